"""Task vectors and bases ↔ the arrays that travel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FP32 = "fp32"


def encode(vector: Tensor) -> dict[str, np.ndarray]:
    """A float32 vector [n] as named arrays; with the codec fp32 the one array "values", which shares its memory."""
    return {"values": vector.detach().cpu().numpy()}


def decode(arrays: dict[str, np.ndarray], codec: str, size: int) -> Tensor:
    """The float32 vector [size] that `encode` was given.

    ValueError, saying what is wrong, for another codec, another size or dtype, or a value that is not finite.
    """
    if codec != FP32:
        raise ValueError(f"codec {codec!r} is unknown; this side speaks {FP32}")
    if set(arrays) != {"values"}:
        raise ValueError(f"arrays {sorted(arrays)} where codec {FP32} has ['values']")
    values = arrays["values"]
    if values.dtype != np.float32 or values.shape != (size,):
        raise ValueError(f"{values.dtype}{list(values.shape)} where a vector float32[{size}] was expected")
    vector = torch.from_numpy(values if values.flags.writeable else values.copy())
    if not bool(torch.isfinite(vector).all()):
        raise ValueError("a value that is not finite (NaN or infinity)")
    return vector
