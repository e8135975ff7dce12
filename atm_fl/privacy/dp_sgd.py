"""DP-SGD: fine-tuning of which no single training record shows (Abadi et al. 2016, arXiv:1607.00133).

Each step takes every record with probability q = batch-size / n (Poisson sampling), clips each record's gradient to the
norm `dp-clip` = C, adds Gaussian noise of deviation σ C to their sum and divides by the expected batch size:

    g = (Σ_{i in batch} gᵢ · min(1, C / ‖gᵢ‖) + σ C · N(0, I)) / batch-size

Gradients per record come from torch.func on the untouched backbone: no layer is replaced (opacus' replacement of
attention scrambles open_clip's).

What is covered: the records of the split that is tuned on, under adding or removing one. What is not: validation and
test images (accuracies on them are reported; heads made from images are made from the split that is not tuned on), the
class names, n itself. Batches and noise are drawn from a key that the operating system gives and the party keeps (see
noise.py), so that no two releases share noise, whatever the settings, the server or the data have in common.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from atm_fl.models import TaskHead
from atm_fl.models.buffers import train_mode
from atm_fl.privacy.noise import Noise, add_noise
from atm_fl.privacy.subspace import PART, PROBES, Subspace, probes
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tasks import Split
from atm_fl.training.local import State, Tuned, along, keep_state, make_optimizer, move, set_rate
from atm_fl.vectors import Layout


def steps_per_round(images: int, settings: Settings) -> int:
    """Optimizer steps of one round on so many images: as many as would see each once an epoch on average."""
    return max(1, round(settings.local_epochs * images / settings.batch_size))


def sampling_rate(images: int, settings: Settings) -> float:
    """q, the probability with which a step takes a record; 1 where a batch is as large as the data."""
    return min(1.0, settings.batch_size / images)


def record_gradients(
    model: nn.Module, head: TaskHead, layout: Layout, flat: Tensor, images: Tensor, labels: Tensor
) -> Tensor:
    """The gradient of each record's own loss at `flat`, [k, n]; images uint8 [k, 3, h, w], labels int64 [k]."""

    def loss(flat: Tensor, image: Tensor, label: Tensor) -> Tensor:
        entries = layout.views(flat)

        def passed(*inputs: Tensor) -> Tensor:
            return torch.func.functional_call(model, entries, inputs)

        return head.loss(passed, image[None], label[None])

    gradient: Callable[..., Tensor] = torch.func.grad(loss)
    each = torch.func.vmap(gradient, in_dims=(None, 0, 0), randomness="different")
    # vmap would take the fused kernels' records one by one; what is not in `layout` needs no gradient.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return each(flat.detach(), images, labels)


def _subspace(
    model: nn.Module, head: TaskHead, layout: Layout, flat: Tensor, data: Split, settings: Settings
) -> Subspace:
    """The directions that are tuned, of the base at `flat`; of `data` the size of its images is asked alone."""
    one, _ = next(data.batches(torch.zeros(1, dtype=torch.int64, device=data.labels.device)))
    images, random = probes(PROBES, one.shape[1:], derive_seed(settings.seed, "probes"))
    images = images.to(flat.device)
    with torch.no_grad():
        classes = head.logits(model, images[:1]).shape[1]
    labels = torch.randint(classes, (PROBES,), generator=random).to(flat.device)
    parts = zip(images.split(PART), labels.split(PART), strict=True)
    gradients = (record_gradients(model, head, layout, flat, *part) for part in parts)
    return Subspace.of(layout, gradients, settings.dp_rank)


def clip_factors(gradients: Tensor, norm: float) -> Tensor:
    """What scales gradients [k, n] down to at most `norm` each, [k]; 0 for one that is not finite."""
    lengths = gradients.norm(dim=1)  # of a gradient that is not finite, neither is its length
    return torch.where(lengths.isfinite(), (norm / lengths).clamp_max(1.0), 0.0)


def clipped_sum(gradients: Tensor, norm: float) -> Tensor:
    """The sum of gradients [k, n], each scaled down to at most `norm`, [n]. `gradients` may be changed.

    One that is not finite counts as zero: a base can be made that overflows on one kind of image alone, and no noise
    hides a NaN.
    """
    factors = clip_factors(gradients, norm)
    if not factors.all():
        gradients[factors == 0] = 0.0
    return factors @ gradients


def tune_privately(
    model: nn.Module,
    head: TaskHead,
    flat: nn.Parameter,
    layout: Layout,
    data: Split,
    settings: Settings,
    noise: Noise,
    state: State | None = None,
    last_step: Tensor | None = None,
) -> Tuned:
    """Tune `model`, whose entries of `layout` are bound to `flat`, in place with DP-SGD, whose random numbers are all
    `noise`'s. All other entries stay as they are.

    A batch goes through the model in parts of batch-size / accumulate records, whose gradients take that many vectors
    of memory. `images` of the result is the expected number, and its loss is NaN: the real ones would tell of records.
    With `dp-rank` the optimizer's parameters are the coordinates of subspace.py, which begin at zero.
    state and last_step: as `training.local.tune` takes and leaves them; the one is made of noised gradients, the other
    of bases, and neither costs privacy.
    """
    random = noise.generator()
    rate, steps = sampling_rate(len(data), settings), steps_per_round(len(data), settings)
    train_mode(model, frozen=settings.buffers == "frozen")
    base = flat.detach().clone() if settings.proximal or settings.dp_rank else None
    subspace = _subspace(model, head, layout, flat, data, settings) if settings.dp_rank else None
    tuned = nn.Parameter(flat.new_zeros(subspace.size)) if subspace else flat
    optimizer = make_optimizer(tuned, settings, state)
    start = tuned.detach().clone() if settings.proximal else None
    tuned.grad = torch.zeros_like(tuned) if tuned.grad is None else tuned.grad
    for step in range(steps):
        chosen = torch.from_numpy(random.random(len(data)) < rate).nonzero().flatten()
        tuned.grad.zero_()
        size = settings.batch_size // settings.accumulate
        parts = data.batches(chosen.to(data.labels.device), size, settings.workers)
        for images, labels in parts if len(chosen) else ():
            gradients = record_gradients(model, head, layout, flat, images, labels)
            gradients = subspace.project(gradients) if subspace else gradients
            tuned.grad.add_(clipped_sum(gradients, settings.dp_clip))
        if noise.multiplier:
            add_noise(tuned.grad, noise.multiplier * settings.dp_clip, random)
        tuned.grad.div_(min(settings.batch_size, len(data)))
        if start is not None:
            tuned.grad.add_(tuned.detach() - start, alpha=settings.proximal)
        along(tuned.grad, last_step, settings)
        set_rate(optimizer, settings, step / steps)
        optimizer.step()
        if subspace and base is not None:
            flat.data.copy_(base + subspace.expand(tuned.detach()))
        move(flat, last_step, settings, steps)
    model.eval()
    keep_state(optimizer, state)
    return Tuned(steps, round(steps * rate * len(data)), float("nan"))
