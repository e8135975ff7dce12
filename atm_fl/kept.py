"""What a client keeps on its disk during a run, for a process may serve one message and end.

    $ATM_FL_CACHE/runs/<run>/<task>/base.safetensors             the base it was last sent: of steps and max-update-norm
                                    residual-00007.safetensors   what the encoding of round 7's task vector lost

It all can be deleted at any time: a client without its base asks for it, and one without its residual starts from zero.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atm_fl import tasks, vectors
from atm_fl.files import atomic_write

KEPT_RESIDUALS = 3
"""A run may be resumed from either of its last two checkpoints, and the client may be a round ahead of them."""


class Kept:
    """One client's files of one run. ValueError if `run` is no run's id (see `Run.id`)."""

    def __init__(self, run: str, task: str) -> None:
        if not re.fullmatch("[0-9a-f]{16}", run):
            raise ValueError(f"run {run!r} is not the id of a run")  # it comes from the server and becomes a path
        self.folder = tasks.cache_dir() / "runs" / run / task

    def base(self, digest: str) -> Tensor | None:
        """The base model, float32 [n], if it was saved under `digest`; whether it still is that one is not checked."""
        found = _load(self.folder / "base.safetensors")
        return found[1] if found and found[0]["digest"] == digest else None

    def held(self) -> tuple[int, Tensor] | None:
        """(rounds done, base model) as it was saved last; None if there is none or it is damaged."""
        found = _load(self.folder / "base.safetensors")
        whole = found and vectors.digest(found[1]) == found[0]["digest"]
        return (int(found[0].get("rounds", 0)), found[1]) if found and whole else None

    def save_base(self, base: Tensor, digest: str, rounds_done: int = 0) -> None:
        """Keep a base model, float32 [n], instead of the one before."""
        _save(self.folder / "base.safetensors", base, {"digest": digest, "rounds": str(rounds_done)})

    def drop_base(self) -> None:
        """Delete the base model: a finished run needs it no more, and one that is resumed sends it again."""
        (self.folder / "base.safetensors").unlink(missing_ok=True)

    def residual(self, round_number: int) -> Tensor | None:
        """The residual, float32 [n], of the last round before `round_number`; None if there is none or it's damaged."""
        before = [path for path in self._residuals() if _round(path) < round_number]
        found = _load(before[-1]) if before else None
        return found[1] if found and vectors.digest(found[1]) == found[0]["digest"] else None

    def save_residual(self, residual: Tensor, round_number: int) -> None:
        """Keep a round's residual, float32 [n]; all but the last few go, and those that a resumed run left behind."""
        _save(self.folder / f"residual-{round_number:05d}.safetensors", residual, {"digest": vectors.digest(residual)})
        known = self._residuals()
        kept = [path for path in known if _round(path) <= round_number][-KEPT_RESIDUALS:]
        for path in set(known) - set(kept):
            path.unlink()

    def _residuals(self) -> list[Path]:
        return sorted(self.folder.glob("residual-*.safetensors"))


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("residual-"))


def _save(path: Path, vector: Tensor, about: dict[str, str]) -> None:
    with atomic_write(path) as part:
        save_file({"vector": vector}, str(part), about)


def _load(path: Path) -> tuple[dict[str, str], Tensor] | None:
    """(what is said about it, vector) of a file; None if it is missing or damaged."""
    try:
        with safe_open(str(path), "pt") as file:
            vector, about = file.get_tensor("vector"), {"digest": "", **(file.metadata() or {})}
    except (SafetensorError, OSError):
        return None
    return (about, vector) if vector.dtype == torch.float32 and vector.dim() == 1 else None
