"""What a contest of many methods tells a reader: Markdown tables, a CSV file, and report.html with the plots.

Everything is made from the contest's results, a dict as in its results.json: for every row (a method as it was run)
and seed the test accuracies, the curve over rounds, and what it cost. An unfinished contest has rows with fewer seeds;
their numbers are over the seeds that are there, and the row says so.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from atm_fl.experiments.significance import LEVEL
from atm_fl.files import atomic_write
from atm_fl.runs import pages
from atm_fl.runs.pages import Series
from atm_fl.tables import markdown

Results = dict[str, Any]
"""A contest's results, as read from results.json."""

Cells = tuple[list[str], list[list[str]]]
"""The headings of a table, and its lines."""


def table(results: Results) -> str:
    """Markdown: test accuracy % of every row by task, its mean ± deviation over seeds, worst task and normalised."""
    return _markdown(_accuracy_cells(_ContestResults.of(results)))


def cost_table(results: Results) -> str:
    """Markdown: what every row's training cost, mean over seeds, its tuned values and what finding them cost."""
    return _markdown(_cost_cells(_ContestResults.of(results)))


def pairs_table(results: Results) -> str:
    """Markdown: the tested differences of pairs of rows; "" if there are none."""
    return _markdown(_pairs_cells(results)) if results.get("pairs") else ""


def tables(results: Results) -> str:
    """All tables in Markdown, one after the other."""
    return "\n\n".join(filter(None, [table(results), cost_table(results), pairs_table(results)]))


def csv_text(results: Results) -> str:
    """Everything but the curves in long form: one line a row, seed and task."""
    contest, file = _ContestResults.of(results), io.StringIO()
    costs = ("steps", "flops", "seconds", "bytes")
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["row", "kind", "seed", "task", "test", *costs])
    for row in contest.rows:
        for seed, run in row.seeds.items():
            for task in contest.tasks:
                if task in run["test"]:
                    lines.writerow([row.name, row.kind, seed, task, run["test"][task], *(run[key] for key in costs)])
    return file.getvalue()


def page(results: Results) -> str:
    """The whole report: one HTML page without any link to outside."""
    contest = _ContestResults.of(results)
    seeds = ", ".join(contest.seeds)
    parts = [
        f"<h1>{escape(results['name'])}</h1>",
        f"<p><code>{escape(results['command'])}</code><br>{escape(results['date'])}, {escape(results['machine'])}<br>"
        f"{len(contest.rows)} rows, {len(contest.tasks)} tasks, seeds {escape(seeds)}; {results['elements']:,} shared "
        f"parameters</p>",
        "<h2>Accuracy</h2>",
        pages.table(*_accuracy_cells(contest), _ACCURACY_CAPTION, "numbers dense"),
        "<h2>Cost</h2>",
        pages.table(*_cost_cells(contest), _COST_CAPTION, "numbers dense"),
        *_pairs(results),
        *_curves(contest),
        *_costs(contest),
        *_heat_map(contest),
        *_alignment(results.get("alignment") or {}),
        *_landscape(results.get("landscape")),
    ]
    return pages.document(results["name"], parts)


def write(results: Results, folder: Path) -> Path:
    """Write table.md, results.csv and report.html into `folder`. Returns the page's path."""
    texts = {
        "table.md": f"{tables(results)}\n",
        "results.csv": csv_text(results),
        "report.html": page(results),
    }
    for name, text in texts.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))
    return folder / "report.html"


# --------------------------------------------------------------------------------------------------------- the results


@dataclass(frozen=True)
class _RowResults:
    """A row with the seeds that it has, at least one."""

    name: str
    label: str
    """The name, and in brackets which part of the contest it covers if that is not all, and another kind of model."""
    kind: str
    whole: bool
    """Whether it has every task, so that its mean compares with the others'."""
    tuned: dict[str, dict[str, Any]]
    tuning: dict[str, Any]
    seeds: dict[str, dict[str, Any]]

    def accuracies(self, task: str) -> list[float]:
        """Test accuracy % of a task, by seed."""
        return [100 * run["test"][task] for run in self.seeds.values() if task in run["test"]]

    def means(self) -> list[float]:
        """The mean over its tasks, by seed."""
        return [100 * fmean(run["test"].values()) for run in self.seeds.values()]

    def cost(self, key: str) -> float:
        """The mean over seeds of steps, flops, seconds or bytes."""
        return fmean(run[key] for run in self.seeds.values())

    def curve(self, key: str) -> Series:
        """A number of the curve by round, the mean over the seeds where it was measured."""
        by_round: dict[int, list[float]] = {}
        for run in self.seeds.values():
            for point in run.get("curve", ()):
                if point.get(key) is not None:
                    by_round.setdefault(point["round"], []).append(point[key])
        return {number: fmean(values) for number, values in sorted(by_round.items())}


@dataclass(frozen=True)
class _ContestResults:
    """The rows that can be shown, in the given order."""

    tasks: list[str]
    seeds: list[str]
    rows: list[_RowResults]

    @classmethod
    def of(cls, results: Results) -> _ContestResults:
        tasks, seeds = list(results["tasks"]), [str(seed) for seed in results["seeds"]]
        rows = []
        for row in results["rows"]:
            present = {seed: row["seeds"][seed] for seed in seeds if row["seeds"].get(seed, {}).get("test")}
            if not present:
                continue
            measured = {task for run in present.values() for task in run["test"]}
            notes = [row["model"]] if row.get("model") else []
            notes += [
                f"{count} of {whole} {what}"
                for count, whole, what in ((len(present), len(seeds), "seeds"), (len(measured), len(tasks), "tasks"))
                if count < whole
            ]
            label = row["name"] + (f" ({', '.join(notes)})" if notes else "")
            tuned, tuning = row.get("tuned") or {}, row.get("tuning") or {}
            rows.append(
                _RowResults(row["name"], label, row["kind"], len(measured) == len(tasks), tuned, tuning, present)
            )
        return cls(tasks, seeds, rows)

    @property
    def single(self) -> _RowResults | None:
        """The row of the single-task models, which the others are measured against."""
        return next((row for row in self.rows if row.kind == "single"), None)

    def normalised(self, row: _RowResults, task: str) -> list[float]:
        """Test accuracy in percent of the single-task model's of the same seed, by seed."""
        runs = self.single.seeds if self.single else {}
        return [
            100 * run["test"][task] / runs[seed]["test"][task]
            for seed, run in row.seeds.items()
            if seed in runs and task in run["test"] and runs[seed]["test"].get(task)
        ]


# ---------------------------------------------------------------------------------------------------------- the tables

_ACCURACY_CAPTION = (
    "Test accuracy %, mean over seeds; mean: over the row's own tasks, ± the standard deviation over seeds; worst "
    "task: the one of the least accuracy; normalised: the mean over tasks and seeds of the accuracy in percent of the "
    "single-task model's; –: not measured"
)
_COST_CAPTION = (
    "Mean over seeds, summed over tasks. Tuned values by seed where they differ; tuning cost: what finding them took "
    "beside the row's own runs: candidate values, epochs over all tasks' data, evaluations of the validation splits"
)


_PAIRS_CAPTION = (
    "Test accuracy in points, mean over seeds, of the first row less the second's: of each task, of their mean, and of "
    "the worst task in percent of its single-task model; paired bootstrap over images and seeds, p two-sided"
)


def _accuracy_cells(contest: _ContestResults) -> Cells:
    lines = []
    for row in contest.rows:
        by_task = {task: row.accuracies(task) for task in contest.tasks}
        mean_of = {task: fmean(values) for task, values in by_task.items() if values}
        means, worst = row.means(), min(mean_of, key=lambda task: mean_of[task])
        ratios = [ratio for task in contest.tasks for ratio in contest.normalised(row, task)]
        lines.append(
            [
                row.label,
                *(f"{mean_of[task]:.1f}" if task in mean_of else "–" for task in contest.tasks),
                f"{fmean(means):.1f}" + (f" ± {stdev(means):.1f}" if len(means) > 1 else ""),
                f"{worst} {mean_of[worst]:.1f}",
                f"{fmean(ratios):.1f}" if ratios else "–",
            ]
        )
    return ["row", *contest.tasks, "mean", "worst task", "normalised"], lines


def _cost_cells(contest: _ContestResults) -> Cells:
    scales = {"steps": 1, "flops": 1e12, "seconds": 1, "bytes": 1e6}
    lines = [
        [
            row.label,
            _tuned(row, contest.seeds),
            *(_amount(row.cost(key) / scale) for key, scale in scales.items()),
            _tuning(row.tuning),
        ]
        for row in contest.rows
    ]
    head = ["row", "tuned values", "optimizer steps", "training TFLOP", "seconds (one core)", "MB on the wire"]
    return [*head, "tuning cost"], lines


def _pairs(results: Results) -> Iterator[str]:
    if results.get("pairs"):
        yield "<h2>Differences</h2>"
        yield pages.table(*_pairs_cells(results), _PAIRS_CAPTION, "numbers dense")


def _pairs_cells(results: Results) -> Cells:
    """A line a pair and measure."""
    lines = [
        [
            f"{' − '.join(pair['rows'])} ({_of_part(results, pair)}seeds {', '.join(map(str, pair['seeds']))})",
            measure,
            f"{100 * tested['value']:+.1f}",
            f"{100 * tested['low']:+.1f} to {100 * tested['high']:+.1f}",
            f"{tested['p']:.4f}",
        ]
        for pair in results["pairs"]
        for measure, tested in pair["differences"].items()
    ]
    return ["rows", "of", "difference", f"{100 * LEVEL:g} % interval", "p"], lines


def _of_part(results: Results, pair: Mapping[str, Any]) -> str:
    """How many tasks both rows of a pair have, where that is not all."""
    there = len(pair["differences"].keys() & set(results["tasks"]))
    return f"{there} of {len(results['tasks'])} tasks, " if there < len(results["tasks"]) else ""


def _tuned(row: _RowResults, seeds: Iterable[str]) -> str:
    """The tuned values by name: once if the seeds agree, and otherwise one a seed."""
    chosen = [row.tuned[seed] for seed in seeds if seed in row.tuned]
    texts = []
    for name in dict.fromkeys(name for values in chosen for name in values):
        values = [_value(values[name]) if name in values else "–" for values in chosen]
        texts.append(f"{name} {values[0] if len(set(values)) == 1 else ' / '.join(values)}")
    return ", ".join(texts) or "–"


def _tuning(tuning: Mapping[str, float]) -> str:
    counts = [(tuning.get(what, 0), what) for what in ("values", "epochs", "evaluations")]
    return ", ".join(f"{count:,g} {what[:-1] if count == 1 else what}" for count, what in counts if count) or "–"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _amount(value: float) -> str:
    """Three digits of a small number, all of those before the point of a large one."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _markdown(cells: Cells) -> str:
    head, lines = cells
    return markdown(list(map(_markdown_cell, head)), (map(_markdown_cell, line) for line in lines), "|---:")


def _markdown_cell(text: str) -> str:
    """A text that neither ends its cell nor begins a tag."""
    return text.replace("|", "\\|").replace("<", "\\<")


# ---------------------------------------------------------------------------------------------------- the page's parts

_KINDS = {"pretrained": "C7", "single": "C2", "joint": "C3", "one-shot": "C1", "atm": "C0", "ph-atm": "C4"}


def _curves(contest: _ContestResults) -> Iterator[str]:
    def percent(row: _RowResults) -> Series:
        return {number: 100 * value for number, value in row.curve("validation").items()}

    lines = {row.label: percent(row) for row in contest.rows if row.kind in ("atm", "ph-atm")}
    joint = {row.label: percent(row) for row in contest.rows if row.kind == "joint"}
    if any(lines.values()):
        yield "<h2>Accuracy by round</h2>"
        yield pages.figure(
            "Validation accuracy after each round, mean over tasks and seeds; the legend is in the order of the last "
            "values." + (" Thick and dashed: joint training, an epoch as a round." if any(joint.values()) else ""),
            lambda: _draw_rows(lines, joint, "validation accuracy %"),
        )


def _costs(contest: _ContestResults) -> Iterator[str]:
    units = {"flops": "training FLOPs", "bytes": "bytes on the wire"}
    shown = {title: key for key, title in units.items() if any(row.cost(key) for row in contest.rows)}
    if shown:
        hollow = "" if all(row.whole for row in contest.rows) else " Hollow: the mean is over fewer tasks."
        yield "<h2>Accuracy against cost</h2>"
        yield pages.figure(
            f"Test accuracy, mean over tasks and seeds, by what training cost; rows at no cost are left out.{hollow}",
            lambda: _draw_costs(contest.rows, shown),
        )


def _heat_map(contest: _ContestResults) -> Iterator[str]:
    if not contest.rows:
        return
    measured = contest.normalised if contest.single else _RowResults.accuracies
    values = [[measured(row, task) for task in contest.tasks] for row in contest.rows]
    means = np.array([[fmean(cell) if cell else np.nan for cell in line] for line in values])
    label = "% of single-task" if contest.single else "accuracy %"
    yield "<h2>Accuracy by task</h2>"
    yield pages.figure(
        "Test accuracy of every row and task, mean over seeds"
        + (", in percent of the single-task model's." if contest.single else "."),
        lambda: _draw_heat_map(means, [row.label for row in contest.rows], contest.tasks, label),
    )


def _alignment(alignment: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    rows = {
        name: {task: _series(values) for task, values in tasks.items() if values} for name, tasks in alignment.items()
    }
    rows = {name: tasks for name, tasks in rows.items() if tasks}
    if not rows:
        return
    means = {name: _mean_series(tasks.values()) for name, tasks in rows.items()}
    caption = "Cosine of each task vector with minus the full-batch gradient, by round"
    yield "<h2>Task vectors and gradients</h2>"
    if len(rows) > 4:
        yield pages.figure(f"{caption}, mean over tasks.", lambda: _draw_rows(means, {}, "cosine, mean over tasks"))
        return
    every = list(dict.fromkeys(task for tasks in rows.values() for task in tasks))
    titles = {name: textwrap.fill(name, 84 // len(rows)) for name in rows}
    panels = {titles[name]: {task: tasks.get(task, {}) for task in every} for name, tasks in rows.items()}
    bold = {titles[name]: series for name, series in means.items()}
    yield pages.figure(f"{caption}.", lambda: pages.draw_lines(panels, bold, "cosine", "mean"))


def _landscape(landscape: Mapping[str, Any] | None) -> Iterator[str]:
    if landscape:
        yield "<h2>Landscape</h2>"
        yield pages.figure(landscape["caption"], partial(_draw_landscape, landscape))


def _series(values: Mapping[str, float]) -> Series:
    """A number by round, from JSON, whose keys are texts."""
    return dict(sorted((int(number), value) for number, value in values.items()))


def _mean_series(series: Iterable[Series]) -> Series:
    """The mean over those that have a number in a round."""
    every = list(series)
    rounds = sorted({number for values in every for number in values})
    return {n: fmean(values[n] for values in every if n in values) for n in rounds}


# --------------------------------------------------------------------------------------------------------- the figures


def _draw_rows(lines: Mapping[str, Series], dashed: Mapping[str, Series], unit: str) -> Figure:
    """A line a row, and thick dashed ones over them; the legend, by the last value, is as the lines end."""
    figure, (axis,) = pages.axes(1, _height(len(lines) + len(dashed)))
    for i, (name, series) in enumerate(lines.items()):
        axis.plot(*pages.points(series), label=name, lw=1.1, **pages.line_style(i), **pages.marks(series))
    for name, series in dashed.items():
        axis.plot(*pages.points(series), label=name, color=pages.INK, linestyle="--", lw=2)
    axis.set(xlabel="rounds", ylabel=unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn = [line for line in axis.lines if len(line.get_xdata())]  # type: ignore[arg-type]
    drawn.sort(key=lambda line: -float(np.asarray(line.get_ydata())[-1]))
    names = [_wrapped(str(line.get_label())) for line in drawn]
    figure.legend(drawn, names, loc="outside right upper", fontsize=6.5, handlelength=3)
    return figure


def _draw_costs(rows: list[_RowResults], units: Mapping[str, str]) -> Figure:
    """A panel a cost, by the axis' title; a point a row, with the row's number, which the legend explains."""
    figure, axes = pages.axes(len(units), _height(len(rows)), share=False)
    for axis in axes[1:]:
        axis.sharey(axes[0])
    shown: dict[int, Any] = {}
    for axis, (title, key) in zip(axes, units.items(), strict=True):
        for i, row in enumerate(rows):
            if row.cost(key) > 0:
                color = _KINDS.get(row.kind, pages.INK)
                shown[i] = axis.scatter(
                    row.cost(key), fmean(row.means()), s=16, color=color, facecolors=color if row.whole else "none"
                )
        axis.set(xlabel=title, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel("test accuracy %")
    names = [_wrapped(f"{i + 1}: {rows[i].label}") for i in sorted(shown)]
    figure.legend([shown[i] for i in sorted(shown)], names, loc="outside right upper", fontsize=6.5)
    for axis, key in zip(axes, units.values(), strict=True):
        costs = [(str(i + 1), row.cost(key), fmean(row.means())) for i, row in enumerate(rows) if row.cost(key) > 0]
        _write_beside(axis, costs, fontsize=6.5)
    return figure


def _draw_heat_map(values: np.ndarray, rows: list[str], tasks: list[str], label: str) -> Figure:
    figure, (axis,) = pages.axes(1, 1.1 + 0.17 * len(rows))
    least, most = (float(f(values)) if np.isfinite(values).any() else 0.0 for f in (np.nanmin, np.nanmax))
    mesh = axis.pcolormesh(values, cmap="viridis", vmin=least, vmax=most)
    axis.set_xticks(np.arange(len(tasks)) + 0.5, [pages.short(task) for task in tasks], fontsize=7, rotation=30)
    axis.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=6.5)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.set(xlim=(0, len(tasks)), ylim=(len(rows), 0))
    for (i, j), value in np.ndenumerate(values):
        if len(tasks) <= 12 and np.isfinite(value):
            color = "black" if value - least > 0.6 * (most - least) else "white"
            axis.text(j + 0.5, i + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=color)
    figure.colorbar(mesh, ax=axis, label=label, pad=0.01, aspect=30).outline.set_visible(False)
    return figure


def _draw_landscape(landscape: Mapping[str, Any]) -> Figure:
    """Filled contours; its points with their names, and a line along those of the path in their order."""
    figure, (axis,) = pages.axes(1, 5.4)
    x, y, accuracy = (np.array(landscape[key], float) for key in ("x", "y", "accuracy"))
    contours = axis.contourf(x, y, 100 * accuracy, levels=20, cmap="viridis")
    points, path = landscape["points"], [point for point in landscape["points"] if point["path"]]
    for color, width in (("black", 3), ("white", 1.4)):
        axis.plot([point["x"] for point in path], [point["y"] for point in path], color=color, lw=width)
    axis.scatter([p["x"] for p in points], [p["y"] for p in points], s=22, color="white", edgecolors="black", zorder=3)
    axis.set(xlabel=landscape["axes"][0], ylabel=landscape["axes"][1])
    axis.grid(False)
    figure.colorbar(contours, ax=axis, label="accuracy %", pad=0.01, aspect=30).outline.set_visible(False)
    names = [(point["name"], point["x"], point["y"]) for point in points]
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.75, "linewidth": 0}
    _write_beside(axis, names, fontsize=7, color="black", bbox=box)
    return figure


def _height(entries: int) -> float:
    """Of a figure beside a legend with so many small entries."""
    return max(3.6, 0.4 + 0.16 * entries)


def _wrapped(label: str) -> str:
    """A label in lines that leave room for the plot beside them."""
    return textwrap.fill(label, 42, subsequent_indent="    ")


_SIDES = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)])


def _write_beside(axis: Axes, texts: list[tuple[str, float, float]], **style: Any) -> None:
    """Write (text, x, y) beside points that are drawn already, each where it covers the least of the others.

    The layout has to be settled first, which is why this comes last in a figure.
    """
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    point = figure.dpi / 72
    places = axis.transData.transform([(x, y) for _, x, y in texts]).reshape(-1, 2)
    taken = [Bbox([place - 3 * point, place + 3 * point]) for place in places]

    def covered(box: Bbox) -> float:
        outside = box.width * box.height - _shared_area(box, axis.bbox)
        return sum(_shared_area(box, other) for other in taken) + 2 * outside

    thread = {"arrowstyle": "-", "lw": 0.4, "color": style.get("color", pages.INK), "shrinkA": 0, "shrinkB": 2}
    centered: Any = {"textcoords": "offset points", "ha": "center", "va": "center", "arrowprops": thread}
    for (text, x, y), place in zip(texts, places, strict=True):
        note = axis.annotate(text, (x, y), (0, 0), **centered, **style)
        note.set_in_layout(False)
        half = np.array(Text.get_window_extent(note).size) / 2 + point  # of the text alone, without its thread
        centers = [place + side * (half + gap * point) for gap in (4, 9, 14, 19, 27) for side in _SIDES]
        best = min((Bbox([center - half, center + half]) for center in centers), key=covered)  # the nearest of the best
        x, y = ((best.p0 + best.p1) / 2 - place) / point
        note.set_position((x, y))
        taken.append(best)


def _shared_area(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return both.width * both.height if both else 0.0
