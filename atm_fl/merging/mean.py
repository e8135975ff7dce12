"""The mean of the task vectors, the merge of ATM's Algorithm 1."""

from __future__ import annotations

from torch import Tensor

from atm_fl.merging import merge


@merge("mean")
class Mean:
    """scaling · Σ wₜ τₜ / Σ wₜ: task arithmetic (Ilharco 2023) with λ = scaling / T, ATM's mean for scaling = 1.

    Streaming: a vector is folded into one running sum and dropped, so memory does not grow with the number of clients.
    The sum is float32 in the order of `add`; the same order gives the same bits.
    """

    def __init__(self, *, scaling: float = 1.0) -> None:
        self.scaling = scaling
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, task: str, vector: Tensor, weight: float = 1.0) -> None:
        """Fold in one vector. The first one becomes the running sum itself."""
        if self._sum is None:
            self._sum = vector.mul_(weight)
        else:
            self._sum.add_(vector, alpha=weight)
        self._weight += weight

    def result(self) -> Tensor:
        if self._sum is None:
            raise ValueError("a merge needs at least one task vector")
        return self._sum.mul_(self.scaling / self._weight)
