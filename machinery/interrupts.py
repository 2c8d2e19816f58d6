"""A safe stop: Ctrl-C, the notebook's stop button, SIGTERM and a terminal that closes become a request."""

from __future__ import annotations

import contextlib
import signal
import threading
import time


class StopRequest:
    """Turns Ctrl-C, the notebook's stop button, SIGTERM and SIGHUP into a request that the loop honours between steps.

    Under `nohup`, which ignores SIGHUP, a closed terminal ends nothing. A second Ctrl-C interrupts at once, unless it
    comes within a second: torchrun passes on the one that the terminal has sent already.
    """

    def __init__(self) -> None:
        self.requested, self._when = False, 0.0

    def __enter__(self) -> StopRequest:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):  # `nohup` is obeyed
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._when > 1:
                raise KeyboardInterrupt
            return
        self.requested, self._when = True, time.monotonic()
        with contextlib.suppress(RuntimeError):  # while another line is being printed
            print("\nstopping after this step; what was learned is written first (interrupt again to stop at once)")

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
