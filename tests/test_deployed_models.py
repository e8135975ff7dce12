"""Models with BatchNorm and of texts over the deployment runtime: real processes, TLS and SuperNodes on loopback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_folder
from federation import Federation, final, same
from test_text_models import folders as text_models  # noqa: F401 (a fixture)
from test_texts import ROWS, write

from atm_fl.federation.loop import run_loop
from atm_fl.settings import Settings

NAMES = ("red", "green")
Made = tuple[list[str], dict[str, Any]]
"""Two parties' folders, and a run's settings."""


def of_images(root: Path, buffers: str) -> Made:
    """timm's smallest ResNet with BatchNorm, of random weights."""
    folders = [str(make_folder(root / name, seed, classes=2, images=6)) for seed, name in enumerate(NAMES)]
    return folders, {"model": "timm/resnet10t", "weights": "random", "buffers": buffers, "batch-size": 4}


def of_texts(root: Path, weights: Path) -> Made:
    """A BERT of two layers, of random weights."""
    for name, more in zip(NAMES, (" a good text", " the bad text"), strict=True):
        rows = [(text + more, label) for text, label in ROWS]
        for split, part in (("train", rows[::2]), ("val", rows[1::4]), ("test", rows[3::4])):
            write(root / name / f"{split}.csv", part)
    folders = [str(root / name) for name in NAMES]
    return folders, {"model": "transformers/tiny", "weights": str(weights), "batch-size": 16, "learning-rate": 0.01}


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [lambda root, _: of_images(root, "mean"), lambda root, _: of_images(root, "private"), of_texts],
    ids=["BatchNorm", "private BatchNorm", "texts"],
)
def test_a_deployed_run_ends_with_the_bits_of_the_plain_loop(
    made: Callable[[Path, Path], Made],
    text_models: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    folders, chosen = made(tmp_path / "data", text_models["bert"])
    config = {"tasks": ",".join(folders), "rounds": 2, "device": "cpu", **chosen}
    federation = Federation(tmp_path / "f", folders)
    try:
        federation.start()
        run = federation.run(config | {"run-dir": str(tmp_path / "run")})
        assert run.finish() == ""
    finally:
        federation.stop()
    plain = run_loop(Settings.parse(config | {"run-dir": str(tmp_path / "plain")}))
    assert same(final(run.directory), final(plain.directory))
    moved = final(run.directory).keys()
    assert any("running_var" in name for name in moved) == (chosen.get("buffers") == "mean")
