"""The library from Python: what `import atm_fl` offers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from atm_fl.errors import SettingError
from atm_fl.merging import MERGES
from atm_fl.merging.checkpoint_files import Merged, merge_files
from atm_fl.options import read_choice
from atm_fl.runs.comparison import write_comparison
from atm_fl.runs.directory import swept_if_failed
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.report import Record, result_text, write_report
from atm_fl.settings import Settings, defaults, read_toml

if TYPE_CHECKING:
    from atm_fl.exports import Export, Predictor
    from atm_fl.models import Backbone, TextModel

Accuracies = dict[int, dict[str, float]]
"""Rounds done → client → accuracy, 0 to 1."""


class Result:
    """A run by its directory, finished or not; everything is read when it is asked for.

    RunError if `directory` is no run's.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        Record.read(self.directory)

    def __repr__(self) -> str:
        return f"<Result {self.directory}: {result_text(self._record)}>"

    @property
    def _record(self) -> Record:
        return Record.read(self.directory)

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings by key, as in its TOML file."""
        return self._record.settings

    @property
    def rounds(self) -> int:
        """Rounds that are done."""
        return self._record.rounds_done

    @property
    def state(self) -> str:
        """finished, stopped (before its last round: by patience or a callback) or unfinished."""
        return self._record.state

    @property
    def validation(self) -> Accuracies:
        """Accuracies of the base on the clients' validation splits."""
        return self._accuracies("validation")

    @property
    def test(self) -> Accuracies:
        """Accuracies of the base on the clients' test splits."""
        return self._accuracies("test")

    def _accuracies(self, split: str) -> Accuracies:
        table: Accuracies = {}
        for task, series in self._record.by_task("evaluation", split).items():
            for number, value in series.items():
                table.setdefault(number, {})[task] = value
        return dict(sorted(table.items()))

    @property
    def best_round(self) -> int | None:
        """The round of the highest mean validation accuracy; None if fewer than two were measured."""
        return self._record.best_round("validation")

    @property
    def epsilon(self) -> dict[str, float]:
        """What differential privacy has been spent, by what it protects; empty without any."""
        return self._record.epsilon()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: see `atm_fl.runs.run.Run.record`."""
        return list(read_metrics(self.directory))

    @property
    def warnings(self) -> list[str]:
        """What the run has warned of."""
        return [line["text"] for line in self.metrics if line["kind"] == "warning"]

    def model(self, round: int | None = None, party: str | None = None) -> Backbone | TextModel:
        """The shared model, as of images uint8 [n, 3, h, w] → features [n, d], after a round whose checkpoint is there.

        By default the newest; 0 is the first base. party: whose private entries are in it: see `atm_fl.exports.export`.
        """
        from atm_fl.exports.export import model_of, owner_of, settings_of

        notes: list[str] = []
        owner = owner_of(self._record.config["run"], settings_of(self.directory), party)
        found = model_of(self.directory, round, notes, owner)[1]
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return found

    def state_dict(self, round: int | None = None, party: str | None = None) -> dict[str, Tensor]:
        """The entries of `model`, by the names of the library that it comes from."""
        from atm_fl.exports.formats import entries

        return entries(self.model(round, party))

    def export(
        self,
        to: str = "safetensors",
        out: str | Path = "export",
        round: int | None = None,
        heads: Collection[str] | None = None,
        party: str | None = None,
    ) -> Export:
        """Write the model for other libraries: see `atm_fl.exports.export`."""
        from atm_fl.exports import export

        return export(self.directory, to, out, round, heads, party)

    def report(self) -> Path:
        """Write report.html and accuracy.png; returns the page's path."""
        return write_report(self.directory)


Callback = Callable[[Result], object]
"""Is called after each round with the run so far. The accuracies of a base are measured in the round after it. The run
ends, its checkpoints kept, if it returns True."""


def run(
    settings: str | Path | Mapping[str, Any] | None = None, *, callbacks: Sequence[Callback] = (), **overrides: Any
) -> Result:
    """Run to the end in this process, without Flower: other runtimes end with the same bits (`atm-fl run --runtime`).

    settings: a TOML file as in configs/, or values by key; overrides: values over them. Keys are those of
    `atm-fl settings`, with `_` or `-`.

    SettingError before any work if a value cannot work; RunError if the run cannot go on.
    """
    from atm_fl.federation.loop import check_plain, run_loop

    chosen = read_settings(settings, overrides)
    check_plain(chosen)
    folder = Path(chosen.run_dir)

    def after_round(_: object) -> bool:
        result = Result(folder)
        answers = [callback(result) for callback in callbacks]
        return any(answer is True for answer in answers)

    with swept_if_failed(folder):
        run_loop(chosen, after_round=after_round)
    return Result(folder)


def read_settings(settings: str | Path | Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> Settings:
    """Settings of a file or of values, with others over them. SettingError if one cannot work."""
    values = read_toml(Path(settings)) if isinstance(settings, str | Path) else dict(settings or {})
    values = {key.replace("_", "-"): value for key, value in [*values.items(), *overrides.items()]}
    known = defaults()
    return Settings.parse({key: str(value) if isinstance(value, Path) else _fitting(value, known.get(key))
                           for key, value in values.items()})  # fmt: skip


def _fitting(value: Any, default: Any) -> Any:
    """A list of names as the setting's text."""
    if isinstance(default, str) and isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return value


def load(run: str | Path) -> Result:
    """The run of a directory. RunError if it is none."""
    return Result(run)


def predictor(export: str | Path) -> Predictor:
    """An exported model with heads, as a classifier of pictures: see `atm_fl.exports.Predictor`."""
    from atm_fl.exports import Predictor

    return Predictor(export)


def compare(*runs: Result | str | Path, out: str | Path = "comparison.html") -> Path:
    """Write a page with runs side by side: accuracies, curves, settings that differ. Returns `out`."""
    if len(runs) < 2:
        raise SettingError(f"compare takes two runs or more, not {len(runs)}")
    return write_comparison([run.directory if isinstance(run, Result) else Path(run) for run in runs], Path(out))


def merge(
    base: str | Path,
    files: Sequence[str | Path | Result],
    out: str | Path,
    method: str = "mean",
    scaling: float | None = None,
    **more: Any,
) -> Merged:
    """Merge models that were fine-tuned from `base` into `out`: files, folders, runs; as `atm-fl merge` does.

    method: with its options, as "ties:density=0.1"; scaling: its factor λ, by default its own. more: what
    `merging.checkpoint_files.merge_files` takes besides.
    """
    choice = read_choice("method", method, MERGES)
    paths = [file.directory if isinstance(file, Result) else Path(file) for file in files]
    chosen = choice.values | ({} if scaling is None else {"scaling": scaling})
    return merge_files(Path(base), paths, Path(out), choice.name, chosen=chosen, **more)
