"""Size or shape: does loss depend on the number of parameters and not on how width and depth share them?

Kaplan et al. 2020, arXiv 2001.08361, section 3.1, found a few percent between shapes of one size.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from tools.common import table as markdown
from tools.experiments.scales import CPU, GPU
from tools.experiments.tool import COLOURS, curves, equal_size, plot_sweep, sweep

TITLE = "Size or shape"
SCALES = {
    "cpu": {
        "shapes": {"small": [(1, 48), (2, 32), (4, 24), (8, 16)], "large": [(1, 96), (2, 64), (4, 48), (8, 32)]},
        "heads": {1: 6, 2: 4, 4: 3, 8: 2}, "seeds": (0, 1, 2),
        "common": CPU | {"attention": "mha", "batch_tokens": 2048, "micro_batch": 16, "max_steps": 700},
    },
    "gpu": {
        "shapes": {
            "small": [(2, 384), (4, 256), (8, 192), (16, 128)],
            "large": [(2, 768), (4, 512), (8, 384), (16, 256)],
        },
        "heads": {2: 6, 4: 4, 8: 3, 16: 2}, "seeds": (0, 1, 2),
        "common": GPU | {"attention": "mha", "max_steps": 4000},
    },
}  # fmt: skip


def variants(scale: dict) -> dict[str, dict]:
    """Labels and overrides: at each size, wide to deep, with equal numbers of parameters outside the embedding."""
    found = {}
    for size, shapes in scale["shapes"].items():
        grid = {
            f"{size}, {n_layer} × {n_embd}": {"n_layer": n_layer, "n_embd": n_embd, "n_head": scale["heads"][n_layer]}
            for n_layer, n_embd in shapes
        }
        parameters = 12 * shapes[0][0] * shapes[0][1] ** 2  # 4·C² of attention and 8·C² of feed-forward, as is usual
        found |= equal_size(grid, parameters, **scale["common"])
    return found


def measure(scale: dict, **options) -> pd.DataFrame:
    """A row per evaluation of each run."""
    table = sweep(
        variants(scale),
        seeds=scale["seeds"],
        **(scale["common"] | {"eval_every": scale["common"]["max_steps"] // 14} | options),
    )
    points = curves(table).dropna(subset=["val_loss"])
    about = table[["label", "seed", "n_layer", "n_embd", "n_ffn", "non_embedding"]]
    kept = points[["label", "seed", "step", "tokens", "flops", "seconds", "val_loss", "val_bpb"]]
    return about.merge(kept, on=["label", "seed"]).assign(size=lambda t: t.label.str.split(",").str[0])


def last(table: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation of each run."""
    return table.sort_values("step", kind="stable").groupby(["label", "seed"], sort=False).tail(1)


def draw(table: pd.DataFrame) -> plt.Figure:
    """Loss against tokens and compute, and at the end, by size and depth."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    later = table[table.tokens >= table.tokens.max() / 15]
    for ax, x in zip(axes, ("tokens", "flops")):
        plot_sweep(later, x=x, y="val_loss", ax=ax)
        ax.set(xscale="log", title=f"Loss against {'tokens' if x == 'tokens' else 'compute'}")
        ax.legend(fontsize=6, title="layers × channels", title_fontsize=7)
    for number, (_, rows) in enumerate(last(table).groupby("size", sort=False)):
        ends = rows.groupby("n_layer").val_loss.agg(["mean", "std"])
        label = f"{rows.non_embedding.mean():,.0f} parameters"
        axes[2].errorbar(
            ends.index, ends["mean"], ends["std"], fmt="os"[number] + "-", capsize=3, label=label, color=COLOURS[number]
        )
    axes[2].set(xscale="log", xlabel="layers", ylabel="held-out loss (nats per token)", title="At the end, by depth")
    axes[2].set_xticks(sorted(table.n_layer.unique()), sorted(table.n_layer.unique()), minor=False)
    axes[2].minorticks_off()
    axes[2].legend(fontsize=8)
    return figure


def say(table: pd.DataFrame) -> str:
    """A row per size with the loss at every depth, and whether size or shape decides."""
    ends = last(table)
    noise = np.sqrt(ends.groupby("label").val_loss.var().mean())
    means = ends.groupby(["size", "n_layer"], sort=False).val_loss.mean()
    gap = abs(means.groupby("size").mean().diff().iloc[-1])
    depths = {int(depth): f"depth {depth}" for depth in sorted(table.n_layer.unique())}
    rows, worth, deep, rest = [], [], [], []  # of all shapes, without the shallowest, without the deepest
    for size, losses in means.groupby("size", sort=False):
        losses = losses.droplevel("size")
        worth.append(np.ptp(losses))
        deep.append(np.ptp(losses.drop(min(depths))))
        rest.append(np.ptp(losses.drop(max(depths))))
        count = ends[ends["size"] == size].non_embedding.mean()
        rows.append({"parameters outside the embedding": count} | {depths[n]: loss for n, loss in losses.items()})
        rows[-1]["worst less best"] = worth[-1]
    columns = {"parameters outside the embedding": ",.0f"} | dict.fromkeys([*depths.values(), "worst less best"], ".3f")
    if max(worth) < 0.25 * gap:
        verdict = "shape is worth less than a quarter of that: **the finding holds here.**"
    elif max(deep) < 0.25 * gap:
        verdict = "the shapes but the shallowest less than a quarter of that: **the finding holds for them.**"
    else:
        verdict = (
            "shape is worth more than a quarter of that, the limit chosen here: **the finding does not reproduce.**"
        )
        verdict += f" Without the deepest shape, looked at afterwards, it is worth at most {max(rest):.3f} nats."
    return (
        f"{markdown(rows, columns)}\n\nThe larger size is {gap:.3f} nats better on average (seeds differ by"
        f" {noise:.3f}), and {verdict}"
    )
