"""How far a server may move the base, and how long a client's vector may be: what each can check of the other.

A crafted base (trap weights: Fowl et al. 2022, arXiv:2110.13057; Boenisch et al. 2023, arXiv:2112.02918) makes a task
vector hold single images. To work it must look unlike a model that came out of merging, and be far from one.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from torch import Tensor

from atm_fl.errors import RunError

Held = tuple[int, Tensor]
"""Rounds done, and the base after them, float32 [n]."""


def check_base(task: str, base: Tensor, rounds_done: int, limit: float, known: dict[str, Held]) -> None:
    """RunError, naming the task, if `base`, after `rounds_done` rounds, is further than they allow from a known one.

    known: bases that this party holds, by what they are called: the pretrained one of its own, and the one it was sent
    before. In k rounds a base may move by the L2 norm k · `limit`; sent again for the same round, by `limit`.
    """
    for name, (rounds, held) in known.items():
        moved = float((base - held).double().norm())
        allowed = limit * (abs(rounds_done - rounds) or min(rounds, 1))
        if not moved <= allowed:  # a norm that is not a number is refused too
            raise RunError(
                f"{task} refuses the server's base of round {rounds_done}: it is {moved:.4g} (L2) from the {name}, "
                f"max-update-norm={limit:g} allows {allowed:.4g}"
            )


def too_long(norms: Mapping[str, float], past: float, base: float, factor: float) -> dict[str, str]:
    """Whose vector is out of proportion, with the figures: the `norms` (L2) of one round's vectors, by client.

    A vector may be `factor` times as long as what is usual: the median of the round's other vectors, or `past`, the
    largest of the past rounds' medians (0: none), whichever is longer; without either, the base. A minority decides
    neither. And it may always be as long as the base (of norm `base`): an honest one is, but for training from
    scratch, a small part of it, so that one who sends next to nothing has nobody else refused.
    """
    found = {}
    for client, norm in norms.items():
        others = [other for name, other in norms.items() if name != client]
        usual = max(past, median(others) if others else 0.0) or base
        allowed = max(factor * usual, base)
        if not norm <= allowed:
            found[client] = (
                f"its vector's norm is {norm:.4g}, {usual:.4g} is usual (base {base:.4g}); "
                f"proportion={factor:g} allows {allowed:.4g}"
            )
    return found
