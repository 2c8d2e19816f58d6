"""Which choices of the recipe earn their place: `demo` trained again and again, one change at a time, at fixed tokens.

    python -m bench.recipe                  the next runs that are missing, until none is; stop it at any time
    python -m bench.recipe --summary        results/recipe.md and .png from the runs there are
    python -m bench.recipe --seconds        seconds per step of both optimizers, on a quiet machine
    python -m bench.recipe --tokens 2200000 --threads 2 --only recipes

A run at fixed tokens gives the same loss on a slow or busy machine as on a fast one. Each has one thread, so several
can go side by side (`--jobs`). Results are lines of results/recipe.jsonl; what is there is not run again, failures
included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import RESULTS, ROOT, lm
from run_utils import read_jsonl

TOKENS, SEEDS = 500_000, (0, 1, 2)
SAME = "as it is"  # the default recipe of `demo`
SHARES = (0.7, 0.6, 0.5)  # of the tokens, with which the recipe may reach what the nanoGPT recipe reaches with all
NANOGPT = {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.1}  # and betas 0.9/0.95, which are the default

# One change each. Where a change would add or remove parameters, n_ffn makes up for it, unless the name says otherwise.
CHOICES: dict[str, dict] = {
    "lr × 0.5": {"lr": 0.0075},
    "lr × 2": {"lr": 0.03},
    "embedding_lr × 0.5": {"embedding_lr": 0.0075},
    "embedding_lr × 2": {"embedding_lr": 0.03},
    "batch_tokens × 0.5": {"batch_tokens": 1024},
    "batch_tokens × 2": {"batch_tokens": 4096},
    "cosine": {"schedule": "cosine"},
    "linear": {"schedule": "linear"},
    "wsd, decay 0.2": {"decay": 0.2},
    "wsd, decay 0.8": {"decay": 0.8},
    "no qk_norm": {"qk_norm": False},
    "weight_decay 0.1": {"weight_decay": 0.1},
    "MLP": {"ffn": "mlp", "n_ffn": 768},
    "LayerNorm": {"norm": "layer"},
    "2 layers × 256": {"n_layer": 2, "n_embd": 256, "n_head": 4, "n_ffn": 640},
    "8 layers × 128": {"n_layer": 8, "n_embd": 128, "n_head": 2, "n_ffn": 470},
    "untied (more parameters)": {"tie_embeddings": False},
    "MHA": {"attention": "mha", "n_ffn": 426},
    "6 heads of 32": {"n_head": 6, "n_kv_head": 2},
    "n_ffn 384 (fewer parameters)": {"n_ffn": 384},
    "n_ffn 768 (more parameters)": {"n_ffn": 768},
    "no warmup": {"warmup": 0.0},
    "warmup 0.1": {"warmup": 0.1},
    "no clipping": {"grad_clip": 1000.0},
    "absolute positions": {"position": "absolute"},
    "AdamW for all, lr 0.002": {"optimizer": "adamw", "lr": 0.002},
    "AdamW for all, lr 0.004": {"optimizer": "adamw", "lr": 0.004},
}

# --------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Run:
    """One training of `demo` with `overrides`, until `tokens`."""

    name: str
    overrides: dict
    seed: int
    tokens: int

    def config(self, runs_dir: str = "runs"):
        """Scored once: at the end, on all of the held-out text."""
        never = 10**9
        return lm.Config.from_preset(
            "demo", **self.overrides, seed=self.seed, max_tokens=self.tokens, max_hours=0.0, eval_every=never,
            sample_every=never, sample_tokens=1, checkpoint_every=never, runs_dir=runs_dir, data_dir=str(ROOT / "data"),
            compile=False,  # one thread computes as fast without
        )  # fmt: skip

    @property
    def key(self) -> tuple[str, int]:
        """What the result depends on: when the recipe changes, so do the keys of all runs that share it."""
        return self.config().identity, self.tokens


def train_once(run: Run) -> dict:
    """Train in this process; returns what summary.json and the last evaluation of metrics.jsonl say."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as folder:
        config = run.config(folder)
        summary = lm.train(config)
        metrics = read_jsonl(Path(folder) / config.run_name / "metrics.jsonl")
    scores = [{name: line[name] for name in ("val_bpb", "val_loss")} for line in metrics if line.get("val_bpb")]
    kept = {name: summary[name] for name in ("status", "parameters", "train_seconds", "tokens_per_second")}
    return kept | (scores[-1] if scores else {})


def train_apart(run: Run, threads: int) -> dict:
    """Train in a process of its own; returns the line for the results, which says so where it failed."""
    line = {"identity": run.key[0], **vars(run), "threads": threads}
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", "bench.recipe", "--one", json.dumps(vars(run))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        return line | {"status": "failed", "error": (done.stderr.strip() or "no message").splitlines()[-1]}
    return line | json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------- the queue


class Results:
    """The lines of results/recipe.jsonl, by what they depend on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.lines = {(line["identity"], line["tokens"]): line for line in lines}

    def add(self, line: dict) -> None:
        self.lines[line["identity"], line["tokens"]] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def loss(self, run: Run) -> float | None:
        """Bits per byte; infinite for a run that failed or diverged, None for one that is missing."""
        line = self.lines.get(run.key)
        return line and line.get("val_bpb", math.inf)


def nanogpt(lr: float, seed: int, tokens: int) -> Run:
    return Run(f"nanoGPT recipe, lr {lr:g}", NANOGPT | {"lr": lr, "embedding_lr": lr}, seed, tokens)


def tune(results: Results, tokens: int) -> tuple[float, bool]:
    """The learning rate at which the nanoGPT recipe is best, at seed 0, with both neighbours measured, and True.

    Or the one to measure next, and False.
    """
    rates = [0.001, 0.002, 0.004]
    while True:
        losses = {lr: results.loss(nanogpt(lr, 0, tokens)) for lr in rates}
        best = None if None in losses.values() else min(losses, key=losses.get)
        missing = [lr for lr, loss in losses.items() if loss is None] if best is None else []
        if missing:
            return missing[0], False
        neighbours = [lr for lr in (best / 2, best * 2) if lr not in rates]
        if not neighbours:
            return best, True
        rates += neighbours


def plan(results: Results, tokens: int, only: str = "all") -> list[Run]:
    """The runs in the order of their importance, as far as the results tell which.

    First the recipe against the nanoGPT recipe, whose learning rate is tuned first; then with how few tokens the
    recipe reaches the same loss; then every other choice, seed after seed.
    """
    lr, tuned = tune(results, tokens)
    if not tuned:
        return [Run(SAME, {}, 0, tokens), nanogpt(lr, 0, tokens)]
    runs = [run for seed in SEEDS for run in (Run(SAME, {}, seed, tokens), nanogpt(lr, seed, tokens))]
    if only == "all":
        runs += [Run(SAME, {}, seed, int(share * tokens)) for seed in SEEDS for share in SHARES]
        runs += [Run(name, overrides, seed, tokens) for seed in SEEDS for name, overrides in CHOICES.items()]
    return runs


def run_missing(results: Results, tokens: int, jobs: int, threads: int, only: str) -> None:
    """Run what is missing, `jobs` at a time, until nothing is."""
    lm.load_data(Run(SAME, {}, 0, tokens).config())  # once, and not by several at a time
    running = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            for run in plan(results, tokens, only):
                if len(running) < jobs and run.key not in results.lines and run.key not in running.values():
                    running[pool.submit(train_apart, run, threads)] = run.key
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                results.add(future.result())
                print(json.dumps(future.result(), ensure_ascii=False), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--only", choices=["all", "recipes"], default="all", help="recipes: without the single choices")
    parser.add_argument("--results", type=Path, default=RESULTS / "recipe.jsonl")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train_once(Run(**json.loads(options.one)))))
    else:
        run_missing(Results(options.results), options.tokens, options.jobs, options.threads, options.only)


if __name__ == "__main__":
    main()
