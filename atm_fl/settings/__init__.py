"""The settings of a run: what there is (schema), what cannot be (rules), how it is written (text, spelling)."""

from atm_fl.settings.rules import OF_DEPLOYMENT, check_closed, check_model
from atm_fl.settings.schema import Settings, defaults, sections, setting, stored
from atm_fl.settings.spelling import OldSpelling, modern
from atm_fl.settings.text import kebab, read_toml, typed

__all__ = [
    "OF_DEPLOYMENT",
    "OldSpelling",
    "Settings",
    "check_closed",
    "check_model",
    "defaults",
    "kebab",
    "modern",
    "read_toml",
    "sections",
    "setting",
    "stored",
    "typed",
]
