"""Vectors in a temporary file instead of in memory."""

from __future__ import annotations

import mmap
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE: Linux would refuse a private map of more bytes than the machine has memory, written to or not."""


class MappedVectors:
    """Vectors [n] kept in one temporary file in `folder` instead of in memory, and read back through memory maps.

    What is mapped belongs to the system's page cache and goes when memory is short: resident memory does not grow with
    the number of vectors.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._parts: dict[str, tuple[np.dtype, int]] = {}

    def add(self, name: str, vector: Tensor) -> None:
        """Append a vector. ValueError if `name` is there already."""
        if name in self._parts:
            raise ValueError(f"{name!r} was added twice")
        values = vector.detach().cpu().contiguous().numpy()
        self._file.write(values.data)
        self._parts[name] = values.dtype, len(values)

    def append(self, name: str, values: Tensor) -> None:
        """More elements of the vector `name`, the last that was added to; a new one if there is none of this name."""
        more = values.detach().cpu().contiguous().numpy()
        if name in self._parts and name != next(reversed(self._parts)):
            raise ValueError(f"{name!r} is not the last vector")
        dtype, size = self._parts.get(name, (more.dtype, 0))
        self._file.write(more.data)
        self._parts[name] = dtype, size + len(more)

    def vectors(self) -> dict[str, Tensor]:
        """The vectors by name, in the order of `add`, on the CPU; read from the file when they are looked at."""
        self._file.flush()
        total = sum(dtype.itemsize * size for dtype, size in self._parts.values())
        # One map of all: each would hold a file descriptor, of which a process has some thousand. Private, for torch
        # wants writable memory, and what is written never reaches the file.
        whole = mmap.mmap(self._file.fileno(), total, flags=mmap.MAP_PRIVATE | NO_RESERVE) if total else b""
        views, offset = {}, 0
        for name, (dtype, size) in self._parts.items():
            views[name] = torch.from_numpy(np.frombuffer(whole, dtype, size, offset) if size else np.empty(0, dtype))
            offset += dtype.itemsize * size
        return views

    def close(self) -> None:
        """Delete the file; its space is free when the vectors are gone too."""
        self._file.close()
