"""PCB-Merging."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from atm_fl.merging import merge, option
from atm_fl.merging.kinds import BatchMerge
from atm_fl.merging.sparse import kept
from atm_fl.vectors.blocks import Scratch, empty, parts, ranked_magnitudes


@merge("pcb")
class Pcb(BatchMerge):
    """Weigh each element by its standing within its task and beside the other tasks; drop the low ones.

    Du et al. 2024, "Parameter competition balancing for model merging" (arXiv:2410.02396), equations 1-4: over the n
    elements of a vector, intra_i = Softmax(T · Norm(τ_i ⊙ τ_i)), inter_i = Σ_j Softmax(Norm(τ_i ⊙ τ_j)), both scaled
    to [0, 1] by Norm before the Softmax; β_i = intra_i ⊙ inter_i, set to 0 below its `density` largest elements;
    merged = Σ β_i ⊙ τ_i / Σ β_i, λ = 1. The authors' code differs: it clips the vectors' extremes and takes
    tanh(τ_i Σ_j τ_j) for the second factor.
    """

    density: float = option(0.2, "fraction of each task's elements that is kept", gt=0, le=1)

    def joined(self, tasks: Sequence[str], vectors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        size, count = self.layout.size, len(vectors)
        if size == 0:
            return vectors[0].clone()
        # Norm and Softmax do not change with a vector's length; with elements of at most 1 no product overflows.
        tiny = torch.finfo(vectors[0].dtype).tiny
        lengths = [max(tiny, *(abs(float(end)) for end in vector.aminmax())) for vector in vectors]
        low, high, sums = self._products(vectors, lengths)
        total, weights = self._memory(vectors[0], out).zero_(), empty(size, vectors[0]).zero_()
        with tempfile.NamedTemporaryFile() as file:
            # A third vector, in a mapped file as a joint merge's vectors are.
            scores = torch.from_file(file.name, shared=True, size=size, dtype=total.dtype).to(total.device)
        for number, vector in enumerate(vectors):
            for chunk, rows, (inter, block) in _stacks(vectors, lengths, 2):
                inter.zero_()
                for other, row in enumerate(rows):
                    if other != number:
                        _exponential(rows[number], row, low[number, other], high[number, other], block)
                        # A mean of 1 instead of 1/n, for float32: constant factors of β drop out of the result.
                        inter.add_(block, alpha=float(size / sums[number, other]))
                _exponential(rows[number], rows[number], low[number, number], high[number, number], block)
                inter.add_(block, alpha=float(size / sums[number, number]))
                torch.mul(inter, block.pow_(count), out=scores[chunk]).mul_(float(size / sums[number, count]))
            threshold = ranked_magnitudes(scores, [size - kept(size, self.density)])[0]
            for chunk, (block, keep), _ in _stacks([vector, vector], [1, 1], 0):
                torch.ge(scores[chunk], threshold, out=keep).mul_(scores[chunk])
                weights[chunk].add_(keep)
                total[chunk].addcmul_(keep, block)
        return total.div_(weights.clamp_min_(torch.finfo(total.dtype).tiny)).mul_(self.scaling)

    def _products(self, vectors: Sequence[Tensor], lengths: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Of all τ_i ⊙ τ_j the least, the greatest, and Σ exp(Norm); in the sums' column T Σ exp(T · Norm(τ_i²))."""
        count = len(vectors)
        low = torch.full((count, count), torch.inf, dtype=torch.float64)
        high, sums = -low, torch.zeros(count, count + 1, dtype=torch.float64)
        pairs = [(i, j) for i in range(count) for j in range(i, count)]
        for _, rows, (block,) in _stacks(vectors, lengths, 1):
            for i, j in pairs:
                least, greatest = torch.mul(rows[i], rows[j], out=block).aminmax()
                low[i, j] = low[j, i] = min(float(low[i, j]), float(least))
                high[i, j] = high[j, i] = max(float(high[i, j]), float(greatest))
        for _, rows, (block,) in _stacks(vectors, lengths, 1):
            for i, j in pairs:
                _exponential(rows[i], rows[j], low[i, j], high[i, j], block)
                sums[i, j] = sums[j, i] = sums[i, j] + float(block.sum())
                if i == j:
                    sums[i, count] += float(block.pow_(count).sum())
        return low, high, sums


def _stacks(
    vectors: Sequence[Tensor], lengths: Sequence[float], extra: int
) -> Iterator[tuple[slice, list[Tensor], list[Tensor]]]:
    """(elements, one block of each vector over its length, `extra` scratch blocks), block by block."""
    count = len(vectors)
    scratch = Scratch(count + extra, vectors[0])
    for chunk in parts(vectors[0].numel()):
        rows = list(scratch[chunk])
        for row, vector, length in zip(rows, vectors, lengths, strict=False):
            torch.mul(vector[chunk], 1 / length, out=row)
        yield chunk, rows[:count], rows[count:]


def _exponential(left: Tensor, right: Tensor, low: Tensor, high: Tensor, out: Tensor) -> Tensor:
    """exp(Norm(left ⊙ right)) into `out`, with Norm(x) = (x − low) / (high − low), or 0 where they are equal."""
    span = float(high - low)
    return torch.mul(left, right, out=out).sub_(float(low)).mul_(1 / span if span else 0.0).exp_()
