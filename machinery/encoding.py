"""Documents as token ids: encoded by threads, in order, with what decides on which side of the split they fall."""

from __future__ import annotations

import contextlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tiktoken

from machinery.errors import DataError
from machinery.held_out import PIECE, look_at, smallest_line
from machinery.machine import usable_cores
from machinery.sources import Position
from machinery.text_files import in_parts
from machinery.tokenizers import ENDS_OF_TEXT, SPLIT_PATTERN

BREAK, MARK = "\x1d", "\x1a"  # between texts, and before some blanks of them
MARKED_PATTERN = SPLIT_PATTERN.replace(r"|\s+(?!\S)", "").replace("[^", f"[^{BREAK}{MARK}") + f"|[{BREAK}{MARK}]"
# Of each character, whether it is the regular expression's \s, Unicode's White_Space, or `BREAK`
IS_BLANK = np.array([chr(code).isspace() and chr(code) not in "\x1c\x1e\x1f" for code in range(0x3002)])
PIECE_DOCUMENTS = 1 << 12
AHEAD = 4 << 20  # characters that are encoded, or wait for it, while more is read


@dataclass(slots=True)
class Encoded:
    """A document as token ids, with what decides on its side."""

    side: str  # "train" or "val"; "" where its lines decide
    position: Position  # in the source, after it
    ids: list[np.ndarray]  # in pieces
    bytes: int
    lines: array  # hashes of its longer lines, and of its shingles (`look_at`)
    smallest: bytes  # of those: what stands for it
    ends_of_text: list[str]  # spelt in it


def encode_all(
    encoding: tiktoken.Encoding, documents: Iterable[tuple[str, str, Position]], dtype: np.dtype
) -> Iterator[Encoded]:
    """Encode (side, text, position), in order. Threads encode, outside Python's lock, while this one reads on and looks
    at what it read, which needs the lock.
    """
    encoder = Encoder(encoding, dtype)

    with ThreadPoolExecutor(usable_cores()) as pool:
        waiting: deque[tuple[list, list[Future], list, int]] = deque()
        for batch in _batches(documents):
            size = sum(len(text) for _, text, _ in batch)
            texts = [text for _, text, _ in batch]
            parts = ([part] for part in in_parts(texts[0], PIECE)) if len(batch) == 1 else [texts]
            futures, found = [], []
            for part in parts:
                futures.append(pool.submit(encoder.encode, part))
                found += look_at(part)
            waiting.append((batch, futures, found, size))
            del batch, texts, parts, part, futures, found  # a document may be large
            while sum(each[3] for each in waiting) > AHEAD or len(waiting) > 16:
                yield from _finish(*waiting.popleft()[:3])
        while waiting:
            yield from _finish(*waiting.popleft()[:3])


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


def _finish(batch: list[tuple[str, str, Position]], futures: list[Future], found: list) -> Iterator[Encoded]:
    ids = [ids for future in futures for ids in future.result()]
    parts = [([part], *of_text) for part, of_text in zip(ids, found)]
    if len(batch) == 1:  # one document from its parts, whose ids stay in pieces
        hashes = array("q", b"".join(hashes for _, hashes, _ in found))
        size, smallest = sum(size for size, *_ in found), smallest_line(line for *_, line in found)
        parts = [(ids, size, hashes, smallest)]
    futures.clear()
    found.clear()
    for (side, text, position), (ids, size, lines, smallest) in zip(batch, parts):
        ends = [found for pattern in ENDS_OF_TEXT for found in pattern.findall(text)]
        yield Encoded(side, position, ids, size, lines, smallest, ends)  # who takes the ids can free them


class Encoder:
    """An encoding for many texts at once, in which special tokens are text like any other.

    With `SPLIT_PATTERN`, more than half of the time would go into looking ahead, which leaves the last of several
    blanks to the word after it. So a mark is set before that blank, and a pattern without look-ahead stops there.
    Marks, and breaks between texts, are pieces of their own, whose ids are left out: the others are tiktoken's own.
    """

    def __init__(self, encoding: tiktoken.Encoding, dtype: np.dtype) -> None:
        names = {"mergeable_ranks": encoding._mergeable_ranks, "special_tokens": encoding._special_tokens}
        self.dtype, self.is_marked = dtype, encoding._pat_str == SPLIT_PATTERN
        pattern = MARKED_PATTERN if self.is_marked else encoding._pat_str
        self.own = tiktoken.Encoding(encoding.name, pat_str=pattern, **names)
        self.encoding = encoding if self.is_marked else self.own
        self.of_mark, self.of_break = (encoding._mergeable_ranks.get(sign.encode()) for sign in (MARK, BREAK))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text. Raises `DataError` where one is none."""
        joined = BREAK.join(texts)
        if self.is_marked and MARK not in joined and joined.count(BREAK) == len(texts) - 1:
            with contextlib.suppress(UnicodeEncodeError):
                ids = self.own.encode_to_numpy(_marked(joined), disallowed_special=())
                ids = ids[ids != self.of_mark].astype(self.dtype)
                ends = np.flatnonzero(ids == self.of_break).tolist()
                return [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)])]
        return [_encode_text(self.encoding, text).astype(self.dtype) for text in texts]


def _marked(text: str) -> str:
    """A text with a mark between a blank and another one, no line end, that something else follows."""
    code, dtype = ("ascii", np.uint8) if text.isascii() else ("utf-32-le", np.uint32)
    codes = np.frombuffer(text.encode(code), dtype)
    blank = IS_BLANK.take(codes, mode="clip")
    last = np.flatnonzero(blank[:-2] & blank[1:-1] & ~blank[2:]) + 1
    last = last[~np.isin(codes[last], [*b"\r\n", ord(BREAK)])]
    return np.insert(codes, last, ord(MARK)).tobytes().decode(code)


def _encode_text(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError as error:
        raise DataError(f"a document holds half of a surrogate pair at character {error.start}: not text") from None
    except ValueError:  # the pattern gives up on very long runs of blanks
        if len(text) < 2:
            raise
        half = len(text) // 2
        return np.concatenate([_encode_text(encoding, text[:half]), _encode_text(encoding, text[half:])])
