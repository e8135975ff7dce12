"""A party's local steps done again on other images, so that the vector can be differentiated by the images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from atm_fl.attacks.scenario import Observation


def simulated_vector(
    seen: Observation, head: nn.Module, pixels: Tensor, labels: Tensor, softness: float = 0.0
) -> Tensor:
    """The task vector float32 [n] that `training.local.tune` would make of these images [k, 3, s, s] in 0..1 and labels
    [k].

    The same steps in the same order of images: SGD (with momentum) or AdamW, gradient clip, weight decay, proximal
    term. softness: AdamW's first step is all but the gradient's sign, which has no slope; its ε grows by so many times
    the mean magnitude of the gradient, for attacks. With 0 the vector is the party's own up to rounding.
    """
    settings = seen.scenario.settings
    differentiable = pixels.requires_grad
    start = seen.base.clone().requires_grad_()
    flat, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
    random = torch.Generator().manual_seed(seen.seed)
    step, rate, decay = 0, settings.learning_rate, settings.weight_decay
    for _ in range(max(1, round(settings.local_epochs))):
        order = torch.randperm(len(labels), generator=random).tensor_split(settings.chunks_per_epoch)[0]
        for batch in order.split(settings.batch_size):
            step += 1
            loss = functional.cross_entropy(head(seen.features(flat, pixels[batch])), labels[batch])
            (gradient,) = torch.autograd.grad(loss, flat, create_graph=differentiable)
            gradient = gradient + settings.proximal * (flat - start)
            if settings.clip_norm:
                gradient = gradient * (settings.clip_norm / (gradient.norm() + 1e-6)).clamp_max(1.0)
            if settings.optimizer == "sgd":
                first = settings.momentum * first + gradient + decay * flat
                flat = flat - rate * first
                continue
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient.square()
            # The root of zero has no finite slope; 1e-30 is far below what ε hides.
            root = (second / (1 - 0.999**step) + 1e-30).sqrt()
            epsilon = 1e-8 + softness * float(gradient.detach().abs().mean())
            flat = (1 - rate * decay) * flat - rate * first / (1 - 0.9**step) / (root + epsilon)
    return flat - start
