"""The flat task vector and its layout.

The shared entries of a model (its trainable floating-point parameters) live in one contiguous float32 tensor of n
elements. A `Layout` says where each named entry stands, so that a vector is one array on the wire and one operand in a
merge, and still can be seen as named tensors without a copy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Ordered names and shapes of a model's shared entries, stored one after another in a flat tensor."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """The layout of a module's trainable floating-point parameters, in the module's order."""
        shared = shared_entries(module)
        return cls(tuple(shared), tuple(tuple(parameter.shape) for parameter in shared.values()))

    def __add__(self, other: Layout) -> Layout:
        """This layout's entries with another's behind them."""
        return Layout(self.names + other.names, self.shapes + other.shapes)

    def only(self, names: Collection[str]) -> Layout:
        """Those of this layout's entries that are among `names`."""
        kept = [(name, shape) for name, shape in zip(self.names, self.shapes, strict=True) if name in names]
        return Layout(tuple(name for name, _ in kept), tuple(shape for _, shape in kept))

    def without(self, names: Collection[str]) -> Layout:
        """The others."""
        return self.only(set(self.names).difference(names))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each entry."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """Elements of the whole vector."""
        return sum(self.sizes)

    @cached_property
    def digest(self) -> str:
        """A short hash of names, shapes and order; equal digests mean that vectors can be added."""
        text = json.dumps([self.names, self.shapes, "float32"])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views of a flat tensor [n]; nothing is copied. ValueError if its size is another."""
        if flat.shape != (self.size,):
            raise ValueError(
                f"a flat tensor of shape {tuple(flat.shape)} does not fit a layout of {self.size} elements"
            )
        parts = flat.split(self.sizes)
        return {name: entry.view(shape) for name, entry, shape in zip(self.names, parts, self.shapes, strict=True)}

    def flatten(self, module: nn.Module) -> Tensor:
        """A copy of the module's entries as one flat tensor [n], in their own dtype."""
        entries = {**shared_entries(module), **dict(module.named_buffers())}
        return torch.cat([entries[name].detach().reshape(-1) for name in self.names])


def bind(module: nn.Module, layout: Layout) -> nn.Parameter:
    """Move the module's shared entries, and their gradients, into one flat parameter [n] and return it.

    The module's parameters become views: writing to the flat parameter changes the module, `backward` fills the flat
    gradient, and one optimizer step is one pass over one tensor instead of one over each of some hundred.
    """
    flat = nn.Parameter(layout.flatten(module))
    flat.grad = torch.zeros_like(flat)
    values, gradients = layout.views(flat.data), layout.views(flat.grad)
    for name, parameter in shared_entries(module).items():
        parameter.data, parameter.grad = values[name], gradients[name]
    return flat


def digest(*parts: Tensor) -> str:
    """A short hash of the exact bytes of a vector, or of its parts one after another."""
    sha = hashlib.sha256()
    for item in parts:
        sha.update(item.detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()[:16]


def shared_entries(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's trainable floating-point parameters by name, in the module's order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point()}


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point buffers of a module's state dict by name, in its order."""
    kept = {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name in owner._buffers.keys() - owner._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in module.named_buffers() if name in kept and buffer.is_floating_point()}
