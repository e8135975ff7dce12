"""What a model holds beside its parameters: the running statistics of BatchNorm above all.

A process has one model for all parties, so that whatever a forward pass leaves in a buffer would be the next party's.
`Buffers` puts each of them back when a base is loaded. What becomes of those that are measurements (floating-point, in
the state dict) is the setting `buffers`:

    mean      they are a part of the base: each party sends its own, and the next base has their mean
    private   each party keeps its own, from round to round (FedBN, Li et al. 2021, arXiv:2102.07623)
    frozen    nobody's change: BatchNorm tunes with the pretrained statistics, as in evaluation

All others (counters of batches, masks, tables) stay as the model was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from atm_fl.vectors import Layout, float_buffers
from atm_fl.vectors.finite import check_finite

BUFFERS = "buffers"
"""What the array of shared buffers is called beside a codec's arrays, either way."""
RULES = ("mean", "private", "frozen")


def measured(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are measurements, by name. One that is not finite is none, but a mask of −∞."""
    return {name: buffer for name, buffer in float_buffers(module).items() if bool(buffer.isfinite().all())}


def shared_buffers(module: nn.Module, rule: str) -> Layout:
    """The layout of the buffers that are a part of the base, behind the entries that are tuned; empty if none are."""
    shared = measured(module) if rule == "mean" else {}
    return Layout(tuple(shared), tuple(tuple(buffer.shape) for buffer in shared.values()))


class Buffers:
    """The buffers of a module as they are now, and how to come back to it.

    names: of those that are measurements, in the module's order.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.names = tuple(measured(module))
        self._made = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def reset(self) -> None:
        """Put every buffer back to what it was when this object was made."""
        for name, value in self._made.items():
            owner, _, attribute = name.rpartition(".")
            holder = self._module.get_submodule(owner)
            now = holder._buffers.get(attribute)
            if now is not None and now.shape == value.shape:
                now.copy_(value)
            else:  # a table that grew with the longest text
                holder._buffers[attribute] = value.clone()

    def state(self) -> dict[str, Tensor]:
        """The measurements by name: copies, float32, on the CPU."""
        return {name: self._module.get_buffer(name).detach().cpu().float().clone() for name in self.names}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set measurements by name."""
        for name, value in state.items():
            self._module.get_buffer(name).copy_(value)


def train_mode(module: nn.Module, frozen: bool) -> None:
    """Training mode; where the buffers are frozen, the layers that have them go on as in evaluation."""
    module.train()
    for name in float_buffers(module) if frozen else ():
        module.get_submodule(name.rpartition(".")[0]).training = False


def mixing(module: nn.Module, frozen: bool) -> Iterator[str]:
    """The names of the layers whose output for a record depends on the others of its batch while it is tuned."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and not (frozen and layer.track_running_stats):
            yield name


def take_buffers(arrays: dict[str, np.ndarray], layout: Layout) -> Tensor:
    """Take shared buffers out of the arrays that arrived: float32 [b] of `layout`, empty if it is.

    ValueError if they are none: of another size, not finite, or with a variance below 0.
    """
    if not layout.size:
        return torch.empty(0)
    array = arrays.pop(BUFFERS, np.empty(0, np.float32))
    if array.dtype != np.float32 or array.shape != (layout.size,):
        raise ValueError(f"{array.dtype}{list(array.shape)} where float32[{layout.size}] was expected: {BUFFERS!r}")
    values = torch.from_numpy(array if array.flags.writeable else array.copy())
    check_buffers(values, layout)
    return values


def check_buffers(values: Tensor, layout: Layout) -> None:
    """ValueError if buffers, float32 [b] of `layout`, are not finite or a variance is below 0."""
    check_finite(values)
    for name, entry in layout.views(values).items():
        if name.endswith("running_var") and bool((entry < 0).any()):
            raise ValueError(f"a variance below 0: {name}")
