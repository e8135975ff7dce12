"""Studies: the loop run many times, and the tables of the documentation.

A study is a TOML file, and the module that runs it a `Study`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Sequence
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar

from atm_fl.errors import SettingError
from atm_fl.files import packaged

Configuration = TypeVar("Configuration")
Unit = TypeVar("Unit")


class Study(Protocol[Configuration, Unit]):
    """What a module of this package has that runs a study: `contest`, `merge_table`, `privacy`, `reconstruction`."""

    def read(self, values: dict[str, Any], /) -> Configuration:
        """The configuration in a file's values. KeyError or TypeError for a wrong key, SettingError for a value."""

    def phases(self, study: Configuration, /) -> Iterator[Sequence[Unit]]:
        """Units of work that may run side by side; a later phase needs the results of the one before it."""

    def run_unit(self, unit: Unit, /) -> str:
        """Do one unit in this process, or what is left of it; a line that says so."""

    def table(self, study: Configuration, /) -> str:
        """What is finished, in Markdown."""

    def page(self, study: Configuration, /) -> Path:
        """The file with what is finished: a page, or the table."""


MARKS = (
    ("common", "atm-fl attack reconstruct"),
    ("reconstruction", "atm-fl study privacy"),
    ("reference", "atm-fl study merges"),
    ("rows", "atm-fl compare"),
)
"""A key that only files of one kind have, the more special first, and the command for that kind."""


def end_with_parent() -> None:
    """In a process that another has started: end when that one does, however it ended.

    Else a command that is killed would leave its units running, whose folders nobody else could have. Units go on
    from where they were broken off.
    """
    parent = parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def command_for(values: dict[str, Any]) -> str:
    """The command that runs a file of these values; `atm-fl run` if it is no study's."""
    return next((command for key, command in MARKS if key in values), "atm-fl run")


def read_study(path: Path, kind: Study[Configuration, Unit]) -> Configuration:
    """The study, of the module `kind`, in a TOML file. SettingError if it is not one, or a value cannot work."""
    path = packaged(path)
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"{path} is not valid TOML: {error}") from error
    if "rows" not in values:
        raise SettingError(f"{path} is not a study, which has [rows]; for a run's settings use atm-fl run {path}")
    try:
        return kind.read({key.replace("-", "_"): value for key, value in values.items()})
    except (TypeError, KeyError, AttributeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise SettingError(f"{path} is not such a study: {why}; is it one for {command_for(values)}?") from error
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error
