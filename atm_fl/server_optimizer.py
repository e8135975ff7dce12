"""Server optimizers: what the base model makes of the merged vector, round after round.

A merged task vector is minus a gradient times the clients' rate (see tests/test_theory.py), so the server can treat it
as an optimizer treats a gradient. Δ is the merged vector of this round, η `server-learning-rate`, β₁ `server-momentum`,
β₂ `server-beta2`, ε `server-epsilon`; the base moves by

    none       η Δ
    momentum   η m                  m ← β₁ m + Δ                      FedAvgM, Hsu et al. 2019 (arXiv:1909.06335)
    nesterov   η (Δ + β₁ m)         m as above                        as torch.optim.SGD(nesterov=True)
    adagrad    η Δ / (√v + ε)       v ← v + Δ²                        FedOpt, Reddi et al. 2021 (arXiv:2003.00295)
    adam       η m̂ / (√v̂ + ε)       m ← β₁ m + (1 − β₁) Δ             FedOpt, with Adam's correction of the start:
                                    v ← β₂ v + (1 − β₂) Δ²            m̂ = m / (1 − β₁ᵏ), v̂ = v / (1 − β₂ᵏ) in round k
    yogi       η m / (√v + ε)       m as adam's,                      FedOpt, without it
                                    v ← v − (1 − β₂) Δ² sgn(v − Δ²)

m and v start at 0. The adaptive three move every element by about η: an η of 1e-4 to 1e-3 is the right order for them,
1 for the others, or 1 − β₁ with momentum.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("none", "momentum", "nesterov", "adam", "yogi", "adagrad")

STATE = {
    "none": (),
    "momentum": ("first",),
    "nesterov": ("first",),
    "adam": ("first", "second"),
    "yogi": ("first", "second"),
    "adagrad": ("second",),
}
"""Which moments each keeps: `first` is m, `second` is v."""


class ServerOptimizer:
    """One run's optimizer. `state` holds its moments, float32 [n] each; it is what a checkpoint must keep."""

    def __init__(self, name: str, learning_rate: float, momentum: float, beta2: float, epsilon: float) -> None:
        self.name = name
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.beta2 = beta2
        self.epsilon = epsilon
        self.state: dict[str, Tensor] = {}

    def step(self, merged: Tensor, round_number: int) -> Tensor:
        """What to add to the base in round `round_number` (from 1), float32 [n]. `merged` may be changed."""
        if not self.state:
            self.state = {moment: torch.zeros_like(merged) for moment in STATE[self.name]}
        rate, beta1, beta2 = self.learning_rate, self.momentum, self.beta2
        first, second = self.state.get("first"), self.state.get("second")
        if self.name in ("momentum", "nesterov"):
            assert first is not None
            first.mul_(beta1).add_(merged)
            return (merged.add_(first, alpha=beta1) if self.name == "nesterov" else first) * rate
        if second is None:
            return merged.mul_(rate)
        if self.name == "adagrad":
            second.addcmul_(merged, merged)
            return merged.div_(second.sqrt().add_(self.epsilon)).mul_(rate)
        assert first is not None
        first.lerp_(merged, 1 - beta1)
        square = merged.square_()
        if self.name == "adam":
            second.lerp_(square, 1 - beta2)
            corrected = first / (1 - beta1**round_number)
            return corrected.div_((second / (1 - beta2**round_number)).sqrt_().add_(self.epsilon)).mul_(rate)
        second.addcmul_(square, torch.sign(second - square), value=beta2 - 1)
        return (first / second.sqrt().add_(self.epsilon)).mul_(rate)
