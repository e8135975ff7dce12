"""Noise taken out of a vector's matrices, by their singular values.

Noise spreads evenly over all directions of a matrix, while what tuning makes of it lies in a few. So below an edge all
singular values are noise's, and above it each is longer than what it stands for by a known amount (random matrix theory
of m and n that grow together).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from atm_fl.transforms import Context, Transform, transform
from atm_fl.vectors.blocks import in_parallel
from atm_fl.vectors.linalg import svd

LEAST = 16
"""Matrices with a shorter side stay: the theory is of large ones."""


@transform("shrink")
class Shrink(Transform):
    """Singular values of each matrix, shrunk as is best against even noise of unknown strength: for DP-SGD's vectors.

    Gavish and Donoho 2017, "Optimal shrinkage of singular values" (arXiv:1405.7511), for the squared error: of a matrix
    [m, n], m ≤ n, with noise of deviation s, β = m / n, a value y √n s becomes √((y² − β − 1)² − 4 β) / y · √n s, and 0
    if y ≤ 1 + √β. n s² is the median of the squared values over that of Marchenko and Pastur's law (Gavish and Donoho
    2014, arXiv:1305.5870), so that where more than half of the values are zero nothing is taken for noise. Entries that
    are no matrices stay. It sees the vector alone, which costs no privacy.
    """

    def client(self, vector: Tensor, context: Context) -> Tensor:
        views = context.layout.views(vector)

        def work(name: str) -> None:
            entry = views[name]
            if entry.dim() == 2 and min(entry.shape) >= LEAST:
                entry.copy_(shrunk(entry))

        in_parallel(work, list(views), vector.device)
        return vector


def shrunk(matrix: Tensor) -> Tensor:
    """The matrix [m, n] with its singular values shrunk, in its dtype."""
    short, long = sorted(matrix.shape)
    ratio = short / long
    left, values, right = svd(matrix, short, matrix.dtype)
    squares = torch.cat([values.new_zeros(short - len(values)), values.square()])  # what is left out is zero
    unit = float(squares.median() / median_of_noise(ratio)) ** 0.5  # √n s
    if not unit:
        return matrix
    y = values / unit
    kept = ((y.square() - ratio - 1).square() - 4 * ratio).clamp_min(0).sqrt() / y
    kept[y <= 1 + ratio**0.5] = 0.0
    return ((left * (kept * unit)) @ right.T).to(matrix.dtype)


@lru_cache
def median_of_noise(ratio: float) -> float:
    """The median of Marchenko and Pastur's law for matrices [m, n] of m / n = `ratio`, of deviation 1 / √n.

    Of its density √((b − t)(t − a)) / (2 π ratio t) on [a, b] = [(1 − √ratio)², (1 + √ratio)²]; with t = a + (b − a)
    sin²φ the integrand is smooth.
    """
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    phi = np.linspace(0, np.pi / 2, 20_001)[1:]
    t = low + (high - low) * np.sin(phi) ** 2
    mass = np.cumsum((np.sin(phi) * np.cos(phi)) ** 2 / t)
    return float(np.interp(mass[-1] / 2, mass, t))
