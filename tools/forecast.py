"""The law behind a run's forecast, fitted to short runs and held against longer ones: results/forecast.json and .md.

    python -m tools.forecast                the next runs that are missing, until none is; stop it at any time
    python -m tools.forecast --summary      fit and write what there is

A law of runs of up to a minute on two cores is held against longer ones, of another depth, batch, seed or text. The law
that is kept is of all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from datetime import date
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch

from machinery.budget import multiplying_and_flops
from machinery.errors import UserError
from machinery.files import write_atomic, write_json
from machinery.forecast import by_law, expected
from tools.bench import recipe
from tools.common import RESULTS, lm, table
from tools.runs import Results, Run, parser_of_runs, run_missing

KINDS = ("python", "english")
SIZES = {  # tokens of runs of up to a minute on two cores; a model of one block cannot hold an induction head
    (2, 128): (200_000, 400_000, 800_000, 1_600_000),
    (4, 192): (200_000, 350_000, 700_000),
    (6, 256): (150_000, 300_000),
}
UNSEEN = [  # source, size, tokens, other overrides
    ("python", (4, 192), 2_200_000, {}),
    ("python", (4, 192), 2_200_000, {"batch_tokens": 4096}),
    ("python", (6, 192), 1_500_000, {}),
    ("english", (4, 192), 2_200_000, {}),
    ("english", (3, 192), 1_000_000, {}),
    ("python", (2, 128), 3_200_000, {}),
    ("english", (6, 256), 600_000, {}),
    ("python", (3, 256), 1_000_000, {}),
    ("english", (2, 128), 3_200_000, {}),
    ("english", (2, 128), 4_500_000, {}),
]
# Tokens that so many minutes of two cores hold at half of 911 GFLOP/s, their rate of a large matrix product, by size
MINUTES = {
    1: {(2, 128): 4_300_000, (3, 192): 2_000_000, (4, 256): 1_000_000},
    3: {(2, 128): 13_000_000, (3, 192): 6_000_000, (4, 256): 3_000_000},
    9: {(3, 192): 18_000_000, (4, 256): 9_000_000, (5, 320): 5_000_000},
}
TEXT_TOKENS = {"python": 3_160_000, "english": 2_520_000}  # that `demo` trains on, about
MOST_EPOCHS = 4  # a run that reads its text more often is in no law: it gains less from text that repeats
MOST_TOKENS = {source: MOST_EPOCHS * tokens for source, tokens in TEXT_TOKENS.items()}
# Fields that a run may change and still be foretold by the law; of model, data and optimisation all others are fixed
FREE = {
    "n_layer", "n_embd", "n_head", "n_kv_head", "n_ffn", "n_position", "batch_tokens", "micro_batch", "max_steps",
    "max_tokens", "max_hours", "data_dir",
}  # fmt: skip
SCORES = 10  # evaluations on the way, to know how a run gets there
MEASURED = ("multiplying", "tokens", "val_bpb")  # of a run, for a law
STARTS = (0.3, 0.6, 0.8)  # of the floor of a law, in the least loss
EDGES = (700_000, 1_800_000)  # in tokens: the error of a law is that of runs between two of them


def run_of(source: str, size: tuple[int, int], tokens: int, more: dict, seed: int = 0) -> Run:
    """`demo` at another size: heads of 64 channels, and a feed-forward of 8/3 of the width."""
    n_layer, n_embd = size
    shape = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // 64, "n_ffn": -(-n_embd * 8 // 3 // 64) * 64}
    prompt = {} if source == "python" else {"prompt": "The"}
    name = f"{source}, {n_layer} × {n_embd}" + "".join(f", {name} {value}" for name, value in more.items())
    return Run(name, {"source": source} | prompt | shape | more, seed, tokens, scores=SCORES)


def fitted() -> list[Run]:
    """The runs that the laws are fitted to."""
    return [run_of(s, size, tokens, {}) for s in KINDS for size, some in SIZES.items() for tokens in some]


def of_minutes(source: str, minutes: int, seed: int = 0) -> list[Run]:
    """Each size for so many minutes."""
    return [run_of(source, size, tokens, {}, seed) for size, tokens in MINUTES[minutes].items()]


def unseen() -> list[Run]:
    """Longer ones, to hold the laws against: `UNSEEN`, `demo` itself, and some sizes for equal times."""
    runs = [run_of(*case) for case in UNSEEN] + [run_of("python", (4, 192), 4_000_000, {}, seed) for seed in (0, 1, 2)]
    return runs + [run for source, minutes in product(KINDS, MINUTES) for run in of_minutes(source, minutes)]


def line_of(results: Results, run: Run) -> dict | None:
    """What a run gave, with the parameters of its matrix products; None where it is missing."""
    line = results.lines.get(run.key)
    if not line or "val_bpb" not in line:
        return None
    return line | {"multiplying": multiplying_and_flops(run.config())[0]}


def recipe_of(config) -> dict:
    """The fields that make a run one of those that the law speaks of."""
    groups = (lm.ModelFields, lm.DataFields, lm.OptimisationFields)
    return {f.name: getattr(config, f.name) for group in groups for f in lm.fields(group) if f.name not in FREE}


def fit_source(lines: list[dict], recipe: dict, left_out: list[list[dict]], edges: tuple[int, ...] = ()) -> dict:
    """The law of a kind of text under a recipe, how runs get to their end, and its error: that of laws fitted without
    one after the other of the groups `left_out`, on these, together for the runs between two `edges` in tokens.
    """
    law, misses = fit_law(lines), []
    for group in left_out:
        blind = fit_law([line for line in lines if line not in group])
        for line in group:
            misses.append((line["tokens"], line["val_bpb"] - expected(blind, line["multiplying"], line["tokens"])))
    errors = []
    for least, most in pairwise((0, *edges, math.inf)):
        if within := [(tokens, miss) for tokens, miss in misses if least <= tokens < most]:
            at, off = zip(*within)
            errors.append([statistics.geometric_mean(at), math.sqrt(statistics.fmean(miss**2 for miss in off))])
    shares, rows = np.arange(1, SCORES) / SCORES, []
    for line in lines:
        if "curve" in line:  # of the recipe's runs only the end is known
            at, bpb = zip(*line["curve"])
            way = [expected(law, line["multiplying"], share * line["tokens"]) for share in shares]
            rows.append(np.interp(shares, at, bpb) - way)
    way = [[float(s), float(np.mean(part)), float(np.std(part))] for s, part in zip(shares, zip(*rows))]
    law |= {"error": errors, "runs": len(lines), "way": [*way, [1.0, 0.0, 0.0]]}
    return law | {"recipe": recipe, "batch_tokens": lm.PRESETS["demo"]["batch_tokens"]}


def fit_law(runs: list[dict]) -> dict:
    """The law through runs with "multiplying" (parameters), "tokens" and "val_bpb": least squares from several floors,
    with the logarithms of all but the floor as unknowns.
    """
    n, d, y = (torch.tensor([run[name] for run in runs], dtype=torch.double) for name in MEASURED)
    found = []
    for start in STARTS:
        floor = torch.tensor(start * y.min().item(), dtype=torch.double, requires_grad=True)
        logs = torch.tensor([0.3, 0.3, 1e5, 1e5], dtype=torch.double).log().requires_grad_()  # alpha, beta, n, d
        optimizer = torch.optim.LBFGS([floor, logs], max_iter=1000, line_search_fn="strong_wolfe")

        def law(floor=floor, logs=logs) -> dict:
            return {"floor": floor} | dict(zip(("alpha", "beta", "n", "d"), logs.exp()))

        def error(law=law, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (expected(law(), n, d) - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(error)
        if math.isfinite(value := error().item()):
            found.append((value, len(found), {name: number.item() for name, number in law().items()}))
    return min(found)[2] | {"parameters": [n.min().item(), n.max().item()], "tokens": [d.min().item(), d.max().item()]}


def short_lines(results: Results, source: str) -> list[dict]:
    """What the runs of up to a minute gave."""
    runs = [run for run in fitted() if run.overrides["source"] == source]
    return [line for run in runs if (line := line_of(results, run))]


def longer_lines(results: Results, others: Results) -> Iterator[tuple[str, dict, str]]:
    """(source, what it gave, name) of each `unseen` run and, among `others`, those of `demo` in the recipe."""
    seeds = [recipe.ours(*case) for case in product(recipe.SEEDS[1:], recipe.BUDGETS, recipe.TEXTS)]  # 0: in `unseen`
    for run, place in [(run, results) for run in unseen()] + [(run, others) for run in seeds]:
        if line := line_of(place, run):
            source = run.config().source
            yield source, line, f"{run.name if place is results else f'{source}, 4 × 192'}, seed {run.seed}"


def lines_of_law(results: Results, others: Results, source: str) -> list[dict]:
    """What all runs gave that the law of a source is fitted to: those that read it no more than `MOST_EPOCHS` times."""
    longer = [line for of, line, _ in longer_lines(results, others) if of == source]
    return short_lines(results, source) + [line for line in longer if line["tokens"] <= MOST_TOKENS[source]]


def short_law(lines: list[dict], recipe: dict) -> dict:
    """The law of runs of up to a minute; its error is that of one that has not seen the longest of each size."""
    longest = {line["multiplying"]: line for line in sorted(lines, key=lambda line: line["tokens"])}  # the last stays
    return fit_source(lines, recipe, [list(longest.values())])


def whole_law(lines: list[dict], recipe: dict) -> dict:
    """The law of all runs; its error is that of laws without one size and length, for short, middling and long runs."""
    cases: dict[tuple, list[dict]] = {}
    for line in lines:
        cases.setdefault((line["multiplying"], line["tokens"]), []).append(line)
    return fit_source(lines, recipe, list(cases.values()), EDGES)


def write_forecast(results: Results, others: Results, folder: Path = RESULTS) -> None:
    """forecast.json and forecast.md in `folder`, of the runs there are; a kind of text with too few has no law.

    Laws of the short runs are held against `unseen` ones and, among `others`, those of `demo` that the recipe was
    measured by. Then all runs go into the laws that are kept.
    """
    kept = {s: lines_of_law(results, others, s) for s in KINDS if len(short_lines(results, s)) >= 7}
    if not kept:
        raise UserError(f"{results.path}: too few runs for a law; `make forecast` makes them")
    recipes = {source: recipe_of(run_of(source, (4, 192), 1, {}).config()) for source in kept}
    short = {source: short_law(short_lines(results, source), recipes[source]) for source in kept}
    rows = [row_of(short[s], line, name) for s, line, name in longer_lines(results, others) if s in short]
    laws = {source: whole_law(lines, recipes[source]) for source, lines in kept.items()}
    write_json(folder / "forecast.json", laws)
    columns = {"run": "", "tokens": ",d", "foretold": ".3f", "±": ".3f", "came": ".3f", "off by": "+.3f", "within": ""}
    columns |= {"on the way": ""}
    law_columns = {"text": "", "runs": "d", "floor": ".2f", "n": ",.0f", "α": ".2f", "d": ",.0f", "β": ".2f"}
    law_columns |= {"error": ""}
    write_atomic(folder / "forecast.md", TEXT.format(
        today=date.today(), epochs=MOST_EPOCHS, within=sum(row["within"] == "yes" for row in rows), count=len(rows),
        places="; ".join(sorted({f"{line['device']}, {line['dtype']}" for line in results.lines.values()})),
        worst=max((abs(row["off by"]) for row in rows), default=math.nan), rows=table(rows, columns),
        short=table(law_rows(short), law_columns), laws=table(law_rows(laws), law_columns),
    ))  # fmt: skip


def row_of(law: dict, line: dict, name: str) -> dict:
    """What a law foretold of a run, and what came."""
    foretold = by_law(law, line["multiplying"], line["tokens"])
    off, width = line["val_bpb"] - foretold.middle, foretold.high - foretold.middle
    curve = line.get("curve", [])  # of the recipe's runs only the end is known
    inside = [band[0] <= bpb <= band[1] for at, bpb in curve if (band := foretold.at(at))]
    return {
        "run": name, "tokens": line["tokens"], "foretold": foretold.middle, "±": width, "came": line["val_bpb"],
        "off by": off, "within": "yes" if abs(off) <= width else "no",
        "on the way": f"{sum(inside)} of {len(inside)}" if inside else None,
    }  # fmt: skip


def law_rows(laws: dict[str, dict]) -> list[dict]:
    """Laws as rows of a table."""
    return [
        {"text": source} | law | {"α": law["alpha"], "β": law["beta"]}
        | {"error": ", ".join(f"{error:.3f} at {tokens / 1e6:.2g}M" for tokens, error in law["error"])}
        for source, law in laws.items()
    ]  # fmt: skip


TEXT = """# The forecast

`make forecast`, {today}, {places}.
Bits per byte of held-out text at the end of a run of D tokens, with N parameters in matrix products: floor +
((n / N)^(α / β) + d / D)^β, the law of [Kaplan et al. 2020](https://arxiv.org/abs/2001.08361) above a floor.

## Can short runs foretell longer ones?

A law fitted to runs of as many tokens as a minute of two cores holds. *Error* is how far it misses the longest run of
each size, root mean square, when it is fitted without them; the band is twice that.

{short}

Runs that were not used for this fit: {within} of {count} ended within their band; the largest miss is {worst:.3f} bits
per byte. A law does not know that text repeats: the English runs of 9 and 18 million tokens read their text 3.6 and 7.1
times, the Python run of 18 million 5.7 times. *On the way* counts the evaluations during the run that lay within the
band drawn for them. From random weights
(`induction` off), runs of `demo` on Python beyond two million tokens ended up to 0.18 below what short runs foretold:
there the loss falls faster for a while, at another time for each seed. Sizes with a single block are left out: they
cannot begin as `demo` does.

{rows}

## The law that runs are foretold by

Fitted to all of these runs, short and long, but those that read their text more than {epochs} times; of longer runs
than these, nothing is foretold. *Error* is how far laws that are fitted without one size and length miss
these runs, root mean square, for runs of about so many tokens. The band of a forecast is twice that.

{laws}

`day` and `hour` read FineWeb-Edu, of which this project has no run. There the forecast is a power law through two
published runs of [nanochat](https://github.com/karpathy/nanochat), 0.829 bits per byte at 5e18 FLOPs and 0.800 at 1e19,
± 0.03. A size that is not the best for its tokens comes to more, by as large a factor as in the law of
[Besiroglu et al. 2024](https://arxiv.org/abs/2404.10102), and the band is wider by half of that. What it says of a day
on an RTX 4090: [benchmarks](../docs/benchmarks.md).
"""


def main() -> None:
    options = parser_of_runs(__doc__).parse_args()
    results = Results(RESULTS / "forecast.jsonl")
    if not options.summary:
        run_missing(results, lambda: fitted() + unseen(), options.jobs)
    write_forecast(results, Results(RESULTS / "recipe.jsonl"))


if __name__ == "__main__":
    main()
