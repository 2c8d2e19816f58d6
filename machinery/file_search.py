"""Which files a path, a folder or a pattern names: each real file once, whatever links lead to it."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from machinery.errors import DataError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
WITHOUT = "without a suffix"
# In capitals, too, no text, even where they are named
TABLES = {".csv", ".tsv", ".tab", ".psv", ".json", ".ndjson", ".jsonl", ".jsonlines", ".ldjson", ".jl", ".parquet"}


def find_files(name: str, apart: Iterable[Path], passed_over: Counter[str]) -> dict[str, Path]:
    """Name to path of every file of text or rows; names are relative to the folder that is searched.

    A path that exists is that path, "~" is home, then patterns, "{c,js}" for either. Nothing inside the folders `apart`
    is found. Notes in `passed_over` what else is there. A suffix that the name spells out is one of text, as in
    "logs/*.log"; where a pattern spells none, "mail/*", so is none. Raises `DataError` for a device.
    """
    root, parts = existing_part(name)
    if parts or root.is_dir():
        return _walk(root, parts or ["**"], apart, passed_over)
    if root.is_file():
        return {root.name: _to_read(root)} if _text_file(root, passed_over, {_suffix(root)}) else {}
    raise DataError(f"source {name!r} is a device, a pipe or a socket; name a file or a folder")


def _walk(root: Path, parts: list[str], apart: Iterable[Path], passed_over: Counter[str]) -> dict[str, Path]:
    """The files under `root` that fit a pattern, once each, whatever links lead to them."""
    set_apart = {found for folder in apart if (found := identity(folder))}
    parts = [each for part in parts for each in _parts(composed(part))]
    end, seen = len(parts), set()
    named = {_suffix(choice) for choice in _choices(parts[-1])} if parts[-1] != "**" else set()
    # Of each folder, the parts of the pattern that may come next, by number: those before are matched, at `end` all
    reaching = {str(root): _skipping({0}, parts)}
    files: dict[tuple[int, int], str] = {}

    def unreadable(error: OSError) -> None:
        passed_over["unreadable folders"] += not isinstance(error, NotADirectoryError)

    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        here, reached = identity(folder), reaching.pop(folder)
        no_text = folder != str(root) and (here in set_apart or "tokenizer.json" in names)
        passed_over["folders of a run, shards or a checkpoint"] += bool(no_text)
        if no_text or (here, reached) in seen:
            subfolders.clear()
            continue
        seen.add((here, reached))
        after = {name: _after(name, reached, parts) for name in subfolders + names}
        if parts == ["**"]:
            passed_over["hidden files, folders"] += sum(not after[name] for name in after)
        elif "**" not in parts:
            passed_over["folders, read with /** after them"] += sum(end in after[name] for name in subfolders)
        subfolders[:] = sorted(name for name in subfolders if after[name] - {end})
        reaching |= {os.path.join(folder, name): after[name] for name in subfolders}
        for path in (os.path.join(folder, name) for name in sorted(names) if end in after[name]):
            if found := _text_file(path, passed_over, named):
                known = files.get(found)
                if known is None or (os.path.islink(known) and not os.path.islink(path)):
                    files[found] = path  # a file's own name says how to read it
    within = len(os.path.join(root, ""))
    return {path[within:].replace(os.sep, "/"): _to_read(path) for path in files.values()}


def _to_read(path: str | Path) -> Path:
    """The path whose suffix says how to read a file: of a link without such a suffix, where it leads."""
    path = Path(path)
    return path.resolve() if path.suffix not in SUFFIXES and path.is_symlink() else path


def _text_file(path: str | Path, passed_over: Counter[str], named: set[str]) -> tuple[int, int] | None:
    """The identity of a file that is read; None for one that is not, which is noted as passed over. `named` are the
    suffixes that were asked for.

    The system is asked once: files come and go, and grow, while a folder is listed.
    """
    found, own, leads_to = _stat(path), _suffix(path), _suffix(_to_read(path))
    suffix = own or leads_to
    is_text = own in SUFFIXES or leads_to in SUFFIXES or (suffix in named and suffix.lower() not in TABLES)
    if not (found and stat.S_ISREG(found.st_mode)):
        passed_over["broken links, devices, unreadable files"] += 1
    elif not is_text:
        passed_over[suffix or WITHOUT] += 1
    elif not found.st_size:
        passed_over["empty files"] += 1
    else:
        return found.st_dev, found.st_ino
    return None


def _suffix(path: str | Path) -> str:
    """The suffix of a name; none where it ends in a point."""
    return os.path.splitext(path)[1].rstrip(".")


def existing_part(pattern: str) -> tuple[Path, list[str]]:
    """The longest beginning of a pattern that exists as it is written, and the parts that follow it.

    Where it does not, a name counts that is the same but for how its accents are composed, as on disks of a Mac.
    """
    path = Path(pattern if os.path.lexists(pattern) else os.path.expanduser(pattern))
    root = Path(path.anchor)
    parts = list(path.parts[len(root.parts) :])
    while parts and (found := _entry(root, parts[0])):
        root, parts = root / found, parts[1:]
    return root, parts


def _entry(folder: Path, name: str) -> str | None:
    """The name in a folder that is meant; None where there is none."""
    if os.path.exists(folder / name):
        return name
    with contextlib.suppress(OSError, ValueError):
        alike = (entry for entry in os.listdir(folder) if composed(entry) == composed(name))
        return next((entry for entry in alike if os.path.exists(folder / entry)), None)


def composed(name: str) -> str:
    """A name with its accents composed, however a disk keeps them."""
    return unicodedata.normalize("NFC", name)


def _after(name: str, reached: frozenset[int], parts: list[str]) -> frozenset[int]:
    """The parts of a pattern that may come next, by number, after `name` came for one of `reached`.

    "**" is any number of folders, at its end of anything. A name that begins with a point fits a part that does.
    """
    found = set()
    for number in reached - {len(parts)}:
        if name.startswith(".") and not parts[number].startswith("."):
            continue
        if parts[number] == "**":
            found.add(number)
        elif any(fnmatch.fnmatchcase(composed(name), choice) for choice in _choices(parts[number])):
            found.add(number + 1)
    return _skipping(found, parts)


def _parts(part: str) -> list[str]:
    """A part of a pattern as fnmatch reads it: "[^a]" is "[!a]"; and "**.txt" is "**/*.txt"."""
    part = part.replace("[^", "[!")
    return ["**", part[1:]] if part.startswith("**") and part != "**" else [part]


@cache
def _choices(part: str) -> list[str]:
    """A part of a pattern, once for each choice within its braces; without a comma these are signs like others."""
    if not (found := re.fullmatch(r"(.*)\{([^{}]*,[^{}]*)\}(.*)", part)):
        return [part]
    before, choices, after = found.groups()
    return [each for choice in choices.split(",") for each in _choices(before + choice + after)]


def _skipping(reached: set[int], parts: list[str]) -> frozenset[int]:
    """`reached`, and what comes after each "**" there."""
    for number, part in enumerate(parts):
        if part == "**" and number in reached:
            reached.add(number + 1)
    return frozenset(reached)


def identity(path: str | Path) -> tuple[int, int] | None:
    """What a file or folder is, under whatever name; None where there is none."""
    found = _stat(path)
    return (found.st_dev, found.st_ino) if found else None


def _stat(path: str | Path) -> os.stat_result | None:
    with contextlib.suppress(OSError, ValueError):
        return os.stat(path)
