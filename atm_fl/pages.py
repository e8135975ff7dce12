"""Self-contained HTML pages with inline SVG figures: what the report of a run and the page of a study have in common.

A page has no link to outside and no script, and follows the reader's dark or light scheme. Every text given to the
functions here is escaped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
        '<meta name="viewport" content="width=device-width">'
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


def figure(caption: str, draw: Callable[[], Figure]) -> str:
    """What `draw` returns as an inline SVG above its caption. Captions of one page differ, so that its ids do."""
    svg = render(draw, "svg", salt=caption).decode()
    svg = re.sub('<g id="[^"]*"', "<g", svg[svg.index("<svg ") :])  # these ids would repeat in the page
    svg = svg.replace(INK, "currentColor")  # the page's text color, in the dark and in the light
    label = f'<svg role="img" aria-label="{escape(caption)}" '
    return f"<figure>{svg.replace('<svg ', label, 1)}<figcaption>{escape(caption)}</figcaption></figure>"


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
        draw().savefig(file, format=kind, dpi=150, facecolor="none" if kind == "svg" else "white", metadata=nothing)
    return file.getvalue()


def axes(panels: int = 1, height: float = 3.2, share: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page with `panels` side by side, which may share their axes."""
    drawing = Figure(figsize=(9, height), layout="constrained")
    return drawing, list(drawing.subplots(1, panels, sharex=share, sharey=share, squeeze=False)[0])


def draw_lines(panels: Mapping[str, Mapping[str, Series]], bold: Mapping[str, Series], unit: str, name: str) -> Figure:
    """Panels by title, each a line per task (the same tasks in all) and a bold one, called `name`, over them."""
    tasks = list(dict.fromkeys(task for series in panels.values() for task in series))
    drawing, across = axes(len(panels), max(3.4, 0.5 + 0.19 * min(len(tasks), 30)))
    for axis, (title, series) in zip(across, panels.items(), strict=True):
        for task, values in series.items():
            axis.plot(*points(values), **line_style(tasks.index(task)), lw=1.2, **marks(values))
        axis.plot(*points(bold[title]), color=INK, lw=2.4, **marks(bold[title]))
        axis.set(title=title, xlabel="rounds")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    across[0].set_ylabel(unit)
    handles = [across[0].lines[-1], *across[0].lines[:-1]]
    drawing.legend(handles, [name, *map(short, tasks)], loc="outside right upper", ncols=1 + len(tasks) // 30)
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
