"""The budget: what is used and what is left of it, and the tokens of a step that it asks for on a machine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from machinery.checkpoints import checkpoint_folders
from machinery.errors import UserError
from machinery.files import read_json
from machinery.machine import DATASHEET_TFLOPS, Machine, measure_matmul_flops
from machinery.settings import AUTO_BATCH, RATE_FIELDS, kv_heads, one_of

# The best batch grows as the tokens of a run to the power 0.383 (Bergsma et al. 2025, arXiv 2505.13738), from what
# `day` has: 524,288 tokens a step, of 3.7 billion in 24 hours of an RTX 4090 at 40% of its data sheet.
DAY_TOKENS, POWER = 3.7e9, 0.383
LEAST_STEPS = 1000  # of a small run, for which that rule asks for too much (results/dial.md)
OWN_PARTS = {"attention": ("mha", "gqa", "value"), "ffn": ("gated", "mlp", "relu2")}  # counted without a model
SHARE = 0.5  # of the rate of a large matrix product that training is taken to reach; 2 times off is 1.3 times in batch
MFU = 0.4  # of the datasheet rate of a card that is not here


def best_batch(tokens: float, least_steps: int = LEAST_STEPS) -> float:
    """Tokens per step for a run of so many tokens."""
    return min(AUTO_BATCH * (tokens / DAY_TOKENS) ** POWER, tokens / least_steps)


def power_of_two(batch: float, unit: int) -> int:
    """The batch of so many units of tokens, a power of two, that is nearest in ratio."""
    return unit * 2 ** max(0, round(math.log2(batch / unit)))


def tokens_of_steps(steps: int) -> float:
    """Tokens of a run of so many steps, each of the batch that the rule has for so many tokens."""
    return (steps * AUTO_BATCH / DAY_TOKENS**POWER) ** (1 / (1 - POWER))


def budget_used(config, steps: float, tokens: float, seconds: float) -> float:
    """The fraction of a budget that is used, 0 to 1: the largest over its limits, of which 0 is none."""
    limits = (steps, config.max_steps), (tokens, config.max_tokens), (seconds, config.max_hours * 3600)
    return min(1.0, max(spent / limit for spent, limit in limits if limit))


def budget_left(config, tokens_per_second: float, used: tuple[int, int, float]) -> dict[str, float]:
    """Tokens until each limit of the budget, after `used` steps, tokens and seconds; the least of them ends a run."""
    step, trained, seconds = used
    left = {
        "max_tokens": config.max_tokens - trained,
        "max_steps": (config.max_steps - step) * config.batch_tokens,
        "max_hours": tokens_per_second * (config.max_hours * 3600 - seconds),
    }
    return {name: tokens for name, tokens in left.items() if getattr(config, name)}


def seconds_between(config, step: int, steps: int, scoring: float, sampling: float) -> float:
    """What evaluations and samples add to each of `steps` steps from `step` on; those of the end of a run are apart."""

    def times(every: int) -> int:  # multiples of it among the steps
        return math.ceil((step + steps) / every) - math.ceil(step / every)

    return (times(config.eval_every) * scoring + times(config.sample_every) * sampling) / steps


def multiplying_and_flops(config) -> tuple[float, float]:
    """Weights in matrix products and training FLOPs per token of the notebook's own parts, without making the model."""
    attention = 2 * config.n_embd**2 * (1 + kv_heads(config) / config.n_head)
    ffn = (3 if config.ffn == "gated" else 2) * config.n_embd * config.n_ffn
    multiplying = config.n_layer * (attention + ffn) + config.vocab_size * config.n_embd
    return multiplying, training_flops(multiplying, config)


def training_flops(multiplying: float, config) -> float:
    """Training FLOPs per token, forward and backward: 6·N + 12·n_layer·n_embd·block_size.

    The second term is attention's scores and weighted sums (Chowdhery et al. 2022, PaLM, appendix B).
    """
    return 6 * multiplying + 12 * config.n_layer * config.n_embd * config.block_size


def training_rate(machine: Machine | str) -> float:
    """The FLOP/s that training is taken to reach on a machine, or on a card by its name, such as "RTX 4080"."""
    if isinstance(machine, str):
        one_of("card", machine, list(DATASHEET_TFLOPS))
        return MFU * 1e12 * DATASHEET_TFLOPS[machine]
    return SHARE * measure_matmul_flops(machine) * machine.processes


def tokens_within(config, machine: Machine | str) -> float:
    """About how many tokens the budget of `config` holds on `machine`: the least that one of its limits allows."""
    rate = training_rate(machine) / multiplying_and_flops(config)[1]
    by_steps = config.max_steps and tokens_of_steps(config.max_steps)
    return min(limit for limit in (config.max_tokens, by_steps, config.max_hours * 3600 * rate) if limit)


def refuse_absurd_sizes(config, machine: Machine) -> None:
    """Raise `UserError` where the matrices of the notebook's own parts, with their gradients, are more than the device
    holds: by arithmetic, since thousands of blocks take minutes to outline. Of another part nothing is known here.
    """
    if all(getattr(config, name) in known for name, known in OWN_PARTS.items()):
        needed = 8 * multiplying_and_flops(config)[0] / 1e9
        memory = machine.memory * (machine.processes if config.parallel == "fsdp" else 1) / 1e9
        if needed > memory:
            raise UserError(
                f"no go: one sequence at a time takes {needed:,.1f} GB for matrices and their gradients alone and the"
                f" device has {memory:,.1f} GB; use a smaller n_layer, n_embd, n_ffn or vocab_size"
            )


def settle_batch(config, machine: Machine):
    """`config` with a number for batch_tokens="auto", and learning rates that fit it; others are as they are.

    The rates are those of 524,288 tokens and move with the square root of the batch (Malladi et al. 2022, arXiv
    2205.10643). The batch is a power of two of sequences in each process. A run that goes on keeps its own. Raises
    `UserError` for sizes that the machine cannot hold.
    """
    refuse_absurd_sizes(config, machine)
    if config.batch_tokens != "auto":
        return config
    unit = config.block_size * machine.processes * (1 if config.micro_batch == "auto" else config.micro_batch)
    run, batch, why = Path(config.runs_dir) / config.run_name, 0, "as this run was begun"
    if config.resume != "never" and checkpoint_folders(run):
        batch = read_json(run / "config.json", missing={}).get("batch_tokens")
    if type(batch) is not int or not 1 <= batch <= 1 << 40:
        tokens = machine.maximum(tokens_within(config, machine))[0]  # all processes agree
        best = best_batch(tokens, min(LEAST_STEPS, config.max_steps or LEAST_STEPS))
        batch, why = power_of_two(best, unit), f"for a run of about {float(f'{tokens:.2g}'):,.0f}"
    factor = math.sqrt(batch / AUTO_BATCH)
    rates = {name: getattr(config, name) * factor for name in RATE_FIELDS}
    listed = ", ".join(f"{name} {getattr(config, name):.3g} → {rate:.3g}" for name, rate in rates.items())
    print(f"batch_tokens 'auto': {batch:,} tokens a step {why}; rates of {AUTO_BATCH:,} tokens move with it: {listed}")
    return replace(config, batch_tokens=batch, **rates)
