"""The two errors a user meets: a setting that cannot work, and a run that cannot go on."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SettingError(ValueError):
    """A setting, file or argument is wrong. The message names it, its value and the mend; it is shown as it is."""


class RunError(RuntimeError):
    """A run cannot go on (too few clients succeeded, a damaged run directory, …). The message says which and why."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest known name, or all of them."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
