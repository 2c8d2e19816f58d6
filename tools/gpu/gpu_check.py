# ruff: noqa: B023, E501
"""Call 1: is what the project does on CUDA right? A line in $OUT/check.md for every question, as it is answered."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a program that is started by its path

import torch
import torch.distributed as dist

from machinery import attention, processes
from machinery.files import read_jsonl
from machinery.machine import Machine, compile_or_eager, measure_matmul_flops
from model_utils import training_memory
from tools.bench.common import pair_for
from tools.common import lm
from tools.gpu.common import DATA, ROOT, SCRATCH, Report, options, seconds_of


def versions() -> None:
    report.say(f"python {platform.python_version()} {sys.executable}")
    if not DRY and shutil.which("nvidia-smi"):
        asked = "name,memory.total,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True
        )
        report.say(f"{asked}: {done.stdout.strip()}")
    report.say(
        f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {os.cpu_count()} cores,"
        f" {shutil.disk_usage(tempfile.gettempdir()).free / 1e9:.0f} GB free for scratch"
    )


def rates() -> None:
    """Is the rate that `measure_matmul_flops` gives, first thing in a process, that of a card that is awake?"""
    measure = measure_matmul_flops.__wrapped__  # the function itself remembers its first answer
    first, again = measure(machine), measure(machine)
    begun = time.monotonic()
    while time.monotonic() - begun < (0.1 if DRY else 3):
        third = measure(machine)
    peak = machine.peak_flops or float("nan")
    report.say(
        f"matrix rate: first {first / 1e12:.1f}, again {again / 1e12:.1f}, after 3 s {third / 1e12:.1f} TFLOP/s"
        f" ({third / peak:.0%} of the datasheet); the first is {first / third:.0%} of the last"
    )
    size = (1 << 20) if DRY else (1 << 30)
    a, b = torch.empty(2, size, device=DEVICE).normal_()
    seconds = seconds_of(lambda: b.copy_(a), machine, 10)
    report.say(f"copy {8 * size / seconds / 1e9:,.0f} GB/s, read and written")
    report.keep(matmul_tflops=third / 1e12, copy_gb=8 * size / seconds / 1e9)


def attention_choice() -> None:
    """Which kernel does scaled_dot_product_attention take, by itself, for what `day` asks?"""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, k = (torch.randn(2, heads, 256, 128, device=DEVICE, dtype=dtype, requires_grad=True) for heads in (8, 4))
        groups = attention.takes_groups(q)
        if not groups:
            k = k.repeat_interleave(2, 1)
        kernel = attention.kernel_name(q, k, k)
        report.say(f"{str(dtype)[6:]}: takes_groups {groups}, PyTorch's choice in training is {kernel}")


def day_model(dtype="auto", **values):
    config = lm.Config.from_preset("day", **(WIDE | {"device": DEVICE, "dtype": dtype, "micro_batch": 4} | values))
    return config, Machine.find(DEVICE, dtype), lm.build_model(config)


def gradients_of(config, card, model, compiled: bool):
    tokens, targets = pair_for(config, 4, card.device)
    runner = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
    scale = 65536.0 if card.dtype == torch.float16 else 1.0  # where the scaler of a run begins
    with card.autocast():
        loss = runner(tokens, targets)
    (loss * scale).backward()
    grads = {name: p.grad.detach().double().cpu() / scale for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), grads


def distance(one: dict, other: dict) -> tuple[float, float, str]:
    """Of all gradients together, and of the worst matrix: length of the difference over length."""
    total = sum((one[n] - other[n]).square().sum() for n in other) / sum(g.square().sum() for g in other.values())
    each = {n: ((one[n] - g).norm() / g.norm().clamp(min=1e-30)).item() for n, g in other.items()}
    worst = max(each, key=each.get)
    return total.sqrt().item(), each[worst], worst


def numbers() -> None:
    """Gradients: float32 on the CPU is the reference; eager and compiled in three precisions against it."""
    config, _, model = day_model("float32")
    with torch.no_grad():  # weights of a model that has moved on from its beginning
        for p in model.parameters():
            p += 0.02 * p.std() * torch.randn_like(p) if p.ndim > 1 else 0.1 * torch.randn_like(p)
    cpu = Machine.find("cpu", "float32")
    loss, reference = gradients_of(config, cpu, model, False)
    model.to(DEVICE)
    for dtype in ("float32", "bfloat16", "float16"):
        if DRY and DEVICE == "cpu" and dtype == "float16":
            continue
        card = Machine.find(DEVICE, dtype)
        if dtype == "float32":
            torch.set_float32_matmul_precision("highest")  # Machine.find asks for TF32
        for compiled in (False, True):
            found, grads = gradients_of(config, card, model, compiled)
            total, worst, name = distance(grads, reference)
            finite = all(g.isfinite().all() for g in grads.values())
            report.say(
                f"{dtype:8s} {'compiled' if compiled else 'eager':8s} loss off by {found - loss:+.1e},"
                f" gradient by {total:.1e}, worst {worst:.1e} {name}{'' if finite else '  NOT FINITE'}"
            )
    torch.set_float32_matmul_precision("high")


def tests() -> subprocess.Popen:
    """`pytest -m cuda`, beside the rest: by file, since others import what the machine lacks."""
    files = [f"tests/{name}.py" for name in ("test_model", "test_train", "test_data")]
    mark = ["-m", "cuda"] if DEVICE == "cuda" else ["-m", "not long", "-k", "test_machine_on_this_computer"]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *mark, *files]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tests_end(running: subprocess.Popen) -> None:
    try:
        said, _ = running.communicate(timeout=max(1, report.left() - 5))
    except subprocess.TimeoutExpired:
        running.kill()
        said = running.communicate()[0] + "\nstopped: no time left"
    for line in said.strip().splitlines()[-25:]:
        report.say(f"    pytest: {line[:300]}")
    if running.returncode:
        raise RuntimeError(f"pytest returned {running.returncode}")


def tiny(name: str, **values):
    base = {"device": DEVICE, "runs_dir": str(WORK / "runs"), "data_dir": str(WORK / "data"), "run_name": name,
            "max_steps": STEPS, "eval_every": STEPS, "sample_every": STEPS, "checkpoint_every": STEPS // 2, "resume": "auto",
            "lr": 0.01, "tokenizer": "bytes", "n_embd": 128, "n_head": 2, "n_kv_head": 1, "n_ffn": 256,
            "keep_checkpoints": 9, "batch_tokens": 512 if DRY else 2048, "micro_batch": 8}  # fmt: skip
    if DRY:  # little text: the last evaluation reads all that is held out
        base |= {"source": f"{ROOT}/machinery/*.py", "val_fraction": 0.2}
    return lm.Config.from_preset("smoke", **(base | values))


def quiet_train(config) -> tuple[dict, list[dict], str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        summary = lm.train(config)
    lines = read_jsonl(Path(config.runs_dir) / config.run_name / "metrics.jsonl")
    return summary, [line for line in lines if "train_loss" in line], said.getvalue()


def learning(dtype: str, compiled: bool) -> None:
    config = tiny(f"{dtype}-{compiled}", dtype=dtype, compile=compiled)
    summary, lines, said = quiet_train(config)
    losses = [line["train_loss"] for line in lines]
    how = next((line.split(",")[-1].strip() for line in said.splitlines() if line.strip().startswith("device")), "?")
    bad = sum("skipped_window" in line for line in lines)
    report.say(
        f"{dtype} {'compiled' if compiled else 'eager'}: {how}; loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(lines)} steps,"
        f" {bad} skipped, val_bpb {summary['val_bpb']:.3f}, {summary['status']}"
    )
    if not losses[-1] < losses[0] - 0.3:
        raise RuntimeError("the loss did not go down by 0.3")
    if compiled and not how.startswith("compiled"):
        raise RuntimeError(f"not compiled: {how}")


def resume(dtype: str, compiled: bool) -> None:
    """Straight, straight again, and cut off after a checkpoint: how far apart are the losses?"""

    class CutOff(Exception):
        pass

    def losses(name: str) -> list[float]:
        return [line["train_loss"] for line in quiet_train(tiny(name, dtype=dtype, compile=compiled))[1]]

    once, again = losses(f"once-{dtype}-{compiled}"), losses(f"again-{dtype}-{compiled}")

    class CutRun(lm.Run):
        def stepped(self, *arguments, **options) -> None:
            super().stepped(*arguments, **options)
            if self.at.step == STEPS // 2 + 1:  # a checkpoint is there already
                raise CutOff

    with patch.object(lm, "Run", CutRun), contextlib.suppress(CutOff):
        losses(f"cut-{dtype}-{compiled}")
    torch.manual_seed(99)  # a resumed run may not lean on what is in memory
    after = losses(f"cut-{dtype}-{compiled}")
    noise = max(abs(a - b) for a, b in zip(once, again))
    gap = max(abs(a - b) for a, b in zip(once, after))
    first = next((i for i, (a, b) in enumerate(zip(once, after)) if a != b), None)
    report.say(
        f"resume {dtype} {'compiled' if compiled else 'eager'}: two straight runs differ by {noise:.1e}, the resumed one by"
        f" {gap:.1e}{'' if first is None else f', first at step {first + 1}'}; {len(after)} lines"
    )
    if len(after) != len(once) or gap > 10 * noise + 0.02:
        raise RuntimeError("the resumed run is another run")


def deterministic() -> None:
    """Are two compiled steps the same, bit for bit, as they come and with deterministic algorithms?"""
    for asked in (False, True):
        torch.use_deterministic_algorithms(asked, warn_only=True)
        torch.compiler.reset()
        config, card, model = day_model(**({} if DRY else {"n_layer": 2}))
        model.to(DEVICE)
        (_, one), (_, other) = (gradients_of(config, card, model, True) for _ in range(2))
        same = sum(torch.equal(one[n], other[n]) for n in one)
        report.say(f"deterministic algorithms {asked}: {same} of {len(one)} gradients are the same twice")
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()


def memory(compiled: bool, micro_batch: int) -> None:
    """Peak of two micro-steps and an optimizer step, against the preflight's sum."""
    values = {"micro_batch": micro_batch, "compile": compiled}
    config, card, model = day_model(**(values | ({"batch_tokens": 64 * 64} if DRY else {})))
    gc.collect()
    machine.release_memory()
    before = machine.used_memory()
    model.to(DEVICE)
    optimizers, scaler = lm.build_optimizers(model, config, card), card.scaler()
    predicted = sum(training_memory(model, optimizers, config, micro_batch, card.dtype).values())
    pair = pair_for(config, micro_batch, DEVICE)
    runner, note = compile_or_eager(model, *pair, card) if compiled else (model, "eager")

    machine.forget_peak()
    for _ in range(2):
        lm.gradient(runner, SimpleNamespace(next=lambda: pair), 2, card, scaler)
        lm.step_weights(model, optimizers, scaler, 1.0, config.grad_clip)
    taken = machine.peak_memory() - before
    report.say(
        f"memory, {config.n_layer} blocks, micro-batch {micro_batch}, {note}: predicted {predicted / 1e9:.2f} GB,"
        f" taken {taken / 1e9:.2f} GB, ratio {taken / predicted:.2f}"
    )


def out_of_memory() -> None:
    """A run that asks for more than there is: does it halve the micro-batch and go on?"""
    if DEVICE == "cpu":
        return
    torch.compiler.reset()
    gc.collect()  # what earlier parts left counts too
    torch.cuda.empty_cache()
    share = 3e9 / machine.memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        config = tiny("oom", n_embd=256, n_ffn=1024, n_head=4, n_layer=8, block_size=512, batch_tokens=256 * 512, micro_batch=256,
                      max_steps=2, dtype="bfloat16", checkpoint_every=99)  # fmt: skip
        _, lines, said = quiet_train(config)
        halved = [line for line in said.splitlines() if "out of memory; on with" in line]
        report.say(f"out of memory: {len(lines)} steps; {halved[-1] if halved else 'it never happened'}")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def generation() -> None:
    """Greedy with the cache against the whole forward pass, and tokens per second at the size of `day`."""
    config, card, model = day_model("float32", **({} if DRY else {"n_layer": 16}))
    model.to(DEVICE).eval()
    torch.set_float32_matmul_precision("highest")
    start = torch.randint(config.vocab_size, (2, 8), device=DEVICE)
    written = lm.generate(model, start, 16, temperature=0)
    with torch.no_grad():
        again = model(written[:, :-1]).argmax(-1)[:, 7:]
    same = (again == written[:, 8:]).float().mean().item()
    torch.set_float32_matmul_precision("high")
    report.say(f"generation, float32: {same:.0%} of greedy tokens as without the cache")
    card, new = Machine.find(DEVICE), 16 if DRY else 96
    # `fused_attention` leaves cuDNN out in decoding and scoring, since it plans each length anew: was that right?
    kernels = {"without cuDNN, as it is": attention.WITHOUT_CUDNN, "PyTorch's own choice": attention.ANY}
    whole = {}
    for name, attention.WITHOUT_CUDNN in kernels.items():
        with card.autocast(decoding=True):
            rates = []
            for _ in range(2):
                machine.synchronize()
                begun = time.perf_counter()
                lm.generate(model, start[:1], new, temperature=0)
                machine.synchronize()
                rates.append(new / (time.perf_counter() - begun))
            cache, tokens = lm.Cache(new), written[:1, :1].repeat(1, new)
            tokens[0] = torch.randint(config.vocab_size, (new,), generator=torch.Generator().manual_seed(3))
            with torch.no_grad():
                one = torch.cat([model(token, cache=cache) for token in tokens.split(1, dim=1)], dim=1).float()
                whole[name] = model(tokens).float()
        gap = ((one - whole[name]).norm() / whole[name].norm()).item()
        begun = time.perf_counter()
        with torch.no_grad(), card.autocast():
            for length in range(20, 60, 2):  # as the scores of section 6 come: every batch has a length of its own
                model(start[:1].repeat(8, 8)[:, :length])
        machine.synchronize()
        scoring = (time.perf_counter() - begun) / 20
        report.say(
            f"generation, {str(card.dtype)[6:]}, {name}: {rates[0]:.0f} tokens/s the first time, {rates[1]:.0f} the second;"
            f" with the cache and without it logits differ by {gap:.1e}; a batch of another length takes {scoring * 1e3:.1f} ms"
        )
    attention.WITHOUT_CUDNN, (ours, theirs) = next(iter(kernels.values())), whole.values()
    report.say(f"generation: the two kernels' logits differ by {((ours - theirs).norm() / ours.norm()).item():.1e}")


def parallel(kind: str, dtype: str, limit: float) -> None:
    """DDP, and FSDP2 with Muon, each compiled, in a group of this one process: gradients of an accumulation, a step.

    FSDP rounds more than one process does in bfloat16, gains too: there the step may differ, and in float32 not.
    """
    small = {} if DRY else {"n_layer": 2}
    config, card, model = day_model(dtype, **small)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rows = torch.randint(config.vocab_size, (2, 4, config.block_size + 1), device=DEVICE)
    pairs = [(part[:, :-1].clone(), part[:, 1:].clone()) for part in rows]
    if not dist.is_initialized():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo", rank=0, world_size=1)
    found = []
    for spread_out in (False, True):
        torch.compiler.reset()
        _, _, model = day_model(dtype, **small)
        model.load_state_dict(state)
        if not spread_out:
            runner = model.to(DEVICE)
        elif kind == "ddp":
            runner = processes.parallelize(model, card.device, card.dtype, 2, "ddp")
        else:
            mesh = processes.init_device_mesh(card.device.type, (1,))
            with patch.object(processes, "init_device_mesh", lambda *_: mesh):
                runner = processes.parallelize(model, card.device, card.dtype, 2, "fsdp")
        optimizers, scaler = lm.build_optimizers(model, config, card), card.scaler()
        runner, note = compile_or_eager(runner, *pairs[0], card)
        if any(p.grad is not None for o in optimizers for g in o.param_groups for p in g["params"]):
            report.say(f"{kind}: compile_or_eager leaves gradients behind (model.zero_grad misses the shared-out root)")
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = lm.gradient(runner, SimpleNamespace(next=iter(pairs).__next__), 2, card, scaler).item()
        norm = lm.step_weights(model, optimizers, scaler, 1.0, config.grad_clip)
        weights = {
            n: processes.gather(p.detach()).double().cpu() - state[n].double().cpu()
            for n, p in model.named_parameters()
        }
        found.append((loss, norm, weights, note))
        runner = model = optimizers = None
    (loss, norm, moved, _), (loss2, norm2, moved2, note) = found
    total, worst, name = distance(moved2, moved)
    report.say(
        f"{kind} {dtype}, {note}: loss off by {loss2 - loss:+.1e}, gradient norm {norm2 / norm - 1:+.1e}, the step by {total:.1e},"
        f" worst {worst:.1e} {name}"
    )
    if not total < limit:
        raise RuntimeError("another step than alone")


def begin_data() -> None:
    """Tokens for gpu_day.py, made gently by a process that outlives this one."""
    if DRY or DEVICE == "cpu":
        return
    DATA.mkdir(parents=True, exist_ok=True)
    program = (
        "from data_utils import prepare_data; from tools.common import lm;"
        f"prepare_data(lm.Config.from_preset('day', source='python+site', data_dir='{DATA}', device='cpu'))"
        ".wait(shards=10**6)"
    )
    with (SCRATCH / "data.log").open("w") as log:
        subprocess.Popen(
            ["nice", "-n", "19", sys.executable, "-c", program], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip


def main() -> None:
    global report, machine, DRY, DEVICE, WORK, WIDE, STEPS
    chosen = options(__doc__, 460)
    report = Report("check", chosen.seconds, chosen.only)
    DRY, DEVICE = chosen.dry, chosen.device
    STEPS = 16 if DRY else 60
    WORK = Path(tempfile.mkdtemp(prefix="lmh-check-"))
    WIDE = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "n_ffn": 128, "block_size": 64, "vocab_size": 512,
            "batch_tokens": 512} if DRY else {"n_layer": 4, "batch_tokens": 524288}  # fmt: skip
    report.part("versions", versions)
    machine = Machine.find(DEVICE)
    report.say(f"machine {machine}")
    report.keep(machine=str(machine))
    report.part("data", begin_data)
    report.part("rates", rates)
    running = tests() if not report.only or "pytest" in report.only else None
    report.part("attention", attention_choice)
    report.part("numbers", numbers, 60)
    for dtype, compiled in (("bfloat16", True), ("float32", False), ("float16", True)):
        if dtype == "float16" and DEVICE == "cpu":
            continue
        report.part(f"learning {dtype}", learning, 30, dtype, compiled)
    report.part("resume eager", resume, 30, "bfloat16", False)
    report.part("memory compiled", memory, 40, True, 4 if DRY else 16)
    report.part("memory eager", memory, 20, False, 4 if DRY else 8)
    report.part("oom", out_of_memory, 20)
    report.part("generation", generation, 20)
    report.part("parallel ddp", parallel, 50, "ddp", "auto", 0.1)
    report.part("parallel fsdp", parallel, 50, "fsdp", "float32", 0.02)
    report.part("parallel fsdp in 16 bits", parallel, 50, "fsdp", "auto", 0.3)
    report.part("resume compiled", resume, 45, "bfloat16", True)
    report.part("deterministic", deterministic, 40)
    if running:
        report.part("pytest", tests_end, 0, running)
    report.say(f"{report.failed} failed; {report.left():.0f} s left")
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
