"""How far a server may move the base: what a client can check of a server that it does not trust.

A crafted base (trap weights: Fowl et al. 2022, arXiv:2110.13057; Boenisch et al. 2023, arXiv:2112.02918) makes a task
vector hold single images. To work it must look unlike a model that came out of merging, and be far from one.
"""

from __future__ import annotations

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
