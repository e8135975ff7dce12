"""Merges: from the task vectors of one round to the step that the base model takes.

A merge is a class with `add(task, vector, weight)`, called once a client, and `result()`. To add one, put a file beside
this one that registers a class::

    @merge("my-merge")
    class MyMerge: ...
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from atm_fl.errors import SettingError, did_you_mean


class Merge(Protocol):
    """One round's merge. A new object serves every round."""

    def __init__(self, *, scaling: float) -> None: ...

    def add(self, task: str, vector: Tensor, weight: float = 1.0) -> None:
        """Take in the task vector of `task`, float32 [n]. The merge may keep or change the tensor."""

    def result(self) -> Tensor:
        """The merged vector, float32 [n], to be added to the base. ValueError if nothing was added."""


_registry: dict[str, type[Merge]] = {}
_Class = TypeVar("_Class", bound=type[Merge])


def merge(name: str) -> Callable[[_Class], _Class]:
    """Register the decorated class as the merge `name`."""

    def register(found: _Class) -> _Class:
        _registry[name] = found
        return found

    return register


def merges() -> dict[str, type[Merge]]:
    """All merges by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _registry


def check_merge(name: str) -> None:
    """SettingError, with the nearest known name, if there is no merge `name`."""
    if name not in merges():
        raise SettingError(f"merge={name!r} is unknown{did_you_mean(name, _registry)}")


def make_merge(name: str, *, scaling: float) -> Merge:
    """A new merge object for one round."""
    check_merge(name)
    return _registry[name](scaling=scaling)
