"""A tiny backbone and two tiny tasks on disk, so that whole runs take a second."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import settings as hypothesis_settings
from PIL import Image
from timm.models.resnet import BasicBlock, ResNet

from atm_fl import models, plugins, tasks
from atm_fl.settings import Settings
from atm_fl.tasks import Source

# A slow machine is no failure: no test has a deadline.
hypothesis_settings.register_profile("without deadlines", deadline=None)
hypothesis_settings.load_profile("without deadlines")


@models.backbone("tiny")
def tiny() -> models.Backbone:
    """5 tokens, one block of width 16."""
    return models.Backbone(models.vit(32, 16, 16, 1, 2), 32)


@models.backbone("tiny_resnet")
def tiny_resnet() -> models.Backbone:
    """Four stages of one block, BatchNorm after every convolution.

    Of 16 channels: with 4, and images in channels-last order, the backward pass of torch 2.14's oneDNN writes past the
    end of its memory, without any code of this project.
    """
    return models.Backbone(ResNet(BasicBlock, (1, 1, 1, 1), channels=(16,) * 4, stem_width=16, num_classes=0), 32)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of a developer's cache decides a test; built tasks are shared by the tests of one session."""
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("ATM_FL_CACHE", str(base))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def report() -> None:
    """In this test runs write their reports."""


@pytest.fixture(autouse=True)
def _without_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process draw no report, which takes four fifths of a tiny run, unless a test asks for `report`."""
    if "report" not in request.fixturenames:
        for module in ("atm_fl.federation.loop", "atm_fl.server.app"):
            monkeypatch.setattr(f"{module}.write_report", lambda directory: directory / "report.html")


def make_folder(root: Path, seed: int, classes: int = 3, images: int = 12) -> Path:
    """A folder task whose classes differ in colour: `images` a class to train on, a third of that in val and test."""
    random = np.random.default_rng(seed)
    colours = random.normal(128, 12, (classes, 3))
    for split, count in (("train", images), ("val", images // 3), ("test", images // 3)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = (colours[label] + random.normal(0, 60, (16, 16, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Three folder tasks."""
    return [str(make_folder(tmp_path / "data" / name, seed)) for seed, name in enumerate(("red", "green", "blue"))]


@pytest.fixture
def config(folders: list[str], tmp_path: Path) -> dict[str, Any]:
    """A run config of three rounds on the tiny tasks."""
    return {
        "tasks": ",".join(folders),
        "model": "tiny",
        "rounds": 3,
        "batch-size": 8,
        "learning-rate": 1e-3,
        "run-dir": str(tmp_path / "run"),
    }


def make_clip(folder: Path) -> str:
    """A tiny CLIP in open_clip's registry: two blocks of width 64, 16 features. Returns the model's name."""
    towers = {
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    file = folder / "ViT-tiny-test.json"
    file.write_text(json.dumps({"embed_dim": 16, **towers}))
    open_clip.add_model_config(file)
    return "open_clip/ViT-tiny-test"


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """The name of a tiny CLIP."""
    return make_clip(tmp_path)


@pytest.fixture
def settings(config: dict[str, Any]) -> Settings:
    return Settings.parse(config)


@pytest.fixture
def noise() -> Iterator[str]:
    """An embedded task of noise with meaningless labels: what is right on it can only have been learnt by heart."""

    def build() -> Source:
        random = np.random.default_rng(0)
        return Source(
            random.integers(0, 256, (340, 32, 32, 3), dtype=np.uint8), random.integers(0, 3, 340), list("abc")
        )

    tasks.TASKS["noise"] = tasks.Embedded("noise", "CC0", "a test", build)
    yield "noise"
    tasks.TASKS.pop("noise")


PluginFiles = Callable[..., Path]


@pytest.fixture
def plugin_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginFiles]:
    """Write files, by name, into a folder that ATM_FL_PLUGINS names for the test."""

    def write(**files: str) -> Path:
        home = tmp_path / "plugins"
        home.mkdir(exist_ok=True)
        for name, text in files.items():
            (home / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.setenv(plugins.VARIABLE, str(home))
        return home

    yield write
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    plugins.load()
