"""Coefficients of single tasks and layers, beside a merge's own `scaling`."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from atm_fl.errors import SettingError, did_you_mean
from atm_fl.vectors import Layout

QUOTED = r'"(?:[^"\\]|\\.)*"|\'[^\']*\''
ITEM = re.compile(rf"\s*({QUOTED}|[^,=]*?)\s*=\s*({QUOTED}|[^,]*?)\s*(?:,|$)")


def read_table(key: str, text: str) -> dict[str, Any]:
    """A text of the form 'name=value, name=value' as a table; values as in TOML, names too if they are quoted.

    Quotes are for names with a comma or an equals sign: '"a,b=c"=2'. SettingError if it cannot be read.
    """
    table: dict[str, Any] = {}
    place = 0
    while text[place:].strip():
        item = ITEM.match(text, place)
        try:
            if not item or not item[1]:
                raise ValueError
            name = tomllib.loads(f"name = {item[1]}")["name"] if item[1][0] in "\"'" else item[1]
            if "=" in item[2]:
                raise ValueError
        except ValueError as error:
            wrong = text[place : item.end() if item else None].strip().rstrip(",")
            raise SettingError(
                f"{key}={text!r}: {wrong!r} is not of the form name=value, with commas between; "
                "a name with a comma or = in it is to be quoted"
            ) from error
        try:
            table[name] = tomllib.loads(f"value = {item[2]}")["value"]
        except ValueError:
            raise SettingError(f"{key}={text!r}: {name}={item[2]!r} must be a number, as {name}=0.5") from None
        place = item.end()
    return table


def read_factors(key: str, text: str) -> dict[str, float]:
    """`read_table` of finite numbers."""
    table = read_table(key, text)
    for name, value in table.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SettingError(f"{key}={text!r}: the factor of {name!r} must be a finite number")
    return table


Factor = float | Sequence[float]
"""A factor, or several that stand at equal distances from the first layer to the last, with straight lines between."""


def depths(names: Sequence[str]) -> dict[str, float]:
    """How deep each entry is, 0 to 1: by the first number in its name; without one, embeddings at 0, others at 1."""
    layers = {name: int(number[1]) for name in names if (number := re.search(r"(?:^|\.)(\d+)\.", name))}
    last = max(layers.values(), default=0)
    return {
        name: layers[name] / last if name in layers and last else 0.0 if "emb" in name or name in layers else 1.0
        for name in names
    }


def factors(names: Sequence[str], table: Factor | Mapping[str, Factor], key: str) -> list[float]:
    """The factor of each entry: of a table, that of the first pattern which it matches, else 1.

    SettingError if a pattern matches nothing or a factor is no finite number.
    """
    rows = table if isinstance(table, Mapping) else {"*": table}
    for pattern, factor in rows.items():
        values = factor if isinstance(factor, Sequence) else [factor]
        wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v)]
        if wrong or not values or isinstance(factor, str):
            raise SettingError(f"{key}: {pattern!r}={factor!r}: it must be a finite number, or several")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SettingError(
                f"{key}: {pattern!r} matches no entry of the model; the first are "
                f"{', '.join(names[:3])}, and * stands for any text"
            )
    deep = depths(names)

    def at(name: str) -> float:
        factor = next((factor for pattern, factor in rows.items() if fnmatchcase(name, pattern)), 1.0)
        if not isinstance(factor, Sequence):
            return float(factor)
        place = deep[name] * (len(factor) - 1)
        left = min(int(place), len(factor) - 2) if len(factor) > 1 else 0
        right = min(left + 1, len(factor) - 1)
        return float(factor[left] + (place - left) * (factor[right] - factor[left]))

    return [at(name) for name in names]


def check_tasks(key: str, table: Mapping[str, Any], tasks: tuple[str, ...]) -> None:
    """SettingError if the setting `key`, a table by task, names one that is not there."""
    for task in table:
        if task not in tasks:
            raise SettingError(f"{key}: there is no task {task!r}{did_you_mean(task, tasks)}")


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
