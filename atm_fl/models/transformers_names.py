"""What Hugging Face's transformers calls the entries of a ViT, a DINOv2 and a CLIP, and what timm and open_clip do.

transformers has three matrices where the others have one (query, key and value), and CLIP's projections transposed.
Names of its version 5 in memory and of its files are both known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

THIRDS = {"query": 0, "q_proj": 0, "key": 1, "k_proj": 1, "value": 2, "v_proj": 2}

RENAMED = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (r"(?:encoder\.)?layers?\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"(?:encoder\.)?layers?\.(\d+)\.(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"(?:encoder\.)?layers?\.(\d+)\.(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"(?:encoder\.)?layers?\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"(?:encoder\.)?layers?\.(\d+)\.(?:output\.dense|mlp\.fc2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"(?:encoder\.)?layers?\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.(\w+)", r"visual.ln_pre.\1"),
    (r"vision_model\.post_layernorm\.(\w+)", r"visual.ln_post.\1"),
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.(\w+)", r"ln_final.\1"),
    (r"logit_scale", "logit_scale"),
    *(
        (rf"{theirs}_model\.encoder\.layers\.(\d+)\.{part}\.(\w+)", rf"{ours}transformer.resblocks.\1.{new}.\2")
        for theirs, ours in (("vision", "visual."), ("text", ""))
        for part, new in (
            (r"self_attn\.out_proj", "attn.out_proj"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            (r"mlp\.fc1", "mlp.c_fc"),
            (r"mlp\.fc2", "mlp.c_proj"),
        )
    ),
]
"""(transformers' name, timm's or open_clip's), of entries that are the same tensor."""

WRAPPERS = re.compile(r"^(?:vit|dinov2|clip)\.")


@dataclass(frozen=True)
class Place:
    """Where transformers' entry is in timm's or open_clip's: all of `name`, or one third of its rows (0, 1, 2)."""

    name: str
    third: int | None = None
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """transformers' entry out of the other's tensor."""
        chunk = tensor if self.third is None else tensor.chunk(3)[self.third]
        return (chunk.T if self.transposed else chunk).contiguous()


def place(name: str) -> Place | None:
    """The place of transformers' entry `name`; None of a classifier, a pooler, or what is not known here."""
    name = WRAPPERS.sub("", name)
    thirds = "|".join(THIRDS)
    if match := re.fullmatch(rf"(?:encoder\.)?layers?\.(\d+)\.attention\.(?:attention\.)?({thirds})\.(\w+)", name):
        return Place(f"blocks.{match[1]}.attn.qkv.{match[3]}", THIRDS[match[2]])
    if match := re.fullmatch(rf"(vision|text)_model\.encoder\.layers\.(\d+)\.self_attn\.({thirds})\.(\w+)", name):
        tower = "visual." if match[1] == "vision" else ""
        return Place(f"{tower}transformer.resblocks.{match[2]}.attn.in_proj_{match[4]}", THIRDS[match[3]])
    if name in ("visual_projection.weight", "text_projection.weight"):
        return Place("visual.proj" if name.startswith("visual") else "text_projection", transposed=True)
    for pattern, new in RENAMED:
        if re.fullmatch(pattern, name):
            return Place(re.sub(pattern, new, name))
    return None


def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a transformers model by timm's or open_clip's names; of those that have no such name, as they are."""
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        target = place(name)
        if target is None:
            renamed[name] = tensor
        elif target.third is not None:
            thirds.setdefault(target.name, {})[target.third] = tensor
        else:
            renamed[target.name] = tensor.T if target.transposed else tensor
    for name, three in thirds.items():
        if len(three) == 3:
            renamed[name] = torch.cat([three[number] for number in range(3)])
    return renamed
