"""An order in which tasks join, chosen by a run's first round: a curriculum (Bengio et al. 2009, ICML).

    loss         the mean loss over the first round's last epoch: easy tasks first
    alignment    the mean cosine of a task's first vector with the others': those first that agree with most

A first round of all tasks is enough (`rounds=1`). The order is the setting `participation` of another run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from atm_fl.errors import RunError, SettingError
from atm_fl.runs.report import Record
from atm_fl.settings import Settings

Scores = dict[str, float]
"""Task → what the order is by; the least comes first."""


def _losses(record: Record, settings: Settings) -> Scores:
    told: dict[str, list[float]] = {task: [] for task in settings.client_tasks}
    for client, task in settings.task_of.items():
        loss = record.lines.get(("tuning", 1, client), {}).get("loss")
        told[task] += [loss] if isinstance(loss, float) and not math.isnan(loss) else []
    return {task: fmean(losses) for task, losses in told.items() if losses}


def _alignments(record: Record, settings: Settings) -> Scores:
    merge = record.lines.get(("merge", 1, ""), {})
    rows = zip(merge.get("cosines_of", merge.get("tasks", ())), merge.get("cosines", ()), strict=False)
    return {task: -(sum(row) - 1) / max(1, len(row) - 1) for task, row in rows}


MEASURES: dict[str, Callable[[Record, Settings], Scores]] = {"loss": _losses, "alignment": _alignments}


def curriculum(run: Path, by: str = "loss", every: int = 1, reverse: bool = False) -> str:
    """The value of `participation` with which one more task joins every so many rounds, as 'mnist=2-, digits=3-'.

    by: of `MEASURES`. reverse: the last first. SettingError if an argument cannot work; RunError if the run's first
    round does not tell that of all tasks.
    """
    if by not in MEASURES:
        raise SettingError(f"by={by!r}: it takes one of {', '.join(MEASURES)}")
    if every < 1:
        raise SettingError(f"every={every}: it must be at least 1")
    record = Record.read(run)
    settings = Settings.of_config(record.settings)
    scores = MEASURES[by](record, settings)
    names = list(dict.fromkeys(settings.client_tasks))
    if missing := [task for task in names if task not in scores]:
        raise RunError(
            f"{run} does not tell the {by} of {', '.join(missing)} in its first round; all tasks must take part in it, "
            "without what hides the numbers of single parties (dp-sgd the loss, secure-aggregation the alignment)"
        )
    order = sorted(names, key=lambda task: scores[task], reverse=reverse)
    return ", ".join(f"{task}={1 + place * every}-" for place, task in enumerate(order) if place)
