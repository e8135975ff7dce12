"""ATM as a plain loop: no Flower, no processes, no network. The reference that the other runtimes must equal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing

from atm_fl.blocks import gram
from atm_fl.codecs import size_of
from atm_fl.party import Party, Update
from atm_fl.report import write_report
from atm_fl.runs import Run
from atm_fl.scaling import scale_layers
from atm_fl.settings import Settings
from atm_fl.vectors import Spill


class Round:
    """The server's side of one round, without any transport: take in updates, then merge in the order of the tasks.

    Holds one update at a time: the vectors are spilled to disk and read back block by block, by the merge and for
    their cosines, whatever the number of clients.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.number = run.rounds_done + 1
        self._scalings = run.settings.task_scalings
        self._spill = Spill(run.directory)
        self._begin = time.perf_counter()

    def add(self, task: str, update: Update, bytes_down: int) -> None:
        """Decode a party's vector and keep it, and record what the party measured. Its arrays may be changed.

        bytes_down: what it was sent. ValueError, before anything is recorded, for arrays that are no vector.
        """
        if update.arrays is None:
            if update.evaluation:
                self.run.record("evaluation", self.number - 1, task=task, **update.evaluation, bytes_down=bytes_down)
            return
        begin = time.perf_counter()
        vector = self.run.settings.uplink.decode(update.arrays, self.run.layout)
        costs = {"seconds_decode": time.perf_counter() - begin}
        costs |= {"bytes_up": size_of(update.arrays), "bytes_down": bytes_down}
        if update.evaluation:
            self.run.record("evaluation", self.number - 1, task=task, **update.evaluation)
        self.run.record("tuning", self.number, task=task, **update.tuning, **costs)
        budget, spent = self.run.settings.dp_epsilon, update.tuning.get("epsilon", 0.0)
        if budget and spent > budget:
            self.run.record("warning", self.number, text=f"{task}: its ε is {spent:.3f}, over dp-epsilon={budget:g}")
        self._spill.add(task, vector.mul_(self._scalings.get(task, 1.0)))

    def close(self, failures: dict[str, str] | None = None) -> None:
        """Merge, move the base, write the checkpoint and the round's line."""
        settings, layout, spilled = self.run.settings, self.run.layout, self._spill.vectors()
        # A client that had to ask for the base answers late; the order of a sum decides its last bits.
        vectors = {task: spilled[task] for task in settings.party_names if task in spilled}
        begin = time.perf_counter()
        merged = settings.make_merge(layout, self.number).combine(vectors)
        merged = scale_layers(merged, layout, settings.layer_scalings)
        seconds_merge = time.perf_counter() - begin
        products = gram(list(vectors.values()))
        self._spill.close()
        norms = products.diagonal().sqrt().clamp_min(1e-30)
        self.run.record(
            "merge",
            self.number,
            norm=float(merged.norm()),
            tasks=list(vectors),
            cosines=[[round(value, 6) for value in row] for row in (products / norms.outer(norms)).tolist()],
            seconds_merge=seconds_merge,
            seconds=time.perf_counter() - self._begin,
            failures=failures or {},
        )
        self.run.advance(merged)


def run_loop(settings: Settings, parties: Sequence[Party] | None = None) -> Run:
    """Run the settings to their end in this process and write the report. Returns the finished run.

    parties: those of the settings by default; an experiment may hand over others, in whatever order they are to act.
    """
    with closing(Run(settings)) as run:
        parties = parties or [Party(settings, name) for name in settings.task_names]
        while run.rounds_done < settings.rounds:
            current = Round(run)
            for party in parties:
                current.add(party.task, party.train(run.base, current.number, run.id), run.bytes_down)
            current.close()
        for party in parties:
            accuracies = party.evaluate(run.base, ("validation", "test"))
            run.record("evaluation", run.rounds_done, task=party.task, **accuracies, bytes_down=run.bytes_down)
    write_report(run.directory)
    return run
