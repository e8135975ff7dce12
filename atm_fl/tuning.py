"""Fine-tuning a base model on one task: where a task vector comes from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from atm_fl.settings import Settings
from atm_fl.tasks import Split


@dataclass(frozen=True)
class Tuned:
    """What tuning did: optimizer steps, images seen (with repetition), and mean training loss of the last epoch."""

    steps: int
    images: int
    loss: float


def make_optimizer(parameter: nn.Parameter, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer that the settings name, on one flat parameter."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            [parameter], lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    # The fused kernel is one pass over memory; it has no float64 on some devices, where only tests go.
    fused = parameter.dtype == torch.float32
    return torch.optim.AdamW([parameter], settings.learning_rate, weight_decay=settings.weight_decay, fused=fused)


def tune(model: nn.Module, head: nn.Module, flat: nn.Parameter, data: Split, settings: Settings, seed: int) -> Tuned:
    """Tune `model`, whose entries and gradients are bound to `flat`, in place for `local-epochs` over `data`.

    The head stays frozen. A new optimizer starts each call: its state does not outlive a round. The order of the images
    derives from `seed` alone. The last batch of an epoch may be smaller.
    """
    optimizer = make_optimizer(flat, settings)
    # Gradients of half precision would vanish; with another precision this changes nothing.
    scaler = torch.amp.GradScaler(flat.device.type, enabled=settings.precision == "fp16")
    random = torch.Generator().manual_seed(seed)
    assert flat.grad is not None
    steps, total = 0, 0.0
    model.train()
    for _ in range(settings.local_epochs):
        order = torch.randperm(len(data.labels), generator=random).to(data.labels.device)
        total = 0.0
        for images, labels in data.batches(order, settings.batch_size, settings.workers):
            flat.grad.zero_()
            size = settings.batch_size // settings.accumulate
            for part, wanted in zip(images.split(size), labels.split(size), strict=True):
                loss = functional.cross_entropy(head(model(part)), wanted)
                scaler.scale(loss * (len(wanted) / len(labels))).backward()
                total += loss.item() * len(wanted)
            scaler.unscale_(optimizer)
            if settings.clip_norm:
                nn.utils.clip_grad_norm_(flat, settings.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            steps += 1
    model.eval()
    return Tuned(steps, settings.local_epochs * len(data.labels), total / len(data.labels))


def task_vector(flat: Tensor, base: Tensor) -> Tensor:
    """τ = fine-tuned − base, float32 [n], against the base that was tuned."""
    return flat.detach() - base
