"""What the benchmarks share: clocks that take turns, a batch, and processes of their own."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from machinery.run_folder import describe_environment, versions_of
from tools.common import ROOT

PACKAGES = ("torch", "transformers", "x-transformers", "tiktoken", "tokenizers", "datasets")


def take_turns(calls: dict[str, Callable], machine, rounds: int) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that whatever slows the machine slows them all.

    The first round is not timed: it compiles and warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, call in calls.items():
            machine.synchronize()
            start = time.perf_counter()
            call()
            machine.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def pair_for(config, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and targets (batch, T) on the device, the same each time."""
    rows = torch.randint(config.vocab_size, (batch, config.block_size + 1), generator=torch.Generator().manual_seed(1))
    rows = rows.to(device)
    return rows[:, :-1].clone(), rows[:, 1:].clone()


def in_own_process(module: str, *arguments, threads: int = 0) -> dict:
    """What `python -m module` prints as its last line, given `arguments` as JSON; `threads` are as here unless given.

    Raises its error as RuntimeError.
    """
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads or torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", done.stderr, re.MULTILINE)
        raise RuntimeError(f"{module}: {errors[-1] if errors else 'no message'}")
    return json.loads(done.stdout.splitlines()[-1])


def benchmark_environment(machine) -> dict:
    """Versions, hardware and threads: what a figure is worth nothing without."""
    return describe_environment(machine) | {"versions": versions_of(PACKAGES), "threads": torch.get_num_threads()}


def slug(machine) -> str:
    """The machine's name as part of a file's name, with the number of threads where those count."""
    threads = f" {torch.get_num_threads()} threads" if machine.device.type == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", (machine.name + threads).lower()).strip("-")
