"""Held-out text: which documents it is, and that none of them has a near-copy in the training text.

Documents are compared by their longer lines, or where they are few, by parts of these; blank space, line ends, ways to
write an accent and the ">" of a quoted line do not count. The side of a document is that of its smallest line, by a
hash: a function of its content alone, in which near-copies mostly agree, since two documents have the same smallest
line as often as they have lines in common (MinHash; Broder 1997). What then still stands on both sides is set aside.
A copy is not found that has other words, case or quotation marks in most lines, a number or sign before each, or its
lines cut at other places.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from itertools import accumulate

import numpy as np

from machinery.text_files import in_parts

PIECE = 1 << 18  # characters of a text that are encoded and looked at together; more at once is not faster
LINE_ENDS = bytes.maketrans(b"\r\v\f\x1c\x1d\x1e\x1f", b"\n" * 6 + b" ")  # as `str.splitlines` sees them
ODD_BLANKS = re.compile(
    rb"\xc2[\x85\xa0\xad]|\xd8\x9c|\xe1(?:\x9a\x80|\xa0\x8e)|\xe2(?:\x80[\x80-\x8f\xa8-\xaf]|\x81[\x9f-\xaf])"
    rb"|\xe3\x80\x80|\xef(?:\xbb\xbf|\xb8[\x80-\x8f])"
)
ODD_LINE_ENDS = {end.encode() for end in "\x85\u2028\u2029"}  # among those blanks: U+00A0, U+2003, U+3000, …
NO_WIDTH = {sign.encode() for sign in "\xad\u061c\u180e\u200b\u200c\u200d\u200e\u200f\ufeff"}
NO_WIDTH |= {chr(code).encode() for code in (*range(0x202A, 0x202F), *range(0x2060, 0x2070), *range(0xFE00, 0xFE10))}
LONG_LINE, SPACED_LINE = 16, 20  # characters of a line that tells one document from another, without and with blanks
FOLLOWING = 32  # bytes of a short line with what follows
CONTINUED = bytes(range(0x80, 0xC0))  # what follows the first byte of a character
FEW, FEW_LINES = 0.25, 0.15  # share of a text, or of its lines, that is longer, under which its short lines count too
QUOTED = re.compile(rb"(?m)^(?:[ \t]*>)+")  # as in a reply
REPLY = re.compile(rb"(?m)^>(?!>>)")  # which quotes once or twice, too, or mostly; else ">>>" is Python's prompt
MARKS = re.compile(rb"(?:[\xcc\xcd][\x80-\xbf]){64}")  # on one letter; to put n of them in order takes n² steps
LONGEST_LINE = 1 << 16  # bytes of a line that counts as one


def _between(every: int, share: int) -> tuple[re.Pattern, re.Pattern]:
    """Where a line of ASCII is cut, and any other: after some pairs of bytes; also after some pairs of letters of two
    or three bytes, by their last ones, since the first are mostly the same in a script. `share` of 64 last bytes count,
    of which any alphabet has a few.
    """
    some = rb"(?<=[%b]{2})" % re.escape(bytes(range(5, 256, every)))
    last = re.escape(bytes(byte for byte in CONTINUED if byte * 29 % 64 < share))
    letters = rb"(?<=[%b][\xc3-\xdf][%b])|(?<=[%b][\xe0-\xef][\x80-\xbf][%b])" % ((last,) * 4)
    return re.compile(some), re.compile(some + b"|" + letters)


CUT = _between(16, 8)  # of a longer one
PARAGRAPHS, PARAGRAPH = 8, 64  # with fewer longer lines, one of so many bytes, a copy may have none whole in common
FINE_CUT = _between(6, 16)  # of these: into parts of some 50 bytes
NEAR_COPY = 0.5  # share of a document's longer lines that makes a near-copy
MANY, TAIL = 20, 1000  # so many documents whose ends are shorter than so many bytes: some are held out whole
FOOTER = 1 << 16  # characters at the end of a text among which what ends many texts is looked for
COMMON = 0.25  # share of the documents that a line stands in which tells none of them from another
OWN = 8  # lines of a text's own, more than which no footer goes on before


def long_lines(content: bytes) -> list[bytes]:
    """The longer lines of a text, without blank space; where it has few, after a line end also each line with what
    follows, in equal lengths, and the parts of paragraphs. Of a text too short for that, all of it.
    """
    plain = _plain(content)
    if len(plain) < LONG_LINE:
        return [b"".join(plain.split())]
    dense = plain.translate(None, b" \t")
    lines, spaced = dense.split(b"\n"), plain.split(b"\n")
    surely = LONG_LINE if plain.isascii() else 4 * LONG_LINE  # bytes of so many characters
    found = [
        line
        for line, whole in zip(lines, spaced)
        if len(line) >= surely or (len(line) > SPACED_LINE // 2 and _is_long(line, whole))
    ]
    few = len(found) < PARAGRAPHS and max(map(len, found), default=0) >= PARAGRAPH
    parts = [part for line in found for part in _parts(line, FINE_CUT)] if few else []
    if len(dense) > LONGEST_LINE:
        found = [part for line in found for part in _cut_line(line)]
    size = len(dense) - len(lines) + 1
    wanted = FEW_LINES * len(lines)  # at most: to count those that are not empty takes longer
    few_lines = len(found) < wanted and len(found) < FEW_LINES * sum(map(bool, lines))
    if few_lines or sum(map(len, found)) < FEW * size:
        whole = b"".join(lines)
        starts = accumulate(map(len, lines), initial=0)
        found += [b"\n" + whole[start : start + FOLLOWING] for start in starts if start + FOLLOWING <= size]
    return found + [b"\n" + part for part in parts] or [b"".join(lines)]


def _cut_line(line: bytes) -> list[bytes]:
    """A line, or of one that is too long to count as one the longer parts."""
    return [line] if len(line) <= LONGEST_LINE else _parts(line, CUT)


def _parts(line: bytes, cuts: tuple[re.Pattern, re.Pattern]) -> list[bytes]:
    """The longer parts of a line."""
    return [part for part in cuts[not line.isascii()].split(line) if len(part) >= LONG_LINE]


def line_hashes(lines: list[bytes]) -> array:
    """Hashes of lines, of this process: below 0 for a line with what follows."""
    hashes = array("q", [*map(abs, map(hash, lines))])  # from a list, which is faster
    if lines[-1].startswith(b"\n"):
        hashes = array("q", (-number if line.startswith(b"\n") else number for line, number in zip(lines, hashes)))
    return hashes


def comparable(lines: Iterable[int]) -> list[list[int]]:
    """The hashes by which a document is compared: of its longer lines, and of lines with what follows and of parts. It
    is a copy by either, since a copy with another few lines may have no more than the longer ones in common.
    """
    kinds = [line for line in lines if line >= 0], [line for line in lines if line < 0]
    return [kind for kind in kinds if kind]


def _plain(content: bytes) -> bytes:
    """A text with plain line ends and blank space, its accents composed."""
    if not content.isascii():
        text = content.decode("utf-8", "surrogatepass")
        many = (b"\xcc" in content or b"\xcd" in content) and MARKS.search(content)  # to look for one byte is faster
        if not many and not unicodedata.is_normalized("NFC", text):
            content = unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")
        content = ODD_BLANKS.sub(lambda found: _plain_blank(found[0]), content)
    content = content.translate(LINE_ENDS)
    mostly = 2 * content.count(b">") > (lines := content.count(b"\n")) and 2 * len(QUOTED.findall(content)) > lines
    is_reply = mostly or ((content.startswith(b">") or b"\n>" in content) and REPLY.search(content))
    return QUOTED.sub(b"", content) if is_reply else content


def _plain_blank(blank: bytes) -> bytes:
    return b"\n" if blank in ODD_LINE_ENDS else b"" if blank in NO_WIDTH else b" "


def _is_long(line: bytes, spaced: bytes) -> bool:
    """Whether a line tells one document from another; a row of a table may be little more than its blanks."""
    size = len(line) if line.isascii() else len(line.translate(None, CONTINUED))
    return size >= LONG_LINE or (2 * size > SPACED_LINE and size + len(spaced.split()) > SPACED_LINE)


def smallest_line(lines: Iterable[bytes]) -> bytes:
    """The line that stands for a document: the smallest by a hash that is the same in every process."""
    return min(lines, key=zlib.crc32)


def is_held_out(text: str, span: Sequence[float]) -> bool:
    """Whether a document belongs to the held-out text: a function of its content, and alike for near-copies."""
    return falls_within(smallest_of_text(text), span)


def smallest_of_text(text: str) -> bytes:
    """The line that stands for a text, which is looked at in pieces, as it is when it is encoded."""
    pieces = [text] if len(text) <= PIECE else in_parts(text, PIECE)
    return smallest_line([smallest_line(long_lines(piece.encode("utf-8", "surrogatepass"))) for piece in pieces])


def falls_within(line: bytes, span: Sequence[float]) -> bool:
    """Whether the place of a line, between 0 and 1, is in a span of places, such as (0, 0.1) for a tenth of all."""
    return span[0] <= place_of(line) < span[1]


def place_of(line: bytes) -> float:
    """A number from 0 to 1 that follows from a line, and evenly from many."""
    return int.from_bytes(hashlib.blake2b(line, digest_size=8, person=b"val").digest(), "big") / 2**64


def span_of_share(texts: Iterable[str], fraction: float) -> tuple[float, float] | None:
    """The places of about `fraction` of the bytes of many texts, of one at least; None where they are few, alike, or so
    long that the end of each says more. What follows the first 256 MB is not looked at.
    """
    sizes: Counter[float] = Counter()
    total = 0
    for text in texts:
        size = len(text.encode("utf-8", "surrogatepass"))
        sizes[place_of(smallest_of_text(text))] += size
        total += size
        if total > 256 << 20:
            break
    if len(sizes) < MANY or fraction * total / len(sizes) >= TAIL:
        return None
    wanted = max(fraction * total, total / len(sizes))
    start, size = 0.0, 0
    for place in sorted(sizes):
        if sizes[place] > wanted * 2:  # one text in many copies is not held out
            start, size = math.nextafter(place, 1), 0
            continue
        size += sizes[place]
        if size >= wanted:
            return start, math.nextafter(place, 1)
    return None


def common_lines(texts: Iterable[str]) -> set[bytes]:
    """The longer lines that stand in the ends of many texts, as footers do; of the first 16 million characters."""
    counts, documents, left = Counter(), 0, 16 << 20
    for text in texts:
        counts.update({*long_lines(text[-FOOTER:].encode("utf-8", "surrogatepass"))})
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
    """Where common lines at the end of a text begin, with a few of its own among them; its length where it has no own.

    That is where from there on most more lines are common than are not; some of its own stand before it.
    """
    found = end = start = len(text)
    score = most = 0
    for line in reversed(text[-FOOTER:].splitlines(keepends=True)):
        start -= len(line)
        spaced = _plain(line.encode("utf-8", "surrogatepass"))
        dense = spaced.translate(None, b" \t\r\n")
        if dense in common:
            score += 1
        elif _is_long(dense, spaced):
            found, score = end, score - 1
        if score >= max(most, 1):  # short lines before it are of the footer
            most, end = score, start
        elif score < most - OWN:
            break
    return found


class HeldOutLines:
    """The lines of held-out documents, and which of them stand in the training text so far."""

    def __init__(self) -> None:
        self._documents: dict[int, list[int]] = {}  # hash of a line to the numbers of the documents that hold it
        self._allowed: list[int] = []  # how many more lines of each may stand in the training text
        self._trained: set[int] = set()  # of the lines

    def add(self, lines: Iterable[int]) -> None:
        """Take in a document by the hashes of its lines."""
        for distinct in map(dict.fromkeys, comparable(lines)):
            for line in distinct:
                self._documents.setdefault(line, []).append(len(self._allowed))
            self._allowed.append(math.ceil(NEAR_COPY * len(distinct)) - 1)

    def train(self, lines: Iterable[int], always: bool = False) -> bool:
        """Note a document with these lines as trained on, and return True; unless with it, training text would hold
        half of the lines of a held-out one. `always` is for what cannot be left out.
        """
        new = (self._documents.keys() & lines) - self._trained
        counts = Counter(number for line in new for number in self._documents[line])
        if not always and any(count > self._allowed[number] for number, count in counts.items()):
            return False
        for number, count in counts.items():
            self._allowed[number] -= count
        self._trained |= new
        return True

    @property
    def trained(self) -> str:
        """A bit for each line, in hexadecimal digits: whether it stands in the training text."""
        return np.packbits([line in self._trained for line in self._documents]).tobytes().hex()

    @trained.setter
    def trained(self, digits: str) -> None:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
        self.train([line for line, bit in zip(self._documents, bits) if bit], always=True)
