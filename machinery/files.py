"""Files read with care and written whole: what exists is complete, on the disk, and where its name says it is."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
import stat
import time
from pathlib import Path

from machinery.errors import FileError, UserError, told

# What systems answer that cannot flush a folder: network and virtual file systems, read-only ones, Windows.
CANNOT_FLUSH = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.EISDIR,
    errno.EROFS, errno.EACCES, errno.EPERM,
}  # fmt: skip

IS_IT_A_RUN = "is it the folder of a run that has begun to train?"  # what to ask of one without its config.json


def folder_path(value: object, what: str = "the folder of a run") -> Path:
    """The path of a folder that somebody names, `~` being home; its right to exist is not asked for.

    Raises `UserError` for what is no path; `what` says in it what was to be named.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise UserError(f"{value!r} ({type(value).__name__}) is not {what}; give its path, like 'runs/demo-123abc'")
    with told(value, problem=f"not {what}"):
        return Path(value).expanduser()


def free_bytes(path: str | Path) -> int:
    """Free bytes on the disk where `path` is, or would be made."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if os.path.exists(place))).free


def regular_file(path: Path) -> Path:
    """`path`, where that is a file with an end. Raises `UserError` for a pipe, a device or a folder, else `OSError`."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: not a regular file; put one in its place")
    return path


def read_json(path: Path, missing: dict | None = None, advice: str = "") -> dict:
    """The object in a JSON file; `missing`, if given, where there is none.

    Raises `UserError` for anything else, with `advice`.
    """
    if missing is not None and not os.path.lexists(path):
        return missing
    with told(path, advice=advice):
        content = regular_file(path).read_bytes()
    with told(path, problem="not readable as JSON", advice=advice):
        value = json.loads(content)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not an object" + (f"; {advice}" if advice else ""))
    return value


def read_note(path: Path) -> dict:
    """The object in a JSON file that nothing depends on: {} where it is missing or damaged."""
    with contextlib.suppress(UserError):
        return read_json(path)
    return {}


def read_jsonl(path: str | Path) -> list[dict]:
    """The lines of a run's log: objects with a "step" and numbers, or a sample's text. Others are left out, such as a
    last one that a crash cut short.
    """
    lines = []
    with told(path):
        if not Path(path).exists():
            return lines
        content = regular_file(Path(path)).read_text("utf-8", errors="replace")
    for text in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("step")) is int and _is_line_of_a_run(line):
                lines.append(line)
    return lines


def _is_line_of_a_run(line: dict) -> bool:
    """Whether all values are numbers to reckon with, or missing, but for the text of a sample: others may have been at
    the file.
    """
    kinds = {"tokens": int, "prompt": str, "text": str}
    return all(
        isinstance(value, kinds.get(name, int | float | None))
        and (value is None or isinstance(value, str) or -1e40 < value < 1e40)
        for name, value in line.items()
    )


def write_json(path: Path, value: dict) -> None:
    """Write an object as JSON, complete or not at all."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def refuse_link(path: str | Path) -> None:
    """Raise `FileError` where `path` is a link."""
    if os.path.islink(path):
        raise FileError(f"{path} is a link, which could lead anywhere; put the file or folder itself there")


def no_links(path: str, flags: int) -> int:
    """An `opener` for `open` that does not write through a link."""
    refuse_link(path)
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside, flush to disk, rename: the file is complete or absent. No link is followed.

    Raises `FileError` with what the system says; what was there before stays.
    """
    beside = path.with_name(path.name + ".part")
    with told(beside, problem="cannot be replaced", advice="remove it, or check the permissions"):
        beside.unlink(missing_ok=True)  # of an interrupted write, or a link that somebody put there
    with told(path, problem="not written"):
        try:
            with open(beside, "xb", opener=no_links) as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
        flush(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those around it, and have the disk hold their names."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        for parent in path.absolute().parents:
            flush(parent)


def publish(beside: Path, target: Path) -> Path | None:
    """Give a finished folder of files its name, once the disk holds it.

    What has the name already is moved out of the way, to the path that is returned. The files become readable for all
    who may read the folder: some libraries keep them to their owner.
    """
    for path in beside.iterdir():
        with contextlib.suppress(OSError):  # of file systems without permissions
            path.chmod(beside.stat().st_mode & 0o666)
        flush(path)
    flush(beside)
    earlier = None
    if os.path.lexists(target):
        earlier = target.rename(free_name(target))
        flush(target.parent)
    beside.rename(target)
    flush(target.parent)
    return earlier


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder; of folders, where the system can do that."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes no file opened to read
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in CANNOT_FLUSH):
            raise


def free_name(path: Path, suffix: str = "") -> Path:
    """The first of `path`.1, `path`.2, … that does not exist, with `suffix` after the number."""
    names = (path.with_name(f"{path.name}.{number}{suffix}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that can be; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def json_digest(value: object) -> str:
    """A checksum of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """A file's checksum; of one that this process has read and that has rested since, from memory."""
    found = regular_file(path).stat()
    changed = max(found.st_mtime_ns, found.st_ctime_ns)
    rests = time.time_ns() - changed > 2 * 10**9  # times are coarse: a file may change twice within one tick
    read = _read_sha256 if rests else _read_sha256.__wrapped__
    return read(path, found.st_ino, found.st_size, changed)


@functools.lru_cache(maxsize=256)
def _read_sha256(path: Path, inode: int, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
