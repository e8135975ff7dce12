"""The audit of DP-SGD: its bound against published values, and what it says of runs with and without noise."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_folder
from scipy.stats import binom
from typer.testing import CliRunner

from atm_fl.attacks.audit import audit, inclusion, lower_bound, p_value
from atm_fl.cli.terminal import app
from atm_fl.errors import SettingError
from atm_fl.privacy.noise import Noise
from atm_fl.settings import Settings


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "published"),
    [
        (1000, 100, 75, 1e-4, 0.673),  # Appendix D
        (100_000, 1510, 1439, 1e-5, 2.675),  # Section 7
        (10, 10, 10, 0.0, 1.05),  # all right: the most that so many canaries can show
        (100, 100, 100, 0.0, 3.49),
        (1000, 1000, 1000, 0.0, 5.81),
        (1000, 100, 50, 1e-5, 0.0),
    ],
)
def test_bounds_are_the_published_ones(
    canaries: int, guesses: int, correct: int, delta: float, published: float
) -> None:
    assert lower_bound(canaries, guesses, correct, delta) == pytest.approx(published, abs=0.006)


def test_all_guesses_right_has_a_closed_form() -> None:
    """P = (e^ε / (1 + e^ε))^r = 0.05."""
    q = 0.05 ** (1 / 40)
    assert lower_bound(40, 40, 40, 0.0) == pytest.approx(math.log(q / (1 - q)), abs=1e-5)


def test_p_values_are_the_papers_sum() -> None:
    """Appendix D's loop, written out."""
    canaries, guesses, correct, epsilon, delta = 300, 60, 44, 0.4, 1e-3
    q = 1 / (1 + math.exp(-epsilon))
    pmf = [math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
    alpha = max(sum(pmf[correct - i : correct]) / i for i in range(1, correct + 1))
    expected = sum(pmf[correct:]) + 2 * canaries * delta * alpha
    assert p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)
    assert p_value(canaries, guesses, correct, epsilon, 0.0) == pytest.approx(binom.sf(correct - 1, guesses, q))


def test_inclusions_are_read_off_a_vector_without_noise() -> None:
    random = torch.Generator().manual_seed(0)
    canary, known = torch.randn(20, 200, generator=random), torch.randn(200, generator=random)
    coins = torch.rand(20, generator=random) < 0.5
    scores = inclusion(-0.03 * (known + canary[coins].sum(0)), known, canary, 0.0)
    assert bool((scores[coins].min() > scores[~coins].max()).all())


@pytest.fixture
def private(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One full-batch step on 120 records; each key of noise is its number, so that all runs of the tests are equal."""
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    keys: dict[bytes, bytes] = {}

    def numbered(multiplier: float, key: bytes) -> Noise:
        return Noise(multiplier, keys.setdefault(key, len(keys).to_bytes(32, "big")))

    monkeypatch.setattr("atm_fl.privacy.budget.Noise", numbered)
    data = make_folder(tmp_path / "data" / "many", 3, images=40)
    chosen = {"tasks": str(data), "rounds": 1, "optimizer": "sgd", "learning-rate": 0.01, "weight-decay": 0.0}
    return {**config, **chosen, "privacy": "dp-sgd", "dp-epsilon": 1.0, "dp-clip": 0.5, "batch-size": 120}


@pytest.mark.parametrize("changed", [{}, {"optimizer": "adamw", "batch-size": 60}])
def test_the_bound_is_below_the_claim_and_above_it_without_noise(
    private: dict[str, Any], changed: dict[str, Any]
) -> None:
    settings = Settings.parse(private | changed)
    task = settings.tasks
    honest, silent = (audit(settings, task, 100, 60, silent) for silent in (False, True))
    assert honest.claimed == pytest.approx(settings.dp_epsilon, rel=0.02)
    assert silent.claimed == honest.claimed
    assert honest.bound <= honest.claimed
    if settings.optimizer == "sgd":
        assert silent.correct == 60
    assert silent.bound > 1.0


def test_the_command_tells_both_audits(private: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "private.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in private.items()))
    chosen = ["--task", private["tasks"], "--canaries", "40", "--guesses", "20"]
    done = CliRunner().invoke(app, ["attack", "audit", str(file), *chosen])
    assert done.exit_code == 0, done.output
    outcomes = re.findall(
        r"noise (on|off): claimed ε ([\d.]+), true ε at least ([\d.]+) \(95%; (\d+) of 20", done.output
    )
    (on, claimed, bound, _), (off, again, above, right) = outcomes
    assert (on, off, right) == ("on", "off", "20")
    assert claimed == again
    assert float(bound) <= float(claimed) <= 1.0 < float(above)


def test_what_cannot_be_audited_is_said(private: dict[str, Any]) -> None:
    for changed, arguments, message in (
        ({"privacy": "clip-only", "dp-epsilon": 0.0}, (50, 20), "the audit needs a claim"),
        ({}, (500, 20), "--canaries 500: many has only 120 records"),
        ({}, (50, 60), "--guesses 60: it must be at least 2 and at most --canaries 50"),
    ):
        settings = Settings.parse(private | changed)
        with pytest.raises(SettingError, match=message):
            audit(settings, settings.tasks, *arguments)
