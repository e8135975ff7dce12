"""Studies: the loop run many times, and the tables of the documentation.

A study is a TOML file whose key `study` names the module here that runs it.
"""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from pathlib import Path
from typing import Any

from atm_fl.errors import SettingError, did_you_mean


def read_study(path: Path) -> tuple[Any, Any]:
    """(the study, its module) of a TOML file. SettingError if it is not one."""
    try:
        name = tomllib.loads(path.read_text()).get("study", "")
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"{path} is not a study: {error}") from error
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise SettingError(f"{path}: study={name!r} is unknown{did_you_mean(str(name), known)}")
    module = importlib.import_module(f"{__name__}.{name}")
    return module.Study.read(path), module
