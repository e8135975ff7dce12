"""How far a server may move the base, and how long a client's vector may be: what each can check of the other.

A crafted base (trap weights: Fowl et al. 2022, arXiv:2110.13057; Boenisch et al. 2023, arXiv:2112.02918) makes a task
vector hold single images. To work it must look unlike a model that came out of merging, and be far from one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping

from torch import Tensor

from atm_fl.errors import RunError


def check_base(task: str, base: Tensor, limit: float, held: Tensor, name: str) -> None:
    """RunError, naming the task, if `base` is further than the L2 norm `limit` from the one that this party `held`.

    held: what it was sent last in this run, or its own pretrained one if it was sent none; `name` says which. How many
    rounds the server says have passed counts for nothing: it is not the one to say how far it may go.
    """
    moved = float((base - held).double().norm())
    if not moved <= limit:  # a norm that is not a number is refused too
        raise RunError(
            f"{task} refuses the server's base: it is {moved:.4g} (L2) from the {name}, max-update-norm={limit:g}; if "
            "this party was away for some rounds, a higher limit lets it in again"
        )


def _ordered(norm: float) -> float:
    """The norm, or infinity for what is not a number, which has no place among numbers."""
    return norm if norm == norm else math.inf


def _median_without(ordered: list[float], value: float) -> float:
    """The median of ascending numbers but one that has this value; 0 of none."""
    count, place = len(ordered) - 1, bisect_left(ordered, value)
    middle = [ordered[at + (at >= place)] for at in ((count - 1) // 2, count // 2) if count]
    return sum(middle) / 2


def too_long(norms: Mapping[str, float], past: float, base: float, factor: float) -> dict[str, str]:
    """Whose vector is out of proportion, with the figures: the `norms` (L2) of one round's vectors, by client.

    A vector may be `factor` times as long as what is usual: the median of the round's other vectors, or `past`, the
    largest of the past rounds' medians (0: none), whichever is longer; without either, the base. A minority decides
    neither. And it may always be as long as the base (of norm `base`): an honest one is, but for training from
    scratch, a small part of it, so that one who sends next to nothing has nobody else refused.
    """
    reasons = {}
    ordered = sorted(map(_ordered, norms.values()))
    for client, norm in norms.items():
        usual = max(past, _median_without(ordered, _ordered(norm))) or base
        allowed = max(factor * usual, base)
        if not norm <= allowed:
            reasons[client] = (
                f"its vector's norm is {norm:.4g}, {usual:.4g} is usual (base {base:.4g}); "
                f"proportion={factor:g} allows {allowed:.4g}"
            )
    return reasons
