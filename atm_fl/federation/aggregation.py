"""How a server takes in the vectors of a round: each by itself, or their sum and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atm_fl.codecs import Arrays
from atm_fl.federation.chain import Chain
from atm_fl.merging.kinds import fold
from atm_fl.models.buffers import take_buffers
from atm_fl.runs.past_vectors import PastVectors
from atm_fl.runs.run import Run
from atm_fl.settings import Settings
from atm_fl.transforms import Context
from atm_fl.vectors.blocks import empty, inner_products, l2_norm, parts
from atm_fl.vectors.mapped import MappedVectors
from atm_fl.vectors.ring import WORD

COMPARED = 64
"""Tasks whose vectors' cosines are recorded, evenly chosen of more: all pairs of 1,000 would cost minutes a round."""


class TaskVectorAggregator:
    """A round's vectors, each by itself, to be merged in the order of the tasks.

    Holds one at a time: they are spilled to disk and read back block by block, by the merge and for their cosines,
    whatever the number of clients. Several clients of one task are averaged first, weighted by the images that each
    says it tuned on, and the task then counts in the merge as any other.
    """

    def __init__(self, run: Run) -> None:
        self._settings, self._layout, self._shared_buffers = run.settings, run.layout, run.shared_buffers
        self._chain = Chain(run.settings)
        self._round = run.rounds_done + 1
        self._folder = run.directory
        self._spill = MappedVectors(self._folder)
        self._images: dict[str, float] = {}
        self._buffers: dict[str, Tensor] = {}
        self.norms: dict[str, float] = {}
        """Of the vectors that arrived, by client; those that were left out are not there."""
        self.buffer_norms: dict[str, float] = {}
        """Of the shared buffers that came with them."""
        self._room: Tensor | None = empty(run.layout.size, run.base)  # costs nothing before it is written to

    def decode(self, client: str, arrays: Arrays) -> tuple[Tensor, Tensor]:
        """The vector that arrived, until the next is decoded, and the shared buffers. ValueError if they are none."""
        buffers = take_buffers(arrays, self._shared_buffers)
        return self._chain.decode(arrays, self._context(client), self._room), buffers

    def add(self, client: str, decoded: tuple[Tensor, Tensor], images: float) -> None:
        """Keep what was decoded, which may be changed."""
        vector, self._buffers[client] = decoded
        self.norms[client] = l2_norm(vector)
        self.buffer_norms[client] = l2_norm(self._buffers[client])
        self._spill.add(client, self._chain.bound(vector, self._context(client)))
        self._images[client] = images

    def drop(self, client: str) -> None:
        """Leave a vector that was kept out of the merge."""
        del self.norms[client]

    def _context(self, client: str) -> Context:
        return Context(self._settings, self._layout, self._round, self._settings.task_of[client], client)

    def buffers(self) -> Tensor | None:
        """The shared buffers' mean over the tasks, float32 [b]; None if there are none."""
        if not self._shared_buffers.size:
            return None
        kept = {client: self._buffers[client] for client in self.norms}
        means = list(by_task(kept, self._images, self._settings).values())
        return mean(means, [1.0] * len(means))

    def merge(self) -> tuple[Tensor, dict[str, Any]]:
        """The merged vector, and what is recorded beside it. Once."""
        self._room = None
        settings = self._settings
        spilled = {client: vector for client, vector in self._spill.vectors().items() if client in self.norms}
        begin = time.perf_counter()
        vectors = by_task(spilled, self._images, settings, MappedVectors(self._folder))
        now = vectors
        if settings.replay_vectors:
            past = PastVectors(self._folder, settings)
            past.keep(now, self._round, self._layout)
            vectors = past.beside(now, self._round, self._layout)
        replayed = {"replayed": names} if (names := [task for task in vectors if task not in now]) else {}
        context = Context(settings, self._layout, self._round)
        merged = merge_tasks(vectors, self._chain, context)
        seconds = time.perf_counter() - begin
        beside = {"tasks": list(vectors), **replayed, **_cosines(vectors), "seconds_merge": seconds, **context.numbers}
        self._spill.close()
        return merged, beside | {"usual_norm": median(self.norms.values())}


def _cosines(vectors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is recorded of the cosines of all pairs of vectors [n]; of more than `COMPARED` only of some, and of
    which."""
    names = list(vectors)
    chosen = names if len(names) <= COMPARED else [names[place * len(names) // COMPARED] for place in range(COMPARED)]
    products = inner_products([vectors[name] for name in chosen])
    norms = products.diagonal().sqrt().clamp_min(1e-30)
    cosines = [[round(value, 6) for value in row] for row in (products / norms.outer(norms)).tolist()]
    return {"cosines": cosines} | ({"cosines_of": chosen} if len(chosen) < len(names) else {})


class SecureSumAggregator:
    """The sum of a round's vectors and nothing else, in the ring of secure aggregation; they may be masked."""

    def __init__(self, run: Run) -> None:
        self._settings, self._layout, self._shared_buffers = run.settings, run.layout, run.shared_buffers
        self._chain = Chain(run.settings)
        self._round = run.rounds_done + 1
        self.words = np.zeros(run.base_layout.size, WORD)
        """The sum, [n + b]: of the vectors, and behind them of the shared buffers."""
        self.clients: list[str] = []
        """Whose vectors are in it."""
        self._mean_norm: float | None = None

    def decode(self, client: str, arrays: Arrays) -> np.ndarray:
        """The words that arrived. ValueError if they are none."""
        assert self._chain.ring
        return self._chain.ring.words(arrays, self._layout + self._shared_buffers)

    def add(self, client: str, words: np.ndarray, images: float) -> None:
        """Add what was decoded."""
        np.add(self.words, words, out=self.words)
        self.clients.append(client)

    def mean_norm(self) -> float:
        """Of the unmasked vectors' mean, which is recorded with the round."""
        words = self.words[: self._layout.size]
        self._mean_norm = l2_norm(self._settings.ring.decode(words, 1 / len(self.clients)))
        return self._mean_norm

    def buffers(self) -> Tensor | None:
        """The shared buffers' mean, float32 [b], once the sum is unmasked; None if there are none."""
        words = self.words[self._layout.size :]
        return self._settings.ring.decode(words, 1 / len(self.clients)) if len(words) else None

    def merge(self) -> tuple[Tensor, dict[str, Any]]:
        """The merged vector, and what is recorded beside it. The sum is unmasked."""
        begin = time.perf_counter()
        settings, count = self._settings, len(self.clients)
        merge, context = settings.make_merge(self._layout, self._round), Context(settings, self._layout, self._round)
        factor = merge.sum_factor(count)
        words = self.words[: self._layout.size]
        total = self._chain.total(settings.ring.decode(words, factor), factor, context)
        merged = merge.from_sum(total, count, settings.ring.step * (count / 12) ** 0.5)
        there = set(self.clients)
        clients = [client for client in settings.party_names if client in there]
        beside = {"tasks": clients, "seconds_merge": time.perf_counter() - begin, **context.numbers}
        return merged, beside | ({} if self._mean_norm is None else {"usual_norm": self._mean_norm})


def by_task(
    vectors: Mapping[str, Tensor],
    images: Mapping[str, float],
    settings: Settings,
    spill: MappedVectors | None = None,
) -> dict[str, Tensor]:
    """Each task's vector [n]: the mean of its clients' `vectors`, weighted by the `images` they were tuned on.

    In the order of the settings' tasks and clients: replies come in any, and the order of a sum decides its last bits.
    spill: an empty one that means go to, which are in memory without it; it is closed.
    """
    clients: dict[str, list[str]] = {task: [] for task in settings.client_tasks}
    for client in settings.party_names:
        clients[settings.task_of[client]] += [client] if client in vectors else []
    means = {}
    for task, of_task in clients.items():
        held, weights = [vectors[name] for name in of_task], [images[name] for name in of_task]
        if spill and len(held) > 1:
            for block in mean_blocks(held, weights):
                spill.append(task, block)
            means[task] = held[0]  # its place in the order, until the file can be read
        elif held:
            means[task] = mean(held, weights)
    if spill:
        means |= spill.vectors()
        spill.close()
    return means


def merge_tasks(vectors: dict[str, Tensor], chain: Chain, context: Context) -> Tensor:
    """The merged vector [n] of the tasks' vectors of a round; where the chain has a say on their sum, of that."""
    merge, layout = context.settings.make_merge(context.layout, context.round_number), context.layout
    if not chain.totals:
        return merge.combine(vectors)
    factor = merge.sum_factor(len(vectors))
    total = empty(layout.size, next(iter(vectors.values())))
    fold(total, list(vectors.values()), [factor] * len(vectors), layout)
    return merge.from_sum(chain.total(total, factor, context), len(vectors))


def mean(vectors: list[Tensor], weights: list[float]) -> Tensor:
    """The weighted mean of vectors [n]; of a single one itself. Summed in float64, block by block, then rounded."""
    if len(vectors) == 1:
        return vectors[0]
    result = torch.empty_like(vectors[0])
    for chunk, block in zip(parts(len(result)), mean_blocks(vectors, weights), strict=True):
        result[chunk] = block
    return result


def mean_blocks(vectors: list[Tensor], weights: list[float]) -> Iterator[Tensor]:
    """The same, block by block."""
    total_weight = sum(weights)
    for chunk in parts(len(vectors[0])):
        total = torch.zeros_like(vectors[0][chunk], dtype=torch.float64)
        for vector, weight in zip(vectors, weights, strict=True):
            total += weight * vector[chunk].double()
        yield (total / total_weight).to(vectors[0].dtype)
