"""`make run` and `make script`: values of the knobs come in, each run keeps its own notebook and page."""

import signal
import subprocess
import sys
import time

import pytest

from machinery.errors import UserError
from machinery.watch import announce
from tools import execute

nbformat = pytest.importorskip("nbformat")
v4 = pytest.importorskip("nbformat.v4")
new_code_cell, new_notebook = v4.new_code_cell, v4.new_notebook


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Makes a notebook of one cell beside the knobs the one that is executed; returns the parameters of a run.

    Braces in a path are braces: papermill would put a value of the knobs in their place.
    """

    def make(source: str) -> dict:
        knobs = new_code_cell("preset, overrides = None, None", metadata={"tags": ["parameters"]})
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(
            new_notebook(cells=[knobs, new_code_cell(source)], metadata=kernel), tmp_path / "small {x}.ipynb"
        )
        monkeypatch.setattr(execute, "NOTEBOOK", tmp_path / "small {x}.ipynb")
        return {"preset": "smoke", "overrides": {"runs_dir": str(tmp_path / "runs {preset}"), "run_name": "mine"}}

    return make


def test_each_run_keeps_its_own_notebook_and_page(notebook, tmp_path, capfd):
    parameters = notebook("from pathlib import Path; Path(overrides['runs_dir'], 'mine').mkdir(); print(preset, 'ran')")
    folder = execute.run_notebook(parameters)
    assert sorted(path.name for path in folder.iterdir()) == ["LMHarness.ipynb", "report.html"]
    assert "smoke ran" in capfd.readouterr().out and "smoke ran" in (folder / "report.html").read_text("utf-8")
    first = (folder / "report.html").read_bytes()
    assert f"<title>{folder.name}</title>".encode() in first
    execute.run_notebook(notebook("print('again')"))
    assert (folder / "report.1.html").read_bytes() == first and "again" in (folder / "LMHarness.ipynb").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]  # nothing else is left


WAITS = """
import time
from pathlib import Path
from machinery.interrupts import StopRequest
from machinery.settings import parse_overrides
here = Path(parse_overrides(overrides)["runs_dir"])
with StopRequest() as stop:
    (here / "begun").touch()
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(1.5)  # a step, and a checkpoint
    (here / "saved").touch()
"""


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.long) for name in ("SIGINT", "SIGHUP"))]
)
def test_a_run_that_is_told_to_end_has_the_time_it_needs(notebook, tmp_path, name):
    parameters, runs = notebook(WAITS), tmp_path / "runs {preset}"
    program = (
        f"from tools import execute; execute.NOTEBOOK = execute.Path({str(execute.NOTEBOOK)!r});"
        "execute.PatientKernel.shutdown_wait_time = 0.5; execute.main()"  # less than it needs
    )
    command = [sys.executable, "-c", program, "--preset", "smoke", "--overrides", str(parameters["overrides"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not (runs / "begun").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        *_, last = process.communicate(timeout=60)[0].splitlines()
    assert last == execute.STOPPED and {path.name for path in runs.iterdir()} == {"begun", "saved"}


def test_a_cell_that_fails_and_a_kernel_that_dies_are_one_line(notebook, tmp_path):
    with pytest.raises(UserError, match=r"^ValueError: too much \(the notebook .*failed-\d+.ipynb"):
        execute.run_notebook(notebook("raise ValueError('too much')"))
    (kept,) = (tmp_path / "runs {preset}").iterdir()
    first = kept.read_bytes()
    with pytest.raises(UserError, match=r"failed-\d+.1.ipynb"):
        execute.run_notebook(notebook("raise ValueError('again')"))
    with pytest.raises(UserError, match=r"^no such text \(the notebook"):
        execute.run_notebook(notebook("from machinery import UserError; raise UserError('no such text')"))
    assert kept.read_bytes() == first
    with pytest.raises(UserError, match="^the kernel died, mostly for lack of memory"):
        execute.run_notebook(notebook("import os; os._exit(9)"))
    for overrides, message in [("{n_layer: 0}", "n_layer is 0"), ("[1", "cannot be read"), ("n_layer", "n_layer")]:
        with pytest.raises(UserError, match=message) as caught:  # before a kernel is started
            execute.run_notebook({"preset": "smoke", "overrides": overrides})
        assert "\n" not in str(caught.value)
    assert len(list((tmp_path / "runs {preset}").iterdir())) == 3


def test_the_program_has_the_knobs_and_no_cells_that_show(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "PROGRAM", tmp_path / "LMHarness.py")
    execute.write_program({"preset": "demo", "overrides": "{n_layer: 2, prompt: it's}"})
    program = (tmp_path / "LMHarness.py").read_text("utf-8")
    assert 'preset = "demo"' in program and 'overrides = "{n_layer: 2, prompt: it\'s}"' in program
    assert "summary = train(config)" in program and "from tools" not in program
    ended = subprocess.run([sys.executable, tmp_path / "LMHarness.py", "--steps=3"], capture_output=True, text=True)
    assert ended.returncode == 1 and "takes no arguments: make script PRESET=… OVERRIDES='{…}' writes" in ended.stderr
    compile(program, "LMHarness.py", "exec")
    monkeypatch.setattr(execute, "PROGRAM", tmp_path)
    with pytest.raises(UserError, match="cannot be written .Is a directory.; copy this project"):
        execute.write_program({"preset": "demo", "overrides": ""})


def test_a_day_its_gigabytes_and_an_hour_to_begin_with_are_announced(capsys):
    """`make run` prints what the notebook's cell does, as in Jupyter."""
    said = {}
    for name, overrides in {"day": {}, "hour": {"source": "owner/name", "vocab_size": 1 << 17}, "demo": {}}.items():
        announce(execute.knobs_config({"preset": name, "overrides": overrides}))
        said[name] = capsys.readouterr().out
    assert "trains for 24 hours on 'HuggingFaceFW/fineweb-edu:sample-10BT'" in said["day"]
    assert "up to 10 billion tokens are some 40 GB to fetch and 20 GB in data, where" in said["day"]
    assert 'preset to "hour"' in said["day"] and "preset to" not in said["hour"] + said["demo"]
    assert "each billion tokens is some 4 GB to fetch and 4 GB in data" in said["hour"] and "hub" not in said["demo"]
    cells = nbformat.read(execute.NOTEBOOK, as_version=4).cells
    said, prepared = (next(i for i, c in enumerate(cells) if f"\n{call}(config)" in c.source or
                      f"= {call}(config)" in c.source) for call in ("announce", "prepare_data"))  # fmt: skip
    assert said < prepared
