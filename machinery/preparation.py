"""From a source to shards: what a process does that tokenizes, this one or one in the background.

A *task* says what to tokenize, as JSON values: the settings, the folders apart from the text, the tokens wanted.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import tiktoken
from filelock import FileLock, Timeout

from machinery.errors import DataError, told
from machinery.files import no_links, write_atomic
from machinery.held_out import is_held_out, spans_of_share
from machinery.screen import progress_bar
from machinery.shards import (
    UnevenSides,
    is_enough,
    load_tokenizer,
    new_manifest,
    read_manifest,
    text_digest,
    with_sides,
    write_shards,
)
from machinery.sources import SOURCES, Source, open_source, source_kind
from machinery.text_files import file_digest
from machinery.tokenizers import tokenizer_to_dict
from machinery.vocabularies import get_tokenizer, tokenizer_file

ADVICE = "check data_dir, its permissions and the disk"
SPANS = 4  # that are tried, each by tokenizing a shard, before the end of each document is held out
SAY_AFTER = 20  # seconds between two lines about a wait


def open_sources(task: dict) -> tuple[Source, Source | None]:
    """The source to train on, and the held-out one where it is named."""
    settings = task["settings"]
    options = (settings["text_column"], settings["split_on"], [Path(folder) for folder in task["apart"]])
    source = open_source(settings["source"], *options)
    if not settings["val_source"]:
        return source, None
    with told("val_source", DataError):
        val_source = open_source(settings["val_source"], *options)
    val_source.stamped = "validation"
    return source, val_source


def is_known(settings: dict) -> bool:
    """Whether another process knows these sources: a class that was added to `SOURCES` later stands in this one."""
    names = [name for name in (settings["source"], settings["val_source"]) if name]
    return all(SOURCES[source_kind(name)].__module__ == "machinery.sources" for name in names)


def tokenize(folder: Path, task: dict, progress: bool, source: Source, val_source: Source | None) -> None:
    """Tokenize what is still wanted of `task`, in this process."""
    # Two runs on the same text: the second waits, then goes on or has nothing to do
    with _alone_in(folder):
        manifest = read_manifest(folder)
        settings, learned = task["settings"], (folder / "tokenizer.json").exists()
        encoding = load_tokenizer(folder) if learned else None
        if encoding and is_enough(manifest, task["train_tokens"]):
            return
        is_touched = manifest and manifest["text"] and settings["text"] != source.stamp()  # since its first shard
        if is_touched and manifest["text"] != text_digest(source, val_source):
            raise DataError(
                f"source {source.name!r}: its files have changed since its tokenization began; put them back,"
                " or use a new run_name, which reads what they hold now"
            )
        with progress_bar(progress, desc="tokenizing", unit="B", unit_scale=True) as bar:
            read = sum(manifest["bytes"].values()) if manifest else 0

            def advance(size: int) -> None:
                nonlocal read
                read += size
                bar.update(size)
                if read >> 22 != (read - size) >> 22:  # every 4 MB
                    _note_bytes_read(folder, read)

            ways = [(manifest["held_out"], manifest["span"])] if manifest else _ways(settings, source, val_source)
            for way, span in ways:
                encoding = encoding or _make_tokenizer(folder, settings, source, way, span)
                manifest = manifest or new_manifest(settings, encoding, way, span)
                with contextlib.suppress(UnevenSides):
                    wanted = task["train_tokens"]
                    while not write_shards(folder, manifest, encoding, source, val_source, wanted, advance):
                        pass
                    break
                encoding, manifest, read = None, {}, 0  # the same text again
                bar.reset()


def _ways(settings: dict, source: Source, val_source: Source | None) -> Iterator[tuple[str, Sequence[float]]]:
    """How text can be held out, and the span of places of whole documents; the next where one leaves too little."""
    if val_source:
        yield "val_source", (0, 0)
        return
    fraction = settings["val_fraction"]
    yield "documents", (0, fraction)
    for span in islice(spans_of_share((text for text, _ in source.read()), fraction), SPANS):
        yield "ranked", span
    yield "tails", (0, 0)


def _note_bytes_read(folder: Path, size: int) -> None:
    """Leave word of how far the reading is, for a process that waits."""
    path = folder / ".bytes_read"
    with told(path, DataError, "cannot be written", ADVICE), open(path, "w", opener=no_links) as file:
        file.write(str(size))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder of shards; while another process does, say so, and now and then for how long."""
    lock, started = FileLock(folder / ".lock"), time.monotonic()
    while not lock.is_locked:
        waited = round(time.monotonic() - started)
        with told(folder / ".lock", DataError, "cannot be locked", ADVICE), contextlib.suppress(Timeout):
            if waited:
                print(f"waiting for another process that tokenizes this text, in {folder}: {waited} s", flush=True)
            lock.acquire(timeout=SAY_AFTER if waited else 1)
    try:
        yield
    finally:
        lock.release()


def _make_tokenizer(
    folder: Path, settings: dict, source: Source, held_out: str, span: Sequence[float]
) -> tiktoken.Encoding:
    """That of the settings, in the folder; one that is learned is learned from what will be trained on."""
    documents = with_sides(source, 0, held_out, settings["val_fraction"])
    training = (text for side, text, _ in documents if side == "train" or not (side or is_held_out(text, span)))
    encoding = get_tokenizer(settings["tokenizer"], settings["vocab_size"], training)
    write_atomic(folder / "tokenizer.json", json.dumps(tokenizer_to_dict(encoding)))
    return load_tokenizer(folder)


def tokenizer_digest(name: str) -> str:
    """Changes with the content of a tokenizer's folder; "" for a tokenizer that is none."""
    path = tokenizer_file(name)
    files = [path, path.with_name("tokenizer_config.json")] if path else []  # the second may name the end of text
    return ":".join(file_digest(file) for file in files if file.is_file())
