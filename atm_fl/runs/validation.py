"""What the validation accuracies of a run decide: its best checkpoints, its early end, and whether it collapsed."""

from __future__ import annotations

from collections.abc import Collection
from statistics import fmean, median
from typing import Any

from atm_fl.runs.membership import Membership

COLLAPSE = 0.1
"""Accuracy that a base has lost to the best one when it is said to have collapsed."""


class ValidationCurve:
    """The bases' validation accuracies, in 0..1, by rounds done and client, out of the lines of metrics.jsonl."""

    def __init__(self, membership: Membership | None = None) -> None:
        """membership: of an open run. Bases are then compared by those that are in it now, since the last has joined:
        a new task's first accuracies say nothing about the rounds before."""
        self._membership = membership or Membership()
        self._by_round: dict[int, dict[str, float]] = {}

    def note(self, line: dict[str, Any]) -> None:
        """Remember what an "evaluation" line says of a base; other lines say nothing."""
        accuracy = line.get("validation")
        if line["kind"] == "evaluation" and isinstance(accuracy, (int, float)):
            self._by_round.setdefault(line["round"], {})[str(line.get("task"))] = accuracy

    def good(self, rounds: Collection[int]) -> set[int]:
        """Which of `rounds` did best: by the tasks' mean, as the table and the report name it, and by their median,
        which a minority that lies about its own does not decide.

        Of equals the first by the mean, the last by the median; none if nothing is known.
        """
        measured = {n: values for n, values in self._measured().items() if n in rounds}
        if not measured:
            return set()
        means = {n: fmean(values) for n, values in measured.items()}
        return {_first_best(means), max(measured, key=lambda n: (median(measured[n]), n))}

    def means(self) -> dict[int, float]:
        """The tasks' mean by round, of the rounds that are compared."""
        return {n: fmean(values) for n, values in self._measured().items()}

    def _measured(self) -> dict[int, list[float]]:
        here = {
            n: [value for task, value in of_task.items() if task not in self._membership.away]
            for n, of_task in sorted(self._by_round.items())
            if n >= self._membership.settled
        }
        return {n: values for n, values in here.items() if values}

    def rounds_since_best(self) -> int:
        """How many rounds the last base that was measured is after the best one, by the tasks' mean."""
        means = self.means()
        return max(means) - _first_best(means) if means else 0

    def collapse(self, done: int) -> str:
        """A warning if the base after `done` rounds has just fallen below the first one and COLLAPSE below the best,
        by the tasks that measured it and the first one; empty if it has not."""
        now = self._by_round.get(done, {}).keys() & self._by_round.get(0, {}).keys()
        means = {
            n: fmean(of_task[task] for task in now)
            for n, of_task in sorted(self._by_round.items())
            if now and now <= of_task.keys()
        }
        if not {0, done} <= means.keys():
            return ""
        best, here = _first_best(means), means[done]
        *_, before = [0, *(n for n in means if n < done)]
        limit = min(means[0], means[best] - COLLAPSE)
        if not here < limit <= means[before]:
            return ""
        return (
            f"round {done}: the model has collapsed: validation accuracy {100 * here:.1f} %, at the start "
            f"{100 * means[0]:.1f} %, best in round {best} with {100 * means[best]:.1f} %; try a lower learning-rate "
            "or scaling"
        )


def _first_best(means: dict[int, float]) -> int:
    """The round of the largest mean; of equals the first."""
    return max(sorted(means), key=means.__getitem__)
