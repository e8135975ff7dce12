"""A party's privacy budget in one run: how much noise, what each round costs, and when to stop."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from atm_fl import vectors
from atm_fl.errors import RunError, with_figures
from atm_fl.privacy import ledger
from atm_fl.privacy.accounting import Spent, calibrate, epsilon
from atm_fl.privacy.dp_sgd import sampling_rate, steps_per_round
from atm_fl.privacy.ledger import Entry, Holding, Ledger, ledger_path
from atm_fl.privacy.noise import Noise
from atm_fl.settings import Settings
from atm_fl.tasks import Split

OPEN = Spent(1.0, 0.0, 1)
"""What a release without noise costs: ε = ∞."""


@dataclass(frozen=True)
class Release:
    """A round's place in the ledger: the noise to draw, and the numbers that may be told of it."""

    entry: Entry
    noise: Noise
    numbers: dict[str, float]


@dataclass(frozen=True)
class Account:
    """A party's own account of its privacy, over all runs.

    ledgers: the folder of the ledger, None for this machine's. An attack that rehearses runs has its own: nobody is
    sent what comes of them, so that they cost the records nothing. lifetime: the party's own limit on ε over all runs,
    0 for none, at its own δ.
    """

    ledgers: Path | None = None
    lifetime: float = 0.0
    delta: float = 1e-5


class Budget:
    """What a party may release of its records: their ledger, this run's noise multiplier, and both limits on ε.

    With a target `dp-epsilon` σ is such that all rounds of the run, of the task's participation, cost no more.

    source: where the data are from (see Holding), by default the task; client: the party's name in the run.
    """

    def __init__(
        self,
        settings: Settings,
        task: str,
        data: Split,
        account: Account | None = None,
        source: str = "",
        client: str = "",
    ) -> None:
        account = account or Account()
        self.settings, self.task, self.client = settings, task, client or task
        self.lifetime, self.lifetime_delta = account.lifetime, account.delta
        self._rate, self._steps = sampling_rate(len(data), settings), steps_per_round(len(data), settings)
        self.noise = settings.dp_noise
        if settings.dp_epsilon:
            rounds = sum(settings.part_taken(task, number) > 0 for number in range(1, settings.rounds + 1))
            self.noise = calibrate(settings.dp_epsilon, settings.dp_delta, self._rate, self._steps * rounds)
        self._source, self._data = source or task, data
        self._digests = data.digests if settings.dp_sgd else ()
        self.ledger = Ledger(account.ledgers / "ledger.sqlite" if account.ledgers else ledger_path())
        if settings.dp_sgd and (older := self.ledger.path.parent / f"{_digest(*self._digests)}.json").exists():
            with self.ledger.transaction() as file:
                ledger.take_over(file, older, self.holding)

    @cached_property
    def holding(self) -> Holding:
        """The records, each of which is hashed for it."""
        return Holding.of(self._source, self._data)

    def spend(self, run: str, round_number: int, base: Tensor, anew: bool = False) -> Release:
        """Enter a round of DP-SGD on `base`, before anything is tuned.

        The very same round of the same run, client, records and settings on the same base gets the same noise and
        costs once, unless it is to be drawn `anew`; so does nothing else, and nothing outside a run (run ""). RunError,
        with nothing entered, if ε would pass `dp-epsilon` (with `dp-policy` "stop") or the party's lifetime.
        """
        settings, delta = self.settings, self.settings.dp_delta
        occasion = _digest(
            run, self.client, round_number, vectors.digest(base), self._digests, settings.decisive(), self.noise
        )
        spent = Spent(self._rate, self.noise, self._steps)
        with self.ledger.transaction() as file:
            entry = None if anew or not run else ledger.find(file, occasion)
            after = ledger.read_run(file, run, self.client) + ([] if entry else [spent])
            total = epsilon(after, delta)
            if settings.dp_epsilon and total > settings.dp_epsilon and settings.dp_policy == "stop":
                raise with_figures(
                    RunError(
                        f"{self.task}: round {round_number} would bring its ε to {total:.3f}, over dp-epsilon="
                        f"{settings.dp_epsilon:g}; end here, or set dp-policy=warn to go on"
                    ),
                    f"the ledger is {self.ledger.path}",
                )
            if entry is None:
                self._check_lifetime([*ledger.read_history(file, self.holding), spent], f"round {round_number}")
                entry = ledger.enter(file, self.holding, run, self.client, round_number, occasion, spent)
        numbers = {"epsilon": total, "epsilon_rdp": epsilon(after, delta, "rdp"), "noise": self.noise}
        assert entry.key is not None
        return Release(entry, Noise(self.noise, entry.key), numbers)

    def expose(self, run: str) -> None:
        """Enter that this run takes vectors without noise from these records, once; RunError over the lifetime."""
        with self.ledger.transaction() as file:
            if OPEN not in ledger.read_run(file, run, self.client):
                self._check_lifetime([*ledger.read_history(file, self.holding), OPEN], "a run without dp-sgd")
                ledger.enter(file, self.holding, run, self.client, 0, _digest(run, self.client), OPEN)

    def _check_lifetime(self, after: list[Spent], what: str) -> None:
        if self.lifetime and (total := epsilon(after, self.lifetime_delta)) > self.lifetime:
            raise with_figures(
                RunError(
                    f"{self.task}: {what} would bring its ε over all runs over this party's lifetime-epsilon="
                    f"{self.lifetime:g} at δ = {self.lifetime_delta:g}"
                ),
                f"the ε of {self.holding.source} would come to {total:.3f}; the ledger is {self.ledger.path}",
            )


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
