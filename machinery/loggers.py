"""Where a run's numbers go beside its own files: a table of siblings, W&B the first of them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from pathlib import Path

from machinery.errors import first_line
from machinery.files import refuse_link, write_atomic


class Logger:
    """Receives what a run notes, beside its files. A sibling overrides what it needs; no error of it stops a run."""

    def __init__(self, folder: Path, config: dict) -> None:
        pass

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        """What a step and the evaluation after it gave."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """What the model wrote."""

    def finish(self, summary: dict | None) -> None:
        """The run ended; without a summary, by an error."""


class WandbLogger(Logger):
    """Weights & Biases, where `wandb` is "online" or "offline". Never asks for a key: without one it logs offline."""

    def __init__(self, folder: Path, config: dict) -> None:
        self.run = None
        if config["wandb"] == "off":
            return
        import wandb

        mode = config["wandb"]
        if mode == "online" and not wandb.login(prompt=False):
            mode = "offline"
            print("W&B: no API key here, logging offline (later: wandb login, then wandb sync)")
        settings = wandb.Settings(console="off", silent=True, init_timeout=60, disable_git=True, disable_code=True)
        id_file = folder / "wandb_id"
        refuse_link(id_file)
        run_id = id_file.read_text("utf-8", errors="replace") if id_file.exists() else ""
        if not re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII):
            run_id = secrets.token_hex(4)
            write_atomic(id_file, run_id)
        self.run = wandb.init(
            project="lmharness", name=folder.name, id=run_id, resume="allow",
            dir=folder.parent, config=config, mode=mode, settings=settings,
        )  # fmt: skip

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        if self.run:
            self.run.log(values, step=step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        if self.run:
            import html

            import wandb

            page = f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>"
            self.run.log({"sample": wandb.Html(page, inject=False)}, step=step)

    def finish(self, summary: dict | None) -> None:
        if self.run:
            self.run.summary.update(summary or {})
            self.run.finish(exit_code=0 if summary else 1)


LOGGERS = {"wandb": WandbLogger}  # each of them is told; W&B only listens where the config says so


class Loggers:
    """All loggers of the table, told together. One that fails is told of once and left out; it never stops training."""

    def __init__(self) -> None:
        self._running: dict[str, Logger] = {}

    def start(self, folder: Path, config: dict) -> None:
        """Begin with what the table holds now."""
        self._folder = folder
        for name, logger in LOGGERS.items():
            try:
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
