"""An audit of our DP-SGD by canaries, in one run: a lower bound on ε that the claimed one must not fall below.

Steinke, Nasr and Jagielski 2023 (arXiv:2305.08846): each of m canaries, images with a wrong label, is put among the
records or not by a fair coin; the party tunes; the auditor sees the task vector and guesses r of the coins. Under
(ε, δ)-DP each guess is right with a probability of at most e^ε / (1 + e^ε), but for δ: so many right guesses rule a
small ε out. With all of them right the bound, at 95 %, is still at most 1.05 (r = 10), 3.49 (100) or 5.81 (1000).

The auditor knows all but the coins: the base, the settings, the canaries, the other records and the head.

Before it, the noise itself is audited: two releases of one round, of data that differ in one record, must differ by two
independent noises. If they share noise their difference is the record, whatever ε is claimed.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from atm_fl.errors import SettingError
from atm_fl.federation.client import Party
from atm_fl.privacy.budget import Account, Budget
from atm_fl.privacy.dp_sgd import clip_factors, record_gradients, sampling_rate
from atm_fl.privacy.noise import Noise
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tasks import Split

CONFIDENCE = 0.95
PART = 32
"""Records whose gradients are made at a time."""
RUN = "0" * 16
"""The id of the one run that is audited."""
SHARED = 0.5
"""Distance in units of two independent noises below which releases share noise."""


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The most that (ε, δ)-DP lets the chance of so many correct guesses be (the paper's Corollary 5.4, Appendix D)."""
    from scipy.stats import binom

    right = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, right))
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))  # P[v > B ≥ v − i], i = 1, 2, …
    alpha = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, beta + 2 * canaries * delta * alpha)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest ε, to 1e-6 from below, that so many correct guesses rule out at `confidence`; 0 if none."""
    low, high = 0.0, 1.0
    if p_value(canaries, guesses, correct, low, delta) >= 1 - confidence:
        return 0.0
    while p_value(canaries, guesses, correct, high, delta) < 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class Audit:
    """One audit: the claimed ε, the lower bound on the true one, and the guesses behind it."""

    claimed: float
    bound: float
    correct: int
    guesses: int


def audit(settings: Settings, task: str, canaries: int, guesses: int, silent: bool = False) -> Audit:
    """Audit one round of a party's DP-SGD, through the path that every run takes, with a ledger of its own.

    silent: switch the noise off behind the accountant's back, which the audit must find out. SettingError for settings
    without a finite ε, or more canaries than the task has records.
    """
    if not settings.dp_sgd or not (settings.dp_noise or settings.dp_epsilon):
        raise SettingError("the audit needs a claim: set privacy='dp-sgd' and dp-epsilon or dp-noise")
    if not 2 <= guesses <= canaries:
        raise SettingError(f"--guesses {guesses}: it must be at least 2 and at most --canaries {canaries}")
    party = Party(settings, task)
    if canaries > len(party.tuned_on):
        raise SettingError(f"--canaries {canaries}: {party.task} has only {len(party.tuned_on)} records")
    random = torch.Generator().manual_seed(derive_seed(settings.seed, "canaries", party.task))
    order = torch.randperm(len(party.tuned_on), generator=random)
    chosen, others = party.tuned_on.take(order[:canaries]), party.tuned_on.take(order[canaries:])
    classes = len(party.data.classes)
    wrong = torch.randint(1, classes, (canaries,), generator=random).to(chosen.labels.device)
    chosen = Split(chosen.images, (chosen.labels + wrong) % classes)
    coins = torch.rand(canaries, generator=random) < 0.5
    tossed = chosen.take(coins.nonzero()[:, 0].to(chosen.labels.device))
    data = _joined(others, tossed)

    base = party.model.pretrained
    party.model.load(base)
    known, canary = _sum(party, others), _gradients(party, chosen)
    with tempfile.TemporaryDirectory() as folder:
        release = Budget(settings, party.task, data, Account(Path(folder))).spend(RUN, 1, base)
    multiplier = 0.0 if silent else release.noise.multiplier
    noise = Noise(multiplier, release.noise.key)
    vector, tuned = party.model.tune(base, party.head, data, settings, settings.seed, noise=noise)
    rate = sampling_rate(len(data), settings)
    scores = inclusion(vector, known, canary, multiplier * settings.dp_clip / (rate * math.sqrt(tuned.steps)))
    ranked = scores.argsort(descending=True)
    ins, outs = ranked[: guesses // 2], ranked[len(ranked) - (guesses - guesses // 2) :]
    correct = int(coins[ins].sum()) + int((~coins[outs]).sum())
    bound = lower_bound(canaries, guesses, correct, settings.dp_delta)
    return Audit(release.numbers["epsilon"], bound, correct, guesses)


def shared_noise(settings: Settings, task: str) -> dict[str, float]:
    """How far apart a round's two releases are if one record is replaced, added or removed, or none at all.

    In units of what two independent noises make of the same data: 1 where noise is independent; 0 for "repeated", the
    same records again, whose release must be the one of before. Everything else is equal: the run, the client, the
    round, the base, the settings, the ledger. SettingError for settings without noise.
    """
    if not settings.dp_sgd or not (settings.dp_noise or settings.dp_epsilon):
        raise SettingError("the audit needs a claim: set privacy='dp-sgd' and dp-epsilon or dp-noise")
    settings = replace(settings, dp_policy="warn")  # of a target ε each release takes the whole
    party = Party(settings, task)
    records, base = party.tuned_on, party.model.pretrained
    if not isinstance(records.images, Tensor) or records.images.ndim != 4:
        raise SettingError("the audit needs a task whose images are in memory: an embedded one or a folder")
    other = Split(255 - records.images[:1], records.labels[:1])
    rest = records.take(slice(1, None))
    neighbours = {
        "replaced": _joined(other, rest),
        "added": _joined(records, other),
        "removed": rest,
        "repeated": records,
    }

    def tuned(data: Split, noise: Noise) -> Tensor:
        party.model.load(base)
        return party.model.tune(base, party.head, data, settings, settings.seed, noise=noise)[0]

    with tempfile.TemporaryDirectory() as folder:

        def release(data: Split) -> Tensor:
            return tuned(data, Budget(settings, party.task, data, Account(Path(folder))).spend(RUN, 1, base).noise)

        first = release(records)
        multiplier = Budget(settings, party.task, records, Account(Path(folder))).noise
        apart = tuned(records, Noise.fresh(multiplier)) - tuned(records, Noise.fresh(multiplier))
        return {change: float((release(data) - first).norm() / apart.norm()) for change, data in neighbours.items()}


def inclusion(vector: Tensor, known: Tensor, canary: Tensor, deviation: float) -> Tensor:
    """How likely each canary is in: the higher the likelier, float64 [m].

    The task vector is taken as −c (known + Σ inᵢ gᵢ + noise) to first order, with `known` [n] the sum of the other
    records' clipped gradients at the base, `canary` [m, n] the canaries', and noise of `deviation` on each element; the
    result is the posterior mean of in − ½ under a Gaussian prior of variance ¼. c is what fits the expected sum best.
    """
    expected = known + canary.sum(0) / 2
    scale = -(vector @ expected) / (expected @ expected)
    residual = -vector / scale - expected
    products = (canary @ canary.T).double()
    ridge = max(4 * deviation**2, 1e-6 * float(products.diagonal().mean()))
    return torch.linalg.solve(products + ridge * torch.eye(len(canary)), (canary @ residual).double())


def _gradients(party: Party, data: Split) -> Tensor:
    """Clipped gradients of each record at the loaded base, float32 [k, n] on the CPU."""
    model, gradients = party.model, []
    for images, labels in data.batches(batch_size=PART):
        of_images = record_gradients(model.module, party.head, model.layout, model.shared, images, labels)
        gradients.append((of_images * clip_factors(of_images, party.settings.dp_clip)[:, None]).cpu())
    return torch.cat(gradients) if gradients else torch.zeros(0, model.layout.size)


def _sum(party: Party, data: Split) -> Tensor:
    """The sum of the records' clipped gradients, float32 [n]."""
    parts = torch.arange(len(data), device=data.labels.device).split(PART)
    return sum((_gradients(party, data.take(chunk)).sum(0) for chunk in parts), torch.zeros(party.model.layout.size))


def _joined(one: Split, other: Split) -> Split:
    """Both splits as one. SettingError for images that are not in memory."""
    try:
        return one.followed_by(other)
    except TypeError as error:
        raise SettingError("the audit needs a task whose images are in memory: an embedded one or a folder") from error
