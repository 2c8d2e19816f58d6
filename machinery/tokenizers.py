"""Tokenizers as they are kept: every one is a `tiktoken.Encoding` with an end-of-text token.

One code path encodes and decodes them all, whether it was published, learned here, or is plain bytes.
"""

from __future__ import annotations

import binascii
import itertools
import re
from collections.abc import Iterable
from functools import lru_cache

import regex
import tiktoken
import torch

from machinery.errors import DataError, told
from machinery.files import json_digest

END_OF_TEXT = "<|endoftext|>"
_END = (  # a word of it, as others spell it
    r"(?:end(?:[_▁ -]?of[_▁ -]?[a-z]{3,10})?(?:_token)?|(?:doc(?:ument)?|text|turn|story)_?end"
    r"|eo[dfmst](?:_id|_token)?|(?:(?:file|doc)_?)?sep(?:arator)?)"
)
ENDS_OF_TEXT = (  # each begins with one character, which `re` finds 8 times as fast as one of two
    re.compile(rf"(?i)<(?:[|｜] ?(?:{_END}|im_end|return|stop) ?[|｜]|{_END}|/(?:s|doc(?:ument)?|story))>"),
    re.compile(r"(?i)\[(?:(?-i:END|SEP)|eo[dfmst]|end_of_[a-z]{3,10})\]"),  # x[end] stands in programs
)
BYTES_PATTERN = r"[\s\S]{1,64}"  # of "bytes", where nothing merges: so that no piece is long
# How text is cut into pieces before byte pairs merge: the pattern of GPT-4 and Llama 3, which keeps
# words, runs of digits and runs of spaces apart (tiktoken: openai_public.py, cl100k_base).
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROBE = "Größe 1234 🙂\r\n\tdef f(x):  # it's\x00\n"  # text with something of everything


def tokenizer_to_dict(encoding: tiktoken.Encoding) -> dict:
    """Everything `tokenizer_from_dict` needs, as JSON values; a token's id is its place in `tokens`."""
    tokens = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    return {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "tokens": [binascii.b2a_base64(token, newline=False).decode() for token in tokens],
    }


class CarefulEncoding(tiktoken.Encoding):
    """An encoding whose pattern may come from anyone: a text that it fails on is a `DataError`.

    tiktoken's own `encode_ordinary` gives the same ids, but panics there: no `Exception`, and printed by Rust before.
    """

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text, in which special tokens are text like any other."""
        if not isinstance(text, str):
            raise DataError(f"{text!r:.60} ({type(text).__name__}) is no text to encode; give a string")
        with told(f"tokenizer {self.name!r}", DataError, "its pattern fails on this text", "use another tokenizer"):
            return self.encode(text, disallowed_special=())


def tokenizer_from_dict(
    fields: dict, where: object = "tokenizer.json", advice: str = "use another tokenizer"
) -> tiktoken.Encoding:
    """The encoding that `tokenizer_to_dict` described.

    Raises `DataError` for what cannot encode every text, with the path `where` it was read and what to do about it.
    """
    with told(where, DataError, "not usable", advice):
        ranks = {binascii.a2b_base64(token, strict_mode=True): rank for rank, token in enumerate(fields["tokens"])}
        special = fields["special_tokens"]
        if len(ranks) != len(fields["tokens"]) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("it does not hold every byte exactly once")
        if END_OF_TEXT not in special or not all(len(ranks) <= number < 1 << 24 for number in special.values()):
            raise ValueError(f"{END_OF_TEXT} or another special token has no number of its own")
        if regex.compile(fields["pattern"]).fullmatch(""):
            raise ValueError("its pattern matches nothing at all")
        encoding = CarefulEncoding(
            str(fields["name"]), pat_str=fields["pattern"], mergeable_ranks=ranks, special_tokens=special
        )
        if encoding.decode_bytes(encoding.encode_ordinary(PROBE)) != PROBE.encode():
            raise ValueError("its pattern leaves text out")
    return encoding


def tokenizer_hash(encoding: tiktoken.Encoding) -> str:
    """Names a tokenizer by what it does: equal for encodings that give the same ids."""
    return json_digest(tokenizer_to_dict(encoding))


@lru_cache(maxsize=2)
def token_byte_counts(encoding: tiktoken.Encoding) -> torch.Tensor:
    """(n_vocab,) int64: how many UTF-8 bytes each token stands for; 0 for special and unused ids."""
    counts, ranks = torch.zeros(encoding.n_vocab, dtype=torch.int64), encoding._mergeable_ranks
    counts[list(ranks.values())] = torch.tensor([*map(len, ranks)])
    return counts


def decode_text(encoding: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """The text of ids up to the first end-of-text, without ids that stand for no text (untrained models draw them)."""
    before_end = itertools.takewhile(lambda token: token != encoding.eot_token, ids)
    return encoding.decode([token for token in before_end if token < len(encoding._mergeable_ranks)])
