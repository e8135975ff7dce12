"""How much of its privacy budget a party has spent: (ε, δ) of everything that DP-SGD did on its records.

Accounting is dp-accounting's: privacy loss distributions (PLD, tight), and Rényi DP (RDP, looser) beside it, both for
Poisson-sampled Gaussian mechanisms under adding or removing one record.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from atm_fl.errors import SettingError
from atm_fl.files import atomic_write, private_folder

RDP_ORDERS = [*range(2, 65), 80, 96, 128, 192, 256, 512]


@dataclass(frozen=True)
class Spent:
    """Steps of DP-SGD that take every record with probability `rate` and add noise of `noise` times the clip."""

    rate: float
    noise: float
    steps: int


def epsilon(history: Iterable[Spent], delta: float, accountant: str = "pld") -> float:
    """ε at `delta` of all of `history` together; infinite if a part of it had no noise. accountant: "pld" or "rdp"."""
    steps: dict[tuple[float, float], int] = {}
    for spent in history:
        steps[spent.rate, spent.noise] = steps.get((spent.rate, spent.noise), 0) + spent.steps
    return _epsilon(tuple(sorted(steps.items())), delta, accountant)


@lru_cache(maxsize=4096)
def _epsilon(steps: tuple[tuple[tuple[float, float], int], ...], delta: float, accountant: str) -> float:
    if not steps:
        return 0.0
    if any(noise == 0 for (_, noise), _ in steps):
        return float("inf")
    from dp_accounting import pld, rdp

    # dp-accounting's default orders include fractions whose series do not converge at high rates.
    counted = pld.PLDAccountant() if accountant == "pld" else rdp.RdpAccountant(RDP_ORDERS)
    for (rate, noise), count in steps:
        counted.compose(_event(rate, noise, count))
    return float(counted.get_epsilon(delta))


def _event(rate: float, noise: float, steps: int) -> Any:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

    return SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)


@lru_cache(maxsize=256)
def calibrate(target: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier (within 0.1 %, from above) at which `steps` steps cost at most ε = `target`.

    SettingError if even a noise of 1,000 times the clip is too little.
    """
    low, high = 0.0, 1.0
    while epsilon([Spent(rate, high, steps)], delta) > target:
        low, high = high, 2 * high
        if high > 1000:
            raise SettingError(f"dp-epsilon={target:g}: no noise reaches it in {steps} steps at dp-delta={delta:g}")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if middle < 0.05 or epsilon([Spent(rate, middle, steps)], delta) > target:
            low = middle
        else:
            high = middle
    return high


class Ledger:
    """The history of one data set's records on its party's disk; it outlives rounds, restarts and runs.

    An entry is what one round of one run did. The same round on the same base with the same settings draws the same
    noise and says the same again: it costs once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, run: str, occasion: str, spent: Spent) -> None:
        """Enter a round. run: the run's settings, digested; occasion: which round, on which base."""
        private_folder(self.path.parent)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            entries = self._read()
            entries.setdefault(run, {})[occasion] = list(astuple(spent))
            with atomic_write(self.path, private=True) as part:
                part.write_text(json.dumps(entries, indent=1))

    def history(self) -> list[Spent]:
        """What was spent by all runs."""
        return [Spent(*values) for own in self._read().values() for values in own.values()]

    def preview(self, run: str, occasion: str, spent: Spent) -> list[Spent]:
        """What one run will have spent when a round is entered."""
        own = self._read().get(run, {}) | {occasion: list(astuple(spent))}
        return [Spent(*values) for values in own.values()]

    def _read(self) -> dict[str, dict[str, list[Any]]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}
