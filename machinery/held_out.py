"""Held-out text: which documents it is, and that none of them has a near-copy in the training text.

Documents are compared by their longer lines, blank space and line ends aside. The side of a document is that of its
smallest line, by a hash: a function of its content alone, in which near-copies mostly agree, since two documents have
the same smallest line as often as they have lines in common (MinHash; Broder 1997). What then still stands on both
sides is set aside. A copy in other words, in other case, or with its lines cut at other places is not found, nor one
of short lines that differs.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Container, Iterable

LINE_ENDS = bytes.maketrans(b"\v\f\x1c\x1d\x1e", b"\n" * 5)  # as `str.splitlines` sees them
ODD_BLANKS = re.compile(
    rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2(?:\x80[\x80-\x8b\xa8\xa9\xaf]|\x81[\x9f\xa0])|\xe3\x80\x80|\xef\xbb\xbf"
)
ODD_LINE_ENDS = {end.encode() for end in "\x85\u2028\u2029"}  # among those blanks: U+00A0, U+2003, U+3000, …
LONG_LINE = 16  # bytes of a line that tells one document from another, blank space aside: some 20 with it
NEAR_COPY = 0.5  # share of a document's longer lines that makes a near-copy
COMMON = 0.25  # share of the documents that a line stands in which tells none of them from another


def long_lines(content: bytes) -> list[bytes]:
    """The longer lines of a text, without blank space; of a text that has none, all of it as one."""
    dense = _dense(content)
    return [line for line in dense.splitlines() if len(line) >= LONG_LINE] or [dense.translate(None, b"\r\n")]


def _dense(content: bytes) -> bytes:
    """A text without blank space, and with plain line ends."""
    if not content.isascii():
        content = ODD_BLANKS.sub(lambda found: b"\n" if found[0] in ODD_LINE_ENDS else b"", content)
    return content.translate(LINE_ENDS, b" \t\x1f")


def smallest_line(lines: Iterable[bytes]) -> bytes:
    """The line that stands for a document: the smallest by a hash that is the same in every process."""
    return min(lines, key=zlib.crc32)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out text: a function of its content, and alike for near-copies."""
    return falls_under(smallest_line(long_lines(text.encode("utf-8", "surrogatepass"))), fraction)


def falls_under(line: bytes, fraction: float) -> bool:
    digest = hashlib.blake2b(line, digest_size=8, person=b"val").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def common_lines(texts: Iterable[str]) -> set[bytes]:
    """The longer lines that stand in many texts, as headers and footers do; of the first 16 million characters."""
    counts, documents, left = Counter(), 0, 16 << 20
    for text in texts:
        counts.update({*long_lines(text[:left].encode("utf-8", "surrogatepass"))})
        documents, left = documents + 1, left - len(text)
        if left <= 0:
            break
    return {line for line, count in counts.items() if count >= max(2, COMMON * documents)}


def cut_tail(text: str, fraction: float, common: Container[bytes] = ()) -> tuple[str, str]:
    """A text without its tail, and the tail: about `fraction` of it, from a line on where one begins nearby.

    The tail ends before the `common` lines at the end: a footer, the same in many texts, measures nothing.
    """
    end = _before_footer(text, common) if common else len(text)
    size = max(1, int(end * fraction))
    cut = end - size
    cut = text.rfind("\n", max(0, cut - size // 2), cut) + 1 or cut
    return text[:cut] + text[end:], text[cut:end]


def _before_footer(text: str, common: Container[bytes]) -> int:
    """Where the common lines at the end of a text begin; its length where there are no others."""
    end = start = len(text)
    for line in reversed(text.splitlines(keepends=True)):
        start -= len(line)
        dense = _dense(line.encode("utf-8", "surrogatepass")).translate(None, b"\r\n")
        if dense in common:
            end = start
        elif len(dense) >= LONG_LINE:
            return end
    return len(text)


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
