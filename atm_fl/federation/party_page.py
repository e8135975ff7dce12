"""A party's own page: pictures of its test split, and what the merged model says of each.

Whoever makes it has the pictures: the party itself, or whoever simulates all parties. Nothing of it is part of the
protocol; a run's report, which its server writes, has numbers only.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from atm_fl import tasks
from atm_fl.errors import SettingError, did_you_mean
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.heads import kept_head
from atm_fl.federation.shared_model import shared_model
from atm_fl.files import atomic_write
from atm_fl.models import EVALUATION_BATCH
from atm_fl.runs import pages
from atm_fl.runs.checkpoints import load_checkpoint
from atm_fl.runs.report import Record
from atm_fl.settings import Settings

EXAMPLES = 12
"""Pictures spread evenly over the test split."""
MISTAKES = 6
"""Wrong answers of the highest probability."""
SIDE = 96
"""Pixels of a thumbnail's longer side."""


@dataclass(frozen=True)
class Answer:
    """One test picture, uint8 [3, h, w]: its class, the model's answer and its probability."""

    picture: Tensor
    label: str
    answer: str
    probability: float

    def html(self) -> str:
        """The thumbnail above its caption."""
        right = self.answer == self.label
        said = f"{self.answer}, {100 * self.probability:.0f} %" + ("" if right else f", not {self.label}")
        mark = "✓" if right else "✗"
        return (
            f'<figure class="{"right" if right else "wrong"}"><img alt="{escape(self.label)}" '
            f'src="data:image/png;base64,{_thumbnail(self.picture)}">'
            f"<figcaption>{mark} {escape(said)}</figcaption></figure>"
        )


def write_party_page(directory: Path, client: str, data: str = "") -> Path:
    """Write `party-CLIENT.html` into a run directory, readable by its owner alone. Returns its path.

    client: its name in the run. data: its task where this machine has it, by default as the run's settings name it.
    SettingError if there is no such party or no data; RunError if the run has no checkpoint.
    """
    record = Record.read(directory)
    settings = Settings.parse({**record.settings, "run-dir": str(directory)})
    if client not in settings.party_names:
        raise SettingError(f"--party {client!r} is not of this run{did_you_mean(client, settings.party_names)}")
    model = shared_model(settings.of_model())
    source = data or settings.task_names[settings.party_names.index(client)]
    tokenizer = getattr(model.module, "tokenizer", None)
    loaded = tasks.load(source, model.module.image_size, settings.workers, tokenizer)
    if loaded.test.of_texts:
        raise SettingError(f"--party {client!r}: its task is of texts, and the page of pictures; see `atm-fl predict`")
    dataset = replace(loaded, name=settings.task_of[client])
    head = kept_head(settings, dataset, model, dataset.name)
    warnings: list[str] = []
    rounds, base, _ = load_checkpoint(directory, model.base_layout, warnings.append)
    state = ClientState(record.config["run"], client)
    own: dict[str, Tensor] = {}
    for kind in settings.own_kinds:
        kept = state.last(kind, rounds + 1)
        if kept is None:
            warnings.append(
                f"This machine keeps no {kind} of {client}'s after {rounds} rounds; pretrained ones are shown."
            )
        own |= kept or {}
    model.load(base, own)
    examples, mistakes, right = _answers(model.module, head, dataset, settings.workers)
    count = len(dataset.test)
    counted = f"{right} of {count} test pictures of {client} ({100 * right / count:.1f} %)"
    parts = [
        f"<h1>{escape(client)}</h1>",
        f'<p class="lead">{escape(f"After {rounds} rounds the merged model is right on {counted}.")}</p>',
        "<p>These are the party's own pictures. The page is on this machine only; no run sends it.</p>",
        *(f"<p>{escape(text)}</p>" for text in warnings),
        f"<h2>Spread over the test split</h2>{_grid(examples)}",
    ]
    if mistakes:
        parts.append(f"<h2>Where it is surest and wrong</h2>{_grid(mistakes)}")
    path = directory / f"party-{client}.html"
    with atomic_write(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(pages.document(f"{client}: test pictures", parts), errors="replace")
    return path


@torch.inference_mode()
def _answers(model: Any, head: Any, dataset: tasks.Dataset, workers: int) -> tuple[list[Answer], list[Answer], int]:
    """(pictures spread over the test split, the surest mistakes, how many answers of all are right)."""
    test = dataset.test
    logits = [head.logits(model, images).cpu() for images, _ in test.batches(None, EVALUATION_BATCH, workers)]
    probabilities, answers = torch.cat(logits).softmax(-1).max(-1)
    labels = test.labels.cpu()
    wrong = (answers != labels).nonzero()[:, 0]
    surest = wrong[probabilities[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    spread = torch.linspace(0, len(test) - 1, min(EXAMPLES, len(test))).long()

    def shown(chosen: Tensor) -> list[Answer]:
        pictures = [picture for images, _ in test.take(chosen).batches() for picture in images]
        return [
            Answer(picture, dataset.classes[labels[n]], dataset.classes[answers[n]], float(probabilities[n]))
            for picture, n in zip(pictures, chosen.tolist(), strict=True)
        ]

    return shown(spread), shown(surest), len(test) - len(wrong)


def _grid(answers: Sequence[Answer]) -> str:
    return f'<div class="pictures">{"".join(answer.html() for answer in answers)}</div>'


def _thumbnail(picture: Tensor) -> str:
    """A picture uint8 [3, h, w] as a PNG in base64; large ones are brought to `SIDE` pixels."""
    image = Image.fromarray(picture.cpu().permute(1, 2, 0).numpy())
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
