"""Task vectors, steps and bases ↔ the few arrays that travel. docs/wire.md has the table of codecs.

A codec is a name and at most one number, as in `int8`, `int4:128`, `topk:0.01`. Codecs that round at random are
unbiased: their errors average out over clients and rounds. With those that leave something out (`feedback`) nothing is
lost for good: the sender keeps what the encoding lost, the residual, and adds it to its next vector.

Every decoder is made of additions and multiplications of single elements in a fixed order, so that arrays decode to the
same bits on every machine and with any number of threads; a server and its clients rely on it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, TypeVar

import numpy as np
import torch
import zstandard
from torch import Tensor
from torch.nn import functional

from atm_fl.blocks import BLOCK, empty, parts, ranked_magnitudes
from atm_fl.errors import SettingError
from atm_fl.merging.spectral import svd
from atm_fl.plugins import Registry
from atm_fl.vectors import Layout

Arrays = dict[str, np.ndarray]
"""What travels: named arrays of dtypes that NumPy has."""


class Codec(ABC):
    """One way to send a vector."""

    name: ClassVar[str]
    feedback: ClassVar[bool] = False
    """Whether a sender must add to each vector what the encoding of the one before lost."""

    def encode(self, vector: Tensor, layout: Layout, seed: int = 0) -> Arrays:
        """A vector float32 [n] of `layout` as arrays, which may share its memory. seed: of what is drawn at random.

        ValueError if a value is not finite.
        """
        vector = vector.detach().cpu()
        check_finite(vector)
        return self._encode(vector, layout, seed)

    def decode(self, arrays: Arrays, layout: Layout, room: Tensor | None = None) -> Tensor:
        """The vector float32 [n] that `arrays` stand for; it may share their memory, or be in `room`, float32 [n].

        ValueError, saying what is wrong, for arrays that `encode` does not make of such a vector, or a value that is
        not finite.
        """
        vector = room
        for part, piece in self._checked(arrays, layout):
            if len(piece) == layout.size:
                return piece
            if vector is None:  # not sooner: arrays that are refused cost nothing
                vector = empty(layout.size, piece)
            vector[part] = piece
        return torch.empty(0) if vector is None else vector

    def add(self, arrays: Arrays, layout: Layout, base: Tensor) -> None:
        """base ← base + the vector that `arrays` stand for, float32 [n]. ValueError as `decode`; `base` is lost then.

        The vector itself is nowhere: a ViT-B/16's is 345 MB, and fresh memory costs more than the sum.
        """
        for part, piece in self._checked(arrays, layout):
            base[part].add_(piece)

    def _checked(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        for part, piece in self._pieces(arrays, layout):
            check_finite(piece)
            yield part, piece

    @abstractmethod
    def _encode(self, vector: Tensor, layout: Layout, seed: int) -> Arrays: ...

    @abstractmethod
    def _pieces(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        """The vector in pieces, float32, each with its place. The next may be in the same memory."""

    def _take(self, arrays: Arrays, **expected: tuple[type, int]) -> Iterator[Tensor]:
        """The arrays as tensors, in the order of `expected`: name → (dtype, elements). ValueError if one is another."""
        if set(arrays) != set(expected):
            raise ValueError(f"arrays {sorted(arrays)} where codec {self.name} has {sorted(expected)}")
        for name, (dtype, size) in expected.items():
            array = arrays[name]
            if array.dtype != dtype or array.shape != (size,):
                raise ValueError(
                    f"{array.dtype}{list(array.shape)} where {np.dtype(dtype)}[{size}] was expected: "
                    f"{name!r} of codec {self.name}"
                )
            yield torch.from_numpy(array if array.flags.writeable else array.copy())


Made = TypeVar("Made", bound=type[Codec])
CODECS: Registry[type[Codec]] = Registry("codec")


def codec(name: str) -> Callable[[Made], Made]:
    """Register a codec class, a dataclass with at most one field, under its name."""

    def add(made: Made) -> Made:
        made.name = name
        CODECS[name] = made
        return made

    return add


def make_codec(text: str, setting: str = "codec") -> Codec:
    """The codec that `text` says: a name, or name:number. SettingError, naming `setting`, if there is no such codec."""
    name, colon, number = text.partition(":")
    made = CODECS.find(name, f"{setting}={text!r}: codec {name!r}")
    options = fields(made) if is_dataclass(made) else ()
    if not colon:
        return made()
    if not options:
        raise SettingError(f"{setting}={text!r}: {name} takes no number; write {setting}={name!r}")
    kind = int if options[0].type == "int" else float
    try:
        value = kind(number)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise SettingError(f"{setting}={text!r}: the {options[0].name} after the colon must be {wanted}") from None
    try:
        return made(value)
    except ValueError as error:
        raise SettingError(f"{setting}={text!r}: {error}") from None


def size_of(arrays: Arrays) -> int:
    """Bytes of the arrays' elements."""
    return sum(array.nbytes for array in arrays.values())


def is_finite(vector: Tensor) -> bool:
    """Whether all values are finite: the least and the largest say it in one pass, and are NaN if one is."""
    return not len(vector) or all(math.isfinite(end) for end in vector.aminmax())


def check_finite(vector: Tensor) -> None:
    """ValueError if a value is not finite."""
    if not is_finite(vector):
        raise ValueError("a value that is not finite (NaN or infinity)")


# ------------------------------------------------------------------------------------------------------ floating point


@codec("fp32")
@dataclass(frozen=True)
class Fp32(Codec):
    """The vector itself: 4 bytes an element."""

    def _encode(self, vector: Tensor, layout: Layout, seed: int) -> Arrays:
        return {"values": vector.numpy()}

    def _pieces(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        (values,) = self._take(arrays, values=(np.float32, layout.size))
        yield slice(None), values


@codec("fp16")
@dataclass(frozen=True)
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
        for part in parts(layout.size):
            yield part, lowered(values[part], lift)


@codec("bf16")
@dataclass(frozen=True)
class Bf16(Codec):
    """bfloat16, 8 significant bits, rounded to nearest even as torch does; as int16, for NumPy has no bfloat16."""

    def _encode(self, vector: Tensor, layout: Layout, seed: int) -> Arrays:
        values = torch.empty(len(vector), dtype=torch.bfloat16)
        most = torch.finfo(torch.bfloat16).max  # what lies above would be rounded to infinity
        for part in parts(len(vector)):
            values[part] = vector[part].clamp(-most, most)
        return {"values": values.view(torch.int16).numpy()}

    def _pieces(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        (values,) = self._take(arrays, values=(np.int16, layout.size))
        for part in parts(layout.size):
            yield part, values[part].view(torch.bfloat16).float()


def exponent(vector: Tensor, top: int) -> int:
    """The k for which the largest magnitude of 2ᵏ · vector lies in [2^(top-1), 2^top); at most 126, and 0 for zeros."""
    largest = max(map(abs, map(float, vector.aminmax()))) if len(vector) else 0.0
    return min(126, top - math.frexp(largest)[1]) if largest else 0


def half(vector: Tensor, lift: int) -> Arrays:
    """2^lift · vector in half precision, and lift."""
    values = torch.empty(len(vector), dtype=torch.float16)
    for part in parts(len(vector)):
        values[part] = vector[part] * 2.0**lift
    return {"values": values.numpy(), "exponent": np.array([lift], np.int16)}


def lowered(values: Tensor, lift: Tensor) -> Tensor:
    """2^-lift · values, float32. ValueError if a value is not finite or a float32 vector has no such exponent."""
    if not -126 <= int(lift) <= 126:
        raise ValueError(f"exponent {int(lift)}, not one from -126 to 126")
    check_finite(values)
    most = torch.finfo(torch.float32).max  # rounding may lead beyond it
    return values.float().mul_(2.0 ** -int(lift)).clamp_(-most, most)


# ------------------------------------------------------------------------------------------------------------ integers


@dataclass(frozen=True)
class Integers(Codec):
    """Whole numbers from -levels to levels, times the largest magnitude of each block of elements over levels.

    Rounded at random, up with a probability that makes the expectation exact (as QSGD, Alistarh et al. 2017,
    arXiv:1610.02132): the error is below one step and averages out. Rounded to nearest it is at most half a step, but
    what is smaller than that is never sent. The numbers are sent in fewer bits where they are small: see `squeezed`.
    """

    block: int = 256
    levels: ClassVar[int] = 127
    """The largest whole number."""
    stochastic: ClassVar[bool] = True
    per_byte: ClassVar[int] = 1
    """Elements in a byte."""

    def __post_init__(self) -> None:
        if not 2 <= self.block <= BLOCK or self.block % 2:
            raise ValueError(f"the block after the colon must be an even number from 2 to {BLOCK}")

    def _encode(self, vector: Tensor, layout: Layout, seed: int) -> Arrays:
        packed = torch.empty(-(-len(vector) // self.per_byte), dtype=torch.uint8)
        largest = torch.empty(-(-len(vector) // self.block))
        random = np.random.Generator(np.random.SFC64(seed))
        for elements, blocks, those in self._strides(len(vector)):
            numbers = self._whole(filled(vector[elements], self.block).view(-1, self.block), largest[blocks], random)
            packed[those] = self._pack(filled(numbers.view(-1), self.per_byte))[: those.stop - those.start]
        return {"values": squeezed(packed), "largest": largest.numpy()}

    def _pieces(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        size, values = layout.size, arrays.get("values", np.empty(0, np.uint8))
        expected = {"values": (np.uint8, values.size), "largest": (np.float32, -(-size // self.block))}
        frame, largest = self._take(arrays, **expected)
        packed = unsqueezed(frame, -(-size // self.per_byte))
        room = torch.empty(min(size, self._stride))
        for elements, blocks, those in self._strides(size):
            count = elements.stop - elements.start
            scaled = torch.div(self._unpack(packed[those])[:count], self.levels, out=room[:count])
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
            blocks, those = (slice(first // n, -(-last // n)) for n in (self.block, self.per_byte))
            yield slice(first, last), blocks, those

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


def squeezed(numbers: Tensor) -> np.ndarray:
    """Bytes [n] in fewer, uint8 (a Zstandard frame): those that are frequent take less than 8 bits.

    Of a bell curve's numbers this saves 5 to 10 %, at 0.7 GB/s; there are no repetitions for it to find.
    """
    return np.frombuffer(zstandard.ZstdCompressor(level=1).compress(numbers.numpy().data), np.uint8)


def unsqueezed(frame: Tensor, count: int) -> Tensor:
    """The `count` bytes, uint8, that `squeezed` made a frame of. ValueError if it is no frame of so many."""
    try:
        size = zstandard.frame_content_size(frame.numpy().data)
        if size != count:  # before anything is reserved for it
            raise ValueError(f"a frame of {size} bytes where {count} were expected")
        content = zstandard.ZstdDecompressor().decompress(frame.numpy().data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged bytes where a frame of {count} was expected: {error}") from None
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)


@codec("int8")
@dataclass(frozen=True)
class Int8(Integers):
    """One byte an element, squeezed, and 4 bytes a block."""


@codec("int4")
@dataclass(frozen=True)
class Int4(Integers):
    """Two elements a byte, the first in the lower half, each plus 8; squeezed; and 4 bytes a block."""

    block: int = 64
    levels: ClassVar[int] = 7
    per_byte: ClassVar[int] = 2

    def _pack(self, numbers: Tensor) -> Tensor:
        low, high = numbers.add(8).view(torch.uint8).view(-1, 2).unbind(1)
        return high.bitwise_left_shift(4).bitwise_or_(low)

    def _unpack(self, packed: Tensor) -> Tensor:
        halves = torch.stack([packed.bitwise_and(15), packed.bitwise_right_shift(4)], 1).view(-1)
        return halves.view(torch.int8).sub_(8)


@codec("int8-nearest")
@dataclass(frozen=True)
class Int8Nearest(Int8):
    """int8, rounded to nearest."""

    stochastic: ClassVar[bool] = False


@codec("int4-nearest")
@dataclass(frozen=True)
class Int4Nearest(Int4):
    """int4, rounded to nearest."""

    stochastic: ClassVar[bool] = False


@codec("ternary")
@dataclass(frozen=True)
class Ternary(Integers):
    """-1, 0 or 1 times one magnitude a block, five elements a byte, squeezed; and 4 bytes a block.

    Ternary weight networks, Li et al. 2016 (arXiv:1605.04711), equations 5 and 6: an element is 0 if its magnitude is
    at most 0.7 times the block's mean, and the block's magnitude is the mean of the others. A bell curve's vector loses
    a fifth of its square length, which error feedback makes up for.
    """

    levels: ClassVar[int] = 1
    feedback: ClassVar[bool] = True
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


# ------------------------------------------------------------------------------------------------- what matters most


@codec("topk")
@dataclass(frozen=True)
class TopK(Codec):
    """The elements of largest magnitude, max(1, round(density · n)) of them, as fp16; of equal ones the first.

    With error feedback: Stich et al. 2018, "Sparsified SGD with memory" (arXiv:1809.07599).
    """

    density: float = 0.01
    feedback: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError("the density after the colon must be above 0 and at most 1")

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
    for part in parts(len(vector)):
        magnitudes = vector[part].abs().numpy()
        above.append(np.flatnonzero(magnitudes > least) + part.start)
        equal.append(np.flatnonzero(magnitudes == least) + part.start)
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


@codec("low-rank")
@dataclass(frozen=True)
class LowRank(Codec):
    """Of every matrix its `rank` leading singular directions, as two factors in half precision; the rest is as fp16.

    A matrix [m, n] = U Σ Vᵀ is sent as U √Σ and V √Σ where they are fewer numbers than it has; an entry of more
    dimensions is a matrix of its first and all others. Error feedback makes up for the directions left out, as in
    PowerSGD (Vogels et al. 2019, arXiv:1905.13727).
    """

    rank: int = 8
    feedback: ClassVar[bool] = True
    TOP: ClassVar[int] = 10
    """Lifts the largest element to below 2¹⁰: the factors' are then at most 2⁵ (m n)^¼, which half precision holds."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("the rank after the colon must be at least 1")

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
