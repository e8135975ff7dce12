"""Server optimizers: what the base model makes of the merged vector, round after round.

A merged task vector is minus a gradient times the clients' rate (see tests/test_theory.py), so the server can treat it
as an optimizer treats a gradient. Δ is the merged vector of this round, η the option `learning-rate`, β₁ `momentum`,
β₂ `beta2`, ε `epsilon` (`adam:learning-rate=0.001`); the base moves by

    none       η Δ
    momentum   η m                  m ← β₁ m + Δ                      FedAvgM, Hsu et al. 2019 (arXiv:1909.06335)
    nesterov   η (Δ + β₁ m)         m as above                        as torch.optim.SGD(nesterov=True)
    adagrad    η Δ / (√v + ε)       v ← v + Δ²                        FedOpt, Reddi et al. 2021 (arXiv:2003.00295)
    adam       η m̂ / (√v̂ + ε)       m ← β₁ m + (1 − β₁) Δ             FedOpt, with Adam's correction of the start:
                                    v ← β₂ v + (1 − β₂) Δ²            m̂ = m / (1 − β₁ᵏ), v̂ = v / (1 − β₂ᵏ) in round k
    yogi       η m / (√v + ε)       m as adam's,                      FedOpt, without it
                                    v ← v − (1 − β₂) Δ² sgn(v − Δ²)

m and v start at 0. The adaptive three move every element by about η: an η of 1e-4 to 1e-3 is the right order for them,
1 for the others, or 1 − β₁ with momentum. Each is a function of the optimizer, Δ and k that returns the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atm_fl.options import check_options, option, options
from atm_fl.plugins import Registry

Step = Callable[["ServerOptimizer", Tensor, int], Tensor]


class Rule(NamedTuple):
    """A server optimizer: the moments that it keeps (`first` is m, `second` is v), its step and its options."""

    moments: tuple[str, ...]
    step: Step
    takes: tuple[str, ...]


@dataclass
class ServerOptimizer:
    """One run's optimizer. `state` holds its moments, float32 [n] each; it is what a checkpoint must keep.

    SettingError if an option is outside its bounds.
    """

    name: str
    learning_rate: float = option(1.0, "η, the factor on the step; about 0.001 for adam, yogi and adagrad", gt=0)
    momentum: float = option(0.9, "β₁", ge=0, lt=1)
    beta2: float = option(0.99, "β₂", ge=0, lt=1)
    epsilon: float = option(1e-3, "ε", gt=0)
    state: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        check_options(self)

    def step(self, merged: Tensor, round_number: int) -> Tensor:
        """What to add to the base in round `round_number` (from 1), float32 [n]. `merged` may be changed."""
        rule = SERVER_OPTIMIZERS.find(self.name)
        if not self.state:
            self.state = {moment: torch.zeros_like(merged) for moment in rule.moments}
        return rule.step(self, merged, round_number)


OPTIONS = tuple(item.name for item in options(ServerOptimizer))


def _options_of(rule: Rule) -> list[Any]:
    return [item for item in options(ServerOptimizer) if item.name in rule.takes]


SERVER_OPTIMIZERS: Registry[Rule] = Registry("server-optimizer", _options_of)


def server_optimizer(name: str, *moments: str, takes: Sequence[str] = OPTIONS) -> Callable[[Step], Step]:
    """Register the decorated (optimizer, Δ float32 [n], round) → step [n]; `optimizer.state` holds its `moments`.

    takes: the options that it reads off the optimizer; no other can be set.
    """
    return SERVER_OPTIMIZERS.register(name, lambda step: Rule(moments, step, tuple(takes)))


@server_optimizer("none", takes=("learning_rate",))
def none(optimizer: ServerOptimizer, merged: Tensor, round_number: int) -> Tensor:
    """The merged vector times the rate."""
    return merged.mul_(optimizer.learning_rate)


@server_optimizer("momentum", "first", takes=("learning_rate", "momentum"))
def momentum(optimizer: ServerOptimizer, merged: Tensor, round_number: int) -> Tensor:
    """FedAvgM."""
    return optimizer.state["first"].mul_(optimizer.momentum).add_(merged) * optimizer.learning_rate


@server_optimizer("nesterov", "first", takes=("learning_rate", "momentum"))
def nesterov(optimizer: ServerOptimizer, merged: Tensor, round_number: int) -> Tensor:
    """Momentum that looks ahead."""
    first = optimizer.state["first"].mul_(optimizer.momentum).add_(merged)
    return merged.add_(first, alpha=optimizer.momentum) * optimizer.learning_rate


@server_optimizer("adam", "first", "second")
def adam(optimizer: ServerOptimizer, merged: Tensor, round_number: int) -> Tensor:
    """FedAdam with the correction of the start."""
    first, second = optimizer.state["first"], optimizer.state["second"]
    beta1, beta2 = optimizer.momentum, optimizer.beta2
    first.lerp_(merged, 1 - beta1)
    second.lerp_(merged.square_(), 1 - beta2)
    corrected = first / (1 - beta1**round_number)
    root = (second / (1 - beta2**round_number)).sqrt_()
    return corrected.div_(root.add_(optimizer.epsilon)).mul_(optimizer.learning_rate)


@server_optimizer("yogi", "first", "second")
def yogi(optimizer: ServerOptimizer, merged: Tensor, round_number: int) -> Tensor:
    """FedYogi."""
    first, second = optimizer.state["first"], optimizer.state["second"]
    first.lerp_(merged, 1 - optimizer.momentum)
    square = merged.square_()
    second.addcmul_(square, torch.sign(second - square), value=optimizer.beta2 - 1)
    return (first / second.sqrt().add_(optimizer.epsilon)).mul_(optimizer.learning_rate)


@server_optimizer("adagrad", "second", takes=("learning_rate", "epsilon"))
def adagrad(optimizer: ServerOptimizer, merged: Tensor, round_number: int) -> Tensor:
    """FedAdagrad."""
    second = optimizer.state["second"].addcmul_(merged, merged)
    return merged.div_(second.sqrt().add_(optimizer.epsilon)).mul_(optimizer.learning_rate)
