"""Size, not shape: does loss depend on the number of parameters and not on how width and depth share them?

Kaplan et al. 2020, arXiv 2001.08361, section 3.1, found a few percent between shapes of one size.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from tools.experiments.scales import CPU, GPU
from tools.experiments.tool import COLOURS, curves, equal_size, plot_sweep, sweep

TITLE = "Size, not shape"
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
    return table.sort_values("step").groupby(["label", "seed"], sort=False).tail(1)


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
    """What was seen, from the numbers."""
    ends = last(table)
    noise = np.sqrt(ends.groupby("label").val_loss.var().mean())
    means = ends.groupby(["size", "n_layer"], sort=False).val_loss.mean()
    gap = abs(means.groupby("size").mean().diff().iloc[-1])
    text = []
    spread = deep = rest = 0.0  # the largest over sizes: of all shapes, without the shallowest, without the deepest
    for size, of_size in means.groupby("size", sort=False):
        of_size = of_size.droplevel("size")
        spread = max(spread, np.ptp(of_size))
        deep = max(deep, np.ptp(of_size.drop(table.n_layer.min())))
        rest = max(rest, np.ptp(of_size.drop(table.n_layer.max())))
        count = ends[ends["size"] == size].non_embedding.mean()
        text.append(
            f"At {count:,.0f} parameters outside the embedding, depth {of_size.idxmin()} is best ({of_size.min():.3f}"
            f" nats) and depth {of_size.idxmax()} worst ({of_size.max():.3f}): shape is worth"
            f" {np.ptp(of_size):.3f} nats."
        )
    text.append(
        f"The larger size is {gap:.3f} nats better on average; seeds of one shape differ by a standard deviation of"
        f" {noise:.3f}."
    )
    if spread < 0.25 * gap:
        text.append("Size decides, and shape is worth less than a quarter of it: **the finding holds here.**")
    elif deep < 0.25 * gap:
        text.append("**It holds here for all but the shallowest shape**, which is worse than its size.")
    else:
        text.append(
            "Shape is worth more than a quarter of what size is, the limit chosen here:"
            " **as stated, the finding does not reproduce here.**"
            f" Looked at afterwards: without the deepest shape, it is worth at most {rest:.3f} nats."
        )
    return " ".join(text)
