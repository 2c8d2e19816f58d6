"""What a person sees and presses while a run goes on: a line of progress, and a safe stop."""

from __future__ import annotations

import signal
import sys
import threading
import time

from tqdm import tqdm

from train_utils import Budget


class progress_bar:
    """One line that is drawn anew: share of the budget used, time left, and what `show` is given.

    Plain text, so that it looks the same in a terminal, a notebook and a saved page; at most 2,000 updates
    over a run limited by the clock, so that a day of them stays small.
    """

    def __init__(self, budget: Budget) -> None:
        self._bar = tqdm(
            total=1.0, file=sys.stdout, mininterval=max(0.5, budget.max_hours * 1.8),
            bar_format="{percentage:5.1f}% |{bar:20}| {remaining} left  {desc}",
        )  # fmt: skip

    def __enter__(self) -> progress_bar:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def show(self, progress: float, step: int, line: dict) -> None:
        """Move to `progress` (0 to 1), with what the last step measured after the bar."""
        if "train_loss" in line:
            mfu = f"{line['mfu']:.0%}" if line["mfu"] else "n/a"
            text = f"step {step:,}  loss {line['train_loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s  MFU {mfu}"
            self._bar.set_description_str(text, refresh=False)
        self._bar.update(progress - self._bar.n)

    def evaluated(self, step: int, tokens: int, seconds: float, val_bpb: float) -> None:
        """A line with what an evaluation found, that stays."""
        self.write(f"step {step:7,} {tokens:15,} tokens {seconds:8,.0f} s   {val_bpb:.4f} bits per byte held out")

    def write(self, text: str) -> None:
        """A line above the bar, that stays."""
        self._bar.write(text, file=sys.stdout)


class StopRequest:
    """Turns Ctrl-C, the notebook's stop button and SIGTERM into a request that the loop honours between steps.

    A second Ctrl-C interrupts at once, unless it comes within a second: torchrun passes on the one that the
    terminal has sent already.
    """

    def __init__(self) -> None:
        self.requested, self._when = False, 0.0

    def __enter__(self) -> StopRequest:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._when > 1:
                raise KeyboardInterrupt
            return
        self.requested, self._when = True, time.monotonic()
        print("\nstopping after this step; a checkpoint is written first (interrupt again to stop at once)")

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
