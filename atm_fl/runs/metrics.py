"""A run's metrics.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atm_fl.errors import RunError


def read_metrics(directory: Path, damaged: Callable[[int], object] = lambda _: None) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; those that are no lines of ours are left out.

    damaged: is told their numbers, from 1, but not of a last one that a crash cut off.
    """
    path = directory / "metrics.jsonl"
    if not path.exists():
        raise RunError(f"{directory} is not a run directory: no metrics.jsonl in it")
    text = path.read_text(errors="replace")
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        record = _read(line)
        if record is not None:
            yield record
        elif number < len(lines):
            damaged(number)


def _read(line: str) -> dict[str, Any] | None:
    """A line of ours, None if it is none."""
    try:
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record["kind"], str) and isinstance(record["round"], int):
            return record
    except (ValueError, KeyError, RecursionError):
        pass
    return None


class Followed:
    """The lines of a run's metrics.jsonl while others write it: a look reads what is new since the one before."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "metrics.jsonl"
        self._file = 0
        """Which file was read: a run that is resumed puts another in its place."""
        self._read_to = 0
        self.lines: list[dict[str, Any]] = []
        """All so far."""

    def look(self) -> bool:
        """Read on; whether there was anything new."""
        with open(self._path, "rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_ino != self._file or facts.st_size < self._read_to:
                self._file, self._read_to, self.lines = facts.st_ino, 0, []
            file.seek(self._read_to)
            whole, end, _ = file.read().rpartition(b"\n")  # the last line may still be written
        self._read_to += len(whole) + len(end)
        found = [record for line in whole.decode(errors="replace").split("\n") if (record := _read(line))]
        self.lines += found
        return bool(found)
