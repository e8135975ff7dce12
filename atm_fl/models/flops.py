"""Floating-point operations, counted and not timed: the same on every machine."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def operations(module: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """FLOPs of one record's (forward, forward and backward) through `module`; `inputs` of a pass, also on "meta"."""
    # Of attention's kernels the counter does not know the CPU's own; as products of matrices it counts them all.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            features = module(*inputs)
        with FlopCounterMode(display=False) as backward:
            features.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()
