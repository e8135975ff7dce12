"""Metric sinks: where the lines of metrics.jsonl go besides. The setting `metric-sinks` names them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from atm_fl.errors import SettingError
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
        self._clients = len([name for name in str(settings["tasks"]).split(",") if name.strip() != "*"])
        self._accuracies: dict[tuple[str, int], dict[str, float]] = {}

    def line(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "membership":
            self._clients += -1 if line["event"] == "is away" else 1
        for name, value in numbers(line).items():
            self._add(name, value, line["round"])
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


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by name: kind/task/value, kind/value where it has no task."""
    prefix = f"{line['kind']}/{line['task']}" if "task" in line else line["kind"]
    return {
        f"{prefix}/{name}": value
        for name, value in line.items()
        if isinstance(value, (int, float)) and name not in ("round", "time")
    }


def _package(name: str, extra: str) -> Any:
    """SettingError if the package is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise SettingError(
            f"metric-sinks={extra!r} needs the package {error.name!r}; install it with pip install 'atm-fl[{extra}]'"
        ) from error


@sink("wandb")
class WeightsAndBiases(Sink):
    """Weights & Biases, by its own package, settings and environment (WANDB_PROJECT, WANDB_MODE=offline, …)."""

    def started(self, directory: Path, settings: Mapping[str, Any], rounds_done: int) -> None:
        wandb = _package("wandb", "wandb")
        identity = json.loads((directory / "config.json").read_text())["run"]
        more = {"name": directory.resolve().name, "id": identity, "resume": "allow", "dir": str(directory)}
        self._run = wandb.init(config=dict(settings), **more)
        self._run.define_metric("*", step_metric="round")

    def line(self, line: Mapping[str, Any]) -> None:
        self._run.log({"round": line["round"], **numbers(line)})

    def closed(self) -> None:
        self._run.finish()


@sink("mlflow")
class MLflow(Sink):
    """MLflow, by its own package and environment (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME): a run of its own."""

    def started(self, directory: Path, settings: Mapping[str, Any], rounds_done: int) -> None:
        mlflow = _package("mlflow", "mlflow")
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=directory.resolve().name).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._id, key, value)

    def line(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers(line).items():
            self._client.log_metric(self._id, name.replace(":", "_"), value, step=line["round"])

    def closed(self) -> None:
        self._client.set_terminated(self._id)
