"""Any encoder: where its blocks are, and what of it is tuned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import nn

from atm_fl import models
from atm_fl.errors import SettingError
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.models.backbones import Backbone
from atm_fl.models.trainable import levels, set_trainable
from atm_fl.settings import Settings
from atm_fl.vectors import Layout

TIMM = {
    "vit_tiny_patch16_224": (12, {"blocks.11", "norm"}),
    "resnet10t": (4, {"layer4.0"}),
    "convnext_atto": (12, {"stages.3.blocks.1", "head.norm"}),
    "swin_tiny_patch4_window7_224": (12, {"layers.3.blocks.1", "norm"}),
    "eva02_tiny_patch14_224": (12, {"blocks.11", "fc_norm"}),
}


@pytest.mark.parametrize("name", TIMM)
def test_the_last_block_of_a_timm_model_is_the_one_that_timm_says(name: str) -> None:
    depth, last = TIMM[name]
    with torch.device("meta"):
        model = Backbone(timm.create_model(name, num_classes=0), 224)
    assert levels(model)[1] in (depth, depth + 1)  # the way down to Swin's last stage counts as one
    set_trainable(model, "last-1")
    names = Layout.of(model).names
    assert {part for part in last if any(name.startswith(f"vit.{part}.") for name in names)} == last
    assert all(any(name.startswith(f"vit.{part}.") for part in last) for name in names)
    assert len(Layout.of(model).names) < len(dict(model.named_parameters()))


def test_blocks_of_open_clips_resnet_are_its_bottlenecks() -> None:
    with torch.device("meta"):
        tower = open_clip.create_model("RN50", device="meta").visual
    model = Backbone(tower, 224)
    assert levels(model)[1] == 3 + 4 + 6 + 3
    set_trainable(model, "last-1")
    assert {name.split(".")[1] for name in Layout.of(model).names} == {"layer4", "attnpool"}


def test_blocks_of_anyones_model_are_its_outermost_list_of_equals() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1)
            self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.layers = nn.ModuleList([Block(), Block(), Block()])
            self.out = nn.Linear(4, 2)

    model = Own()
    level, depth = levels(model)
    assert depth == 3
    assert [level[name] for name in ("table.weight", "layers.0.mlp.1.bias", "layers.2.mlp.0.weight", "out.bias")] == [
        0,
        1,
        3,
        4,
    ]
    set_trainable(model, "attention")
    assert {name.split(".")[2] for name in Layout.of(model).names} == {"attention"}
    set_trainable(model, "last-2")
    assert not {"table", "0"} & {part for name in Layout.of(model).names for part in name.split(".")[:2]}


def test_the_guides_own_model_runs(config: dict[str, Any]) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "tutorials" / "own-model.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", guide, re.DOTALL)), {"__name__": "guide"})
    try:
        run = run_loop(Settings.parse({**config, "model": "small", "rounds": 1}))
        assert set(run.base_layout.names) - set(run.layout.names) == {"layers.1.running_mean", "layers.1.running_var"}
        settings = Settings.parse({**config, "model": "small", "precision": "bf16"})
        with pytest.raises(SettingError, match="precision='bf16': model='small' is no Backbone"):
            Party(settings, settings.task_names[0])
    finally:
        models.BACKBONES.pop("small")
