"""Power cuts: what a disk may hold after each of them, rebuilt from the kernel's own record of a run.

`strace` records every write, flush, rename and removal of a run that trains, ends and goes on. A power cut may come
after any of them. The disk then holds all that was flushed: the bytes of a file by its own fsync, the names in a folder
by that of the folder. Of what was not flushed it holds any part: names may have changed in another order, and bytes may
be missing, cut short or zero. (File systems promise more than that; see Pillai et al. 2014, "All File Systems Are Not
Created Equal".)
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from machinery.checkpoints import newest_checkpoint
from machinery.errors import UserError
from machinery.notebook import TRAIN
from tools.common import ROOT, lm, quietly
from tools.drills.common import Result, equal, make_texts, tiny_config, weights

CALLS = "openat,write,writev,lseek,ftruncate,rename,renameat,unlink,unlinkat,rmdir,mkdir,fsync"
CALLS += ",pwrite64,fallocate,renameat2,link,linkat,fdatasync"  # should a library come to use them, it is noticed
STRACE = ["strace", "-f", "-y", "-qq", "-xx", "-s", "1000000000", "-e", "signal=none", "-e", f"trace={CALLS}"]
ROOT_FOLDER = -1
RESUME_EVERY = 150  # states: after so many, training goes on from one


@dataclass
class Operation:
    """A change of the names in a folder, of the bytes of a file, or a flush. Folders have negative numbers."""

    path: str
    folder: int | None = None
    names: tuple[tuple[str, int | None], ...] = ()  # of the folder, with what each leads to from now on
    file: int | None = None
    content: bytes = b""  # all of the file's from now on
    flushed: int | None = None  # a file or a folder


def power_cuts(folder: Path, times: int) -> Result:
    """Rebuild `times` different states of a disk: a reader finds what was promised, and from some training goes on."""
    if shutil.which("strace") is None or subprocess.run(["strace", "-o", "/dev/null", "true"]).returncode:
        return Result("power cut", 0, 0, note="skipped: strace is not installed, or may not trace here")
    chance, disk = random.Random(0), folder / "disk"
    config = tiny_config(
        folder, source=make_texts(folder / "few", files=8, lines=10), eval_tokens=64, max_steps=20, keep_checkpoints=1,
        schedule="constant", warmup=0.0, decay=0.0, data_dir=str(disk / "data"), runs_dir=str(disk / "runs"),
    )  # fmt: skip
    longer = replace(config, max_steps=30)
    operations = to_operations([*record(folder / "trace", config), *record(folder / "trace", longer)], disk)
    straight = weights(longer)
    if rebuild(operations, lambda _: True, lambda contents: contents[-1]) != read_tree(disk):
        return Result("power cut", times, 0, note="the record does not lead to what is on the disk")

    seen, cuts, failures, resumed, same = set(), set(), [], 0, 0
    for attempt in range(20 * times):
        if len(seen) == times:
            break
        cut = (attempt * 7919) % (len(operations) + 1)  # a prime: all of them, in no order
        tree = cut_power(operations[:cut], chance)
        state = hash(frozenset(tree.items()))
        if state in seen:
            continue
        seen.add(state)
        cuts.add(cut)
        shutil.rmtree(disk)
        write_tree(disk, tree)
        wrong = broken_promise(operations, cut, disk, tree, config.run_name)
        if not wrong and len(seen) % RESUME_EVERY == 0:
            try:
                quietly(lm.train, longer)
                resumed, same = resumed + 1, same + equal(straight, weights(longer))
            except UserError as error:
                wrong = str(error)
        failures += [f"after operation {cut}: {wrong}"] if wrong else []
    note = (
        f"after each of {len(cuts)} of {len(operations)} operations that strace recorded; {resumed} states trained on"
    )
    note, survived = "; ".join([note, *failures[:3]]), len(seen) - len(failures)
    return Result("power cut", len(seen), survived, identical=same == resumed if resumed else None, note=note)


# ------------------------------------------------------------------------------------------- the record


def record(trace: Path, config) -> Iterator[tuple[str, str, int]]:
    """Train in a process of its own; yields the calls that succeeded: name, arguments, result."""
    program = [*STRACE, "-o", trace, sys.executable, "-c", TRAIN, json.dumps(config.to_dict())]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(program, check=True, cwd=ROOT, **quiet)  # from where modules are found
    begun: dict[str, str] = {}  # by threads: a call during which another thread makes one is written in two parts
    for line in trace.read_text("ascii").splitlines():
        thread, text = line.split(maxsplit=1)
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>")
            continue
        if text.startswith("<..."):
            text = begun.pop(thread) + text.split("resumed>", 1)[1]
        if call := re.fullmatch(r"(\w+)\((.*)\)\s+= (\d+).*", text):
            yield call[1], call[2], int(call[3])


def to_operations(calls: Iterable[tuple[str, str, int]], disk: Path) -> list[Operation]:
    """What the calls did below the folder `disk`. A name may lead to one file after another: those have numbers."""
    folders: dict[int, dict[str, int | None]] = {ROOT_FOLDER: {}}
    files: dict[int, bytes] = {}
    positions: dict[tuple[str, str], int] = {}  # where the next byte goes, by descriptor and path
    operations: list[Operation] = []

    def name(path: str, *names: tuple[str, int | None]) -> None:
        for text, number in names:
            folders[folder][text] = number
        operations.append(Operation(path, folder, names))

    def write(path: str, number: int, content: bytes) -> None:
        files[number] = content
        operations.append(Operation(path, file=number, content=content))

    for call, arguments, result in calls:
        opened = [decode(text).decode() for text in re.findall(r"<((?:\\x\w\w)+)>", arguments)]
        strings = [decode(text) for text in re.findall(r'"((?:\\x\w\w)*)"', arguments)]
        on_descriptor = call in ("write", "writev", "lseek", "ftruncate", "fsync")
        paths = opened[:1] if on_descriptor else [str(Path(*opened[:1], text.decode())) for text in strings]
        if not paths or not Path(paths[0]).is_relative_to(disk) or "O_TMPFILE" in arguments:
            continue
        path, descriptor = paths[0], arguments.split("<")[0]
        folder, number = None, ROOT_FOLDER
        for text in Path(path).relative_to(disk).parts:
            folder, number = number, folders[number].get(text)
        if call == "openat" and ("O_CREAT" in arguments or number in files):
            if number is None:
                number = len(files)
                files[number] = b""
                name(path, (Path(path).name, number))
            elif "O_TRUNC" in arguments:
                write(path, number, b"")
            positions[str(result), path] = len(files[number]) if "O_APPEND" in arguments else 0
        elif call == "mkdir" and folder is not None:
            number = ROOT_FOLDER - len(folders)
            folders[number] = {}
            name(path, (Path(path).name, number))
        elif call in ("rename", "renameat"):
            assert Path(paths[1]).parent == Path(path).parent, "of two folders, both would have to be flushed"
            name(path, (Path(path).name, None), (Path(paths[1]).name, number))
        elif call in ("unlink", "unlinkat", "rmdir"):
            name(path, (Path(path).name, None))
        elif call == "lseek":
            positions[descriptor, path] = result
        elif call == "ftruncate":
            size = int(arguments.rsplit(",", 1)[1])
            write(path, number, files[number][:size].ljust(size, b"\0"))
        elif call in ("write", "writev"):
            at, content = positions[descriptor, path], b"".join(strings)[:result]
            write(path, number, files[number][:at].ljust(at, b"\0") + content + files[number][at + result :])
            positions[descriptor, path] = at + result
        elif call == "fsync":
            operations.append(Operation(path, flushed=number))
        elif call != "openat" and folder is not None:
            raise ValueError(f"{call} is not known to this drill")
    return operations


def decode(text: str) -> bytes:
    """Bytes as `strace -xx` writes them."""
    return bytes.fromhex(text.replace("\\x", ""))


# ------------------------------------------------------------------------------------------- the states


def cut_power(operations: list[Operation], chance: random.Random) -> dict[str, bytes]:
    """One of the trees that a disk may hold when the power goes after `operations`."""
    flushed, safe = set(), set()
    for number, operation in reversed(list(enumerate(operations))):
        if operation.flushed is not None:
            flushed.add(operation.flushed)
        elif operation.folder in flushed or operation.file in flushed:
            safe.add(number)
    share = chance.choice([0.0, 0.5, 1.0])  # of the changes of names that reached the disk without a flush
    kept = safe | {number for number in range(len(operations)) if chance.random() < share}
    kind = chance.choice(["old", "new", "cut", "zero", "mixed"])

    def bytes_of(contents: list[bytes]) -> bytes:
        old, *later = contents
        if not later:
            return old
        how, new = chance.choice(["old", "new", "cut", "zero"]) if kind == "mixed" else kind, chance.choice(later)
        zero = old[: len(new)].ljust(len(new), b"\0")
        return {"old": old, "new": new, "cut": new[: len(new) // 2], "zero": zero}[how]

    return rebuild(operations, kept.__contains__, bytes_of, safe)


def rebuild(
    operations: list[Operation],
    is_kept: Callable[[int], bool],
    bytes_of: Callable[[list[bytes]], bytes],
    safe: Iterable[int] = (),
) -> dict[str, bytes]:
    """The files by their paths, and folders with a "/" after theirs, from the changes of names that are kept.

    `bytes_of` chooses among what a file held at its last flush and what it was to hold after.
    """
    names: dict[int, dict[str, int | None]] = {}
    contents: dict[int, list[bytes]] = {}
    for number, operation in enumerate(operations):
        if operation.folder is not None and is_kept(number):
            names.setdefault(operation.folder, {}).update(operation.names)
        elif operation.file is not None:
            before = [] if number in safe else contents.get(operation.file, [b""])
            contents[operation.file] = [*before, operation.content]
    tree: dict[str, bytes] = {}

    def walk(folder: int, path: str) -> None:
        for name, number in names.get(folder, {}).items():
            if number is None:
                continue
            if number <= ROOT_FOLDER:
                tree[f"{path}{name}/"] = b""
                walk(number, f"{path}{name}/")
            else:
                tree[path + name] = bytes_of(contents.get(number, [b""]))

    walk(ROOT_FOLDER, "")
    return tree


def read_tree(folder: Path) -> dict[str, bytes]:
    tree = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        tree |= {f"{name}/": b""} if path.is_dir() else {name: path.read_bytes()}
    return tree


def write_tree(folder: Path, tree: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir(exist_ok=True) if name.endswith("/") else (folder / name).write_bytes(content)


# ----------------------------------------------------------------------------------------- the promises


def broken_promise(operations: list[Operation], cut: int, disk: Path, tree: dict[str, bytes], run_name: str) -> str:
    """What is wrong with the state on `disk` after `cut` operations, "" where all is as promised."""
    run = disk / "runs" / run_name
    saved, removed = checkpoints_of(operations[:cut], str(run / "checkpoints"))
    try:
        newest = quietly(newest_checkpoint, run)
    except UserError as error:
        newest = None
        if saved or removed:
            return f"step {max(saved | removed)} was saved, and now: {error}"
    step = int(newest.name[5:]) if newest else -1
    if step < max(saved, default=-1) or step <= max(removed, default=-2):
        return f"the newest checkpoint is {step}; saved were {sorted(saved)}, removed {sorted(removed)}"
    whole = written(operations[:cut], disk)
    for name, content in tree.items():
        if name.endswith((".json", ".bin")) and "/checkpoints/" not in name and content not in whole.get(name, ()):
            return f"{name} is neither an old one nor a new one, whole"
    return ""


def checkpoints_of(operations: list[Operation], folder: str) -> tuple[set[int], set[int]]:
    """The steps of which a checkpoint was saved, and of which one began to be removed.

    One is saved once the disk holds its name, or when the run says that it is finished, flushed or not.
    """
    named, saved, removed = set(), set(), set()
    for operation in operations:
        for name, number in operation.names if operation.path.rsplit("/", 1)[0] == folder else ():
            if step := re.fullmatch(r"step_(\d+)", name):
                (removed if number is None else named).add(int(step[1]))
        held = operation.flushed is not None and operation.path == folder
        if held or operation.path.endswith("/summary.json"):
            saved |= named
    return saved - removed, removed


def written(operations: list[Operation], disk: Path) -> dict[str, set[bytes]]:
    """What each file held at the moments when it was given its name."""
    contents: dict[int, bytes] = {}
    versions: dict[str, set[bytes]] = {}
    for operation in operations:
        if operation.file is not None:
            contents[operation.file] = operation.content
        for name, number in operation.names:
            path = (Path(operation.path).parent / name).relative_to(disk).as_posix()
            versions.setdefault(path, set()).add(contents.get(number, b""))
    return versions
