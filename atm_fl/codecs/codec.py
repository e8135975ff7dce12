"""What a codec is, and the registry of their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar, dataclass_transform

import numpy as np
import torch
from torch import Tensor

from atm_fl.options import check_options, declare, option, options
from atm_fl.plugins import Registry
from atm_fl.vectors import Layout
from atm_fl.vectors.blocks import empty
from atm_fl.vectors.finite import check_finite

Arrays = dict[str, np.ndarray]
"""What travels: named arrays of dtypes that NumPy has."""


class Codec(ABC):
    """One way to send a vector."""

    name: ClassVar[str]
    error_feedback: ClassVar[bool] = False
    """Whether a sender must add to each vector what the encoding of the one before lost."""

    def __post_init__(self) -> None:
        check_options(self)

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
        for chunk, piece in self._checked(arrays, layout):
            if len(piece) == layout.size:
                return piece
            if vector is None:  # not sooner: arrays that are refused cost nothing
                vector = empty(layout.size, piece)
            vector[chunk] = piece
        return torch.empty(0) if vector is None else vector

    def add(self, arrays: Arrays, layout: Layout, base: Tensor) -> None:
        """base ← base + the vector that `arrays` stand for, float32 [n]. ValueError as `decode`; `base` is lost then.

        The vector itself is nowhere: a ViT-B/16's is 345 MB, and fresh memory costs more than the sum.
        """
        for chunk, piece in self._checked(arrays, layout):
            base[chunk].add_(piece)

    def _checked(self, arrays: Arrays, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        for chunk, piece in self._pieces(arrays, layout):
            check_finite(piece)
            yield chunk, piece

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


CODECS: Registry[type[Codec]] = Registry("codec", options, bare=True)
_Class = TypeVar("_Class", bound=type[Codec])


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
def codec(name: str) -> Callable[[_Class], _Class]:
    """Register the decorated class as the codec `name`; its options become keyword arguments."""
    return declare(CODECS, name)


def size_of(arrays: Arrays) -> int:
    """Bytes of the arrays' elements."""
    return sum(array.nbytes for array in arrays.values())
