"""Held-out text: which documents it is, and that none of them has a near-copy in the training text.

Documents are compared by their longer lines, blank space and line ends aside. The side of a document is that of its
smallest line, by a hash: a function of its content alone, in which near-copies mostly agree, since two documents have
the same smallest line as often as they have lines in common (MinHash; Broder 1997). What then still stands on both
sides is set aside.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np

LONG_LINE = 20  # bytes of a line that tells one document from another, without the blank space at its ends
NEAR_COPY = 0.5  # share of a document's longer lines that makes a near-copy
BLANKS = b" \t\v\f\r\n"


def long_lines(content: bytes) -> list[bytes]:
    """The longer lines of a text, without blank space; of a text that has none, all of it as one."""
    lines = [line for line in map(bytes.strip, content.splitlines()) if len(line) >= LONG_LINE]
    if not lines:
        return [content.translate(None, BLANKS)]
    return b"\n".join(lines).translate(None, b" \t\v\f").split(b"\n")


def smallest_line(lines: Iterable[bytes]) -> bytes:
    """The line that stands for a document: the smallest by a hash that is the same in every process."""
    return min(lines, key=zlib.crc32)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out text: a function of its content, and alike for near-copies."""
    return falls_under(smallest_line(long_lines(text.encode("utf-8", "surrogatepass"))), fraction)


def falls_under(line: bytes, fraction: float) -> bool:
    digest = hashlib.blake2b(line, digest_size=8, person=b"val").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def cut_tail(text: str, fraction: float) -> tuple[str, str]:
    """A text without its end, and the end: about `fraction` of it, from a line on where one begins nearby."""
    size = max(1, int(len(text) * fraction))
    cut = len(text) - size
    cut = text.rfind("\n", max(0, cut - size // 2), cut) + 1 or cut
    return text[:cut], text[cut:]


class HeldOutLines:
    """The lines of held-out documents, to find near-copies of them in text that comes later."""

    def __init__(self) -> None:
        self._documents: dict[int, list[int]] = {}  # hash of a line to the numbers of the documents that hold it
        self._sizes: list[int] = []  # how many lines each document has, repetitions aside

    def add(self, lines: array) -> None:
        """Take in a document by the hashes of its lines."""
        distinct = set(lines)
        for line in distinct:
            self._documents.setdefault(line, []).append(len(self._sizes))
        self._sizes.append(len(distinct))

    def are_in(self, lines: array) -> bool:
        """Whether a document with these lines holds half of those of a held-out one."""
        if self._documents.keys().isdisjoint(lines):
            return False
        shared = Counter(number for line in set(lines) for number in self._documents.get(line, ()))
        return any(count >= NEAR_COPY * self._sizes[number] for number, count in shared.items())


def standing_in(documents: list[array], training: array) -> np.ndarray:
    """(documents,) bool: whether half of the lines of each stand in the training text; both are hashes of lines."""
    if not documents or not training:
        return np.zeros(len(documents), dtype=bool)
    known = np.unique(np.frombuffer(training, dtype=np.int64))
    sizes = np.array([len(lines) for lines in documents])
    lines = np.concatenate([np.frombuffer(lines, dtype=np.int64) for lines in documents])
    places = np.minimum(np.searchsorted(known, lines), len(known) - 1)
    found = np.add.reduceat(known[places] == lines, np.cumsum(sizes) - sizes, dtype=np.int64)
    return found >= NEAR_COPY * sizes
