"""What a party of benchmarks/clients.py has and does, whoever's engine runs it: its data, its head, a round's steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from atm_fl import tasks
from atm_fl.federation.heads import kept_head
from atm_fl.federation.shared_model import shared_model
from atm_fl.models import TaskHead
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tasks import Dataset
from atm_fl.training.evaluation import accuracy, classified_rightly
from atm_fl.training.local import Tuned


@dataclass(frozen=True)
class Party:
    """A party that a process keeps, of however many."""

    data: Dataset
    head: TaskHead

    def tune(self, base: Tensor, settings: Settings, number: int) -> tuple[Tensor, Tuned, float]:
        """A round's work, as ours: (the task vector of `base`, float32 [n]; what was done; the base's validation)."""
        model = shared_model(settings.of_model())
        model.load(base)
        validation = accuracy(classified_rightly(model.module, self.head, self.data.validation, 0))
        seed = derive_seed(0, "tune", self.data.name, number)
        vector, tuned = model.tune(base, self.head, self.data.train, settings, seed)
        return vector, tuned, validation


@cache
def party(folder: str, settings: Settings) -> Party:
    """The party of a folder of pictures."""
    torch.set_num_threads(1)
    data = tasks.load(folder)
    return Party(data, kept_head(settings, data, shared_model(settings.of_model()), Path(folder).name))
