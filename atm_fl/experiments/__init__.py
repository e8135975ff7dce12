"""Studies: the loop run many times, and the tables of the documentation.

A study is a TOML file. The module that runs it has a class `Study` with a class method `of`, which checks the file's
values, and the functions `phases`, `run_unit` and `table`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from atm_fl.errors import SettingError


def read_study(path: Path, kind: Any) -> Any:
    """The study, of the module `kind`, in a TOML file. SettingError if it is not one, or a value cannot work."""
    try:
        values = tomllib.loads(path.read_text())
        return kind.Study.of({key.replace("-", "_"): value for key, value in values.items()})
    except (OSError, tomllib.TOMLDecodeError, TypeError, KeyError, AttributeError) as error:
        raise SettingError(f"{path} is not such a study: {error}") from error
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error
