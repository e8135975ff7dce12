"""What a client keeps on its disk during a run, for a process may serve one message and end.

    $ATM_FL_CACHE/runs/<run>/<task>/base.safetensors             the base it was last sent: of steps and max-update-norm
                                    residual-00007.safetensors   what the encoding of round 7's task vector lost
                                    optimizer-00007.safetensors  the optimizer's state after round 7 (keep-optimizer)
                                    tuned_from-00007.safetensors the base that round 7 began with (client-momentum)
                                    ewc-00007.safetensors        its model after round 7, and what mattered in it (ewc)
                                    buffers-00007.safetensors    its own buffers after round 7 (buffers=private)
                                    private-00007.safetensors    its own entries after round 7 (private)
                                    finished-00008.safetensors   the same, tuned on after the run's end (private-epochs)
                                    measured.json                accuracies that it may not tell (private and dp-sgd)
                                    head.safetensors             its head in this run, with its classes: for exports
                                    secret.json                  of a round's secure aggregation, until it is over

It all can be deleted at any time: a client without its base asks for it, one without its secret is out of the round,
and one without the others starts from zero.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atm_fl import tasks, vectors
from atm_fl.files import atomic_write
from atm_fl.vectors.tensor_files import save_vectors

KEPT_ROUNDS = 3
"""A run may be resumed from either of its last two checkpoints, and the client may be a round ahead of them."""
_recent: dict[str, Tensor] = {}
"""The base that this process saved last, by its digest: it need not be read when it is asked for next."""


class ClientState:
    """One client's files of one run. ValueError if `run` is no run's id (see `Run.id`)."""

    def __init__(self, run: str, task: str) -> None:
        if not re.fullmatch("[0-9a-f]{16}", run):
            raise ValueError(f"run {run!r} is not the id of a run")  # it comes from the server and becomes a path
        self.folder = tasks.cache_dir() / "runs" / run / task

    @staticmethod
    def forget(run: str) -> None:
        """Delete all that this machine keeps of a run that will not go on."""
        shutil.rmtree(ClientState(run, "").folder, ignore_errors=True)

    def base(self, digest: str) -> Tensor | None:
        """The base model, float32 [n], if it was saved under `digest`; whether it still is that one is not checked.

        It is the caller's, who may change it.
        """
        recent = _recent.pop(digest, None)
        stored = _load(self.folder / "base.safetensors", whole=recent is None)
        return stored[1].get("vector", recent) if stored and stored[0]["digest"] == digest else None

    def held(self) -> Tensor | None:
        """The base model as it was saved last; None if there is none or it is damaged."""
        saved = _load(self.folder / "base.safetensors")
        return saved[1]["vector"] if saved and _digest(saved[1]) == saved[0]["digest"] else None

    def save_base(self, base: Tensor, digest: str) -> None:
        """Keep a base model, float32 [n], instead of the one before. Nobody may change it any more."""
        about = {"digest": digest}
        # The server has it too, and a client that has none asks for it.
        _save(self.folder / "base.safetensors", {"vector": base}, about, flush=False)
        forget_recent()
        _recent[digest] = base

    def drop_base(self) -> None:
        """Delete the base model: a finished run needs it no more, and one that is resumed sends it again."""
        forget_recent()
        (self.folder / "base.safetensors").unlink(missing_ok=True)

    def last(self, kind: str, round_number: int) -> dict[str, Tensor] | None:
        """What was saved as `kind` in the last round before `round_number`; None if there is none or it is damaged."""
        before = [path for path in self._files(kind) if _round(path) < round_number]
        stored = _load(before[-1]) if before else None
        return stored[1] if stored and _digest(stored[1]) == stored[0]["digest"] else None

    def at(self, kind: str, round_number: int) -> dict[str, Tensor] | None:
        """What was saved as `kind` in just this round; None if there is none or it is damaged."""
        there = [path for path in self._files(kind) if _round(path) == round_number]
        return self.last(kind, round_number + 1) if there else None

    def save(self, kind: str, tensors: dict[str, Tensor], round_number: int, checkpoints: int = 1) -> None:
        """Keep a round's "residual" or "optimizer", float32; all but the last few go, and what a resumed run left.

        Those of the run's last `checkpoints` stay, 0: of all.
        """
        _save(self.folder / f"{kind}-{round_number:05d}.safetensors", tensors, {"digest": _digest(tensors)})
        known = self._files(kind)
        rounds = max(KEPT_ROUNDS, checkpoints + 1) if checkpoints else 0
        kept = [path for path in known if _round(path) <= round_number][-rounds:]
        for path in set(known) - set(kept):
            path.unlink()

    def note(self, rounds: int, numbers: dict[str, float]) -> None:
        """Add numbers to what is written down, for the owner's eyes only, of the model after so many rounds."""
        known = self.noted()
        known[rounds] = known.get(rounds, {}) | numbers
        with atomic_write(self.folder / "measured.json", private=True) as temporary:
            temporary.write_text(json.dumps({str(number): known[number] for number in sorted(known)}, indent=1))

    def noted(self) -> dict[int, dict[str, float]]:
        """Rounds done → numbers, of what was written down."""
        try:
            return {
                int(number): told for number, told in json.loads((self.folder / "measured.json").read_text()).items()
            }
        except (OSError, ValueError):
            return {}

    def save_head(self, head: dict[str, Tensor], classes: tuple[str, ...]) -> None:
        """Keep the head's tensors, by name, with the names of its classes, for its owner's eyes only."""
        saved = self.head()
        if saved and saved[1] == classes and all(torch.equal(saved[0][name], head[name].cpu()) for name in head):
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in head.items()}
        with atomic_write(self.folder / "head.safetensors", private=True) as temporary:
            save_file(tensors, temporary, {"task": self.folder.name, "classes": json.dumps(classes)})

    def head(self) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
        """The head's tensors and its classes; None if there are none."""
        try:
            with safe_open(str(self.folder / "head.safetensors"), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
                return tensors, tuple(json.loads((file.metadata() or {})["classes"]))
        except (SafetensorError, OSError, KeyError):
            return None

    def save_secret(self, text: str) -> None:
        """Keep a secret, for its owner's eyes only, instead of the one before."""
        with atomic_write(self.folder / "secret.json", private=True) as temporary:
            temporary.touch(0o600)
            temporary.write_text(text)

    def take_secret(self) -> str | None:
        """The secret, which is gone then: of several processes that want it, one gets it. None if there is none."""
        taken = self.folder / f"secret.{os.getpid()}"
        try:
            os.replace(self.folder / "secret.json", taken)
        except FileNotFoundError:
            return None
        text = taken.read_text()
        taken.unlink()
        return text

    def _files(self, kind: str) -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*.safetensors"))


def forget_recent() -> None:
    """Free the base in memory; it is in its file."""
    _recent.clear()


def _round(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])


def _digest(tensors: dict[str, Tensor]) -> str:
    return "-".join(vectors.digest(tensor) for _, tensor in sorted(tensors.items()))


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, str], flush: bool = True) -> None:
    with atomic_write(path, flush, private=True) as temporary:
        save_vectors(temporary, tensors, about)


def _load(path: Path, whole: bool = True) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """(what is said about them, tensors) of a file; None if it is missing or damaged. No tensors unless `whole`."""
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if whole}  # noqa: SIM118 (no dictionary)
            about = {"digest": "", **(file.metadata() or {})}
    except (SafetensorError, OSError):
        return None
    return (about, tensors) if all(tensor.dtype == torch.float32 for tensor in tensors.values()) else None
