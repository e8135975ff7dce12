"""Backbones and heads.

A model is an `Encoder`, which maps images or texts to one feature vector each, or a `LanguageModel`, which says how
probable an answer to a text is. `Backbone` is a timm VisionTransformer; the
embedded ones are the same module code with other sizes and weights. A head belongs to a task, is made once with the
pretrained model, and stays frozen.

To add a model, register a function that returns an `Encoder`::

    @backbone("my_vit")
    def my_vit() -> Encoder: ...

Those of open_clip, timm and transformers go by their own names: see hubs.py, clip.py and texts.py. A function of an
installed package goes by its path: see imported.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from atm_fl.errors import SettingError, did_you_mean
from atm_fl.models import clip, hubs, texts  # noqa: F401 (they register the libraries' models)
from atm_fl.models.backbones import (
    BACKBONES,
    EVALUATION_BATCH,
    FAMILIES,
    PRECISIONS,
    Backbone,
    Encoder,
    LanguageModel,
    backbone,
    dinov2,
    dinov2_s6,
    dinov2_s12,
    family,
    untrained_vit_micro,
    vit,
    vit_micro,
)
from atm_fl.models.clip import Clip, both_towers
from atm_fl.models.heads import (
    HEADS,
    KINDS,
    LOGIT_SCALE,
    Answers,
    Head,
    HeadSource,
    MakeHead,
    Sentences,
    TaskHead,
    features,
    head,
    linear_probe,
    linear_probe_head,
    prototype_head,
    prototypes,
    restored,
)
from atm_fl.models.imported import check_path, imported_plugin, is_imported, make_imported
from atm_fl.models.loading import is_path, load_weights
from atm_fl.models.texts import TextModel

__all__ = [
    "BACKBONES",
    "EVALUATION_BATCH",
    "FAMILIES",
    "HEADS",
    "KINDS",
    "LOGIT_SCALE",
    "PRECISIONS",
    "Answers",
    "Backbone",
    "Clip",
    "Encoder",
    "Head",
    "HeadSource",
    "LanguageModel",
    "MakeHead",
    "Sentences",
    "TaskHead",
    "TextModel",
    "backbone",
    "backbones",
    "both_towers",
    "check_backbone",
    "dinov2",
    "dinov2_s6",
    "dinov2_s12",
    "family",
    "features",
    "head",
    "imported_plugin",
    "is_imported",
    "linear_probe",
    "linear_probe_head",
    "load_backbone",
    "load_image_backbone",
    "load_library_model",
    "prototype_head",
    "prototypes",
    "restored",
    "untrained_vit_micro",
    "vit",
    "vit_micro",
]


def backbones() -> list[str]:
    """The names of all backbones."""
    return sorted(BACKBONES)


def _family(name: str) -> tuple[Callable[[str, str], Any], Callable[[str, str], object]] | None:
    return FAMILIES.get(name.partition("/")[0]) if "/" in name and not is_imported(name) else None


def check_backbone(name: str, weights: str = "pretrained") -> None:
    """SettingError, with the nearest known name, if there is no backbone `name` or there are no such weights of it."""
    if family := _family(name):
        family[1](name.partition("/")[2], weights)
        return
    if is_imported(name):
        check_path(name)
    elif name not in BACKBONES:
        raise SettingError(f"model={name!r} is unknown{did_you_mean(name, [*BACKBONES, 'open_clip/…', 'timm/…'])}")
    if weights != "pretrained" and not is_path(weights):
        raise SettingError(
            f"weights={weights!r}: model={name!r} has weights of its own; leave it at 'pretrained', or name a file "
            "that is here"
        )


def load_backbone(name: str, weights: str = "pretrained") -> Any:
    """The `Encoder` or `LanguageModel` called `name`, in evaluation mode.

    weights: those of libraries as hubs.py and texts.py explain them.
    """
    check_backbone(name, weights)
    # A ViT draws its initial weights before ours are loaded: without the fork each client's draws would be disturbed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family = _family(name)
        if family:
            made = family[0](name.partition("/")[2], weights)
        else:
            made = make_imported(name) if is_imported(name) else BACKBONES[name]()
        _check_encoder(name, made)
        if not family and weights != "pretrained":
            made.notes = [*getattr(made, "notes", ()), *load_weights(made, weights)]
        return made.eval()


def _check_encoder(name: str, made: Any) -> None:
    if not isinstance(made, torch.nn.Module) or not isinstance(getattr(made, "image_size", None), int):
        raise SettingError(
            f"model={name!r} is a {type(made).__name__} without what atm_fl.models.Encoder asks for: a "
            "torch.nn.Module with an image_size"
        )


def load_library_model(name: str, weights: str = "pretrained") -> Backbone | TextModel:
    """`load_backbone` where only a module of a library will do. SettingError if it is anyone's own."""
    model = load_backbone(name, weights)
    if not isinstance(model, Backbone | TextModel):
        raise SettingError(f"model={name!r} is a module of your own, which no library loads; save it yourself")
    return model


def load_image_backbone(name: str, weights: str = "pretrained") -> Backbone:
    """`load_backbone` where only a `Backbone` will do. SettingError if the model is another kind of encoder."""
    model = load_backbone(name, weights)
    if not isinstance(model, Backbone):
        raise SettingError(f"model={name!r} reads no images, or not as a ViT; that is not built for it yet")
    return model
