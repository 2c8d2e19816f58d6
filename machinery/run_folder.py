"""The run directory: its lock, its log, its mirror in W&B, and a view of it from anywhere.

runs/<run_name>/
    config.json  environment.json  tokenizer.json     what the run is, and what produced it
    metrics.jsonl  samples.jsonl                      a line a step, complete at every moment
    summary.json                                      how it ended
    checkpoints/                                      checkpoint_utils
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from machinery.machine import Machine, cpu_name
from machinery.notebook import NOTEBOOK


def portable(config: dict) -> dict:
    """The config without the folders of one machine: of an absolute path, the last part."""
    return {
        name: f"…/{Path(value).name}" if isinstance(value, str) and Path(value).expanduser().is_absolute() else value
        for name, value in config.items()
    }


def describe_environment(machine: Machine) -> dict:
    """Versions, hardware and source identity: what is needed to say later what produced a run. No paths, no names."""
    packages = ("torch", "numpy", "tiktoken", "rustbpe", "datasets", "safetensors", "transformers", "wandb")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "device": machine.name,
        "device_memory_bytes": machine.memory,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "commit": _commit(),
        "notebook_sha256": hashlib.sha256(NOTEBOOK.read_bytes()).hexdigest() if NOTEBOOK.exists() else None,
    }


def _commit() -> str | None:
    """The checked-out commit, with "+" after it when files differ from it."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        here = Path(__file__).parents[1]
        git = ["git", "-C", str(here)]
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain"], text=True, stderr=subprocess.DEVNULL)
        return commit + ("+" if changed.strip() else "")
    return None
