"""Layouts, binding and spilling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atm_fl.models import load_backbone
from atm_fl.vectors import Layout, bind
from atm_fl.vectors.finite import is_finite
from atm_fl.vectors.mapped import MappedVectors


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


def test_a_spill_gives_back_what_was_added_and_its_file_never_changes() -> None:
    spill, vectors = MappedVectors(), {name: torch.randn(100) for name in "abc"}
    for name, vector in vectors.items():
        spill.add(name, vector)
    for mapped in spill.vectors().values():
        mapped.zero_()
    actual = spill.vectors()
    spill.close()
    assert list(actual) == ["a", "b", "c"]
    assert all(torch.equal(actual[name], vectors[name]) for name in "abc")


def test_a_spill_refuses_a_name_twice() -> None:
    spill = MappedVectors()
    spill.add("a", torch.ones(3))
    with pytest.raises(ValueError, match="'a' was added twice"):
        spill.add("a", torch.ones(3))
    spill.close()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_is_finite_if_all_its_values_are_whatever_their_sum(dtype: torch.dtype) -> None:
    largest, inf, nan = torch.finfo(dtype).max, torch.inf, torch.nan
    for values in ([], [0.0], [largest] * 9, [largest, -largest] * 9):
        assert is_finite(torch.tensor(values, dtype=dtype))
    for values in ([inf], [nan], [inf, -inf], [-inf, 1.0, largest], [0.0] * 999 + [nan]):
        assert not is_finite(torch.tensor(values, dtype=dtype))
