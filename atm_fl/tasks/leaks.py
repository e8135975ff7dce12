"""Whether images that a model is tested on are among those it is trained on.

A published set of fine-tuned DTD models was trained on test images; and data sets repeat images on their own. Nothing
is removed here: what is found is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional

from atm_fl.tasks import SPLITS, Dataset, Split

SIZE = 224
"""The size at which files are compared, that of CLIP's models."""


NEAR = 4
"""Bits in which two difference hashes may differ for the images to look alike."""


@dataclass(frozen=True)
class Leaks:
    """Items of one split that are also in train: pairs (index in the split, index in train).

    exact: all pixels are equal; alike: only the difference hashes nearly are, which may be chance where images are
    simple, as digits are.
    """

    split: str
    images: int
    exact: list[tuple[int, int]]
    alike: list[tuple[int, int]]


def find_leaks(data: Dataset, workers: int = 0) -> list[Leaks]:
    """The validation and test images of `data` that are also in train. Every image is decoded once."""
    hashes = {name: _hashes(data.split(name), workers) for name in SPLITS}
    return [compare(name, *hashes[name], *hashes["train"]) for name in SPLITS[1:]]


def compare(
    split: str, exact: list[bytes], bits: np.ndarray, train_exact: list[bytes], train_bits: np.ndarray
) -> Leaks:
    """The leaks of a split by its images' hashes and train's: of all pixels, and by `difference_hash`, uint64 [n]."""
    first = {key: index for index, key in reversed(list(enumerate(train_exact)))}
    same = {index: first[key] for index, key in enumerate(exact) if key in first}
    alike = [pair for pair in _near(bits, train_bits) if pair[0] not in same]
    return Leaks(split, len(exact), list(same.items()), alike)


def exact_hash(image: Tensor) -> bytes:
    """16 bytes that tell an image, uint8 [3, h, w], from any other."""
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()


def difference_hash(images: Tensor) -> np.ndarray:
    """64 bits, as uint64 [n], of images uint8 [n, 3, h, w]: which of 8 x 9 grey patches outshine their left one.

    Other sizes, compression or brightness change few of the bits; flips and crops change many.
    """
    grey = functional.adaptive_avg_pool2d(images.float().mean(1), (8, 9))
    brighter = (grey[:, :, 1:] > grey[:, :, :-1]).flatten(1).numpy()
    return np.packbits(brighter, axis=1).view(np.uint64)[:, 0]


def _near(bits: np.ndarray, train: np.ndarray) -> list[tuple[int, int]]:
    """Each of `bits` that is within `NEAR` of one of `train`, with the nearest: every pair is compared, in blocks."""
    pairs: list[tuple[int, int]] = []
    if not len(train):
        return pairs
    rows = max(1, 2**22 // len(train))
    for start in range(0, len(bits), rows):
        distance = np.bitwise_count(bits[start : start + rows, None] ^ train)
        nearest = distance.argmin(1)
        close = distance[np.arange(len(nearest)), nearest] <= NEAR
        pairs += [(start + row, int(nearest[row])) for row in close.nonzero()[0].tolist()]
    return pairs


def describe(data: Dataset, leaks: Leaks, examples: int = 3) -> str:
    """One line: numbers, and the first few pairs by file name or number."""

    def pairs(matched: list[tuple[int, int]]) -> str:
        here, train = _namer(data.split(leaks.split)), _namer(data.train)
        shown = ", ".join(f"{here(i)} = {train(j)}" for i, j in matched[:examples])
        return f" ({shown}{', …' if len(matched) > examples else ''})" if matched else ""

    return (
        f"{data.name}: of {leaks.images} {leaks.split} images {len(leaks.exact)} are in train"
        f"{pairs(leaks.exact)}, {len(leaks.alike)} more look like one there{pairs(leaks.alike)}"
    )


def _hashes(split: Split, workers: int) -> tuple[list[bytes], np.ndarray]:
    exact: list[bytes] = []
    bits = []
    for images, _ in split.batches(workers=workers):
        exact += map(exact_hash, images)
        bits.append(difference_hash(images))
    return exact, np.concatenate(bits)


def _namer(split: Split) -> Callable[[int], str]:
    if isinstance(split.images, Tensor):
        return str
    files = split.images.files
    return lambda index: f"{files[index].parent.name}/{files[index].name}"
