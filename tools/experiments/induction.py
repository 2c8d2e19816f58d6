"""The phase change: do induction heads, in-context learning and a bump in the loss come together?

Olsson et al. 2022, In-context Learning and Induction Heads, transformer-circuits.pub. An induction head finds the
earlier occurrence of the present token and reads what followed it.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data_utils import prepare_data
from machinery.checkpoints import checkpoint_folders, load_checkpoint
from machinery.files import read_json
from machinery.machine import Machine
from model_utils import attention_maps
from tools.common import lm
from tools.common import table as markdown
from tools.experiments.scales import CPU, GPU
from tools.experiments.tool import COLOURS, places, plot_sweep, sweep
from tools.scores.scoring import held_out_losses

TITLE = "The phase change"
VARIANTS = {
    "mha, rope": {"attention": "mha", "position": "rope"},
    "gqa, rope": {"attention": "gqa", "position": "rope"},
    "mha, none": {"attention": "mha", "position": "none"},
    "gqa, none": {"attention": "gqa", "position": "none"},
    "one layer": {"attention": "mha", "position": "rope", "n_layer": 1},  # which cannot form them: the control
}
SCALES = {
    "cpu": {
        "variants": VARIANTS,
        "seeds": (0, 1, 2),
        "common": CPU | {
            "n_layer": 4, "n_embd": 64, "n_head": 2, "n_kv_head": 1, "n_ffn": 32, "block_size": 512, "micro_batch": 2,
            "embedding_lr": 0.004, "head_lr": 0.004,  # at 0.015 and more, heads form in fewer runs
            "schedule": "constant", "max_steps": 4500, "checkpoint_every": 90, "keep_checkpoints": 10**6,
        },
    },
    "gpu": {
        "variants": VARIANTS,
        "seeds": (0, 1, 2),
        "common": GPU | {
            "n_layer": 4, "n_embd": 512, "n_head": 8, "n_kv_head": 4, "n_ffn": 256, "schedule": "constant",
            "max_steps": 4000, "checkpoint_every": 50, "keep_checkpoints": 10**6,
        },
    },
}  # fmt: skip
FORMED = 0.05  # prefix matching from which a head counts as one for induction; even attention gives 0.003 here


def prefix_matching(maps: Tensor, period: int) -> Tensor:
    """Of attention (..., T, T) on tokens that repeat after `period`, the part (...) that induction explains, 0 to 1.

    The mean weight, over tokens t that occurred before, on the token after the earlier occurrence: t - period + 1.
    """
    diagonal = maps.diagonal(offset=1 - period, dim1=-2, dim2=-1)  # element k: row k + period - 1, column k
    return diagonal[..., 1:].mean(-1)  # from row `period`, the first repeated token


def in_context_score(losses: Tensor) -> float:
    """Loss late in the context minus early, in nats per token, of losses (B, T): below 0 where context helps.

    Olsson et al. compare token 500 with token 50 of 512; here, for less noise, the tokens from 85% to 100% of the
    context with those from 5% to 15%.
    """
    T = losses.size(-1)
    early, late = losses[..., T // 20 : T * 3 // 20], losses[..., T * 17 // 20 :]
    return (late.mean() - early.mean()).item()


def repeated_tokens(vocab_size: int, block_size: int, sequences: int) -> Tensor:
    """Random tokens (sequences, block_size) whose second half repeats the first: nothing but induction predicts it."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (sequences, block_size // 2), generator=generator).repeat(1, 2)


def measure_run(folder: str | Path, sequences: int = 8, windows: int = 128, **where) -> pd.DataFrame:
    """A row per checkpoint: step, tokens, held-out loss, in-context score, prefix matching of the best and every head.

    `where` are fields that a run directory does not keep: data_dir, and a source by its absolute path. The table stays
    in the run's folder as induction.csv; all checkpoints but the newest are then removed.
    """
    folder = Path(folder)
    if (folder / "induction.csv").exists():
        return pd.read_csv(folder / "induction.csv")
    config = replace(lm.Config.from_dict(read_json(folder / "config.json")), **where)
    machine = Machine.find(config.device, config.dtype)
    model, data = lm.build_model(config).to(machine.device), prepare_data(config)
    repeated = repeated_tokens(data.encoding.eot_token, config.block_size, sequences).to(machine.device)
    rows = []
    for checkpoint in checkpoint_folders(folder):
        state = load_checkpoint(checkpoint, model)
        losses = held_out_losses(model, data, machine, windows * config.block_size)
        scores = torch.stack([prefix_matching(attention_maps(model, row), len(row) // 2) for row in repeated]).mean(0)
        heads = {f"layer {n}, head {h}": s for n, layer in enumerate(scores.tolist()) for h, s in enumerate(layer)}
        row = {"step": state["step"], "tokens": state["tokens"], "loss": losses.mean().item()}
        rows.append(row | {"in_context": in_context_score(losses), "prefix": scores.max().item()} | heads)
    table = pd.DataFrame(rows)
    table.to_csv(folder / "induction.csv", index=False, float_format="%.5g")
    for checkpoint in checkpoint_folders(folder)[:-1]:
        shutil.rmtree(checkpoint)
    return table


def measure(scale: dict, **options) -> pd.DataFrame:
    """A row per checkpoint of each run."""
    measured = partial(measure_run, **places(options))  # after each run: all their checkpoints are 105 GB on a GPU
    table = sweep(scale["variants"], seeds=scale["seeds"], then=measured, **(scale["common"] | options))
    finished = table[table.status == "finished"].itertuples()
    return pd.concat([measured(run.run).assign(label=run.label, seed=run.seed) for run in finished], ignore_index=True)


def bump(tokens: pd.Series | np.ndarray, loss: pd.Series | np.ndarray) -> tuple[float, float]:
    """How far (nats) a loss curve rises above its lower convex hull, and where (tokens).

    A loss that only flattens is its own hull. Where it falls, rests and falls again, as at the phase change of Olsson
    et al., it stands above it. The curve is smoothed by a running median of five points.
    """
    loss = pd.Series(np.asarray(loss, dtype=float)).rolling(5, center=True, min_periods=1).median().to_numpy()
    tokens, hull = np.asarray(tokens, dtype=float), []
    for i in range(len(tokens)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (loss[b] - loss[a]) * (tokens[i] - tokens[a]) < (loss[i] - loss[a]) * (tokens[b] - tokens[a]):
                break
            hull.pop()
        hull.append(i)
    above = loss - np.interp(tokens, tokens[hull], loss[hull])
    return float(above.max()), float(tokens[above.argmax()])


def halfway(tokens: pd.Series, score: pd.Series) -> float:
    """Tokens at which a score is half of the way from its median in the first quarter to its mean in the last tenth.

    The score is smoothed by a running median of five points, and it is the last crossing that counts.
    """
    smooth = score.rolling(5, center=True, min_periods=1).median()
    begin, end = score.iloc[: len(score) // 4].median(), score.iloc[-max(1, len(score) // 10) :].mean()
    before = (smooth - begin) / (end - begin) < 0.5
    return float(tokens[before].max())


def events(table: pd.DataFrame) -> pd.DataFrame:
    """A row per run: final scores, when (in tokens) head and in-context score were half way, and the bump.

    The bump is looked for after the first quarter: the fast fall of the beginning is not smooth either.
    """
    rows = []
    for (label, seed), run in table.groupby(["label", "seed"], sort=False):
        tenth = max(1, len(run) // 10)
        prefix, context = run.prefix.iloc[-tenth:].mean(), run.in_context.iloc[-tenth:].mean()
        height, place = bump(run.tokens[len(run) // 4 :], run.loss[len(run) // 4 :])
        row = {"label": label, "seed": seed, "prefix": prefix, "in_context": context, "bump": height, "bump_at": place}
        formed = prefix > FORMED
        row["prefix_at"] = halfway(run.tokens, run.prefix) if formed else math.nan
        row["in_context_at"] = halfway(run.tokens, run.in_context) if formed else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> plt.Figure:
    """Loss, in-context score and prefix matching against tokens, for each variant; dots mark the half-way points."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharex=True)
    found = events(table)
    names = {"loss": "held-out loss (nats per token)", "in_context": "in-context score (nats per token)"}
    names["prefix"] = "prefix matching of the best head"
    for ax, (column, name) in zip(axes, names.items()):
        plot_sweep(table.assign(tokens=table.tokens / 1e6), x="tokens", y=column, ax=ax)
        ax.set(xlabel="training tokens (millions)", ylabel=name)
        for number, (_, runs) in enumerate(found.groupby("label", sort=False)):
            for at in runs.prefix_at.dropna():
                ax.axvline(at / 1e6, color=COLOURS[number], linestyle=":", linewidth=1)
    axes[0].set(title="Loss", ylim=(None, table.loss.quantile(0.95)))
    axes[1].set(title="Late in the context minus early")
    axes[2].set(title="Attention to what followed the last time")
    return figure


def say(table: pd.DataFrame) -> str:
    """A row per variant, and whether heads, in-context score and bump come together."""
    found, rows = events(table), []
    formed, control = found[found.prefix_at.notna()], found[found.prefix_at.isna()]
    limit = 1.5 * (control.bump.max() if len(control) else 0.0)  # a bump is clear above what other runs have by chance
    bump = f"bumps above {limit:.3f} nats"
    for label, runs in found.groupby("label", sort=False):
        having = runs[runs.prefix_at.notna()]
        row = {"variant": label, "prefix matching of the best head": _spread(runs.prefix, ".2f")}
        row |= {"in-context score (nats)": _spread(runs.in_context, ".2f"), "bump (nats)": _spread(runs.bump, ".3f")}
        row |= {"runs with heads": f"{len(having)} of {len(runs)}", bump: (having.bump > limit).sum()}
        row["heads half formed at (M tokens)"] = _spread(having.prefix_at / 1e6, ".2f") if len(having) else None
        rows.append(row)
    shown, span = markdown(rows, dict.fromkeys(rows[0], "")), table.tokens.max() / 1e6
    formed_in = f"Induction heads (prefix matching above {FORMED}) formed in {len(formed)} of {len(found)} runs"
    if len(formed) < 2:
        return f"{shown}\n\n{formed_in}, too few to see what comes with them: **the phase change was not seen here.**"
    gap, clear = (formed.in_context_at - formed.prefix_at) / 1e6, formed[formed.bump > limit]
    away = (clear.bump_at - clear.prefix_at).abs() / 1e6
    together = gap.abs().max() < span / 5 and len(clear) == len(formed) and away.max() < span / 5
    how = "together" if together else "together in no run" if clear.empty else "together in some runs only"
    return (
        f"{shown}\n\n{formed_in}. There, the in-context score was half way {abs(gap.mean()):.2f} ± {gap.std():.2f}M"
        f" tokens {'later' if gap.mean() > 0 else 'earlier'} (of {span:.1f}M), and {len(clear)} runs have a clear bump:"
        f" **head, score and bump come {how} here.**"
    )


def _spread(values: pd.Series, form: str) -> str:
    return f"{values.mean():{form}}" + (f" ± {values.std():{form}}" if len(values) > 1 else "")
