"""What strangers have: files that are something else, folders that others were at, a screen that is gone."""

import codecs
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from data_utils import prepare_data
from machinery import preparation
from machinery.checkpoints import CheckpointError, newest_checkpoint
from machinery.errors import DataError, UserError
from machinery.figures import show_run
from machinery.files import read_jsonl, write_atomic
from machinery.held_out import common_lines, cut_tail, is_held_out
from machinery.run_folder import RunFolder
from machinery.sources import iter_documents
from tests.text_config import TextConfig

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(("content", "said"), [(gzip.compress(b"x", mtime=0), "gzip"), (LFS, "Git LFS")])
def test_what_is_no_parquet_is_named(tmp_path, content, said):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=f"holds .*{said}.*, not Parquet"):
        list(iter_documents(str(tmp_path)))


def test_tables_put_together_and_columns_of_one_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(2 * (codecs.BOM_UTF8 + b'{"text": "a"}\n') + codecs.BOM_UTF8)
    assert list(iter_documents(str(tmp_path))) == ["a", "a"]
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "b.parquet"
    )
    with pytest.raises(DataError, match="two columns are called 'text'"):
        list(iter_documents(str(tmp_path / "b.parquet")))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "pipe.txt"}, "'pipe.txt' is a device, a pipe or a socket"),
        ({"val_source": "nosuch"}, "val_source: source 'nosuch'"),
        ({"tokenizer": "x" * 300}, "is not known"),
        ({"data_dir": "a\0b"}, "cannot be written"),
        ({"data_dir": "texts/0.txt/x"}, "cannot be written"),
    ],
)
def test_names_that_lead_nowhere_are_told(corpus, settings, said):
    os.mkfifo("pipe.txt")
    with pytest.raises(DataError) as error:
        prepare_data(TextConfig(**({"source": "texts"} | settings)))
    assert said in str(error.value)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A working folder with 40 short texts in texts/."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(40):
        Path(f"texts/{number}.txt").write_text("".join(f"line {i} of the text {number * 7919}\n" for i in range(20)))
    return tmp_path


# ------------------------------------------------------------------------------------------- held out


def _licence(held_out: bool) -> str:
    """Forty lines of which the smallest, by its hash, puts a document into the held-out text, or does not."""
    licences = ("".join(f"// {n}: you may copy it, line {i}\n" for i in range(40)) for n in range(1000))
    return next(text for text in licences if is_held_out(text, (0, 0.2)) == held_out)


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("where", ["header", "footer", "both"])
def test_what_all_documents_share_neither_decides_nor_is_held_out(corpus, held_out, where):
    licence = _licence(held_out)
    for path in Path("texts").iterdir():
        text = path.read_text()
        header, footer = licence * (where != "footer"), licence.replace("//", "##") * (where != "header")
        path.write_text(header + text + footer)
    data = prepare_data(TextConfig(source="texts"))
    texts = {split: [data.encoding.decode(ids.tolist()) for ids in data.documents(split)] for split in ("train", "val")}
    size = {split: sum(map(len, texts[split])) for split in texts}
    assert 0.05 < size["val"] / (size["train"] + size["val"]) < 0.45
    own = sum(line.startswith("line ") for text in texts["val"] for line in text.splitlines())
    assert own > 0.2 * sum(len(text.splitlines()) for text in texts["val"])
    assert len(set(texts["val"])) == len(texts["val"])


def test_a_tail_ends_before_the_footer_and_nothing_is_lost():
    footer = "the licence of all of them\n\nits second line, of them all\n"
    texts = [f"line one of the text {i}\n" * 9 + f"the last own line, of {i}\n" + footer for i in range(5)]
    common = common_lines(texts)
    assert sum(isinstance(part, bytes) for part in common) == 2
    rest, tail = cut_tail(texts[0], 0.3, common)
    assert tail.endswith("the last own line, of 0\n") and rest == texts[0].replace(tail, "") and footer in rest
    assert cut_tail(footer, 0.3, common) == cut_tail(footer, 0.3)  # all of it is common
    assert cut_tail(texts[0] + "a line of its own, after it\n", 0.3, common)[1] == tail
    assert common_lines(texts[:1]) == set()
    title = "the title of the licence of them all\nits first line, the same in all\n"
    licences = [title + f"Copyright of somebody, number {i}, of this text\n" + footer for i in range(5)]
    for text in licences:  # no more than a footer, with a line of its own
        head, tail = cut_tail(text, 0.3, common_lines(licences))
        assert tail and sorted(head + tail) == sorted(text)
    letters = [
        f"{title}Dear somebody, number {i}\n{i} is the last own line of this\nYours\n--\n\n{footer}" for i in range(5)
    ]
    assert cut_tail(letters[3], 0.3, common_lines(letters))[1].endswith("3 is the last own line of this\n")


# ---------------------------------------------------------------------------- folders others were at


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["pipe", "folder", "list", "object", "empty", "broken link"])
def test_damaged_shards_end_in_a_line_that_names_the_file(corpus, name, damage):
    config = TextConfig(source="texts")
    path = prepare_data(config).folder / name
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "list": lambda: path.write_text("[1, 2]"),
        "object": lambda: path.write_text("{}"),
        "empty": path.touch,
        "broken link": lambda: path.symlink_to("nowhere"),
    }[damage]()
    with pytest.raises(DataError) as error:
        prepare_data(config)
    assert str(path) in str(error.value)
    assert "remove" in str(error.value) or "not a regular file" in str(error.value)
    assert str(error.value).count(name) == 1


def test_no_link_is_written_through(corpus):
    folder = prepare_data(TextConfig(source="texts")).folder
    Path("mine").write_text("mine")
    (folder / ".bytes_read").symlink_to(corpus / "mine")
    with pytest.raises(DataError, match="bytes_read is a link"):
        preparation._note_bytes_read(folder, 7)
    assert Path("mine").read_text() == "mine"


def test_who_waits_for_another_process_says_so(corpus, capsys):
    config = TextConfig(source="texts")
    folder = prepare_data(config).folder
    (folder / "manifest.json").unlink()
    lock = FileLock(folder / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(1.6, lock.release).start()
    started = time.monotonic()
    assert prepare_data(config).manifest["complete"] and time.monotonic() - started > 1.5
    assert f"waiting for another process that tokenizes this text, in {folder}: 1 s" in capsys.readouterr().out


def _a_run(folder: Path) -> RunFolder:
    run = RunFolder(folder, "r")
    run.begin({"seed": 0}, tokenizer={"a": 1}, data={"key": "k"}, environment={"dtype": "float32"})
    run.append("metrics.jsonl", {"step": 1, "train_loss": 2.0})
    return run


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 10**5, None])
def test_a_damaged_note_does_not_forbid_to_resume(tmp_path, content):
    run = _a_run(tmp_path)
    (run.path / "environment.json").unlink()
    (run.path / "environment.json").mkdir() if content is None else (run.path / "environment.json").write_bytes(content)
    run.same_text({"a": 1}, "k", "float32")


@pytest.mark.parametrize("name", ["summary.json", "config.json.part", "metrics.jsonl.part"])
def test_a_folder_in_the_way_is_named_and_stays(tmp_path, name):
    run = _a_run(tmp_path)
    (run.path / "summary.json").unlink(missing_ok=True)
    (run.path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: cannot be replaced"):
        run.begin({"seed": 0})
    assert (run.path / name).is_dir()


def test_a_run_is_set_aside_whole_or_not_at_all(tmp_path, monkeypatch):
    run = _a_run(tmp_path)
    before, rename = sorted(os.listdir(run.path)), Path.rename

    def fail_for_metrics(path, target):
        if path.name == "metrics.jsonl" and path.parent == run.path:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_metrics)
    with pytest.raises(UserError, match="cannot be moved there"):
        run.set_aside()
    assert sorted(os.listdir(run.path)) == before and os.listdir(tmp_path) == ["r"]


def test_a_folder_of_a_run_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    run = _a_run(tmp_path)
    monkeypatch.setattr(Path, "iterdir", lambda folder: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(UserError, match="r: cannot be read .denied"):
        run.lock()


def test_checkpoints_that_cannot_be_read_are_not_none(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="checkpoints: cannot be read"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("line", "is_read"),
    [
        ({"step": 1, "tokens_per_second": 2.5, "mfu": None}, True),
        ({"step": 1, "prompt": "a", "text": "b"}, True),
        ({"step": 1, "tokens_per_second": "2.5"}, False),
        ({"step": 1, "tokens_per_second": [2.5]}, False),
        ({"step": 1, "prompt": None, "text": 3}, False),
        ({"step": 1, "tokens": 1.5}, False),
        ({"step": True}, False),
        ({"step": 1.5}, False),
        ({"step": 1, "tokens": 10**400}, False),
        ({"step": 1, "train_loss": 1e299}, False),
        ({"step": 1, "grad_norm": 3e38}, True),
        ({"step": 1, "progress": float("inf")}, False),
    ],
)
def test_lines_of_a_run_are_numbers(tmp_path, line, is_read):
    write_atomic(tmp_path / "metrics.jsonl", json.dumps(line) + "\n")
    assert read_jsonl(tmp_path / "metrics.jsonl") == [line] * is_read


@pytest.mark.parametrize(
    "line", ["", '{"step": 1, "train_loss": 2}', '{"step": 1, "tokens": 1e400, "train_loss": NaN}']
)
def test_a_run_that_others_were_at_is_shown(tmp_path, capsys, line):
    run = _a_run(tmp_path)
    (run.path / "expected.json").write_text("[" * 10**5)
    (run.path / "metrics.jsonl").write_text(line)
    (run.path / "summary.json").write_text('{"status": "\\u001b[31m"}')
    (run.path / ".lock").unlink(missing_ok=True)
    os.mkfifo(run.path / ".lock")
    show_run(run.path)
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full here")
def test_a_screen_that_is_gone_does_not_end_a_program(tmp_path):
    program = "from machinery.screen import keep_printing\nkeep_printing(); keep_printing()\n"
    program += "for _ in range(9): print('🙂' * 9999, flush=True)\nopen('done', 'w').close()"
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    with open("/dev/full", "w") as stdout:
        done = subprocess.run([sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE, **options)
    assert done.returncode == 0 and done.stderr.count(b"going on without it") == 1 and (tmp_path / "done").exists()


def test_what_a_terminal_lacks_does_not_end_a_program_before_training_either():
    program = "from machinery import load_definitions\nfrom machinery.budget import settle_batch\n"
    program += "lm, auto = load_definitions(), {'batch_tokens': 'auto'}\n"
    program += "settle_batch(lm.Config.from_preset('smoke', **auto), lm.Machine.find('cpu'))"
    options = {"env": os.environ | {"PYTHONIOENCODING": "cp1252"}, "capture_output": True}  # Windows, to a file
    done = subprocess.run([sys.executable, "-c", program], **options)
    assert done.returncode == 0 and b"lr 0.64 ? " in done.stdout, done.stderr


def test_a_program_without_stdout_and_stderr_shows_its_progress_nowhere(tmp_path):
    program = "import os, sys; sys.stdout = sys.stderr = None  # as `>&- 2>&-`, and Windows without a console\n"
    program += "from machinery.screen import Screen, keep_printing\nkeep_printing()\n"
    program += "with Screen(0.0) as screen: screen.say('a line')\nopen('done', 'w').close()"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and not done.stdout + done.stderr and (tmp_path / "done").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_a_bar_is_drawn_in_a_terminal_and_lines_alone_are_written_to_a_file(tmp_path):
    import pty
    import termios

    program = "from machinery.screen import Screen\nwith Screen(0.0) as screen:\n"
    program += "    screen.say('a line')\n    screen.show(1, {'progress': 0.5})"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout == "a line\n"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    assert subprocess.run(command, cwd=tmp_path, stdout=theirs).returncode == 0
    os.close(theirs)
    assert b" 0.0% |" in (said := os.read(ours, 1 << 16)) and b"a line" in said
