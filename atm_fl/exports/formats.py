"""Formats of exports: a model's weights as a library's own loader takes them. One class each."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from atm_fl.errors import SettingError
from atm_fl.models import Backbone, Clip, TextModel, load_image_backbone, load_library_model, load_weights
from atm_fl.models.hubs import load_clip
from atm_fl.models.loading import is_path
from atm_fl.models.texts import CausalModel, load_text_model
from atm_fl.models.transformers_names import Place, place
from atm_fl.plugins import Registry
from atm_fl.settings import Settings

WEIGHTS = "model.safetensors"


class Format(ABC):
    """How a model is written to a folder, and read again by the library that the format is of.

    loads: Python that loads the folder FOLDER, for the model card.
    """

    loads: str
    library: str
    """As Hugging Face's hub calls it, for the card."""

    @abstractmethod
    def write(self, model: Any, settings: Settings, folder: Path) -> None:
        """Write the weights and what the loader needs of a `Backbone` or a `TextModel`.

        SettingError if the library has no such model.
        """

    def read(self, folder: Path, about: dict[str, Any]) -> nn.Module | None:
        """The module by the library's loader: of a `Backbone` normalised pixels [n, 3, s, s] → features [n, d], of a
        `Clip` open_clip's whole, of a `TextModel` another. None if there is no loader.

        about: what atm-fl.json says.
        """
        return None


FORMATS: Registry[type[Format]] = Registry("export format")
_Class = TypeVar("_Class", bound=type[Format])


def export_format(name: str) -> Callable[[_Class], _Class]:
    """Register the decorated class as the format `name`."""
    return FORMATS.register(name)


def entries(model: Backbone | TextModel) -> dict[str, Tensor]:
    """A model's entries by the names of the library that its module comes from; of entries that are one, the first."""
    state = {name: tensor.detach() for name, tensor in model.network.state_dict().items()}
    first = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
    return {name: tensor.cpu().contiguous() for name, tensor in state.items() if first[tensor.data_ptr()] == name}


def _of_images(model: Backbone | TextModel, settings: Settings, to: str) -> Backbone:
    """SettingError if the model, which is to go to a library of image models, reads texts."""
    if not isinstance(model, Backbone):
        raise SettingError(
            f"to={to!r}: model={settings.model!r} reads texts; choose transformers, safetensors or task-vector"
        )
    return model


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@export_format("safetensors")
class Safetensors(Format):
    """One file with the names of the model's own library; runs and merges take it as `weights`, `start` and file."""

    library = "safetensors"
    loads = 'from safetensors.torch import load_file\n\nstate = load_file("FOLDER/model.safetensors")'

    def write(self, model: Backbone | TextModel, settings: Settings, folder: Path) -> None:
        save_file(entries(model), folder / WEIGHTS, {"format": "pt"})

    def read(self, folder: Path, about: dict[str, Any]) -> nn.Module | None:
        if not about["image_size"]:  # the file of a model of texts has no tokenizer
            return None
        return load_image_backbone(about["model"], str((folder / WEIGHTS).resolve())).vit


@export_format("task-vector")
class TaskVector(Format):
    """The model minus the pretrained one, by the same names: what `base + factor * vector` is made of."""

    library = "safetensors"
    loads = 'from safetensors.torch import load_file\n\nvector = load_file("FOLDER/task_vector.safetensors")'

    def write(self, model: Backbone | TextModel, settings: Settings, folder: Path) -> None:
        before = entries(load_library_model(settings.model, settings.weights))
        vector = {name: after - before[name] for name, after in entries(model).items() if after.is_floating_point()}
        save_file(vector, folder / "task_vector.safetensors", {"format": "pt"})


@export_format("timm")
class Timm(Format):
    """A folder as timm's own on the hub: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

    library = "timm"
    loads = 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)'

    def write(self, model: Backbone | TextModel, settings: Settings, folder: Path) -> None:
        model = _of_images(model, settings, "timm")
        vit = model.vit
        known = settings.model.startswith("timm/")
        if not known and type(vit).__module__ != "timm.models.vision_transformer":
            raise SettingError(f"to='timm': timm has no such model as {settings.model!r}; choose another format")
        size = model.image_size
        config = {
            "architecture": settings.model.removeprefix("timm/").partition(".")[0] if known else "vit_tiny_patch16_224",
            "num_classes": 0,
            "num_features": vit.num_features,
            "model_args": {} if known else _vit_arguments(vit),
            "pretrained_cfg": {
                **{"input_size": [3, size, size], "fixed_input_size": True, "interpolation": "bicubic"},
                **{"crop_pct": 1.0, "mean": _channels(model.mean), "std": _channels(model.std), "num_classes": 0},
                **{"first_conv": "patch_embed.proj", "classifier": "head"},
            },
        }
        write_json(folder / "config.json", config)
        save_file(entries(model), folder / WEIGHTS, {"format": "pt"})

    def read(self, folder: Path, about: dict[str, Any]) -> nn.Module:
        import timm

        return timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)


def _vit_arguments(vit: Any) -> dict[str, Any]:
    """What timm's VisionTransformer is made with to be this one."""
    block = vit.blocks[0]
    arguments = {
        "img_size": vit.patch_embed.img_size[0],
        "patch_size": vit.patch_embed.patch_size[0],
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    return arguments | ({"init_values": 1.0} if hasattr(block.ls1, "gamma") else {})


def _channels(values: Tensor) -> list[float]:
    """A buffer of three channels, or one, of values in 0..255, as three numbers in 0..1."""
    return [float(value) / 255 for value in values.flatten().expand(3).double()]


@export_format("open_clip")
class OpenClip(Format):
    """The whole CLIP with this image tower, or with these towers: `open_clip.create_model("local-dir:FOLDER")`."""

    library = "open_clip"
    loads = (
        "import open_clip\n\n"
        'model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")'
    )

    def write(self, model: Backbone | TextModel, settings: Settings, folder: Path) -> None:
        import open_clip

        model = _of_images(model, settings, "open_clip")
        if not settings.model.startswith(("open_clip/", "clip/")):
            raise SettingError(f"to='open_clip': model={settings.model!r} is no CLIP; choose another format")
        name = settings.model.partition("/")[2]
        clip = model.vit if isinstance(model, Clip) else load_clip(name, settings.weights)
        if not isinstance(model, Clip):
            if is_path(settings.weights):
                load_weights(clip, settings.weights)
            clip.visual.load_state_dict(model.vit.state_dict())
        quick = {"quick_gelu": True} if _quick(clip.visual) else {}
        config = {
            "model_cfg": open_clip.get_model_config(name) | quick,
            "preprocess_cfg": {"mean": _channels(model.mean), "std": _channels(model.std)},
        }
        write_json(folder / "open_clip_config.json", config)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors", {"format": "pt"})

    def read(self, folder: Path, about: dict[str, Any]) -> nn.Module:
        import open_clip

        clip = open_clip.create_model(f"local-dir:{folder.resolve()}")
        return clip if about["model"].startswith("clip/") else clip.visual


def _quick(module: nn.Module) -> bool:
    return any(type(each).__name__ == "QuickGELU" for each in module.modules())


@export_format("transformers")
class Transformers(Format):
    """A ViT, a DINOv2 or a CLIP's image tower of transformers, with its image processor; a model of texts as it is."""

    library = "transformers"
    loads = (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        'model, processor = AutoModel.from_pretrained("FOLDER"), AutoImageProcessor.from_pretrained("FOLDER")'
    )

    def write(self, model: Backbone | TextModel, settings: Settings, folder: Path) -> None:
        transformers = _transformers()
        if isinstance(model, TextModel):
            kind = "AutoModelForCausalLM" if isinstance(model, CausalModel) else "AutoModel"
            self.loads = (
                f"from transformers import {kind}, AutoTokenizer\n\n"
                f'model, tokenizer = {kind}.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")'
            )
            model.network.save_pretrained(folder)
            model.tokenizer.library.save_pretrained(folder)
            return
        kinds = {
            "timm.models.vision_transformer": _their_vit,
            "open_clip.transformer": _their_clip,
        }
        make = kinds.get(type(model.vit).__module__)
        if make is None:
            raise SettingError(
                f"to='transformers': no model there is known for {settings.model!r}; choose another format"
            )
        theirs, prefix = make(transformers, model)
        ours = entries(model)
        state = theirs.state_dict()
        used = set()
        for name, tensor in state.items():
            spot = place(name)
            source = spot and spot.name.removeprefix(prefix)
            if source in ours:
                assert spot
                tensor.copy_(Place(spot.name, spot.third, spot.transposed).of(ours[source]))
                used.add(source)
            elif name != "embeddings.mask_token":
                raise SettingError(f"to='transformers': {settings.model!r} has no {name}, which is needed there")
        if left := [name for name in ours if name not in used]:
            raise SettingError(f"to='transformers': there is no place for {left[0]} of {settings.model!r}")
        theirs.save_pretrained(folder)
        size = model.image_size
        processor = transformers.ViTImageProcessor(
            size={"height": size, "width": size},
            resample=3,
            image_mean=_channels(model.mean),
            image_std=_channels(model.std),
        )
        processor.save_pretrained(folder)

    def read(self, folder: Path, about: dict[str, Any]) -> nn.Module:
        transformers = _transformers()
        if not about["image_size"]:
            language = about["model"].startswith("causal-lm/")
            return load_text_model(str(folder.resolve()), "pretrained", about["model"], language)
        (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
        more = {"add_pooling_layer": False} if kind == "ViTModel" else {}
        return _Features(getattr(transformers, kind).from_pretrained(folder, **more).eval())


class _Features(nn.Module):
    """transformers' model as one that returns features: a CLIP's embedding, or the class token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.model(pixel_values=pixels)
        return found["image_embeds"] if "image_embeds" in found else found["last_hidden_state"][:, 0]


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise SettingError("to='transformers' needs the package transformers; install it with pip") from error
    return transformers


def _their_vit(transformers: Any, model: Backbone) -> tuple[Any, str]:
    """A ViT of transformers like timm's, a DINOv2 where it has layer scales, and the prefix of its entries' names."""
    vit = model.vit
    block = vit.blocks[0]
    sizes = {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": vit.patch_embed.img_size[0],
        "patch_size": vit.patch_embed.patch_size[0],
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": vit.norm.eps,
    }
    with torch.no_grad():
        if hasattr(block.ls1, "gamma"):
            ratio = block.mlp.fc1.out_features // vit.embed_dim
            return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=ratio)), ""
        config = transformers.ViTConfig(**sizes, intermediate_size=block.mlp.fc1.out_features)
        return transformers.ViTModel(config, add_pooling_layer=False), ""


def _their_clip(transformers: Any, model: Backbone) -> tuple[Any, str]:
    """A CLIP's image tower of transformers like open_clip's, and the prefix of its entries' names."""
    tower = model.vit
    block = tower.transformer.resblocks[0]
    config = transformers.CLIPVisionConfig(
        hidden_size=tower.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(tower.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        projection_dim=tower.output_dim,
        image_size=tower.image_size[0],
        patch_size=tower.patch_size[0],
        hidden_act="quick_gelu" if _quick(tower) else "gelu",
        layer_norm_eps=block.ln_1.eps,
    )
    return transformers.CLIPVisionModelWithProjection(config), "visual."
