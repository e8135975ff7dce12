"""A party's privacy budget in one run: how much noise, what each round costs, and when to stop."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor

from atm_fl import tasks, vectors
from atm_fl.errors import RunError
from atm_fl.privacy.accounting import Ledger, Spent, calibrate, epsilon
from atm_fl.privacy.dp_sgd import party_secret, sampling_rate, steps_per_round
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tasks import Split


class Budget:
    """The noise multiplier σ of `noise`, and the ledger of the data's records.

    With a target `dp-epsilon` σ is such that all rounds of the run, of the task's participation, cost no more.

    ledgers: the folder of the ledger, by default this machine's. An attack that rehearses runs has its own: nobody is
    sent what comes of them, so that they cost the records nothing, and the run itself may have spent its ε.
    """

    def __init__(self, settings: Settings, task: str, data: Split, ledgers: Path | None = None) -> None:
        self.settings, self.task = settings, task
        rounds = sum(settings.part_taken(task, number) > 0 for number in range(1, settings.rounds + 1))
        self._rate, self._steps = sampling_rate(len(data), settings), steps_per_round(len(data), settings)
        self.noise = settings.dp_noise
        if settings.dp_epsilon:
            self.noise = calibrate(settings.dp_epsilon, settings.dp_delta, self._rate, self._steps * rounds)
        self._run = _digest(task, settings.decisive())
        self.ledger = Ledger((ledgers or tasks.cache_dir() / "privacy") / f"{_digest(*data.digests)}.json")

    def spend(self, round_number: int, base: Tensor) -> tuple[int, dict[str, float]]:
        """Enter a round on `base`: (the secret seed of its random numbers, what was spent).

        RunError, with `dp-policy` "stop" and nothing entered, if the run's ε would pass `dp-epsilon`. The seed depends
        on the base, so that noise drawn twice for one round on other bases cannot be subtracted.
        """
        settings, delta = self.settings, self.settings.dp_delta
        occasion = _digest(round_number, vectors.digest(base), self.noise)
        spent = Spent(self._rate, self.noise, self._steps)
        after = self.ledger.preview(self._run, occasion, spent)
        total = epsilon(after, delta)
        if settings.dp_epsilon and total > settings.dp_epsilon and settings.dp_policy == "stop":
            raise RunError(
                f"{self.task}: round {round_number} would bring its ε to {total:.3f}, over dp-epsilon="
                f"{settings.dp_epsilon:g}; end here, or set dp-policy=warn to go on ({self.ledger.path})"
            )
        self.ledger.add(self._run, occasion, spent)
        numbers = {
            "epsilon": total,
            "epsilon_rdp": epsilon(after, delta, "rdp"),
            "epsilon_data": epsilon(self.ledger.history(), delta),
            "noise": self.noise,
        }
        return derive_seed(party_secret(tasks.cache_dir()), self._run, occasion), numbers


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
