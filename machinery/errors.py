"""What is said when something cannot work: one line, with what, where and what to do."""

from __future__ import annotations

import sys
import types


class UserError(ValueError):
    """Something the user can mend. The message says what was wrong, where, and what to do.

    IPython prints the one line instead of a stack trace, and so does a program.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class DataError(UserError):
    """Text, tokenizer or shards that cannot be used as they are."""


def first_line(error: BaseException, length: int = 160) -> str:
    """The first line of an error's message, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:length]


def _print_error(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    if issubclass(kind, UserError):
        print(*error._render_traceback_(), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def plain_errors() -> None:
    """Have a program print a `UserError` as one line, as a notebook does by itself."""
    sys.excepthook = _print_error
