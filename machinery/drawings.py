"""Drawings of the model and of what training does with it, computed from a configuration: they change when it does.

`config` is the notebook's Config, or any object with the same fields. Each function returns a figure whose label is
its alternative text. Lengths are inches.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from machinery.figures import legible
from machinery.settings import kv_heads

TABLE, NORM, ATTENTION, FFN, STREAM = "C0", "C7", "C1", "C2", "0.55"


def canvas(width: float, height: float, label: str) -> tuple[Figure, Axes]:
    """A figure of so many inches, without axes; `label` is its alternative text."""
    figure = plt.figure(figsize=(width, height))
    figure.set_label(label)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.2, height: float = 0.6) -> None:
    """A box with `text`, centred on (x, y)."""
    corner, shape = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.06"
    for fill in ({"fc": colour, "alpha": 0.25, "ec": "none"}, {"fc": "none", "ec": colour, "lw": 1.2}):
        axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, **fill))
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow, with `text` above its middle."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": STREAM, "shrinkA": 0, "shrinkB": 0})
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.08, text, ha="center", va="bottom", fontsize=8)


def draw_model(config) -> Figure:
    """From tokens (B, T) to logits (B, T, V), with the shape of what flows and the size of every part."""
    T, C, V = config.block_size, config.n_embd, config.vocab_size
    parts = [("embedding", f"{V:,} × {C:,}", TABLE)]
    if config.position == "absolute":
        parts.append(("+ position", f"{config.positions:,} × {C:,}", TABLE))
    parts += [(f"{config.n_layer} blocks", "drawn in 4.5", ATTENTION), (f"{config.norm} norm", f"{C:,}", NORM)]
    parts.append(("head", f"{C:,} × {V:,}", TABLE))
    figure, axes = canvas(10, 1.9, f"The model: tokens, then {', '.join(name for name, *_ in parts)}, then logits")
    step = 8.6 / len(parts)
    for i, (name, size, colour) in enumerate(parts):
        x = 0.7 + step * (i + 0.5)
        for shift in (0.12, 0.06, 0) if "blocks" in name else (0,):  # a pile of them
            box(axes, x + shift, 1 + shift, f"{name}\n{size}" if not shift else "", colour, 1.1)
        arrow(axes, (x - step + 0.55 if i else 0.3, 1), (x - 0.55, 1), "(B, T, C)" if i else "tokens\n(B, T)")
    arrow(axes, (x + 0.55, 1), (9.75, 1), "logits\n(B, T, V)")
    if config.tie_embeddings:
        axes.plot([0.7 + step / 2] * 2 + [x] * 2, [0.7, 0.4, 0.4, 0.7], color="C0", linestyle=":")
        axes.text(5, 0.44, "the same table (tie_embeddings)", ha="center", va="bottom", fontsize=8)
    axes.text(5, 0.12, f"T = {T:,}   C = {C:,}   V = {V:,}", ha="center", fontsize=9)
    return figure


def draw_block(config) -> Figure:
    """The residual stream through one block: two branches read it, and each adds to it."""
    D, K = config.n_embd // config.n_head, kv_heads(config)
    turned = ", rope" if config.position == "rope" else ""
    branches = [
        (f"attention{turned}", f"{config.n_head} × {D} query\n{K} × {D} key, value", ATTENTION),
        ("ffn", f"{config.ffn}\n{config.n_embd:,} → {config.n_ffn:,}", FFN),
    ]
    figure, axes = canvas(10, 2.2, "One block: norm and attention add to the residual stream, then norm and ffn do")
    axes.plot([0.3, 9.6], [0.5, 0.5], color=STREAM, linewidth=4, alpha=0.6)
    arrow(axes, (9.6, 0.5), (9.85, 0.5))
    axes.text(0.3, 0.18, f"residual stream (B, T, C = {config.n_embd:,})", fontsize=9)
    for start, (name, size, colour) in zip((0.8, 5.2), branches):
        axes.plot([start, start], [0.5, 1.5], color=STREAM)  # a copy is read, the stream goes on
        arrow(axes, (start, 1.5), (start + 0.4, 1.5))
        box(axes, start + 0.95, 1.5, f"{config.norm}\nnorm", NORM, 1.1)
        arrow(axes, (start + 1.5, 1.5), (start + 1.9, 1.5))
        box(axes, start + 2.7, 1.5, f"{name}\n{size}", colour, 1.6, 0.9)
        axes.plot([start + 3.5, start + 3.9], [1.5, 1.5], color=STREAM)
        arrow(axes, (start + 3.9, 1.5), (start + 3.9, 0.65))
        axes.text(start + 3.9, 0.5, "+", ha="center", va="center", fontsize=14, bbox={"boxstyle": "circle", "fc": "w"})
    return figure


def draw_heads(config) -> Figure:
    """Which query heads read which key/value heads."""
    H, K = config.n_head, kv_heads(config)
    figure, axes = canvas(8, 1.9, f"{H} query heads share {K} key/value heads, {H // K} each")
    step = 6.4 / H
    for head in range(H):
        x, group = 1.5 + step * (head + 0.5), head // (H // K)
        below = 1.5 + 6.4 / K * (group + 0.5)
        axes.plot([x, below], [1.2, 0.7], color=f"C{group % 8}")
        box(axes, x, 1.4, str(head) if H <= 16 else "", f"C{group % 8}", 0.7 * step, 0.4)
        if head % (H // K) == 0:
            box(axes, below, 0.5, str(group) if K <= 16 else "", f"C{group % 8}", 0.7 * step, 0.4)
    for y, text in ((1.4, f"H = {H}\nquery heads"), (0.5, f"K = {K}\nkey/value heads")):
        axes.text(0.75, y, text, ha="center", va="center", fontsize=9)
    return figure


def draw_targets(config, pieces: list[str]) -> Figure:
    """A window of the text as inputs and targets; of `pieces`, its first tokens as text, nine are shown."""
    T, shown = config.block_size, pieces[:9]
    letters = [repr(piece)[1:-1].replace(" ", "·") for piece in shown]  # and a line end as \n
    letters, families = legible(letters, "sans-serif")
    figure, axes = canvas(10, 1.9, f"Inputs {shown[:-1]} and, one place on, targets {shown[1:]}")
    for y, text, row in ((1.35, "inputs", letters[:-1]), (0.45, "targets", letters[1:])):
        axes.text(0.55, y, f"{text}\n(T = {T:,})", ha="center", va="center", fontsize=9)
        for i, piece in enumerate(row):
            box(axes, 1.6 + i, y, "", TABLE if y > 1 else FFN, 0.9, 0.4)
            options = {"family": families, "fontsize": 8, "parse_math": False}
            axes.text(1.6 + i, y, piece[:10], ha="center", va="center", **options)
        axes.text(1.6 + len(row), y, "…", ha="center", va="center")
    axes.text(9.9, 0.06, "· is a space", ha="right", fontsize=8)
    for i in range(len(shown) - 1):
        arrow(axes, (1.6 + i, 1.15), (1.6 + i, 0.65))
    return figure


def draw_cache(config) -> Figure:
    """What each pass of generation computes, and what the cache keeps of the passes before."""
    D, K = config.n_embd // config.n_head, kv_heads(config)
    prompt, new = 4, 5  # tokens
    figure, axes = canvas(8, 0.36 * new + 0.8, f"{new} passes: all of the prompt first, then one new token in each")
    for row in range(new):
        y = 0.36 * (new - row) + 0.1
        axes.text(0.1, y, f"pass {row + 1}", va="center", fontsize=9)
        for token in range(prompt + row):
            computed = row == 0 or token == prompt + row - 1
            box(axes, 1.2 + 0.62 * token, y, "computed" if computed else "kept", ATTENTION if computed else NORM,
                0.58, 0.28)  # fmt: skip
            axes.texts[-1].set_fontsize(6.5)
        arrow(axes, (1.55 + 0.62 * (prompt + row - 1), y), (1.85 + 0.62 * (prompt + row - 1), y))
        axes.text(1.9 + 0.62 * (prompt + row - 1), y, "next token", va="center", fontsize=8)
    sizes = f"2 (key, value) × {config.n_layer} layers × {K} head{'s' if K > 1 else ''} × {D}"
    title = f"kept of each token: {sizes} = {2 * config.n_layer * K * D:,} numbers"
    axes.text(0.9, 0.36 * new + 0.5, title, fontsize=9)
    return figure


def draw_step(config, micro_batch: int) -> Figure:
    """The sequences of one optimizer step, `micro_batch` of them at a time: gradients add up, then the weights move."""
    sequences = config.batch_tokens // config.block_size
    passes = sequences // micro_batch
    label = f"{sequences:,} sequences in {passes:,} micro-batches of {micro_batch:,}, then one step of the optimizer"
    figure, axes = canvas(10, 2.1, label)
    drawn = min(passes, 4)
    for i in range(drawn):
        x = 1.2 + 1.6 * i
        text = f"{micro_batch:,} × {config.block_size:,}\ntokens"
        box(axes, x, 1.5, text if i < 3 or passes <= 4 else f"… {passes:,} in all", TABLE, 1.3)
        arrow(axes, (x, 1.2), (x, 0.8))
        axes.text(x, 0.6, "+ gradient" if i else "gradient", ha="center", va="center", fontsize=9)
    end = 1.2 + 1.6 * (drawn - 1)
    arrow(axes, (end + 0.5, 0.6), (end + 1.2, 0.6))
    box(axes, end + 1.95, 0.6, f"one step:\n{config.optimizer}", FFN, 1.4)
    axes.text(0.55, 0.1, f"batch_tokens = {config.batch_tokens:,} = {label.split(', then')[0]}", fontsize=9)
    return figure
