"""Codecs of floating-point numbers: fp32, fp16, bf16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from atm_fl.codecs.codec import Arrays, Codec, codec
from atm_fl.vectors import Layout
from atm_fl.vectors.blocks import parts
from atm_fl.vectors.finite import check_finite


@codec("fp32")
class Fp32(Codec):
    """The vector itself: 4 bytes an element."""

    def _encode(self, vector: Tensor, layout: Layout, seed: int) -> Arrays:
        return {"values": vector.numpy()}

    def _pieces(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        (values,) = self._take(arrays, values=(np.float32, layout.size))
        yield slice(None), values


@codec("fp16")
class Fp16(Codec):
    """Half precision of the vector times a power of two that lifts its largest magnitude to [2¹⁴, 2¹⁵).

    Without that, most of a task vector would be among half precision's subnormal numbers, below 6e-5. So an element has
    11 significant bits unless it is 2²⁸ times smaller than the largest one.
    """

    TOP: ClassVar[int] = 15

    def _encode(self, vector: Tensor, layout: Layout, seed: int) -> Arrays:
        return half(vector, exponent(vector, self.TOP))

    def _pieces(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        values, lift = self._take(arrays, values=(np.float16, layout.size), exponent=(np.int16, 1))
        for chunk in parts(layout.size):
            yield chunk, lowered(values[chunk], lift)


@codec("bf16")
class Bf16(Codec):
    """bfloat16, 8 significant bits, rounded to nearest even as torch does; as int16, for NumPy has no bfloat16."""

    def _encode(self, vector: Tensor, layout: Layout, seed: int) -> Arrays:
        values = torch.empty(len(vector), dtype=torch.bfloat16)
        most = torch.finfo(torch.bfloat16).max  # what lies above would be rounded to infinity
        for chunk in parts(len(vector)):
            values[chunk] = vector[chunk].clamp(-most, most)
        return {"values": values.view(torch.int16).numpy()}

    def _pieces(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        (values,) = self._take(arrays, values=(np.int16, layout.size))
        for chunk in parts(layout.size):
            yield chunk, values[chunk].view(torch.bfloat16).float()


def exponent(vector: Tensor, top: int) -> int:
    """The k for which the largest magnitude of 2ᵏ · vector lies in [2^(top-1), 2^top); at most 126, and 0 for zeros."""
    largest = max(map(abs, map(float, vector.aminmax()))) if len(vector) else 0.0
    return min(126, top - math.frexp(largest)[1]) if largest else 0


def half(vector: Tensor, lift: int) -> Arrays:
    """2^lift · vector in half precision, and lift."""
    values = torch.empty(len(vector), dtype=torch.float16)
    for chunk in parts(len(vector)):
        values[chunk] = vector[chunk] * 2.0**lift
    return {"values": values.numpy(), "exponent": np.array([lift], np.int16)}


def lowered(values: Tensor, lift: Tensor) -> Tensor:
    """2^-lift · values, float32. ValueError if a value is not finite or a float32 vector has no such exponent."""
    if not -126 <= int(lift) <= 126:
        raise ValueError(f"exponent {int(lift)}, not one from -126 to 126")
    check_finite(values)
    most = torch.finfo(torch.float32).max  # rounding may lead beyond it
    return values.float().mul_(2.0 ** -int(lift)).clamp_(-most, most)
