"""Around the loop and the loop itself: schedules, budget, run files, resuming bit for bit, stopping, bad steps."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

from data_utils import TokenWindows
from machinery import machine as machine_module
from machinery.budget import budget_left, budget_used
from machinery.checkpoints import (
    checkpoint_folders,
    newest_checkpoint,
    read_state,
)
from machinery.errors import UserError
from machinery.figures import plot_runs, show_run
from machinery.files import free_bytes, read_jsonl
from machinery.huggingface import config_from_hf, export_hf, import_hf
from machinery.interrupts import StopRequest
from machinery.loggers import LOGGERS, Logger, Loggers
from machinery.machine import Machine, datasheet_flops, is_out_of_memory, measure_matmul_flops
from machinery.notebook import TRAIN, train_elsewhere
from machinery.run_folder import RunFolder, run_state
from machinery.watch import Watch, print_preflight, refuse_too_large
from model_utils import (
    attention_maps,
    choose_micro_batch,
    multiplying_parameters,
    predict,
    training_memory,
)
from train_utils import SCHEDULES, Run

# --------------------------------------------------------------------------------------------- schedules


def torch_schedule(make, steps=200):
    """The factors that a torch scheduler gives over `steps`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_schedules_equal_torch(name):
    steps, warm, decay = 200, 20, 80
    tails = {
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, steps - warm),
        "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, steps - warm),
        "constant": lambda o: lr_scheduler.ConstantLR(o, 1.0),
        "wsd": lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 1.0), lr_scheduler.LinearLR(o, 1.0, 0.0, decay)], [steps - warm - decay]
        ),
    }
    reference = torch_schedule(tails[name], steps - warm)  # after the warmup, which torch starts above zero
    ours = [SCHEDULES[name](step / steps, warm / steps, decay / steps) for step in range(steps)]
    assert ours[:warm] == pytest.approx([step / warm for step in range(warm)])
    assert ours[warm:] == pytest.approx(reference, abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_sane_everywhere(name):
    for warmup, decay in [(0.0, 0.0), (0.0, 1.0), (0.1, 0.5), (1.0, 0.0), (0.5, 0.5)]:
        values = [SCHEDULES[name](i / 100, warmup, decay) for i in range(101)]
        assert all(0 <= value <= 1 for value in values)
    assert SCHEDULES["wsd"](1.0, 0.1, 0.5) == SCHEDULES["linear"](1.0, 0.1, 0) == 0
    assert SCHEDULES["cosine"](1.0, 0.1, 0) == pytest.approx(0)


def test_the_first_limit_of_a_budget_counts():
    budget = SimpleNamespace(max_steps=10, max_tokens=1000, max_hours=1.0)
    assert budget_used(budget, 5, 100, 36.0) == 0.5
    assert budget_used(budget, 5, 900, 36.0) == 0.9
    assert budget_used(budget, 5, 100, 7200.0) == 1.0


# ---------------------------------------------------------------------------------------- run directory


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "a/b", "", ".hidden", "a" * 101, "with space", "end.", "CON", "aux.txt", "Wandb"]
)
def test_run_names_stay_inside_and_can_be_held_anywhere(tmp_path, name):
    with pytest.raises(UserError, match="run_name"):
        RunFolder(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def open_folder(folder, config=None, at_step=0):
    """A run's folder, locked and begun."""
    run = RunFolder(folder, "run")
    run.lock()
    run.begin(config or {"a": 1}, at_step, tokenizer={"tokens": []}, environment={"python": "3"})
    return run


def test_starting_over_keeps_the_earlier_run(tmp_path):
    for expected in (None, "run.1", "run.2"):
        run = RunFolder(tmp_path, "run")
        run.set_aside()
        run.begin({"a": 1})
        run.append("metrics.jsonl", {"step": 1})
        assert expected is None or (tmp_path / expected / "metrics.jsonl").exists()
        (tmp_path / "run/config.json").unlink()  # not even that is needed


def test_a_folder_of_other_things_is_not_moved_to_make_room_for_a_run(lm, settings, tmp_path):
    """`runs_dir` "." and `run_name` "data", or a folder of the user's own."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.DS_Store").touch()
    open_folder(tmp_path).unlock()  # what a system puts into any folder is in nobody's way
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    for name in ("data", "mine"):  # "data": the shards are made there first
        for _ in range(2):
            with pytest.raises(UserError, match=f"{name} holds .* and no run; move that away"):
                lm.train(settings(runs_dir=str(tmp_path), run_name=name, data_dir=str(tmp_path / "data")))
        assert not (tmp_path / f"{name}.1").exists() and run_state(tmp_path / "run")["status"] == "stopped"
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_a_terminal_that_closes_is_a_safe_stop_and_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_model_that_has_diverged_still_writes(lm):
    logits, generator = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]]), torch.Generator()
    for options in ((0.8, 0, 0.95), (1e-3, 2, 1.0), (0.8, 0, 1e-9)):
        for given in (logits, logits * 0 + math.nan, torch.zeros(1, 4)):
            assert 0 <= lm.sample_token(given, *options, generator) < 4


def test_what_cannot_begin_leaves_what_was_there(tmp_path):
    run = open_folder(tmp_path)
    run.finish({"status": "finished"})
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl: not a regular file"):
        run.begin({"a": 2}, at_step=1)
    assert (tmp_path / "run/summary.json").exists() and json.loads((tmp_path / "run/config.json").read_text()) == {
        "a": 1
    }


@pytest.mark.parametrize("prompt", ["~nobody here", "/* a comment */", "C:\\x"])
def test_a_text_that_looks_like_a_path_is_kept_as_it_is(tmp_path, prompt):
    open_folder(tmp_path, {"prompt": prompt, "split_on": "/", "source": "/home/me/texts"})
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved == {"prompt": prompt, "split_on": "/", "source": "…/texts"}


def test_a_log_is_live_and_drops_what_a_resume_will_write_again(tmp_path):
    run = open_folder(tmp_path)
    for number in range(1, 6):
        run.append("metrics.jsonl", {"step": number, "train_loss": 1.0 / number})
        assert read_jsonl(tmp_path / "run/metrics.jsonl")[-1] == {"step": number, "train_loss": 1.0 / number}
    run.append("metrics.jsonl", {"step": 6, "train_loss": math.nan})
    assert read_jsonl(tmp_path / "run/metrics.jsonl")[-1]["train_loss"] is None
    run.unlock()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tra')  # what a power cut leaves
    assert len(read_jsonl(tmp_path / "run/metrics.jsonl")) == 6
    open_folder(tmp_path, at_step=3).unlock()
    assert [line["step"] for line in read_jsonl(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]


def test_a_resume_keeps_what_others_wrote_into_a_log(tmp_path):
    open_folder(tmp_path).unlock()
    mine = '{"note":  "mine"}\nno JSON\n{"step":1,"prompt":"a","text":"b","rating":"good"}\n'
    (tmp_path / "run/samples.jsonl").write_text(mine + '{"step": 4, "prompt": "a", "text": "b"}\n{"step": 3}')
    open_folder(tmp_path, at_step=3).unlock()
    assert (tmp_path / "run/samples.jsonl").read_text() == mine + '{"step": 3}\n'


def test_a_loss_spike_and_a_machine_that_slows_down_are_told_once():
    watch, spikes, slow = Watch(), [], 0
    watch.expected_rate = 1000.0
    for number in range(120):
        rate = 1000.0 if number < 70 else 400.0
        found = watch.note(3.0 if number == 60 else 2.0 + 0.01 * (number % 5), rate, 0.1)
        spikes += [number] if "spike" in found else []
        slow += sum("under half" in remark for remark in watch.remarks)
    assert spikes == [60] and slow == 1


def test_a_second_trainer_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    program = (
        "import sys, time\nfrom machinery.run_folder import RunFolder\n"
        "run = RunFolder(sys.argv[1], 'run')\nrun.lock()\nprint('in', flush=True)\ntime.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UserError, match="another process is training in"):
        RunFolder(tmp_path, "run").lock()
    other.kill()
    other.wait()
    RunFolder(tmp_path, "run").lock()
    (tmp_path / "other" / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"other.\.lock: not to be locked .*; remove it"):
        RunFolder(tmp_path, "other").lock()


@pytest.mark.skipif(sys.platform == "win32", reason="a look takes no lock of this kind there")
def test_a_look_from_elsewhere_keeps_no_trainer_out(tmp_path):
    import fcntl

    run = RunFolder(tmp_path, "run")
    with open(tmp_path / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as `run_state` does, for a moment
        threading.Timer(0.1, fcntl.flock, (file.fileno(), fcntl.LOCK_UN)).start()
        run.lock()
    assert run_state(tmp_path / "run")["status"] == "running"
    run.unlock()


def test_changed_configs_are_told_and_what_does_not_fit_is_refused(tmp_path, capsys):
    open_folder(tmp_path, config={"n_layer": 2, "max_steps": 10, "source": "/home/me/texts/*.txt"}).unlock()
    run = RunFolder(tmp_path, "run")
    run.compare({"n_layer": 2, "max_steps": 20, "source": "/home/me/texts/*.txt"}, ["n_layer", "source"])
    assert "max_steps: 10 before, 20 now" in capsys.readouterr().out
    run.compare({"n_layer": 2, "new": 1}, ["n_layer"])
    told = capsys.readouterr().out
    assert "new: not known before, 1 now" in told and "max_steps: 10 before, not known now" in told
    with pytest.raises(UserError, match="n_layer is 3 but run 'run' was begun with 2; use a new run_name"):
        run.compare({"n_layer": 3, "max_steps": 10}, ["n_layer"])
    assert "/home" not in (tmp_path / "run/config.json").read_text()


@contextlib.contextmanager
def full_disk(log):
    """A real file-size limit: within it, a log cannot grow by more than a few bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("later", ["a line", "the end"])
def test_a_full_disk_keeps_lines_for_later(tmp_path, capsys, later):
    run, log = open_folder(tmp_path), tmp_path / "run/metrics.jsonl"
    run.append("metrics.jsonl", {"step": 1})
    with full_disk(log):
        for number in (2, 3):
            run.append("metrics.jsonl", {"step": number})
    if later == "a line":
        run.append("metrics.jsonl", {"step": 4})
    run.finish({"status": "finished"})  # the last checkpoint may have made room after the last line
    assert [line["step"] for line in read_jsonl(log)] == [1, 2, 3, 4][: 4 if later == "a line" else 3]
    assert capsys.readouterr().out.count("cannot be written now") == 1


def test_lines_that_are_never_written_are_told_at_the_end(tmp_path, capsys):
    run, log = open_folder(tmp_path), tmp_path / "run/metrics.jsonl"
    run.append("metrics.jsonl", {"step": 1})
    with full_disk(log):
        for number in (2, 3):
            run.append("metrics.jsonl", {"step": number})
        run.finish({"status": "finished"})
    assert "run: the last 2 lines of its logs were not written" in capsys.readouterr().out


def test_lines_are_kept_while_the_disk_of_a_run_is_gone(tmp_path):
    run, runs, aside = open_folder(tmp_path / "runs"), tmp_path / "runs", tmp_path / "aside"
    runs.rename(aside)
    runs.write_text("no folder can be made here")
    run.append("metrics.jsonl", {"step": 1})
    runs.unlink()
    aside.rename(runs)
    run.append("metrics.jsonl", {"step": 2})
    assert [line["step"] for line in read_jsonl(runs / "run/metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("how", ["moved", "removed", "all but the lock", "a file is removed"])
def test_a_folder_that_goes_while_its_run_trains_is_written_again(lm, settings, monkeypatch, capsys, how):
    config = settings()
    folder, write_text = folder_of(config), lm.write_text

    def take_away(*arguments, **options):
        if (folder / "metrics.jsonl").exists() and len(read_jsonl(folder / "metrics.jsonl")) == 7:
            if how == "moved":
                folder.rename(folder.with_name("elsewhere"))
            (folder / "config.json").unlink(missing_ok=True)
            for path in folder.iterdir() if how == "all but the lock" else ():
                if path.name == "checkpoints":
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
            while how == "removed" and folder.exists():  # a checkpoint may be being written there
                shutil.rmtree(folder, ignore_errors=True)
        return write_text(*arguments, **options)

    monkeypatch.setattr(lm, "write_text", take_away)
    assert lm.train(config)["status"] == "finished"
    said = capsys.readouterr().out
    assert said.count("moved or removed while this run trains there") == 1 and "cannot be" not in said
    assert lm.load_run(folder)[0].n_embd == config.n_embd and run_state(folder)["last"]["step"] == 12
    assert lm.train(replace(config, max_steps=14))["steps"] == 14


def test_a_lock_that_is_removed_is_taken_again(tmp_path):
    run = open_folder(tmp_path)
    (run.path / ".lock").unlink()
    run.append("metrics.jsonl", {"step": 1})
    with pytest.raises(UserError, match="another process is training"):
        RunFolder(tmp_path, "run").lock()


def test_a_trainer_whose_lock_another_one_has_taken_ends_and_writes_nothing(tmp_path):
    run = open_folder(tmp_path)
    run.append("metrics.jsonl", {"step": 1})
    (run.path / ".lock").unlink()
    other = RunFolder(tmp_path, "run")
    other.lock()
    with pytest.raises(UserError, match="another process is training in"):
        run.append("metrics.jsonl", {"step": 2})
    other.append("metrics.jsonl", {"step": 3})
    assert [line["step"] for line in read_jsonl(run.path / "metrics.jsonl")] == [1, 3]


def test_no_line_is_written_through_a_link(tmp_path):
    run = open_folder(tmp_path)
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run/samples.jsonl").unlink()
    (tmp_path / "run/samples.jsonl").symlink_to(tmp_path / "elsewhere")
    run.append("samples.jsonl", {"step": 1})
    assert (tmp_path / "elsewhere").read_text() == "mine"


# --------------------------------------------------------------------------------------------- the loop


@pytest.fixture
def settings(texts, tmp_path, tiny):
    """settings(**overrides): a tiny run on the local texts, in a folder of its own."""

    def make(**overrides):
        base = {
            "source": texts[0], "val_fraction": 0.1, "vocab_size": 257, "block_size": 16, "max_steps": 12, "lr": 0.01,
            "data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs"), "eval_tokens": 512, "eval_every": 4,
            "sample_every": 6, "checkpoint_every": 5, "sample_tokens": 4, "prompt": "line", "schedule": "cosine",
        }  # fmt: skip
        return tiny(**base | overrides)

    return make


def folder_of(config):
    return Path(config.runs_dir) / config.run_name


def metrics_of(config, name=None):
    """The lines of a run's log, or the values of `name` in those that have one."""
    lines = read_jsonl(folder_of(config) / "metrics.jsonl")
    return [line[name] for line in lines if name in line] if name else lines


def weights_of(lm, folder):
    return lm.load_run(folder)[1].state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_run_directory_holds_what_it_promises(lm, settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = settings(source="texts/*.txt", data_dir="data", runs_dir="runs")
    summary = lm.train(config)
    folder = folder_of(config)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert lm.Config.from_dict(json.loads((folder / "config.json").read_text())) == config
    assert set(summary) >= {
        "parameters", "steps", "tokens", "train_seconds", "val_loss", "val_bpb", "tokens_per_second", "mfu",
        "matmul_fraction", "peak_memory_bytes", "status",
    }  # fmt: skip
    assert summary["status"] == "finished" and summary["steps"] == 12 and summary["tokens"] == 12 * 64
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # +cpu, +cu130, …
    assert len(environment["notebook_sha256"]) == 64
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(13))
    for line in metrics[1:]:
        assert set(line) >= {"step", "tokens", "seconds", "train_loss", "lr", "grad_norm", "tokens_per_second", "mfu"}
    assert [line["step"] for line in metrics if "val_loss" in line] == [0, 4, 8, 12]
    assert metrics[-1]["val_bpb"] == summary["val_bpb"] < metrics[0]["val_bpb"]
    assert [line["step"] for line in read_jsonl(folder / "samples.jsonl")] == [0, 6, 12]
    kept = [summary["best_step"], 10, 12]  # the best of equal text; the last evaluation was of all
    assert [int(path.name[5:]) for path in checkpoint_folders(folder)] == kept


def test_bits_per_byte_is_nats_over_ln2_and_bytes(lm, settings):
    config = settings(max_steps=1, dtype="float32")
    summary = lm.train(config)
    _, model, encoding = lm.load_run(folder_of(config))
    data = lm.prepare_data(config)
    windows = data.windows("val", config.block_size)
    rows = torch.from_numpy(windows.read(0, len(windows)))
    nats = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    text_bytes = len(encoding.decode_bytes([t for t in rows[:, 1:].flatten().tolist() if t != encoding.eot_token]))
    assert summary["val_bpb"] == pytest.approx(nats.item() / math.log(2) / text_bytes, rel=1e-5)
    assert summary["val_loss"] == pytest.approx(nats.item() / rows[:, 1:].numel(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_micro_batches_give_the_same_gradient(lm, settings, optimizer):
    runs = []
    for micro_batch in (1, 2, 4):
        name = f"micro{micro_batch}"
        config = settings(micro_batch=micro_batch, max_steps=3, optimizer=optimizer, run_name=name, dtype="float32")
        lm.train(config)
        runs.append(metrics_of(config)[1:])
    for lines in zip(*runs):
        for field, tolerance in [("train_loss", 1e-5), ("grad_norm", 1e-3)]:
            assert [line[field] for line in lines] == pytest.approx([lines[0][field]] * 3, rel=tolerance)


class Interrupt:
    """Sends SIGINT to this process when the run has logged `after` steps."""

    def __init__(self, folder, after):
        self.folder, self.after = folder, after

    def __enter__(self):
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        while len(read_jsonl(self.folder / "metrics.jsonl")) <= self.after:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    def __exit__(self, *exception):
        self.thread.join(timeout=60)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "muon", "micro_batch": 1},
        {"optimizer": "muon", "schedule": "linear", "compile": True, "dtype": "bfloat16", "n_layer": 1},
        {
            "optimizer": "adamw",
            "schedule": "constant",
            "block_size": 64,
            "batch_tokens": 2048,
            "micro_batch": 32,
        },  # over two epochs
        {"attention": "mha", "position": "absolute", "tie_embeddings": False, "batch_tokens": 1024, "micro_batch": 64},
    ],
    ids=str,
)
def test_interrupted_and_resumed_is_the_same_run_bit_for_bit(lm, settings, capsys, change):
    """A compiled run compiles before its clock starts and never again, whatever an earlier one in this process did:
    a graph to train with and one to evaluate with.
    """

    def train(config):
        torch._dynamo.utils.counters.clear()
        summary = lm.train(config)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs, "compiled in" in capsys.readouterr().out) == ((2, True) if config.compile else (0, False))
        return summary

    steps = 24 if change.get("compile") else 36
    straight = settings(run_name="straight", max_steps=steps, **change)
    train(straight)
    broken = settings(run_name="broken", max_steps=steps, **change)
    runs = Path(broken.runs_dir)
    for after in {1: (3, 17), 4: (3,)}.get(broken.micro_batch, (17,)):
        with Interrupt(runs / "broken", after):
            summary = train(broken)
        assert summary["status"] == "interrupted" and after < summary["steps"] < steps
    assert train(broken)["status"] == "finished"
    assert same(weights_of(lm, runs / "straight"), weights_of(lm, runs / "broken"))
    kept = ("step", "tokens", "train_loss", "lr", "grad_norm", "val_loss")
    first, second = (
        [{k: line[k] for k in kept if k in line} for line in read_jsonl(runs / name / "metrics.jsonl")]
        for name in ("straight", "broken")
    )
    assert first == second


def test_layers_that_draw_numbers_go_on_where_they_were(lm, settings, monkeypatch):
    class Dropout(lm.GatedFFN):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x), 0.2)

    monkeypatch.setitem(lm.FFNS, "dropout", Dropout)
    steady = {"ffn": "dropout", "schedule": "constant", "warmup": 0.0, "decay": 0.0, "eval_every": 100}
    lm.train(settings(run_name="straight", max_steps=10, **steady))
    for steps in (4, 10):
        lm.train(settings(run_name="halves", max_steps=steps, **steady))
    runs = Path(settings().runs_dir)
    assert same(weights_of(lm, runs / "straight"), weights_of(lm, runs / "halves"))


def test_a_run_that_ends_by_a_smaller_budget_is_scored_on_all_held_out_text(lm, settings):
    config = settings(eval_tokens=64)
    lm.train(replace(config, max_steps=8))
    summary = lm.train(replace(config, max_steps=6))
    assert summary["status"] == "finished" and summary["steps"] == 8
    _, model, _ = lm.load_run(folder_of(config))
    scores = lm.evaluate(model, lm.prepare_data(config), Machine.find("cpu"), 4, math.inf)
    assert summary["val_loss"] == pytest.approx(scores["val_loss"], rel=1e-3)
    lines = metrics_of(config)
    assert [line["step"] for line in lines] == list(range(9)) and lines[8]["val_loss"] == summary["val_loss"]
    assert math.isfinite(lines[8]["train_loss"])  # the line of the step is another one now, and has lost nothing
    samples = read_jsonl(folder_of(config) / "samples.jsonl")
    assert [line["step"] for line in samples] == [0, 6, 8]
    assert lm.train(replace(config, max_steps=6))["val_loss"] == summary["val_loss"]
    assert metrics_of(config) == lines  # once is enough


def test_a_run_whose_budget_is_set_to_where_it_stopped_is_scored_there(lm, settings, monkeypatch):
    """Also where each evaluation was of all held-out text: the last one was of an earlier step."""
    config = settings(eval_tokens=10**6, eval_every=5)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "clock", lambda self: (1.0, self.at.step == 7))
        assert lm.train(config)["status"] == "interrupted"
    summary = lm.train(replace(config, max_steps=7))
    _, model, _ = lm.load_run(folder_of(config))
    scores = lm.evaluate(model, lm.prepare_data(config), Machine.find("cpu"), 4, math.inf)
    assert summary["val_loss"] == pytest.approx(scores["val_loss"], rel=1e-3)


def test_scores_of_different_texts_are_not_compared(lm, settings, monkeypatch):
    """A part of the held-out text that is harder than all of it; then the run goes on, and on with a larger part."""
    scores = iter([3.0, 2.0, 2.5, 1.0, 2.4, 1.9, 0.5, 2.8, 2.7, 0.4])

    def evaluate(*_):
        return {"val_loss": 1.0, "val_bpb": next(scores)}

    config = settings(eval_tokens=64, max_steps=12, keep_checkpoints=1, schedule="constant")
    folder = folder_of(config)
    for change, best in [
        ({}, (2.0, 4, 64)),
        ({"max_steps": 22}, (1.9, 20, 64)),
        ({"max_steps": 29, "eval_tokens": 128}, (2.7, 28, 128)),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr("machinery.watch.time_between", lambda *_: [1.0] * 4)
            patch.setitem(lm.train.__globals__, "evaluate", evaluate)
            summary = lm.train(replace(config, **change))
        assert tuple(summary[f"best_{name}"] for name in ("val_bpb", "step", "tokens")) == best
        assert lm.load_run(folder, step=best[1]) and summary["val_tokens"] > 128
    assert next(scores, None) is None


def test_a_finished_run_is_not_trained_further(lm, settings, capsys):
    config = settings()
    first = lm.train(config)
    assert "budget is used" not in capsys.readouterr().out
    again = lm.train(config)
    assert "budget is used: a larger one goes on, another run_name or resume='never'" in capsys.readouterr().out
    kept = ("status", "steps", "val_bpb", "predicted", "peak_memory_bytes")  # what was measured while it trained, too
    assert [again[name] for name in kept] == [first[name] for name in kept] and again["predicted"]
    more = lm.train(replace(config, max_steps=20, micro_batch=2))
    assert more["steps"] == 20
    run = folder_of(config)
    assert read_state(newest_checkpoint(run))["micro_batch"] == 2
    capsys.readouterr()
    (run / "metrics.jsonl").unlink()
    lm.train(replace(config, max_steps=24, micro_batch=2))
    assert "metrics.jsonl was removed or emptied: its curves begin at step 20" in capsys.readouterr().out
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [21, 22, 23, 24]


def test_a_run_that_goes_on_tells_when_its_learning_rate_rises_again(lm, settings, monkeypatch, capsys):
    """With a larger budget, less of it is used; a resumed run whose budget is the same has nothing to say."""
    for warmup, stopped in ((0.5, 2), (0.0, 7)):
        config = settings(max_steps=12, schedule="linear", warmup=warmup, run_name=f"run{stopped}")
        with monkeypatch.context() as patch:
            patch.setattr(Run, "clock", lambda self, stopped=stopped: (1.0, self.at.step == stopped))
            lm.train(config)
        lm.train(config)
        assert "the learning rate is" not in capsys.readouterr().out
    lm.train(replace(config, max_steps=24))
    told = re.search(
        r"step 13: the learning rate is up to (\S+) from (\S+): less of the budget is used", capsys.readouterr().out
    )
    first, last = (config.lr * share for share in (11.5 / 24, 0.5 / 12))
    assert [float(rate) for rate in told.groups()] == pytest.approx([first, last], rel=0.05)


def test_a_run_without_the_states_of_its_optimizers_is_loaded_and_not_trained_further(lm, settings, tmp_path):
    """Whoever has little disk keeps the weights alone, less than half of a checkpoint."""
    config = settings(max_steps=12)
    lm.train(config)
    run, before = folder_of(config), weights_of(lm, folder_of(config))
    for path in run.glob("checkpoints/*/training.pt"):
        path.unlink()
    after = weights_of(lm, run)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert list(export_hf(run, tmp_path / "export").glob("model*.safetensors"))
    with pytest.raises(UserError, match="none of its .* checkpoints can be read"):
        lm.train(replace(config, max_steps=20))


def test_optimizers_of_ones_own_that_leave_something_out_are_told(lm, settings, monkeypatch, capsys):
    config, build = settings(max_steps=1), lm.build_optimizers
    with monkeypatch.context() as patch:
        patch.setitem(lm.train.__globals__, "build_optimizers", lambda *args: build(*args)[1:])
        lm.train(config)
    left = ", ".join(f"blocks.0.attention.{name}_proj.weight" for name in "qkv")
    assert f"build_optimizers: no optimizer has {left} and others: not trained" in capsys.readouterr().out
    plain = lambda model, *_: [torch.optim.SGD(model.parameters(), 0.1)]  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(UserError, match="a group lacks its peak_lr"):
        patch.setitem(lm.train.__globals__, "build_optimizers", plain)
        lm.train(replace(config, run_name="plain"))


def test_a_micro_batch_changed_by_hand_counts_also_after_a_start_that_was_cut_off(lm, settings, monkeypatch):
    config = replace(settings(max_steps=5), micro_batch=2)
    lm.train(settings(max_steps=4))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "compile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        lm.train(config)
    lm.train(config)
    assert read_state(newest_checkpoint(folder_of(config)))["micro_batch"] == 2


def test_a_start_that_does_not_come_to_training_changes_nothing(lm, settings, monkeypatch):
    config = settings()
    folder = folder_of(config)
    with pytest.raises(UserError, match="val_source"):
        lm.train(replace(config, val_source="nowhere.txt"))
    assert not folder.exists()
    lm.train(config)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("write_text", "evaluate"):  # of the preflight
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(lm, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            lm.train(replace(config, max_steps=20))
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "expected.json").unlink()
    (folder / "expected.json").mkdir()
    monkeypatch.setattr(lm, "prepare_data", None)  # it does not come to that, nor to compiling
    with pytest.raises(UserError, match="expected.json: not a regular file"):
        lm.train(replace(config, max_steps=20))
    (folder / "expected.json").rmdir()
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(UserError, match=r"checkpoints: cannot be written \(denied\); check the permissions"):
        lm.train(replace(config, max_steps=20))
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == {path: content for path, content in before.items() if path.name != "expected.json"}


def test_a_smaller_budget_that_was_told_is_on_the_disk(lm, settings, capsys):
    config = settings()
    lm.train(config)
    capsys.readouterr()
    for told in (1, 0):
        assert lm.train(replace(config, max_steps=4, prompt="a"))["steps"] == 12
        assert capsys.readouterr().out.count("max_steps: 12 before, 4 now") == told
    saved = lm.load_run(folder_of(config))[0]
    assert (saved.max_steps, saved.prompt) == (4, "a")


def test_a_run_interrupted_while_it_ends_is_not_locked_any_more(lm, settings, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as held:
        patch.setattr(Loggers, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        lm.train(settings(max_steps=2))
    assert held.tb and lm.train(settings(max_steps=2))["status"] == "finished"


def test_a_class_of_ones_own_that_is_missing_where_its_run_is_used_is_named(lm, settings, tmp_path, capsys):
    class Block(lm.Block):
        def forward(self, x, position, cache=None, tokens=None):
            return x + self.attention(self.attention_norm(x), position, cache, tokens) + self.ffn(self.ffn_norm(x))

    def printed(use) -> str:
        capsys.readouterr()
        use()
        return capsys.readouterr().out

    said = "parallel was trained with other code of Block: what"
    folder = tmp_path / "runs" / "parallel"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "Block", Block)
        lm.train(settings(run_name="parallel", max_steps=2))
        assert said not in printed(lambda: lm.load_run(folder))
        assert said not in printed(lambda: lm.train(settings(run_name="parallel", max_steps=3)))
    assert said in printed(lambda: lm.load_run(folder))
    assert said in printed(lambda: lm.train(settings(run_name="parallel", max_steps=4)))
    assert said in printed(lambda: lm.load_run(folder))  # most of its steps were


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("after", "kept", "said"),
    [(1, False, "the model reads later tokens"), (0, False, "if there were fewer"), (0, True, "")],
)
def test_a_layer_that_reads_later_tokens_or_no_earlier_ones_is_told(
    lm, settings, monkeypatch, capsys, after, kept, said, dtype
):
    """A convolution over three tokens before attention: with the next one among them; without those of the cache."""

    class Block(lm.Block):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            self.mixed = torch.nn.Conv1d(config.n_embd, config.n_embd, 3, groups=config.n_embd, bias=False)

        def forward(self, x, position, cache=None, tokens=None):
            rows = F.pad(x.transpose(1, 2), (2 - after, after))
            if cache and kept:
                before = cache.layers.get(f"{id(self)}", rows[:, :, :2])
                rows = torch.cat((before, x.transpose(1, 2)), dim=2)
                cache.layers[f"{id(self)}"] = rows[:, :, -2:]
            return super().forward(x + self.mixed(rows).transpose(1, 2), position, cache, tokens)

    monkeypatch.setattr(lm, "Block", Block)
    lm.train(settings(max_steps=2, dtype=dtype))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the model ")]
    assert len(lines) == bool(said) and said in "".join(lines)


def test_a_rate_of_zero_leaves_its_weights_as_they_began(lm, settings, tmp_path):
    config = settings(run_name="frozen", embedding_lr=0.0, max_steps=3)
    lm.train(config)
    begun, trained = lm.build_model(config).state_dict(), weights_of(lm, tmp_path / "runs" / "frozen")
    kept = {name for name in begun if torch.equal(begun[name], trained[name])}
    assert kept == {"embedding.weight", "head.weight"}


def test_hours_end_a_run(lm, settings):
    summary = lm.train(settings(max_steps=0, max_hours=2 / 3600, eval_every=1000))
    assert summary["status"] == "finished" and 2.0 <= summary["train_seconds"] < 4.0


def test_killed_run_goes_on_from_its_checkpoint(lm, settings, tmp_path, capsys):
    straight, killed = (settings(run_name=name, max_steps=30) for name in ("straight", "killed"))
    lm.train(straight)
    folder = tmp_path / "runs" / "killed"
    with train_elsewhere(killed) as process:
        while not checkpoint_folders(folder) and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert newest_checkpoint(folder) is not None and not (folder / "summary.json").exists()
    again = read_jsonl(folder / "metrics.jsonl")[-1]["step"] - read_state(newest_checkpoint(folder))["step"]
    capsys.readouterr()
    assert lm.train(killed)["status"] == "finished"
    assert (f"\n{again} steps that were logged after" in capsys.readouterr().out) == (again > 0)
    assert same(weights_of(lm, tmp_path / "runs" / "straight"), weights_of(lm, folder))


def test_a_loaded_run_asks_for_the_whole_path_of_its_text_and_makes_no_folder_of_half_a_path(lm, settings, tmp_path):
    lm.train(settings(run_name="loaded", max_steps=2))
    config = lm.load_run(tmp_path / "runs" / "loaded")[0]
    assert (config.data_dir, config.runs_dir) == ("data", "runs") and config.source.startswith("…/")
    with pytest.raises(UserError, match="source '…/.*' is the end of a path"):
        lm.prepare_data(config)


def test_a_loaded_run_has_its_tokenizer_whose_folder_was_elsewhere(lm, settings, tmp_path):
    folder = tmp_path / "runs" / "loaded"
    lm.train(settings(run_name="first", max_steps=2))
    begun = settings(run_name="loaded", max_steps=2, tokenizer=str(tmp_path / "runs" / "first"))
    lm.train(begun)
    (tmp_path / "runs" / "first").rename(tmp_path / "moved")
    config = replace(
        lm.load_run(folder)[0], source=begun.source, data_dir=begun.data_dir, runs_dir=begun.runs_dir, max_steps=3
    )
    assert lm.prepare_data(config).encoding._mergeable_ranks == lm.load_run(folder)[2]._mergeable_ranks
    assert lm.train(config)["steps"] == 3  # the run goes on


def test_a_run_elsewhere_ends_with_who_started_it_and_keeps_a_checkpoint(settings, tmp_path):
    folder = tmp_path / "runs" / "apart"
    with train_elsewhere(settings(run_name="apart", max_steps=10**6, checkpoint_every=10**6)) as process:
        while not read_jsonl(folder / "metrics.jsonl") and process.poll() is None:
            time.sleep(0.005)
        process.stdin.close()  # as where the other process is gone
        assert process.wait(timeout=60) == 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted" and newest_checkpoint(folder)


def test_a_run_that_fails_elsewhere_is_not_taken_for_a_killed_one(settings):
    with train_elsewhere(replace(settings(), ffn="of another notebook"), stderr=subprocess.DEVNULL) as process:
        process.wait()
        with pytest.raises(UserError, match="failed, for the reason above; .* knows the saved LMHarness.ipynb alone"):
            process.kill()


def test_a_run_is_seen_from_elsewhere(lm, settings, capsys):
    """State and curves of a run that is being trained by another process, from its files alone."""
    config = settings(max_steps=12)
    lm.train(config)
    folder = folder_of(config)
    state = run_state(folder)
    assert (state["status"], state["progress"], state["last"]["step"]) == ("finished", 1.0, 12)
    metrics = (folder / "metrics.jsonl").rename(folder / "away")
    assert run_state(folder)["progress"] == 1.0  # a finished run without its log has used its budget all the same
    metrics.rename(folder / "metrics.jsonl")
    run = RunFolder(config.runs_dir, config.run_name)
    run.lock()
    assert run_state(folder)["status"] == "running"
    run.unlock()
    (folder / "summary.json").unlink()
    assert run_state(folder)["status"] == "stopped"
    show_run(folder)
    printed = capsys.readouterr().out
    assert "stopped, 100.0% of the budget" in printed and "sample of step 12" in printed
    with pytest.raises(UserError, match="is it the folder of a run"):
        run_state(folder / "checkpoints")
    run.lock()
    (folder / "config.json").unlink()  # as while a new run reads its text
    show_run(folder)
    assert "running, 100.0% of the budget" in capsys.readouterr().out
    run.unlock()


@pytest.mark.parametrize("odd", [None, 3, True, b"x", [], "", "~no such user/x", Ellipsis], ids=repr)
def test_what_is_no_folder_of_a_run_is_one_line(lm, odd):
    for call in (run_state, show_run, plot_runs, lm.load_run, import_hf, config_from_hf, lambda x: export_hf(x, x)):
        with pytest.raises(UserError, match="^[^\n]+ is not |: not the folder of a"):
            call(odd)


def test_a_program_of_ones_own_ends_in_one_line(tmp_path):
    program = [sys.executable, "-c", "from machinery import load_definitions; load_definitions().load_run('nowhere')"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert re.fullmatch(r"\w+Error: .+\n", done.stderr) and done.returncode == 1


def train_poisoned(lm, config, monkeypatch, bad) -> dict:
    """Train with a loss that is not a number in the steps for which `bad` holds; returns the summary."""
    real, preflight = lm.cross_entropy, Run.preflight
    calls = {"n": -math.inf}

    def from_here_on(*arguments, **options):
        preflight(*arguments, **options)
        calls["n"] = 0  # of one micro-batch in a step

    def poisoned(*args, **kwargs):
        loss = real(*args, **kwargs)
        if torch.is_grad_enabled():
            calls["n"] += 1
            if bad(calls["n"]):
                return loss * math.nan
        return loss

    monkeypatch.setattr(lm, "cross_entropy", poisoned)
    monkeypatch.setattr(Run, "preflight", from_here_on)
    summary = lm.train(config)
    monkeypatch.undo()
    return summary


def test_a_run_whose_last_step_is_bad_is_saved(lm, settings, monkeypatch):
    config = settings(max_steps=7, checkpoint_every=5)
    summary = train_poisoned(lm, config, monkeypatch, lambda step: step == 7)
    folder = folder_of(config)
    assert summary["status"] == "finished" and newest_checkpoint(folder).name == "step_00000007"
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(lm, folder).values())


def test_an_evaluation_far_off_keeps_no_later_step_from_being_saved(lm, settings, monkeypatch):
    config, evaluate = settings(eval_every=5, checkpoint_every=3), lm.evaluate

    def far_off(*arguments):
        return {"val_loss": 17.0, "val_bpb": 24.0} if sum(steps) == 5 else evaluate(*arguments)

    steps, stepped = [], Run.stepped
    monkeypatch.setattr(Run, "stepped", lambda self, *given, **named: steps.append(1) or stepped(self, *given, **named))
    monkeypatch.setattr(Run, "clock", lambda self: (1.0, self.at.step == 8))
    monkeypatch.setattr(lm, "evaluate", far_off)
    assert lm.train(config)["status"] == "interrupted"
    assert newest_checkpoint(folder_of(config)).name == "step_00000008"


def test_an_evaluation_of_ones_own_gives_numbers(lm, settings, monkeypatch):
    config, evaluate = settings(max_steps=1), lm.evaluate
    monkeypatch.setattr(lm, "evaluate", lambda *arguments: evaluate(*arguments) | {"norm": torch.tensor(0.5)})
    assert lm.train(config)["norm"] == 0.5
    for number, wrong in enumerate(({"val_loss": 1.0}, {"val_loss": 1.0, "val_bpb": [2.0]}, None)):
        monkeypatch.setattr(lm, "evaluate", lambda *_, wrong=wrong: wrong)
        with pytest.raises(UserError, match="evaluate: .*a dict of numbers, with val_loss and val_bpb"):
            lm.train(lm.replace(config, run_name=f"wrong{number}"))


def test_a_preflight_reads_no_more_than_the_run_will(lm, settings, monkeypatch):
    """Its text may end there: more would have to be tokenized, or fetched."""
    read, furthest = TokenWindows.read, [0]

    def noted(self, position, count):
        if self.split == "train":
            furthest[0] = max(furthest[0], position + count)
        return read(self, position, count)

    monkeypatch.setattr(TokenWindows, "read", noted)
    for steps in (1, 2):
        config = settings(max_steps=steps, max_hours=0.005)
        lm.train(config)
        assert furthest[0] == steps * config.batch_tokens // config.block_size


def test_a_best_score_at_a_skipped_step_has_its_checkpoint(lm, settings, monkeypatch):
    config = settings(max_steps=10, eval_every=5, checkpoint_every=100, keep_checkpoints=1, lr=0.02)
    summary = train_poisoned(lm, config, monkeypatch, lambda step: step == 5)
    assert summary["best_step"] == 5  # the other evaluation is of another text
    assert lm.load_run(folder_of(config), step=5)


def test_a_run_goes_on_in_another_precision_and_says_so(lm, settings, capsys):
    config = settings(max_steps=1, dtype="float32")
    lm.train(config)
    summary = lm.train(replace(config, max_steps=2, dtype="float16"))  # whose scaler nothing was saved of
    assert "were in float32 until here, and go on in float16" in capsys.readouterr().out
    assert summary["status"] == "finished" and summary["steps"] == 2


def test_a_gradient_is_clipped_unless_told_not_to(lm, settings):
    config, machine = settings(), Machine.find("cpu", "float32")
    for limit, kept in ((0.5, 0.5), (0.0, 5.0)):
        model = lm.build_model(config)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        model.embedding.weight.grad[0, 0], norms = 5.0, []
        sgd = torch.optim.SGD(model.parameters(), 1.0)
        sgd.param_groups[0]["peak_lr"] = 1.0
        sgd.register_step_pre_hook(lambda *_, m=model, n=norms: n.append(m.embedding.weight.grad.norm().item()))
        assert lm.step_weights(model, [sgd], machine.scaler(), 1.0, limit) == 5.0
        assert norms == [pytest.approx(kept, rel=1e-4)]


def test_a_bad_step_never_reaches_the_weights(lm, settings, monkeypatch):
    """A batch whose loss is not finite is skipped; when nothing else comes, the run ends as diverged."""
    config = settings(max_steps=40, checkpoint_every=5)
    summary = train_poisoned(lm, config, monkeypatch, lambda step: step == 3 or step > 20)
    folder = folder_of(config)
    assert summary["status"] == "diverged" and summary["steps"] == 20 + lm.MAX_BAD_STEPS
    lines = read_jsonl(folder / "metrics.jsonl")
    skipped = [line["step"] for line in lines if "skipped_window" in line]
    assert skipped == [3, *range(21, 21 + lm.MAX_BAD_STEPS)]
    assert lines[3]["skipped_window"] == 2 * config.batch_tokens // config.block_size
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(lm, folder).values())
    assert newest_checkpoint(folder).name == "step_00000020"


OUT_OF_MEMORY_PROGRAM = """
import resource, psutil
from data_utils import Batches
retry = Batches.retry
_, most = resource.getrlimit(resource.RLIMIT_AS)
def limited(batches, model, attempt):
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (128 << 20), most))
    try:
        return retry(batches, model, attempt)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
Batches.retry = limited
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process, as Linux can")
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(lm, settings):
    """A process that may take 128 MB more is given micro-batches that need about 500."""
    sizes = {"micro_batch": 8, "block_size": 64, "n_ffn": 2048, "batch_tokens": 8192, "max_steps": 2}
    fits = settings(run_name="fits", dtype="float32", **sizes)
    big = replace(fits, run_name="big", micro_batch=128)
    lm.train(fits)
    command = [sys.executable, "-c", OUT_OF_MEMORY_PROGRAM + TRAIN, json.dumps(big.to_dict())]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "out of memory; on with micro-batches of 64" in result.stdout
    losses = [metrics_of(config, "train_loss") for config in (fits, big)]
    assert len(losses[1]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA error: out of memory", "[enforce fail] bad_alloc",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "DefaultCPUAllocator: can't allocate memory",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)  # fmt: skip
def test_what_counts_as_out_of_memory(words):
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_one_sequence_that_does_not_fit_is_one_line(lm, settings, monkeypatch):
    def too_large(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(lm, "gradient", too_large)
    with pytest.raises(UserError, match="out of memory with one sequence"):
        lm.train(settings(micro_batch=2))


def test_micro_batch_auto_is_the_largest_that_fits(lm, tiny):
    config = tiny(micro_batch="auto", block_size=64, batch_tokens=64 * 48)
    model = lm.build_model(config)
    optimizers = lm.build_optimizers(model, config, Machine.find("cpu", "float32"))
    chosen = []
    for free in (1e6, 3e6, 1e7, 1e8, 1e12):
        size = choose_micro_batch(model, optimizers, config, torch.float32, free)
        needed = [sum(training_memory(model, optimizers, config, n, torch.float32).values()) for n in (size, 2 * size)]
        assert 48 % size == 0 and (size == 1 or needed[0] < 0.8 * free) and (size == 48 or needed[1] > 0.8 * free * 0.6)
        chosen.append(size)
    assert chosen == sorted(chosen) and chosen[0] == 1 and chosen[-1] == 48


def test_memory_is_predicted_for_shares_of_a_step_alone(lm, tiny, monkeypatch):
    config, asked = tiny(micro_batch="auto", block_size=1, batch_tokens=3 * 21841), []
    monkeypatch.setattr("model_utils.training_memory", lambda *arguments: asked.append(arguments[3]) or {"all": 1.0})
    assert choose_micro_batch(None, [], config, torch.float32, 0) == 1
    assert len(asked) < 20 and not any(65523 % size for size in asked)


def bytes_kept_for_backward(lm, config, dtype) -> int:
    """Of all tensors that autograd keeps in a step, each once, weights left out."""
    model, kept = lm.build_model(config), {}
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    tokens = torch.randint(config.vocab_size, (config.micro_batch, config.block_size))

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    choices = "aot_eager_decomp_partition"  # Inductor's choice of what to keep, without its kernels
    runner = torch.compile(model, dynamic=False, backend=choices) if config.compile else model
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = runner(tokens, tokens)
    loss.backward()
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize(
    "compiled, dtype", [(True, torch.float32), (False, torch.float32), (False, torch.bfloat16)], ids=str
)
def test_predicted_activations_are_what_a_block_keeps(lm, tiny, compiled, dtype):
    kept, predicted = [], []
    for n_layer in (1, 2):
        config = tiny(
            compile=compiled, n_layer=n_layer, n_embd=256, n_head=4, n_kv_head=2, n_ffn=704, vocab_size=512,
            block_size=512, batch_tokens=1024, micro_batch=2,
        )  # fmt: skip
        model = lm.build_model(config)
        memory = training_memory(
            model, lm.build_optimizers(model, config, Machine.find("cpu", "float32")), config, 2, dtype
        )
        copies = dtype.itemsize * multiplying_parameters(model) if dtype != torch.float32 else 0
        kept.append(bytes_kept_for_backward(lm, config, dtype) - copies)
        predicted.append(memory["activations"])
    assert kept[1] - kept[0] == pytest.approx(predicted[1] - predicted[0], rel=0.06)


def test_an_eager_run_chooses_its_micro_batch_for_an_eager_step(lm, settings, monkeypatch, capsys):
    """Here the compiler fails, and memory is what a compiled step of 8 sequences takes."""
    config = settings(
        compile=True, micro_batch="auto", block_size=512, batch_tokens=512 * 16, max_steps=1, dtype="float32"
    )
    model = lm.build_model(config)
    optimizers = lm.build_optimizers(model, config, Machine.find("cpu", "float32"))
    fits = sum(training_memory(model, optimizers, config, 8, torch.float32).values()) / 0.79
    monkeypatch.setattr(Machine, "free_memory", lambda machine: fits)

    assert choose_micro_batch(model, optimizers, config, torch.float32, fits) == 8

    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    lm.train(config)
    assert read_state(newest_checkpoint(folder_of(config)))["micro_batch"] == 4
    assert "eager, since torch.compile failed (RuntimeError: no compiler)" in capsys.readouterr().out


def test_float16_trains_with_a_scaled_loss_and_resumes(lm, settings, monkeypatch):
    """What a card without bfloat16 does, here on a CPU: the same losses as float32 to three digits."""
    wide, narrow = (settings(dtype=dtype, run_name=dtype, max_steps=6) for dtype in ("float32", "float16"))
    for config in (wide, narrow):
        lm.train(config)
    assert lm.train(replace(narrow, max_steps=8))["steps"] == 8
    assert metrics_of(narrow, "train_loss")[:6] == pytest.approx(metrics_of(wide, "train_loss"), rel=2e-3)
    state = read_state(newest_checkpoint(folder_of(narrow)))
    assert state["scaler"]["scale"] >= 1024


def test_a_run_that_ends_before_its_first_good_step_can_be_resumed(lm, settings, monkeypatch):
    """In float16 the first steps often overflow; there are no averages of the optimizers yet that could be kept."""
    config = settings(max_steps=2)
    assert train_poisoned(lm, config, monkeypatch, lambda step: True)["steps"] == 2
    assert lm.train(replace(config, max_steps=6))["status"] == "finished"


def test_preflight_says_no_before_anything_is_made(lm, settings, tmp_path, capsys, monkeypatch):
    machine, config = Machine.find("cpu"), settings(micro_batch=1)
    prediction = predict(*lm.outline(config, machine), config, machine, 1e5)
    prediction["last evaluation (s)"] = 90.0
    print_preflight(prediction, config, machine, "eager", tmp_path, 0.0, {"max_steps": prediction["tokens"]})
    printed = capsys.readouterr().out
    assert "then 0:01:30 to score all held-out text" in printed and "GB predicted" in printed and "limit" not in printed
    assert printed.endswith("  go\n")
    few = prediction | {"checkpoint (GB)": free_bytes(tmp_path) / 2e9}  # of four, one fits
    print_preflight(few, config, machine, "eager", tmp_path, 0.0, {"max_steps": prediction["tokens"]})
    assert "go, but make room on the disk" in capsys.readouterr().out
    for position, said in (("rope", False), ("absolute", True)):
        told = lm.replace(config, induction=True, position=position)
        print_preflight(prediction, told, machine, "eager", tmp_path, 0.0, {"max_steps": prediction["tokens"]})
        assert ("for position 'rope', not" in capsys.readouterr().out) == said
    with pytest.raises(UserError, match="no go: one sequence .* 99999.0 GB"):
        refuse_too_large(prediction | {"peak memory (GB)": 99999.0}, machine, tmp_path)
    with pytest.raises(UserError, match="no go: a checkpoint takes"):
        refuse_too_large(prediction | {"checkpoint (GB)": 1e6}, machine, tmp_path)
    before = machine.peak_memory()
    with pytest.raises(UserError, match="no go"):
        lm.train(settings(n_layer=64, n_embd=1 << 16, n_head=16, n_kv_head=16, n_ffn=1 << 18))
    with pytest.raises(UserError, match="no go: one sequence"):  # whatever micro_batch is
        lm.train(settings(n_ffn=1 << 22, n_layer=64, micro_batch=4))
    with pytest.raises(UserError, match="no go: micro_batch 32,768 .* or 'auto'"):  # the system would end the process
        lm.train(settings(block_size=1024, batch_tokens=1 << 25, micro_batch=1 << 15))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no go: one sequence .* n_layer"):
        patch.setitem(lm.train.__globals__, "build_model", None)  # by arithmetic: outlining so many takes minutes
        lm.train(settings(n_layer=4096, n_embd=1 << 13, n_ffn=1 << 15))
    assert machine.peak_memory() - before < 500e6 and not (tmp_path / "data").exists()


def test_what_is_predicted_counts_whole_steps_tables_and_the_copy_of_a_checkpoint(lm, settings, monkeypatch):
    def foretold(config, machine):
        return predict(*lm.outline(config, machine), config, machine, 1e5, used=(4, 256, 1.0))

    machine, config = Machine.find("cpu", "float32"), settings(max_steps=0, max_tokens=257, batch_tokens=64)
    assert foretold(config, machine)["tokens"] == 64
    assert foretold(replace(config, max_tokens=0, max_hours=1.001 / 3600), machine)["tokens"] == 128
    long = replace(config, n_position=1 << 20)  # two tables of angles, 8 channels in float32
    more = foretold(long, machine)["peak memory (GB)"] - foretold(config, machine)["peak memory (GB)"]
    assert more == pytest.approx(2 * (1 << 20) * config.head_size * 4 / 1e9, rel=0.01)
    on_gpu = replace(machine, device=torch.device("cuda"))  # whose checkpoints are copied to other memory
    shapes = lm.outline(config, machine)
    monkeypatch.setattr(Machine, "free_memory", lambda self: 10**12)
    peaks = [predict(*shapes, config, where, 1e5)["peak memory (GB)"] for where in (machine, on_gpu)]
    checkpoint = foretold(config, machine)["checkpoint (GB)"]
    assert peaks[0] - peaks[1] == pytest.approx(checkpoint)


def test_the_last_evaluation_is_foretold_from_what_one_computes_at_least(lm, settings, monkeypatch):
    monkeypatch.setattr("machinery.watch.time_between", lambda *_: [1.0] * 4)
    config = settings(eval_tokens=1, max_steps=2)
    summary = lm.train(config)
    data, batch = lm.prepare_data(config), config.block_size * config.micro_batch
    assert summary["predicted"]["last evaluation (s)"] == data.manifest["tokens"]["val"] / batch


def test_preflight_says_which_limit_of_the_budget_is_reached_first(lm, settings, capsys, monkeypatch):
    monkeypatch.setattr("machinery.watch.time_between", lambda *_: [1.0] * 4)
    config = settings(max_hours=100.0, max_tokens=5 * 64, max_steps=0, batch_tokens=64)
    assert budget_left(config, 1000.0, (1, 64, 3600.0)) == {"max_tokens": 256, "max_hours": 99 * 3600 * 1000.0}
    lm.train(config)
    said = capsys.readouterr().out
    assert "max_tokens is reached first; max_hours would be after 4 days, 4:00:00" in said
    assert "\n  forecast     n/a, no law for this text" in said


def test_memory_that_runs_out_beside_the_optimizer_s_state_is_found_before_the_clock_starts(lm, settings, monkeypatch):
    found, gradient, states = [], lm.gradient, lm.step_weights

    def no_room(runner, batches, *rest):
        if found and batches.at.micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient(runner, batches, *rest)

    def step(*arguments):
        found.append(1)
        return states(*arguments)

    monkeypatch.setitem(lm.train.__globals__, "gradient", no_room)
    monkeypatch.setitem(lm.train.__globals__, "step_weights", step)
    assert lm.train(settings(max_steps=2, micro_batch=4))["status"] == "finished"


def test_preflight_changes_nothing(lm, settings):
    """The losses of a run whose preflight steps on a copy of nothing are those of a loop written by hand."""
    config, machine = settings(max_steps=3, dtype="float32", micro_batch=2), Machine.find("cpu", "float32")
    lm.train(config)
    lines = metrics_of(config)
    data, model, at = lm.prepare_data(config), lm.build_model(config), lm.Progress(micro_batch=2)
    optimizers, batches, losses = lm.build_optimizers(model, config, machine), lm.Batches(data, config, machine, at), []
    for line in lines[1:]:
        losses.append(lm.gradient(model, batches, batches.micro_steps, machine, machine.scaler()).item())
        lm.step_weights(model, optimizers, machine.scaler(), line["lr"] / config.lr, config.grad_clip)
    assert losses == [line["train_loss"] for line in lines[1:]]


@pytest.mark.parametrize("compile", [False, True])
def test_what_is_tried_before_training_leaves_buffers_as_they_were(lm, settings, monkeypatch, compile):
    class Counting(lm.GatedFFN):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(self.training)
            return super().forward(x)

    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setitem(lm.FFNS, "counting", Counting)
    for steps in (2, 5):
        config = settings(ffn="counting", max_steps=steps, compile=compile)
        config = replace(config, run_name="counting")
        lm.train(config)
    assert weights_of(lm, Path(config.runs_dir) / "counting")["blocks.0.ffn.calls"] == 5


@pytest.mark.parametrize("steps", [3, 10, 12])
def test_a_model_that_only_gives_nan_has_diverged(lm, settings, monkeypatch, steps):
    monkeypatch.setitem(lm.FFNS, "nan", type("Nan", (lm.GatedFFN,), {"forward": lambda self, x: x * math.nan}))
    config = settings(ffn="nan", max_steps=steps)
    assert lm.train(config)["status"] == "diverged"
    summary = (folder_of(config) / "summary.json").read_text()
    assert "NaN" not in summary and "Infinity" not in summary


def test_a_run_that_ends_far_worse_than_guessing_has_diverged(lm, settings, capsys):
    assert lm.train(settings(embedding_lr=1e12, max_steps=4))["status"] == "diverged"
    assert "diverged: go on from the last checkpoint, if any, " in capsys.readouterr().out


def test_weights_that_diverged_at_the_end_replace_no_checkpoint(lm, settings):
    """What is said then, to go on from the last checkpoint with a lower lr, works."""
    rare = {"eval_every": 10**6, "checkpoint_every": 5, "keep_checkpoints": 1, "run_name": "late"}
    assert lm.train(settings(max_steps=12, **rare))["status"] == "finished"
    assert lm.train(settings(max_steps=20, lr=1e11, **rare))["status"] == "diverged"
    between = rare | {"checkpoint_every": 2}  # while the loss is finite and huge, and no evaluation has seen it
    assert lm.train(settings(max_steps=20, embedding_lr=1e12, **between))["status"] == "diverged"
    summary = lm.train(settings(max_steps=20, lr=1e-4, **rare))
    assert summary["status"] == "finished" and summary["val_loss"] < 7


def test_a_run_whose_end_is_not_on_the_disk_has_not_finished(lm, settings, monkeypatch, capsys):
    config = settings(max_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert lm.train(config)["status"] == "interrupted" and "No space left" in capsys.readouterr().out
    assert lm.train(config)["status"] == "finished"


def test_a_layer_that_drops_values_drops_none_outside_training(lm, settings, monkeypatch):
    """Evaluation, samples and a loaded model are the same each time; training goes on dropping."""

    class Dropping(lm.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(super().forward(x))

    monkeypatch.setitem(lm.FFNS, "dropping", Dropping)
    config, machine = settings(ffn="dropping", max_steps=2, dtype="float32"), Machine.find("cpu", "float32")
    lm.train(config)
    data, model = lm.prepare_data(config), lm.load_run(folder_of(config))[1]
    assert not model.training
    model.train()
    scores = [lm.evaluate(model, data, machine, 4, 512) for _ in range(3)]
    assert scores[0] == scores[1] == scores[2] and model.training
    texts = [lm.write_text(model, data.encoding, machine, "line", 8, temperature=0) for _ in range(3)]
    assert texts[0] == texts[1] == texts[2] and model.training
    tokens = torch.zeros(1, 16, dtype=torch.long)
    assert not torch.equal(model(tokens), model(tokens))  # it still drops
    assert torch.equal(attention_maps(model, tokens[0]), attention_maps(model, tokens[0])) and model.training


@pytest.mark.parametrize("compile", [False, True])
def test_a_part_that_is_kept_in_evaluation_mode_stays_in_it(lm, settings, monkeypatch, compile):
    class Frozen(lm.MLP):
        modes = set()

        def __init__(self, config):
            super().__init__(config)
            self.dropout = torch.nn.Dropout(0.5).eval()

        def forward(self, x):
            self.modes.add((self.training, self.dropout.training))
            return self.dropout(super().forward(x))

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: torch.nn.Sequential(model)[0])  # takes no time
    monkeypatch.setitem(lm.FFNS, "frozen", Frozen)
    lm.train(settings(ffn="frozen", max_steps=6, eval_every=2, compile=compile))
    assert Frozen.modes == {(True, False), (False, False)}


def test_checkpoints_come_by_the_clock_too(lm, settings):
    rare = {"checkpoint_every": 10**6, "eval_every": 10**6, "keep_checkpoints": 99}
    config = settings(max_steps=0, max_hours=3 / 3600, checkpoint_minutes=0.5 / 60, **rare)
    lm.train(config)
    assert 3 <= len(checkpoint_folders(folder_of(config))) <= 7


@pytest.mark.parametrize(
    "budget", [{"max_steps": 1}, {"max_steps": 0, "max_tokens": 1}, {"max_steps": 0, "max_hours": 1e-7}]
)
def test_the_first_step_learns_however_small_the_budget(lm, settings, budget):
    config = settings(warmup=0.5, **budget)
    assert lm.train(config)["steps"] == 1
    trained = lm.load_run(folder_of(config))[1].state_dict()
    first = lm.build_model(config).state_dict()
    assert all(not torch.equal(trained[name], first[name]) for name in ("embedding.weight", "norm.weight"))


@pytest.mark.parametrize("prompt", ["", "line " * 3, "line " * 100])
def test_any_prompt_gets_text(lm, settings, prompt):
    config = settings(max_steps=1, prompt=prompt)
    lm.train(config)
    sample = read_jsonl(folder_of(config) / "samples.jsonl")[-1]
    assert sample["prompt"] == prompt and sample["text"]


def test_samples_are_drawn_at_the_temperature_of_the_configuration(lm, settings):
    config = settings(max_steps=1, sample_temperature=0)
    lm.train(config)
    run = folder_of(config)
    _, model, encoding = lm.load_run(run)
    machine = Machine.find("cpu", config.dtype)
    cold, warm = (
        [lm.write_text(model, encoding, machine, config.prompt, config.sample_tokens, t, seed=s) for s in range(5)]
        for t in (0, 0.8)
    )
    assert {read_jsonl(run / "samples.jsonl")[-1]["text"]} == set(cold) and len(set(warm)) > 1


def test_time_left_and_progress_of_a_resumed_run_are_those_of_its_budget(lm, settings, capsys):
    """A run of an hour, stopped after a moment and resumed at its half."""
    config = settings(max_steps=0, max_hours=1 / 3600, eval_every=10**6)
    begun = lm.train(config)
    capsys.readouterr()
    lm.train(replace(config, max_hours=2 / 3600))
    lines = metrics_of(config)
    resumed = [line for line in lines if line["step"] > begun["steps"]]
    assert resumed[0]["progress"] > 0.5 and resumed[-1]["progress"] > 0.95
    for line in resumed:
        assert line["seconds_left"] == pytest.approx(max(0, 2 - line["seconds"]), abs=1e-6)
        assert line["progress"] == pytest.approx(min(1, line["seconds"] / 2))
    budget = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("budget"))
    assert "in 0:00:01" in budget  # not the two seconds of the whole


@pytest.mark.parametrize(("every", "between"), [((4, 6), 5), ((7, 10**6), 3), ((10**6, 10**6), 2)])
def test_time_left_counts_evaluations_and_samples(lm, settings, monkeypatch, every, between):
    """Each takes a second, and so does a step, as far as the preflight knows."""
    monkeypatch.setattr("machinery.watch.time_between", lambda *_: [1.0] * 4)
    config = settings(max_steps=12, eval_every=every[0], sample_every=every[1])
    assert lm.train(config)["predicted"]["seconds"] == pytest.approx(12 + between)
    for line in metrics_of(config):
        steps = 12 - line["step"]
        assert line["seconds_left"] >= steps * between / 12 and (steps or line["seconds_left"] == 0)


def test_starting_over_checks_everything_before_it_moves_anything(lm, settings):
    config = settings(max_steps=2)
    lm.train(config)
    folder = folder_of(config)
    before = sorted(path.name for path in folder.iterdir())
    long = {"block_size": 1 << 17, "batch_tokens": 1 << 17, "micro_batch": 1}  # a window is more than the text
    for wrong in ({"source": "nowhere/*.txt"}, {"optimizer": "adamww"}, {"n_embd": 1 << 22}, long):
        with pytest.raises(UserError):
            lm.train(replace(config, resume="never", **wrong))
        assert sorted(path.name for path in folder.iterdir()) == before
    (folder / "config.json").unlink()
    assert lm.train(replace(config, resume="never"))["status"] == "finished"
    assert (folder.with_name(folder.name + ".1") / "summary.json").exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"val_source": "mine"}], ids=str)
def test_a_checkpoint_of_another_run_is_not_gone_on_from(lm, settings, texts, change):
    if "val_source" in change:
        change = {"val_source": texts[0].replace("*", "00"), "source": texts[0].replace("*", "[1-9]*")}
    mine, other = settings(run_name="mine"), settings(run_name="other", max_steps=20, **change)
    lm.train(mine)
    lm.train(other)
    folder = Path(mine.runs_dir) / "mine"
    shutil.copytree(folder.with_name("other") / "checkpoints/step_00000020", folder / "checkpoints/step_00000020")
    with pytest.raises(UserError, match="step_00000020 is of another run, whose (seed was 1|text was '.*'), and here"):
        lm.train(replace(mine, max_steps=30))
    shutil.rmtree(folder / "checkpoints/step_00000020")
    assert lm.train(replace(mine, max_steps=14))["steps"] == 14


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_kept(lm, settings):
    config = settings(max_steps=12)
    lm.train(config)
    folder = folder_of(config)
    for checkpoint in checkpoint_folders(folder):
        (checkpoint / "model.safetensors").write_bytes(b"damaged")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="none of its .* checkpoints can be read"):
        lm.train(replace(config, max_steps=20))
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert lm.train(replace(config, resume="never"))["steps"] == 12


def test_a_run_tells_when_its_text_repeats_and_that_the_best_was_earlier(lm, settings, capsys):
    """A few texts, learned by heart: the held-out loss falls, then rises."""
    config = settings(
        max_steps=300, lr=0.03, n_layer=2, batch_tokens=512, micro_batch=32, eval_every=25, checkpoint_every=100,
        schedule="constant", val_fraction=0.5, eval_tokens=10**6,
    )  # fmt: skip
    summary = lm.train(config)
    printed = capsys.readouterr().out
    assert re.search(r"text +read \d+\.\d times \(what repeats adds less from about 4 on\)", printed)
    assert printed.count("it repeats now") == 1
    assert f"held-out loss was best at step {summary['best_step']:,}" in printed
    run = folder_of(config)
    assert [int(path.name[5:]) for path in checkpoint_folders(run)] == [summary["best_step"], 200, 300]
    _, best, _ = lm.load_run(run, step=summary["best_step"])
    scores = lm.evaluate(best, lm.prepare_data(config), Machine.find("cpu"), 32, math.inf)
    assert scores["val_bpb"] == pytest.approx(summary["best_val_bpb"], rel=0.01)
    with pytest.raises(UserError, match="step_00000007 is not there; there are step_"):
        lm.load_run(run, step=7)


def test_how_often_a_text_is_read_is_counted_in_windows(lm, settings, tmp_path, capsys):
    """The end of a text, less than a window, is never read: of 44 tokens, 32 are."""
    (tmp_path / "few").mkdir()
    for number, length in enumerate((40, 20)):
        (tmp_path / f"few/{number}.txt").write_text((f"abc def ghi {number} " * 9)[:length])
    config = settings(source=str(tmp_path / "few/*.txt"), val_fraction=0.3, batch_tokens=16, micro_batch=1)
    lm.train(replace(config, max_steps=7))
    printed, train = capsys.readouterr().out, lm.prepare_data(config).manifest["tokens"]["train"]
    assert train == 44 and "read 3.5 times" in printed and "step 2: the whole text was read" in printed


def test_runs_on_folders_of_one_name_that_hold_other_text_are_told_apart(lm, settings, texts, tmp_path, capsys):
    """A run keeps the last part of its source's path alone; other tokenizers and budgets have the same text."""
    folder = Path(texts[0]).parent
    shutil.copytree(folder, tmp_path / "other" / folder.name)
    for path in (tmp_path / "other" / folder.name).iterdir():
        path.write_text(path.read_text("utf-8") + "and more", "utf-8")
    own, base = {"run_name": "own", "tokenizer": "bpe", "vocab_size": 300}, {"source": str(folder), "max_steps": 1}
    there = {"run_name": "there", "source": str(tmp_path / "other" / folder.name)}
    moved = {"run_name": "moved", "source": str(shutil.copytree(folder, tmp_path / "of another name"))}
    for change in ({"run_name": "a"}, own, there, moved):
        lm.train(settings(**base | change))
    runs = [tmp_path / "runs" / name for name in ("a", "own", "there", "moved")]
    capsys.readouterr()
    plt.close(plot_runs(*runs[:2], runs[3]))
    assert not capsys.readouterr().out
    plt.close(plot_runs(runs[0], runs[2]))
    assert re.match(r"of runs scored on other .* a: source .*, [\d,]+ bytes; there: ", capsys.readouterr().out)


def test_nothing_secret_or_local_is_written_into_a_run(lm, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    config = settings(max_steps=2)
    lm.train(config)
    folder = folder_of(config)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        for secret in (str(tmp_path), str(Path.home()) + "/", os.environ["WANDB_API_KEY"], os.environ["HF_TOKEN"]):
            assert secret.encode() not in content, path


def test_compile_failure_falls_back_and_says_why(settings, tmp_path):
    """On a machine without a C++ compiler, here one whose PATH is empty and whose compile cache is new."""
    config = settings(compile=True, max_steps=2, device="cpu")
    env = os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", TRAIN, json.dumps(config.to_dict())]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "eager, since torch.compile failed" in result.stdout
    assert json.loads((folder_of(config) / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("compile", [False, True])
def test_a_second_training_leaves_no_first_model_behind(lm, settings, compile):
    import gc
    import weakref

    made = []
    real = lm.build_model

    def watched(config):
        model = real(config)
        made.append(weakref.ref(model))
        return model

    lm.build_model = watched
    try:
        lm.train(settings(max_steps=2, compile=compile, dtype="bfloat16", n_layer=1, schedule="linear"))
    finally:
        lm.build_model = real
    gc.collect()
    assert made and made[0]() is None


# ------------------------------------------------------------------------------------------------- W&B


@pytest.fixture
def fresh_wandb():
    """It reads the environment when it is first used in a process."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


def test_wandb_that_cannot_start_never_stops_a_run(lm, settings, monkeypatch, capsys, fresh_wandb):
    monkeypatch.setenv("WANDB_BASE_URL", "not a url")
    summary = lm.train(settings(wandb="online", max_steps=2))
    assert summary["status"] == "finished"
    assert "wandb is off" in capsys.readouterr().out


@pytest.mark.parametrize(
    "missing",
    ["no API key here", pytest.param("Failed to authenticate with http://127.0.0.1:9", marks=pytest.mark.long)],
)
def test_wandb_online_without_a_key_or_a_way_to_it_logs_offline_and_never_asks(
    lm, settings, monkeypatch, capsys, tmp_path, fresh_wandb, missing
):
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    if missing != "no API key here":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for input"))
    summary = lm.train(settings(wandb="online", max_steps=2))
    assert summary["status"] == "finished"
    said = capsys.readouterr().out
    assert missing in said and "logging offline" in said and list((tmp_path / "runs").glob("wandb/offline-run-*"))


@pytest.mark.parametrize("what", ["hangs", "has died"])
def test_wandb_that_does_not_end_or_has_died_is_told_and_left(tmp_path, monkeypatch, capsys, what):
    run = SimpleNamespace(summary={}, log=lambda *_, **options: None, finish=lambda **options: time.sleep(60))
    fake = SimpleNamespace(Settings=dict, init=lambda **options: run, teardown=sys.exit)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("machinery.loggers.WANDB_SECONDS", 0.5)
    loggers, service = Loggers(), psutil.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    loggers.start(tmp_path, {"wandb": "offline"})
    loggers._running["wandb"].processes = [service]
    if what == "has died":
        service.kill()
        os.waitid(os.P_PID, service.pid, os.WEXITED | os.WNOWAIT)
    loggers.tell(lambda logger: logger.metrics(1, {}))
    loggers.finish({})
    assert service.wait() and ("waiting up to" in (said := capsys.readouterr().out)) == (what == "hangs")
    assert said.count({"hangs": "wandb stopped (TimeoutError", "has died": "its process has died"}[what]) == 1


class Csv(Logger):
    """A logger of the reader's own: a class and a line."""

    def __init__(self, folder, config):
        self.path = folder / "metrics.csv"

    def metrics(self, step, values):
        with self.path.open("a") as file:
            file.write(f"{step},{values.get('train_loss', '')}\n")


class Broken(Logger):
    def metrics(self, step, values):
        raise ConnectionError("gone")


@pytest.mark.parametrize("content", ["a/../b", "", "link", "pipe"])
def test_the_id_of_wandb_belongs_to_a_folder_whatever_is_in_its_file_and_a_link_is_not_followed(
    tmp_path, monkeypatch, content
):
    made, path = [], tmp_path / "wandb_id"
    fake = SimpleNamespace(Settings=dict, init=lambda **options: made.append(options["id"]))
    monkeypatch.setitem(sys.modules, "wandb", fake)  # what it is given is looked at
    if content == "link":
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="wandb_id is a link"):
            LOGGERS["wandb"](tmp_path, {"wandb": "offline"})
        assert not (tmp_path / "elsewhere").exists()
        return
    if content == "pipe":
        os.mkfifo(path)
        with pytest.raises(UserError, match="wandb_id: not a regular file"):  # and it is not waited for
            LOGGERS["wandb"](tmp_path, {"wandb": "offline"})
        return
    path.write_text(content)
    for _ in range(2):
        LOGGERS["wandb"](tmp_path, {"wandb": "offline"})
    assert made[0] == made[1] and re.fullmatch("[0-9a-f]{16}", made[0])
    LOGGERS["wandb"](shutil.copytree(tmp_path, tmp_path / "copy"), {"wandb": "offline"})
    assert made[2] != made[0]  # a copy is another run


def test_a_logger_is_a_class_and_a_line_and_one_that_breaks_is_said_once(lm, settings, capsys, monkeypatch):
    monkeypatch.setitem(LOGGERS, "csv", Csv)
    monkeypatch.setitem(LOGGERS, "broken", Broken)
    config = settings(max_steps=4)
    assert lm.train(config)["status"] == "finished"
    assert len((folder_of(config) / "metrics.csv").read_text().splitlines()) == 5
    assert capsys.readouterr().out.count("broken stopped (ConnectionError: gone)") == 1


def test_an_optimizer_is_a_class_and_a_line(lm, settings, monkeypatch):
    class Sign(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay, precision=None):
            super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=0.9)

    monkeypatch.setitem(lm.OPTIMIZERS, "sgd", Sign)
    assert lm.train(settings(optimizer="sgd", max_steps=4))["status"] == "finished"
    with pytest.raises(UserError, match="optimizer 'sgdd' is not known; did you mean 'sgd'"):
        lm.train(settings(optimizer="sgdd"))


# ------------------------------------------------------------------------------------------------ machine


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 3090 Ti", 80.0), ("NVIDIA GeForce RTX 4060", 30.2),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2), ("NVIDIA GeForce RTX 5070 Ti", 87.9),
        ("NVIDIA GeForce RTX 5070 Ti Laptop GPU", None), ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None), ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA GH200 144G HBM3e", 989), ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250), ("NVIDIA GB200", None), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
        ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None), ("NVIDIA A10", 125),
        ("NVIDIA A10G", None), ("NVIDIA A10-24Q", None), ("NVIDIA RTX A4000", None), ("NVIDIA T400 4GB", None),
        ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112), ("Tesla V100S-PCIE-32GB", None),
    ],
)  # fmt: skip
def test_datasheets_are_found_by_name(name, tflops):
    assert datasheet_flops(name) == (tflops and tflops * 1e12)


@pytest.mark.skipif(sys.platform != "linux", reason="the system keeps the highest")
def test_peak_memory_can_begin_anew():
    machine = Machine.find("cpu")
    torch.ones(100 << 20)  # 400 MB, freed at once
    machine.release_memory()
    highest = machine.peak_memory()
    machine.forget_peak()
    assert machine.peak_memory() < highest - 300e6


@pytest.mark.skipif(sys.platform != "linux", reason="as containers are")
@pytest.mark.parametrize(("limit", "memory", "free"), [("max", math.inf, math.inf), ("3000000000", 3e9, 1.5e9)])
def test_memory_is_that_of_a_container_and_has_a_peak_where_linux_does_not_tell_it(monkeypatch, limit, memory, free):
    read, parts = Path.read_text, {"max": limit, "current": "2000000000", "stat": "file 9\ninactive_file 500000000\n"}
    files = {f"/sys/fs/cgroup/memory.{name}": text for name, text in parts.items()}
    files["/proc/self/status"] = "Name:\tpython\n"
    monkeypatch.setattr(Path, "read_text", lambda self, *args: files.get(str(self)) or read(self, *args))
    machine = Machine.find("cpu")
    assert machine.memory == min(memory, psutil.virtual_memory().total) and machine.free_memory() <= free
    assert 1e7 < machine.peak_memory() < 1e12


def test_a_gpu_that_pytorch_cannot_use_is_told_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "nvidia-smi").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine_module._say_unused_gpu.cache_clear()  # other tests have asked before
    for _ in range(2):
        assert Machine.find().device.type == "cpu"
    assert capsys.readouterr().out.count("finds no GPU") == 1


def test_more_processes_than_gpus_are_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 1 has no GPU to itself: there are 1"):
        Machine.find("cuda")


def test_machine_on_this_computer():
    machine = Machine.find("cpu")
    assert machine.dtype in (torch.float32, torch.bfloat16)  # by what the processor can
    assert Machine.find("cpu", "float32").dtype == torch.float32
    assert machine.memory > 1e9 and machine.peak_flops is None
    assert measure_matmul_flops(machine) > 1e9
    assert machine.peak_memory() > 1e7


def test_decoding_on_a_cpu_is_in_float32():
    machine, x = Machine.find("cpu", "bfloat16"), torch.ones(4, 4)
    with machine.autocast():
        assert (x @ x).dtype == torch.bfloat16
    with machine.autocast(decoding=True):
        assert (x @ x).dtype == torch.float32


def test_bfloat16_is_for_processors_that_multiply_it(monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has}, raising=False)
        assert Machine.find("cpu").dtype == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # an older PyTorch, which does not tell
    assert Machine.find("cpu").dtype == torch.float32


def test_a_gpu_is_asked_for_tf32_and_the_cpu_is_not_and_one_too_old_is_refused(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H200", total_memory=1)
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_capability": (9, 0), "get_device_properties": card,
        "set_device": None, "get_arch_list": ["sm_75", "sm_90a", "compute_120"],
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    try:
        assert Machine.find().peak_flops == 989e12
        assert torch.backends.cuda.matmul.fp32_precision == "tf32" != torch.backends.mkldnn.matmul.fp32_precision
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    with pytest.raises(UserError, match=r"H200 has compute capability 7\.0, and PyTorch .* is built for 7\.5 on"):
        Machine.find()


@pytest.mark.cuda
def test_training_on_cuda(lm, settings):
    config = settings(device="cuda", dtype="auto", compile=True, max_steps=6)
    summary = lm.train(config)
    assert summary["status"] == "finished" and 0 < summary["peak_memory_bytes"] < 1e9
    before = torch.cuda.memory_allocated()
    lm.train(settings(device="cuda", max_steps=2, run_name="second"))
    assert torch.cuda.memory_allocated() <= before
