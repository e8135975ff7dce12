"""Federated learning by alternating tuning and merging of task vectors (ATM, arXiv:2411.03055).

What a person needs in Python; each name is imported when it is first used::

    import atm_fl

    result = atm_fl.run("configs/demo.toml", tasks="mnist,digits,icons", rounds=3, run_dir="runs/mine")
    print(result.test[3], result.best_round)
    result.export("timm", out="mine")
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atm_fl.api import Result, compare, load, merge, predictor, run
    from atm_fl.errors import RunError, SettingError
    from atm_fl.exports import Predictor
    from atm_fl.settings import Settings

__all__ = [
    "Predictor",
    "Result",
    "RunError",
    "SettingError",
    "Settings",
    "__version__",
    "compare",
    "load",
    "merge",
    "predictor",
    "run",
]

_PLACES = {
    **dict.fromkeys(("Result", "compare", "load", "merge", "predictor", "run"), "atm_fl.api"),
    **dict.fromkeys(("RunError", "SettingError"), "atm_fl.errors"),
    "Predictor": "atm_fl.exports",
    "Settings": "atm_fl.settings",
}

try:
    __version__ = version("atm-fl")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
