"""Documents and tokenizers: text as it is, and the numbers a model reads instead.

A *document* is a `str`. Every tokenizer is a `tiktoken.Encoding` with an end-of-text token, so one code
path encodes and decodes them all, whether it was published, learned here, or is plain bytes.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import json
import os
import re
import site
import sysconfig
import time
from collections.abc import Iterable, Iterator
from functools import cache
from glob import glob
from pathlib import Path
from types import ModuleType

from machinery.checkpoints import first_line
from machinery.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
TEST_FOLDERS = {"test", "tests", "idle_test"}  # the standard library's own test suites
MAX_DOCUMENT_BYTES = 64 << 20  # a longer text file is read as several documents, cut at line ends
HUB_RETRIES = 5  # after a stream has broken off, with 1, 2, 4, … seconds between them

Position = int | dict  # where reading a source goes on: a count of documents, or the state of a hub stream


# ---------------------------------------------------------------------------------------------- sources


def source_files(source: str) -> list[Path] | None:
    """The files behind a source, in an order unrelated to folders; None for a hub data set.

    `"python"` is the standard library without its test suites, `"python+site"` adds every installed
    package, a path, folder or glob is local files. Ordering by a hash of the name mixes the folders and
    is the same on every machine. Raises `DataError` when nothing matches.
    """
    if source in ("python", "python+site"):
        files = _python_files(with_site=source == "python+site")
    elif _is_hub_name(source):
        return None
    else:
        pattern = os.path.join(source, "**", "*") if os.path.isdir(source) else source
        known = TEXT_SUFFIXES + TABLE_SUFFIXES
        matches = [Path(name) for name in glob(os.path.expanduser(pattern), recursive=True)]
        files = {path.as_posix(): path for path in matches if path.suffix in known and path.is_file()}
        if not files:
            other = sorted({path.suffix or path.name for path in matches if path.is_file()})
            found = f"only {', '.join(other[:5])}" if other else "nothing"
            raise DataError(
                f"source {source!r}: no {', '.join(known)} file matches (found {found}); check the path or glob"
            )
    return [path for _, path in sorted((hashlib.sha256(name.encode()).digest(), path) for name, path in files.items())]


def _is_hub_name(source: str) -> bool:
    looks_local = os.path.exists(source) or source.endswith(TEXT_SUFFIXES + TABLE_SUFFIXES)
    return not looks_local and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) is not None


def _python_files(with_site: bool) -> dict[str, Path]:
    """Name to path of the Python sources on this machine; names are relative to their library folder."""
    paths = sysconfig.get_paths()
    packages = {Path(p).resolve() for p in [paths["purelib"], paths["platlib"], *site.getsitepackages()]}
    stdlib = Path(paths["stdlib"]).resolve()
    skipped = TEST_FOLDERS | {"site-packages", "dist-packages"}
    files = {path.relative_to(stdlib).as_posix(): path for path in _find_python(stdlib, skipped)}
    if with_site:
        for root in packages:
            files |= {f"site/{path.relative_to(root).as_posix()}": path for path in _find_python(root)}
    return files


def _find_python(root: Path, skipped: Iterable[str] = ()) -> Iterator[Path]:
    """Python files under `root`, without a look into `skipped` folders, which may hold many more."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def iter_documents(source: str, text_column: str = "text", split: str = "train") -> Iterator[str]:
    """Yield the documents of `source`, whole and with their line breaks as they are. Empty ones are left out."""
    return (text for text, _ in read_documents(source, text_column, split))


def read_documents(
    source: str, text_column: str = "text", split: str = "train", start: Position = 0
) -> Iterator[tuple[str, Position]]:
    """Yield each document from `start` on, with the position after it, where a later call would go on.

    `split` picks the split of a hub data set; `text_column` is read from JSONL, Parquet and hub rows.
    Raises `DataError` naming the file, row or column that is wrong, or the hub that did not answer.
    """
    files = source_files(source)
    if files is None:
        yield from _hub_documents(source, text_column, split, start)
        return
    lenient = source in ("python", "python+site")  # Python sources may declare another encoding: skipped
    documents = itertools.chain.from_iterable(
        _table_documents(path, text_column) if path.suffix in TABLE_SUFFIXES else _text_documents(path, lenient)
        for path in files
    )
    for number, text in enumerate((text for text in documents if text), 1):
        if number > start:
            yield text, number


def _text_documents(path: Path, lenient: bool) -> Iterator[str]:
    with path.open("rb") as file:
        while block := file.read(MAX_DOCUMENT_BYTES) + file.readline():
            try:
                yield block.decode("utf-8")
            except UnicodeDecodeError as error:
                if lenient:
                    return
                raise DataError(
                    f"{path}: not UTF-8 at byte {file.tell() - len(block) + error.start} (0x{block[error.start]:02x});"
                    f" convert it, for example: iconv -f latin1 -t utf-8 {path.name}"
                ) from None


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


def _table_documents(path: Path, text_column: str) -> Iterator[str]:
    """Rows of a JSONL or Parquet file, streamed by Hugging Face `datasets`."""
    if path.stat().st_size == 0:
        return
    builder = {".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    try:
        rows = _datasets().load_dataset(builder, data_files=str(path), split="train", streaming=True)
        yield from _column(rows, text_column, str(path))
    except DataError:
        raise
    except Exception as error:  # pyarrow's own words, with the line where they can be placed
        where = f"{path}{_first_bad_line(path)}" if path.suffix == ".jsonl" else path
        raise DataError(
            f"{where}: not readable as {path.suffix[1:]} ({first_line(error)}); mend or remove it"
        ) from None


def _first_bad_line(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                json.dumps(json.loads(line or b"{}"), ensure_ascii=False).encode("utf-8")
            except ValueError:
                return f", line {number}"
    return ""


def hub_split(source: str, wanted: str) -> str:
    """The split of a hub data set to read: for held-out text its validation or test split, where it has one."""
    name, _, config = source.partition(":")
    available = _datasets().get_dataset_split_names(name, config or None) if wanted != "train" else []
    return next((split for split in (wanted, "test") if split in available), "train")


def _hub_documents(source: str, text_column: str, split: str, start: Position) -> Iterator[tuple[str, Position]]:
    """Rows of a hub data set, streamed. A stream that breaks off is taken up where it was, a few times."""
    name, _, config = source.partition(":")
    failures, position, reached = 0, start, False
    while True:
        try:
            split = hub_split(source, split)
            rows = _datasets().load_dataset(name, config or None, split=split, streaming=True)
            if position:
                rows.load_state_dict(position)
            for text in _column(rows, text_column, f"{source} ({split})"):
                failures, position, reached = 0, rows.state_dict(), True
                if text:
                    yield text, position
            return
        except DataError:
            raise
        except Exception as error:  # whatever the network libraries raise
            failures += 1
            if not reached or failures > HUB_RETRIES:  # opening is retried by the library itself
                raise DataError(
                    f"data set {source!r} could not be read from the Hugging Face hub ({first_line(error)}); check the"
                    " name and the network, or use source='python' or a local file"
                ) from None
            time.sleep(2 ** (failures - 1))


def _column(rows: Iterable[dict], text_column: str, where: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        if text_column not in row:
            raise DataError(
                f"{where}: no column {text_column!r}; there are {', '.join(map(repr, row))}: set text_column"
            )
        text = row[text_column]
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}, row {number}: column {text_column!r} holds {type(text).__name__}, not text")
        yield text or ""
