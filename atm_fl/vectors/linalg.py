"""Singular values and vectors of matrices, from the eigenvectors of the Gram matrix of the shorter side.

That is several times faster than an SVD in float32, and all up to the last product is float64, or float32 refined to
`RESIDUAL`, so that what squaring the condition number costs is less than what an SVD in float32 loses. What is below
`NOISE` is taken as zero, where an SVD invents directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOISE = 1e-7
"""Singular values below this part of a matrix's largest are zero: float32 vectors hold no more."""

WELL_CONDITIONED = 100
"""Up to this ratio of singular values a product in float32 loses no more than float32 vectors had to lose."""

ROWS = 128
"""Rows that are made float64 at once, so that they stay in cache until they are used."""

LARGE = 384
"""Columns from which a few eigenvectors are found faster in float32 and refined than in float64."""

SPARE = 32
"""Eigenvectors that are refined beside those that are wanted, so that these are far from all that are not refined."""

RESIDUAL = 1e-8
"""Most that refined eigenvectors leave, of the smallest wanted eigenvalue; a float32 SVD leaves thirty times that."""


def svd(matrix: Tensor, rank: int, dtype: torch.dtype, norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values [r] of a matrix [m, n], their left [m, r] and right vectors [n, r]; float64.

    All is float64 if `dtype`, the task vectors', is; a value σ then errs by about 1e-16 (σ₁ / σ)² of itself. Otherwise
    it may be refined float32. r is `rank` or less: values below `NOISE` · σ₁ are left out, or below `NOISE` · norm if
    the matrix is what is left of one of this norm.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    columns = matrix if tall else matrix.T
    squares, vectors = leading(gram(columns), rank, refined=dtype != torch.float64)
    values = squares.clamp_min(0).sqrt()
    real = ~(values <= NOISE * (values[-1:] if norm is None else norm))  # NaN stays
    values, vectors = values[real], vectors[:, real]
    scaled = vectors / values
    others = torch.cat([rows.double() @ scaled for rows in columns.split(ROWS)])
    return (others, values, vectors) if tall else (vectors, values, others)


def gram(columns: Tensor) -> Tensor:
    """columnsᵀ · columns, float64 [k, k] of [m, k], of which only the upper blocks are computed: 5/8 of the work."""
    size = columns.shape[1]
    width = -(-size // 4) or 1
    product = columns.new_zeros(size, size, dtype=torch.float64)
    blocks = [slice(left, left + width) for left in range(0, size, width)]
    for rows in columns.split(ROWS):
        exact = rows.double()
        for block in blocks:
            product[block, block.start :].addmm_(exact[:, block].T, exact[:, block.start :])
    for block in blocks:
        product[block.stop :, block] = product[block, block.stop :].T
    return product


def leading(matrix: Tensor, rank: int, refined: bool) -> tuple[Tensor, Tensor]:
    """The largest `rank` eigenvalues [r], ascending, and eigenvectors [k, r] of a positive matrix [k, k]; float64.

    `refined`: a few of a large one are found in float32 and refined, where that succeeds.
    """
    if refined and rank and len(matrix) >= max(LARGE, 4 * rank) and (factors := refine(matrix, rank)):
        return factors
    squares, vectors = eigh(matrix)
    return squares[len(squares) - rank :], vectors[:, len(squares) - rank :]


def refine(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """What `leading` returns, from the eigenvectors in float32; None where eigenvalues span too many powers of ten.

    First-order perturbation theory adds to the leading ones what they lack of the others, and Rayleigh and Ritz turn
    them in their span in float64, until ‖Mv − λv‖ ≤ `RESIDUAL` · λᵣ for each. As a rule one such step is enough.
    """
    kept, scale = rank + SPARE, matrix.trace()
    if not scale > 0:
        return None
    matrix = matrix / scale
    squares, vectors = eigh(matrix.float())
    if not squares[-rank] > 1000 * NOISE * squares[-1]:  # steps gain little so near to float32's rounding
        return None
    others, low, high = vectors[:, :-kept], squares[:-kept, None], squares[-kept:]
    basis = vectors[:, -kept:].double()
    image = matrix @ basis
    residual = image - basis @ (basis.T @ image)
    for _ in range(3):
        lacking = others.T @ residual.float() / (high - low).clamp_min(NOISE)
        basis, _ = torch.linalg.qr(basis + others @ lacking)
        image = matrix @ basis
        exact, turn = eigh(basis.T @ image)
        basis = basis @ turn
        residual = image @ turn - basis * exact
        if residual[:, -rank:].norm(dim=0).max() <= RESIDUAL * exact[-rank]:
            return exact[-rank:] * scale, basis[:, -rank:]
        high = exact.float()
    return None


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues [k], ascending, and eigenvectors [k, k] of a positive matrix [k, k], in its dtype."""
    try:
        return torch.linalg.eigh(matrix, UPLO="U")  # up to a tenth faster than "L"
    except torch.linalg.LinAlgError:  # MKL's fails on some matrices with many zero rows; the slower SVD does not
        _, values, rows = torch.linalg.svd(matrix)
        return values.flip(0), rows.flip(0).T


def polar(columns: Tensor, dtype: torch.dtype, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """The polar factor UVᵀ, `dtype` [m, k] with m ≥ k, of columns = UΣVᵀ, and Σ, float64 [k].

    It is the nearest matrix of orthogonal columns. Values of Σ below `NOISE` of the largest, or below `least`, are 0,
    their directions missing.
    """
    squares, vectors = eigh(gram(columns))
    noise = (NOISE**2 * squares[-1:]).clamp_min(least**2)
    if bool(((squares > noise / 10) & (squares < noise * 1000)).any()):  # float64 holds too little of such squares
        left, values, right = torch.linalg.svd(columns, full_matrices=False)
        values = torch.where(values > (NOISE * values[:1]).clamp_min(least), values, 0)
        return ((left * (values > 0)) @ right).to(dtype), values
    values = torch.where(squares > noise, squares, 0).sqrt()
    inverse = torch.where(values > 0, 1 / values, 0)
    root = gram((vectors * inverse.sqrt()).T)  # (columnsᵀ columns)^(-1/2)
    exact = torch.float64 if bool((values * WELL_CONDITIONED < values[-1:]).any()) else dtype
    return (columns.to(exact) @ root.to(exact)).to(dtype), values


def add(matrices: list[Tensor]) -> Tensor:
    """Their sum, float64."""
    total = torch.empty_like(matrices[0], dtype=torch.float64)
    for rows, first, *others in zip(total.split(ROWS), *(matrix.split(ROWS) for matrix in matrices), strict=True):
        rows.copy_(first)
        for other in others:
            rows.add_(other)
    return total
