"""The setting `task-scaling`: a factor on the vectors of single tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from atm_fl.transforms import Context, Transform


@dataclass
class TaskScaling(Transform):
    """Task → the factor on its vectors; 1 for tasks that are not there."""

    factors: Mapping[str, float]

    def client(self, vector: Tensor, context: Context) -> Tensor:
        return vector.mul_(self.factors.get(context.task, 1.0))

    server = client
