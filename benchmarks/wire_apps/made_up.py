"""What both apps of benchmarks/wire.py work with: a made-up base, made-up steps, and marks where rounds begin and end.

It is all in the folder that the environment names WIRE_FOLDER: `layout.json`, one file of a step a client
(WIRE_CLIENT says which), and `marks`. Nothing of atm_fl is imported here, so that stock Flower's app is not slowed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor


def folder() -> Path:
    """Where it all is."""
    return Path(os.environ["WIRE_FOLDER"])


def shapes() -> dict[str, list[int]]:
    """The shape of every entry, in order."""
    return json.loads((folder() / "layout.json").read_text())


def first_base(elements: int) -> Tensor:
    """A base float32 [n] that no two chunks of are equal, for Flower sends equal ones once."""
    return torch.randn(elements, generator=torch.Generator().manual_seed(0)).mul_(0.02)


def step(turn: int) -> Tensor:
    """What this client's tuning would have found, float32 [n]; another one for every turn below 97."""
    vector = np.fromfile(folder() / f"{os.environ['WIRE_CLIENT']}.f32", np.float32)
    return torch.from_numpy(vector).mul_(1 + turn % 97 / 97)


def mark(event: str) -> None:
    """Write down that something happens now."""
    with open(folder() / "marks", "a") as file:
        file.write(f"{event} {time.time()}\n")


def marked(strategy: type[Strategy]) -> type[Strategy]:
    """A strategy that also writes down when a round begins and when its vectors are merged."""

    class Marked(strategy):  # type: ignore[valid-type,misc]
        def configure_train(self, *args: Any) -> Iterable[Message]:
            mark("begin")
            return super().configure_train(*args)

        def configure_evaluate(self, *args: Any) -> Iterable[Message]:
            mark("merged")
            return super().configure_evaluate(*args)

        def aggregate_evaluate(self, *args: Any) -> MetricRecord | None:
            metrics = super().aggregate_evaluate(*args)
            mark("evaluated")
            return metrics

    return Marked
