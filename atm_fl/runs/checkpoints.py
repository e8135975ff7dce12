"""A run's checkpoints: the base after each round, and what the server keeps beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atm_fl import vectors
from atm_fl.errors import RunError
from atm_fl.files import atomic_write
from atm_fl.vectors.model_files import RUN_METADATA, STATE, checkpoints
from atm_fl.vectors.tensor_files import save_vectors


def save_checkpoint(
    directory: Path,
    rounds_done: int,
    base: Tensor,
    layout: vectors.Layout,
    state: dict[str, Tensor] | None = None,
    kept: int = 2,
    digest: str = "",
    good: Collection[Path] = (),
) -> Path:
    """Write the base after `rounds_done` rounds, atomically, as named tensors; all but the last `kept` go (0: none).

    state: the server optimizer's moments and the residual of `codec-down`, flat tensors [n]. digest: the base's, if it
    is known. good: checkpoints that stay.
    """
    folder = directory / "checkpoint"
    path = folder / f"round-{rounds_done:05d}.safetensors"
    moments = {STATE + name: moment for name, moment in (state or {}).items()}
    about = {"rounds": rounds_done, "layout": layout.digest, "base": digest or vectors.digest(base)}
    about |= {name: vectors.digest(moment) for name, moment in sorted(moments.items())}
    with atomic_write(path) as temporary:
        save_vectors(temporary, layout.views(base.cpu()) | moments, {RUN_METADATA: json.dumps(about)})
    past = checkpoints(directory)[:-kept] if kept else []
    for old in [*(other for other in past if other not in good), *folder.glob(".*.safetensors")]:
        old.unlink()
    return path


def load_checkpoint(
    directory: Path, layout: vectors.Layout, warn: Callable[[str], object], rounds: int = 0
) -> tuple[int, Tensor, dict[str, Tensor]]:
    """(rounds done, base, server optimizer's moments and residual) of the newest whole checkpoint.

    With `rounds`, of that after so many rounds.

    A damaged one is passed over and `warn` is told. RunError if none is whole, or if it belongs to a model of another
    layout.
    """
    path, about, base, state = whole_checkpoint(directory, warn, rounds)
    if about.get("layout") != layout.digest:
        raise RunError(f"{path} holds a model of another layout ({about.get('layout')}, not {layout.digest})")
    return int(about["rounds"]), base, state


def whole_checkpoint(
    directory: Path, warn: Callable[[str], object], rounds: int = 0
) -> tuple[Path, dict[str, Any], Tensor, dict[str, Tensor]]:
    """The newest checkpoint that is whole, as `load_checkpoint` says: its file, what is said of it, its base float32
    [n] in the order of its entries, and the state. RunError if there is none."""
    for path in reversed(checkpoints(directory)):
        if rounds and rounds_of(path) != rounds:
            continue
        try:
            with safe_open(str(path), "pt") as file:
                about = json.loads((file.metadata() or {}).get(RUN_METADATA, "{}"))
                # The order of the file, which is the layout's; safetensors sorts by it.
                tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        except (SafetensorError, OSError) as error:
            warn(f"{path} is damaged ({error}); going back to the checkpoint before it")
            continue
        state = {name: tensors.pop(name).clone() for name in list(tensors) if name.startswith(STATE)}
        base = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        digests = {name: vectors.digest(tensor) for name, tensor in {"base": base, **state}.items()}
        if all(digest == about.get(name) for name, digest in digests.items()):
            return path, about, base, {name.removeprefix(STATE): tensor for name, tensor in state.items()}
        warn(f"{path} is damaged (its digest does not match); going back to the checkpoint before it")
    raise RunError(f"{directory} holds no whole checkpoint")


def rounds_of(checkpoint: Path) -> int:
    """The rounds after which a checkpoint was written, by its name."""
    return int(checkpoint.stem.removeprefix("round-"))
