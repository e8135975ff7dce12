"""What a run is held against: the single-task and joint models that a contest has measured beside it.

A contest (`atm_fl/experiments/contest.py`) keeps a seed's units in one folder, seed-N. So the references of a run in
such a folder are there, and a run elsewhere has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atm_fl.errors import RunError
from atm_fl.runs.metrics import read_metrics
from atm_fl.settings import defaults
from atm_fl.training.evaluation import mean_accuracy

SHARED = ("tasks", "model", "weights", "head", "shots", "trainable", "seed")
"""The settings in which a run and its references must agree."""


def find_references(directory: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Mean accuracies in 0..1 by split and reference, "single-task" or "joint", of what a run's contest has finished.

    settings: the run's. Of joint models with several values of a tuned setting, the best on validation. A file of
    another make is passed over.
    """
    seed = next((folder for folder in directory.resolve().parents if re.fullmatch(r"seed-\d+", folder.name)), None)
    means: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
    for config in sorted(seed.glob("**/config.json")) if seed else ():
        try:
            theirs = json.loads(config.read_text())["settings"]
            if any(_value(theirs, key) != _value(settings, key) for key in SHARED):
                continue
            kind, accuracies = _single(config.parent) or _joint(config.parent) or ("", {})
            if kind == "joint" and _value(theirs, "private") != _value(settings, "private"):
                continue  # another kind of model
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RunError):
            continue
        if kind and accuracies["validation"] > means["validation"].get(kind, -1.0):
            for split in means:
                means[split][kind] = accuracies[split]
    return means


def _value(settings: Mapping[str, Any], key: str) -> Any:
    return settings.get(key, defaults()[key])


def _single(folder: Path) -> tuple[str, dict[str, float]] | None:
    """Of a unit of kind single: {task: {"after": {split: accuracy}, …}} in results.json."""
    path = folder / "results.json"
    tasks = json.loads(path.read_text()) if path.exists() else {}
    if not tasks or not all(isinstance(task, dict) and "after" in task for task in tasks.values()):
        return None
    return "single-task", {
        split: mean_accuracy({name: task["after"][split] for name, task in tasks.items()})
        for split in ("validation", "test")
    }


def _joint(folder: Path) -> tuple[str, dict[str, float]] | None:
    """Of a joint run that was evaluated on both splits to its end: its tuning lines have the task "joint"."""
    path = folder / "metrics.jsonl"
    if not path.exists() or '"task": "joint"' not in path.read_text():
        return None
    rounds = json.loads((folder / "config.json").read_text())["rounds"]
    last = [line for line in read_metrics(folder) if line["kind"] == "evaluation" and line["round"] == rounds]
    if not last or not all("test" in line and "validation" in line for line in last):
        return None
    return "joint", {
        split: mean_accuracy({line["task"]: line[split] for line in last}) for split in ("validation", "test")
    }
