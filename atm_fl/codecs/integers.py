"""Codecs of a few bits an element: whole numbers times a block's largest magnitude, entropy-coded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import zstandard
from torch import Tensor
from torch.nn import functional

from atm_fl.codecs.codec import Arrays, Codec, codec
from atm_fl.errors import SettingError
from atm_fl.options import option
from atm_fl.vectors import Layout
from atm_fl.vectors.blocks import BLOCK


@dataclass(kw_only=True)
class Integers(Codec):
    """Whole numbers from -levels to levels, times the largest magnitude of each block of elements over levels.

    Rounded at random, up with a probability that makes the expectation exact (as QSGD, Alistarh et al. 2017,
    arXiv:1610.02132): the error is below one step and averages out. Rounded to nearest it is at most half a step, but
    what is smaller than that is never sent. The numbers are sent in fewer bits where they are small: see
    `entropy_encode`.
    """

    block: int = option(256, "elements that share a scale, an even number", ge=2, le=BLOCK)
    levels: ClassVar[int] = 127
    """The largest whole number."""
    stochastic: ClassVar[bool] = True
    per_byte: ClassVar[int] = 1
    """Elements in a byte."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % 2:
            raise SettingError(f"block={self.block}: it must be an even number")

    def _encode(self, vector: Tensor, layout: Layout, seed: int) -> Arrays:
        packed = torch.empty(-(-len(vector) // self.per_byte), dtype=torch.uint8)
        largest = torch.empty(-(-len(vector) // self.block))
        random = np.random.Generator(np.random.SFC64(seed))
        for elements, blocks, codes in self._strides(len(vector)):
            numbers = self._whole(filled(vector[elements], self.block).view(-1, self.block), largest[blocks], random)
            packed[codes] = self._pack(filled(numbers.view(-1), self.per_byte))[: codes.stop - codes.start]
        return {"values": entropy_encode(packed), "largest": largest.numpy()}

    def _pieces(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        size, values = layout.size, arrays.get("values", np.empty(0, np.uint8))
        expected = {"values": (np.uint8, values.size), "largest": (np.float32, -(-size // self.block))}
        frame, largest = self._take(arrays, **expected)
        packed = entropy_decode(frame, -(-size // self.per_byte))
        room = torch.empty(min(size, self._stride))
        for elements, blocks, codes in self._strides(size):
            count = elements.stop - elements.start
            scaled = torch.div(self._unpack(packed[codes])[:count], self.levels, out=room[:count])
            whole = count // self.block * self.block
            scaled[:whole].view(-1, self.block).mul_(largest[blocks][: count // self.block].unsqueeze(1))
            scaled[whole:].mul_(largest[blocks][-1])
            yield elements, scaled

    @property
    def _stride(self) -> int:
        """Elements that are worked on at once: whole blocks and whole bytes."""
        return max(1, BLOCK // self.block // self.per_byte) * self.per_byte * self.block

    def _strides(self, size: int) -> Iterator[tuple[slice, slice, slice]]:
        """(elements, blocks, bytes) that are worked on at once."""
        for first in range(0, size, self._stride):
            last = min(first + self._stride, size)
            blocks, codes = (slice(first // n, -(-last // n)) for n in (self.block, self.per_byte))
            yield slice(first, last), blocks, codes

    def _whole(self, rows: Tensor, largest: Tensor, random: np.random.Generator) -> Tensor:
        """The whole numbers, int8, of blocks in rows, whose largest magnitudes are written to `largest`."""
        torch.amax(rows.abs(), 1, out=largest)
        # Divided by the magnitude and not by the step, which of a subnormal magnitude would be zero.
        scaled = (rows / torch.where(largest > 0, largest, 1).unsqueeze(1)).mul_(self.levels)
        if self.stochastic:
            scaled.add_(torch.from_numpy(random.random(scaled.shape, np.float32))).floor_()
        else:
            scaled.round_()
        return scaled.clamp_(-self.levels, self.levels).to(torch.int8)

    def _pack(self, numbers: Tensor) -> Tensor:
        """Whole numbers, int8, as bytes; so many that they fill them."""
        return numbers.view(torch.uint8)

    def _unpack(self, packed: Tensor) -> Tensor:
        """The whole numbers, int8, in bytes. ValueError if a byte is none of `_pack`."""
        return packed.view(torch.int8)


def filled(piece: Tensor, multiple: int) -> Tensor:
    """A piece, and zeros to the next multiple of elements; itself if there are none."""
    lacking = -len(piece) % multiple
    return functional.pad(piece, (0, lacking)) if lacking else piece


def entropy_encode(numbers: Tensor) -> np.ndarray:
    """Bytes [n] in fewer, uint8 (a Zstandard frame): those that are frequent take less than 8 bits.

    Of a bell curve's numbers this saves 5 to 10 %, at 0.7 GB/s; there are no repetitions for it to find.
    """
    return np.frombuffer(zstandard.ZstdCompressor(level=1).compress(numbers.numpy().data), np.uint8)


def entropy_decode(frame: Tensor, count: int) -> Tensor:
    """The `count` bytes, uint8, that `entropy_encode` made a frame of. ValueError if it is no frame of so many."""
    try:
        size = zstandard.frame_content_size(frame.numpy().data)
        if size != count:  # before anything is reserved for it
            raise ValueError(f"a frame of {size} bytes where {count} were expected")
        content = zstandard.ZstdDecompressor().decompress(frame.numpy().data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged bytes where a frame of {count} was expected: {error}") from None
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)


@codec("int8")
class Int8(Integers):
    """One byte an element, entropy-coded, and 4 bytes a block."""


@codec("int4")
class Int4(Integers):
    """Two elements a byte, the first in the lower half, each plus 8; entropy-coded; and 4 bytes a block."""

    block: int = option(64, "elements that share a scale, an even number", ge=2, le=BLOCK)
    levels: ClassVar[int] = 7
    per_byte: ClassVar[int] = 2

    def _pack(self, numbers: Tensor) -> Tensor:
        low, high = numbers.add(8).view(torch.uint8).view(-1, 2).unbind(1)
        return high.bitwise_left_shift(4).bitwise_or_(low)

    def _unpack(self, packed: Tensor) -> Tensor:
        halves = torch.stack([packed.bitwise_and(15), packed.bitwise_right_shift(4)], 1).view(-1)
        return halves.view(torch.int8).sub_(8)


@codec("int8-nearest")
class Int8Nearest(Int8):
    """int8, rounded to nearest."""

    stochastic: ClassVar[bool] = False


@codec("int4-nearest")
class Int4Nearest(Int4):
    """int4, rounded to nearest."""

    stochastic: ClassVar[bool] = False


@codec("ternary")
class Ternary(Integers):
    """-1, 0 or 1 times one magnitude a block, five elements a byte, entropy-coded; and 4 bytes a block.

    Ternary weight networks, Li et al. 2016 (arXiv:1605.04711), equations 5 and 6: an element is 0 if its magnitude is
    at most 0.7 times the block's mean, and the block's magnitude is the mean of the others. A bell curve's vector loses
    a fifth of its square length, which error feedback makes up for.
    """

    levels: ClassVar[int] = 1
    error_feedback: ClassVar[bool] = True
    per_byte: ClassVar[int] = 5
    PLACES: ClassVar[Tensor] = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
    """What each of a byte's five elements, plus 1, counts."""
    BYTES: ClassVar[Tensor] = (torch.arange(3**5)[:, None] // PLACES % 3 - 1).to(torch.int8)
    """The five elements of each byte."""

    def _whole(self, rows: Tensor, largest: Tensor, random: np.random.Generator) -> Tensor:
        sizes = rows.abs()
        kept = sizes > 0.7 * sizes.mean(1, dtype=torch.float64).unsqueeze(1)
        sizes.mul_(kept)
        largest.copy_(sizes.sum(1, dtype=torch.float64) / kept.sum(1).clamp_min(1))
        return rows.sign().mul_(kept).to(torch.int8)

    def _pack(self, numbers: Tensor) -> Tensor:
        return numbers.add(1).view(torch.uint8).view(-1, 5).mul_(self.PLACES).sum(1, dtype=torch.uint8)

    def _unpack(self, packed: Tensor) -> Tensor:
        if int(packed.max()) >= len(self.BYTES):
            raise ValueError(f"a byte of {int(packed.max())}, which is no five elements of -1, 0 or 1")
        return self.BYTES.index_select(0, packed.int()).view(-1)
