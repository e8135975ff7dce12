"""The study of merges, on tiny tasks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from atm_fl.errors import SettingError
from atm_fl.experiments import merge_table, read_study


@pytest.fixture
def merges(config: dict[str, Any], tmp_path: Path) -> Path:
    """A study of three merges, one of which cannot end well."""
    config.pop("rounds")
    config.pop("run-dir")
    lines = [
        f'folder = "{tmp_path}/merges"\nseeds = [0]',
        'rounds = 3\nearly = 2\ntuning-rounds = 1\nreference = "mean"\n[settings]',
        *(f"{key} = {json.dumps(value)}" for key, value in config.items()),
        "[rows]\nmean = { values = [2.0] }",
        'huge = { merge = "task-arithmetic", scaling = 1e38, values = [0.2] }',
        '[rows.momentum]\nserver-optimizer = "momentum"\ntune = "server-optimizer"',
        'values = ["momentum:learning-rate=0.5"]',
    ]
    path = tmp_path / "merges.toml"
    path.write_text("\n".join(lines))
    return path


def test_a_study_of_merges_tunes_each_and_keeps_what_came_to_nothing(
    merges: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(merges, merge_table)
    printed = [merge_table.run_unit(unit) for units in merge_table.phases(study) for unit in units]
    assert any("not finite" in line for line in printed)
    for row in study.rows:
        units = [merge_table.MergeUnit(study, 0, row, value, 1) for value in (None, *row.values)]
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


def test_a_study_that_cannot_work_is_named(tmp_path: Path, merges: Path) -> None:
    (tmp_path / "other.toml").write_text('folder = "x"\nseed = [1]\n')
    with pytest.raises(SettingError, match=r"other.toml is not a study"):
        read_study(tmp_path / "other.toml", merge_table)
    merges.write_text(merges.read_text().replace('reference = "mean"', 'reference = "men"'))
    with pytest.raises(SettingError, match="reference='men' is none of the study's rows"):
        read_study(merges, merge_table)


SLEEPY = """
import os, time
from pathlib import Path
FOLDER = Path(__file__).parent
def read(values): return values
def phases(study): yield [0, 1]
def run_unit(unit):
    (FOLDER / f"{unit}.pid").write_text(str(os.getpid()))
    time.sleep(300)
    return ""
def table(study): return ""
def page(study): return FOLDER
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_units_end_with_a_study_that_is_killed(number: int, tmp_path: Path) -> None:
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    (tmp_path / "study.toml").write_text("[rows]\n")
    code = "import sleepy; from pathlib import Path; from atm_fl.cli.study import run_study; "
    code += "run_study(Path('study.toml'), sleepy, 2, False)"
    paths = [str(tmp_path), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    files = [tmp_path / f"{unit}.pid" for unit in (0, 1)]

    def wait(done: Callable[[], bool]) -> None:
        begin = time.monotonic()
        while not done():
            assert time.monotonic() < begin + 120
            time.sleep(0.1)

    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as process:
        wait(lambda: process.poll() is not None or all(file.exists() and file.read_text() for file in files))
        assert process.poll() is None
        process.send_signal(number)
        units = [int(file.read_text()) for file in files]
    wait(lambda: not any(psutil.pid_exists(unit) for unit in units))
