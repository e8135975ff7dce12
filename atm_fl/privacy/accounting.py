"""How much of its privacy budget a party has spent: (ε, δ) of everything that DP-SGD did on its records.

Accounting is dp-accounting's: privacy loss distributions (PLD, tight), and Rényi DP (RDP, looser) beside it, both for
Poisson-sampled Gaussian mechanisms under adding or removing one record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from atm_fl.errors import SettingError

LEAST_NOISE = 0.05
"""Noise multiplier below which ε, above a thousand, is called infinite: accounting would take all memory."""
RDP_ORDERS = [*range(2, 65), 80, 96, 128, 192, 256, 512]


@dataclass(frozen=True)
class Spent:
    """Steps of DP-SGD that take every record with probability `rate` and add noise of `noise` times the clip."""

    rate: float
    noise: float
    steps: int


def epsilon(history: Iterable[Spent], delta: float, accountant: str = "pld") -> float:
    """ε at `delta` of all of `history` together; infinite if a part of it had next to no noise.

    accountant: "pld" or "rdp".
    """
    steps: dict[tuple[float, float], int] = {}
    for spent in history:
        steps[spent.rate, spent.noise] = steps.get((spent.rate, spent.noise), 0) + spent.steps
    return _epsilon(tuple(sorted(steps.items())), delta, accountant)


@lru_cache(maxsize=4096)
def _epsilon(steps: tuple[tuple[tuple[float, float], int], ...], delta: float, accountant: str) -> float:
    if not steps:
        return 0.0
    if any(noise < LEAST_NOISE for (_, noise), _ in steps):
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
        if middle < LEAST_NOISE or epsilon([Spent(rate, middle, steps)], delta) > target:
            low = middle
        else:
            high = middle
    return high
