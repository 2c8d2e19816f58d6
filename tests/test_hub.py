"""Streaming from a hub: the real `datasets` against a local server that refuses, stalls and drops connections."""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest

from machinery.errors import DataError
from machinery.sources import open_source, refuse_overlap
from tools.drills.hub_server import Hub

DOCUMENTS = [f"Document {i}: ünïcode\r\n" + f"line {i} of many\n" * (5 + i % 40) for i in range(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three Parquet files of training text and one of validation text, in many row groups."""
    folder = tmp_path_factory.mktemp("hub")
    for part in range(3):
        table = pyarrow.table({"text": DOCUMENTS[part * 200 : part * 200 + 200]})
        pyarrow.parquet.write_table(table, folder / f"train-{part:05d}.parquet", row_group_size=20)
    return folder


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["data_utils"])  # which takes seconds to import; `datasets` is imported by each


def printed(program, env):
    os.environ.update(env)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(program, {})
    return out.getvalue()


BEGIN = """
import itertools, json
from machinery import sources
from machinery.errors import DataError
from machinery.sources import *
def error_of(call):
    try:
        call()
    except DataError as error:
        return str(error)
"""


def run(hub, tmp_path, program, **env):
    """Run a program in a process of its own, whose hub is `hub`; returns what it printed as JSON."""
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"} | env
    with PROCESSES.Pool(1) as pool:
        return json.loads(pool.apply_async(printed, (BEGIN + program, env)).get(timeout=200).splitlines()[-1])


READ = "print(json.dumps(list(iter_documents('owner/name'))))"
ERROR = "print(json.dumps(error_of(lambda: list(iter_documents('owner/name')))))"


@pytest.mark.parametrize("fault", ["drop", "refuse", "stall"])
def test_every_document_arrives_once_whatever_the_network_does(folder, tmp_path, fault):
    def faults(path, count):
        return fault if path.endswith(".parquet") and count == 2 else None

    with Hub(folder, faults) as hub:
        assert run(hub, tmp_path, READ, HF_HUB_DOWNLOAD_TIMEOUT="2") == DOCUMENTS


def test_a_hub_stream_goes_on_from_a_position(folder, tmp_path):
    program = (
        "head = list(itertools.islice(open_source('owner/name').read(), 333))\n"
        "position = json.loads(json.dumps(head[-1][1]))\n"
        "rest = [text for text, _ in open_source('owner/name').read(start=position)]\n"
        "print(json.dumps([text for text, _ in head] + rest))"
    )
    with Hub(folder) as hub:
        assert run(hub, tmp_path, program) == DOCUMENTS


def test_a_blank_line_before_the_place_where_a_stream_goes_on_changes_nothing(tmp_path):
    (tmp_path / "served").mkdir()
    rows = [json.dumps({"text": text}) + "\n" for text in ("a0|a1", "b0|b1|b2", "c")]
    (tmp_path / "served" / "train.jsonl").write_text("\n".join(rows))
    program = (
        "read = [*open_source('owner/name', split_on='|').read()]\n"
        "rest = lambda at: [text for text, _ in open_source('owner/name', split_on='|').read(start=at)]\n"
        "print(json.dumps([[text for text, _ in read], [rest(at) for _, at in read]]))"
    )
    with Hub(tmp_path / "served") as hub:
        texts, rests = run(hub, tmp_path, program)
    assert texts == ["a0", "a1", "b0", "b1", "b2", "c"] and rests == [texts[i:] for i in range(1, 7)]


def test_held_out_text_is_the_validation_split_where_there_is_one(folder, tmp_path):
    program = READ.replace("'owner/name'", "'owner/name', split='validation'")
    table = pyarrow.table({"text": ["held out"]})
    with Hub(folder) as hub:
        pyarrow.parquet.write_table(table, tmp_path / "validation-00000.parquet")
        hub.files["validation-00000.parquet"] = (tmp_path / "validation-00000.parquet").read_bytes()
        assert run(hub, tmp_path, program) == ["held out"]
        assert run(hub, tmp_path, READ) == DOCUMENTS


def test_the_same_data_set_cannot_be_both(folder, tmp_path):
    program = (
        "import data_utils\nfrom tests.text_config import TextConfig\n"
        "config = TextConfig(source='owner/name', val_source='owner/name')\n"
        "print(json.dumps(error_of(lambda: data_utils.prepare_data(config))))"
    )
    with Hub(folder) as hub:
        assert "val_source is the same text as source" in run(hub, tmp_path, program)
        gone = program.replace("owner/name", "owner/other")
        assert "data set 'owner/other' could not be read" in run(hub, tmp_path, gone)


@pytest.mark.parametrize("held_out", ["validation", "valid", "val", "dev", "test", ""])
def test_held_out_splits_by_their_names(monkeypatch, held_out):
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *address: ["train", held_out])
    source = open_source("owner/name")
    assert source.split("validation") == (held_out or "train") and source.split("train") == "train"
    if not held_out:
        with pytest.raises(DataError, match="it has no validation or test split"):
            refuse_overlap(source, open_source("owner/name"))


def test_a_configuration_that_has_to_be_named_is_said_with_those_there_are():
    words = "Config name is missing.\nPlease pick one among the available configs: ['de', 'en']\nExample of usage: …"
    message = str(open_source("owner/name").unreadable(ValueError(words)))
    assert "['de', 'en']" in message and "'owner/name:config'" in message


def test_an_interrupted_hub_tokenization_goes_on_and_gives_the_same_shards(folder, tmp_path):
    prepare = (
        "import json, sys, time, data_utils\nfrom tests.text_config import TextConfig\n"
        "data_utils.SHARD_TOKENS = 20_000\n"
        "config = TextConfig(source='owner/name', data_dir=sys.argv[1], val_fraction=0.1)\n"
        "data = data_utils.prepare_data(config)\n"
    )
    finish = prepare + "data.wait(shards=10**9)\nprint(json.dumps(data.manifest['shards']))"
    with Hub(folder) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        parent = subprocess.Popen([sys.executable, "-c", prepare + "time.sleep(60)", str(tmp_path / "a")], env=env)
        while not list((tmp_path / "a").glob("*/train_000001.bin")) and parent.poll() is None:
            time.sleep(0.05)
        parent.kill()
        parent.wait()

        def shards(name):
            program = finish.replace("sys.argv[1]", repr(str(tmp_path / name)))
            return run(hub, tmp_path, program)

        first = shards("a")
        assert first == shards("b") and len(first["train"]) > 5


def test_a_hub_that_is_gone_is_one_line(folder, tmp_path):
    with Hub(folder) as hub:
        message = run(hub, tmp_path, ERROR.replace("owner/name", "owner/other"))
    assert (
        message.startswith("data set 'owner/other' could not be read from the Hugging Face hub") and "\n" not in message
    )


JSON_LINES = [
    {"text": "one", "meta": None},
    {"text": "2024-01-01", "meta": {"a": 1}},
    {"meta": [1.5], "text": "a\u2028b"},
]


def test_json_of_a_hub_is_read_by_its_text_column_alone(tmp_path):
    """Another column changes its type at once, after an empty line, and after more rows than `datasets` looks at."""
    rows = [JSON_LINES[0] | {"text": f"{i} " * 500} for i in range(5_000)] + JSON_LINES
    rows[1] |= {"meta": "of another type"}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    served = tmp_path / "served"
    served.mkdir()
    (served / "train.jsonl").write_text("\n".join([lines[0], "".join(lines[1:])]), "utf-8")
    program = (
        "source = open_source('owner/name', split_on='4999 ')\n"
        "*_, before, last = itertools.pairwise(source.read())\n"
        "rest = [text for text, _ in source.read(start=json.loads(json.dumps(before[0][1])))]\n"
        "print(json.dumps([rest, sum(1 for _ in iter_documents('owner/name'))]))"
    )
    with Hub(served) as hub:
        rest, count = run(hub, tmp_path, program)
        assert rest == ["2024-01-01", "a\u2028b"] and count == len(rows)
        hub.files["train.jsonl"] += b'{"body": "no text"}\n'
        message = run(hub, tmp_path, ERROR, HF_HOME=str(tmp_path / "other"))
        assert f"row {len(rows) + 2}: no column 'text'; there are 'body'" in message


def test_content_that_is_no_text_is_told_at_once_with_its_row(tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    (served / "train.jsonl").write_bytes(b'{"text": "%b"}\n' % (b"one " * 40) * 100_000 + b'{"text": "\xe4"}\n')
    program = (
        "slept = []; sources.time.sleep = slept.append\n"
        "print(json.dumps([error_of(lambda: list(iter_documents('owner/name'))), slept]))"
    )
    with Hub(served) as hub:
        message, slept = run(hub, tmp_path, program)
    assert sum(slept) <= 1 and "utf-8" in message
    assert 50_000 < int(message.split("after row ")[1].split(" ")[0].replace(",", "")) < 100_001


def test_a_json_array_of_a_hub_is_read_by_its_text_column_alone(tmp_path):
    rows = [*JSON_LINES, {"text": None, "meta": "a word"}, {"text": "last", "meta": 5}]
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "train.json").write_text(json.dumps(rows, indent=1), "utf-8")
    program = (
        "source = open_source('owner/name')\n"
        "read = list(source.read())\n"
        "rest = [text for text, _ in source.read(start=json.loads(json.dumps(read[1][1])))]\n"
        "print(json.dumps([[text for text, _ in read], rest, source.passed_over[EMPTY_ROWS]]))"
    )
    with Hub(tmp_path / "served") as hub:
        texts, rest, empty = run(hub, tmp_path, program)
    assert texts == ["one", "2024-01-01", "a\u2028b", "last"] and rest == texts[2:]
    assert empty == 2  # the row without text, once at each reading of it


def test_parquet_of_a_hub_is_read_by_its_text_column_alone(tmp_path):
    """Other columns differ over the files; a file without the text is an error and not empty texts."""
    served = tmp_path / "served"
    served.mkdir()
    for part, columns in enumerate([{"text": ["a"], "x": [1]}, {"text": ["b"], "x": ["one"]}, {"x": [2]}]):
        pyarrow.parquet.write_table(pyarrow.table(columns), served / f"train-{part}.parquet")
    program = (
        "sources.HUB_RETRIES, texts = 0, []\n"
        "print(json.dumps([error_of(lambda: texts.extend(iter_documents('owner/name'))), texts]))"
    )
    with Hub(served) as hub:
        message, texts = run(hub, tmp_path, program)
        assert texts == ["a", "b"] and "could not be read" in message and "(text)" in message
        hub.files = {"test.jsonl": b'{"text": "a"}\n'}
        message, _ = run(hub, tmp_path, program, HF_HOME=str(tmp_path / "other"))
        assert "train" in message and "['test']" in message


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv"])
def test_text_and_tables_of_a_hub_are_read_as_they_are(tmp_path, suffix):
    """`datasets` makes a row of each line of a text, numbers of digits, and nothing of a few words."""
    served, texts = (
        tmp_path / "served",
        ["one line\nof two\n\nparts\n", "another, \tfile", "5", "None", "NA", "2024-01-01"],
    )
    served.mkdir()
    if suffix == "txt":
        for number, text in enumerate(texts):
            (served / f"train-{number}.txt").write_text(text)
    else:
        with open(served / f"train.{suffix}", "w", newline="") as file:
            rows = csv.writer(file, delimiter="," if suffix == "csv" else "\t")
            rows.writerows([["n", "text"], *enumerate(texts)])
    with Hub(served) as hub:
        assert run(hub, tmp_path, READ) == texts
