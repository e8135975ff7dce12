"""How much an attack finds: a row of numbers for a scenario, beside what needs no vector."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from atm_fl import tasks
from atm_fl.attacks.labels import class_histogram, histogram_error
from atm_fl.attacks.reconstruction import NoEquation, reconstruct
from atm_fl.attacks.scenario import Scenario, Victim, victims
from atm_fl.attacks.similarity import lpips, paired, psnr, ssim

FOUND = "found"
BASELINES = ("noise", "mean image", "prior only")
MEAN_OF = 256
"""Validation images behind the mean image, at most."""


@dataclass(frozen=True)
class Outcome:
    """Of one party: its images, and those of the attack (`found`) and each baseline, paired with them.

    All float32 [k, 3, s, s] in 0..1. distance: of the found images' vector from the one received. histogram_error: of
    what labels.py finds in the vector, and of the uniform histogram; None without the head.
    """

    truth: Tensor
    images: dict[str, Tensor]
    distance: float | None
    histogram_error: tuple[float, float] | None


def measure_reconstruction(scenario: Scenario, base: Tensor | None = None) -> dict[str, Any]:
    """A row of numbers about the scenario; `base` [n] is the model that is tuned, by default the pretrained one."""
    begin = time.monotonic()
    return summary(scenario, attacked(scenario, base)) | {"seconds": time.monotonic() - begin}


def attacked(scenario: Scenario, base: Tensor | None = None) -> list[Outcome]:
    """The scenario's attack on each of its parties."""
    chosen = list(victims(scenario, base))
    model = chosen[0].observed.model
    # The mean of images that are no victim's: who knows what such images look like needs no vector for it.
    data = tasks.load(scenario.settings.task_names[0], model.image_size).validation
    images, _ = next(data.batches(batch_size=MEAN_OF))
    average = model.denormalise(model.normalise(images)).clamp(0, 1).mean(0)
    return [_attack_one(victim, number, average) for number, victim in enumerate(chosen)]


def _attack_one(victim: Victim, number: int, average: Tensor) -> Outcome:
    seen, count = victim.observed, len(victim.labels)
    random = torch.Generator().manual_seed(number)
    images = {
        "noise": torch.rand(victim.images.shape, generator=random),
        "mean image": average.expand_as(victim.images),
    }
    distance = None
    try:
        guess = reconstruct(seen, number)
    except NoEquation:
        pass
    else:
        images[FOUND], distance = guess.images, guess.distance
        if guess.prior is not None:
            images["prior only"] = guess.prior
    error = None
    if seen.scenario.head_known:
        classes = len(seen.head.bias)
        true = torch.bincount(victim.labels, minlength=classes) / count
        uniform = torch.full((classes,), 1 / classes)
        error = histogram_error(class_histogram(seen), true), histogram_error(uniform, true)
    return Outcome(victim.images, {name: paired(one, victim.images) for name, one in images.items()}, distance, error)


def summary(scenario: Scenario, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means over all images of PSNR in dB, SSIM and LPIPS (None without its weights), by who made them: the attack
    (absent where it has no equation), and each baseline; the standard error of the PSNR's mean, and the best image's.

    labels: how wrong the class histogram is, and the uniform one (None without the head). distance: how far the vector
    of what was found is from the one received. epsilon: see Scenario.
    """
    truth = torch.cat([outcome.truth for outcome in outcomes])
    images = {}
    for name in outcomes[0].images:
        guesses = torch.cat([outcome.images[name] for outcome in outcomes])
        decibels, distance = psnr(guesses, truth), lpips(guesses, truth)
        images[name] = {
            "psnr": float(decibels.mean()),
            "psnr_error": float(decibels.std() / len(decibels) ** 0.5) if len(decibels) > 1 else 0.0,
            "psnr_best": float(decibels.max()),
            "ssim": float(ssim(guesses, truth).mean()),
            "lpips": None if distance is None else float(distance.mean()),
        }
    distances = [outcome.distance for outcome in outcomes if outcome.distance is not None]
    errors = [outcome.histogram_error for outcome in outcomes if outcome.histogram_error]
    return {
        "attack": scenario.attack,
        "images": len(truth),
        "steps": scenario.steps,
        "epsilon": scenario.epsilon,
        "distance": mean(distances) if distances else None,
        "labels": {"found": mean(a for a, _ in errors), "uniform": mean(b for _, b in errors)} if errors else None,
        **{name: images.get(name) for name in (FOUND, *BASELINES)},
    }
