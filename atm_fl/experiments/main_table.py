"""The main table: pretrained, single-task, tuned one-shot mean and PA-ATM, over seeds, at equal steps.

One study is a folder of units, each resumable by itself: one-shot units (every task tuned alone for `epochs` from the
pretrained base) and PA-ATM runs (ordinary run directories). The scaling of the one-shot merge is tuned on validation
splits for every seed, over `one-shot-scalings`; that of PA-ATM on the validation splits of the first seed, by runs of
`rounds` rounds with each of `atm-scalings`. Test splits are only read for the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from atm_fl.errors import SettingError
from atm_fl.evaluation import mean_accuracy, normalised_accuracy
from atm_fl.files import atomic_write
from atm_fl.loop import run_loop
from atm_fl.party import Party
from atm_fl.runs import checkpoints, read_metrics
from atm_fl.settings import Settings

Accuracies = dict[str, float]
"""Accuracy (0..1) by task."""


@dataclass(frozen=True)
class Study:
    """A study's configuration: see configs/study.toml."""

    folder: Path
    settings: dict[str, Any]
    seeds: list[int]
    epochs: int
    rounds: int
    long_rounds: int
    one_shot_scalings: list[float]
    atm_scalings: list[float]

    @classmethod
    def of(cls, values: dict[str, Any]) -> Study:
        """The study of a file's values. TypeError or KeyError for a wrong key, SettingError for a wrong setting."""
        study = cls(**values | {"folder": Path(values["folder"])})
        Settings.parse(study.settings)
        return study

    def run_settings(self, seed: int, **more: Any) -> Settings:
        """The settings of one unit."""
        return Settings.parse({**self.settings, "seed": seed, **more})


@dataclass(frozen=True)
class Unit:
    """A piece of work that one process does: a one-shot unit, or with `scaling` a PA-ATM run of `rounds` rounds."""

    study: Study
    seed: int
    scaling: float | None = None
    rounds: int = 0

    @property
    def folder(self) -> Path:
        """Where its results are."""
        kind = "one-shot" if self.scaling is None else f"atm-{self.scaling:g}"
        return self.study.folder / f"seed-{self.seed}" / kind

    def __str__(self) -> str:
        return f"seed {self.seed}, " + (
            "one-shot" if self.scaling is None else f"PA-ATM, scaling {self.scaling:g}, {self.rounds} rounds"
        )


def phases(study: Study) -> Iterator[list[Unit]]:
    """Units that may run side by side; a later phase needs the results of the one before it.

    Longest first, so that processes end at about the same time.
    """
    first, *rest = study.seeds
    tuning = [Unit(study, first, scaling, study.rounds) for scaling in study.atm_scalings]
    plain = [Unit(study, seed, 1.0, study.rounds) for seed in rest]
    yield [*tuning, *plain, *(Unit(study, seed) for seed in study.seeds)]
    best = best_atm_scaling(study)
    yield [Unit(study, seed, best, study.long_rounds) for seed in study.seeds]


def run_unit(unit: Unit) -> str:
    """Do one unit, or what is left of it."""
    if unit.scaling is None:
        _one_shot(unit)
    else:
        done = bool(checkpoints(unit.folder))
        more = {"scaling": unit.scaling, "rounds": unit.rounds, "test-every": unit.study.rounds}
        if not done or len(mean_by_round(unit.folder, "test", unit.rounds)) < len(
            Settings.parse(unit.study.settings).task_names
        ):
            run_loop(unit.study.run_settings(unit.seed, **more, **{"run-dir": str(unit.folder), "resume": done}))
    return str(unit)


def _one_shot(unit: Unit) -> None:
    """Tune every task alone, then evaluate the scaled means. Vectors stay on disk, so that a break loses one task."""
    settings = unit.study.run_settings(unit.seed, **{"local-epochs": unit.study.epochs})
    decides = {"settings": settings.decisive(), "one-shot-scalings": unit.study.one_shot_scalings}
    config, results = unit.folder / "config.json", unit.folder / "results.json"
    if config.exists() and json.loads(config.read_text()) != decides:
        raise SettingError(f"{unit.folder} holds results of another configuration; choose another folder or delete it")
    with atomic_write(config) as part:
        part.write_text(json.dumps(decides, indent=1))
    if results.exists():
        return
    parties = [Party(settings, name) for name in settings.task_names]
    base = parties[0].model.pretrained
    vectors, single, start = {}, {}, {}
    for party in parties:
        path = unit.folder / f"{party.task}.safetensors"
        if not path.exists():
            update = party.train(base, 1)
            with atomic_write(path) as part:
                save_file({"vector": update.vector}, str(part))
        vectors[party.task] = load_file(str(path))["vector"]
        start[party.task] = party.evaluate(base, ("test",))["test"]
        single[party.task] = party.evaluate(base + vectors[party.task], ("test",))["test"]
    merged = torch.stack(list(vectors.values())).mean(0)
    by_scaling = {}
    for scaling in unit.study.one_shot_scalings:
        both = {party.task: party.evaluate(base + scaling * merged, ("validation", "test")) for party in parties}
        by_scaling[scaling] = {split: {task: a[split] for task, a in both.items()} for split in ("validation", "test")}
    best = max(by_scaling, key=lambda scaling: mean_accuracy(by_scaling[scaling]["validation"]))
    found = {
        "pretrained": start,
        "single": single,
        "scaling": best,
        "one-shot": by_scaling[best]["test"],
        "validation": {scaling: mean_accuracy(found["validation"]) for scaling, found in by_scaling.items()},
    }
    with atomic_write(results) as part:
        part.write_text(json.dumps(found, indent=1))


def mean_by_round(folder: Path, split: str, round_number: int) -> Accuracies:
    """Each task's accuracy on `split` after `round_number` rounds of a run; empty if it was not evaluated."""
    return {
        line["task"]: line[split]
        for line in read_metrics(folder)
        if line["kind"] == "evaluation" and line["round"] == round_number and split in line
    }


def best_atm_scaling(study: Study) -> float:
    """The scaling with the best mean validation accuracy after `rounds` rounds of the first seed."""
    return max(
        study.atm_scalings,
        key=lambda scaling: mean_accuracy(
            mean_by_round(Unit(study, study.seeds[0], scaling).folder, "validation", study.rounds)
        ),
    )


def rows(study: Study) -> dict[str, list[Accuracies]]:
    """Test accuracies by model, one entry a seed."""
    best = best_atm_scaling(study)
    found: dict[str, list[Accuracies]] = {}
    for seed in study.seeds:
        one_shot = json.loads((Unit(study, seed).folder / "results.json").read_text())
        plain, tuned = Unit(study, seed, 1.0).folder, Unit(study, seed, best).folder
        for name, accuracies in {
            "pretrained": one_shot["pretrained"],
            f"single-task, {study.epochs} epochs": one_shot["single"],
            f"one-shot mean, tuned scaling, {study.epochs} epochs": one_shot["one-shot"],
            f"PA-ATM, scaling 1, {study.rounds} rounds": mean_by_round(plain, "test", study.rounds),
            f"PA-ATM, scaling {best:g}, {study.rounds} rounds": mean_by_round(tuned, "test", study.rounds),
            f"PA-ATM, scaling {best:g}, {study.long_rounds} rounds": mean_by_round(tuned, "test", study.long_rounds),
        }.items():
            found.setdefault(name, []).append(accuracies)
    return found


def table(study: Study) -> str:
    """The main table in Markdown: test accuracy % per task, mean ± over seeds, normalised by the single-task models."""
    found = rows(study)
    single = next(accuracies for name, accuracies in found.items() if name.startswith("single"))
    tasks = list(single[0])
    head = ["model", *tasks, "mean", "normalised"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, seeds in found.items():
        means = [100 * mean_accuracy(accuracies) for accuracies in seeds]
        spread = f" ± {stdev(means):.1f}" if len(means) > 1 else ""
        relative = mean(normalised_accuracy(a, s) for a, s in zip(seeds, single, strict=True))
        cells = [f"{100 * mean(accuracies[task] for accuracies in seeds):.1f}" for task in tasks]
        row = [name, *cells, f"{mean(means):.1f}{spread}", f"{100 * relative:.1f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
