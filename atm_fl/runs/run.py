"""A run's directory: its configuration, its metrics, its checkpoints.

config.json       the settings and versions that decide the result, and the run's id
metrics.jsonl     one JSON object a line, see `Run.record`
checkpoint/       round-00007.safetensors: the base after 7 rounds; the last `keep-checkpoints` are kept, and the best
set-aside/        what `resume-from` went back behind, and metrics.jsonl files with damaged lines
tensorboard/      the same metrics as TensorBoard events, of the metric sink `tensorboard`
report.html       written when the run ends
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from atm_fl import vectors
from atm_fl.codecs import Arrays, Codec, size_of
from atm_fl.errors import RunError, SettingError
from atm_fl.files import atomic_write
from atm_fl.merging.scaling import check_layer_scaling
from atm_fl.models import load_backbone
from atm_fl.models.trainable import set_trainable
from atm_fl.runs.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from atm_fl.runs.metrics import read_metrics
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings, defaults, stored
from atm_fl.sinks import SINKS
from atm_fl.vectors.finite import is_finite


class Run:
    """One run of the loop and its directory.

    Opening it checks the directory before any work: a run that is there already without `resume`, one of another
    configuration, or nothing to resume is a SettingError.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.directory = Path(settings.run_dir)
        check_run_dir(settings)
        backbone = load_backbone(settings.model, settings.weights)
        set_trainable(backbone, settings.trainable)
        self.layout = vectors.Layout.of(backbone)
        self.base = self.layout.flatten(backbone)
        """The current base model, float32 [n]."""
        self.rounds_done = 0
        self.delta: Arrays | None = {} if settings.downlink and settings.start == "pretrained" else None
        """The base's last step as it travels; empty at the start and after a resume, where clients have the base. None
        if the whole base travels: always with codec-down=fp32, and first from another start than the pretrained."""
        self.residual: Tensor | None = None
        """What the encoding of that step lost, float32 [n], if `codec-down` has error feedback."""
        self.optimizer = settings.make_server_optimizer()
        check_layer_scaling(settings.layer_scalings, self.layout)
        self._begin = time.time()
        self._lock = lock(self.directory)
        warnings: list[str] = []
        if settings.resume:
            found = load_checkpoint(self.directory, self.layout, warnings.append, settings.resume_from)
            self.rounds_done, self.base, state = found
            self.residual = state.pop("residual", None)
            self.optimizer.state = state
        elif settings.start != "pretrained":
            _, self.base, _ = load_checkpoint(Path(settings.start), self.layout, warnings.append)
        self.digest = vectors.digest(self.base)
        """Of the base."""
        self.id = self._known_id() or secrets.token_hex(8)
        """Of this run and no other, kept when it is resumed: clients keep files under it."""
        self._validations: dict[int, dict[str, float]] = {}
        self.usual_norm = 0.0
        """The largest of the past rounds' median norms of task vectors."""
        self._write_config()
        if settings.resume_from:
            self._set_aside([path for path in checkpoints(self.directory) if rounds_of(path) > self.rounds_done])
        self._keep_metrics(warnings)
        self._sinks = [SINKS[name]() for name in settings.sinks]
        for sink in self._sinks:
            sink.started(self.directory, settings.as_config(), self.rounds_done)
        for text in warnings:
            self.record("warning", self.rounds_done, text=text)

    def record(self, kind: str, round_number: int, **values: Any) -> None:
        """Append a line to metrics.jsonl and hand it to the `metric-sinks`.

        kind "evaluation" (task, validation, test; bytes_down if nothing else was asked of the client): accuracy of the
        base after `round_number` rounds; "tuning" (task, loss, steps, images, norm, alignment, seconds_…, bytes_up,
        bytes_down; residual_lost=1 or optimizer_lost=1 if a client began without what its last round had left; of
        private runs epsilon, epsilon_rdp, noise); "merge" (norm, tasks, cosines unless
        secure-aggregation, seconds_merge, seconds, failures; with secure-aggregation seconds_secure, with
        dp-client-noise epsilon); "warning" (text). Bytes are those of the arrays that travel, or in a plain loop would.
        """
        line = {"kind": kind, "round": round_number, **values, "time": round(time.time() - self._begin, 3)}
        with open(self.directory / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self._note(line)
        for sink in self._sinks:
            sink.line(line)

    def _note(self, line: dict[str, Any]) -> None:
        """Remember a validation accuracy: {rounds done: {client: accuracy}}."""
        accuracy = line.get("validation")
        if line["kind"] == "evaluation" and isinstance(accuracy, (int, float)):
            self._validations.setdefault(line["round"], {})[str(line.get("task"))] = accuracy

    def advance(self, merged: Tensor) -> None:
        """End a round: base ← base + what the server optimizer makes of `merged`, float32 [n], which may be changed.

        Where steps travel, the base moves by what the clients will decode, so that theirs and ours stay bit-equal. All
        is written to disk before anything else happens. RunError if a value is not finite; the checkpoint before it
        stays.
        """
        step = self.optimizer.step(merged, self.rounds_done + 1)
        if not is_finite(step):
            raise RunError(
                f"round {self.rounds_done + 1}: the step is not finite; try a lower learning-rate or scaling"
            )
        if self.settings.downlink:
            self._send(step, self.settings.downlink)
        else:
            self.base.add_(step)
        self.digest = vectors.digest(self.base)
        self.rounds_done += 1
        state = self.optimizer.state | ({} if self.residual is None else {"residual": self.residual})
        kept = self.settings.keep_checkpoints
        save_checkpoint(
            self.directory, self.rounds_done, self.base, self.layout, state, kept, self.digest, self._good()
        )

    def _good(self) -> Path | None:
        """The checkpoint of those that are there whose base did best: by the median of the tasks' validation accuracy.

        A minority that lies about its own does not decide it. The later one of equals; None if none is known.
        """
        known = {rounds_of(path): path for path in checkpoints(self.directory)}
        scores = {number: median(found.values()) for number, found in self._validations.items() if number in known}
        best = max(scores, key=lambda number: (scores[number], number), default=0)
        return known.get(best)

    def _send(self, step: Tensor, codec: Codec) -> None:
        """Make `step`, which may be changed, the `delta`, and move the base by what that decodes to."""
        if self.residual is not None:
            step.add_(self.residual)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads)  # sums in another order give other bits
        self.delta = codec.encode(step, self.layout, derive_seed(self.settings.seed, "codec", self.rounds_done + 1))
        torch.set_num_threads(threads)
        if codec.error_feedback:
            decoded = codec.decode(self.delta, self.layout)
            self.base.add_(decoded)
            self.residual = step.sub_(decoded)
        else:
            codec.add(self.delta, self.layout, self.base)

    @property
    def bytes_down(self) -> int:
        """Bytes of what a client is sent to know the current base."""
        return self.base.nbytes if self.delta is None else size_of(self.delta)

    def close(self) -> None:
        """Close the sinks and let others have the directory."""
        try:
            for sink in self._sinks:
                sink.closed()
        finally:
            self._lock.close()

    def _known_id(self) -> str:
        """The id of the run that is resumed."""
        return json.loads((self.directory / "config.json").read_text()).get("run", "") if self.settings.resume else ""

    def _write_config(self) -> None:
        packages = ("torch", "timm", "numpy", "flwr")
        config = {
            "run": self.id,
            "settings": self.settings.decisive(),
            "rounds": self.settings.rounds,
            **({"plugins": plugins} if (plugins := self.settings.plugins()) else {}),
            "layout": self.layout.digest,
            "elements": self.layout.size,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "machine": {"processor": processor(), "cores": torch.multiprocessing.cpu_count()},
        }
        with atomic_write(self.directory / "config.json") as part:
            part.write_text(json.dumps(config, indent=2) + "\n")

    def _keep_metrics(self, warnings: list[str]) -> None:
        """Drop what came after the checkpoint of a resumed run: it will be written again.

        Of the base at the checkpoint itself, test accuracies stay: the rounds to come may evaluate validation only.
        The old file stays in set-aside/ if lines of it are damaged, or if the run goes back.
        """
        path, done = self.directory / "metrics.jsonl", self.rounds_done
        damaged: list[int] = []
        kept = [
            line
            for line in (read_metrics(self.directory, damaged.append) if path.exists() else ())
            if line["round"] < done or (line["round"] == done and (line["kind"] != "evaluation" or "test" in line))
        ]
        if path.exists() and (damaged or self.settings.resume_from):
            self._set_aside([path])
        if damaged:
            told = f"lines {', '.join(map(str, damaged[:10]))} of metrics.jsonl are damaged and left out"
            warnings.append(f"{told}; the old file is in {self.directory / SET_ASIDE}")
        norms = (line.get("usual_norm", 0.0) for line in kept if line["kind"] == "merge")
        self.usual_norm = max((norm for norm in norms if isinstance(norm, float)), default=0.0)
        for line in kept:
            self._note(line)
        with atomic_write(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def _set_aside(self, files: list[Path]) -> None:
        """Move files of this directory to a new folder of set-aside/, where nothing looks for them."""
        folder = self.directory / SET_ASIDE
        number = len(list(folder.glob("*"))) + 1
        for path in files:
            moved = folder / f"{number}" / path.name
            moved.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, moved)


SET_ASIDE = "set-aside"


def check_run_dir(settings: Settings) -> None:
    """SettingError if `run-dir` holds a run and `resume` is false, holds one of another configuration, or has no
    checkpoint to resume from. A directory without a checkpoint holds nothing worth keeping and may be used again."""
    directory, start = Path(settings.run_dir), settings.start
    make_run_dir(directory)
    if start != "pretrained" and not checkpoints(Path(start)):
        raise SettingError(f"start={start!r} is neither 'pretrained' nor the directory of a run with a checkpoint")
    if not checkpoints(directory):
        if settings.resume:
            raise SettingError(f"resume=true, but run-dir={str(directory)!r} holds no checkpoint")
        return
    if settings.resume_from:
        there = [rounds_of(path) for path in checkpoints(directory)]
        if settings.resume_from not in there:
            raise SettingError(
                f"resume-from={settings.resume_from}: run-dir={str(directory)!r} has no checkpoint after so many "
                f"rounds; there are {', '.join(map(str, there))}"
            )
    config = directory / "config.json"
    if not config.exists():
        raise SettingError(f"run-dir={str(directory)!r} holds checkpoints but no config.json; choose another run-dir")
    known = json.loads(config.read_text())
    theirs, ours = (defaults() | decisive for decisive in (stored(known["settings"]), settings.decisive()))
    other = next((key for key in ours if theirs[key] != ours[key]), None)
    if other:
        raise SettingError(
            f"run-dir={str(directory)!r} holds a run with {other}={theirs.get(other)!r}, not {ours[other]!r}; choose "
            "another run-dir"
        )
    before, now = known.get("plugins", {}), settings.plugins()
    changed = next((thing for thing in {**before, **now} if before.get(thing) != now.get(thing)), None)
    if changed:
        raise SettingError(
            f"run-dir={str(directory)!r} holds a run whose {changed} was {before.get(changed, 'no plugin')}, not "
            f"{now.get(changed, 'no plugin')}; bring back that file, or choose another run-dir"
        )
    if not settings.resume:
        raise SettingError(
            f"run-dir={str(directory)!r} holds a run already; go on from it with -c resume=true, choose another "
            "run-dir, or delete it"
        )


def make_run_dir(directory: Path) -> None:
    """SettingError if `directory` is a file, or can't be made or written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "lock", "a"):
            pass
    except FileExistsError:
        raise SettingError(f"run-dir={str(directory)!r} is a file; choose a directory") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in FULL:
            raise
        told = getattr(error, "strerror", None) or str(error)
        raise SettingError(
            f"run-dir={str(directory)!r} can't be made or written to ({told}); choose another directory"
        ) from None


@contextmanager
def swept_if_failed(directory: Path) -> Iterator[None]:
    """If the body fails before anything was measured, remove the run's directory, unless it was there before.

    A log of Flower's that the error names stays.
    """
    made = not directory.exists()
    try:
        yield
    except BaseException as error:
        log, metrics = directory / "flower.log", directory / "metrics.jsonl"
        empty = not checkpoints(directory) and not (metrics.exists() and metrics.stat().st_size)
        if made and empty and str(log) not in str(error):
            shutil.rmtree(directory, ignore_errors=True)
        raise


FULL = (errno.ENOSPC, errno.EDQUOT)


def rounds_of(checkpoint: Path) -> int:
    """The rounds after which a checkpoint was written, by its name."""
    return int(checkpoint.stem.removeprefix("round-"))


def lock(directory: Path) -> Any:
    """Hold a run's directory until the returned file is closed or the process ends. RunError if it is held already."""
    file = open(directory / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"run-dir={str(directory)!r} is in use by another process; wait for it or end it") from None
    return file


@contextmanager
def told_if_full(directory: Path) -> Iterator[None]:
    """Make a RunError, in one line, of what a full disk raises: the checkpoint before it is whole and stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) not in FULL and "os error 28" not in str(error):
            raise
        remedy = "go on with resume=true" if checkpoints(directory) else "start it again: no round was finished"
        raise RunError(f"the disk of run-dir={str(directory)!r} is full; make room and {remedy}") from error


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
