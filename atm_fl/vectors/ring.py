"""Vectors as whole numbers modulo 2³², whose sums are exact: what secure aggregation masks and adds up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atm_fl.errors import with_figures
from atm_fl.vectors.blocks import parts
from atm_fl.vectors.finite import check_finite

WORD = np.dtype("<u4")
"""An element: a whole number modulo 2³²."""


@dataclass(frozen=True)
class Ring:
    """Vectors in whole steps, modulo 2³². Their sum over at most `parties` vectors within ±`reach` never wraps.

    step = reach / ⌊(2³¹ − 1) / parties⌋. Rounding is to nearest (ties to even), so that an element of a vector is off
    by at most half a step, and the same vectors give the same sum to the last bit.
    """

    reach: float
    parties: int

    @property
    def levels(self) -> int:
        """Steps from 0 to `reach`."""
        return (2**31 - 1) // self.parties

    @property
    def step(self) -> float:
        """The difference of two neighbours."""
        return self.reach / self.levels

    def encode(self, vector: Tensor) -> np.ndarray:
        """A vector, float32 [n], as words [n]. ValueError if a value is not finite or beyond the reach."""
        vector = vector.detach().cpu()
        check_finite(vector)
        words = torch.empty(len(vector), dtype=torch.int32)
        for chunk in parts(len(vector)):
            block = vector[chunk].double()
            largest = max(map(abs, map(float, block.aminmax())))
            if largest > self.reach:
                raise with_figures(
                    ValueError(f"an element beyond secure-range={self.reach:g} (raise it)"),
                    f"one of magnitude {largest:.4g}",
                )
            words[chunk] = block.div_(self.step).round_().clamp_(-self.levels, self.levels)
        return words.numpy().view(np.uint32).astype(WORD, copy=False)

    def decode(self, words: np.ndarray, factor: float = 1.0) -> Tensor:
        """`factor` times the vector, float32 [n], that a sum of words [n] stands for."""
        vector = torch.empty(len(words))
        for chunk in parts(len(words)):
            signed = words[chunk].astype(np.uint32, copy=False).view(np.int32)
            vector[chunk] = torch.from_numpy(signed).double() * (self.step * factor)
        return vector


def check_words(words: np.ndarray, size: int) -> None:
    """ValueError if `words` are not [size] words."""
    if words.dtype != WORD or words.shape != (size,):
        raise ValueError(f"{words.dtype}{list(words.shape)} where {WORD}[{size}] was expected: 'words'")
