"""What the dial says for minutes on two cores, held against a sweep by hand over size and batch: results/dial.md.

    python -m tools.dial                the runs that are missing, then the table
    python -m tools.dial --summary      the table of what there is

All runs are of `demo` on English, whose seeds differ by 0.001 bits per byte.
"""

from __future__ import annotations

from datetime import date

from machinery.budget import best_batch, power_of_two
from machinery.errors import UserError, plain_errors
from machinery.files import write_atomic
from machinery.machine import Machine, measure_matmul_flops
from model_utils import best_shape
from tools.common import RESULTS, lm, quietly, table
from tools.forecast import LINES, MINUTES, run_of
from tools.runs import Results, Run, parser_of_runs, run_missing

BATCHES, TOKENS = (1024, 2048, 4096, 8192, 16384), 1_400_000  # of the preset's 4 × 192, about a minute too
UNMOVED = (1024, 8192)  # also tried with the rates of the preset
ENGLISH = {"source": "english", "prompt": "The"}


def by_size() -> list[Run]:
    """Each size, for so many minutes."""
    return [run_of("english", size, tokens, {}) for sizes in MINUTES.values() for size, tokens in sizes.items()]


def by_batch(batches: tuple[int, ...] = BATCHES, power: float = 0.5) -> list[Run]:
    """The preset with other batches, and rates that move with this power of them."""
    preset, runs = lm.PRESETS["demo"], []
    for batch in batches:
        factor = (batch / preset["batch_tokens"]) ** power
        rates = {name: preset[name] * factor for name in ("lr", "embedding_lr", "head_lr")}
        runs.append(Run(f"english, batch {batch}", ENGLISH | {"batch_tokens": batch} | rates, 0, TOKENS))
    return runs


def chosen_size(minutes: int) -> str:
    """What `best_shape` says for so many minutes of this machine, as n_layer × n_embd; or why it says nothing."""
    try:
        shape = quietly(best_shape, lm.Config.from_preset("demo", **ENGLISH), Machine.find(), hours=minutes / 60)
    except UserError as error:
        return f"nothing ({error})"
    return f"{shape['n_layer']} × {shape['n_embd']}"


def write_dial(sizes: Results, batches: Results) -> None:
    """results/dial.md, of the runs there are."""
    rows = [
        {"minutes": minutes, "n_layer × n_embd": "{} × {}".format(*size), "tokens": tokens,
         "bits per byte": sizes.loss(run_of("english", size, tokens, {}))}
        for minutes, some in MINUTES.items() for size, tokens in some.items()
    ]  # fmt: skip
    others = [
        {"batch_tokens": batch, "steps": TOKENS // batch, "bits per byte": batches.loss(run), "as they are": as_is}
        for batch, run, as_is in zip(BATCHES, by_batch(), map(batches.loss, by_batch(power=0.0)))
    ]
    write_atomic(RESULTS / "dial.md", TEXT.format(
        today=date.today(), rule=power_of_two(best_batch(TOKENS), lm.PRESETS["demo"]["block_size"]), tokens=TOKENS,
        said="; ".join(f"{chosen_size(minutes)} for {60 * minutes} seconds" for minutes in MINUTES),
        rate=measure_matmul_flops(Machine.find()) / 1e9,
        sizes=table(rows, {"minutes": "d", "n_layer × n_embd": "", "tokens": ",d", "bits per byte": ".4f"}),
        batches=table(others, {"batch_tokens": ",d", "steps": ",d", "bits per byte": ".4f", "as they are": ".4f"}),
    ))  # fmt: skip


TEXT = """# The dial on two cores

`make dial`, {today}: `demo` on English, one seed (three differ by 0.001 bits per byte, [recipe.md](recipe.md)).

## Size

Tokens are what so many minutes hold at half of 911 GFLOP/s, the rate of a large matrix product on two quiet cores.
`best_shape` says, at the {rate:.0f} GFLOP/s measured while this was written: {said}. Its law was fitted
to these runs too; without them it covers no best size for so long.

{sizes}

## Batch

4 × 192, {tokens:,} tokens; learning rates move with the square root of the batch. `batch_tokens="auto"` would say
{rule:,}. The smallest batch tried is the best, so the best is not bracketed. *As they are*: with the rates of the
preset, unmoved.

{batches}
"""


def main() -> None:
    """See the module's docstring."""
    plain_errors()
    options = parser_of_runs(__doc__).parse_args()
    sizes, batches = Results(LINES), Results(RESULTS / "dial.jsonl")
    if not options.summary:
        run_missing(sizes, by_size, options.jobs)
        run_missing(batches, lambda: by_batch() + by_batch(UNMOVED, 0.0), options.jobs)
    write_dial(sizes, batches)


if __name__ == "__main__":
    main()
