"""The last vectors of tasks that have left, which the server merges again without their parties (`replay-vectors`).

    RUN-DIR/vectors/<task>/round-00005.safetensors     what entered the merge of round 5 as the vector of <task>,
                                                       as arrays of the codec that the setting names

Of each task whose participation ends, from its first round on: the last one is the one to stay. It is of a base that is
past, so it points where that task wanted to go from there; how much is left of that after some rounds is measured in
docs/results.md. Older ones stay as long as a checkpoint does that a run may go back to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atm_fl import vectors
from atm_fl.codecs import Codec
from atm_fl.errors import RunError, SettingError
from atm_fl.files import atomic_write
from atm_fl.runs.checkpoints import checkpoints, rounds_of
from atm_fl.runs.metrics import read_metrics
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.vectors import Layout
from atm_fl.vectors.tensor_files import save_vectors


class PastVectors:
    """Those of the run in `directory`, whose settings are as they are now: participation may be another on resume."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        assert settings.past_codec
        self._directory, self._settings, self._codec = directory, settings, settings.past_codec

    def check(self, rounds_done: int) -> None:
        """SettingError if a task has left after it took part, and no vector of it is here."""
        known = read_metrics(self._directory) if (self._directory / "metrics.jsonl").exists() else ()
        merges = [line["tasks"] for line in known if line["kind"] == "merge" and line["round"] <= rounds_done]
        took_part = {task for tasks in merges for task in tasks}
        for task in self._left(rounds_done + 1):
            if task in took_part and not self._last(task):
                raise SettingError(
                    f"replay-vectors={self._settings.replay_vectors!r}: {self._folder(task)} holds no vector of "
                    f"{task}, which has left; vectors are kept once participation names an end, as "
                    f"'{task}=1-{rounds_done + 1}', so choose a later one"
                )

    def keep(self, merged: Mapping[str, Tensor], round_number: int, layout: Layout) -> None:
        """Keep those of a round's vectors, float32 [n] of `layout`, by task, that may be the last of theirs."""
        for path in self._directory.glob("vectors/*/round-*.safetensors"):
            if rounds_of(path) >= round_number:  # of a run that has gone back behind it
                path.unlink()
        for task, vector in merged.items():
            if math.isfinite(self._end(task)):
                seed = derive_seed(self._settings.seed, "past vector", task, round_number)
                arrays = self._codec.encode(vector, layout, seed)
                tensors = {
                    name: torch.from_numpy(np.require(arrays[name], requirements="W")) for name in sorted(arrays)
                }
                with atomic_write(self._folder(task) / f"round-{round_number:05d}.safetensors") as temporary:
                    save_vectors(temporary, tensors, {"digest": vectors.digest(*tensors.values())})
        oldest = min(map(rounds_of, checkpoints(self._directory)), default=0)
        for task in self._settings.participations:
            for path in [path for path in self._files(task) if rounds_of(path) <= oldest][:-1]:
                path.unlink()

    def beside(self, merged: Mapping[str, Tensor], round_number: int, layout: Layout) -> dict[str, Tensor]:
        """A round's vectors with those of the tasks that have left, in the order of the settings' tasks.

        RunError if a file of theirs is damaged.
        """
        past = {
            task: _read(path, self._codec, layout) for task in self._left(round_number) if (path := self._last(task))
        }
        both = past | dict(merged)
        return {task: both[task] for task in dict.fromkeys(self._settings.client_tasks) if task in both}

    def _end(self, task: str) -> float:
        return self._settings.participations.get(task, (1, math.inf))[1]

    def _left(self, round_number: int) -> list[str]:
        return [task for task in dict.fromkeys(self._settings.client_tasks) if self._end(task) < round_number]

    def _last(self, task: str) -> Path | None:
        """The file of the last round in which a task that has left took part."""
        return next((path for path in reversed(self._files(task)) if rounds_of(path) <= self._end(task)), None)

    def _files(self, task: str) -> list[Path]:
        return sorted(self._folder(task).glob("round-*.safetensors"))

    def _folder(self, task: str) -> Path:
        return self._directory / "vectors" / task


def _read(path: Path, codec: Codec, layout: Layout) -> Tensor:
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            wanted = (file.metadata() or {}).get("digest")
        if vectors.digest(*tensors.values()) != wanted:
            raise ValueError("its digest does not match")
        return codec.decode({name: tensor.numpy() for name, tensor in tensors.items()}, layout)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}); bring back a copy, or begin a run anew") from error
