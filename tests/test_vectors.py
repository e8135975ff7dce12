"""Layouts, binding, spilling and merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from atm_fl import codecs
from atm_fl.merging import make_merge, merges
from atm_fl.models import load_backbone
from atm_fl.vectors import Layout, Spill, bind, digest

stacks = arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 40)),
    elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False),
)


def test_a_layout_holds_trainable_floats_only_and_views_share_memory() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    module[2].requires_grad_(False)
    layout = Layout.of(module)
    assert layout.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert layout.size == 6 + 2 + 2 + 2
    flat = layout.flatten(module)
    layout.views(flat)["0.bias"].fill_(7)
    assert flat[6:8].tolist() == [7, 7]
    with pytest.raises(ValueError, match="12 elements"):
        layout.views(torch.zeros(11))


def test_the_digest_tells_layouts_apart() -> None:
    digests = {Layout(names, shapes).digest for names, shapes in [
        (("a", "b"), ((2,), (3,))), (("b", "a"), ((2,), (3,))), (("a", "b"), ((3,), (2,))), (("a", "b"), ((2,), (3, 1)))
    ]}  # fmt: skip
    assert len(digests) == 4


def test_a_bound_module_follows_its_flat_parameter() -> None:
    model = load_backbone("tiny")
    layout = Layout.of(model)
    before = layout.flatten(model)
    images = torch.randint(0, 256, (2, 3, 32, 32)).byte()
    expected = model(images)
    flat = bind(model, layout)
    assert torch.equal(flat.detach(), before)
    assert torch.equal(model(images), expected)
    model(images).sum().backward()
    assert flat.grad is not None
    assert torch.equal(flat.grad, torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    flat.data.zero_()
    assert all(not bool(p.any()) for p in model.parameters())


@given(stacks)
def test_spilled_inner_products_are_exact_to_rounding(stack: np.ndarray) -> None:
    spill = Spill()
    for number, row in enumerate(torch.from_numpy(stack)):
        spill.add(str(number), row)
    expected = stack.astype(np.float64) @ stack.astype(np.float64).T
    np.testing.assert_allclose(spill.gram().numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(stack).max() ** 2 + 1e-30)
    spill.close()


def test_the_spill_works_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.randn(3, 100)
    monkeypatch.setattr(Spill, "BLOCK", 21)
    spill = Spill()
    for row in stack:
        spill.add("x", row)
    torch.testing.assert_close(spill.gram().float(), stack @ stack.T)


@given(stacks, st.floats(-3, 3), st.lists(st.floats(0.125, 4), min_size=6, max_size=6))
def test_the_mean_is_the_scaled_weighted_mean(stack: np.ndarray, scaling: float, weights: list[float]) -> None:
    merge = make_merge("mean", scaling=scaling)
    for row, weight in zip(stack, weights, strict=False):
        merge.add("task", torch.from_numpy(row.copy()), weight)
    expected = scaling * np.average(stack.astype(np.float64), axis=0, weights=weights[: len(stack)])
    np.testing.assert_allclose(merge.result().numpy(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", sorted(merges()))
@given(stack=stacks)
def test_every_merge_of_equal_vectors_keeps_zero_at_zero_and_its_size(name: str, stack: np.ndarray) -> None:
    merge = make_merge(name, scaling=1.0)
    for _ in range(3):
        merge.add("task", torch.zeros(stack.shape[1]))
    assert torch.equal(merge.result(), torch.zeros(stack.shape[1]))


def test_a_merge_without_vectors_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        make_merge("mean", scaling=1.0).result()


def test_vectors_travel_bit_for_bit() -> None:
    vector = torch.randn(1000)
    received = codecs.decode(codecs.encode(vector), codecs.FP32, 1000)
    assert digest(received) == digest(vector)


@pytest.mark.parametrize(
    ("arrays_", "codec", "words"),
    [
        ({"values": np.zeros(3, np.float32)}, "fp9", "codec 'fp9'"),
        ({"values": np.zeros(4, np.float32)}, "fp32", r"float32\[4\]"),
        ({"values": np.zeros(3, np.float64)}, "fp32", "float64"),
        ({"other": np.zeros(3, np.float32)}, "fp32", "other"),
        ({"values": np.array([0, np.nan, 0], np.float32)}, "fp32", "not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays_: dict[str, np.ndarray], codec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        codecs.decode(arrays_, codec, 3)
