"""What the dial says for minutes on two cores, held against a sweep by hand over size and batch: results/dial.md.

    python -m tools.dial                the runs that are missing, then the table
    python -m tools.dial --summary      the table of what there is

All runs are of `demo` on English with random weights at first; seeds differ by 0.001 bits per byte.
"""

from __future__ import annotations

from datetime import date

from machinery.budget import best_batch, power_of_two
from machinery.errors import UserError, plain_errors
from machinery.files import write_atomic
from machinery.machine import Machine, measure_matmul_flops
from machinery.settings import RATES
from model_utils import best_shape
from tools.bench.recipe import RANDOM, TEXTS
from tools.common import RESULTS, lm, quietly, table
from tools.forecast import run_of
from tools.runs import Results, Run, parser_of_runs, run_missing

# Tokens that so many minutes of two cores hold at half of 911 GFLOP/s, their rate of a large matrix product, by size
MINUTES = {
    1: {(1, 64): 12_800_000, (2, 128): 4_300_000, (3, 192): 2_000_000, (4, 256): 1_000_000},
    3: {(2, 128): 13_000_000, (3, 192): 6_000_000, (4, 256): 3_000_000},
}
BATCHES = {  # by size and tokens: the preset's, for about a minute, and the best sizes for one and for three
    ((4, 192), 1_400_000): (512, 1024, 2048, 4096, 8192, 16384),
    ((2, 128), 4_300_000): (1024, 2048, 4096, 8192),
    ((3, 192), 6_000_000): (2048, 4096, 8192),
}
UNMOVED = (1024, 8192)  # for the first, also tried with the rates of the preset
PRESET = lm.PRESETS["demo"]


def by_size() -> list[Run]:
    """Each size, for so many minutes."""
    return [with_batch(size, tokens) for sizes in MINUTES.values() for size, tokens in sizes.items()]


def with_batch(size: tuple[int, int], tokens: int, batch: int = PRESET["batch_tokens"], power: float = 0.5) -> Run:
    """A run with this batch, and rates that move with this power of it."""
    factor = (batch / PRESET["batch_tokens"]) ** power
    rates = {name: PRESET[name] * factor for name in RATES}
    return lm.replace(run_of("english", size, tokens, RANDOM | {"batch_tokens": batch} | rates), scores=1)


def by_batch() -> list[Run]:
    """Each size with its batches, and with the rates of the preset."""
    runs = [with_batch(*at, batch) for at, batches in BATCHES.items() for batch in batches]
    return runs + [with_batch(*next(iter(BATCHES)), batch, power=0.0) for batch in UNMOVED]


def chosen_size(minutes: int) -> str:
    """What `best_shape` says for so many minutes of this machine, as n_layer × n_embd; or why it says nothing."""
    try:
        shape = quietly(
            best_shape, lm.Config.from_preset("demo", **TEXTS["english"]), Machine.find(), hours=minutes / 60
        )
    except UserError as error:
        return f"nothing ({error})"
    return f"{shape['n_layer']} × {shape['n_embd']}"


def write_dial(results: Results) -> None:
    """results/dial.md, of the runs there are."""
    rows = [
        {"minutes": minutes, "n_layer × n_embd": "{} × {}".format(*size), "tokens": tokens,
         "bits per byte": results.loss(with_batch(size, tokens))}
        for minutes, some in MINUTES.items() for size, tokens in some.items()
    ]  # fmt: skip
    others, cost = [], 0.0
    for (size, tokens), some in BATCHES.items():
        said = power_of_two(best_batch(tokens), PRESET["block_size"])
        runs = [with_batch(size, tokens, batch) for batch in some]
        losses = [results.loss(run) for run in runs]
        least = min(losses)
        for batch, loss in zip(some, losses):
            row = {"n_layer × n_embd": "{} × {}".format(*size), "tokens": tokens, "batch_tokens": batch}
            row |= {"steps": tokens // batch, "bits per byte": loss, "auto": "this" if batch == said else ""}
            cost = max(cost, loss - least if batch == said else 0.0)
            others.append(row | {"as they are": results.loss(with_batch(size, tokens, batch, power=0.0))})
    write_atomic(RESULTS / "dial.md", TEXT.format(
        today=date.today(), cost=cost,
        said="; ".join(f"{chosen_size(minutes)} for {60 * minutes} seconds" for minutes in MINUTES),
        rate=measure_matmul_flops(Machine.find()) / 1e9,
        sizes=table(rows, {"minutes": "d", "n_layer × n_embd": "", "tokens": ",d", "bits per byte": ".4f"}),
        batches=table(others, {"n_layer × n_embd": "", "tokens": ",d", "batch_tokens": ",d", "steps": ",d",
                               "bits per byte": ".4f", "as they are": ".4f", "auto": ""}),
    ))  # fmt: skip


TEXT = """# The dial on two cores

`make dial`, {today}: `demo` on English, with random weights at first (`induction` off), one seed (three differ by 0.001
bits per byte, [recipe.md](recipe.md)).

## Size

Tokens are what so many minutes hold at half of 911 GFLOP/s, the rate of a large matrix product on two quiet cores.
`best_shape` says, at the {rate:.0f} GFLOP/s measured while this was written: {said}.
Its law is of other runs, which begin with an induction head.

{sizes}

## Batch

Learning rates move with the square root of the batch; *as they are*: with those of the preset, unmoved. *auto*: what
`batch_tokens="auto"` would take for so many tokens: at most {cost:.3f} above the best of its size.

{batches}
"""


def main() -> None:
    """See the module's docstring."""
    plain_errors()
    options = parser_of_runs(__doc__).parse_args()
    results = Results(RESULTS / "dial.jsonl")
    if not options.summary:
        run_missing(results, lambda: by_size() + by_batch(), options.jobs)
    write_dial(results)


if __name__ == "__main__":
    main()
