"""Task vectors that stay in their files: each block is computed, fine-tuned − base, when a merge looks at it.

So a merge of files costs memory by the block, whatever the model's size: mapped files are the system's page cache.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from atm_fl.errors import SettingError
from atm_fl.vectors import Layout
from atm_fl.vectors.blocks import BLOCK
from atm_fl.vectors.finite import is_finite
from atm_fl.vectors.model_files import Checkpoint, Dense, Reader


class BaseParts:
    """A base's entries by parts, float32 (float64 where the base is); each thread keeps its last one."""

    def __init__(self, base: Checkpoint, layout: Layout) -> None:
        self.base, self.layout = base, layout
        self.starts = [0, *accumulate(layout.sizes)]
        self.entries = [base.reader(name) for name in layout.names]
        self._own = threading.local()

    def part(self, entry: int, chunk: slice) -> Tensor:
        """The elements `chunk` of the entry `entry`, which lasts until the thread asks for others."""
        values = self.entries[entry].values[chunk]
        if values.dtype in (torch.float32, torch.float64):
            return values
        key = entry, chunk.start, chunk.stop, chunk.step
        if getattr(self._own, "key", None) != key:
            buffer = _buffer(self._own, "base", len(values))
            self._own.converted, self._own.key = buffer.copy_(values), key
        converted: Tensor = self._own.converted
        return converted

    def within(self, start: int, stop: int, step: int = 1) -> Iterator[tuple[int, slice, int]]:
        """(entry, elements in it, how many) of the flat elements start, start + step, … below stop."""
        while start < stop:
            entry = bisect_right(self.starts, start) - 1
            first, end = self.starts[entry], min(stop, self.starts[entry + 1])
            count = -(-(end - start) // step)
            # Torch takes no slice that ends beyond the tensor by more than a step, nor needs one.
            yield entry, slice(start - first, end - first, step), count
            start += count * step


def _buffer(thread_local: Any, name: str, size: int) -> Tensor:
    """A thread's buffer, float32 [size]; fresh memory if that is more than a block."""
    if size > BLOCK:
        return torch.empty(size)
    if not hasattr(thread_local, name):
        setattr(thread_local, name, torch.empty(BLOCK))
    buffer: Tensor = getattr(thread_local, name)[:size]
    return buffer


class FileVector:
    """The task vector of a file, float32 [n], of which a merge reads parts; it stands where a Tensor does.

    What it lacks of a Tensor is asked of the whole vector, made for the moment. A part lasts until the thread asks for
    the next. SettingError, which names file and entry, if an element is not finite; one that equals the base's is 0,
    infinite or not.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(
        self,
        file: Checkpoint,
        base: BaseParts,
        readers: Sequence[Reader],
        factors: Sequence[float],
        span: tuple[int, int] | None = None,
        done: Callable[[int], object] = lambda elements: None,
    ) -> None:
        self._file, self._base, self._readers, self._factors, self._done = file, base, readers, factors, done
        self._span = span or (0, base.layout.size)
        self._own = threading.local()

    def numel(self) -> int:
        return self._span[1] - self._span[0]

    __len__ = numel

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.numel()])

    def new_empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*size, dtype=dtype or self.dtype)

    def new_zeros(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(*size, dtype=dtype or self.dtype)

    def split(self, sizes: Sequence[int]) -> list[FileVector]:
        ends = list(accumulate(sizes, initial=self._span[0]))
        arguments = self._file, self._base, self._readers, self._factors
        return [FileVector(*arguments, span, self._done) for span in pairwise(ends)]

    def __getitem__(self, key: slice) -> Tensor:
        start, stop, step = key.indices(self.numel())
        out = _buffer(self._own, "block", max(0, -(-(stop - start) // step)))
        place = 0
        for entry, chunk, count in self._base.within(self._span[0] + start, self._span[0] + stop, step):
            self._fill(entry, chunk, out[place : place + count])
            place += count
        self._done(place)
        return out

    def _fill(self, entry: int, chunk: slice, out: Tensor) -> None:
        reader, before = self._readers[entry], self._base.part(entry, chunk)
        reader.difference(chunk, before, out)
        if not is_finite(out):
            if isinstance(reader, Dense):
                out.masked_fill_(reader.equal(chunk, before), 0)
            if not is_finite(out):
                wrong = self._file.path if is_finite(before) else self._base.base.path
                name = self._base.layout.names[entry]
                raise SettingError(f"{wrong}: {name} is not finite (NaN, infinite or beyond float32)")
        if self._factors[entry] != 1:
            out.mul_(self._factors[entry])

    def ahead(self, entry: int, chunk: slice) -> None:
        """Have the system read a part of an entry soon."""
        self._readers[entry].ahead(chunk)

    def whole(self) -> Tensor:
        """The vector as a tensor of its own."""
        out = torch.empty(self.numel())
        for start in range(0, len(out), BLOCK):
            chunk = slice(start, min(start + BLOCK, len(out)))
            out[chunk] = self[chunk]
        return out

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def real(value: Any) -> Any:
            if isinstance(value, FileVector):
                return value.whole()
            return type(value)(map(real, value)) if isinstance(value, (list, tuple)) else value

        return function(*map(real, args), **{key: real(value) for key, value in (kwargs or {}).items()})
