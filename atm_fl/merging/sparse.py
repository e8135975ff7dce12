"""Means of task vectors of which only some elements are kept."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from atm_fl.merging import merge, option
from atm_fl.merging.kinds import Change, Streaming
from atm_fl.seeds import derive_seed
from atm_fl.vectors.blocks import Block, all_ranked_magnitudes, in_parallel, ranked_magnitudes


def kept(size: int, density: float) -> int:
    """How many of `size` elements a density keeps: ⌊density · size⌋, but at least one."""
    return max(1, math.floor(round(density * size, 6)))


def largest(vectors: Sequence[Tensor], density: float) -> list[float]:
    """Of each of several vectors of one size, the λ of `hardshrink` for its `kept` largest magnitudes and their equals.

    hardshrink keeps what is above λ.
    """
    size = vectors[0].numel()
    if size == 0:
        return [0.0] * len(vectors)
    number = torch.empty(0, dtype=vectors[0].dtype).numpy().dtype.type
    thresholds = all_ranked_magnitudes(vectors, [size - kept(size, density)])
    return [float(np.nextafter(number(threshold), number(0))) for (threshold,) in thresholds]


@merge("magnitude")
class Magnitude(Streaming):
    """The mean of the task vectors' largest elements: the `density` fraction of each entry by magnitude.

    Pruning by magnitude (Han et al. 2015, arXiv:1506.02626) per tensor, as PEFT's `magnitude_prune` and mergekit do it.
    ⌊density · n⌋ elements of an entry are kept, at least one (PEFT: none of a single element), and all that equal the
    smallest kept.
    """

    density: float = option(0.2, "fraction of each entry that is kept", gt=0, le=1)

    def change(self, task: str, vector: Tensor) -> Change:
        entries = vector.split(self.layout.sizes)
        thresholds = in_parallel(lambda entry: largest([entry], self.density)[0], entries, vector.device)

        def prune(values: Tensor, block: Block, scratch: Tensor) -> Tensor:
            return torch.ops.aten.hardshrink.out(values, thresholds[block.entry], out=scratch[0])

        return prune


@merge("breadcrumbs")
class Breadcrumbs(Streaming):
    """scaling · Σ of the task vectors without each entry's smallest and largest elements.

    Davari and Belilovsky 2023, "Model breadcrumbs" (arXiv:2312.06795), with their λ = 0.3. Of an entry of n elements,
    sorted by magnitude, those from place ⌊β n⌋ up to, but not including, place ⌈γ n⌉ are kept, with all their equals.
    We mask whole entries, as the paper says and mergekit does; the authors' code masks each row of a matrix by itself.
    So the entry of one element is kept, where mergekit up to 0.1.4 refuses it.
    """

    average: ClassVar[bool] = False
    scaling: float = option(0.3, "λ, the factor on the sum")
    beta: float = option(0.85, "fraction of each entry, the smallest, that goes", ge=0, lt=1)
    gamma: float = option(0.993, "fraction of each entry above which the largest go", gt=0, le=1)

    def change(self, task: str, vector: Tensor) -> Change:
        bounds = in_parallel(self._bounds, vector.split(self.layout.sizes), vector.device)

        def mask(values: Tensor, block: Block, scratch: Tensor) -> Tensor:
            low, high = bounds[block.entry]
            kept, largest = scratch
            torch.ops.aten.hardshrink.out(values, low, out=kept)
            return kept.sub_(torch.ops.aten.hardshrink.out(values, high, out=largest))

        return mask

    def _bounds(self, entry: Tensor) -> tuple[float, float]:
        size = len(entry)
        if size == 0:
            return 0.0, 0.0
        last = max(0, math.ceil(round(self.gamma * size, 6)) - 1)
        first = min(math.floor(round(self.beta * size, 6)), last)
        low, high = ranked_magnitudes(entry, [first, last])
        number = torch.empty(0, dtype=entry.dtype).numpy().dtype.type
        return float(np.nextafter(number(low), number(0))), high


class Mask:
    """A random mask of elements that are kept with a probability, the same for a seed wherever and however computed.

    16 random bits decide an element, so that the probability is a multiple of 1/65536; `density` is the exact one.
    """

    def __init__(self, density: float, *seed: object) -> None:
        self._threshold = max(1, min(65536, round(density * 65536)))
        self.density = self._threshold / 65536
        self._seed = derive_seed(*seed)
        self._own = threading.local()

    def draw(self, chunk: slice, out: Tensor) -> Tensor:
        """The mask's elements `chunk`, 1 or 0, into `out`."""
        if self._threshold == 65536:
            return out.fill_(1)
        # A number of 64 bits serves four elements. Each thread has a generator, and leaps to where it is needed.
        if not hasattr(self._own, "random"):
            self._own.random, self._own.position = np.random.PCG64DXSM(self._seed), 0
        first, end = chunk.start // 4, -(-chunk.stop // 4)
        if first != self._own.position:
            self._own.random.advance(first - self._own.position)
        bits = self._own.random.random_raw(end - first).view(np.int16)[chunk.start - 4 * first :][: out.numel()]
        self._own.position = end
        return torch.lt(torch.from_numpy(bits).to(out.device), self._threshold - 32768, out=out)


@merge("dare")
class Dare(Streaming):
    """The mean of the task vectors, of each of which random elements are dropped and the rest scaled up.

    f(τ) = m ⊙ τ / density with m ~ Bernoulli(density): Yu et al. 2024, "Language models are super Mario"
    (arXiv:2311.03099), with their p = 1 − density = 0.9. The rescaling is the paper's and PEFT's; mergekit's default
    rescales to the L1 norm instead.
    """

    surveys: ClassVar[bool] = False
    density: float = option(0.1, "probability that an element is kept (1 − p)", ge=1e-4, le=1)

    def change(self, task: str, vector: Tensor) -> Change:
        mask = Mask(self.density, self.seed, "dare", task)

        def drop(values: Tensor, block: Block, scratch: Tensor) -> Tensor:
            return mask.draw(block.elements, scratch[0]).mul_(values).mul_(1 / mask.density)

        return drop
