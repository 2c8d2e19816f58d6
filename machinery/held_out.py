"""Held-out text: which documents it is, and that none of them has a near-copy in the training text.

Documents are compared by their longer lines, and by *shingles*: stretches of letters and digits, of which their own
content picks some, wherever they stand, whatever lines they are in. Blank space, line ends, ways to write an accent and
the ">" of a quoted line do not count, for shingles nor do capitals, accents, signs, tags of HTML, and times and numbers
of lines. The side of a document is that of its smallest line, by a hash: a function of its content alone, in which
near-copies mostly agree, since two documents have the same smallest line as often as they have lines in common
(MinHash; Broder 1997). What is then still copied on the other side (`HeldOutLines`) is set aside. A copy is not found
that differs in a word of eight, nor a row of some twenty letters where it is not equal, nor, without a line in common,
a short text within a longer one.
"""

from __future__ import annotations

import hashlib
import html
import math
import re
import string
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from machinery.text_files import in_parts

PIECE = 1 << 18  # characters of a text that are encoded and looked at together; more at once is not faster
LINE_ENDS = bytes.maketrans(b"\r\v\f\x1c\x1d\x1e\x1f", b"\n" * 6 + b" ")  # as `str.splitlines` sees them
ODD_BLANKS = re.compile(
    rb"\xc2[\x85\xa0\xad]|\xd8\x9c|\xd9\x80|\xe1(?:\x9a\x80|\xa0\x8e)|\xe2(?:\x80[\x80-\x8f\xa8-\xaf]|\x81[\x9f-\xaf])"
    rb"|\xe3\x80\x80|\xef(?:\xbb\xbf|\xb8[\x80-\x8f])"
)
ODD_LINE_ENDS = {end.encode() for end in "\x85\u2028\u2029"}  # among those blanks: U+00A0, U+2003, U+3000, …
NO_WIDTH = {sign.encode() for sign in "\xad\u061c\u0640\u180e\u200b\u200c\u200d\u200e\u200f\ufeff"}
NO_WIDTH |= {chr(code).encode() for code in (*range(0x202A, 0x202F), *range(0x2060, 0x2070), *range(0xFE00, 0xFE10))}
SMALL = bytes.maketrans(string.ascii_uppercase.encode(), string.ascii_lowercase.encode())
SIGNS = bytes({*range(128)} - {*string.ascii_letters.encode(), *string.digits.encode()})
LETTERS = re.compile(r"[^\W_]+")  # and digits; no signs, and no marks on letters
MARKED = str.maketrans("ıłŁøØđĐħĦ", "ilLoOdDhH")  # letters whose marks Unicode does not take for marks
MONTH = rb"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
TIME = re.compile(  # in a log or a chat, without blanks
    rb"(?:\d{4}-\d\d-\d\dT?|\d?\d[./-]\d\d?[./-](?:\d{4}|\d\d),?"
    rb"|\d?\d[/-]?%b[/-]?(?:\d{4}|\d\d)?[:,]?|%b\d?\d(?:,\d{4},?)?)?"
    rb"\d?\d:\d\d(?::\d\d)?(?:[.,]\d+)?(?:Z|[AaPp]\.?[Mm]\b\.?)?" % (MONTH, MONTH)
)
CLOCK = re.compile(rb"\d:\d\d")
NUMBER = re.compile(rb"(?m)^[ \t]*(\d{1,13})(?=[ \t:|]|$)")  # of a line, or a time in seconds or thousandths
NUMBERED, MOST = 8, 0.9  # lines that such numbers begin, at least; share of them that follow the one before
ESCAPED = re.compile(rb"\\[nrt]")  # line ends and tabs, as in JSON
BY_CODE, ENTITY = re.compile(rb"\\u([\dA-Fa-f]{4})"), re.compile(rb"&#?\w{1,31};")  # characters in JSON and in HTML
TAG = re.compile(
    rb"(?i)</?(?:a|abbr|article|aside|b|blockquote|body|br|button|center|cite|code|dd|div|dl|dt|em|figcaption|figure|font"
    rb"|footer|h[1-6]|head|header|hr|html|i|img|label|li|link|main|mark|meta|nav|ol|p|pre|q|s|section|small|span|strike"
    rb"|strong|sub|sup|table|tbody|td|tfoot|th|thead|tr|tt|u|ul)"
    rb"(?:\s+[\w:-]+(?:\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>]+))?)*\s*/?>"
)
BARE = 0.1  # of a page, without which its tags are what counts
TERMINAL = re.compile(  # colours, and what is struck over
    rb"\x1b\[[\d;]*[A-Za-z]|(?:[\x00-\x09\x0b-\x7f]|[\xc2-\xf4][\x80-\xbf]+)\x08"
)
CUE = re.compile(rb"(?m)^(?:\d+\n+)?(?:\d+:)?\d\d:\d\d[,.]\d{3} *--> *(?:\d+:)?\d\d:\d\d[,.]\d{3}.*")  # of a subtitle
LONG_LINE, SPACED_LINE = 16, 20  # characters of a line that tells one document from another, without and with blanks
BEYOND_ASCII = bytes(range(0x80, 0x100))
NEARLY_ASCII = 0.98  # of the bytes of a text, in which few stretches hold any others
CONTINUED = bytes(range(0x80, 0xC0))  # what follows the first byte of a character
QUOTED = re.compile(rb"(?m)^(?:[ \t]*>)+")  # as in a reply
REPLY = re.compile(rb"(?m)^>(?!>>)")  # which quotes once or twice, too, or mostly; else ">>>" is Python's prompt
NO_LETTERS = re.compile(r"[^\w\s\x00-\x7f]{64}")  # if they are marks on one letter, putting n in order takes n² steps
SHINGLE, EVERY, LEAST = 16, 16, 4  # bytes of one; one of so many is picked; with fewer, a text is not told by them
LEADS = bytes(range(0xC2, 0xE2))  # first bytes of letters: without, most alphabets have one byte a letter
SHORTER = {256: 4, 64: 2}  # of a text of fewer bytes, one of so many is picked
BELOW = {every: 2**64 // every - 2**63 for every in (*SHORTER.values(), EVERY)}  # what is picked has a hash below this
PICKED = BELOW[EVERY]  # what is picked in any text has one below this
FACTOR = 0x9E3779B97F4A7C15  # odd, and without a pattern: 2⁶⁴ over the golden ratio
MOSTLY = 0.6  # of a text, without which times are what counts
FEW_LINES, PARAGRAPH, FEW = 8, 64, 0.33  # with fewer lines, one of so many bytes, or less of a text in longer ones: few
NEAR_COPY = 0.5  # share of a document's longer lines, or shingles, that makes a near-copy
ROW, ROW_COPY = 13, 0.7  # that of fewer shingles: short rows have half in common where a template made them
FEW_HOLDERS = 64  # what more held-out documents hold tells none of them from another, and takes long to count
MANY, TAIL = 20, 1000  # so many documents whose ends are shorter than so many bytes: some are held out whole
FOOTER = 1 << 16  # characters at the end of a text among which what ends many texts is looked for
COMMON = 0.25  # share of the documents that a line stands in which tells none of them from another
OWN = 512  # bytes of a text's own, more than which no footer goes on before


def long_lines(content: bytes) -> list[bytes]:
    """The longer lines of a text, without blank space; of one that has none, all of it."""
    return _lines_and_all(content)[0]


def _lines_and_all(content: bytes, keep_tags: bool = False) -> tuple[list[bytes], bytes]:
    """The longer lines of a text, without blank space; and all of it as one, in small letters, without signs, blanks,
    the times and numbers of its lines and, unless they are to be kept, tags of HTML.
    """
    plain = _plain(content)
    dense = plain.translate(None, b" \t")
    surely = LONG_LINE if plain.isascii() else 4 * LONG_LINE  # bytes of so many characters
    dense_lines = dense.split(b"\n")
    found = [
        line
        for line, whole in zip(dense_lines, plain.split(b"\n"))
        if len(line) >= surely or (len(line) > SPACED_LINE // 2 and _is_long(line, whole))
    ]
    whole = BY_CODE.sub(_character, plain) if b"\\u" in plain else plain
    whole = ENTITY.sub(_character, whole) if b"&" in whole else whole
    whole = ESCAPED.sub(b"", whole) if b"\\" in whole else whole
    if b"</" in whole and not keep_tags and len(bare := TAG.sub(b"", whole)) > BARE * len(whole):
        whole = bare
    whole = _without_numbers(whole, dense_lines)
    whole = dense if whole is plain else whole.translate(None, b" \t")
    size = _length(whole)
    whole = _without_times(whole, dense_lines).translate(SMALL, SIGNS)
    ascii_alone = whole.translate(None, BEYOND_ASCII)
    if len(ascii_alone) >= NEARLY_ASCII * len(whole):
        whole = ascii_alone
    else:
        text = whole.decode("utf-8", "surrogatepass")
        apart = text if _has_many_marks(text) else unicodedata.normalize("NFKD", text)
        text = unicodedata.normalize("NFC", "".join(LETTERS.findall(apart)).translate(MARKED).casefold())
        whole = text.encode("utf-8", "surrogatepass")
    if _length(whole) < FEW * size:  # of numbers, or signs
        whole = dense.translate(None, b"\n")
    return found or [dense.translate(None, b"\n>")], whole


def _character(found: re.Match[bytes]) -> bytes:
    text = html.unescape(found[0].decode()) if found[0].startswith(b"&") else chr(int(found[1], 16))
    return text.encode("utf-8", "surrogatepass")


def _without_times(dense: bytes, lines: list[bytes]) -> bytes:
    """A text without the times that a third of its lines hold, as the first lines of messages do."""
    if not CLOCK.search(dense[:2048]):
        return dense
    rest, times = TIME.subn(b"", dense)
    few = max(1, sum(map(bool, lines)) / 3)
    return rest if times >= few and len(rest) > MOSTLY * len(dense) else dense  # of a timetable, times say what it is


def _without_numbers(text: bytes, lines: list[bytes]) -> bytes:
    """A text without the numbers that its lines begin with, where these count them, or are times in seconds."""
    if len(lines) < NUMBERED or sum(line[:1].isdigit() for line in lines[:64]) < NUMBERED:
        return text
    numbers = [int(number) for number in NUMBER.findall(text)]
    counted = sum(after == before + 1 for before, after in pairwise(numbers))
    times = sum(10**9 <= number < 2 * 10**9 or 10**12 <= number < 2 * 10**12 for number in numbers)
    if max(counted, times) < MOST * len(numbers) or 2 * len(numbers) < sum(map(bool, lines)):
        return text
    rest = NUMBER.sub(b"", text)
    return rest if len(rest) > MOSTLY * len(text) else text


def look_at(texts: list[str]) -> list[tuple[int, array, bytes]]:
    """Of each text its bytes, the hashes of its longer lines and, below 0, of its shingles, and what stands for it.

    Hashes of lines are of this process.
    """
    contents = [text.encode("utf-8", "surrogatepass") for text in texts]
    looked_at = [_lines_and_all(content) for content in contents]
    shingles = _shingles([whole for _, whole in looked_at])
    found = []
    for content, (lines, whole), some in zip(contents, looked_at, shingles):
        hashes = array("q", [*map(abs, map(hash, lines))])  # from a list, which is faster
        hashes.frombytes(some.tobytes())
        if len(whole) < max(SHORTER) or not len(some):
            hashes.append(-1 - _number_of(whole) % 2**62)  # all of it, whatever lines it is in; in no longer text
        found.append((len(content), hashes, _smallest(lines, whole, some)))
    return found


def _smallest(lines: list[bytes], whole: bytes, shingles: np.ndarray | None = None) -> bytes:
    """What stands for a text: the smallest of its longer lines, or where these are few, of its shingles."""
    if sum(map(len, lines)) < FEW * len(whole) or len(lines) < FEW_LINES and max(map(len, lines)) >= PARAGRAPH:
        some = _shingles([whole])[0] if shingles is None else shingles
        if np.count_nonzero(some < PICKED) >= LEAST:
            return some.min().tobytes()
    return smallest_line(lines)


def _shingles(texts: list[bytes]) -> list[np.ndarray]:
    """Of each text the hashes, below 0, of some stretches of `SHINGLE` bytes; the stretch itself decides (Manber 1994).

    A hash is a polynomial of the bytes, modulo 2⁶⁴, put together from those of halves of the stretch.
    """
    texts = [text.translate(None, LEADS) for text in texts]
    every = [min((each for size, each in SHORTER.items() if len(text) < size), default=EVERY) for text in texts]
    codes = np.frombuffer(b"".join(text + bytes(SHINGLE) for text in texts), np.uint8)
    hashes, factor, span = codes.astype(np.uint64), FACTOR, 1
    while span < SHINGLE:
        hashes = hashes[:-span] * np.uint64(factor) + hashes[span:]
        factor, span = factor * factor % 2**64, 2 * span
    within = (codes[: len(hashes)] != 0) & (codes[SHINGLE - 1 :] != 0)  # one text
    hashes *= np.uint64(FACTOR)
    sizes = [len(text) + SHINGLE for text in texts]
    below = np.repeat(np.array([BELOW[each] + 2**63 for each in every], np.uint64), sizes)[: len(hashes)]
    places = np.flatnonzero((hashes < below) & within)
    ends = np.cumsum(sizes)
    found = np.split((hashes[places] | np.uint64(1 << 63)).view(np.int64), np.searchsorted(places, ends[:-1]))
    # In a run of a few signs all stretches are alike
    return [
        np.unique(some) if len(some) > 2 * len(text) // each else some for some, text, each in zip(found, texts, every)
    ]


def makes_copy(alike: int, shingles: int) -> bool:
    """Whether so many of the shingles of a text, found in another, make that a near-copy."""
    share = ROW_COPY if shingles < ROW else NEAR_COPY
    return alike >= max(share * shingles, min(LEAST, shingles))


def as_picked(shingles: Iterable[int]) -> list[list[int]]:
    """The hashes of the shingles of a text, and those of them that longer texts pick, too, unless these are few."""
    found = [[*shingles]]
    for below in sorted(BELOW.values(), reverse=True):
        some = [each for each in found[0] if each < below]
        if LEAST <= len(some) < len(found[-1]) - 1:  # by more than that of all of it
            found.append(some)
    return found


def without_common(hashes: Collection[int], common: Container[int]) -> list[int]:
    """The hashes of a text; of a short one without the shingles that many texts hold, as those of a template."""
    is_short = any(PICKED <= each < 0 for each in hashes)
    return [each for each in hashes if each not in common] if is_short else [*hashes]


def _plain(content: bytes) -> bytes:
    """A text with plain line ends and blank space, its accents composed; without the times of subtitles."""
    if not content.isascii():
        text = content.decode("utf-8", "surrogatepass")
        if not unicodedata.is_normalized("NFC", text) and not _has_many_marks(text):
            content = unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")
        content = ODD_BLANKS.sub(lambda found: _plain_blank(found[0]), content)
    content = TERMINAL.sub(b"", content) if b"\x1b" in content or b"\x08" in content else content
    content = content.translate(LINE_ENDS)
    content = CUE.sub(b"", content) if b"-->" in content else content
    mostly = 2 * content.count(b">") > (lines := content.count(b"\n")) and 2 * len(QUOTED.findall(content)) > lines
    is_reply = mostly or ((content.startswith(b">") or b"\n>" in content) and REPLY.search(content))
    return QUOTED.sub(b"", content) if is_reply else content


def _has_many_marks(text: str) -> bool:
    return any(all(unicodedata.category(sign)[0] == "M" for sign in some) for some in NO_LETTERS.findall(text))


def _length(content: bytes) -> int:
    """In characters."""
    return len(content) if content.isascii() else len(content.translate(None, CONTINUED))


def _plain_blank(blank: bytes) -> bytes:
    return b"\n" if blank in ODD_LINE_ENDS else b"" if blank in NO_WIDTH else b" "


def _is_long(line: bytes, spaced: bytes) -> bool:
    """Whether a line tells one document from another; a row of a table may be little more than its blanks."""
    size = _length(line)
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
    return smallest_line([_smallest(*_lines_and_all(piece.encode("utf-8", "surrogatepass"))) for piece in pieces])


def falls_within(line: bytes, span: Sequence[float]) -> bool:
    """Whether the place of a line, between 0 and 1, is in a span of places, such as (0, 0.1) for a tenth of all."""
    return span[0] <= place_of(line) < span[1]


def place_of(line: bytes) -> float:
    """A number from 0 to 1 that follows from a line, and evenly from many."""
    return _number_of(line) / 2**64


def _number_of(content: bytes) -> int:
    """A number below 2⁶⁴ that follows from its content, and evenly from many."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, person=b"val").digest(), "big")


def spans_of_share(texts: Iterable[str], fraction: float) -> Iterator[tuple[float, float]]:
    """Spans of places, one after the other, that each hold about `fraction` of the bytes of many texts, of one at
    least; none where they are few, alike, or so long that the end of each says more. What follows the first 256 MB is
    not looked at.
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
        return
    wanted = max(fraction * total, total / len(sizes))
    start, size = 0.0, 0
    for place in sorted(sizes):
        after = math.nextafter(place, 1)
        if sizes[place] > wanted * 2:  # one text in many copies is not held out
            start, size = after, 0
            continue
        size += sizes[place]
        if size >= wanted:
            yield start, after
            start, size = after, 0


def common_lines(texts: Iterable[str]) -> set[bytes | int]:
    """The longer lines, and the shingles, that stand in the ends of many texts, as footers do; of the first 16 million
    characters.
    """
    counts, documents, left = Counter(), 0, 16 << 20
    for text in texts:
        lines, whole = _lines_and_all(text[-FOOTER:].encode("utf-8", "surrogatepass"), keep_tags=True)
        counts.update({*lines, *_shingles([whole])[0].tolist()})
        documents, left = documents + 1, left - len(text)
        if left <= 0:
            break
    return {part for part, count in counts.items() if count >= max(2, COMMON * documents)}


def cut_tail(text: str, fraction: float, common: Container[bytes | int] = ()) -> tuple[str, str]:
    """A text without its tail, and the tail: about `fraction` of it, from a line on where one begins nearby.

    The tail ends before the `common` lines at the end: a footer, the same in many texts, measures nothing.
    """
    end = _before_footer(text, common) if common else len(text)
    size = max(1, int(end * fraction))
    cut = end - size
    cut = text.rfind("\n", cut - min(size, cut) // 2, cut) + 1 or cut
    return text[:cut] + text[end:], text[cut:end]


def _before_footer(text: str, common: Container[bytes | int]) -> int:
    """Where common lines at the end of a text begin, with a few of its own among them; its length where it has no own.

    That is where from there on most more bytes are of common lines than of others; some of its own stand before it.
    """
    found = end = start = len(text)
    score = most = 0
    for line in reversed(text[-FOOTER:].splitlines(keepends=True)):
        start -= len(line)
        spaced = _plain(line.encode("utf-8", "surrogatepass"))
        dense = spaced.translate(None, b" \t\r\n")
        is_long = _is_long(dense, spaced)
        if dense in common or (is_long and _is_mostly_common(spaced, common)):
            score += len(dense)
        elif is_long:
            found, score = end, score - len(dense)
        if score >= max(most, 1):  # short lines before it are of the footer
            most, end = score, start
        elif score < most - OWN:
            break
    return found


def _is_mostly_common(line: bytes, common: Container[bytes | int]) -> bool:
    """Whether a line is that of other texts but for a name, an address or the like."""
    picked = [each for each in _shingles([_lines_and_all(line, keep_tags=True)[1]])[0].tolist() if each < PICKED]
    return sum(each in common for each in picked) >= max(LEAST, NEAR_COPY * len(picked))


class HeldOutLines:
    """The lines and shingles of held-out documents, and which lines stand in the training text so far.

    A document is copied where half of its lines stand anywhere in the training text, or half of its shingles in one
    document of it: of texts that are made alike, as by a template, many together hold nearly all shingles of another.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # of documents, by all their hashes
        self._documents: dict[int, list[int]] = {}  # hash of a line to the numbers of the documents that hold it
        self._allowed: list[int] = []  # how many more lines of each may stand in the training text
        self._trained: set[int] = set()  # of the lines
        self._shingles: dict[int, list[int]] = {}  # hash of a shingle to the numbers of the sets that hold it
        self._sets: list[tuple[int, int]] = []  # of each the document, and how many shingles
        self.copied: set[int] = set()  # documents
        self.common: set[int] = set()  # shingles that many training documents hold, as of a licence

    def add(self, hashes: Iterable[int], met: Container[int] | None = None) -> int:
        """Take in a document by the hashes of its lines and shingles; only what will be `met`, where that is known.

        Returns its number; that of the first of several that are equal, which is enough to know a copy by.
        """
        hashes, number, lines, shingles = tuple(hashes), len(self._allowed), [], []
        if (known := self._numbers.setdefault(hash(hashes), number)) < number:
            return known
        for each in dict.fromkeys(hashes):
            (lines if each >= 0 else shingles).append(each)
        for each in lines if met is None else (each for each in lines if each in met):
            self._documents.setdefault(each, []).append(number)
        self._allowed.append(math.ceil(NEAR_COPY * len(lines)) - 1)
        for some in as_picked(shingles):  # a short document is found in a long one, too
            for each in some if met is None else (each for each in some if each in met):
                self._shingles.setdefault(each, []).append(len(self._sets))
            self._sets.append((number, len(some)))
        return number

    def copies(self, hashes: Iterable[int]) -> tuple[set[int], Counter[int]]:
        """The documents that a text with these lines and shingles copies, with what was trained on before; and how many
        of their lines it adds to that.
        """
        new = (self._documents.keys() & hashes) - self._trained
        counts = Counter(number for line in new for number in self._documents[line])
        alike = self._alike(hashes)
        copied = {number for number, count in counts.items() if count > self._allowed[number]}
        copied |= {self._sets[some][0] for some, count in alike.items() if makes_copy(count, self._sets[some][1])}
        return copied, counts

    def _alike(self, hashes: Iterable[int]) -> Counter[int]:
        """How many of these shingles each set holds."""
        holders = (self._shingles[shingle] for shingle in self._shingles.keys() & hashes)
        return Counter(number for numbers in holders if self._are_few(numbers) for number in numbers)

    def _are_few(self, sets: list[int]) -> bool:
        """Whether these are the sets of few documents, which have up to three each."""
        return len(sets) <= FEW_HOLDERS or (
            len(sets) <= 3 * FEW_HOLDERS and len({self._sets[number][0] for number in sets}) <= FEW_HOLDERS
        )

    def _holds(self, hashes: Iterable[int]) -> bool:
        """Whether a text with these shingles is, for the most part, a piece of a held-out document."""
        if self._shingles.keys().isdisjoint(hashes):  # as of most
            return False
        own = as_picked({each for each in hashes if each < 0})[-1]
        alike = self._alike(set(own) - self.common)
        return makes_copy(max(alike.values(), default=0), len(own))

    def train(self, hashes: Iterable[int], always: bool = False) -> bool:
        """Note a document with these lines and shingles as trained on, and return True; unless a held-out one would be
        copied then, or a piece of one. `always` is for what cannot be left out: then that is noted in `copied`.
        """
        copied, counts = self.copies(hashes)
        if not always and (copied or self._holds(hashes)):
            return False
        for number, count in counts.items():
            self._allowed[number] -= count
        self._trained |= self._documents.keys() & hashes
        self.copied |= copied
        return True

    @property
    def trained(self) -> str:
        """A bit for each line, in hexadecimal digits: whether it stands in the training text."""
        return np.packbits([line in self._trained for line in self._documents]).tobytes().hex()

    @trained.setter
    def trained(self, digits: str) -> None:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
        self.train([line for line, bit in zip(self._documents, bits) if bit], always=True)
