"""An order in which tasks join, chosen by a run's first round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from federation import call
from test_participation import lines

from atm_fl.errors import RunError, SettingError
from atm_fl.experiments.curriculum import curriculum
from atm_fl.federation.loop import run_loop
from atm_fl.settings import Settings


def told(run: Path, losses: dict[str, float], cosines: list[list[float]]) -> Path:
    """A finished run, with other numbers in its first round."""
    path = run / "metrics.jsonl"
    changed = []
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if line["round"] == 1 and line["kind"] == "tuning":
            line["loss"] = losses.get(line["task"])
        if line["round"] == 1 and line["kind"] == "merge":
            line["cosines"] = cosines
        changed.append(json.dumps(line) + "\n")
    path.write_text("".join(changed))
    return run


@pytest.fixture
def run(config: dict[str, Any]) -> Path:
    """Green agrees with both others, blue with green alone; blue has the least loss and green the most."""
    directory = run_loop(Settings.parse(config | {"rounds": 2})).directory
    cosines = [[1.0, 0.5, -0.2], [0.5, 1.0, 0.1], [-0.2, 0.1, 1.0]]
    return told(directory, {"red": 1.0, "green": 2.0, "blue": 0.5}, cosines)


@pytest.mark.parametrize(
    ("chosen", "order"),
    [
        ({}, "red=2-, green=3-"),
        ({"every": 3}, "red=4-, green=7-"),
        ({"reverse": True}, "red=2-, blue=3-"),
        ({"by": "alignment"}, "red=2-, blue=3-"),
        ({"by": "alignment", "reverse": True}, "red=2-, green=3-"),
    ],
)
def test_the_order_is_by_the_first_round(run: Path, chosen: dict[str, Any], order: str) -> None:
    assert curriculum(run, **chosen) == order


def test_it_is_a_participation_that_a_run_takes(
    run: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "curriculum", str(run)) == 0
    order = capsys.readouterr().out.strip()
    other = run_loop(Settings.parse(config | {"participation": order, "run-dir": config["run-dir"] + "-next"}))
    assert [line["tasks"] for line in lines(other.directory, "merge")] == [
        *(["blue"], ["red", "blue"], ["red", "green", "blue"])
    ]


def test_several_parties_of_a_task_count_as_their_mean(run: Path, config: dict[str, Any]) -> None:
    first = config["tasks"].split(",")[0]
    config |= {"tasks": f"{config['tasks']},{first}", "rounds": 1, "run-dir": config["run-dir"] + "-four"}
    four = run_loop(Settings.parse(config)).directory
    told(four, {"red": 1.0, "green": 1.5, "blue": 0.5, "red.2": 3.0}, [[1.0] * 3] * 3)
    assert curriculum(four) == "green=2-, red=3-"


@pytest.mark.parametrize(
    ("chosen", "by"),
    [
        ({"participation": "green=2-"}, "loss"),
        ({"participation": "green=2-"}, "alignment"),
        ({"privacy": "clip-only"}, "loss"),
        ({"secure-aggregation": True}, "alignment"),
    ],
)
def test_a_run_that_does_not_tell_it_is_refused(config: dict[str, Any], chosen: dict[str, Any], by: str) -> None:
    run = run_loop(Settings.parse(config | {"rounds": 2} | chosen))
    with pytest.raises(RunError, match=f"does not tell the {by} of .*green.* in its first round"):
        curriculum(run.directory, by)


def test_arguments_that_cannot_work_are_refused(run: Path, tmp_path: Path) -> None:
    for chosen, words in (({"by": "luck"}, "by='luck': it takes one of loss"), ({"every": 0}, "every=0: it must be")):
        with pytest.raises(SettingError, match=words):
            curriculum(run, **chosen)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="is not a run directory"):
        curriculum(tmp_path)
