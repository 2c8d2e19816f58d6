"""What the drills share: a tiny run, and the row that a drill returns."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from machinery.files import read_jsonl
from machinery.notebook import train_elsewhere
from tools.common import lm, quietly


@dataclass
class Result:
    """One row of the table. `lost` and `identical` are None where a fault has no steps or weights."""

    kind: str
    injected: int
    survived: int
    lost: int | None = None  # most steps lost to one fault; a checkpoint is written every `every` steps
    identical: bool | None = None  # final weights or shards equal those of an undisturbed run
    note: str = ""


def make_texts(folder: Path, files: int = 20, lines: int = 80) -> str:
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
        "source": make_texts(folder / "texts"), "val_fraction": 0.1, "tokenizer": "bytes", "vocab_size": 257,
        "n_embd": 32, "n_ffn": 48, "block_size": 16, "batch_tokens": 64, "micro_batch": 2, "max_steps": 400,
        "eval_every": 50, "eval_tokens": 256, "sample_every": 10**6, "sample_tokens": 4, "checkpoint_every": 5,
        "data_dir": str(folder / "data"), "runs_dir": str(folder / "runs"), "run_name": "drill", "device": "cpu",
    }  # fmt: skip
    return lm.Config.from_preset("smoke", **values | overrides)


def weights(config) -> dict:
    """The final weights of a run, by name."""
    return quietly(lm.load_run, Path(config.runs_dir) / config.run_name)[1].state_dict()


def equal(first: dict, second: dict) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return all(torch.equal(first[name], second[name]) for name in first)


def start_training(config, **options) -> subprocess.Popen:
    """Train in a process of its own with one thread: the models are tiny, and the processes share the machine."""
    return train_elsewhere(config, env={"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, **options)


def wait_for_step(folder: Path, process: subprocess.Popen | None = None) -> None:
    """Return once the log of a run folder has a step more, or `process` has ended."""
    begun = last_step(folder)
    while last_step(folder) <= begun and (process is None or process.poll() is None):
        time.sleep(0.005)


def last_step(folder: Path) -> int:
    """The last step that the log of a run folder holds."""
    return max((line["step"] for line in read_jsonl(folder / "metrics.jsonl")), default=0)
