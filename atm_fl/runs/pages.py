"""Self-contained HTML pages with inline SVG figures: what the report of a run and the page of a study have in common.

A page has no link to outside and no script, follows the reader's dark or light scheme, and fits a telephone: what is
wider scrolls by itself. Every text given to the functions here is escaped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atm_fl.runs.fonts import save_figure

Series = dict[int, float]
"""A number by round; rounds where it was not measured are missing."""

INK = "#0a0b0c"
"""The color of a figure's text and axes; nothing else has it, so that an SVG's can be replaced by the page's."""

DASHES = ("-", "--", ":", "-.")
"""Line styles, for more lines than there are colors."""

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
.total tbody tr:last-child { font-weight: bold }
.dense { font-size: .8em } .dense :is(th, td) { padding: .1rem .4rem }
.scroll { overflow-x: auto } figure { margin: .8rem 0; break-inside: avoid } svg { max-width: 100%; height: auto }
.lead { font-size: 1.2em; opacity: 1 } h1, .lead { overflow-wrap: anywhere }
.row { display: flex; flex-wrap: wrap; gap: 0 1.5rem } .row figure { flex: 1 1 21rem; min-width: 0; max-width: 36rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .2rem 1rem }
.pictures img { width: 6rem; height: 6rem; object-fit: contain; image-rendering: pixelated }
.pictures figcaption { font-size: .85em; overflow-wrap: anywhere } .wrong figcaption { font-weight: bold; opacity: 1 }
.tip:hover path { fill-opacity: .12 !important }
@media (max-width: 30rem) { body { margin: 1rem auto; font-size: 16px } th, td { padding: .15rem .4rem } }
@media print { :root { color-scheme: light } body { margin: 0; max-width: none } tr { break-inside: avoid }
  h2 { break-after: avoid } details::details-content { content-visibility: visible; display: block } }
"""


def told(value: float | None, form: str = ".2f") -> str:
    """A number as a table has it: a dash where it was not measured."""
    return "–" if value is None else format(value, form)


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page around `parts`, which are HTML already; nothing that it names is ever loaded from outside."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and their values."""
    return table((), [(key, str(value)) for key, value in values.items()])


def table(headings: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "", style: str = "") -> str:
    """A table, which scrolls by itself where the page is too narrow.

    Words of `style`: "numbers" (all but the first column to the right), "total" (last row bold), "dense" (small).
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table class="{style}">'
        + (f"<caption>{escape(caption)}</caption>" if caption else "")
        + (f"<thead><tr>{head}</tr></thead>" if head else "")
        + f"<tbody>{body}</tbody></table></div>"
    )


def row(figures: Iterable[str]) -> str:
    """Figures side by side where the page is wide enough."""
    return f'<div class="row">{"".join(figures)}</div>'


def figure(caption: str, draw: Callable[[], Figure]) -> str:
    """What `draw` returns as an inline SVG above its caption. Captions of one page differ, so that its ids do."""
    svg = render(draw, "svg", salt=caption).decode()
    svg = re.sub(f'<g id="{_TIP}([0-9a-f]*)">', _shown_tip, svg[svg.index("<svg ") :])
    svg = re.sub('<g id="[^"]*"', "<g", svg)  # these ids would repeat in the page
    svg = svg.replace(INK, "currentColor")  # the page's text color, in the dark and in the light
    label = f'<svg role="img" aria-label="{escape(caption)}" '
    return f"<figure>{svg.replace('<svg ', label, 1)}<figcaption>{escape(caption)}</figcaption></figure>"


def add_tips(axis: Axes, texts: Mapping[int, str]) -> None:
    """Show a text while the pointer is over a round's stripe of the figure."""
    if not texts:
        return
    rounds = sorted(texts)
    edges = [(a + b) / 2 for a, b in pairwise(rounds)]
    for number, low, high in zip(rounds, [rounds[0] - 0.5, *edges], [*edges, rounds[-1] + 0.5], strict=True):
        # Not quite transparent: what has no color at all feels no pointer.
        stripe = axis.axvspan(low, high, color=INK, alpha=0.002, lw=0, zorder=10)
        stripe.set_gid(_TIP + texts[number].encode("utf-8", "replace").hex())


_TIP = "tip:"
"""What the id of a stripe with a text begins with; the text follows in hexadecimal digits."""


def _shown_tip(match: re.Match[str]) -> str:
    return f'<g class="tip"><title>{escape(bytes.fromhex(match[1]).decode())}</title>'


def size_text(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    unit, name = byte_unit(count)
    return f"{count / unit:,.1f} {name}"


def byte_unit(count: float) -> tuple[float, str]:
    """The largest unit that `count` reaches, and its name."""
    return next((unit for unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= unit[0]), (1e3, "kB"))


# --------------------------------------------------------------------------------------------------------- the figures


def render(draw: Callable[[], Figure], kind: str, salt: str = "") -> bytes:
    """A figure as "svg" (no background) or "png" (white background). Ids in SVGs of other `salt` are other ones."""
    style: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        **{"grid.color": INK, "grid.alpha": 0.15, "axes.grid": True, "axes.axisbelow": True},
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
        background = "none" if kind == "svg" else "white"
        save_figure(draw, file, format=kind, dpi=150, facecolor=background, metadata=nothing)
    return file.getvalue()


NARROW = 5.2
"""The width in inches of a figure that is read on a telephone, or beside another."""


def axes(panels: int = 1, height: float = 3.2, share: bool = True, width: float = 9) -> tuple[Figure, list[Axes]]:
    """A figure, as wide as the page by default, with `panels` side by side, which may share their axes. Inches."""
    drawing = Figure(figsize=(width, height), layout="constrained")
    return drawing, list(drawing.subplots(1, panels, sharex=share, sharey=share, squeeze=False)[0])


MANY = 40
"""More lines than these in one figure, which are also as many as differ in style, are drawn as the band they fill."""


def _draw_tasks(axis: Axes, curves: Mapping[str, Series]) -> None:
    """A thin line per task, or of more than `MANY` tasks the bands that all and the middle four fifths of them fill."""
    if len(curves) <= MANY:
        for i, (name, series) in enumerate(curves.items()):
            axis.plot(*points(series), label=short(name), **line_style(i), lw=1.2, **marks(series))
        return
    rounds = sorted({n for series in curves.values() for n in series})
    values = {n: [series[n] for series in curves.values() if n in series] for n in rounds}
    for low, high, name in ((0, 100, f"all {len(curves)}"), (10, 90, "four fifths of them")):
        below, above = ([float(np.percentile(values[n], share)) for n in rounds] for share in (low, high))
        axis.fill_between(rounds, below, above, color="C0", alpha=0.2, lw=0, label=name)


def draw_lines(panels: Mapping[str, Mapping[str, Series]], bold: Mapping[str, Series], unit: str, name: str) -> Figure:
    """Panels by title, each a line per task (the same tasks in all) and a bold one, called `name`, over them."""
    tasks = list(dict.fromkeys(task for series in panels.values() for task in series))
    drawing, across = axes(len(panels), max(3.4, 0.5 + 0.19 * min(len(tasks), 30)))
    for axis, (title, series) in zip(across, panels.items(), strict=True):
        _draw_tasks(axis, {task: series.get(task, {}) for task in tasks})
        axis.plot(*points(bold[title]), color=INK, lw=2.4, label=name, **marks(bold[title]))
        axis.set(title=title, xlabel="rounds")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    across[0].set_ylabel(unit)
    *lines, mean = across[0].lines
    handles = [*lines, *across[0].collections]
    labels = [str(handle.get_label()) for handle in (mean, *handles)]
    drawing.legend([mean, *handles], labels, loc="outside right upper", ncols=1 + len(handles) // 30)
    return drawing


def draw_curves(
    curves: Mapping[str, Series],
    bold: Mapping[str, Series],
    unit: str,
    references: Mapping[str, float] | None = None,
    best: int | None = None,
    form: str = ".1f",
) -> Figure:
    """Thin and bold lines by round, with their values on hover, level `references`, and the `best` round marked.

    best: a round of the first bold line. form: how a value is written.
    """
    levels = references or {}
    named = len(curves) if len(curves) <= MANY else 2
    drawing, (axis,) = axes(1, 3.0 + 0.17 * -(-(named + len(bold) + len(levels)) // 3), width=NARROW)
    many = len(bold) > 1
    for i, (name, series) in enumerate(bold.items()):
        style = line_style(i) if many else {"color": INK}
        axis.plot(*points(series), label=short(name), **style, lw=2.4, **marks(series))
    _draw_tasks(axis, curves)
    for i, (name, level) in enumerate(levels.items()):
        axis.axhline(level, label=f"{name} {level:{form}}", color=INK, lw=1.4, linestyle=DASHES[1 + i % 3], alpha=0.6)
    if best is not None:
        value = next(iter(bold.values()))[best]
        axis.plot([best], [value], "*", color="C1", markersize=13, label=f"best: round {best}")
    axis.set(xlabel="round", ylabel=unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines = {**bold, **(curves if len(curves) <= MANY else {})}
    texts: dict[int, list[str]] = {}
    for name, series in lines.items():
        for n, value in series.items():
            texts.setdefault(n, [f"round {n}"]).append(f"{name}: {value:{form}}")
    add_tips(axis, {n: "\n".join(tips) for n, tips in texts.items()})
    drawing.legend(loc="outside lower center", ncols=3, fontsize=8)
    return drawing


def line_style(i: int) -> dict[str, Any]:
    """Color and dashes of the i-th of many lines; the first forty differ."""
    return {"color": f"C{i % 10}", "linestyle": DASHES[i // 10 % 4]}


def points(series: Series) -> tuple[list[int], list[float]]:
    """The rounds and the numbers, to be plotted."""
    return list(series), list(series.values())


def marks(series: Series) -> dict[str, Any]:
    """Markers where there are few points, so that one alone and a gap are seen."""
    return {"marker": "o", "markersize": 3} if len(series) <= 40 else {}


def short(task: str) -> str:
    """A task's name as a label; of a long path, its end."""
    return task if len(task) <= 20 else f"…{task[-19:]}"
