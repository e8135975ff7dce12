"""The page and tables of a made-up contest, against numbers worked out by hand."""

from __future__ import annotations

import copy
import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from atm_fl.experiments.contest_page import cost_table, csv_text, page, table, write

Results = dict[str, Any]


def run(validation: float, **test: float) -> dict[str, Any]:
    curve = [
        {"round": r, "steps": 10 * r, "flops": 1e12 * r, "bytes": 5 * r, "validation": validation - 0.1 + 0.05 * r}
        for r in range(3)
    ]
    costs = {"steps": 2880, "images": 90980, "flops": 1.2e13, "seconds": 230.4, "bytes": 1.1e9}
    return {"test": test, "validation": validation, **costs, "curve": [point | {"test": None} for point in curve]}


def free(**test: float) -> dict[str, Any]:
    return run(0.2, **test) | {"steps": 0, "flops": 0.0, "seconds": 0.0, "bytes": 0, "curve": []}


def row(name: str, kind: str, *seeds: dict[str, Any], **more: Any) -> dict[str, Any]:
    nothing = {"tuned": {}, "tuning": {"values": 0, "epochs": 0.0, "evaluations": 0}}
    return {"name": name, "kind": kind, **nothing, **more, "seeds": {str(i): seed for i, seed in enumerate(seeds)}}


@pytest.fixture
def results() -> Results:
    return {
        "name": "contest",
        "command": "atm-fl compare a&b.toml",
        "date": "2026-11-24",
        "machine": "2 cores of <Abacus>",
        "tasks": ["solar", "icons", "mnist"],
        "seeds": [0, 1],
        "elements": 1820352,
        "rows": [
            row(
                "pretrained", "pretrained", free(solar=0.2, icons=0.1, mnist=0.3), free(solar=0.2, icons=0.1, mnist=0.3)
            ),
            row(
                "single", "single", run(0.9, solar=0.8, icons=0.5, mnist=1.0), run(0.9, solar=0.8, icons=0.4, mnist=1.0)
            ),
            row("joint", "joint", run(0.8, solar=0.7, icons=0.4, mnist=0.9) | {"bytes": 0}),
            row(
                "PA-ATM <b>bold</b> | x",
                "atm",
                run(0.7, solar=0.4, icons=0.5, mnist=0.75),
                run(0.7, solar=0.6, icons=0.2, mnist=0.25),
                tuned={"0": {"scaling": 1.5, "merge": "ties"}, "1": {"scaling": 1.0, "merge": "ties"}},
                tuning={"values": 3, "epochs": 20.0, "evaluations": 0},
            ),
            row(
                "pair",
                "ph-atm",
                run(0.6, icons=0.45, mnist=0.8),
                run(0.6, icons=0.36, mnist=0.8),
                tuned={"0": {"scaling": 0.3}},
                tuning={"values": 1, "epochs": 0.0, "evaluations": 8},
            ),
            row("not yet run", "atm"),
        ],
        "alignment": {},
        "landscape": None,
    }


def landscape() -> dict[str, Any]:
    points = [{"name": name, "x": x, "y": x / 2, "path": path} for name, x, path in (("a<i>", 0, True), ("b", 1, True))]
    grid = {"x": [0.0, 0.5, 1.0], "y": [0.0, 1.0], "accuracy": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]}
    return {"caption": "The <plane>.", "axes": ["along", "across"], **grid, "points": points}


def lines(markdown: str) -> dict[str, list[str]]:
    """The cells of a Markdown table's lines by the first one."""
    head, rule, *rest = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in markdown.split("\n"))
    assert {len(cells) for cells in (rule, *rest)} <= {len(head)}
    return {cells[0]: cells[1:] for cells in (head, *rest)}


def test_accuracies(results: Results) -> None:
    actual = lines(table(results))
    assert actual["row"] == ["solar", "icons", "mnist", "mean", "worst task", "normalised"]
    assert actual["pretrained"][:5] == ["20.0", "10.0", "30.0", "20.0 ± 0.0", "icons 10.0"]
    assert actual["single"][3:] == ["75.0 ± 2.4", "icons 45.0", "100.0"]  # means 76.67 and 73.33
    # 55 and 35: stdev 14.14; ratios .5 1 .75 and .75 .5 .25
    assert actual["PA-ATM \\<b>bold\\</b> \\| x"] == ["50.0", "35.0", "50.0", "45.0 ± 14.1", "icons 35.0", "62.5"]
    assert not any("not yet run" in name for name in actual)


def test_missing_seeds_and_tasks(results: Results) -> None:
    actual = lines(table(results))
    # one seed: no deviation; against the single-task models of that seed, .875 .8 .9
    assert actual["joint (1 of 2 seeds)"] == ["70.0", "40.0", "90.0", "66.7", "icons 40.0", "85.8"]
    # means over the two tasks, 62.5 and 58; ratios .9 .8 and .9 .8
    assert actual["pair (2 of 3 tasks)"] == ["–", "40.5", "80.0", "60.2 ± 3.2", "icons 40.5", "85.0"]


def test_no_single_task_row(results: Results) -> None:
    del results["rows"][1]
    assert all(cells[-1] == "–" for name, cells in lines(table(results)).items() if name != "row")
    assert "% of single-task" not in page(results)


def test_costs(results: Results) -> None:
    actual = lines(cost_table(results))
    costs = ["2,880", "12", "230", "1,100"]
    assert actual["pretrained"] == ["–", "0", "0", "0", "0", "–"]
    assert actual["joint (1 of 2 seeds)"] == ["–", "2,880", "12", "230", "0", "–"]
    assert actual["PA-ATM \\<b>bold\\</b> \\| x"] == ["scaling 1.5 / 1, merge ties", *costs, "3 values, 20 epochs"]
    assert actual["pair (2 of 3 tasks)"] == ["scaling 0.3", *costs, "1 value, 8 evaluations"]


def test_csv(results: Results) -> None:
    actual = list(csv.DictReader(io.StringIO(csv_text(results))))
    assert len(actual) == 6 + 6 + 3 + 6 + 4
    assert actual[12] == {
        **{"row": "joint", "kind": "joint", "seed": "0", "task": "solar", "test": "0.7"},
        **{"steps": "2880", "flops": "12000000000000.0", "seconds": "230.4", "bytes": "0"},
    }
    named = [line for line in actual if line["row"] == "PA-ATM <b>bold</b> | x"]
    assert [float(line["test"]) for line in named] == [0.4, 0.5, 0.75, 0.6, 0.2, 0.25]


def test_page_is_self_contained_and_escaped(results: Results) -> None:
    html = page(results | {"landscape": landscape()})
    assert not re.search(r'(src|href)="(?!#|data:)|url\((?!#)|@import|<link|<script', html)
    addresses = set(re.findall(r"\S*https?://[^\s\"'<>]*", html))
    assert all(address.startswith("xmlns") for address in addresses), addresses
    for text in (
        "PA-ATM &lt;b&gt;bold&lt;/b&gt; | x",
        "a&amp;b.toml",
        "&lt;Abacus&gt;",
        "The &lt;plane&gt;.",
        "a&lt;i&gt;",
    ):
        assert text in html
    assert not re.search("<b>|<i>|<plane>|<Abacus>", html)
    ids = re.findall(r'<[^>]* id="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_parts_of_the_page(results: Results) -> None:
    html = page(results)
    assert re.findall("<h2>(.*?)</h2>", html) == [
        *("Accuracy", "Cost", "Accuracy by round", "Accuracy against cost", "Accuracy by task")
    ]
    assert html.count("<svg ") == 3
    assert "% of single-task" in html
    tasks = {task: {"2": 0.1, "1": 0.3} for task in results["tasks"]}
    for rows in (2, 5):
        more = page(results | {"alignment": {f"row {i}": tasks for i in range(rows)}, "landscape": landscape()})
        assert "<h2>Task vectors and gradients</h2>" in more
        assert "<h2>Landscape</h2>" in more
        assert more.count("<svg ") == 5
        assert ("mean over tasks." in more) == (rows > 4)


def test_alignment_of_rows_with_other_tasks(results: Results) -> None:
    rows = {"pair": {"mnist": {"1": 0.1}, "icons": {}}, "all": {"solar": {"1": 0.2}, "mnist": {"1": 0.3}}}
    html = page(results | {"alignment": rows})
    svg = re.findall("<svg .*?</svg>", html, re.DOTALL)[-1]
    names = re.findall(">(pair|all|mean|mnist|icons|solar)<", svg)
    assert names == ["pair", "all", "mean", "mnist", "solar"]


def test_contest_that_has_just_begun(results: Results) -> None:
    start = copy.deepcopy(results)
    start["rows"] = [start["rows"][0], *({**row, "seeds": {}} for row in start["rows"][1:])]
    assert page(start).count("<svg ") == 1  # the pretrained model's accuracies
    start["rows"] = []
    assert "<svg " not in page(start)
    assert table(start).count("\n") == cost_table(start).count("\n") == 1


def test_files(results: Results, tmp_path: Path) -> None:
    path = write(results, tmp_path / "contest")
    assert path == tmp_path / "contest" / "report.html"
    assert path.read_text() == page(results)
    assert (path.parent / "table.md").read_text() == f"{table(results)}\n\n{cost_table(results)}\n"
    assert (path.parent / "results.csv").read_text() == csv_text(results)
    assert len(list(path.parent.iterdir())) == 3
