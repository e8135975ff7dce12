"""A run's directory: its configuration, its metrics, its checkpoints.

config.json       the settings and versions that decide the result
metrics.jsonl     one JSON object a line, see `Run.record`
checkpoint/       round-00007.safetensors: the base after 7 rounds; the last two are kept
tensorboard/      the same metrics as TensorBoard events
report.html       written when the run ends
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atm_fl import vectors
from atm_fl.errors import RunError, SettingError
from atm_fl.files import atomic_write
from atm_fl.party import shared_model
from atm_fl.settings import Settings

KEPT_CHECKPOINTS = 2


class Run:
    """One run of the loop and its directory.

    Opening it checks the directory before any work: a run that is there already without `resume`, one of another
    configuration, or nothing to resume is a SettingError.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.directory = Path(settings.run_dir)
        check_run_dir(settings)
        pretrained = shared_model(settings.model)
        self.layout = pretrained.layout
        self.base = pretrained.pretrained.clone()
        """The current base model, float32 [n]."""
        self.rounds_done = 0
        if settings.start != "pretrained":
            self.base = merged_model(Path(settings.start), self.layout)
        self.directory.mkdir(parents=True, exist_ok=True)
        if settings.resume:
            self.rounds_done, self.base = load_checkpoint(self.directory, self.layout, warn=print)
        self._write_config()
        self._keep_metrics()
        self._begin = time.time()
        self._board: Any = None

    def record(self, kind: str, round_number: int, **values: Any) -> None:
        """Append a line to metrics.jsonl and the same numbers to TensorBoard.

        kind "evaluation" (task, validation, test): accuracy of the base after `round_number` rounds; "tuning" (task,
        loss, steps, images, norm, seconds_…, bytes_up, bytes_down); "merge" (norm, tasks, cosines, seconds, failures).
        """
        line = {"kind": kind, "round": round_number, **values, "time": round(time.time() - self._begin, 3)}
        with open(self.directory / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        prefix = f"{kind}/{values['task']}" if "task" in values else kind
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._tensorboard().add_scalar(f"{prefix}/{name}", value, round_number)

    def advance(self, step: Tensor) -> None:
        """End a round: base ← base + step, written to disk before anything else happens.

        RunError if the step is not finite; the checkpoint before it stays.
        """
        if not bool(torch.isfinite(step).all()):
            raise RunError(f"round {self.rounds_done + 1}: the merged vector is not finite; try a lower learning-rate")
        self.base = self.base + step
        self.rounds_done += 1
        save_checkpoint(self.directory, self.rounds_done, self.base, self.layout)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self._board is not None:
            self._board.close()

    def _tensorboard(self) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.directory / "tensorboard"))
        return self._board

    def _write_config(self) -> None:
        packages = ("torch", "timm", "numpy", "flwr")
        config = {
            "settings": self.settings.decisive(),
            "rounds": self.settings.rounds,
            "layout": self.layout.digest,
            "elements": self.layout.size,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "machine": {"processor": processor(), "cores": torch.multiprocessing.cpu_count()},
        }
        with atomic_write(self.directory / "config.json") as part:
            part.write_text(json.dumps(config, indent=2) + "\n")

    def _keep_metrics(self) -> None:
        """Drop the lines that a resumed run will write again: what came after its checkpoint."""
        path, done = self.directory / "metrics.jsonl", self.rounds_done
        kept = [
            line
            for line in (read_metrics(self.directory) if path.exists() else ())
            if (line["round"] < done if line["kind"] == "evaluation" else line["round"] <= done)
        ]
        with atomic_write(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))


def check_run_dir(settings: Settings) -> None:
    """SettingError if `run-dir` holds a run and `resume` is false, holds one of another configuration, or has no
    checkpoint to resume from. A directory without a checkpoint holds nothing worth keeping and may be used again."""
    directory = Path(settings.run_dir)
    if not any(directory.glob("checkpoint/*.safetensors")):
        if settings.resume:
            raise SettingError(f"resume=true, but run-dir={str(directory)!r} holds no checkpoint")
        return
    theirs, ours = json.loads((directory / "config.json").read_text())["settings"], settings.decisive()
    other = next((key for key in ours if theirs.get(key) != ours[key]), None)
    if other:
        raise SettingError(
            f"run-dir={str(directory)!r} holds a run with {other}={theirs.get(other)!r}, not {ours[other]!r}; choose "
            "another run-dir"
        )
    if not settings.resume:
        raise SettingError(
            f"run-dir={str(directory)!r} holds a run already; go on from it with -c resume=true, choose another "
            "run-dir, or delete it"
        )


def read_metrics(directory: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut off by a crash is left out."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        raise RunError(f"{directory} is not a run directory: no metrics.jsonl in it")
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def save_checkpoint(directory: Path, rounds_done: int, base: Tensor, layout: vectors.Layout) -> Path:
    """Write the base after `rounds_done` rounds, atomically, as named tensors; older ones than the last two go."""
    folder = directory / "checkpoint"
    path = folder / f"round-{rounds_done:05d}.safetensors"
    # One key: safetensors writes several in an order of its own each time, and equal runs should be equal files.
    metadata = {"atm-fl": json.dumps({"rounds": rounds_done, "layout": layout.digest, "base": vectors.digest(base)})}
    with atomic_write(path) as part:
        save_file({name: view.contiguous() for name, view in layout.views(base).items()}, str(part), metadata)
    for old in sorted(folder.glob("*.safetensors"))[:-KEPT_CHECKPOINTS]:
        old.unlink()
    return path


def load_checkpoint(directory: Path, layout: vectors.Layout, warn: Any = None) -> tuple[int, Tensor]:
    """(rounds done, base) of the newest whole checkpoint; a damaged one is passed over and `warn` is told.

    RunError if none is whole, or if it belongs to a model of another layout.
    """
    for path in sorted((directory / "checkpoint").glob("*.safetensors"), reverse=True):
        try:
            with safe_open(str(path), "pt") as file:
                metadata = json.loads((file.metadata() or {}).get("atm-fl", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            if warn:
                warn(f"{path} is damaged ({error}); going back to the checkpoint before it")
            continue
        if metadata.get("layout") != layout.digest:
            raise RunError(f"{path} holds a model of another layout ({metadata.get('layout')}, not {layout.digest})")
        base = torch.cat([tensors[name].reshape(-1) for name in layout.names])
        if vectors.digest(base) == metadata.get("base"):
            return int(metadata["rounds"]), base
        if warn:
            warn(f"{path} is damaged (its digest does not match); going back to the checkpoint before it")
    raise RunError(f"{directory} holds no whole checkpoint")


def merged_model(directory: Path, layout: vectors.Layout) -> Tensor:
    """The newest base of another run, float32 [n]."""
    return load_checkpoint(directory, layout)[1]


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
