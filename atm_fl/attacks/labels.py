"""Classes out of a task vector, for an attacker that has the head.

A head is private and frozen, so its gradient, from which labels are usually read (iDLG), is never sent. But the last
entries of the backbone feel it through the head's own weights: their gradient is a mean of what each image's features
and label make of it.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional

from atm_fl.attacks.scenario import Observation
from atm_fl.models.trainable import AFTER, BLOCK

NORMS = ("vit.norm", "vit.fc_norm", "vit.ln_post")
"""The last layer norm in timm's and open_clip's ViTs; an open_clip ViT's `proj` comes after it."""
IMAGES = 64
"""Images of uniform noise that stand in for the party's."""
LEAST = 0.01
"""Weight of the sum of h in its equation, against the columns' norm."""


def class_histogram(seen: Observation) -> Tensor:
    """The share of each class among the images behind a vector, float32 [classes], which sum to one.

    gradient ≈ Σ_c h_c A_c with h ≥ 0, where A_c is the gradient of features that are all labelled c. Its scale is free,
    as clip and optimizer change it; of the solutions (softmax probabilities p themselves have Σ_c p_c A_c = 0) the one
    of the smallest sum is taken. Of one image and one step of SGD the features are read off the vector, and the answer
    is exact; otherwise those of noise images stand in.
    """
    read = _read_features(seen) if seen.scenario.images == 1 == seen.scenario.steps else None
    logits, entries, wanted = read or _noise_features(seen)
    columns = []
    for label in range(logits.shape[1]):
        loss = functional.cross_entropy(logits, torch.full((len(logits),), label))
        gradients = torch.autograd.grad(loss, entries, retain_graph=True)
        columns.append(torch.cat([gradient.flatten() for gradient in gradients]))
    matrix = torch.stack(columns, 1).double()
    least = matrix.new_full((1, matrix.shape[1]), LEAST * float(matrix.norm()))
    solution, _ = nnls(torch.cat([matrix, least]).numpy(), np.append(wanted.double().numpy(), 0.0))
    total = solution.sum()
    shares = solution / total if total > 0 else np.full(len(solution), 1 / len(solution))
    return torch.from_numpy(shares).float()


def _read_features(seen: Observation) -> tuple[Tensor, list[Tensor], Tensor] | None:
    """(logits, what they are differentiated by, its gradient in the vector) of one image, or None if that is not sent.

    The last norm makes y = γ z + b of a normalised z, so ∂L/∂b = ∂L/∂y and ∂L/∂γ = z ∂L/∂y: their ratio is z.
    """
    gradients, base = seen.layout.views(seen.gradient), seen.layout.views(seen.base)
    name = next((name for name in NORMS if f"{name}.bias" in gradients), None)
    if name is None or seen.scenario.settings.optimizer != "sgd":
        return None
    slope = gradients[f"{name}.bias"]
    ratio = torch.nan_to_num(gradients[f"{name}.weight"] / slope, 0.0, 0.0, 0.0)
    output = (base[f"{name}.weight"] * ratio + base[f"{name}.bias"])[None].requires_grad_()
    features = output @ base["vit.proj"] if "vit.proj" in base else output
    return seen.head(features), [output], slope


def _noise_features(seen: Observation) -> tuple[Tensor, list[Tensor], Tensor]:
    """As `_read_features`, of noise images and the entries behind the last block, or else of the last that is tuned."""
    names = [name for name in seen.layout.names if AFTER.match(name)] or _last_block(seen.layout.names)
    views = seen.layout.views(seen.base)
    entries = {name: views[name].clone().requires_grad_() for name in names}
    random = torch.Generator().manual_seed(0)
    size = seen.model.image_size
    noise = torch.rand(IMAGES, 3, size, size, generator=random) * 255
    logits = seen.head(torch.func.functional_call(seen.model, views | entries, (noise,)))
    gradients = seen.layout.views(seen.gradient)
    return logits, list(entries.values()), torch.cat([gradients[name].flatten() for name in names])


def recovered_labels(seen: Observation) -> Tensor:
    """A label for each of the party's images, int64 [images], ascending: the histogram by largest remainders."""
    count = seen.scenario.images
    shares = class_histogram(seen) * count
    counts = shares.floor()
    rest = (shares - counts).argsort(descending=True)[: count - int(counts.sum())]
    counts[rest] += 1
    return torch.arange(len(shares)).repeat_interleave(counts.long())


def histogram_error(guessed: Tensor, true: Tensor) -> float:
    """Total variation distance of two histograms [classes]: the share of images that are counted to a wrong class."""
    return float((guessed - true).abs().sum() / 2)


def _last_block(names: tuple[str, ...]) -> list[str]:
    last = max(int(match[1]) for name in names if (match := BLOCK.search(name)))
    return [name for name in names if (match := BLOCK.search(name)) and int(match[1]) == last]
