"""Merges that settle the sign of each element first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from atm_fl.merging import merge, option
from atm_fl.merging.kinds import Elementwise
from atm_fl.merging.sparse import Mask, largest
from atm_fl.vectors.blocks import Block


def mean_of_elected(stack: Tensor, scratch: Tensor) -> Tensor:
    """[w]: elect each element's sign, that of Σ (+ where it is 0), and average the elements of `stack` [T, w] that have
    it, zeros left out. scratch: [T + 3, w]."""
    *_, total, count, merged = scratch
    total.copy_(stack[0])
    for row in stack[1:]:  # one by one, since `sum` adds in an order in which equal opposites leave a rest
        total.add_(row)
    elected = torch.ge(total, 0, out=total).mul_(2).sub_(1)
    agreeing = stack.mul_(elected).clamp_min_(0)
    torch.sum(torch.sign(agreeing, out=scratch[: len(stack)]), 0, out=count)
    return torch.sum(agreeing, 0, out=merged).mul_(elected).div_(count.clamp_min_(1))


@merge("ties")
class Ties(Elementwise):
    """Trim each vector to its largest elements, elect a sign for each element, average those that agree.

    Yadav et al. 2023, "TIES-merging" (arXiv:2306.01708): τ̂ₜ = the `density` fraction of τₜ largest by magnitude,
    γ = sgn(Σ τ̂ₜ), merged = mean of the τ̂ₜ with the sign γ, zeros left out ("dis-mean"), λ = 1.

    Ours of what implementations do: each task's vector is trimmed over its whole length (mergekit and PEFT trim each
    tensor by itself), signs are elected over all tasks; ⌊density · n⌋ elements are kept, as in PEFT and mergekit (the
    original keeps one more), at least one, with all that equal the smallest kept; a sum of exactly 0 elects +, as in
    PEFT (the original: the majority of the whole vector).
    """

    surveys: ClassVar[bool] = True
    density: float = option(0.2, "fraction of each task vector that is kept", gt=0, le=1)
    scratch: ClassVar[int] = 1

    def prepare(self, tasks: Sequence[str], vectors: Sequence[Tensor]) -> None:
        self._thresholds = largest(vectors, self.density)

    def take(self, number: int, changed: Tensor, block: Block, row: Tensor) -> None:
        torch.ops.aten.hardshrink.out(changed, self._thresholds[number], out=row)

    def block(self, stack: Tensor, block: Block, scratch: Tensor) -> Tensor:
        return mean_of_elected(stack, scratch)


@merge("dare-ties")
class DareTies(Elementwise):
    """Drop random elements and rescale (DARE), then elect signs and average those that agree (TIES without its trim).

    Yu et al. 2024 (arXiv:2311.03099), their combination with TIES: the random drop takes the place of the trim.
    """

    density: float = option(0.1, "probability that an element is kept (1 − p)", ge=1e-4, le=1)
    scratch: ClassVar[int] = 1

    def prepare(self, tasks: Sequence[str], vectors: Sequence[Tensor]) -> None:
        self._masks = [Mask(self.density, self.seed, "dare", task) for task in tasks]

    def take(self, number: int, changed: Tensor, block: Block, row: Tensor) -> None:
        mask = self._masks[number]
        mask.draw(block.elements, row).mul_(changed).mul_(1 / mask.density)

    def block(self, stack: Tensor, block: Block, scratch: Tensor) -> Tensor:
        return mean_of_elected(stack, scratch)
