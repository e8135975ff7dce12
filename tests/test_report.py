"""Reports of made-up run directories, against numbers worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from atm_fl.errors import RunError
from atm_fl.report import accuracy_table, print_table, write_report
from atm_fl.settings import defaults

TASKS = ("mnist", "icons", "solar")


def evaluation(number: int, task: str, **splits: float) -> dict[str, Any]:
    return {"kind": "evaluation", "round": number, "task": task, **splits, "time": 1.0}


def tuning(number: int, task: str) -> dict[str, Any]:
    numbers = {"loss": 0.5, "steps": 4, "images": 128, "norm": 0.7, "seconds_evaluate": 0.5, "seconds_tune": 2.0}
    return {
        "kind": "tuning",
        "round": number,
        "task": task,
        **numbers,
        "bytes_up": 4000,
        "bytes_down": 8000,
        "time": 1.0,
    }


def merge(number: int, tasks: tuple[str, ...], **failures: str) -> dict[str, Any]:
    cosines = [[1.0 if a == b else 0.25 for a in tasks] for b in tasks]
    numbers = {"norm": 0.3, "tasks": tasks, "cosines": cosines, "seconds": 9.0, "failures": failures}
    return {"kind": "merge", "round": number, **numbers, "time": 2.0}


def whole_run(tasks: tuple[str, ...] = TASKS, rounds: int = 3) -> list[dict[str, Any]]:
    """Validation accuracy of task i after r rounds is 0.1 i + 0.2 r; test, at the start and the end, is 0.05 less."""
    lines = []
    for r in range(rounds + 1):
        for i, task in enumerate(tasks):
            accuracies = {"validation": 0.1 * (i + 2 * r)}
            if r in (0, rounds):
                accuracies["test"] = accuracies["validation"] + 0.05
            lines.append(evaluation(r, task, **accuracies))
        if r < rounds:
            lines += [tuning(r + 1, task) for task in tasks] + [merge(r + 1, tasks)]
    return lines


def write_run(directory: Path, lines: list[dict[str, Any]], tasks: tuple[str, ...] = TASKS, rounds: int = 3) -> Path:
    settings = {**defaults(), "tasks": ",".join(tasks), "learning-rate": 0.125}
    settings.pop("rounds")
    config = {
        "settings": settings,
        "rounds": rounds,
        "versions": {"torch": "2.14.0"},
        "machine": {"processor": "Abacus & Sons", "cores": 2},
        "layout": "x",
        "elements": 10,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def page_of(directory: Path) -> str:
    path = write_report(directory)
    assert path == directory / "report.html"
    assert (directory / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return path.read_text()


def test_table_shows_test_accuracy_where_it_was_measured_at_both_ends(tmp_path: Path) -> None:
    table = accuracy_table(write_run(tmp_path, whole_run()))
    assert (table.split, table.rounds) == ("test", (0, 3))
    assert [row.name for row in table.rows] == list(TASKS)
    assert table.rows[1].accuracies == pytest.approx((15, 75))
    assert table.rows[1].gain == pytest.approx(60)
    assert table.mean.accuracies == pytest.approx((15, 75))
    assert table.cells()[2] == ("solar", "25.0", "85.0", "+60.0")
    assert "test accuracy %" in table.caption


def test_table_falls_back_on_validation(tmp_path: Path) -> None:
    lines = [line for line in whole_run() if not (line["kind"] == "evaluation" and line["round"] == 3)]
    table = accuracy_table(write_run(tmp_path, lines))
    assert (table.split, table.rounds) == ("validation", (0, 1, 2))
    assert table.mean.accuracies == pytest.approx((10, 30, 50))
    assert "validation accuracy %" in table.caption
    assert accuracy_table(tmp_path, "test").rounds == (0,)


def test_missing_task_is_left_out_of_the_mean(tmp_path: Path) -> None:
    lines = [
        line for line in whole_run() if (line["kind"], line["round"], line.get("task")) != ("evaluation", 1, "solar")
    ]
    table = accuracy_table(write_run(tmp_path, lines), "validation")
    assert table.rows[2].accuracies == pytest.approx((20, None, 60, 80))
    assert table.cells()[2] == ("solar", "20.0", "–", "60.0", "80.0", "+60.0")
    assert table.mean.accuracies == pytest.approx((10, 25, 50, 70))
    assert "–" in table.caption


def test_mean_gain_compares_a_task_with_itself(tmp_path: Path) -> None:
    lines = [evaluation(0, "mnist", validation=0.5), evaluation(0, "icons", validation=0.1)]
    table = accuracy_table(write_run(tmp_path, [*lines, evaluation(1, "mnist", validation=0.6)]))
    assert table.mean.accuracies == pytest.approx((30, 60))
    assert table.mean.gain == pytest.approx(10)
    assert [row.gain for row in table.rows] == [pytest.approx(10), None]


def test_later_line_wins(tmp_path: Path) -> None:
    table = accuracy_table(write_run(tmp_path, [*whole_run(), evaluation(3, "icons", validation=0.9, test=0.99)]))
    assert table.rows[1].accuracies[-1] == pytest.approx(99)


def test_columns_are_evenly_chosen_with_both_ends(tmp_path: Path) -> None:
    write_run(tmp_path, [evaluation(r, "mnist", validation=r / 100) for r in range(31)])
    table = accuracy_table(tmp_path)
    assert table.rounds == (0, 4, 9, 13, 17, 21, 26, 30)
    assert table.rows[0].accuracies == pytest.approx(table.rounds)


def test_printed_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ("[red]", "icons")
    print_table(write_run(tmp_path, whole_run(tasks), tasks))
    printed = capsys.readouterr().out
    for word in ("base", "gain", "mean", "[red]", "+60.0", "test accuracy %"):
        assert word in printed


def test_page_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    tasks = ("mnist", "icons", "a<b>&$c_$")
    lines = [*whole_run(tasks), merge(3, ("mnist", "icons"), solar='<script>alert("1")</script>')]
    page = page_of(write_run(tmp_path, lines, tasks))
    assert not re.search(r'(src|href)="(?!#|data:)|url\((?!#)|@import|<link|<script', page)
    addresses = set(re.findall(r"\S*https?://[^\s\"'<>]*", page))
    assert all(address.startswith("xmlns") for address in addresses), addresses
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in page
    for text in (
        "mnist",
        "icons",
        "a&lt;b&gt;&amp;$c_$",
        "Abacus &amp; Sons",
        "2.14.0",
        "3 of 3 rounds",
        "(18.0 s tuning, 4.5 s evaluating in all)",
    ):
        assert text in page
    for heading in ("Accuracy", "Task vectors", "Cosines", "Time", "Traffic", "Failures"):
        assert f"<h2>{heading}" in page
    assert page.count("<svg ") == 6
    other = page.split("Settings other than the defaults")[1].split("<details>")[0]
    assert "learning-rate" in other
    assert "weight-decay" not in other
    ids = re.findall(r'<[^>]* id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_unfinished_runs(tmp_path: Path) -> None:
    everything = whole_run()
    for count in (0, 4, 12):  # before any line; amid the first round; amid the second
        page = page_of(write_run(tmp_path, everything[:count]))
        assert "unfinished" in page
    assert "1 of 3 rounds" in page
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "eval')
    page_of(tmp_path)


def test_rounds_with_one_task_or_none(tmp_path: Path) -> None:
    lines = [evaluation(0, "mnist", validation=0.5), tuning(1, "mnist"), merge(1, ("mnist",), icons="out of memory")]
    page = page_of(write_run(tmp_path, [*lines, merge(2, (), mnist="gone", icons="gone")]))
    assert "2 of 3 rounds, unfinished" in page
    assert "out of memory" in page
    assert "Cosines" not in page
    assert accuracy_table(tmp_path).cells()[1] == ("icons", "–", "–")


def test_heat_maps_name_their_own_rounds_tasks(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, [merge(1, ("mnist", "icons")), merge(2, ("mnist", "solar"), icons="gone")]))
    maps = [svg for svg in re.findall("<svg .*?</svg>", page, re.DOTALL) if "round 2" in svg]
    assert [(maps[0].count(f">{task}<"), task) for task in TASKS] == [(4, "mnist"), (2, "icons"), (2, "solar")]


def test_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        write_report(tmp_path)
