"""Client-level DP: clipped task vectors, noise of the stated size on their merge, and its ε."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from federation import final, in_process, same
from scipy.stats import norm
from torch import Tensor

from atm_fl.errors import SettingError
from atm_fl.federation.chain import Chain
from atm_fl.federation.client import Update
from atm_fl.federation.loop import run_loop
from atm_fl.federation.server_round import ServerRound
from atm_fl.merging import make_merge
from atm_fl.merging.spectral import IsoC
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.settings import Settings
from atm_fl.transforms import Context


@pytest.fixture(autouse=True)
def _own_secret(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))


def merged(config: dict[str, Any], vectors: dict[str, Tensor], **more: Any) -> Tensor:
    """What one round makes of `vectors`, by the server's own code."""
    name = config["run-dir"] + str(abs(hash((str(more), *(float(v.sum()) for v in vectors.values())))))
    settings = Settings.parse(config | {"run-dir": name} | {key.replace("_", "-"): more[key] for key in more})
    run = Run(settings)
    before, current = run.base.clone(), ServerRound(run)
    for task, vector in vectors.items():
        if settings.secure_aggregation:
            arrays = Chain(settings).encode(vector.clone(), Context(settings, run.layout, 1, task, task))
        else:
            arrays = settings.uplink.encode(vector.clone(), run.layout)
        current.add(task, Update(arrays, {}, {}), 0)
    current.close()
    run.close()
    return run.base - before


def three(config: dict[str, Any]) -> dict[str, Tensor]:
    """Vectors of norms 0.1, 1 and 10."""
    random = torch.Generator().manual_seed(0)
    size = Run(Settings.parse(config | {"run-dir": config["run-dir"] + "-size"})).layout.size
    drawn = [torch.randn(size, generator=random) for _ in range(3)]
    lengths = zip(("red", "green", "blue"), drawn, (0.1, 1.0, 10.0), strict=True)
    return {name: vector / vector.norm() * length for name, vector, length in lengths}


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(("merge", "factor"), [("mean", 1 / 3), ("task-arithmetic", 0.3)])
def test_vectors_are_clipped_and_the_noise_has_the_stated_size(
    config: dict[str, Any], merge: str, factor: float, secure: bool
) -> None:
    vectors, clip, noise = three(config), 0.5, 2.0
    common = {"merge": merge, "dp_client_clip": clip, "secure_aggregation": secure}
    quiet = merged(config, vectors, **common)
    expected = factor * torch.stack([v * min(1.0, clip / float(v.norm())) for v in vectors.values()]).sum(0)
    torch.testing.assert_close(quiet, expected, rtol=1e-4, atol=1e-6)
    noisy = merged(config, vectors, **common, dp_client_noise=noise) - quiet
    deviation = factor * noise * clip
    assert float(noisy.std()) == pytest.approx(deviation, rel=0.05)
    assert abs(float(noisy.mean())) < 5 * deviation / len(noisy) ** 0.5


@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_is_on_the_sum_before_a_merge_that_is_not_linear(
    config: dict[str, Any], secure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iso-C gets Σ clip(τ) + σ C N, and its result is that of this sum, not a merged vector with noise on it."""
    vectors, clip, noise = three(config), 0.5, 2.0
    seen: list[Tensor] = []
    from_sum = IsoC.from_sum

    def watched(self: IsoC, scaled: Tensor, count: int, rounding: float = 0.0) -> Tensor:
        seen.append(scaled.clone())
        return from_sum(self, scaled, count, rounding)

    monkeypatch.setattr(IsoC, "from_sum", watched)
    common = {"merge": "iso-c", "dp_client_clip": clip, "dp_client_noise": noise, "secure_aggregation": secure}
    result = merged(config, vectors, **common, scaling=2.0)
    drawn = seen[0] - torch.stack([v * min(1.0, clip / float(v.norm())) for v in vectors.values()]).sum(0)
    assert float(drawn.std()) == pytest.approx(noise * clip, rel=0.05)
    layout = Run(Settings.parse(config | {"run-dir": config["run-dir"] + "-layout"})).layout
    # a base of order 1 holds a step of order 10 to float32's rounding
    torch.testing.assert_close(
        result, from_sum(make_merge("iso-c", layout, scaling=2.0), seen[0], 3), rtol=0, atol=1e-5
    )


def test_the_same_sum_gets_the_same_noise_and_another_sum_another(config: dict[str, Any]) -> None:
    vectors, common = three(config), {"dp_client_clip": 0.5, "dp_client_noise": 1.0}
    one = merged(config, vectors, **common)
    other = merged(config, {"red": vectors["red"], "green": vectors["green"]}, **common)
    quiet, without = (merged(config, v, dp_client_clip=0.5) for v in (vectors, dict(list(vectors.items())[:2])))
    noises = torch.stack([one - quiet, other - without])
    assert abs(float(torch.corrcoef(noises)[0, 1])) < 6 / noises.shape[1] ** 0.5


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """δ of one Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, Theorem 8)."""
    return float(
        norm.cdf(1 / (2 * sigma) - epsilon * sigma) - math.exp(epsilon) * norm.cdf(-1 / (2 * sigma) - epsilon * sigma)
    )


@pytest.mark.parametrize("secure", [False, True])
def test_a_run_reports_the_epsilon_of_all_its_rounds(config: dict[str, Any], secure: bool) -> None:
    """K rounds of noise σ are one of σ / √K, whose ε has a closed form."""
    config |= {"dp-client-clip": 0.1, "dp-client-noise": 4.0, "secure-aggregation": secure}
    plain, flower = (Settings.parse({**config, "run-dir": config["run-dir"] + name}) for name in ("-plain", "-flower"))
    run = run_loop(plain)
    in_process(flower)
    assert same(final(plain.run_dir), final(flower.run_dir))
    actual = [line["epsilon"] for line in read_metrics(run.directory) if line["kind"] == "merge"]
    assert actual == sorted(actual)
    for rounds, epsilon in enumerate(actual, 1):
        assert gaussian_delta(epsilon, 4.0 / math.sqrt(rounds)) == pytest.approx(1e-5, rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dp-client-clip": 1.0, "merge": "ties"}, "merge='ties': not with dp-client-clip=1"),
        ({"dp-client-noise": 1.0}, "dp-client-noise=1: it needs dp-client-clip"),
        ({"dp-client-clip": -1.0}, "dp-client-clip=-1.0: it must be 0 or more"),
        ({"dp-client-clip": 1.0, "participation": "red=2-"}, "participation='red=2-': not with dp-client-clip=1"),
    ],
)
def test_settings_that_cannot_work_are_said(config: dict[str, Any], wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Settings.parse({**config, **wrong})
