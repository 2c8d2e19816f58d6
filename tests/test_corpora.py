"""The notebook over corpora as people have them: each in a real kernel to the last cell, and its page, report.html."""

import json
import random
from html.parser import HTMLParser

import pytest
from test_notebook import check_run, execute, texts_of

from tools.execute import report_page

v4 = pytest.importorskip("nbformat.v4")

WORDS = ["the", "of", "light", "door", "hand", "letter", "old", "winter", "house", "road", "said", "never", "river"]
SHORT = {"val_fraction": 0.1, "sample_tokens": 16}


def sentences(random_numbers, words, count):
    """So many sentences of 5 to 14 of `words`."""
    drawn = (random_numbers.choices(words, k=random_numbers.randint(5, 14)) for _ in range(count))
    return [" ".join(words).capitalize() + "." for words in drawn]


def chinese_jsonl(folder):
    """300 rows of invented Chinese, in a file and a column of Chinese names, among fields that nobody asked for."""
    numbers = random.Random(1)
    letters = [chr(0x4E00 + numbers.randrange(3000)) for _ in range(400)]
    with (folder / "新闻.jsonl").open("w", encoding="utf-8") as file:
        for i in range(300):
            parts = ["".join(numbers.choices(letters, k=numbers.randint(8, 30))) for _ in range(20)]
            row = {"id": i, "标题": parts[0], "正文": "，".join(parts) + "。\n", "likes": None}
            file.write(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n")  # as characters, and as escapes
    return {"source": "新闻.jsonl", "text_column": "正文", "prompt": "今天的新闻，"}


def one_book(folder):
    """One file of a novel's length, with chapters, a byte order mark and Windows' line ends."""
    numbers = random.Random(2)
    names = [f"{word}{other}" for word in WORDS for other in ("", "s", "ing", "ly", "er", "ness")]
    chapters = []
    for i in range(1, 41):
        paragraphs = [" ".join(sentences(numbers, names, 6)) for _ in range(25)]
        chapters.append("\r\n\r\n".join([f"CHAPTER {i}", *paragraphs]))
    (folder / "My Novel (final).txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(chapters).encode())
    return {"source": "My Novel (final).txt", "prompt": "CHAPTER 1\n\n"}


def tiny_files(folder):
    """50,000 notes of a line or two, in folders by day; some are empty, some are alike."""
    numbers = random.Random(3)
    for i in range(50_000):
        day = folder / "notes" / f"{i % 250:03}"
        if i < 250:
            day.mkdir(parents=True)
        (day / f"{i}.txt").write_text("" if i % 100 == 0 else f"{sentences(numbers, WORDS, 1)[0]} No. {i // 3}\n")
    return {"source": "notes", "prompt": "The"}


def parquet_folder(folder):
    """Three Parquet files of two row groups each, with a missing text and columns of other kinds."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    numbers = random.Random(4)
    (folder / "table").mkdir()
    for number in range(3):
        texts = ["\n".join(sentences(numbers, WORDS, 15)) for _ in range(100)]
        texts[7] = None
        columns = {"url": [f"https://example.org/{i}" for i in range(100)], "content": texts, "score": [0.5] * 100}
        path = folder / "table" / f"part-{number}.parquet"
        parquet.write_table(pyarrow.table(columns), path, row_group_size=50)
    return {"source": "table", "text_column": "content", "prompt": "The old"}


MARK = "window.ran='it'"
HOSTILE = [
    f"<script>{MARK}</script>",
    f"</pre></script><script>{MARK}</script>",
    f'<img src="x" onerror="{MARK}">',
    f"<svg/onload={MARK}>",
    "$x$ and $$\\sum_i x_i$$, \\(a\\) \\[b\\] $100, \\begin{align}",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x08\x00 \u202eturned\u202c \u2028",
    "<|endoftext|> and <|im_start|> <s> </s> [INST]",
    "<!-- ]]> --> &lt;b&gt; &amp;amp; <?php ?> {{ 7 * 7 }} {% raw %} ${HOME} `ls` %s %n {0}",
    "| a | b |\n|---|---|\n# heading\n```\nfence\n```\n[x](javascript:alert(1))",
]


def markup(folder):
    """Pages full of what a terminal, a browser, MathJax, a template or a tokenizer could obey."""
    numbers = random.Random(5)
    (folder / "pages").mkdir()
    for i in range(200):
        lines = sentences(numbers, WORDS, 10) + numbers.choices(HOSTILE, k=10)
        numbers.shuffle(lines)
        (folder / "pages" / f"{i}.md").write_text("\n".join(lines), encoding="utf-8")
    return {"source": "pages/*.md", "prompt": "\n".join(HOSTILE[:7]).replace("\0", "")}  # a configuration has no 0


CORPORA = {make.__name__: make for make in (chinese_jsonl, one_book, tiny_files, parquet_folder, markup)}


class Page(HTMLParser):
    """What a browser would obey in a page: the text of its scripts, and what its elements refer to or react with."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.attributes, self._within = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self._within = tag == "script"
        obeyed = ((name, value or "") for name, value in attributes)
        self.attributes += [value for name, value in obeyed if name.startswith("on") or name in ("src", "href")]

    def handle_endtag(self, tag):
        self._within = self._within and tag != "script"

    def handle_data(self, data):
        if self._within:
            self.scripts.append(data)


def check_page(text):
    """No script, and no reference, of a corpus's text is one of the page's own."""
    page = Page(text)
    assert page.scripts and not [script for script in page.scripts if MARK in script]
    assert not [value for value in page.attributes if MARK in value or value.startswith("javascript")]


def hostile_notebook():
    """Hostile text wherever a notebook of ours has text of a corpus: printed, shown, and as words for a picture."""
    outputs = []
    for text in HOSTILE:
        picture = {"image/png": "iVBORw0KGgo=", "text/plain": text}
        outputs += [v4.new_output("stream", text=text + "\n"), v4.new_output("display_data", {"text/plain": text})]
        outputs.append(v4.new_output("display_data", picture, metadata={"image/png": {"alt": text}}))
    return v4.new_notebook(cells=[v4.new_code_cell("prompt = '<script>'", outputs=outputs)])


def test_no_script_of_a_text_is_one_of_the_page():
    page = report_page(hostile_notebook())
    check_page(page)
    assert "&lt;script&gt;" in page  # it is there, to be read


@pytest.mark.long
@pytest.mark.parametrize("name", CORPORA)
def test_the_notebook_runs_over_a_corpus_as_it_comes(tmp_path, name):
    overrides = SHORT | CORPORA[name](tmp_path)
    notebook, run = execute(tmp_path, **overrides)
    check_run(notebook, run, overrides)
    printed = texts_of(notebook)
    assert "Traceback" not in printed and "Warning" not in printed
    check_page(report_page(notebook))
    assert "\x1b" not in printed and "\u202e" not in printed
