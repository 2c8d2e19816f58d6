"""What the dial says for minutes on two cores, held against a sweep by hand over size and batch: results/dial.md.

    python -m tools.dial                the runs that are missing, then the table
    python -m tools.dial --summary      the table of what there is

Sizes are those of `make forecast`; batches are tried with random weights at first.
"""

from __future__ import annotations

import statistics
from datetime import date
from itertools import product

from machinery.budget import best_batch, power_of_two
from machinery.files import write_atomic
from machinery.forecast import expected
from machinery.settings import RATE_FIELDS
from tools.bench.recipe import RANDOM
from tools.common import RESULTS, lm, table
from tools.forecast import (
    KINDS,
    MINUTES,
    MOST_EPOCHS,
    MOST_TOKENS,
    TEXT_TOKENS,
    fit_law,
    fitted,
    line_of,
    lines_of_law,
    of_minutes,
    run_of,
    short_lines,
    unseen,
)
from tools.runs import Results, Run, parser_of_runs, run_missing

BATCHES = {  # by size and tokens: the preset's, for about a minute, and the best sizes for one and for three
    ((4, 192), 1_400_000): (512, 1024, 2048, 4096, 8192, 16384),
    ((2, 128), 4_300_000): (1024, 2048, 4096, 8192),
    ((3, 192), 6_000_000): (2048, 4096, 8192),
}
UNMOVED = (1024, 8192)  # for the first, also tried with the rates of the preset
SEEDS = (0, 1, 2)  # of the sizes that read their text no more than `MOST_EPOCHS` times
PRESET = lm.PRESETS["demo"]


def with_batch(size: tuple[int, int], tokens: int, batch: int, power: float = 0.5) -> Run:
    """A run with this batch, and rates that move with this power of it."""
    factor = (batch / PRESET["batch_tokens"]) ** power
    rates = {name: PRESET[name] * factor for name in RATE_FIELDS}
    return lm.replace(run_of("english", size, tokens, RANDOM | {"batch_tokens": batch} | rates), scores=1)


def by_batch() -> list[Run]:
    """Each size with its batches, and with the rates of the preset."""
    runs = [with_batch(*at, batch) for at, batches in BATCHES.items() for batch in batches]
    return runs + [with_batch(*next(iter(BATCHES)), batch, power=0.0) for batch in UNMOVED]


def sizes(results: Results, others: Results) -> tuple[list[dict], float]:
    """A row for each size and time: what the law of all other runs foretold, and what came; and how far its choices are
    above the best that came, at most.
    """
    rows, most = [], 0.0
    for source, minutes in product(KINDS, MINUTES):
        runs = of_minutes(source, minutes)
        lines = [line for run in runs if (line := line_of(results, run))]
        if len(lines) < len(runs) or len(short_lines(results, source)) < 7:
            continue
        tried = [(line["multiplying"], line["tokens"]) for line in lines]
        unlike = [
            line for line in lines_of_law(results, others, source) if (line["multiplying"], line["tokens"]) not in tried
        ]
        law = fit_law(unlike)
        foretold = [expected(law, *size) for size in tried]
        best = min(loss for loss, (_, tokens) in zip(foretold, tried) if tokens <= MOST_TOKENS[source])
        found = [[*results.losses(run, SEEDS).values()] for run in runs]
        came = [statistics.fmean(losses) for losses in found]
        most = max(most, came[foretold.index(best)] - min(came))
        rows += [
            {"text": source, "minutes": minutes, "tokens": line["tokens"], "foretold": loss,
             "readings": line["tokens"] / TEXT_TOKENS[source],
             "n_layer × n_embd": "{n_layer} × {n_embd}".format(**line["overrides"]),
             "came": mean, "seeds": len(losses), "chosen": "this" if loss == best else ""}
            for line, loss, mean, losses in zip(lines, foretold, came, found)
        ]  # fmt: skip
    return rows, most


def write_dial(results: Results, forecasts: Results) -> None:
    """results/dial.md, of the runs there are."""
    rows, most = sizes(forecasts, Results(RESULTS / "recipe.jsonl"))
    by_batch_rows, cost = [], 0.0
    for (size, tokens), some in BATCHES.items():
        said = power_of_two(best_batch(tokens), PRESET["block_size"])
        losses = {batch: results.loss(with_batch(size, tokens, batch)) for batch in some}
        losses = {batch: loss for batch, loss in losses.items() if loss is not None}
        least = min(losses.values(), default=0.0)
        for batch, loss in losses.items():
            row = {"n_layer × n_embd": "{} × {}".format(*size), "tokens": tokens, "batch_tokens": batch}
            row |= {"steps": tokens // batch, "bits per byte": loss, "auto": "this" if batch == said else ""}
            cost = max(cost, loss - least if batch == said else 0.0)
            by_batch_rows.append(row | {"as they are": results.loss(with_batch(size, tokens, batch, power=0.0))})
    write_atomic(RESULTS / "dial.md", TEXT.format(
        today=date.today(), cost=cost, most=most, epochs=MOST_EPOCHS,
        sizes=table(rows, {"text": "", "minutes": "d", "n_layer × n_embd": "", "tokens": ",d", "readings": ".1f",
                           "foretold": ".4f", "came": ".4f", "seeds": "d", "chosen": ""}),
        batches=table(by_batch_rows, {"n_layer × n_embd": "", "tokens": ",d", "batch_tokens": ",d", "steps": ",d",
                               "bits per byte": ".4f", "as they are": ".4f", "auto": ""}),
    ))  # fmt: skip


TEXT = """# The dial on two cores

`make dial`, {today}: `demo` by size and by batch.

## Size

Tokens are what so many minutes hold at half of 911 GFLOP/s, the rate of a large matrix product on two quiet cores.
*Foretold* is what a law says that was fitted to all runs of [forecast.md](forecast.md) but these, of these minutes and
sizes; *came* the mean over seeds; *chosen* the best by the law among those that read their text no more than {epochs}
times, as `best_shape` chooses: at most {most:.3f} above the best that came.

{sizes}

## Batch

On English, one seed, with random weights at first (`induction` off). Learning rates move with the square root of the
batch; *as they are*: with those of the preset, unmoved. *auto*: what `batch_tokens="auto"` would take for so many
tokens: at most {cost:.3f} above the best of its size.

{batches}
"""


def main() -> None:
    options = parser_of_runs(__doc__).parse_args()
    results, forecasts = Results(RESULTS / "dial.jsonl"), Results(RESULTS / "forecast.jsonl")
    if not options.summary:
        sized = [
            run
            for source, minutes, seed in product(KINDS, MINUTES, SEEDS)
            for run in of_minutes(source, minutes, seed)
            if run.tokens <= MOST_TOKENS[source]
        ]
        run_missing(forecasts, lambda: fitted() + unseen() + sized, options.jobs)
        run_missing(results, by_batch, options.jobs)
    write_dial(results, forecasts)


if __name__ == "__main__":
    main()
