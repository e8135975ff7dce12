"""The transform `shrink` against the theory's own figures, which it does not compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atm_fl.federation.loop import run_loop
from atm_fl.settings import Settings
from atm_fl.transforms import Context, make_transforms
from atm_fl.transforms.shrink import median_of_noise, shrunk
from atm_fl.vectors import Layout

SHAPES = [(192, 192), (192, 768), (576, 192)]


def planted(shape: tuple[int, int], strengths: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with singular values of so many times √n, n its longer side, and noise of deviation 1."""
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(side, len(strengths), generator=random))[0] for side in shape)
    signal = (left * torch.tensor(strengths) * max(shape) ** 0.5) @ right.T
    return signal, torch.randn(shape, generator=random)


@pytest.mark.parametrize("shape", [(600, 600), (300, 1200), (100, 2000)])
def test_the_median_of_noise_is_that_of_a_large_matrix_of_noise(shape: tuple[int, int]) -> None:
    _, noise = planted(shape, [])
    values = torch.linalg.svdvals(noise.double()) ** 2 / shape[1]
    assert median_of_noise(shape[0] / shape[1]) == pytest.approx(float(values.median()), rel=0.02)


def test_the_threshold_for_square_matrices_is_the_published_one() -> None:
    """4 / √3 over the root of the median: 2.858 (Gavish and Donoho 2014, table of ω)."""
    assert 4 / 3**0.5 / median_of_noise(1.0) ** 0.5 == pytest.approx(2.858, abs=5e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_of_noise_alone_next_to_nothing_is_left(shape: tuple[int, int], seed: int) -> None:
    _, noise = planted(shape, [], seed)
    assert float(shrunk(noise).norm()) < 0.05 * float(noise.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strengths", [[3.0], [6.0, 4.0, 2.5, 1.6], [20.0, 1.5]])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_a_planted_matrix_comes_out_as_near_as_the_theory_says(
    shape: tuple[int, int], strengths: list[float], scale: float
) -> None:
    """Each direction of strength x costs x² (1 − c² d²), c and d the cosines of the true vectors to the noisy ones."""
    signal, noise = planted(shape, strengths)
    out = shrunk(scale * (signal + noise)) / scale
    ratio, x = min(shape) / max(shape), np.array(strengths)
    left, right = (x**4 - ratio) / (x**4 + ratio * x**2), (x**4 - ratio) / (x**4 + x**2)
    least = max(shape) * float((x**2 * (1 - left * right)).sum())
    assert float((out - signal).square().sum()) == pytest.approx(least, rel=0.25)
    assert float((out - signal).norm()) < 0.5 * float(noise.norm())


def test_nothing_is_noise_where_most_directions_have_none() -> None:
    signal, _ = planted((64, 96), [2.0, 1.0, 0.5])
    assert torch.equal(shrunk(signal), signal)


def test_a_transposed_matrix_is_shrunk_alike() -> None:
    signal, noise = planted((48, 80), [4.0, 2.0])
    assert torch.allclose(shrunk((signal + noise).T).T, shrunk(signal + noise), atol=1e-4)


def test_what_is_no_large_matrix_stays(config: dict[str, Any]) -> None:
    layout = Layout(("bias", "small", "conv", "weight"), ((40,), (15, 90), (20, 20, 1), (20, 90)))
    vector = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    (transform,) = make_transforms("shrink")
    out = transform.client(vector.clone(), Context(Settings.parse(config), layout, 1))
    before, after = layout.views(vector), layout.views(out)
    assert {name for name in layout.names if not torch.equal(before[name], after[name])} == {"weight"}


@pytest.mark.parametrize("secure", [False, True])
def test_a_private_run_takes_it(config: dict[str, Any], secure: bool) -> None:
    """After the noise, which it cannot see but takes out; also where the server sees sums alone."""
    settings = {"privacy": "dp-sgd", "dp-noise": 1.0, "rounds": 1, "secure-aggregation": secure, "merge": "iso-c"}
    plain = run_loop(Settings.parse({**config, **settings}))
    run = run_loop(Settings.parse({**config, **settings, "transforms": "shrink", "run-dir": config["run-dir"] + "-s"}))
    assert not torch.equal(plain.base, run.base)
