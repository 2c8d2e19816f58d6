"""What the drills share: a tiny run, a process that trains it, and the row that a drill returns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and the processes of a drill share the machine

import torch  # noqa: E402

from machinery.files import read_jsonl  # noqa: E402
from machinery.notebook import load_definitions  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
lm = load_definitions()


@dataclass
class Result:
    """One row of the table. `lost` and `identical` are None where a fault has no steps or weights."""

    kind: str
    injected: int
    survived: int
    lost: int | None = None  # most steps lost to one fault; a checkpoint is written every `every` steps
    identical: bool | None = None  # final weights and shards equal those of an undisturbed run
    note: str = ""


def quietly(function, *arguments, **options):
    """Call a function without its prints."""
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        return function(*arguments, **options)


def make_texts(folder: Path, files: int = 60, lines: int = 80) -> str:
    """A folder of text files; returns their glob."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        (folder / f"{i:03d}.txt").write_text(
            f"Chapter {i}\n" + f"line {i} of a text, ünïcode 🙂 and all\n" * (lines + i)
        )
    return str(folder / "*.txt")


def tiny_config(folder: Path, **overrides):
    """A run of a few kilobytes per checkpoint, on local text, with bytes as tokens."""
    values = {
        "source": make_texts(folder / "texts"), "val_fraction": 0.2, "tokenizer": "bytes", "vocab_size": 257,
        "n_embd": 32, "n_ffn": 48, "block_size": 16, "batch_tokens": 64, "micro_batch": 2, "max_steps": 400,
        "eval_every": 50, "eval_tokens": 256, "sample_every": 10**6, "sample_tokens": 4, "checkpoint_every": 5,
        "data_dir": str(folder / "data"), "runs_dir": str(folder / "runs"), "run_name": "drill", "device": "cpu",
    }  # fmt: skip
    return lm.Config.from_preset("smoke", **values | overrides)


def weights(config) -> dict:
    """The final weights of a run, by name."""
    return quietly(lm.load_run, Path(config.runs_dir) / config.run_name)[1].state_dict()


def equal(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


TRAIN = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
from machinery.notebook import load_definitions
lm = load_definitions()
lm.train(lm.Config.from_dict(json.loads(sys.argv[2])))
"""


def start_training(config, **options) -> subprocess.Popen:
    """Train in a process of its own."""
    command = [sys.executable, "-c", TRAIN, str(ROOT), json.dumps(config.to_dict())]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)


def last_step(folder: Path) -> int:
    return max((line["step"] for line in read_jsonl(folder / "metrics.jsonl")), default=0)
