"""Both towers of a CLIP as one model: images or texts in, features of one space out.

`model = "clip/ViT-B-16"` is what open_clip has under this name, with the weights of `open_clip/ViT-B-16` (hubs.py), and
all of it is tuned and merged but the logit scale, which stays as it is. A task may be of images or of texts, and a
federation of both. With the head `sentences` both towers learn: each image, or text, is to be closest to its class's
sentence, as in CLIP's pretraining and in Goyal et al. 2022 (arXiv:2212.00638), against all classes' sentences and not
those of the batch, so that a record's loss is its own. With any other head the text tower learns from tasks of texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from atm_fl.errors import SettingError
from atm_fl.models.backbones import Backbone, family
from atm_fl.models.hubs import clip_weights, load_clip
from atm_fl.models.loading import is_path, load_weights
from atm_fl.models.trainable import levels


class ClipTokenizer:
    """CLIP's own tokenizer, cut at the text tower's length; see `tasks.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self.library = tokenizer
        self.key = f"CLIP {tokenizer.vocab_size} {tokenizer.context_length}"

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self.library(list(texts))
        return [row[: int(row.argmax()) + 1].tolist() for row in rows]  # the mark of the end is the highest number


class Clip(Backbone):
    """Images uint8 [n, 3, h, w], or texts int32 [n, l], → features float32 [n, d], before they are normalised.

    vit: open_clip's module of both towers.
    """

    untuned = frozenset({"vit.logit_scale"})
    """Entries that nothing is learned of, for the features do not depend on them."""

    def __init__(self, clip: nn.Module, tokenizer: Any, size: int, mean: float | tuple, std: float | tuple) -> None:
        super().__init__(clip, size, mean, std)
        self.tokenizer = ClipTokenizer(tokenizer)

    @property
    def logit_scale(self) -> float:
        """What CLIP's cosines are multiplied with."""
        return float(self.vit.logit_scale.detach().exp())

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.ndim == 2:
            texts = functional.pad(inputs.to(self.mean.device), (0, self.vit.context_length - inputs.shape[1]))
            passed, given = self.vit.encode_text, (texts - 1).clamp_min(0).long()
        else:
            passed, given = self.vit.encode_image, self.normalise(inputs)
        with torch.autocast(given.device.type, self.precision, enabled=self.precision != torch.float32):
            return passed(given).to(self.vit.logit_scale.dtype)

    def compile_passes(self) -> None:
        """Compile both towers with torch.compile when they are first used."""
        self.vit.visual.compile()
        getattr(self.vit, "text", self.vit).transformer.compile()

    def levels(self) -> tuple[dict[str, int], int]:
        """`trainable.levels`, the blocks of both towers counted from their ends: last-1 is the last of each."""
        alone = nn.Module()
        alone.vit = self.vit.visual
        images, depth = levels(alone)
        of_images = {name.replace("vit.", "vit.visual.", 1): level for name, level in images.items()}
        names = [name for name, _ in self.named_parameters() if name not in of_images]
        blocks = {name: int(found[1]) + 1 for name in names if (found := re.search(r"\.resblocks\.(\d+)\.", name))}
        most = max(blocks.values())
        behind = {name: most + 1 for name in names if re.search(r"\.(ln_final|text_projection)\b", name)}
        of_texts = dict.fromkeys(names, 0) | blocks | behind
        deepest = max(depth, most)
        parts = (of_images, deepest - depth), (of_texts, deepest - most)
        return {name: level and level + more for part, more in parts for name, level in part.items()}, deepest


def check_clip(name: str, weights: str) -> None:
    """SettingError if open_clip has no such model or weights, or if its text tower is not as CLIP's own."""
    import open_clip

    clip_weights(name, weights, "clip")
    config = open_clip.get_model_config(name)
    text = config["text_cfg"]
    other = {"hf_model_name", "hf_tokenizer_name", "embed_cls"} & {key for key, value in text.items() if value}
    if other or text.get("pool_type", "argmax") != "argmax" or {"init_logit_bias", "multimodal_cfg"} & config.keys():
        raise SettingError(
            f"model='clip/{name}': its text tower is not as CLIP's own, which is all that is built; choose another, or "
            f"the image tower alone, model='open_clip/{name}'"
        )


@family("clip", check=check_clip)
def clip_model(name: str, weights: str) -> Clip:
    """Both towers of a CLIP."""
    import open_clip

    return both_towers(load_clip(name, weights), open_clip.get_tokenizer(name), weights)


def both_towers(clip: Any, tokenizer: Any, weights: str = "") -> Clip:
    """A CLIP of open_clip's as a model; weights: a file that is loaded into it, whole."""
    visual = clip.visual
    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    notes = load_weights(clip, weights) if is_path(weights) else []
    made = Clip(clip, tokenizer, size, visual.image_mean, visual.image_std)
    made.notes += notes
    return made
