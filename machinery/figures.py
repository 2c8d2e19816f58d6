"""Figures that say what they show, and things to play with: widgets where somebody is there to use them."""

from __future__ import annotations

import functools
import html
import inspect
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from machinery.errors import UserError
from machinery.files import folder_path, read_jsonl


def show(*pictures) -> None:
    """Display figures, with a text that tells their contents, Markdown, or what displays itself; the current figure if
    nothing is given.
    """
    from IPython.display import Markdown, display

    for picture in pictures or (plt.gcf(),):
        if isinstance(picture, Figure):
            display(picture, metadata={"image/png": {"alt": describe(picture)}})
            plt.close(picture)
        else:
            display(Markdown(picture) if isinstance(picture, str) else picture)


def describe(figure: Figure) -> str:
    """The alternative text of a figure: its label, or titles, axes and labels of its parts."""
    if figure.get_label():
        return figure.get_label()
    parts = []
    for axes in figure.axes:
        words = axes.get_title() or "Plot"
        if axes.get_ylabel():
            words += f": {axes.get_ylabel()}" + (f" against {axes.get_xlabel()}" if axes.get_xlabel() else "")
        labels = axes.get_legend_handles_labels()[1]
        parts.append(words + (f", for {', '.join(labels)}" if labels else ""))
    return "; ".join(dict.fromkeys(parts))


def _shell():
    """The notebook's kernel or IPython's terminal; None in a program."""
    from IPython import get_ipython  # where figures are shown; training needs none

    return get_ipython()


def attended() -> bool:
    """Whether somebody runs this cell: programs that execute notebooks say that nobody could answer a question."""
    shell = _shell()
    if not hasattr(shell, "get_parent"):
        return False
    return shell.get_parent().get("content", {}).get("allow_stdin", True)  # a control's message does not say


def play(draw: Callable, **controls) -> None:
    """Show what `draw()` returns; in a live kernel, with controls that draw it again.

    Every argument of `draw` has a default. `controls` are what ipywidgets' `interact` takes: (low, high, step) for a
    slider, a list for a choice; a default that is text gets an area to write in. Where nobody is there, in the HTML
    page and on GitHub, there is the picture of the defaults.
    """
    if not attended():
        show(draw())
        return
    from ipywidgets import Textarea, interactive

    first, metadata = draw(), {}
    picture, _ = _shell().display_formatter.format(first)  # for a page made of the notebook that is saved now
    if isinstance(first, Figure):
        metadata = {"image/png": {"alt": describe(first)}}
        plt.close(first)
    for name, parameter in inspect.signature(draw).parameters.items():
        if isinstance(parameter.default, str):
            controls.setdefault(name, Textarea(parameter.default))
    widget = interactive(functools.wraps(draw)(lambda **values: show(draw(**values))), **controls)
    for control in widget.children[:-1]:  # the last one is what is drawn
        control.style.description_width = "initial"
        if hasattr(control, "continuous_update"):
            control.continuous_update = False  # draw when a slider is let go, not on its way
    from IPython.display import display

    display(picture | widget._repr_mimebundle_(), metadata=metadata, raw=True)


def plot_runs(*folders: str | Path) -> Figure:
    """Held-out bits per byte against training tokens, a line for each run folder.

    Raises `UserError` for a folder without an evaluation.
    """
    curves = []
    for folder in [folder_path(folder, "the folder of a run") for folder in folders]:
        lines = [line for line in read_jsonl(folder / "metrics.jsonl") if line.get("val_bpb") is not None]
        points = [(line["tokens"] / 1e6, line["val_bpb"]) for line in lines if "tokens" in line]
        if not points:
            raise UserError(
                f"{folder} has no evaluation in metrics.jsonl: give the folder of a run, like runs/demo-123abc"
            )
        curves.append((folder.absolute().name, zip(*points)))
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    drawn = [axes.plot(*curve, "o-")[0] for _, curve in curves]
    axes.set(xlabel="training tokens (millions)", ylabel="held-out bits per byte", title="Runs on held-out text")
    for label in axes.legend(drawn, [name for name, _ in curves]).get_texts():
        label.set_parse_math(False)
    return figure


def coloured_tokens(pieces: list[tuple[str, float, str]], width: int = 88):
    """Text on a background that is darker where a token was less expected; live, a pointer on it tells more.

    `pieces` holds a text, its probability and a remark for each token; `width` is the length of a line of the figure.
    """
    shades = plt.get_cmap("YlOrBr")

    def shade(probability: float):
        return shades(0.5 * min(1.0, -math.log2(max(probability, 1e-9)) / 10))  # black can be read on half of the scale

    if attended():
        spans = []
        for text, probability, remark in pieces:
            red, green, blue = (round(255 * part) for part in shade(probability)[:3])
            style = f"background: rgb({red},{green},{blue}); color: black"
            label = html.escape(f"{probability:.1%}; {remark}", quote=True)
            spans.append(f'<span style="{style}" title="{label}">{html.escape(text)}</span>')
        from IPython.display import HTML

        return HTML(f'<pre style="white-space: pre-wrap; font-family: monospace">{"".join(spans)}</pre>')

    marks, column, row = [], 0, 0
    for text, probability, _ in pieces:
        for letter in text.replace("\t", "    "):
            if letter == "\n" or column == width:
                column, row = 0, row + 1
            if letter != "\n":
                marks.append((column, row, letter, shade(probability)))
                column += 1
    figure = plt.figure(figsize=(0.0753 * width, 0.18 * (row + 1)))  # 9 point letters are 0.0753 inches wide
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(row + 1, 0))
    figure.set_label(" ".join(["Tokens, darker where less expected:", *"".join(text for text, _, _ in pieces).split()]))
    axes.axis("off")
    for column, row, letter, colour in marks:
        axes.add_patch(Rectangle((column, row), 1, 1, color=colour, linewidth=0))
        axes.text(column, row + 0.75, letter, family="monospace", fontsize=9, color="black")
    return figure
