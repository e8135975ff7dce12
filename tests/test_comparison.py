"""A folder of runs as a list, and runs side by side, against numbers worked out by hand."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from federation import call
from test_report import evaluation, merge, tuning, whole_run, write_run

from atm_fl.errors import RunError
from atm_fl.runs import directory
from atm_fl.runs.comparison import Summary, list_runs, names_of, write_comparison


def folder_of_runs(root: Path) -> Path:
    """A finished run, one that broke off in its second round, and one of a damaged configuration."""
    for name in ("good", "deep/broken", "damaged"):
        (root / name).mkdir(parents=True)
    write_run(root / "good", whole_run())
    private = tuning(1, "mnist") | {"epsilon": 2.25}
    write_run(root / "deep" / "broken", [evaluation(0, "mnist", validation=0.5), private, merge(1, ("mnist",))])
    config = json.loads((root / "deep" / "broken" / "config.json").read_text())
    config["settings"] |= {"merge": "ties", "scaling": 1.5, "privacy": "dp-sgd"}
    (root / "deep" / "broken" / "config.json").write_text(json.dumps(config))
    write_run(root / "damaged", whole_run())
    (root / "damaged" / "config.json").write_text("[]")
    return root


def test_a_folder_s_runs_are_listed_with_what_they_reached_and_cost(tmp_path: Path) -> None:
    listed = {run.name: run.cells()[1:] for run in list_runs(folder_of_runs(tmp_path))}
    assert listed == {
        "good": ("mean", "3/3", "75.0", "mnist 65.0", "–", "108.0 kB", "finished"),
        "deep/broken": ("ties, scaling 1.5", "1/3", "50.0 v", "mnist 50.0", "2.25", "12.0 kB", "unfinished"),
        "damaged": ("–", "0/0", "–", "–", "–", "0.0 kB", "damaged"),
    }


def test_a_run_that_a_process_holds_is_running(tmp_path: Path) -> None:
    write_run(tmp_path, whole_run()[:8])
    with closing(directory.lock(tmp_path)):
        assert Summary.of(tmp_path).state == "running"
    assert Summary.of(tmp_path).state == "unfinished"
    with closing(directory.lock(tmp_path)):  # to look does not take the directory from anyone
        pass


def test_runs_are_told_apart_by_as_much_of_their_path_as_they_need(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a" / "run", tmp_path / "b"]) == ["run", "b"]
    assert names_of([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert names_of([tmp_path / "a", tmp_path / "a"]) == ["a", "a (2)"]


def test_runs_side_by_side_show_curves_tasks_and_the_settings_that_differ(tmp_path: Path) -> None:
    folder = folder_of_runs(tmp_path / "<b>")
    page = write_comparison([folder / "good", folder / "deep" / "broken"], tmp_path / "page.html").read_text()
    assert "good is ahead with 75.0 % mean test accuracy. Not all were measured on the same split." in page
    assert "<tr><td>merge</td><td>mean</td><td>ties</td></tr>" in page
    assert "<tr><td>solar</td><td>85.0</td><td>–</td></tr>" in page
    assert "<td>learning-rate</td>" not in page  # the same in both
    assert "<title>round 0\ngood: 10.0\nbroken: 50.0</title>" in page
    assert "<b>good" in page
    assert page.count("<svg ") == 2


def test_the_commands_list_and_compare_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of_runs(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, "runs") == 0
    listed = capsys.readouterr().out
    for text in ("good", "mnist", "75.0", "finished", "unfinished"):
        assert text in listed
    assert "…" not in listed
    assert call(monkeypatch, "report", str(folder / "good"), str(folder / "deep" / "broken")) == 0
    assert "comparison.html" in capsys.readouterr().out
    assert (tmp_path / "comparison.html").exists()
    assert call(monkeypatch, "report", str(folder / "good"), str(folder)) == 1
    assert "is not a run directory" in capsys.readouterr().err
    assert call(monkeypatch, "runs", str(tmp_path / "none")) == 1
    assert "none is not a folder" in capsys.readouterr().err


def test_a_folder_without_runs(tmp_path: Path) -> None:
    assert list(list_runs(tmp_path)) == []
    with pytest.raises(RunError, match="is not a folder"):
        list(list_runs(tmp_path / "none"))
