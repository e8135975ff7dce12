"""Merges that a minority of bad vectors cannot move far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from atm_fl.merging import merge, option
from atm_fl.merging.kinds import Elementwise, LinearCombination
from atm_fl.vectors.blocks import Block, sort_rows


@merge("median")
class Median(Elementwise):
    """The median of each element over the tasks; of an even number, the mean of the middle two.

    Yin et al. 2018, "Byzantine-robust distributed learning" (arXiv:1803.01498), Algorithm 1, option I.
    """

    robust: ClassVar[bool] = True

    def block(self, stack: Tensor, block: Block, scratch: Tensor) -> Tensor:
        ordered = sort_rows(stack, scratch[0])
        return ordered[(len(stack) - 1) // 2].add_(ordered[len(stack) // 2]).mul_(0.5)


@merge("trimmed-mean")
class TrimmedMean(Elementwise):
    """The mean of each element over the tasks without the ⌊trim · T⌋ smallest and as many largest values.

    Yin et al. 2018 (arXiv:1803.01498), Algorithm 1, option II. Of so few tasks that it would leave none out, and be the
    mean, it refuses to make anything; `trim` = 0 asks for the mean.
    """

    robust: ClassVar[bool] = True
    trim: float = option(0.2, "fraction of the tasks left out at either end", ge=0, lt=0.5)

    def min_tasks(self) -> int:
        return math.ceil(1 / self._share) if self._share else 1

    def left_out(self, count: int) -> int:
        """How many values of so many tasks are left out at either end."""
        return math.floor(self._share * count)

    @property
    def _share(self) -> Fraction:
        """`trim` as the fraction that was meant: 0.3 of 10 is 3, and 0.333333333 of 3 is 1."""
        return Fraction(self.trim).limit_denominator(1_000_000)

    def block(self, stack: Tensor, block: Block, scratch: Tensor) -> Tensor:
        out = self.left_out(len(stack))
        first, *others = sort_rows(stack, scratch[0])[out : len(stack) - out] if out else stack
        for row in others:
            first.add_(row)
        return first.div_(len(others) + 1)


@merge("geometric-median")
class GeometricMedian(LinearCombination):
    """The point with the smallest sum of distances to the task vectors, by smoothed Weiszfeld iterations.

    Pillutla et al. 2022, "Robust aggregation for federated learning" (arXiv:1912.13445), Algorithm 2: weights
    1 / max(ν, ‖z − τₜ‖). The point is a combination of the vectors, so that all distances follow from their inner
    products, and the iterations cost nothing; they go on until the weights stand still (at most 1000). Their ν = 1e-6
    is relative here, to the mean norm of the vectors. With tasks as far apart as AdamW's the iterations hardly move
    from the mean.
    """

    robust: ClassVar[bool] = True
    smoothing: float = option(1e-6, "least distance (ν), relative to the mean norm", gt=0)

    def coefficients(self, tasks: Sequence[str], products: Tensor) -> Tensor:
        count = len(tasks)
        weights = torch.full((count,), 1 / count, dtype=torch.float64)
        least = self.smoothing * products.diagonal().clamp_min(0).sqrt().mean()
        if least == 0:
            return weights
        for _ in range(1000):
            towards = products @ weights
            distances = (weights @ towards - 2 * towards + products.diagonal()).clamp_min(0).sqrt()
            new = 1 / distances.clamp_min(least)
            new /= new.sum()
            done = float((new - weights).abs().max()) < 1e-12
            weights = new
            if done:
                break
        return weights


@merge("multi-krum")
class MultiKrum(LinearCombination):
    """The mean of the T − f task vectors that are nearest to their neighbours.

    Blanchard et al. 2017, "Machine learning with adversaries" (arXiv:1703.02757): the score of a vector is the sum of
    its squared distances to its T − f − 2 nearest others; the T − f vectors of the smallest scores are averaged. Equal
    scores: the task whose name comes first. It needs T ≥ 2 f + 3.
    """

    robust: ClassVar[bool] = True
    f: int = option(1, "vectors that may be bad", ge=0)

    def min_tasks(self) -> int:
        return 2 * self.f + 3

    def coefficients(self, tasks: Sequence[str], products: Tensor) -> Tensor:
        count, squares = len(tasks), products.diagonal()
        distances = (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0).fill_diagonal_(torch.inf)
        scores = distances.sort(dim=1).values[:, : count - self.f - 2].sum(1).tolist()
        chosen = sorted(range(count), key=lambda row: (scores[row], tasks[row]))[: count - self.f]
        result = torch.zeros(count, dtype=torch.float64)
        result[chosen] = 1 / len(chosen)
        return result
