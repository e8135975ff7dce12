"""Passes over long vectors, a block that stays in the processor's cache at a time, and exact selection.

Every pass reads each vector from memory once; what it needs on the way lives in scratch blocks. Blocks never cross the
bounds of a layout's entries, so that a pass can treat each entry in its own way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from atm_fl.vectors.layout import Layout

BLOCK = 1 << 19
"""Elements that one operation works on: few enough to stay in cache, enough to be worth a call from several threads."""

STRETCH = 4
"""Blocks that one thread goes through before it takes the next."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Block(NamedTuple):
    """Where a block is: the number of its entry in the layout, and its elements in the flat vector."""

    entry: int
    elements: slice


def blocks(layout: Layout, rows: int = 1) -> Iterator[Block]:
    """All blocks, in order; shorter ones where operations work on several `rows` at once."""
    start = 0
    for entry, size in enumerate(layout.sizes):
        for chunk in parts(size, rows):
            yield Block(entry, slice(start + chunk.start, start + chunk.stop))
        start += size


def parts(size: int, rows: int = 1) -> Iterator[slice]:
    """The blocks of a vector of `size` elements, in order."""
    width = max(1, BLOCK // rows)
    for start in range(0, size, width):
        yield slice(start, min(start + width, size))


def stretches(all_blocks: Iterable[Item]) -> Iterator[list[Item]]:
    """Successive blocks, some at a time: what one thread does."""
    rest = iter(all_blocks)
    while stretch := list(islice(rest, STRETCH)):
        yield stretch


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item], on: torch.device) -> list[Result]:
    """[work(item) …] in as many threads as torch may use on the CPU, with torch's own parallelism off meanwhile.

    Torch would split each of many thousand short operations among all cores and wait for the last of them every time:
    one core that is late, because something else runs on it, then holds up all, ten times and more. Here nothing
    waits before the end. Which thread does what does not change the result.
    """
    threads = torch.get_num_threads()
    if threads == 1 or on.type != "cpu":
        return [work(item) for item in items]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)


def empty(size: int, like: Tensor) -> Tensor:
    """An uninitialised vector [size] of `like`'s dtype and device."""
    if like.device.type == "cpu":
        # NumPy asks the system for huge pages, torch does not: the first write to a large vector costs half.
        return torch.from_numpy(np.empty(size, torch.empty(0, dtype=like.dtype).numpy().dtype))
    return torch.empty(size, dtype=like.dtype, device=like.device)


class Scratch(threading.local):
    """Blocks [rows, width] that a thread uses again and again: fresh memory would cost more than what is done in it.

    Each thread has its own. A block works on `shared_by` rows at once, and is so much shorter.
    """

    def __init__(self, rows: int, like: Tensor, shared_by: int = 1, dtype: torch.dtype | None = None) -> None:
        width = max(1, min(BLOCK // shared_by, like.numel()))
        self._rows = like.new_empty(rows, width, dtype=dtype or like.dtype)

    def __getitem__(self, chunk: slice) -> Tensor:
        """The rows, as long as `chunk`."""
        return self._rows[:, : chunk.stop - chunk.start]


SHORT = 1 << 18
"""Vectors of up to so many elements are partitioned as a whole."""

WITHIN = 1 << 26
"""Magnitudes that are kept at once to be sorted out: a bound on memory (256 MB) for vectors of any number and size."""


def ranked_magnitudes(vector: Tensor, ranks: Sequence[int]) -> list[float]:
    """The exact order statistics of |vector|: for each rank r (from 0) the r-th smallest magnitude."""
    return all_ranked_magnitudes([vector], ranks)[0]


def all_ranked_magnitudes(vectors: Sequence[Tensor], ranks: Sequence[int]) -> list[list[float]]:
    """`ranked_magnitudes` of each of several vectors of one size, in one pass over all of them.

    Long vectors on the CPU are read once: a sample brackets each rank, and only the few magnitudes within a bracket are
    sorted out. Where the sample misleads, the whole vector is partitioned instead; the answer is exact either way.
    """
    if vectors[0].device.type != "cpu":
        return [[float(torch.kthvalue(vector.abs(), rank + 1).values) for rank in ranks] for vector in vectors]
    wanted, size = sorted(set(ranks)), vectors[0].numel()
    found: list[list[float] | None] = [None] * len(vectors)
    if size > SHORT:
        found = _bracketed(vectors, wanted)

    def ordered(number: int) -> list[float]:
        vector = vectors[number]
        magnitudes = found[number] or (_by_bits(vector, wanted) if size > LONG else None) or _selected(vector, wanted)
        return [magnitudes[wanted.index(rank)] for rank in ranks]

    return in_parallel(ordered, range(len(vectors)), vectors[0].device)


def _selected(vector: Tensor, ranks: Sequence[int]) -> list[float]:
    """The magnitudes of the ascending `ranks`, from the whole vector."""
    magnitudes, rest, below = [], vector[0 : vector.numel()].abs().numpy(), 0
    for rank in ranks:  # one after another: NumPy partitions by several ranks at once five times slower
        rest = np.partition(rest, rank - below)[rank - below :]
        below = rank
        magnitudes.append(float(rest[0]))
    return magnitudes


def _bracketed(vectors: Sequence[Tensor], ranks: Sequence[int]) -> list[list[float] | None]:
    """Each vector's magnitudes of the ascending `ranks`, or None if one does not lie where a sample says it should."""
    size = vectors[0].numel()
    brackets = in_parallel(lambda vector: _brackets(vector, ranks), vectors, vectors[0].device)
    expected = max(sum(bracket.share for bracket in of_vector) for of_vector in brackets) * size
    together = max(1, int(WITHIN // max(1, expected)))
    found: list[list[float] | None] = []
    for first in range(0, len(vectors), together):
        found += _between(vectors[first : first + together], ranks, brackets[first : first + together])
    return found


class Bracket(NamedTuple):
    """Magnitudes between which one of a rank should lie, and about what share of all lies between them."""

    low: float
    high: float
    share: float


def _brackets(vector: Tensor, ranks: Sequence[int]) -> list[Bracket]:
    """Where a sample says that the magnitudes of the ascending `ranks` lie."""
    size = vector.numel()
    # With n^(2/3) samples, sorting them and what they leave to be sorted cost about the same.
    sample = np.abs(vector[:: max(1, int(size ** (1 / 3) / 2))].numpy())
    places = []
    for rank in ranks:
        share = rank / (size - 1)
        place, margin = share * (len(sample) - 1), 5 * (share * (1 - share) * len(sample)) ** 0.5 + 5
        places.append((int(place - margin), int(place + margin)))
    first, count = max(0, places[0][0]), len(sample)
    sample = np.sort(np.partition(sample, first)[first:])
    return [
        Bracket(
            sample[low - first] if low >= first else sample.dtype.type(0),
            sample[high - first] if high < count else sample.dtype.type(np.inf),
            (high - low) / count,
        )
        for low, high in places
    ]


def _between(
    vectors: Sequence[Tensor], ranks: Sequence[int], brackets: Sequence[Sequence[Bracket]]
) -> list[list[float] | None]:
    """What `_bracketed` returns, given its brackets: one pass that counts, and keeps what is within them.

    What equals an end of a bracket is counted, not kept: differences of bfloat16 numbers have few magnitudes.
    """
    size, dtype = vectors[0].numel(), vectors[0][0:0].numpy().dtype
    shape = len(vectors), len(ranks)
    kept: list[list[list[np.ndarray]]] = [[[] for _ in ranks] for _ in vectors]
    room = [min(size // 8, WITHIN)] * len(vectors)
    lock = threading.Lock()

    def count(stretch: list[slice]) -> np.ndarray:
        counts = np.zeros((*shape, 4), np.int64)  # < low, = low, = high, <= high
        for chunk in stretch:
            magnitudes, under, inside = (buffer[: chunk.stop - chunk.start] for buffer in _selection_buffers(dtype))
            for number, vector in enumerate(vectors):
                if room[number] < 0:
                    continue
                np.abs(vector[chunk].numpy(), out=magnitudes)
                for which, (low, high, _) in enumerate(brackets[number]):
                    np.less(magnitudes, low, out=under)
                    np.less_equal(magnitudes, high, out=inside)
                    below, upto = np.count_nonzero(under), np.count_nonzero(inside)
                    values = magnitudes[:0]
                    at_low = at_high = 0
                    if below < upto:
                        np.not_equal(under, inside, out=inside)
                        values = magnitudes[np.flatnonzero(inside)]  # twice as fast as magnitudes[inside]
                        at_low, at_high = int(np.count_nonzero(values == low)), int(np.count_nonzero(values == high))
                        if at_low or at_high:
                            values = values[(values > low) & (values < high)]
                    counts[number, which] += below, at_low, at_high, upto
                    with lock:
                        kept[number][which].append(values)
                        room[number] -= len(values)
        return counts

    counted = sum(in_parallel(count, stretches(parts(size)), vectors[0].device), np.zeros((*shape, 4), np.int64))

    def chosen(number: int) -> list[float] | None:
        found = []
        for which, (rank, (low, high, _)) in enumerate(zip(ranks, brackets[number], strict=True)):
            below, at_low, at_high, upto = counted[number, which].tolist()
            if room[number] < 0 or not below <= rank < upto:
                return None
            pieces, kept[number][which] = kept[number][which], []
            if rank < below + at_low:
                found.append(float(low))
            elif rank >= upto - at_high:
                found.append(float(high))
            else:
                place = rank - below - at_low
                found.append(float(np.partition(np.concatenate(pieces), place)[place]))
        return found

    return [chosen(number) for number in range(len(vectors))]


LONG = 1 << 26
"""Vectors of more elements are never partitioned as a whole: that would take as much memory as they have."""


def _by_bits(vector: Tensor, ranks: Sequence[int]) -> list[float] | None:
    """The magnitudes of the ascending `ranks` of a float32 vector, by counting its upper 16 bits, then its lower.

    The bits of magnitudes are ordered as they are. None if the vector is not float32.
    """
    if vector.dtype != torch.float32:
        return None
    upper = np.zeros(1 << 16, np.int64)
    for chunk in parts(vector.numel()):
        upper += np.bincount(np.abs(vector[chunk].numpy()).view(np.uint32) >> 16, minlength=1 << 16)
    until = np.cumsum(upper)
    halves = [int(np.searchsorted(until, rank, side="right")) for rank in ranks]
    lower = {half: np.zeros(1 << 16, np.int64) for half in halves}
    for chunk in parts(vector.numel()):
        pattern = np.abs(vector[chunk].numpy()).view(np.uint32)
        for half, counts in lower.items():
            counts += np.bincount(pattern[pattern >> 16 == half] & 0xFFFF, minlength=1 << 16)
    buffers = []
    for rank, half in zip(ranks, halves, strict=True):
        inside = rank - int(until[half] - upper[half])
        low = int(np.searchsorted(np.cumsum(lower[half]), inside, side="right"))
        buffers.append(float(np.array(half << 16 | low, np.uint32).view(np.float32)))
    return buffers


_thread = threading.local()


def _selection_buffers(dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """A block of numbers and two of truth values, a thread's own: new ones for each entry would cost half the time."""
    if getattr(_thread, "made_for", None) != (dtype, BLOCK):
        _thread.made_for = dtype, BLOCK
        _thread.buffers = np.empty(BLOCK, dtype), np.empty(BLOCK, bool), np.empty(BLOCK, bool)
    buffers: tuple[np.ndarray, ...] = _thread.buffers
    return buffers


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """The vectors' inner products in float64, [k, k] on the CPU."""
    size, count = vectors[0].numel(), len(vectors)

    scratch = Scratch(count, vectors[0], count, torch.float64)

    def products(stretch: list[slice]) -> Tensor:
        total = vectors[0].new_zeros(count, count, dtype=torch.float64)
        for chunk in stretch:
            stack = scratch[chunk]
            for row, vector in zip(stack, vectors, strict=True):
                row.copy_(vector[chunk])
            total += stack @ stack.T
        return total.cpu()

    sums = in_parallel(products, stretches(parts(size, count)), vectors[0].device)
    return sum(sums, torch.zeros(count, count, dtype=torch.float64))


def l2_norm(vector: Tensor) -> float:
    """‖vector‖ (L2), summed as `inner_products` are."""
    return float(inner_products([vector])) ** 0.5


def sort_rows(stack: Tensor, spare: Tensor) -> list[Tensor]:
    """Sort the rows of `stack` [k, w] against each other, element by element; its contents and `spare`'s [w] are lost.

    Batcher's merge exchange network (Knuth 5.2.2, algorithm M): minima and maxima of whole rows need no branch per
    element. Returns the sorted rows, smallest first.
    """
    rows, low = list(stack), spare
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
