"""The kinds of merges: how they go through the vectors. A merge says only what is its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atm_fl.merging import Merge
from atm_fl.vectors import Layout
from atm_fl.vectors.blocks import Block, Scratch, blocks, empty, in_parallel, inner_products, stretches
from atm_fl.vectors.mapped import MappedVectors

Change = Callable[[Tensor, Block, Tensor], Tensor]
"""(elements, where they are, scratch blocks [k, w]) → the changed elements, in scratch. Several threads may call it."""

Pieces = Callable[[Block, Tensor], object]
"""(where, target [w]) → fill the target with a block of the merged vector. Several threads may call it."""


@dataclass(kw_only=True)
class Streaming(Merge):
    """scaling · Σ wₜ f(τₜ) / Σ wₜ, or without the division where the paper has a plain sum (`average = False`).

    Each vector is folded into one running sum and dropped, so that memory does not grow with their number. With all
    vectors at hand the sum is taken block by block, and each is read from memory once. Sums are in the order of the
    vectors; the same order gives the same bits.
    """

    surveys: ClassVar[bool] = True
    average: ClassVar[bool] = True
    """Whether the sum is divided by the weights'."""
    scratch: ClassVar[int] = 2
    """Blocks that a change may use."""

    def change(self, task: str, vector: Tensor) -> Change | None:
        """f for one vector, with what it must know of the whole of it; None: the vector as it is."""
        return None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, task: str, vector: Tensor, weight: float = 1.0) -> None:
        self._check_vector(task, vector)
        vector = self._widened(vector)
        fresh = self._sum is None
        if self._sum is None:
            self._sum = empty(self.layout.size, vector)
        fold(self._sum, [vector], [weight], self.layout, [self.change(task, vector)], fresh, self.scratch)
        self._weight += weight

    def result(self) -> Tensor:
        if self._sum is None:
            raise ValueError("a merge needs at least one task vector")
        total, weight = self._sum, self._weight
        self._sum, self._weight = None, 0.0
        return self._rounded(total.mul_(self.scaling / weight if self.average else self.scaling))

    def pieces(self, tasks: Sequence[str], vectors: Sequence[Tensor]) -> Pieces:
        """What `add` and `result` make, block by block where it is asked for."""
        changes = [self.change(task, vector) for task, vector in zip(tasks, vectors, strict=True)]
        factor = self.scaling / len(vectors) if self.average else self.scaling
        scratch, ones = Scratch(self.scratch, vectors[0]), [1.0] * len(vectors)

        def work(block: Block, target: Tensor) -> None:
            fold_block(target, block, vectors, ones, changes, True, scratch[block.elements])
            target.mul_(factor)

        return work

    def sum_factor(self, count: int) -> float:
        """λ / T or λ: all that there is to a merge without a `change` of single vectors."""
        return self.scaling / count if self.average else self.scaling

    def from_sum(self, scaled: Tensor, count: int, rounding: float = 0.0) -> Tensor:
        return scaled

    def _combine(self, vectors: Mapping[str, Tensor], weights: Mapping[str, float], out: Tensor | None) -> Tensor:
        factor = self.scaling / sum(weights[task] for task in vectors) if self.average else self.scaling
        total = self._memory(next(iter(vectors.values())), out)
        changes = [self.change(task, vector) for task, vector in vectors.items()]
        coefficients = [factor * weights[task] for task in vectors]
        fold(total, list(vectors.values()), coefficients, self.layout, changes, True, self.scratch)
        return total


def fold(
    total: Tensor,
    vectors: Sequence[Tensor],
    coefficients: Sequence[float],
    layout: Layout,
    changes: Sequence[Change | None] | None = None,
    fresh: bool = True,
    count: int = 1,
) -> None:
    """total ← Σ cₜ f(τₜ), or total + Σ cₜ f(τₜ) unless `fresh`, in one pass; each f has `count` scratch blocks."""
    changes = changes or [None] * len(vectors)
    scratch = Scratch(count, total)

    def work(stretch: list[Block]) -> None:
        for block in stretch:
            fold_block(total[block.elements], block, vectors, coefficients, changes, fresh, scratch[block.elements])

    in_parallel(work, stretches(blocks(layout)), total.device)


def fold_block(
    target: Tensor,
    block: Block,
    vectors: Sequence[Tensor],
    coefficients: Sequence[float],
    changes: Sequence[Change | None],
    fresh: bool,
    scratch: Tensor,
) -> None:
    """`fold` of one block, into `target` [w]."""
    for vector, coefficient, change in zip(vectors, coefficients, changes, strict=True):
        changed = change(vector[block.elements], block, scratch) if change else vector[block.elements]
        if fresh:
            torch.mul(changed, coefficient, out=target)
        else:
            target.add_(changed, alpha=coefficient)
        fresh = False


@dataclass(kw_only=True)
class BatchMerge(Merge):
    """A merge that needs all vectors at once. Added one by one, they are spilled to a temporary file and mapped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._spill: MappedVectors | None = None
        self._device = torch.device("cpu")

    def add(self, task: str, vector: Tensor, weight: float = 1.0) -> None:
        self._check_vector(task, vector)
        self._check_weights({task: weight})
        self._spill = self._spill or MappedVectors()
        self._spill.add(task, self._widened(vector))
        self._device = vector.device

    def result(self) -> Tensor:
        if self._spill is None:
            raise ValueError("a merge needs at least one task vector")
        spill, self._spill = self._spill, None
        vectors = {task: vector.to(self._device) for task, vector in spill.vectors().items()}
        spill.close()
        dtype, self._dtype = self._dtype, None
        return self.combine(vectors).to(dtype)

    def _combine(self, vectors: Mapping[str, Tensor], weights: Mapping[str, float], out: Tensor | None) -> Tensor:
        self._check_weights(weights)
        return self.joined(list(vectors), list(vectors.values()), out)

    @abstractmethod
    def joined(self, tasks: Sequence[str], vectors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The merged vector, scaling included; in the memory `out` if it is given (or `combine` copies it there)."""

    def _check_weights(self, weights: Mapping[str, float]) -> None:
        for task, weight in weights.items():
            if weight != 1:
                raise ValueError(f"{task}: weight={weight}: this merge is not defined for weights other than 1")


ROWS = 3
"""Single rows of scratch that every `Elementwise` merge may use."""


@dataclass(kw_only=True)
class Elementwise(BatchMerge):
    """A merge of each element by itself, given what `prepare` found out about the whole vectors."""

    scratch: ClassVar[int] = 0
    """Stacks that `block` may use beside its own."""

    def prepare(self, tasks: Sequence[str], vectors: Sequence[Tensor]) -> None:
        """Look at the whole vectors before the blocks come."""

    def take(self, number: int, changed: Tensor, block: Block, row: Tensor) -> None:
        """Put one block of the task `number` into its `row` of the stack, as it is or changed already."""
        row.copy_(changed)

    @abstractmethod
    def block(self, stack: Tensor, block: Block, scratch: Tensor) -> Tensor:
        """The merged block [w], without scaling, of `stack` [T, w]: a block of every task, which may be altered.

        scratch: [k T + ROWS, w], k as the class says. Several threads may call it.
        """

    def joined(self, tasks: Sequence[str], vectors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        piece = self.pieces(tasks, vectors)
        total = self._memory(vectors[0], out)

        def work(stretch: list[Block]) -> None:
            for block in stretch:
                piece(block, total[block.elements])

        in_parallel(work, stretches(blocks(self.layout, len(vectors))), total.device)
        return total

    def pieces(self, tasks: Sequence[str], vectors: Sequence[Tensor]) -> Pieces:
        """The merged vector, block by block (of `blocks(layout, len(vectors))`) where it is asked for."""
        self.prepare(tasks, vectors)
        count = len(vectors)
        scratch = Scratch((1 + self.scratch) * count + ROWS, vectors[0], count)

        def work(block: Block, target: Tensor) -> None:
            stack, spare = scratch[block.elements].tensor_split([count])
            for number, (row, vector) in enumerate(zip(stack, vectors, strict=True)):
                self.take(number, vector[block.elements], block, row)
            torch.mul(self.block(stack, block, spare), self.scaling, out=target)

        return work


@dataclass(kw_only=True)
class LinearCombination(BatchMerge):
    """scaling · Σ cₜ τₜ with coefficients that follow from the vectors' inner products alone."""

    surveys: ClassVar[bool] = True

    @abstractmethod
    def coefficients(self, tasks: Sequence[str], products: Tensor) -> Tensor:
        """c, float64 [k], from the inner products, float64 [k, k]."""

    def joined(self, tasks: Sequence[str], vectors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        coefficients = self.scaling * self.coefficients(tasks, inner_products(vectors))
        total = self._memory(vectors[0], out)
        fold(total, vectors, coefficients.tolist(), self.layout)
        return total

    def pieces(self, tasks: Sequence[str], vectors: Sequence[Tensor]) -> Pieces:
        """The merged vector, block by block where it is asked for."""
        coefficients = (self.scaling * self.coefficients(tasks, inner_products(vectors))).tolist()
        nothing, unused = [None] * len(vectors), torch.empty(0)
        return lambda block, target: fold_block(target, block, vectors, coefficients, nothing, True, unused)


@dataclass(kw_only=True)
class TensorWise(BatchMerge):
    """A merge of each entry of the layout (a weight matrix, a bias) by itself."""

    def work(self, shape: tuple[int, ...]) -> float:
        """About how much longer an entry of this shape takes than one of another."""
        return float(math.prod(shape))

    @abstractmethod
    def entry(self, name: str, tensors: list[Tensor]) -> Tensor:
        """The merged entry, without scaling, from every task's, in the entry's own shape."""

    def joined(self, tasks: Sequence[str], vectors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        return self.each(vectors, self.entry, out)

    def each(
        self, vectors: Sequence[Tensor], entry: Callable[[str, list[Tensor]], Tensor], out: Tensor | None = None
    ) -> Tensor:
        """`scaling` times what `entry` makes of every entry of the vectors."""
        total = self._memory(vectors[0], out)
        views = [self.layout.views(vector.contiguous()) for vector in vectors]
        targets = self.layout.views(total)

        def work(name: str) -> None:
            torch.mul(entry(name, [view[name] for view in views]), self.scaling, out=targets[name])

        # An eigendecomposition hardly gains from a second core, two at a time do. Largest first, to end together.
        in_parallel(work, sorted(targets, key=lambda name: -targets[name].numel()), total.device)
        return total
