"""The codec of the elements that matter most: topk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from atm_fl.codecs.codec import Arrays, Codec, codec
from atm_fl.codecs.floats import Fp16, exponent, half, lowered
from atm_fl.options import option
from atm_fl.vectors import Layout
from atm_fl.vectors.blocks import parts, ranked_magnitudes


@codec("topk")
class TopK(Codec):
    """The elements of largest magnitude, max(1, round(density · n)) of them, as fp16; of equal ones the first.

    With error feedback: Stich et al. 2018, "Sparsified SGD with memory" (arXiv:1809.07599).
    """

    density: float = option(0.01, "part of the elements that is sent", gt=0, le=1)
    error_feedback: ClassVar[bool] = True

    def count(self, size: int) -> int:
        """How many of `size` elements are sent."""
        return min(size, max(1, round(self.density * size)))

    def _encode(self, vector: Tensor, layout: Layout, seed: int) -> Arrays:
        positions = largest_elements(vector, self.count(len(vector)))
        chosen = vector[torch.from_numpy(positions)]
        return half(chosen, exponent(chosen, Fp16.TOP)) | pack_positions(positions, len(vector))

    def _pieces(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        size, count = layout.size, self.count(layout.size)
        packed = {name: array for name, array in arrays.items() if name in ("gaps", "bitmap")}
        rest = {name: array for name, array in arrays.items() if name not in packed}
        values, lift = self._take(rest, values=(np.float16, count), exponent=(np.int16, 1))
        positions = torch.from_numpy(unpack_positions(packed, size, count))
        yield slice(None), torch.zeros(size).index_copy_(0, positions, lowered(values, lift))


def largest_elements(vector: Tensor, count: int) -> np.ndarray:
    """The ascending positions, int64 [count], of the elements of largest magnitude; of equal ones the first."""
    if not count:
        return np.empty(0, np.int64)
    (least,) = ranked_magnitudes(vector, [len(vector) - count])
    above, equal = [], []
    for chunk in parts(len(vector)):
        magnitudes = vector[chunk].abs().numpy()
        above.append(np.flatnonzero(magnitudes > least) + chunk.start)
        equal.append(np.flatnonzero(magnitudes == least) + chunk.start)
    larger = np.concatenate(above)
    return np.sort(np.concatenate([larger, np.concatenate(equal)[: count - len(larger)]]))


def pack_positions(positions: np.ndarray, size: int) -> Arrays:
    """Ascending positions below `size` in the least bytes: the gaps between them as uint8 or uint16, or a bitmap.

    A gap is the number of elements passed over; one that is too large for its dtype is the dtype's largest number, as
    often as it goes, and the rest.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    lengths = {dtype: len(gaps) + int((gaps // np.iinfo(dtype).max).sum()) for dtype in (np.uint8, np.uint16)}
    dtype = min(lengths, key=lambda dtype: np.dtype(dtype).itemsize * lengths[dtype])
    if np.dtype(dtype).itemsize * lengths[dtype] > (size + 7) // 8:
        taken = np.zeros(size, bool)
        taken[positions] = True
        return {"bitmap": np.packbits(taken)}
    most = np.iinfo(dtype).max
    packed = np.full(lengths[dtype], most, dtype)
    packed[np.cumsum(gaps // most + 1) - 1] = gaps % most
    return {"gaps": packed}


def unpack_positions(packed: Arrays, size: int, count: int) -> np.ndarray:
    """The `count` ascending positions below `size`, int64. ValueError if `packed` does not say as many."""
    kinds = [(name, str(array.dtype), array.ndim) for name, array in packed.items()]
    if kinds not in ([("gaps", "uint8", 1)], [("gaps", "uint16", 1)], [("bitmap", "uint8", 1)]):
        raise ValueError(f"positions {kinds} where gaps uint8 or uint16, or a bitmap uint8 were expected")
    ((name, array),) = packed.items()
    if name == "bitmap":
        positions = np.flatnonzero(np.unpackbits(array))
    else:
        ends = np.flatnonzero(array < np.iinfo(array.dtype).max)
        positions = np.cumsum(array, dtype=np.int64)[ends] + np.arange(len(ends))
        if len(array) and array[-1] == np.iinfo(array.dtype).max:
            raise ValueError("positions that are cut off")
    if len(positions) != count or (count and positions[-1] >= size):
        raise ValueError(f"positions that are not {count} below {size}")
    return positions
