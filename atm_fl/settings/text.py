"""Settings as text: keys and types."""

from __future__ import annotations

from typing import Any

from atm_fl.errors import SettingError


def kebab(name: str) -> str:
    """A Python name as a run-config key."""
    return name.replace("_", "-")


def typed(key: str, value: Any, kind: str | type) -> Any:
    """`value` as the type a setting has; SettingError if it is another. Whole numbers serve as floats."""
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != kind:
        example = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string in quotes"}
        raise SettingError(f"{key}={value!r}: it must be {example[str(kind)]}")
    return value
