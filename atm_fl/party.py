"""A party: one task's private data and frozen head, and what it does in a round."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atm_fl import models, tasks, vectors
from atm_fl.errors import SettingError
from atm_fl.evaluation import accuracy
from atm_fl.files import atomic_write
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tasks import Dataset, Split
from atm_fl.tuning import task_vector, tune


@dataclass(frozen=True)
class Update:
    """A party's answer to one round: its task vector, float32 [n] on the CPU, and numbers about the round."""

    vector: Tensor
    evaluation: dict[str, float]
    tuning: dict[str, float]


class SharedModel:
    """The one backbone of a process, reused in place by every party and round; its entries are one flat tensor."""

    def __init__(self, name: str, device: str) -> None:
        self.module = models.load_backbone(name)
        self.layout = vectors.Layout.of(self.module)
        self.pretrained = self.layout.flatten(self.module)
        self.module.to(device)
        self.flat: nn.Parameter = vectors.bind(self.module, self.layout)

    def load(self, base: Tensor) -> None:
        """Set the model's shared entries to `base`, float32 [n]."""
        self.flat.data.copy_(base)


@lru_cache(maxsize=1)
def shared_model(name: str, device: str) -> SharedModel:
    """The process's model, loaded once. SettingError if the device is not there."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device={device!r} cannot be used here: {error}") from error
    return SharedModel(name, device)


class Party:
    """One client's side of the protocol, without any transport.

    Loads the task's data and makes (or finds on this machine's disk) its head; what is wrong with them is raised here,
    before any round. `name` is the task's name in the run where it is not the data's own.
    """

    def __init__(self, settings: Settings, task: str, name: str = "") -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.model = shared_model(settings.model, settings.device)
        self.data: Dataset = tasks.load(task, self.model.module.image_size)
        self.task = name or self.data.name
        self.head = self._make_head().to(settings.device)
        self._splits = {name: self._on_device(self.data.split(name)) for name in tasks.SPLITS}

    def evaluate(self, base: Tensor, splits: tuple[str, ...]) -> dict[str, float]:
        """Accuracy of `base`, float32 [n], with this party's head on each of `splits`."""
        torch.set_num_threads(self.settings.threads)
        self.model.load(base)
        return {split: accuracy(self.model.module, self.head, self._splits[split]) for split in splits}

    def train(self, base: Tensor, round_number: int) -> Update:
        """Evaluate the received base, tune it for `local-epochs`, and return the task vector against it."""
        begin = time.perf_counter()
        evaluation = self.evaluate(base, evaluated_splits(self.settings, round_number - 1))
        evaluated = time.perf_counter()
        seed = derive_seed(self.settings.seed, "tune", self.task, round_number)
        tuned = tune(
            self.model.module, self.head, self.model.flat, self._splits[self.settings.split], self.settings, seed
        )
        vector = task_vector(self.model.flat, base.to(self.model.flat.device)).cpu()
        return Update(
            vector,
            evaluation,
            {
                "loss": tuned.loss,
                "steps": tuned.steps,
                "images": tuned.images,
                "norm": float(vector.norm()),
                "seconds_evaluate": evaluated - begin,
                "seconds_tune": time.perf_counter() - evaluated,
            },
        )

    def _on_device(self, split: Split) -> Split:
        return split.to(self.settings.device)

    def _make_head(self) -> models.Head:
        """The head, kept on disk so that it outlives rounds and restarts; it never leaves this machine."""
        kind, shots, classes = self.settings.head, self.settings.shots, len(self.data.classes)
        seed = derive_seed(self.settings.seed, "head", self.task)
        made_by = inspect.getsource(models.prototypes), inspect.getsource(models.linear_probe), torch.__version__
        machine = self.settings.device, self.settings.threads
        data = [vectors.digest(self.model.pretrained), *self.data.train.digests]
        key = derive_seed(kind, shots, seed, data, made_by, machine)
        path = tasks.cache_dir() / "heads" / f"{key:016x}.safetensors"
        if not path.exists():
            self.model.load(self.model.pretrained)
            backbone = self.model.module
            made = (
                models.prototypes(backbone, self.data.train, classes, shots, seed)
                if kind == "prototypes"
                else models.linear_probe(backbone, self.data.train, classes)
            )
            with atomic_write(path) as part:
                save_file({"weight": made.weight.contiguous(), "bias": made.bias.contiguous()}, str(part))
        stored = load_file(str(path))
        # Tensors out of a file are not aligned as torch's own are, and with that a product's last bits may differ.
        return models.Head(stored["weight"].clone(), stored["bias"].clone())


def evaluated_splits(settings: Settings, rounds_done: int) -> tuple[str, ...]:
    """The splits on which the base after `rounds_done` rounds is evaluated: validation always, test now and then."""
    due = rounds_done in (0, settings.rounds) or (settings.test_every and rounds_done % settings.test_every == 0)
    return ("validation", "test") if due else ("validation",)
