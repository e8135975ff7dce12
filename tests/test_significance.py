"""The paired bootstrap against closed forms, and the contest's table of tested differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from test_contest import run, write

from atm_fl import tasks
from atm_fl.errors import SettingError
from atm_fl.experiments import contest, read_study
from atm_fl.experiments.significance import LEVEL, differences


def drawn(random: np.random.Generator, seeds: int, images: int, rate: float, spread: float = 0.0) -> list[dict]:
    """Models of one task, of which each image is right with a rate that differs by seed."""
    rates = rate + spread * random.standard_normal(seeds)
    return [{"task": random.random(images) < rate} for rate in rates]


def test_of_one_seed_it_is_the_normal_approximation_of_a_paired_test() -> None:
    """McNemar's: the difference's variance is (b + c − (b − c)² / n) / n² of b and c discordant images."""
    random = np.random.default_rng(1)
    one = random.random(2000) < 0.8
    other = one ^ (random.random(2000) < np.where(one, 0.08, 0.2))
    b, c = int((one & ~other).sum()), int((other & ~one).sum())
    deviation = (b + c - (b - c) ** 2 / 2000) ** 0.5 / 2000
    tested = differences([{"task": one}], [{"task": other}])["task"]
    assert tested.value == pytest.approx((b - c) / 2000)
    reach = norm.ppf((1 + LEVEL) / 2) * deviation
    assert tested.low == pytest.approx(tested.value - reach, abs=0.1 * reach)
    assert tested.high == pytest.approx(tested.value + reach, abs=0.1 * reach)
    assert tested.p == pytest.approx(2 * norm.sf(abs(tested.value) / deviation), rel=0.3, abs=5e-4)


def test_what_is_hard_for_both_rows_cancels() -> None:
    """Unpaired, 1 point of 1,000 images at 50 % would have a deviation of 2.2 points."""
    one = np.arange(1000) < 510
    tested = differences([{"task": one}], [{"task": np.arange(1000) < 500}])["task"]
    assert tested.value == pytest.approx(0.01)
    assert tested.low > 0
    assert tested.p < 0.01


def test_images_of_one_thing_count_once() -> None:
    """Four pictures of each of 100 letters that share their letter's fate are 100 images, not 400."""
    random = np.random.default_rng(5)
    one, other = ({"task": random.random(100) < rate} for rate in (0.8, 0.7))
    fourfold = [{"task": np.repeat(model["task"], 4)} for model in (one, other)]
    plain = differences([one], [other])["task"]
    grouped = differences([fourfold[0]], [fourfold[1]], groups={"task": np.repeat(np.arange(100), 4) * 7})["task"]
    apart = differences([fourfold[0]], [fourfold[1]])["task"]
    assert (grouped.low, grouped.high, grouped.p) == pytest.approx((plain.low, plain.high, plain.p))
    assert apart.high - apart.low == pytest.approx((plain.high - plain.low) / 2, rel=0.1)


def test_a_group_of_many_images_weighs_more() -> None:
    """A resample's accuracy is of its images: with groups of sizes 1 and 3, (a + 3 b) / (a + 3 b of all drawn)."""
    groups = np.array([0, 1, 1, 1])
    tested = differences([{"task": groups == 1}], [{"task": groups == 2}], groups={"task": groups})["task"]
    assert tested.value == 0.75
    assert (tested.low, tested.high) == (0.0, 1.0)  # the small group drawn twice, and the large one


def test_glyphs_of_one_letter_are_grouped_and_photos_are_not() -> None:
    for name in ("scripts", "icons", "strokes"):
        groups = tasks.load(name).test_groups
        assert groups is not None
        assert np.array_equal(groups, tasks.test_groups(name, larger=False))
        assert len(groups) == len(tasks.load(name).test)
        assert len(set(groups)) < len(groups)
    for name in ("digits", "cars", "some/folder"):
        assert tasks.test_groups(name, larger=False) is None


def test_parties_that_are_tested_on_the_same_images_count_once() -> None:
    """Three parties of one task, whose models are right on the same images, are no more sure than one; other images
    in the same places are."""
    random = np.random.default_rng(6)

    def rows(kinds: int) -> tuple[list[dict], list[dict]]:
        models = [[random.random(1000) < rate for _ in range(kinds)] for rate in (0.8, 0.77)]
        one, other = ([{f"pets.{number}": right[number % kinds] for number in range(3)}] for right in models)
        return one, other

    same = {f"pets.{number}": "pets" for number in range(3)}

    def reach(one: list[dict], other: list[dict], **more: Any) -> float:
        tested = differences(one, other, **more)
        return (tested["mean"].high - tested["mean"].low) / (tested["pets.0"].high - tested["pets.0"].low)

    one, other = rows(1)
    assert reach(one, other, same=same) == pytest.approx(1)
    assert reach(one, other) == pytest.approx(3**-0.5, rel=0.1)
    one, other = rows(3)
    assert reach(one, other, same=same) == pytest.approx(3**-0.5, rel=0.1)
    assert differences(one, other, same={}) == differences(one, other)


def test_rows_that_are_equal_or_swapped() -> None:
    random = np.random.default_rng(2)
    one, other = drawn(random, 3, 500, 0.6), drawn(random, 3, 500, 0.6)
    same = differences(one, one)
    assert {(tested.value, tested.low, tested.high, tested.p) for tested in same.values()} == {(0.0, 0.0, 0.0, 1.0)}
    there, back = differences(one, other)["mean"], differences(other, one)["mean"]
    assert back.value == -there.value
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert back.p == there.p
    assert differences(one, other) == differences(one, other)


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.05])
def test_two_rows_of_one_truth_seldom_differ(spread: float) -> None:
    """Of 200 pairs without a difference at most 8 % have p < 0.05, also where seeds differ by 5 points."""
    random = np.random.default_rng(3)
    ps = [
        differences(drawn(random, 5, 200, 0.7, spread), drawn(random, 5, 200, 0.7, spread), resamples=300)["task"].p
        for _ in range(200)
    ]
    assert np.mean(np.array(ps) < 0.05) <= 0.08


def test_seeds_that_disagree_widen_the_interval() -> None:
    right, wrong = np.ones(1000, bool), np.arange(1000) < 900
    agree = differences([{"task": right}] * 4, [{"task": wrong}] * 4)["task"]
    differ = differences([{"task": right}] * 3 + [{"task": wrong}], [{"task": wrong}] * 4)["task"]
    assert differ.high - differ.low > 2 * (agree.high - agree.low)


def test_the_worst_normalised_task_is_that_of_the_means_over_seeds() -> None:
    def model(easy: int, hard: int) -> dict[str, np.ndarray]:
        return {"easy": np.arange(10) < easy, "hard": np.arange(20) < hard}

    single = [model(10, 10), model(8, 10)]
    tested = differences([model(9, 9), model(9, 5)], [model(6, 8), model(6, 8)], single)
    assert tested["worst normalised task"].value == pytest.approx(
        min(0.9 / 0.9, 0.35 / 0.5) - min(0.6 / 0.9, 0.4 / 0.5)
    )
    assert tested["mean"].value == pytest.approx((0.9 + 0.35) / 2 - (0.6 + 0.4) / 2)


def test_rows_that_do_not_pair_are_refused() -> None:
    one = [{"task": np.ones(5, bool)}]
    with pytest.raises(ValueError, match="5 test images and groups of 4"):
        differences(one, one, groups={"task": np.arange(4)})
    for other in ([{"task": np.ones(4, bool)}], [{"other": np.ones(5, bool)}], one * 2):
        with pytest.raises(ValueError, match="do not pair"):
            differences(one, other)


ROWS = """
[rows]
single = { kind = "single" }
joint = { kind = "joint" }
average = { kind = "one-shot" }
atm = {}
"""
PAIRS = 'pairs = [["atm", "joint"], ["atm", "average"], ["single", "atm"]]\n'


def test_a_contest_tells_the_tested_differences_of_its_pairs(config: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "contest.toml", config, ROWS)
    path.write_text(PAIRS + path.read_text())
    study = read_study(path, contest)
    run(study)
    text = contest.table(study)
    outcomes = contest.results(study)
    test = {row["name"]: {seed: of["test"] for seed, of in row["seeds"].items()} for row in outcomes["rows"]}
    assert [pair["rows"] for pair in outcomes["pairs"]] == [["atm", "joint"], ["atm", "average"], ["single", "atm"]]
    for pair in outcomes["pairs"]:
        one, other = pair["rows"]
        assert pair["seeds"] == [0, 1]
        assert list(pair["differences"]) == ["red", "green", "blue", "mean", "worst normalised task"]
        for task in ("red", "green", "blue"):
            expected = np.mean([test[one][seed][task] - test[other][seed][task] for seed in ("0", "1")])
            assert pair["differences"][task]["value"] == pytest.approx(expected)
    assert "| atm − joint (seeds 0, 1) | mean |" in text
    assert "Differences" in contest.page(study).read_text()


def test_rows_of_other_tasks_pair_on_those_that_both_have(config: dict[str, Any], tmp_path: Path) -> None:
    red, green, blue = config["tasks"].split(",")
    rows = f'\n[rows]\nsingle = {{ kind = "single" }}\natm = {{}}\ntwo = {{ tasks = "{red},{blue}" }}\n'
    path = write(tmp_path / "contest.toml", config, rows)
    path.write_text(f'pairs = [["atm", "two"], ["two", "single"]]\n{path.read_text()}')
    study = read_study(path, contest)
    run(study)
    outcomes = contest.results(study)
    test = {row["name"]: {seed: of["test"] for seed, of in row["seeds"].items()} for row in outcomes["rows"]}
    for pair in outcomes["pairs"]:
        assert list(pair["differences"]) == ["red", "blue", "mean", "worst normalised task"]
        one, other = pair["rows"]
        expected = np.mean([test[one][s][t] - test[other][s][t] for s in ("0", "1") for t in ("red", "blue")])
        assert pair["differences"]["mean"]["value"] == pytest.approx(expected)
    assert "| atm − two (2 of 3 tasks, seeds 0, 1) | mean |" in contest.table(study)
    path.write_text(
        path.read_text().replace("[rows]", f'[rows]\ngreen = {{ tasks = "{green}" }}').replace('"atm", ', '"green", ')
    )
    with pytest.raises(SettingError, match="pairs: 'green' and 'two' have no task in common"):
        read_study(path, contest)


@pytest.mark.parametrize("pairs", ['[["atm", "join"]]', '[["atm"]]', '["atm"]', "3"])
def test_pairs_that_cannot_be_are_said_before_any_work(config: dict[str, Any], tmp_path: Path, pairs: str) -> None:
    path = write(tmp_path / "contest.toml", config, ROWS)
    path.write_text(f"pairs = {pairs}\n{path.read_text()}")
    with pytest.raises(SettingError, match="pairs"):
        read_study(path, contest)
