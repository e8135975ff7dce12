"""Live progress of a run, read from its metrics.jsonl: the same for every runtime, in whatever process it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from atm_fl.runs.membership import Membership, told
from atm_fl.runs.metrics import Followed
from atm_fl.runs.report import duration
from atm_fl.settings import Settings
from atm_fl.training.evaluation import mean_accuracy

POLL = 0.5


@contextmanager
def progress(settings: Settings, console: Console) -> Iterator[None]:
    """While the body runs, print a line a finished round and, on a terminal, a live line of the round under way."""
    path = Path(settings.run_dir) / "metrics.jsonl"
    already = path.stat().st_mtime_ns if path.exists() else 0
    stop = threading.Event()

    def follow() -> None:
        printed, warned, met, begin, followed = -1, 0, 0, time.monotonic(), Followed(path.parent)
        with console.status("starting") as live:
            while True:
                last = stop.wait(POLL)
                if path.exists() and path.stat().st_mtime_ns != already:
                    new, lines = followed.look(), followed.lines
                    if new or last:
                        warnings = [line["text"] for line in lines if line["kind"] == "warning"]
                        for text in warnings[warned:]:
                            console.print(f"warning: {text}", highlight=False, markup=False)
                        warned = len(warnings)
                        members = [told(line) for line in lines if line["kind"] == "membership"]
                        for text in members[met:]:
                            console.print(text, highlight=False, markup=False)
                        met = len(members)
                        printed = _print_rounds(lines, settings, console, printed, last)
                    live.update(_under_way(lines, settings, time.monotonic() - begin))
                if last:
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _accuracies(lines: list[dict[str, Any]], split: str) -> dict[int, dict[str, float]]:
    by_round: dict[int, dict[str, float]] = {}
    for line in lines:
        if line["kind"] == "evaluation" and split in line:
            by_round.setdefault(line["round"], {})[line["task"]] = line[split]
    return by_round


def _print_rounds(lines: list[dict[str, Any]], settings: Settings, console: Console, printed: int, last: bool) -> int:
    """Print every finished round after `printed`, the final evaluation only when it is the `last` look."""
    accuracies = _accuracies(lines, "validation")
    finished = {line["round"]: line for line in lines if line["kind"] == "merge"}
    ends = {settings.rounds, *(line["round"] for line in lines if line["kind"] == "stop")}
    for number, tasks in sorted(accuracies.items()):
        complete = number + 1 in finished or (number in ends and last)
        if number <= printed or not complete:
            continue
        name = "start " if number == 0 else f"round {number}/{settings.rounds}"
        took = f", {finished[number]['seconds']:.1f} s" if number in finished else ""
        spent, left = _epsilon(lines, number), _time_left(finished, settings, number)
        console.print(
            f"{name}: validation {100 * mean_accuracy(tasks):.1f} % over {len(tasks)} tasks"
            + (f", ε {spent:.2f}" if spent else "")
            + took
            + (f", about {duration(left)} left" if left else ""),
            highlight=False,
        )
        printed = number
    return printed


def _epsilon(lines: list[dict[str, Any]], number: int) -> float:
    """The largest ε, of a training record or a client, up to a round; 0 without differential privacy."""
    return max((line.get("epsilon", 0.0) for line in lines if line["round"] <= number), default=0.0)


def _time_left(finished: dict[int, dict[str, Any]], settings: Settings, done: int) -> float:
    """Seconds that the rounds after `done` take, each as long as the median of those before; 0 if nothing is known."""
    seconds = [line["seconds"] for number, line in finished.items() if number <= done]
    return (settings.rounds - done) * median(seconds) if seconds else 0.0


def _under_way(lines: list[dict[str, Any]], settings: Settings, elapsed: float) -> str:
    done = max((line["round"] for line in lines if line["kind"] == "merge"), default=0)
    finished = {line["round"]: line for line in lines if line["kind"] == "merge"}
    if done == settings.rounds:
        return "final evaluation"
    tuned = [line["task"] for line in lines if line["kind"] == "tuning" and line["round"] == done + 1]
    membership = Membership.of(lines)
    members = len(settings.task_names) + len(membership.joined) - len(membership.away)
    text = f"round {done + 1}/{settings.rounds}: {len(tuned)} of {members} tasks"
    if left := _time_left(finished, settings, done):
        text += f", about {duration(left)} left"
    return f"{text} ({elapsed:.0f} s)"
