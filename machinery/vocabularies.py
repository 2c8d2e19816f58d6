"""Tokenizers by their names: published, learned from the text, of a checkpoint's folder, or plain bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken

from machinery.errors import DataError
from machinery.files import read_json
from machinery.text_files import in_parts
from machinery.tokenizers import BYTES_PATTERN, END_OF_TEXT, SPLIT_PATTERN, tokenizer_from_dict

BPE_TRAINING_PART = 900_000  # characters of a text at a time
BPE_TRAINING_TEXT = 256 << 20  # characters that a BPE vocabulary is learned from; more change it very little


def get_tokenizer(name: str, vocab_size: int, documents: Iterable[str] = ()) -> tiktoken.Encoding:
    """A tokenizer as a `tiktoken.Encoding`: `"bytes"`, `"bpe"`, a tiktoken name such as `"gpt2"`, or the folder of a
    tokenizer.json, of Hugging Face or of a run.

    `"bpe"` learns `vocab_size` tokens, end-of-text included, from `documents` (rustbpe trains, tiktoken
    runs). Raises `DataError` for an unknown name, an unreachable vocabulary, or a `vocab_size` that the
    tokenizer does not fit in.
    """
    if name == "bytes":
        encoding = _encoding("bytes", {bytes([i]): i for i in range(256)}, BYTES_PATTERN)
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
    elif path := tokenizer_file(name):
        from machinery.huggingface.tokenizers import read_tokenizer

        fields = read_json(path, advice="bring it back, or use another tokenizer")
        own = "special_tokens" in fields  # of a run of this project
        encoding = tokenizer_from_dict(fields, path) if own else read_tokenizer(path.parent)
    else:
        names = ", ".join(built_in())
        raise DataError(
            f"tokenizer {name!r} is not known; there are {names}, or the folder of a tokenizer.json, as each run is one"
        )
    if encoding.n_vocab > vocab_size:
        raise DataError(
            f"vocab_size is {vocab_size} but tokenizer {name!r} has {encoding.n_vocab} tokens;"
            f" set vocab_size to {-(-encoding.n_vocab // 64) * 64} (a multiple of 64 suits GPUs)"
        )
    return encoding


def built_in() -> list[str]:
    """The tokenizers that have a name of their own."""
    return ["bytes", "bpe", *tiktoken.list_encoding_names()]


def tokenizer_notes(name: str) -> list[str]:
    """Lines that a user should see before a tokenizer is used."""
    if name in built_in() and tokenizer_file(name):
        return [f"tokenizer {name!r} is built in; for the folder of that name here, write './{name}'"]
    return []


def tokenizer_file(name: str) -> Path | None:
    """The tokenizer.json of a folder; None where there is none under that name."""
    path = os.path.join(os.path.expanduser(name), "tokenizer.json")
    return Path(path) if os.path.isfile(path) else None


def _encoding(name: str, ranks: dict[bytes, int], pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def _train_bpe(documents: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    import rustbpe

    if vocab_size < 257:
        raise DataError(f"vocab_size is {vocab_size} but BPE needs at least 257: 256 bytes and end-of-text")

    def sample() -> Iterator[str]:
        left = BPE_TRAINING_TEXT
        for text in documents:
            yield from in_parts(text, BPE_TRAINING_PART)  # the pattern fails on longer runs of blanks
            left -= len(text)
            if left <= 0:
                return

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(sample(), vocab_size - 1, pattern=SPLIT_PATTERN)
    return _encoding("bpe", {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}, SPLIT_PATTERN)
