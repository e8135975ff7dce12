"""Fewer directions for DP-SGD's noise: those that gradients of made-up images have.

Noise grows with the root of the number of elements it is added to, while the gradients of a matrix lie in a few
directions of its two sides: those of what comes in, and those that change what goes out. DP-SGD in a subspace that was
found without the records (Zhou, Wu and Banerjee 2021, "Bypassing the ambient dimension", arXiv:2007.03813; Yu et al.
2021, arXiv:2102.12677) keeps its promise to the letter: a record's gradient is projected, then clipped, and the noise
is of the subspace alone. They take public records; here images are made up, with the spectrum of natural ones, and get
labels by chance. So nobody's records are in it, but what the party's head holds of the images that made it, which every
vector that is tuned under that head holds as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from atm_fl.errors import RunError
from atm_fl.vectors import Layout

PROBES = 128
"""Made-up images."""
PART = 32
"""Probes whose gradients are held at once."""


@dataclass(frozen=True)
class Subspace:
    """For each matrix [m, n] of a layout orthonormal directions of its sides, U [m, a] and V [n, b]. A point of the
    subspace, [d], has the coordinates S [a, b] of one U S Vᵀ after another; all other entries are zero there."""

    layout: Layout
    sides: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, layout: Layout, gradients: Iterable[Tensor], rank: int) -> Self:
        """The `rank` directions of each side, all of a shorter one, that hold most of `gradients`, each [k, n].

        RunError if there is no matrix.
        """
        names = [
            name for name, size in zip(layout.names, layout.shapes, strict=True) if len(size) == 2 and min(size) > 1
        ]
        if not names:
            raise RunError(f"dp-rank={rank}: none of what is tuned is a matrix; leave dp-rank out")
        left: dict[str, Tensor] = {}
        right: dict[str, Tensor] = {}
        for part in gradients:
            of_part = torch.where(part.isfinite(), part, 0.0)
            for name, entry in _matrices(layout, names, of_part).items():
                left[name] = torch.einsum("bmn,bkn->mk", entry, entry) + left.get(name, 0.0)
                right[name] = torch.einsum("bmn,bmk->nk", entry, entry) + right.get(name, 0.0)
        return cls(layout, {name: (_leading(left[name], rank), _leading(right[name], rank)) for name in names})

    @property
    def size(self) -> int:
        """d."""
        return sum(left.shape[1] * right.shape[1] for left, right in self.sides.values())

    def project(self, vectors: Tensor) -> Tensor:
        """The coordinates [k, d] of vectors [k, n]."""
        entries = _matrices(self.layout, list(self.sides), vectors)
        return torch.cat(
            [(left.T @ entries[name] @ right).flatten(1) for name, (left, right) in self.sides.items()], dim=1
        )

    def expand(self, point: Tensor) -> Tensor:
        """The vector [n] of a point [d]."""
        vector = point.new_zeros(self.layout.size)
        views = self.layout.views(vector)
        parts = point.split([left.shape[1] * right.shape[1] for left, right in self.sides.values()])
        for (name, (left, right)), part in zip(self.sides.items(), parts, strict=True):
            views[name].copy_(left @ part.view(left.shape[1], right.shape[1]) @ right.T)
        return vector


def probes(count: int, shape: torch.Size, seed: int) -> tuple[Tensor, torch.Generator]:
    """Images uint8 [count, 3, h, w] of random phases, whose amplitudes fall with the frequency f as those of natural
    images, as 1 / f (Field 1987); and the generator that they were drawn from."""
    random = torch.Generator().manual_seed(seed)
    height, width = shape[-2:]
    vertical, horizontal = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    frequency = (vertical[:, None].square() + horizontal.square()).sqrt().clamp_min(1 / max(height, width))
    waves = torch.fft.rfft2(torch.randn(count, *shape, generator=random)) / frequency
    images = torch.fft.irfft2(waves, s=(height, width))
    images = images / images.flatten(1).std(1).clamp_min(1e-12)[:, None, None, None]
    return (128 + 64 * images).clamp(0, 255).to(torch.uint8), random


def _matrices(layout: Layout, names: list[str], vectors: Tensor) -> dict[str, Tensor]:
    """Those entries of vectors [k, n], each [k, rows, columns]."""
    parts = dict(zip(layout.names, vectors.split([_elements(size) for size in layout.shapes], dim=1), strict=True))
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    return {name: parts[name].unflatten(1, shapes[name]) for name in names}


def _elements(size: tuple[int, ...]) -> int:
    return int(torch.Size(size).numel())


def _leading(moment: Tensor, rank: int) -> Tensor:
    """The eigenvectors [m, rank] of the largest eigenvalues."""
    return torch.linalg.eigh(moment.double())[1][:, -rank:].float().contiguous()
