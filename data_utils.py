"""Shards and batches: text in, once, as token shards on disk; windows and batches out, in a known order.

    documents ─ tokenizer ─ shards ─ windows ─ batches

A *shard* is a flat little-endian array of token ids, an end-of-text token after each document. A *window*
is `block_size + 1` consecutive tokens of one shard: inputs, and the same shifted by one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch
from filelock import FileLock
from tqdm import tqdm

from text_utils import (
    DataError,
    Position,
    get_tokenizer,
    hub_split,
    iter_documents,
    read_documents,
    source_files,
    tokenizer_from_dict,
    tokenizer_hash,
    tokenizer_to_dict,
)

SHARD_TOKENS = 1 << 25  # a shard closes at the first document that ends beyond this: 67 MB of uint16
ENCODE_BYTES = 4 << 20  # text handed to the encoder threads at a time
BACKGROUND_BYTES = 256 << 20  # more text than this is tokenized by a process of its own, beside training
MANIFEST_VERSION = 1


# -------------------------------------------------------------------------------------------- preparing


def prepare_data(
    source: str,
    *,
    tokenizer: str,
    vocab_size: int,
    data_dir: str | Path = "data",
    val_source: str = "",
    val_fraction: float = 0.05,
    text_column: str = "text",
    train_tokens: int | None = None,
    progress: bool = True,
) -> TokenData:
    """Tokenize `source` into shards under `data_dir`, or use the shards already there.

    Held-out text is `val_source` where given, else the documents whose hash falls under `val_fraction`
    (equal texts fall on the same side); it is what the first train shard's stretch of text holds, so it
    never changes as more text is prepared. `train_tokens` stops early: a later call with more goes on
    after the last finished shard, as does one after an interruption.

    Text of the hub, or more than `BACKGROUND_BYTES` of it, is tokenized by a process of its own: this
    returns as soon as the first shards stand, and the rest arrives beside training. Raises `DataError`.
    """
    files = source_files(source)
    if val_source == source and (files is not None or hub_split(source, "validation") == "train"):
        raise DataError(f"val_source is the same text as source ({source!r}); leave it empty to hold documents out")
    settings = {
        "version": MANIFEST_VERSION,
        "source": source,
        "val_source": val_source,
        "val_fraction": val_fraction,
        "text_column": text_column,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "shard_tokens": SHARD_TOKENS,
        "files": None if files is None else _fingerprint(files),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{source}-{tokenizer}-{vocab_size}").strip("-")[-60:]
    data = TokenData(Path(data_dir) / f"{slug}-{key}", settings, train_tokens)
    data.folder.mkdir(parents=True, exist_ok=True)
    if not data.is_enough():
        if files is None or sum(path.stat().st_size for path in files) > BACKGROUND_BYTES:
            data.start_background()
            data.wait(progress=progress)
        else:
            data.encoding = _prepare(data.folder, settings, train_tokens, progress)
            return data
    data.encoding = _load_tokenizer(data.folder)
    return data


class TokenData:
    """A folder of shards with its manifest and tokenizer, complete or still growing."""

    encoding: tiktoken.Encoding

    def __init__(self, folder: Path, settings: dict, train_tokens: int | None) -> None:
        self.folder, self.settings, self.train_tokens = folder, settings, train_tokens

    @property
    def manifest(self) -> dict:
        """What is on disk now: settings, tokenizer, counts, the checksum of every shard; empty before there is any."""
        return read_manifest(self.folder)

    def is_enough(self) -> bool:
        """Whether the shards on disk are all there will be, or all that was asked for."""
        manifest = self.manifest
        wanted = self.train_tokens
        return bool(manifest) and (
            manifest["complete"] or (wanted is not None and manifest["tokens"]["train"] >= wanted)
        )

    def windows(self, split: str, block_size: int, seed: int | None = None) -> TokenWindows:
        """The windows of one split: shuffled by `seed`, or in text order without one."""
        return TokenWindows(self, split, block_size, seed)

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """The token ids of each document of one split, as far as it is on disk, without its end-of-text token."""
        windows = self.windows(split, 1)
        for shard in range(len(windows.shards)):
            ids, start = windows._tokens(shard), 0
            for end in np.flatnonzero(ids == self.encoding.eot_token):
                yield ids[start:end]
                start = end + 1

    def start_background(self) -> None:
        """Tokenize in another process, which ends with this one. One at a time is enough for a folder."""
        running = _background.get(self.folder)
        if running is None or running.poll() is not None:
            task = {"folder": str(self.folder), "settings": self.settings, "train_tokens": self.train_tokens}
            path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
            _background[self.folder] = subprocess.Popen(
                [sys.executable, "-c", "import data_utils; data_utils.work()", json.dumps(task)],
                env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=(self.folder / "work.log").open("w"),
                start_new_session=True,  # a Ctrl-C is for the process that trains
            )  # fmt: skip

    def wait(self, shards: int = 1, progress: bool = False) -> None:
        """Return when there are `shards` train shards, or no more to come. Raises what the other process raised."""
        with tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=not progress, file=sys.stdout) as bar:
            while True:
                manifest, running = self.manifest, _background.get(self.folder)
                if manifest and (manifest["complete"] or len(manifest["shards"]["train"]) >= shards):
                    return
                if running is None or running.poll() == 0:  # it was asked for less than is wanted now
                    self.train_tokens = self.train_tokens if not manifest else None
                    self.start_background()
                elif running.poll():
                    lines = (self.folder / "work.log").read_text("utf-8").strip().splitlines() or ["it was killed"]
                    raise DataError(f"tokenization stopped: {lines[-1].removeprefix('DataError: ')}")
                done = self.folder / ".bytes_read"
                bar.update((int(done.read_text() or 0) if done.exists() else 0) - bar.n)
                time.sleep(0.1)

    def stop(self) -> None:
        """End a tokenization that runs in the background; what it has finished stays."""
        if running := _background.pop(self.folder, None):
            running.kill()
            running.wait()


_background: dict[Path, subprocess.Popen] = {}  # tokenizations that this process has started


def work() -> None:
    """The body of a background tokenization. Ends when the process that started it is gone: its stdin closes then."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    task = json.loads(sys.argv[1])
    _prepare(Path(task["folder"]), task["settings"], task["train_tokens"], progress=False)


def _prepare(folder: Path, settings: dict, train_tokens: int | None, progress: bool) -> tiktoken.Encoding:
    with FileLock(folder / ".lock"):  # two runs on the same text: the second waits, then goes on or has nothing to do
        encoding = _make_tokenizer(folder, settings)
        manifest = read_manifest(folder)
        if manifest and manifest["tokenizer"]["sha256"] != tokenizer_hash(encoding):
            raise DataError(f"{folder}: shards and tokenizer.json do not belong together; remove the folder")
        manifest = manifest or _new_manifest(settings, encoding)
        if not manifest["complete"]:
            _write_shards(folder, manifest, encoding, train_tokens, progress)
    return encoding


def _fingerprint(files: list[Path]) -> str:
    """Changes when a file is added, removed, renamed or edited."""
    stats = [(path.as_posix(), stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _load_tokenizer(folder: Path) -> tiktoken.Encoding:
    path = folder / "tokenizer.json"
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable ({type(error).__name__}); remove the folder") from None
    return tokenizer_from_dict(fields)


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


def _make_tokenizer(folder: Path, settings: dict) -> tiktoken.Encoding:
    path = folder / "tokenizer.json"
    if not path.exists():
        held_out = 0.0 if settings["val_source"] else settings["val_fraction"]
        documents = iter_documents(settings["source"], settings["text_column"])
        training = (text for text in documents if not is_held_out(text, held_out))
        encoding = get_tokenizer(settings["tokenizer"], settings["vocab_size"], training)
        _write_atomic(path, json.dumps(tokenizer_to_dict(encoding)).encode())
    return _load_tokenizer(folder)


def _new_manifest(settings: dict, encoding: tiktoken.Encoding) -> dict:
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


def _write_shards(
    folder: Path, manifest: dict, encoding: tiktoken.Encoding, train_tokens: int | None, progress: bool
) -> None:
    """Read on from `manifest["position"]` and close shards until the source or `train_tokens` ends."""
    settings, read = manifest["settings"], sum(manifest["bytes"].values())
    writers = {split: _ShardWriter(folder, split, manifest) for split in ("train", "val")}
    val_is_open = not manifest["shards"]["val"]
    if settings["val_source"] and val_is_open:
        documents = read_documents(settings["val_source"], settings["text_column"], "validation")
        for _, text, ids, _ in _encode_all(encoding, (("val", *document) for document in documents)):
            writers["val"].add(len(text.encode()), ids)
            if writers["val"].size >= settings["shard_tokens"]:
                break
        writers["val"].close()
        val_is_open = False

    documents = read_documents(settings["source"], settings["text_column"], start=manifest["position"])
    assigned = _assign(documents, manifest["held_out"], settings["val_fraction"])
    position = manifest["position"]
    with tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=not progress, file=sys.stdout) as bar:
        for split, text, ids, position in _encode_all(encoding, assigned):
            size = len(text.encode())
            read += size
            bar.update(size)
            if read >> 22 != (read - size) >> 22:  # every 4 MB, for a process that waits
                (folder / ".bytes_read").write_text(str(read))
            if split == "train" or val_is_open:
                writers[split].add(size, ids)
            if writers["train"].size >= settings["shard_tokens"]:
                val_is_open = val_is_open and not writers["val"].size
                for writer in writers.values():
                    writer.close()
                manifest["position"] = position
                _save_manifest(folder, manifest)
                if train_tokens is not None and manifest["tokens"]["train"] >= train_tokens:
                    return
    for writer in writers.values():
        writer.close()
    if not (manifest["shards"]["train"] and manifest["shards"]["val"]):
        if manifest["held_out"] != "documents" or not manifest["shards"]["train"] + manifest["shards"]["val"]:
            raise DataError(f"source {settings['source']!r} holds no text to train on and validate with")
        retry = _new_manifest(settings, encoding) | {"held_out": "tails"}  # a handful of documents: hold out their ends
        return _write_shards(folder, retry, encoding, train_tokens, progress)
    manifest["position"] = position
    manifest["complete"] = True
    _save_manifest(folder, manifest)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation text: a function of its content alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _assign(
    documents: Iterable[tuple[str, Position]], held_out: str, fraction: float
) -> Iterator[tuple[str, str, Position]]:
    """Yield ("train" or "val", text, position) for every document, by one of the three ways to hold text out."""
    for text, position in documents:
        if held_out == "val_source":
            yield "train", text, position
        elif held_out == "documents":
            yield ("val" if is_held_out(text, fraction) else "train"), text, position
        else:  # "tails": the end of every document, from a line break on where there is one
            cut = len(text) - max(1, int(len(text) * fraction))
            cut = text.rfind("\n", 0, cut) + 1 or cut
            parts = [("val", text[cut:], position), ("train", text[:cut], position)]
            yield from (part for part in parts if part[1])


def _encode_all(
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


class _ShardWriter:
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
        _write_atomic(self.folder / name, content)
        shards.append({"name": name, "tokens": self.size, "sha256": hashlib.sha256(content).hexdigest()})
        for field in ("documents", "tokens", "bytes"):
            self.manifest[field][self.split] += getattr(self, "size" if field == "tokens" else field)
        self._clear()


def _save_manifest(folder: Path, manifest: dict) -> None:
    _write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def _write_atomic(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename: the file is complete or absent."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


# --------------------------------------------------------------------------------------------- batches


class TokenWindows:
    """Windows of `block_size + 1` tokens, each exactly once per epoch.

    Which window stands at a position is a function of (seed, epoch, position) alone, so a resumed run
    reads what the uninterrupted one would have. Windows never cross shards; the first epoch takes the
    shards as they were written, so it can begin while later ones are being made, and further epochs
    shuffle them too. Consecutive windows share one token, the last target of one and the first input of
    the next.
    """

    def __init__(self, data: TokenData, split: str, block_size: int, seed: int | None) -> None:
        self.data, self.split, self.block_size, self.seed = data, split, block_size, seed
        self._opened: dict[int, np.ndarray] = {}
        manifest = self._look()
        if self.counts.sum() < 1:
            raise DataError(
                f"{split} text has {manifest['tokens'][split]} tokens in {data.folder}, fewer than one window of"
                f" block_size + 1 = {block_size + 1}; add text, lower block_size, or raise val_fraction"
            )

    def _look(self) -> dict:
        """Take in the shards that the manifest names now."""
        manifest = self.data.manifest
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.n_vocab = manifest["tokenizer"]["n_vocab"]
        self.shards = manifest["shards"][self.split]
        self.complete = manifest["complete"] or self.split == "val"
        self.counts = np.array([(shard["tokens"] - 1) // self.block_size for shard in self.shards])
        return manifest

    def __len__(self) -> int:
        """Windows in an epoch, or so far."""
        return int(self.counts.sum())

    def read(self, position: int, count: int) -> np.ndarray:
        """(count, block_size + 1) int64: the windows at `position`, `position + 1`, … of the endless order."""
        while not self.complete and position + count > len(self):  # the first epoch, ahead of the tokenization
            self.data.wait(shards=len(self.shards) + 1)
            self._look()
        rows = np.empty((count, self.block_size + 1), dtype=np.int64)
        for row, at in zip(rows, range(position, position + count)):
            shard, index = self._locate(at)
            start = index * self.block_size
            row[:] = self._tokens(shard)[start : start + self.block_size + 1]
        return rows

    def _locate(self, position: int) -> tuple[int, int]:
        """Shard and window of a position in the endless order."""
        epoch, within = divmod(position, len(self))
        order, ends = self._shard_order(epoch)
        place = int(np.searchsorted(ends, within, side="right"))
        shard = int(order[place])
        index = within - int(ends[place] - self.counts[shard])
        return shard, index if self.seed is None else int(
            _permutation(self.counts[shard], self.seed, epoch, shard)[index]
        )

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in reading order, and the window count up to the end of each."""
        shuffled = self.seed is not None and epoch > 0
        order = _permutation(len(self.shards), self.seed, epoch) if shuffled else np.arange(len(self.shards))
        return order, np.cumsum(self.counts[order])

    def _tokens(self, shard: int) -> np.ndarray:
        """The shard as a memory map, verified against the manifest before its first token is used."""
        if shard not in self._opened:
            entry = self.shards[shard]
            path = self.data.folder / entry["name"]
            if not path.exists() or path.stat().st_size != entry["tokens"] * self.dtype.itemsize:
                found = f"{path.stat().st_size} bytes" if path.exists() else "nothing"
                raise DataError(
                    f"{path}: expected {entry['tokens'] * self.dtype.itemsize} bytes, found {found}; remove the folder"
                    " to tokenize again"
                )
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise DataError(
                        f"{path}: content does not match the manifest's checksum; remove the folder to tokenize again"
                    )
            tokens = np.memmap(path, dtype=self.dtype, mode="r")
            if tokens.max(initial=0) >= self.n_vocab:
                raise DataError(
                    f"{path}: holds token {tokens.max()}, but the tokenizer has {self.n_vocab}; remove the folder"
                )
            self._opened[shard] = tokens
        return self._opened[shard]


@lru_cache(maxsize=4)
def _permutation(size: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


class Batches:
    """Endless micro-batches from `position` on, already on `device`; process `rank` of `size` gets every size-th.

    On CUDA the copy leaves from pinned memory and is queued behind what still computes, while the next is read.
    """

    def __init__(
        self,
        windows: TokenWindows,
        micro_batch: int,
        device: torch.device,
        position: int = 0,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.windows, self.micro_batch, self.device = windows, micro_batch, device
        self.position, self.stride = position + rank * micro_batch, size * micro_batch

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, T) and targets (B, T), the same windows shifted by one."""
        rows = torch.from_numpy(self.windows.read(self.position, self.micro_batch))
        self.position += self.stride
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(self.device, non_blocking=True)
        return rows[:, :-1].clone(), rows[:, 1:].clone()  # strides as in evaluation: nothing is compiled twice
