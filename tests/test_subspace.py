"""DP-SGD in a subspace (`dp-rank`): its geometry, its promise, and that no record has a part in its directions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_noise import RECORDS, STEP, edit, release
from test_privacy import looped, vector_of
from torch import Tensor

from atm_fl.errors import RunError, SettingError
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.privacy import dp_sgd
from atm_fl.privacy.subspace import Subspace, probes
from atm_fl.settings import Settings

CLIP, NOISE = 0.3, 2.0
QUIET = {**STEP, "privacy": "clip-only", "dp-clip": CLIP, "dp-rank": 3}


def subspace_of(party: Party) -> Subspace:
    model = party.model
    model.load(model.pretrained)
    data, settings = party.tuned_on, party.settings
    return dp_sgd._subspace(model.module, party.head, model.layout, model.shared, data, settings)


def party_of(config: dict[str, Any], **changed: Any) -> Party:
    settings = Settings.parse({**config, **QUIET, **changed})
    return Party(settings, settings.task_names[0])


def projected(subspace: Subspace, vector: Tensor) -> Tensor:
    """U Uᵀ G V Vᵀ of every matrix G, zero elsewhere: what `expand` and `project` make of it, without either."""
    out = torch.zeros_like(vector)
    views, targets = subspace.layout.views(vector), subspace.layout.views(out)
    for name, (left, right) in subspace.sides.items():
        targets[name].copy_(left @ (left.T @ views[name] @ right) @ right.T)
    return out


def test_a_point_and_its_vector_are_of_one_length_and_low_rank(config: dict[str, Any]) -> None:
    subspace = subspace_of(party_of(config))
    random = torch.Generator().manual_seed(0)
    points = torch.randn(5, subspace.size, generator=random)
    vectors = torch.stack([subspace.expand(point) for point in points])
    torch.testing.assert_close(subspace.project(vectors), points, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vectors.norm(dim=1), points.norm(dim=1))
    shapes = dict(zip(subspace.layout.names, subspace.layout.shapes, strict=True))
    for name, entry in subspace.layout.views(vectors[0]).items():
        if len(shapes[name]) == 2 and min(shapes[name]) > 1:
            assert torch.linalg.matrix_rank(entry, rtol=1e-4) == min(3, *shapes[name])
        else:
            assert not entry.any()
    anything = torch.randn(2, subspace.layout.size, generator=random)
    for vector, point in zip(anything, subspace.project(anything), strict=True):
        torch.testing.assert_close(subspace.expand(point), projected(subspace, vector), rtol=1e-3, atol=1e-5)


def test_in_all_directions_it_is_descent_of_the_matrices(config: dict[str, Any]) -> None:
    party = party_of(config, **{"dp-rank": 10_000, "dp-clip": math.inf, "learning-rate": 0.05})
    base = party.model.pretrained
    party.model.load(base)
    step = -0.05 * looped(party, *next(party.tuned_on.batches(None, RECORDS))).mean(0)
    matrices = projected(subspace_of(party), step)
    vector = vector_of(party.train(base, 1))
    torch.testing.assert_close(vector, matrices, rtol=1e-3, atol=1e-6)
    views, shapes = party.model.layout.views(step), party.model.layout.shapes
    for (name, entry), shape in zip(party.model.layout.views(matrices).items(), shapes, strict=True):
        if len(shape) == 2 and min(shape) > 1:
            torch.testing.assert_close(entry, views[name], rtol=1e-3, atol=1e-6)


def test_a_step_is_the_sum_of_what_is_projected_and_then_clipped_and_its_noise(config: dict[str, Any]) -> None:
    party = party_of(config)
    base = party.model.pretrained
    party.model.load(base)
    gradients = looped(party, *next(party.tuned_on.batches(None, RECORDS)))
    subspace = subspace_of(party)
    within = torch.stack([projected(subspace, gradient) for gradient in gradients])
    norms = within.norm(dim=1)
    assert bool((norms > CLIP).any())
    expected = -(within * (CLIP / norms).clamp_max(1.0)[:, None]).sum(0) / RECORDS
    torch.testing.assert_close(vector_of(party.train(base, 1)), expected, rtol=1e-3, atol=1e-6)
    noisy = party_of(config, privacy="dp-sgd", **{"dp-noise": NOISE, "dp-rank": 8})
    subspace = subspace_of(noisy)
    drawn = vector_of(noisy.train(base, 1))
    torch.testing.assert_close(projected(subspace, drawn), drawn, rtol=1e-3, atol=1e-5)  # no noise elsewhere
    within = torch.stack([projected(subspace, gradient) for gradient in gradients])
    expected = -(within * (CLIP / within.norm(dim=1)).clamp_max(1.0)[:, None]).sum(0) / RECORDS
    noise = subspace.project((drawn - expected)[None])[0]
    assert float(noise.std()) == pytest.approx(NOISE * CLIP / RECORDS, rel=4 / math.sqrt(2 * len(noise)))


def test_no_record_has_a_part_in_the_directions(config: dict[str, Any]) -> None:
    """Two parties that share nothing but the head, which their validation images make."""
    one, other = (Party(party_of(config).settings, folder) for folder in config["tasks"].split(",")[:2])
    other.head = one.head
    for (left, right), (same_left, same_right) in zip(
        subspace_of(one).sides.values(), subspace_of(other).sides.values(), strict=True
    ):
        assert torch.equal(left, same_left)
        assert torch.equal(right, same_right)


@pytest.mark.parametrize("change", ["replace", "add", "remove"])
def test_releases_of_neighbours_differ_by_two_independent_noises(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    folder = config["tasks"].split(",")[0]
    settings = {**STEP, "privacy": "dp-sgd", "dp-noise": 8.0, "dp-clip": 0.5, "dp-rank": 8, "rounds": 1}
    parsed = Settings.parse({**config, **settings, "tasks": folder})
    size = subspace_of(Party(parsed, folder)).size
    first = release(parsed, folder)
    assert torch.equal(release(parsed, folder), first)
    edit(Path(folder), change, 0, 128)
    second = release(parsed, folder)
    noises = float((first - second).norm()) / (2 * size) ** 0.5 / (8.0 * 0.5 / RECORDS)
    assert noises == pytest.approx(1, abs=6 / math.sqrt(2 * size))


def test_epsilon_is_what_it_is_without(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the subspace: the noise is measured by the clip."""
    private = {"privacy": "dp-sgd", "dp-noise": 1.0, "rounds": 2}
    numbers = []
    for rank in (0, 2):
        monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / f"cache-{rank}"))  # a ledger of its own
        settings = Settings.parse({**config, **private, "dp-rank": rank})
        party = Party(settings, settings.task_names[0])
        told = party.train(party.model.pretrained, 1).tuning
        numbers.append({key: told[key] for key in ("epsilon", "epsilon_rdp", "noise", "steps")})
    assert numbers[0] == numbers[1]


def test_a_whole_run_takes_it(config: dict[str, Any]) -> None:
    run = run_loop(Settings.parse({**config, "privacy": "dp-sgd", "dp-noise": 1.0, "dp-rank": 2, "merge": "tsv-m"}))
    assert run.rounds_done == 3


def test_probes_have_the_spectrum_of_natural_images() -> None:
    """Amplitudes that fall as one over the frequency, on average, and pixels within a byte's range."""
    images, _ = probes(256, torch.Size((3, 32, 32)), 0)
    assert images.dtype == torch.uint8
    waves = torch.fft.fft2(images.double() - images.double().mean((-2, -1), keepdim=True)).abs().mean((0, 1))
    ratio = float(waves[0, 2] / waves[0, 8])
    assert ratio == pytest.approx(4, rel=0.15)
    assert torch.equal(images, probes(256, torch.Size((3, 32, 32)), 0)[0])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dp-rank": -1}, "dp-rank=-1: it must be 0 or more"),
        ({"privacy": "none", "dp-clip": 1.0}, "dp-rank=3: it needs privacy='dp-sgd' or 'clip-only'"),
        ({"keep-optimizer": True, "optimizer": "adamw"}, "keep-optimizer=True: not with dp-rank"),
        ({"client-momentum": 0.3}, "client-momentum=0.3: not with dp-rank"),
        ({"gradient-surgery": True}, "gradient-surgery=True: not with dp-rank"),
        ({"trainable": "lora"}, "dp-rank: not with trainable='lora'"),
        ({"model": "minilm"}, "dp-rank: its made-up images are nothing to model='minilm'"),
    ],
)
def test_what_it_does_not_go_with_is_said(config: dict[str, Any], changed: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError) as error:
        Settings.parse({**config, **QUIET, **changed})
    assert words in str(error.value)


def test_where_nothing_is_a_matrix_it_is_refused(config: dict[str, Any]) -> None:
    party = party_of(config, trainable="*norm*")
    with pytest.raises(RunError, match="dp-rank=3: none of what is tuned is a matrix"):
        party.train(party.model.pretrained, 1)
