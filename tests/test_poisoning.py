"""Poisoning: forged vectors against their formulas, what merges let through, and whole runs with attackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_folder
from federation import final, same
from scipy.stats import norm

from atm_fl import tasks
from atm_fl.attacks import poisoning
from atm_fl.attacks.poisoning import alie_factor, forge, kept_shares, poisoned, stamp
from atm_fl.errors import SettingError
from atm_fl.federation.loop import run_loop
from atm_fl.merging import make_merge
from atm_fl.runs.metrics import read_metrics
from atm_fl.settings import Settings
from atm_fl.tasks import Split
from atm_fl.vectors import Layout

LAYOUT = Layout(("w",), ((60,),))


def test_forged_vectors_are_those_of_their_formulas() -> None:
    random = torch.Generator().manual_seed(0)
    of_attackers, honest = torch.randn(60, generator=random), list(torch.randn(6, 60, generator=random))
    step = torch.randn(60, generator=random)

    def sent(attack: str, last: torch.Tensor | None = step) -> torch.Tensor:
        return forge(attack, 3.0, of_attackers, honest, 8, last, 1)

    mean = sum(honest) / 6
    deviation = (sum((vector - mean) ** 2 for vector in honest) / 5) ** 0.5
    torch.testing.assert_close(sent("sign-flip"), -3 * of_attackers)
    torch.testing.assert_close(sent("scale"), 3 * of_attackers)
    torch.testing.assert_close(sent("ipm"), -3 * mean)
    torch.testing.assert_close(sent("alie"), mean - 3 * float(norm.ppf(0.5)) * deviation)  # z of 8 with 2: below
    torch.testing.assert_close(sent("free-ride"), step)
    assert float(sent("free-ride", None).norm()) == 0
    assert float(sent("gaussian").norm()) == pytest.approx(3 * float(of_attackers.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(sent("gaussian"), of_attackers, dim=0))) < 0.4
    assert torch.equal(sent("counts"), of_attackers)


def test_alies_factor_is_the_papers() -> None:
    """50 workers, 24 corrupt: s = 2, so that 24 of 26 honest ones must be nearer: Φ(z) = 24 / 26."""
    assert norm.cdf(alie_factor(50, 24)) == pytest.approx(24 / 26)
    assert norm.cdf(alie_factor(8, 2)) == pytest.approx(3 / 6)


def test_kept_shares_are_those_of_the_merged_vector() -> None:
    """Moving one vector moves the merged one by the share of it that is kept, over the number of those averaged."""
    random = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(60, generator=random) for name in "abcdefgh"}
    vectors["h"] = vectors["h"] * 50
    for name, options in (("multi-krum", {"f": 2}), ("trimmed-mean", {"trim": 0.25}), ("median", {}), ("mean", {})):
        shares = kept_shares(make_merge(name, LAYOUT, **options), vectors)
        before = make_merge(name, LAYOUT, **options).combine(vectors)
        for task, share in shares.items():
            moved = {**vectors, task: vectors[task] + 1e-4}
            after = make_merge(name, LAYOUT, **options).combine(moved)
            assert share == pytest.approx(float(((after - before).abs() > 1e-6).float().mean()), abs=0.02), (name, task)
    assert kept_shares(make_merge("multi-krum", LAYOUT, f=2), vectors)["h"] == 0


def test_a_stamp_is_in_its_corner_and_half_the_data_carries_it() -> None:
    images = torch.full((6, 3, 20, 20), 7, dtype=torch.uint8)
    data = poisoned(Split(images, torch.arange(6) % 3 + 1))
    marked = (data.images != 7).any(1)
    assert marked[::2].flatten(1).any(1).tolist() == [True] * 3
    assert not marked[1::2].any()
    assert not marked[:, :16].any()
    assert not marked[:, :, :16].any()
    assert data.labels.tolist() == [0, 2, 0, 1, 0, 3]
    assert bool((images == 7).all())
    assert torch.equal(stamp(stamp(images)), stamp(images))


@pytest.fixture
def five(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    folders = [str(make_folder(tmp_path / "five" / name, seed)) for seed, name in enumerate("abcde")]
    return config | {"tasks": ",".join(folders), "rounds": 2, "batch-size": 12}


def test_inflated_counts_change_nothing(five: dict[str, Any], tmp_path: Path) -> None:
    """Nor do players whom nobody attacks: the run is the plain one."""
    plain = run_loop(Settings.parse(five))
    for attack in ("none", "counts"):
        settings = Settings.parse({**five, "run-dir": str(tmp_path / attack)})
        poisoning.study(settings, attack, ["a"])
        assert same(final(plain.directory), final(settings.run_dir))
    counts = [line["images"] for line in read_metrics(tmp_path / "counts") if line["kind"] == "tuning"]
    assert counts.count(1e9) == 2


def test_a_robust_merge_holds_where_the_mean_falls(five: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    arguments = (Settings.parse(five), ["none", "gaussian"], ["mean", "multi-krum:f=1"], ["b"], tmp_path / "poison")
    results = poisoning.studies(*arguments, say=said.append)
    actual = {(row["attack"], row["merge"]): row for row in results}
    assert set(actual["none", "mean"]["tasks"]) == set("acde")
    attacked = actual["gaussian", "multi-krum"]
    assert attacked["kept"] == {"a": 1, "b": 0, "c": 1, "d": 1, "e": 1}  # it finds the attacker in both rounds
    nobody = actual["none", "multi-krum"]
    assert sum(nobody["kept"].values()) == pytest.approx(4)  # and drops an honest task if there is none
    for row in results:
        assert row["worst"] == min(row["tasks"].values()) <= row["mean"]
        assert row["trigger"] == pytest.approx(row["trigger"])

    def moved(attack: str, merge: str) -> float:
        """How far the final base is from that of the same merge without an attack, relative to its whole way."""
        ends = [final(tmp_path / "poison" / f"{name}-{merge}") for name in ("none", attack)]
        flat = [torch.cat([tensor.flatten() for tensor in end.values()]) for end in ends]
        return float((flat[0] - flat[1]).norm())

    assert moved("gaussian", "mean") > 2 * moved("gaussian", "multi-krum")
    again = poisoning.studies(*arguments, say=said.append)
    assert again == results
    assert poisoning.table(results).count("\n") == 5


def test_a_private_run_is_attacked_though_its_budget_is_spent(
    five: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forged vectors lead to other bases than the run's, which a budget would have to pay for."""
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    private = Settings.parse({**five, "privacy": "dp-sgd", "dp-epsilon": 3.0})
    run_loop(private)
    ledgers = {path: path.read_text() for path in (tasks.cache_dir() / "privacy").glob("*.json")}
    (row,) = poisoning.studies(private, ["sign-flip"], ["mean"], ["b"], tmp_path / "poison", say=str)
    assert set(row["tasks"]) == set("acde")
    assert {path: path.read_text() for path in (tasks.cache_dir() / "privacy").glob("*.json")} == ledgers


def test_what_cannot_be_run_is_said(five: dict[str, Any]) -> None:
    settings = Settings.parse(five)
    for attack, attackers, message in (
        ("sign-flop", ["a"], "attack='sign-flop' is unknown; did you mean"),
        ("none", ["z"], "--attackers z: it is not in tasks="),
        ("none", ["a", "b", "c"], "they must be fewer than half"),
    ):
        with pytest.raises(SettingError, match=message):
            poisoning.study(settings, attack, attackers)
