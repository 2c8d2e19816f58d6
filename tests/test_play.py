"""Figures told in words, and controls that are there only where somebody can use them."""

import json
import re

import matplotlib.pyplot as plt
import pytest

from machinery import drawings, figures
from machinery.errors import UserError
from machinery.figures import coloured_tokens, describe, plot_runs
from machinery.huggingface.families import families_table
from machinery.notebook import NOTEBOOK

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


PIECES_OF_TEXT = ["import", " os", "\n", "def", " f", "()", ":", "$x$", " return", " 1"]
DRAWINGS = {
    "model": (drawings.draw_model, {"n_layer": 3}, "3 blocks", "2 blocks"),
    "position": (drawings.draw_model, {"position": "absolute"}, "+ position", "T = 64"),
    "block": (drawings.draw_block, {"n_ffn": 96}, "64 → 96", "64 → 128"),
    "heads": (drawings.draw_heads, {"n_kv_head": 1}, "K = 1", "K = 2"),
    "attention": (drawings.draw_heads, {"attention": "mha"}, "K = 4", "K = 2"),
    "targets": (lambda c: drawings.draw_targets(c, PIECES_OF_TEXT), {"block_size": 32}, "T = 32", "T = 64"),
    "cache": (drawings.draw_cache, {"n_layer": 3}, "= 192 numbers", "= 128 numbers"),
    "step": (lambda c: drawings.draw_step(c, 2), {"batch_tokens": 768}, "12 sequences in 6", "8 sequences in 4"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_change_with_the_configuration_and_stay_within_their_figure(lm, name):
    draw, overrides, changed, default = DRAWINGS[name]
    for values, words, others in (({}, default, changed), (overrides, changed, None)):
        figure = draw(lm.Config.from_preset("smoke", **values))
        texts = figure.axes[0].texts
        told = "\n".join(text.get_text() for text in texts)
        assert words in told and (others is None or others not in told)
        assert len(describe(figure)) > 10
        width, height = figure.canvas.get_width_height()
        renderer = figure.canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
        plt.close(figure)


def test_heads_are_joined_to_the_keys_they_share(lm):
    figure = drawings.draw_heads(lm.Config.from_preset("smoke", n_head=8, n_kv_head=2))
    ends = [round(float(line.get_xdata()[1]), 3) for line in figure.axes[0].lines]
    assert len(ends) == 8 and [ends.count(x) for x in sorted(set(ends))] == [4, 4]
    plt.close(figure)


def test_runs_are_compared_in_one_figure_and_a_folder_that_is_no_run_is_named(tmp_path):
    for name, scores in (("one", [3.0, 2.0]), ("two", [3.0, 1.5])):
        (tmp_path / name).mkdir()
        lines = [{"step": i, "tokens": i * 10**6, "val_bpb": score} for i, score in enumerate(scores)]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 2, "train_loss": 1.0}])
        (tmp_path / name / "metrics.jsonl").write_text(text)
    figure = plot_runs(tmp_path / "one", str(tmp_path / "two"))
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[3.0, 2.0], [3.0, 1.5]]
    assert describe(figure).endswith("for one, two")
    plt.close(figure)
    with pytest.raises(UserError, match="three has no evaluation"):
        plot_runs(tmp_path / "one", tmp_path / "three")


def test_links_within_the_notebook_lead_to_headings_and_those_out_of_it_to_files():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    headings = {heading.replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}  # Jupyter's ids
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", text)
    assert len(links) >= 10
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (NOTEBOOK.parent / link).exists(), link


def test_the_docs_hold_the_table_of_families():
    assert families_table() in (NOTEBOOK.parent / "docs" / "huggingface.md").read_text("utf-8")


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
