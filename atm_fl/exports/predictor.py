"""Using an exported model: pictures or texts in, classes with probabilities out. It reads the folder and them alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from atm_fl.errors import SettingError
from atm_fl.exports.export import ABOUT, HEADS, read_heads
from atm_fl.exports.formats import FORMATS
from atm_fl.models import EVALUATION_BATCH, Backbone, Clip, TaskHead, TextModel, both_towers, restored
from atm_fl.tasks.images import decode
from atm_fl.tasks.texts import token_table


@dataclass(frozen=True)
class Prediction:
    """One picture's file or text under one task: its classes with their probabilities, the most probable first."""

    item: str
    task: str
    classes: dict[str, float]


class Predictor:
    """An exported folder with heads as a classifier.

    >>> classify = Predictor("export")
    >>> classify(["cat.png"], task="pets")[0].classes
    >>> Predictor("export of a model of texts")(texts=["It rains."])[0].classes

    SettingError if it is no such folder, or has no head.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not (folder / ABOUT).is_file():
            raise SettingError(f"{folder} is no export: it has no {ABOUT}; `atm-fl export` writes one")
        about = json.loads((folder / ABOUT).read_text())
        self.heads: dict[str, tuple[TaskHead, tuple[str, ...]]] = {
            task: (restored(tensors), classes) for task, (tensors, classes) in read_heads(folder / HEADS).items()
        }
        """Task → its head and its classes."""
        if not self.heads:
            raise SettingError(f"{folder} has no heads, which a party's export has: it gives features and no classes")
        module = FORMATS.find(about["format"], f"format={about['format']!r}")().read(folder, about)
        if module is None:
            raise SettingError(f"{folder} is a {about['format']}, no model; export the run as another format")
        from open_clip import get_tokenizer

        self.model: Backbone | TextModel
        if isinstance(module, TextModel):
            self.model = module.eval()
        elif about["model"].startswith("clip/"):
            self.model = both_towers(module, get_tokenizer(about["model"].removeprefix("clip/"))).eval()
        else:
            scale = [tuple(value / 255 for value in about[name]) for name in ("mean", "std")]
            self.model = Backbone(module, about["image_size"], *scale).eval()

    def __call__(
        self, images: Iterable[str | Path] = (), task: str | None = None, texts: Iterable[str] = ()
    ) -> list[Prediction]:
        """Each of the picture files, or of the texts, under `task`, or under every task that there is a head of."""
        return list(self.predict(images, task, texts))

    @torch.inference_mode()
    def predict(
        self, images: Iterable[str | Path] = (), task: str | None = None, texts: Iterable[str] = ()
    ) -> Iterator[Prediction]:
        """The same one after another: any number of them in the memory of one batch.

        SettingError if there is no such head, or the model does not read what it is given.
        """
        if task is not None and task not in self.heads:
            raise SettingError(f"task={task!r}: there is no such head; there are {', '.join(self.heads)}")
        tasks = [task] if task else list(self.heads)
        for items, read in ((iter(images), self._pictures), (iter(texts), self._texts)):
            while batch := [str(item) for item in islice(items, EVALUATION_BATCH)]:
                yield from self._classified(batch, read(batch), tasks)

    def _pictures(self, files: list[str]) -> Tensor:
        """uint8 [k, 3, s, s]."""
        if isinstance(self.model, TextModel):
            raise SettingError(f"{files[0]}: the model reads texts and no pictures; give --text")
        return torch.stack([decode(Path(file), self.model.image_size) for file in files])

    def _texts(self, texts: list[str]) -> Tensor:
        """int32 [k, l]."""
        if not isinstance(self.model, TextModel | Clip):
            raise SettingError(f"--text {texts[0]!r}: the model reads pictures and no texts; name files")
        return torch.from_numpy(token_table(texts, self.model.tokenizer))

    def _classified(self, batch: list[str], inputs: Tensor, tasks: list[str]) -> Iterator[Prediction]:
        for name in tasks:
            head, classes = self.heads[name]
            for item, row in zip(batch, head.logits(self.model, inputs).softmax(-1), strict=True):
                values, order = row.sort(descending=True, stable=True)
                ranked = {classes[place]: float(value) for place, value in zip(order.tolist(), values, strict=True)}
                yield Prediction(item, name, ranked)
