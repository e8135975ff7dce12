"""A run's directory: its configuration, its metrics, its checkpoints.

config.json       the settings and versions that decide the result, and the run's id
metrics.jsonl     one JSON object a line, see `Run.record`
checkpoint/       round-00007.safetensors: the base after 7 rounds; the last `keep-checkpoints` are kept, and the best
vectors/          of tasks that leave, of `replay-vectors`: see `runs.past_vectors`
set-aside/        what `resume-from` went back behind, and metrics.jsonl files with damaged lines
tensorboard/      the same metrics as TensorBoard events, of the metric sink `tensorboard`
report.html       written when the run ends
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atm_fl import vectors
from atm_fl.codecs import size_of
from atm_fl.errors import RunError
from atm_fl.files import atomic_write
from atm_fl.merging.scaling import check_layer_scaling
from atm_fl.models import load_backbone
from atm_fl.models.buffers import shared_buffers
from atm_fl.models.trainable import set_trainable, shared_and_private
from atm_fl.runs.checkpoints import checkpoints, load_checkpoint, rounds_of, save_checkpoint
from atm_fl.runs.directory import check_run_dir, lock, noted_plugins
from atm_fl.runs.downlink import Downlink
from atm_fl.runs.membership import AWAY, JOINED, Membership
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.past_vectors import PastVectors
from atm_fl.runs.start import first_base
from atm_fl.runs.validation import ValidationCurve
from atm_fl.settings import Settings, check_model
from atm_fl.sinks import SINKS
from atm_fl.vectors.finite import is_finite


class Run:
    """One run of the loop and its directory.

    Opening it checks the directory before any work: a run that is there already without `resume`, one of another
    configuration, or nothing to resume is a SettingError.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        """Of an open run, with the tasks that have joined."""
        self.directory = Path(settings.run_dir)
        check_run_dir(settings)
        backbone = load_backbone(settings.model, settings.weights)
        set_trainable(backbone, settings.trainable)
        check_model(settings, backbone)
        self.layout, _ = shared_and_private(backbone, settings.private)
        """Of a task vector [n]: the entries that are tuned and merged."""
        self.shared_buffers = shared_buffers(backbone, settings.buffers)
        self.base_layout = self.layout + self.shared_buffers
        self.base: Tensor
        """The current base model, float32 [n + b]."""
        self.rounds_done = 0
        self.downlink = Downlink(settings, self.layout)
        self.optimizer = settings.make_server_optimizer()
        check_layer_scaling(settings.layer_scalings, self.layout)
        self._begin = time.time()
        self._lock = lock(self.directory)
        warnings: list[str] = list(getattr(backbone, "notes", ()))
        if settings.resume:
            checkpoint = load_checkpoint(self.directory, self.base_layout, warnings.append, settings.resume_from)
            self.rounds_done, self.base, state = checkpoint
            self.downlink.residual = state.pop("residual", None)
            self.optimizer.state = state
            if settings.replay_vectors:
                PastVectors(self.directory, settings).check(self.rounds_done)
        else:
            self.base = first_base(settings, backbone, self.base_layout, warnings.append)
        self.digest = vectors.digest(self.base)
        """Of the base."""
        self.id = self._known_id() or secrets.token_hex(8)
        """Of this run and no other, kept when it is resumed: clients keep files under it."""
        self.membership = Membership()
        self._validation = ValidationCurve(self.membership)
        self.usual_norm = 0.0
        """The largest of the past rounds' median norms of task vectors."""
        self._write_config()
        if settings.resume_from:
            self._set_aside([path for path in checkpoints(self.directory) if rounds_of(path) > self.rounds_done])
        self._keep_metrics(warnings)
        self._sinks = [SINKS[name]() for name in settings.sinks]
        for sink in self._sinks:
            sink.started(self.directory, settings.as_config(), self.rounds_done)
        for client in sorted(self.membership.away):
            for sink in self._sinks:
                sink.line({"kind": "membership", "round": self.rounds_done, "task": client, "event": AWAY, "time": 0.0})
        for text in warnings:
            self.record("warning", self.rounds_done, text=text)
        for client in self._added:
            self.member(client, JOINED)

    def record(self, kind: str, round_number: int, **values: Any) -> None:
        """Append a line to metrics.jsonl and hand it to the `metric-sinks`.

        kind "evaluation" (task, validation, test; bytes_down if nothing else was asked of the client): accuracy of the
        base after `round_number` rounds; "tuning" (task, loss, steps, images, norm, alignment, seconds_…, bytes_up,
        bytes_down; residual_lost=1, optimizer_lost=1, buffers_lost=1, private_lost=1, tuned_from_lost=1 or ewc_lost=1
        if a client began without what its last round had left; with DP-SGD epsilon, epsilon_rdp, noise); "merge" (norm,
        tasks, with replay-vectors replayed: those of them that have left; cosines unless secure-aggregation, and of
        more than 64 tasks cosines_of, whose they are; seconds_merge, seconds, failures; with secure-aggregation
        seconds_secure, with dp-client-noise epsilon); "membership" (task, event: see `runs.membership`) of who comes
        and goes; "warning" (text); "stop" (text) if a run ends before its last round. Bytes are those of the arrays
        that travel, or in a plain loop would.
        """
        line = {"kind": kind, "round": round_number, **values, "time": round(time.time() - self._begin, 3)}
        with open(self.directory / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self._validation.note(line)
        self.membership.note(line)
        for sink in self._sinks:
            sink.line(line)

    def member(self, client: str, event: str) -> None:
        """Record that a party has JOINED the run, or of an open run is AWAY or BACK, from the coming round on."""
        self.record("membership", self.rounds_done + 1, task=client, event=event)
        if event == JOINED:
            self.settings = self.settings.joined(client, self.rounds_done + 1)

    def advance(self, merged: Tensor, buffers: Tensor | None = None) -> None:
        """End a round: base ← base + what the server optimizer makes of `merged`, float32 [n], which may be changed.

        buffers: the shared ones' new values, float32 [b]; no optimizer has a say in them.
        Where steps travel, the base moves by what the clients will decode (`Downlink`). All is written to disk before
        anything else happens. RunError if a value is not finite; the checkpoint before it stays.
        """
        self._tell_collapse()
        step = self.optimizer.step(merged, self.rounds_done + 1)
        if not is_finite(step):
            raise RunError(
                f"round {self.rounds_done + 1}: the step is not finite; try a lower learning-rate or scaling"
            )
        self.downlink.move(self.base, step, self.rounds_done + 1, buffers)
        self.digest = vectors.digest(self.base)
        self.rounds_done += 1
        state = self.optimizer.state | ({} if self.downlink.residual is None else {"residual": self.downlink.residual})
        kept = self.settings.keep_checkpoints
        save_checkpoint(
            self.directory, self.rounds_done, self.base, self.base_layout, state, kept, self.digest, self._good()
        )

    def _good(self) -> set[Path]:
        """The checkpoints of those that are there whose base did best on validation."""
        known = {rounds_of(path): path for path in checkpoints(self.directory)}
        return {known[n] for n in self._validation.good(known)}

    @property
    def over(self) -> bool:
        """Whether no round is left: all were done, or `patience` has run out."""
        return self.rounds_done >= self.settings.rounds or self._impatient

    @property
    def _impatient(self) -> bool:
        """Whether the best validation accuracy is `patience` or more rounds old."""
        return 0 < self.settings.patience <= self._validation.rounds_since_best()

    def _tell_collapse(self) -> None:
        if text := self._validation.collapse(self.rounds_done):
            self.record("warning", self.rounds_done, text=text)

    @property
    def bytes_down(self) -> int:
        """Bytes of what a client is sent to know the current base."""
        return self.base.nbytes if self.downlink.delta is None else size_of(self.downlink.delta)

    def close(self) -> None:
        """Close the sinks and let others have the directory."""
        try:
            self._tell_collapse()
            if self._impatient and self.rounds_done < self.settings.rounds:
                patience = self.settings.patience
                text = f"no better validation accuracy in {patience} rounds, as patience={patience} says"
                self.record("stop", self.rounds_done, text=text)
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
            **({"plugins": plugins} if (plugins := noted_plugins(self.settings)) else {}),
            "layout": self.base_layout.digest,
            "elements": self.base_layout.size,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "machine": {"processor": processor(), "cores": torch.multiprocessing.cpu_count()},
        }
        with atomic_write(self.directory / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")

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
            warning = f"lines {', '.join(map(str, damaged[:10]))} of metrics.jsonl are damaged and left out"
            warnings.append(f"{warning}; the old file is in {self.directory / SET_ASIDE}")
        seen = {name for line in kept for name in (line.get("task"), *line.get("failures", ()))}
        self._added = [client for client in self.settings.party_names if done and seen and client not in seen]
        """Clients that are new in the rounds to come."""
        norms = (line.get("usual_norm", 0.0) for line in kept if line["kind"] == "merge")
        self.usual_norm = max((norm for norm in norms if isinstance(norm, float)), default=0.0)
        for line in kept:
            self._validation.note(line)
            self.membership.note(line)
        for task, first in self.membership.joined.items():
            self.settings = self.settings.joined(task, first)
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def _set_aside(self, files: list[Path]) -> None:
        """Move files of this directory to a new folder of set-aside/, where nothing looks for them."""
        folder = self.directory / SET_ASIDE
        number = len(list(folder.glob("*"))) + 1
        for path in files:
            moved = folder / f"{number}" / path.name
            moved.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, moved)


SET_ASIDE = "set-aside"


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
