"""Settings as text: keys and types."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from atm_fl.errors import SettingError
from atm_fl.files import packaged


def read_toml(path: Path) -> dict[str, Any]:
    """What a file of settings says: `path`, or a configuration of this package. SettingError if it can't be read."""
    path = packaged(path)
    if not path.is_file():
        raise SettingError(f"{path} is not a file of settings; the configurations are in configs/")
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"{path} is not valid TOML: {error}") from error


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
