"""Figures told in words, and controls that are there only where somebody can use them."""

import json
import re
import shutil

import matplotlib.pyplot as plt
import pytest
from conftest import FLAT_LAW

from machinery import drawings, figures
from machinery.errors import UserError
from machinery.figures import coloured_tokens, describe, plot_runs
from machinery.huggingface.families import FAMILIES
from machinery.notebook import NOTEBOOK

nbformat = pytest.importorskip("nbformat")
run_kernel = pytest.importorskip("jupyter_client.manager").run_kernel
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


@pytest.mark.filterwarnings("error")  # Matplotlib warns of what its font lacks
def test_letters_that_no_font_here_has_are_boxes_and_wide_ones_take_two_places(monkeypatch):
    texts, families = figures.legible(["a\u1f42", "\u4e2d\n", "\U000f0000"])
    assert families[0] == "monospace" and texts[2] == "□" and texts[0][0] == "a" and texts[1][1] == "\n"
    figure = coloured_tokens([("⚡⚡", 0.5, ""), ("\r\x1b[1m$x$", 0.5, "")], width=8)
    letters = [(text.get_text(), *text.get_position()) for text in figure.axes[0].texts]
    assert [x for _, x, _ in letters[:3]] == [0, 2, 4] and "".join(t for t, _, _ in letters[2:]) == "\\r\\x1b[1m$x$"
    figure.canvas.draw()
    plt.close(figure)

    first, (other, *_) = figures.font_manager.findfont("monospace"), figures.font_manager.fontManager.ttflist
    monkeypatch.setattr(figures.matplotlib, "get_data_path", lambda: "/nowhere")  # its fonts are then the machine's
    has = {first: frozenset(range(128)), other.fname: frozenset([ord("中")])}
    monkeypatch.setattr(figures, "_characters", lambda path: has.get(path, frozenset()))
    assert figures.legible(["中文a"]) == (["中□a"], ["monospace", other.name])


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


def test_runs_are_compared_in_one_figure_and_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    for name, scores in (("one", [3.0, 2.0]), ("two", [3.0, 1.5])):
        (tmp_path / name).mkdir()
        numbers = [{"step": i, "tokens": i * 10**6, "seconds": 7.0 * i} for i in range(len(scores))]
        lines = [line | {"val_bpb": score} for line, score in zip(numbers, scores)]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 2, "train_loss": 1.0}])
        (tmp_path / name / "metrics.jsonl").write_text(text)
    figure = plot_runs(tmp_path / "one", str(tmp_path / "two"))
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[3.0, 2.0], [3.0, 1.5]]
    assert describe(figure).endswith("for one, two")
    figures = [plot_runs(tmp_path / "one", x=x) for x in ("tokens", "seconds", "step")]
    assert [line.get_xdata()[1] for drawn in figures for line in drawn.axes[0].lines] == [1.0, 7.0, 1]
    with pytest.raises(UserError, match="x 'second' is not known; did you mean 'seconds'"):
        plot_runs(tmp_path / "one", x="second")
    for drawn in [figure, *figures]:
        plt.close(drawn)
    shutil.copytree(tmp_path / "one", tmp_path / "other" / "one")
    for folder, source in (("one", "python"), ("two", "python"), ("other/one", "english")):
        (tmp_path / folder / "config.json").write_text(json.dumps({"source": source, "val_source": ""}))
    figures = [plot_runs(*(tmp_path / name for name in names)) for names in (("one", "two"), ("one", "other/one"))]
    assert describe(figures[1]).endswith(f"for {(tmp_path / 'one').as_posix()}, {(tmp_path / 'other/one').as_posix()}")
    said = capsys.readouterr().out
    assert said.startswith("of runs scored on other") and said.count("source 'python'") == 1 == said.count("\n")
    for figure in figures:
        plt.close(figure)
    with pytest.raises(UserError, match="three has no evaluation"):
        plot_runs(tmp_path / "one", tmp_path / "three")
    with pytest.raises(UserError, match="each folder that is named, and none is"):
        plot_runs()


def test_links_within_the_notebook_lead_to_headings_and_those_out_of_it_to_files():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    headings = {heading.replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}  # Jupyter's ids
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", text)
    assert len(links) >= 10
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (NOTEBOOK.parent / link).exists(), link


def test_the_docs_hold_the_table_of_families():
    heads = {"any": "mha or gqa", "mha": "mha", "mqa": "gqa of 1"}
    rows = [("position", "attention", "ffn", "norm", "qk_norm", "transformers", "llama.cpp")]
    rows += [(f.position, heads[f.attention], f.ffn, f.norm, str(f.qk_norm), f.model_type, f.gguf) for f in FAMILIES]
    table = "\n".join("{:9s} {:11s} {:6s} {:6s} {:8s} {:13s} {}".format(*row) for row in rows)
    assert table in (NOTEBOOK.parent / "docs" / "huggingface.md").read_text("utf-8")


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


@pytest.fixture(scope="module")
def client():
    """That of a kernel."""
    with run_kernel(kernel_name="python3") as client:
        yield client


def outputs_of(client, source, allow_stdin):
    """What a cell puts out, asked for by a front end that can answer questions, or cannot."""
    outputs = []

    def keep(message):
        if message["msg_type"] in ("stream", "display_data", "error"):
            outputs.append(nbformat.v4.output_from_msg(message))

    reply = client.execute_interactive(source, allow_stdin=allow_stdin, output_hook=keep, timeout=120)
    assert reply["content"]["status"] == "ok", reply["content"]
    return outputs


def test_controls_are_there_for_somebody_and_the_picture_for_everybody(client):
    view = "application/vnd.jupyter.widget-view+json"
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


LINES = [{"step": 0, "tokens": 0, "val_loss": 6.0, "val_bpb": 4.0}] + [
    {"step": i, "tokens": i * 10**4, "train_loss": 6 - i / 500, "lr": 0.01, "tokens_per_second": 1e4 + i}
    | ({"val_loss": 6 - i / 400, "val_bpb": 4 - i / 600} if i % 100 == 0 else {})
    for i in range(1, 1001)
]


def test_the_figure_of_a_run_labels_its_lines_smooths_steps_and_has_room_for_what_was_expected():
    figure = figures.draw_run(LINES)
    loss, rate, speed = figure.axes
    assert [line.get_label() for line in loss.lines] == ["training (means of 10)", "held out"]
    assert (
        len(loss.lines[0].get_xdata()) == len(rate.lines[0].get_xdata()) == 100 and len(loss.lines[1].get_xdata()) == 11
    )
    assert loss.lines[0].get_ydata()[0] == pytest.approx(6 - 5.5 / 500) and speed.get_ylim()[0] == 0
    assert all(axes.get_xlabel() == "training tokens (millions)" and axes.get_ylabel() for axes in figure.axes)
    plt.close(figure)

    expected = {"tokens": [10**6, 10**7], "low": [3.0, 2.0], "high": [3.5, 2.2]}
    figure, factor = figures.draw_run(LINES, expected), LINES[-1]["val_loss"] / LINES[-1]["val_bpb"]
    assert "for expected, training (means of 10), held out" in describe(figure)
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    assert corners[:, 0].max() == 10 and corners[:, 1].min() == pytest.approx(2.0 * factor)
    plt.close(figure)
    with pytest.raises(UserError, match="expected.json: is no band of the loss"):
        figures.draw_run(LINES, {"tokens": [10**6]})
    assert not figures.draw_run([{"step": 0}]).axes[0].get_legend()
    plt.close("all")


TRAIN = """
from machinery import load_definitions, loggers
lm = load_definitions()
values = {"runs_dir": RUNS, "data_dir": RUNS + "/data", "eval_every": 4, "sample_every": 3, "run_name": "drawn"}
values |= {"source": SOURCE, "tokenizer": "bytes", "val_fraction": 0.2}
def train(steps, share, **more):
    loggers.FIGURE_SHARE = share
    lm.train(lm.Config.from_preset("smoke", **values, max_steps=steps, **more))
"""
BROKEN = """
draw, calls = loggers.draw_run, []
def draw_run(*arguments):
    calls.append(arguments)
    if len(calls) > 1:
        raise ValueError("no ink")
    return draw(*arguments)
loggers.draw_run = draw_run
train(18, float("inf"), resume="never")
"""


def test_a_run_in_a_notebook_is_drawn_in_one_place_at_evaluations_and_no_figure_ends_it(tmp_path, texts, client):
    """Counted as the front end sees it: places, and pictures that are put there."""

    def messages(source):
        seen = []
        reply = client.execute_interactive(source, output_hook=seen.append, timeout=300)
        assert reply["content"]["status"] == "ok", reply["content"]
        places = [m["content"]["transient"]["display_id"] for m in seen if m["msg_type"] == "display_data"]
        news = [m["content"] for m in seen if m["msg_type"] in ("display_data", "update_display_data")]
        printed = "".join(m["content"]["text"] for m in seen if m["msg_type"] == "stream")
        assert len(places) in (0, 2) and {new["transient"]["display_id"] for new in news} <= set(places)
        pictures = [new for new in news if "image/png" in new["data"]]
        assert {new["transient"]["display_id"] for new in pictures} <= set(places[:1])
        return pictures, [new["data"]["text/plain"] for new in news if new not in pictures][1:], printed

    begin = f"RUNS, SOURCE = {str(tmp_path)!r}, {texts[0]!r}\n{TRAIN}"
    pictures, samples, printed = messages(f"{begin}\ntrain(12, float('inf'))")
    assert len(pictures) == 1 + 3  # the axes, then at steps 4, 8 and 12, which is also the end
    assert pictures[-1]["metadata"]["image/png"]["alt"].startswith("Loss: nats per token against training tokens")
    assert [text.split("\n")[0] for text in samples] == [f"──── sample of step {i}" for i in (0, 3, 6, 9, 12)]
    assert "bits per byte held out" in printed

    law = FLAT_LAW | {"recipe": {}, "parameters": [1, 1e9], "tokens": [1, 1e9], "batch_tokens": 512}
    law |= {"way": [[0.2, 3.0, 0.5], [1.0, 0.0, 0.0]]}
    (tmp_path / "laws.json").write_text(json.dumps({texts[0]: law}))
    known = f"from machinery import forecast\nforecast.LAWS = lm.Path({str(tmp_path / 'laws.json')!r})\n"
    pictures, samples, printed = messages(f"{known}train(30, 0.0)")
    assert len(pictures) == 1 + 1 + 1  # what there was, the first evaluation, and no time for more until the end
    assert "for expected, training" in pictures[0]["metadata"]["image/png"]["alt"]
    assert samples[0].startswith("──── sample of step 12") and "from step 12" in printed

    pictures, _, printed = messages(BROKEN)
    assert len(pictures) == 1 and printed.count("figure stopped (ValueError: no ink); the run goes on") == 1
    assert json.loads((tmp_path / "drawn" / "summary.json").read_text())["status"] == "finished"
