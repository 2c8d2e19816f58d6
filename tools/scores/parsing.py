"""Does what a model writes parse? Functions of held-out Python files, begun, and what Python's own parser says."""

from __future__ import annotations

import ast
import re
import warnings

import numpy as np

from data_utils import TokenData


def held_out_functions(data: TokenData, count: int, length: int) -> np.ndarray:
    """(up to count, length) int64: the first tokens of functions and classes in the held-out Python files.

    One of each file at most, at its first top-level `def` or `class` with so much text; none for other text.
    """
    source = data.settings["val_source"] or data.settings["source"]
    if not (source in ("python", "python+site") or source.endswith(".py")):
        return np.empty((0, length), dtype=np.int64)
    rows = []
    for document in data.documents("val"):
        text = data.encoding.decode_bytes(document.tolist()).decode("utf-8")
        starts = (match.start() for match in re.finditer(r"^(def|class) \w", text, re.MULTILINE))
        for start in starts:
            ids = data.encoding.encode_ordinary(text[start : start + 16 * length])[:length]
            if len(ids) == length:
                rows.append(ids)
                break
        if len(rows) == count:
            break
    return np.array(rows, dtype=np.int64).reshape(-1, length)


def parses(prompt: str, completion: str) -> bool:
    """Whether `ast.parse` accepts the prompt with the first lines of the completion, half of them or more.

    A completion stops at its last token, mostly within a statement, so lines may be missing at its end.
    """
    lines = completion.splitlines(keepends=True)
    for kept in range(len(lines), (len(lines) - 1) // 2, -1):
        try:
            with warnings.catch_warnings(action="ignore"):  # of odd escapes in strings
                ast.parse(prompt + "".join(lines[:kept]))
            return True
        except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: nested too deeply
            continue
    return False
