"""Merges of weight matrices by their singular values. Entries that are no matrices are averaged.

Singular vectors come from the eigenvectors of the Gram matrix of the shorter side, in float64: several times faster
than an SVD in float32, and more exact wherever σ > 1e-8 σ₁, since squaring the condition number costs float64 less
than float32 has lost already. What is below `NOISE` is taken as zero, where an SVD invents directions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atm_fl.errors import SettingError
from atm_fl.merging import merge, option
from atm_fl.merging.kinds import Entrywise

NOISE = 1e-7
"""Singular values below this part of the largest are zero: float32 vectors hold no more."""

FUSED = ("in_proj_weight", "qkv.weight")
"""Ends of the names of matrices that hold an attention's query, key and value one above the other."""


def right_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest `rank` singular values [r] and right singular vectors [n, r] of a float64 [m, n] with m ≥ n.

    Values below `NOISE` · σ₁ are 0, their vectors too.
    """
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    values, vectors = values[-rank:].clamp_min(0).sqrt(), vectors[:, -rank:]
    real = (values > NOISE * values[-1]).double()
    return values * real, vectors * real


def inverse(values: Tensor) -> Tensor:
    """1 / values, 0 where they are 0."""
    return torch.where(values > 0, 1 / values, 0)


def orthogonaliser(columns: Tensor) -> Tensor:
    """M [k, k] so that columns · M, for columns float64 [m, k], is their polar factor: UVᵀ of their SVD."""
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    values = torch.where(values > NOISE**2 * values[-1], values, 0)
    return (vectors * inverse(values.sqrt())) @ vectors.T


def tall(matrix: Tensor) -> Tensor:
    """The matrix [m, n] itself, or transposed, so that m ≥ n."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


@dataclass(kw_only=True)
class Spectral(Entrywise):
    """A merge of matrices [m, n]; other entries are averaged, as the authors of all three methods do."""

    split_qkv: bool = option(
        False, "treat fused attention projections as three matrices; false is what the authors did with open_clip"
    )

    @abstractmethod
    def matrix(self, matrices: list[Tensor]) -> Tensor:
        """The merged matrix [m, n] of every task's, m ≥ n."""

    def entry(self, name: str, tensors: list[Tensor]) -> Tensor:
        if tensors[0].dim() != 2 or tensors[0].numel() == 0:
            mean = tensors[0].clone()
            for tensor in tensors[1:]:
                mean.add_(tensor)
            return mean.div_(len(tensors))
        rows = tensors[0].shape[0]
        pieces = 3 if self.split_qkv and name.endswith(FUSED) and rows % 3 == 0 else 1
        merged = []
        for number in range(pieces):
            part = slice(number * rows // pieces, (number + 1) * rows // pieces)
            found = self.matrix([tall(tensor[part]) for tensor in tensors])
            merged.append(found if tensors[0][part].shape == found.shape else found.T)
        return torch.cat(merged)


@merge("tsv-m")
class TsvM(Spectral):
    """Keep each task's leading singular directions of a matrix, and make those of different tasks orthogonal.

    Gargiulo et al. 2025, "Task singular vectors" (arXiv:2412.00081), Algorithm 1: of every Δₜ = Uₜ Σₜ Vₜᵀ the leading
    ⌊r / T⌋ components (r = min(m, n)), concatenated to U, Σ, V; Û and V̂ the polar factors of U and V;
    merged = Û Σ V̂ᵀ, λ = 1. Components that several tasks share exactly count once each with half their weight, where
    the polar factor by an SVD is arbitrary.
    """

    def matrix(self, matrices: list[Tensor]) -> Tensor:
        rank = matrices[0].shape[1] // len(matrices)
        if rank == 0:
            return torch.zeros_like(matrices[0])
        left, sizes, right = [], [], []
        for matrix in matrices:
            exact = matrix.double()
            values, vectors = right_vectors(exact, rank)
            left.append(exact @ (vectors * inverse(values)))
            sizes.append(values)
            right.append(vectors)
        u, v = torch.cat(left, 1), torch.cat(right, 1)
        inner = (orthogonaliser(u) * torch.cat(sizes)) @ orthogonaliser(v)
        dtype = matrices[0].dtype
        return (u.to(dtype) @ inner.to(dtype)) @ v.T.to(dtype)


@merge("iso-c")
class IsoC(Spectral):
    """The sum of the tasks' matrices with all singular values replaced by their mean.

    Marczak et al. 2025, "No task left behind" (arXiv:2502.04959), Algorithm 1: Σ Δₜ = U Σ Vᵀ, merged = σ̄ U Vᵀ; λ is
    tuned near 1.
    """

    def matrix(self, matrices: list[Tensor]) -> Tensor:
        total = add(matrices)
        exact = total.double()
        values, vectors = right_vectors(exact, exact.shape[1])
        factor = (vectors * (values.mean() * inverse(values))) @ vectors.T
        return total @ factor.to(total.dtype)


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
        count, rank = len(matrices), matrices[0].shape[1]
        own = round((rank - int(rank * self.common)) / count)
        shared = rank - own * count
        if shared <= 0:
            raise SettingError(f"iso-cts with common={self.common}: a matrix of rank {rank} leaves no common direction")
        total = add(matrices).double()
        values, vectors = right_vectors(total, shared)
        u = total @ (vectors * inverse(values))
        left, sizes, right = [], [], []
        for matrix in matrices if own else []:
            exact = matrix.double()
            rest = exact - u @ (u.T @ exact)
            found, directions = right_vectors(rest, own)
            left.append(rest @ (directions * inverse(found)))
            sizes.append(found)
            right.append(directions)
        u, v = torch.cat([*left, u], 1), torch.cat([*right, vectors], 1)
        inner = torch.cat([*sizes, values]).mean() * (orthogonaliser(u) @ orthogonaliser(v))
        dtype = matrices[0].dtype
        return (u.to(dtype) @ inner.to(dtype)) @ v.T.to(dtype)


def add(matrices: Sequence[Tensor]) -> Tensor:
    """Their sum, a new tensor."""
    total = matrices[0].clone()
    for matrix in matrices[1:]:
        total.add_(matrix)
    return total
