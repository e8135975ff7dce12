"""WUDI: the matrix that disturbs every task least on the inputs that its own task vector stands for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atm_fl.merging import merge, option
from atm_fl.merging.spectral import Spectral
from atm_fl.vectors.linalg import add, gram


@merge("wudi")
class Wudi(Spectral):
    """Each weight matrix as near to every task's as can be on that task's inputs, which the rows of its Δₜ stand for.

    Cheng et al. 2025, "Whoever started the interference should end it" (arXiv:2503.08099): the minimiser of
    Σ ‖(Δ − Δₜ) Δₜᵀ‖² / ‖Δₜ‖², where they take 300 steps of Adam from the sum S of the Δₜ, which leave weak directions
    as they are there. Here it is solved: with `pull` · μ · ‖Δ − S‖² added, μ = Σ ‖Δₜ‖² / (n ‖Δₜ‖²) being the mean
    eigenvalue of A = Σ Δₜᵀ Δₜ / ‖Δₜ‖² [n, n],

        Δ = (Σ Δₜ Δₜᵀ Δₜ / ‖Δₜ‖² + pull · μ · S) (A + pull · μ · I)⁻¹.

    A large `pull` leaves the sum. Matrices are taken as [out, in], as torch.nn.Linear has them.
    """

    pull: float = option(0.1, "how strongly directions that the tasks say little of are held at the sum", gt=0)

    def work(self, shape: tuple[int, ...]) -> float:
        return math.prod(shape) * (1 + shape[1] / 8) if len(shape) == 2 else math.prod(shape)

    def matrix(self, matrices: list[Tensor]) -> Tensor:
        columns = matrices[0].shape[1]
        curvature = matrices[0].new_zeros(columns, columns, dtype=torch.float64)
        target = matrices[0].new_zeros(matrices[0].shape, dtype=torch.float64)
        for matrix in matrices:
            products = gram(matrix)
            if square := products.trace():  # a task without a step says nothing
                curvature.add_(products, alpha=1 / float(square))
                target.addmm_(matrix.double(), products, alpha=1 / float(square))
        pull = self.pull * float(curvature.trace()) / columns or 1.0
        curvature.diagonal().add_(pull)
        target.add_(add(matrices), alpha=pull)
        return torch.linalg.solve(curvature, target.T).T.to(matrices[0].dtype)
