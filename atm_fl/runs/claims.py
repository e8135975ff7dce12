"""Whose a folder of results is: what decides them is written beside them, and nobody else's are put there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atm_fl.errors import SettingError
from atm_fl.files import atomic_write
from atm_fl.settings import stored


def holds(path: Path, decides: dict[str, Any]) -> bool:
    """Whether `path` says that the folder's results are of `decides`; older versions' spelling of settings is read."""
    return path.exists() and _today(json.loads(path.read_text())) == _today(decides)


def claim(path: Path, decides: dict[str, Any], fix: str) -> dict[str, Any]:
    """Write what decides a folder's results to `path`, and return it; as it is there already where it says the same.

    SettingError, ending with `fix`, if the folder holds results of another configuration.
    """
    if path.exists():
        if not holds(path, decides):
            raise SettingError(f"{path.parent} holds results of another configuration; {fix}")
        return json.loads(path.read_text())
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(decides, indent=1))
    return decides


def _today(config: dict[str, Any]) -> dict[str, Any]:
    """`settings` complete and in today's spelling, once for each choice of values of `tune` where there are any."""
    tune: dict[str, list[Any]] = config.get("tune", {})
    choices: list[dict[str, Any]] = [{}]
    for key, values in tune.items():
        choices = [{**choice, key: value} for choice in choices for value in values]
    settings = [stored({**config.get("settings", {}), **choice}) for choice in choices]
    return {**{key: value for key, value in config.items() if key != "tune"}, "settings": settings}
