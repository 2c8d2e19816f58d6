"""Scores: ours are lm_eval's, on the same files; and what the files and the parse rule promise."""

import contextlib
import itertools
import json
import lzma
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import LM
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils import get_tokenizer, prepare_data
from machinery.errors import FileError, UserError
from machinery.machine import Machine
from machinery.sources import iter_documents
from tools.scores import questions as tasks
from tools.scores.parsing import held_out_functions, parses
from tools.scores.questions import encode_pair, held_out_documents, make_questions
from tools.scores.scoring import (
    document_windows,
    log_likelihoods,
    loss_by_position,
    parse_share,
    score_choices,
    score_documents,
    score_tokens,
    simple_models,
)

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: see tools/requirements.txt")

from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from tools.scores.__main__ import by_ours, compare  # noqa: E402


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A folder of Python files that are a little alike and a little different; returns its glob."""
    folder = tmp_path_factory.mktemp("code")
    words = ["alpha", "beta", "gamma", "delta", "größe", "zeta", "eta", "theta", "iota", "kappa"]
    random = np.random.default_rng(0)
    for number in range(24):
        names = [str(random.choice(words)) for _ in range(60)]
        body = "".join(
            f"def {a}_{number}({b}):\n    # the {a} of every {b} is what the {c} was before it\n"
            f"    total = {b} + {i}\n    return total * {i}\n\n\n"
            for i, (a, b, c) in enumerate(zip(names, names[1:], names[2:]))
        )
        (folder / f"{number:02d}.py").write_text(f'"""File {number}."""\n\n\n{body}', encoding="utf-8")
    return str(folder / "*.py")


@pytest.fixture(scope="module")
def run(code, tmp_path_factory):
    """A run of a few steps on that code, with a learned vocabulary; returns its folder and its held-out text."""
    folder = tmp_path_factory.mktemp("run")
    config = LM.Config.from_preset(
        "smoke", n_embd=32, n_ffn=48, block_size=64, vocab_size=400, batch_tokens=256, max_steps=40, sample_every=20,
        val_fraction=0.3, source=code, run_name="scored", data_dir=str(folder / "data"), runs_dir=str(folder),
        device="cpu",
    )  # fmt: skip
    LM.train(config)
    return folder / "scored", prepare_data(config)


def test_scores_equal_those_of_lm_eval(lm, run, capsys):
    """The whole way: a run, exported, scored by the harness on the files, from the same command as `make scores`."""
    folder, data = run
    config, model, encoding = lm.load_run(folder)
    texts = held_out_documents(data)
    questions = make_questions(texts, config.block_size, count=60)
    tasks.write_tasks(folder / "scores", questions, texts)
    result = compare(folder)
    ours, theirs = result["ours"], result["lm_eval"]
    for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert ours["endings"][name] == pytest.approx(theirs["endings"][name], abs=1e-9), name
    assert ours["endings"]["acc_norm_stderr"] > 0
    assert ours["documents"]["bits_per_byte"] == pytest.approx(theirs["documents"]["bits_per_byte"], rel=1e-4)
    assert "acc_norm" in capsys.readouterr().out
    # and the loop's own evaluation, on the same text in windows, is close: other borders, end-of-text tokens too
    in_windows = lm.evaluate(model, data, Machine.find("cpu", "float32"), 8, math.inf)["val_bpb"]
    assert ours["documents"]["bits_per_byte"] == pytest.approx(in_windows, rel=0.02)


def test_a_run_whose_source_has_an_absolute_path_is_scored_with_that_path(run, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="source '…/.*' is the end of a path"):
        by_ours(run[0], tmp_path, Machine.find("cpu"))
    (tmp_path / "text.txt").write_text("Another text, of which this run has held nothing out.\n" * 400)
    with pytest.raises(UserError, match="was begun with other text than source '.*text.txt' holds now"):
        by_ours(run[0], tmp_path / "scores", Machine.find("cpu"), str(tmp_path / "text.txt"))
    assert by_ours(run[0], tmp_path, Machine.find("cpu"), code).keys() == {"endings", "documents"}


@pytest.mark.parametrize("texts", [[], [""], None, "a text", [3], ["a\ud800"]], ids=ascii)
def test_what_is_no_list_of_texts_is_one_line(lm, tiny, texts):
    said = "^texts are .*; give a list of strings|^texts: not text .*position 1: .*; leave that character out"
    with pytest.raises(UserError, match=said):
        score_documents(lm.build_model(tiny()), get_tokenizer("bytes", 257), texts, 16, Machine.find("cpu"))


@pytest.mark.parametrize("block_size", [0, None, "64", 17, -1, 16.0], ids=repr)
def test_a_block_size_that_the_model_does_not_have_is_one_line(lm, tiny, block_size):
    model, machine = lm.build_model(tiny()), Machine.find("cpu")
    for call in (
        lambda: score_documents(model, get_tokenizer("bytes", 257), ["a text"], block_size, machine),
        lambda: score_tokens(model, get_tokenizer("bytes", 257), "a text", block_size, machine),
        lambda: log_likelihoods(model, [([1], [2])], block_size, machine),
    ):
        with pytest.raises(UserError, match="^block_size is .*; give a whole number of tokens from 1 to 16"):
            call()


def test_a_context_too_long_loses_its_beginning_in_both(lm, run):
    """One question with a context of several windows: cut from the left, token for token as lm_eval cuts it."""
    folder, data = run
    config, model, encoding = lm.load_run(folder)
    text = held_out_documents(data)[0]
    machine = Machine.find("cpu", "float32")
    context, ending = encode_pair(encoding, text[:2000], " the end")
    found = [log_likelihoods(model, [(context[-keep:], ending)], 64, machine)[0] for keep in (10**6, 65 - len(ending))]
    assert torch.equal(*found)
    with torch.no_grad():
        row = torch.tensor(context + ending)[-65:]
        chosen = model(row[None, :-1])[0].log_softmax(-1).gather(1, row[1:, None])[-len(ending) :]
    assert found[0].tolist() == pytest.approx(chosen.flatten().tolist(), rel=1e-4)
    tokens = score_tokens(model, encoding, text[:2000], 64, machine)  # of several windows
    assert "".join(piece for piece, _ in tokens).encode() == text[:2000].encode()
    together = score_documents(model, encoding, [text[:2000]], 64, machine)["bits_per_byte"]
    nats = sum(loss for _, loss in tokens)
    assert nats / math.log(2) / len(text[:2000].encode()) == pytest.approx(together, rel=1e-6)
    with pytest.raises(UserError, match="a continuation has 70 tokens and block_size is 64"):
        log_likelihoods(model, [([1], [2] * 70)], 64, machine)


class Encoder(TemplateLM):
    """lm_eval's own way from texts to tokens, with one of our tokenizers behind it."""

    def __init__(self, encoding):
        self.encoding = encoding

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.encoding.encode_ordinary(string)

    eot_token_id = 0
    _loglikelihood_tokens = loglikelihood_rolling = generate_until = None


PIECES = st.text(st.sampled_from("ab (:\n\t é🙂_0#'\""), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(PIECES, PIECES)
def test_pairs_are_cut_as_lm_eval_cuts_them(run, context, ending):
    encoding = run[1].encoding
    if not context.strip():
        with pytest.raises(UserError, match="needs a token of its own"):
            encode_pair(encoding, context, ending)
        return
    theirs = Encoder(encoding)._encode_pair(context, ending)
    if theirs[1]:
        assert encode_pair(encoding, context, ending) == theirs
    else:
        with pytest.raises(UserError, match="needs a token of its own"):
            encode_pair(encoding, context, ending)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 40])
def test_windows_of_a_document_are_those_of_lm_eval(length):
    """Each token once, and with the context that the harness gives it."""
    encoding = get_tokenizer("bytes", 257)
    ids = encoding.encode_ordinary("".join(chr(65 + i) for i in range(length)))
    theirs = get_rolling_token_windows(ids, encoding.eot_token, 8, 1)
    assert document_windows([encoding.eot_token, *ids], 8) == [make_disjoint_window(pair) for pair in theirs]


def test_standard_error_and_chance(lm, run):
    folder, data = run
    config, model, encoding = lm.load_run(folder)
    machine = Machine.find("cpu", "float32")
    questions = make_questions(held_out_documents(data), 64, count=9)
    scores = score_choices(model, encoding, questions, 64, machine)
    right = [1.0] * round(9 * scores["acc_norm"]) + [0.0] * (9 - round(9 * scores["acc_norm"]))
    assert scores["acc_norm_stderr"] == pytest.approx(np.std(right, ddof=1) / 3)
    assert scores["chance"] == 0.25
    uneven = [questions[0] | {"endings": questions[0]["endings"][:2], "label": 0}, *questions[1:2]]
    assert score_choices(model, encoding, uneven, 64, machine)["chance"] == pytest.approx(3 / 8)


def test_questions_are_a_function_of_the_text(run):
    texts = held_out_documents(run[1])
    questions = make_questions(texts, 64)
    assert questions == make_questions(list(texts), 64) and len(questions) > 20
    assert questions != make_questions(texts, 64, seed=1)
    for question in questions:
        context, endings, truth = question["ctx"], question["endings"], question["endings"][question["label"]]
        assert len(set(endings)) == 4 and context == context.rstrip()
        home = [text for text in texts if f"{context} {truth}" in text]
        assert home and all(len(ending.encode()) < 64 for ending in endings)
    labels = [question["label"] for question in make_questions(texts, 64, count=400)]
    assert set(labels) == {0, 1, 2, 3}
    assert make_questions(["ohneleerzeichen" * 100, "zwei"], 64) == []
    assert make_questions(texts, 16) == []  # no ending fits
    assert len(make_questions([" ".join(f"word{i}" for i in range(2000))], 256)) > 5  # one document


def test_held_out_documents_are_the_text(run, code):
    texts = held_out_documents(run[1])
    everything = set(iter_documents(code))
    assert len(texts) == run[1].manifest["documents"]["val"] and set(texts) <= everything
    assert sum(len(text.encode()) for text in texts) == run[1].manifest["bytes"]["val"]
    assert held_out_documents(run[1], tokens=1) == texts[:1]


def test_simple_models_are_those_of_counts_made_one_by_one(run):
    data = run[1]
    size, V = 32, data.encoding.n_vocab
    known, new = data.windows("train", size, 0), data.windows("val", size)
    known, new = known.read(0, len(known)).tolist(), new.read(0, len(new)).tolist()
    pairs = Counter(pair for row in known for pair in itertools.pairwise(row))
    single = Counter(token for row in known for token in row[1:])
    first = Counter(token for row in known for token in row[:-1])
    nats = {"by how often each occurs": 0.0, "by what followed the token before": 0.0}
    for before, token in (pair for row in new for pair in itertools.pairwise(row)):
        alone = (single[token] + 1) / (single.total() + V)
        nats["by how often each occurs"] -= math.log(alone)
        nats["by what followed the token before"] -= math.log(
            (pairs[before, token] + 100 * alone) / (first[before] + 100)
        )
    text = b"".join(data.encoding.decode_bytes(row[1:]) for row in new)
    size_of_text = data.bytes_of(torch.tensor(new)[:, 1:])
    expected = {name: value / math.log(2) / size_of_text for name, value in nats.items()}
    expected |= {"all tokens alike": math.log2(V) * len(new) * size / size_of_text}
    expected |= {"packed by xz": 8 * len(lzma.compress(text, preset=9)) / size_of_text}
    assert simple_models(data, size) == pytest.approx(expected, rel=1e-5)


def test_loss_by_position_averages_to_the_loss(lm, run):
    folder, data = run
    config, model, encoding = lm.load_run(folder)
    machine, windows = Machine.find("cpu", "float32"), data.windows("val", 64)
    positions = loss_by_position(model, data, machine, 1 << 20)
    assert positions.shape == (64,)
    row = torch.from_numpy(np.concatenate([windows.read(i, 1) for i in range(len(windows))]))
    with torch.no_grad():
        expected = -model(row[:, :-1]).log_softmax(-1).gather(2, row[:, 1:, None]).squeeze(2)
    assert torch.allclose(positions, expected.mean(0).double(), atol=1e-4)
    loss = lm.evaluate(model, data, machine, 4, math.inf)["val_loss"]
    assert positions.mean().item() == pytest.approx(loss, rel=1e-5)


def test_what_parses():
    assert parses("def f(x):\n", "    return x\n")
    assert parses("def f(x):\n", "    return x\n    y = (1,\n")  # the last of two lines is unfinished
    assert not parses("def f(x):\n", "    return x\n    y = (1,\n  2,\n 3\n")  # three of four
    assert not parses("def", " f(x:\n    return x\n")
    assert parses("x = '", "\\d'\ny")  # an odd escape is a warning, not an error
    assert parses("x = 1", "") and not parses("def f(", "")
    for hostile in ["\0", "(" * 5000, "-" * 100_000 + "1", "\ud800", "é = '\u2028'\n'"]:
        parses("x = ", hostile)  # comes back, with an answer


def test_functions_are_begun_and_the_share_is_that_of_those_that_parse(lm, run):
    folder, data = run
    machine = Machine.find("cpu")
    rows = held_out_functions(data, 4, 30)
    assert rows.shape == (4, 30)
    assert all(data.encoding.decode(row.tolist()).startswith(("def ", "class ")) for row in rows)
    _, model, _ = lm.load_run(folder)
    shares = parse_share(model, data, machine, lm.generate)
    assert set(shares) == {"written", "real"} and all(0 <= share <= 1 for share in shares.values())

    def nothing(model, tokens, n_new, n_vocab):  # a first line alone, then what no parser takes
        return torch.cat((tokens, torch.full((len(tokens), n_new), data.encoding.encode_ordinary("(")[0])), dim=1)

    assert parse_share(model, data, machine, nothing)["written"] == 0.0
    short = lm.build_model(lm.Config.from_preset("smoke", block_size=8))  # a ninth of it would be no token
    assert set(parse_share(short, data, machine, lm.generate)) == {"written", "real"}


def test_text_that_is_not_python_has_no_share(lm, tiny, texts, tmp_path):
    config = tiny(source=texts[0], data_dir=str(tmp_path))
    assert parse_share(lm.build_model(config), prepare_data(config), Machine.find("cpu"), lm.generate) == {}


BAD_QUESTIONS = [
    ("", "is empty"),
    ("{", r"line 1: not JSON"),
    ("[1]", "line 1: holds list, not an object"),
    ('{"endings": ["a", "b"], "label": 0}', "line 1: ctx is 'None'"),
    ('{"ctx": " ", "endings": ["a", "b"], "label": 0}', "line 1: ctx is ' '"),
    ('{"ctx": "a", "endings": ["a"], "label": 0}', "line 1: endings is"),
    ('{"ctx": "a", "endings": ["a", ""], "label": 0}', "line 1: endings is"),
    ('{"ctx": "a", "endings": ["a", "b"], "label": 2}', "label is 2 with 2 endings"),
    ('{"ctx": "a", "endings": ["a", "b"], "label": true}', "label is True"),
    ("[" * 100_000, "line 1: not JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD_QUESTIONS)
def test_a_file_of_questions_that_is_none_gets_one_line(tmp_path, content, message):
    path = tmp_path / "endings.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        tasks.read_questions(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_task_files_come_back(tmp_path):
    texts = ["a\r\nb\u2028c\x0b", "🙂"]
    questions = [{"ctx": "é\u2028", "endings": ["a", "b"], "label": 1}]
    tasks.write_tasks(tmp_path, questions, texts)
    assert tasks.read_questions(tmp_path / "endings.jsonl") == questions
    assert tasks.read_texts(tmp_path / "documents.jsonl") == texts
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(UserError, match="not readable as text"):
        tasks.read_texts(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": 3}))
    with pytest.raises(UserError, match="text is '3'"):
        tasks.read_texts(tmp_path / "bad.jsonl")
    tasks.write_tasks(tmp_path / "none", [], texts)
    assert not (tmp_path / "none" / "endings.jsonl").exists()
    assert (tmp_path / "none" / "documents.yaml").exists()


@pytest.mark.parametrize("written", [0, 1, 2, 3, 4])
def test_task_files_that_were_cut_off_are_not_taken_for_whole(tmp_path, monkeypatch, written):
    write, calls = tasks.write_atomic, []

    def until(path, content):
        if len(calls) == written:
            raise FileError("the disk is full")
        calls.append(path)
        write(path, content)

    monkeypatch.setattr(tasks, "write_atomic", until)
    with pytest.raises(FileError) if written < 4 else contextlib.nullcontext():
        tasks.write_tasks(tmp_path, [{"ctx": "a", "endings": ["a", "b"], "label": 1}], ["text"])
    assert tasks.has_tasks(tmp_path) == (written == 4)
    (tmp_path / "scores.json").write_text("{}")
    (tmp_path / "endings.yaml").unlink(missing_ok=True)  # as one may who has questions of his own
    assert tasks.has_tasks(tmp_path) == (written == 4)
