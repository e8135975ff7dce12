"""What a run directory tells a reader: an accuracy table for the terminal, and report.html with every curve.

Everything is read from config.json and metrics.jsonl, so that a report can be made at any time, also of an unfinished
run.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
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
from atm_fl.runs import read_metrics
from atm_fl.settings import defaults

COLUMNS = 8
"""At most so many evaluated rounds in a table."""

Series = dict[int, float]
"""A number by round; rounds where it was not measured are missing."""


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
        part.write_bytes(_render(lambda: _draw_accuracy(record), "png"))
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

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem } p, figcaption, caption { opacity: .8 }
table { border-collapse: collapse; margin: .6rem 0 1.2rem } caption { caption-side: bottom; text-align: left }
th, td { padding: .15rem .7rem; border-bottom: 1px solid #8884; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; white-space: pre-wrap }
.numbers :is(th, td) { white-space: nowrap; font-variant-numeric: tabular-nums }
.numbers :is(th, td):not(:first-child) { text-align: right }
.numbers tbody tr:last-child { font-weight: bold }
.scroll { overflow-x: auto } figure { margin: .8rem 0; break-inside: avoid } svg { max-width: 100%; height: auto }
@media print { :root { color-scheme: light } body { margin: 0; max-width: none } tr { break-inside: avoid }
  h2 { break-after: avoid } details::details-content { content-visibility: visible; display: block } }
"""


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
        _pairs(changed) if changed else "<p>None: every setting has its default.</p>",
        f"<details><summary>All settings</summary>{_pairs(settings)}</details>",
        "<details><summary>Versions and machine</summary>",
        _pairs({**config["versions"], **config["machine"], "layout": config["layout"], "elements": config["elements"]}),
        "</details>",
        "<h2>Accuracy</h2>",
        *_accuracy_tables(record),
        _figure("Accuracy of the merged model after each round.", lambda: _draw_accuracy(record)),
        *_norms(record),
        *_cosines(record),
        *_costs(record),
        *_failures(record),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(name)}: ATM run</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _accuracy_tables(record: _Record) -> Iterable[str]:
    tables = [_accuracy_table(record, split) for split in ("test", "validation")]
    measured = [table for table in tables if table.rounds]
    if not measured:
        yield "<p>No accuracy was measured yet.</p>"
    for table in measured:
        yield _table(table.headings, table.cells(), table.caption, "numbers")


def _norms(record: _Record) -> Iterable[str]:
    norms, step = record.by_task("tuning", "norm"), record.series("merge", "norm")
    if step or any(norms.values()):
        yield "<h2>Task vectors</h2>"
        yield _figure(
            "Norm of each task vector, and of the merged step by which the base moved.",
            lambda: _draw_lines({"": norms}, {"": step}, "L2 norm", "merged step"),
        )


def _cosines(record: _Record) -> Iterable[str]:
    """Pairwise cosines; only rounds with at least two task vectors have any."""
    merges = record.merges().items()
    found = {n: (line["tasks"], np.array(line["cosines"], float)) for n, line in merges if len(line["tasks"]) > 1}
    if not found:
        return
    apart = {n: cosines[~np.eye(len(cosines), dtype=bool)] for n, (_, cosines) in found.items()}
    yield "<h2>Cosines between task vectors</h2>"
    yield _figure("Mean over all pairs, and the range from the least to the greatest.", lambda: _draw_range(apart))
    ends = sorted({min(found), max(found)})
    yield _figure(
        "Pairs in the first and in the last round.",
        lambda: _draw_heat_maps({f"round {n}": found[n] for n in ends}),
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
        yield _figure(
            f"Bars: seconds that the clients spent, summed over tasks ({sum(tune.values()):,.1f} s tuning, "
            f"{sum(evaluate.values()):,.1f} s evaluating in all). Line: the round's wall clock at the server "
            f"({sum(wall.values()):,.1f} s in all).",
            lambda: _draw_time(tune, evaluate, wall),
        )
    if up or down:
        yield "<h2>Traffic</h2>"
        yield _figure(
            f"Bytes from the clients ({_bytes(sum(up.values()))} in all) and to them ({_bytes(sum(down.values()))}).",
            lambda: _draw_bytes(up, down),
        )


def _failures(record: _Record) -> Iterable[str]:
    rows = [
        (str(number), task, str(text))
        for number, line in record.merges().items()
        for task, text in line.get("failures", {}).items()
    ]
    yield "<h2>Failures</h2>"
    yield _table(("round", "task", "what failed"), rows) if rows else "<p>No client failed in a merged round.</p>"


def _pairs(values: Mapping[str, Any]) -> str:
    return _table((), [(key, str(value)) for key, value in values.items()])


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "", style: str = "") -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table class="{style}">'
        + (f"<caption>{escape(caption)}</caption>" if caption else "")
        + (f"<thead><tr>{head}</tr></thead>" if head else "")
        + f"<tbody>{body}</tbody></table></div>"
    )


def _figure(caption: str, draw: Callable[[], Figure]) -> str:
    svg = _render(draw, "svg", salt=caption).decode()
    svg = re.sub('<g id="[^"]*">', "<g>", svg[svg.index("<svg ") :])  # these ids would repeat in the page
    svg = svg.replace(_INK, "currentColor")  # the page's text color, in the dark and in the light
    label = f'<svg role="img" aria-label="{escape(caption)}" '
    return f"<figure>{svg.replace('<svg ', label, 1)}<figcaption>{escape(caption)}</figcaption></figure>"


def _bytes(count: float) -> str:
    unit, name = _byte_unit(count)
    return f"{count / unit:,.1f} {name}"


def _byte_unit(count: float) -> tuple[float, str]:
    """The largest unit that `count` reaches, and its name."""
    return next((unit for unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= unit[0]), (1e3, "kB"))


# --------------------------------------------------------------------------------------------------------- the figures

_INK = "#0a0b0c"  # no other color of a figure is this one, so that it can be replaced in an SVG
_DASHES = ("-", "--", ":", "-.")


def _render(draw: Callable[[], Figure], kind: str, salt: str = "") -> bytes:
    """A figure as "svg" (no background) or "png" (white background). Ids in SVGs of other `salt` are other ones."""
    style: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
        **{"grid.color": _INK, "grid.alpha": 0.15, "axes.grid": True, "axes.axisbelow": True},
        **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9},
        **{
            "axes.facecolor": "none",
            "text.parse_math": False,
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
        },
    }
    file = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else None
    with matplotlib.rc_context(style):
        draw().savefig(file, format=kind, dpi=150, facecolor="none" if kind == "svg" else "white", metadata=nothing)
    return file.getvalue()


def _axes(panels: int = 1, height: float = 3.2, share: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page with `panels` side by side, which may share their axes."""
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, sharex=share, sharey=share, squeeze=False)[0])


def _draw_accuracy(record: _Record) -> Figure:
    panels = {split: record.by_task("evaluation", split) for split in ("validation", "test")}
    shown = {split: series for split, series in panels.items() if any(series.values())}
    percent = {
        split: {task: {n: 100 * value for n, value in values.items()} for task, values in series.items()}
        for split, series in (shown or {"validation": {}}).items()
    }
    means = {split: _over_tasks(fmean, series) for split, series in percent.items()}
    return _draw_lines(percent, means, "accuracy %", "mean")


def _draw_lines(panels: Mapping[str, Mapping[str, Series]], bold: Mapping[str, Series], unit: str, name: str) -> Figure:
    """Panels by title, each a line per task and a bold one, called `name`, over them."""
    tasks = list(dict.fromkeys(task for series in panels.values() for task in series))
    figure, axes = _axes(len(panels), max(3.4, 0.5 + 0.19 * min(len(tasks), 30)))
    for axis, (title, series) in zip(axes, panels.items(), strict=True):
        for task, values in series.items():
            i = tasks.index(task)
            axis.plot(*_points(values), color=f"C{i % 10}", linestyle=_DASHES[i // 10 % 4], lw=1.2, **_marks(values))
        axis.plot(*_points(bold[title]), color=_INK, lw=2.4, **_marks(bold[title]))
        axis.set(title=title, xlabel="rounds")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel(unit)
    handles = [axes[0].lines[-1], *axes[0].lines[:-1]]
    figure.legend(handles, [name, *map(_short, tasks)], loc="outside right upper", ncols=1 + len(tasks) // 30)
    return figure


def _draw_range(apart: Mapping[int, np.ndarray]) -> Figure:
    """The mean of each round's values, in the band from their least to their greatest."""
    figure, (axis,) = _axes()
    least, mean, most = ({n: float(f(values)) for n, values in apart.items()} for f in (np.min, np.mean, np.max))
    axis.fill_between(list(apart), list(least.values()), list(most.values()), color="C0", alpha=0.2, lw=0)
    for series, width in ((least, 0.8), (mean, 2.4), (most, 0.8)):
        axis.plot(*_points(series), color="C0", lw=width, **_marks(series))
    axis.axhline(0, color=_INK, lw=0.8)
    axis.set(xlabel="round", ylabel="cosine")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_heat_maps(maps: Mapping[str, tuple[list[str], np.ndarray]]) -> Figure:
    """Square matrices with the tasks on both axes, on one color scale around 0; the diagonal, always 1, is left out."""
    figure, axes = _axes(2, 4.6, share=False)
    blank = {title: np.where(np.eye(len(tasks)), np.nan, matrix) for title, (tasks, matrix) in maps.items()}
    limit = max(float(np.nanmax(np.abs(matrix))) for matrix in blank.values()) or 1.0
    for axis in axes[len(maps) :]:
        axis.set_axis_off()
    for axis, (title, (tasks, _)) in zip(axes, maps.items(), strict=False):
        size = min(8.0, 120 / len(tasks))
        mesh = axis.pcolormesh(blank[title], cmap="RdBu_r", vmin=-limit, vmax=limit)
        labels = [_short(task) for task in tasks]
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
    figure, (axis,) = _axes()
    axis.bar(*_points(tune), color="C0", label="tuning, all clients")
    below = [tune.get(n, 0.0) for n in evaluate]
    axis.bar(*_points(evaluate), bottom=below, color="C1", label="evaluating, all clients")
    axis.plot(*_points(wall), color=_INK, lw=1.6, label="wall clock", **_marks(wall))
    return _finish_bars(figure, axis, "seconds")


def _draw_bytes(up: Series, down: Series) -> Figure:
    figure, (axis,) = _axes()
    unit, name = _byte_unit(max([*up.values(), *down.values()]))
    axis.bar([n - 0.2 for n in up], [count / unit for count in up.values()], 0.4, color="C0", label="from clients")
    axis.bar([n + 0.2 for n in down], [count / unit for count in down.values()], 0.4, color="C1", label="to clients")
    return _finish_bars(figure, axis, name)


def _finish_bars(figure: Figure, axis: Axes, unit: str) -> Figure:
    axis.set(xlabel="round", ylabel=unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper")
    return figure


def _points(series: Series) -> tuple[list[int], list[float]]:
    return list(series), list(series.values())


def _marks(series: Series) -> dict[str, Any]:
    """Markers where there are few points, so that one alone and a gap are seen."""
    return {"marker": "o", "markersize": 3} if len(series) <= 40 else {}


def _short(task: str) -> str:
    """A task's name as a label; of a long path, its end."""
    return task if len(task) <= 20 else f"…{task[-19:]}"
