"""Figures told in words, and controls that are there only where somebody can use them."""

import matplotlib.pyplot as plt
import pytest

from machinery import figures
from machinery.figures import coloured_tokens, describe

nbformat = pytest.importorskip("nbformat")
start_new_kernel = pytest.importorskip("jupyter_client.manager").start_new_kernel
HTML = pytest.importorskip("IPython.display").HTML

PIECES = [("import os\n", 0.9, "first"), ("<b>", 0.001, 'a "quoted" guess'), ("\tx", 1e-12, "last")]


def test_a_figure_is_told_by_its_titles_axes_and_labels():
    figure, (left, right) = plt.subplots(1, 2)
    left.plot([1, 2], label="ours")
    left.plot([2, 1], label="theirs")
    left.set(title="Loss", xlabel="step", ylabel="nats")
    left.legend()
    right.imshow([[0]])
    assert describe(figure) == "Loss: nats against step, for ours, theirs; Plot"
    figure.set_label("Something else")
    assert describe(figure) == "Something else"
    plt.close("all")


def test_tokens_are_a_figure_where_nobody_is_there_and_html_where_somebody_is(monkeypatch):
    figure = coloured_tokens(PIECES, width=6)
    letters = [(text.get_text(), *text.get_position()) for text in figure.axes[0].texts]
    assert "".join(letter for letter, _, _ in letters) == "import os<b>    x"
    assert max(x for _, x, _ in letters) < 6 and letters[-1][2] > letters[0][2]  # lines of six letters
    assert "import os <b> x" in describe(figure)
    shades = [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]
    assert sum(shades[0]) > sum(shades[-1])  # what was not expected is darker
    plt.close(figure)

    monkeypatch.setattr(figures, "attended", lambda: True)
    page = coloured_tokens(PIECES)
    assert isinstance(page, HTML) and "&lt;b&gt;" in page.data and "0.1%; a &quot;quoted&quot; guess" in page.data


CELL = """
import matplotlib.pyplot as plt
from machinery.figures import play

def draw(power: int = 2, name: str = "x"):
    print("drawn", power, name)
    figure, axes = plt.subplots()
    axes.set_title(f"{name} to the {power}")
    return figure

play(draw, power=(0, 5))
"""


def outputs_of(client, source, allow_stdin):
    """What a cell puts out in a kernel of its own, asked for by a front end that can answer questions, or cannot."""
    outputs = []

    def keep(message):
        if message["msg_type"] in ("stream", "display_data", "error"):
            outputs.append(nbformat.v4.output_from_msg(message))

    reply = client.execute_interactive(source, allow_stdin=allow_stdin, output_hook=keep, timeout=120)
    assert reply["content"]["status"] == "ok", reply["content"]
    return outputs


def test_controls_are_there_for_somebody_and_the_picture_for_everybody():
    view = "application/vnd.jupyter.widget-view+json"
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        alone = outputs_of(client, CELL, allow_stdin=False)
        pictures = [output for output in alone if output.output_type == "display_data"]
        assert [set(output.data) for output in pictures] == [{"image/png", "text/plain"}]
        assert pictures[0].metadata["image/png"]["alt"] == "x to the 2"

        together = outputs_of(client, CELL, allow_stdin=True)
        (widget,) = [output for output in together if view in output.get("data", {})]
        assert "image/png" in widget.data  # for a page made of a notebook that was saved with its controls
        find = "import gc, ipywidgets; (slider,) = [w for w in gc.get_objects() if isinstance(w, ipywidgets.IntSlider)]"
        outputs_of(client, f"{find}; assert slider.max == 5 and not slider.continuous_update", allow_stdin=True)
        moved = outputs_of(client, "slider.value = 4", allow_stdin=True)
        assert "drawn 4 x" in "".join(output.get("text", "") for output in moved)
        assert any("image/png" in output.get("data", {}) for output in moved)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
