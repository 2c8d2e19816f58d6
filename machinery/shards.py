"""Shards: flat little-endian arrays of token ids, an end-of-text token after each document, and their manifest."""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import tiktoken

from machinery.encoding import Encoded, encode_all
from machinery.errors import DataError, told
from machinery.files import json_digest, regular_file, write_atomic, write_json
from machinery.held_out import (
    FEW_HOLDERS,
    PIECE,
    HeldOutLines,
    as_picked,
    common_lines,
    cut_tail,
    falls_within,
    look_at,
    makes_copy,
    without_common,
)
from machinery.sources import BLANK_TEXTS, EMPTY_ROWS, NOT_UTF8, Position, Source, named
from machinery.text_files import in_parts
from machinery.tokenizers import tokenizer_from_dict, tokenizer_hash

MANIFEST_VERSION = 25  # part of the settings: shards of an earlier way are not mistaken for those of this one
FEW_BYTES = 10_000  # of held-out text, about 3,000 tokens
FEWEST, MOST = 0.25, 2.0  # of the wanted held-out text: with less or more, it is chosen otherwise
LEAST_END = 64  # bytes of an end that says something
MANY_HOLDERS = 16  # training documents with a shingle that tells no copy of a short text
PASSAGES, RARE = 4, 0.04  # training documents, and share of them, that hold a stretch of which they are passages


# ------------------------------------------------------------------------------------------- manifest


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder of shards, {} where there is none. Raises `DataError` unless it is as it was written."""
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        return {}
    with told(path, DataError, "not usable", "check its permissions, or remove the folder to tokenize again"):
        manifest = json.loads(regular_file(path).read_bytes())
        if manifest.pop("digest") != json_digest(manifest):
            raise ValueError("it is damaged, or was changed by hand")
    return manifest


def new_manifest(settings: dict, encoding: tiktoken.Encoding, held_out: str, span: Sequence[float]) -> dict:
    """The manifest of a folder without shards; `held_out` is "val_source", "documents", "ranked" ones, or the "tails"
    of documents; `span` the places of whole ones that are (`falls_within`).
    """
    return {
        "settings": settings,
        "text": "",  # a digest of all that will be read, where it is more than the first shards hold
        "tokenizer": {
            "name": encoding.name,
            "sha256": tokenizer_hash(encoding),
            "n_vocab": encoding.n_vocab,
            "end_of_text": encoding.eot_token,
        },
        "dtype": "uint16" if encoding.n_vocab <= 1 << 16 else "uint32",
        **{counted: {"train": 0, "val": 0} for counted in ("documents", "tokens", "bytes")},
        "shards": {"train": [], "val": []},
        "held_out": held_out,
        "span": span,
        "grouped": 0,  # held-out documents beside a near-copy of theirs, held out too
        "repeated": False,  # whether held-out text could not be kept out of the training text: it repeats itself
        "set_aside": {"documents": 0, "bytes": 0},  # in neither split, for a near-copy in the other
        "end_of_text_spelt": {},  # spellings of it in the texts, and how often: text like any other
        "is_split": False,  # whether split_on was found
        "val_source_cut": False,  # whether val_source holds more than a shard, of which the rest is not read
        "passed_over": {},  # beside the text: kinds of files and rows, and how many
        "common": [],  # shingles that many documents of the first shard hold, so that they tell no copy of a short text
        "trained_lines": "",  # of the held-out ones: which stand in the training text so far (`HeldOutLines`)
        "position": 0,  # in the source, after the last closed shard: where an interrupted preparation goes on
        "complete": False,
    }


def is_enough(manifest: dict, train_tokens: int | None) -> bool:
    """Whether the shards on disk are all there will be, or all that was asked for; without a manifest they are not."""
    asked = math.inf if train_tokens is None else train_tokens
    return bool(manifest) and (manifest["complete"] or manifest["tokens"]["train"] >= asked)


def report(manifest: dict) -> list[str]:
    """Lines that tell a user how text was held out, and what to know about it."""
    documents, size, apart, settings = (manifest[name] for name in ("documents", "bytes", "set_aside", "settings"))
    ways = {
        "documents": "whole documents, by their content",
        "ranked": "whole documents, as many as come nearest to val_fraction",
        "tails": "the end of each document, since there are few, or they are much alike",
        "val_source": "val_source",
    }
    fraction = 0.0 if manifest["held_out"] == "val_source" else settings["val_fraction"]
    lines = [
        f"held out: {documents['val']:,} document{'' if documents['val'] == 1 else 's'}, {size['val'] / 1e6:,.2f} MB,"
        f" {size['val'] / sum(size.values()):.2%} of what was read ({ways[manifest['held_out']]});"
        f" near-copies of one another among them: {manifest['grouped']:,};"
        f" set aside for a near-copy in the other split: {apart['documents']:,}, {apart['bytes'] / 1e6:,.2f} MB"
    ]
    if manifest["repeated"]:
        lines.append(
            "half of its lines or more stand in the training text too, since the texts repeat each other: its loss says"
            " how well they are remembered; for another, name a val_source"
        )
    if manifest["val_source_cut"]:
        lines.append("val_source holds more than that: it is read until its tokens fill a shard")
    if len(manifest["shards"]["train"]) == 1 and size["val"] < FEWEST * fraction * sum(size.values()):
        lines.append(
            f"val_fraction asks for {fraction:.2%}, but the texts repeat each other, and more would leave copies in the"
            " training text; for a loss that says more, name a val_source"
        )
    elif size["val"] < FEW_BYTES:
        advice = "raise val_fraction or set val_source" if fraction else "name more in val_source"
        lines.append(f"{size['val']:,} bytes are held out; a loss on so few says little: {advice}")
    elif manifest["held_out"] == "tails" and (end := size["val"] / documents["val"]) < LEAST_END:
        lines.append(f"these ends have {end:.0f} bytes, and say little: raise val_fraction or set val_source")
    if not manifest["complete"]:
        lines.append(
            "more text is read later: a document is set aside with which the training text would hold half of the lines"
            " of a held-out one"
        )
    for kind in (NOT_UTF8, EMPTY_ROWS, BLANK_TEXTS):
        if count := manifest["passed_over"].get(kind):
            so_far = "" if manifest["complete"] else " so far"
            lines.append(f"passed over in source {settings['source']!r}: {kind} ({count:,}{so_far})")
    if (spelt := manifest["end_of_text_spelt"]) and settings["source"] not in named():  # of text that others wrote
        often = [f"{spelling!r} stands {'once' if n == 1 else f'{n:,} times'}" for spelling, n in spelt.items()]
        lines.append(
            f"{', '.join(often)} in the texts, as text like any other; if it separates documents, set"
            f" split_on={max(spelt, key=spelt.get)!r}"
        )
    tokens, vocab_size = manifest["tokenizer"]["n_vocab"], settings["vocab_size"]
    if (enough := -(-tokens // 64) * 64) < vocab_size:
        lines.append(
            f"vocab_size is {vocab_size:,} but the tokenizer has {tokens:,} tokens: the rest costs time and memory and"
            f" is never used; set vocab_size to {enough:,}"
        )
    if (split_on := settings["split_on"]) and not manifest["is_split"]:
        hint = r"; a line end is written as such, in double quotes in YAML" if r"\n" in split_on else ""
        lines.append(f"split_on {split_on!r} stands nowhere in the texts; they are documents as they are{hint}")
    return lines


def load_tokenizer(folder: Path) -> tiktoken.Encoding:
    """The tokenizer of a folder of shards. Raises `DataError` where it is not the one that the manifest names."""
    path, manifest, advice = folder / "tokenizer.json", read_manifest(folder), "remove the folder to tokenize again"
    with told(path, DataError, "not readable", advice):
        encoding = tokenizer_from_dict(json.loads(regular_file(path).read_bytes()), path, advice)
    if manifest and manifest["tokenizer"]["sha256"] != tokenizer_hash(encoding):
        raise DataError(f"{folder}: shards and tokenizer.json do not belong together; remove the folder")
    return encoding


# ------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Collects the documents of one split and writes them as shards, recorded in the manifest."""

    def __init__(self, folder: Path, split: str, manifest: dict) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.end_of_text = np.array([manifest["tokenizer"]["end_of_text"]], self.dtype).tobytes()
        self._clear()

    def _clear(self) -> None:
        self.content = bytearray()  # a million documents are no more than their tokens
        self.documents = self.bytes = 0

    @property
    def tokens(self) -> int:
        return len(self.content) // self.dtype.itemsize

    def add(self, document: Encoded) -> None:
        while document.ids:  # freed one by one: a document may be large
            self.content += document.ids.pop(0).data
        self.content += self.end_of_text
        self.documents += 1
        self.bytes += document.bytes
        for spelling in document.ends_of_text:
            spelt = self.manifest["end_of_text_spelt"]
            spelt[spelling] = spelt.get(spelling, 0) + 1

    def close(self) -> None:
        if not self.documents:
            return
        shards = self.manifest["shards"][self.split]
        name = f"{self.split}_{len(shards):06d}.bin"
        write_atomic(self.folder / name, self.content)
        shards.append({"name": name, "tokens": self.tokens, "sha256": hashlib.sha256(self.content).hexdigest()})
        for field in ("documents", "tokens", "bytes"):
            self.manifest[field][self.split] += getattr(self, field)
        self._clear()


class Collected:
    """Documents in flat arrays: a million small ones take little more than their tokens."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype, self.ids, self.lines, self.ends_of_text = dtype, bytearray(), array("q"), {}
        self.counts = array("q")  # of each: bytes of its ids, its lines, its own bytes

    def add(self, document: Encoded) -> None:
        size = len(self.ids)
        while document.ids:  # freed one by one: a document may be large
            self.ids += document.ids.pop(0).data
        self.lines.extend(document.lines)
        if document.ends_of_text:
            self.ends_of_text[len(self)] = document.ends_of_text
        self.counts.extend((len(self.ids) - size, len(document.lines), document.bytes))

    def __len__(self) -> int:
        return len(self.counts) // 3

    @property
    def tokens(self) -> int:
        """All ids, and an end of text for each document."""
        return len(self.ids) // self.dtype.itemsize + len(self)

    def __iter__(self) -> Iterator[Encoded]:
        """Yield them as they were, but for the smallest line, which is no longer asked for."""
        at = line = 0
        for number, (size, lines, length) in enumerate(zip(*(self.counts[i::3] for i in range(3)))):
            ids = np.frombuffer(self.ids, self.dtype, size // self.dtype.itemsize, at)
            own, ends = self.lines[line : line + lines], self.ends_of_text.get(number, [])
            yield Encoded("val", 0, [ids], length, own, b"", ends)
            at, line = at + size, line + lines

    def repeated(self) -> set[int]:
        """The hashes that stand in them more than once."""
        hashes, counts = np.unique(np.frombuffer(self.lines, np.int64), return_counts=True)
        return set(hashes[counts > 1].tolist())

    def copied(self, training: array, ends: array) -> tuple[set[int], set[int]]:
        """The numbers of those that are copied in the training text, whose hashes and ends of documents are given; in
        several documents together, too, by those shingles that few of them hold. And the shingles that many hold.
        """
        held_out, own, others = HeldOutLines(), np.frombuffer(self.lines, np.int64), np.frombuffer(training, np.int64)
        known = np.zeros(1 << 24, bool)  # by a part of each hash: of most others it says at once that they are none
        known[own >> 39] = True
        places = np.flatnonzero(known[others >> 39])
        numbers, hashes = np.searchsorted(ends, places, side="right").tolist(), others[places].tolist()

        def training_documents() -> Iterator[set[int]]:
            for _, some in groupby(zip(numbers, hashes), itemgetter(0)):
                yield {each for _, each in some}

        holders = Counter(each for some in training_documents() for each in some if each < 0)
        met = set(hashes).intersection(self.lines)
        common = {each for each in met if holders[each] > MANY_HOLDERS}
        added = [held_out.add(without_common(document.lines, common), met) for document in self]
        for some in training_documents():
            held_out.train(some, always=True)
        copied = {number for number, first in enumerate(added) if first in held_out.copied}
        rare = {each for each, count in holders.items() if count <= min(PASSAGES, RARE * len(ends))}
        for number, document in enumerate(self):
            shingles = as_picked({each for each in document.lines if each < 0})[-1]
            if makes_copy(len(rare.intersection(shingles)), len(shingles)):
                copied.add(number)
        return copied, common


class UnevenSides(Exception):
    """The sides of whole documents leave too little to validate with, or to train on: they are few, or much alike."""


class HeldOut:
    """The held-out documents: collected until the first train shard is full, then fixed, checked and written. All text
    after that is trained on.

    Those that have a near-copy in the training text until then are set aside; later, training text that is a near-copy
    of one of them is. Both take one pass, and memory for one shard.
    """

    def __init__(self, folder: Path, manifest: dict, encoding: tiktoken.Encoding) -> None:
        self.manifest, self.writer = manifest, ShardWriter(folder, "val", manifest)
        self.documents = Collected(self.writer.dtype)
        self.lines, self.training, self.ends = HeldOutLines(), array("q"), array("q")
        self.is_open, common = not manifest["shards"]["val"], {*manifest["common"]}
        self.lines.common = common
        for shard in manifest["shards"]["val"]:
            path = folder / shard["name"]
            with told(path, DataError, "cannot be read", "remove the folder to tokenize again"):
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != shard["sha256"]:
                    raise ValueError("content does not match the manifest's checksum")
            for document in split_documents(np.frombuffer(content, self.writer.dtype), encoding.eot_token):
                text, lines = encoding.decode_bytes(document.tolist()).decode(), array("q")
                for piece in in_parts(text, PIECE):
                    lines.extend(look_at([piece])[0][1])
                self.lines.add(without_common(lines, common))
        self.lines.trained = manifest["trained_lines"]

    def takes_apart(self, document: Encoded) -> bool:
        """Whether a training document is set aside, as a near-copy of a held-out one. While the first shard fills, none
        is: its lines are kept for `close`.
        """
        if self.is_open:
            self.training.extend(document.lines)
            self.ends.append(len(self.training))
            return False
        if self.lines.train(document.lines):
            return False
        self._set_aside(document)
        return True

    def _set_aside(self, document: Encoded) -> None:
        self.manifest["set_aside"]["documents"] += 1
        self.manifest["set_aside"]["bytes"] += document.bytes

    def close(self, training_bytes: int) -> None:
        """Write what is held out. Raises `UnevenSides`, or `DataError` where no other way is left."""
        settings, way, self.is_open = self.manifest["settings"], self.manifest["held_out"], False
        copied, common = self.documents.copied(self.training, self.ends)
        if way == "tails" and len(copied) == len(self.documents):  # a text that repeats itself
            copied, self.manifest["repeated"] = set(), True
        sizes = self.documents.counts[2::3]
        whole, left = sum(sizes), sum(size for number, size in enumerate(sizes) if number not in copied)
        share, fraction = left / max(1, training_bytes + whole), settings["val_fraction"]
        if way == "documents" and not FEWEST * fraction <= share <= min(MOST * fraction, (1 + fraction) / 2):
            raise UnevenSides
        end = fraction * (training_bytes + whole) / (len(self.ends) + len(self.documents))  # bytes of each
        if way == "ranked" and (not left or share < FEWEST * fraction and end >= LEAST_END):
            raise UnevenSides
        if way == "val_source" and left < whole / 2:
            raise DataError(
                f"val_source {settings['val_source']!r}: {len(copied)} of its {len(self.documents)}"
                f" documents stand in source {settings['source']!r} too, whole or half of their lines; name other text,"
                " or leave val_source empty"
            )
        within, repeated, holders = HeldOutLines(), self.documents.repeated(), Counter()
        for number, document in enumerate(self.documents):
            if number in copied:
                self._set_aside(document)
                continue
            lines = without_common(document.lines, common)
            some = {each for each in repeated.intersection(lines) if holders[each] < FEW_HOLDERS}
            if within.copies(some)[0]:  # of a text in many copies, the first is enough to know the others by
                self.manifest["grouped"] += 1
            else:
                within.add(lines, some)
                holders.update(some)
            self.writer.add(document)
            if not self.manifest["complete"]:  # more text is to come
                self.lines.add(lines)
        if not self.manifest["complete"]:
            self.manifest["common"], self.lines.common = sorted(common), common
            training = np.frombuffer(self.training, np.int64)
            self.lines.train(training[training >= 0].tolist(), always=True)
        self.training = self.ends = array("q")
        self.writer.close()
        self.documents = Collected(self.writer.dtype)


def split_documents(ids: np.ndarray, end_of_text: int) -> Iterator[np.ndarray]:
    """The documents of a shard, without the token that ends each."""
    start = 0
    for end in np.flatnonzero(ids == end_of_text):
        yield ids[start:end]
        start = end + 1


def write_shards(
    folder: Path,
    manifest: dict,
    encoding: tiktoken.Encoding,
    source: Source,
    val_source: Source | None,
    train_tokens: int | None,
    advance: Callable[[int], object],
) -> bool:
    """Read on from `manifest["position"]` and close shards until the source or `train_tokens` ends.

    Calls `advance` with the bytes of every document. Returns whether that is all: where ends are held out, what follows
    the first shards is read on without a cut. Raises `DataError`, or `UnevenSides` before anything is written.
    """
    settings = manifest["settings"]
    train, held_out = ShardWriter(folder, "train", manifest), HeldOut(folder, manifest, encoding)
    source.passed_over |= Counter(manifest["passed_over"])  # of a stream that goes on, what came before
    manifest["passed_over"] = source.passed_over
    if val_source and held_out.is_open:
        documents = (("val", *document) for document in val_source.read("validation"))
        for document in encode_all(encoding, documents, train.dtype):
            if held_out.documents.tokens >= settings["shard_tokens"]:
                manifest["val_source_cut"] = True
                break
            held_out.documents.add(document)
            manifest["is_split"] |= val_source.is_split
    position = manifest["position"]
    documents = with_sides(source, position, manifest["held_out"], settings["val_fraction"])
    for document in encode_all(encoding, documents, train.dtype):
        position = document.position
        manifest["is_split"] |= source.is_split
        advance(document.bytes)
        chosen = document.side == "val" or not document.side and falls_within(document.smallest, manifest["span"])
        if held_out.is_open and chosen:
            held_out.documents.add(document)
            continue
        if held_out.takes_apart(document):
            continue
        train.add(document)
        whole = document.side != "val"  # and no tail, whose head is still to come
        if whole and max(train.tokens, held_out.documents.tokens) >= settings["shard_tokens"]:
            is_first = held_out.is_open
            if is_first:
                manifest["text"] = text_digest(source, val_source)
            _close(folder, manifest, train, held_out, position)
            if is_enough(manifest, train_tokens):
                return True
            if is_first and manifest["held_out"] == "tails":
                return False
    manifest["complete"] = True
    _close(folder, manifest, train, held_out, position)
    return True


def text_digest(source: Source, val_source: Source | None) -> str:
    """Changes when text has changed that is read, and only then."""
    return ":".join(text.digest() for text in (source, val_source) if text)


def _close(folder: Path, manifest: dict, train: ShardWriter, held_out: HeldOut, position: Position) -> None:
    if held_out.is_open:
        settings = manifest["settings"]
        if not (train.documents or len(held_out.documents)):
            rows = manifest["passed_over"].get(EMPTY_ROWS)
            found = f": none of {rows:,} rows has any in column {settings['text_column']!r}" if rows else ""
            raise DataError(f"source {settings['source']!r} holds no text to train on and validate with{found}")
        if not train.documents and manifest["held_out"] in ("documents", "ranked"):
            raise UnevenSides
        held_out.close(train.bytes)
    train.close()
    if not (manifest["shards"]["train"] and manifest["shards"]["val"]):
        named = manifest["held_out"] == "val_source" and not manifest["shards"]["val"]
        empty = "val_source" if named else "source"
        documents, size = (sum(manifest[name].values()) for name in ("documents", "bytes"))
        problem = (
            "holds no text; name other text"
            if manifest["settings"]["val_source"]
            else f"has too little text, {size:,} bytes in {documents:,} documents: both splits need some; add text"
        )
        raise DataError(f"{empty} {manifest['settings'][empty]!r} {problem}")
    manifest |= {"position": position, "trained_lines": "" if manifest["complete"] else held_out.lines.trained}
    write_json(folder / "manifest.json", manifest | {"digest": json_digest(manifest)})


def with_sides(source: Source, start: Position, held_out: str, fraction: float) -> Iterator[tuple[str, str, Position]]:
    """(side, text, position) of every document; the side is "" where the lines of the document decide.

    Tails are cut off where reading begins; later documents, of which nothing is held out, are whole.
    """
    is_cut = held_out == "tails" and not start
    common = common_lines(text for text, _ in source.read()) if is_cut else ()
    for text, position in source.read("train", start):
        if not is_cut:
            yield ("" if held_out in ("documents", "ranked") else "train"), text, position
        else:
            head, tail = cut_tail(text, fraction, common)
            yield "val", tail, position
            if head:
                yield "train", head, position
