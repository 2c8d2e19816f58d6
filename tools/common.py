"""What the commands share: the notebook's definitions, where results go, silence, and tables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from machinery.notebook import NOTEBOOK, load_definitions

ROOT = NOTEBOOK.parent
RESULTS = ROOT / "results"
lm = load_definitions()


def quietly(function: Callable, *arguments, **options):
    """Call a function without what it prints; returns its result."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*arguments, **options)


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A Markdown table of `rows`: `columns` maps a key to the format of its values, such as ",.0f"."""
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], form) for key, form in columns.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
