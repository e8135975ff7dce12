"""Gaussian noise that nobody can draw again without its key.

Random numbers are ChaCha20's (randomgen), keyed with 32 bytes of the operating system's. Each element of noise is a
float64 out of NumPy's ziggurat, and the noised sum is rounded to a grid of 2⁻²⁰ of the noise's deviation (to a power of
two): a float's last bits, from which Mironov 2012 ("On significance of the least significant bits for differential
privacy") reads the sum before noise, are not in what is released. Between two points of the grid lie 2³² floats or
more out to seven deviations, so that each point's probability is the Gaussian's to about one part in 2³².
What remains: gradients are clipped and summed in float32, so that a record's share can pass the clip by some 1e-6 of
it. This is an argument, not a proof, and no discrete Gaussian (Canonne et al. 2020), which is too slow for this many.
"""

from __future__ import annotations

import hmac
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from randomgen import ChaCha
from torch import Tensor

from atm_fl.errors import RunError
from atm_fl.files import write_once
from atm_fl.vectors.blocks import parts

GRID = 2.0**-20
"""The grid's step in deviations of the noise, before it is rounded to a power of two."""


@dataclass(frozen=True)
class Noise:
    """What DP-SGD draws: a noise multiplier σ, and the secret key (32 bytes) of its random numbers."""

    multiplier: float
    key: bytes

    @classmethod
    def fresh(cls, multiplier: float) -> Noise:
        """With a key of the operating system's."""
        return cls(multiplier, os.urandom(32))

    def generator(self) -> np.random.Generator:
        """The random numbers, from their start."""
        return keyed_generator(self.key)


def keyed_generator(key: bytes) -> np.random.Generator:
    """NumPy's generator on ChaCha20 with a key of 32 bytes."""
    return np.random.Generator(ChaCha(key=int.from_bytes(key, "big"), rounds=20))


def derive_key(secret: str, *inputs: object) -> bytes:
    """A key of 32 bytes from a secret and all that the noise must not be repeated for."""
    return hmac.digest(secret.encode(), json.dumps(inputs, sort_keys=True).encode(), "sha256")


def add_noise(vector: Tensor, deviation: float, random: np.random.Generator) -> None:
    """Add Gaussian noise to `vector`, float32 [n], in place, and round the sum to the grid."""
    step = 2.0 ** math.floor(math.log2(deviation * GRID))
    for chunk in parts(len(vector)):
        drawn = torch.from_numpy(random.standard_normal(chunk.stop - chunk.start)).to(vector.device)
        vector[chunk] = ((vector[chunk].double() + deviation * drawn) / step).round_().mul_(step)


def party_secret(folder: Path) -> str:
    """32 random bytes of this machine, hexadecimal, made once and kept in `folder` for its owner's eyes only."""
    path = folder / "secret"
    write_once(path, os.urandom(32).hex().encode())
    secret = path.read_text()
    if len(secret) != 64:
        raise RunError(f"{path} holds no secret of 32 bytes; delete it, and a new one is made")
    return secret
