"""Which choices of the recipe earn their place: `demo` trained again and again, one change at a time, at fixed tokens.

    python -m tools.bench.recipe                  the next runs that are missing, until none is; stop it at any time
    python -m tools.bench.recipe --summary        results/recipe.md and .png from the runs there are
    python -m tools.bench.recipe --seconds        seconds per step of both optimizers, on a quiet machine
    python -m tools.bench.recipe --tokens 2200000 --threads 2 --only recipes

A run at fixed tokens gives the same loss on a slow or busy machine as on a fast one. Each has one thread, so several
can go side by side (`--jobs`). Results are lines of results/recipe.jsonl; what is there is not run again, failures
included.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from data_utils import prepare_data
from machinery.errors import UserError, plain_errors
from machinery.files import read_json, read_jsonl
from machinery.machine import Machine
from tools.bench.common import benchmark_environment, take_turns
from tools.common import RESULTS, ROOT, lm, table
from tools.training import train_apart

DATA = ROOT / "data"
SECONDS = RESULTS / "recipe-seconds.json"
TOKENS, SEEDS = 500_000, (0, 1, 2)
SAME = "as it is"  # the default recipe of `demo`
SHARES = (0.7, 0.5, 0.35)  # of the tokens, with which the recipe may reach what the nanoGPT recipe reaches with all
NANOGPT = {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.1}  # and betas 0.9/0.95, which are the default

# One change each. Where a change would add or remove parameters, n_ffn makes up for it, unless the name says otherwise.
CHOICES: dict[str, dict] = {
    "embedding_lr × 0.5": {"embedding_lr": 0.015},
    "embedding_lr × 2": {"embedding_lr": 0.06},
    "lr × 0.5": {"lr": 0.0075},
    "lr × 2": {"lr": 0.03},
    "AdamW for all, lr 0.004": {"optimizer": "adamw", "lr": 0.004, "embedding_lr": 0.004},
    "batch_tokens × 0.5": {"batch_tokens": 1024},
    "batch_tokens × 2": {"batch_tokens": 4096},
    "cosine": {"schedule": "cosine"},
    "wsd, decay 0.2": {"decay": 0.2},
    "wsd, decay 0.8": {"decay": 0.8},
    "no qk_norm": {"qk_norm": False},
    "2 layers × 256": {"n_layer": 2, "n_embd": 256, "n_head": 4, "n_ffn": 640},
    "8 layers × 128": {"n_layer": 8, "n_embd": 128, "n_head": 2, "n_ffn": 470},
    "n_ffn 384 (fewer parameters)": {"n_ffn": 384},
    "MLP": {"ffn": "mlp", "n_ffn": 768},
    "weight_decay 0.1": {"weight_decay": 0.1},
    "no warmup": {"warmup": 0.0},
    "MHA": {"attention": "mha", "n_ffn": 426},
    "untied (more parameters)": {"tie_embeddings": False},
    "LayerNorm": {"norm": "layer"},
    "6 heads of 32": {"n_head": 6, "n_kv_head": 2},
    "no clipping": {"grad_clip": 1000.0},
    "absolute positions": {"position": "absolute"},
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
            sample_every=never, sample_tokens=1, checkpoint_every=never, runs_dir=runs_dir, data_dir=str(DATA),
        )  # fmt: skip

    @property
    def key(self) -> tuple[str, int]:
        """What the result depends on: when the recipe changes, so do the keys of all runs that share it."""
        return self.config().identity, self.tokens


def train_run(run: Run, threads: int) -> dict:
    """Train in a process of its own; returns the line for the results, which says so where it failed."""
    machine = Machine.find()
    where = {"date": str(date.today()), "device": machine.name, "dtype": str(machine.dtype)[6:], "threads": threads}
    line = {"identity": run.key[0], **vars(run), **where}
    with tempfile.TemporaryDirectory() as folder:
        config = run.config(folder)
        if error := train_apart(config, threads):
            return line | {"status": "failed", "error": error}
        summary = read_json(Path(folder) / config.run_name / "summary.json")
        metrics = read_jsonl(Path(folder) / config.run_name / "metrics.jsonl")
    scores = [{name: line[name] for name in ("val_bpb", "val_loss")} for line in metrics if line.get("val_bpb")]
    kept = {name: summary[name] for name in ("status", "parameters", "train_seconds", "tokens_per_second")}
    return line | kept | (scores[-1] if scores else {})


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
    recipe reaches the same loss; then one choice after the other, each with all seeds.
    """
    lr, tuned = tune(results, tokens)
    if not tuned:
        return [Run(SAME, {}, 0, tokens), nanogpt(lr, 0, tokens)]
    runs = [run for seed in SEEDS for run in (Run(SAME, {}, seed, tokens), nanogpt(lr, seed, tokens))]
    if only == "all":
        runs += [Run(SAME, {}, seed, int(share * tokens)) for seed in SEEDS for share in SHARES]
        runs += [Run(name, overrides, seed, tokens) for name, overrides in CHOICES.items() for seed in SEEDS]
    return runs


def run_missing(results: Results, tokens: int, jobs: int, threads: int, only: str) -> None:
    """Run what is missing, `jobs` at a time, until nothing is."""
    prepare_data(Run(SAME, {}, 0, tokens).config())  # once, and not by several at a time
    running = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            for run in plan(results, tokens, only):
                if len(running) < jobs and run.key not in results.lines and run.key not in running.values():
                    running[pool.submit(train_run, run, threads)] = run.key
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                results.add(future.result())
                print(json.dumps(future.result(), ensure_ascii=False), flush=True)


# ----------------------------------------------------------------------------------------- the summary


def effects_of_changes(results: Results, tokens: int) -> list[dict]:
    """A row per choice that has a result: bits per byte less those of the recipe with the same seed, best first."""
    rows = []
    for name, overrides in CHOICES.items():
        pairs = {}
        for seed in SEEDS:
            ours, changed = (results.loss(Run(n, o, seed, tokens)) for n, o in ((SAME, {}), (name, overrides)))
            if ours is not None and changed is not None:
                pairs[seed] = changed - ours
        if pairs:
            line = results.lines[Run(name, overrides, next(iter(pairs)), tokens).key]
            values = list(pairs.values())
            rows.append({
                "choice": name, "effect": statistics.fmean(values), "values": values, "runs": len(values),
                "parameters": line.get("parameters"), "spread": statistics.stdev(values) if len(values) > 1 else None,
            })  # fmt: skip
    return sorted(rows, key=lambda row: row["effect"])


def verdict(row: dict, noise: float) -> str:
    """Whether an effect is more than twice the standard error that `noise`, the spread over seeds, gives it."""
    error = 2 * noise * math.sqrt(2 / row["runs"])
    return "better" if row["effect"] < -error else "worse" if row["effect"] > error else "no difference seen"


def losses_of(results: Results, make: Callable[[int], Run]) -> list[float]:
    """Bits per byte of the seeds there are."""
    return [loss for seed in SEEDS if (loss := results.loss(make(seed))) is not None]


def scored(losses: list[float]) -> dict:
    """Mean, standard deviation and number of some bits per byte, as cells of a table."""
    deviation = statistics.stdev(losses) if len(losses) > 1 else None
    return {"bits per byte": statistics.fmean(losses), "±": deviation, "seeds": len(losses)}


def nanogpt_rates(results: Results, tokens: int) -> dict[float, list[float]]:
    """Bits per byte of the nanoGPT recipe, by learning rate."""
    rates = sorted({line["overrides"]["lr"] for line in results.lines.values() if "lr" in line["overrides"]})
    found = {lr: losses_of(results, lambda seed, lr=lr: nanogpt(lr, seed, tokens)) for lr in rates}
    return {lr: losses for lr, losses in found.items() if losses}


def budgets(results: Results, tokens: int) -> dict[int, list[float]]:
    """Bits per byte of the recipe, by the tokens that its run had."""
    sizes = [int(share * tokens) for share in SHARES] + [tokens]
    found = {size: losses_of(results, lambda seed, size=size: Run(SAME, {}, seed, size)) for size in sorted(sizes)}
    return {size: losses for size, losses in found.items() if losses}


def write_summary(results: Results, tokens: int, folder: Path = RESULTS) -> None:
    """recipe.md and recipe.png in `folder`, of the results there are."""
    ours, theirs, (lr, tuned) = budgets(results, tokens), nanogpt_rates(results, tokens), tune(results, tokens)
    if len(ours.get(tokens, [])) < 2 or not theirs:
        raise UserError(
            f"{results.path}: too few runs of {tokens:,} tokens of the recipe as it is now; `make recipe` makes them"
        )
    reached = [
        size for size, losses in ours.items() if tuned and statistics.fmean(losses) <= statistics.fmean(theirs[lr])
    ]
    share = f"{min(reached) / tokens:.2f}× or less" if reached else "more than all"
    noise, rows = statistics.stdev(ours[tokens]), effects_of_changes(results, tokens)
    failed = [line for line in results.lines.values() if line["status"] != "finished"]
    seconds = json.loads(SECONDS.read_text()) if SECONDS.exists() else {"seconds": None}
    places = {(line["date"], line["device"], line["dtype"]) for line in results.lines.values()}
    text = TEXT.format(
        tokens=tokens, about="; ".join("{}, {}, matrix products in {}".format(*place) for place in sorted(places)),
        recipes=table(
            [{"recipe": f"nanoGPT, lr {rate:g}", "tokens": tokens} | scored(losses) for rate, losses in theirs.items()]
            + [{"recipe": "the default", "tokens": size} | scored(losses) for size, losses in ours.items()],
            {"recipe": "", "tokens": ",d", "bits per byte": ".4f", "±": ".4f", "seeds": "d"},
        ),
        share=share, time=time_text(seconds["seconds"], min(reached) / tokens if reached else 1.0), noise=noise,
        failed=", ".join(f"{line['name']} (seed {line['seed']})" for line in failed) or "none",
        choices=table(
            [row | {"": verdict(row, noise)} for row in rows],
            {"choice": "", "effect": "+.4f", "spread": ".4f", "runs": "d", "parameters": ",d", "": ""},
        ),
        rules=table([dict(zip(("of", "rule", "here", "source"), rule)) for rule in RULES],
                    {"of": "", "rule": "", "here": "", "source": ""}),
    )  # fmt: skip
    (folder / "recipe.md").write_text(text)
    draw_recipe(folder / "recipe.png", rows, ours, theirs, noise, tokens)


def time_text(seconds: dict[str, float] | None, share: float) -> str:
    """What the share of the tokens is in time, where seconds per step are measured."""
    if not seconds:
        return " Seconds per step of both are not measured yet (`--seconds`)."
    ratio = seconds[SAME] / seconds["nanoGPT recipe"]
    return (
        f" A step takes {ratio:.2f}× the time (measured in turns), so that is {share * ratio:.2f}× of its time or less."
    )


def draw_recipe(path: Path, rows: list[dict], ours: dict, theirs: dict, noise: float, tokens: int) -> None:
    """Left: the effect of each choice, a dot for each seed. Right: loss against tokens, beside the nanoGPT recipe's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.26 * len(rows) + 2), width_ratios=(2, 1))
    left.axvspan(-2 * noise, 2 * noise, color="gray", alpha=0.2, label="twice the spread over seeds")
    for place, row in enumerate(reversed(rows)):
        left.plot(row["values"], [place] * row["runs"], "o", color="tab:blue", alpha=0.5)
        left.plot(row["effect"], place, "|", color="tab:red", markersize=14)
    left.set_yticks(range(len(rows)), [row["choice"] for row in reversed(rows)], fontsize=8)
    left.set(xlabel="change in bits per byte (right is worse)", title=f"One change at a time, {tokens:,} tokens")
    left.legend(fontsize=8)
    right.plot([n / 1e3 for n in ours], [statistics.fmean(losses) for losses in ours.values()], "o-", label="default")
    best = min(theirs.values(), key=statistics.fmean)
    right.axhline(
        statistics.fmean(best), color="gray", linestyle="--", label=f"nanoGPT recipe, tuned, {tokens:,} tokens"
    )
    right.set(xlabel="tokens of a whole run (thousands)", ylabel="bits per byte held out", title="Tokens to a loss")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def seconds_per_step(machine, rounds: int = 30, **changes) -> dict[str, float]:
    """Seconds of a whole step of `demo`, compiled, under both recipes' optimizers; they take turns."""
    steps = {}
    for name, overrides in [(SAME, {}), ("nanoGPT recipe", NANOGPT | {"lr": 0.002, "embedding_lr": 0.002})]:
        config = lm.Config.from_preset("demo", **overrides | changes, micro_batch=8)
        model = lm.build_model(config).to(machine.device)
        optimizers, scaler = lm.build_optimizers(model, config, machine), machine.scaler()
        rows = torch.randint(config.vocab_size, (8, config.block_size + 1), device=machine.device)
        runner = torch.compile(model, dynamic=False) if config.compile else model

        def step(model=model, optimizers=optimizers, scaler=scaler, rows=rows, runner=runner, config=config) -> None:
            with machine.autocast():
                loss = runner(rows[:, :-1], rows[:, 1:])
            scaler.scale(loss).backward()
            lm.step_weights(model, optimizers, scaler, 1.0, config.grad_clip)

        steps[name] = step
    return take_turns(steps, machine, rounds)


TEXT = """# The recipe

`make recipe`, {about}: `demo`, trained on {tokens:,} tokens, one change at a time. *Bits per byte* is on all of the
held-out text. Tokens are fixed, so the losses do not depend on the machine's speed.

## Against the nanoGPT recipe

That of [nanoGPT](https://github.com/karpathy/nanoGPT): AdamW with betas 0.9 and 0.95 and one learning rate for
everything, weight decay 0.1, and a cosine; on the same model, text and batches, with the same warmup. Its
learning rate is tuned on seed 0 by factors of two, until both neighbours of the best are worse. The default is
trained anew for each number of tokens, with its whole schedule; ± is the standard deviation over seeds.

{recipes}

The default reaches the loss of the tuned nanoGPT recipe with {share} of its tokens.{time}

## One change at a time

Each change against the default with the same seed, so with the same order of the text. *Effect* is in bits per
byte, and below zero is better; *spread* is its standard deviation over seeds; the default itself varies by
{noise:.4f} from seed to seed. Better and worse are effects of more than twice the standard error that this
leaves; with one run, that is not much to go by. Where a change would add or remove parameters, `n_ffn` makes up
for it, unless the name says otherwise. Failed or diverged: {failed}.

![Effects](recipe.png)

{choices}

## From `demo` to `day`, by rule

What was tuned on small models moves to large ones by rules; where the notebook follows none, its value has to be
measured at the size it is for.

{rules}

So between `demo` and `day`, width does not ask for another `lr`; depth, `embedding_lr` and `batch_tokens` do, and
the values of `day` are those of published runs near its size. They have not been tried on a GPU.
"""


def link(name: str, number: str) -> str:
    return f"[{name}](https://arxiv.org/abs/{number})"


RULES = [
    (
        "`lr` (Muon), width",
        "the same at every width: an update whose spectral norm is √(rows / columns) changes outputs equally",
        "`Muon` has it: lr · √max(1, rows / columns)",
        "[Jordan et al. 2024](https://kellerjordan.github.io/posts/muon/), " + link("Yang et al. 2023", "2310.17813"),
    ),
    (
        "`lr` (Muon), tuned for AdamW",
        "lr · 0.2 · √max(rows, columns) gives updates of AdamW's size",
        "not used",
        link("Liu et al. 2025", "2502.16982"),
    ),
    (
        "`lr` (AdamW), width",
        "∝ 1 / width for matrices",
        '`optimizer="adamw"` leaves it to the user',
        link("Yang et al. 2022", "2203.03466"),
    ),
    (
        "`lr`, depth",
        "the same where a block's output is multiplied by 1 / n_layer; without, lower as depth grows",
        "no multiplier, only smaller `o_proj` and `down_proj` at the start: not covered",
        link("Dey et al. 2025", "2505.01618") + ", " + link("Qiu et al. 2025", "2512.05620"),
    ),
    (
        "`embedding_lr`, width",
        "an input table: the same; a head: ∝ 1 / width; nanochat takes ∝ 1 / √width for both",
        "one table for both, a value of its own in each preset",
        link("Yang et al. 2022", "2203.03466") + ", [nanochat](https://github.com/karpathy/nanochat)",
    ),
    (
        "AdamW, batch",
        "∝ √batch_tokens, up to a critical batch, which is larger for Muon",
        "a value of its own in each preset",
        link("Malladi et al. 2022", "2205.10643") + ", " + link("Shah et al. 2025", "2505.02222"),
    ),
    (
        "`weight_decay`",
        "lr · weight_decay ∝ 1 / width, and 1 / (lr · weight_decay) a fixed share of the steps",
        "a value of its own in each preset",
        link("Qiu et al. 2025", "2512.05620") + ", " + link("Wang and Aitchison 2024", "2405.13698"),
    ),
    (
        "`schedule`",
        "warmup and decay as fractions of the budget",
        "`warmup`, `decay`",
        link("Hägele et al. 2024", "2405.18392"),
    ),
]


def main() -> None:
    plain_errors()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--only", choices=["all", "recipes"], default="all", help="recipes: without the single choices")
    parser.add_argument("--summary", action="store_true", help="write what there is, train nothing")
    parser.add_argument("--seconds", action="store_true", help="measure seconds per step, train nothing")
    parser.add_argument("--results", type=Path, default=RESULTS / "recipe.jsonl")
    options = parser.parse_args()
    if options.seconds:
        machine = Machine.find()
        SECONDS.write_text(
            json.dumps({"seconds": seconds_per_step(machine)} | benchmark_environment(machine), indent=1) + "\n"
        )
        print(SECONDS.read_text())
        return
    results = Results(options.results)
    if not options.summary:
        run_missing(results, options.tokens, options.jobs, options.threads, options.only)
    write_summary(results, options.tokens)


if __name__ == "__main__":
    main()
