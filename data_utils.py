"""From a source of text to a batch: tokenized once into shards on disk, read in windows in a known order.

    source ─ documents ─ tokenizer ─ shards ─ windows ─ batches

A *shard* is a flat little-endian array of token ids, an end-of-text token after each document. A *window*
is `block_size + 1` consecutive tokens of one shard: inputs, and the same shifted by one.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch

from machinery.errors import DataError, UserError, told
from machinery.files import json_digest, no_links, sha256
from machinery.machine import Machine, is_out_of_memory
from machinery.notebook import start_python
from machinery.preparation import ADVICE, is_known, open_sources, tokenize, tokenizer_digest
from machinery.screen import progress_bar
from machinery.shards import MANIFEST_VERSION, is_enough, load_tokenizer, read_manifest, report, split_documents
from machinery.sources import refuse_overlap
from machinery.tokenizers import token_byte_counts
from machinery.vocabularies import get_tokenizer, tokenizer_notes

__all__ = ["Batches", "TokenData", "TokenWindows", "get_tokenizer", "prepare_data", "tokens_needed", "work"]

SHARD_TOKENS = 1 << 25  # a shard closes at the first document that ends beyond this: 67 MB of uint16
LEARNING_BYTES = 32 << 20  # from more text than this, it is said that a vocabulary is learned
BACKGROUND_BYTES = 256 << 20  # more text than this is tokenized by a process of its own, beside training


# -------------------------------------------------------------------------------------------- preparing


def prepare_data(config) -> TokenData:
    """Tokenize the text of the notebook's `config` into shards under its `data_dir`, or use the shards there.

    Held-out text is `val_source` where given, else a share `val_fraction` of the documents, near-copies together. It
    is chosen when the first train shard is full and never changes as more text is prepared. As much is prepared as
    the run reads; a later call for more goes on after the last finished shard, as does one after an interruption.

    Text of the hub, or more than `BACKGROUND_BYTES` of it, is tokenized by a process of its own: this
    returns as soon as the first shards stand, and the rest arrives beside training. Raises `DataError`.
    """
    fields = ("source", "val_source", "val_fraction", "text_column", "split_on", "tokenizer", "vocab_size")
    data_dir, runs_dir = (Path(folder).absolute() for folder in (config.data_dir, config.runs_dir))
    settings = {name: getattr(config, name) for name in fields}
    task = {"settings": settings, "apart": [str(runs_dir)], "train_tokens": tokens_needed(config)}
    source, val_source = open_sources(task)
    settings |= {
        "version": MANIFEST_VERSION,
        "shard_tokens": SHARD_TOKENS,
        "text": source.stamp(),
        "val_text": val_source.stamp() if val_source else "",
        "tokenizer_text": tokenizer_digest(config.tokenizer),
    }
    slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{config.source}-{config.tokenizer}-{config.vocab_size}").strip("-")[-60:]
    data = TokenData(data_dir / f"{slug}-{json_digest(settings)[:8]}", task, config.block_size)
    if not is_enough(data.manifest, task["train_tokens"]):
        of_val_source = [f"val_source: {note}" for note in val_source.notes()] if val_source else []
        for note in source.notes() + of_val_source + tokenizer_notes(config.tokenizer):
            print(note)
        if val_source:
            refuse_overlap(source, val_source)
        with told(data.folder, DataError, "cannot be written", ADVICE):
            data.folder.mkdir(parents=True, exist_ok=True)
        learns = config.tokenizer == "bpe" and not (data.folder / "tokenizer.json").exists()
        if learns and source.size() > LEARNING_BYTES:
            print(
                "first a vocabulary is learned, from up to 268 million characters, which can take minutes; then the"
                " tokenization begins",
                flush=True,
            )
        if is_known(settings) and source.size() > BACKGROUND_BYTES:
            data.start_background()
            data.wait(progress=True)
        else:
            tokenize(data.folder, task, True, source, val_source)
        print(*report(data.manifest), sep="\n")
    data.encoding = load_tokenizer(data.folder)
    return data


def tokens_needed(config) -> int | None:
    """Upper bound on the tokens that a run of `config` reads; None when only the clock limits it."""
    batch = 2**21 if config.batch_tokens == "auto" else config.batch_tokens  # more than "auto" takes in any day
    limits = [config.max_steps * batch, config.max_tokens and config.max_tokens + batch]
    return min((limit for limit in limits if limit), default=None)


class TokenData:
    """A folder of shards with its manifest and tokenizer, complete or still growing."""

    encoding: tiktoken.Encoding

    def __init__(self, folder: Path, task: dict, block_size: int) -> None:
        self.folder, self.task, self.settings, self.block_size = folder, task, task["settings"], block_size
        self._has_manifest = False  # or had

    @property
    def manifest(self) -> dict:
        """What is on disk now: settings, tokenizer, counts, the checksum of every shard; empty before there is any."""
        manifest = read_manifest(self.folder)
        if self._has_manifest and not manifest:
            raise DataError(f"{self.folder / 'manifest.json'} is gone; bring it back, or begin again to tokenize anew")
        self._has_manifest = bool(manifest)
        return manifest

    @property
    def key(self) -> str:
        """Names the text that is trained on: equal for equal content and settings, wherever the files lie.

        It covers the first train shard and the held-out one, which stand from the start and are all there is of a
        small text; of more text in files it also covers their content, whatever their dates (beyond 1 GB samples of
        every file: a start should not read it all again). Of what a stream holds later, nothing can be known.
        """
        manifest = self.manifest
        first = [shard["sha256"] for split in ("train", "val") for shard in manifest["shards"][split][:1]]
        places = {"source", "val_source", "text", "val_text", "tokenizer", "tokenizer_text", "version"}
        settings = {name: value for name, value in self.settings.items() if name not in places}
        return json_digest([settings, first, manifest["text"], manifest["tokenizer"]["sha256"]])[:16]

    def windows(self, split: str, block_size: int, seed: int | None = None) -> TokenWindows:
        """The windows of one split: shuffled by `seed`, or in text order without one."""
        return TokenWindows(self, split, block_size, seed)

    def scored_tokens(self, tokens: float) -> int:
        """How many tokens `held_out` gives where about so many are wanted: those of whole windows, at least of one."""
        windows = len(self.windows("val", self.block_size))
        return self.block_size * int(max(1, min(windows, tokens / self.block_size)))

    def held_out(
        self, tokens: float, micro_batch: int, machine: Machine
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets (B, T) of about `tokens` held-out tokens, or with inf all, windows spread evenly.

        Each process gets as many batches as the others; rows that only fill up have targets of -100. Raises `DataError`
        at the end where none of it has bytes to score.
        """
        if not (isinstance(micro_batch, int) and micro_batch > 0 and tokens > 0):
            raise UserError(f"micro_batch is {micro_batch!r} and tokens {tokens!r}; both must be above 0")
        windows, has_text = self.windows("val", self.block_size), False
        count = self.scored_tokens(tokens) // self.block_size
        micro_batch = min(micro_batch, math.ceil(len(windows) / machine.processes))
        chosen = np.linspace(0, len(windows), count, endpoint=False).astype(int)
        for start in range(0, count, machine.processes * micro_batch):
            first = start + machine.rank * micro_batch  # of this process
            part = chosen[first : first + micro_batch]
            rows = torch.zeros(micro_batch, self.block_size + 1, dtype=torch.long)  # one shape for the compiled model
            for row, i in zip(rows, part):
                row[:] = torch.from_numpy(windows.read(int(i), 1)[0])
            has_text |= bool((rows[: len(part), 1:] != self.encoding.eot_token).any())
            inputs, targets = inputs_and_targets(rows, machine.device)
            targets[len(part) :] = -100
            yield inputs, targets
        if not machine.maximum(has_text)[0]:
            raise DataError(f"all {count * self.block_size} tokens to score are ends of texts; use a larger block_size")

    def bytes_of(self, targets: torch.Tensor) -> int:
        """UTF-8 bytes of the text that targets stand for; an end-of-text token has none."""
        return int(token_byte_counts(self.encoding)[targets[targets >= 0].cpu()].sum())

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """The token ids of each document of one split, as far as it is on disk, without its end-of-text token."""
        windows = self.windows(split, 1)
        for shard in range(len(windows.shards)):
            yield from split_documents(windows._tokens(shard), self.encoding.eot_token)

    def start_background(self) -> None:
        """Tokenize in another process, which ends with this one. One at a time is enough for a folder."""
        running = _background.get(self.folder)
        if running is None or running.poll() is not None:
            log = self.folder / "work.log"
            with told(log, DataError, "cannot be written", ADVICE):
                said = open(log, "w", opener=no_links)  # noqa: SIM115 - of an earlier one too, and of other processes
            with said:
                _background[self.folder] = start_python(
                    "import data_utils; data_utils.work()", str(self.folder), json.dumps(self.task),
                    stderr=said, start_new_session=True,  # a Ctrl-C is for the process that trains
                )  # fmt: skip

    def wait(self, shards: int = 1, progress: bool = False) -> None:
        """Return when there are `shards` train shards, or no more to come. Raises what the other process raised."""
        with progress_bar(progress, desc="tokenizing", unit="B", unit_scale=True) as bar:
            while True:
                code = running.poll() if (running := _background.get(self.folder)) else 0
                manifest = self.manifest  # read after that: what has ended has written all of it
                if manifest and (manifest["complete"] or len(manifest["shards"]["train"]) >= shards):
                    return
                if code == 0:  # there is none, or it was asked for less than is wanted now
                    if manifest:
                        self.task["train_tokens"] = None
                    if not is_known(self.settings):
                        tokenize(self.folder, self.task, progress, *open_sources(self.task))
                        continue
                    self.start_background()
                elif code:
                    del _background[self.folder]  # who asks again, when it is mended, has it tried again
                    said = (self.folder / "work.log").read_text("utf-8", "replace").strip() if code > 0 else ""
                    last = (said or "it was killed, as where memory runs out").splitlines()[-1]
                    raise DataError(f"tokenization stopped: {last.removeprefix('DataError: ')}")
                bar.update(self._bytes_read() - bar.n)
                time.sleep(0.1)

    def _bytes_read(self) -> int:
        """How far the other process is, as it notes for whoever waits; 0 where that is no number."""
        try:
            return int((self.folder / ".bytes_read").read_text("utf-8")[:18])
        except (OSError, ValueError):
            return 0

    def stop(self) -> None:
        """End a tokenization that runs in the background; what it has finished stays."""
        if running := _background.pop(self.folder, None):
            running.kill()
            running.wait()


_background: dict[Path, subprocess.Popen] = {}  # tokenizations that this process has started


def work() -> None:
    """The body of a background tokenization."""
    if hasattr(os, "nice"):
        os.nice(10)  # training comes first
    task = json.loads(sys.argv[2])
    tokenize(Path(sys.argv[1]), task, False, *open_sources(task))


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
        self._verified: set[int] = set()
        manifest = self._look()
        if self.counts.sum() < 1:
            more = ", or raise val_fraction" if manifest["held_out"] != "val_source" and split == "val" else ""
            raise DataError(
                f"{split} text has {manifest['tokens'][split]} tokens in {data.folder}, fewer than one window of"
                f" block_size + 1 = {block_size + 1}; add text or lower block_size{more}"
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

    def epochs(self, tokens: int) -> float:
        """How often so many tokens are all windows; 0 while that is not known."""
        return tokens / (len(self) * self.block_size) if self.complete else 0.0

    def read(self, position: int, count: int) -> np.ndarray:
        """(count, block_size + 1) int64: the windows at `position`, `position + 1`, … of the endless order."""
        while not self.complete and position + count > len(self):  # the first epoch, ahead of the tokenization
            self.data.wait(shards=len(self.shards) + 1)
            self._look()
        rows = np.empty((count, self.block_size + 1), dtype=np.int64)
        for row, at in zip(rows, range(position, position + count)):
            shard, index = self._locate(at)
            row[:] = self._tokens(shard, index * self.block_size, self.block_size + 1)
        return rows

    def _locate(self, position: int) -> tuple[int, int]:
        """Shard and window of a position in the endless order."""
        epoch, within = divmod(position, len(self))
        shuffled = self.seed is not None and epoch > 0
        order = _permutation(len(self.shards), self.seed, epoch) if shuffled else np.arange(len(self.shards))
        ends = np.cumsum(self.counts[order])  # of the windows of each shard, in that order
        place = int(np.searchsorted(ends, within, side="right"))
        shard = int(order[place])
        index = within - int(ends[place] - self.counts[shard])
        if self.seed is not None:
            index = int(_permutation(self.counts[shard], self.seed, epoch, shard)[index])
        return shard, index

    def _tokens(self, shard: int, start: int = 0, count: int = -1) -> np.ndarray:
        """Tokens of a shard, all without `count`. It is verified before its first token is used.

        Each part is read from the file: a memory map of one that is cut off meanwhile would end the process.
        """
        entry = self.shards[shard]
        path, advice = self.data.folder / entry["name"], "remove the folder to tokenize again"
        with told(path, DataError, "cannot be read", advice):
            if shard not in self._verified:
                if sha256(path) != entry["sha256"]:
                    raise DataError(f"{path}: content does not match the manifest's checksum; {advice}")
                self._verified.add(shard)
            tokens = np.fromfile(path, self.dtype, count, offset=start * self.dtype.itemsize)
        wanted = count if count >= 0 else entry["tokens"]
        if len(tokens) != wanted:
            raise DataError(f"{path}: {wanted} tokens were expected at {start}, {len(tokens)} are there; {advice}")
        if (largest := tokens.max(initial=0)) >= self.n_vocab:
            raise DataError(f"{path}: holds token {largest}, but the tokenizer has {self.n_vocab}; {advice}")
        return tokens


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
        return inputs_and_targets(rows, self.machine.device)

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


def inputs_and_targets(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) as tokens and targets (B, T) on the device, with the same strides wherever they are made."""
    if device.type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1].clone(), rows[:, 1:].clone()
