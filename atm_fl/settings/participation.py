"""Which task takes part in which rounds: tasks that join late, or leave, by plan or on their own."""

from __future__ import annotations

import math
import re

from atm_fl.errors import SettingError

ANYONE = "*"
"""In `tasks`: others may join while the run goes on."""


def read_participation(text: str) -> dict[str, tuple[int, float]]:
    """'mnist=1-5, digits=6-' as task → (first, last) round; an open end is infinite. SettingError if it is neither."""
    periods: dict[str, tuple[int, float]] = {}
    for item in text.split(",") if text.strip() else ():
        read = re.fullmatch(r"\s*(\S.*?)\s*=\s*(\d+)\s*-\s*(\d*)\s*", item)
        first, last = (int(read[2]), float(read[3] or math.inf)) if read else (0, 0.0)
        if not read or not 1 <= first <= last:
            raise SettingError(f"participation={text!r}: {item.strip()!r} is not of the form mnist=2-5 or mnist=2-")
        periods[read[1]] = first, last
    return periods
