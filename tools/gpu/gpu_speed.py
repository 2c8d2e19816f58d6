# ruff: noqa: B023, E501, E731, F821
"""Call 2: how fast is a step of `day`, where does its time go, and what would make it faster? $OUT/speed.md, .json."""

from __future__ import annotations

import contextlib
import gc
import importlib
import re
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a program that is started by its path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity

from machinery.errors import first_line
from machinery.machine import Machine, compile_or_eager, measure_matmul_flops, time_per_call
from model_utils import LinearCrossEntropy, flops_per_token, training_memory
from tools.bench.common import pair_for
from tools.bench.peers import make_config
from tools.bench.steps import OURS, build
from tools.bench.traffic import OneProduct, OneProductFFN
from tools.common import lm
from tools.gpu.common import OUT, Report, options, seconds_of


def day(**values):
    return lm.Config.from_preset("day", **({"batch_tokens": 524288} | SMALL | {"device": DEVICE} | values))


def clean() -> None:
    gc.collect()
    machine.release_memory()


# ------------------------------------------------------------------------------------------------ ceilings


def matrices() -> None:
    """The products of a micro-batch alone: what a step cannot go below, and which shapes are slow."""
    config = day()
    M, C, H, V = BIG * config.block_size, config.n_embd, config.n_ffn, config.vocab_size
    kv = config.n_kv_head * config.head_size
    names = {"q, o": (C, C, 2), "k, v": (C, kv, 2), "gate, up": (C, H, 2), "down": (H, C, 1), "qkv in one": (C, C + 2 * kv, 0),
             "gate and up in one": (C, 2 * H, 0), "head, a quarter of the rows": (C, V, -1)}  # fmt: skip
    total, floor = 0.0, 0.0
    for name, (inside, outside, times) in names.items():
        rows = M // 4 if times < 0 else M
        x = torch.randn(rows, inside, device=DEVICE, dtype=machine.dtype)
        w = torch.randn(outside, inside, device=DEVICE, dtype=machine.dtype)
        y = torch.randn(rows, outside, device=DEVICE, dtype=machine.dtype)
        flops = 2 * rows * inside * outside
        found = [seconds_of(call, machine, 7, 3) for call in (lambda: x @ w.mT, lambda: y @ w, lambda: y.mT @ x)]
        report.say(
            f"{name:28s} {rows} × {inside} × {outside}: forward {flops / found[0] / 1e12:6.1f}, to x {flops / found[1] / 1e12:6.1f},"
            f" to the weight {flops / found[2] / 1e12:6.1f} TFLOP/s"
        )
        times = 4 / config.n_layer if times < 0 else times
        total += config.n_layer * times * sum(found)
        floor += config.n_layer * times * 3 * flops
        del x, w, y
    report.say(
        f"all products of a micro-batch of {BIG}: {total * 1e3:.1f} ms, {floor / total / 1e12:.0f} TFLOP/s, {floor / total / PEAK:.0%}"
    )
    report.keep(matmul_ms_per_micro_batch=total * 1e3, matmul_rate=floor / total)
    with contextlib.suppress(Exception):  # 8-bit head: the products alone
        rows = M // 4
        a = torch.randn(rows, C, device=DEVICE).to(torch.float8_e4m3fn)
        b = torch.randn(V, C, device=DEVICE).to(torch.float8_e4m3fn)
        one = torch.ones((), device=DEVICE)
        seconds = seconds_of(lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16), machine, 7, 3)
        report.say(f"head in float8, forward: {2 * rows * C * V / seconds / 1e12:.0f} TFLOP/s")


def attention() -> None:
    """Forward and backward of one layer's attention, by kernel."""
    config = day()
    T, D = config.block_size, config.head_size
    make = lambda heads: (
        torch.randn(BIG, T, heads, D, device=DEVICE, dtype=machine.dtype).transpose(1, 2).requires_grad_()
    )
    q, k, v = make(config.n_head), make(config.n_kv_head), make(config.n_kv_head)
    out = torch.randn(BIG, T, config.n_head, D, device=DEVICE, dtype=machine.dtype).transpose(1, 2)
    flops = 4 * BIG * T * T * config.n_embd / 2  # forward; the causal half is not computed
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                with torch.no_grad():
                    forward = seconds_of(call, machine, 7, 3)
                both = seconds_of(lambda: torch.autograd.grad(call(), (q, k, v), out), machine, 7, 3)
            report.say(
                f"attention {backend.name}: forward {forward * 1e3:.2f} ms ({flops / forward / 1e12:.0f} TFLOP/s),"
                f" both {both * 1e3:.2f} ms ({3.5 * flops / both / 1e12:.0f} TFLOP/s), {config.n_layer} layers"
                f" {config.n_layer * both * 1e3:.1f} ms"
            )
            report.keep(**{f"attention_ms_{backend.name}": config.n_layer * both * 1e3})
        except RuntimeError as error:
            report.say(f"attention {backend.name}: {first_line(error)}")


# ---------------------------------------------------------------------------------------- a step of `day`


def step_of_day(batch: int, profiled: bool) -> None:
    """Compile, time a micro-step, the weights' step and the whole; memory against the preflight; the profile."""
    clean()
    torch.compiler.reset()
    config = day(micro_batch=batch)
    before = machine.used_memory()
    machine.forget_peak()
    model = lm.build_model(config).to(DEVICE)
    optimizers, scaler = lm.build_optimizers(model, config, machine), machine.scaler()
    flops = flops_per_token(model, config)
    predicted = sum(training_memory(model, optimizers, config, batch, machine.dtype).values())
    pair = pair_for(config, batch, DEVICE)
    runner, note = compile_or_eager(model, *pair, machine)
    report.say(f"micro-batch {batch}: {note}")
    data = SimpleNamespace(next=lambda: pair)  # batches that are there already: what is timed is the step
    micro_steps = config.batch_tokens // config.block_size // batch

    def micro() -> None:
        lm.gradient(runner, data, 1, machine, scaler)

    seconds = seconds_of(micro, machine, 5 if DRY else 8, 3)

    def weights() -> None:  # gradients stay: they are wanted again
        kept = [(p, p.grad) for p in model.parameters()]
        lm.step_weights(model, optimizers, scaler, 1e-6, config.grad_clip)
        for p, g in kept:
            p.grad = g

    optimizer_seconds = seconds_of(weights, machine, 5, 2)
    begun, steps = [], 2 if batch == SIZES[0] else 1
    for _ in range(steps + 1):
        machine.synchronize()
        begun.append(time.perf_counter())
        lm.gradient(runner, data, micro_steps, machine, scaler)
        lm.step_weights(model, optimizers, scaler, 1e-6, config.grad_clip)
    machine.synchronize()
    begun.append(time.perf_counter())
    whole = statistics.median(b - a for a, b in zip(begun[1:], begun[2:]))
    rate = config.batch_tokens / whole
    taken = machine.peak_memory() - before
    report.say(
        f"micro-batch {batch}: {rate:,.0f} tokens/s, MFU {rate * flops / PEAK:.1%}; step {whole * 1e3:.0f} ms ="
        f" {micro_steps} × {seconds * 1e3:.1f} + weights {optimizer_seconds * 1e3:.1f} + rest"
        f" {(whole - micro_steps * seconds - optimizer_seconds) * 1e3:.1f} ms"
    )
    report.say(
        f"micro-batch {batch}: memory predicted {predicted / 1e9:.2f} GB, taken {taken / 1e9:.2f}, ratio {taken / predicted:.2f}"
    )
    report.keep(
        **{f"tokens_per_second_{batch}": rate, f"mfu_{batch}": rate * flops / PEAK, f"peak_gb_{batch}": taken / 1e9}
    )
    with torch.no_grad(), machine.autocast():
        evaluation = seconds_of(lambda: runner(*pair), machine, 3, 1)
    report.say(
        f"micro-batch {batch}: forward alone {evaluation * 1e3:.1f} ms, {evaluation / seconds:.0%} of forward and backward"
    )
    if profiled:
        report.part("profile", profile, 10, micro, weights, micro_steps)


KINDS = [
    ("attention", r"flash|fmha|cudnn.*(sdpa|attn)|sdpa|attention"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|splitK|ampere_|sm90_|sm89_|sm80_"),
    ("loss, besides products", r"softmax"),
    ("casts of weights and gradients", r"triton_poi_fused__to_copy(_t)?_\d+$"),
    ("copies", r"memcpy|memset|copy_kernel|CatArray"),
    ("other compiled", r"^triton"),
]


def profile(micro, weights, micro_steps: int) -> None:
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    found = {}
    for name, call, times in (("micro-step", micro, 2), ("weights", weights, 1)):
        with torch.profiler.profile(activities=kinds) as seen:
            for _ in range(times):
                call()
            machine.synchronize()
        rows = []
        for event in seen.key_averages():
            on_device = getattr(event, "self_device_time_total", 0) or getattr(event, "self_cuda_time_total", 0)
            # A kernel, and no "Optimizer.step#…", which stands on the device's line too with the time of all of its own
            is_kernel = str(getattr(event, "device_type", "")).endswith("CUDA") and not event.is_user_annotation
            spent = on_device if DEVICE == "cuda" and is_kernel else event.self_cpu_time_total if DEVICE == "cpu" else 0
            if spent:
                rows.append((spent / 1e3 / times, event.count / times, event.key))
        rows.sort(reverse=True)
        found[name] = rows
        total = sum(row[0] for row in rows)
        report.say(f"{name}: {total:.2f} ms in {sum(row[1] for row in rows):.0f} kernels of {len(rows)} kinds")
        shares: dict[str, float] = {}
        for spent, _, key in rows:
            kind = next((kind for kind, words in KINDS if re.search(words, key, re.IGNORECASE)), "other")
            shares[kind] = shares.get(kind, 0.0) + spent
        report.say(
            "    "
            + ", ".join(
                f"{kind} {spent:.2f} ms ({spent / total:.0%})"
                for kind, spent in sorted(shares.items(), key=lambda s: -s[1])
            )
        )
        report.keep(**{f"profile_{name}": {kind: round(spent, 3) for kind, spent in shares.items()}})
        for spent, count, key in rows[:25]:
            report.say(f"    {spent:8.3f} ms {spent / total:5.1%} {count:6.0f} × {key[:110]}")
    step = micro_steps * sum(row[0] for row in found["micro-step"]) + sum(row[0] for row in found["weights"])
    report.say(f"kernels of a step: {step:.0f} ms; the rest of its time the device waits")


# ----------------------------------------------------------------------------------------------- the loss


LOSSES = [  # of other libraries
    ("Liger", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    ("cut cross-entropy", "cut_cross_entropy", "linear_cross_entropy"),
]


def losses() -> None:
    """Forward and backward from the last norm on, of a whole micro-batch: time and memory."""
    config = day()
    rows, C, V = BIG * config.block_size, config.n_embd, config.vocab_size
    x = torch.randn(rows, C, device=DEVICE, requires_grad=True)
    table = (torch.randn(V, C, device=DEVICE) * 0.01).requires_grad_()
    targets = torch.randint(V, (rows,), device=DEVICE)

    def with_rows(parts: int):
        return lambda: LinearCrossEntropy.apply(x, table, targets, max(1, rows // parts), True)

    def plain():
        return F.cross_entropy(F.linear(x, table).float(), targets)

    calls = {"ours, 4 parts": (with_rows(4), True), "ours, 4 parts, eager": (with_rows(4), False), "ours, 8 parts": (with_rows(8), True),
             "ours, 16 parts": (with_rows(16), True), "F.cross_entropy(F.linear)": (plain, True)}  # fmt: skip
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        parts = torch.nn.LinearCrossEntropyOptions()  # without, it makes all logits at once
        calls["F.linear_cross_entropy"] = (
            lambda: F.linear_cross_entropy(x.to(machine.dtype), table.to(machine.dtype), targets, options=parts),
            True,
        )
    for name, module, function in LOSSES:
        with contextlib.suppress(Exception):  # where it is not installed
            theirs = getattr(importlib.import_module(module), function)
            calls[name] = (lambda f=theirs: f(x.to(machine.dtype), table.to(machine.dtype), targets)), False
    flops = 6 * rows * C * V

    def measure(name: str, call, compiled: bool) -> None:
        clean()
        torch.compiler.reset()
        run = torch.compile(call, dynamic=False) if compiled else call

        def both():
            with machine.autocast():
                loss = run()
            return torch.autograd.grad(loss, (x, table))

        both()
        machine.forget_peak()
        before = machine.used_memory()
        seconds = seconds_of(both, machine, 5, 1)
        report.say(
            f"loss {name:26s} {seconds * 1e3:8.2f} ms, {flops / seconds / 1e12:6.1f} TFLOP/s of its products,"
            f" {(machine.peak_memory() - before) / 1e9:.2f} GB"
        )
        report.keep(**{f"loss_ms {name}": seconds * 1e3})

    for name, (call, compiled) in calls.items():
        report.part(f"losses {name}", measure, 15, name, call, compiled)


# ---------------------------------------------------------------------------------------------- the weights


def optimizers() -> None:
    """A step of Muon and AdamW on `day`: as it is, in float32, compiled, and PyTorch's."""
    clean()
    config = day()
    model = lm.build_model(config).to(DEVICE)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    muon, *rest = lm.build_optimizers(model, config, machine)
    shapes = {p.shape: sum(q.shape == p.shape for q in matrices) for p in matrices}
    flops = sum(n * 5 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s, n in shapes.items())

    def say(name: str, seconds: float, extra: str = "") -> None:
        report.say(f"weights: {name:40s} {seconds * 1e3:8.2f} ms{extra}")
        report.keep(**{f"weights_ms {name}": seconds * 1e3})

    seconds = time_per_call(muon.step, machine)
    say("Muon, bfloat16", seconds, f", {flops / seconds / 1e12:.0f} TFLOP/s of its iterations")
    say("AdamW for the rest, fused", time_per_call(lambda: [adamw.step() for adamw in rest], machine))
    say(
        "clip_grad_norm_ and its number",
        time_per_call(lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0).item(), machine),
    )
    slow = lm.Muon([{"params": matrices}], 0.02, 0.1, torch.float32)
    say("Muon, float32 (TF32)", time_per_call(slow.step, machine, 3))
    with patch.object(lm, "orthogonalise", torch.compile(lm.orthogonalise, dynamic=False)):
        say("Muon, the iteration compiled", time_per_call(muon.step, machine))
    theirs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    say("torch.optim.Muon", time_per_call(theirs.step, machine, 3))
    alone = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    say("AdamW for all, fused", time_per_call(alone.step, machine))


# ------------------------------------------------------------------------------------------ other libraries


def peers() -> None:
    """The project's own contenders (tools/bench/steps.py) at one micro-batch, AdamW in all, without QK-norm."""
    names = [OURS, "transformers, as shipped", "transformers, compiled, fused AdamW"]
    batch = 2 if DRY else 16
    config = make_config("tiny" if DRY else "day", device=DEVICE, micro_batch=batch)
    rates = {}

    def measure(name: str) -> None:
        clean()
        torch.compiler.reset()
        machine.forget_peak()
        before = machine.used_memory()
        model, step = build(name, config, machine)
        begun = time.monotonic()
        step()
        machine.synchronize()
        first = time.monotonic() - begun
        rates[name] = batch * config.block_size / seconds_of(step, machine, 8, 2)
        report.say(
            f"{name}: {rates[name]:,.0f} tokens/s with a step of the weights for every {batch} sequences, MFU"
            f" {rates[name] * flops_per_token(model, config) / PEAK:.1%}, {(machine.peak_memory() - before) / 1e9:.2f} GB,"
            f" first step {first:.0f} s; ours is {rates[OURS] / rates[name]:.2f} ×"
        )
        report.keep(**{f"peer {name}": rates[name]})

    for name in names:
        report.part(f"peers {name}", measure, 45, name)


def qwen3() -> None:
    """`transformers` Qwen3, which `day` is, compiled, with fused AdamW: the same shapes with QK-norm."""
    config = day(micro_batch=2 if DRY else 16)
    torch.compiler.reset()
    model, step = build("transformers, compiled, fused AdamW", config, machine)
    rate = config.micro_batch * config.block_size / seconds_of(step, machine, 8, 3)
    mfu = rate * flops_per_token(model, config) / PEAK
    report.say(f"{type(model.model).__name__}, compiled, fused AdamW: {rate:,.0f} tokens/s, MFU {mfu:.1%}")
    report.keep(peer_qwen3=rate)


# ------------------------------------------------------------------------------- what might make it faster


NO_GRAPHS = "max-autotune-no-cudagraphs"
VARIANTS = {  # fields, options of torch.compile, seconds to compile
    "as it is": ({}, {}, 25),
    "residual stream in float32": ({}, {"wide": True}, 25),
    "one product for q, k, v": ({"attention": "one"}, {}, 25),
    "one for gate and up": ({"ffn": "one"}, {}, 25),
    "no QK-norm": ({"qk_norm": False}, {}, 25),
    "FlashAttention 2": ({}, {"flash": True}, 25),
    "weights in 16 bits, no autocast": ({}, {"half": True}, 25),
    "coordinate descent": ({}, {"options": {"coordinate_descent_tuning": True}}, 45),
    "as it is, again": ({}, {}, 15),  # what differs from the first is noise
    "CUDA graphs": ({}, {"mode": "reduce-overhead"}, 30),
    "max-autotune": ({}, {"mode": NO_GRAPHS}, 120),
}


def candidates() -> None:
    """One change at a time on four blocks; what a change of a block saves, `day` saves four times."""
    layers = 2 if DRY else 4
    found: dict[str, float] = {}  # seconds

    def measure(name: str, fields: dict, how: dict) -> None:
        flash, half, wide = (how.pop(name, False) for name in ("flash", "half", "wide"))
        clean()
        torch.compiler.reset()
        config = day(n_layer=layers, micro_batch=BIG, **fields)
        model = lm.build_model(config).to(DEVICE)
        if half:
            model.to(machine.dtype)
        if wide:
            model.blocks[0].register_forward_pre_hook(lambda block, inputs: (inputs[0].float(), *inputs[1:]))
        for p in model.parameters():  # as in all micro-steps but the first, gradients are added to what is there
            p.grad = torch.zeros_like(p)
        pair = pair_for(config, BIG, DEVICE)
        kernels = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else contextlib.nullcontext()
        begun = time.monotonic()
        runner = torch.compile(model, dynamic=False, **how)

        def micro() -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            with contextlib.nullcontext() if half else machine.autocast():
                loss = runner(*pair)
            loss.backward()
            return loss.detach().clone()

        machine.forget_peak()
        with kernels:
            loss = micro().item()
            micro()
            machine.synchronize()
            took = time.monotonic() - begun
            found[name] = seconds = seconds_of(micro, machine, 10, 2)
        base = next(iter(found.values()))
        saved = (base - seconds) * lm.Config.n_layer / layers
        report.say(
            f"variant {name:36s} {seconds * 1e3:8.2f} ms ({seconds / base - 1:+.1%}); of a whole micro-step about"
            f" {saved * 1e3:+.1f} ms; {machine.peak_memory() / 1e9:.1f} GB; loss {loss:.4f}; compiled in {took:.0f} s"
        )
        report.keep(**{f"variant_ms {name}": seconds * 1e3})

    for name, (fields, how, needs) in VARIANTS.items():
        report.part(f"variants {name}", measure, needs + 8, name, fields, dict(how))


def main() -> None:
    global report, DRY, DEVICE, machine, PEAK, SMALL, BIG, SIZES
    chosen = options(__doc__, 540)
    report = Report("speed", chosen.seconds, chosen.only)
    DRY, DEVICE = chosen.dry, chosen.device
    machine = Machine.find(DEVICE)
    PEAK = machine.peak_flops or float("nan")
    SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "n_ffn": 128, "block_size": 64, "vocab_size": 512,
             "batch_tokens": 1024} if DRY else {}  # fmt: skip
    BIG = 4 if DRY else 64 if machine.memory > 60e9 else 16  # sequences at a time
    SIZES = (4, 2) if DRY else (64, 32, 16) if machine.memory > 60e9 else (16, 8)
    lm.ATTENTIONS.update(one=OneProduct)
    lm.FFNS.update(one=OneProductFFN)
    report.say(f"{machine.name}, torch {torch.__version__}, {machine.memory / 1e9:.0f} GB, {machine.dtype}")
    report.keep(device=machine.name, torch=torch.__version__)
    rate = measure_matmul_flops(machine)
    report.say(f"matrix rate {rate / 1e12:.1f} TFLOP/s, {rate / PEAK:.0%} of the datasheet")
    report.part("matrices", matrices, 15)
    report.part("attention", attention, 10)
    report.part("step", step_of_day, 60, SIZES[0], True)
    report.part("losses", losses, 30)
    report.part("optimizers", optimizers, 20)
    report.part("peers", peers, 60)
    for size in SIZES[1:]:
        report.part(f"step-{size}", step_of_day, 60, size, False)
    report.part("variants", candidates, 60)
    report.part("qwen3", qwen3, 60)
    report.say(f"{report.failed} failed; {report.left():.0f} s left; numbers in {OUT / 'speed.json'}")


if __name__ == "__main__":
    main()
