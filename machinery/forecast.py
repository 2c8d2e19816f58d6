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
REACH = 4.0  # times outside the sizes and tokens it was fitted to that a law is believed


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

    def place(self, progress: float, bits_per_byte: float) -> str:
        """Where a loss on the way lies: ", as expected", or above or below the band; nothing where none is known."""
        if (band := self.at(progress)) is None:
            return ""
        low, high = band
        where = "above" if bits_per_byte > high else "below" if bits_per_byte < low else ""
        return f", {where} the band of {low:.3f} to {high:.3f}" if where else ", as expected"

    def band(self) -> dict:
        """The way as lists for a figure: tokens, and the two ends in bits per byte; empty where it is not known."""
        if self.law is None:
            return {}
        shares = [share for share, *_ in self.law["way"]]
        low, high = zip(*(self.at(share) for share in shares))
        return {"tokens": [s * self.tokens for s in shares], "low": low, "high": high, "unit": "bits per byte"}


def expected(law: dict, parameters: float, tokens: float) -> float:
    """E + A / parameters^α + B / tokens^β, in bits per byte (the form of Hoffmann et al. 2022)."""
    return law["E"] + law["A"] / parameters ** law["alpha"] + law["B"] / tokens ** law["beta"]


def by_law(law: dict, parameters: float, tokens: float) -> Forecast:
    """What a fitted law says of a run, twice its error either way."""
    middle, width = expected(law, parameters, tokens), 2 * law["error"]
    return Forecast(middle - width, middle + width, law, parameters, tokens)


def laws() -> dict[str, dict]:
    """The fitted laws by source; empty where there are none."""
    return read_json(LAWS, missing={})


def forecast(config, parameters: float, flops_per_token: float, tokens: float) -> Forecast | None:
    """The forecast for a run of `tokens` in all, of a model with so many multiplying parameters.

    None where nothing is known: other text or another recipe than those of the runs that the law was fitted to, or a
    size or length far from theirs.
    """
    law = laws().get(config.source)
    if law and all(getattr(config, name, None) == value for name, value in law["recipe"].items()):
        near = zip((parameters, tokens), (law["parameters"], law["tokens"]))
        if all(least / REACH <= value <= most * REACH for value, (least, most) in near):
            return by_law(law, parameters, tokens)
    flops = flops_per_token * tokens
    if "fineweb-edu" in config.source.lower() and flops > WEB_FLOPS / 50 and not config.init_from:
        middle = WEB * (flops / WEB_FLOPS) ** -WEB_POWER
        return Forecast(middle - WEB_SPREAD, middle + WEB_SPREAD)
    return None


def fit_law(runs: list[dict]) -> dict:
    """The law of runs with "multiplying", "tokens" and "val_bpb": powers from a grid, the rest by least squares."""
    n, d, y = (np.array([run[name] for run in runs], dtype=float) for name in ("multiplying", "tokens", "val_bpb"))
    best = None
    for alpha in np.arange(0.1, 1.01, 0.05):
        for beta in np.arange(0.1, 1.01, 0.02):
            columns = np.stack([np.ones_like(y), n**-alpha, d**-beta], axis=1)
            scale = columns.max(axis=0)
            x, *_ = np.linalg.lstsq(columns / scale, y, rcond=None)
            error = float(((columns / scale) @ x - y) @ ((columns / scale) @ x - y))
            if (x >= 0).all() and (best is None or error < best[0]):
                best = error, alpha, beta, *(x / scale)
    if best is None:
        raise ValueError("no law of this form fits these runs")
    _, alpha, beta, e, a, b = (float(value) for value in best)
    return {
        "E": e, "A": a, "alpha": alpha, "B": b, "beta": beta,
        "parameters": [float(n.min()), float(n.max())], "tokens": [float(d.min()), float(d.max())],
    }  # fmt: skip
