"""`make run` and `make script`: the notebook with other values for its two knobs.

    python -m tools.execute --preset demo --overrides '{n_layer: 2}'            executed, into the run's folder
    python -m tools.execute --preset demo --overrides '{n_layer: 2}' --script   as a program, LMHarness.py

An executed notebook is LMHarness.ipynb in the folder of its run, beside report.html, a page to read or to send. Those
of an earlier time are kept as LMHarness.1.ipynb, report.1.html and so on.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

STOPPED = "stopped; the same command goes on from the last checkpoint"
NO_ARGUMENTS = """import sys

if sys.argv[1:]:
    sys.exit(f"{sys.argv[0]} takes no arguments: make script PRESET=… OVERRIDES='{{…}}' writes one with other values")
"""
STOPPING = 240.0  # seconds for a training to end a step, write a checkpoint and close its loggers
if __name__ == "__main__":  # until `main`: the rest takes seconds to import
    signal.signal(signal.SIGINT, lambda *_: sys.exit(STOPPED))

import nbformat
import papermill
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter, ScriptExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, TagRemovePreprocessor

from machinery.errors import UserError, first_line, told
from machinery.files import folder_path, free_name
from machinery.notebook import NOTEBOOK
from machinery.screen import keep_printing
from machinery.settings import parse_overrides
from tools.common import ROOT, lm

PROGRAM = ROOT / "LMHarness.py"


def knobs_config(parameters: dict):
    """The Config that the two knobs stand for. Raises `UserError`."""
    return lm.Config.from_preset(parameters["preset"], **parse_overrides(parameters["overrides"]))


def verbatim(path: Path) -> str:
    """A path as papermill takes it, which would put values of the knobs where braces stand in it."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextlib.contextmanager
def kernel_errors_to(path: Path) -> Iterator[None]:
    """What the kernel and its client write to standard error past the notebook goes to `path`."""
    with told(path, problem="cannot be written", advice="set runs_dir to a folder of yours"):
        file = path.open("w")
    screen = os.dup(2)
    with file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)


class PatientKernel(AsyncKernelManager):
    """A kernel that is not killed after some seconds where a training may have been told to stop."""

    is_training = False

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
        if self.is_training:
            self.shutdown_wait_time = STOPPING
        await super().shutdown_kernel(now=now, restart=restart)


def execute(parameters: dict, unfinished: Path) -> nbformat.NotebookNode:
    """The executed notebook, whose prints appear on the screen. It is kept in `unfinished` where a cell fails."""
    log = unfinished.with_suffix(".log")
    try:
        with kernel_errors_to(log):
            papermill.execute_notebook(
                verbatim(NOTEBOOK), verbatim(unfinished), parameters, kernel_name="python3", progress_bar=False,
                stdout_file=sys.stdout, stderr_file=sys.stdout,
                kernel_manager_class=PatientKernel,
            )  # fmt: skip
        return nbformat.read(unfinished, as_version=4)
    except papermill.PapermillExecutionError as error:
        keep = unfinished.with_stem(unfinished.stem.replace("executing", "failed"))
        if os.path.lexists(keep):  # the earlier one is of another process that had the same number
            keep = free_name(keep.with_suffix(""), keep.suffix)
        unfinished.replace(keep)
        ours = {kind.__name__ for kind in (UserError, *UserError.__subclasses__())}
        said = error.evalue if error.ename in ours else f"{error.ename}: {error.evalue}"
        raise UserError(f"{said} (the notebook as far as it came is {keep})") from None
    except DeadKernelError:
        said = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"the kernel died, mostly for lack of memory{': '.join(['', *said])}") from None
    except UserError:
        raise
    except OSError as error:
        place, said = error.filename or unfinished, first_line(error)
        raise UserError(f"{place}: {said}; once that is mended, the same command goes on from what is kept") from None
    finally:
        for left in (unfinished, log):
            with contextlib.suppress(OSError):
                left.unlink()


def report_page(notebook: nbformat.NotebookNode, title: str = "LMHarness") -> str:
    """The HTML page of an executed notebook."""
    exporter = HTMLExporter(template_file=str(ROOT / "tools" / "report.html.j2"))
    return exporter.from_notebook_node(notebook, {"metadata": {"name": title}})[0]


def run_notebook(parameters: dict) -> Path:
    """Execute the notebook and put it into the folder of its run with a page to read; returns the folder."""
    config = knobs_config(parameters)
    runs = folder_path(config.runs_dir, "runs_dir, where runs are kept")
    with told(runs, problem="cannot be made", advice="set runs_dir to a folder of yours"):
        runs.mkdir(parents=True, exist_ok=True)
    notebook = execute(parameters, runs / f"executing-{os.getpid()}.ipynb")  # a run that starts over moves its folder
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    page, folder = report_page(notebook, config.run_name), runs / config.run_name
    with told(folder, problem="the run is there; its notebook and report cannot be written", advice="make room"):
        for name, suffix in (("LMHarness", ".ipynb"), ("report", ".html")):
            if os.path.lexists(folder / (name + suffix)):  # of an earlier time
                (folder / (name + suffix)).rename(free_name(folder / name, suffix))
        nbformat.write(notebook, folder / "LMHarness.ipynb")
        (folder / "report.html").write_text(page, encoding="utf-8")
    return folder


def write_program(parameters: dict) -> None:
    """LMHarness.py: the cells but those tagged `show`, as a program for torchrun."""
    knobs_config(parameters)  # refused here, and not by eight processes
    notebook = papermill.execute_notebook(verbatim(NOTEBOOK), None, parameters, prepare_only=True)
    notebook, _ = TagRemovePreprocessor(remove_cell_tags={"show"}, enabled=True).preprocess(notebook, {})
    notebook.cells.insert(0, nbformat.v4.new_code_cell(NO_ARGUMENTS))
    program, _ = ScriptExporter().from_notebook_node(notebook)
    with told(PROGRAM, problem="cannot be written", advice="copy this project to a folder of yours"):
        PROGRAM.write_text(program, encoding="utf-8")


def stop(number: int, frame: object) -> None:
    """Once: have the kernel interrupted and wait for its training to end. Twice: end at once."""
    for other in STOPS:
        if signal.getsignal(other) is stop:
            signal.signal(other, signal.default_int_handler)
    PatientKernel.is_training = True
    print("\nstopping; training, if any, ends its step and writes a checkpoint first (interrupt again to stop at once)")
    raise KeyboardInterrupt


STOPS = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])


def main() -> None:
    keep_printing()
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it reports a kernel that was told to end
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, stop)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="auto")
    parser.add_argument("--overrides", default="", help="fields of the configuration, in YAML or JSON")
    parser.add_argument("--script", action="store_true", help="write LMHarness.py, execute nothing")
    options = parser.parse_args()
    try:
        parameters = {"preset": options.preset or "auto", "overrides": options.overrides}
        if options.script:
            write_program(parameters)
            torchrun = f"{Path(sys.executable).parent / 'torchrun'} --nproc-per-node=auto"
            print(f"{sys.executable} LMHarness.py runs the program; on several GPUs: {torchrun} LMHarness.py")
        else:
            folder = run_notebook(parameters)
            print(f"{folder}/ has the executed notebook, LMHarness.ipynb, and a page to read or to send, report.html.")
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
