"""The two errors a user meets: a setting that cannot work, and a run that cannot go on.

A party's error goes to the server. So its text says the rule, and what tells of its data or its disk (`figures`) is a
note of the exception, which goes to the party's own log. So do all of an `OwnFileError` and, where the party's machine
is its own, its paths (atm_fl/clients/mods.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

E = TypeVar("E", bound=Exception)


class SettingError(ValueError):
    """A setting, file or argument is wrong. The message names it, its value and the fix; it is shown as it is."""


class OwnFileError(SettingError):
    """What is wrong with a party's own files. The message may quote them: the server is told `what` they are alone."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(message)
        self.what = what


class RunError(RuntimeError):
    """A run cannot go on (too few clients succeeded, a damaged run directory, …). The message says which and why."""


def with_figures(error: E, figures: str) -> E:
    """The error, with what only this machine's log is to say of it."""
    error.add_note(figures)
    return error


def figures(error: BaseException) -> list[str]:
    """All that the error, and what caused it, keep for this machine's log."""
    held = list(getattr(error, "__notes__", []))
    return held + (figures(error.__cause__) if error.__cause__ else [])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest known name, or all of them."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def printable(text: str, most: int = 500) -> str:
    """What another machine said, in one line that a terminal only shows: what does not print is escaped, its end cut.

    So are newlines, control characters (escape sequences begin with one) and marks that turn the direction of writing.
    """
    escaped = (sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text[: most + 1])
    shown = "".join(escaped)
    return shown if len(shown) <= most else f"{shown[:most]}…"
