"""What `linalg` has, in float32: less exact, and stated how much.

On the CPU all is from the eigenvectors of a Gram matrix. Elsewhere, where eigenvectors are slow, polar factors are made
by products alone. Either way a direction of singular value σ errs by about 1e-6 (σ₁ / σ)², where σ₁ is the matrix's
largest value, until it comes out weaker than it should: below about σ₁ / 1000, down to nothing for rounding errors.
`ERROR` bounds it, and the tests hold that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atm_fl.vectors.linalg import eigh

ERROR = 8e-6
"""Most that a polar factor's direction of singular value σ errs, of (σ₁ / σ)², and 1 in any case."""

FLOOR = 1e-6
"""Eigenvalues of a Gram matrix below this part of the largest are no better known than that they are small."""

WEAKEST = 1e-4
"""Singular values above this part of the largest become 1 by the products, within what float32 holds."""

EIGENVECTORS = ("cpu",)
"""Devices where eigenvectors cost less than the products."""


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """At most the `rank` largest singular values [r], ascending, float64, and their left [m, r] and right vectors
    [n, r], float32, of a matrix [m, n]. Values whose squares are below `FLOOR` of the largest's are left out."""
    tall = matrix.shape[0] >= matrix.shape[1]
    columns, scale = _scaled(matrix if tall else matrix.T)
    squares, vectors = eigh(columns.T @ columns)
    wanted = slice(len(squares) - rank, None)
    real = ~(squares[wanted] <= FLOOR * squares[-1:])  # NaN stays
    values, vectors = squares[wanted][real].sqrt(), vectors[:, wanted][:, real]
    others = columns @ (vectors / values)
    left, right = (others, vectors) if tall else (vectors, others)
    return left, values.double() * scale, right


def polar(columns: Tensor, least: float = 0.0) -> Tensor:
    """The polar factor UVᵀ, float32 [m, k] with m ≥ k, of columns = UΣVᵀ; directions below `least` are missing."""
    scaled, scale = _scaled(columns)
    if least or columns.device.type in EIGENVECTORS:
        return polar_by_eigenvectors(scaled, float(least / scale) if least else 0.0)
    return polar_by_products(scaled)


def polar_by_eigenvectors(columns: Tensor, least: float = 0.0) -> Tensor:
    """columns · (columnsᵀ columns)^(-1/2), float32, of columns of a magnitude near 1."""
    squares, vectors = eigh(columns.T @ columns)
    floor = (FLOOR * squares[-1:]).clamp_min(torch.finfo(squares.dtype).tiny)
    inverse = torch.where(squares < least**2, 0, squares.maximum(floor).rsqrt())
    return columns @ ((vectors * inverse) @ vectors.T)


def polar_by_products(columns: Tensor) -> Tensor:
    """The limit of Newton-Schulz steps X ← X (a + b XᵀX), float32, of columns of a magnitude near 1.

    Each step's a and b are best for the values that the one before left (Chen and Chow 2014, "A stable scaling of
    Newton-Schulz"; Amsel et al. 2025, "The Polar Express", arXiv:2505.16932): a weak direction grows 2.6 times a step
    rather than 1.5 times. Steps of degree 5 take as many products for the same growth.
    """
    products = columns.T @ columns
    bound = (products @ products).norm().sqrt()  # (Σ σ⁸)^(1/4), no less than the square of the largest value
    if not bound > 0:
        return torch.zeros_like(columns) if bound == 0 else torch.full_like(columns, torch.nan)
    columns = columns / bound.sqrt()
    for slope, cubic in COEFFICIENTS:
        factor = (columns.T @ columns).mul_(cubic)
        factor.diagonal().add_(slope)
        columns = columns @ factor
    return columns


def _coefficients(low: float) -> list[tuple[float, float]]:
    """(a, b) of each step until all values that are between `low` and 1 at first are 1 in float32.

    Of cubics a x + b x³ the one nearest to 1 on [low, high] is β p(α x), with p(x) = (3 x − x³) / 2,
    α² = 3 / (high² + high low + low²) and β = 2 / (1 + p(α low)). What it makes is between 2 − β and β.
    """
    steps, high = [], 1.0
    while high - low > 1e-6:  # whose square is nothing to float32
        alpha = (3 / (high**2 + high * low + low**2)) ** 0.5
        beta = 2 / (1 + (3 * alpha * low - (alpha * low) ** 3) / 2)
        steps.append((1.5 * alpha * beta, -0.5 * alpha**3 * beta))
        low, high = 2 - beta, beta
    return steps


COEFFICIENTS = _coefficients(WEAKEST)


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix in float32, divided by its largest magnitude, and that: squares of its elements are in range."""
    scale = matrix.abs().max()
    divisor = torch.where(scale == 0, 1, scale)
    return (matrix / divisor).float(), divisor.double()
