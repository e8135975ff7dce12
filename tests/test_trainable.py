"""Training parts of a backbone, low-rank updates, and the settings of a pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from atm_fl import models
from atm_fl.errors import SettingError
from atm_fl.federation.loop import run_loop
from atm_fl.federation.shared_model import SharedModel
from atm_fl.models.trainable import Lora, set_trainable
from atm_fl.runs.metrics import read_metrics
from atm_fl.settings import Settings
from atm_fl.tasks import Split
from atm_fl.vectors import Layout, bind

IMAGES = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
DATA = Split(IMAGES, torch.arange(12) % 3)
HEAD = models.Head(
    nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(1))), torch.zeros(3)
)


def shared(config: dict[str, Any], **more: Any) -> tuple[SharedModel, Settings]:
    settings = Settings.parse(config | {name.replace("_", "-"): value for name, value in more.items()})
    return SharedModel(settings.of_model()), settings


@pytest.mark.parametrize("trainable", ["all", "attention", "last-1", "lora"])
def test_only_what_is_trainable_moves_and_the_rest_is_not_sent(
    config: dict[str, Any], trainable: str, tmp_path: Path
) -> None:
    run = run_loop(Settings.parse(config | {"trainable": trainable}))
    whole = models.load_backbone("tiny")
    moved = {
        name for name, view in run.layout.views(run.base).items() if not torch.equal(view, whole.get_parameter(name))
    }
    assert moved == set(run.layout.names)
    matrices = {f"vit.blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    expected = {
        "all": {name for name, _ in whole.named_parameters()},
        "attention": {name for name, _ in whole.named_parameters() if ".attn." in name},
        "last-1": {name for name, _ in whole.named_parameters() if ".blocks." in name or name.startswith("vit.norm")},
        "lora": matrices,
    }
    assert set(run.layout.names) == expected[trainable]
    loss = {line["round"]: line["loss"] for line in read_metrics(run.directory) if line["kind"] == "tuning"}
    assert all(0 < value < 10 for value in loss.values())


def test_a_backbone_with_fewer_blocks_is_named(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="trainable='last-2': the backbone has 1 blocks"):
        shared(config, trainable="last-2")


def test_loras_task_vector_is_the_dense_difference(config: dict[str, Any]) -> None:
    model, settings = shared(config, trainable="lora", lora_rank=2)
    base = model.pretrained + 0.01
    model.load(base)
    vector, tuned = model.tune(base, HEAD, DATA, settings, seed=3)
    assert tuned.steps == 2
    assert all(0 < int(torch.linalg.matrix_rank(view)) <= 2 for view in model.layout.views(vector).values())
    with torch.inference_mode():
        adapted = model.module(IMAGES)
        model.load(base)
        untouched = model.module(IMAGES)
        model.load(base + vector)
        torch.testing.assert_close(model.module(IMAGES), adapted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(untouched, adapted, atol=1e-4)
    # the same seed, the same vector; another, another
    model.load(base)
    assert torch.equal(model.tune(base, HEAD, DATA, settings, seed=3)[0], vector)
    model.load(base)
    assert not torch.equal(model.tune(base, HEAD, DATA, settings, seed=4)[0], vector)


def test_lora_is_pefts() -> None:
    """The same A and B in peft's layers give the same features and the same gradients."""
    ours, theirs = models.load_backbone("tiny"), models.load_backbone("tiny")
    set_trainable(ours, "lora")
    layout = Layout.of(ours)
    bind(ours, layout)
    lora = Lora(ours, layout, rank=3, alpha=5.0)
    lora.reset(seed=0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["qkv", "attn.proj", "fc1", "fc2"], lora_dropout=0.0)
    inject_adapter_in_model(config, theirs.vit)
    random = torch.Generator().manual_seed(1)
    for name in layout.names:
        peft, update = theirs.get_submodule(name.removesuffix(".weight")), lora._updates[name]
        with torch.no_grad():
            update.b.normal_(generator=random)
            peft.lora_A["default"].weight.copy_(update.a)
            peft.lora_B["default"].weight.copy_(update.b)
        view = layout.views(lora.vector())[name]
        torch.testing.assert_close(view, peft.get_delta_weight("default"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES), rtol=1e-4, atol=1e-5)
    ours(IMAGES).square().sum().backward()
    theirs(IMAGES).square().sum().backward()
    for name in layout.names:
        peft, update = theirs.get_submodule(name.removesuffix(".weight")), lora._updates[name]
        torch.testing.assert_close(update.a.grad, peft.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(update.b.grad, peft.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-3)


def test_lora_reaches_the_fused_attention_of_a_clip(clip: str, config: dict[str, Any]) -> None:
    model, settings = shared(config, model=clip, weights="random", trainable="lora")
    model.load(model.pretrained)
    vector, _ = model.tune(model.pretrained, HEAD, DATA, settings, seed=0)
    norms = {name: float(view.norm()) for name, view in model.layout.views(vector).items()}
    matrices = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert set(norms) == {f"vit.transformer.resblocks.{block}.{name}" for block in (0, 1) for name in matrices}
    assert min(norms.values()) > 0


def tuned_vector(config: dict[str, Any], **more: Any) -> torch.Tensor:
    model, settings = shared(config, optimizer="sgd", learning_rate=0.05, **more)
    model.load(model.pretrained)
    return model.tune(model.pretrained, HEAD, DATA, settings, seed=0)[0]


def test_settings_of_a_pass_leave_the_result_what_it_was(config: dict[str, Any]) -> None:
    plain = tuned_vector(config)
    for more in ({"accumulate": 4}, {"gradient_checkpointing": True}, {"channels_last": True}):
        torch.testing.assert_close(tuned_vector(config, **more), plain, rtol=1e-3, atol=1e-5)
    half = tuned_vector(config, precision="bf16")
    assert half.dtype == torch.float32
    assert not torch.equal(half, plain)
    assert float(torch.cosine_similarity(half, plain, dim=0)) > 0.9


def test_auto_is_the_cpu_where_there_is_no_gpu(config: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        assert torch.equal(tuned_vector(config, device="auto"), tuned_vector(config, device="cpu"))
