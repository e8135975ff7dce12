"""Models by the path of a function: `model = "package.module:function"` of a package that is installed.

Importing a module runs it, and the run's settings come from its server. So nothing is imported when settings are
checked, and a party with data of its own imports only what its policy's rule `models` names (`Policy.check_imports`).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from atm_fl.errors import SettingError
from atm_fl.plugins import Plugin, digest

PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_imported(name: str) -> bool:
    """Whether a model's name is the path of a function."""
    return ":" in name


def check_path(name: str) -> None:
    """SettingError if `name` cannot be the path of a function; whether it is there shows when it is imported."""
    if not PATH.fullmatch(name):
        raise SettingError(f"model={name!r} is no path of a function; write it as package.module:function")


def make_imported(name: str) -> Any:
    """What the function makes. SettingError if there is no such module or function."""
    check_path(name)
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise SettingError(f"model={name!r}: {module_name} needs {error.name!r}, which is not installed") from error
        raise SettingError(f"model={name!r}: {_missing(error.name)}") from error
    made = getattr(module, function_name, None)
    if not callable(made):
        raise SettingError(f"model={name!r}: {module.__file__} has no function {function_name!r}")
    return made()


def imported_plugin(name: str) -> Plugin:
    """The file of a model's module, with its digest: server and parties must have the same. Nothing is imported.

    SettingError if it is not there.
    """
    first, *parts = name.partition(":")[0].split(".")
    spec = importlib.util.find_spec(first)
    for part in parts:
        places = spec.submodule_search_locations if spec else None
        first = f"{first}.{part}"
        spec = PathFinder.find_spec(first, places) if places else None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise SettingError(f"model={name!r}: {_missing(first)}")
    return Plugin(spec.origin, digest(Path(spec.origin).read_bytes()))


def _missing(module: str | None) -> str:
    return (
        f"there is no module {module!r} here; install its package, or put the file into the folder that ATM_FL_PLUGINS "
        "names"
    )
