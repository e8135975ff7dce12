"""ATM as a plain loop: no Flower, no processes, no network. The reference that the other runtimes must equal."""

from __future__ import annotations

import time
from contextlib import closing

from atm_fl.merging import make_merge
from atm_fl.party import Party, Update
from atm_fl.report import write_report
from atm_fl.runs import Run
from atm_fl.settings import Settings
from atm_fl.vectors import Spill


class Round:
    """The server's side of one round, without any transport: take in updates in the order of the tasks, then merge.

    Holds the merge's own memory and one update at a time; the vectors that the cosines need are spilled to disk.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.number = run.rounds_done + 1
        self._merge = make_merge(run.settings.merge, scaling=run.settings.scaling)
        self._spill = Spill(run.directory)
        self._begin = time.perf_counter()

    def add(self, task: str, update: Update, **more: float) -> None:
        """Record what a party measured and fold its vector into the merge."""
        self.run.record("evaluation", self.number - 1, task=task, **update.evaluation)
        self.run.record("tuning", self.number, task=task, **update.tuning, **more)
        self._spill.add(task, update.vector)
        self._merge.add(task, update.vector)

    def close(self, failures: dict[str, str] | None = None) -> None:
        """Merge, move the base, write the checkpoint and the round's line."""
        step = self._merge.result()
        gram = self._spill.gram()
        self._spill.close()
        norms = gram.diagonal().sqrt().clamp_min(1e-30)
        self.run.record(
            "merge",
            self.number,
            norm=float(step.norm()),
            tasks=self._spill.names,
            cosines=[[round(value, 6) for value in row] for row in (gram / norms.outer(norms)).tolist()],
            seconds=time.perf_counter() - self._begin,
            failures=failures or {},
        )
        self.run.advance(step)


def run_loop(settings: Settings) -> Run:
    """Run the settings to their end in this process and write the report. Returns the finished run."""
    with closing(Run(settings)) as run:
        parties = [Party(settings, name) for name in settings.task_names]
        while run.rounds_done < settings.rounds:
            current = Round(run)
            for party in parties:
                current.add(party.task, party.train(run.base, current.number))
            current.close()
        for party in parties:
            accuracies = party.evaluate(run.base, ("validation", "test"))
            run.record("evaluation", run.rounds_done, task=party.task, **accuracies)
    write_report(run.directory)
    return run
