"""How well a model does a task, and the measures that the field compares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from atm_fl.models import EVALUATION_BATCH, TaskHead
from atm_fl.tasks import Split


@torch.inference_mode()
def classified_rightly(model: nn.Module, head: TaskHead, data: Split, workers: int = 0) -> Tensor:
    """Which of `data` model and head classify rightly, bool [n] on the CPU; `workers` processes decode image files."""
    order = data.by_length
    batches = data.batches(order, EVALUATION_BATCH, workers)
    rightly = torch.cat([(head.logits(model, images).argmax(-1) == labels).cpu() for images, labels in batches])
    return rightly if order is None else torch.empty_like(rightly).scatter_(0, order.cpu(), rightly)


def accuracy(rightly: Tensor) -> float:
    """The fraction of true values of `classified_rightly`'s, bool [n], in 0..1."""
    return int(rightly.sum()) / len(rightly)


def mean_accuracy(accuracies: Mapping[str, float]) -> float:
    """The mean over tasks, each counted once whatever its size."""
    return sum(accuracies.values()) / len(accuracies)


def normalised_accuracy(accuracies: Mapping[str, float], single_task: Mapping[str, float]) -> float:
    """The mean over tasks of accuracy / single-task accuracy; 1 means nothing was lost by sharing one model."""
    return sum(accuracies[task] / single_task[task] for task in accuracies) / len(accuracies)
