"""Fault drills: the ways in which long runs die, injected for real, many times over, and what was lost.

`make drill` runs them all and writes results/reliability.md; the tests run a short version of each. A drill takes a
folder to work in and how often to strike, and returns a `Result`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from machinery.files import read_jsonl, write_atomic
from machinery.machine import Machine
from machinery.run_folder import describe_environment
from tools.common import RESULTS, lm, quietly, table
from tools.drills.common import Result
from tools.drills.hostile import fuzz
from tools.drills.power import power_cuts
from tools.drills.processes import interrupt_kernel, kill_tokenization, kill_training, terminate
from tools.drills.services import bad_network, bad_wandb
from tools.drills.storage import corrupt_checkpoints, corrupt_shards, full_disk

DRILLS = [
    (kill_training, 50), (kill_tokenization, 15), (interrupt_kernel, 20), (terminate, 10), (full_disk, 3),
    (power_cuts, 1_500), (corrupt_checkpoints, 120), (corrupt_shards, 80), (fuzz, 10_000), (bad_network, 6),
    (bad_wandb, 3),
]  # fmt: skip


def checkpoint_cost(folder: Path) -> tuple[float, list[float]]:
    """Time of `demo` steps with checkpoints at the default interval over time without, interleaved: median and all."""
    ratios = []
    for number in range(3):
        seconds = {}
        for every in (300, 10**6) if number % 2 else (10**6, 300):
            config = lm.Config.from_preset(
                "demo", data_dir=str(folder / "data"), runs_dir=str(folder / "cost"), run_name=f"cost{number}-{every}",
                max_steps=330, max_hours=0.0, checkpoint_every=every, eval_every=10**6, sample_every=10**6,
            )  # fmt: skip
            quietly(lm.train, config)
            lines = read_jsonl(Path(config.runs_dir) / config.run_name / "metrics.jsonl")
            seconds[every] = lines[-1]["seconds"] - lines[10]["seconds"]
        ratios.append(seconds[300] / seconds[10**6])
    return statistics.median(ratios), ratios


def main() -> None:
    torch.set_num_threads(1)  # the models are tiny, and the processes of a drill share the machine
    rows, begun = [], time.perf_counter()
    for drill, times in DRILLS:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            result = drill(Path(folder) / "drill", times)
            rows.append(report_row(result, time.perf_counter() - started))
            print(rows[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cost, ratios = checkpoint_cost(Path(folder))
    environment = describe_environment(Machine.find("cpu"))
    print(write_reliability(rows, cost, ratios, environment, time.perf_counter() - begun))


COLUMNS = {
    "fault": "", "injected": "d", "survived": "d", "most steps lost": "d", "identical": "", "": "", "seconds": ".0f",
}  # fmt: skip


def report_row(result: Result, seconds: float) -> dict:
    """A drill's row of the table."""
    identical = {None: None, True: "yes", False: "NO"}[result.identical]
    values = (result.kind, result.injected, result.survived, result.lost, identical, result.note, seconds)
    return dict(zip(COLUMNS, values))


def write_reliability(rows: list[dict], cost: float, ratios: list[float], environment: dict, seconds: float) -> str:
    """results/reliability.md; returns its text."""
    machine = f"{environment['cpu_count']} × {environment['cpu']}, torch {environment['versions']['torch']}"
    pairs = ", ".join(f"{ratio - 1:+.1%}" for ratio in ratios)
    text = f"""# Reliability

`make drill`, {environment["started"][:10]}, {machine}, Python {environment["python"]}: {seconds / 60:.0f} minutes.

Faults are real: killed processes, a full file system, damaged files, a hub that misbehaves. Of power
cuts, states that the disk may be in are rebuilt from the kernel's record of what was written and flushed. In the drills
a checkpoint is begun every 5 steps, once the one before is on the disk, so a fault costs 10 steps at most. *Identical*
compares final weights, or shards, with those of an undisturbed run, bit for bit.

{table(rows, COLUMNS)}

Cost of checkpoints at the default interval of `demo` (every 300 steps): {cost - 1:+.1%} of the time of the same steps
without, the median of {len(ratios)} interleaved pairs ({pairs}).
"""
    write_atomic(RESULTS / "reliability.md", text)
    return text


if __name__ == "__main__":
    main()
