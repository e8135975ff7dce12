"""The study of the main table, on tiny tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atm_fl.errors import SettingError
from atm_fl.experiments import main_table, merge_table, read_study


@pytest.fixture
def study(config: dict[str, Any], tmp_path: Path) -> main_table.Study:
    config.pop("rounds")
    config.pop("run-dir")
    lines = [
        f'study = "main_table"\nfolder = "{tmp_path}/study"',
        "seeds = [0, 1]\nepochs = 2\nrounds = 2\nlong-rounds = 3",
        "one-shot-scalings = [0.5, 1.0]\natm-scalings = [1.0, 1.5]\n[settings]",
        *(f"{key} = {json.dumps(value)}" for key, value in config.items()),
    ]
    (tmp_path / "study.toml").write_text("\n".join(lines))
    found, module = read_study(tmp_path / "study.toml")
    assert module is main_table
    return found


def test_a_study_runs_resumes_and_tabulates(study: main_table.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    for units in main_table.phases(study):
        for unit in units:
            main_table.run_unit(unit)
    lines = main_table.table(study).splitlines()
    assert len(lines) == 2 + (5 if main_table.best_atm_scaling(study) == 1 else 6)
    assert lines[2].startswith("| pretrained")
    assert "PA-ATM, scaling" in lines[-1]
    assert all(len(line.split("|")) == 3 + 3 + 2 for line in lines)
    found = main_table.rows(study)
    assert all(len(seeds) == 2 and len(seeds[0]) == 3 for seeds in found.values())

    # a second go does no work at all
    monkeypatch.setattr(main_table, "run_loop", lambda *_: pytest.fail("a finished unit ran again"))
    monkeypatch.setattr(main_table, "Party", lambda *_: pytest.fail("a finished unit ran again"))
    for units in main_table.phases(study):
        for unit in units:
            main_table.run_unit(unit)


def test_the_one_shot_scaling_is_the_best_on_validation(study: main_table.Study) -> None:
    unit = main_table.Unit(study, 0)
    main_table.run_unit(unit)
    result = json.loads((unit.folder / "results.json").read_text())
    best = max(result["validation"], key=lambda scaling: result["validation"][scaling])
    assert result["scaling"] == float(best)
    assert set(result["single"]) == {"red", "green", "blue"}


def test_a_study_file_that_cannot_work_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text('study = "main_table"\nfolder = "x"\nseed = [1]\n')
    with pytest.raises(SettingError, match="study.toml is not a study"):
        read_study(tmp_path / "study.toml")


@pytest.fixture
def merges(config: dict[str, Any], tmp_path: Path) -> Path:
    """A study of three merges, one of which cannot end well."""
    config.pop("rounds")
    config.pop("run-dir")
    lines = [
        f'study = "merge_table"\nfolder = "{tmp_path}/merges"\nseeds = [0]',
        'rounds = 3\nearly = 2\ntuning-rounds = 1\nreference = "mean"\n[settings]',
        *(f"{key} = {json.dumps(value)}" for key, value in config.items()),
        "[rows]\nmean = { values = [2.0] }",
        'momentum = { server-optimizer = "momentum", tune = "server-learning-rate", values = [0.5] }',
        'huge = { merge = "task-arithmetic", scaling = 1e38, values = [0.2] }',
    ]
    path = tmp_path / "merges.toml"
    path.write_text("\n".join(lines))
    return path


def test_a_study_of_merges_tunes_each_and_keeps_what_came_to_nothing(
    merges: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, module = read_study(merges)
    assert module is merge_table
    told = [merge_table.run_unit(unit) for units in merge_table.phases(study) for unit in units]
    assert any("not finite" in line for line in told)
    for row in study.rows:
        units = [merge_table.Unit(study, 0, row, value, 1) for value in (None, *row.values)]
        best = max(units, key=lambda unit: merge_table.validation(unit, 1))
        assert merge_table.best_value(study, 0, row) == best.value
    head, _, *lines = merge_table.table(study).splitlines()
    assert len(lines) == 3
    assert all(line.count("|") == head.count("|") for line in lines)
    assert "not finite" in next(line for line in lines if line.startswith("| huge"))

    # a second go does no work at all
    monkeypatch.setattr(merge_table, "run_loop", lambda *_: pytest.fail("a finished unit ran again"))
    for units in merge_table.phases(study):
        for unit in units:
            merge_table.run_unit(unit)


def test_a_study_that_does_not_exist_is_named(tmp_path: Path, merges: Path) -> None:
    (tmp_path / "other.toml").write_text('study = "merge_tabel"')
    with pytest.raises(SettingError, match="study='merge_tabel' is unknown; did you mean 'merge_table'"):
        read_study(tmp_path / "other.toml")
    merges.write_text(merges.read_text().replace('reference = "mean"', 'reference = "men"'))
    with pytest.raises(SettingError, match="reference='men' is none of the study's rows"):
        read_study(merges)
