"""What is attacked: parties of a few images each, the vectors that they send, and what the attacker knows.

The vectors come out of the code that a party runs: `SharedModel.tune`, then the codec's arrays, decoded as the server
does. The attacker is the server: it knows the base, every setting (the run's seed too, and with it the order of the
images), and how many images there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from atm_fl import models
from atm_fl.errors import SettingError, did_you_mean
from atm_fl.federation.client import Party
from atm_fl.models.trainable import set_trainable
from atm_fl.optimizers import OPTIMIZERS
from atm_fl.privacy.accounting import Spent, epsilon
from atm_fl.privacy.dp_sgd import sampling_rate, steps_per_round
from atm_fl.privacy.noise import Noise, derive_key
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings, kebab
from atm_fl.vectors import Layout

ATTACKS = ("closed-form", "dlg", "inverting", "simulation")


@dataclass(frozen=True)
class Scenario:
    """A run's settings, of which the first task is attacked, and the attack. Make one with `Scenario.parse`."""

    settings: Settings = field(default_factory=Settings)
    attack: str = "closed-form"
    """One of ATTACKS; see reconstruction.py."""
    images: int = 1
    """Images that a party tunes on: what a batch is follows from batch-size, how many steps from local-epochs too."""
    victims: int = 20
    """Parties, each with images of its own, whose vectors are attacked one after the other."""
    labels_known: bool = True
    """Whether the attacker knows each image's class; else it takes what labels.py finds in the vector."""
    head_known: bool = True
    """Whether it has the party's head (public class names, say); else it searches for one along with the images."""
    iterations: int = 400
    step_size: float = 0.1
    """Of the attacks with signed gradients: pixels, of values in 0..1, move by so much an iteration at first."""
    smoothness: float = 1.0
    """Weight of the images' total variation in their objective."""
    restarts: int = 1
    """Starts from other noise; the one whose vector comes nearest to the one received is taken."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Scenario:
        """A scenario from kebab-case keys: an attack's own, and any of a run's. SettingError if a value cannot work."""
        declared = {kebab(item.name): item for item in fields(cls) if item.name != "settings"}
        run = {kebab(item.name) for item in fields(Settings)}
        for key, value in values.items():
            if key not in declared and key not in run:
                raise SettingError(
                    f"{key!r} is neither of a run nor of an attack{did_you_mean(key, run | set(declared))}"
                )
            if key in declared and declared[key].type == "float" and type(value) is int:
                continue
            if key in declared and type(value).__name__ != declared[key].type:
                raise SettingError(f"{key}={value!r}: it must be of type {declared[key].type}")
        settings = Settings.parse({key: value for key, value in values.items() if key in run})
        chosen = {declared[key].name: value for key, value in values.items() if key in declared}
        scenario = cls(settings=settings, **chosen)
        scenario._check()
        return scenario

    def _check(self) -> None:
        if self.attack not in ATTACKS:
            raise SettingError(f"attack={self.attack!r}: it takes one of {', '.join(ATTACKS)}")
        for name in ("images", "victims", "iterations", "restarts"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.step_size <= 0 or self.smoothness < 0:
            raise SettingError("step-size must be positive and smoothness 0 or more")
        settings = self.settings
        if settings.secure_aggregation:
            raise SettingError("secure-aggregation=true: the server sees no single vector that could be attacked")
        if settings.task_epochs:
            raise SettingError(f"task-epochs={settings.task_epochs!r}: attacks are on one task; set local-epochs")
        for name in ("client_momentum", "gradient_surgery", "ewc", "final_learning_rate"):
            if value := getattr(settings, name):
                raise SettingError(f"{kebab(name)}={value}: the attacks know one round; leave it out")
        if settings.private:
            raise SettingError(f"private={settings.private!r}: the attacks know whole models alone; leave it out")
        if settings.head in ("answers", "sentences"):
            raise SettingError(f"head={settings.head!r}: the attacks know classifiers of features; choose prototypes")
        if settings.transforms:
            raise SettingError(f"transforms={settings.transforms!r}: the attacks know none; leave them out")
        if settings.dp_epsilon:
            raise SettingError("dp-epsilon is of a whole run; an attack on one vector wants dp-noise")
        if OPTIMIZERS.plugin(self.settings.optimizer):
            raise SettingError(f"optimizer={self.settings.optimizer!r}: the attacks know adamw and sgd alone")
        if self.attack == "dlg" and settings.optimizer != "sgd":
            raise SettingError("attack='dlg' reads a gradient off the vector: optimizer='sgd', or another attack")
        if self.attack == "simulation" and (settings.dp_sgd or settings.trainable == "lora"):
            raise SettingError("attack='simulation' knows neither dp-sgd nor lora; choose 'inverting'")

    @property
    def steps(self) -> int:
        """Optimizer steps behind a vector."""
        settings = self.settings
        if settings.dp_sgd:
            return steps_per_round(self.images, settings)
        return max(1, round(settings.local_epochs)) * math.ceil(self.images / settings.batch_size)

    @property
    def epsilon(self) -> float | None:
        """ε of the one vector for each of its images at `dp-delta`; None without DP-SGD, infinite without its noise."""
        if not self.settings.dp_sgd:
            return None
        spent = Spent(sampling_rate(self.images, self.settings), self.settings.dp_noise, self.steps)
        return epsilon([spent], self.settings.dp_delta)


@dataclass(frozen=True)
class Observation:
    """What the attacker has: everything but the party's images, and perhaps their labels.

    vector, base: float32 [n] of `layout`. head: the party's, or a random one. seed: of the order of the images.
    """

    scenario: Scenario
    model: models.Backbone
    layout: Layout
    base: Tensor
    vector: Tensor
    head: models.Head
    seed: int
    labels: Tensor | None

    @property
    def gradient(self) -> Tensor:
        """The mean gradient of the steps as the vector tells it, float32 [n]; exact for one step of SGD.

        What weight decay alone would do to the base, known to all, is taken off.
        """
        settings, steps = self.scenario.settings, self.scenario.steps
        momentum = settings.momentum if settings.optimizer == "sgd" else 0.0
        kept, speed = 1.0, 0.0
        for _ in range(steps):
            speed = momentum * speed + settings.weight_decay * kept
            kept -= settings.learning_rate * speed
        return ((kept - 1) * self.base - self.vector) / (settings.learning_rate * steps)

    def features(self, flat: Tensor, pixels: Tensor) -> Tensor:
        """Features [k, d] of pixels [k, 3, s, s] in 0..1 by the model whose entries are `flat`; differentiable."""
        return torch.func.functional_call(self.model, self.layout.views(flat), (pixels * 255,))


@dataclass(frozen=True)
class Victim:
    """A party's images as the ViT takes them, float32 [k, 3, s, s] in 0..1, their labels, and what was observed."""

    images: Tensor
    labels: Tensor
    observed: Observation


def victims(scenario: Scenario, base: Tensor | None = None) -> Iterator[Victim]:
    """The scenario's parties, one by one; `base` [n] is what they tune, by default the pretrained weights.

    SettingError if the task has fewer images.
    """
    settings = scenario.settings
    party = Party(settings, settings.task_names[0])
    if party.tuned_on.of_texts:
        raise SettingError(f"task {party.task!r} is of texts; the attacks look for images alone")
    needed = scenario.images * scenario.victims
    if needed > len(party.tuned_on):
        raise SettingError(f"{party.task} has {len(party.tuned_on)} images to tune on, not images * victims = {needed}")
    shared = party.model
    base = shared.pretrained if base is None else base
    # The attacker's own copy; the party's is one flat tensor that tuning changes.
    model = models.load_image_backbone(settings.model, settings.weights)
    set_trainable(model, settings.trainable)
    assert isinstance(party.head, models.Head)  # of every image model
    head = party.head if scenario.head_known else random_head(party.head, settings.seed)
    random = torch.Generator().manual_seed(derive_seed(settings.seed, "victims", party.task))
    order = torch.randperm(len(party.tuned_on), generator=random)
    for number, chosen in enumerate(order[:needed].split(scenario.images)):
        data = party.tuned_on.take(chosen)
        seed = derive_seed(settings.seed, "tune", party.task, 1)  # as Party.train in round 1; the server can derive it
        # Of this measurement alone, so that it can be repeated: a real party's key is nobody's to derive.
        key = derive_key("not the attacker's", settings.seed, number)
        noise = Noise(settings.dp_noise, key) if settings.dp_sgd else None
        shared.load(base)
        vector, _ = shared.tune(base, party.head, data, settings, seed, noise=noise)
        codec = settings.uplink
        sent = codec.encode(vector, shared.layout, derive_seed(settings.seed, "codec", party.task, 1))
        received = codec.decode(sent, shared.layout)
        images, labels = next(data.batches(batch_size=scenario.images))
        pixels = model.denormalise(model.normalise(images)).clamp(0, 1)
        known = labels if scenario.labels_known else None
        yield Victim(pixels, labels, Observation(scenario, model, shared.layout, base, received, head, seed, known))


def random_head(like: models.Head, seed: int) -> models.Head:
    """A head of the same size whose directions are drawn at random: where an attacker without the party's begins."""
    random = torch.Generator().manual_seed(derive_seed("random head", seed))
    weight = torch.randn(like.weight.shape, generator=random)
    return models.Head(functional.normalize(weight, dim=-1), torch.zeros_like(like.bias))
