"""Merges: against float64 transcriptions of the papers, on ordinary and nasty vectors, and what all of them promise."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import ORACLES, dare_mask, distances
from torch import Tensor

from atm_fl import merging
from atm_fl.errors import SettingError
from atm_fl.merging import Merge, find_merge, make_merge, merges, options
from atm_fl.merging.kinds import BatchMerge, Streaming
from atm_fl.merging.sparse import Mask
from atm_fl.vectors import Layout, blocks, linalg, single
from atm_fl.vectors.blocks import inner_products, ranked_magnitudes, sort_rows

NAMES = sorted(merges())
STREAMING = [name for name in NAMES if issubclass(merges()[name], Streaming)]
JOINT = [name for name in NAMES if issubclass(merges()[name], BatchMerge)]
RANDOM = ["dare", "dare-ties", "pcgrad"]

LEAST = {"consensus": 2, "model-stock": 2, "multi-krum": 5, "trimmed-mean": 5}
"""Tasks that a merge needs with its default options."""

few = settings(deadline=None, max_examples=10)

MIXED = Layout(
    (
        "scale",
        "bias",
        "empty",
        "tall.weight",
        "wide.weight",
        "square.weight",
        "conv.weight",
        "qkv.weight",
        "row.weight",
    ),
    ((), (7,), (0,), (9, 5), (4, 11), (6, 6), (3, 2, 2, 2), (12, 5), (1, 6)),
)
ONE = Layout(("one",), ((1,),))


def flat(size: int) -> Layout:
    return Layout(("vector",), ((size,),))


def normal(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    return random.normal(size=(count, size))


def grid(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Multiples of 2⁻¹⁰, few of them: many equal magnitudes, and sums that are exactly 0."""
    return random.integers(-5, 6, (count, size)) * 2.0**-10


def opposite(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Pairs that cancel out."""
    stack = random.normal(size=(count, size))
    stack[1::2] = -stack[0::2][: count // 2]
    return stack


def some_zero(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Every third vector is zero."""
    stack = random.normal(size=(count, size))
    stack[::3] = 0
    return stack


def sparse(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Fewer elements than the default densities keep."""
    return random.normal(size=(count, size)) * (random.random((count, size)) < 0.05)


def equal(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    return np.tile(random.normal(size=size), (count, 1))


def constant(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Each vector all of one number: every magnitude is the threshold, every matrix has rank one."""
    return np.tile(np.array([3.0, -1.5, 0.75, 2.25, -0.5, 1.0, 4.0])[:count, None], (1, size))


def outlier(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """One vector is a thousand times as long as the others."""
    stack = random.normal(size=(count, size))
    stack[-1] *= 1024
    return stack


def peak(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """One element of each vector is much larger than the others."""
    stack = random.normal(size=(count, size))
    stack[np.arange(count), np.arange(count) % size] *= 1e4
    return stack


def related(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """A large part in common, as of tasks that are alike."""
    return random.normal(size=(count, size)) + 3 * random.normal(size=size)


def huge(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    return random.normal(size=(count, size)) * 1e15


def tiny(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    return random.normal(size=(count, size)) * 1e-15


MAKERS = [normal, grid, opposite, some_zero, sparse, equal, constant, outlier, peak, related, huge, tiny]


def make(
    maker: Callable[..., np.ndarray], count: int, size: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Task vectors that are columns of one tensor, not contiguous, by names that are not in order."""
    stack = torch.from_numpy(maker(count, size, np.random.default_rng(seed))).to(dtype)
    columns = stack.T.contiguous()
    names = ["solar", "icons", "mnist", "digits", "bluemarble", "strokes", "radicals"]
    return {names[number]: columns[:, number] for number in range(count)}


CHOICES: dict[str, list[dict[str, Any]]] = {
    "clipped-mean": [{"max_norm": 1e-3}, {"max_norm": 16.5}],
    "magnitude": [{"density": 0.5}, {"density": 1.0}, {"density": 1e-4}],
    "breadcrumbs": [{"beta": 0.5, "gamma": 0.9}, {"beta": 0.0, "gamma": 1.0}, {"beta": 0.9, "gamma": 0.3}],
    "dare": [{"density": 0.5}, {"density": 1.0}],
    "ties": [{"density": 0.5}, {"density": 1.0}, {"density": 1e-4}],
    "dare-ties": [{"density": 0.5}, {"density": 1.0}],
    "consensus": [{"threshold": 0.375}, {"threshold": 0.0}, {"threshold": 0.625, "agreement": 1}],
    "trimmed-mean": [{"trim": 0.4}, {"trim": 0.0}],
    "multi-krum": [{"f": 0}],
    "cagrad": [{"c": 0.0}, {"c": 0.9}],
    "pcb": [{"density": 1.0}, {"density": 0.05}],
    "tsv-m": [{"split_qkv": True}],
    "iso-c": [{"split_qkv": True}],
    "iso-cts": [{"split_qkv": True}, {"common": 0.6}, {"common": 1.0}],
    "wudi": [{"split_qkv": True}, {"pull": 1e-3}, {"pull": 100.0}],
}
"""Options to try beside the defaults."""

CASES = [(name, chosen) for name in NAMES for chosen in [{}, {"scaling": -0.75}, *CHOICES.get(name, [])]]

ITERATIVE = {"geometric-median": 2e-3, "cagrad": 1e-4}
"""Merges that minimise something, and how near to the minimiser they come."""


def expected(
    merge: Merge,
    name: str,
    vectors: dict[str, Tensor],
    weights: dict[str, float] | None = None,
    dtype: type[np.floating] = np.float64,
) -> np.ndarray:
    """What the transcription of a merge makes of the vectors, in float64 or another dtype."""
    chosen = {item.name: getattr(merge, item.name) for item in options(type(merge))}
    if name in STREAMING:
        chosen["weights"] = weights or dict.fromkeys(vectors, 1.0)
    exact = {task: vector.numpy().astype(dtype) for task, vector in vectors.items()}
    return ORACLES[name](exact, merge.layout, merge.seed, **chosen)


def size_of(vectors: dict[str, Tensor]) -> float:
    """The largest magnitude in any vector, on which errors are measured."""
    return max((float(vector.abs().max()) for vector in vectors.values()), default=0.0)


def assert_near(actual: Tensor, wanted: np.ndarray, scale: float, tolerance: float = 1e-5) -> None:
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual.numpy(), wanted, rtol=tolerance, atol=tolerance * scale)


# --- against the transcriptions


def test_every_merge_has_a_transcription() -> None:
    assert set(NAMES) == set(ORACLES)


def agree(merge: Merge, name: str, vectors: dict[str, Tensor], weights: dict[str, float] | None = None) -> None:
    """Assert that a merge of the vectors, which stay as they are, is its transcription."""
    before = {task: vector.clone() for task, vector in vectors.items()}
    actual = merge.combine(vectors, weights)
    first = next(iter(vectors.values()))
    assert actual.dtype == first.dtype
    assert actual.is_contiguous()
    assert all(torch.equal(vectors[task], before[task]) for task in vectors)
    tolerance = max(1e-5 if first.dtype == torch.float32 else 1e-8, ITERATIVE.get(name, 0))
    assert_near(actual, expected(merge, name, vectors, weights), size_of(vectors), tolerance)


@pytest.mark.parametrize(("name", "chosen"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_every_merge_is_its_transcription(name: str, chosen: dict[str, Any]) -> None:
    for number, (dtype, count) in enumerate(itertools.product([torch.float32, torch.float64], [2, 3, 5, 6])):
        if count < max(LEAST.get(name, 1), chosen.get("agreement", 1)) or (name, count) == ("geometric-median", 2):
            continue  # every point between two vectors is their geometric median
        agree(make_merge(name, MIXED, seed=number, **chosen), name, make(normal, count, MIXED.size, dtype, seed=number))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LEAST])
def test_every_merge_of_one_task_is_its_transcription(name: str) -> None:
    for chosen in [{}, *CHOICES.get(name, [])]:
        agree(make_merge(name, MIXED, **chosen), name, make(normal, 1, MIXED.size, torch.float32))


@pytest.mark.parametrize("name", STREAMING)
def test_weighted_merges_are_their_transcriptions(name: str) -> None:
    vectors = make(normal, 4, MIXED.size, torch.float32)
    weights = dict(zip(vectors, [3.0, 0.125, 17.0, 1.0], strict=True))
    agree(make_merge(name, MIXED), name, vectors, weights)


@pytest.mark.parametrize("maker", [normal, grid, some_zero])
@pytest.mark.parametrize("name", NAMES)
def test_vectors_of_one_element(name: str, maker: Callable[..., np.ndarray]) -> None:
    if name == "cagrad" and maker is not normal:
        pytest.skip("of a task of zero the step is g₀ + 0/0: see the test below")
    for seed in range(5):
        agree(make_merge(name, ONE, seed=seed), name, make(maker, 5, 1, torch.float32, seed))


UNSURE = {
    ("cagrad", "opposite"): "0 is a mixture of two vectors: the step is g₀ + 0/0",
    ("cagrad", "some_zero"): "0 is one of the vectors: the step is g₀ + 0/0",
    **dict.fromkeys(
        [("pcb", "grid"), ("consensus", "grid")], "elements at exactly the threshold fall where rounding throws them"
    ),
}
"""Where the definition does not settle the result, or float32 may not."""


@pytest.mark.parametrize("maker", MAKERS[1:], ids=lambda maker: maker.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_nasty_vectors_change_nothing(name: str, maker: Callable[..., np.ndarray]) -> None:
    if (name, maker.__name__) in UNSURE:
        pytest.skip(UNSURE[name, maker.__name__])
    for dtype, count in [(torch.float32, 6), (torch.float64, 5)]:
        vectors = make(maker, count, MIXED.size, dtype)
        for chosen in [{}, *CHOICES.get(name, [])]:
            agree(make_merge(name, MIXED, **chosen), name, vectors)


@pytest.mark.parametrize("maker", [some_zero, opposite])
def test_cagrad_where_a_mixture_of_the_vectors_is_zero_is_the_mean(maker: Callable[..., np.ndarray]) -> None:
    for seed, count in itertools.product(range(5), [2, 4, 6]):
        vectors = make(maker, count, MIXED.size, torch.float32, seed)
        actual = make_merge("cagrad", MIXED).combine(vectors)
        stack = torch.stack(list(vectors.values()))
        torch.testing.assert_close(actual, stack.mean(0) / 1.25, rtol=1e-4, atol=1e-5 * float(stack.abs().max()))


@pytest.mark.parametrize("threshold", [0.375, 0.5, 1.0])
def test_consensus_counts_elements_exactly_at_its_threshold(threshold: float) -> None:
    for agreement in (1, 2, 3):
        merge = make_merge("consensus", MIXED, threshold=threshold, agreement=agreement)
        agree(merge, "consensus", make(grid, 5, MIXED.size, torch.float32))


def test_pcb_keeps_what_equals_the_last_kept() -> None:
    agree(make_merge("pcb", MIXED, density=0.3), "pcb", make(grid, 3, MIXED.size, torch.float64))


@pytest.mark.parametrize(
    "maker", [normal, related, opposite, some_zero, sparse, huge], ids=lambda maker: maker.__name__
)
def test_the_geometric_median_has_the_smallest_sum_of_distances(maker: Callable[..., np.ndarray]) -> None:
    for count in (2, 3, 4, 7):
        vectors = make(maker, count, 50, torch.float64)
        stack = np.stack([vector.numpy() for vector in vectors.values()])
        merge = make_merge("geometric-median", flat(50))
        best = distances(expected(merge, "geometric-median", vectors), stack)
        assert distances(merge.combine(vectors).numpy(), stack) <= best * (1 + 1e-4)


@pytest.mark.parametrize("maker", [normal, grid, related, outlier, huge], ids=lambda maker: maker.__name__)
def test_the_cagrad_step_helps_the_worst_off_task_most(maker: Callable[..., np.ndarray]) -> None:
    for count, c in itertools.product((1, 2, 4, 7), (0.1, 0.5, 0.9)):
        vectors = make(maker, count, 50, torch.float64)
        stack = np.stack([vector.numpy() for vector in vectors.values()])
        merge = make_merge("cagrad", flat(50), c=c)
        step, best = (
            actual * (1 + c**2) for actual in (merge.combine(vectors).numpy(), expected(merge, "cagrad", vectors))
        )
        centre = stack.mean(0)
        assert np.linalg.norm(step - centre) <= c * np.linalg.norm(centre) * (1 + 1e-6)
        slack = 1e-6 * float((stack**2).sum(1).max())
        assert float((stack @ step).min()) >= float((stack @ best).min()) - slack


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "wudi"])
@pytest.mark.parametrize("difference", [1.0, 0.1, 0.01, 0.001])
def test_matrices_that_are_much_alike_are_merged_as_exactly_as_others(name: str, difference: float) -> None:
    random = np.random.default_rng(0)
    matrices = random.normal(size=32 * 24) + difference * random.normal(size=(4, 32 * 24))
    layout = Layout(("weight",), ((32, 24),))
    agree(make_merge(name, layout), name, {str(i): torch.from_numpy(m).float() for i, m in enumerate(matrices)})


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "wudi"])
@pytest.mark.parametrize("weakest", [1e-2, 1e-3, 1e-4])
def test_weak_directions_are_merged_exactly(name: str, weakest: float) -> None:
    random = np.random.default_rng(0)
    vectors = {}
    for task in "ab":
        u, _, vt = np.linalg.svd(random.normal(size=(20, 12)), full_matrices=False)
        vectors[task] = torch.from_numpy((u * np.geomspace(1, weakest, 12) @ vt).ravel()).float()
    agree(make_merge(name, Layout(("weight",), ((20, 12),))), name, vectors)


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "wudi"])
@pytest.mark.parametrize("shape", [(30, 10), (10, 30), (10, 10)])
def test_matrices_of_low_rank(name: str, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for rank, count in itertools.product((1, 2, 5), (1, 2, 3)):
        layout = Layout(("weight",), (shape,))
        # Small whole numbers, so that float32 holds matrices of exactly this rank.
        factors = [
            (random.integers(-9, 10, (shape[0], rank)), random.integers(-9, 10, (rank, shape[1]))) for _ in range(count)
        ]
        vectors = {str(i): torch.from_numpy(a @ b).reshape(-1).float() for i, (a, b) in enumerate(factors)}
        agree(make_merge(name, layout), name, vectors)


@pytest.mark.parametrize("angle", [1e-6, 5e-7])
def test_directions_of_tasks_that_nearly_coincide_are_still_two(angle: float) -> None:
    # Of 64 axes of each task one is the other task's, but for an angle that float32 holds: the lesser singular value
    # of all axes is angle / 2 of the largest, more than what is noise of the largest, less than what is of their norm.
    matrices, axes = np.zeros((2, 256, 128)), np.arange(128)
    matrices[axes // 64, axes, axes] = 1
    matrices[1, [0, 64], 64] = np.cos(angle), np.sin(angle)
    vectors = {str(task): torch.from_numpy(matrix.ravel()).float() for task, matrix in enumerate(matrices)}
    agree(make_merge("tsv-m", Layout(("weight",), ((256, 128),))), "tsv-m", vectors)


def spectrum(shape: tuple[int, int], values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A matrix with these singular values and random singular vectors."""
    (u, _), (v, _) = (np.linalg.qr(random.normal(size=(side, len(values)))) for side in shape)
    return (u * values) @ v.T


SPECTRA = {
    "noise": np.linspace(1, 0.2, 400),
    "noise and steps": np.r_[np.geomspace(30, 2, 60), np.linspace(1, 0.5, 340)],
    "steep": np.arange(1, 401.0) ** -2,
    "steps of equal values": np.repeat([4.0, 3, 2, 1], [45, 25, 130, 200]),
    "all equal": np.ones(400),
    "low rank": np.linspace(2, 1, 8),
    "nothing": np.zeros(1),
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("scale", [1.0, 1e12, 1e-12])
def test_leading_eigenvectors_are_as_exact_as_is_said(kind: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, eigh = [], linalg.eigh

    def counted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        whole.extend([matrix] if matrix.dtype == torch.float64 and len(matrix) == 400 else [])
        return eigh(matrix)

    monkeypatch.setattr(linalg, "eigh", counted)
    columns = torch.from_numpy(scale * spectrum((600, 400), SPECTRA[kind], np.random.default_rng(0)))
    matrix = linalg.gram(columns)
    np.testing.assert_allclose(matrix.numpy(), columns.T @ columns, atol=1e-14 * float(matrix.trace()))
    for rank in (0, 1, 50, 100, 300):
        values, vectors = linalg.leading(matrix, rank, refined=True)
        assert vectors.shape == (400, rank)
        assert_near(vectors.T @ vectors, np.eye(rank), 1, 1e-12)
        exact = np.linalg.eigvalsh(matrix.numpy())[400 - rank :]
        rounding = 1e-13 * float(matrix.trace())
        np.testing.assert_allclose(values.numpy(), exact, rtol=linalg.RESIDUAL, atol=rounding)
        left = (matrix @ vectors - vectors * values).norm(dim=0)
        assert (left <= linalg.RESIDUAL * values[:1].abs() + rounding).all()
    few = 0 if kind in ("steep", "low rank", "nothing") else 3  # of the ranks were found without all of float64
    assert len(whole) <= 5 - few


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "wudi"])
@pytest.mark.parametrize("kind", SPECTRA)
def test_large_matrices_are_merged_more_exactly_than_by_float32(name: str, kind: str) -> None:
    random = np.random.default_rng(0)
    layout = Layout(("weight",), ((400, 430),))
    common = spectrum(layout.shapes[0], SPECTRA[kind], random)
    vectors = {
        str(task): torch.from_numpy((spectrum(layout.shapes[0], SPECTRA[kind], random) + common).ravel()).float()
        for task in range(5)
    }
    merge = make_merge(name, layout)
    wanted = expected(merge, name, vectors)
    single = expected(merge, name, vectors, dtype=np.float32)
    error, limit = (float(np.linalg.norm(actual - wanted)) for actual in (merge.combine(vectors).numpy(), single))
    assert error <= max(limit, 2e-6 * np.linalg.norm(wanted))


# --- in float32


BY = {"eigenvectors": ("cpu",), "products": ()}
"""How polar factors are made in float32 → the devices where they are made by eigenvectors."""


@st.composite
def spectra(draw: st.DrawFn) -> tuple[tuple[int, int], np.ndarray]:
    """A shape, tall, wide or square, and singular values: flat, steep, of low rank, or all zero."""
    shape = draw(st.sampled_from([(24, 24), (60, 20), (20, 60), (7, 5), (1, 9), (9, 1), (1, 1)]))
    size = min(shape)
    weakest = draw(st.sampled_from([0.3, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9]))
    values = np.geomspace(1, weakest, size)
    values[draw(st.integers(0, size)) :] = draw(st.sampled_from([0.0, weakest]))
    return shape, values * 10.0 ** draw(st.integers(-12, 12))


def stated_errors(values: np.ndarray) -> np.ndarray:
    """Most that each direction of a polar factor may err in float32."""
    parts = values / max(values.max(), 1e-300)
    return np.minimum(1.01, single.ERROR / np.maximum(parts, 1e-9) ** 2)


@pytest.mark.parametrize("by", BY)
@given(spectra(), st.integers(0, 2**32 - 1))
def test_iso_c_in_float32_is_as_near_to_exact_as_it_says(by: str, drawn: Any, seed: int) -> None:
    shape, values = drawn
    matrix = spectrum(shape, values, np.random.default_rng(seed))
    vectors, layout = {"a": torch.from_numpy(matrix.ravel()).float()}, Layout(("weight",), (shape,))
    exact = make_merge("iso-c", layout).combine(vectors).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single, "EIGENVECTORS", BY[by])
        merged = make_merge("iso-c", layout, precision="float32").combine(vectors).double()
    errors = stated_errors(values)
    # all directions have the mean's strength, which itself errs by what each adds to it
    limit = values.mean() * np.linalg.norm(errors) + (values * errors).mean() * len(values) ** 0.5
    assert float((merged - exact).norm()) <= limit + 1e-30


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (48, 48)])
@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15])
def test_tsv_m_in_float32_is_as_near_to_exact_as_it_says(
    by: str, shape: tuple[int, int], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "EIGENVECTORS", BY[by])
    random, layout = np.random.default_rng(0), Layout(("weight",), (shape,))
    strengths = np.r_[np.linspace(3, 1, 12), np.linspace(0.1, 0, 36)]  # a gap behind those that are kept
    matrices = [scale * spectrum(shape, strengths, random) for _ in range(4)]
    vectors = {str(number): torch.from_numpy(matrix.ravel()).float() for number, matrix in enumerate(matrices)}
    exact = make_merge("tsv-m", layout).combine(vectors).double()
    merged = make_merge("tsv-m", layout, precision="float32").combine(vectors).double()
    parts = [np.linalg.svd(matrix) for matrix in matrices]
    limit = single.ERROR * (3 / 1) ** 2
    for factors in ([u[:, :12] for u, _, _ in parts], [vt[:12].T for _, _, vt in parts]):
        limit += stated_errors(np.linalg.svd(np.concatenate(factors, 1), compute_uv=False)).max()
    assert float((merged - exact).norm()) <= limit * scale * 2 * np.linalg.norm(strengths[:12])


@pytest.mark.parametrize("by", BY)
def test_iso_c_in_float32_of_a_noisy_sum_leaves_out_what_is_noise(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "EIGENVECTORS", BY[by])
    layout, random = Layout(("weight",), ((40, 30),)), np.random.default_rng(0)
    matrix = spectrum((40, 30), np.r_[np.linspace(2, 1, 10), np.full(20, 1e-2)], random)
    total = torch.from_numpy(matrix.ravel()).float()
    exact, merge = make_merge("iso-c", layout), make_merge("iso-c", layout, precision="float32")
    for rounding in (0.0, 1e-2):  # all directions, or the strong ones alone
        merged = merge.from_sum(total, 3, rounding)
        assert_near(merged, exact.from_sum(total, 3, rounding).numpy(), float(merged.abs().max()), 0.1)
        rank = np.linalg.matrix_rank(merged.view(40, 30).numpy(), tol=0.1 * float(merged.norm()) / 30**0.5)
        assert rank == (10 if rounding else 30)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("name", ["tsv-m", "iso-c"])
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_float32_is_finite_and_no_stronger_than_exact(
    by: str, name: str, maker: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "EIGENVECTORS", BY[by])
    for dtype, count in [(torch.float32, 6), (torch.float64, 5), (torch.float32, 1)]:
        vectors = make(maker, count, MIXED.size, dtype)
        exact, merged = (
            make_merge(name, MIXED, precision=precision).combine(vectors) for precision in ("exact", "float32")
        )
        assert merged.dtype == dtype
        rest = 0.01 * size_of(vectors)  # of what cancels out exactly
        assert float(merged.double().norm()) <= 1.5 * float(exact.double().norm()) + rest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_goes_into_given_memory(name: str, dtype: torch.dtype) -> None:
    vectors = {
        task: vector.to(dtype).contiguous() for task, vector in make(normal, 5, MIXED.size, torch.float32).items()
    }
    out = torch.full((MIXED.size,), torch.nan, dtype=dtype)
    assert make_merge(name, MIXED, seed=1).combine(vectors, out=out) is out
    assert torch.equal(out, make_merge(name, MIXED, seed=1).combine(vectors))
    for wrong in (out[1:], out.double(), torch.empty(2 * MIXED.size, dtype=dtype)[::2]):
        with pytest.raises(ValueError, match="out is .*it must be"):
            make_merge(name, MIXED).combine(vectors, out=wrong)
    task, vector = next(iter(vectors.items()))
    with pytest.raises(ValueError, match=f"out has the memory of {task}"):
        make_merge(name, MIXED).combine(vectors, out=vector)


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "wudi"])
@pytest.mark.parametrize("rank", [1, 2])
def test_many_tasks_of_low_rank_in_large_matrices(name: str, rank: int) -> None:
    layout = Layout(("weight",), ((300, 256),))
    for seed in range(4):
        random = np.random.default_rng(seed)
        products = (random.normal(size=(300, rank)) @ random.normal(size=(rank, 256)) for _ in range(8))
        vectors = {str(task): torch.from_numpy(product.ravel()).float() for task, product in enumerate(products)}
        agree(make_merge(name, layout), name, vectors)


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts"])
def test_where_lapack_finds_no_eigenvectors_an_svd_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Tensor, UPLO: str) -> None:
        raise torch.linalg.LinAlgError("The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    agree(make_merge(name, MIXED), name, make(normal, 3, MIXED.size, torch.float32))


@pytest.mark.parametrize(
    ("name", "precision", "by"),
    [
        *((name, {}, "eigenvectors") for name in ("tsv-m", "iso-c", "iso-cts")),
        *((name, {"precision": "float32"}, by) for name in ("tsv-m", "iso-c") for by in BY),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [64, 400])
def test_what_is_not_finite_is_not_lost(
    name: str, precision: dict[str, str], by: str, value: float, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "EIGENVECTORS", BY[by])
    vectors = make(normal, 3, side * side, torch.float32)
    vectors["solar"][7] = value
    try:
        merged = make_merge(name, Layout(("weight",), ((side, side),)), **precision).combine(vectors)
    except torch.linalg.LinAlgError:
        return
    assert not merged.isfinite().all()


@pytest.mark.parametrize("name", ["iso-c", "tsv-m"])
def test_a_wide_matrix_is_merged_as_its_transpose_is(name: str) -> None:
    vectors = make(normal, 3, 6 * 11, torch.float32)
    turned = {task: vector.view(6, 11).T.reshape(-1) for task, vector in vectors.items()}
    wide = make_merge(name, Layout(("weight",), ((6, 11),))).combine(vectors)
    tall = make_merge(name, Layout(("weight",), ((11, 6),))).combine(turned)
    assert_near(tall.view(11, 6).T.reshape(-1), wide.numpy(), size_of(vectors))


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "wudi"])
@pytest.mark.parametrize("fused", ["attn.qkv.weight", "attn.in_proj_weight"])
def test_a_fused_projection_is_one_matrix_unless_it_is_split(name: str, fused: str) -> None:
    whole = Layout((fused,), ((12, 8),))
    other = Layout(("attn.proj.weight",), ((12, 8),))
    apart = Layout(("q", "k", "v"), ((4, 8),) * 3)
    vectors = make(normal, 2, whole.size, torch.float32)
    assert torch.equal(make_merge(name, whole).combine(vectors), make_merge(name, other).combine(vectors))
    split = make_merge(name, whole, split_qkv=True).combine(vectors)
    assert_near(split, make_merge(name, apart).combine(vectors).numpy(), size_of(vectors))
    assert not torch.allclose(split, make_merge(name, whole).combine(vectors))


# --- TIES: two published mistakes


def test_ties_trims_each_vector_over_itself() -> None:
    vectors = {"large": torch.tensor([100.0, 90, 80, 70]), "small": torch.tensor([1.0, 2, 3, 4])}
    # Trimmed over both at once, all of the large vector would stay and nothing of the small one: [100, 90, 80, 70].
    assert make_merge("ties", flat(4), density=0.5).combine(vectors).tolist() == [100, 90, 3, 4]


def test_ties_trims_a_vector_over_its_whole_length_and_not_each_entry() -> None:
    layout = Layout(("a", "b"), ((2,), (2,)))
    assert make_merge("ties", layout, density=0.5).combine({"x": torch.tensor([4.0, 3, 2, 1])}).tolist() == [4, 3, 0, 0]
    assert make_merge("magnitude", layout, density=0.5).combine({"x": torch.tensor([4.0, 3, 2, 1])}).tolist() == [
        4, 0, 2, 0,
    ]  # fmt: skip


def test_ties_elects_signs_over_all_tasks() -> None:
    vectors = {"a": torch.tensor([5.0, 1]), "b": torch.tensor([-3.0, -4]), "c": torch.tensor([-3.0, 1])}
    # The first task alone would elect + for both elements.
    assert make_merge("ties", flat(2), density=1.0).combine(vectors).tolist() == [-3, -4]


def test_ties_elects_plus_where_the_sum_is_zero_and_leaves_zeros_out_of_the_mean() -> None:
    vectors = {"a": torch.tensor([2.0, 0]), "b": torch.tensor([-3.0, 0]), "c": torch.tensor([1.0, 4])}
    assert make_merge("ties", flat(2), density=1.0).combine(vectors).tolist() == [1.5, 4]


# --- what all merges promise


FLAT_SHAPES = [(), (1,), (0,), (5,), (2, 1, 3)]
SHAPES = [*FLAT_SHAPES, (3, 4), (4, 3), (2, 2)]


@st.composite
def task_vectors(
    draw: st.DrawFn, name: str, shapes: list[tuple[int, ...]] = SHAPES
) -> tuple[Layout, dict[str, Tensor]]:
    """A small layout and enough vectors of few small numbers, with which float32 computes without rounding."""
    chosen = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=3).filter(lambda some: set(some) != {(0,)}))
    layout = Layout(tuple(f"{number}.weight" for number in range(len(chosen))), tuple(chosen))
    least = LEAST.get(name, 1)
    count = draw(st.integers(least, max(least + 2, 4)))
    numbers = st.integers(-16, 16).map(lambda number: number / 8)
    stack = draw(arrays(np.float32, (count, layout.size), elements=numbers))
    tasks = draw(st.permutations([f"task{number}" for number in range(count)]))
    return layout, dict(zip(tasks, torch.from_numpy(stack), strict=True))


UNROUNDED: dict[str, dict[str, Any]] = {"pcb": {"density": 1.0}, "consensus": {"threshold": 0.375}}
"""Options with which no element stands at a threshold that rounding moves."""


def same(name: str, actual: Tensor, other: Tensor, vectors: dict[str, Tensor]) -> None:
    """Assert that two results are equal; of many minimisers each is as good."""
    stack = torch.stack(list(vectors.values())).double()
    if name == "geometric-median":
        assert math.isclose(
            distances(actual.numpy(), stack.numpy()),
            distances(other.numpy(), stack.numpy()),
            rel_tol=1e-3,
            abs_tol=1e-6,
        )
    else:
        assert_near(actual, other.numpy(), size_of(vectors), ITERATIVE.get(name, 1e-5))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cagrad"])  # it may stand at 0/0; tested below
@few
@given(data=st.data())
def test_the_order_of_tasks_does_not_matter(name: str, data: st.DataObject) -> None:
    layout, vectors = data.draw(task_vectors(name))
    order = data.draw(st.permutations(list(vectors)))
    merge = make_merge(name, layout, seed=1, **UNROUNDED.get(name, {}))
    same(name, merge.combine(vectors), merge.combine({task: vectors[task] for task in order}), vectors)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_arrival_does_not_matter(name: str) -> None:
    vectors = make(normal, 6, MIXED.size, torch.float32)
    results = []
    for order in (list(vectors), sorted(vectors), sorted(vectors, reverse=True)):
        merge = make_merge(name, MIXED, seed=3)
        for task in order:
            merge.add(task, vectors[task])
        results.append(merge.result())
    same(name, results[0], results[1], vectors)
    same(name, results[0], results[2], vectors)


@pytest.mark.parametrize("name", RANDOM)
def test_another_seed_gives_another_result(name: str) -> None:
    vectors = make(normal, 6, MIXED.size, torch.float32)
    first, again, other = (make_merge(name, MIXED, seed=seed).combine(vectors) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM])
def test_a_merge_without_chance_has_no_use_for_a_seed(name: str) -> None:
    vectors = make(normal, 6, MIXED.size, torch.float32)
    first, other = (make_merge(name, MIXED, seed=seed).combine(vectors) for seed in (1, 2))
    assert torch.equal(first, other)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "clipped-mean"])  # its max-norm must scale too
@few
@given(data=st.data())
def test_merges_scale_with_their_vectors(name: str, data: st.DataObject) -> None:
    layout, vectors = data.draw(task_vectors(name))
    factor = 2.0 ** data.draw(st.integers(-20, 20))
    merge = make_merge(name, layout)
    scaled = {task: factor * vector for task, vector in vectors.items()}
    same(name, merge.combine(scaled) / factor, merge.combine(vectors), vectors)


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_says_that_it_is_of_the_sum_exactly_if_it_is(name: str) -> None:
    """Vectors of one sum: the merged vector is the same exactly for those that declare it, and comes from the sum."""
    layout = Layout(("matrix.weight", "bias"), ((40, 30), (7,)))
    random = torch.Generator().manual_seed(0)
    vectors = {task: torch.randn(layout.size, generator=random, dtype=torch.float64) for task in "abcde"}
    moved = 0.5 * torch.randn(layout.size, generator=random, dtype=torch.float64)
    others = vectors | {"a": vectors["a"] + moved, "b": vectors["b"] - moved}
    one, other = (make_merge(name, layout, scaling=0.7).combine(each) for each in (vectors, others))
    merge = make_merge(name, layout, scaling=0.7)
    assert torch.allclose(one, other, atol=1e-9) == merge.of_sum
    total = sum(vectors.values(), torch.zeros(layout.size, dtype=torch.float64))
    if merge.of_sum:
        torch.testing.assert_close(merge.from_sum(total * merge.sum_factor(5), 5), one)


@few
@given(data=st.data())
def test_the_clipped_mean_scales_with_its_vectors_and_bound(data: st.DataObject) -> None:
    layout, vectors = data.draw(task_vectors("clipped-mean"))
    scaled = make_merge("clipped-mean", layout, max_norm=4.0).combine({task: 4 * vectors[task] for task in vectors})
    assert torch.equal(scaled, 4 * make_merge("clipped-mean", layout, max_norm=1.0).combine(vectors))


@pytest.mark.parametrize("name", NAMES)
@few
@given(data=st.data())
def test_vectors_of_zero_merge_to_zero(name: str, data: st.DataObject) -> None:
    layout, vectors = data.draw(task_vectors(name))
    actual = make_merge(name, layout).combine({task: torch.zeros_like(vector) for task, vector in vectors.items()})
    assert torch.equal(actual, torch.zeros(layout.size))


EQUAL: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "mean": ({}, lambda count: 1),
    "task-arithmetic": ({}, lambda count: 0.3 * count),
    "clipped-mean": ({"max_norm": 1e6}, lambda count: 1),
    "magnitude": ({"density": 1.0}, lambda count: 1),
    "breadcrumbs": ({"beta": 0.0, "gamma": 1.0}, lambda count: 0.3 * count),
    "dare": ({"density": 1.0}, lambda count: 1),
    "dare-ties": ({"density": 1.0}, lambda count: 1),
    "ties": ({"density": 1.0}, lambda count: 1),
    "consensus": ({"threshold": 0.25}, lambda count: 0.3 * count),  # |τ| ≥ 0.25 · (T − 1) · |τ| up to T = 5
    "median": ({}, lambda count: 1),
    "trimmed-mean": ({}, lambda count: 1),
    "geometric-median": ({}, lambda count: 1),
    "multi-krum": ({}, lambda count: 1),
    "pcgrad": ({}, lambda count: 1),
    "cagrad": ({"c": 0.5}, lambda count: 1.5 / 1.25),  # (1 + c) / (1 + c²)
    "model-stock": ({}, lambda count: 1),
    "pcb": ({"density": 1.0}, lambda count: 1),
    "tsv-m": ({}, lambda count: 1),  # of entries that are no matrices
    "iso-c": ({}, lambda count: 1),
    "iso-cts": ({}, lambda count: 1),
    "wudi": ({}, lambda count: 1),
}
"""Options, and what factor on a vector τ comes of several τ."""


@pytest.mark.parametrize("name", NAMES)
@few
@given(data=st.data())
def test_equal_vectors_merge_to_what_their_definition_says(name: str, data: st.DataObject) -> None:
    chosen, factor = EQUAL[name]
    layout, vectors = data.draw(task_vectors(name, FLAT_SHAPES))
    vector = next(iter(vectors.values()))
    actual = make_merge(name, layout, **chosen).combine(dict.fromkeys(vectors, vector))
    assert_near(actual, factor(len(vectors)) * vector.double().numpy(), size_of(vectors))


@pytest.mark.parametrize("name", NAMES)
@few
@given(data=st.data())
def test_one_by_one_is_as_at_once_and_leaves_vectors_alone(name: str, data: st.DataObject) -> None:
    layout, vectors = data.draw(task_vectors(name))
    chosen = UNROUNDED.get(name, {})
    weights = {task: data.draw(st.sampled_from([1.0, 0.5, 3.0])) if name in STREAMING else 1.0 for task in vectors}
    merge = make_merge(name, layout, **chosen)
    for task, vector in vectors.items():
        passing = vector.clone()
        merge.add(task, passing, weights[task])
        assert torch.equal(passing, vector)
        passing.fill_(torch.nan)  # the tensor is used again
    same(name, merge.result(), make_merge(name, layout, **chosen).combine(vectors, weights), vectors)


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_serves_many_rounds(name: str) -> None:
    merge = make_merge(name, MIXED)
    results = []
    for seed in (0, 1, 0):
        for task, vector in make(normal, 6, MIXED.size, torch.float32, seed).items():
            merge.add(task, vector)
        results.append(merge.result())
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_a_tensor_of_its_own(name: str) -> None:
    vectors = dict(zip("abcdef", torch.ones(6, MIXED.size), strict=True))
    make_merge(name, MIXED).combine(vectors).fill_(torch.nan)
    assert all(bool((vector == 1).all()) for vector in vectors.values())


def small_blocks(patch: pytest.MonkeyPatch, size: int) -> None:
    """Blocks of `size` elements, wherever a module has taken the number over."""
    merges()
    for name, module in list(sys.modules.items()):
        if name.startswith("atm_fl.") and hasattr(module, "BLOCK"):
            patch.setattr(module, "BLOCK", size)


@pytest.mark.parametrize("block", [5, 64])
@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_is_as_at_once(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = make(normal, 6, MIXED.size, torch.float32)
    whole = make_merge(name, MIXED).combine(vectors)
    small_blocks(monkeypatch, block)
    same(name, make_merge(name, MIXED).combine(vectors), whole, vectors)
    merge = make_merge(name, MIXED)
    for task, vector in vectors.items():
        merge.add(task, vector)
    same(name, merge.result(), whole, vectors)


# --- masks


@pytest.mark.parametrize("density", [1e-4, 0.1, 0.5, 0.9, 1.0])
def test_masks_keep_their_share_of_elements(density: float) -> None:
    size = 1_000_000
    mask = Mask(density, 0, "dare", "task")
    assert mask.density == pytest.approx(density, abs=1 / 131072)
    kept = mask.draw(slice(0, size), torch.empty(size))
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert abs(float(kept.mean()) - mask.density) <= 5 * math.sqrt(mask.density * (1 - mask.density) / size)


def test_masks_of_neighbours_tasks_and_seeds_are_independent() -> None:
    size, density = 400_000, 0.25
    keys = [(0, "dare", "a"), (0, "dare", "b"), (1, "dare", "a")]
    masks = [Mask(density, *key).draw(slice(0, size), torch.empty(size)) - density for key in keys]
    bound = 5 * density * (1 - density) / math.sqrt(size)
    for mask, other in itertools.combinations(masks, 2):
        assert abs(float((mask * other).mean())) <= bound
    for lag in (1, 2, 3, 4, 8, 64):
        assert abs(float((masks[0][lag:] * masks[0][:-lag]).mean())) <= bound


@few
@given(st.lists(st.integers(0, 40), max_size=8), st.booleans())
def test_a_mask_is_the_same_however_it_is_cut(sizes: list[int], forwards: bool) -> None:
    mask = Mask(0.3, 7)
    ends = list(itertools.accumulate(sizes, initial=0))
    parts = [slice(start, end) for start, end in itertools.pairwise(ends)]
    order = range(len(parts)) if forwards else reversed(range(len(parts)))
    actual = {number: mask.draw(parts[number], torch.empty(sizes[number])) for number in order}
    pieces = [actual[number] for number in range(len(parts))]
    whole = Mask(0.3, 7).draw(slice(0, sum(sizes)), torch.empty(sum(sizes)))
    assert torch.equal(torch.cat([*pieces, torch.empty(0)]), whole)


def test_dare_and_dare_ties_drop_the_same_elements_and_keep_the_expectation() -> None:
    layout = flat(200_000)
    ones = {"task": torch.ones(layout.size)}
    dare = make_merge("dare", layout, seed=5).combine(ones)
    assert torch.equal(dare, make_merge("dare-ties", layout, seed=5).combine(ones))
    assert np.array_equal(dare.numpy() > 0, dare_mask(layout, 5, "task", 0.1))
    assert float(dare.mean()) == pytest.approx(1, abs=5 * math.sqrt(9 / layout.size))


# --- passes over blocks


@pytest.mark.parametrize("name", sorted(merges()))
def test_threads_do_not_change_a_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64)
    vectors = make(normal, 6, flat(5000).size, torch.float32)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(make_merge(name, flat(5000), seed=3).combine(vectors))
        assert torch.get_num_threads() == threads
    assert torch.equal(*results)


def sizes_of_blocks(patch: pytest.MonkeyPatch, sample: int, block: int) -> None:
    patch.setattr(blocks, "SHORT", sample)
    patch.setattr(blocks, "BLOCK", block)


@few
@given(
    vector=arrays(
        np.float32,
        st.integers(1, 400),
        elements=st.one_of(st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 2.0])),
    ),
    data=st.data(),
)
def test_ranked_magnitudes_are_exact(vector: np.ndarray, data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(0, len(vector) - 1), min_size=1, max_size=4))
    ordered = np.sort(np.abs(vector))
    with pytest.MonkeyPatch.context() as patch:
        sizes_of_blocks(patch, 8, 7)
        assert ranked_magnitudes(torch.from_numpy(vector), ranks) == [float(ordered[rank]) for rank in ranks]


PERIODS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "normal": lambda size, random: random.normal(size=size),
    "sample sees zeros only": lambda size, random: np.where(np.arange(size) % 16 == 0, 0, random.normal(size=size)),
    "sample sees the largest only": lambda size, random: np.where(np.arange(size) % 16 == 0, 100, random.random(size)),
    "constant": lambda size, random: np.full(size, -3.0),
    "two values": lambda size, random: random.choice([-1.0, 2.0], size),
    "ordered": lambda size, random: np.arange(size) - size / 2.0,
    "zeros and one": lambda size, random: np.eye(1, size, size // 2)[0],
    "wide": lambda size, random: random.normal(size=size) * 10.0 ** random.integers(-30, 30, size),
}


@pytest.mark.parametrize("kind", PERIODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranked_magnitudes_of_long_vectors_are_exact(
    kind: str, dtype: type[np.floating], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 16 * 250  # a sample of 250 takes every 16th element
    sizes_of_blocks(monkeypatch, 250, 333)
    columns = np.zeros((size, 3), dtype)
    columns[:, 1] = PERIODS[kind](size, np.random.default_rng(0))
    ranks = [0, 1, 17, size // 5, size // 2, size - size // 5, size - 2, size - 1, size // 2]
    ordered = np.sort(np.abs(columns[:, 1]))
    assert ranked_magnitudes(torch.from_numpy(columns)[:, 1], ranks) == [float(ordered[rank]) for rank in ranks]


@pytest.mark.parametrize("count", range(1, 22))
def test_rows_are_sorted(count: int) -> None:
    # A network that sorts all columns of zeros and ones sorts everything (the 0-1 principle).
    if count <= 12:
        columns = np.array(list(itertools.product([0, 1], repeat=count)), np.float32).T
    else:
        columns = np.random.default_rng(count).integers(0, 2, (count, 20_000)).astype(np.float32)
    columns = np.concatenate([columns, np.random.default_rng(0).normal(size=(count, 500))], 1).astype(np.float32)
    ordered = sort_rows(torch.from_numpy(columns.copy()), torch.empty(columns.shape[1]))
    assert np.array_equal(torch.stack(ordered).numpy(), np.sort(columns, axis=0))


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner_products_are_exact_to_rounding(block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    vectors = list(make(normal, 5, 1000, dtype).values())
    stack = np.stack([vector.numpy().astype(np.float64) for vector in vectors])
    actual = inner_products(vectors)
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(
        actual.numpy(), stack @ stack.T, rtol=1e-5, atol=1e-3 if dtype == torch.float32 else 1e-10
    )


# --- errors: one message that names what is wrong


def test_names_of_merges_and_options_are_checked() -> None:
    with pytest.raises(SettingError, match="merge='tise' is unknown; did you mean 'ties'"):
        find_merge("tise")
    with pytest.raises(SettingError, match="merge='zzz' is unknown; known: breadcrumbs, .*, tsv-m"):
        make_merge("zzz", ONE)
    with pytest.raises(SettingError, match="'ties' has no option 'densty'; did you mean 'density'"):
        make_merge("ties", ONE, densty=0.3)
    with pytest.raises(SettingError, match="'clipped-mean' has no option 'max-nrm'; did you mean 'max-norm'"):
        make_merge("clipped-mean", ONE, max_nrm=0.3)


@pytest.mark.parametrize(
    ("name", "chosen", "words"),
    [
        ("ties", {"density": 0}, "density=0: it must be above 0 and at most 1"),
        ("ties", {"density": 1.5}, "density=1.5: it must be above 0 and at most 1"),
        ("ties", {"density": math.nan}, "density=nan: it must be a finite number"),
        ("ties", {"density": "0.2"}, "density='0.2': it must be a finite number"),
        ("ties", {"density": True}, "density=True: it must be a finite number"),
        ("mean", {"scaling": math.inf}, "scaling=inf: it must be a finite number"),
        ("mean", {"scaling": None}, "scaling=None: it must be a finite number"),
        ("dare", {"density": 0.0}, "density=0.0: it must be at least 0.0001 and at most 1"),
        ("clipped-mean", {"max_norm": 0.0}, "max-norm=0.0: it must be above 0"),
        ("trimmed-mean", {"trim": 0.5}, "trim=0.5: it must be at least 0 and below 0.5"),
        ("multi-krum", {"f": -1}, "f=-1: it must be at least 0"),
        ("multi-krum", {"f": 1.0}, "f=1.0: it must be a whole number"),
        ("consensus", {"agreement": 0}, "agreement=0: it must be at least 1"),
        ("cagrad", {"c": 1}, "c=1: it must be at least 0 and below 1"),
        ("tsv-m", {"split_qkv": 1}, "split-qkv=1: it must be true or false"),
    ],
)
def test_values_of_options_are_checked(name: str, chosen: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError) as caught:
        make_merge(name, ONE, **chosen)
    assert str(caught.value) == words


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_meaning_and_its_default_is_allowed(name: str) -> None:
    merge = make_merge(name, ONE)
    actual = options(type(merge))
    assert "scaling" in [item.name for item in actual]
    assert all(item.metadata["meaning"] for item in actual)
    # An option of a class that is no dataclass stays a Field object, which counts as true and cannot be set.
    assert not [key for key in dir(merge) if isinstance(getattr(merge, key), dataclasses.Field)]


@pytest.mark.parametrize("name", NAMES)
def test_vectors_must_fit_the_layout(name: str) -> None:
    layout = flat(4)
    for wrong in (torch.zeros(3), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int64)):
        vectors = {task: torch.zeros(4) for task in "abcde"} | {"solar": wrong}
        with pytest.raises(ValueError, match="solar: .* does not fit a layout of 4 elements"):
            make_merge(name, layout).combine(vectors)
        with pytest.raises(ValueError, match="solar: .* does not fit a layout of 4 elements"):
            make_merge(name, layout).add("solar", wrong)


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_of_nothing_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="at least one task vector"):
        make_merge(name, ONE).combine({})
    with pytest.raises(ValueError, match="at least one task vector"):
        make_merge(name, ONE).result()


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_too_few_tasks_are_an_error(name: str, least: int) -> None:
    vectors = {str(number): torch.ones(1) for number in range(least - 1)}
    with pytest.raises(SettingError, match=f"{name}.*needs at least {least} tasks.* {least - 1}"):
        make_merge(name, ONE).combine(vectors)
    merge = make_merge(name, ONE)
    for task, vector in vectors.items():
        merge.add(task, vector)
    with pytest.raises(SettingError, match=f"{name}.*needs at least {least} tasks"):
        merge.result()


@settings(deadline=None)
@given(trim=st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.45, 0.49]), count=st.integers(1, 40))
def test_a_trimmed_mean_leaves_something_out_or_says_that_it_cannot(trim: float, count: int) -> None:
    merge = make_merge("trimmed-mean", ONE, trim=trim)
    vectors = {str(number): torch.tensor([float(number == 0)]) for number in range(count)}
    if trim > 0 and trim * count < 1 - 1e-9:
        with pytest.raises(SettingError, match=r"trimmed-mean.*trim=.*needs at least \d+ tasks"):
            merge.combine(vectors)
    elif trim:
        assert merge.combine(vectors) == 0  # the largest is out
    else:
        assert merge.combine(vectors) == pytest.approx(1 / count)


def test_the_message_about_too_few_tasks_names_the_option() -> None:
    vectors = {str(number): torch.ones(1) for number in range(6)}
    with pytest.raises(SettingError, match="f=2.* 7 tasks"):
        make_merge("multi-krum", ONE, f=2).combine(vectors)
    with pytest.raises(SettingError, match="agreement=7.* 7 tasks"):
        make_merge("consensus", ONE, agreement=7).combine(vectors)


@pytest.mark.parametrize("name", JOINT)
def test_weights_of_a_joint_merge_are_an_error(name: str) -> None:
    vectors = {task: torch.ones(1) for task in "abcde"}
    with pytest.raises(ValueError, match="b: weight=2.0: .*not defined for weights"):
        make_merge(name, ONE).combine(vectors, {**dict.fromkeys(vectors, 1.0), "b": 2.0})
    with pytest.raises(ValueError, match="b: weight=2.0: .*not defined for weights"):
        make_merge(name, ONE).add("b", torch.ones(1), 2.0)


def test_a_task_cannot_be_added_twice_to_a_joint_merge() -> None:
    merge = make_merge("median", ONE)
    merge.add("solar", torch.ones(1))
    with pytest.raises(ValueError, match="'solar' was added twice"):
        merge.add("solar", torch.ones(1))


# --- a user's own merge


@pytest.fixture
def _registry() -> Iterator[None]:
    """What a test registers is gone afterwards."""
    before = set(merges())
    yield
    for name in set(merging.MERGES) - before:
        del merging.MERGES[name]


IMPORTS = """
import torch
from atm_fl.merging import merge, option
from atm_fl.merging.kinds import Elementwise
"""


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("first", ["from __future__ import annotations", ""], ids=["with-future", "without-future"])
def test_the_merge_of_the_documentation_works_from_one_small_file(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert merging.__doc__ is not None
    example = textwrap.dedent(merging.__doc__.split("::\n", 1)[1].split("\n\nIts options")[0])
    (tmp_path / "own_merge.py").write_text(first + IMPORTS + example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_merge", raising=False)
    __import__("own_merge")
    monkeypatch.delitem(sys.modules, "own_merge")

    assert "sign-mean" in merges()
    vectors = {"a": torch.tensor([2.0, -3, 0]), "b": torch.tensor([5.0, 1, -1])}
    assert_near(make_merge("sign-mean", flat(3)).combine(vectors), np.array([0.01, 0, -0.005]), 0.01)
    assert_near(make_merge("sign-mean", flat(3), size=0.1, scaling=2.0).combine(vectors), np.array([0.2, 0, -0.1]), 0.1)
    with pytest.raises(SettingError, match="size=-1: it must be above 0"):
        make_merge("sign-mean", flat(3), size=-1)
    with pytest.raises(SettingError, match="did you mean 'size'"):
        make_merge("sign-mean", flat(3), sice=1)
    with pytest.raises(SettingError, match="did you mean 'sign-mean'"):
        find_merge("sign-meen")
