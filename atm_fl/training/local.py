"""Fine-tuning a base model on one task: where a task vector comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atm_fl.models import EVALUATION_BATCH, TaskHead
from atm_fl.models.buffers import train_mode
from atm_fl.optimizers import OPTIMIZERS
from atm_fl.settings import Settings
from atm_fl.tasks import Split
from atm_fl.training.ewc import Memory


@dataclass(frozen=True)
class Tuned:
    """What tuning did: optimizer steps, images seen (with repetition), and mean training loss of the last epoch."""

    steps: int
    images: int
    loss: float


State = dict[str, Tensor]
"""An optimizer's tensors by their names in torch (AdamW: exp_avg and exp_avg_sq [n], step []); empty at its start."""


def make_optimizer(parameter: nn.Parameter, settings: Settings, state: State | None = None) -> torch.optim.Optimizer:
    """The optimizer that the settings name, on one flat parameter, going on from `state`."""
    optimizer = OPTIMIZERS[settings.optimizer](parameter, settings)
    if state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: state}})
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, settings: Settings, done: float) -> None:
    """Give an optimizer the learning rate after this part, in 0..1, of a round; settings: `Settings.of_round`'s."""
    if settings.final_learning_rate:
        rate = settings.learning_rate + (settings.final_learning_rate - settings.learning_rate) * done
        for group in optimizer.param_groups:
            group["lr"] = rate


def keep_state(optimizer: torch.optim.Optimizer, state: State | None) -> None:
    """Leave the tensors of an optimizer on one parameter, on the CPU, in `state`."""
    if state is not None:
        for moments in optimizer.state.values():
            state |= {name: value.cpu() for name, value in moments.items() if isinstance(value, Tensor)}


def tune(
    model: nn.Module,
    head: TaskHead,
    flat: nn.Parameter,
    data: Split,
    settings: Settings,
    seed: int,
    epoch_chunk: int = 0,
    state: State | None = None,
    last_step: Tensor | None = None,
    memory: Memory | None = None,
) -> Tuned:
    """Tune `model`, whose entries and gradients are bound to `flat`, in place for `local-epochs` over `data`.

    The head stays frozen. The optimizer goes on from `state` and leaves its own there; a new one starts without. The
    order of the images derives from `seed` alone; of an epoch spread over several rounds `epoch_chunk` says which part
    this one is. The last batch of an epoch, or of its part, may be smaller. last_step: as `along` and `move` take it.
    memory: of past rounds, for `ewc`. settings: those of the round (`Settings.of_round`).
    """
    optimizer = make_optimizer(flat, settings, state)
    # Gradients of half precision would vanish; with another precision this changes nothing.
    scaler = torch.amp.GradScaler(flat.device.type, enabled=settings.precision == "fp16")
    random = torch.Generator().manual_seed(seed)
    assert flat.grad is not None
    start = flat.detach().clone() if settings.proximal else None
    epochs = max(1, round(settings.local_epochs))
    steps, seen, order, total = 0, 0, torch.empty(0), 0.0
    train_mode(model, frozen=settings.buffers == "frozen")
    for _ in range(epochs):
        order = (
            torch.randperm(len(data), generator=random)
            .tensor_split(settings.chunks_per_epoch)[epoch_chunk]
            .to(data.labels.device)
        )
        seen, total = seen + len(order), 0.0
        all_steps = epochs * math.ceil(len(order) / settings.batch_size)
        for images, labels in data.batches(order, settings.batch_size, settings.workers):
            flat.grad.zero_()
            size = settings.batch_size // settings.accumulate
            for batch, wanted in zip(images.split(size), labels.split(size), strict=True):
                loss = head.loss(model, batch, wanted)
                scaler.scale(loss * (len(wanted) / len(labels))).backward()
                total += loss.item() * len(wanted)
            scaler.unscale_(optimizer)
            set_rate(optimizer, settings, steps / all_steps)
            if start is not None:
                flat.grad.add_(flat.detach() - start, alpha=settings.proximal)
            if memory is not None:
                flat.grad.add_(memory.pull(flat.detach()), alpha=settings.ewc)
            along(flat.grad, last_step, settings)
            if settings.clip_norm:
                nn.utils.clip_grad_norm_(flat, settings.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            move(flat, last_step, settings, all_steps)
            steps += 1
    model.eval()
    keep_state(optimizer, state)
    return Tuned(steps, seen, total / len(order))


def along(gradient: Tensor, last_step: Tensor | None, settings: Settings) -> None:
    """`gradient-surgery`: free a gradient of its part against the federation's last step, float32 [k], in place.

    A step down a gradient whose product with the last step is positive takes some of that back. The projection is
    PCGrad's (Yu et al. 2020, arXiv:2001.06782), of a party's own gradient and of what all parties have agreed on, on
    the first k entries.
    """
    if settings.gradient_surgery and last_step is not None:
        shared = gradient[: len(last_step)]
        against, square = torch.dot(shared, last_step), torch.dot(last_step, last_step)
        if against > 0:  # then neither is zero
            shared.sub_(last_step * (against / square))


def move(flat: Tensor, last_step: Tensor | None, settings: Settings, parts: int) -> None:
    """`client-momentum`: add a part, of so many, of that much of the last step, float32 [k], to the first k entries."""
    if settings.client_momentum and last_step is not None:
        flat.detach()[: len(last_step)].add_(last_step, alpha=settings.client_momentum / parts)


def full_gradient(model: nn.Module, head: TaskHead, flat: nn.Parameter, data: Split, workers: int = 0) -> Tensor:
    """∇L(θ), float32 [n]: the gradient of the mean loss over all of `data` at what `flat` holds, which stays."""
    assert flat.grad is not None
    flat.grad.zero_()
    for images, labels in data.batches(batch_size=EVALUATION_BATCH, workers=workers):
        (head.loss(model, images, labels, "sum") / len(data)).backward()
    return flat.grad.clone()


def task_vector(flat: Tensor, base: Tensor) -> Tensor:
    """τ = fine-tuned − base, float32 [n], against the base that was tuned."""
    return flat.detach() - base
