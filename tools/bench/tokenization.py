"""Tokenization with all cores: bytes per second of text, from files to shards, against what only encodes.

All use one vocabulary, and give the same tokens (checked on a part of the text). The others get the text in memory
and leave the tokens there; ours reads files, holds documents out, and writes shards with their checksums.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import tiktoken

from data_utils import prepare_data
from machinery.huggingface.tokenizers import to_tokenizers
from machinery.machine import usable_cores
from machinery.sources import iter_documents
from tools.bench.common import take_turns
from tools.common import lm, quietly


def with_datasets(encoding: tiktoken.Encoding, documents: list[str]) -> Callable:
    """tiktoken in the worker processes of `datasets.map`."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": documents})

    def encode(batch: dict) -> dict:
        return {"ids": [encoding.encode_ordinary(text) for text in batch["text"]]}

    def run() -> None:
        options = {"num_proc": usable_cores(), "remove_columns": ["text"], "load_from_cache_file": False}
        rows.map(encode, batched=True, batch_size=100, **options)

    return run


def package_source(name: str) -> str:
    """The Python files of an installed package, as a source."""
    return f"{Path(importlib.util.find_spec(name).origin).parent.as_posix()}/**/*.py"


def compare_tokenization(
    machine, source: str = "python", vocab_size: int = 32768, rounds: int = 5, slow_ones: bool = True
) -> list[dict]:
    """A row per library: bytes per second, and the share of raw tiktoken's rate. All of them, or tiktoken and ours."""
    documents = list(iter_documents(source))
    size = sum(len(text.encode()) for text in documents)
    with tempfile.TemporaryDirectory() as folder:
        config = lm.Config.from_preset("demo", source=source, vocab_size=vocab_size, data_dir=folder)
        data = quietly(prepare_data, config)  # learns the vocabulary, which stays
        encoding = data.encoding
        fast = to_tokenizers(encoding)
        fast.encode_special_tokens = True  # as text
        sample = documents[:20]
        same = [e.ids for e in fast.encode_batch_fast(sample, add_special_tokens=False)]
        assert same == encoding.encode_ordinary_batch(sample), "the vocabularies differ"

        def ours() -> None:  # into a new folder, but for the vocabulary
            place = Path(tempfile.mkdtemp(dir=folder), data.folder.name)
            place.mkdir()
            shutil.copy(data.folder / "tokenizer.json", place)
            quietly(prepare_data, lm.replace(config, data_dir=str(place.parent)))

        calls = {
            "LMHarness, files to shards": ours,
            "tiktoken, batch": lambda: encoding.encode_ordinary_batch(documents, num_threads=usable_cores()),
        }
        if slow_ones:
            calls["tokenizers, batch"] = lambda: fast.encode_batch_fast(documents, add_special_tokens=False)
            calls["datasets.map with tiktoken"] = with_datasets(encoding, documents)
        seconds = take_turns(calls, machine, rounds)
    raw = seconds["tiktoken, batch"]
    text = {"text (MB)": size / 1e6}
    return [
        text | {"library": name, "MB/s": size / taken / 1e6, "of raw tiktoken": raw / taken}
        for name, taken in seconds.items()
    ]
