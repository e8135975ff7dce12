"""Local optimizers: what clients tune with. One is a function of the flat parameter [n] and the settings::

@optimizer("sign")
def sign(parameter, settings):
    return MyOptimizer([parameter], lr=settings.learning_rate)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from atm_fl.plugins import Registry

if TYPE_CHECKING:
    from atm_fl.settings import Settings

Make = Callable[[nn.Parameter, "Settings"], torch.optim.Optimizer]
OPTIMIZERS: Registry[Make] = Registry("optimizer")


def optimizer(name: str) -> Callable[[Make], Make]:
    """Register the decorated function as the maker of the optimizer `name`."""
    return OPTIMIZERS.register(name)


@optimizer("adamw")
def adamw(parameter: nn.Parameter, settings: Settings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    # The fused kernel is one pass over memory; it has no float64 on some devices, where only tests go.
    fused = parameter.dtype == torch.float32
    return torch.optim.AdamW([parameter], settings.learning_rate, weight_decay=settings.weight_decay, fused=fused)


@optimizer("sgd")
def sgd(parameter: nn.Parameter, settings: Settings) -> torch.optim.Optimizer:
    """SGD with `momentum`."""
    return torch.optim.SGD(
        [parameter], lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
