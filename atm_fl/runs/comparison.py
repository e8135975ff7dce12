"""Several runs at once: a folder of runs as a list, and runs side by side in one table and page."""

from __future__ import annotations

import fcntl
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from atm_fl.errors import RunError
from atm_fl.files import atomic_write
from atm_fl.runs import pages
from atm_fl.runs.report import Record, result_text
from atm_fl.settings import defaults

HEADINGS = ("run", "merge", "rounds", "accuracy %", "worst task", "ε", "bytes", "state")
CAPTION = (
    "accuracy: mean over tasks after the last evaluated round, on test (v: on validation); ε: the largest of the run "
    "(–: no differential privacy); bytes: from and to clients"
)


@dataclass(frozen=True)
class Summary:
    """A run in one line."""

    name: str
    merge: str
    rounds: tuple[int, int]
    """Done, planned."""
    split: str
    accuracies: dict[str, float]
    """Each task's in percent on `split` after the last round that was evaluated on it."""
    epsilon: float | None
    bytes: float
    state: str
    """finished, running, stopped, or unfinished."""

    @classmethod
    def of(cls, directory: Path, name: str = "") -> Summary:
        """RunError if `directory` holds no run."""
        record = Record.read(directory)
        settings, split = record.settings, "test" if len(record.means("test")) > 1 else "validation"
        last = max((n for kind in ("test", "validation") for n in record.means(kind)), default=0)
        number, accuracies = record.last_accuracies(split)
        if split == "test" and number < last:
            split, (number, accuracies) = "validation", record.last_accuracies("validation")
        done, spent = record.rounds_done, record.epsilon()
        return cls(
            name or directory.resolve().name,
            settings["merge"] + (f", scaling {settings['scaling']:g}" if settings["scaling"] else ""),
            (done, settings["rounds"]),
            split,
            accuracies,
            max(spent.values(), default=None),
            record.total("tuning", key="bytes_up") + record.total("tuning", "evaluation", key="bytes_down"),
            "running" if _is_held(directory) else record.state,
        )

    @property
    def mean(self) -> float | None:
        """The mean accuracy in percent."""
        return sum(self.accuracies.values()) / len(self.accuracies) if self.accuracies else None

    def cells(self) -> tuple[str, ...]:
        """The line as text, under `HEADINGS`."""
        mark = " v" if self.split == "validation" and self.accuracies else ""
        worst = min(self.accuracies, key=self.accuracies.__getitem__, default="")
        epsilon = "∞" if self.epsilon is not None and math.isinf(self.epsilon) else pages.told(self.epsilon, ".2f")
        return (
            self.name,
            self.merge,
            "{}/{}".format(*self.rounds),
            pages.told(self.mean, ".1f") + mark,
            f"{worst} {self.accuracies[worst]:.1f}" if worst else "–",
            epsilon,
            pages.size_text(self.bytes),
            self.state,
        )


def _is_held(directory: Path) -> bool:
    """Whether a process has the run's directory: see `runs.lock`. Nothing is made or changed."""
    try:
        with open(directory / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def list_runs(folder: Path) -> Iterator[Summary]:
    """The runs in a folder and the folders below it, by name. RunError if `folder` is none; damaged runs say so."""
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder")
    for path in sorted(folder.rglob("metrics.jsonl")):
        name = str(path.parent.relative_to(folder)) if path.parent != folder else folder.resolve().name
        try:
            yield Summary.of(path.parent, name)
        except (RunError, ValueError, KeyError, TypeError, AttributeError):
            yield Summary(name, "–", (0, 0), "test", {}, None, 0.0, "damaged")


def names_of(directories: list[Path]) -> list[str]:
    """Names by which runs are told apart: their folders', with as much of the path before as they need."""
    parts = [path.resolve().parts for path in directories]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def differing(records: dict[str, Record]) -> list[tuple[str, ...]]:
    """(setting, its value in each run) of the settings in which the runs differ."""
    settings = {name: record.settings for name, record in records.items()}
    keys = list(dict.fromkeys([*defaults(), *(key for values in settings.values() for key in values)]))
    rows = [(key, *(_text(values.get(key)) for values in settings.values())) for key in keys if key != "run-dir"]
    return [row for row in rows if len(set(row[1:])) > 1]


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


def accuracy_rows(summaries: Iterable[Summary]) -> list[tuple[str, ...]]:
    """(task, its accuracy in each run), the mean last."""
    runs = list(summaries)
    tasks = list(dict.fromkeys(task for run in runs for task in run.accuracies))
    rows = [(task, *(pages.told(run.accuracies.get(task), ".1f") for run in runs)) for task in tasks]
    return [*rows, ("mean", *(pages.told(run.mean, ".1f") for run in runs))]


def write_comparison(directories: list[Path], out: Path) -> Path:
    """Write a page, one file without links to outside, with runs side by side. Returns `out`."""
    records = dict(zip(names_of(directories), map(Record.read, directories), strict=True))
    summaries = [Summary.of(path, name) for path, name in zip(directories, records, strict=True)]
    best = max((run for run in summaries if run.mean is not None), key=lambda run: run.mean or 0.0, default=None)
    lead = (
        f"{best.name} is ahead with {best.mean:.1f} % mean {best.split} accuracy." if best else "Nothing was measured."
    )
    if best and len({run.split for run in summaries if run.accuracies}) > 1:
        lead += " Not all were measured on the same split."
    curves = {
        split: {name: record.means(split) for name, record in records.items()} for split in ("test", "validation")
    }
    parts = [
        f'<h1>{len(directories)} runs</h1><p class="lead">{escape(lead)}</p>',
        pages.row(
            pages.figure(
                f"Mean {split} accuracy of the merged model after each round.",
                partial(pages.draw_curves, {}, series, f"{split} accuracy %"),
            )
            for split, series in curves.items()
            if any(series.values())
        ),
        pages.table(HEADINGS, (run.cells() for run in summaries), CAPTION, "numbers"),
        "<h2>Tasks</h2>",
        pages.table(("task", *records), accuracy_rows(summaries), "accuracy % as above", "numbers total"),
        "<h2>Settings that differ</h2>",
        pages.table(("setting", *records), differing(records)) if differing(records) else "<p>None.</p>",
        "<h2>Each run</h2>",
        *(f"<p><b>{escape(name)}</b>: {escape(result_text(record))}</p>" for name, record in records.items()),
    ]
    with atomic_write(out) as temporary:
        temporary.write_bytes(pages.document("Runs side by side", parts).encode("utf-8", "replace"))
    return out
