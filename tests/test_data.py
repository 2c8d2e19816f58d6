"""Text in, batches out: nothing is lost, nothing is seen twice, and wrong input is one clear line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data_utils
from data_utils import get_tokenizer, prepare_data
from machinery import text_files
from machinery.encoding import BREAK, MARK, Encoder
from machinery.errors import DataError, UserError
from machinery.held_out import is_held_out
from machinery.machine import Machine
from machinery.preparation import open_sources, tokenize
from machinery.shards import new_manifest, read_manifest
from machinery.sources import iter_documents, open_source
from machinery.tokenizers import token_byte_counts, tokenizer_from_dict, tokenizer_to_dict
from tests.text_config import TextConfig, batches_at

GPT2_VOCABULARY = Path(__file__).parents[2] / "shared" / "tiktoken"  # tiktoken's cache files, where a machine has them
SAMPLE = ["def main():\n    return 1\n", "Größe 🙂 naïve\r\n\r\n\ttabs   spaces\n", "0123456789" * 3]


def gpt2():
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not GPT2_VOCABULARY.is_dir():
            pytest.skip("no copy of the gpt2 vocabulary here: set TIKTOKEN_CACHE_DIR to one")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(GPT2_VOCABULARY)
    return get_tokenizer("gpt2", 50304)


TOKENIZERS = {
    "bytes": lambda: get_tokenizer("bytes", 257),
    "bpe": lambda: get_tokenizer("bpe", 400, SAMPLE * 20),
    "gpt2": gpt2,
}


@pytest.fixture(scope="module", params=TOKENIZERS, name="encoding")
def _encoding(request):
    return TOKENIZERS[request.param]()


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
@settings(max_examples=300, deadline=None)
def test_decode_of_encode_is_the_text(encoding, text):
    ids = encoding.encode_to_numpy(text, disallowed_special=())
    assert encoding.decode_bytes(ids.tolist()) == text.encode()


@pytest.mark.parametrize("text", ["<|endoftext|>", " " * 5000, "\n\r\n\r", "\x00\x01", "a" * 3000, "👩‍👩‍👧‍👦é"])
def test_awkward_text_round_trips(encoding, text):
    ids = encoding.encode_to_numpy(text, disallowed_special=())
    assert encoding.decode_bytes(ids.tolist()) == text.encode()
    assert encoding.eot_token not in ids  # end-of-text written in a document is text


BLANKS_AND_OTHERS = [
    *" \t\n\r\v\f\x85\xa0\u2003\u3000\u2028\x1c\x1f",
    *"aZ中１1,!\u0301🙂",
    "'s",
    "<|endoftext|>",
    "\u200b",
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_encoded_together_have_the_ids_of_tiktoken(name):
    encoding = TOKENIZERS[name]()
    encoder = Encoder(encoding, np.dtype("<u2"))
    assert encoder.is_marked == (name == "bpe")

    @given(st.lists(st.lists(st.sampled_from([*BLANKS_AND_OTHERS, BREAK, MARK]), max_size=30).map("".join), min_size=1))
    @settings(max_examples=300, deadline=None)
    def check(texts):
        for text, ids in zip(texts, encoder.encode(texts), strict=True):
            assert ids.tolist() == encoding.encode(text, disallowed_special=())

    check()


def test_every_character_beside_blanks_is_encoded_as_by_tiktoken():
    encoding = get_tokenizer("bpe", 400, SAMPLE * 20)
    encoder = Encoder(encoding, np.dtype("<u2"))
    letters = [chr(code) for code in {*range(0x3100), *range(0x3100, 0x110000, 97)} - {*range(0xD800, 0xE000)}]
    texts = [f"a {letter}{letter} b  {letter}1\n {letter}x {letter} {letter}\t!  {letter}" for letter in letters]
    for start in range(0, len(texts), 500):
        for text, ids in zip(texts[start : start + 500], encoder.encode(texts[start : start + 500]), strict=True):
            assert ids.tolist() == encoding.encode(text, disallowed_special=())


def test_tokenizer_survives_its_file(encoding):
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer_to_dict(encoding))))
    for text in SAMPLE:
        assert again.encode_ordinary(text) == encoding.encode_ordinary(text)
    assert again.eot_token == encoding.eot_token and again.n_vocab == encoding.n_vocab


def test_byte_counts_add_up(encoding):
    counts = token_byte_counts(encoding)
    for text in SAMPLE:
        assert counts[encoding.encode_ordinary(text)].sum().item() == len(text.encode())
    assert counts[encoding.eot_token] == 0


def test_bpe_reaches_its_vocabulary_and_compresses():
    encoding = get_tokenizer("bpe", 300, SAMPLE * 20)
    assert encoding.n_vocab == 300
    assert len(encoding.encode_ordinary(SAMPLE[0])) <= 0.6 * len(SAMPLE[0])


@pytest.mark.parametrize(
    ("name", "vocab_size", "message"),
    [("gpt3", 50304, "'gpt3' is not known"), ("bytes", 200, "200.*257"), ("bpe", 200, "200.*257")],
)
def test_tokenizers_that_cannot_be(name, vocab_size, message):
    with pytest.raises(DataError, match=message):
        get_tokenizer(name, vocab_size, SAMPLE)


def test_vocabulary_download_refused_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR"):
        get_tokenizer("r50k_base", 50304)


# ------------------------------------------------------------------------------------------------ sources


def test_text_files_come_whole_and_byte_for_byte(texts):
    pattern, contents = texts
    assert sorted(iter_documents(pattern)) == sorted(contents)
    assert sorted(iter_documents(str(Path(pattern).parent))) == sorted(contents)  # the folder itself


def test_very_long_files_are_cut_at_line_ends(texts, monkeypatch):
    pattern, contents = texts
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 200)
    pieces = list(iter_documents(pattern))
    assert sum(map(len, pieces)) == sum(map(len, contents)) and len(pieces) > len(contents)
    assert all(piece.endswith("\n") for piece in pieces)


def test_python_source_is_the_standard_library_without_tests():
    names = list(open_source("python").files)
    assert len(names) > 400 and "json/decoder.py" in names
    assert not any("/test/" in f"/{name}" or "site-packages" in name for name in names)
    assert len(open_source("python+site").files) > len(names)


def test_of_equal_names_among_packages_the_one_that_is_imported_is_read(tmp_path, monkeypatch):
    """Windows gives Python's own folder among those of packages."""
    for root in ("a", "b"):
        (tmp_path / root / "dist-packages").mkdir(parents=True)
        (tmp_path / root / "dist-packages" / "same.py").write_text(root)
    (tmp_path / "a" / "os.py").touch()
    roots = [str(tmp_path / name) for name in ("a", "a/dist-packages", "b/dist-packages")]
    monkeypatch.setattr("site.getsitepackages", lambda: roots)
    files = open_source("python+site").files
    assert files["site/same.py"].read_text() == "a" and "site/os.py" not in files


@pytest.mark.long
def test_hub_that_does_not_answer_is_one_line():
    """A real refusal: the hub library is told to use an address where nothing listens."""
    program = "from machinery.sources import *\nlist(iter_documents('owner/name:config'))"
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    last = result.stderr.strip().splitlines()[-1]
    assert "DataError: data set 'owner/name:config' could not be read" in last, result.stderr
    assert "source='python'" in last


# ----------------------------------------------------------------------------------------- shards, batches


def prepare(source, folder, **fields):
    return prepare_data(TextConfig(source=source, data_dir=str(folder / "data"), **fields))


def all_documents(data, split):
    """The documents of a split, read back from its shards."""
    tokens = np.concatenate(
        [np.fromfile(data.folder / s["name"], data.manifest["dtype"]) for s in data.manifest["shards"][split]]
    )
    ends = np.flatnonzero(tokens == data.encoding.eot_token)
    assert ends[-1] == len(tokens) - 1
    return [data.encoding.decode(piece[: len(piece) - 1].tolist()) for piece in np.split(tokens, ends + 1)[:-1]]


@pytest.mark.parametrize("shard_tokens", [1 << 25, 5_000])
def test_shards_hold_every_document_once(texts, tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", shard_tokens)
    pattern, contents = texts
    data = prepare(pattern, tmp_path)
    train, val = all_documents(data, "train"), all_documents(data, "val")
    assert sorted(train + val) == sorted(contents)
    assert val and set(val) <= {text for text in contents if is_held_out(text, (0, 0.2))}
    assert not set(train) & set(val)
    assert data.manifest["bytes"]["train"] == sum(len(text.encode()) for text in train)
    assert data.manifest["documents"]["train"] == len(train)
    assert len(data.manifest["shards"]["train"]) > 1 or shard_tokens > 5_000


def test_reading_goes_on_from_a_position(texts):
    pattern, _ = texts
    everything = list(open_source(pattern).read())
    for text, position in everything[::7]:
        rest = [text for text, _ in open_source(pattern).read(start=position)]
        assert rest == [text for text, _ in everything[position:]]


def test_training_reads_beside_tokenization(texts, tmp_path, monkeypatch):
    """Large sources: the first windows are there while the rest is tokenized, and the order is the same."""
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 1500)
    pattern, _ = texts
    first = prepare(pattern, tmp_path / "a")
    monkeypatch.setattr(data_utils, "BACKGROUND_BYTES", 0)
    beside = prepare(pattern, tmp_path / "b")
    windows, expected = beside.windows("train", 16, seed=1), first.windows("train", 16, seed=1)
    rows = [windows.read(position, 5) for position in range(0, 2 * len(expected), 5)]
    assert np.array_equal(np.concatenate(rows), expected.read(0, 5 * len(rows)))
    assert beside.manifest["shards"] == first.manifest["shards"]
    beside.stop()


def test_a_part_is_extended_when_more_is_read(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 1500)
    whole = prepare(texts[0], tmp_path / "a").windows("train", 16, seed=1)
    part = prepare(texts[0], tmp_path / "b", max_tokens=100)
    windows = part.windows("train", 16, seed=1)
    assert len(windows) < len(whole)
    assert np.array_equal(windows.read(0, len(whole)), whole.read(0, len(whole)))
    part.stop()


def test_several_processes_prepare_no_more_than_one(texts, tmp_path, monkeypatch):
    """Each waits for the others, and then finds enough."""
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 5000)
    task = prepare(texts[0], tmp_path, max_tokens=100).task
    folder = prepare(texts[0], tmp_path, max_tokens=100).folder
    before = read_manifest(folder)
    tokenize(folder, task, False, *open_sources(task))
    assert read_manifest(folder) == before and not before["complete"]


def test_what_stops_a_background_tokenization_is_told(tmp_path, monkeypatch):
    """In UTF-8, whatever the encoding of other programs' output here."""
    monkeypatch.setattr(data_utils, "BACKGROUND_BYTES", 0)
    monkeypatch.setenv("PYTHONIOENCODING", "latin1")
    (tmp_path / "ünï.txt").write_bytes("café\n".encode("latin1"))
    with pytest.raises(DataError, match="tokenization stopped: .*ünï.txt: not UTF-8 at byte 3"):
        prepare(str(tmp_path / "ünï.txt"), tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that ends a process at once")
def test_a_background_tokenization_that_was_killed_is_not_blamed_on_a_warning(texts, tmp_path, monkeypatch):
    killed = "import os, sys; os.write(2, b'a warning \\xe9\\n'); os.kill(os.getpid(), 9)"
    start = data_utils.start_python
    monkeypatch.setattr(data_utils, "start_python", lambda _, *rest, **options: start(killed, *rest, **options))
    monkeypatch.setattr(data_utils, "BACKGROUND_BYTES", 0)
    with pytest.raises(DataError, match="tokenization stopped: it was killed"):
        prepare(texts[0], tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups of this kind")
def test_a_background_tokenization_is_spared_the_ctrl_c_of_its_parent(texts, tmp_path):
    """Jupyter's stop button and a terminal send it to the whole group."""
    program = (
        "import os, signal, sys, data_utils\nfrom tests.text_config import TextConfig\n"
        "config = TextConfig(source=sys.argv[1], data_dir=sys.argv[2])\n"
        "data = data_utils.prepare_data(config)\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "data.start_background()\n"
        "os.killpg(0, signal.SIGINT)\n"
        "print(data_utils._background[data.folder].wait(60))"
    )
    command = [sys.executable, "-c", program, texts[0], str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert done.stdout.splitlines()[-1] == "0", done.stderr


def test_a_background_tokenization_ends_with_its_parent_and_goes_on_later(texts, tmp_path, monkeypatch):
    """The parent is killed in the middle; what stands is kept and the shards come out the same."""
    for i in range(300):
        (Path(texts[0]).parent / f"more{i}.txt").write_text(f"number {i} of many\n" * 1800)
    program = (
        "import sys, time, data_utils\ndata_utils.SHARD_TOKENS, data_utils.BACKGROUND_BYTES = 500_000, 0\n"
        "from tests.text_config import TextConfig\n"
        f"data_utils.prepare_data(TextConfig(source={texts[0]!r}, data_dir=sys.argv[1]))\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "b" / "data")], stdout=subprocess.DEVNULL)
    while not list((tmp_path / "b" / "data").glob("*/train_*.bin")) and parent.poll() is None:
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 500_000)
    finished = prepare(texts[0], tmp_path / "b")  # waits for the lock, which the worker lets go when it ends
    assert finished.manifest["shards"] == prepare(texts[0], tmp_path / "a").manifest["shards"]
    assert finished.manifest["complete"] and len(finished.manifest["shards"]["train"]) > 10


def test_damaged_shards_are_named_before_a_token_is_used(texts, tmp_path):
    pattern, _ = texts
    data = prepare(pattern, tmp_path)
    shard = data.folder / "train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="train_000000.bin.*checksum"):
        data.windows("train", 16, 0).read(0, 1)
    shard.write_bytes(content[:-2])
    with pytest.raises(DataError, match="train_000000.bin.*checksum"):
        data.windows("train", 16, 0).read(0, 1)


def test_a_manifest_that_vanishes_is_one_line(texts, tmp_path):
    data = prepare(texts[0], tmp_path)
    (data.folder / "manifest.json").unlink()
    for use in (lambda: data.windows("val", 16), lambda: data.manifest["complete"], data.wait):
        with pytest.raises(DataError, match="manifest.json is gone"):
            use()


@pytest.mark.parametrize("noted", [b"12\0", b"", b"\xff", None], ids=str)
def test_what_is_no_number_of_bytes_read_is_none(texts, tmp_path, noted):
    data = prepare(texts[0], tmp_path)
    (data.folder / ".bytes_read").unlink(missing_ok=True)
    if noted is not None:
        (data.folder / ".bytes_read").write_bytes(noted)
    assert data._bytes_read() == 0


def test_a_shard_overwritten_while_it_is_read_ends_in_a_line(texts, tmp_path):
    data = prepare_data(TextConfig(texts[0], data_dir=str(tmp_path / "over")))
    windows, path = data.windows("train", 16, 0), data.folder / "train_000000.bin"
    windows.read(0, 4)
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DataError, match=r"train_000000\.bin: holds token 65535, but the tokenizer has"):
        windows.read(4, 4)


def test_a_shard_cut_off_while_it_is_read_ends_in_a_line(texts, tmp_path):
    """In a process of its own: a memory map would end it with a signal."""
    program = (
        "import os, sys; from text_config import TextConfig; from data_utils import prepare_data\n"
        "from machinery.errors import DataError\n"
        "data = prepare_data(TextConfig(sys.argv[1], data_dir=sys.argv[2]))\n"
        "windows = data.windows('train', 16, 0); windows.read(0, 4)\n"
        "os.truncate(data.folder / 'train_000000.bin', 100)\n"
        "try: windows.read(4, 2000)\nexcept DataError as error: print(error)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])}
    command = [sys.executable, "-c", program, texts[0], str(tmp_path / "cut")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "17 tokens were expected" in done.stdout, done.stderr


def test_narrowest_type_that_holds_the_vocabulary(texts, tmp_path):
    pattern, _ = texts
    assert prepare(pattern, tmp_path).manifest["dtype"] == "uint16"
    ranks = {bytes([i]): i for i in range(256)} | {i.to_bytes(3, "big"): i for i in range(256, 70000)}
    encoding = tiktoken.Encoding("wide", pat_str=r"\S+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 70000})
    wide = new_manifest({}, encoding, "documents", (0, 0.1))
    assert wide["dtype"] == "uint32"


@pytest.mark.parametrize("shard_tokens", [1 << 25, 3000])
def test_every_window_exactly_once_per_epoch(texts, tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", shard_tokens)
    data = prepare(texts[0], tmp_path)
    windows, in_order = data.windows("train", 16, seed=3), data.windows("train", 16)
    expected = sorted(map(bytes, in_order.read(0, len(in_order))))
    epochs = [windows.read(epoch * len(windows), len(windows)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(map(bytes, epoch)) == expected
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert np.array_equal(
        windows.read(len(windows) - 2, 5), np.concatenate(epochs)[len(windows) - 2 : len(windows) + 3]
    )


def test_windows_are_the_text_in_order(texts, tmp_path):
    data = prepare(texts[0], tmp_path)
    windows = data.windows("train", 16)
    rows = windows.read(0, len(windows))
    assert np.array_equal(rows[:-1, -1], rows[1:, 0])  # the last target of one is the first input of the next
    text = np.fromfile(data.folder / "train_000000.bin", "<u2")
    assert np.array_equal(rows[:, :-1].ravel(), text[: len(windows) * 16])


def test_two_processes_read_the_same_batches(texts, tmp_path, monkeypatch, capsys):
    pattern, _ = texts
    program = (
        "import sys, hashlib\nfrom data_utils import prepare_data\n"
        "from tests.text_config import TextConfig, batches_at\n"
        f"config = TextConfig(source={pattern!r}, data_dir=sys.argv[1], seed=5)\n"
        "batches = batches_at(prepare_data(config), config, 'cpu', position=777)\n"
        "digest = hashlib.sha256()\n"
        "for _ in range(300):\n"
        "    for part in batches.next(): digest.update(part.contiguous().numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "one")]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "two")])
    exec(program, {})
    last = other.splitlines()[-1]
    assert last == capsys.readouterr().out.splitlines()[-1] and len(last) == 64


def test_batches_are_inputs_and_the_same_shifted(texts, tmp_path):
    config = TextConfig(source=texts[0], data_dir=str(tmp_path))
    data = prepare_data(config)
    batches, windows = batches_at(data, config, "cpu", position=3), data.windows("train", 16, config.seed)
    tokens, targets = batches.next()
    assert tokens.shape == targets.shape == (4, 16) and tokens.dtype == torch.int64
    rows = torch.from_numpy(windows.read(3, 4))
    assert torch.equal(tokens, rows[:, :-1]) and torch.equal(targets, rows[:, 1:])
    assert torch.equal(batches.next()[0], torch.from_numpy(windows.read(7, 4))[:, :-1])


@pytest.mark.parametrize(("tokens", "micro_batch"), [(64, 0), (64, -1), (64, 2.5), (0, 4), (float("nan"), 4)])
def test_an_evaluation_of_nothing_is_one_line(texts, tmp_path, tokens, micro_batch):
    config = TextConfig(source=texts[0], data_dir=str(tmp_path))
    with pytest.raises(UserError, match="micro_batch is .* and tokens .*; both must be above 0"):
        next(prepare_data(config).held_out(tokens, micro_batch, Machine.find("cpu")))


def test_held_out_tokens_that_stand_for_no_text_are_one_line(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(chr(33 + number))  # each token that follows one is an end of text
    config = TextConfig(source=str(tmp_path / "*.txt"), data_dir=str(tmp_path / "data"), block_size=1)
    data = prepare_data(config)
    with pytest.raises(DataError, match="all 1 tokens to score are ends of texts; use a larger block_size"):
        list(data.held_out(1, 4, Machine.find("cpu")))
    assert len(list(data.held_out(8, 4, Machine.find("cpu")))) == 2


def test_too_little_text_for_a_window(tmp_path):
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    data = prepare(str(tmp_path / "short.txt"), tmp_path)
    with pytest.raises(DataError, match="fewer than one window of block_size"):
        data.windows("train", 64, 0)


@pytest.mark.cuda
def test_batches_arrive_on_cuda(texts, tmp_path):
    config = TextConfig(source=texts[0], data_dir=str(tmp_path))
    data = prepare_data(config)
    windows = data.windows("train", 16, config.seed)
    tokens, targets = batches_at(data, config, "cuda", position=0).next()
    assert tokens.is_cuda and torch.equal(tokens.cpu(), torch.from_numpy(windows.read(0, 4))[:, :-1])
