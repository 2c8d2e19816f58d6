"""The notebook end to end, in a real kernel, as its users run it: papermill sets the knobs, every cell executes."""

import json
import struct

import pytest
import tiktoken
import torch

from machinery.files import read_jsonl
from machinery.notebook import NOTEBOOK, load_definitions, mark_executed, source_digest
from machinery.tokenizers import tokenizer_to_dict

nbformat, papermill = pytest.importorskip("nbformat"), pytest.importorskip("papermill")


def execute(folder, *more, **overrides):
    """Run the notebook on `smoke` in `folder`, with `more` cells at its end; returns it and the run's folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells += map(nbformat.v4.new_code_cell, more)
    parameters = {"preset": "smoke", "overrides": {"max_steps": 12, "run_name": "here"} | overrides}
    nbformat.write(notebook, folder / "in.ipynb")
    papermill.execute_notebook(
        folder / "in.ipynb", folder / "out.ipynb", parameters, cwd=folder, kernel_name="python3", progress_bar=False,
        log_output=False,
    )  # fmt: skip
    return nbformat.read(folder / "out.ipynb", as_version=4), folder / "runs" / "here"


def texts_of(notebook):
    return "\n".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )


def make_texts(folder):
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(
            f"Chapter {i}\r\n" + "Once upon a time there was a line. Ünïcode 🙂\n" * (30 + i)
        )
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(60):
            file.write(json.dumps({"body": f"Row {i}\n" + "of a table, with text in it\n" * (2 + i % 3)}) + "\n")
    return folder


CASES = {
    "raw MHA, absolute positions, own text files, bytes": {
        "attention": "mha", "position": "absolute", "norm": "layer", "qk_norm": False,
        "source": "texts/*.txt", "tokenizer": "bytes", "val_fraction": 0.2,
    },
    "RoPE MHA, AdamW": {"attention": "mha", "position": "rope", "optimizer": "adamw", "lr": 0.001},
}  # fmt: skip
TWICE = {  # NoPE GQA with MLP, JSONL, W&B offline
    "attention": "gqa", "position": "none", "ffn": "mlp", "tie_embeddings": False, "wandb": "offline",
    "source": "texts/rows.jsonl", "text_column": "body", "val_source": "texts/7.txt", "vocab_size": 320,
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_notebook_runs_to_the_end(tmp_path, case):
    make_texts(tmp_path / "texts")
    notebook, run = execute(tmp_path, **CASES[case])
    check_run(notebook, run, CASES[case])


def check_run(notebook, run, overrides):
    """Every cell ran, to the last line, with the figures and files that a run leaves."""
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 12
    config = json.loads((run / "config.json").read_text())
    assert all(config[name] == value for name, value in overrides.items())
    printed = texts_of(notebook)
    assert (
        f"{summary['val_bpb']:.4f} bits per byte" in printed and "everything about this run is in runs/here/" in printed
    )
    pictures = sum(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert pictures >= 6
    (training,) = (cell for cell in notebook.cells if cell.source.startswith("summary = train("))
    drawn = [output for output in training.outputs if output.output_type == "display_data"]
    assert len(drawn) == 2 and drawn[0].metadata["image/png"]["alt"].startswith("Loss: nats per token against")
    assert drawn[1].data["text/plain"].startswith("──── sample of step 12\n")


def wandb_records(path):
    """The records of an offline W&B run file: protobufs in LevelDB's log format, 32 KB blocks of framed pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, pieces = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        pieces += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(pieces)
            pieces = b""


def check_wandb(run):
    """What W&B wrote offline, read back: the same metrics, the config and the samples."""
    file, _ = sorted((run.parent / "wandb").glob("offline-run-*/*.wandb"))  # the second had nothing to log
    history, config, samples = {}, {}, 0
    for record in wandb_records(file):
        for update in record.run.config.update:
            config[update.key] = json.loads(update.value_json)
        items = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        samples += any("sample" in (item.key, *item.nested_key) for item in record.history.item)
        if "train_loss" in items:
            history[items["_step"]] = items["train_loss"]
    logged = {m["step"]: m["train_loss"] for m in read_jsonl(run / "metrics.jsonl") if "train_loss" in m}
    assert len(logged) == 12 and history == pytest.approx(logged)
    assert config["n_layer"] == 2 and config["position"] == "none"
    assert samples >= 2


def test_a_mistake_in_the_knobs_is_one_line_in_the_notebook(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        execute(tmp_path, n_layr=3)
    assert caught.value.ename == "ConfigError" and "did you mean 'n_layer'" in caught.value.evalue
    failed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    (error,) = [
        o for cell in failed.cells if cell.cell_type == "code" for o in cell.outputs if o.output_type == "error"
    ]
    assert len(error.traceback) == 1
    assert not (tmp_path / "data").exists() and not (tmp_path / "runs").exists()


def test_notebook_runs_to_the_end_and_again_without_an_edit(tmp_path):
    """Trained twice: the finished run is found, tokenized text is reused."""
    make_texts(tmp_path / "texts")
    again = "again = train(config)\nassert [again[x] == summary[x] for x in ('steps', 'val_bpb')] == [True, True]"
    notebook, run = execute(tmp_path, again, **TWICE)
    check_run(notebook, run, TWICE)
    check_wandb(run)
    said = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "its budget is used" in said and "tokenizing" not in said


def test_committed_notebook_is_one_clean_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert notebook.metadata.executed_source == source_digest(), "its code changed since it was run: `make notebook`"
    assert NOTEBOOK.stat().st_size < 2e6
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "define" in tags:
            assert not cell.outputs
            assert not any(line.lstrip().startswith(("%", "!")) for line in cell.source.splitlines())


def test_figures_of_the_committed_notebook_are_told_in_words_and_no_output_needs_a_kernel():
    outputs = [o for c in nbformat.read(NOTEBOOK, as_version=4).cells for o in c.get("outputs", []) if "data" in o]
    figures = [output for output in outputs if "image/png" in output.data]
    assert len(figures) > 12 and all(len(output.metadata["image/png"]["alt"]) > 10 for output in figures)
    assert not any("application/vnd.jupyter.widget-view+json" in output.data for output in outputs)


def test_changed_code_is_no_longer_the_executed_one_and_changed_prose_and_comments_are(tmp_path):
    copy = tmp_path / "copy.ipynb"
    copy.write_bytes(NOTEBOOK.read_bytes())
    mark_executed(copy)
    notebook = nbformat.read(copy, as_version=4)
    assert notebook.metadata.executed_source == source_digest(copy) == source_digest()
    notebook.cells[0].source += " "
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    last.source += "  # a comment"
    nbformat.write(notebook, copy)
    assert notebook.metadata.executed_source == source_digest(copy)
    last.source += "\nlen('#')"
    nbformat.write(notebook, copy)
    assert notebook.metadata.executed_source != source_digest(copy)


def test_notebook_converts_to_a_program(tmp_path):
    from nbconvert import ScriptExporter

    source, _ = ScriptExporter().from_filename(str(NOTEBOOK))
    compile(source, "LMHarness.py", "exec")
    assert "get_ipython" not in source


def test_tokens_are_shown_of_a_vocabulary_whose_numbers_have_a_gap(lm, texts, tmp_path):
    """As of cl100k_base and o200k_base, where a number before that of end-of-text stands for nothing."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    gap = tiktoken.Encoding("gap", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_to_dict(gap)))
    config = lm.Config.from_preset(
        "smoke", source=texts[0], val_fraction=0.2, tokenizer=str(tmp_path), data_dir=str(tmp_path / "data")
    )
    data = lm.prepare_data(config)
    names = vars(lm) | {"config": config, "data": data, "encoding": data.encoding, "model": lm.build_model(config)}
    with torch.no_grad():
        names["model"].embedding.weight[256] = names["model"].embedding.weight.mean(0)  # near all others
    for words in ("longest = sorted", "rows = F.normalize"):
        exec(source_with(words), names)


def source_with(words):
    """The source of the one code cell that has these words."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    (source,) = (source for cell in cells if words in (source := "".join(cell["source"])))
    return source


def test_a_run_without_a_prompt_is_exported(lm, texts, tmp_path, capsys):
    pytest.importorskip("transformers")
    places = {"data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path), "run_name": "here"}
    config = lm.Config.from_preset("smoke", source=texts[0], val_fraction=0.2, prompt="", max_steps=1, **places)
    lm.train(config)
    run = tmp_path / "here"
    names = vars(lm) | {"config": config, "run": run, "encoding": lm.load_run(run)[2]}
    exec(source_with("exported = export_hf("), names)
    assert "logits differ by at most" in capsys.readouterr().out


@pytest.mark.parametrize("values", [{"block_size": 3, "batch_tokens": 12}, {"position": "none", "n_embd": 4}])
def test_rotary_positions_are_shown_for_a_short_context_and_for_heads_of_one_channel(lm, values):
    names = {"config": lm.Config.from_preset("smoke", **values), "play": lambda draw, **_: draw()}
    exec(source_with("play(draw_rope"), vars(lm) | names)


def test_a_class_that_is_defined_anew_without_the_tag_is_told(tmp_path, capsys):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    load_definitions()
    assert "without the tag" not in capsys.readouterr().out
    notebook.cells += map(nbformat.v4.new_code_cell, ("class Block(Block):\n    pass", "%time class Block"))
    nbformat.write(notebook, tmp_path / "Own.ipynb")
    load_definitions(tmp_path / "Own.ipynb")
    said = f"Own.ipynb, cell {len(notebook.cells) - 2} defines Block without the tag 'define'"
    assert capsys.readouterr().out.count(said) == 1
