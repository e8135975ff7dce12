"""Merges that settle the sign of each element first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from atm_fl.blocks import Block, in_parallel
from atm_fl.merging import merge, option
from atm_fl.merging.kinds import Elementwise
from atm_fl.merging.sparse import Mask, largest


def mean_of_elected(stack: Tensor, spare: Tensor) -> Tensor:
    """[w]: elect each element's sign, that of Σ (+ where it is 0), and average the elements of `stack` [T, w] that have
    it, zeros left out.

    One pass: with S = Σ τ and A = Σ |τ|, the elected elements sum up to sgn(S) · (A + |S|) / 2, which loses no accuracy
    since they are at least half of A; likewise their number from the sums of signs and of their magnitudes.
    """
    total, sign = stack[0].clone(), torch.sign(stack, out=spare)
    for row in stack[1:]:  # one by one, since `sum` adds in an order in which equal opposites leave a rest
        total.add_(row)
    signs, count, mass = sign.sum(0), sign.abs_().sum(0), stack.abs_().sum(0)
    elected = torch.ge(total, 0, out=torch.empty_like(total)).mul_(2).sub_(1)
    agreeing = count.add_(signs.mul_(elected)).clamp_min_(1)  # twice their number, and 1 where there is none
    return mass.add_(total.abs_()).mul_(elected).div_(agreeing)


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

    density: float = option(0.2, "fraction of each task vector that is kept", above=0, most=1)
    scratch: ClassVar[int] = 1

    def prepare(self, tasks: Sequence[str], vectors: Sequence[Tensor]) -> None:
        self._thresholds = in_parallel(lambda vector: largest(vector, self.density), vectors, vectors[0].device)

    def block(self, stack: Tensor, block: Block, scratch: Tensor) -> Tensor:
        for row, threshold in zip(stack, self._thresholds, strict=True):
            torch.ops.aten.hardshrink.out(row, threshold, out=row)
        return mean_of_elected(stack, scratch[0])


@merge("dare-ties")
class DareTies(Elementwise):
    """Drop random elements and rescale (DARE), then elect signs and average those that agree (TIES without its trim).

    Yu et al. 2024 (arXiv:2311.03099), their combination with TIES: the random drop takes the place of the trim.
    """

    density: float = option(0.1, "probability that an element is kept (1 − p)", least=1e-4, most=1)
    scratch: ClassVar[int] = 1

    def prepare(self, tasks: Sequence[str], vectors: Sequence[Tensor]) -> None:
        self._masks = [Mask(self.density, self.seed, "dare", task) for task in tasks]

    def block(self, stack: Tensor, block: Block, scratch: Tensor) -> Tensor:
        for row, own, mask in zip(stack, scratch[0], self._masks, strict=True):
            row.mul_(mask.draw(block.part, own)).mul_(1 / mask.density)
        return mean_of_elected(stack, scratch[0])
