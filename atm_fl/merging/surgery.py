"""Gradient surgery on task vectors: a task vector is a gradient, so conflicts between tasks can be projected out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from atm_fl.merging import merge, option
from atm_fl.merging.kinds import LinearCombination
from atm_fl.seeds import derive_seed


@merge("pcgrad")
class PcGrad(LinearCombination):
    """The mean of the task vectors after each is freed of what conflicts with the others.

    Yu et al. 2020, "Gradient surgery for multi-task learning" (arXiv:2001.06782), Algorithm 1: for each task i, over
    the other tasks j in random order, if ⟨gᵢ, τⱼ⟩ < 0 then gᵢ ← gᵢ − ⟨gᵢ, τⱼ⟩ / ‖τⱼ‖² · τⱼ, starting from gᵢ = τᵢ.
    The mean instead of their sum. The order derives from the seed and the tasks' names.
    """

    def coefficients(self, tasks: Sequence[str], products: Tensor) -> Tensor:
        count = len(tasks)
        mixture = torch.eye(count, dtype=torch.float64)
        for i, task in enumerate(tasks):
            others = sorted((j for j in range(count) if j != i), key=lambda j: tasks[j])
            np.random.default_rng(derive_seed(self.seed, "pcgrad", task)).shuffle(others)
            for j in others:
                product = mixture[i] @ products[j]
                if product < 0:
                    mixture[i, j] -= product / products[j, j]
        return mixture.mean(0)


@merge("cagrad")
class CaGrad(LinearCombination):
    """A step near the mean that improves the worst-off task most (conflict-averse gradient descent).

    Liu et al. 2021, "Conflict-averse gradient descent" (arXiv:2110.14048), Algorithm 1 with τ for the gradients: g₀ =
    mean, φ = c² ‖g₀‖², w = argmin over the simplex of ⟨g_w, g₀⟩ + √φ ‖g_w‖ with g_w = Σ wₜ τₜ, and the step
    g₀ + √φ / ‖g_w‖ · g_w. Like the authors' code we divide it by 1 + c². c = 0 is the mean.
    """

    c: float = option(0.5, "how far from the mean, relative to its norm, the step may be", ge=0, lt=1)

    def coefficients(self, tasks: Sequence[str], products: Tensor) -> Tensor:
        count = len(tasks)
        mean = np.full(count, 1 / count)
        # The step does not depend on the vectors' length; the minimiser's tolerances do.
        scale = float(products.diagonal().mean())
        if scale <= 0 or self.c == 0:
            return torch.from_numpy(mean)
        inner = products.numpy() / scale
        radius = self.c * np.sqrt(max(mean @ inner @ mean, 0.0))

        def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
            towards = inner @ w
            norm = np.sqrt(max(w @ towards, 1e-24))
            return float(mean @ towards + radius * norm), inner @ mean + radius * towards / norm

        solution = minimize(
            objective,
            mean,
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-14, "maxiter": 500},
        ).x
        norm = np.sqrt(max(solution @ inner @ solution, 0.0))
        # Where a mixture of the vectors is 0 no direction serves all tasks, and g_w is the minimiser's rounding.
        aside = radius / norm * solution if norm > 1e-6 else 0.0
        return torch.from_numpy((mean + aside) / (1 + self.c**2))
