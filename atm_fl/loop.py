"""ATM as a plain loop: no Flower, no processes, no network. The reference that the other runtimes must equal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atm_fl.blocks import empty, gram, parts
from atm_fl.bounds import too_long
from atm_fl.codecs import Arrays, size_of
from atm_fl.errors import RunError
from atm_fl.merging.kinds import fold
from atm_fl.party import Party, Update
from atm_fl.privacy import client_level
from atm_fl.privacy.ring import WORD, check_words
from atm_fl.report import write_report
from atm_fl.runs import Run, told_if_full
from atm_fl.scaling import scale_layers
from atm_fl.settings import Settings
from atm_fl.vectors import Spill


class Apart:
    """A round's vectors, each by itself, to be merged in the order of the tasks.

    Holds one at a time: they are spilled to disk and read back block by block, by the merge and for their cosines,
    whatever the number of clients. Several clients of one task are averaged first, weighted by the images that each
    says it tuned on, and the task then counts in the merge as any other.
    """

    def __init__(self, run: Run) -> None:
        self._settings, self._layout = run.settings, run.layout
        self._scalings = run.settings.task_scalings
        self._spill = Spill(run.directory)
        self._images: dict[str, float] = {}
        self.norms: dict[str, float] = {}
        """Of the vectors as they arrived, by client; those that were left out are not there."""
        self._room: Tensor | None = empty(run.layout.size, run.base)  # costs nothing before it is written to

    def decode(self, arrays: Arrays) -> Tensor:
        """The vector that arrived, until the next is decoded. ValueError if it is none."""
        return self._settings.uplink.decode(arrays, self._layout, self._room)

    def add(self, client: str, vector: Tensor, images: float) -> None:
        """Keep a decoded vector, which may be changed."""
        self.norms[client] = float(gram([vector])) ** 0.5
        vector.mul_(self._scalings.get(self._settings.task_of[client], 1.0))
        if self._settings.dp_client_clip:
            client_level.clip(vector, self._settings.dp_client_clip)
        self._spill.add(client, vector)
        self._images[client] = images

    def drop(self, client: str) -> None:
        """Leave a vector that was kept out of the merge."""
        del self.norms[client]

    def merge(self, round_number: int) -> tuple[Tensor, dict[str, Any]]:
        """The merged vector, and what is recorded beside it. Once."""
        self._room = None
        settings = self._settings
        spilled = {client: vector for client, vector in self._spill.vectors().items() if client in self.norms}
        begin = time.perf_counter()
        # Replies come in any order, and the order of a sum decides its last bits.
        clients: dict[str, list[str]] = {task: [] for task in settings.held_tasks}
        for client in settings.party_names:
            clients[settings.task_of[client]] += [client] if client in spilled else []
        vectors = {
            task: mean([spilled[name] for name in those], [self._images[name] for name in those])
            for task, those in clients.items()
            if those
        }
        merge = settings.make_merge(self._layout, round_number)
        private: dict[str, float] = {}
        if settings.dp_client_noise:
            factor = merge.sum_factor(len(vectors))
            total = empty(self._layout.size, next(iter(vectors.values())))
            fold(total, list(vectors.values()), [factor] * len(vectors), self._layout)
            private["epsilon"] = client_level.add_noise(total, factor, settings, round_number)
            merged = merge.from_sum(total, len(vectors))
        else:
            merged = merge.combine(vectors)
        seconds = time.perf_counter() - begin
        products = gram(list(vectors.values()))
        self._spill.close()
        norms = products.diagonal().sqrt().clamp_min(1e-30)
        cosines = [[round(value, 6) for value in row] for row in (products / norms.outer(norms)).tolist()]
        beside = {"tasks": list(vectors), "cosines": cosines, "seconds_merge": seconds, **private}
        return merged, beside | {"usual_norm": median(self.norms.values())}


class Together:
    """The sum of a round's vectors and nothing else, in the ring of secure aggregation; they may be masked."""

    def __init__(self, run: Run) -> None:
        self._settings, self._layout = run.settings, run.layout
        self.words = np.zeros(run.layout.size, WORD)
        """The sum, [n]."""
        self.tasks: list[str] = []
        """Whose vectors are in it."""
        self.norms: dict[str, float] = {}
        """Of their mean, once the sum is unmasked."""

    def decode(self, arrays: Arrays) -> np.ndarray:
        """The words that arrived. ValueError if they are none."""
        if set(arrays) != {"words"}:
            raise ValueError(f"arrays {sorted(arrays)} where ['words'] was expected")
        check_words(arrays["words"], len(self.words))
        return arrays["words"]

    def add(self, task: str, words: np.ndarray, images: float) -> None:
        """Add what was decoded."""
        np.add(self.words, words, out=self.words)
        self.tasks.append(task)

    def merge(self, round_number: int) -> tuple[Tensor, dict[str, Any]]:
        """The merged vector, and what is recorded beside it."""
        begin = time.perf_counter()
        settings, count = self._settings, len(self.tasks)
        private: dict[str, float] = {}
        merge = settings.make_merge(self._layout, round_number)
        factor = merge.sum_factor(count)
        total = settings.ring.decode(self.words, factor)
        if settings.dp_client_noise:
            private["epsilon"] = client_level.add_noise(total, factor, settings, round_number)
        merged = merge.from_sum(total, count, settings.ring.step * (count / 12) ** 0.5)
        tasks = [task for task in settings.party_names if task in self.tasks]
        beside = {"tasks": tasks, "seconds_merge": time.perf_counter() - begin, **private}
        return merged, beside | ({"usual_norm": self.norms["the mean"]} if self.norms else {})


class Round:
    """The server's side of one round, without any transport: take in updates, then merge and move the base."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.number = run.rounds_done + 1
        self.vectors: Any = Together(run) if run.settings.secure_aggregation else Apart(run)
        self._begin = time.perf_counter()

    def add(self, task: str, update: Update, bytes_down: int) -> None:
        """Decode a party's vector and keep it, and record what the party measured. Its arrays may be changed.

        task: the client's name (`Settings.party_names`). bytes_down: what it was sent. ValueError, before anything is
        recorded, for arrays that are no vector or images that are no weight.
        """
        if update.arrays is None:
            if update.evaluation:
                self.run.record("evaluation", self.number - 1, task=task, **update.evaluation, bytes_down=bytes_down)
            return
        begin = time.perf_counter()
        held, images = self.run.settings.task_of[task], update.tuning.get("images", 0)
        if self.run.settings.held_tasks.count(held) > 1 and not 0 < images < math.inf:
            raise ValueError(f"images {images!r}, not the positive number that weighs it within {held}")
        vector = self.vectors.decode(update.arrays)
        costs = {"seconds_decode": time.perf_counter() - begin}
        costs |= {"bytes_up": size_of(update.arrays), "bytes_down": bytes_down}
        if update.evaluation:
            self.run.record("evaluation", self.number - 1, task=task, **update.evaluation)
        self.run.record("tuning", self.number, task=task, **update.tuning, **costs)
        budget, spent = self.run.settings.dp_epsilon, update.tuning.get("epsilon", 0.0)
        if budget and spent > budget:
            self.run.record("warning", self.number, text=f"{task}: its ε is {spent:.3f}, over dp-epsilon={budget:g}")
        self.vectors.add(task, vector, images)

    def out_of_proportion(self) -> dict[str, str]:
        """The clients whose vectors are too long, with the figures; none if the vectors are added up unseen."""
        factor = self.run.settings.proportion
        if not factor or isinstance(self.vectors, Together):
            return {}
        return too_long(self.vectors.norms, self.run.usual_norm, float(gram([self.run.base])) ** 0.5, factor)

    def check_sum(self) -> None:
        """RunError if an unmasked sum, of which no single vector is known, is out of proportion."""
        settings, count = self.run.settings, len(self.vectors.tasks)
        mean = settings.ring.decode(self.vectors.words, 1 / count)
        norms, base = {"the mean": float(gram([mean])) ** 0.5}, float(gram([self.run.base])) ** 0.5
        self.vectors.norms = norms
        if settings.proportion and (told := too_long(norms, self.run.usual_norm, base, settings.proportion)):
            raise RunError(
                f"round {self.number}: the sum of {count} vectors is refused, whoever spoiled it: {told['the mean']}"
            )

    def close(self, failures: dict[str, str] | None = None, costs: dict[str, float] | None = None) -> None:
        """Merge, move the base, write the checkpoint and the round's line, with `costs` in it."""
        settings = self.run.settings
        merged, beside = self.vectors.merge(self.number)
        merged = scale_layers(merged, self.run.layout, settings.layer_scalings)
        beside |= {"seconds": time.perf_counter() - self._begin, "failures": failures or {}, **(costs or {})}
        self.run.usual_norm = max(self.run.usual_norm, beside.get("usual_norm", 0.0))
        self.run.record("merge", self.number, norm=float(merged.norm()), **beside)
        self.run.advance(merged)


def mean(vectors: list[Tensor], weights: list[float]) -> Tensor:
    """The weighted mean of vectors [n]; of a single one itself. Summed in float64, block by block, then rounded."""
    if len(vectors) == 1:
        return vectors[0]
    result = torch.empty_like(vectors[0])
    for part in parts(len(result)):
        total = sum(weight * vector[part].double() for vector, weight in zip(vectors, weights, strict=True))
        result[part] = total / sum(weights)
    return result


def play_round(run: Run, updates: Iterable[tuple[str, Update]]) -> None:
    """One round of a run from its clients' updates, by client, which may be made as they are asked for.

    RunError if an unmasked sum is out of proportion.
    """
    current = Round(run)
    for client, update in updates:
        current.add(client, update, run.bytes_down)
    if run.settings.secure_aggregation:
        current.check_sum()
    current.close()


def run_loop(settings: Settings, parties: Sequence[Party] | None = None) -> Run:
    """Run the settings to their end in this process and write the report. Returns the finished run.

    parties: those of the settings by default; an experiment may hand over others, in whatever order they are to act.
    """
    with told_if_full(Path(settings.run_dir)), closing(Run(settings)) as run:
        named = zip(settings.party_names, settings.task_names, strict=True)
        parties = parties or [Party(settings, task, client=client) for client, task in named]
        while run.rounds_done < settings.rounds:
            number = run.rounds_done + 1
            play_round(run, ((party.client, party.train(run.base, number, run.id)) for party in parties))
        for party in parties:
            accuracies = party.evaluate(run.base, ("validation", "test"))
            run.record("evaluation", run.rounds_done, task=party.client, **accuracies, bytes_down=run.bytes_down)
    write_report(run.directory)
    return run
