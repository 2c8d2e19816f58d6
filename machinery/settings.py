"""The rules a configuration has to keep. Each message has the numbers in the way and a way out."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import get_args

from machinery.errors import UserError
from train_utils import SCHEDULES

TOKENIZER_SIZES = {"bytes": 257, "gpt2": 50257, "r50k_base": 50257, "cl100k_base": 100277, "o200k_base": 200019}
POSITIVE = [
    "n_layer", "n_embd", "n_head", "n_kv_head", "n_ffn", "block_size", "vocab_size", "rope_base", "lr", "embedding_lr",
    "grad_clip", "batch_tokens", "eval_every", "eval_tokens", "sample_every", "sample_tokens", "checkpoint_every",
    "keep_checkpoints",
]  # fmt: skip
NOT_NEGATIVE = ["n_position", "weight_decay", "warmup", "decay", "max_steps", "max_tokens", "max_hours", "seed"]
LIMITS = {
    "n_layer": 4096,
    "n_embd": 1 << 20,
    "n_head": 1 << 16,
    "n_ffn": 1 << 22,
    "vocab_size": 1 << 24,
    "block_size": 1 << 24,
}
CHOICES = {
    "optimizer": ["muon", "adamw"],
    "schedule": list(SCHEDULES),
    "dtype": ["auto", "bfloat16", "float16", "float32"],
    "wandb": ["off", "online", "offline"],
    "resume": ["auto", "never"],
    "parallel": ["ddp", "fsdp"],
}


class ConfigError(UserError):
    """A configuration that cannot work."""


def require(condition: object, message: str) -> None:
    """Raise `ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: str, known: list[str]) -> None:
    """Raise `ConfigError`, naming the nearest, unless `value` is among `known`."""
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
    listed = f" There are: {', '.join(known)}." if len(known) < 12 else ""
    require(value in known, f"{name} {value!r} is not known; did you mean {near!r}?{listed}")


def check(config) -> None:
    """Raise `ConfigError` unless the fields of the notebook's Config have the right types and fit together."""
    for field in fields(config):
        value, kinds = getattr(config, field.name), get_args(field.type) or (field.type,)
        fits = type(value) in kinds or (kinds == (float,) and type(value) is int)
        takes = f"it takes {' or '.join(kind.__name__ for kind in kinds)}, like {field.default!r}"
        require(fits, f"{field.name} is {value!r} ({type(value).__name__}); {takes}")
    for name in POSITIVE + NOT_NEGATIVE:
        value, most = getattr(config, name), LIMITS.get(name, 1 << 40)
        require(value > 0 or name in NOT_NEGATIVE, f"{name} is {value}; it must be above 0")
        require(0 <= value <= most, f"{name} is {value}; it must lie between 0 and {most:,}")
    for name, known in CHOICES.items():
        one_of(name, getattr(config, name), known)
    _check_shapes(config)
    _check_batch(config)
    _check_text_and_budget(config)


def _check_shapes(c) -> None:
    wider = c.n_head * (c.n_embd // c.n_head + 1)
    require(c.n_embd % c.n_head == 0, f"n_embd {c.n_embd} is not divisible by n_head {c.n_head}; {wider} is")
    require(
        c.attention != "gqa" or c.n_head % c.n_kv_head == 0,
        f"n_head {c.n_head} is not divisible by n_kv_head {c.n_kv_head}; use a divisor of {c.n_head}",
    )
    size = c.n_embd // c.n_head
    require(
        c.position != "rope" or size % 2 == 0,
        f"rope turns pairs of channels, but head size n_embd / n_head = {c.n_embd} / {c.n_head} = {size} is odd",
    )
    require(
        c.n_position == 0 or c.n_position >= c.block_size,
        f"n_position {c.n_position} is shorter than block_size {c.block_size}; set it to 0 or {c.block_size}",
    )


def _check_batch(c) -> None:
    auto = c.micro_batch == "auto"
    require(
        auto or (type(c.micro_batch) is int and c.micro_batch > 0),
        f"micro_batch is {c.micro_batch!r}; it takes a number above 0, or 'auto'",
    )
    tokens = c.block_size * (1 if auto else c.micro_batch)
    product = "block_size" if auto else f"block_size × micro_batch = {c.block_size} × {c.micro_batch} ="
    near = tokens * max(1, round(c.batch_tokens / tokens))
    require(
        c.batch_tokens % tokens == 0,
        f"batch_tokens {c.batch_tokens} is not a multiple of {product} {tokens}; {near} is",
    )


def _check_text_and_budget(c) -> None:
    fewest = TOKENIZER_SIZES.get(c.tokenizer, 257)
    require(
        c.vocab_size >= fewest,
        f"vocab_size {c.vocab_size} is smaller than the {fewest} tokens of tokenizer {c.tokenizer!r};"
        f" set it to {-(-fewest // 64) * 64}, a multiple of 64",
    )
    require(0 < c.val_fraction < 1, f"val_fraction is {c.val_fraction}; it must lie between 0 and 1")
    require(c.warmup + c.decay <= 1, f"warmup {c.warmup} and decay {c.decay} make more than the whole budget, 1")
    require(
        c.max_steps or c.max_tokens or c.max_hours, "no budget: set max_steps, max_tokens or max_hours to more than 0"
    )
