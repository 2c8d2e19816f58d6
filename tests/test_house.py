"""The rules of the layout: what stands where, what may import what, and how long it may be."""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT

from machinery.notebook import defining_cells

TOP = {
    "LMHarness.ipynb", "data_utils.py", "model_utils.py", "train_utils.py", "machinery", "tools", "tests", "results",
    "docs", "README.md", "requirements.txt", "Makefile", "pyproject.toml",
}  # fmt: skip
SUPPORT = ("data_utils", "model_utils", "train_utils")
LINES = {"data_utils.py": 400, "model_utils.py": 320, "train_utils.py": 320}
TABLES = ("ATTENTIONS", "POSITIONS", "FFNS", "NORMS", "OPTIMIZERS", "SCHEDULES", "SOURCES", "LOGGERS")


def tracked(pattern: str = "*") -> list[Path]:
    """The files of the repository that git knows, relative to its root."""
    listed = subprocess.run(["git", "ls-files", "-z", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def module_name(path: Path) -> str:
    """tools/bench/common.py is tools.bench.common, and tools/bench/__init__.py is tools.bench."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): ast.parse((ROOT / path).read_text("utf-8"))
    for path in tracked("*.py")
    if path.parts[0] not in ("tests", ".ci")
}


def cells(tag: str) -> list[ast.Module]:
    """The notebook's code cells with a tag; "" for those without `define` and `show`."""
    found = []
    for cell in json.loads((ROOT / "LMHarness.ipynb").read_text("utf-8"))["cells"]:
        tags = set(cell["metadata"].get("tags", [])) & {"define", "show"} or {""}
        if cell["cell_type"] == "code" and tag in tags:
            found.append(ast.parse("".join(cell["source"])))
    return found


def imports(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """(module, names) of every import of ours below `tree`, also within functions; `import x` has no names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found.append((node.module, [alias.name for alias in node.names]))
    ours = {name.split(".")[0] for name in MODULES}
    return [(module, names) for module, names in found if module.split(".")[0] in ours]


def imported_modules(tree: ast.AST) -> set[str]:
    """The modules of ours that `tree` imports: `from machinery import files` is machinery.files."""
    modules = set()
    for module, names in imports(tree):
        inside = {f"{module}.{name}" for name in names} & set(MODULES)
        modules |= inside if names and len(inside) == len(names) else inside | {module}
    return modules


def layer(module: str) -> int:
    """Packages may be imported from layers above them: machinery 0, the support modules 1, tools 2."""
    top = module.split(".")[0]
    return {"machinery": 0, "tools": 2}.get(top, 1)


def test_the_top_level_is_what_was_ordered():
    here = {path.parts[0] for path in tracked() if not path.parts[0].startswith(".")}
    assert here - {"docs"} == TOP - {"docs"}


def test_the_notebook_imports_few_names_and_only_what_it_may():
    names = []
    for tree in cells("define"):
        for module, imported in imports(tree):
            assert module.split(".")[0] in (*SUPPORT, "machinery"), f"a define cell imports {module}"
            names += imported or [module]
    assert len(names) <= 15, names
    for tree in cells(""):
        assert not [module for module in imported_modules(tree) if layer(module) == 2], "only show cells import tools"


def test_nothing_imports_upward():
    for name, tree in MODULES.items():
        above = [module for module in imported_modules(tree) if layer(module) > layer(name)]
        assert not above, f"{name} imports {above}"


def test_imports_make_no_circle():
    edges = {name: imported_modules(tree) & set(MODULES) for name, tree in MODULES.items()}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        for other in sorted(edges[name]):
            visit(other, (*path, name))
        edges[name] = set()  # no circle goes through it

    for name in sorted(edges):
        visit(name, ())


def test_modules_and_the_notebook_are_short():
    for name, limit in LINES.items():
        lines = len((ROOT / name).read_text("utf-8").splitlines())
        assert lines <= limit, f"{name} has {lines} lines, {limit} are allowed"
    defining = sum(bool(line.strip()) for _, source in defining_cells() for line in source.splitlines())
    assert defining <= 640, f"the define cells have {defining} lines that are not blank"


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def functions_in(tree: ast.AST) -> list[ast.AST]:
    """The functions and lambdas directly inside `tree`, at whatever depth of its statements."""
    found, waiting = [], list(ast.iter_child_nodes(tree))
    while waiting:
        node = waiting.pop()
        if isinstance(node, FUNCTIONS):
            found.append(node)
        else:
            waiting += ast.iter_child_nodes(node)
    return found


def test_the_loop_fits_on_one_screen():
    defined = [node for tree in cells("define") for node in tree.body if isinstance(node, ast.FunctionDef)]
    (train,) = (function for function in defined if function.name == "train")
    lines = train.end_lineno - train.lineno + 1
    assert lines <= 60, f"train has {lines} lines"
    for inner in functions_in(train):
        assert not functions_in(inner), f"line {inner.lineno} of its cell: a function inside a function of train"


def test_no_function_is_defined_twice():
    """At the top level of two modules, or of a module and the notebook; methods of classes may share their names.

    A program's `main` is its own. The findings of tools/experiments are siblings of one table: they share theirs too.
    """
    siblings = ("variants", "measure", "draw", "say")
    homes = defaultdict(set)
    for name, tree in [*MODULES.items(), *(("the notebook", tree) for tree in cells("define"))]:
        allowed = ("main", *siblings) if name.startswith("tools.experiments.") else ("main",)
        for node in tree.body:
            if isinstance(node, FUNCTIONS) and node.name not in allowed:
                homes[node.name].add(name)
    twice = {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1}
    assert not twice


UNTOUCHED = """
import contextlib, importlib, signal, sys
import matplotlib
def state():
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    return {"excepthook": sys.excepthook, "stdout": sys.stdout, "stderr": sys.stderr, "signal handlers": handlers,
            "matplotlib's settings": dict(matplotlib.rcParams)}
for number in signal.valid_signals():  # what the process that started this one ignores would be ignored here too
    with contextlib.suppress(OSError, ValueError):  # SIGKILL, and what the C library keeps
        signal.signal(number, signal.SIG_DFL)
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    for what, value in state().items():
        if value != before[what]:
            sys.exit(f"importing {name} changes {what}")
"""


def test_importing_has_no_side_effect():
    done = subprocess.run([sys.executable, "-c", UNTOUCHED, *MODULES], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr.strip().splitlines()[-1]
    assert not done.stdout.strip()


@pytest.mark.parametrize("table", TABLES)
def test_choices_are_tables_with_one_home(table):
    """Each stands once, at the top level of the notebook or of a module, and holds siblings by name."""
    homes = []
    trees = [*MODULES.items(), *(("the notebook", tree) for tree in cells("define"))]
    for name, tree in trees:
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == table for target in targets):
                homes.append((name, node.value))
    assert len(homes) == 1, f"{table} is defined in {[name for name, _ in homes]}"
    assert isinstance(homes[0][1], ast.Dict) and homes[0][1].keys
