"""Buffers: no party finds another's in the model, and they travel, are saved and are merged as the setting says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import final, in_process, same
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from atm_fl import models
from atm_fl.errors import RunError, SettingError
from atm_fl.experiments.joint import run_joint
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.federation.server_round import ServerRound
from atm_fl.models.buffers import Buffers, check_buffers, take_buffers
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.settings import Settings
from atm_fl.vectors import Layout


@models.backbone("tiny_convnext")
def tiny_convnext() -> models.Backbone:
    return models.Backbone(ConvNeXt(depths=(1,) * 4, dims=(16,) * 4, num_classes=0, drop_path_rate=0.2), 32)


@models.backbone("tiny_swin")
def tiny_swin() -> models.Backbone:
    """Its attention draws dropout masks, and its masks of windows are buffers."""
    swin = SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4, num_classes=0,
        attn_drop_rate=0.2,
    )  # fmt: skip
    return models.Backbone(swin, 32)


class Counting(nn.Module):
    """A user's own: a running mean of its pixels, a counter, and a table that no state dict has; it uses all."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 32
        self.linear = nn.Linear(12, 6)
        self.register_buffer("centre", torch.zeros(12))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1, 12), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        if self.training:
            self.seen.add_(1)
            self.centre.lerp_(pooled.detach().mean(0), 1 / float(self.seen + 1))
            self.last = pooled.detach()  # of another shape than before
        return self.linear(pooled - self.centre + self.last.mean(0))


@models.backbone("counting")
def counting() -> nn.Module:
    return Counting()


FAMILIES = ["tiny", "tiny_resnet", "tiny_convnext", "tiny_swin", "counting"]
MEASURING = ["tiny_resnet", "counting"]


def settings_of(config: dict[str, Any], name: str = "", **more: Any) -> Settings:
    values = {key.replace("_", "-"): value for key, value in more.items()}
    return Settings.parse({"rounds": 2, **config, **values, "run-dir": config["run-dir"] + name})


@pytest.fixture
def config(config: dict[str, Any]) -> dict[str, Any]:
    """Two rounds."""
    return {**config, "rounds": 2, "metric-sinks": ""}


@pytest.mark.parametrize("rule", ["mean", "private"])
@pytest.mark.parametrize("model", FAMILIES)
def test_parties_of_a_process_cannot_touch_each_other(config: dict[str, Any], model: str, rule: str) -> None:
    """In whatever order they act, before and after each other, round after round: the same bits."""
    if rule == "private" and model not in MEASURING:
        pytest.skip("it has no buffers to keep")
    ends = []
    for turn in (1, -1):
        settings = settings_of(config, str(turn), model=model, buffers=rule)
        named = list(zip(settings.party_names, settings.task_names, strict=True))[::turn]
        run = run_loop(settings, [Party(settings, task, client=client) for client, task in named])
        told = {
            (line["round"], line["task"]): [line.get(key) for key in ("validation", "test", "loss", "norm")]
            for line in read_metrics(run.directory)
            if "task" in line
        }
        ends.append((final(run.directory), told))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("rule", ["mean", "private", "frozen"])
@pytest.mark.parametrize("model", MEASURING)
def test_a_resumed_run_is_the_unbroken_one(config: dict[str, Any], model: str, rule: str) -> None:
    unbroken = run_loop(settings_of(config, "-unbroken", model=model, buffers=rule))
    run_loop(settings_of(config, model=model, buffers=rule, rounds=1))
    resumed = run_loop(settings_of(config, model=model, buffers=rule, resume=True))
    assert same(final(unbroken.directory), final(resumed.directory))
    last = [[line["test"] for line in read_metrics(run.directory) if line["round"] == 2 and "test" in line]
            for run in (unbroken, resumed)]  # fmt: skip
    assert last[0] == last[1]


def test_the_next_base_has_the_mean_of_what_the_parties_measured_whatever_the_merge_is(config: dict[str, Any]) -> None:
    run = run_loop(settings_of(config, model="tiny_resnet", rounds=1, merge="ties", scaling=20.0, layer_scaling="*=3",
                               server_optimizer="momentum"))  # fmt: skip
    settings = run.settings
    parties = [Party(settings, task) for task in settings.task_names]
    start = parties[0].model.pretrained
    sent = []
    for party in parties:
        arrays = party.train(start, 1).arrays
        assert arrays is not None
        sent.append(take_buffers(arrays, run.shared_buffers))
    stored, names = final(run.directory), run.shared_buffers.names
    assert len(names) == 2 * sum(isinstance(layer, nn.BatchNorm2d) for layer in parties[0].model.module.modules())
    for name, expected in run.shared_buffers.views(torch.stack(sent).double().mean(0).float()).items():
        assert torch.equal(stored[name], expected), name
        assert not torch.equal(expected, parties[0].model.base_layout.views(start)[name]), name
        assert not name.endswith("running_var") or float(stored[name].min()) >= 0
    assert not any("num_batches_tracked" in name for name in stored)


def test_without_buffers_nothing_is_new(config: dict[str, Any]) -> None:
    run = run_loop(settings_of(config, rounds=1))
    assert run.base_layout == run.layout == Layout.of(models.load_backbone("tiny"))
    with safe_open(sorted(run.directory.glob("checkpoint/*"))[0], "pt") as file:
        assert set(file.keys()) == set(run.layout.names)
    assert "buffers" not in run.settings.decisive()


def test_private_ones_stay_with_their_party_and_frozen_ones_as_they_were(config: dict[str, Any]) -> None:
    runs = {rule: run_loop(settings_of(config, rule, model="tiny_resnet", buffers=rule)) for rule in
            ("private", "frozen")}  # fmt: skip
    for run in runs.values():
        assert run.base_layout == run.layout
        assert not any("running" in name for name in final(run.directory))
    settings = runs["private"].settings
    party = Party(settings, settings.task_names[0])
    kept = [Party(settings, task).context(3, runs["private"].id).recall("buffers") for task in settings.task_names]
    assert all(kept)
    assert not same(kept[0] or {}, kept[1] or {})  # each its own
    party.evaluate(runs["private"].base, (), party.context(3, runs["private"].id))
    assert same(party.model.buffers.state(), kept[0] or {})
    lost = party.train(runs["private"].base, 2, "f" * 16)
    assert lost.tuning["buffers_lost"] == 1
    settings = runs["frozen"].settings
    party = Party(settings, settings.task_names[0])
    before = party.model.buffers.state()
    party.train(runs["frozen"].base, 1)
    assert same(party.model.buffers.state(), before)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"codec-up": "int4", "codec-down": "topk:density=0.1"},
        {"codec-up": "topk:density=0.05", "codec-down": "int8", "buffers": "private"},
        {"secure-aggregation": True, "secure-range": 64.0},
        {"secure-aggregation": True, "buffers": "private", "codec-down": "low-rank:rank=2"},
        {"max-update-norm": 1000.0, "buffers": "frozen"},
    ],
)
def test_flower_ends_with_the_bits_of_the_plain_loop(config: dict[str, Any], more: dict[str, Any]) -> None:
    config |= {"model": "tiny_resnet", **more}
    plain, flower = run_loop(settings_of(config, "-plain")), in_process(settings_of(config, "-flower"))
    assert same(final(plain.directory), final(flower.directory))
    told = [
        {(line["round"], line["task"]): line["test"] for line in read_metrics(run.directory) if "test" in line}
        for run in (plain, flower)
    ]
    assert told[0] == told[1]


def test_a_sum_of_secure_aggregation_is_the_mean_that_is_seen_one_by_one(config: dict[str, Any]) -> None:
    secure = {"secure_aggregation": True, "secure_range": 64.0}
    seen, summed = (run_loop(settings_of(config, name, model="tiny_resnet", rounds=1, **more))
                    for name, more in (("-seen", {}), ("-summed", secure)))  # fmt: skip
    size = seen.layout.size
    torch.testing.assert_close(seen.base[size:], summed.base[size:], rtol=1e-6, atol=summed.settings.ring.step)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, np.float32), r"float32\[3\] where float32\[4\] was expected: 'buffers'"),
        (np.zeros(4, np.float64), r"float64\[4\] where float32\[4\]"),
        (np.array([0, 0, np.nan, 0], np.float32), "not finite"),
        (np.array([-1, 0, 1, -1e-9], np.float32), "a variance below 0: bn.running_var"),
        (None, r"float32\[0\] where"),
    ],
)
def test_buffers_that_are_none_are_refused(array: np.ndarray | None, message: str) -> None:
    layout = Layout(("bn.running_mean", "bn.running_var"), ((2,), (2,)))
    with pytest.raises(ValueError, match=message):
        take_buffers({} if array is None else {"buffers": array}, layout)


def test_a_hostile_partys_buffers_are_left_out_of_the_round(config: dict[str, Any]) -> None:
    settings = settings_of(config, model="tiny_resnet", on_failure="skip")
    parties = [Party(settings, task) for task in settings.task_names]
    run = Run(settings)
    current = ServerRound(run)
    for number, party in enumerate(parties):
        update = party.train(run.base, 1)
        assert update.arrays is not None
        if not number:
            update.arrays["buffers"] = update.arrays["buffers"] + np.float32(1e6)
        current.add(party.client, update, 0)
    assert list(current.out_of_proportion()) == [parties[0].client]
    assert "of its buffers" in current.out_of_proportion()[parties[0].client]
    run.close()


def test_a_sum_with_a_variance_below_zero_ends_the_round(config: dict[str, Any]) -> None:
    settings = settings_of(config, model="tiny_resnet", secure_aggregation=True, secure_range=64.0)
    run = Run(settings)
    current = ServerRound(run)
    for task in settings.task_names:
        party = Party(settings, task)
        update = party.train(run.base, 1)
        assert update.arrays is not None
        update.arrays["words"][-16:] = settings.ring.encode(torch.full((16,), -1.0))
        current.add(party.client, update, 0)
    with pytest.raises(RunError, match=r"the sum of 3 vectors is refused.*a variance below 0: vit.layer4.0.downsample"):
        current.check_sum()
    run.close()


@given(st.lists(st.lists(st.floats(0, 2.0**20, width=32), min_size=4, max_size=4), min_size=1, max_size=6))
def test_a_mean_of_variances_is_never_below_zero(rows: list[list[float]]) -> None:
    from atm_fl.federation.aggregation import mean

    layout = Layout(("bn.running_var",), ((4,),))
    check_buffers(mean([torch.tensor(row) for row in rows], [1.0] * len(rows)), layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "tiny", "buffers": "private"}, "buffers='private': model='tiny' has no such buffers"),
        ({"model": "tiny", "buffers": "frozen"}, "buffers='frozen': model='tiny' has no such buffers"),
        ({"privacy": "dp-sgd", "dp-noise": 1.0}, "the BatchNorm 'vit.bn1' of model='tiny_resnet' mixes the records"),
        ({"privacy": "clip-only", "buffers": "private"}, "BatchNorm 'vit.bn1'.*choose buffers='frozen'"),
        ({"model": "counting", "privacy": "clip-only"}, "model='counting' measures its records"),
        ({"dp-client-clip": 1.0}, "dp-client-clip=1: the buffers of .*'frozen' or 'private'"),
        ({"merge": "median"}, "merge='median': a bad party would have the mean of the buffers"),
        ({"gradient-checkpointing": True}, "would measure every batch twice"),
        ({"buffers": "median"}, "buffers='median': it takes one of mean, private, frozen"),
    ],
)
def test_what_cannot_go_with_buffers_is_said_at_both_ends(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    config |= {"model": "tiny_resnet", **change}
    for begin in (Run, lambda settings: Party(settings, settings.task_names[0])):
        shutil.rmtree(Path(config["run-dir"]), ignore_errors=True)
        with pytest.raises(SettingError, match=message):
            begin(Settings.parse(config))


def test_frozen_statistics_go_with_dp_sgd(config: dict[str, Any]) -> None:
    run = run_loop(settings_of(config, model="tiny_resnet", buffers="frozen", privacy="dp-sgd", dp_noise=1.0, rounds=1))
    assert not torch.equal(run.base, run.layout.flatten(models.load_backbone("tiny_resnet")))


def test_joint_training_keeps_what_it_measured(config: dict[str, Any]) -> None:
    settings = settings_of(config, model="tiny_resnet", rounds=1)
    run_joint(settings)
    before = Buffers(models.load_backbone("tiny_resnet")).state()
    after = final(settings.run_dir)
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_every_buffer_comes_back_even_one_that_grew() -> None:
    module = Counting()
    buffers = Buffers(module)
    before = {name: value.clone() for name, value in module.named_buffers()}
    module.train()(torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8))
    assert not same(dict(module.named_buffers()), before)
    buffers.reset()
    assert same(dict(module.named_buffers()), before)
