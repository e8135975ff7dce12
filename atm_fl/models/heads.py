"""Heads: what makes a model's output a task's classes. Each is made once, from the pretrained model, and is frozen.

A `TaskHead` says how probable each class is (`logits`) and what is learned from (`loss`). `Head` is a classifier of
features, `Sentences` lets the model read the classes' names anew, `Answers` asks a language model for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from atm_fl.errors import SettingError
from atm_fl.models.backbones import EVALUATION_BATCH, Encoder, LanguageModel
from atm_fl.plugins import Registry
from atm_fl.tasks import Split, Tokenizer
from atm_fl.tasks.texts import appended, token_table, tokenise

LOGIT_SCALE = 20.0
"""Fixed scale of the cosine logits; CLIP's learned one is 100, for features that lie closer together."""


Model = Callable[..., Tensor]
"""A model's pass: an `Encoder`'s or a `LanguageModel`'s."""


class TaskHead(nn.Module):
    """What makes a model's output the classes of one task. `parts`: the names of the tensors that it is made of."""

    parts: ClassVar[tuple[str, ...]]

    def logits(self, model: Model, inputs: Tensor) -> Tensor:
        """Float32 [k, classes], whose softmax is each class's probability, of images or texts [k, …]."""
        raise NotImplementedError

    def loss(self, model: Model, inputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """The mean or, with "sum", the sum of the records' own losses; labels int64 [k]."""
        return functional.cross_entropy(self.logits(model, inputs), labels, reduction=reduction)

    def state(self) -> dict[str, Tensor]:
        """The arguments that make this head again, as tensors."""
        return {name: torch.as_tensor(getattr(self, name)).contiguous() for name in self.parts}


class Head(TaskHead):
    """A frozen classifier of features: logits = scale · normalised features · weightᵀ + bias.

    weight [classes, d], bias [classes], scale: a number. Prototypes, linear probes and zero-shot heads have this form.
    """

    parts = ("weight", "bias", "scale")
    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, scale: float | Tensor = LOGIT_SCALE) -> None:
        super().__init__()
        self.scale = float(scale)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def state(self) -> dict[str, Tensor]:
        """The arguments that make this head again; the scale is float64, as Python's numbers are."""
        return super().state() | {"scale": torch.tensor(self.scale, dtype=torch.float64)}

    def logits(self, model: Model, inputs: Tensor) -> Tensor:
        """Of the features of the inputs."""
        return self(model(inputs))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * functional.linear(functional.normalize(features, dim=-1), self.weight) + self.bias


class Answers(TaskHead):
    """A language model's answers: logits = log P(answer | text, prompt), the loss is minus that of the right one.

    prompt: int32 [p], what every text is followed by; answers: int32 [classes, a], each class's words, as tokens are in
    texts. The loss is no cross-entropy between the classes: the model learns to say the answer, whatever else it could.
    """

    parts = ("prompt", "answers")
    prompt: Tensor
    answers: Tensor

    def __init__(self, prompt: Tensor, answers: Tensor) -> None:
        super().__init__()
        self.register_buffer("prompt", prompt)
        self.register_buffer("answers", answers)

    def logits(self, model: Model, inputs: Tensor) -> Tensor:
        """A pass for each class."""
        asked = self._asked(inputs)
        return torch.stack([model(asked, answer.expand(len(asked), -1)) for answer in self.answers], 1)

    def loss(self, model: Model, inputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Of the right answers' tokens, summed over an answer."""
        losses = -model(self._asked(inputs), self.answers[labels])
        return losses.sum() if reduction == "sum" else losses.mean()

    def _asked(self, texts: Tensor) -> Tensor:
        return appended(texts, self.prompt.expand(len(texts), -1))


class Sentences(TaskHead):
    """Each class's sentence, read anew by the model in every pass: what reads them learns too.

    logits = scale · cosine of the features of the inputs and of the sentences, int32 [classes, l], as texts are.
    """

    parts = ("sentences", "scale")
    sentences: Tensor

    def __init__(self, sentences: Tensor, scale: float | Tensor = LOGIT_SCALE) -> None:
        super().__init__()
        self.scale = float(scale)
        self.register_buffer("sentences", sentences)

    def state(self) -> dict[str, Tensor]:
        """The arguments that make this head again; the scale is float64, as Python's numbers are."""
        return super().state() | {"scale": torch.tensor(self.scale, dtype=torch.float64)}

    def logits(self, model: Model, inputs: Tensor) -> Tensor:
        """Two passes: of the inputs, and of all classes' sentences."""
        weight = functional.normalize(model(self.sentences), dim=-1)
        return self.scale * functional.linear(functional.normalize(model(inputs), dim=-1), weight)


KINDS = (Head, Answers, Sentences)


def restored(state: Mapping[str, Tensor]) -> TaskHead:
    """The head whose `state` this is. SettingError if it is no head's."""
    for kind in KINDS:
        if state.keys() == set(kind.parts):
            return kind(**state)
    raise SettingError(f"these are no head's tensors: {', '.join(state)}")


@dataclass(frozen=True)
class HeadSource:
    """All that a party makes its head of.

    backbone: the pretrained `Encoder` or `LanguageModel`; model, weights: the settings that name it. data: images or
    texts that may be used; prompts: each class's sentences; shots: the setting; seed: of what is drawn at random;
    workers: processes that decode images.
    """

    backbone: Any
    data: Split
    classes: tuple[str, ...]
    prompts: Sequence[Sequence[str]]
    model: str
    weights: str
    shots: int
    seed: int
    workers: int = 0


MakeHead = Callable[[HeadSource], TaskHead]
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
    return Head(weight, torch.zeros(len(weight)), getattr(model, "logit_scale", LOGIT_SCALE))


@head("answers")
def answers_head(source: HeadSource) -> Answers:
    """What a language model says after a text: each class's first sentence.

    What all of them begin with, as "This mail is a", is the prompt, and no part of the loss. SettingError if the tokens
    of a class's sentence are those that another's begins with: the model could not tell the two apart.
    """
    model: LanguageModel = source.backbone
    answers = model.answers([sentences[0] for sentences in source.prompts])
    common = int((answers == answers[0]).all(0).long().cumprod(0).sum())
    _told_apart(answers, source.classes, "answers")
    return Answers(answers[0, :common], answers[:, common:])


@head("sentences")
def sentences_head(source: HeadSource) -> Sentences:
    """Each class's first sentence, read anew by the model that is tuned. SettingError if two classes' are one to it."""
    sentences = torch.from_numpy(token_table([each[0] for each in source.prompts], source.backbone.tokenizer))
    _told_apart(sentences, source.classes, "sentences")
    return Sentences(sentences, getattr(source.backbone, "logit_scale", LOGIT_SCALE))


def _told_apart(rows: Tensor, classes: Sequence[str], head: str) -> None:
    """SettingError if the tokens of a class, int32 [classes, l], are those that another's begin with."""
    for number, row in enumerate(rows):
        length = int((row > 0).sum())
        same = (rows[:, :length] == row[:length]).all(1).nonzero()[:, 0].tolist()
        if other := [place for place in same if place != number]:
            raise SettingError(
                f"head={head!r}: the model's tokens of class {classes[number]!r} begin those of "
                f"{classes[other[0]]!r}; give the classes other words in task.toml"
            )


@head("prototypes")
def prototype_head(source: HeadSource) -> Head:
    """Class means of a few images a class."""
    return prototypes(source.backbone, source.data, len(source.classes), source.shots, source.seed)


@head("linear-probe")
def linear_probe_head(source: HeadSource) -> Head:
    """Logistic regression on all images."""
    return linear_probe(source.backbone, source.data, len(source.classes), source.workers)
