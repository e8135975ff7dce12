"""A slice of the loss landscape: accuracy over the plane through the pretrained, a one-shot merged and an ATM model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atm_fl.federation.client import Party
from atm_fl.training.evaluation import mean_accuracy

MARGIN = 0.25
"""How far the plane reaches beyond the outermost point, in parts of the points' extent."""


def landscape(
    parties: Sequence[Party], base: Tensor, merged: Tensor, path: Sequence[Tensor], others: dict[str, Tensor], grid: int
) -> dict[str, Any]:
    """Mean validation accuracy at grid x grid points of the plane through `base`, `merged` and the end of `path`.

    x runs from the base to the one-shot merged model, y at a right angle to it towards the end of ATM's `path` (the
    bases after rounds 1, 2, …); both in units of the vectors' L2 norm. `others` are shown where they project to, which
    is not where they are: they lie off the plane. All are models, float32 [n]. The result is what contest_page draws.
    """
    x = (merged - base) / (merged - base).norm()
    rest = path[-1] - base
    rest = rest - (rest @ x) * x
    y = rest / rest.norm()

    def point(name: str, model: Tensor, on_path: bool) -> dict[str, Any]:
        step = model - base
        return {"name": name, "x": float(step @ x), "y": float(step @ y), "path": on_path}

    points = [point("pretrained", base, True)]
    points += [point(f"round {number}", model, True) for number, model in enumerate(path, 1)]
    points += [point("one-shot", merged, False), *(point(name, model, False) for name, model in others.items())]
    on_plane = [place for place in points if place["path"] or place["name"] == "one-shot"]
    axes = []
    for key in ("x", "y"):
        low, high = min(place[key] for place in on_plane), max(place[key] for place in on_plane)
        margin = MARGIN * (high - low)
        axes.append(torch.linspace(low - margin, high + margin, grid).tolist())

    def accuracy(model: Tensor) -> float:
        return mean_accuracy({party.task: party.evaluate(model, ("validation",))["validation"] for party in parties})

    return {
        "axes": ["towards the one-shot merged model", "towards the end of ATM"],
        "x": axes[0],
        "y": axes[1],
        "accuracy": [[accuracy(base + a * x + b * y) for a in axes[0]] for b in axes[1]],
        "points": points,
    }
