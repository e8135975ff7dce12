"""Using an exported model: pictures in, classes with probabilities out. It reads the folder and the pictures alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from atm_fl.errors import SettingError
from atm_fl.exports.export import ABOUT, HEADS, read_heads
from atm_fl.exports.formats import FORMATS
from atm_fl.models import EVALUATION_BATCH, Backbone, Head
from atm_fl.tasks.images import decode


@dataclass(frozen=True)
class Prediction:
    """One picture under one task: its classes with their probabilities, the most probable first."""

    image: str
    task: str
    classes: dict[str, float]


class Predictor:
    """An exported folder with heads as a classifier.

    >>> classify = Predictor("export")
    >>> classify(["cat.png"], task="pets")[0].classes

    SettingError if it is no such folder, or has no head.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not (folder / ABOUT).is_file():
            raise SettingError(f"{folder} is no export: it has no {ABOUT}; `atm-fl export` writes one")
        about = json.loads((folder / ABOUT).read_text())
        self.heads: dict[str, tuple[Head, tuple[str, ...]]] = {
            task: (Head(**tensors), classes) for task, (tensors, classes) in read_heads(folder / HEADS).items()
        }
        """Task → its head and its classes."""
        if not self.heads:
            raise SettingError(f"{folder} has no heads, which a party's export has: it gives features and no classes")
        module = FORMATS.find(about["format"], f"format={about['format']!r}")().read(folder, about)
        if module is None:
            raise SettingError(f"{folder} is a {about['format']}, no model; export the run as another format")
        scale = [tuple(value / 255 for value in about[name]) for name in ("mean", "std")]
        self.model = Backbone(module, about["image_size"], *scale).eval()

    def __call__(self, images: Iterable[str | Path], task: str | None = None) -> list[Prediction]:
        """Each of the picture files under `task`, or under every task that there is a head of."""
        return list(self.predict(images, task))

    @torch.inference_mode()
    def predict(self, images: Iterable[str | Path], task: str | None = None) -> Iterator[Prediction]:
        """The same one after another: any number of pictures in the memory of one batch."""
        if task is not None and task not in self.heads:
            raise SettingError(f"task={task!r}: there is no such head; there are {', '.join(self.heads)}")
        tasks = [task] if task else list(self.heads)
        files = iter(images)
        while batch := [Path(file) for file in islice(files, EVALUATION_BATCH)]:
            pixels = torch.stack([decode(file, self.model.image_size) for file in batch])
            features = self.model(pixels)
            for name in tasks:
                head, classes = self.heads[name]
                for file, row in zip(batch, head(features).softmax(-1), strict=True):
                    values, order = row.sort(descending=True, stable=True)
                    ranked = {classes[place]: float(value) for place, value in zip(order.tolist(), values, strict=True)}
                    yield Prediction(str(file), name, ranked)
