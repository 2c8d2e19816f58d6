"""What the commands share: the notebook's definitions, where results go, silence, processes that train, and tables."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable

from machinery.notebook import NOTEBOOK, load_definitions, train_elsewhere

ROOT = NOTEBOOK.parent
RESULTS = ROOT / "results"
lm = load_definitions()


def quietly(function: Callable, *arguments, **options):
    """Call a function without what it prints; returns its result."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*arguments, **options)


def train_apart(config, threads: int) -> str:
    """Train `config` in a process with so many threads; returns the last line of its error, or nothing."""
    env = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), str(threads))
    process = train_elsewhere(config, env=env, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()  # and not `communicate`, which closes what it ends with
    process.wait()
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    return f"{lines[-1][:300]} (exit status {process.returncode})" if process.returncode else ""


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A Markdown table of `rows`: `columns` maps a key to the format of its values, such as ",.0f"."""
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], form) for key, form in columns.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
