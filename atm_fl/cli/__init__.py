"""`atm-fl`: run, resume, report and list, thin over the library."""

from __future__ import annotations

import sys

from atm_fl.cli.terminal import app, complain
from atm_fl.errors import RunError, SettingError

# isort: off
from atm_fl.cli import run, data, merge, study, attack, deploy  # noqa: F401 (the order of the help)

# isort: on


def main() -> None:
    """Entry point: errors that a user can fix are one line and exit status 2 (a setting) or 1 (a run)."""
    try:
        app()
    except SettingError as error:
        sys.exit(complain(error, 2))
    except RunError as error:
        sys.exit(complain(error, 1))
