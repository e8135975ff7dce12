"""For anyone's Flower app: a strategy in the place of `FedAvg`, and a mod of the ClientApp.

On the server, in any app of Flower's message API::

    from atm_fl.flower import TaskVectorStrategy

    strategy = TaskVectorStrategy(merge="tsv-m", checkpoint_dir="checkpoints")

On the clients, where bytes matter, with `codec="int8"` on the server::

    app = ClientApp(mods=[encoded("int8")])

Each name is imported when it is first used: every message of a deployment starts a ClientApp, which needs no server.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atm_fl.flower.mods import encoded
    from atm_fl.flower.strategy import TaskVectorStrategy

__all__ = ["TaskVectorStrategy", "encoded"]

_PLACES = {"TaskVectorStrategy": "atm_fl.flower.strategy", "encoded": "atm_fl.flower.mods"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
