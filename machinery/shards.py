"""Shards: flat little-endian arrays of token ids, an end-of-text token after each document, and their manifest."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from machinery.errors import DataError
from machinery.files import write_atomic
from machinery.sources import Position
from machinery.tokenizers import tokenizer_from_dict, tokenizer_hash

MANIFEST_VERSION = 1
ENCODE_BYTES = 4 << 20  # text handed to the encoder threads at a time


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder of shards, {} where there is none. Raises `DataError` for one that does not add up."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text("utf-8"))
        for split in ("train", "val"):
            shards = manifest["shards"][split]
            for number, shard in enumerate(shards):
                if shard["name"] != f"{split}_{number:06d}.bin" or not re.fullmatch("[0-9a-f]{64}", shard["sha256"]):
                    raise ValueError(f"entry {number} of {split} is not a shard")
                if type(shard["tokens"]) is not int or shard["tokens"] < 0:
                    raise ValueError(f"{shard['name']} cannot have {shard['tokens']!r} tokens")
            if sum(shard["tokens"] for shard in shards) != manifest["tokens"][split]:
                raise ValueError(f"the tokens of {split} do not add up")
        counts = [manifest[field][split] for field in ("tokens", "documents", "bytes") for split in ("train", "val")]
        vocabulary = [manifest["tokenizer"][field] for field in ("n_vocab", "end_of_text")]
        if not all(type(number) is int and number >= 0 for number in counts + vocabulary):
            raise ValueError("a count is not a number")
        wide_enough = manifest["tokenizer"]["n_vocab"] <= 1 << (8 * np.dtype(manifest["dtype"]).itemsize)
        if manifest["dtype"] not in ("uint16", "uint32") or not wide_enough:
            raise ValueError(f"dtype {manifest['dtype']!r} does not hold the vocabulary")
        if type(manifest["complete"]) is not bool or not isinstance(manifest["position"], int | dict):
            raise ValueError("it does not say how far it got")
        if manifest["held_out"] not in ("documents", "tails", "val_source") or not isinstance(
            manifest["settings"], dict
        ):
            raise ValueError("it does not say how text was held out")
        str(manifest["tokenizer"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a usable manifest ({reason}); remove the folder to tokenize again") from None
    return manifest


def new_manifest(settings: dict, encoding: tiktoken.Encoding) -> dict:
    zero = {"train": 0, "val": 0}
    return {
        "settings": settings,
        "tokenizer": {
            "name": encoding.name,
            "sha256": tokenizer_hash(encoding),
            "n_vocab": encoding.n_vocab,
            "end_of_text": encoding.eot_token,
        },
        "dtype": "uint16" if encoding.n_vocab <= 1 << 16 else "uint32",
        "documents": dict(zero),
        "tokens": dict(zero),
        "bytes": dict(zero),
        "shards": {"train": [], "val": []},
        "held_out": "val_source" if settings["val_source"] else "documents",
        "position": 0,  # in the source, after the last closed shard: where an interrupted preparation goes on
        "complete": False,
    }


def save_manifest(folder: Path, manifest: dict) -> None:
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def load_tokenizer(folder: Path) -> tiktoken.Encoding:
    path = folder / "tokenizer.json"
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable ({type(error).__name__}); remove the folder") from None
    return tokenizer_from_dict(fields)


def encode_all(
    encoding: tiktoken.Encoding, assigned: Iterable[tuple[str, str, Position]]
) -> Iterator[tuple[str, str, np.ndarray, Position]]:
    """Yield (split, text, ids, position) in order. Threads encode a batch, outside Python's lock, while one is read.

    Each thread has an encoder of its own: of a shared one, only the thread that used it first is spared its lock.
    """
    own = threading.local()

    def start() -> None:
        own.encoding = copy.copy(encoding)

    def encode(document: tuple[str, str, Position]) -> tuple[str, str, np.ndarray, Position]:
        split, text, position = document
        try:
            return split, text, own.encoding.encode_to_numpy(text, disallowed_special=()), position
        except UnicodeEncodeError as error:
            raise DataError(f"a document holds half of a surrogate pair at character {error.start}: not text") from None

    with ThreadPoolExecutor(os.cpu_count(), initializer=start) as pool:
        ahead: Iterable = ()
        batch, size = [], 0
        for document in assigned:
            batch.append(document)
            size += len(document[1])
            if size >= ENCODE_BYTES:
                encoded = pool.map(encode, batch)
                yield from ahead
                ahead, batch, size = encoded, [], 0
        encoded = pool.map(encode, batch)
        yield from ahead
        yield from encoded


class ShardWriter:
    """Collects the documents of one split and writes them as shards, recorded in the manifest."""

    def __init__(self, folder: Path, split: str, manifest: dict) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.end_of_text = np.array([manifest["tokenizer"]["end_of_text"]])
        self._clear()

    def _clear(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.documents = self.size = self.bytes = 0

    def add(self, text_bytes: int, ids: np.ndarray) -> None:
        self.arrays += [ids.astype(self.dtype), self.end_of_text.astype(self.dtype)]
        self.documents += 1
        self.size += len(ids) + 1
        self.bytes += text_bytes

    def close(self) -> None:
        if not self.arrays:
            return
        content = np.concatenate(self.arrays).tobytes()
        shards = self.manifest["shards"][self.split]
        name = f"{self.split}_{len(shards):06d}.bin"
        write_atomic(self.folder / name, content)
        shards.append({"name": name, "tokens": self.size, "sha256": hashlib.sha256(content).hexdigest()})
        for field in ("documents", "tokens", "bytes"):
            self.manifest[field][self.split] += getattr(self, "size" if field == "tokens" else field)
        self._clear()
