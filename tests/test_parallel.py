"""Several processes, started by torchrun on this machine: the same run as one gives, whoever is lost."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from checkpoint_utils import newest_checkpoint, read_state
from data_utils import Batches
from notebook_utils import NOTEBOOK, UserError
from parallel_utils import ALONE, Group, micro_batch_of
from run_utils import read_json, read_jsonl

PROGRAM = """
import json, sys
import torch
import notebook_utils

torch.set_num_threads(1)
lm = notebook_utils.load_definitions()
for values in json.loads(sys.argv[1]):
    lm.train(lm.Config.from_dict(values))
"""


def torchrun(processes, *program, **options):
    """Start `program` in so many processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def train_together(processes, configs, folder):
    """Run `configs` one after the other in so many processes; returns what was printed."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    job = torchrun(processes, str(program), json.dumps([config.to_dict() for config in configs]))
    printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed[-3000:]
    return printed


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
        values |= {"checkpoint_every": 25, "keep_checkpoints": 9, "dtype": "float32", "val_fraction": 0.2}
        return tiny(**folder | values | overrides)

    return make


@pytest.mark.parametrize("processes", [2, 4])
def test_losses_are_those_of_one_process(lm, settings, tmp_path, processes):
    """DDP and FSDP2, both optimizers, with accumulation; and checkpoints are the same files, whoever wrote them."""
    kinds = {"muon": {"optimizer": "muon"}, "adamw": {"optimizer": "adamw", "lr": 0.001}}
    together = []
    for name, kind in kinds.items():
        lm.train(settings(run_name=name, **kind))
        together += [settings(run_name=f"{name}-{way}", parallel=way, **kind) for way in ("ddp", "fsdp")]
    printed = train_together(processes, together, tmp_path)
    assert printed.count("adamw-fsdp from step 0") == 1  # one process speaks
    for config in together:
        alone = settings(run_name=config.optimizer)
        for ours, expected in zip(losses(config), losses(alone)):
            assert len(ours) == len(expected) > 1 and ours == pytest.approx(expected, rel=1e-5)
        summary = read_json(Path(config.runs_dir) / config.run_name / "summary.json")
        assert summary["status"] == "finished" and summary["tokens"] == 50 * 128
        _, model, _ = lm.load_run(Path(config.runs_dir) / config.run_name)
        _, reference, _ = lm.load_run(Path(alone.runs_dir) / alone.run_name)
        for (name, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values()):
            assert (ours - theirs).abs().max() < 1e-4, name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(lm, settings, tmp_path, parallel):
    """Two processes, then one, four, two again: the order of batches and the losses are those of one run."""
    steady = {"schedule": "constant", "warmup": 0.0, "decay": 0.0}  # so that a longer budget is the same run
    lm.train(settings(run_name="straight", **steady))
    for processes, steps in [(2, 12), (1, 25), (4, 37), (2, 50)]:
        config = settings(run_name="changing", parallel=parallel, max_steps=steps, **steady)
        if processes > 1:
            train_together(processes, [config], tmp_path)
        else:
            lm.train(config)
    assert losses(config)[0] == pytest.approx(losses(settings(run_name="straight"))[0], rel=1e-5)


def test_a_resumed_job_is_the_same_bits(settings, tmp_path):
    steady = {"schedule": "constant", "warmup": 0.0, "decay": 0.0, "max_steps": 20}
    configs = []
    for way in ("ddp", "fsdp"):
        configs += [settings(run_name=f"{way}-straight", parallel=way, **steady)]
        configs += [settings(run_name=f"{way}-halves", parallel=way, **steady | {"max_steps": n}) for n in (10, 20)]
    train_together(2, configs, tmp_path)
    for way in ("ddp", "fsdp"):
        straight, halves = (newest_checkpoint(tmp_path / "runs" / f"{way}-{name}") for name in ("straight", "halves"))
        assert read_state(straight)["files"] == read_state(halves)["files"]


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
    assert "another process of this run is gone; start the same command again" in printed
    kept = read_state(newest_checkpoint(run))["step"]
    summary = lm.train(settings(run_name="killed", max_steps=kept + 2))
    assert summary["status"] == "finished" and summary["steps"] == kept + 2


@pytest.fixture
def group_of_one():
    """PyTorch's collectives, in this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_accumulation_exchanges_gradients_once(lm, settings, group_of_one, parallel):
    config = settings()
    model, machine = lm.build_model(config), lm.find_machine("cpu")
    if parallel == "ddp":
        runner = torch.nn.parallel.DistributedDataParallel(model)
    else:
        runner = torch.distributed.fsdp.fully_shard(model)
    windows = lm.load_data(config).windows("train", config.block_size, 0)
    counted = []
    for steps in (1, 4):
        with CommDebugMode() as counter:
            lm.accumulate(runner, Batches(windows, 1, machine.device), steps, machine, machine.scaler())
        operations = {operation.__name__: count for operation, count in counter.get_comm_counts().items()}
        counted.append(operations["allreduce_" if parallel == "ddp" else "reduce_scatter_tensor"])
        model.zero_grad(set_to_none=True)
    assert counted[0] == counted[1] > 0


def test_shares_of_a_batch(lm, settings):
    data = lm.load_data(settings())
    windows = data.windows("train", 16, 0)
    alone = Batches(windows, 2, torch.device("cpu"), position=4)
    expected = torch.cat([alone.next()[0] for _ in range(6)])
    shares = [Batches(windows, 2, torch.device("cpu"), 4, rank, 3) for rank in range(3)]
    together = torch.cat([share.next()[0] for _ in range(2) for share in shares])
    assert torch.equal(together, expected)
    assert micro_batch_of(ALONE, 6, 12) == 6 and micro_batch_of(ALONE, 5, 12) == 1
    with pytest.raises(UserError, match="a batch of 8 sequences cannot be shared by 3 processes"):
        micro_batch_of(Group(0, 3), 1, 8)


def test_the_notebook_becomes_a_program_that_torchrun_starts(tmp_path):
    """The two lines of the README."""
    overrides = (
        f"overrides: {{max_steps: 6, run_name: here, runs_dir: {tmp_path / 'runs'}, data_dir: {tmp_path / 'data'}}}"
    )
    prepared = tmp_path / "LMHarness.ipynb"
    prepare = ["papermill", "--prepare-only", "-p", "preset", "smoke", "-y", overrides, str(NOTEBOOK), str(prepared)]
    convert = ["jupyter", "nbconvert", "--to", "script", "--TagRemovePreprocessor.enabled=True"]
    convert += ["--TagRemovePreprocessor.remove_cell_tags=show", str(prepared)]
    for command in (prepare, convert):
        subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], check=True, capture_output=True)
    job = torchrun(2, str(tmp_path / "LMHarness.py"))
    printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed[-3000:]
    assert printed.count("finished: 3,072 tokens") == 1
