"""FedAvg by pfl-research on the work of benchmarks/clients.py: its simulation, model, training and mean.

pfl tunes by its own loop: AdamW on each parameter, batches in the same order in every round.
"""

from __future__ import annotations

import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from clients_apps.party import party
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from atm_fl.models import TaskHead, load_backbone
from atm_fl.settings import Settings
from atm_fl.tasks import Split


class Module(nn.Module):
    """The backbone, of which a party's head makes its classes."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def loss(self, images: Tensor, labels: Tensor, head: TaskHead) -> Tensor:
        """The mean of a batch."""
        return head.loss(self.backbone.train(), images, labels)

    @torch.inference_mode()
    def metrics(self, images: Tensor, labels: Tensor, head: TaskHead) -> dict[str, Weighted]:
        """The accuracy."""
        rightly = head.logits(self.backbone.eval(), images).argmax(-1) == labels
        return {"accuracy": Weighted(int(rightly.sum()), len(labels))}


class Validated(FederatedAveraging):
    """FedAvg whose clients evaluate the base on validation before they tune it, in every round, as ours do."""

    def train_one_user(self, state: Any, model: Any, data: Dataset, context: Any) -> tuple[Any, Metrics]:
        metrics = model.evaluate(data.metadata["validation"], eval_params=context.model_eval_params)
        statistics, tuned = super().train_one_user(state, model, data, context)
        return statistics, metrics | tuned


class Marks(TrainingProcessCallback):
    """A line with the time whenever a round is merged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_central_iteration(self, *args: Any, **kwargs: Any) -> tuple[bool, Metrics]:
        with self.path.open("a") as file:
            file.write(f"{time.time()}\n")
        return False, Metrics()


def run(folders: list[str], settings: Settings, marks: Path) -> None:
    """`rounds` of all parties; `marks`: where the times go."""

    @cache
    def user(folder: str) -> Dataset:
        made = party(folder, settings)

        def of_split(split: Split, **more: Any) -> Dataset:
            images, labels = next(iter(split.batches(batch_size=len(split))))
            with_head = {"head": made.head}
            return Dataset((images, labels), user_id=folder, train_kwargs=with_head, eval_kwargs=with_head, **more)

        return of_split(made.data.train, metadata={"validation": of_split(made.data.validation)})

    module = Module(load_backbone(settings.model))
    adamw = partial(torch.optim.AdamW, weight_decay=settings.weight_decay, fused=True)
    model = PyTorchModel(module, adamw, torch.optim.SGD(module.parameters(), lr=1.0))
    users = FederatedDataset(user, get_user_sampler("minimize_reuse", folders))
    tuning = NNTrainHyperParams(
        local_num_epochs=1,
        local_learning_rate=settings.learning_rate,
        local_batch_size=settings.batch_size,
        local_max_grad_norm=settings.clip_norm,
    )
    # It evaluates on what is tuned on, before and after, in the first round only.
    rounds = NNAlgorithmParams(settings.rounds, settings.rounds + 1, len(folders), val_cohort_size=None)
    Validated().run(
        algorithm_params=rounds,
        backend=SimulatedBackend(users, users, [WeightByDatapoints()]),
        model=model,
        model_train_params=tuning,
        model_eval_params=NNEvalHyperParams(local_batch_size=256),
        callbacks=[Marks(marks)],
    )
