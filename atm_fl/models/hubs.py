"""Backbones by name from open_clip and timm, and the zero-shot heads of CLIP's text tower.

`model = "open_clip/ViT-B-16"` is the image tower of a CLIP, `model = "timm/vit_small_patch16_224"` a model of timm's.
`weights` says which: "pretrained" (CLIP: OpenAI's where there are any), one of open_clip's tags ("laion2b_s34b_b88k"),
a file, or "random" (drawn from a fixed seed, so that server and clients hold the same; for tests). Tags are downloaded
by the two libraries, once, into Hugging Face's cache; no download was ever run by this project's tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from atm_fl.errors import SettingError, did_you_mean
from atm_fl.models.backbones import Backbone, family
from atm_fl.models.heads import Head, HeadSource, described, head
from atm_fl.models.loading import is_path, load_weights

RANDOM, PRETRAINED = "random", "pretrained"


def clip_weights(name: str, weights: str, library: str = "open_clip") -> str | None:
    """What open_clip takes as `pretrained`: a tag, or None for random weights and those of a file, which we read.

    library: what errors call it. SettingError if open_clip has no model `name`, or no weights `weights` for it.
    """
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        raise SettingError(f"model='{library}/{name}' is unknown{did_you_mean(name, known)}")
    if weights == RANDOM or is_path(weights):
        return None
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights == PRETRAINED and tags:
        return "openai" if "openai" in tags else tags[0]
    if weights in tags:
        return weights
    raise SettingError(
        f"weights={weights!r}: open_clip has no such weights of {name}, and no such file is here; it takes "
        f"{', '.join([*tags, RANDOM])} or a file"
    )


def load_clip(name: str, weights: str) -> Any:
    """The whole CLIP model, float32, in evaluation mode. SettingError if its weights cannot be had."""
    import open_clip

    chosen = clip_weights(name, weights)
    # OpenAI's towers were trained with another GELU than open_clip's; loaded without it they are a few points worse.
    quick = bool(chosen and open_clip.get_pretrained_cfg(name, chosen).get("quick_gelu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = open_clip.create_model(name, pretrained=chosen, force_quick_gelu=quick).eval()
        except (RuntimeError, OSError) as error:
            raise not_here(f"open_clip/{name}", weights, error) from error
    return model


@family("open_clip", check=clip_weights)
def clip_tower(name: str, weights: str) -> Backbone:
    """The image tower of a CLIP; features are its projected image embeddings, before they are normalised.

    A file may have the whole CLIP or the tower alone.
    """
    visual = load_clip(name, weights).visual
    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    made = Backbone(visual, size, visual.image_mean, visual.image_std)
    if is_path(weights):
        made.notes += load_weights(made, weights)
    return made


def zero_shot(name: str, weights: str, prompts: Sequence[Sequence[str]]) -> Head:
    """CLIP's own classifier (Radford et al. 2021, arXiv:2103.00020) of classes described by sentences each.

    A class's weight is the normalised mean of the normalised text embeddings of its sentences ("a photo of a cat.", "a
    drawing of a cat."); the learned logit scale is folded in. The text tower is loaded for this and dropped.
    """
    import open_clip

    clip_name = name.removeprefix("open_clip/")
    clip, tokenizer = load_clip(clip_name, weights), open_clip.get_tokenizer(clip_name)
    if is_path(weights):
        try:
            load_weights(clip, weights)
        except SettingError as error:
            raise SettingError(f"head='zero-shot' needs a whole CLIP, with its text tower: {error}") from error
    # Classes may have different numbers of sentences; open_clip's function wants as many of each at a time.
    columns = [
        open_clip.build_zero_shot_classifier(clip, tokenizer, [""], [lambda _, text=text: text for text in texts])
        for texts in prompts
    ]
    weight = torch.cat(columns, 1).T.contiguous()
    return Head(weight, torch.zeros(len(weight)), float(clip.logit_scale.detach().exp()))


@head("zero-shot")
def zero_shot_head(source: HeadSource) -> Head:
    """What reads texts on the class names: CLIP's text tower, or the model itself. No item of the data is looked at."""
    tokenizer = getattr(source.backbone, "tokenizer", None)
    if tokenizer:
        return described(source.backbone, tokenizer, source.prompts)
    return zero_shot(source.model, source.weights, source.prompts)


def check_timm(name: str, weights: str) -> None:
    """SettingError if timm has no model `name`, or `weights` is none of what `timm_encoder` takes."""
    import timm

    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise SettingError(f"model='timm/{name}' is unknown{did_you_mean(name, known)}")
    if weights not in (RANDOM, PRETRAINED) and not is_path(weights):
        raise SettingError(
            f"weights={weights!r}: it takes {PRETRAINED}, {RANDOM} or a file (other weights of timm's are models of "
            "their own: timm/vit_base_patch16_224.dino)"
        )


@family("timm", check=check_timm)
def timm_encoder(name: str, weights: str) -> Backbone:
    """A model of timm's without its classifier; features are what the classifier would get. A file's is dropped."""
    import timm
    from timm.data import resolve_model_data_config

    try:
        model = timm.create_model(name, pretrained=weights == PRETRAINED, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise not_here(f"timm/{name}", weights, error) from error
    config = resolve_model_data_config(model)
    made = Backbone(model, config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]))
    if is_path(weights):
        made.notes += load_weights(made, weights)
    return made


def not_here(name: str, weights: str, error: Exception) -> SettingError:
    """What to say of weights that a library could not load."""
    reason = " ".join(str(error).split())[:200]
    return SettingError(
        f"model={name!r}: the weights {weights!r} could not be loaded here ({reason}); fetch them once on a machine "
        "with a network and name the file with weights=FILE"
    )
