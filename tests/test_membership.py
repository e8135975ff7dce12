"""Membership inference: scores against closed forms, curves against counts, and a whole attack on small runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atm_fl import tasks
from atm_fl.attacks import membership
from atm_fl.attacks.membership import Curve, MembershipLeak, confidences, lira, membership_leak, rmia
from atm_fl.errors import SettingError
from atm_fl.federation.loop import run_loop
from atm_fl.models import TaskHead
from atm_fl.settings import Settings
from atm_fl.tasks import Split


def log_density(value: float, mean: float, deviation: float) -> float:
    return -((value - mean) ** 2) / (2 * deviation**2) - math.log(deviation * math.sqrt(2 * math.pi))


def test_lira_is_the_ratio_of_two_gaussians() -> None:
    """Three models with the image, three without, of chosen mean and deviation; φ of the attacked model is 1."""
    spread = torch.tensor([-1.0, 0.0, 1.0])  # unbiased deviation 1
    inside, outside = 2 + 0.5 * spread, -1 + 0.25 * spread
    references = torch.cat([inside, outside])[:, None]
    members = torch.tensor([True] * 3 + [False] * 3)[:, None]
    expected = log_density(1, 2, 0.5) - log_density(1, -1, 0.25)
    for shared in (False, True):
        assert float(lira(torch.tensor([1.0]), references, members, shared)) == pytest.approx(expected, abs=1e-5)


def test_lira_shares_the_variance_and_not_the_means() -> None:
    """Two images whose deviations are 1 and 3: of both sides √5 is shared."""
    spread = torch.tensor([-1.0, 0.0, 1.0])
    means = torch.tensor([[4.0, 10.0], [2.0, 6.0]])  # in, out
    references = torch.cat([torch.stack([row[0] + spread, row[1] + 3 * spread], 1) for row in means])
    members = torch.tensor([True] * 3 + [False] * 3)[:, None].expand(-1, 2)
    scores = lira(torch.tensor([3.5, 7.0]), references, members)
    for score, value, (inside, outside) in zip(scores, (3.5, 7.0), means.T.tolist(), strict=True):
        expected = log_density(value, inside, math.sqrt(5)) - log_density(value, outside, math.sqrt(5))
        assert float(score) == pytest.approx(expected, abs=1e-5)


def test_lira_guesses_the_side_that_no_reference_is_on() -> None:
    """Four references; the third image is in all of them, and gets the others' mean shift of 2."""
    members = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 1], [0, 0, 1]]).bool()
    references = 2.0 * members + torch.tensor([0.1, -0.1, 0.1, -0.1])[:, None]
    assert bool(members[:, 2].all())
    scores = lira(torch.tensor([2.0, 0.0, 0.0]), references, members)
    assert float(scores[0]) > 0
    assert float(scores[1]) < 0
    assert float(scores[2]) < 0


def test_rmia_counts_the_population_that_is_exceeded_twofold() -> None:
    random = torch.Generator().manual_seed(0)
    target, population = torch.randn(6, generator=random), torch.randn(9, generator=random)
    references, seen = torch.randn(4, 6, generator=random), torch.randn(4, 9, generator=random)
    members = torch.tensor([[1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0]]).bool()
    scores = rmia(target, references, members, population, seen)

    def p(value: Tensor) -> float:
        return 1 / (1 + math.exp(-float(value)))

    for image in range(6):
        sides: dict[bool, list[float]] = {True: [], False: []}
        for model in range(4):
            sides[bool(members[model, image])].append(p(references[model, image]))
        known = np.mean([np.mean(side) for side in sides.values() if side])  # the fifth image is in all
        exceeded = sum(
            p(target[image]) / known >= 2 * p(population[k]) / np.mean([p(value) for value in seen[:, k]])
            for k in range(9)
        )
        assert float(scores[image]) == pytest.approx(exceeded / 9)


def test_confidences_are_logits_of_the_right_labels_probability() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [30.0, 0.0, -30.0]])
    data = Split(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([2, 0]))
    head = type("Fixed", (TaskHead,), {"logits": lambda self, model, inputs: logits})()
    actual = confidences(nn.Identity(), head, data)
    p = logits.double().softmax(1)[[0, 1], [2, 0]]
    assert float(actual[0]) == pytest.approx(float(p[0].logit()), abs=1e-5)
    assert float(actual[1]) == pytest.approx(30, abs=1e-4)  # 1 − p is 1e-13


def test_measures_are_those_of_a_count() -> None:
    random = torch.Generator().manual_seed(1)
    members = torch.rand(2, 1500, generator=random) < 0.5
    scores = torch.randn(2, 1500, generator=random).mul(20).round() + 12 * members  # with ties
    inside, outside = scores[members], scores[~members]
    pairs = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
    leak = membership_leak(scores, members)
    assert leak.auc == pytest.approx(float(pairs.mean()), abs=1e-9)
    for rate in (0.01, 0.001):
        allowed = [t for t in scores.unique().tolist() if float((outside >= t).double().mean()) <= rate]
        assert leak.tpr[rate] == pytest.approx(float((inside >= min(allowed)).double().mean()))
        assert leak.tpr_interval[rate][0] <= leak.tpr[rate] <= leak.tpr_interval[rate][1]
    assert leak.auc_interval[0] < leak.auc < leak.auc_interval[1]
    # the normal approximation of the area's deviation (Hanley and McNeil 1982), with about 1500 on either side
    area = leak.auc
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    deviation = math.sqrt((area * (1 - area) + 1499 * (q1 + q2 - 2 * area**2)) / 1500**2)
    assert leak.auc_interval[1] - leak.auc_interval[0] == pytest.approx(2 * 1.96 * deviation, rel=0.35)


@pytest.fixture
def run(config: dict[str, Any], noise: str) -> dict[str, Any]:
    """A run of the noise and one other task that learns by heart."""
    config |= {"tasks": f"{noise},{config['tasks'].split(',')[0]}", "rounds": 2, "local-epochs": 20, "scaling": 2.0}
    return config | {"learning-rate": 5e-3, "batch-size": 20, "validate-every": 9}


def found(result: dict[str, Any], round_number: int, model: str, attack: str) -> MembershipLeak:
    (row,) = (r for r in result["rows"] if (r["round"], r["model"], r["attack"]) == (round_number, model, attack))
    return row["leak"]


def test_what_was_learnt_by_heart_is_found_and_the_study_resumes(run: dict[str, Any], tmp_path: Path) -> None:
    settings, folder, said = Settings.parse(run), tmp_path / "study", []
    result = membership.study(settings, "noise", folder, members=80, count=4, say=said.append)
    assert len(said) == 4
    for attack in ("loss", "LiRA", "RMIA"):
        for model in ("local", "merged"):
            assert found(result, 2, model, attack).auc_interval[0] > 0.55, (attack, model)
    text = membership.write(result, folder)
    assert text.count("\n") == 1 + 2 * 2 * 3
    assert {path.name for path in folder.iterdir()} >= {"table.md", "result.json", "roc.png"}
    (folder / "run-002.safetensors").unlink()
    again = membership.study(settings, "noise", folder, members=80, count=4, say=said.append)
    assert said[4:] == ["run 3 of 4"]
    assert again["rows"] == result["rows"]
    with pytest.raises(SettingError, match="holds results of another configuration; choose another --folder"):
        membership.study(Settings.parse({**run, "local-epochs": 1}), "noise", folder, members=80, count=4)


def test_a_private_run_is_attacked_though_its_budget_is_spent(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other parties' vectors in the attack are of other bases than the run's; their ledgers are not touched."""
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    settings = Settings.parse({**run, "privacy": "dp-sgd", "dp-epsilon": 3.0, "local-epochs": 2, "learning-rate": 0.1})
    run_loop(settings)
    ledger = tasks.cache_dir() / "privacy" / "ledger.sqlite"
    before = ledger.read_bytes()
    result = membership.study(settings, "noise", tmp_path / "study", members=80, count=4)
    assert {row["round"] for row in result["rows"]} == {1, 2}
    assert ledger.read_bytes() == before


def test_a_base_that_was_not_tuned_tells_nothing(run: dict[str, Any]) -> None:
    settings = Settings.parse(run)
    asked = membership.membership_target(settings, "noise", 80)
    party = membership.Party(settings, "noise")
    party.model.load(party.model.pretrained)
    seen = confidences(party.model.module, asked.head, asked.images)
    halves = torch.stack([asked.half(settings, number) for number in range(8)])
    assert [int(half.sum()) for half in halves] == [80] * 8
    leak = membership_leak(seen.expand(8, -1), halves)
    assert leak.auc_interval[0] < 0.5 < leak.auc_interval[1]


def test_head_images_and_population_are_nobodys(run: dict[str, Any]) -> None:
    asked = membership.membership_target(Settings.parse(run), "noise", 80)
    pixels = [{image.numpy().tobytes() for image in split.images} for split in (asked.images, asked.population)]
    assert len(pixels[0]) == 160
    assert len(pixels[1]) == 340 - 160 - 3 * 5
    assert not pixels[0] & pixels[1]


def test_what_cannot_work_is_said(run: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    settings = Settings.parse(run)
    for arguments, message in (
        (("noise", tmp_path, 150), "--members 150: noise has 340 images"),
        (("mnist", tmp_path), "--task mnist: it is not in tasks="),
        (("noise", tmp_path, 80, 2), "--models 2: it must be at least 4"),
    ):
        with pytest.raises(SettingError, match=message):
            membership.study(settings, *arguments)


def test_the_curve_is_scikit_learns() -> None:
    from sklearn.metrics import roc_curve

    random = np.random.default_rng(0)
    scores, members, weights = random.integers(0, 40, 500), random.random(500) < 0.4, random.integers(0, 4, 500)
    theirs = roc_curve(members, scores, sample_weight=weights, drop_intermediate=False)[:2]
    ours = Curve(torch.from_numpy(scores), torch.from_numpy(members)).rates(weights)
    np.testing.assert_allclose(ours, theirs)
