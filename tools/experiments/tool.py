"""A question to the machine in a few lines: overrides in, runs in processes of their own, one table and one figure out.

    from tools.experiments import compare_sweep, plot_sweep, sweep

    table = sweep({"wide": {"n_layer": 1}, "deep": {"n_layer": 4}}, seeds=range(5), preset="smoke", max_steps=200)
    compare_sweep(table)
    plot_sweep(table)

A table is a pandas DataFrame with a row per run: `table.to_csv("answer.csv")` keeps it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from tqdm import tqdm

from machinery.budget import settle_batch
from machinery.errors import UserError, told
from machinery.files import folder_path, free_bytes, json_digest, read_jsonl, read_note, sha256
from machinery.machine import Machine, usable_cores
from machinery.notebook import defining_cells, load_definitions
from machinery.preparation import open_sources, tokenizer_digest
from machinery.settings import one_of
from model_utils import count_parameters, flops_per_token, predict
from tools.common import train_apart
from tools.runs import paired_effect, verdict

# What a run of a sweep does without, unless it is asked for
PLAIN = {"sample_every": 10**9, "sample_tokens": 1, "compile": False, "keep_checkpoints": 1}
# Fields that say where and how a run is kept, and nothing about what it learns
KEEPING = ("run_name", "runs_dir", "data_dir", "resume", "wandb")
COLOURS = plt.style.library["petroff10"]["axes.prop_cycle"].by_key()["color"]  # the notebook's
MARKERS = "os^DvPX*"


def sweep(
    variants: dict[str, dict],
    seeds: Iterable[int] = (0,),
    preset="smoke",
    jobs: int = 0,
    threads=1,
    then: Callable[[Path], object] | None = None,
    **common,
) -> pd.DataFrame:
    """Train every variant with every seed, `jobs` at a time, each run in a process with `threads` threads.

    `variants` maps a label to its overrides of `preset`, `common` are overrides of all. Returns a row per run: label,
    seed, what the variants override, what the run's summary holds, FLOPs, and the run's folder. A run that is finished
    on disk is not made again, and one that was cut off goes on; a change of the notebook's definitions, of the text, or
    of the weights of a folder `init_from`, makes a new one.
    A run that fails is a row with its `error`, and the others go on. `then` is called with the folder of each run that
    is finished, before more are begun. `jobs` is, unless given, the number of cores over `threads`; on a GPU no more
    than its memory and the disk hold. Raises UserError for a configuration that cannot work, before any training.
    """
    seeds = _check_arguments(variants, seeds, jobs, threads)
    if not (then is None or callable(then)):
        raise UserError(f"then is {then!r:.80}; give a function of the folder of a run")
    lm, source = load_definitions(), "\n".join(source for _, source in defining_cells())
    runs = []
    for label, values in variants.items():
        if given := {"seed", "run_name"} & (common.keys() | values.keys()):
            raise UserError(f"{min(given)} of {label!r} would not count: seeds=(…) gives seeds, a sweep names")
        text = None  # of all seeds
        for seed in seeds:
            config = lm.Config.from_preset(preset, **(PLAIN | common | values | {"seed": seed, "run_name": ""}))
            own = replace(config, resume="never")  # takes no batch of a run that has the preset's name
            own = settle_batch(own, Machine.find(config.device, config.dtype))
            text = text or _text(own)
            config = _named(replace(own, resume=config.resume), [source, *text])
            with torch.device("meta"):  # an unknown variant, and what the model holds
                runs.append((label, config, lm.build_model(config)))
    jobs = jobs or max(1, usable_cores() // threads)
    for _, config, model in runs:
        machine = Machine.find(config.device, config.dtype)
        if machine.device.type == "cuda":
            jobs = min(jobs, runs_that_fit(config, model, lm.build_optimizers(model, config, machine), machine))
    different = {config.run_name: config for _, config, _ in runs}  # two labels may mean the same run
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(different), unit="run", file=sys.stdout) as bar:

        def finish(config) -> str:
            error = "" if _is_finished(config) else train_apart(config, threads)
            if not error and not _is_finished(config):
                error = "it did not finish; see its folder"
            if then and not error:
                then(Path(config.runs_dir) / config.run_name)
            bar.update()
            return error

        errors = dict(zip(different, pool.map(finish, different.values())))
    rows = [_row(label, variants, config, model, errors[config.run_name]) for label, config, model in runs]
    for row in rows:
        if row["error"]:
            print(f"{row['label']}, seed {row['seed']} {row['status']}: {row['error']}")
    return pd.DataFrame(rows)


def _check_arguments(
    variants: dict, seeds: Iterable[int] = (0,), jobs: int = 0, threads: int = 1, parameters: int = 0
) -> list[int]:
    """The seeds as a list. Raises `UserError` for arguments of `sweep` or `equal_size` that are of another kind."""
    pairs = variants.items() if isinstance(variants, dict) else ()
    if not pairs or not all(
        isinstance(label, str) and isinstance(values, dict) and all(isinstance(name, str) for name in values)
        for label, values in pairs
    ):
        raise UserError(f"variants are {variants!r:.80}; map labels to overrides, such as {{'deep': {{'n_layer': 4}}}}")
    listed = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else []
    if not listed or any(seed in listed[:place] for place, seed in enumerate(listed)):
        raise UserError(f"seeds are {listed or seeds!r:.80}; give numbers, each once, such as (0, 1, 2) or range(3)")
    for name, value, least in (("jobs", jobs, 0), ("threads", threads, 1), ("parameters", parameters, 0)):
        if type(value) is not int or value < least:
            raise UserError(f"{name} is {value!r:.80}; give a whole number, {least} or more")
    return listed


def _check_table(table: pd.DataFrame, numbers: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise `UserError` unless a table has these columns, those of `numbers` holding such, or nothing."""
    if not isinstance(table, pd.DataFrame):
        raise UserError(f"the table is {table!r:.80}; give what sweep or curves returned")
    for name in (*others, *numbers):
        if name not in table:
            known = ", ".join(map(str, table.columns)) or "none, as when no run has finished"
            raise UserError(f"the table has no column {name!r}; its columns are {known}")
    for name in numbers:
        if not pd.api.types.is_numeric_dtype(table[name]) and table[name].notna().any():
            raise UserError(f"column {name!r} of the table holds no numbers")


def runs_that_fit(config, model: torch.nn.Module, optimizers: list, machine: Machine) -> int:
    """How many such runs the memory of the GPU and half of the free disk hold at a time, at least 1."""
    needed = predict(model, optimizers, config, machine, 1.0)
    memory = 1e9 * needed["peak memory (GB)"] + 1e9  # a process has CUDA's own beside its tensors
    most = config.max_steps // config.checkpoint_every if config.max_steps else config.keep_checkpoints
    kept = 1 + min(config.keep_checkpoints, most)
    disk = 1e9 * kept * needed["checkpoint (GB)"]
    return max(1, int(min(0.8 * machine.free_memory() / memory, 0.5 * free_bytes(config.runs_dir) / disk)))


def equal_size(
    variants: dict[str, dict], parameters: int = 0, preset="smoke", counted="non_embedding", **common
) -> dict[str, dict]:
    """The variants, each with the `n_ffn` that gives it as many parameters as the first has, or `parameters`.

    `counted` is "non_embedding", those outside the embedding and the head, or "parameters", all of them: then a smaller
    vocabulary comes with a wider feed-forward. Raises UserError where the rest of a variant takes more.
    """
    _check_arguments(variants, parameters=parameters)
    if counted not in COUNTS:
        raise UserError(f"counted is {counted!r}; use {' or '.join(map(repr, COUNTS))}")
    lm, sized = load_definitions(), {}

    def count(values: dict) -> int:
        with torch.device("meta"):
            return COUNTS[counted](lm.build_model(lm.Config.from_preset(preset, **(common | values))))

    for label, values in variants.items():
        first, second = count(values | {"n_ffn": 1}), count(values | {"n_ffn": 2})
        if first == second:
            raise UserError(f"{label!r} has as many parameters whatever n_ffn is; size it by n_embd or n_layer")
        parameters = parameters or count(values)
        n_ffn = 1 + round((parameters - first) / (second - first))
        if n_ffn < 1:
            raise UserError(
                f"{label!r} has {first:,} parameters with the smallest feed-forward, more than {parameters:,};"
                " give it a smaller n_embd or n_layer"
            )
        sized[label] = values | {"n_ffn": n_ffn}
        with told(repr(label)):
            lm.Config.from_preset(preset, **(common | sized[label]))
    return sized


def non_embedding(model: torch.nn.Module) -> int:
    """Parameters outside the embedding and the head: of blocks, norms and positions."""
    counts = count_parameters(model)
    return counts["total"] - counts["embedding"] - counts["head"]


COUNTS = {"non_embedding": non_embedding, "parameters": lambda model: count_parameters(model)["total"]}


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """The logged steps of the runs of a table, a row each: label, seed, step, tokens, flops, train_loss, val_loss, …"""
    _check_table(table, ("flops", "tokens"), ("label", "seed", "status", "run"))
    parts = []
    for run in table[table.status == "finished"].itertuples():
        steps = pd.DataFrame(read_jsonl(Path(run.run) / "metrics.jsonl"))
        if steps.empty:
            raise UserError(f"{run.run} has no steps in metrics.jsonl: was it moved? Bring it back, or sweep again")
        steps["flops"] = steps.tokens * (run.flops / run.tokens)
        parts.append(steps.assign(label=run.label, seed=run.seed))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def compare_sweep(table: pd.DataFrame, y: str = "val_bpb", against: str | None = None) -> pd.DataFrame:
    """What each label gains over the first, or over `against`, lower being better: a row with the mean difference of
    runs of one seed, which read the same batches, its standard error, the number of such pairs, and whether it is more
    than two errors.
    """
    _check_table(table, (y,), ("label", "seed", "status"))
    finished = table[table.status == "finished"]
    for label, seed in finished.loc[finished.duplicated(["label", "seed"]), ["label", "seed"]].itertuples(index=False):
        raise UserError(f"{label!r} has two runs of seed {seed}; give runs of two sweeps labels of their own")
    runs = [Path(run) for run in finished.get("run", [])]
    if len({read_note(run / "data.json").get("held_out_bytes") for run in runs}) > 1:
        print(f"scored on other held-out text, so {y} does not compare")
    elif y == "val_loss" and len({json_digest(read_note(run / "tokenizer.json")) for run in runs}) > 1:
        print("val_loss is of a token, and their tokenizers differ: compare val_bpb")
    finished = finished.groupby("label", sort=False)
    losses = {label: runs.set_index("seed")[y].to_dict() for label, runs in finished}
    if against is not None:
        one_of("against", against, list(losses))
    rows, first = [], next(iter(losses), None) if against is None else against
    for label in [label for label in losses if label != first and losses[label].keys() & losses[first].keys()]:
        effect, error, pairs = paired_effect(losses[label], losses[first])
        row = {"label": label, "against": first, f"difference in {y}": effect, "standard error": error, "pairs": pairs}
        few = {2: "two", 3: "three", 4: "four"}.get(pairs)  # by chance, in 30, 18 or 14% of cases
        hint = f", a hint: {few} pairs" if few else ""
        rows.append(row | {"verdict": verdict(effect, error) + hint})
    return pd.DataFrame(rows)


def plot_sweep(table: pd.DataFrame, y="val_bpb", x="tokens", ax=None, **style) -> plt.Figure:
    """Mean over seeds for each label, with one standard deviation either way: points, or lines where x has many values;
    where it has one, the labels stand side by side.

    Takes what `sweep` or `curves` returns. Axes are named after the columns. Returns the figure.
    """
    _check_table(table, (x, y), ("label", "seed"))
    ax = ax or plt.subplots(figsize=(6, 3.6), layout="constrained")[1]
    table = table.dropna(subset=[y])
    at_one_place = table[x].nunique() == 1
    for number, (label, rows) in enumerate(table.groupby("label", sort=False)):
        look = {"color": COLOURS[number % len(COLOURS)], "label": label} | style
        marker = MARKERS[number % len(MARKERS)]
        if rows.groupby("seed")[x].nunique().max() == 1:
            place = label if at_one_place else rows[x].mean()
            ax.errorbar(place, rows[y].mean(), rows[y].std(), fmt=marker, capsize=3, **look)
            continue
        points = rows.groupby(x)[y].agg(["mean", "std"]).reset_index()
        few = len(points) <= 30
        ax.plot(points[x], points["mean"], marker=marker if few else None, markersize=4, linewidth=1.5, **look)
        low, high = points["mean"] - points["std"], points["mean"] + points["std"]
        ax.fill_between(points[x], low, high, color=look["color"], alpha=0.2, linewidth=0)
    value = f": {table[x].iloc[0]:,.6g}" if at_one_place else ""
    ax.set(xlabel=NAMES.get(x, x) + value, ylabel=NAMES.get(y, y))
    several = table.groupby("label")["seed"].nunique().max() > 1
    ax.legend(fontsize=8, title="mean ± standard deviation of seeds" if several else None, title_fontsize=8)
    return ax.figure


NAMES = {
    "tokens": "training tokens",
    "flops": "training compute (FLOPs)",
    "parameters": "parameters",
    "train_seconds": "training time (s)",
    "train_loss": "training loss (nats per token)",
    "val_loss": "held-out loss (nats per token)",
    "val_bpb": "held-out bits per byte",
}


def places(options: dict) -> dict:
    """Of overrides, those that a run directory does not keep: where text and shards lie."""
    return {name: options[name] for name in ("source", "data_dir") if name in options}


def _text(config) -> list[str]:
    """What changes with the content of the text, tokenizer and weights that a run reads; where that fails, it tells."""
    settings = {name: getattr(config, name) for name in ("source", "val_source", "text_column", "split_on")}
    with contextlib.suppress(UserError, OSError):
        sources = open_sources({"settings": settings, "apart": [str(Path(config.runs_dir).absolute())]})
        texts = [tokenizer_digest(config.tokenizer), *(source.digest() for source in sources if source)]
        begun = sorted(folder_path(config.init_from).glob("*.safetensors")) if config.init_from else []
        return texts + [sha256(path) for path in begun]
    return ["none"]


def _named(config, source: list[str]):
    """The config, with a run_name that changes with whatever may change the result."""
    values = {name: value for name, value in config.to_dict().items() if name not in KEEPING}
    return replace(config, run_name=f"sweep-{json_digest([values, source])[:10]}")


def _is_finished(config) -> bool:
    summary = read_note(Path(config.runs_dir) / config.run_name / "summary.json")
    return summary.get("status") == "finished"


def _row(label: str, variants: dict, config, model, error: str) -> dict:
    """One line of the table."""
    varied = dict.fromkeys(name for values in variants.values() for name in values)
    folder = Path(config.runs_dir) / config.run_name
    summary = read_note(folder / "summary.json")
    tokens = summary.get("tokens", 0)
    return {
        "label": label, "seed": config.seed, **{name: getattr(config, name) for name in varied},
        "status": summary.get("status", "failed"), "parameters": count_parameters(model)["total"],
        "non_embedding": non_embedding(model), "steps": summary.get("steps", 0),
        "tokens": tokens, "flops": tokens * flops_per_token(model, config),
        **{name: summary.get(name) for name in ("val_loss", "val_bpb", "train_seconds", "tokens_per_second")},
        "run": folder.as_posix(), "error": error,
    }  # fmt: skip
