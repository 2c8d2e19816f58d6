"""Shards and batches: text in, once, as token shards on disk; windows and batches out, in a known order.

    documents ─ tokenizer ─ shards ─ windows ─ batches

A *shard* is a flat little-endian array of token ids, an end-of-text token after each document. A *window*
is `block_size + 1` consecutive tokens of one shard: inputs, and the same shifted by one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch
from filelock import FileLock
from tqdm import tqdm

from machinery.errors import DataError, UserError
from machinery.files import write_atomic
from machinery.machine import Machine, is_out_of_memory
from machinery.shards import (
    MANIFEST_VERSION,
    ShardWriter,
    encode_all,
    load_tokenizer,
    new_manifest,
    read_manifest,
    save_manifest,
)
from machinery.sources import Position, hub_split, iter_documents, read_documents, source_files
from machinery.tokenizers import (
    END_OF_TEXT,
    SPLIT_PATTERN,
    token_byte_counts,
    tokenizer_hash,
    tokenizer_to_dict,
)

SHARD_TOKENS = 1 << 25  # a shard closes at the first document that ends beyond this: 67 MB of uint16
BACKGROUND_BYTES = 256 << 20  # more text than this is tokenized by a process of its own, beside training


# -------------------------------------------------------------------------------------------- preparing


def prepare_data(config, progress: bool = True) -> TokenData:
    """Tokenize `source` into shards under `data_dir`, or use the shards already there.

    Held-out text is `val_source` where given, else the documents whose hash falls under `val_fraction`
    (equal texts fall on the same side); it is what the first train shard's stretch of text holds, so it
    never changes as more text is prepared. A budget in steps or tokens stops early: a later call with a larger one
    goes on after the last finished shard, as does one after an interruption.

    Text of the hub, or more than `BACKGROUND_BYTES` of it, is tokenized by a process of its own: this
    returns as soon as the first shards stand, and the rest arrives beside training. Raises `DataError`.
    """
    source, val_source, tokenizer, vocab_size = config.source, config.val_source, config.tokenizer, config.vocab_size
    train_tokens, files = tokens_needed(config), source_files(source)
    if val_source == source and (files is not None or hub_split(source, "validation") == "train"):
        raise DataError(f"val_source is the same text as source ({source!r}); leave it empty to hold documents out")
    settings = {
        "version": MANIFEST_VERSION,
        "source": source,
        "val_source": val_source,
        "val_fraction": config.val_fraction,
        "text_column": config.text_column,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "shard_tokens": SHARD_TOKENS,
        "files": None if files is None else _fingerprint(files),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{source}-{tokenizer}-{vocab_size}").strip("-")[-60:]
    data = TokenData(Path(config.data_dir).expanduser() / f"{slug}-{key}", settings, train_tokens, config.block_size)
    data.folder.mkdir(parents=True, exist_ok=True)
    if not data.is_enough():
        if files is None or sum(path.stat().st_size for path in files) > BACKGROUND_BYTES:
            data.start_background()
            data.wait(progress=progress)
        else:
            data.encoding = _prepare(data.folder, settings, train_tokens, progress)
            return data
    data.encoding = load_tokenizer(data.folder)
    return data


def tokens_needed(config) -> int | None:
    """Upper bound on the tokens that a run reads; None when only the clock limits it."""
    limits = [config.max_steps * config.batch_tokens, config.max_tokens and config.max_tokens + config.batch_tokens]
    return min((limit for limit in limits if limit), default=None)


class TokenData:
    """A folder of shards with its manifest and tokenizer, complete or still growing."""

    encoding: tiktoken.Encoding

    def __init__(self, folder: Path, settings: dict, train_tokens: int | None, block_size: int) -> None:
        self.folder, self.settings, self.train_tokens, self.block_size = folder, settings, train_tokens, block_size
        self._byte_counts: torch.Tensor | None = None

    @property
    def key(self) -> str:
        """Names the text: a run goes on with no other."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

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

    def held_out(self, tokens: int, micro_batch: int, machine: Machine) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets (B, T) of about `tokens` held-out tokens, windows spread evenly, on the device.

        Each process gets as many batches as the others; rows that only fill up have targets of -100.
        """
        windows = self.windows("val", self.block_size)
        count = max(1, min(len(windows), tokens // self.block_size))
        chosen = np.linspace(0, len(windows), count, endpoint=False).astype(int)
        for start in range(0, count, machine.processes * micro_batch):
            first = start + machine.rank * micro_batch  # of this process
            part = chosen[first : first + micro_batch]
            rows = torch.zeros(micro_batch, self.block_size + 1, dtype=torch.long)  # one shape for the compiled model
            for row, i in zip(rows, part):
                row[:] = torch.from_numpy(windows.read(int(i), 1)[0])
            inputs, targets = _inputs_and_targets(rows, machine.device)
            targets[len(part) :] = -100
            yield inputs, targets

    def bytes_of(self, targets: torch.Tensor) -> int:
        """UTF-8 bytes of the text that targets stand for; an end-of-text token has none."""
        if self._byte_counts is None:
            self._byte_counts = token_byte_counts(self.encoding, self.encoding.n_vocab)
        return int(self._byte_counts[targets[targets >= 0].cpu()].sum())

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
        manifest = manifest or new_manifest(settings, encoding)
        if not manifest["complete"]:
            _write_shards(folder, manifest, encoding, train_tokens, progress)
    return encoding


def _fingerprint(files: list[Path]) -> str:
    """Changes when a file is added, removed, renamed or edited."""
    stats = [(path.as_posix(), stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _make_tokenizer(folder: Path, settings: dict) -> tiktoken.Encoding:
    path = folder / "tokenizer.json"
    if not path.exists():
        held_out = 0.0 if settings["val_source"] else settings["val_fraction"]
        documents = iter_documents(settings["source"], settings["text_column"])
        training = (text for text in documents if not is_held_out(text, held_out))
        encoding = get_tokenizer(settings["tokenizer"], settings["vocab_size"], training)
        write_atomic(path, json.dumps(tokenizer_to_dict(encoding)).encode())
    return load_tokenizer(folder)


def _write_shards(
    folder: Path, manifest: dict, encoding: tiktoken.Encoding, train_tokens: int | None, progress: bool
) -> None:
    """Read on from `manifest["position"]` and close shards until the source or `train_tokens` ends."""
    settings, read = manifest["settings"], sum(manifest["bytes"].values())
    writers = {split: ShardWriter(folder, split, manifest) for split in ("train", "val")}
    val_is_open = not manifest["shards"]["val"]
    if settings["val_source"] and val_is_open:
        documents = read_documents(settings["val_source"], settings["text_column"], "validation")
        for _, text, ids, _ in encode_all(encoding, (("val", *document) for document in documents)):
            writers["val"].add(len(text.encode()), ids)
            if writers["val"].size >= settings["shard_tokens"]:
                break
        writers["val"].close()
        val_is_open = False

    documents = read_documents(settings["source"], settings["text_column"], start=manifest["position"])
    assigned = _assign(documents, manifest["held_out"], settings["val_fraction"])
    position = manifest["position"]
    with tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=not progress, file=sys.stdout) as bar:
        for split, text, ids, position in encode_all(encoding, assigned):
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
                save_manifest(folder, manifest)
                if train_tokens is not None and manifest["tokens"]["train"] >= train_tokens:
                    return
    for writer in writers.values():
        writer.close()
    if not (manifest["shards"]["train"] and manifest["shards"]["val"]):
        if manifest["held_out"] != "documents" or not manifest["shards"]["train"] + manifest["shards"]["val"]:
            raise DataError(f"source {settings['source']!r} holds no text to train on and validate with")
        retry = new_manifest(settings, encoding) | {"held_out": "tails"}  # a handful of documents: hold out their ends
        return _write_shards(folder, retry, encoding, train_tokens, progress)
    manifest["position"] = position
    manifest["complete"] = True
    save_manifest(folder, manifest)


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
    """Micro-batches of the training text from where a run is, on its device; each process reads its own share.

    `at.tokens` says where the run is, `at.micro_batch` how many sequences are read at a time. On CUDA the copy leaves
    from pinned memory and is queued behind what still computes, while the next is read.
    """

    def __init__(self, data: TokenData, config, machine: Machine, at) -> None:
        self.windows = data.windows("train", config.block_size, config.seed)
        self.machine, self.at, self.sequences = machine, at, config.batch_tokens // config.block_size
        self.use_micro_batch(at.micro_batch)

    def use_micro_batch(self, size: int) -> None:
        """Go on with so many sequences at a time, or the smaller number that all processes can take."""
        processes = self.machine.processes
        share, left = divmod(self.sequences, processes)
        if left or not share:
            raise UserError(
                f"a batch of {self.sequences} sequences cannot be shared by {processes} processes; set batch_tokens"
                f" to a multiple of {processes} × block_size"
            )
        self.at.micro_batch = math.gcd(share, round(-self.machine.maximum(-size)[0]))
        self.micro_steps = share // self.at.micro_batch  # of an optimizer step
        self.seek()

    def seek(self) -> None:
        """Read on from where the run is, whatever was read since."""
        self._position = self.at.tokens // self.windows.block_size + self.machine.rank * self.at.micro_batch

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, T) and targets (B, T), the same windows shifted by one."""
        rows = torch.from_numpy(self.windows.read(self._position, self.at.micro_batch))
        self._position += self.machine.processes * self.at.micro_batch
        return _inputs_and_targets(rows, self.machine.device)

    def retry(self, model: torch.nn.Module, attempt: Callable):
        """The result of `attempt()`, made again with half the micro-batch while the device has no memory for it."""
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            size = self.at.micro_batch
            half = next((n for n in range(size // 2, 0, -1) if size % n == 0), 0)
            if not half:
                raise UserError("out of memory with one sequence: use a smaller model or block_size")
            if self.machine.processes > 1:
                raise UserError(f"out of memory at micro_batch {size}: go on with {half} or less")
            model.zero_grad(set_to_none=True)
            self.machine.release_memory()
            self.use_micro_batch(half)
            print(f"\nout of memory; on with micro-batches of {half}")


def _inputs_and_targets(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) as tokens and targets (B, T) on the device, with the same strides wherever they are made."""
    if device.type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1].clone(), rows[:, 1:].clone()


# ------------------------------------------------------------------------------------------- tokenizers


BPE_TRAINING_BYTES = 256 << 20  # text a BPE vocabulary is learned from; more changes it very little


def get_tokenizer(name: str, vocab_size: int, documents: Iterable[str] = ()) -> tiktoken.Encoding:
    """A tokenizer as a `tiktoken.Encoding`: `"bytes"`, `"bpe"`, a tiktoken name such as `"gpt2"`, or the folder of a
    Hugging Face tokenizer.json.

    `"bpe"` learns `vocab_size` tokens, end-of-text included, from `documents` (rustbpe trains, tiktoken
    runs). Raises `DataError` for an unknown name, an unreachable vocabulary, or a `vocab_size` that the
    tokenizer does not fit in.
    """
    if name == "bytes":
        encoding = _encoding("bytes", {bytes([i]): i for i in range(256)}, r"[\s\S]{1,64}")
    elif name == "bpe":
        encoding = _train_bpe(documents, vocab_size)
    elif name in tiktoken.list_encoding_names():
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:
            raise DataError(
                f"tokenizer {name!r}: its vocabulary could not be downloaded ({type(error).__name__});"
                " check the network, point TIKTOKEN_CACHE_DIR to a copy, or use tokenizer='bpe'"
            ) from None
    elif (Path(name).expanduser() / "tokenizer.json").is_file():
        from machinery.huggingface.tokenizers import read_tokenizer

        encoding = read_tokenizer(Path(name).expanduser())
    else:
        names = ", ".join(["bytes", "bpe", *tiktoken.list_encoding_names()])
        raise DataError(f"tokenizer {name!r} is not known; there are {names}, or the folder of a tokenizer.json")
    if encoding.n_vocab > vocab_size:
        raise DataError(
            f"vocab_size is {vocab_size} but tokenizer {name!r} has {encoding.n_vocab} tokens;"
            f" set vocab_size to {-(-encoding.n_vocab // 64) * 64} (a multiple of 64 suits GPUs)"
        )
    return encoding


def _encoding(name: str, ranks: dict[bytes, int], pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def _train_bpe(documents: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    import rustbpe

    if vocab_size < 257:
        raise DataError(f"vocab_size is {vocab_size} but BPE needs at least 257: 256 bytes and end-of-text")

    def sample() -> Iterator[str]:
        left = BPE_TRAINING_BYTES
        for text in documents:
            yield text
            left -= len(text)
            if left <= 0:
                return

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(sample(), vocab_size - 1, pattern=SPLIT_PATTERN)
    return _encoding("bpe", {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}, SPLIT_PATTERN)
