"""The choices: two kinds of attention, three of position, two of feed-forward, at equal parameters and tokens."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from tools.common import table as markdown
from tools.experiments.scales import CPU, GPU
from tools.experiments.tool import COLOURS, equal_size, sweep

TITLE = "The choices"
SCALES = {
    "cpu": {
        "seeds": (0, 1, 2),
        "common": CPU | {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "max_steps": 900},
    },
    "gpu": {
        "seeds": (0, 1, 2),
        "common": GPU | {"n_layer": 8, "n_embd": 512, "n_head": 8, "n_kv_head": 4, "max_steps": 4000},
    },
}


def variants(scale: dict) -> dict[str, dict]:
    """All combinations, each with the n_ffn that makes it as large as a plain one of 12 · n_layer · n_embd²."""
    choices = itertools.product(("mha", "gqa"), ("rope", "absolute", "none"), ("gated", "mlp"))
    grid = {f"{a}, {p}, {f}": {"attention": a, "position": p, "ffn": f} for a, p, f in choices}
    parameters = 12 * scale["common"]["n_layer"] * scale["common"]["n_embd"] ** 2
    return equal_size(grid, parameters, **scale["common"])


def measure(scale: dict, **options) -> pd.DataFrame:
    """A row per run."""
    table = sweep(variants(scale), seeds=scale["seeds"], **(scale["common"] | options))
    return table[table.status == "finished"].drop(columns=["status", "run", "error", "steps"])


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """What each choice costs against the best of its kind, the others averaged: field, choice, nats, error.

    `error` is the standard error of the difference, from the spread between seeds.
    """
    noise, rows = table.groupby("label").val_loss.var().mean(), []
    for field in ("attention", "position", "ffn"):
        means = table.groupby(field).val_loss.agg(["mean", "count"]).sort_values("mean")
        for choice, mean, count in means.itertuples():
            error = np.sqrt(noise / count + noise / means["count"].iloc[0])
            rows.append({"field": field, "choice": choice, "nats": mean - means["mean"].iloc[0], "error": error})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> plt.Figure:
    """All combinations from best to worst, seeds as dots, mean and one standard deviation over them."""
    ranked = table.groupby("label").val_loss.agg(["mean", "std"]).sort_values("mean", ascending=False)
    colours = dict(zip(("rope", "absolute", "none"), COLOURS))
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row, (label, mean, std) in enumerate(ranked.itertuples()):
        colour = colours[label.split(", ")[1]]
        ax.errorbar(mean, row, xerr=std, fmt="o", color=colour, capsize=3)
        ax.plot(table[table.label == label].val_loss, [row] * (table.label == label).sum(), "|", color=colour)
    ax.set_yticks(range(len(ranked)), ranked.index, fontsize=8)
    for name, colour in colours.items():
        ax.plot([], [], "o", color=colour, label=name)
    ax.legend(title="position", fontsize=8)
    ax.set(xlabel="held-out loss (nats per token)", title="Equal parameters, equal tokens")
    return figure


def say(table: pd.DataFrame) -> str:
    """A row per choice against the best of its kind, and the best and the last combination."""
    rows = []
    for field, of_field in effects(table).groupby("field", sort=False):
        best = of_field.choice.iloc[0]
        for row in of_field.iloc[1:].itertuples():
            cells = {"choice": field, "better": best, "than": row.choice, "by (nats)": row.nats}
            cells |= {"standard error": row.error, "more than two errors": "yes" if row.nats > 2 * row.error else "no"}
            rows.append(cells)
    columns = dict.fromkeys(rows[0], "") | {"by (nats)": ".3f", "standard error": ".3f"}
    ranked = table.groupby("label").val_loss.agg(["mean", "std"]).sort_values("mean")
    ends = [f"{label} ({mean:.3f} ± {std:.3f} nats)" for label, mean, std in ranked.iloc[[0, -1]].itertuples()]
    return f"{markdown(rows, columns)}\n\nOf the {len(ranked)} combinations, {ends[0]} is best and {ends[1]} is last."
