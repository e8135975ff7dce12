"""How far a server may move the base: what a client can check of a server that it does not trust.

A crafted base (trap weights: Fowl et al. 2022, arXiv:2110.13057; Boenisch et al. 2023, arXiv:2112.02918) makes a task
vector hold single images. To work it must look unlike a model that came out of merging, and be far from one.
"""

from __future__ import annotations

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
