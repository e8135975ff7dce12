"""Heads: a task's frozen classifier, made once from pretrained features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from atm_fl.models.backbones import EVALUATION_BATCH, Encoder
from atm_fl.plugins import Registry
from atm_fl.tasks import Split, Tokenizer
from atm_fl.tasks.texts import tokenise

LOGIT_SCALE = 20.0
"""Fixed scale of the cosine logits; CLIP's learned one is 100, for features that lie closer together."""


class Head(nn.Module):
    """A frozen classifier: logits = scale · normalised features · weightᵀ + bias.

    weight [classes, d], bias [classes], scale: a number. Prototypes, linear probes and zero-shot heads have this form.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, scale: float | Tensor = LOGIT_SCALE) -> None:
        super().__init__()
        self.scale = float(scale)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def state(self) -> dict[str, Tensor]:
        """The arguments that make this head again, as tensors."""
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return {"weight": self.weight.contiguous(), "bias": self.bias.contiguous(), "scale": scale}

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * functional.linear(functional.normalize(features, dim=-1), self.weight) + self.bias


@dataclass(frozen=True)
class HeadSource:
    """All that a party makes its head of.

    backbone: the pretrained one; model, weights: the settings that name it. data: images that may be used; prompts:
    each class's sentences; shots: the setting; seed: of what is drawn at random; workers: processes that decode images.
    """

    backbone: Encoder
    data: Split
    classes: tuple[str, ...]
    prompts: Sequence[Sequence[str]]
    model: str
    weights: str
    shots: int
    seed: int
    workers: int = 0


MakeHead = Callable[[HeadSource], Head]
HEADS: Registry[MakeHead] = Registry("head")


def head(name: str) -> Callable[[MakeHead], MakeHead]:
    """Register the decorated function as the maker of the heads `name`."""
    return HEADS.register(name)


@torch.inference_mode()
def features(model: Encoder, data: Split, workers: int = 0) -> Tensor:
    """Features [n, d] of the images of `data`, in batches, on the CPU; `workers` processes decode image files."""
    return torch.cat([model(images) for images, _ in data.batches(None, EVALUATION_BATCH, workers)]).cpu()


def prototypes(model: Encoder, data: Split, classes: int, shots: int, seed: int) -> Head:
    """A head whose weights are the normalised class means of the normalised features of `shots` images a class.

    The images are drawn from `data` by `seed`; classes with fewer images give all they have.
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.labels), generator=random)
    chosen = [order[data.labels[order] == label][:shots] for label in range(classes)]
    embedded = functional.normalize(features(model, data.take(torch.cat(chosen))), dim=-1)
    means = torch.stack([of_class.mean(0) for of_class in embedded.split([len(of_class) for of_class in chosen])])
    centre = means.mean(0)
    weight = functional.normalize(means - centre, dim=-1)
    return Head(weight, -LOGIT_SCALE * (weight @ centre))


def linear_probe(model: Encoder, data: Split, classes: int, workers: int = 0) -> Head:
    """A head fitted to the normalised features of all of `data` by logistic regression (scikit-learn, C = 1)."""
    from sklearn.linear_model import LogisticRegression

    embedded = functional.normalize(features(model, data, workers), dim=-1) * LOGIT_SCALE
    fitted = LogisticRegression(max_iter=1000).fit(embedded.numpy(), data.labels.numpy())
    weight, bias = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    if classes == 2:  # scikit-learn returns one row for two classes
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return Head(weight, bias)


@torch.inference_mode()
def described(model: Encoder, tokenizer: Tokenizer, prompts: Sequence[Sequence[str]]) -> Head:
    """A head whose weights are the normalised means of the normalised features of each class's sentences."""
    weights = [functional.normalize(model(tokenise(texts, tokenizer)).cpu(), dim=-1).mean(0) for texts in prompts]
    weight = functional.normalize(torch.stack(weights), dim=-1)
    return Head(weight, torch.zeros(len(weight)))


@head("prototypes")
def prototype_head(source: HeadSource) -> Head:
    """Class means of a few images a class."""
    return prototypes(source.backbone, source.data, len(source.classes), source.shots, source.seed)


@head("linear-probe")
def linear_probe_head(source: HeadSource) -> Head:
    """Logistic regression on all images."""
    return linear_probe(source.backbone, source.data, len(source.classes), source.workers)
