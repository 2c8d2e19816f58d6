"""Several processes, started by torchrun on this machine: the same run as one gives, whoever is lost."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from data_utils import Batches
from machinery.checkpoints import newest_checkpoint, read_state
from machinery.errors import UserError
from machinery.files import read_json, read_jsonl
from machinery.machine import Machine
from tools import execute

PROGRAM = """
import json, os, sys
import torch
from machinery import notebook

torch.set_num_threads(1)
lm = notebook.load_definitions()

class Drawing(lm.GatedFFN):  # as a dropout does; what it draws is noted with the seed, and changes nothing
    def __init__(self, config):
        super().__init__(config)
        self.path = f"{config.runs_dir}/{config.run_name}.draws{os.environ['RANK']}"

    def forward(self, x):
        if self.training:
            with open(self.path, "a") as file:
                print(json.dumps([torch.initial_seed(), torch.rand(()).item()]), file=file)
        return super().forward(x)

lm.FFNS["drawing"] = Drawing
for values in json.loads(sys.argv[1]):
    lm.train(lm.Config.from_dict(values))
"""

KEEP_MODEL = """
build, models = lm.build_model, []
lm.train.__globals__["build_model"] = lambda config: models.append(build(config)) or models[-1]
"""
COMPARE_MODELS = """
weights = torch.cat([p.detach().flatten() for p in models[-1].parameters()])
copies = [torch.empty_like(weights) for _ in range(2)]
torch.distributed.all_gather(copies, weights)
print("largest difference", (copies[0] - copies[1]).abs().max().item())
"""


def torchrun(processes, *program, **options):
    """Start `program` in so many processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def printed_by(processes, source, folder, *arguments):
    """What a program prints in so many processes, which end well."""
    (folder / "program.py").write_text(source)
    job = torchrun(processes, str(folder / "program.py"), *arguments)
    printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed[-3000:]
    return printed


def train_together(processes, configs, folder, source=PROGRAM):
    """Run `configs` one after the other in so many processes; returns what was printed."""
    return printed_by(processes, source, folder, json.dumps([config.to_dict() for config in configs]))


def losses(config):
    """Of every step, and of every evaluation."""
    lines = read_jsonl(Path(config.runs_dir) / config.run_name / "metrics.jsonl")
    return [[line[name] for line in lines if name in line] for name in ("train_loss", "val_loss")]


@pytest.fixture
def settings(texts, tmp_path, tiny):
    """settings(**overrides): 50 steps of 8 sequences on a small folder of text, everything in 32 bits."""
    folder = {"source": texts[0], "data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs")}

    def make(**overrides):
        values = {"batch_tokens": 128, "micro_batch": 1, "max_steps": 50, "eval_every": 25, "sample_every": 50}
        values |= {"checkpoint_every": 25, "keep_checkpoints": 9, "dtype": "float32", "val_fraction": 0.05}
        return tiny(**folder | values | overrides)

    return make


STEADY = {"schedule": "constant", "warmup": 0.0, "decay": 0.0}  # so that a longer budget is the same run
KINDS = {"muon": {"optimizer": "muon"}, "adamw": {"optimizer": "adamw", "lr": 0.001}}


def check_losses(lm, together):
    """The losses and final weights of `together` are those of one process, which is run now."""
    for config in together:
        alone = replace(config, run_name=f"alone-{config.optimizer}")
        if not (Path(alone.runs_dir) / alone.run_name).exists():
            lm.train(alone)
        for ours, expected in zip(losses(config), losses(alone)):
            assert len(ours) == len(expected) > 1 and ours == pytest.approx(expected, rel=1e-5)
        summary = read_json(Path(config.runs_dir) / config.run_name / "summary.json")
        assert summary["status"] == "finished" and summary["tokens"] == config.max_steps * config.batch_tokens
        _, model, _ = lm.load_run(Path(config.runs_dir) / config.run_name)
        _, reference, _ = lm.load_run(Path(alone.runs_dir) / alone.run_name)
        for (name, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values()):
            assert (ours - theirs).abs().max() < 1e-4, name


def draws(runs, name, rank):
    """What the layers of a run drew in one process, by the seed of the step; before the first step it is that of 0."""
    found = {}
    for line in (runs / f"{name}.draws{rank}").read_text().splitlines():
        seed, number = json.loads(line)
        found.setdefault(seed, []).append(number)
    found.pop(0)
    return found


def test_two_processes_train_the_run_of_one(lm, settings, tmp_path, monkeypatch):
    """Copies of the model, and shares of it; four micro-batches each; stopped halfway and resumed, bit for bit, with
    the same random numbers, which are others in each process and step.
    """
    monkeypatch.setitem(lm.FFNS, "drawing", lm.GatedFFN)
    short = STEADY | {"max_steps": 8, "eval_every": 4, "sample_every": 8}
    copies = settings(run_name="ddp", parallel="ddp", **short | KINDS["muon"])
    shares = settings(run_name="fsdp", parallel="fsdp", ffn="drawing", **short | KINDS["adamw"])
    halves = [replace(shares, run_name="halves", max_steps=steps) for steps in (4, 8)]
    hours = settings(run_name="hours", parallel="ddp", max_steps=0, max_hours=4 / 3600, eval_every=10**6)
    program = PROGRAM.replace("for values", KEEP_MODEL + "for values") + COMPARE_MODELS
    printed = train_together(2, [copies, shares, *halves, hours], tmp_path, program)
    assert "largest difference 0.0" in printed, printed[-3000:]  # in hours, the clock sets the rate: one for all
    assert printed.count("fsdp from step 0") == 1  # one process speaks
    check_losses(lm, [copies, shares])
    straight, resumed = (newest_checkpoint(tmp_path / "runs" / name) for name in ("fsdp", "halves"))
    assert read_state(straight)["files"] == read_state(resumed)["files"]
    drawn = [draws(tmp_path / "runs", "fsdp", rank) for rank in (0, 1)]
    assert drawn == [draws(tmp_path / "runs", "halves", rank) for rank in (0, 1)]
    numbers = [number for process in drawn for step in process.values() for number in step]
    assert len(drawn[0]) == len(drawn[1]) == 8 and len({*numbers}) == len(numbers) == 2 * 8 * 4 * shares.n_layer


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_fifty_steps_have_the_losses_of_one_process(lm, settings, tmp_path, processes):
    together = [
        settings(run_name=f"{name}-{way}", parallel=way, **kind)
        for name, kind in KINDS.items()
        for way in ("ddp", "fsdp")
    ]
    train_together(processes, together, tmp_path)
    check_losses(lm, together)


@pytest.mark.long
def test_compiled_processes_train_the_run_of_one(lm, settings, tmp_path):
    short = STEADY | {"max_steps": 8, "eval_every": 4, "sample_every": 8, "compile": True}
    together = [settings(run_name=way, parallel=way, **short | KINDS["muon"]) for way in ("ddp", "fsdp")]
    assert train_together(2, together, tmp_path).count("compiled in") == 2
    check_losses(lm, together)


@pytest.mark.long
def test_fsdp_in_bfloat16_has_the_losses_of_one_process_within_its_precision(lm, settings, tmp_path):
    """Weights are gathered in 16 bits and gradients added in 32: checkpoints and weights stay in 32."""
    short = STEADY | {"max_steps": 12, "eval_every": 6, "sample_every": 12, "dtype": "bfloat16"}
    lm.train(settings(run_name="alone", **short))
    train_together(2, [settings(run_name="fsdp", parallel="fsdp", **short)], tmp_path)
    for ours, alone in zip(losses(settings(run_name="fsdp")), losses(settings(run_name="alone"))):
        assert ours == pytest.approx(alone, rel=1e-2)
    weights = lm.load_run(tmp_path / "runs" / "fsdp")[1].state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


GRADIENTS = """
import sys, torch
from machinery.notebook import load_definitions
lm = load_definitions()
real = torch.compile
torch.compile = lambda model, **options: real(model, backend="eager")  # traced, and not made into kernels
from machinery import Machine
from machinery.machine import compile_or_eager
config, machine = lm.Config.from_preset("smoke"), Machine.find("cpu", "float32")
tokens = torch.arange(128).view(2, 64) % config.vocab_size
norms = []
for compiled in (False, True):
    runner = machine.parallelize(lm.build_model(config), "fsdp")
    if compiled:
        runner, note = compile_or_eager(runner, tokens, tokens, machine)
        assert note.startswith("compiled"), note
    runner(tokens, tokens).backward()
    norms.append([round(p.grad.full_tensor().norm().item(), 5) for p in runner.parameters()])
assert norms[0] == norms[1], [(a, b) for a, b in zip(*norms) if a != b]
print("equal")
"""


DISAGREEMENT = """
from machinery import Machine, UserError
machine = Machine.find("cpu")
for values in ({"lr": 0.02, "norm": "rms"}, {"lr": 0.02, "norm": ["rms", "layer"][machine.rank], "step": machine.rank}):
    try:
        machine.agree(values)
        print("agreed", flush=True)
    except UserError as error:
        print(error, flush=True)
"""


def test_processes_that_do_not_agree_are_told_and_compiling_leaves_no_gradients_behind_under_fsdp(tmp_path):
    printed = printed_by(2, DISAGREEMENT + GRADIENTS, tmp_path)
    assert printed.count("agreed") == 1
    assert "processes do not agree on norm: process 0 has 'rms', process 1 'layer'" in printed
    assert "equal" in printed


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(lm, settings, tmp_path, parallel):
    """Two processes, then one, four, two again: the order of batches and the losses are those of one run."""
    lm.train(settings(run_name="straight", **STEADY))
    for processes, steps in [(2, 12), (1, 25), (4, 37), (2, 50)]:
        config = settings(run_name="changing", parallel=parallel, max_steps=steps, **STEADY)
        if processes > 1:
            train_together(processes, [config], tmp_path)
        else:
            lm.train(config)
    assert losses(config)[0] == pytest.approx(losses(settings(run_name="straight"))[0], rel=1e-5)


def test_a_killed_process_ends_the_job_with_one_line(lm, settings, tmp_path):
    config = settings(run_name="killed", max_steps=100_000, checkpoint_every=5, sample_every=100_000)
    (tmp_path / "program.py").write_text(PROGRAM)
    job = torchrun(2, str(tmp_path / "program.py"), json.dumps([config.to_dict()]))
    run = tmp_path / "runs" / "killed"
    while newest_checkpoint(run) is None and job.poll() is None:
        time.sleep(0.1)
    workers = {p.environ().get("RANK"): p for p in psutil.Process(job.pid).children() if "RANK" in p.environ()}
    workers["1"].kill()
    printed, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "[rank0]: UserError: process 0 of 2: another process of this run is gone; start the same" in printed
    kept = read_state(newest_checkpoint(run))["step"]
    summary = lm.train(settings(run_name="killed", max_steps=kept + 2))
    assert summary["status"] == "finished" and summary["steps"] == kept + 2


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ddp_exchanges_gradients_once_a_step_and_fsdp_in_each_micro_batch(lm, settings, parallel):
    """Counted on one process: DDP exchanges even alone; FSDP2 not, so the other of two is only made believe."""
    if parallel == "ddp":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    else:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    config, machine = settings(), Machine.find("cpu")
    runner = replace(machine, processes=2).parallelize(lm.build_model(config), parallel)
    batches, counted = Batches(lm.prepare_data(config), config, machine, lm.Progress(micro_batch=1)), []
    for steps in (1, 1, 4):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            lm.gradient(runner, batches, steps, machine, machine.scaler())
        exchanges = ("c10d::allreduce_", "c10d::_reduce_scatter_base_")
        counted.append(sum(event.count for event in profile.key_averages() if event.key in exchanges))
    if parallel == "ddp":  # gradients stay where they are sent from, or there would be two sets of them
        model = runner.module
        lm.step_weights(model, lm.build_optimizers(model, config, machine), machine.scaler(), 0.0, 1.0)
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    torch.distributed.destroy_process_group()
    assert counted[2] == counted[1] * (1 if parallel == "ddp" else 4) > 0


def test_shares_of_a_batch(lm, settings):
    config, machine = settings(), Machine.find("cpu")  # 8 sequences
    data = lm.prepare_data(config)

    def batches(micro_batch, rank=0, processes=1, **values):
        """Of one of several processes; what they agree on is made believe."""

        class One(Machine):
            def maximum(self, *values):
                return list(values)

        part = One(machine.device, machine.dtype, "", 0, None, rank, processes)
        at = lm.Progress(tokens=4 * config.block_size, micro_batch=micro_batch)
        return Batches(data, replace(config, **values), part, at)

    alone = batches(2)
    expected = torch.cat([alone.next()[0] for _ in range(4)])
    shares = [batches(2, rank, 2) for rank in range(2)]
    together = torch.cat([share.next()[0] for _ in range(2) for share in shares])
    assert torch.equal(together, expected)
    assert [batches(size).at.micro_batch for size in (8, 6, 5)] == [8, 2, 1]
    with pytest.raises(UserError, match="a batch of 8 sequences cannot be shared by 3 processes"):
        batches(1, 0, 3)


def test_the_notebook_becomes_a_program_that_torchrun_starts(texts, tmp_path, monkeypatch):
    """What `make script` does."""
    folders = {"runs_dir": str(tmp_path / "runs"), "data_dir": str(tmp_path / "data")}
    monkeypatch.setattr(execute, "PROGRAM", tmp_path / "LMHarness.py")
    own = folders | {"source": texts[0], "val_fraction": 0.2, "tokenizer": "bytes", "max_steps": 6, "run_name": "here"}
    execute.write_program({"preset": "smoke", "overrides": json.dumps(own)})
    printed = printed_by(2, (tmp_path / "LMHarness.py").read_text("utf-8"), tmp_path)
    assert printed.count("finished: 3,072 tokens") == 1
