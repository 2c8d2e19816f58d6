"""Documents as token ids: encoded by threads, in order, with what decides on which side of the split they fall."""

from __future__ import annotations

import copy
import os
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tiktoken

from machinery.errors import DataError
from machinery.held_out import PIECE, line_hashes, long_lines, smallest_line
from machinery.sources import Position
from machinery.text_files import in_parts
from machinery.tokenizers import ENDS_OF_TEXT

PIECE_DOCUMENTS = 1 << 12
AHEAD = 4 << 20  # characters that are encoded, or wait for it, while more is read


@dataclass(slots=True)
class Encoded:
    """A document as token ids, with what decides on its side."""

    side: str  # "train" or "val"; "" where its lines decide
    position: Position  # in the source, after it
    ids: list[np.ndarray]  # in pieces
    bytes: int
    lines: array  # hashes of its longer lines, of this process
    smallest: bytes  # of those lines
    ends_of_text: list[str]  # spelt in it


def encode_all(
    encoding: tiktoken.Encoding, documents: Iterable[tuple[str, str, Position]], dtype: np.dtype
) -> Iterator[Encoded]:
    """Encode (side, text, position), in order. Threads encode, outside Python's lock, while more is read.

    Each thread has an encoder of its own: of a shared one, only the thread that used it first is spared its lock.
    tiktoken's own batches return Python lists: 1.37 times the time (12 MB of Python, two cores), four times the memory.
    """
    own = threading.local()

    def start() -> None:
        own.encoding = copy.copy(encoding)

    def encode(texts: list[str]) -> list[tuple[list[np.ndarray], int, array, bytes]]:
        return [([encode_text(own.encoding, text).astype(dtype)], *look_at_lines(text)) for text in texts]

    with ThreadPoolExecutor(os.cpu_count(), initializer=start) as pool:
        waiting: deque[tuple[list, list[Future], int]] = deque()
        ahead = 0
        for batch in _batches(documents):
            size = sum(len(text) for _, text, _ in batch)
            texts = [text for _, text, _ in batch]
            parts = ([part] for part in in_parts(texts[0], PIECE)) if len(batch) == 1 else [texts]
            waiting.append((batch, [pool.submit(encode, part) for part in parts], size))
            ahead += size
            del batch, texts, parts  # a document may be large
            while ahead > AHEAD or len(waiting) > 16:
                ahead -= waiting[0][2]
                yield from _finish(*waiting.popleft()[:2])
        while waiting:
            yield from _finish(*waiting.popleft()[:2])


def _batches(documents: Iterable[tuple[str, str, Position]]) -> Iterator[list[tuple[str, str, Position]]]:
    """Documents in lists of about `PIECE` characters; a longer one alone."""
    batch, size = [], 0
    for document in documents:
        if batch and (size + len(document[1]) > PIECE or len(batch) >= PIECE_DOCUMENTS):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document[1])
        del document
    if batch:
        yield batch


def _finish(batch: list[tuple[str, str, Position]], futures: list[Future]) -> Iterator[Encoded]:
    parts = [part for future in futures for part in future.result()]
    futures.clear()
    if len(batch) == 1:
        parts = [_put_together(parts)]
    for (side, text, position), (ids, size, lines, smallest) in zip(batch, parts):
        ends = [found for pattern in ENDS_OF_TEXT for found in pattern.findall(text)]
        yield Encoded(side, position, ids, size, lines, smallest, ends)  # who takes the ids can free them


def _put_together(parts: list[tuple]) -> tuple[list[np.ndarray], int, array, bytes]:
    """One document from its parts, whose ids stay in pieces."""
    ids, sizes, hashes, smallest = zip(*parts)
    lines = hashes[0]
    for more in hashes[1:]:
        lines.extend(more)
    return [piece for pieces in ids for piece in pieces], sum(sizes), lines, smallest_line(smallest)


def encode_text(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The ids of a text, in which special tokens are text like any other."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError as error:
        raise DataError(f"a document holds half of a surrogate pair at character {error.start}: not text") from None
    except ValueError:  # the pattern gives up on very long runs of blanks
        if len(text) < 2:
            raise
        half = len(text) // 2
        return np.concatenate([encode_text(encoding, text[:half]), encode_text(encoding, text[half:])])


def look_at_lines(text: str) -> tuple[int, array, bytes]:
    """Bytes of a text, the hashes of its longer lines, and the smallest of those."""
    content = text.encode()
    lines = long_lines(content)
    return len(content), line_hashes(lines), smallest_line(lines)
