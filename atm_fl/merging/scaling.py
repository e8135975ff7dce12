"""Coefficients of single tasks and layers, beside a merge's own `scaling`."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from atm_fl.errors import SettingError, did_you_mean
from atm_fl.options import read_items
from atm_fl.vectors import Layout


def read_table(key: str, text: str) -> dict[str, Any]:
    """A text of the form 'name=value, name=value' as a table, values as in TOML. SettingError if it cannot be read."""
    table: dict[str, Any] = {}
    for name, value in read_items(f"{key}={text!r}", text) if text.strip() else ():
        try:
            table[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            raise SettingError(f"{key}={text!r}: {name}={value!r} must be a number, as {name}=0.5") from None
    return table


def read_factors(key: str, text: str) -> dict[str, float]:
    """`read_table` of finite numbers."""
    found = read_table(key, text)
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SettingError(f"{key}={text!r}: the factor of {name!r} must be a finite number")
    return found


def check_task_scaling(table: Mapping[str, float], tasks: tuple[str, ...]) -> None:
    """SettingError if `table` (task → factor on its vector before the merge) names a task that is not there."""
    for task in table:
        if task not in tasks:
            raise SettingError(f"task-scaling: there is no task {task!r}{did_you_mean(task, tasks)}")


def check_layer_scaling(table: Mapping[str, float], layout: Layout) -> None:
    """SettingError if a pattern of `table` matches no entry of the layout."""
    for pattern in table:
        if not any(fnmatchcase(name, pattern) for name in layout.names):
            raise SettingError(
                f"layer-scaling: {pattern!r} matches no entry of the model; the first are "
                f"{', '.join(layout.names[:3])}, and * stands for any text"
            )


def scale_layers(merged: Tensor, layout: Layout, table: Mapping[str, float]) -> Tensor:
    """Multiply each entry of the merged vector [n], in place, by the factor of the first pattern that it matches.

    table: pattern with * and ? → factor, as {"*.mlp.*": 1.5, "*norm*": 0.5}; what matches none keeps its length.
    """
    for name, entry in layout.views(merged).items() if table else ():
        factor = next((factor for pattern, factor in table.items() if fnmatchcase(name, pattern)), 1.0)
        entry.mul_(factor)
    return merged
