"""The settings of a run: what there is (schema), what cannot be (rules), how it is written (text)."""

from atm_fl.settings.rules import OF_DEPLOYMENT
from atm_fl.settings.schema import Settings, defaults, setting
from atm_fl.settings.text import kebab, typed

__all__ = [
    "OF_DEPLOYMENT",
    "Settings",
    "defaults",
    "kebab",
    "setting",
    "typed",
]
