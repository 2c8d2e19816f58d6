"""Settings: a frozen dataclass whose fields carry their rules. Each message shows the values in the way and a fix."""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

import numpy as np

from machinery.errors import UserError, first_line

TOKENIZER_SIZES = {"bytes": 257, "gpt2": 50257, "r50k_base": 50257, "cl100k_base": 100277, "o200k_base": 200019}
# The most that a size may be: nothing that is read from a file makes more memory than this be asked for
LIMITS = {
    "n_layer": 4096, "n_embd": 1 << 20, "n_head": 1 << 16, "n_kv_head": 1 << 16, "n_ffn": 1 << 22,
    "vocab_size": 1 << 24, "block_size": 1 << 20, "n_position": 1 << 20, "sample_tokens": 1 << 24,
}  # fmt: skip
RATE_FIELDS = ("lr", "embedding_lr", "head_lr")  # the fields that are learning rates
AUTO_BATCH = 524_288  # tokens a step that learning rates are for where batch_tokens is "auto"
FOLDERS = ("data_dir", "runs_dir")  # the fields that are folders of this machine, "~" being home
ABOVE_ZERO = {int: 1, float: 1e-30}  # the least of a number whose field does not say


class ConfigError(UserError):
    """A configuration that cannot work."""


def setting(
    default, least: float | None = None, most: float | None = None, choices: Iterable[str] | None = None
) -> Any:
    """A field with its rule: a number from `least` to `most`, or one of `choices`. Other numbers have to be above 0."""
    return field(default=default, metadata={"least": least, "most": most, "choices": choices})


def require(condition: object, message: str) -> None:
    """Raise `ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Raise `ConfigError`, naming the nearest, unless `value` is among `known`."""
    is_table, known = isinstance(known, dict), list(known)  # of classes or functions
    if value in known:
        return
    said = str(value)[:100].lower()
    near = sorted((name for name in known if said and said in name.lower()), key=len)
    near = near or difflib.get_close_matches(said, known, n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]!r}?" if near else "."
    listed = f" There are: {', '.join(known)}." if len(known) < 12 or not near else ""
    own = " Define one of your own first: section 8, docs/changing.md." if is_table else ""
    raise ConfigError(f"{name} {value!r} is not known{meant}{listed}{own}")


def takes(method: Callable, arguments: str, who: str) -> None:
    """Raise `ConfigError`, naming `who`, unless `method` can be called with these arguments, such as "q k v"."""
    try:
        inspect.signature(method).bind(*arguments.split())
    except TypeError:
        name, given = method.__qualname__, ", ".join(arguments.split())
        raise ConfigError(
            f"{who} do not go together: {name}{inspect.signature(method)} would be given {given}; let it take them, or"
            " change one of the two"
        ) from None


@dataclass(frozen=True)
class Settings:
    """Base of the notebook's Config: checked when it is made, whole in JSON."""

    require, one_of, takes = staticmethod(require), staticmethod(one_of), staticmethod(takes)

    def __post_init__(self) -> None:
        for rule in fields(self):
            object.__setattr__(self, rule.name, _as_meant(getattr(self, rule.name), rule))
            _check(rule.name, getattr(self, rule.name), rule)
        _check_shapes(self)
        _check_batch(self)
        _check_text_and_budget(self)

    @classmethod
    def from_dict(cls, values: dict):
        """The settings with these values, such as `to_dict` gives; the rest are defaults. Raises `ConfigError`."""
        require(isinstance(values, dict), f"a configuration is {type(values).__name__}; it takes names with values")
        known = [rule.name for rule in fields(cls)]
        for name in values:
            one_of("config field", name, known)
        return cls(**values)

    @classmethod
    def for_auto_batch(cls, values: dict, batch: int) -> dict:
        """`values` with the learning rates among them, which are for so many tokens a step, as "auto" takes them."""
        factor = math.sqrt(AUTO_BATCH / batch)
        return values | {name: factor * values.get(name, getattr(cls, name)) for name in RATE_FIELDS}

    def to_dict(self) -> dict:
        """All fields as JSON values."""
        return asdict(self)


def kv_heads(config) -> int:
    """K, key/value heads: `n_kv_head`, but for "mha", which has one for each query head."""
    return config.n_head if config.attention == "mha" else config.n_kv_head


def parse_overrides(overrides) -> dict:
    """The two forms of the notebook's `overrides` as one: a dictionary, or text such as "{n_layer: 2, wandb: off}".

    Values in text stay text: the type of their field says what they mean. Raises `ConfigError` for anything else.
    """
    if isinstance(overrides, str):
        import yaml

        try:
            text, overrides = overrides, yaml.load(overrides, yaml.BaseLoader) or {}
            root = yaml.compose(text, yaml.BaseLoader)
            again = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.BaseLoader))
        except (yaml.YAMLError, RecursionError) as error:
            problem = getattr(error, "problem", None) or first_line(error)
            raise ConfigError(
                f"overrides {overrides!r} cannot be read ({problem}); write {{n_layer: 2, source: '*.txt'}}"
            ) from None
        require(not again, f"overrides {text!r} refer to a value by *; write it out, and a pattern in quotes: '*.txt'")
        twice = isinstance(overrides, dict) and root and len(root.value) > len(overrides)
        require(not twice, f"overrides {text!r} hold a name twice; write each once, and no comma in a number")
        for name, value in root.value if isinstance(root, yaml.MappingNode) else ():
            empty = isinstance(value, yaml.ScalarNode) and value.style is None and value.value.lower() in ("null", "~")
            require(not empty, f"{name.value} is {value.value} in overrides {text!r}; to leave it empty, write ''")
    require(
        isinstance(overrides, dict | None),
        f"overrides are {overrides!r}; write names with values, such as {{n_layer: 2}}",
    )
    for name in overrides or {}:
        require(
            isinstance(name, str) and name.replace("-", "_").isidentifier(),
            f"overrides {overrides!r} hold {name!r} as a name; write {{n_layer: 2}}, and no comma in a number",
        )
        require(name != "cls", f"config field {name!r} is not known.")  # of Python's own, for the class
        require(name not in ("preset", "overrides"), f"{name} is a knob of its own, beside those in {overrides!r}")
    return overrides or {}


WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _as_meant(value, rule):
    """`value` in the type of its field, where it is plain what was meant: 1e-3 or "1e-3", 4.0 for 4, off for "off"."""
    kinds, choices = get_args(rule.type) or (rule.type,), rule.metadata.get("choices") or ()
    if isinstance(value, np.generic):  # one of NumPy's numbers
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and rule.name in FOLDERS:
        value = os.path.expanduser(value)  # so that whoever takes the field apart has a path
    word = value.strip().lower() if isinstance(value, str) else None
    if "off" in choices and (value is False or WORDS.get(word) is False):
        return "off"
    if word in choices:
        return word
    if type(value) is int and value.bit_length() > 1000:  # too long to be printed
        return math.inf if value > 0 else -math.inf
    if isinstance(value, str) and kinds != (str,):
        if bool in kinds:
            return WORDS.get(word, value)
        try:
            value = float(value)
        except ValueError:
            return value
    if int in kinds and type(value) is float and value.is_integer():
        return int(value)
    return float(value) if kinds == (float,) and type(value) is int else value


def _check(name: str, value, rule) -> None:
    """Raise `ConfigError` unless a value has the type of its field and keeps its rule."""
    kinds = get_args(rule.type) or (rule.type,)
    least, most, choices = (rule.metadata.get(part) for part in ("least", "most", "choices"))
    if type(value) not in kinds:
        takes = f"it takes {' or '.join(kind.__name__ for kind in kinds)}, like {rule.default!r}"
        raise ConfigError(f"{name} is {value!r} ({type(value).__name__}); {takes}")
    if choices is not None:
        one_of(name, value, choices)
    if type(value) in (int, float):
        most = LIMITS.get(name, 1 << 40) if most is None else most
        if not (ABOVE_ZERO[type(value)] if least is None else least) <= value <= most:
            within = f"lie between {least or 0:,} and {most:,}" if least is not None or value > 0 else "be above 0"
            raise ConfigError(f"{name} is {value}; it must {within}")
    if isinstance(value, str):
        require("\0" not in value, f"{name} is {value!r}; it holds a character of code 0")


def _check_shapes(c) -> None:
    unit = 2 if c.position == "rope" else 1
    wider = c.n_head * unit * (c.n_embd // (c.n_head * unit) + 1)
    whose = f"n_head {c.n_head}" if c.n_embd % c.n_head else f"n_head {c.n_head} in even parts: rope turns pairs"
    require(c.n_embd % (c.n_head * unit) == 0, f"n_embd {c.n_embd} is not divisible by {whose}; {wider} is")
    require(
        c.n_head % kv_heads(c) == 0,
        f"n_head {c.n_head} is not divisible by n_kv_head {c.n_kv_head}; use a divisor of {c.n_head}",
    )
    require(
        c.n_position == 0 or c.n_position >= c.block_size,
        f"n_position {c.n_position} is shorter than block_size {c.block_size}; set it to 0 or {c.block_size}",
    )


def _check_batch(c) -> None:
    for name in ("batch_tokens", "micro_batch"):
        value = getattr(c, name)
        require(
            value == "auto" or type(value) is int,
            f"{name} is {value!r}; it takes a number above 0, or 'auto'",
        )
    if c.batch_tokens == "auto":
        return
    auto = c.micro_batch == "auto"
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
    for name in FOLDERS:
        folder = getattr(c, name)
        require(folder and folder[0] != "~", f"{name} is {folder!r}, which is no folder; '.' is this one")
    require(
        c.schedule != "wsd" or c.warmup + c.decay <= 1,  # the other schedules do not use `decay`
        f"warmup {c.warmup} and decay {c.decay} make more than the whole budget, 1",
    )
    require(
        c.max_steps or c.max_tokens or c.max_hours, "no budget: set max_steps, max_tokens or max_hours to more than 0"
    )
