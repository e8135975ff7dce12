"""`atm-fl`: run, resume, report and list, thin over the library."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from atm_fl.cli.terminal import app, complain
from atm_fl.errors import RunError, SettingError

# isort: off
from atm_fl.cli import run, export, data, merge, study, attack, deploy  # noqa: F401 (the order of the help)

# isort: on


_show = warnings.showwarning


def _in_one_line(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> None:
    """An old spelling is told in a line, without the place in our code that read it."""
    if category.__name__ == "OldSpelling":
        print(f"atm-fl: {message}", file=sys.stderr)
    else:
        _show(message, category, *more, **named)


def main() -> None:
    """Entry point: errors that a user can fix are one line and exit status 2 (a setting) or 1 (a run)."""
    warnings.showwarning = _in_one_line
    try:
        app()
    except SettingError as error:
        sys.exit(complain(error, 2))
    except RunError as error:
        sys.exit(complain(error, 1))
