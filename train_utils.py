"""Around the training loop: schedules, budget, hardware, compilation, progress, and a safe stop.

Everything here is plumbing that a run leans on and a reader may take on trust. The loop itself, and all
that decides what is learned, stands in the notebook.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import re
import secrets
import shutil
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from machinery.errors import UserError
from machinery.files import read_json, read_jsonl, write_atomic, write_json
from machinery.machine import Machine
from machinery.run_folder import portable

# ------------------------------------------------------------------------------------------- schedules
# Each is a pure function of progress, the fraction of the budget used (0 to 1), and gives the factor on
# the peak learning rate (0 to 1). `warmup` and `decay` are fractions of the budget too.


def wsd(progress: float, warmup: float, decay: float) -> float:
    """Warm up, stay, decay linearly to zero (Hu et al. 2024, MiniCPM; Hägele et al. 2024)."""
    return min(_warm(progress, warmup), (1 - progress) / decay if decay else 1.0, 1.0)


def cosine(progress: float, warmup: float, decay: float) -> float:
    """Warm up, then half a cosine down to zero (Loshchilov & Hutter 2017). `decay` is not used."""
    if progress < warmup:
        return _warm(progress, warmup)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9)))


def linear(progress: float, warmup: float, decay: float) -> float:
    """Warm up, then straight down to zero (Bergsma et al. 2025). `decay` is not used."""
    return wsd(progress, warmup, 1 - warmup)


def constant(progress: float, warmup: float, decay: float) -> float:
    """Warm up and stay: for runs without a known end. `decay` is not used."""
    return _warm(progress, warmup)


def _warm(progress: float, warmup: float) -> float:
    return min(1.0, progress / warmup) if warmup else 1.0


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "wsd": wsd,
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}


@dataclass(frozen=True)
class Budget:
    """What a run may spend; 0 means no limit of that kind. The first limit reached ends the run."""

    max_steps: int = 0
    max_tokens: int = 0
    max_hours: float = 0.0

    def progress(self, step: int, tokens: int, seconds: float) -> float:
        """Fraction of the budget used, 0 to 1: the largest over its limits."""
        used = [(step, self.max_steps), (tokens, self.max_tokens), (seconds, self.max_hours * 3600)]
        return min(1.0, max(amount / limit for amount, limit in used if limit))

    def tokens_needed(self, batch_tokens: int) -> int | None:
        """Upper bound on the tokens a run reads; None when only the clock limits it."""
        limits = [self.max_steps * batch_tokens, self.max_tokens and self.max_tokens + batch_tokens]
        return min((limit for limit in limits if limit), default=None)


# ------------------------------------------------------------------------------------------------- runs


class RunLog:
    """A run directory that this process, and no other, is writing. Mirrored to W&B where asked.

    Opening locks it; the lock goes with the process, however that ends. The local files are the truth and
    are complete after every line. Where several processes train together, one `writes`. Raises `UserError` for
    a name that would lead elsewhere, and for a run that another process is training.
    """

    def __init__(self, runs_dir: str | Path, run_name: str, start_over: bool = False, writes: bool = True) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run_name):
            raise UserError(
                f"run_name is {run_name!r}; use up to 100 letters, digits, '.', '_', '-', a letter or digit first"
            )
        self.folder = Path(runs_dir) / run_name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        self._wandb = None
        self._unwritten: list[tuple[str, str]] = []
        self._losses: deque[float] = deque(maxlen=50)
        self._rates: deque[float] = deque(maxlen=20)
        self._expected_rate = 0.0
        self._start_over, self.writes = start_over, writes

    def __enter__(self) -> RunLog:
        if not self.writes:
            return self
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is training in {self.folder}; wait for it, stop it, or use a new run_name"
            ) from None
        if self._start_over and (self.folder / "config.json").exists():
            self._set_aside()
        return self

    def __exit__(self, *exception) -> None:
        """End W&B where `finish` did not, and let the run go; files need no closing."""
        self._mirror(lambda run: run.finish(exit_code=1))
        self._wandb = None
        self._lock.release()

    def _set_aside(self) -> None:
        """Move an earlier run of this name to `<run_name>.1`, `.2`, …: nothing is lost."""
        name = self.folder.name
        aside = next(p for n in itertools.count(1) if not (p := self.folder.with_name(f"{name}.{n}")).exists())
        aside.mkdir()
        for path in self.folder.iterdir():
            if path.name != ".lock":
                path.rename(aside / path.name)
        print(f"starting over; the earlier run is now in {aside}")

    def compare(self, config: dict, fixed: Iterable[str]) -> set[str]:
        """Print how `config` differs from the one this run was begun with; returns the names that do.

        Raises `UserError` when one of the `fixed` fields differs: what is on disk would not fit it.
        """
        saved = read_json(self.folder / "config.json")
        now, changed = portable(config), set()
        for name in now:
            if name in saved and saved[name] != now[name] and name != "resume":
                if name in fixed:
                    raise UserError(
                        f"{name} is {now[name]!r} but run {self.folder.name!r} was begun with {saved[name]!r};"
                        " use a new run_name, or resume='never' to start over"
                    )
                print(f"  {name}: {saved[name]!r} before, {now[name]!r} from here on")
                changed.add(name)
        return changed

    def begin(self, config: dict, tokenizer: dict, environment: dict, wandb: str = "off", at_step: int = 0) -> None:
        """Write what the run is. Lines logged after `at_step`, by a run that was cut off later, are dropped.

        Raises `UserError` when the run was begun with another tokenizer.
        """
        if at_step and read_json(self.folder / "tokenizer.json") != tokenizer:
            raise UserError(
                f"run {self.folder.name!r} was begun with another tokenizer: the text it was learned from has"
                " changed; use a new run_name"
            )
        if not self.writes:
            return
        config = portable(config)
        (self.folder / "summary.json").unlink(missing_ok=True)  # of an earlier part of this run
        for name, value in [("config", config), ("tokenizer", tokenizer), ("environment", environment)]:
            write_json(self.folder / f"{name}.json", value)
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [line for line in read_jsonl(self.folder / name) if line["step"] <= at_step] if at_step else []
            write_atomic(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))
        if wandb != "off":
            self._wandb = _start_wandb(self.folder, config, wandb)

    def preflight(
        self, prediction: dict, machine: Machine, note: str, matmul_flops: float, keep: int, processes: int = 1
    ) -> None:
        """Print what the run will take. Raises `UserError` when the device cannot hold one sequence, or the disk one
        checkpoint.

        `prediction` is the notebook's, with the measured rate of all processes; `note` says how the model runs. A
        rate that falls under half of it later is reported.
        """
        p, free_disk = prediction, shutil.disk_usage(self.folder).free / 1e9
        needed, memory, peak = p["checkpoint (GB)"] * (keep + 1), machine.memory / 1e9, p["peak memory (GB)"]
        flops = p["tokens per second"] * p["FLOPs per token"] / processes
        each = f"{processes} × " if processes > 1 else ""
        mfu = f", MFU {flops / machine.peak_flops:.0%}" if machine.peak_flops else ""
        length = datetime.timedelta(seconds=round(p["seconds"]))
        end = datetime.datetime.now() + length
        loss, best = p["expected loss"], p["compute-optimal parameters"]  # nan where the law knows nothing
        rows = {
            "device": f"{each}{machine.name}, {str(machine.dtype).removeprefix('torch.')}, {note}",
            "memory": f"{peak:.2f} GB predicted at micro-batch {p['micro-batch']}, {memory:.1f} GB there",
            "disk": f"{needed:.2f} GB for {keep} checkpoints and one being written, {free_disk:.1f} GB free",
            "speed": f"{p['tokens per second']:,.0f} tokens/s, {flops / matmul_flops:.0%} of the matrix rate{mfu}",
            "budget": f"{p['tokens']:,.0f} tokens in {length}, until {end:%Y-%m-%d %H:%M}",
            "size": f"{p['parameters']:,} parameters, {p['tokens per parameter']:.2g} tokens for each"
            + ("" if math.isnan(loss) else " (best: about 20)"),
            "scaling law": ("loss n/a, too small" if math.isnan(loss) else f"loss {loss:.2f} on web text")
            + ("" if math.isnan(best) else f"; best size for so much compute {best:,.0f}"),
        }  # fmt: skip
        print("\n".join(f"  {name:12s} {text}" for name, text in rows.items()))
        if p["micro-batch"] == 1 and peak > memory:
            raise UserError(
                f"no go: one sequence at a time is predicted to take {peak:.1f} GB and the device has {memory:.1f} GB;"
                " use a smaller n_layer, n_embd, vocab_size or block_size"
            )
        if p["checkpoint (GB)"] > free_disk:
            raise UserError(
                f"no go: a checkpoint takes {p['checkpoint (GB)']:.2f} GB and {free_disk:.2f} GB are free in"
                f" {self.folder.parent}; make room or set runs_dir"
            )
        print("  go")
        self._expected_rate = p["tokens per second"]

    def metrics(self, step: int, **values: float | None) -> None:
        """Append one line to metrics.jsonl. A loss far above the last fifty is marked, a slow machine told."""
        loss = values.get("train_loss")
        if loss is not None and math.isfinite(loss):
            if len(self._losses) == self._losses.maxlen:
                mean, spread = statistics.fmean(self._losses), statistics.stdev(self._losses)
                if loss > mean + 6 * spread:
                    values["spike"] = loss - mean
                    tqdm.write(f"step {step:,}: loss {loss:.3f} after a mean of {mean:.3f}", file=sys.stdout)
            self._losses.append(loss)
            self._rates.append(values.get("tokens_per_second", math.inf))
            if len(self._rates) == self._rates.maxlen and statistics.median(self._rates) < self._expected_rate / 2:
                rate = statistics.median(self._rates)
                text = f"{rate:,.0f} tokens/s, under half of the {self._expected_rate:,.0f} before"
                tqdm.write(f"step {step:,}: {text}", file=sys.stdout)
                self._expected_rate = rate  # said once, until it halves again
        self._append("metrics.jsonl", {"step": step, **values})
        self._mirror(lambda run: run.log(values, step=step))

    def sample(self, step: int, prompt: str, text: str, **scores: float) -> None:
        """Append one line to samples.jsonl, with the scores of what is written at this step."""
        self._append("samples.jsonl", {"step": step, "prompt": prompt, "text": text, **scores})
        self._mirror(lambda run: run.log({"sample": _wandb_html(prompt, text), **scores}, step=step))

    def median_rate(self) -> float:
        """Tokens per second of the median step; 0 before there is one."""
        lines = read_jsonl(self.folder / "metrics.jsonl")
        rates = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        return statistics.median(rates or [0.0])

    def finish(self, summary: dict) -> None:
        """Write summary.json and close W&B."""
        if not self.writes:
            return
        try:
            write_json(self.folder / "summary.json", summary)
        except OSError as error:
            print(f"summary.json was not written ({error.strerror}): {json.dumps(summary)}")
        self._mirror(lambda run: (run.summary.update(summary), run.finish(exit_code=0)))
        self._wandb = None

    def _append(self, name: str, line: dict) -> None:
        """Add a line to a file; on a full disk, keep it and try again with the next one."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        if self.writes:
            self._unwritten.append((name, json.dumps(finite) + "\n"))  # JSON has no NaN
        try:
            while self._unwritten:
                name, text = self._unwritten[0]
                with (self.folder / name).open("a", encoding="utf-8") as file:
                    file.write(text)
                self._unwritten.pop(0)
        except OSError as error:
            if len(self._unwritten) == 1:
                print(f"\n{name} cannot be written now ({error.strerror}); its lines are kept and written later")
            name, text = self._unwritten[0]
            self._unwritten[0] = name, "\n" + text.lstrip("\n")  # part of it may be on disk: begin a line of its own

    def _mirror(self, action: Callable) -> None:
        """Do something with the W&B run. Whatever goes wrong there is said once and never stops training."""
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            self._wandb = None
            print(f"W&B stopped ({type(error).__name__}: {error}); the run goes on, its files are in {self.folder}")


def _start_wandb(folder: Path, config: dict, mode: str):
    """A W&B run, or None with a line that says why. Never asks for a key: without one it logs offline."""
    try:
        import wandb

        if mode == "online" and not wandb.login(prompt=False):
            mode = "offline"
            print("W&B: no API key here, logging offline (later: wandb login, then wandb sync)")
        settings = wandb.Settings(console="off", silent=True, init_timeout=60, disable_git=True, disable_code=True)
        id_file = folder / "wandb_id"
        run_id = id_file.read_text() if id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id)
        return wandb.init(
            project="lmharness", name=folder.name, id=run_id, resume="allow",
            dir=folder.parent, config=config, mode=mode, settings=settings,
        )  # fmt: skip
    except Exception as error:
        print(f"W&B is off ({type(error).__name__}: {error}); the run's files are in {folder}")
        return None


def _wandb_html(prompt: str, text: str):
    import html

    import wandb

    return wandb.Html(f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>", inject=False)


def run_state(folder: str | Path) -> dict:
    """Where a run stands, from its files alone: for another notebook, kernel or terminal, while it trains or after.

    "status" is "running", "finished", "interrupted" or "diverged", or "stopped" when its process is gone without
    a word; "progress" (0 to 1) and "seconds_left" come from the budget; "metrics" and "samples" are its lines.
    """
    folder = Path(folder)
    config, metrics = read_json(folder / "config.json"), read_jsonl(folder / "metrics.jsonl")
    last = {name: value for line in metrics for name, value in line.items()}  # the latest of each
    try:
        budget = Budget(config["max_steps"], config["max_tokens"], config["max_hours"])
        seconds = float(last.get("seconds", 0.0))
        progress = budget.progress(last.get("step", 0), last.get("tokens", 0), seconds)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: its config or metrics do not say how far it is ({error!r})") from None
    summary = folder / "summary.json"
    status = read_json(summary).get("status", "stopped") if summary.exists() else "stopped"
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
        lock.release()
    except Timeout:
        status = "running"
    return {
        "status": status,
        "progress": progress,
        "seconds_left": seconds / progress * (1 - progress) if progress else math.inf,
        "last": last,
        "metrics": metrics,
        "samples": read_jsonl(folder / "samples.jsonl"),
    }


def show_run(folder: str | Path) -> None:
    """Print where a run stands and its latest sample, and draw its curves."""
    import matplotlib.pyplot as plt

    state = run_state(folder)
    last, left = state["last"], state["seconds_left"]
    print(f"{Path(folder).name}: {state['status']}, {state['progress']:.1%} of the budget", end="")
    print(f", {left / 3600:.1f} hours left" if state["status"] == "running" and math.isfinite(left) else "")
    numbers = [
        ("step", ",d"),
        ("tokens", ",d"),
        ("train_loss", ".3f"),
        ("val_bpb", ".4f"),
        ("tokens_per_second", ",.0f"),
    ]
    print(", ".join(f"{name} {last[name]:{form}}" for name, form in numbers if last.get(name) is not None))
    for sample in state["samples"][-1:]:
        print(f"──── sample of step {sample['step']:,}\n{sample['prompt']}{sample['text']}")
    plt.figure(figsize=(7, 3))
    for name, style in [("train_loss", "-"), ("val_loss", "o-")]:
        points = [(line["tokens"] / 1e6, line[name]) for line in state["metrics"] if line.get(name) is not None]
        plt.plot(*zip(*points), style, label=name) if points else None
    plt.gca().set(xlabel="tokens (millions)", ylabel="nats per token", title=Path(folder).name)
    plt.legend()
    plt.show()
