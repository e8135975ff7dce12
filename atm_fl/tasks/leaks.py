"""Whether images that a model is tested on are among those it is trained on.

A published set of fine-tuned DTD models was trained on test images; and data sets repeat images on their own. Nothing
is removed here: what is found is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from atm_fl.tasks import SPLITS, Dataset, Split

SIZE = 224
"""The size at which files are compared, that of CLIP's models."""


@dataclass(frozen=True)
class Leaks:
    """Items of one split that are also in train: pairs (index in the split, index in train).

    exact: all pixels are equal; alike: only the difference hashes are, which may be chance where images are simple.
    """

    split: str
    images: int
    exact: list[tuple[int, int]]
    alike: list[tuple[int, int]]


def find_leaks(data: Dataset, workers: int = 0) -> list[Leaks]:
    """The validation and test images of `data` that are also in train. Every image is decoded once."""
    train_exact, train_alike = _hashes(data.train, workers)
    first_exact, first_alike = _first(train_exact), _first(train_alike)
    found = []
    for name in SPLITS[1:]:
        exact, alike = _hashes(data.split(name), workers)
        same = {i: first_exact[key] for i, key in enumerate(exact) if key in first_exact}
        near = {i: first_alike[key] for i, key in enumerate(alike) if key in first_alike and i not in same}
        found.append(Leaks(name, len(exact), list(same.items()), list(near.items())))
    return found


def difference_hash(images: Tensor) -> list[bytes]:
    """64 bits for each of the images uint8 [n, 3, h, w]: which of 8 x 9 patches of grey is brighter than its left one.

    It withstands other sizes, compression and brightness; flips and crops it does not.
    """
    grey = functional.adaptive_avg_pool2d(images.float().mean(1), (8, 9))
    brighter = (grey[:, :, 1:] > grey[:, :, :-1]).flatten(1)
    return [bytes(row) for row in (brighter.view(-1, 8, 8) * 2 ** torch.arange(8)).sum(-1).byte().numpy()]


def describe(data: Dataset, leaks: Leaks, examples: int = 3) -> str:
    """One line: numbers, and the first few pairs by file name or number."""

    def pairs(found: list[tuple[int, int]]) -> str:
        here, train = _namer(data.split(leaks.split)), _namer(data.train)
        shown = ", ".join(f"{here(i)} = {train(j)}" for i, j in found[:examples])
        return f" ({shown}{', …' if len(found) > examples else ''})" if found else ""

    return (
        f"{data.name}: of {leaks.images} {leaks.split} images {len(leaks.exact)} are in train"
        f"{pairs(leaks.exact)}, {len(leaks.alike)} more look like one there{pairs(leaks.alike)}"
    )


def _hashes(split: Split, workers: int) -> tuple[list[bytes], list[bytes]]:
    exact: list[bytes] = []
    alike: list[bytes] = []
    for images, _ in split.batches(workers=workers):
        exact += [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images]
        alike += difference_hash(images)
    return exact, alike


def _first(keys: list[bytes]) -> dict[bytes, int]:
    return {key: index for index, key in reversed(list(enumerate(keys)))}


def _namer(split: Split) -> Callable[[int], str]:
    if isinstance(split.images, Tensor):
        return str
    files = split.images.files
    return lambda index: f"{files[index].parent.name}/{files[index].name}"
