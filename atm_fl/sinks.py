"""Metric sinks: where the lines of metrics.jsonl go besides. The setting `metric-sinks` names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from atm_fl.plugins import Registry


class Sink:
    """One sink of one run; what it has no use for it leaves out. An error in it ends the run."""

    def started(self, directory: Path, settings: Mapping[str, Any], rounds_done: int) -> None:
        """The run begins, or goes on after `rounds_done` rounds; what came later is told again. settings: by key."""

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: `kind`, `round`, `time` and the values that `Run.record` explains."""

    def closed(self) -> None:
        """The run is over, or has failed."""


SINKS: Registry[type[Sink]] = Registry("metric sink")
_Class = TypeVar("_Class", bound=type[Sink])


def sink(name: str) -> Callable[[_Class], _Class]:
    """Register the decorated class as the sink `name`."""
    return SINKS.register(name)


@sink("tensorboard")
class TensorBoard(Sink):
    """TensorBoard events in the run's directory: all numbers, by kind and task, and evaluations' means over tasks."""

    def started(self, directory: Path, settings: Mapping[str, Any], rounds_done: int) -> None:
        self._directory, self._first = directory, rounds_done + 1
        self._writer: Any = None
        self._clients = len(str(settings["tasks"]).split(","))
        self._accuracies: dict[tuple[str, int], dict[str, float]] = {}

    def line(self, line: Mapping[str, Any]) -> None:
        prefix = f"{line['kind']}/{line['task']}" if "task" in line else line["kind"]
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in ("round", "time"):
                self._add(f"{prefix}/{name}", value, line["round"])
        for split in ("validation", "test") if line["kind"] == "evaluation" else ():
            if split in line:
                accuracies = self._accuracies.setdefault((split, line["round"]), {})
                accuracies[line["task"]] = line[split]
                if len(accuracies) == self._clients:
                    self._add(f"evaluation/mean/{split}", sum(accuracies.values()) / self._clients, line["round"])

    def _add(self, name: str, value: float, round_number: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory / "tensorboard"), purge_step=self._first)
        self._writer.add_scalar(name, value, round_number)

    def closed(self) -> None:
        if self._writer is not None:
            self._writer.close()
