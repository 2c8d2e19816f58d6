"""Runs at fixed tokens, each in a process of its own, kept as lines of a file: what is there is not run again.

Tokens are fixed, so the loss does not depend on the machine's speed. Each run has one thread; several go side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path

from data_utils import prepare_data
from machinery.errors import UserError, plain_errors
from machinery.files import read_json, read_jsonl
from machinery.machine import Machine
from tools.bench.common import in_own_process
from tools.common import ROOT, lm, quietly, train_apart

DATA = ROOT / "data"


@dataclass(frozen=True)
class Run:
    """One training of `demo` with `overrides` until `tokens`, scored `scores` times, the last on all held-out text.

    `by` is who trains: "" the notebook, or a variant of tools/bench/nanochat.py, whose rates are times `scale`.
    """

    name: str
    overrides: dict = field(hash=False)
    seed: int
    tokens: int
    by: str = ""
    scale: float = 1.0
    scores: int = 1

    def config(self, runs_dir: str = "runs"):
        """That of the run."""
        never = 10**9
        config = lm.Config.from_preset(
            "demo", **self.overrides, seed=self.seed, max_tokens=self.tokens, max_hours=0.0, sample_every=never,
            sample_tokens=1, checkpoint_every=never, runs_dir=runs_dir, data_dir=str(DATA),
        )  # fmt: skip
        steps = self.tokens / config.batch_tokens
        return replace(config, eval_every=never if self.scores == 1 else max(1, round(steps / self.scores)))

    @cached_property
    def key(self) -> str:
        """What the result depends on: when the recipe changes, so do the keys of all runs that share it."""
        return f"{self.config().identity} {self.tokens} {self.by} {self.scale:g} {self.scores}"


def train_run(run: Run) -> dict:
    """Train in a process of its own; returns the line for the results, which says so where it failed."""
    machine = Machine.find()
    where = {"date": str(date.today()), "device": machine.name, "dtype": str(machine.dtype)[6:], "threads": 1}
    line = {"key": run.key, **vars(run), **where}
    if run.by:
        try:
            return line | in_own_process("tools.bench.nanochat", run.config().to_dict(), run.by, run.scale, threads=1)
        except RuntimeError as error:
            return line | {"status": "failed", "error": str(error)[:300]}
    with tempfile.TemporaryDirectory() as folder:
        config = run.config(folder)
        if error := train_apart(config, threads=1):
            return line | {"status": "failed", "error": error}
        summary = read_json(Path(folder) / config.run_name / "summary.json")
        metrics = read_jsonl(Path(folder) / config.run_name / "metrics.jsonl")
    curve = [[x["progress"], x["val_bpb"]] for x in metrics if x.get("val_bpb")]
    kept = {name: summary[name] for name in ("status", "parameters", "train_seconds", "val_bpb", "val_loss")}
    return line | kept | ({"curve": curve} if run.scores > 1 else {})


class Results:
    """The lines of a file, by what they depend on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.lines = {line["key"]: line for line in lines}

    def add(self, line: dict) -> None:
        """Keep a line, here and in the file."""
        self.lines[line["key"]] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def loss(self, run: Run) -> float | None:
        """Bits per byte; infinite for a run that failed or diverged, None for one that is missing."""
        line = self.lines.get(run.key)
        return line and line.get("val_bpb", math.inf)

    def losses(self, run: Run, seeds: Iterable[int]) -> dict[int, float]:
        """Bits per byte of a run with each of the seeds there are."""
        return {seed: loss for seed in seeds if (loss := self.loss(replace(run, seed=seed))) is not None}


def parser_of_runs(doc: str) -> argparse.ArgumentParser:
    """The options of a program that makes runs and writes what they gave; `doc` says what it does."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--summary", action="store_true", help="write what there is, train nothing")
    return parser


def run_missing(results: Results, plan: Callable[[], list[Run]], jobs: int) -> None:
    """Run what of `plan()` is missing, in its order and `jobs` at a time, until nothing is."""
    plain_errors()  # Ctrl-C: the same command goes on
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; give 1 or more")
    running, prepared = {}, set()
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            for run in plan():
                if len(running) < jobs and run.key not in results.lines and run.key not in running.values():
                    config = run.config()
                    if config.source not in prepared:  # once, and not by several at a time
                        quietly(prepare_data, config)
                        prepared.add(config.source)
                    running[pool.submit(train_run, run)] = run.key
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                results.add(future.result())
                print(json.dumps(future.result(), ensure_ascii=False), flush=True)


# ---------------------------------------------------------------------------------------------- statistics


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean of some runs and its standard error; that of one run is not known, nan."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired_effect(changed: dict[int, float], base: dict[int, float]) -> tuple[float, float, int]:
    """Mean difference of runs with the same seed, so the same batches; its standard error; and how many pairs."""
    shared = changed.keys() & base.keys()
    return *mean_and_error(changed[seed] - base[seed] for seed in shared), len(shared)


def verdict(effect: float, error: float) -> str:
    """Lower is better: "better" or "worse" where an effect is more than two of its standard errors."""
    if math.isnan(error):
        return "one run"
    return "better" if effect < -2 * error else "worse" if effect > 2 * error else "no difference seen"
