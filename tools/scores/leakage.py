"""How much of the held-out text stands in the training text, and what the model makes of such documents."""

from __future__ import annotations

from torch import nn

from data_utils import TokenData
from machinery.held_out import long_lines
from machinery.machine import Machine
from tools.scores.questions import held_out_documents
from tools.scores.scoring import packed_bits, score_documents

EDGES = (0.0, 0.05, 0.25, 0.5, 1.0)  # of overlap, from the first to the next
MOST_BYTES = 256 << 20  # of training text that is looked at


def overlaps(data: TokenData, texts: list[str]) -> list[float]:
    """Of each text, the share of its longer lines that stand in the training text (0 to 1)."""
    lines = [set(long_lines(text.encode())) for text in texts]
    wanted, found, looked_at = set().union(*lines), set(), 0
    for ids in data.documents("train"):
        content = data.encoding.decode_bytes(ids.tolist())
        found.update(wanted.intersection(long_lines(content)))
        looked_at += len(content)
        if looked_at > MOST_BYTES:
            break
    return [len(some & found) / len(some) for some in lines]


def bits_by_overlap(model: nn.Module, data: TokenData, machine: Machine, tokens: int) -> list[dict]:
    """Rows of "overlap", "documents", "bytes", "bits_per_byte" and, packed, "xz", for held-out documents of about so
    many tokens.
    """
    texts = held_out_documents(data, tokens)
    rows, shares = [], overlaps(data, texts)
    for low, high in zip(EDGES, EDGES[1:]):
        some = [text for text, share in zip(texts, shares) if low <= share < high or share == high == 1]
        if some:
            scores = score_documents(model, data.encoding, some, data.block_size, machine)
            whole = "".join(some).encode()
            row = {"overlap": f"{low:.0%} to {high:.0%}", "documents": len(some), "bytes": len(whole)}
            rows.append(row | {"xz": packed_bits(whole) / len(whole), **scores})
    return rows
