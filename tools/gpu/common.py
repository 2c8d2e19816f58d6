# ruff: noqa: E501
"""What the three scripts share: options, a clock with a deadline, lines that are kept as they come, and a timer."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
import traceback
from pathlib import Path

import torch

from machinery.machine import time_per_call

STARTED = time.monotonic()
SCRATCH = Path(tempfile.gettempdir()) / "lmh"  # lives as long as the machine: tokens, compiled kernels
DATA = SCRATCH / "data"  # the tokens: gpu_check.py begins them, gpu_day.py trains on them
ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("OUT", "gpu-out")).resolve()


def options(text: str, seconds: int) -> argparse.Namespace:
    """What the program was asked for. Also sets what has to be set before anything is compiled."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU unless --device says otherwise")
    parser.add_argument("--device", default="", help="cuda; with --dry, cpu")
    parser.add_argument("--seconds", type=int, default=seconds, help="parts that would end later are left out")
    parser.add_argument("--only", nargs="*", default=[], help="names of parts")
    chosen = parser.parse_args()
    chosen.device = chosen.device or ("cpu" if chosen.dry else "cuda")
    OUT.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(SCRATCH / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(SCRATCH / "triton"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    if chosen.dry:
        chosen.seconds = 10**6  # nothing is left out
        if chosen.device == "cpu":
            compile_quickly()
    return chosen


def compile_quickly() -> None:
    """A rehearsal on a CPU traces what it would compile, and leaves the kernels unmade: those take minutes there."""
    real = torch.compile

    def traced(*arguments, **options):
        for name in ("mode", "options"):
            options.pop(name, None)
        return real(*arguments, **(options | {"backend": "aot_eager"}))

    torch.compile = traced


class Report:
    """Lines on the screen and in $OUT/<name>.md at once, numbers in $OUT/<name>.json: a time-out loses nothing."""

    def __init__(self, name: str, seconds: int, only=()) -> None:
        self.path, self.numbers = OUT / f"{name}.md", {}
        self.json, self.deadline, self.only = OUT / f"{name}.json", STARTED + seconds, only
        self.file = self.path.open("a")
        self.failed = 0

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line and keep it."""
        line = f"[{time.monotonic() - STARTED:5.0f}s] {text}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def keep(self, **values) -> None:
        """Keep numbers by name."""
        self.numbers |= values
        self.json.write_text(json.dumps(self.numbers, indent=1, default=str) + "\n")

    def part(self, name: str, function, needs: float = 0, *arguments):
        """What `function` returns; None, with a line that says why, where it fails or `needs` more seconds than are left."""
        if self.only and name.split()[0] not in self.only:
            return None
        if needs and self.left() < needs:  # what needs nothing keeps what there is, also after the deadline
            self.say(f"SKIPPED {name}: needs {needs:.0f} s, {self.left():.0f} s left")
            return None
        begun = time.monotonic()
        try:
            result = function(*arguments)
            self.say(f"ok {name} ({time.monotonic() - begun:.0f} s)")
            return result
        except BaseException as error:  # SystemExit of a UserError too: the next part is worth as much
            if isinstance(error, KeyboardInterrupt):
                raise
            self.failed += 1
            lines = str(error).strip().splitlines() or ["no message"]
            self.say(f"FAILED {name} ({time.monotonic() - begun:.0f} s): {type(error).__name__}: {lines[0][:300]}")
            where = traceback.format_exc().strip().splitlines()
            self.say("    " + " | ".join(line.strip() for line in where[-7:-1])[:700])
            error.__traceback__ = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None


def seconds_of(call, machine, calls: int = 5, warm: int = 2) -> float:
    """Median seconds of a call on the machine's device, by events on CUDA."""
    if machine.device.type != "cuda":
        return time_per_call(call, machine, calls)
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    found = []
    for _ in range(calls):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        found.append(first.elapsed_time(last) / 1e3)
    return statistics.median(found)
