"""A run's checkpoints: the base after each round, and what the server keeps beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atm_fl import vectors
from atm_fl.errors import RunError
from atm_fl.files import atomic_write
from atm_fl.vectors.tensor_files import save_vectors

STATE = "server-optimizer."
"""What the names of a server optimizer's moments begin with in a checkpoint."""


def save_checkpoint(
    directory: Path,
    rounds_done: int,
    base: Tensor,
    layout: vectors.Layout,
    state: dict[str, Tensor] | None = None,
    kept: int = 2,
    digest: str = "",
    good: Path | None = None,
) -> Path:
    """Write the base after `rounds_done` rounds, atomically, as named tensors; all but the last `kept` go (0: none).

    state: the server optimizer's moments and the residual of `codec-down`, flat tensors [n]. digest: the base's, if it
    is known. good: a checkpoint that stays.
    """
    folder = directory / "checkpoint"
    path = folder / f"round-{rounds_done:05d}.safetensors"
    moments = {STATE + name: moment for name, moment in (state or {}).items()}
    about = {"rounds": rounds_done, "layout": layout.digest, "base": digest or vectors.digest(base)}
    about |= {name: vectors.digest(moment) for name, moment in sorted(moments.items())}
    with atomic_write(path) as temporary:
        save_vectors(temporary, layout.views(base.cpu()) | moments, {"atm-fl": json.dumps(about)})
    past = checkpoints(directory)[:-kept] if kept else []
    for old in [*(other for other in past if other != good), *folder.glob(".*.safetensors")]:
        old.unlink()
    return path


def checkpoints(directory: Path) -> list[Path]:
    """A run's checkpoint files, oldest first."""
    return sorted(directory.glob("checkpoint/round-*.safetensors"))


def load_checkpoint(
    directory: Path, layout: vectors.Layout, warn: Callable[[str], object], rounds: int = 0
) -> tuple[int, Tensor, dict[str, Tensor]]:
    """(rounds done, base, server optimizer's moments and residual) of the newest whole checkpoint.

    With `rounds`, of that after so many rounds.

    A damaged one is passed over and `warn` is told. RunError if none is whole, or if it belongs to a model of another
    layout.
    """
    for path in reversed(checkpoints(directory)):
        if rounds and path.stem != f"round-{rounds:05d}":
            continue
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get("atm-fl", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            warn(f"{path} is damaged ({error}); going back to the checkpoint before it")
            continue
        if about.get("layout") != layout.digest:
            raise RunError(f"{path} holds a model of another layout ({about.get('layout')}, not {layout.digest})")
        state = {name: tensors.pop(name).clone() for name in list(tensors) if name.startswith(STATE)}
        state["base"] = torch.cat([tensors[name].reshape(-1) for name in layout.names])
        if all(vectors.digest(tensor) == about.get(name) for name, tensor in state.items()):
            return int(about["rounds"]), state.pop("base"), {k.removeprefix(STATE): v for k, v in state.items()}
        warn(f"{path} is damaged (its digest does not match); going back to the checkpoint before it")
    raise RunError(f"{directory} holds no whole checkpoint")


def rounds_of(checkpoint: Path) -> int:
    """The rounds after which a checkpoint was written, by its name."""
    return int(checkpoint.stem.removeprefix("round-"))
