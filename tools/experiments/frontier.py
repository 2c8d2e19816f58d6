"""Larger or longer: of equal compute or time, how much should go into parameters and how much into tokens?

Hoffmann et al. 2022, arXiv 2203.15556, approach 2: at each budget a parabola of loss in the logarithm of the size, and
a power law through the lowest points. Beside it, the corrected fit of Besiroglu et al. 2024, arXiv 2404.10102.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import NullFormatter

from machinery.budget import multiplying_and_flops
from model_utils import compute_optimal
from tools.common import lm
from tools.common import table as markdown
from tools.experiments.scales import CPU, GPU
from tools.experiments.tool import COLOURS, MARKERS, sweep

TITLE = "Larger or longer"
SCALES = {
    "cpu": {
        "sizes": [(1, 16), (1, 24), (2, 32), (2, 48), (3, 64), (4, 80), (4, 112)], "head_size": 8,
        "budgets": [2e11, 6e11, 1.8e12], "seeds": (0, 1),
        "common": CPU | {"attention": "mha", "warmup": 0.05},
    },
    "gpu": {
        "sizes": [(4, 128), (5, 192), (6, 256), (8, 384), (10, 512), (12, 768)], "head_size": 64,
        "budgets": [2e15, 1e16, 5e16], "seeds": (0, 1),
        "common": GPU | {"attention": "mha", "warmup": 0.05},
    },
}  # fmt: skip


def variants(scale: dict) -> dict[str, dict]:
    """Labels and overrides: at each budget, every size for as many steps as the budget pays for."""
    common, found = scale["common"], {}
    for budget in scale["budgets"]:
        for n_layer, n_embd in scale["sizes"]:
            n_head = max(1, n_embd // scale["head_size"])
            values = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "n_ffn": n_embd * 8 // 3}
            config = lm.Config.from_preset("smoke", **(common | values))
            step = multiplying_and_flops(config)[1] * config.batch_tokens
            if budget / step >= 20:
                found[f"{n_layer} × {n_embd}, {budget:g}"] = values | {"max_steps": round(budget / step)}
    return found


def measure(scale: dict, **options) -> pd.DataFrame:
    """A row per run, with its budget in FLOPs."""
    table = sweep(variants(scale), seeds=scale["seeds"], **(scale["common"] | options))
    table = table[table.status == "finished"]
    return table.drop(columns=["status", "run", "error", "max_steps", "tokens_per_second"]).assign(
        budget=table.label.str.split(", ").str[1].astype(float)
    )


def fit(table: pd.DataFrame) -> pd.DataFrame:
    """At each budget, where a parabola of loss in ln(parameters) is lowest: budget, parameters, tokens, loss, inside.

    `inside` says whether that is between the smallest and the largest size, and not a guess beyond them.
    """
    rows = []
    for budget, runs in table.groupby("budget"):
        x = np.log(runs.parameters)
        a, b, c = np.polyfit(x, runs.val_loss, 2)
        best = -b / (2 * a)
        means = runs.groupby("parameters").tokens.mean()
        tokens = np.exp(np.interp(best, np.log(means.index), np.log(means)))
        inside = bool(a > 0 and x.min() < best < x.max())
        rows.append({"budget": budget, "parameters": np.exp(best), "tokens": tokens, "inside": inside})
        rows[-1] |= {"loss": c - b * b / (4 * a), "a": a, "b": b, "c": c}
    return pd.DataFrame(rows)


def at_equal_time(table: pd.DataFrame) -> pd.DataFrame:
    """What `fit` takes, with seconds of training as the budget, at three times that all sizes have.

    The loss of a size is read between its own runs, each of which had a whole schedule, linearly in ln(seconds).
    """
    sizes = {size: runs.groupby("budget").mean(numeric_only=True) for size, runs in table.groupby("parameters")}
    sizes = {size: runs.sort_values("train_seconds") for size, runs in sizes.items()}
    earliest = max(runs.train_seconds.min() for runs in sizes.values())
    latest = min(runs.train_seconds.max() for runs in sizes.values())
    rows = []
    for seconds in np.geomspace(earliest, latest, 3) if earliest < latest else []:
        for size, runs in sizes.items():
            read = {c: np.interp(np.log(seconds), np.log(runs.train_seconds), runs[c]) for c in ("val_loss", "tokens")}
            rows.append({"budget": seconds, "parameters": size} | read)
    return pd.DataFrame(rows)


def power_law(budgets, values) -> tuple[float, float]:
    """k and p of values = k · budgets^p, by least squares of the logarithms."""
    power, constant = np.polyfit(np.log(budgets), np.log(values), 1)
    return float(np.exp(constant)), float(power)


def spread_of_power(table: pd.DataFrame) -> float:
    """One standard deviation of the exponent, when each run is drawn anew from its seeds (a bootstrap)."""
    chance, powers = np.random.default_rng(0), []
    for _ in range(200):
        drawn = table.groupby("label", group_keys=False).sample(
            frac=1, replace=True, random_state=chance.integers(2**31)
        )
        points = fit(drawn)
        if points.inside.all():
            powers.append(power_law(points.budget, points.parameters)[1])
    return float(np.std(powers)) if len(powers) > 1 else float("nan")


def draw_sizes(ax: plt.Axes, table: pd.DataFrame, unit: str) -> None:
    """Loss by size at each budget, with its parabola and the lowest point of that."""
    for number, (point, (budget, runs)) in enumerate(zip(fit(table).itertuples(), table.groupby("budget"))):
        colour, ends = COLOURS[number], runs.groupby("parameters").val_loss.agg(["mean", "std"])
        spread = ends["std"] if ends["std"].notna().any() else None
        label = f"{budget:.3g} {unit}"
        ax.errorbar(ends.index, ends["mean"], spread, fmt=MARKERS[number], capsize=3, color=colour, label=label)
        x = np.linspace(np.log(ends.index.min()), np.log(ends.index.max()))
        ax.plot(np.exp(x), np.polyval([point.a, point.b, point.c], x), color=colour, linewidth=1)
        if point.inside:
            ax.plot(point.parameters, point.loss, "k*", markersize=11, markeredgecolor="white")
    ax.set(xscale="log", xlabel="parameters", ylabel="held-out loss (nats per token)")
    ax.legend(fontsize=8, title="★: lowest point of a parabola", title_fontsize=7)


def draw(table: pd.DataFrame) -> plt.Figure:
    """Loss by size at equal compute and at equal time, and the best sizes beside the published ones."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    draw_sizes(left, table, "FLOPs")
    left.set_title("Equal compute, by size")
    if len(timed := at_equal_time(table)):
        draw_sizes(middle, timed, "s")
        middle.set_title("Equal training time, interpolated")
    else:
        middle.set_axis_off()

    points = fit(table)
    inside = points[points.inside]
    budgets = np.array([table.budget.min(), table.budget.max()])
    published = [compute_optimal(budget)[0] for budget in budgets]
    right.plot(inside.budget, inside.parameters, "k*", markersize=11, label="best size here")
    if len(inside) > 1:
        k, p = power_law(inside.budget, inside.parameters)
        right.plot(budgets, k * budgets**p, "k-", linewidth=1, label=f"fit: exponent {p:.2f}")
    right.plot(budgets, published, "--", color=COLOURS[1], label="published law, far below its range")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="training compute (FLOPs)",
        ylabel="parameters",
        title="The best size for a budget",
    )
    right.legend(fontsize=8)
    for ax in (left, middle, right):
        ax.xaxis.set_minor_formatter(NullFormatter())  # they would cover each other
    return figure


def say(table: pd.DataFrame) -> str:
    """A row per budget, in compute and in time, with its best size, and how that size grows."""
    points, rows = fit(table), []
    for point in points.itertuples():
        runs = table[table.budget == point.budget].groupby("parameters")
        losses, times = runs.val_loss.mean(), runs.train_seconds.mean()
        rows.append(_best_size(f"{point.budget:.1e} FLOPs, {times.min():,.0f} to {times.max():,.0f} s", point))
        rows[-1] |= {"by the published law": compute_optimal(point.budget)[0]}
        rows[-1] |= {
            "smallest model (nats above the best)": losses.iloc[0] - losses.min(),
            "largest model": losses.iloc[-1] - losses.min(),
        }
    if len(timed := at_equal_time(table)):
        rows += [_best_size(f"{p.budget:.0f} s, interpolated", p) for p in fit(timed).itertuples()]
    columns = {"budget": "", "best size": "", "tokens (M)": ".2f", "by the published law": ",.0f"}
    columns |= {"smallest model (nats above the best)": "+.3f", "largest model": "+.3f"}
    inside = points[points.inside]
    if len(inside) < 2:
        return f"{markdown(rows, columns)}\n\nA best size between the sizes tried **was not seen at two budgets.**"
    power = power_law(inside.budget, inside.parameters)[1]
    published = [compute_optimal(budget)[0] for budget in inside.budget]
    ratio = np.exp(np.mean(np.log(published) - np.log(inside.parameters)))
    holds = len(inside) == len(points) and (inside.parameters.diff().dropna() > 0).all()
    return (
        f"{markdown(rows, columns)}\n\nThe best size grows as compute to the power {power:.2f} ±"
        f" {spread_of_power(table):.2f} (the published law: {power_law(inside.budget, published)[1]:.2f}, and"
        f" {ratio:.2f} times these sizes): **the finding {'holds' if holds else 'was not seen'} here.**"
    )


def _best_size(budget: str, point) -> dict:
    """A budget and its best size; a parabola that is lowest outside the sizes tried gives none."""
    size = f"{point.parameters:,.0f}" if point.inside else "outside the sizes tried"
    return {"budget": budget, "best size": size, "tokens (M)": point.tokens / 1e6 if point.inside else None}
