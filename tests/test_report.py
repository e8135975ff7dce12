"""Reports of made-up run directories, against numbers worked out by hand."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from atm_fl.errors import RunError
from atm_fl.runs import pages
from atm_fl.runs.comparison import write_comparison
from atm_fl.runs.pages import draw_lines, render
from atm_fl.runs.report import accuracy_table, print_table, write_report
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


def test_names_in_any_script_have_their_glyphs() -> None:
    """A box for want of a glyph would be a warning, and the same picture twice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph")
        for kind in ("svg", "png"):
            drawn = {render(named(first, "Кириллица", "العربية", "हिन्दी"), kind) for first in ("漢字", "言語")}
            assert len(drawn) == 2


def test_lines_of_many_tasks_are_drawn_as_the_band_they_fill(tmp_path: Path) -> None:
    tasks = tuple(f"task{number}" for number in range(pages.MANY + 1))
    text = write_report(write_run(tmp_path, whole_run(tasks), tasks)).read_text()
    figures = "".join(re.findall("<svg.*?</svg>", text, re.DOTALL))
    assert f"all {len(tasks)}" in figures
    assert "task17" not in re.sub("<title>.*?</title>", "", figures.partition("Cosines of all pairs")[0])
    fewer = tasks[1:]
    text = write_report(write_run(tmp_path, whole_run(fewer), fewer)).read_text()
    assert f"all {len(fewer)}" not in text


def test_other_fonts_are_left_alone_where_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atm_fl.runs.fonts.families", lambda: pytest.fail("more fonts were read"))
    render(named("mnist", "Кириллица"), "png")


def named(*tasks: str) -> Callable[[], Figure]:
    """What draws a panel with the tasks' names in its title and legend."""
    lines = {task: {0: 0.1, 1: 0.2} for task in tasks}
    return lambda: draw_lines({tasks[0]: lines}, {tasks[0]: {0: 0.1, 1: 0.2}}, "accuracy", "mean")


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
        "18.0 s tuning, 4.5 s evaluating",
    ):
        assert text in page
    parts = ['<p class="lead">', "<h2>What it cost", "<h3>Failures", "<h2>Task vectors", "<h2>Settings"]
    assert parts == sorted(parts, key=page.index)
    assert page.count("<svg ") == 8
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
    assert "2 of 3 rounds (unfinished)" in page
    assert "out of memory" in page
    assert "Cosines" not in page
    assert "<td>failures</td><td>3</td>" in page
    assert accuracy_table(tmp_path).cells()[1] == ("icons", "–", "–")


def test_heat_maps_name_their_own_rounds_tasks(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, [merge(1, ("mnist", "icons")), merge(2, ("mnist", "solar"), icons="gone")]))
    maps = re.findall(r'<svg role="img" aria-label="Cosines of all pairs.*?</svg>', page, re.DOTALL)
    assert [(sum(svg.count(f">{task}<") for svg in maps), task) for task in TASKS] == [
        (4, "mnist"),
        (2, "icons"),
        (2, "solar"),
    ]


def lead(page: str) -> str:
    return page.split('<p class="lead">')[1].split("</p>")[0]


def test_the_page_begins_with_the_result_in_a_sentence(tmp_path: Path) -> None:
    lines = [*whole_run(), evaluation(2, "solar", validation=1.0)]
    assert lead(page_of(write_run(tmp_path, lines))) == (
        "After 3 of 3 rounds the merged model has 75.0 % test accuracy, the mean over 3 tasks (pretrained 15.0 %); the "
        "worst task is mnist with 65.0 %. Best round on validation: 3 (70.0 %)."
    )
    lines.append(evaluation(1, "icons", validation=3.0))  # the first of the best
    assert "Best round on validation: 1 (" in lead(page_of(write_run(tmp_path, lines)))


def test_a_run_from_another_start_is_not_called_pretrained(tmp_path: Path) -> None:
    write_run(tmp_path, whole_run())
    config = json.loads((tmp_path / "config.json").read_text())
    config["settings"]["start"] = "/runs/one_shot"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "(start 15.0 %)" in lead(page_of(tmp_path))


def test_values_are_shown_on_hover_and_escaped(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, whole_run(("mnist", "</title><b>")), ("mnist", "</title><b>")))
    assert "<title>round 3\nmean: 65.0\nmnist: 60.0\n&lt;/title&gt;&lt;b&gt;: 70.0</title>" in page
    assert "from clients: 8.0 kB" in page


def beside_a_contest(folder: Path, **changed: Any) -> Path:
    """A run in a contest's folder, beside single-task models and two joint ones of settings `changed`."""
    run, single = folder / "seed-0" / "mean" / "scaling=2.0", folder / "seed-0" / "single"
    for path in (run, single):
        path.mkdir(parents=True)
    write_run(run, whole_run())
    settings = json.loads((run / "config.json").read_text())["settings"] | changed
    (single / "config.json").write_text(json.dumps({"settings": settings, "tune": {}}))
    alone = {task: {"before": {}, "after": {"validation": 0.92, "test": 0.9}} for task in TASKS}
    (single / "results.json").write_text(json.dumps(alone))
    for value, validation in (("1e-4", 0.8), ("2e-4", 0.7)):
        joint = folder / "seed-0" / "joint" / f"learning-rate={value}"
        joint.mkdir(parents=True)
        lines = [evaluation(1, task, validation=validation, test=validation + 0.01) for task in TASKS]
        write_run(joint, [tuning(1, "joint"), *lines], rounds=1)
        (joint / "config.json").write_text(json.dumps({"settings": settings, "rounds": 1}))
    (folder / "seed-0" / "config.json").write_text('["not ours"]')
    return run


def test_a_contest_s_run_is_held_against_its_single_task_and_joint_models(tmp_path: Path) -> None:
    page = page_of(beside_a_contest(tmp_path))
    assert "(pretrained 15.0 %, joint 81.0 %, single-task 90.0 %)" in lead(page)
    assert "single-task 90.0</text>" in page
    assert "single-task 92.0</text>" in page
    assert "best: round 3</text>" in page


@pytest.mark.parametrize("changed", [{"tasks": "mnist"}, {"model": "dinov2_s6"}, {"seed": 1}])
def test_models_of_other_settings_are_no_reference(changed: dict[str, Any], tmp_path: Path) -> None:
    assert "(pretrained 15.0 %)" in lead(page_of(beside_a_contest(tmp_path, **changed)))


@pytest.mark.parametrize(
    ("privacy", "spent", "message"),
    [
        ({}, {}, "no differential privacy"),
        ({"privacy": "dp-sgd"}, {"epsilon": 1.5}, "1.500 for a training record of icons, δ = 1e-05"),
        ({"privacy": "dp-sgd"}, {}, "∞ for a training record of icons: nothing is promised"),
        ({"privacy": "dp-sgd"}, {"epsilon": math.inf}, "∞ for a training record of icons: nothing is promised"),
        ({"dp-client-noise": 1.0}, {"client": 2.5}, "2.500 for a client, δ = 1e-05"),
    ],
)
def test_epsilon_so_far_is_in_the_terminal_and_in_the_page(
    privacy: dict[str, Any], spent: dict[str, float], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = {"mnist": {"epsilon": 1.0} if "epsilon" in spent else {}, "icons": spent}
    lines = [tuning(1, task) | ({} if "client" in spent else epsilon) for task, epsilon in tuned.items()]
    step = merge(1, ("mnist", "icons")) | ({"epsilon": spent["client"]} if "client" in spent else {})
    write_run(tmp_path, [evaluation(0, "mnist", validation=0.5), *lines, step])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"settings": config["settings"] | privacy}))
    assert f"<td>ε so far</td><td>{message}</td>" in page_of(tmp_path)
    print_table(tmp_path)
    assert (f"ε so far: {message}" in " ".join(capsys.readouterr().out.split())) == bool(privacy)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def screenshot(page: Path, width: int, scheme: str, folder: Path) -> Path:
    """The page as Chromium draws it, without the network."""
    out = folder / f"{width}-{scheme}.png"
    quiet = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    quiet += "disable-sync hide-scrollbars force-device-scale-factor=1"
    command = [str(CHROMIUM), "--headless", *(f"--{flag}" for flag in quiet.split())]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2400", f"--screenshot={out}"]
    command += ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    return out


def overflow(page: Path, width: int, folder: Path) -> int:
    """By how many pixels the page is wider than a frame of `width`, which Chromium itself measures."""
    probe = folder / "probe.html"
    source = html.escape(page.read_text().replace("default-src 'none'", "default-src 'self'"))
    probe.write_text(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{source}"></iframe><pre></pre><script>'
        "onload = () => { const root = document.querySelector('iframe').contentDocument.documentElement;"
        "document.querySelector('pre').textContent = `over ${root.scrollWidth - root.clientWidth}` }</script>"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-quic", "--no-first-run", "--disable-component-update", "--disable-sync", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", probe.as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout
    return int(re.findall(r"<pre>over (-?\d+)</pre>", dom)[0])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_browser_shows_the_page_at_two_widths_in_light_and_dark_with_nothing_beyond_the_edge(
    kind: str, tmp_path: Path
) -> None:
    tasks = ("mnist", "a" * 80, "/data/" + "long-folder-" * 6, *(f"task{i}" for i in range(9)))
    lines = [*whole_run(tasks), merge(3, tasks[:2], mnist="out of memory " * 20, icons="x" * 300)]
    page = page_of(write_run(tmp_path, lines, tasks))
    assert page
    path = tmp_path / "report.html"
    if kind == "comparison":
        path = write_comparison([tmp_path, tmp_path], tmp_path / "comparison.html")
    for width in (390, 1280):
        assert overflow(path, width, tmp_path) == 0
        corners = {}
        for scheme in ("light", "dark"):
            with Image.open(screenshot(path, width, scheme, tmp_path)) as picture:
                corners[scheme] = picture.convert("L").getpixel((2, 2))
                assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
        assert corners["dark"] < 64 < 192 < corners["light"]


def test_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        write_report(tmp_path)
