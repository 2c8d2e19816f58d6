"""What loss to expect, with an error bar: laws fitted to runs of this project on two kinds of text, and published ones.

results/forecast.json holds the fitted laws and is written by `make forecast`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from machinery.files import read_json

LAWS = Path(__file__).parents[1] / "results" / "forecast.json"
# nanochat's runs on FineWeb-Edu, 0.829 bits per byte at 5e18 FLOPs and 0.800 at 1e19, as a power law
# (github.com/karpathy/nanochat, its published results). No run of this project has been held against it.
WEB, WEB_FLOPS, WEB_POWER, WEB_SPREAD = 0.829, 5e18, math.log2(0.829 / 0.800), 0.03
# The Chinchilla law as corrected by Besiroglu et al. 2024 (arXiv 2404.10102), for web text and 50M to 16B parameters
E, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
REACH = 2.0  # times outside the sizes and the batch it was fitted to, or with fewer tokens, that a law is believed


@dataclass(frozen=True)
class Forecast:
    """Bits per byte to expect at the end of a run, between `low` and `high`, and on the way there."""

    low: float
    high: float
    law: dict | None = None  # the fitted law; without it nothing is known of the way
    parameters: float = 0.0
    tokens: float = 0.0

    @property
    def middle(self) -> float:
        """The most likely value."""
        return (self.low + self.high) / 2

    def at(self, progress: float) -> tuple[float, float] | None:
        """The band at a share of the run, above 0: a run's loss is higher before its learning rate has come down."""
        if self.law is None or progress < self.law["way"][0][0]:
            return None
        shares, above, spread = zip(*self.law["way"])
        middle = expected(self.law, self.parameters, progress * self.tokens) + float(np.interp(progress, shares, above))
        width = math.hypot((self.high - self.low) / 2, 2 * float(np.interp(progress, shares, spread)))
        return middle - width, middle + width

    def with_tokens(self, tokens: float) -> Forecast:
        """That of the same model after so many in all: a run by the clock comes to more, or fewer, than foretold."""
        return by_law(self.law, self.parameters, tokens) if self.law else self

    def place(self, progress: float, tokens: float, bits_per_byte: float) -> str:
        """Where a loss after so many tokens, a share of the run, lies: ", as expected", or above or below the band;
        nothing where none is known.
        """
        if not progress * tokens or (band := self.with_tokens(tokens / progress).at(progress)) is None:
            return ""
        low, high = band
        where = "below" if bits_per_byte < low else "" if bits_per_byte <= high else "above"  # so is nan
        return f", {where} the band of {low:.3f} to {high:.3f}" if where else ", as expected"

    def ends(self) -> dict[str, float]:
        """The two ends by the names that summary.json has for them."""
        return {"bits per byte, low": self.low, "bits per byte, high": self.high}

    def band(self) -> dict:
        """The way as lists for a figure: tokens, and the two ends in bits per byte; empty where it is not known."""
        if self.law is None:
            return {}
        shares = [share for share, *_ in self.law["way"]]
        low, high = zip(*(self.at(share) for share in shares))
        return {"tokens": [s * self.tokens for s in shares], "low": low, "high": high}


def expected(law: dict, parameters: float, tokens: float) -> float:
    """Bits per byte at the end of a run: floor + ((n / N)^(α / β) + d / D)^β, for N parameters in matrix products and D
    tokens; above the floor the law of Kaplan et al. 2020 (arXiv 2001.08361, equation 1.5).

    Either term alone is a power law; together, the larger one decides more sharply than in a sum of two power laws.
    """
    size = (law["n"] / parameters) ** (law["alpha"] / law["beta"])
    return law["floor"] + (size + law["d"] / tokens) ** law["beta"]


def by_law(law: dict, parameters: float, tokens: float) -> Forecast:
    """What a fitted law says of a run, twice its error at so many tokens either way."""
    at, errors = zip(*law["error"])
    width = 2 * float(np.interp(math.log(tokens), np.log(at), errors))
    middle = expected(law, parameters, tokens)
    return Forecast(middle - width, middle + width, law, parameters, tokens)


def expected_loss(parameters: float, tokens: float) -> float:
    """Nats per token of web text, for so many parameters and tokens."""
    return E + A / parameters**ALPHA + B / tokens**BETA


def compute_optimal(flops: float) -> tuple[float, float]:
    """Parameters and tokens of the lowest expected loss, where 6 · parameters · tokens = `flops`."""
    balance = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    parameters = balance * (flops / 6) ** (BETA / (ALPHA + BETA))
    return parameters, flops / 6 / parameters


def laws() -> dict[str, dict]:
    """The fitted laws by source; empty where there are none."""
    return read_json(LAWS, missing={})


def forecast(config, parameters: float, flops_per_token: float, tokens: float) -> Forecast | None:
    """The forecast for a run of `tokens` in all, of a model with so many multiplying parameters.

    None where nothing is known: other text or another recipe than those of the runs that the law was fitted to, or a
    size, batch or length far from theirs.
    """
    law = laws().get(config.source)
    if law and all(getattr(config, name, None) == value for name, value in law["recipe"].items()):
        (smallest, largest), (fewest, most) = law["parameters"], law["tokens"]
        is_near = smallest / REACH <= parameters <= largest * REACH
        if config.batch_tokens != "auto":
            is_near &= 1 / REACH <= config.batch_tokens / law["batch_tokens"] <= REACH
        if is_near and fewest / REACH <= tokens <= most:  # with more, the text repeats too often
            return by_law(law, parameters, tokens)
    flops = flops_per_token * tokens
    if "fineweb-edu" in config.source.lower() and flops > WEB_FLOPS / 50 and not config.init_from:
        best = WEB * (flops / WEB_FLOPS) ** -WEB_POWER  # of a model of the best size, as nanochat's are
        worse = expected_loss(parameters, tokens) / expected_loss(*compute_optimal(6 * parameters * tokens)) - 1
        middle, spread = best * (1 + worse), WEB_SPREAD + best * worse / 2
        return Forecast(middle - spread, middle + spread)
    return None
