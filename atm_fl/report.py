"""What a run directory tells a reader: an accuracy table for the terminal, and report.html with every curve.

Everything is read from config.json and metrics.jsonl, so that a report can be made at any time, also of an unfinished
run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from atm_fl import pages
from atm_fl.errors import RunError
from atm_fl.files import atomic_write
from atm_fl.pages import Series
from atm_fl.runs import read_metrics
from atm_fl.settings import defaults

COLUMNS = 8
"""At most so many evaluated rounds in a table."""


@dataclass(frozen=True)
class Row:
    """A line of the accuracy table: accuracies in percent at the table's rounds, None where one was not measured."""

    name: str
    accuracies: tuple[float | None, ...]
    gain: float | None
    """Last minus first accuracy in percentage points; None if either is missing. The mean's is the tasks' mean gain."""


@dataclass(frozen=True)
class AccuracyTable:
    """Accuracy on one split, for every task and their mean, after each of `rounds` (0: the start)."""

    split: str
    rounds: tuple[int, ...]
    rows: tuple[Row, ...]
    mean: Row

    @property
    def headings(self) -> tuple[str, ...]:
        """The columns' headings, from the task to the gain."""
        return ("task", *("base" if number == 0 else str(number) for number in self.rounds), "gain")

    @property
    def caption(self) -> str:
        """What the numbers are."""
        if not self.rounds:
            return "no accuracy was measured yet"
        text = f"{self.split} accuracy % of the merged model by round"
        if any(value is None for row in self.rows for value in row.accuracies):
            text += "; –: not measured, and a mean is over the tasks that were"
        return text

    def cells(self) -> list[tuple[str, ...]]:
        """The lines as text, the mean last."""
        return [
            (row.name, *(_percent(value) for value in row.accuracies), _percent(row.gain, "+"))
            for row in (*self.rows, self.mean)
        ]


def accuracy_table(directory: Path, split: str | None = None, columns: int = COLUMNS) -> AccuracyTable:
    """The accuracies of a run at no more than `columns` rounds, evenly chosen with the first and the last.

    Without `split`, of the test split if it was evaluated at the start and after the last evaluated round, and of the
    validation split otherwise.
    """
    return _accuracy_table(_Record.read(directory), split, columns)


def print_table(directory: Path) -> None:
    """Print a run's accuracy table to the terminal."""
    accuracies = accuracy_table(directory)
    table = Table(box=SIMPLE_HEAD, collapse_padding=True)
    for heading in accuracies.headings:
        table.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=heading != "task")
    *rows, mean = ([escape_markup(cell) for cell in cells] for cells in accuracies.cells())
    for row in rows:
        table.add_row(*row)
    table.add_section()
    table.add_row(*mean, style="bold")
    console = Console()
    console.print(table)
    console.print(accuracies.caption, highlight=False)


def write_report(directory: Path) -> Path:
    """Write a run's report.html, one file without any link to outside, and accuracy.png. Returns the page's path."""
    record = _Record.read(directory)
    page = _page(record, directory.resolve().name)
    with atomic_write(directory / "accuracy.png") as part:
        part.write_bytes(pages.render(lambda: _draw_accuracy(record), "png"))
    with atomic_write(directory / "report.html") as part:
        part.write_bytes(page.encode("utf-8", "replace"))
    return directory / "report.html"


# ---------------------------------------------------------------------------------------------------------- the record


@dataclass(frozen=True)
class _Record:
    """A run directory's numbers. Of lines with the same kind, round and task only the last is kept."""

    config: dict[str, Any]
    lines: dict[tuple[str, int, str], dict[str, Any]]
    tasks: tuple[str, ...]
    """Tasks with at least one line or failure, in the order of the settings."""

    @classmethod
    def read(cls, directory: Path) -> _Record:
        try:
            config = json.loads((directory / "config.json").read_text())
        except FileNotFoundError:
            raise RunError(f"{directory} is not a run directory: no config.json in it") from None
        lines: dict[tuple[str, int, str], dict[str, Any]] = {}
        seen: dict[str, None] = {}
        for line in read_metrics(directory):
            lines[line["kind"], line["round"], line.get("task", "")] = line
            seen |= dict.fromkeys([line["task"]] if "task" in line else line.get("failures", ()))
        names = [name.strip() for name in config["settings"].get("tasks", "").split(",")]
        tasks = sorted(seen, key=lambda task: names.index(task) if task in names else len(names))
        return cls(config, lines, tuple(tasks))

    @property
    def rounds_done(self) -> int:
        """Rounds that ended with a merge."""
        return max(self.merges(), default=0)

    def merges(self) -> dict[int, dict[str, Any]]:
        """The merge lines by round."""
        return {number: line for (kind, number, _), line in sorted(self.lines.items()) if kind == "merge"}

    def series(self, kind: str, key: str, task: str = "") -> Series:
        """A finite number of one task, or of the merge, by round."""
        found = {
            number: line[key]
            for (its_kind, number, its_task), line in self.lines.items()
            if (its_kind, its_task) == (kind, task)
            and isinstance(line.get(key), (int, float))
            and math.isfinite(line[key])
        }
        return dict(sorted(found.items()))

    def by_task(self, kind: str, key: str) -> dict[str, Series]:
        """A number's series of every task."""
        return {task: self.series(kind, key, task) for task in self.tasks}


def _over_tasks(reduce: Callable[[list[float]], float], series: Mapping[str, Series]) -> Series:
    """A mean or sum over the tasks present in each round."""
    rounds = sorted({number for values in series.values() for number in values})
    return {n: reduce([values[n] for values in series.values() if n in values]) for n in rounds}


def _accuracy_table(record: _Record, split: str | None = None, columns: int = COLUMNS) -> AccuracyTable:
    means = {name: _over_tasks(fmean, record.by_task("evaluation", name)) for name in ("validation", "test")}
    if split is None:
        last = max((number for values in means.values() for number in values), default=0)
        split = "test" if not means["validation"] or {0, last} <= means["test"].keys() else "validation"
    rounds = _evenly(list(means[split]), columns)

    def row(name: str, values: Series) -> Row:
        cells = tuple(100 * values[n] if n in values else None for n in rounds)
        first, last = (cells[0], cells[-1]) if len(cells) > 1 else (None, None)
        return Row(name, cells, None if first is None or last is None else last - first)

    rows = tuple(row(task, values) for task, values in record.by_task("evaluation", split).items())
    gains = [row.gain for row in rows if row.gain is not None]
    mean = Row("mean", row("mean", means[split]).accuracies, fmean(gains) if gains else None)
    return AccuracyTable(split, rounds, rows, mean)


def _evenly(numbers: list[int], count: int) -> tuple[int, ...]:
    """At most `count` (2 or more) of `numbers`, evenly spaced, with the first and the last."""
    if len(numbers) <= count:
        return tuple(numbers)
    return tuple(numbers[round(i * (len(numbers) - 1) / (count - 1))] for i in range(count))


def _percent(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.1f}"


# ------------------------------------------------------------------------------------------------------------ the page


def _page(record: _Record, name: str) -> str:
    """The whole HTML page; every text from the run is escaped on its way in."""
    config, planned = record.config, record.config["rounds"]
    settings = {**config["settings"], "rounds": planned}
    changed = {key: value for key, value in settings.items() if key not in defaults() or defaults()[key] != value}
    done = f"{record.rounds_done} of {planned} rounds" + ("" if record.rounds_done >= planned else ", unfinished")
    parts = [
        f"<h1>{escape(name)}</h1><p>ATM run: {escape(done)}, {len(record.tasks)} tasks, {config['elements']:,} shared "
        f"parameters</p>",
        "<h2>Settings other than the defaults</h2>",
        pages.pairs(changed) if changed else "<p>None: every setting has its default.</p>",
        f"<details><summary>All settings</summary>{pages.pairs(settings)}</details>",
        "<details><summary>Versions and machine</summary>",
        pages.pairs(
            {**config["versions"], **config["machine"], "layout": config["layout"], "elements": config["elements"]}
        ),
        "</details>",
        "<h2>Accuracy</h2>",
        *_accuracy_tables(record),
        pages.figure("Accuracy of the merged model after each round.", lambda: _draw_accuracy(record)),
        *_norms(record),
        *_cosines(record),
        *_privacy(record),
        *_costs(record),
        *_failures(record),
    ]
    return pages.document(f"{name}: ATM run", parts)


def _accuracy_tables(record: _Record) -> Iterable[str]:
    tables = [_accuracy_table(record, split) for split in ("test", "validation")]
    measured = [table for table in tables if table.rounds]
    if not measured:
        yield "<p>No accuracy was measured yet.</p>"
    for table in measured:
        yield pages.table(table.headings, table.cells(), table.caption, "numbers total")


def _norms(record: _Record) -> Iterable[str]:
    norms, step = record.by_task("tuning", "norm"), record.series("merge", "norm")
    if step or any(norms.values()):
        yield "<h2>Task vectors</h2>"
        yield pages.figure(
            "Norm of each task vector, and of the merged step by which the base moved.",
            lambda: pages.draw_lines({"": norms}, {"": step}, "L2 norm", "merged step"),
        )


def _cosines(record: _Record) -> Iterable[str]:
    """Pairwise cosines; only rounds with at least two task vectors have any."""
    merges = record.merges().items()
    found = {
        n: (line["tasks"], np.array(line["cosines"], float)) for n, line in merges if len(line.get("cosines", ())) > 1
    }
    if not found:
        return
    apart = {n: cosines[~np.eye(len(cosines), dtype=bool)] for n, (_, cosines) in found.items()}
    yield "<h2>Cosines between task vectors</h2>"
    yield pages.figure("Mean over all pairs, and the range from the least to the greatest.", lambda: _draw_range(apart))
    ends = sorted({min(found), max(found)})
    yield pages.figure(
        "Pairs in the first and in the last round.",
        lambda: _draw_heat_maps({f"round {n}": found[n] for n in ends}),
    )


def _privacy(record: _Record) -> Iterable[str]:
    """What each party's training records cost so far, of runs with DP-SGD."""
    spent = {task: series for task, series in record.by_task("tuning", "epsilon").items() if series}
    if not spent:
        return
    settings = record.config["settings"]
    numbers = {name: record.by_task("tuning", name) for name in ("epsilon", "epsilon_rdp", "noise")}
    last = [
        (task, *(f"{series[task].get(max(own), math.inf):.3f}" for series in numbers.values()))
        for task, own in spent.items()
    ]
    yield "<h2>Privacy</h2>"
    yield pages.table(
        ("task", "ε", "ε by RDP", "noise"),
        last,
        f"(ε, δ = {settings['dp-delta']:g}) of one training record after the last round, by privacy loss distributions",
        "numbers",
    )
    yield pages.figure(
        "ε of each party's training records after each round.",
        lambda: pages.draw_lines({"": spent}, {"": _over_tasks(max, spent)}, "ε", "largest"),
    )


def _costs(record: _Record) -> Iterable[str]:
    """Time and traffic."""
    tune, evaluate, up, down = (
        _over_tasks(sum, record.by_task("tuning", key))
        for key in ("seconds_tune", "seconds_evaluate", "bytes_up", "bytes_down")
    )
    wall = record.series("merge", "seconds")
    if tune or evaluate or wall:
        yield "<h2>Time</h2>"
        yield pages.figure(
            f"Bars: seconds that the clients spent, summed over tasks ({sum(tune.values()):,.1f} s tuning, "
            f"{sum(evaluate.values()):,.1f} s evaluating in all). Line: the round's wall clock at the server "
            f"({sum(wall.values()):,.1f} s in all).",
            lambda: _draw_time(tune, evaluate, wall),
        )
    if up or down:
        yield "<h2>Traffic</h2>"
        yield pages.figure(
            f"Bytes from the clients ({pages.size_text(sum(up.values()))} in all) and to them "
            f"({pages.size_text(sum(down.values()))}).",
            lambda: _draw_bytes(up, down),
        )


def _failures(record: _Record) -> Iterable[str]:
    rows = [
        (str(number), task, str(text))
        for number, line in record.merges().items()
        for task, text in line.get("failures", {}).items()
    ]
    yield "<h2>Failures</h2>"
    yield pages.table(("round", "task", "what failed"), rows) if rows else "<p>No client failed in a merged round.</p>"


# --------------------------------------------------------------------------------------------------------- the figures


def _draw_accuracy(record: _Record) -> Figure:
    panels = {split: record.by_task("evaluation", split) for split in ("validation", "test")}
    shown = {split: series for split, series in panels.items() if any(series.values())}
    percent = {
        split: {task: {n: 100 * value for n, value in values.items()} for task, values in series.items()}
        for split, series in (shown or {"validation": {}}).items()
    }
    means = {split: _over_tasks(fmean, series) for split, series in percent.items()}
    return pages.draw_lines(percent, means, "accuracy %", "mean")


def _draw_range(apart: Mapping[int, np.ndarray]) -> Figure:
    """The mean of each round's values, in the band from their least to their greatest."""
    figure, (axis,) = pages.axes()
    least, mean, most = ({n: float(f(values)) for n, values in apart.items()} for f in (np.min, np.mean, np.max))
    axis.fill_between(list(apart), list(least.values()), list(most.values()), color="C0", alpha=0.2, lw=0)
    for series, width in ((least, 0.8), (mean, 2.4), (most, 0.8)):
        axis.plot(*pages.points(series), color="C0", lw=width, **pages.marks(series))
    axis.axhline(0, color=pages.INK, lw=0.8)
    axis.set(xlabel="round", ylabel="cosine")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_heat_maps(maps: Mapping[str, tuple[list[str], np.ndarray]]) -> Figure:
    """Square matrices with the tasks on both axes, on one color scale around 0; the diagonal, always 1, is left out."""
    figure, axes = pages.axes(2, 4.6, share=False)
    blank = {title: np.where(np.eye(len(tasks)), np.nan, matrix) for title, (tasks, matrix) in maps.items()}
    limit = max(float(np.nanmax(np.abs(matrix))) for matrix in blank.values()) or 1.0
    for axis in axes[len(maps) :]:
        axis.set_axis_off()
    for axis, (title, (tasks, _)) in zip(axes, maps.items(), strict=False):
        size = min(8.0, 120 / len(tasks))
        mesh = axis.pcolormesh(blank[title], cmap="RdBu_r", vmin=-limit, vmax=limit)
        labels = [pages.short(task) for task in tasks]
        axis.set_xticks(np.arange(len(tasks)) + 0.5, labels, rotation=90, fontsize=size)
        axis.set_yticks(np.arange(len(tasks)) + 0.5, labels, fontsize=size)
        axis.tick_params(length=0)
        axis.grid(False)
        axis.set(title=title, aspect="equal", xlim=(0, len(tasks)), ylim=(len(tasks), 0))
        for (i, j), value in np.ndenumerate(blank[title]):
            if len(tasks) <= 12 and not np.isnan(value):
                color = "white" if abs(value) > 0.6 * limit else "black"
                axis.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=color)
    figure.colorbar(mesh, ax=axes, shrink=0.7, label="cosine").outline.set_visible(False)
    return figure


def _draw_time(tune: Series, evaluate: Series, wall: Series) -> Figure:
    figure, (axis,) = pages.axes()
    axis.bar(*pages.points(tune), color="C0", label="tuning, all clients")
    below = [tune.get(n, 0.0) for n in evaluate]
    axis.bar(*pages.points(evaluate), bottom=below, color="C1", label="evaluating, all clients")
    axis.plot(*pages.points(wall), color=pages.INK, lw=1.6, label="wall clock", **pages.marks(wall))
    return _finish_bars(figure, axis, "seconds")


def _draw_bytes(up: Series, down: Series) -> Figure:
    figure, (axis,) = pages.axes()
    unit, name = pages.byte_unit(max([*up.values(), *down.values()]))
    axis.bar([n - 0.2 for n in up], [count / unit for count in up.values()], 0.4, color="C0", label="from clients")
    axis.bar([n + 0.2 for n in down], [count / unit for count in down.values()], 0.4, color="C1", label="to clients")
    return _finish_bars(figure, axis, name)


def _finish_bars(figure: Figure, axis: Axes, unit: str) -> Figure:
    axis.set(xlabel="round", ylabel=unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper")
    return figure
