"""The findings by name, and the answer to one from its table in results/experiments/."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from tools.common import RESULTS
from tools.experiments import choices, frontier, induction, lengths, shape

FINDINGS = {"induction": induction, "shape": shape, "frontier": frontier, "choices": choices, "lengths": lengths}


def answer(name: str, folder: Path = RESULTS / "experiments") -> list[plt.Figure | str]:
    """The figure of a finding, and its table and conclusion in Markdown; or a line on how to measure it."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return [f"Not measured here: there is no results/{folder.name}/{path.name}. `make experiments` writes it."]
    table = pd.read_csv(path)
    return [FINDINGS[name].draw(table), FINDINGS[name].say(table)]
