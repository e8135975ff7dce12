"""Which merges help inside ATM: PA-ATM with every merge and server optimizer, at default and tuned strength.

A row is a set of settings with one setting to tune. Each row runs once as it is, `rounds` rounds; then every candidate
value of its tuned setting for `tuning-rounds`, and the one of the best mean validation accuracy on to `rounds`. Every
run is an ordinary run directory and resumes by itself. Test splits are only read for the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from atm_fl.errors import RunError, SettingError
from atm_fl.federation.loop import run_loop
from atm_fl.runs.checkpoints import checkpoints
from atm_fl.runs.metrics import read_metrics
from atm_fl.settings import Settings
from atm_fl.tables import markdown
from atm_fl.training.evaluation import mean_accuracy


@dataclass(frozen=True)
class MergeRow:
    """One line of the table: its own settings, and the values that its tuned setting `tune` may take."""

    name: str
    settings: dict[str, Any]
    tune: str
    values: tuple[float | str, ...]


@dataclass(frozen=True)
class MergeStudy:
    """A study's configuration: see configs/merges.toml."""

    folder: Path
    settings: dict[str, Any]
    seeds: list[int]
    rounds: int
    early: int
    tuning_rounds: int
    reference: str
    rows: list[MergeRow]

    @classmethod
    def of(cls, values: dict[str, Any]) -> MergeStudy:
        """The study of a file's values. TypeError or KeyError for a wrong key, SettingError for a wrong setting."""
        rows = [
            MergeRow(
                name,
                row,
                row.pop("tune", "scaling"),
                tuple(v if isinstance(v, str) else float(v) for v in row.pop("values")),
            )
            for name, row in values["rows"].items()
        ]
        study = cls(**values | {"folder": Path(values["folder"]), "rows": rows})
        if study.reference not in [row.name for row in rows]:
            raise SettingError(f"reference={study.reference!r} is none of the study's rows")
        for row in rows:
            for unit in (
                MergeUnit(study, 0, row, None, 1),
                *(MergeUnit(study, 0, row, value, 1) for value in row.values),
            ):
                Settings.parse(unit.settings())
        return study


@dataclass(frozen=True)
class MergeUnit:
    """One run: a row, at its own strength (None) or with a value of its tuned setting, up to `rounds` rounds."""

    study: MergeStudy
    seed: int
    row: MergeRow
    value: float | str | None
    rounds: int

    @property
    def folder(self) -> Path:
        """Its run directory."""
        choice = "default" if self.value is None else f"{self.row.tune}-{_text(self.value).replace(':', '-')}"
        return self.study.folder / f"seed-{self.seed}" / self.row.name / choice

    def settings(self) -> dict[str, Any]:
        """Its run config."""
        tuned = {} if self.value is None else {self.row.tune: self.value}
        return {
            **self.study.settings,
            **self.row.settings,
            **tuned,
            "seed": self.seed,
            "rounds": self.rounds,
            "test-every": self.study.early,
            "run-dir": str(self.folder),
        }

    def __str__(self) -> str:
        choice = "default" if self.value is None else f"{self.row.tune} {_text(self.value)}"
        return f"seed {self.seed}, {self.row.name}, {choice}, {self.rounds} rounds"


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def phases(study: MergeStudy) -> Iterator[list[MergeUnit]]:
    """Units that may run side by side; a later phase needs the results of the one before it."""
    runs = [(seed, row) for seed in study.seeds for row in study.rows]
    yield [MergeUnit(study, seed, row, None, study.rounds) for seed, row in runs]
    yield [MergeUnit(study, seed, row, value, study.tuning_rounds) for seed, row in runs for value in row.values]
    yield [MergeUnit(study, seed, row, best_value(study, seed, row), study.rounds) for seed, row in runs]


def run_unit(unit: MergeUnit) -> str:
    """Do one run, or what is left of it. A run that ends with a RunError is kept as one that came to nothing."""
    if not finished(unit):
        settings = Settings.parse(unit.settings() | {"resume": bool(checkpoints(unit.folder))})
        try:
            run_loop(settings)
        except RunError as error:
            _failure(unit).write_text(f"{error}\n")
            return f"{unit}: {error}"
    return str(unit)


def finished(unit: MergeUnit) -> bool:
    """Whether all parties evaluated its base after `rounds` rounds, or it came to nothing."""
    tasks = Settings.parse(unit.settings()).task_names
    return _failure(unit).exists() or len(_accuracies(unit, "test", unit.rounds)) == len(tasks)


def best_value(study: MergeStudy, seed: int, row: MergeRow) -> float | str | None:
    """The value (None: the default) with the best mean validation accuracy after `tuning-rounds` rounds."""
    return max(
        (None, *row.values), key=lambda value: validation(MergeUnit(study, seed, row, value, 0), study.tuning_rounds)
    )


def table(study: MergeStudy) -> str:
    """The table in Markdown, means over tasks and seeds: accuracies in %, and the first round at which the validation
    accuracy is at least the reference row's, untuned, in the last."""
    early, last = study.early, study.rounds
    head = ["setting", f"default: test at {early}", f"at {last}", "reaches in"]
    head += ["tuned", f"test at {early}", f"at {last}", "reaches in"]
    reference = next(row for row in study.rows if row.name == study.reference)
    goals = {seed: validation(MergeUnit(study, seed, reference, None, last), last) for seed in study.seeds}
    rows = []
    for row in study.rows:
        best = {seed: best_value(study, seed, row) for seed in study.seeds}
        plain = [MergeUnit(study, seed, row, None, last) for seed in study.seeds]
        tuned = [MergeUnit(study, seed, row, best[seed], last) for seed in study.seeds]
        values = ", ".join(sorted({"default" if value is None else _text(value) for value in best.values()}))
        cells = [row.name, *_cells(plain, goals), f"{row.tune} {values}", *_cells(tuned, goals)]
        rows.append((max(_test(tuned), _test(plain)), cells))
    return markdown(head, (cells for _, cells in sorted(rows, key=lambda pair: -pair[0])))


def page(study: MergeStudy) -> Path:
    """Write the table to table.md in the study's folder; its path."""
    path = study.folder / "table.md"
    path.write_text(table(study) + "\n")
    return path


def _cells(units: list[MergeUnit], goals: dict[int, float]) -> list[str]:
    """Test accuracies early and last, and rounds to the goal, of one setting over the seeds."""
    early = units[0].study.early
    accuracies = [mean_accuracy(_accuracies(unit, "test", early)) for unit in units if not _failure(unit).exists()]
    reached = []
    for unit in units:
        rounds = range(1, unit.rounds + 1)
        reached.append(next((k for k in rounds if validation(unit, k) >= goals[unit.seed]), None))
    first_round = "never" if None in reached else f"{mean(k for k in reached if k):g}"
    if len(accuracies) < len(units):
        return ["not finite", "not finite", first_round]
    return [f"{100 * mean(accuracies):.1f}", f"{100 * _test(units):.1f}", first_round]


def _test(units: list[MergeUnit]) -> float:
    """Mean test accuracy in the last round; 0 where a run came to nothing."""
    return mean(
        0.0 if _failure(unit).exists() else mean_accuracy(_accuracies(unit, "test", unit.rounds)) for unit in units
    )


def validation(unit: MergeUnit, round_number: int) -> float:
    """Mean validation accuracy after a round, −1 if the run did not come so far."""
    accuracies = _accuracies(unit, "validation", round_number)
    return mean_accuracy(accuracies) if accuracies else -1.0


def _accuracies(unit: MergeUnit, split: str, round_number: int) -> dict[str, float]:
    """Each task's accuracy on `split` after a round, empty if there is none."""
    lines = read_metrics(unit.folder) if (unit.folder / "metrics.jsonl").exists() else ()
    return {
        line["task"]: line[split]
        for line in lines
        if line["kind"] == "evaluation" and line["round"] == round_number and split in line
    }


def _failure(unit: MergeUnit) -> Path:
    """Where the error is kept of a run that came to nothing."""
    return unit.folder / "failed.txt"


read = MergeStudy.of
"""A study of the values in a TOML file: see `read_study`."""
