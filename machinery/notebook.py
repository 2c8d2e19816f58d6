"""The seam between the notebook and plain Python: its definitions as a module, and processes that train by them.

`tests/`, `tools/` and any script of yours get the notebook's classes and functions from here, so that
nothing is written twice:

    lm = load_definitions()
    model = lm.build_model(lm.Config.from_preset("smoke"))
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import linecache
import os
import signal
import subprocess
import sys
import threading
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path

from machinery.errors import UserError
from machinery.files import json_digest
from machinery.screen import keep_printing

NOTEBOOK = Path(__file__).parents[1] / "LMHarness.ipynb"


def defining_cells(notebook: str | Path = NOTEBOOK) -> list[tuple[int, str]]:
    """Number and source of the cells tagged `define`. Reads plain JSON: nbformat takes two seconds to import."""
    cells = json.loads(Path(notebook).read_text("utf-8")).get("cells", [])
    return [(i, "".join(c["source"])) for i, c in enumerate(cells) if "define" in c["metadata"].get("tags", [])]


def untagged_definitions(notebook: Path, defining: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Number of a cell without the tag, and name of what it defines anew."""
    names = {name for _, source in defining for name in _defined(source)}
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    for index in sorted({i for i, cell in enumerate(cells) if cell["cell_type"] == "code"} - {i for i, _ in defining}):
        yield from ((index, name) for name in _defined("".join(cells[index]["source"])) if name in names)


def _defined(source: str) -> list[str]:
    """The classes and functions of a cell; none of one with commands of IPython."""
    with contextlib.suppress(SyntaxError):
        kinds = (ast.ClassDef, ast.FunctionDef)
        return [node.name for node in ast.parse(source).body if isinstance(node, kinds)]
    return []


def load_definitions(notebook: str | Path = NOTEBOOK) -> types.ModuleType:
    """Execute the cells of `notebook` tagged `define`, in order, in a fresh module and return it.

    Stack traces show the notebook's own lines. Raises `UserError` when there is nothing to execute.
    """
    keep_printing()  # before anything is printed: names of files, and signs, which not every terminal has
    path = Path(notebook)
    defining = defining_cells(path)
    if not defining:
        raise UserError(f"{path.name} has no cell tagged 'define': is this the LMHarness notebook?")
    for index, name in untagged_definitions(path, defining):
        print(f"{path.name}, cell {index} defines {name} without the tag 'define': here it is that of a cell before")
    module = types.ModuleType(path.stem)
    module.defining_cells = defining
    sys.modules[module.__name__] = module  # dataclasses and torch.compile look classes up by module name
    for index, source in defining:
        name = f"{path.name}, cell {index}"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    return module


def definitions_in_use() -> types.ModuleType:
    """Those that were loaded last, with what a script has put in their place; anew where the notebook has changed."""
    module = sys.modules.get(NOTEBOOK.stem)
    return module if getattr(module, "defining_cells", None) == defining_cells() else load_definitions()


TRAIN = "import json, sys; from machinery import load_definitions; lm = load_definitions()"
TRAIN += "; lm.train(lm.Config.from_dict(json.loads(sys.argv[1])))"


class Training(subprocess.Popen):
    """A process that trains. One that has failed cannot be killed any more, and whoever wants to is told."""

    def kill(self) -> None:
        if (self.poll() or 0) > 0:
            raise UserError(
                "the other process failed, for the reason above; if that is something you wrote: it knows the saved"
                " LMHarness.ipynb alone, and of that the cells with the tag `define`"
            )
        super().kill()


def train_elsewhere(config, **options) -> Training:
    """A process that trains `config` by the definitions of the saved notebook; `options` as for `start_python`."""
    return start_python(TRAIN, json.dumps(config.to_dict()), kind=Training, **options)


def start_python(
    program: str, *arguments: str, env: dict[str, str] | None = None, kind=subprocess.Popen, **options
) -> subprocess.Popen:
    """A process of `program`, which finds this project's modules; `options` are those of Popen, or of a `kind` of it.

    It prints nothing, and its errors are UTF-8, whatever other programs here write. It ends with this one.
    """
    path = os.pathsep.join([str(NOTEBOOK.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"} | (env or {})
    program = f"from machinery.notebook import end_with_parent; end_with_parent(); {program}"
    command = [sys.executable, "-c", program, *arguments]
    return kind(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, **options)


def end_with_parent() -> None:
    """Have this process told to end, as by SIGTERM, once the one that started it is gone: its stdin closes then."""

    def watch() -> None:
        sys.stdin.read()
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def source_digest(notebook: str | Path = NOTEBOOK) -> str:
    """A hash of the code of all cells, whatever their outputs and comments are."""
    cells = json.loads(Path(notebook).read_text("utf-8"))["cells"]
    return json_digest([_without_comments("".join(c["source"])) for c in cells if c["cell_type"] == "code"])


def _without_comments(source: str) -> str:
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return "\n".join(lines)


def mark_executed(notebook: str | Path = NOTEBOOK) -> None:
    """Note in the file that its outputs are of its present code; a test asks for that. `make notebook` calls it."""
    content = json.loads(Path(notebook).read_text("utf-8"))
    content["metadata"]["executed_source"] = source_digest(notebook)
    Path(notebook).write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
