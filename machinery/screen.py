"""What a person sees while a run goes on: one line that is drawn anew, and lines above it that stay."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable

from tqdm import tqdm


def duration(seconds: float) -> str:
    """A time to read: "1 h 05 min", "12 min", "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def keep_printing() -> None:
    """Have no line that is printed end the program: what a terminal lacks is written as "?", a stdout that is closed,
    or full, is told on stderr and left. Where there is none from the start, nothing is told.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the program runs)
    stdout = sys.stdout
    if not hasattr(stdout, "reconfigure"):  # a notebook's
        return
    stdout.reconfigure(errors="replace")

    def careful(call: Callable) -> Callable:
        @functools.wraps(call)
        def attempt(*arguments):
            try:
                return call(*arguments)
            except OSError as error:
                with contextlib.suppress(OSError):
                    print(f"stdout: {error.strerror}; going on without it", file=sys.stderr)
                os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # also for what is still in its buffer

        return attempt

    if not hasattr(stdout.write, "__wrapped__"):
        stdout.write, stdout.flush = careful(stdout.write), careful(stdout.flush)


def shell():
    """The notebook's kernel or IPython's terminal; None in a program."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def in_notebook() -> bool:
    """Whether pictures can be displayed: in a notebook's kernel, also where a program executes the notebook."""
    return hasattr(shell(), "get_parent")


def progress_bar(shown: bool = True, **options) -> tqdm:
    """tqdm's bar, where a line can be drawn anew: in a terminal or a notebook, not in a file."""
    drawn = in_notebook() or (not sys.stdout.closed and sys.stdout.isatty())
    return tqdm(file=sys.stdout, disable=not (shown and drawn), **options)


class Screen(contextlib.AbstractContextManager):
    """A bar over the budget. Plain text, so that it looks the same in a terminal, a notebook and a saved page."""

    def __init__(self, progress: float) -> None:
        self._bar = progress_bar(
            total=1.0, initial=progress, bar_format="{percentage:5.1f}% |{bar:20}| {desc}",
            mininterval=0.5, miniters=1 / 2000,  # at most 2,000 updates: a saved page stays small
        )  # fmt: skip

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._bar.write(text, file=sys.stdout)

    def show(self, step: int, values: dict) -> None:
        """Move to values["progress"] (0 to 1), with what the step gave and the time left."""
        if "train_loss" in values:
            mfu = f"  MFU {values['mfu']:.0%}" if values["mfu"] else ""
            speed = f"{values['tokens_per_second']:,.0f} tokens/s{mfu}"
            left = f"{duration(values['seconds_left'])} left"
            text = f"{left}  step {step:,}  loss {values['train_loss']:.3f}  {speed}"
            self._bar.set_description_str(text, refresh=False)
        self._bar.update(values["progress"] - self._bar.n)
