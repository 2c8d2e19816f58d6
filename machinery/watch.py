"""What is worth a remark while a run goes on: a loss that jumps, a machine that slows down; and the table before it."""

from __future__ import annotations

import datetime
import math
import re
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from machinery.budget import multiplying_and_flops
from machinery.checkpoints import checkpoint_folders
from machinery.errors import UserError, told
from machinery.files import free_bytes
from machinery.forecast import Forecast, forecast
from machinery.machine import Machine, evaluation_mode, measure_matmul_flops, time_between
from machinery.sources import source_kind


class Watch:
    """The latest losses and speeds of a run."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=50)
        self.rates: deque[float] = deque(maxlen=20)
        self.expected_rate = 0.0  # tokens per second; half of it is told once, until it halves again
        self.remarks: list[str] = []
        self.lr = 0.0  # of the last step
        self.rises = False  # whether a run goes on with a larger budget, at an earlier place of its schedule

    def rate(self) -> float:
        """Tokens per second of late; before the first step, as expected."""
        return statistics.median(self.rates or [self.expected_rate or math.nan])

    def note(self, loss: float, tokens_per_second: float, lr: float) -> dict[str, float]:
        """Take a step in, and put what there is to say in `remarks`; {"spike": …} for a loss far above the last."""
        self.remarks, spike = [], {}
        if self.rises and lr > 1.5 * self.lr:
            self.remarks.append(f"the learning rate is up to {lr:.2g} from {self.lr:.2g}: less of the budget is used")
        self.lr, self.rises = lr, False
        if len(self.losses) == self.losses.maxlen:
            mean, spread = statistics.fmean(self.losses), statistics.stdev(self.losses)
            if loss > mean + 6 * spread:
                spike = {"spike": loss - mean}
                self.remarks.append(f"loss {loss:.3f} after a mean of {mean:.3f}")
        self.losses.append(loss)
        self.rates.append(tokens_per_second)
        rate = self.rate()
        if len(self.rates) == self.rates.maxlen and rate < self.expected_rate / 2:
            told = f"{rate:,.0f} tokens/s, under half of the {self.expected_rate:,.0f} before"
            self.remarks.append(f"{told}; another program may use the device")
            self.expected_rate = rate
        return spike


def with_best(
    scores: dict[str, float], tokens: int, step: int, last: dict[str, float], is_last: bool
) -> tuple[dict[str, float], float | None]:
    """`scores`, of so many held-out tokens, with the best so far, which `last` has; and by how much they are worse.

    Only scores of the same text are compared. The last evaluation is mostly of more than those before it: then the best
    stays as it is, for a run that goes on. Where a part of another size is scored from here on, it begins anew.
    """
    with told("evaluate", advice="it returns a dict of numbers, with val_loss and val_bpb"):
        scores = {name: float(scores[name]) for name in ("val_loss", "val_bpb", *scores)}
    best = {name: value for name, value in last.items() if name.startswith("best_")}
    comparable = best.get("best_tokens") == tokens
    rise = scores["val_bpb"] - best["best_val_bpb"] if comparable else None
    replaced = rise < 0 if comparable else not (best.get("best_tokens") and is_last)
    if replaced and math.isfinite(scores["val_bpb"]):
        best = {"best_val_bpb": scores["val_bpb"], "best_step": step, "best_tokens": tokens}
    return scores | {"val_tokens": tokens, "val_step": step} | best, rise


TEXT_BYTES = 4  # of a token, roughly: English with some ten thousand tokens to choose from


def is_lost(vocab_size: int, *losses: float) -> bool:
    """Whether one of these is far above the loss of all tokens alike, ln V, or nan: no weights to keep."""
    return not all(loss <= 3 * math.log(vocab_size) for loss in losses)


def announce(config) -> None:
    """What a run is about to do, before anything is fetched, and where it takes hours, what to begin with."""
    limits = {"hours": config.max_hours, "tokens": config.max_tokens, "steps": config.max_steps}
    budget = ", or ".join(f"{limit:,.12g} {name}" for name, limit in limits.items() if limit)
    print(
        f"{config.run_name} trains for {budget} on {config.source!r}; before it starts, a table shows what it will take"
    )
    if source_kind(config.source) == "hub":
        named = re.search(r"(\d+)BT\b", config.source)  # sample-10BT: ten billion tokens
        known = [tokens for tokens in (config.max_tokens / 1e9, named and int(named[1])) if tokens]
        billions = min(known, default=1)
        sizes = billions * TEXT_BYTES, billions * (2 if config.vocab_size <= 1 << 16 else 4)
        fetched, kept = (format(size, ",.0f" if size >= 10 else ".2g") for size in sizes)
        amount = f"up to {billions:,.3g} billion tokens are" if known else "each billion tokens is"
        print(f"  its text comes from the Hugging Face hub during the run: {amount} some {fetched} GB to fetch", end="")
        print(f" and {kept} GB in {config.data_dir}, where {free_bytes(config.data_dir) / 1e9:,.0f} GB are free")
    if config.max_hours > 4:
        print('  for a first look stop it and set preset to "hour", or to "demo", three minutes of training', end="")
        print(" (in a terminal: make run PRESET=hour)")


def refuse_too_large(prediction: dict, machine: Machine, folder: Path) -> None:
    """Raise `UserError` where the device cannot hold the predicted step, or the disk one checkpoint."""
    p, free, memory = prediction, free_bytes(folder) / 1e9, machine.memory / 1e9
    if p["peak memory (GB)"] > memory:
        size, advice = "one sequence at a time", "a smaller n_layer, n_embd, n_ffn, vocab_size or block_size"
        if p["micro-batch"] > 1:
            size, advice = f"micro_batch {p['micro-batch']:,}", "a smaller one, or 'auto'"
        raise UserError(
            f"no go: {size} is predicted to take {p['peak memory (GB)']:.1f} GB and the device has {memory:.1f} GB; use"
            f" {advice}"
        )
    if p["checkpoint (GB)"] > free:
        raise UserError(
            f"no go: a checkpoint takes {p['checkpoint (GB)']:,.4f} GB and {free:,.4f} GB are free in {folder.parent};"
            " make room or set runs_dir"
        )


def time_parts(
    model: torch.nn.Module,
    batches,
    gradient: Callable,
    update: Callable,
    evaluation: Callable,
    sample: Callable,
    hours: float,
) -> tuple[float, float, float]:
    """Seconds of a step, an evaluation and a sample of a run of so many `hours`, 0 where they do not limit it. Prints
    what is wrong with how the model reads.
    """

    def step(micro_steps: int) -> None:
        batches.seek()  # the text may end with the run
        batches.retry(model, lambda: gradient(min(micro_steps, batches.micro_steps)))
        update()

    others = [lambda: batches.retry(model, evaluation), sample, lambda: step(2)]
    least = min(1.0, 18 * hours)  # seconds, a two-hundredth of a run by the clock
    one, scoring, sampling, two = time_between(lambda: step(1), others, batches.machine, least)
    for remark in remarks_on_reading(model, sample, batches.machine):
        print(remark)
    batches.seek()
    return one + (batches.micro_steps - 1) * max(0.0, two - one), scoring, sampling


@torch.no_grad()
def remarks_on_reading(model: torch.nn.Module, sample: Callable, machine: Machine) -> list[str]:
    """Whether a model, as classes of one's own may, reads later tokens, or writes as if there were fewer earlier ones.

    Of the tokens that `sample` reads one by one, the logits have to be those of a pass over all of them, in which the
    last one changes nothing before it.
    """
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []  # tokens (1, T) of each, and its last logits (1, V)

    def note(_, arguments: tuple, logits: torch.Tensor) -> None:
        if arguments and len(passes) < 9:
            passes.append((arguments[0][:1], logits[:1, -1].float()))

    with model.register_forward_hook(note):
        sample()
    by_token = passes and all(read.size(1) == 1 for read, _ in passes[1:])  # else it has no cache
    tokens = torch.cat([read for read, _ in passes], dim=1) if by_token else torch.empty(1, 0)
    if not 1 < tokens.size(1) <= min(model.max_length, 256):  # logits of more take memory
        return []
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % model.embedding.num_embeddings
    with evaluation_mode(model), machine.autocast(decoding=True):
        whole, other = model(torch.cat((tokens, changed))).float()  # (T, V) each
    written, size = torch.cat([last for _, last in passes]), whole.std()
    if (whole - other)[:-1].abs().max() > 0.01 * size:
        return ["the model reads later tokens, so its loss says nothing: a layer may read earlier ones alone"]
    if (written - whole[-len(passes) :]).square().mean().sqrt() > 0.1 * size:
        return ["the model writes text as if there were fewer tokens: a layer that reads others keeps them in `cache`"]
    return []


def _clock(seconds: float) -> datetime.timedelta:
    """Hours, minutes and seconds to print; at most 30 years, which other units could not hold."""
    return datetime.timedelta(seconds=min(round(seconds), 10**9))


def _about(value: float) -> str:
    """A number to print, with a digit or two that matter."""
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def print_preflight(
    prediction: dict, config, machine: Machine, note: str, folder: Path, epochs: float, left: dict[str, float]
) -> Forecast | None:
    """A table of what the rest of a run takes; `note` says how the model runs, `epochs` how often the text is read,
    `left` the tokens until each limit of the budget. Returns the forecast of held-out loss, where there is one.
    """
    p, matmul_flops = prediction, measure_matmul_flops(machine)
    keep = min(config.keep_checkpoints, math.ceil(p["tokens"] / config.batch_tokens))  # of as many steps
    flops = p["tokens per second"] * p["FLOPs per token"] / machine.processes
    each = f"{machine.processes} × " if machine.processes > 1 else ""
    mfu = f", MFU {flops / machine.peak_flops:.0%}" if machine.peak_flops else ""
    length = _clock(p["seconds"])
    end = datetime.datetime.now() + length
    first, *others = sorted(left, key=left.get)
    rate = p["tokens"] / p["seconds"]  # with evaluations and samples
    later = ", ".join(f"{name} would be after {_clock(left[name] / rate)}" for name in others)
    more = " more" * (p["tokens per parameter"] * p["parameters"] > p["tokens"] + 1)  # of a run that goes on
    loss, best = p["expected loss"], p["compute-optimal parameters"]  # nan where the law knows nothing
    expected = forecast(config, *multiplying_and_flops(config), p["tokens per parameter"] * p["parameters"])
    rows = {
        "device": f"{each}{machine.name}, {str(machine.dtype).removeprefix('torch.')}, {note}",
        "memory": f"{p['peak memory (GB)']:.2f} GB predicted at micro-batch {p['micro-batch']},"
        f" {machine.memory / 1e9:.1f} GB there",
        "disk": f"{p['checkpoint (GB)'] * (keep + 2):.2f} GB for {keep} checkpoints, the best and one being written,"
        f" {free_bytes(folder) / 1e9:.1f} GB free",
        "speed": f"{p['tokens per second']:,.0f} tokens/s, {flops / matmul_flops:.0%} of the matrix rate{mfu}",
        "budget": f"{p['tokens']:,.0f} tokens{more} in {length} with evaluations and samples, until"
        f" {end:%Y-%m-%d %H:%M}; then {_clock(p['last evaluation (s)'])} to score all held-out text",
        "limit": f"{first} is reached first; {later}" if later else "",
        "text": (f"read {_about(epochs)} times" if epochs else "read once or less, as far as is known")
        + (" (what repeats adds less from about 4 on)" if epochs > 4 else ""),
        "size": f"{p['parameters']:,} parameters, {_about(p['tokens per parameter'])} tokens for each"
        + ("" if math.isnan(loss) else " (best: about 20)"),
        "scaling law": ("loss n/a, too small" if math.isnan(loss) else f"loss {loss:.2f} on web text")
        + ("" if math.isnan(best) else f"; best size for so much compute {best:,.0f}"),
        "induction": f"none: it is for position 'rope', not {config.position!r}; the heads begin with random weights"
        if config.induction and config.position != "rope"
        else "",
        "forecast": f"{expected.low:.3f} to {expected.high:.3f} bits per byte held out"
        if expected
        else "n/a, no law for this text, recipe, size and length",
    }
    print("\n".join(f"  {name:12s} {text}" for name, text in rows.items() if text))
    to_come = keep + 2 - len(checkpoint_folders(folder))
    is_full = p["checkpoint (GB)"] * to_come > free_bytes(folder) / 1e9
    print("  go" + (", but make room on the disk, or set runs_dir: not all checkpoints will fit" if is_full else ""))
    return expected


def print_ending(
    scores: dict[str, float], rise: float, diverged: bool, expected: Forecast | None = None, tokens: int = 0
) -> None:
    """What is worth a remark at the end of a run; `rise` is the held-out loss over the best one, in bits per byte, when
    the same text was last scored. The last score is mostly of more text; where it is below the best, nothing is said.
    `expected` is the forecast of a run that came to its end, and `tokens` what it took.
    """
    if expected and scores:
        print(f"forecast {expected.low:.3f} to {expected.high:.3f}, came {scores['val_bpb']:.3f} bits per byte", end="")
        now = expected.with_tokens(tokens)
        more = tokens / (expected.tokens or tokens)
        print(
            "" if 0.9 < more < 1.1 else f"; with {more:.2f} times the tokens foretold, {now.low:.3f} to {now.high:.3f}"
        )
    if rise > 0.005 and scores["val_bpb"] > scores["best_val_bpb"]:
        lower = f"{rise:.4f} bits per byte lower than when the same text was last scored"
        print(f"held-out loss was best at step {scores['best_step']:,}, {lower}")
    if diverged:
        print(
            "diverged: go on from the last checkpoint, if any, with a lower lr or longer warmup, or anew with qk_norm;"
            " where that one is ruined too, remove its folder, and the one before is taken"
        )
