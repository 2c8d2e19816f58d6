"""What is said when something cannot work: one line, with what, where and what to do."""

from __future__ import annotations

import contextlib
import errno
import sys
import types
import unicodedata
from collections.abc import Iterator

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota
LONGEST = 600  # characters of a message; of a longer one the middle is left out


def printable(text: str, keep: str = "") -> str:
    """`text` with what a terminal would obey written as an escape: control characters, line breaks, directions of
    writing, but for those in `keep`.
    """
    escaped = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in escaped and c not in keep else c for c in text
    )


def readable(text: str) -> str:
    """A corpus's or a model's text for a screen: lines and tabs as they are, all else that would be obeyed escaped."""
    return printable(text, keep="\n\t\u200d")


class UserError(ValueError):
    """Something the user can mend. The message says what was wrong, where, and what to do.

    It is one printable line of bounded length whatever names and values of other people's files stand in it. IPython
    prints it instead of a stack trace, and so does a program, in which the first one sees to that.
    """

    def __init__(self, message: object) -> None:
        plain_errors()
        text = printable(str(message))
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 201]}…{text[-200:]}")

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class DataError(UserError):
    """Text, tokenizer or shards that cannot be used as they are."""


class FileError(UserError, OSError):
    """What the operating system says of a file or folder; also an `OSError`, for those who can go on without it."""


def first_line(error: BaseException) -> str:
    """What an error's message begins with; its type where that says nothing or is a mere key."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the number, and without the path that stands beside it
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith((":", ".")) else lines[0]
    name = type(error).__name__
    return (name if not text else f"{name}: {text}" if isinstance(error, KeyError) else text)[:160]


@contextlib.contextmanager
def told(where: object, kind: type[UserError] = UserError, problem: str = "", advice: str = "") -> Iterator[None]:
    """Have whatever goes wrong with `where`, which may come from anyone, end as a `kind` of one line.

    For the places where content that nobody checked is taken apart: any type of value may be anywhere in it. Errors
    of the operating system become a `FileError` where no other kind is asked for. A message that is one line already
    keeps its words. The cause stays attached.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except UserError as error:
        named = str(where) in str(error)
        if named and isinstance(error, kind):
            raise
        raise kind(error if named else f"{where}: {error}") from error
    except BaseException as error:  # a panic of the libraries written in Rust is no Exception
        if kind is UserError and isinstance(error, OSError):
            kind = FileError
        if isinstance(error, OSError) and error.errno in FULL:
            advice = "make room on its disk"
        line = f"{problem} ({first_line(error)})" if problem else first_line(error)
        raise kind(f"{where}: {line}" + (f"; {advice}" if advice else "")) from error


def _print_error(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    if issubclass(kind, UserError):
        print(*error._render_traceback_(), file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted; the same command goes on from what is finished", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def plain_errors() -> None:
    """Have a program print a `UserError` as one line, as a notebook does by itself, and so Ctrl-C.

    A program that has its own way to print errors keeps it.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_error
