"""Where a run's numbers go beside its own files: a table of siblings, such as W&B and the figure in a notebook."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import psutil

from machinery.errors import first_line
from machinery.figures import describe, draw_run
from machinery.files import json_digest, read_jsonl, read_note, refuse_link, regular_file, write_atomic
from machinery.run_folder import as_sample
from machinery.screen import in_notebook


class Logger:
    """Receives what a run notes, beside its files. A sibling overrides what it needs; no error of it stops a run."""

    @staticmethod
    def is_wanted(config: dict) -> bool:
        """Whether a run with these settings has one."""
        return True

    def __init__(self, folder: Path, config: dict) -> None:
        pass

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        """What a step and the evaluation after it gave."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """What the model wrote."""

    def finish(self, summary: dict | None) -> None:
        """The run ended; without a summary, by an error."""


WANDB_SECONDS = 60.0  # to end in; then it is left


class WandbLogger(Logger):
    """Weights & Biases, where `wandb` is "online" or "offline". Never asks for a key: without one, or where the service
    is not reached, it logs offline.

    A process of its own, `wandb-core`, writes and sends. Where that has died or does not end, it is told and left.
    """

    @staticmethod
    def is_wanted(config: dict) -> bool:
        return config["wandb"] != "off"

    def __init__(self, folder: Path, config: dict) -> None:
        import wandb

        mode = config["wandb"]
        if mode == "online":
            try:
                missing = "" if wandb.login(prompt=False) else "no API key here"
            except wandb.Error as error:
                missing = first_line(error)
            if missing:
                mode = "offline"
                print(f"W&B: {missing}, logging offline (later: wandb login, then wandb sync)")
        settings = wandb.Settings(console="off", silent=True, init_timeout=60, disable_git=True, disable_code=True)
        id_file = folder / "wandb_id"
        refuse_link(id_file)
        if not (drawn := regular_file(id_file).read_text("utf-8", errors="replace") if id_file.exists() else ""):
            drawn = secrets.token_hex(4)
            write_atomic(id_file, drawn)
        run_id = json_digest([drawn, folder.name])[:16]  # a copy of the folder under another name is another run
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lmharness"), name=folder.name, id=run_id, resume="allow",
            dir=folder.parent, config=config, mode=mode, settings=settings,
        )  # fmt: skip
        self.processes = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        if any(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in self.processes):
            self._leave()
            raise RuntimeError("its process has died")
        self.run.log(values, step=step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        import wandb

        page = f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>"
        self.run.log({"sample": wandb.Html(page, inject=False)}, step=step)

    def finish(self, summary: dict | None) -> None:
        errors = []

        def end() -> None:
            try:
                self.run.summary.update(summary or {})
                self.run.finish(exit_code=0 if summary else 1)
            except Exception as error:
                errors.append(error)

        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(WANDB_SECONDS / 12)
        if ending.is_alive():
            print(f"waiting up to {WANDB_SECONDS:.0f} s for W&B to end")
            ending.join(WANDB_SECONDS)
        if ending.is_alive():
            self._leave()
            raise TimeoutError("it did not end; `wandb sync` sends what it holds")
        if errors:
            raise errors[0]

    def _leave(self) -> None:
        """End its processes, which the end of this program would wait for; what they have written stays."""
        import wandb

        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(Exception, SystemExit):  # it complains that they are gone
            wandb.teardown()


FIGURE_SHARE = 0.004  # of the time, at most, goes into drawing; evaluations that come too soon after others wait


class FigureLogger(Logger):
    """In a notebook, the curves of the run, drawn anew in one place at its evaluations, and beneath them its newest
    sample. Both stay in the cell's output.
    """

    @staticmethod
    def is_wanted(config: dict) -> bool:
        return in_notebook()

    def __init__(self, folder: Path, config: dict) -> None:
        from IPython.display import DisplayHandle, display

        self.lines = read_jsonl(folder / "metrics.jsonl")
        self.expected = read_note(folder / "expected.json")
        self.started, self.spent = time.perf_counter(), 0.0  # seconds
        self.curves = DisplayHandle()
        self._draw(self.curves.display)  # empty axes, or the steps of an earlier part; the first one takes longer
        self.text = display({"text/plain": ""}, raw=True, display_id=True)
        for sample in read_jsonl(folder / "samples.jsonl")[-1:]:
            self.sample(**sample)

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        self.lines.append({"step": step, **values})
        before = time.perf_counter()
        if step and "val_loss" in values and self.spent <= FIGURE_SHARE * (before - self.started):
            self._draw(self.curves.update)
            self.spent += time.perf_counter() - before

    def sample(self, step: int, prompt: str, text: str) -> None:
        words = as_sample({"step": step, "prompt": prompt, "text": text}, heading=True)
        self.text.update({"text/plain": words}, raw=True)

    def finish(self, summary: dict | None) -> None:
        if self._steps() != self.drawn:  # some came after the last drawing
            self._draw(self.curves.update)

    def _draw(self, put: Callable) -> None:
        """Draw the figure and `put` it in its place, as a notebook keeps it."""
        self.drawn, content = self._steps(), io.BytesIO()
        figure = draw_run(self.lines, self.expected)
        try:
            figure.savefig(content, format="png", dpi=72)
        finally:
            plt.close(figure)
        picture = {"image/png": base64.b64encode(content.getvalue()).decode(), "text/plain": "the curves of this run"}
        put(picture, raw=True, metadata={"image/png": {"alt": describe(figure)}})

    def _steps(self) -> int:
        return sum("train_loss" in line for line in self.lines)


LOGGERS = {"wandb": WandbLogger, "figure": FigureLogger}


class Loggers:
    """All loggers of the table, told together. One that fails is told of once and left out; it never stops training."""

    def __init__(self) -> None:
        self._running: dict[str, Logger] = {}

    def start(self, folder: Path, config: dict) -> None:
        """Begin with what the table holds now."""
        self._folder = folder
        for name, logger in LOGGERS.items():
            try:
                if logger.is_wanted(config):
                    self._running[name] = logger(folder, config)
            except Exception as error:
                self._left_out(name, "is off", error)

    def tell(self, action: Callable[[Logger], None]) -> None:
        """Do something with each."""
        for name, logger in list(self._running.items()):
            try:
                action(logger)
            except Exception as error:
                del self._running[name]
                self._left_out(name, "stopped", error)

    def finish(self, summary: dict | None) -> None:
        """End all that still run."""
        self.tell(lambda logger: logger.finish(summary))
        self._running = {}

    def _left_out(self, name: str, what: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {first_line(error)}"
        print(f"{name} {what} ({reason}); the run goes on, its files are in {self._folder}")
