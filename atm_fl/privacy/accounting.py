"""How much of its privacy budget a party has spent: (ε, δ) of everything that DP-SGD did on its records.

Accounting is dp-accounting's: privacy loss distributions (PLD, tight), and Rényi DP (RDP, looser) beside it, both for
Poisson-sampled Gaussian mechanisms under adding or removing one record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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
    from scipy.optimize import brentq

    def above(log_noise: float, accountant: str = "pld") -> float:
        return math.log(epsilon([Spent(rate, math.exp(log_noise), steps)], delta, accountant) / target)

    least, most = math.log(LEAST_NOISE), math.log(1000)
    if above(most) > 0:
        raise SettingError(f"dp-epsilon={target:g}: no noise reaches it in {steps} steps at dp-delta={delta:g}")
    # RDP takes milliseconds and never too little noise; PLD takes seconds, the more the less noise there is.
    high = most if above(most, "rdp") > 0 else _first(lambda log_noise: above(log_noise, "rdp") <= 0, least, most)
    while above(high) > 0:  # PLD's own rounding, where both are all but the same
        high += 1e-3
    low = high
    while low > least and above(low) <= 0:
        high, low = low, max(least, low - 0.3)
    if above(low) <= 0:
        return LEAST_NOISE
    found = brentq(above, low, high, xtol=3e-4)
    while above(found) > 0:
        found += 3e-4
    return math.exp(found)


def _first(holds: Callable[[float], bool], low: float, high: float) -> float:
    """From above, to 1e-3, the least value in [low, high] at which `holds`, as it does from there on."""
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
