"""Backbones of open_clip and timm by name, and CLIP's zero-shot heads. Nothing is downloaded: weights are random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from atm_fl import models
from atm_fl.errors import SettingError
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.models import hubs
from atm_fl.models.trainable import set_trainable
from atm_fl.settings import Settings
from atm_fl.vectors import Layout, bind

CLASSES = ["a red thing", "a green thing", "a blue thing"]
TEMPLATES = ["a photo of a {}.", "a blurry photo of a {}.", "art of the {}."]
PROMPTS = [[template.format(name) for template in TEMPLATES] for name in CLASSES]


@pytest.fixture
def clip_config(clip: str, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"model": clip, "weights": "random", "head": "zero-shot", "rounds": 2}


def test_the_image_tower_of_vit_b_16_has_the_papers_number_of_elements() -> None:
    with torch.device("meta"):
        tower = open_clip.create_model("ViT-B-16", device="meta").visual
    assert Layout.of(tower).size == 86_192_640


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14"])
def test_layouts_of_larger_towers_leave_nothing_out(name: str) -> None:
    with torch.device("meta"):
        tower = open_clip.create_model(name, device="meta").visual
    layout = Layout.of(tower)
    assert layout.size == sum(parameter.numel() for parameter in tower.parameters())
    assert set(layout.names) == set(tower.state_dict())


@pytest.mark.parametrize("name", ["clip", "timm/vit_tiny_patch16_224", "vit_micro", "tiny"])
def test_a_layout_takes_a_backbone_apart_and_puts_it_together(name: str, clip: str) -> None:
    name, weights = (clip, "random") if name == "clip" else (name, "random" if "/" in name else "pretrained")
    model = models.load_backbone(name, weights)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    layout = Layout.of(model)
    with torch.inference_mode():
        expected = model(images)
    flat = layout.flatten(model)
    other = models.load_backbone(name, weights)
    bound = bind(other, layout)
    bound.data.zero_()
    bound.data.copy_(flat)
    with torch.inference_mode():
        torch.testing.assert_close(other(images), expected, rtol=0, atol=0)


def test_random_weights_are_the_same_everywhere_and_disturb_no_other_draws(clip: str) -> None:
    torch.manual_seed(5)
    first = models.load_backbone(clip, "random")
    drawn = torch.rand(3)
    second = models.load_backbone(clip, "random")
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_a_zero_shot_head_is_clips_own_classifier(clip: str) -> None:
    clip_model = hubs.load_clip(clip.removeprefix("open_clip/"), "random")
    model, head = models.load_backbone(clip, "random"), hubs.zero_shot(clip, "random", PROMPTS)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        pixels = (images / 255 - torch.tensor(clip_model.visual.image_mean).view(1, 3, 1, 1)) / torch.tensor(
            clip_model.visual.image_std
        ).view(1, 3, 1, 1)
        # One class at a time, and the whole model: another way through open_clip than the head's.
        classifier = open_clip.build_zero_shot_classifier_legacy(
            clip_model, open_clip.get_tokenizer("ViT-tiny-test"), CLASSES, TEMPLATES
        )
        image = clip_model.encode_image(pixels, normalize=True)
        torch.testing.assert_close(head.weight, classifier.T, rtol=0, atol=1e-6)
        scale = float(clip_model.logit_scale.exp())
        torch.testing.assert_close(head(model(images)) / scale, image @ classifier, rtol=0, atol=1e-6)
        assert head.scale == pytest.approx(scale)


def test_weights_of_a_file_are_loaded(clip: str, tmp_path: Path) -> None:
    name = clip.removeprefix("open_clip/")
    clip_model = hubs.load_clip(name, "random")
    torch.nn.init.normal_(clip_model.visual.proj)
    torch.save(clip_model.state_dict(), tmp_path / "clip.pt")
    loaded = models.load_backbone(clip, str(tmp_path / "clip.pt"))
    assert torch.equal(loaded.vit.proj, clip_model.visual.proj)

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    loaded = models.load_backbone("timm/vit_tiny_patch16_224", str(tmp_path / "vit.safetensors"))
    assert torch.equal(loaded.vit.pos_embed, vit.pos_embed)


def test_a_run_with_a_clip_and_zero_shot_heads(clip_config: dict[str, Any]) -> None:
    settings = Settings.parse(clip_config)
    before = models.load_backbone(settings.model, "random")
    run = run_loop(settings)
    assert run.layout.size == sum(parameter.numel() for parameter in before.parameters())
    assert not torch.equal(run.base, run.layout.flatten(before))
    # the head comes from the disk the second time, and is the same
    first, second = (Party(settings, settings.task_names[0]).head for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.scale == second.scale == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "open_clip/ViT-B-17"}, "model='open_clip/ViT-B-17' is unknown; did you mean"),
        ({"model": "open_clip/ViT-B-16", "weights": "openia"}, "open_clip has no such weights of ViT-B-16.*openai"),
        ({"model": "timm/resnet17"}, "model='timm/resnet17' is unknown; did you mean"),
        ({"model": "timm/vit_tiny_patch16_224", "weights": "here.pt"}, "weights='here.pt': it takes pretrained"),
        ({"model": "hub/vit"}, "model='hub/vit' is unknown"),
        ({"weights": "random"}, "model='tiny' has weights of its own"),
        ({"head": "zero-shot"}, "model='tiny' has no text tower"),
        ({"trainable": "last-0"}, "trainable='last-0': it takes all, attention, lora, or last-K"),
        ({"batch-size": 8, "accumulate": 3}, "accumulate=3: it must divide batch-size=8"),
        ({"precision": "fp8"}, "precision='fp8': it takes one of fp32, bf16, fp16"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        Settings.parse(config | change)


def test_weights_that_cannot_be_had_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the Hub")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(SettingError, match="the weights 'openai' could not be loaded here .*connect.*weights=FILE"):
        models.load_backbone("open_clip/ViT-B-32", "openai")


def test_openais_weights_get_the_gelu_they_were_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    actual: list[dict[str, Any]] = []

    def create(*args: Any, **chosen: Any) -> torch.nn.Module:
        actual.append(chosen)
        return torch.nn.Identity()

    monkeypatch.setattr(open_clip, "create_model", create)
    hubs.load_clip("ViT-B-16", "pretrained")
    hubs.load_clip("ViT-B-16", "laion2b_s34b_b88k")
    assert [item["pretrained"] for item in actual] == ["openai", "laion2b_s34b_b88k"]
    assert [item["force_quick_gelu"] for item in actual] == [True, False]


def test_parts_of_a_clip_can_be_trained(clip: str) -> None:
    model = models.load_backbone(clip, "random")
    set_trainable(model, "last-1")
    names = set(Layout.of(model).names)
    assert {"vit.proj", "vit.ln_post.weight", "vit.transformer.resblocks.1.mlp.c_fc.weight"} <= names
    assert not {name for name in names if "resblocks.0." in name or "conv1" in name or "embedding" in name}
    set_trainable(model, "attention")
    assert {name.split(".")[4] for name in Layout.of(model).names} == {"attn"}
