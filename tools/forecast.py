"""The law behind a run's forecast, fitted to short runs and held against longer ones: results/forecast.json and .md.

    python -m tools.forecast                the next runs that are missing, until none is; stop it at any time
    python -m tools.forecast --summary      fit and write what there is

The law is fitted to runs of up to a minute on two cores. Longer ones, of another depth, batch or text, were not used.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import torch

from machinery.errors import UserError, plain_errors
from machinery.files import write_atomic
from machinery.forecast import by_law, expected, fit_law
from model_utils import multiplying_parameters
from tools.bench import recipe
from tools.common import RESULTS, lm, table
from tools.runs import Results, Run, run_missing

KINDS = ("python", "english")
SIZES = {  # tokens of runs of up to a minute on two cores
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
    ("english", (4, 256), 1_000_000, {}),
]
# Fields that a run may change and still be foretold by the law; of model, data and optimisation all others are fixed
FREE = {
    "n_layer", "n_embd", "n_head", "n_kv_head", "n_ffn", "n_position", "batch_tokens", "micro_batch", "max_steps",
    "max_tokens", "max_hours", "data_dir",
}  # fmt: skip
SCORES = 10  # evaluations on the way, to know how a run gets there
LINES = RESULTS / "forecast.jsonl"


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


def unseen() -> list[Run]:
    """Longer ones, to hold the laws against."""
    return [run_of(*case) for case in UNSEEN]


def line_of(results: Results, run: Run) -> dict | None:
    """What a run gave, with the parameters of its matrix products; None where it is missing."""
    line = results.lines.get(run.key)
    if not line or "val_bpb" not in line:
        return None
    with torch.device("meta"):
        return line | {"multiplying": multiplying_parameters(lm.build_model(run.config()))}


def recipe_of(config) -> dict:
    """The fields that make a run one of those that the law speaks of."""
    groups = (lm.ModelFields, lm.DataFields, lm.OptimisationFields)
    return {f.name: getattr(config, f.name) for group in groups for f in lm.fields(group) if f.name not in FREE}


def fit_source(lines: list[dict], recipe: dict) -> dict:
    """The law of a kind of text under a recipe, its error, and how runs get to their end."""
    law = fit_law(lines)
    # The error of a law that has not seen the longest run of each size, on those runs
    longest = {
        line["multiplying"]: max(x["tokens"] for x in lines if x["multiplying"] == line["multiplying"])
        for line in lines
    }
    far = [line for line in lines if line["tokens"] == longest[line["multiplying"]]]
    blind = fit_law([line for line in lines if line not in far])
    misses = [line["val_bpb"] - expected(blind, line["multiplying"], line["tokens"]) for line in far]
    error = math.sqrt(statistics.fmean(miss**2 for miss in misses))
    shares, rows = np.arange(1, SCORES) / SCORES, []
    for line in lines:
        at, bpb = zip(*line["curve"])
        rows.append(
            [float(np.interp(s, at, bpb)) - expected(law, line["multiplying"], s * line["tokens"]) for s in shares]
        )
    way = [[float(s), float(np.mean(part)), float(np.std(part))] for s, part in zip(shares, zip(*rows))] + [
        [1.0, 0.0, 0.0]
    ]
    return law | {"error": error, "runs": len(lines), "way": way, "recipe": recipe}


def write_forecast(results: Results, others: Results, folder: Path = RESULTS) -> None:
    """forecast.json and forecast.md in `folder`, of the runs there are; a kind of text with too few has no law.

    The laws are held against `unseen` runs and, among `others`, those of `demo` that the recipe was measured by.
    """
    laws, rows = {}, []
    for source in KINDS:
        runs = [run for run in fitted() if run.overrides["source"] == source]
        lines = [line for run in runs if (line := line_of(results, run))]
        if len(lines) < 7:
            continue
        laws[source] = fit_source(lines, recipe_of(runs[0].config()))
    if not laws:
        raise UserError(f"{results.path}: too few runs for a law; `make forecast` makes them")
    seeds = [recipe.ours(*case) for case in product(recipe.SEEDS[1:], recipe.BUDGETS, recipe.TEXTS)]  # 0: above
    for run, kept_in in [(run, results) for run in unseen()] + [(run, others) for run in seeds]:
        line, config = line_of(kept_in, run), run.config()
        if line and config.source in laws:
            law = laws[config.source]
            foretold, width = by_law(law, line["multiplying"], run.tokens), 2 * law["error"]
            off = line["val_bpb"] - foretold.middle
            curve = line.get("curve", [])  # of the recipe's runs only the end is known
            kept = [band[0] <= bpb <= band[1] for at, bpb in curve if (band := foretold.at(at))]
            name = run.name if curve else f"{config.source}, demo, seed {run.seed}"
            rows.append({
                "run": name, "tokens": run.tokens, "foretold": foretold.middle, "±": width, "came": line["val_bpb"],
                "off by": off, "within": "yes" if abs(off) <= width else "no",
                "on the way": f"{sum(kept)} of {len(kept)}" if kept else None,
            })  # fmt: skip
    write_atomic(folder / "forecast.json", json.dumps(laws, indent=1) + "\n")
    within = sum(row["within"] == "yes" for row in rows)
    places = sorted({(line["device"], line["dtype"]) for line in results.lines.values()})
    law_rows = [
        {"text": source} | law | dict(zip(("c", "p", "r", "q"), law["powers"])) | {"c": math.exp(law["powers"][0])}
        for source, law in laws.items()
    ]
    columns = {
        "run": "",
        "tokens": ",d",
        "foretold": ".3f",
        "±": ".3f",
        "came": ".3f",
        "off by": "+.3f",
        "within": "",
        "on the way": "",
    }
    law_columns = {"text": "", "runs": "d", "floor": ".2f", "c": ".3f", "p": "+.3f", "q": "+.3f", "r": "+.3f"}
    law_columns |= {"error": ".3f"}
    write_atomic(folder / "forecast.md", TEXT.format(
        today=date.today(), places="; ".join(", ".join(place) for place in places), within=within, count=len(rows),
        worst=max((abs(row["off by"]) for row in rows), default=math.nan),
        laws=table(law_rows, law_columns), rows=table(rows, columns),
    ))  # fmt: skip


TEXT = """# The forecast

`make forecast`, {today}, {places}. Bits per byte of held-out text at the end of a run of D tokens, with N million
parameters in matrix products: floor + c · d^(p + q · ln n) · n^r, for d = D / 500,000 and n = N / 2 (the form of
[Hoffmann et al. 2022](https://arxiv.org/abs/2203.15556), a term of size and a term of tokens, missed the longer runs:
here larger models gain more from the same tokens). It is fitted to runs of up to a minute on two cores. *Error* is how
far the law misses the longest run of each size, root mean square, when it is fitted without them; the band is twice
that.

{laws}

Runs that were not used for the fit. {within} of {count} ended within their band; the largest miss is {worst:.3f} bits
per byte. *On the way* counts the evaluations during the run that lay within the band drawn for them.

{rows}
"""


def main() -> None:
    """See the module's docstring."""
    plain_errors()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--summary", action="store_true", help="fit and write what there is, train nothing")
    options = parser.parse_args()
    results = Results(LINES)
    if not options.summary:
        run_missing(results, lambda: fitted() + unseen(), options.jobs)
    write_forecast(results, Results(RESULTS / "recipe.jsonl"))


if __name__ == "__main__":
    main()
