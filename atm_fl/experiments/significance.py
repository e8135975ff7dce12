"""Whether one row of a contest is better than another, or chance: a paired bootstrap over test images and seeds.

Both rows classify the same test images, in runs of the same seeds, so that what is hard for both cancels (Efron and
Tibshirani 1993, An introduction to the bootstrap, ch. 8 and 16). A resample draws images of every task and, where there
are several, seeds, both with replacement and the same for both rows. Drawing both ways overstates what comes of image
and seed together (Owen 2007, The pigeonhole bootstrap), so that it errs on the side of no claim. Images that show one
thing, as one letter in two weights, are drawn together (a cluster bootstrap: Davison and Hinkley 1997, ch. 3.8), and so
are those of several parties that are tested on the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CHUNK = 500
"""Resamples at once: their counts are float32 [CHUNK, groups]."""
LEVEL = 0.99
"""Of the interval: a claim holds at p < 0.01."""

Rightly = Mapping[str, np.ndarray]
"""By task: which test images a model classifies rightly, bool [n]."""


@dataclass(frozen=True)
class Difference:
    """One row's accuracy less another's, from −1 to 1, with an interval of LEVEL; p is two-sided, never 0."""

    value: float
    low: float
    high: float
    p: float


def differences(
    one: Sequence[Rightly],
    other: Sequence[Rightly],
    single: Sequence[Rightly] = (),
    resamples: int = RESAMPLES,
    groups: Mapping[str, np.ndarray] | None = None,
    same: Mapping[str, str] | None = None,
) -> dict[str, Difference]:
    """The first row less the second: of each task, of their mean and, where the single-task models (single) are given,
    of the worst normalised task: the least accuracy, mean over seeds, in parts of the single-task models'.

    Each row has a model a seed, in the same order of seeds; all have the same tasks and images. Images of one number in
    a task's `groups`, int [n], are drawn together. Of tasks that are one in `same`, with as many images, the same
    places are drawn: if the images there are the same ones, a party more is no image more, and if not, nothing is lost.
    Deviations are widened by √(S / (S − 1)), since S seeds drawn from S vary too little; one seed alone says nothing of
    other seeds. The same input has the same output. ValueError if the rows do not pair, or a task's groups are not of
    its images.
    """
    rows = [one, other, *([single] if single else [])]
    tasks = list(one[0])
    for row in rows:
        if len(row) != len(one):
            raise ValueError(f"rows of {len(one)} and {len(row)} seeds do not pair")
        if any(
            {task: len(model[task]) for task in model} != {task: len(one[0][task]) for task in tasks} for model in row
        ):
            raise ValueError("rows of other tasks or test images do not pair")
    random, seeds = np.random.default_rng(0), len(one)
    drawn_seeds = random.multinomial(seeds, [1 / seeds] * seeds, resamples) / seeds
    exact = np.stack([[np.mean([model[task].mean() for model in row]) for task in tasks] for row in rows])
    resampled = np.empty((len(rows), len(tasks), resamples))
    before: dict[tuple[str, int], np.random.Generator] = {}
    for number, task in enumerate(tasks):
        images = len(one[0][task])
        group = (groups or {}).get(task, np.arange(images))
        if len(group) != images:
            raise ValueError(f"{task} has {images} test images and groups of {len(group)}")
        _, group, sizes = np.unique(group, return_inverse=True, return_counts=True)
        sizes = sizes.astype(np.float32)
        rightly = [
            np.stack([np.bincount(group, model[task], len(sizes)) for model in row]).astype(np.float32) for row in rows
        ]
        kind = (same or {}).get(task, task), len(sizes)
        drawing = deepcopy(before[kind]) if kind in before else random
        before.setdefault(kind, deepcopy(random))
        for begin in range(0, resamples, CHUNK):
            chunk = slice(begin, min(begin + CHUNK, resamples))
            picked = drawing.integers(len(sizes), size=(chunk.stop - begin, len(sizes)))
            counts = np.stack([np.bincount(places, minlength=len(sizes)) for places in picked]).astype(np.float32)
            drawn_images = counts @ sizes
            for place, models in enumerate(rightly):
                drawn_rightly = np.einsum("rs,rs->r", counts @ models.T, drawn_seeds[chunk])
                resampled[place, number, chunk] = drawn_rightly / drawn_images
    measured = {task: (exact[:2, number], resampled[:2, number]) for number, task in enumerate(tasks)}
    measured["mean"] = exact[:2].mean(1), resampled[:2].mean(1)
    if single:
        measured["worst normalised task"] = (exact[:2] / exact[2]).min(1), (resampled[:2] / resampled[2]).min(1)
    widen = (seeds / (seeds - 1)) ** 0.5 if seeds > 1 else 1.0
    return {name: _difference(*values, widen) for name, values in measured.items()}


def _difference(exact: np.ndarray, resampled: np.ndarray, widen: float) -> Difference:
    """Of two rows' measure [2] and its resamples [2, R]."""
    value = float(exact[0] - exact[1])
    drawn = value + widen * (resampled[0] - resampled[1] - value)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    return Difference(value, float(low), float(high), float(min(1.0, 2 * (tail + 1) / (drawn.size + 1))))
