"""The one place where figures are written to files: names in any script have their glyphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

from atm_fl.tasks.photos import package_dir

PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")
"""Where fonts of other scripts are, those of the embedded tasks: Noto Sans, its CJK part last, for it is 33 MB."""


def save_figure(draw: Callable[[], Figure], target: Path | IO[bytes], **options: Any) -> None:
    """Write what `draw` draws to `target`, with matplotlib's `options` of savefig.

    matplotlib's own font is taken unless it lacks a character; then the figure is drawn again with all fonts behind it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph .* missing from")
        try:
            draw().savefig(target, **options)
            return
        except UserWarning as warning:
            if "missing from" not in str(warning):
                raise
    if not isinstance(target, Path):
        target.seek(0)
        target.truncate()
    with matplotlib.rc_context({"font.family": [*matplotlib.rcParams["font.family"], *families()]}):
        draw().savefig(target, **options)


@cache
def families() -> tuple[str, ...]:
    """The names of the fonts in `PACKAGES`, which matplotlib knows from then on."""
    names = []
    for package in PACKAGES:
        for file in sorted(package_dir(package).glob("*.tt[fc]")):
            font_manager.fontManager.addfont(file)
            names.append(font_manager.fontManager.ttflist[-1].name)
    return tuple(names)
