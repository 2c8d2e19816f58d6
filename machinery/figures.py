"""Figures that say what they show, and things to play with: widgets where somebody is there to use them."""

from __future__ import annotations

import functools
import html
import inspect
import itertools
import math
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from statistics import fmean as mean

import matplotlib
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from machinery.errors import UserError, printable, readable, told
from machinery.files import folder_path, read_jsonl, read_note
from machinery.notebook import NOTEBOOK
from machinery.run_folder import as_sample, run_state
from machinery.screen import duration, in_notebook, keep_printing, shell
from machinery.settings import one_of


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


def attended() -> bool:
    """Whether somebody runs this cell: programs that execute notebooks say that nobody could answer a question."""
    return in_notebook() and shell().get_parent().get("content", {}).get("allow_stdin", True)  # a control is silent


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
    picture, _ = shell().display_formatter.format(first)  # for a page made of the notebook that is saved now
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


POINTS = 100  # of a line of steps, at most: smooth, and drawn fast


@plt.rc_context({"font.size": 8.5, "axes.titlesize": 10})
def draw_run(metrics: list[dict], expected: dict | None = None) -> Figure:
    """Loss, learning rate and speed of a run against its training tokens, from the lines of its metrics.jsonl.

    `expected` is a band of held-out bits per byte to draw in grey: lists "tokens", "low" and "high" of one length.
    """
    band = _band(metrics, expected)
    figure, (loss, rate, speed) = plt.subplots(1, 3, figsize=(9.5, 2.6))
    figure.subplots_adjust(left=0.055, right=0.99, top=0.89, bottom=0.17, wspace=0.31)
    size = max(1, math.ceil(sum("train_loss" in line for line in metrics) / POINTS))

    def curve(axes, name: str, label: str, title: str, unit: str) -> None:
        tokens, values = _points(metrics, name)
        means = [(mean(tokens[i : i + size]), mean(values[i : i + size])) for i in range(0, len(values), size)]
        if means:
            axes.plot(*zip(*means), label=f"{label} (means of {size})" if size > 1 else label)
        axes.set(title=title, xlabel="training tokens (millions)", ylabel=unit)
        axes.locator_params(nbins=5)  # labels are most of what drawing takes

    if band:
        tokens, low, high = band
        loss.fill_between(tokens, low, high, color="gray", alpha=0.3, linewidth=0, label="expected")
        loss.vlines(tokens[-1], low[-1], high[-1], color="gray", linewidth=3)  # where the band is the end alone
    curve(loss, "train_loss", "training", "Loss", "nats per token")
    if (evaluated := _points(metrics, "val_loss"))[0]:
        loss.plot(*evaluated, "o-", markersize=4, label="held out")
    curve(rate, "lr", "blocks' matrices", "Learning rate of the blocks' matrices", "learning rate")
    curve(speed, "tokens_per_second", "steps", "Speed", "tokens per second")
    if loss.lines:
        loss.legend()
    speed.set_ylim(bottom=0)
    return figure


def _points(metrics: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Millions of tokens and values of the lines that have both."""
    lines = [line for line in metrics if line.get("tokens") is not None and line.get(name) is not None]
    lines = [line for line in lines if math.isfinite(line[name])]
    return [line["tokens"] / 1e6 for line in lines], [line[name] for line in lines]


def _band(metrics: list[dict], expected: dict | None) -> tuple[list[float], list[float], list[float]] | None:
    """Millions of tokens, and the band's ends in nats per token; None where there is none, or nothing scored yet."""
    evaluated = [line for line in metrics if line.get("val_bpb") and line.get("val_loss")]
    if not expected or not evaluated:
        return None
    with told("expected.json", problem="is no band of the loss"):
        factor = evaluated[-1]["val_loss"] / evaluated[-1]["val_bpb"]  # nats per token of this text in a bit per byte
        tokens = [count / 1e6 for count in expected["tokens"]]
        low, high = ([factor * value for value in expected[end]] for end in ("low", "high"))
        return tokens, low, high


def show_run(folder: str | Path) -> None:
    """Print where a run stands and its latest sample, and draw its curves where there is a screen for them."""
    keep_printing()
    state, name = run_state(folder), folder_path(folder).absolute().name
    last, left = state["last"], state["seconds_left"]
    print(printable(f"{name}: {state['status']}, {state['progress']:.1%} of the budget"), end="")
    print(f", {duration(left)} left" if state["status"] == "running" and left is not None else "")
    numbers = {"step": ",d", "tokens": ",d", "train_loss": ".3f", "val_bpb": ".4f", "tokens_per_second": ",.0f"}
    print(", ".join(f"{name} {last[name]:{form}}" for name, form in numbers.items() if last.get(name) is not None))
    for sample in state["samples"][-1:]:
        print(as_sample(sample, heading=True))
    if plt.get_backend().lower() == "agg":  # a terminal without a screen
        return
    draw_run(state["metrics"], state["expected"])
    plt.show()


def plot_runs(*folders: str | Path, x: str = "tokens") -> Figure:
    """Held-out bits per byte against tokens, seconds or steps, a line for each run folder; runs of other text are told.

    Raises `UserError` for a folder without an evaluation, and for none at all.
    """
    if not folders:
        raise UserError(
            "plot_runs draws a line for each folder that is named, and none is: plot_runs('runs/demo-123abc')"
        )
    units = {"tokens": "training tokens (millions)", "seconds": "training time (s)", "step": "step"}
    one_of("x", x, list(units))
    paths, curves, texts, sizes = [folder_path(folder) for folder in folders], [], {}, {}
    names = [path.absolute().name for path in paths]
    for folder, name in zip(paths, names):
        lines = [line for line in read_jsonl(folder / "metrics.jsonl") if line.get("val_bpb") is not None]
        scale = 1e6 if x == "tokens" else 1
        points = [(line[x] / scale, line["val_bpb"]) for line in lines if x in line]
        if not points:
            raise UserError(
                f"{folder} has no evaluation in metrics.jsonl: give the folder of a run, like runs/demo-123abc"
            )
        label = name if names.count(name) == 1 else folder.as_posix()
        curves.append((label, zip(*points)))
        if config := read_note(folder / "config.json"):
            fields = ("val_source" if config.get("val_source") else "source", "val_fraction", "text_column", "split_on")
            texts[label] = ", ".join(f"{field} {config[field]!r}" for field in fields if config.get(field))
            if type(size := read_note(folder / "data.json").get("held_out_bytes")) is int:
                sizes[label] = f", {size:,} bytes"
    of_all = sizes if len(sizes) == len(folders) else texts  # the same bytes may have come from elsewhere
    if len(set(of_all.values())) > 1 or len(set(sizes.values())) > 1:
        told_apart = "; ".join(f"{label}: {text}{sizes.get(label, '')}" for label, text in texts.items())
        print(printable(f"of runs scored on other held-out text, bits per byte do not compare: {told_apart}"))
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    styles = itertools.cycle(["o-", "x--"])  # so that two runs that agree are both seen
    drawn = [axes.plot(*curve, style, label=name)[0] for style, (name, curve) in zip(styles, curves)]
    axes.set(xlabel=units[x], ylabel="held-out bits per byte", title="Runs on held-out text")
    for label in axes.legend(drawn, [name for name, _ in curves]).get_texts():
        label.set_parse_math(False)
    return figure


def published_run() -> list:
    """The picture and the texts of results/demo.md, for `show`; none where results/ was not copied along."""
    from IPython.display import Image

    results = NOTEBOOK.parent / "results"
    if not results.exists():
        return []
    alt = "A run of demo: the loss falls steeply, then slowly; the learning rate rises, stays and falls"
    texts = re.findall(r"```text\n.*?```", (results / "demo.md").read_text("utf-8"), re.DOTALL)
    return [Image(results / "demo.png", alt=alt), *texts]


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """What a font can draw; nothing where it is made of pictures, which Matplotlib cannot use."""
    try:
        font = font_manager.get_font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()


def legible(texts: list[str], family: str = "monospace") -> tuple[list[str], list[str]]:
    """The texts as the fonts of this machine can draw them, "□" for what none of them has; and the fonts to name as
    their family: `family` first, then others for what it lacks, such as Chinese.
    """
    families = [family]
    first = font_manager.findfont(font_manager.FontProperties(family=[family]))
    missing = {ord(letter) for text in texts for letter in text if letter != "\n"} - _characters(first)
    for font in font_manager.fontManager.ttflist:
        of_the_machine = not font.fname.startswith(matplotlib.get_data_path()) and "emoji" not in font.name.lower()
        if missing and of_the_machine and (found := missing & _characters(font.fname)):
            families.append(font.name)
            missing -= found
    return [text.translate(dict.fromkeys(missing, "□")) for text in texts], families


def coloured_tokens(pieces: list[tuple[str, float, str]], width: int = 88):
    """Text on a background that is darker where a token was less expected; live, a pointer on it tells more.

    `pieces` holds a text, its probability and a remark for each token; `width` is the length of a line of the figure.
    """
    shades = plt.get_cmap("YlOrBr")
    pieces = [(readable(text), probability, remark) for text, probability, remark in pieces]

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

    texts, families = legible([text.replace("\t", "    ") for text, _, _ in pieces])
    marks, column, row = [], 0, 0
    for text, (_, probability, _) in zip(texts, pieces):
        for letter in text:
            columns = 2 if unicodedata.east_asian_width(letter) in "FW" else 1
            if letter == "\n" or column + columns > width:
                column, row = 0, row + 1
            if letter != "\n":
                marks.append((column, row, columns, letter, shade(probability)))
                column += columns
    figure = plt.figure(figsize=(0.0753 * width, 0.18 * (row + 1)))  # 9 point letters are 0.0753 inches wide
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(row + 1, 0))
    figure.set_label(" ".join(["Tokens, darker where less expected:", *"".join(text for text, _, _ in pieces).split()]))
    axes.axis("off")
    for column, row, columns, letter, colour in marks:
        axes.add_patch(Rectangle((column, row), columns, 1, color=colour, linewidth=0))
        axes.text(column, row + 0.75, letter, family=families, fontsize=9, color="black", parse_math=False)
    return figure
