"""The recipe against others on equal text, order and tokens, and one change at a time: results/recipe.md.

    python -m tools.bench.recipe                  the next runs that are missing, until none is; stop it at any time
    python -m tools.bench.recipe --summary        results/recipe.md and .png from the runs there are
    python -m tools.bench.recipe --seconds        seconds per step, in turns, on a quiet machine
    NANOCHAT=../nanochat python -m tools.bench.recipe --jobs 2 --only contest

Results are lines of results/recipe.jsonl; what is there is not run again, failures included.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from machinery.errors import UserError
from machinery.files import write_atomic, write_json
from machinery.machine import Machine
from machinery.settings import RATE_FIELDS
from tools.bench.common import benchmark_environment, take_turns
from tools.bench.nanochat import VARIANTS, clone, in_reach, step_of
from tools.common import RESULTS, lm, table
from tools.runs import Results, Run, mean_and_error, paired_effect, parser_of_runs, run_missing, verdict

SECONDS = RESULTS / "recipe-seconds.json"
BUDGETS, SEEDS = (500_000, 1_000_000, 2_200_000), (0, 1, 2, 3, 4)  # of the contest
TEXTS = {"python": {}, "english": {"source": "english", "prompt": "The"}}
CHOICE_TOKENS, CHOICE_SEEDS = BUDGETS[0], SEEDS[:3]
AGAIN_TOKENS, AGAIN_SEEDS = BUDGETS[-1], SEEDS[:2]  # of the changes that were better: a gain may be one of short runs
SCALES = (0.5, 1.0, 2.0)  # of all rates, tried for those whose rates are not made for this batch
OURS, PLAIN, NANOGPT_NAME = "the default", "random weights at first", "nanoGPT"
RANDOM = {"induction": False}
NANOGPT = RANDOM | {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.1, "embedding_norm": False}
NANOGPT_RATES = (0.001, 0.002, 0.004)

UNTIED = {"tie_embeddings": False, "embedding_norm": False, "embedding_lr": 0.3, "head_lr": 0.016}
CONTENDERS = {  # of this project, by what differs from the presets' recipe
    OURS: {},
    PLAIN: RANDOM,
    "with value embeddings": {"attention": "value"},
}

# One change each. Where a change would add or remove parameters, n_ffn makes up for it, unless the name says otherwise.
CHOICES: dict[str, dict] = {
    PLAIN: RANDOM,
    "untied, no embedding_norm, rates of its own (more parameters)": UNTIED,
    "value embeddings (more parameters)": CONTENDERS["with value embeddings"],
    "no embedding_norm": {"embedding_norm": False},
    "embedding_lr × 0.5": {"embedding_lr": 0.03},
    "embedding_lr × 2": {"embedding_lr": 0.12},
    "head_lr × 0.3": {"head_lr": 0.003},
    "head_lr × 3": {"head_lr": 0.03},
    "lr × 0.5": {"lr": 0.0075},
    "lr × 2": {"lr": 0.03},
    **{f"AdamW for all, lr {rate:g}": {"optimizer": "adamw", "lr": rate} for rate in NANOGPT_RATES},
    "batch_tokens × 0.5": {"batch_tokens": 1024},
    "batch_tokens × 2": {"batch_tokens": 4096},
    "cosine": {"schedule": "cosine"},
    "wsd, decay 0.2": {"decay": 0.2},
    "wsd, decay 0.8": {"decay": 0.8},
    "no qk_norm": {"qk_norm": False},
    "MLP": {"ffn": "mlp", "n_ffn": 768},
    "MLP with squared ReLU": {"ffn": "relu2", "n_ffn": 768},
    "weight_decay 0.1": {"weight_decay": 0.1},
    "no warmup": {"warmup": 0.0},
    "MHA": {"attention": "mha", "n_ffn": 426},
    "LayerNorm": {"norm": "layer"},
    "absolute positions, and so random weights at first": {"position": "absolute"},
}

SHOWN = {  # in section 7: a change, and where the notebook explains it
    "LayerNorm": "LayerNorm (4.1)",
    "absolute positions, and so random weights at first": "absolute positions, and so no `induction` (4.3)",
    "MHA": "a key/value head per query head (4.2)",
    "no qk_norm": "no `qk_norm` (4.2)",
    "value embeddings (more parameters)": "value embeddings: 3.4M parameters, not 2.4M (4.2)",
    "MLP": "an MLP with GELU (4.4)",
    "MLP with squared ReLU": "an MLP with squared ReLU (4.4)",
    "no embedding_norm": "no `embedding_norm` (4.5)",
    PLAIN: "no `induction` (4.7)",
    "AdamW for all, lr 0.002": "AdamW for all, at the best of three rates (5.1)",
    "embedding_lr × 0.5": "half the `embedding_lr` (5.1)",
    "weight_decay 0.1": "a weight decay of 0.1 (5.1)",
    "no warmup": "no warm-up (5.2)",
    "batch_tokens × 0.5": "half the batch, twice the steps (5.5)",
}

# ------------------------------------------------------------------------------------------- contenders


def ours(seed: int, tokens: int, text: str, name: str = OURS) -> Run:
    """One of this project's."""
    return Run(name, TEXTS[text] | CONTENDERS[name], seed, tokens)


def nanogpt(rate: float, seed: int, tokens: int, text: str) -> Run:
    """nanoGPT's: AdamW with one rate for everything, weight decay and a cosine."""
    overrides = TEXTS[text] | NANOGPT | dict.fromkeys(RATE_FIELDS, rate)
    return Run(f"{NANOGPT_NAME}, lr {rate:g}", overrides, seed, tokens)


def nanochat(variant: str, scale: float, seed: int, tokens: int, text: str) -> Run:
    """nanochat whole, or its optimizer on the notebook's model."""
    return Run(f"nanochat, {variant}, rates × {scale:g}", TEXTS[text] | RANDOM, seed, tokens, variant, scale)


def choice(name: str, seed: int, tokens: int) -> Run:
    """One change."""
    return Run(name, CHOICES[name], seed, tokens)


def tuning() -> list[list[Run]]:
    """Groups of runs with other rates, of Python at the smallest budget: the best of each goes into the contest."""
    at = (0, BUDGETS[0], "python")
    found = [[nanogpt(rate, *at) for rate in NANOGPT_RATES]]
    return found + [[nanochat(variant, scale, *at) for scale in SCALES] for variant in VARIANTS]


def contest(results: Results, text: str, seed: int, tokens: int) -> list[Run]:
    """The contenders at one seed and budget, as far as their rates are tuned."""
    runs = [ours(seed, tokens, text, name) for name in CONTENDERS]
    for group in tuning():
        if None not in map(results.loss, group):
            best = min(group, key=results.loss)
            runs.append(lm.replace(best, seed=seed, tokens=tokens, overrides=best.overrides | TEXTS[text]))
    return runs


def plan(results: Results, only: str = "all", others: bool = True) -> list[Run]:
    """The runs in the order of their importance, as far as the results tell which.

    Rates first, then all contenders budget by budget and seed by seed, then one choice after the other, and those that
    were better again, for longer.
    """
    runs = [run for group in tuning() for run in group]
    runs += [
        run for seed in SEEDS for text in TEXTS for tokens in BUDGETS for run in contest(results, text, seed, tokens)
    ]
    if only == "all":
        runs += [choice(name, seed, CHOICE_TOKENS) for name in CHOICES for seed in CHOICE_SEEDS]
        better = [row["choice"] for row in effects_of_changes(results) if row[""] == "better"]
        runs += [choice(name, seed, AGAIN_TOKENS) for seed in AGAIN_SEEDS for name in better]
    return [run for run in runs if others or not run.by]


# ------------------------------------------------------------------------------------------ the summary


def contest_rows(results: Results, text: str) -> list[dict]:
    """A row per contender and budget: mean, standard error, and its paired difference to the default."""
    rows = []
    for tokens in BUDGETS:
        base = results.losses(ours(0, tokens, text), SEEDS)
        for number, run in enumerate(contest(results, text, 0, tokens)):  # each at this budget
            losses = results.losses(run, SEEDS)
            if not losses:
                continue
            mean, error = mean_and_error(losses.values())
            line = results.lines[lm.replace(run, seed=next(iter(losses))).key]
            row = {"contender": run.name, "tokens": tokens, "bits per byte": mean, "±": _known(error)}
            row |= {"seeds": len(losses), "parameters": line.get("parameters")}
            if number and base.keys() & losses.keys():
                effect, error, _ = paired_effect(losses, base)
                row |= {"against the default": effect, "± ": _known(error), "": verdict(effect, error)}
            rows.append(row)
    return rows


def _known(error: float) -> float | None:
    return None if math.isnan(error) else error


def effect_of(results: Results, name: str, tokens: int, seeds: tuple[int, ...]) -> dict:
    """The paired difference of a choice to the default; empty where it has no result."""
    base = results.losses(ours(0, tokens, "python"), seeds)
    losses = results.losses(choice(name, 0, tokens), seeds)
    if not (shared := sorted(losses.keys() & base.keys())):
        return {}
    effect, error, count = paired_effect(losses, base)
    return {
        "choice": name, "effect": effect, "±": _known(error), "runs": count, "": verdict(effect, error),
        "parameters": results.lines[choice(name, shared[0], tokens).key].get("parameters"),
        "values": [losses[seed] - base[seed] for seed in shared],
    }  # fmt: skip


def effects_of_changes(results: Results) -> list[dict]:
    """A row per choice that has a result, best first; with what it is worth after more tokens, where that is known."""
    rows = []
    for name in CHOICES:
        if row := effect_of(results, name, CHOICE_TOKENS, CHOICE_SEEDS):
            later = effect_of(results, name, AGAIN_TOKENS, AGAIN_SEEDS) if row[""] == "better" else {}
            rows.append(row | {"longer": later.get("effect"), "± ": later.get("±"), " ": later.get("", "")})
    return sorted(rows, key=lambda row: row["effect"])


def changes_of_demo(results: Results | None = None) -> str:
    """Single changes of `demo` as a table, in bits per byte; of other presets than those measured, how to make one."""
    results = results or Results(RESULTS / "recipe.jsonl")
    rows, measured = [], False
    for name, text in SHOWN.items():
        row = {"change": text}
        for tokens in (CHOICE_TOKENS, AGAIN_TOKENS):
            found = effect_of(results, name, tokens, SEEDS)
            clear, measured = found.get("") in ("better", "worse"), measured or bool(found)
            row[f"{tokens:,} tokens"] = f"{found['effect']:+.3f}" if clear else found.get("", "not measured")
        rows.append(row)
    if not measured:
        return "Not measured for these presets: `make recipe` does it."
    return table(rows, dict.fromkeys(rows[0], ""))


def write_summary(results: Results, folder: Path = RESULTS) -> None:
    """recipe.md and recipe.png in `folder`, of the results there are."""
    tables = {text: rows for text in TEXTS if (rows := contest_rows(results, text))}
    if not tables:
        raise UserError(f"{results.path}: no run of the recipe as it is now; `make recipe` makes them")
    rows = effects_of_changes(results)
    failed = [line for line in results.lines.values() if line["status"] != "finished"]
    dates = sorted(line["date"] for line in results.lines.values())
    places = sorted({f"{line['device']} in {line['dtype']}" for line in results.lines.values()})
    columns = {"contender": "", "tokens": ",d", "bits per byte": ".4f", "±": ".4f", "seeds": "d", "parameters": ",d"}
    columns |= {"against the default": "+.4f", "± ": ".4f", "": ""}
    changes = {"choice": "", "effect": "+.4f", "±": ".4f", "runs": "d", "": "", "parameters": ",d"}
    changes |= {"longer": "+.4f", "± ": ".4f", " ": ""}
    text = TEXT.format(
        about=f"{dates[0]} to {dates[-1]}, on {', '.join(places)}",
        contest="\n\n".join(f"### {text}\n\n{table(rows, columns)}" for text, rows in tables.items()),
        time=time_text(json.loads(SECONDS.read_text())["seconds"] if SECONDS.exists() else {}),
        tokens=CHOICE_TOKENS, again=AGAIN_TOKENS, choices=table(rows, changes),
        failed=", ".join(f"{line['name']} (seed {line['seed']})" for line in failed) or "none",
    )  # fmt: skip
    write_atomic(folder / "recipe.md", text)
    draw_recipe(folder / "recipe.png", rows, tables)


def time_text(seconds: dict[str, float]) -> str:
    """What a step of each contender takes, where that is measured."""
    if not seconds:
        return "Seconds per step are not measured yet (`--seconds`)."
    listed = ", ".join(f"{name} {value * 1000:.0f} ms" for name, value in seconds.items())
    return f"A step of 2,048 tokens, measured in turns (on a CPU, nanochat does not compile): {listed}."


def draw_recipe(path: Path, rows: list[dict], tables: dict[str, list[dict]]) -> None:
    """Left: the effect of each choice, a dot for each seed. Right: loss against tokens of each contender."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.26 * len(rows) + 3), width_ratios=(2, 1))
    for place, row in enumerate(reversed(rows)):
        left.plot(row["values"], [place] * row["runs"], "o", color="tab:blue", alpha=0.5)
        left.plot(row["effect"], place, "|", color="tab:red", markersize=14)
    left.axvline(0, color="gray", linewidth=1)
    left.set_yticks(range(len(rows)), [row["choice"] for row in reversed(rows)], fontsize=8)
    left.set(xlabel="change in bits per byte (right is worse)", title=f"One change at a time, {CHOICE_TOKENS:,} tokens")
    for name in dict.fromkeys(row["contender"] for row in next(iter(tables.values()))):
        mine = [row for row in next(iter(tables.values())) if row["contender"] == name]
        right.errorbar(
            [row["tokens"] / 1e6 for row in mine], [row["bits per byte"] for row in mine],
            [row["±"] or 0 for row in mine], fmt="o-", capsize=3, label=name,
        )  # fmt: skip
    right.set(xlabel="tokens of a whole run (millions)", ylabel="bits per byte held out", title=next(iter(tables)))
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def seconds_per_step(machine) -> dict[str, float]:
    """Seconds of a whole step of `demo` for some contenders, which take turns; nanochat is eager on a CPU."""
    steps = {}
    if clone():
        config = lm.Config.from_preset("demo", **RANDOM)
        rows = torch.randint(config.vocab_size, (8, config.block_size + 1), device=machine.device)
        with in_reach(machine):
            for name, build in VARIANTS.items():
                model, optimizer = build(config, 1.0)
                step = step_of(model.to(machine.device), optimizer, machine)
                steps[f"nanochat, {name}"] = lambda step=step, rows=rows: step(rows)
    more = {f"{OURS}, eager": {"compile": False}, NANOGPT_NAME: nanogpt(0.002, 0, 0, "python").overrides}
    for name, overrides in (CONTENDERS | more).items():
        config = lm.Config.from_preset("demo", **overrides, micro_batch=8)
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
    return take_turns(steps, machine, rounds=30)


TEXT = """# The recipe

`make recipe`, {about}:
`demo` under its recipe and under others, at fixed tokens, so that the losses do not depend on the machine's speed.
*Bits per byte* is on all of the held-out text, none of which has a near-copy in the training text.

## The contest

Equal text, batches, order, depth, width, heads, vocabulary and context. ± is the standard error over seeds;
differences are between runs with the same seed, and *better* and *worse* are more than two standard errors. The rates
of the others are the best of three on seed 0 of Python at the smallest budget.

- **random weights at first**: the default with `induction` off (4.7), and so without biases of queries and keys.
- **with value embeddings**: the default with `attention="value"`.
- **nanoGPT**: the optimizer of [nanoGPT](https://github.com/karpathy/nanoGPT), AdamW with one learning rate for
  everything, weight decay 0.1 and a cosine, on the notebook's model without `embedding_norm` and with random weights at
  first.
- **nanochat, llama**: the optimizer, schedules and initial weights of [nanochat](https://github.com/karpathy/nanochat),
  its own code, on the notebook's model with an untied head, without `embedding_norm`.
- **nanochat, whole**: its model as well: value embeddings, squared ReLU, soft-capped logits, scalars per layer.

From random weights, the loss of a run on Python falls faster for a while, between half a million and two million
tokens, at a time that the seed decides: hence the large ± there. That is when it learns to repeat. Runs that begin with
an induction head need not wait for it. English repeats itself less, and gains less.

{contest}

{time}

## One change at a time

Each change against the default with the same seed, {tokens:,} tokens of Python. *Effect* is in bits per byte, and below
zero is better. Where a change would add or remove parameters, `n_ffn` makes up for it, unless the name says otherwise.
Seeds are the first of those above, so these effects differ a little from those. The runs of *AdamW for all* are in
float32, all others in bfloat16. *Longer*: the effect of those that were better, after {again:,} tokens, two seeds:
about half of what it was, or less.
Failed or diverged: {failed}.

![Effects](recipe.png)

{choices}

## From `demo` to `day`, by rule

What was tuned on small models moves to large ones by rules; where the notebook follows none, its value has to be
measured at the size it is for. After each rule, what is done here.

- **`lr` (Muon), width**: the same at every width, since an update whose spectral norm is √(rows / columns) changes
  outputs equally ([Jordan et al. 2024](https://kellerjordan.github.io/posts/muon/), [Yang et al.
  2023](https://arxiv.org/abs/2310.17813)). `Muon` has it: lr · √max(1, rows / columns).
- **`lr` (Muon), tuned for AdamW**: lr · 0.2 · √max(rows, columns) gives updates of AdamW's size ([Liu et al.
  2025](https://arxiv.org/abs/2502.16982)). Not used.
- **`lr` (AdamW), width**: ∝ 1 / width for matrices ([Yang et al. 2022](https://arxiv.org/abs/2203.03466)).
  `optimizer="adamw"` leaves it to the user.
- **`lr`, depth**: the same where a block's output is multiplied by 1 / n_layer; without, lower as depth grows ([Dey et
  al. 2025](https://arxiv.org/abs/2505.01618), [Qiu et al. 2025](https://arxiv.org/abs/2512.05620)). No multiplier, only
  smaller `o_proj` and `down_proj` at the start: not covered.
- **`embedding_lr`, width**: an input table: the same; a head: ∝ 1 / width ([Yang et al.
  2022](https://arxiv.org/abs/2203.03466)); [nanochat](https://github.com/karpathy/nanochat) takes ∝ 1 / √width for
  both. One table for both, a value of its own in each preset.
- **AdamW, batch**: ∝ √batch_tokens, up to a critical batch, which is larger for Muon ([Malladi et al.
  2022](https://arxiv.org/abs/2205.10643), [Shah et al. 2025](https://arxiv.org/abs/2505.02222)). `batch_tokens="auto"`
  does it, for Muon too.
- **`weight_decay`**: lr · weight_decay ∝ 1 / width, and 1 / (lr · weight_decay) a fixed share of the steps ([Qiu et al.
  2025](https://arxiv.org/abs/2512.05620), [Wang and Aitchison 2024](https://arxiv.org/abs/2405.13698)). A value of its
  own in each preset.
- **`schedule`**: warmup and decay as fractions of the budget ([Hägele et al. 2024](https://arxiv.org/abs/2405.18392)).
  So are `warmup` and `decay`.

So between `demo` and `day`, width does not ask for another `lr`; depth, `embedding_lr` and `batch_tokens` do, and
the values of `day` are those of published runs near its size. They have not been tried on a GPU.
"""


def main() -> None:
    parser = parser_of_runs(__doc__)
    parser.add_argument("--only", choices=["all", "contest"], default="all", help="contest: without the single choices")
    parser.add_argument("--seconds", action="store_true", help="measure seconds per step, train nothing")
    options = parser.parse_args()
    if options.seconds:
        machine = Machine.find()
        seconds = {"seconds": seconds_per_step(machine)} | benchmark_environment(machine)
        write_json(SECONDS, seconds)
        print(SECONDS.read_text())
        return
    results = Results(RESULTS / "recipe.jsonl")
    if not options.summary:
        others = clone() is not None
        if not others:
            print("nanochat is left out: set NANOCHAT to a clone of it to compare with its own code")
        run_missing(results, lambda: plan(results, options.only, others), options.jobs)
    write_summary(results)


if __name__ == "__main__":
    main()
