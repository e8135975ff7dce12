"""Sums and means of task vectors as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from atm_fl.merging import merge, option
from atm_fl.merging.kinds import Change, Streaming
from atm_fl.vectors.blocks import Block, l2_norm


@merge("mean")
class Mean(Streaming):
    """scaling · Σ wₜ τₜ / Σ wₜ: the weight average, ATM's own merge.

    ATM (arXiv:2411.03055), Algorithm 1 with α = scaling / T. It keeps its meaning when a task is missing from a round.
    """

    of_sum: ClassVar[bool] = True
    surveys: ClassVar[bool] = False


@merge("task-arithmetic")
class TaskArithmetic(Streaming):
    """scaling · Σ τₜ (Ilharco et al. 2023, "Editing models with task arithmetic", arXiv:2212.04089).

    Their λ is tuned on validation data; 0.3 is the usual choice for eight tasks. Weights multiply the vectors.
    """

    of_sum: ClassVar[bool] = True
    surveys: ClassVar[bool] = False
    average: ClassVar[bool] = False
    scaling: float = option(0.3, "λ, the factor on the sum")


@merge("clipped-mean")
class ClippedMean(Streaming):
    """The mean of the task vectors, each first scaled down to a norm of at most `max_norm`.

    scaling · Σ wₜ τₜ min(1, max_norm / ‖τₜ‖) / Σ wₜ, the clipping of DP-FedAvg (McMahan et al. 2018,
    arXiv:1710.06963) and of norm bounding against poisoning (Sun et al. 2019, arXiv:1911.07963), without their noise.
    """

    max_norm: float = option(1.0, "Euclidean norm above which a vector is scaled down", gt=0)

    def change(self, task: str, vector: Tensor) -> Change | None:
        norm = l2_norm(vector)
        if norm <= self.max_norm:
            return None
        factor = self.max_norm / norm

        def shorten(values: Tensor, block: Block, scratch: Tensor) -> Tensor:
            return torch.mul(values, factor, out=scratch[0])

        return shorten
