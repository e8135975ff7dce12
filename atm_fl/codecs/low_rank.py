"""The codec of every matrix's leading singular directions: low-rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from atm_fl.codecs.codec import Arrays, Codec, codec
from atm_fl.codecs.floats import exponent, lowered
from atm_fl.options import option
from atm_fl.vectors import Layout
from atm_fl.vectors.linalg import svd


@codec("low-rank")
class LowRank(Codec):
    """Of every matrix its `rank` leading singular directions, as two factors in half precision; the rest is as fp16.

    A matrix [m, n] = U Σ Vᵀ is sent as U √Σ and V √Σ where they are fewer numbers than it has; an entry of more
    dimensions is a matrix of its first and all others. Error feedback makes up for the directions left out, as in
    PowerSGD (Vogels et al. 2019, arXiv:1905.13727).
    """

    rank: int = option(8, "directions of a matrix that are sent", ge=1)
    error_feedback: ClassVar[bool] = True
    TOP: ClassVar[int] = 10
    """Lifts the largest element to below 2¹⁰: the factors' are then at most 2⁵ (m n)^¼, which half precision holds."""

    def _matrix(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The matrix [m, n] that an entry is sent as, if it pays."""
        size = math.prod(shape)
        if len(shape) < 2 or not size:
            return None
        rows, columns = shape[0], size // shape[0]
        return (rows, columns) if self.rank * (rows + columns) < size else None

    def _lengths(self, layout: Layout) -> list[int]:
        """Numbers that are sent of every entry."""
        matrices = map(self._matrix, layout.shapes)
        return [self.rank * sum(matrix) if matrix else n for matrix, n in zip(matrices, layout.sizes, strict=True)]

    def _encode(self, vector: Tensor, layout: Layout, seed: int) -> Arrays:
        lift = exponent(vector, self.TOP)
        pieces = []
        for shape, entry in zip(layout.shapes, vector.split(layout.sizes), strict=True):
            matrix, lifted = self._matrix(shape), entry * 2.0**lift
            if matrix:
                left, values, right = svd(lifted.view(matrix), self.rank, vector.dtype)
                lifted = torch.zeros(self.rank, sum(matrix))
                lifted[: len(values)] = (torch.cat([left, right]) * values.sqrt()).T
            pieces.append(lifted.reshape(-1).half())
        return {"values": torch.cat(pieces).numpy(), "exponent": np.array([lift], np.int16)}

    def _pieces(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        lengths, start = self._lengths(layout), 0
        values, lift = self._take(arrays, values=(np.float16, sum(lengths)), exponent=(np.int16, 1))
        for shape, size, sent in zip(layout.shapes, layout.sizes, values.split(lengths), strict=True):
            matrix, entry = self._matrix(shape), sent.float()
            if matrix:
                # One direction after another and no matrix product, whose sums are in another order elsewhere.
                factors = entry.view(self.rank, -1)
                entry = torch.zeros(matrix)
                for left, right in (both.split(matrix) for both in factors):
                    entry.add_(torch.outer(left, right))
            yield slice(start, start + size), lowered(entry.view(-1), lift)
            start += size
