"""What the figure of a running notebook costs: its seconds over those of training, in a run in a real kernel.

python -m tools.bench.live                                  all of `demo`, three minutes
python -m tools.bench.live --preset smoke --overrides '{max_steps: 400, eval_every: 50}'
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from jupyter_client.manager import run_kernel

from machinery.loggers import LOGGERS, FigureLogger
from machinery.settings import parse_overrides
from tools.common import lm


class TimedFigure(FigureLogger):
    """The figure, and the seconds that its calls took while the clock of the run went."""

    seconds, pictures = 0.0, 0

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        self._timed(super().metrics, step, values)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._timed(super().sample, step, prompt, text)

    def _timed(self, call: Callable, *arguments) -> None:
        drawn, started = self.drawn, time.perf_counter()
        call(*arguments)
        TimedFigure.seconds += time.perf_counter() - started
        TimedFigure.pictures += self.drawn != drawn


def measure(preset: str, overrides: str) -> None:
    """Train in this kernel from the start, and print the figure's share of the time."""
    LOGGERS["figure"] = TimedFigure
    options = {"run_name": "live", "runs_dir": "runs/.live", "resume": "never"}
    summary = lm.train(lm.Config.from_preset(preset, **(options | parse_overrides(overrides))))
    drawing, training = TimedFigure.seconds, summary["train_seconds"]
    print(f"{TimedFigure.pictures} drawings and the samples: {drawing:.2f} s of {training:.1f} s", end="")
    print(f", {drawing / training:.2%}, {1000 * drawing / max(1, TimedFigure.pictures):.0f} ms for each drawing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--overrides", default="", help="fields of the configuration, in YAML or JSON")
    options = parser.parse_args()

    def say(message: dict) -> None:
        if message["msg_type"] == "stream":
            print(message["content"]["text"], end="", flush=True)

    call = f"from tools.bench.live import measure; measure({options.preset!r}, {options.overrides!r})"
    with run_kernel(kernel_name="python3") as client:
        reply = client.execute_interactive(call, output_hook=say, allow_stdin=False)["content"]
    if reply["status"] != "ok":
        raise SystemExit(f"{reply['ename']}: {reply['evalue']}")


if __name__ == "__main__":
    main()
