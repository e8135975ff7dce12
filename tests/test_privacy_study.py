"""The study of privacy: accuracy, ε and three attacks of every row, on tiny tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from atm_fl.cli import terminal
from atm_fl.errors import SettingError
from atm_fl.experiments import privacy, read_study
from atm_fl.privacy.accounting import Spent, epsilon
from atm_fl.runs.metrics import read_metrics

STUDY = """
folder = "{folder}/contest"
name = "privacy"
seeds = [0, 1]
epochs = 2
[settings]
{settings}
[reconstruction]
tasks = "{red}"
attack = "inverting"
victims = 2
iterations = 3
[membership]
task = "noise"
members = 60
models = 4
[poisoning]
attack = "backdoor"
attackers = "red"
rounds = 1
[rows]
"""
ROWS = """
"plain" = { }
"one-shot" = { rounds = 1, local-epochs = 2, membership = false }
"frozen" = { trainable = "last-1", reconstruction = { attack = "closed-form" }, poisoning = { attack = "sign-flip" } }
"private" = { privacy = "dp-sgd", dp-epsilon = 4.0, membership = false, poisoning = false }
"""


@pytest.fixture
def file(config: dict[str, Any], noise: str, tmp_path: Path) -> Path:
    red = config["tasks"].split(",")[0]
    config |= {"tasks": f"{noise},{config['tasks']}"}
    for key in ("rounds", "run-dir"):
        del config[key]
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
    path = tmp_path / "privacy.toml"
    path.write_text(STUDY.format(folder=tmp_path, settings=settings, red=red) + ROWS)
    return path


def run(study: privacy.PrivacyStudy) -> list[str]:
    return [privacy.run_unit(unit) for units in privacy.phases(study) for unit in units]


def test_a_study_measures_every_row_and_resumes(file: Path) -> None:
    study = read_study(file, privacy)
    before = {line.name: line.cells() for line in privacy.lines(study)}
    assert before["private"][1:] == ["0", *["–"] * 13]
    run(study)
    actual = {line.name: line for line in privacy.lines(study)}
    for line in actual.values():
        assert len(line.means) == 2
        assert line.worst is not None
        assert line.worst <= sum(line.means) / 2 + 1e-9
        assert line.images is not None
    assert [round_number for round_number, _ in actual["plain"].rates("merged")] == [1, 2]
    assert all(0 <= rate <= 1 for _, rate in actual["plain"].rates("local"))
    assert actual["one-shot"].members is None
    assert actual["frozen"].psnr is None  # no equation without the embeddings
    assert actual["frozen"].poisoned is not None
    assert actual["frozen"].poisoned[1]["attack"] == "sign-flip"
    assert actual["private"].poisoned is None

    output = CliRunner().invoke(terminal.app, ["study", "privacy", str(file), "--report"])
    assert output.exit_code == 0, output.output
    table, page = privacy.table(study), study.runs.reports / "report.html"
    assert table in output.output
    assert table.count("\n") == 1 + 4
    assert "| private | 2 |" in table
    text = page.read_text()
    assert text.count("<figure>") == 2 + 4  # frontiers, rounds, and every row's images
    assert "http://" not in text.replace("http://www.w3.org", "")
    times = {path: path.stat().st_mtime_ns for path in study.runs.folder.rglob("*.json")}
    run(study)
    assert {path: path.stat().st_mtime_ns for path in study.runs.folder.rglob("*.json")} == times

    file.write_text(file.read_text().replace("members = 60", "members = 50"))
    other = read_study(file, privacy)
    assert all(line.members is None for line in privacy.lines(other))  # not those of sixty
    with pytest.raises(SettingError, match="holds results of another configuration; delete it"):
        run(other)


def test_epsilon_and_the_attacked_noise_are_the_runs(file: Path) -> None:
    """ε of the table is what the accountant says of the noise that the attack was measured with."""
    study = read_study(file, privacy)
    run(study)
    line = next(line for line in privacy.lines(study) if line.name == "private")
    assert line.epsilon is not None
    assert 3.5 < line.epsilon <= 4
    row = next(row for row in study.runs.rows if row.name == "private")
    (leak,) = study.leaks(row)
    lines = [line for line in read_metrics(leak.run.folder) if line["kind"] == "tuning" and line["task"] == "red"]
    assert leak.pictured().values["dp-noise"] == lines[-1]["noise"] > 0
    images = 36  # of the folder task's training split
    spent = Spent(8 / images, lines[-1]["noise"], 2 * round(images / 8))
    assert lines[-1]["epsilon"] == pytest.approx(epsilon([spent], 1e-5), rel=1e-3)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('"x" = { kind = "one-shot" }', "row 'x': it takes settings and reconstruction, membership, poisoning"),
        ('"x" = { reconstruction = { victims = 0 } }', "row 'x', reconstruction: victims=0"),
        ('"x" = { poisoning = { attackers = "blue" }, tasks = "noise" }', "row 'x', poisoning: --attackers blue"),
        ('"x" = { poisoning = { attack = "sign-flop" } }', "attack='sign-flop' is unknown"),
        ('"x" = { membership = { rounds = 0 } }', "row 'x', membership: rounds=0"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(file: Path, row: str, words: str) -> None:
    file.write_text(file.read_text() + row + "\n")
    with pytest.raises(SettingError, match=words):
        read_study(file, privacy)
