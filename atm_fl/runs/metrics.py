"""A run's metrics.jsonl."""

from __future__ import annotations

import json
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
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record["kind"], str) and isinstance(record["round"], int)):
                raise ValueError
        except (ValueError, KeyError, RecursionError):
            if number < len(lines):
                damaged(number)
            continue
        yield record
