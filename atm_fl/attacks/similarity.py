"""How like two sets of images are: PSNR and SSIM (torchmetrics) of the pairs that fit best.

No LPIPS: torchmetrics has it, but the weights of its AlexNet or VGG are a download, and no package brings them.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

MOST = 100.0
"""dB that equal images get, instead of infinitely many."""


def paired(found: Tensor, truth: Tensor) -> Tensor:
    """The images `found` [k, 3, h, w] in the order of `truth` that makes the sum of the pairs' PSNR largest."""
    count = len(truth)
    every = psnr(found.repeat(count, 1, 1, 1), truth.repeat_interleave(count, 0)).view(count, count)
    _, order = linear_sum_assignment(every.numpy(), maximize=True)
    return found[torch.from_numpy(order)]


def psnr(found: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images [k, 3, h, w] in 0..1, in dB, at most MOST."""
    each = peak_signal_noise_ratio(found, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return each.reshape(-1).clamp_max(MOST)


def ssim(found: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each pair of images [k, 3, h, w] in 0..1: 1 for equal ones."""
    each = structural_similarity_index_measure(found, truth, data_range=1.0, reduction="none")
    assert isinstance(each, Tensor)
    return each.reshape(-1)
