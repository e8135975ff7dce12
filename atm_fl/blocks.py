"""Passes over long vectors, a block that stays in the processor's cache at a time, and exact selection.

Every pass reads each vector from memory once; what it needs on the way lives in scratch blocks. Blocks never cross the
bounds of a layout's entries, so that a pass can treat each entry in its own way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from atm_fl.vectors import Layout

BLOCK = 1 << 16
"""Elements of a block: with a few scratch blocks of float32 it stays in a core's second-level cache."""


def parts(size: int) -> Iterator[slice]:
    """The blocks of a vector of `size` elements, in order."""
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def blocks(layout: Layout) -> Iterator[tuple[int, slice]]:
    """(entry's number, elements of the flat vector) of every block, in order."""
    start = 0
    for entry, size in enumerate(layout.sizes):
        for part in parts(size):
            yield entry, slice(start + part.start, start + part.stop)
        start += size


def empty(size: int, like: Tensor) -> Tensor:
    """An uninitialised vector [size] of `like`'s dtype and device."""
    if like.device.type == "cpu":
        # NumPy asks the system for huge pages, torch does not: the first write to a large vector costs half.
        return torch.from_numpy(np.empty(size, torch.empty(0, dtype=like.dtype).numpy().dtype))
    return torch.empty(size, dtype=like.dtype, device=like.device)


class Scratch:
    """A few blocks that are used again and again."""

    def __init__(self, count: int, like: Tensor) -> None:
        self._blocks = torch.empty(count, min(BLOCK, max(1, like.numel())), dtype=like.dtype, device=like.device)

    def stack(self, part: slice) -> Tensor:
        """The scratch blocks [count, elements], as long as `part`."""
        return self._blocks[:, : part.stop - part.start]

    def rows(self, part: slice) -> list[Tensor]:
        """The scratch blocks one by one, as long as `part`."""
        return list(self.stack(part))


def ranked_magnitudes(vector: Tensor, ranks: Sequence[int]) -> list[float]:
    """The exact order statistics of |vector|: for each rank r (from 0) the r-th smallest magnitude.

    Long vectors on the CPU are read once: a sample brackets each rank, and only the few magnitudes within the bracket
    are sorted out. Where the sample misleads, the whole vector is partitioned instead; the answer is exact either way.
    """
    if vector.device.type != "cpu":
        magnitudes = vector.abs()
        return [float(torch.kthvalue(magnitudes, rank + 1).values) for rank in ranks]
    size = vector.numel()
    found: dict[int, float] = {}
    if size > SAMPLE * 8:
        sample = np.sort(np.abs(vector[:: -(-size // SAMPLE)].numpy()))
        for rank in set(ranks):
            value = _bracketed(vector, rank, sample)
            if value is not None:
                found[rank] = value
    missing = sorted(set(ranks) - set(found))
    if missing:
        partitioned = np.partition(vector.abs().numpy(), missing)
        found.update({rank: float(partitioned[rank]) for rank in missing})
    return [found[rank] for rank in ranks]


SAMPLE = 1 << 18
"""Magnitudes looked at to bracket a rank."""


def _bracketed(vector: Tensor, rank: int, sample: np.ndarray) -> float | None:
    """The magnitude of `rank`, or None if it does not lie where the sorted sample says that it should."""
    share = rank / max(1, vector.numel() - 1)
    place, margin = share * (len(sample) - 1), 5 * (share * (1 - share) * len(sample)) ** 0.5 + 5
    low = sample[int(place - margin)] if place >= margin else sample.dtype.type(0)
    high = sample[int(place + margin)] if place + margin < len(sample) else sample.dtype.type(np.inf)
    below, within, limit = 0, [], vector.numel() // 8
    scratch = Scratch(1, vector)
    for part in parts(vector.numel()):
        block = torch.abs(vector[part], out=scratch.rows(part)[0]).numpy()
        under = block < low
        below += int(np.count_nonzero(under))
        within.append(block[~under & (block <= high)])
        limit -= len(within[-1])
        if limit < 0:
            return None
    candidates = np.concatenate(within)
    if not 0 <= rank - below < len(candidates):
        return None
    return float(np.partition(candidates, rank - below)[rank - below])


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """The vectors' inner products in float64, [k, k] on the CPU."""
    size, count = vectors[0].numel(), len(vectors)
    total = torch.zeros(count, count, dtype=torch.float64)
    space = Scratch(count, vectors[0].new_empty(min(BLOCK, size), dtype=torch.float64))
    for part in parts(size):
        stack = space.stack(part)
        for row, vector in zip(stack, vectors, strict=True):
            row.copy_(vector[part])
        total += (stack @ stack.T).cpu()
    return total


def sort_rows(rows: Sequence[Tensor], low: Tensor) -> list[Tensor]:
    """Sort blocks against each other, element by element: Batcher's merge exchange network (Knuth 5.2.2, algorithm M).

    Minima and maxima of whole blocks need no branch per element. `low` is a scratch block; it and those of `rows` trade
    places. Returns the sorted blocks, smallest first.
    """
    rows = list(rows)
    count = len(rows)
    top = 1 << max(0, (count - 1).bit_length() - 1)
    step = top
    while step > 0:
        q, r, d = top, 0, step
        while True:
            for i in range(count - d):
                if i & step == r:
                    torch.minimum(rows[i], rows[i + d], out=low)
                    torch.maximum(rows[i], rows[i + d], out=rows[i + d])
                    rows[i], low = low, rows[i]
            if q == step:
                break
            d, q, r = q - step, q >> 1, step
        step >>= 1
    return rows
