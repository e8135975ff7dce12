"""What a run directory tells a reader: a table for the terminal, and report.html: the result, its cost, every curve.

Everything is read from config.json and metrics.jsonl, so that a report can be made at any time, also of an unfinished
run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
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

from atm_fl.errors import RunError
from atm_fl.files import atomic_write
from atm_fl.runs import pages
from atm_fl.runs.membership import Membership, told
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.pages import Series
from atm_fl.runs.references import find_references
from atm_fl.runs.validation import ValidationCurve
from atm_fl.settings import Settings, defaults, stored

COLUMNS = 8
"""At most so many evaluated rounds in a table."""


@dataclass(frozen=True)
class AccuracyRow:
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
    rows: tuple[AccuracyRow, ...]
    mean: AccuracyRow

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
    return _accuracy_table(Record.read(directory), split, columns)


def print_table(directory: Path) -> None:
    """Print a run's accuracy table to the terminal, and what it has spent of privacy."""
    record = Record.read(directory)
    accuracies = _accuracy_table(record)
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
    if text := best_text(record, directory):
        console.print(text, highlight=False, markup=False)
    for text in record.epsilon_texts():
        console.print(f"ε so far: {text}", highlight=False, markup=False)


def best_text(record: Record, directory: Path) -> str:
    """The best round on validation and where its model is; empty if fewer than two rounds were measured."""
    means = record.means("validation")
    best = record.best_round("validation")
    if best is None:
        return ""
    file = directory / "checkpoint" / f"round-{best:05d}.safetensors"
    where = f", {file.relative_to(directory)}" if file.exists() else " (the first base)" if best == 0 else ""
    return f"best round on validation: {best} ({means[best]:.1f} %){where}"


def write_report(directory: Path) -> Path:
    """Write a run's report.html, one file without any link to outside, and accuracy.png. Returns the page's path."""
    record = Record.read(directory)
    page = _page(record, directory.resolve().name, find_references(directory, record.settings))
    with atomic_write(directory / "accuracy.png") as temporary:
        temporary.write_bytes(pages.render(lambda: _draw_accuracy(record), "png"))
    with atomic_write(directory / "report.html") as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return directory / "report.html"


# ---------------------------------------------------------------------------------------------------------- the record


@dataclass(frozen=True)
class Record:
    """A run directory's numbers. Of lines with the same kind, round and task only the last is kept.

    Texts in it come from clients: whoever shows one escapes it.
    """

    config: dict[str, Any]
    lines: dict[tuple[str, int, str], dict[str, Any]]
    tasks: tuple[str, ...]
    """Tasks with at least one line or failure, in the order of the settings."""

    @classmethod
    def read(cls, directory: Path) -> Record:
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
        places = {name: place for place, name in reversed([*enumerate(names)])}
        tasks = sorted(seen, key=lambda task: places.get(task, len(names)))
        return cls(config, lines, tuple(tasks))

    @cached_property
    def _by_task(self) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
        """The lines of each kind and task by round: to look through all of them for every task takes minutes of a
        thousand."""
        found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        for (kind, number, task), line in self.lines.items():
            found.setdefault((kind, task), {})[number] = line
        return found

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings, with the rounds that were planned; those from before a setting was there have its default.

        Of an open run, with the tasks that have joined.
        """
        values = {**defaults(), **stored(self.config["settings"]), "rounds": self.config["rounds"]}
        if self.membership.joined:
            settings = Settings.of_config(values)
            for task, first in self.membership.joined.items():
                settings = settings.joined(task, first)
            values |= settings.as_config()
        return values

    @cached_property
    def membership(self) -> Membership:
        """Who has joined an open run, and who is away."""
        return Membership.of(self.lines.values())

    @property
    def rounds_done(self) -> int:
        """Rounds that ended with a merge."""
        return max(self.merges(), default=0)

    @property
    def state(self) -> str:
        """finished, stopped (before the last round: by patience or a callback) or unfinished."""
        if self.rounds_done >= self.settings["rounds"]:
            return "finished"
        return "stopped" if ("stop", self.rounds_done, "") in self.lines else "unfinished"

    def merges(self) -> dict[int, dict[str, Any]]:
        """The merge lines by round."""
        return {number: line for (kind, number, _), line in sorted(self.lines.items()) if kind == "merge"}

    def series(self, kind: str, key: str, task: str = "") -> Series:
        """A finite number of one task, or of the merge, by round."""
        values = {
            number: line[key]
            for number, line in self._by_task.get((kind, task), {}).items()
            if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
        }
        return dict(sorted(values.items()))

    def total(self, *kinds: str, key: str) -> float:
        """The sum of a number over all lines of these kinds."""
        return sum(sum(self.series(kind, key, task).values()) for kind in kinds for task in ("", *self.clients))

    @cached_property
    def clients(self) -> tuple[str, ...]:
        """Everyone with a line; in a joint run also "joint"."""
        return tuple({task: None for _, _, task in self.lines if task})

    def failures(self) -> list[tuple[int, str, str]]:
        """(round, client, reason) of all that failed in rounds that were merged all the same."""
        return [
            (number, client, str(reason))
            for number, line in self.merges().items()
            for client, reason in line.get("failures", {}).items()
        ]

    def epsilon(self) -> dict[str, float]:
        """The ε spent so far by what it protects: "a training record of TASK" (the largest of all) and "a client".

        Infinite for DP-SGD without noise, and before its first round nothing.
        """
        spent: dict[str, float] = {}
        records: dict[str, float] = {}
        for (kind, _, task), line in sorted(self.lines.items()):
            if kind == "tuning" and self.settings["privacy"] == "dp-sgd":
                value = line.get("epsilon")
                records[task] = float(value) if isinstance(value, (int, float)) else math.inf
            elif kind == "merge" and "epsilon" in line:
                spent["a client"] = float(line["epsilon"])
        if records:
            most = max(records, key=records.__getitem__)
            spent[f"a training record of {most}"] = records[most]
        return spent

    def epsilon_texts(self) -> list[str]:
        """`epsilon` as sentences."""
        delta = f"δ = {self.settings['dp-delta']:g}"
        return [
            f"{value:.3f} for {unit}, {delta}" if math.isfinite(value) else f"∞ for {unit}: nothing is promised"
            for unit, value in self.epsilon().items()
        ]

    def means(self, split: str) -> Series:
        """Accuracy in percent, the mean over the tasks that were measured, by round."""
        return {n: 100 * value for n, value in _over_tasks(fmean, self.by_task("evaluation", split)).items()}

    def best_round(self, split: str) -> int | None:
        """The first round of the highest mean; None where fewer than two were measured.

        Of an open run, by those that are in it now, since the last one joined: as its checkpoints are kept.
        """
        curve = ValidationCurve(self.membership)
        for task, series in self.by_task("evaluation", split).items():
            for number, value in series.items():
                curve.note({"kind": "evaluation", "round": number, "task": task, "validation": value})
        means = curve.means()
        return max(means, key=means.__getitem__) if len(means) > 1 else None

    def last_accuracies(self, split: str) -> tuple[int, dict[str, float]]:
        """(The last evaluated round, each task's accuracy in percent then); (0, {}) if there is none."""
        series = self.by_task("evaluation", split)
        last = max((n for values in series.values() for n in values), default=0)
        return last, {task: 100 * values[last] for task, values in series.items() if last in values}

    def by_task(self, kind: str, key: str) -> dict[str, Series]:
        """A number's series of every task."""
        return {task: self.series(kind, key, task) for task in self.tasks}


def _over_tasks(reduce: Callable[[list[float]], float], series: Mapping[str, Series]) -> Series:
    """A mean or sum over the tasks present in each round."""
    rounds = sorted({number for values in series.values() for number in values})
    return {n: reduce([values[n] for values in series.values() if n in values]) for n in rounds}


def _accuracy_table(record: Record, split: str | None = None, columns: int = COLUMNS) -> AccuracyTable:
    means = {name: _over_tasks(fmean, record.by_task("evaluation", name)) for name in ("validation", "test")}
    if split is None:
        last = max((number for values in means.values() for number in values), default=0)
        split = "test" if not means["validation"] or {0, last} <= means["test"].keys() else "validation"
    rounds = _evenly(list(means[split]), columns)

    def row(name: str, values: Series) -> AccuracyRow:
        cells = tuple(100 * values[n] if n in values else None for n in rounds)
        first, last = (cells[0], cells[-1]) if len(cells) > 1 else (None, None)
        return AccuracyRow(name, cells, None if first is None or last is None else last - first)

    rows = tuple(row(task, values) for task, values in record.by_task("evaluation", split).items())
    gains = [row.gain for row in rows if row.gain is not None]
    mean = AccuracyRow("mean", row("mean", means[split]).accuracies, fmean(gains) if gains else None)
    return AccuracyTable(split, rounds, rows, mean)


def _evenly(numbers: list[int], count: int) -> tuple[int, ...]:
    """At most `count` (2 or more) of `numbers`, evenly spaced, with the first and the last."""
    if len(numbers) <= count:
        return tuple(numbers)
    return tuple(numbers[round(i * (len(numbers) - 1) / (count - 1))] for i in range(count))


def _percent(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.1f}"


# ------------------------------------------------------------------------------------------------------------ the page


def _page(record: Record, name: str, references: Mapping[str, Mapping[str, float]]) -> str:
    """The whole HTML page; every text from the run is escaped on its way in.

    references: mean accuracies in 0..1 by split and name.
    """
    config, settings = record.config, record.settings
    changed = {key: value for key, value in settings.items() if key not in defaults() or defaults()[key] != value}
    parts = [
        f"<h1>{escape(name)}</h1>",
        *_result(record, references),
        *_costs(record),
        *_vectors(record),
        "<h2>Settings other than the defaults</h2>",
        pages.pairs(changed) if changed else "<p>None: every setting has its default.</p>",
        f"<details><summary>All settings</summary>{pages.pairs(settings)}</details>",
        "<details><summary>Versions and machine</summary>",
        pages.pairs(
            {**config["versions"], **config["machine"], "layout": config["layout"], "elements": config["elements"]}
        ),
        "</details>",
    ]
    return pages.document(f"{name}: ATM run", parts)


def _result(record: Record, references: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    """The sentence, the curves and the tables."""
    measured = [split for split in ("test", "validation") if record.means(split)]
    yield f'<p class="lead">{escape(result_text(record, references))}</p>'
    if measured:
        yield pages.row(
            pages.figure(
                f"{split.capitalize()} accuracy of the merged model after each round.",
                partial(_draw_split, record, split, references.get(split, {})),
            )
            for split in measured
        )
    for split in measured:
        table = _accuracy_table(record, split)
        yield pages.table(table.headings, table.cells(), table.caption, "numbers total")
    members = [told(line) for (kind, *_), line in sorted(record.lines.items()) if kind == "membership"]
    if members:
        yield f"<p>{escape('; '.join(members))}.</p>"


def result_text(record: Record, references: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """A run's result in a sentence or two: the mean, what it is held against, the worst task and the best round."""
    rounds = f"{record.rounds_done} of {record.settings['rounds']} rounds"
    rounds += f" ({record.state})" if record.state != "finished" else ""
    split = _accuracy_table(record).split
    last, accuracies = record.last_accuracies(split)
    if not accuracies:
        return f"After {rounds} no accuracy was measured yet."
    means = record.means(split)
    levels = _levels(record, split, (references or {}).get(split, {}))
    against = ", ".join(f"{name} {level:.1f} %" for name, level in levels.items() if last or name != start_name(record))
    of = f"the mean over {len(accuracies)} tasks" if len(accuracies) > 1 else "one task"
    where = f" of round {last}" if last != record.rounds_done else ""
    text = f"After {rounds} the merged model{where} has {means[last]:.1f} % {split} accuracy, {of}"
    text += f" ({against})" if against else ""
    worst = min(accuracies, key=accuracies.__getitem__)
    text += f"; the worst task is {worst} with {accuracies[worst]:.1f} %" if len(accuracies) > 1 else ""
    validation = record.means("validation")
    best = record.best_round("validation")
    if best is not None:
        text += f". Best round on validation: {best} ({validation[best]:.1f} %)"
    return f"{text}."


def start_name(record: Record) -> str:
    """What the model before the first round is called."""
    return "pretrained" if record.settings["start"] == "pretrained" else "start"


def _levels(record: Record, split: str, references: Mapping[str, float]) -> dict[str, float]:
    """Accuracies in percent that a run is held against, by name."""
    means = record.means(split)
    measured = {start_name(record): means[0]} if 0 in means else {}
    return measured | {name: 100 * value for name, value in references.items()}


def _vectors(record: Record) -> Iterable[str]:
    figures = [*_norms(record), *_cosines(record)]
    if figures:
        yield "<h2>Task vectors</h2>"
        yield pages.row(figures)


def _norms(record: Record) -> Iterable[str]:
    norms, step = record.by_task("tuning", "norm"), record.series("merge", "norm")
    if step or any(norms.values()):
        yield pages.figure(
            "Norm of each task vector, and of the merged step by which the base moved.",
            lambda: pages.draw_curves(norms, {"merged step": step}, "L2 norm", form=".4g"),
        )


def _cosines(record: Record) -> Iterable[str]:
    """Pairwise cosines; only rounds with at least two task vectors have any."""
    merges = record.merges().items()
    values = {
        n: (line.get("cosines_of", line["tasks"]), np.array(line["cosines"], float))
        for n, line in merges
        if len(line.get("cosines", ())) > 1
    }
    if not values:
        return
    apart = {n: cosines[~np.eye(len(cosines), dtype=bool)] for n, (_, cosines) in values.items()}
    yield pages.figure(
        "Cosines between task vectors: mean over all pairs, and the range from the least to the greatest.",
        lambda: _draw_range(apart),
    )
    for n in sorted({min(values), max(values)}):
        yield pages.figure(f"Cosines of all pairs, round {n}.", partial(_draw_heat_map, f"round {n}", *values[n]))


def _costs(record: Record) -> Iterable[str]:
    """Time, traffic, privacy and failures: in numbers, then in figures."""
    tune, evaluate, up, down = (
        _over_tasks(sum, record.by_task("tuning", key))
        for key in ("seconds_tune", "seconds_evaluate", "bytes_up", "bytes_down")
    )
    wall, failed = record.series("merge", "seconds"), record.failures()
    rounds = max(1, len(wall))
    yield "<h2>What it cost</h2>"
    yield pages.pairs(
        {
            "time": f"{duration(sum(wall.values()))} in {len(wall)} rounds ({sum(wall.values()) / rounds:,.1f} s each)",
            "clients' work": f"{record.total('tuning', key='seconds_tune'):,.1f} s tuning, "
            f"{record.total('tuning', key='seconds_evaluate'):,.1f} s evaluating",
            "bytes from clients": pages.size_text(record.total("tuning", key="bytes_up")),
            "bytes to clients": pages.size_text(record.total("tuning", "evaluation", key="bytes_down")),
            "ε so far": "; ".join(record.epsilon_texts()) or "no differential privacy",
            "failures": str(len(failed)),
        }
    )
    figures = []
    if tune or evaluate or wall:
        caption = "Bars: seconds that the clients spent, summed over tasks. Line: the round's wall clock at the server."
        figures.append(pages.figure(caption, lambda: _draw_time(tune, evaluate, wall)))
    if up or down:
        caption = "Bytes from the clients and to them in each round."
        figures.append(pages.figure(caption, lambda: _draw_bytes(up, down)))
    yield pages.row(figures)
    yield from _privacy(record)
    yield "<h3>Failures</h3>"
    rows = [(str(number), client, reason) for number, client, reason in failed]
    yield (
        pages.table(("round", "client", "what failed"), rows) if rows else "<p>No client failed in a merged round.</p>"
    )


def _privacy(record: Record) -> Iterable[str]:
    """What each party's training records cost so far, of runs with DP-SGD."""
    spent = {task: series for task, series in record.by_task("tuning", "epsilon").items() if series}
    if not spent:
        return
    numbers = {name: record.by_task("tuning", name) for name in ("epsilon", "epsilon_rdp", "noise")}
    last = [
        (task, *(f"{series[task].get(max(epsilons), math.inf):.3f}" for series in numbers.values()))
        for task, epsilons in spent.items()
    ]
    yield "<h3>Privacy</h3>"
    yield pages.table(
        ("task", "ε", "ε by RDP", "noise"),
        last,
        f"(ε, δ = {record.settings['dp-delta']:g}) of one training record after the last round, by privacy loss "
        "distributions",
        "numbers",
    )
    yield pages.figure(
        "ε of each party's training records after each round.",
        lambda: pages.draw_curves(spent, {"largest": _over_tasks(max, spent)}, "ε", form=".3f"),
    )


def duration(seconds: float) -> str:
    """Seconds in the words of a clock: 42.0 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


# --------------------------------------------------------------------------------------------------------- the figures


def _draw_accuracy(record: Record) -> Figure:
    panels = {split: record.by_task("evaluation", split) for split in ("validation", "test")}
    shown = {split: series for split, series in panels.items() if any(series.values())}
    percent = {
        split: {task: {n: 100 * value for n, value in values.items()} for task, values in series.items()}
        for split, series in (shown or {"validation": {}}).items()
    }
    means = {split: _over_tasks(fmean, series) for split, series in percent.items()}
    return pages.draw_lines(percent, means, "accuracy %", "mean")


def _draw_split(record: Record, split: str, references: Mapping[str, float]) -> Figure:
    """One split's curves in percent, with what they are held against."""
    tasks = record.by_task("evaluation", split)
    percent = {task: {n: 100 * value for n, value in series.items()} for task, series in tasks.items()}
    means = record.means(split)
    levels = _levels(record, split, references)
    return pages.draw_curves(percent, {"mean": means}, f"{split} accuracy %", levels, record.best_round(split))


def _draw_range(apart: Mapping[int, np.ndarray]) -> Figure:
    """The mean of each round's values, in the band from their least to their greatest."""
    figure, (axis,) = pages.axes(width=pages.NARROW)
    least, mean, most = ({n: float(f(values)) for n, values in apart.items()} for f in (np.min, np.mean, np.max))
    axis.fill_between(list(apart), list(least.values()), list(most.values()), color="C0", alpha=0.2, lw=0)
    for series, width in ((least, 0.8), (mean, 2.4), (most, 0.8)):
        axis.plot(*pages.points(series), color="C0", lw=width, **pages.marks(series))
    axis.axhline(0, color=pages.INK, lw=0.8)
    spans = {n: f"round {n}\nmean {mean[n]:.3f}, from {least[n]:.3f} to {most[n]:.3f}" for n in apart}
    pages.add_tips(axis, spans)
    axis.set(xlabel="round", ylabel="cosine")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_heat_map(title: str, tasks: list[str], matrix: np.ndarray) -> Figure:
    """A square matrix with the tasks on both axes, colored around 0; the diagonal, always 1, is left out."""
    figure, (axis,) = pages.axes(1, 4.4, width=pages.NARROW)
    blank = np.where(np.eye(len(tasks)), np.nan, matrix)
    limit = float(np.nanmax(np.abs(blank))) or 1.0
    size = min(8.0, 120 / len(tasks))
    mesh = axis.pcolormesh(blank, cmap="RdBu_r", vmin=-limit, vmax=limit)
    labels = [pages.short(task) for task in tasks]
    axis.set_xticks(np.arange(len(tasks)) + 0.5, labels, rotation=90, fontsize=size)
    axis.set_yticks(np.arange(len(tasks)) + 0.5, labels, fontsize=size)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.set(title=title, aspect="equal", xlim=(0, len(tasks)), ylim=(len(tasks), 0))
    for (i, j), value in np.ndenumerate(blank):
        if len(tasks) <= 12 and not np.isnan(value):
            color = "white" if abs(value) > 0.6 * limit else "black"
            axis.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=color)
    figure.colorbar(mesh, ax=axis, shrink=0.7, label="cosine").outline.set_visible(False)
    return figure


def _draw_time(tune: Series, evaluate: Series, wall: Series) -> Figure:
    figure, (axis,) = pages.axes(width=pages.NARROW)
    axis.bar(*pages.points(tune), color="C0", label="tuning, all clients")
    below = [tune.get(n, 0.0) for n in evaluate]
    axis.bar(*pages.points(evaluate), bottom=below, color="C1", label="evaluating, all clients")
    axis.plot(*pages.points(wall), color=pages.INK, lw=1.6, label="wall clock", **pages.marks(wall))
    values = {"tuning": tune, "evaluating": evaluate, "wall clock": wall}
    return _finish_bars(figure, axis, "seconds", values, lambda value: f"{value:,.1f} s")


def _draw_bytes(up: Series, down: Series) -> Figure:
    figure, (axis,) = pages.axes(width=pages.NARROW)
    unit, name = pages.byte_unit(max([*up.values(), *down.values()]))
    axis.bar([n - 0.2 for n in up], [count / unit for count in up.values()], 0.4, color="C0", label="from clients")
    axis.bar([n + 0.2 for n in down], [count / unit for count in down.values()], 0.4, color="C1", label="to clients")
    return _finish_bars(figure, axis, name, {"from clients": up, "to clients": down}, pages.size_text)


def _finish_bars(
    figure: Figure, axis: Axes, unit: str, values: Mapping[str, Series], text: Callable[[float], str]
) -> Figure:
    axis.set(xlabel="round", ylabel=unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    tips: dict[int, list[str]] = {}
    for name, series in values.items():
        for n, value in series.items():
            tips.setdefault(n, [f"round {n}"]).append(f"{name}: {text(value)}")
    pages.add_tips(axis, {n: "\n".join(lines) for n, lines in tips.items()})
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure
