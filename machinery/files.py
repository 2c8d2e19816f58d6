"""Small files, read with care and written whole."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from machinery.errors import UserError


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises `UserError` for anything else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({type(error).__name__}); is it a run directory?") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def read_jsonl(path: str | Path) -> list[dict]:
    """The lines of a JSON-lines file; a last line that a crash cut short is left out."""
    lines = []
    if Path(path).exists():
        for text in Path(path).read_text("utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def write_json(path: Path, value: dict) -> None:
    """Write an object as JSON, complete or not at all."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside, flush to disk, rename: the file is complete or absent."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
