"""Consensus task arithmetic."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from atm_fl.merging import merge, option
from atm_fl.merging.kinds import Elementwise
from atm_fl.vectors.blocks import Block


@merge("consensus")
class Consensus(Elementwise):
    """Task arithmetic on the elements that several tasks need (Consensus Task Arithmetic, TALL masks).

    Wang et al. 2024, "Localizing task information" (arXiv:2405.07813): with τ = Σ τₜ the task t needs the elements
    with |τₜ| ≥ threshold · |τ − τₜ|; merged = scaling · τ on the elements that at least `agreement` tasks need, else 0.
    Every task has the same threshold here; the authors tune one a task.
    """

    scaling: float = option(0.3, "λ, the factor on the sum")
    threshold: float = option(0.4, "λₜ of the masks: the larger, the fewer elements a task needs", ge=0)
    agreement: int = option(2, "tasks that must need an element (k)", ge=1)
    scratch: ClassVar[int] = 1

    def min_tasks(self) -> int:
        return self.agreement

    def block(self, stack: Tensor, block: Block, scratch: Tensor) -> Tensor:
        others, (total, count, _) = scratch[: len(stack)], scratch[-3:]
        torch.sub(torch.sum(stack, 0, out=total), stack, out=others).abs_().mul_(self.threshold)
        torch.sum(torch.ge(stack.abs_(), others, out=others), 0, out=count)
        return total.mul_(count.ge_(self.agreement))
