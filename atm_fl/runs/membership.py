"""Who is in an open run: the tasks that have joined it, and the parties that are away. Read from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

JOINED, AWAY, BACK = "joined", "is away", "is back"
"""The events of a line of kind "membership"."""


class Membership:
    """What the lines of kind "membership" say so far; in other runs there are none."""

    def __init__(self) -> None:
        self.joined: dict[str, int] = {}
        """Task → the first round that it is in, in the order in which they came."""
        self.away: set[str] = set()

    @classmethod
    def of(cls, lines: Iterable[dict[str, Any]]) -> Self:
        """What a run's lines say."""
        membership = cls()
        for line in lines:
            membership.note(line)
        return membership

    def note(self, line: dict[str, Any]) -> None:
        """Remember what a line says of members; others say nothing."""
        if line["kind"] != "membership":
            return
        client, event = str(line.get("task")), line.get("event")
        if event == JOINED:
            self.joined.setdefault(client, line["round"])
        self.away = self.away | {client} if event == AWAY else self.away - {client}

    @property
    def settled(self) -> int:
        """Rounds done when the last one joined: bases from then on are measured by all that are in the run now."""
        return max((first - 1 for first in self.joined.values()), default=0)


def told(line: dict[str, Any]) -> str:
    """A line of kind "membership" in words."""
    return f"round {line['round']}: {line['task']} {line['event']}"
