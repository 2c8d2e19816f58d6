"""The folder of a run: its lock, its lines, what produced it, and a view of it from anywhere.

runs/<run_name>/
    config.json  environment.json  tokenizer.json     what the run is, and what produced it
    data.json  expected.json  code.json               which text it reads, the band of its loss, its model's classes
    metrics.jsonl  samples.jsonl                      a line a step, complete at every moment
    summary.json                                      how it ended
    checkpoints/                                      machinery/checkpoints.py
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import statistics
import subprocess
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from machinery.errors import FileError, UserError, first_line, printable, readable, told
from machinery.files import (
    IS_IT_A_RUN,
    folder_path,
    free_name,
    json_digest,
    make_folder,
    no_links,
    read_json,
    read_jsonl,
    read_note,
    refuse_link,
    regular_file,
    sha256,
    write_atomic,
    write_json,
)
from machinery.machine import Machine, cpu_name
from machinery.notebook import NOTEBOOK

COPY = "bring it back from a copy, use a new run_name, or resume='never' to start over"
ENDINGS = ("finished", "interrupted", "diverged")  # of a run, as summary.json tells them
SIGNS = ("config.json", "metrics.jsonl", "checkpoints")  # of a run: one of them is there from its first moment on
FILES = (
    "config.json", "environment.json", "tokenizer.json", "data.json", "expected.json", "code.json",
    "metrics.jsonl", "samples.jsonl", "summary.json",
)  # fmt: skip
PLACES = ("source", "val_source", "tokenizer", "init_from", "data_dir", "runs_dir")  # fields that may hold a path
TAKEN = re.compile(r"wandb|(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by W&B beside runs, by Windows


class RunFolder:
    """runs/<run_name>, which this process, and no other, writes. Where several train together, one `writes`.

    The lock goes with the process, however that ends. Raises `UserError` for a name that would lead elsewhere or that
    no other system can hold, and for a run that another process is training.
    """

    def __init__(self, runs_dir: str | Path, run_name: str, writes: bool = True) -> None:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?", run_name):
            raise UserError(
                f"run_name is {run_name!r}; use up to 100 letters, digits, '.', '_', '-', a letter or digit first,"
                " no '.' at the end"
            )
        if TAKEN.fullmatch(run_name):
            raise UserError(
                f"run_name is {run_name!r}, which Windows keeps for a device, or W&B for its files; use another"
            )
        self.path = folder_path(runs_dir, "runs_dir, where runs are kept") / run_name
        self.writes = writes
        self.code: dict[str, str] = {}  # of the model's classes, by `model_code`
        self._unwritten: list[tuple[str, str]] = []
        self._continued: set[str] = set()  # the logs that have a line of this process
        self._files: dict[str, dict] = {}  # what `begin` wrote
        with told(self.path, problem="cannot be made", advice="use another run_name or a runs_dir of yours"):
            make_folder(self.path)
        # Let go by any thread; waits a moment, since a look at the run from elsewhere may have it
        self._lock = FileLock(self.path / ".lock", timeout=0.5, thread_local=False)

    def lock(self) -> None:
        """Keep other trainers out until `unlock`, or until this process ends."""
        if not self.writes:
            return
        self._contents()  # first: a lock would stay in somebody else's folder
        refuse_link(self._lock.lock_file)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is training in {self.path}; wait for it, stop it, or use a new run_name"
            ) from None
        except OSError as error:
            raise FileError(
                f"{self._lock.lock_file}: not to be locked ({error.strerror}); remove it where it is yours, or set"
                " runs_dir elsewhere"
            ) from None

    def _contents(self) -> list[Path]:
        """What is in the folder beside its lock. Raises `UserError` where that is of no run: it is somebody else's."""
        with told(self.path, problem="cannot be read", advice="check its permissions, or use another run_name"):
            found = sorted(path for path in self.path.iterdir() if path.name != ".lock")
        others = [path.name for path in found if path.name[0] != "."]
        if others and not any(name.startswith(SIGNS) for name in others):
            raise UserError(
                f"{self.path} holds {', '.join(others[:3])} and no run; move that away, or use another run_name"
            )
        return found

    def unlock(self) -> None:
        """Let the folder go; one in which nothing was begun is gone then."""
        with contextlib.suppress(OSError):  # Windows removes no file in use
            if self._is_held() and os.listdir(self.path) == [".lock"]:
                os.unlink(self._lock.lock_file)
                self.path.rmdir()
        self._lock.release()

    def set_aside(self) -> None:
        """Move what an earlier run left here to `<run_name>.1`, `.2`, …: nothing is lost."""
        found = self._contents()
        if not found or not self.writes:
            return
        aside = free_name(self.path)
        with told(aside, problem="the earlier run cannot be moved there"), contextlib.ExitStack() as undo:
            aside.mkdir()
            undo.callback(aside.rmdir)
            for path in found:
                path.rename(aside / path.name)
                undo.callback((aside / path.name).rename, path)
            undo.pop_all()  # all of it, or nothing
        print(f"starting over; the earlier run is now in {aside}")

    def compare(self, config: dict, fixed: Iterable[str]) -> None:
        """Print how `config` differs from the one this run was begun with.

        Raises `UserError` when one of the `fixed` fields differs: what is on disk would not fit it. A field that only
        one of the two has, of another version of this program, is told.
        """
        saved = read_json(self.path / "config.json", advice=COPY)
        now = portable(config)
        changed = {name for name in now.keys() & saved.keys() - {"resume"} if saved[name] != now[name]}
        for name in sorted(changed.intersection(fixed)):  # the first is told
            raise UserError(
                f"{name} is {now[name]!r} but run {self.path.name!r} was begun with {saved[name]!r};"
                " use a new run_name, or resume='never' to start over"
            )
        for name in sorted(changed | now.keys() ^ saved.keys()):
            before, after = (repr(values[name]) if name in values else "not known" for values in (saved, now))
            print(printable(f"  {name}: {before[:60]} before, {after[:60]} now"))
        tell_other_code(self.path, self.code)

    def same_text(self, tokenizer: dict, key: str, dtype: str) -> None:
        """Raise `UserError` where a run would go on with another tokenizer or text; say where its precision changes."""
        name = self.path.name
        advice = "use a new run_name (init_from takes an export of this one), put the text back, or resume='never'"
        saved = read_json(self.path / "config.json")
        if read_json(self.path / "tokenizer.json", advice=COPY) != tokenizer:
            raise UserError(
                f"run {name!r} was begun with another tokenizer, or one learned from other text (tokenizer"
                f" {saved.get('tokenizer')!r}, source {saved.get('source')!r}, which has to give"
                f" the same text each time); {advice}"
            )
        if read_json(self.path / "data.json", advice=COPY).get("key") != key:
            raise UserError(
                f"run {name!r} was begun with other text than its source holds now, or files of other names, which are"
                f" in another order (source {saved.get('source')!r}, val_source {saved.get('val_source')!r} then);"
                f" {advice}"
            )
        before = read_note(self.path / "environment.json").get("dtype", dtype)
        if before != dtype:
            print(printable(f"matrix products were in {before!s:.60} until here, and go on in {dtype}"))

    def rehearse(self) -> None:
        """Write what `begin` will replace as it is, and beside the checkpoints: what is in the way is told at once, and
        not after minutes of compiling, or of training without a checkpoint.
        """
        if not self.writes:
            return
        for path in (self.path / name for name in FILES):
            if os.path.lexists(path):
                with told(path, problem="not written"):
                    write_atomic(path, regular_file(path).read_bytes())
        checkpoints = self.path / "checkpoints"
        with told(checkpoints, problem="cannot be written", advice="check the permissions"):
            tempfile.TemporaryDirectory(dir=checkpoints, prefix=".step_", suffix=".part").cleanup()

    def configure(self, config: dict) -> None:
        """Write config.json alone, of a run whose budget is used: what `compare` told counts from now on."""
        if self.writes:
            write_json(self.path / "config.json", portable(config))

    def begin(self, config: dict, at_step: int = 0, **files: dict) -> None:
        """Write config.json and the other `files`. Lines after `at_step`, of a run cut off later, are dropped.

        The summary of an earlier part goes last: until here, all that the folder held is in it.
        """
        if not self.writes:
            return
        logs = [self.path / name for name in ("metrics.jsonl", "samples.jsonl")]
        kept = [_lines_until(at_step, log) if at_step else b"" for log in logs]
        if at_step and not kept[0]:
            print(f"{logs[0]} was removed or emptied: its curves begin at step {at_step:,}")
        again = max((line["step"] for line in read_jsonl(logs[0])), default=0) - at_step
        if again > 0:
            print(f"{again:,} steps that were logged after the last checkpoint are taken again")
        summary, advice = self.path / "summary.json", "remove it, or check the permissions"
        code = (at_step and read_note(self.path / "code.json")) or self.code  # what was trained first counts
        self._files = {"config": portable(config), "code": code, **files}
        self._write_files()
        for log, lines in zip(logs, kept):
            write_atomic(log, lines)
        with told(summary, problem="cannot be replaced", advice=advice):
            summary.unlink(missing_ok=True)  # of an earlier part of this run

    def _write_files(self) -> None:
        for name, value in self._files.items():
            write_json(self.path / f"{name}.json", value)

    def _make_again(self) -> None:
        """Where the folder is gone, or a file that a checkpoint needs beside it: lock it, and write those again.

        Raises `UserError` where another process has locked it meanwhile: without the lock file, it could.
        """
        files = [self.path / f"{name}.json" for name in self._files]
        if self._is_held() and all(map(os.path.lexists, files)):
            return
        make_folder(self.path)
        if not self._is_held():
            self._lock.release()  # the folder stays, which may be empty
            self.lock()
        self._write_files()
        print(
            f"\n{self.path} or files of it were moved or removed while this run trains there; it is written again from"
            " here on: what it held before, if moved, is at its new place"
        )

    def _is_held(self) -> bool:
        """Whether the lock file in the folder is the one that this process has locked, and no later one."""
        held = self._lock._context.lock_file_fd
        with contextlib.suppress(OSError):
            return held is not None and os.path.samestat(os.stat(self._lock.lock_file), os.fstat(held))
        return False

    def append(self, name: str, line: dict) -> None:
        """Add a line to a file; on a full disk, keep it and try again with the next one. The first may be of a step
        that an earlier process has logged, scored again: then it takes the place of that line.
        """
        if not self.writes:
            return
        if name not in self._continued:
            self._continued.add(name)
            with contextlib.suppress(UserError):
                if self._replace(self.path / name, line):
                    return
        self._unwritten.append((name, json.dumps(_finite(line)) + "\n"))
        self._write_lines()

    def _write_lines(self) -> None:
        try:
            self._make_again()
            while self._unwritten:
                name, text = self._unwritten[0]
                with open(self.path / name, "a", encoding="utf-8", opener=no_links) as file:
                    file.write(text)
                self._unwritten.pop(0)
        except OSError as error:
            name, text = self._unwritten[0]
            if len(self._unwritten) == 1:
                print(f"\n{name} cannot be written now ({first_line(error)}); its lines are kept and written later")
            self._unwritten[0] = name, "\n" + text.lstrip("\n")  # part of it may be on disk: begin a line of its own

    def _replace(self, log: Path, line: dict) -> bool:
        """Put a line in the place of those of its step, whose other values stay; whether there was one."""
        earlier = [other for other in read_jsonl(log) if other["step"] == line["step"]]
        if earlier:
            self._make_again()
            merged = json.dumps(_finite(earlier[-1] | line)) + "\n"
            write_atomic(log, _lines_until(line["step"] - 1, log) + merged.encode())
        return bool(earlier)

    def usual_rate(self) -> float:
        """Tokens per second in the median step; 0 where there was none."""
        rates = [line.get("tokens_per_second") for line in read_jsonl(self.path / "metrics.jsonl")]
        return statistics.median([rate for rate in rates if rate] or [0.0])

    def measured(self, step: int) -> dict:
        """What summary.json says of the training up to `step` that nobody can measure later."""
        summary = read_note(self.path / "summary.json")
        kept = {name: summary.get(name) for name in ("predicted", "peak_memory_bytes")}
        fits = summary.get("steps") == step and [type(value) for value in kept.values()] == [dict, int]
        return kept if fits else {}

    def finish(self, summary: dict) -> None:
        """Write summary.json, and lines that are kept still; where that cannot be, print it."""
        if self.writes:
            if self._unwritten:  # the last checkpoint may have made room
                self._write_lines()
            if self._unwritten:
                print(f"{self.path}: the last {len(self._unwritten):,} lines of its logs were not written")
            try:
                write_json(self.path / "summary.json", _finite(summary))
            except OSError as error:
                print(f"summary.json was not written ({first_line(error)}): {json.dumps(summary)}")


def _lines_until(step: int, log: Path) -> bytes:
    """A log without lines of later steps and a last one that a crash cut short; what others wrote stays as it is."""
    with told(log):
        content = regular_file(log).read_bytes() if os.path.lexists(log) else b""
    kept = []
    for text in content.splitlines(keepends=True):
        line = None
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
        number = line.get("step") if isinstance(line, dict) else None
        is_later = isinstance(number, int) and number > step
        is_torn = line is None and not text.endswith(b"\n")
        if not (is_later or is_torn):
            kept.append(text if text.endswith(b"\n") else text + b"\n")
    return b"".join(kept)


def _finite(values: dict) -> dict:
    """`values` with None where JSON has no number, as it has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def portable(config: dict) -> dict:
    """The config without the folders of one machine: of an absolute path, the last part."""
    return {
        name: f"…/{Path(value).name}" if name in PLACES and Path(os.path.expanduser(value)).is_absolute() else value
        for name, value in config.items()
    }


def describe_environment(machine: Machine) -> dict:
    """Versions, hardware and source identity: what is needed to say later what produced a run. No paths, no names."""
    packages = ("torch", "numpy", "tiktoken", "rustbpe", "datasets", "safetensors", "transformers", "wandb")
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions_of(packages),
        "cuda": torch.version.cuda,
        "device": machine.name,
        "device_memory_bytes": machine.memory,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "commit": _commit(),
        "notebook_sha256": sha256(NOTEBOOK) if NOTEBOOK.exists() else None,
    }


def model_code(model: torch.nn.Module) -> dict[str, str]:
    """A hash of the source, comments apart, of each class of a model that is not PyTorch's, by its name."""
    code = {}
    for kind in {type(module) for module in model.modules()}:
        own = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
        methods = [part for base in own for _, part in sorted(vars(base).items()) if inspect.isfunction(part)]
        with contextlib.suppress(OSError, SyntaxError):  # typed in, and not to be had any more
            sources = [ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(method)))) for method in methods]
            code |= {own[0].__name__: json_digest(sources)[:8]} if own else {}
    return code


def tell_other_code(run: Path, code: dict[str, str]) -> None:
    """Print which classes of a model are not those that a run was trained with, as far as that is known."""
    trained = read_note(run / "code.json")
    if other := [name for name in trained.keys() | code.keys() if trained and trained.get(name) != code.get(name)]:
        print(
            f"{run.name} was trained with other code of {printable(', '.join(sorted(other)))}: what this model computes"
            " may differ; a class of your own has to be defined wherever its run is used"
        )


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _commit() -> str | None:
    """The checked-out commit, with "+" after it when files differ from it."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(NOTEBOOK.parent)]
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain"], text=True, stderr=subprocess.DEVNULL)
        return commit + ("+" if changed.strip() else "")
    return None


# ------------------------------------------------------------------------------------ from anywhere else


def run_state(folder: str | Path) -> dict:
    """Where a run stands, from its files alone: for another notebook, kernel or terminal, while it trains or after.

    "status" is "running", "finished", "interrupted" or "diverged", or "stopped" when its process is gone without
    a word; "progress" (0 to 1) and "seconds_left" are those of the last step; "metrics" and "samples" are its lines;
    "expected" is the band of its loss, where expected.json has one.
    """
    folder = folder_path(folder)
    running = _is_locked(folder / ".lock")
    missing = {} if running else None  # a new run makes its model and reads its text before it writes
    read_json(folder / "config.json", missing, advice=IS_IT_A_RUN)  # else it is no run
    metrics = read_jsonl(folder / "metrics.jsonl")
    last = {name: value for line in metrics for name, value in line.items()}  # the latest of each
    ended = read_note(folder / "summary.json").get("status")
    return {
        "status": "running" if running else ended if ended in ENDINGS else "stopped",
        "progress": last.get("progress", float(ended == "finished" and not running)) or 0.0,
        "seconds_left": last.get("seconds_left"),
        "last": last,
        "metrics": metrics,
        "samples": read_jsonl(folder / "samples.jsonl"),
        "expected": read_note(folder / "expected.json"),
    }


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock; needs no right to write where the system has `flock`."""
    if not os.path.isfile(path):  # none, or a pipe, which would be waited for
        return False
    try:
        import fcntl

        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except ImportError:  # Windows
        with contextlib.suppress(OSError), FileLock(path, timeout=0):  # its `Timeout` is one
            return False
        return True
    except OSError as error:
        return isinstance(error, BlockingIOError)  # else there is none
    return False


def as_sample(sample: dict, heading: bool = False) -> str:
    """A line of samples.jsonl as text for a screen: prompt and continuation, where asked for under their step."""
    text = readable(sample.get("prompt", "") + sample.get("text", ""))
    return f"──── sample of step {sample['step']:,}\n{text}" if heading else text
