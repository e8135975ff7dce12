"""Merges of weight matrices by their singular values. Entries that are no matrices are averaged.

Singular vectors come from the eigenvectors of the Gram matrix of the shorter side. That is several times faster than an
SVD in float32, and all up to the last product is float64, so that what squaring the condition number costs is less than
what an SVD in float32 loses. What is below `NOISE` is taken as zero, where an SVD invents directions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from atm_fl.merging import merge, option
from atm_fl.merging.kinds import Entrywise

NOISE = 1e-7
"""Singular values below this part of a matrix's Frobenius norm are zero: float32 vectors hold no more."""

WELL_CONDITIONED = 100
"""Up to this ratio of singular values a product in float32 loses no more than float32 vectors had to lose."""

FUSED = ("in_proj_weight", "qkv.weight")
"""Ends of the names of matrices that hold an attention's query, key and value one above the other."""


def svd(matrix: Tensor, rank: int, norm: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest `rank` singular values [r] of a matrix [m, n], their left [m, r] and right vectors [n, r]; float64.

    Values below `NOISE` · norm (the matrix's own, unless it is what is left of a larger one) are 0, their vectors too.
    """
    matrix, tall = matrix.double(), matrix.shape[0] >= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(gram(matrix if tall else matrix.T))
    cut = len(squares) - rank
    values, vectors = squares[cut:].clamp_min(0).sqrt(), vectors[:, cut:]
    real = values > NOISE * (matrix.norm() if norm is None else norm)
    values, vectors = values * real, vectors * real
    others = (matrix if tall else matrix.T) @ (vectors * inverse(values))
    return (others, values, vectors) if tall else (vectors, values, others)


def gram(columns: Tensor) -> Tensor:
    """columnsᵀ · columns, [k, k] of [m, k], of which only the upper blocks are computed: five eighths of the work."""
    if columns.shape[1] < 256:
        return columns.T @ columns
    product = columns.new_empty(columns.shape[1], columns.shape[1])
    width = -(-columns.shape[1] // 4)
    for left in range(0, columns.shape[1], width):
        mine = slice(left, left + width)
        torch.mm(columns[:, mine].T, columns[:, left:], out=product[mine, left:])
        product[left + width :, mine] = product[mine, left + width :].T
    return product


def inverse(values: Tensor) -> Tensor:
    """1 / values, 0 where they are 0."""
    return torch.where(values > 0, 1 / values, 0)


def polar(columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The polar factor UVᵀ, `dtype` [m, k] with m ≥ k, of columns = UΣVᵀ, float64, and Σ, float64 [k].

    It is the nearest matrix of orthogonal columns. Singular values below `NOISE` are 0, their directions missing.
    """
    squares, vectors = torch.linalg.eigh(gram(columns))
    squares = torch.where(squares > NOISE**2 * squares.sum(), squares, 0)
    values = squares.sqrt()
    root = gram((vectors * inverse(values).sqrt()).T)  # (columnsᵀ columns)^(-1/2)
    exact = torch.float64 if bool((values * WELL_CONDITIONED < values[-1:]).any()) else dtype
    return (columns.to(exact) @ root.to(exact)).to(dtype), values


@dataclass(kw_only=True)
class Spectral(Entrywise):
    """A merge of matrices [m, n]; other entries are averaged, as the authors of all three methods do."""

    split_qkv: bool = option(
        False, "treat fused attention projections as three matrices; false is what the authors did with open_clip"
    )

    @abstractmethod
    def matrix(self, matrices: list[Tensor]) -> Tensor:
        """The merged matrix [m, n] of every task's, in their dtype."""

    def entry(self, name: str, tensors: list[Tensor]) -> Tensor:
        if tensors[0].dim() != 2 or tensors[0].numel() == 0:
            return add(tensors, tensors[0].dtype).div_(len(tensors))
        rows = tensors[0].shape[0]
        pieces = 3 if self.split_qkv and name.endswith(FUSED) and rows % 3 == 0 else 1
        parts = zip(*(tensor.chunk(pieces) for tensor in tensors), strict=True)
        return torch.cat([self.matrix(list(matrices)) for matrices in parts])


@merge("tsv-m")
class TsvM(Spectral):
    """Keep each task's leading singular directions of a matrix, and make those of different tasks orthogonal.

    Gargiulo et al. 2025, "Task singular vectors" (arXiv:2412.00081), Algorithm 1: of every Δₜ = Uₜ Σₜ Vₜᵀ the leading
    ⌊r / T⌋ components (r = min(m, n)), concatenated to U, Σ, V; Û and V̂ the polar factors of U and V;
    merged = Û Σ V̂ᵀ, λ = 1. Components that several tasks share exactly count once each with half their weight, where
    the polar factor by an SVD is arbitrary.
    """

    def matrix(self, matrices: list[Tensor]) -> Tensor:
        rank = min(matrices[0].shape) // len(matrices)
        left, values, right = zip(*(svd(matrix, rank) for matrix in matrices), strict=True)
        dtype = matrices[0].dtype
        (u, _), (v, _) = polar(torch.cat(left, 1), dtype), polar(torch.cat(right, 1), dtype)
        return (u * torch.cat(values).to(dtype)) @ v.T


@merge("iso-c")
class IsoC(Spectral):
    """The sum of the tasks' matrices with all singular values replaced by their mean.

    Marczak et al. 2025, "No task left behind" (arXiv:2502.04959), Algorithm 1: Σ Δₜ = U Σ Vᵀ, merged = σ̄ U Vᵀ; λ is
    tuned near 1.
    """

    def matrix(self, matrices: list[Tensor]) -> Tensor:
        total = add(matrices, torch.float64)
        flat, values = polar(total if total.shape[0] >= total.shape[1] else total.T, matrices[0].dtype)
        return values.mean() * (flat if flat.shape == total.shape else flat.T)


@merge("iso-cts")
class IsoCts(Spectral):
    """Iso-C on the common directions and on some of each task's own, all made orthogonal and equally strong.

    Marczak et al. 2025 (arXiv:2502.04959), Algorithm 2: of r = min(m, n) directions about `common` · r are the leading
    ones of Σ Δₜ (as many as leave the rest divisible by T); with their left vectors U, each task adds the leading
    directions of Δₜ − U Uᵀ Δₜ. Left and right vectors are replaced by their polar factors, all singular values by
    their mean.
    """

    common: float = option(0.8, "fraction of the directions that are common", above=0, most=1)

    def matrix(self, matrices: list[Tensor]) -> Tensor:
        count, rank = len(matrices), min(matrices[0].shape)
        own = min(round((rank - int(rank * self.common)) / count), rank // count)
        u, values, v = svd(add(matrices, torch.float64), rank - own * count)
        found = [(u, values, v)]
        for matrix in matrices if own else []:
            exact = matrix.double()
            found.append(svd(exact - u @ (u.T @ exact), own, exact.norm()))
        left, strengths, right = zip(*found, strict=True)
        dtype = matrices[0].dtype
        (u, _), (v, _) = polar(torch.cat(left, 1), dtype), polar(torch.cat(right, 1), dtype)
        return torch.cat(strengths).mean() * (u @ v.T)


def add(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Their sum."""
    total = tensors[0].to(dtype, copy=True)
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total
