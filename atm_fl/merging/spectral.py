"""Merges of weight matrices by their singular values (vectors/linalg.py). Entries that are no matrices are averaged."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from atm_fl.merging import merge, option
from atm_fl.merging.kinds import TensorWise
from atm_fl.vectors import single
from atm_fl.vectors.linalg import add, polar, svd

PRECISION = option(
    "exact", "float32: faster, and weak directions come out weaker (vectors/single.py)", among=("exact", "float32")
)

FUSED = ("in_proj_weight", "qkv.weight")
"""Ends of the names of matrices that hold an attention's query, key and value one above the other."""


@dataclass(kw_only=True)
class Spectral(TensorWise):
    """A merge of matrices [m, n]; other entries are averaged, as the authors of all three methods do."""

    split_qkv: bool = option(
        False, "treat fused attention projections as three matrices; false is what the authors did with open_clip"
    )

    def work(self, shape: tuple[int, ...]) -> float:
        """Decompositions: the shorter side times the elements, and more than a pass for the least."""
        return math.prod(shape) * (1 + min(shape) / 8) if len(shape) == 2 else math.prod(shape)

    @abstractmethod
    def matrix(self, matrices: list[Tensor]) -> Tensor:
        """The merged matrix [m, n] of every task's, in their dtype."""

    def entry(self, name: str, tensors: list[Tensor]) -> Tensor:
        if not is_matrix(tensors[0]):
            return reduce(torch.add, tensors) / len(tensors)
        return self.by_pieces(name, tensors, self.matrix)

    def by_pieces(self, name: str, tensors: list[Tensor], matrix: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """What `matrix` makes of every task's matrix `name`, of a fused projection's three each by itself if split."""
        rows = tensors[0].shape[0]
        pieces = 3 if self.split_qkv and name.endswith(FUSED) and rows % 3 == 0 else 1
        parts = zip(*(tensor.chunk(pieces) for tensor in tensors), strict=True)
        return torch.cat([matrix(list(matrices)) for matrices in parts])


def is_matrix(entry: Tensor) -> bool:
    """Whether there are singular values to merge by."""
    return entry.dim() == 2 and entry.numel() > 0


@merge("tsv-m")
class TsvM(Spectral):
    """Keep each task's leading singular directions of a matrix, and make those of different tasks orthogonal.

    Gargiulo et al. 2025, "Task singular vectors" (arXiv:2412.00081), Algorithm 1: of every Δₜ = Uₜ Σₜ Vₜᵀ the leading
    ⌊r / T⌋ components (r = min(m, n)), concatenated to U, Σ, V; Û and V̂ the polar factors of U and V;
    merged = Û Σ V̂ᵀ, λ = 1. Components that several tasks share exactly count once each with half their weight, where
    the polar factor by an SVD is arbitrary.
    """

    precision: str = PRECISION

    def matrix(self, matrices: list[Tensor]) -> Tensor:
        rank, dtype = min(matrices[0].shape) // len(matrices), matrices[0].dtype
        if self.precision == "float32":
            return self._single(matrices, rank)
        left, values, right = zip(*(svd(matrix, rank, dtype) for matrix in matrices), strict=True)
        (u, _), (v, _) = polar(torch.cat(left, 1), dtype), polar(torch.cat(right, 1), dtype)
        return (u * torch.cat(values).to(dtype)) @ v.T

    def _single(self, matrices: list[Tensor], rank: int) -> Tensor:
        left, values, right = zip(*(single.leading(matrix, rank) for matrix in matrices), strict=True)
        strengths = torch.cat(values)
        if not len(strengths):
            return torch.zeros_like(matrices[0])
        u, v = (single.polar(torch.cat(factors, 1)) for factors in (left, right))
        scale = strengths.max()
        return ((u * (strengths / scale).float()) @ v.T).to(matrices[0].dtype) * scale


@merge("iso-c")
class IsoC(Spectral):
    """The sum of the tasks' matrices with all singular values replaced by their mean.

    Marczak et al. 2025, "No task left behind" (arXiv:2502.04959), Algorithm 1: Σ Δₜ = U Σ Vᵀ, merged = σ̄ U Vᵀ; λ is
    tuned near 1.
    """

    of_sum: ClassVar[bool] = True
    precision: str = PRECISION

    def matrix(self, matrices: list[Tensor]) -> Tensor:
        return isotropic(add(matrices), matrices[0].dtype, precision=self.precision)

    def sum_factor(self, count: int) -> float:
        return 1.0

    def from_sum(self, scaled: Tensor, count: int, rounding: float = 0.0) -> Tensor:
        """Directions that are no more than `rounding` are missing: made as strong as the others they would drown them.

        A matrix [m, n] of such errors has no singular value much above rounding · (√m + √n).
        """

        def matrix(matrices: list[Tensor]) -> Tensor:
            rows, columns = matrices[0].shape
            return isotropic(add(matrices), scaled.dtype, 2 * rounding * (rows**0.5 + columns**0.5), self.precision)

        def entry(name: str, tensors: list[Tensor]) -> Tensor:
            return self.by_pieces(name, tensors, matrix) if is_matrix(tensors[0]) else tensors[0] / count

        return self.each([scaled], entry)


def isotropic(total: Tensor, dtype: torch.dtype, least: float = 0.0, precision: str = "exact") -> Tensor:
    """σ̄ U Vᵀ, `dtype`, of a matrix U Σ Vᵀ, float64 [m, n], without the directions of values below `least`."""
    columns = total if total.shape[0] >= total.shape[1] else total.T
    if precision == "float32":
        flat = single.polar(columns, least)
        mean = (flat * columns).sum() / flat.shape[1]
        merged = mean * flat.to(dtype)
    else:
        flat, values = polar(columns, dtype, least)
        merged = values.mean() * flat
    return merged if merged.shape == total.shape else merged.T


@merge("iso-cts")
class IsoCts(Spectral):
    """Iso-C on the common directions and on some of each task's own, all made orthogonal and equally strong.

    Marczak et al. 2025 (arXiv:2502.04959), Algorithm 2: of r = min(m, n) directions about `common` · r are the leading
    ones of Σ Δₜ (as many as leave the rest divisible by T); with their left vectors U, each task adds the leading
    directions of Δₜ − U Uᵀ Δₜ. Left and right vectors are replaced by their polar factors, all singular values by
    their mean.
    """

    common: float = option(0.8, "fraction of the directions that are common", gt=0, le=1)

    def matrix(self, matrices: list[Tensor]) -> Tensor:
        count, rank, dtype = len(matrices), min(matrices[0].shape), matrices[0].dtype
        own_rank = min(round((rank - int(rank * self.common)) / count), rank // count)
        u, values, v = svd(add(matrices), rank - own_rank * count, dtype)
        factors = [(u, values, v)]
        for matrix in matrices if own_rank else []:
            exact = matrix.double()
            factors.append(svd(exact - u @ (u.T @ exact), own_rank, dtype, exact.norm()))
        left, strengths, right = zip(*factors, strict=True)
        (u, _), (v, _) = polar(torch.cat(left, 1), dtype), polar(torch.cat(right, 1), dtype)
        return torch.cat(strengths).sum() / rank * (u @ v.T)
