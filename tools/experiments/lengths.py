"""Beyond the trained length: what each kind of position predicts where it has never been.

Rotary and no position can be computed anywhere; an absolute table needs rows, which `n_position` provides and which
training on shorter sequences leaves as they began. Kazemnejad et al. 2023, arXiv 2305.19466.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from data_utils import prepare_data
from machinery.machine import Machine
from machinery.saved_run import SavedRun
from tools.common import lm
from tools.common import table as markdown
from tools.experiments import choices
from tools.experiments.tool import COLOURS, MARKERS, places, sweep
from tools.scores.scoring import loss_by_position

TITLE = "Beyond the trained length"
SCALES = choices.SCALES
TIMES = 4  # the longest sequence, in trained lengths
BINS = 32  # stretches of it


def measure(scale: dict, **options) -> pd.DataFrame:
    """A row per stretch of the sequence: position, seed, trained length, at (token), loss."""
    length, all_choices = scale["common"]["block_size"] * TIMES, choices.variants(scale)
    kinds = {name: all_choices[f"mha, {name}, gated"] for name in ("rope", "absolute", "none")}
    kinds["absolute"] |= {"n_position": length}
    table = sweep(kinds, seeds=scale["seeds"], **(scale["common"] | options))
    rows = []
    for run in table[table.status == "finished"].itertuples():
        losses = measure_length(run.run, length, **places(options))
        for at, loss in zip(np.linspace(0, length, BINS, endpoint=False), losses.view(BINS, -1).mean(1).tolist()):
            middle = at + length / BINS / 2
            row = {"position": run.label, "seed": run.seed, "trained": length // TIMES, "at": middle, "loss": loss}
            rows.append(row)
    return pd.DataFrame(rows)


def measure_length(folder: str | Path, length: int, windows: int = 64, **where) -> torch.Tensor:
    """Mean held-out loss (length,) at each token of windows of `length`, of a run that may have seen shorter ones.

    `where` as for `measure_run`.
    """
    saved = SavedRun(folder)
    trained = saved.settings(lm.Config)
    positions = max(length, trained.n_position)
    config = replace(trained, block_size=length, batch_tokens=length, micro_batch=1, n_position=positions, **where)
    machine = Machine.find(config.device, config.dtype)
    model = saved.model(lambda: lm.build_model(config), machine.device)
    return loss_by_position(model, prepare_data(config), machine, windows * length)


def draw(table: pd.DataFrame) -> plt.Figure:
    """Loss by place in the sequence; the trained length is marked."""
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for number, (name, rows) in enumerate(table.groupby("position", sort=False)):
        ends = rows.groupby("at").loss.agg(["mean", "std"])
        ax.plot(ends.index, ends["mean"], MARKERS[number] + "-", color=COLOURS[number], markersize=4, label=name)
        low, high = ends["mean"] - ends["std"], ends["mean"] + ends["std"]
        ax.fill_between(ends.index, low, high, color=COLOURS[number], alpha=0.2)
    ax.axvline(table.trained.iloc[0], color="gray", linestyle="--", label="trained length")
    ax.set(xlabel="token of the sequence", ylabel="held-out loss (nats per token)", title=TITLE)
    ax.legend(fontsize=8)
    return figure


def say(table: pd.DataFrame) -> str:
    """A row per kind of position: its loss, and how much higher it is beyond the trained length."""
    trained, rows, rise = table.trained.iloc[0], [], {}
    inside, second, last = "trained length, second half (nats)", f"second {trained} tokens", f"last {trained} tokens"
    for name, runs in table.groupby("position", sort=False):
        near = runs[runs["at"].between(trained / 2, trained)].groupby("seed").loss.mean()
        beyond = {
            second: runs[runs["at"].between(trained, 2 * trained)].groupby("seed").loss.mean() - near,
            last: runs[runs["at"] > (TIMES - 1) * trained].groupby("seed").loss.mean() - near,
        }
        spread = {key: f"{losses.mean():+.3f} ± {losses.std():.3f}" for key, losses in beyond.items()}
        rows.append({"position": name, inside: near.mean()} | spread)
        rise[name] = beyond[last].mean()
    least, most = min(rise, key=rise.get), max(rise, key=rise.get)
    return (
        f"{markdown(rows, {'position': '', inside: '.3f', second: '', last: ''})}\n\n"
        f"Beyond the trained {trained} tokens, the loss rises least with {least} ({rise[least]:+.3f} nats in the last"
        f" {trained} of {TIMES * trained}) and most with {most} ({rise[most]:+.3f})."
    )
