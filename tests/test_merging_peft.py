"""Merges against PEFT's, an implementation by others.

Known differences, which the cases here avoid: PEFT keeps ⌊density · n⌋ elements, none of one element at density 0.2,
where we keep at least one (below); of equal magnitudes it keeps some, we all; it trims each tensor by itself, our TIES
the whole vector, so there is one tensor; its DARE has any density, ours multiples of 1/65536.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from atm_fl.merging import make_merge
from atm_fl.merging.sparse import Mask
from atm_fl.vectors import Layout


def load_peft() -> ModuleType:
    """`peft.utils.merge_utils` by itself, which needs torch only; as a part of peft it brings in transformers (8 s)."""
    actual = importlib.util.find_spec("peft")
    assert actual is not None, "pip install --no-deps peft"
    assert actual.origin is not None
    file = Path(actual.origin).parent / "utils" / "merge_utils.py"
    spec = importlib.util.spec_from_file_location("peft_merge_utils", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peft = load_peft()

SIZES = [5, 40, 333, 1000]
COUNTS = [1, 2, 5, 8]
WEIGHTS = [0.5, 2.0, 1.0, 0.25, 3.0, 1.5, 1.0, 0.75]


def make(count: int, size: int, seed: int = 0) -> tuple[Layout, dict[str, Tensor]]:
    """Vectors whose magnitudes all differ."""
    generator = torch.Generator().manual_seed(seed)
    stack = torch.stack([torch.randperm(size, generator=generator) + 1.0 for _ in range(count)])
    stack *= torch.randint(0, 2, stack.shape, generator=generator) * 2 - 1
    return Layout(("weight",), ((size,),)), {f"task{number}": row / 64 for number, row in enumerate(stack)}


@pytest.mark.parametrize("count", COUNTS)
def test_task_arithmetic_is_that_of_peft(count: int) -> None:
    layout, vectors = make(count, 100)
    weights = dict(zip(vectors, WEIGHTS, strict=False))
    actual = make_merge("task-arithmetic", layout, scaling=0.3).combine(vectors, weights)
    wanted = peft.task_arithmetic(list(vectors.values()), 0.3 * torch.tensor(list(weights.values())))
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.2, 0.4, 0.75, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_magnitude_pruning_is_that_of_peft(count: int, size: int, density: float) -> None:
    layout, vectors = make(count, size)
    weights = dict(zip(vectors, WEIGHTS, strict=False))
    actual = make_merge("magnitude", layout, density=density).combine(vectors, weights)
    shares = torch.tensor(list(weights.values())) / sum(weights.values())
    torch.testing.assert_close(actual, peft.magnitude_prune(list(vectors.values()), shares, density))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.2, 0.4, 0.75, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_is_that_of_peft(count: int, size: int, density: float) -> None:
    layout, vectors = make(count, size)
    actual = make_merge("ties", layout, density=density).combine(vectors)
    torch.testing.assert_close(actual, peft.ties(list(vectors.values()), torch.ones(count), density))


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], None]:
    """PEFT draws the masks that we draw for task0, task1, …"""

    def use(density: float, seed: int) -> None:
        tasks = iter(range(100))
        monkeypatch.setattr(
            torch,
            "bernoulli",
            lambda like: Mask(density, seed, "dare", f"task{next(tasks)}").draw(
                slice(0, like.numel()), torch.empty_like(like)
            ),
        )

    return use


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("density", [0.125, 0.5, 0.75])
def test_dare_is_that_of_peft(count: int, density: float, same_masks: Callable[[float, int], None]) -> None:
    layout, vectors = make(count, 333)
    weights = dict(zip(vectors, WEIGHTS, strict=False))
    actual = make_merge("dare", layout, seed=4, density=density).combine(vectors, weights)
    same_masks(density, 4)
    shares = torch.tensor(list(weights.values())) / sum(weights.values())
    torch.testing.assert_close(actual, peft.dare_linear(list(vectors.values()), shares, density))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("density", [0.125, 0.5, 0.75])
def test_dare_ties_is_that_of_peft(count: int, density: float, same_masks: Callable[[float, int], None]) -> None:
    layout, vectors = make(count, 333)
    actual = make_merge("dare-ties", layout, seed=4, density=density).combine(vectors)
    same_masks(density, 4)
    torch.testing.assert_close(actual, peft.dare_ties(list(vectors.values()), torch.ones(count), density))


@pytest.mark.parametrize("name", ["ties", "magnitude"])
def test_of_one_element_peft_keeps_none_and_we_one(name: str) -> None:
    layout, vectors = make(1, 1)
    (vector,) = vectors.values()
    assert torch.equal(make_merge(name, layout, density=0.2).combine(vectors), vector)
    assert not bool(peft.ties([vector], torch.ones(1), 0.2).any())
    assert not bool(peft.magnitude_prune([vector], torch.ones(1), 0.2).any())


def test_of_equal_magnitudes_peft_keeps_some_and_we_all() -> None:
    vector = torch.tensor([1.0, -1, 1, -1])
    layout = Layout(("weight",), ((4,),))
    assert torch.equal(make_merge("ties", layout, density=0.5).combine({"a": vector}), vector)
    assert int(peft.ties([vector], torch.ones(1), 0.5).count_nonzero()) == 2
