"""Studies: the loop run many times, and the tables of the documentation.

A study is a TOML file whose key `study` names the module here that runs it. The module has a class `Study` with a class
method `of`, which checks the file's values, and the functions `phases`, `run_unit` and `table`.
"""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from pathlib import Path
from typing import Any

from atm_fl.errors import SettingError, did_you_mean


def read_study(path: Path) -> tuple[Any, Any]:
    """(the study, its module) of a TOML file. SettingError if it is not one, or one of its values cannot work."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"{path} is not a study: {error}") from error
    name, known = values.pop("study", ""), [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise SettingError(f"{path}: study={name!r} is unknown{did_you_mean(str(name), known)}")
    module = importlib.import_module(f"{__name__}.{name}")
    try:
        return module.Study.of({key.replace("-", "_"): value for key, value in values.items()}), module
    except (TypeError, KeyError) as error:
        raise SettingError(f"{path} is not a study: {error}") from error
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error
