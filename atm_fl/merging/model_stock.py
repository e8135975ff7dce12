"""Model stock."""

from __future__ import annotations

import torch
from torch import Tensor

from atm_fl.merging import merge
from atm_fl.merging.kinds import TensorWise


@merge("model-stock")
class ModelStock(TensorWise):
    """The mean of the task vectors, each entry scaled by how well the tasks agree on it.

    Jang et al. 2024, "Model stock" (arXiv:2403.19522): per entry (their layer), t = T cos θ / (1 + (T − 1) cos θ) and
    merged = t · mean, with cos θ the mean of the pairwise cosines (the mean of the angles differs in the fifth digit).
    Made for models of one task: with the all but orthogonal vectors of different tasks cos θ ≈ 0 and little is left.
    Below 0 the formula has a pole; there we take t = 0.
    """

    def min_tasks(self) -> int:
        return 2

    def entry(self, name: str, tensors: list[Tensor]) -> Tensor:
        count = len(tensors)
        stack = torch.stack([tensor.reshape(-1) for tensor in tensors])
        products = (stack @ stack.T).double().cpu()
        norms = products.diagonal().clamp_min(0).sqrt()
        cosines = products / norms.outer(norms).clamp_min(torch.finfo(torch.float64).tiny)
        cosine = float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
        ratio = count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0
        return stack.mean(0).mul_(ratio).view_as(tensors[0])
