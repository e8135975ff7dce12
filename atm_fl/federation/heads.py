"""A party's head: made once from its own data, and kept on its machine."""

from __future__ import annotations

import inspect
import json
from functools import cache

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atm_fl import models, tasks
from atm_fl.federation.shared_model import SharedModel
from atm_fl.files import atomic_write
from atm_fl.models.heads import answers_head, described, sentences_head
from atm_fl.models.hubs import zero_shot
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tasks import Dataset
from atm_fl.tasks.images import decoder

MAKERS = (models.prototypes, models.linear_probe, zero_shot, described, answers_head, sentences_head)


@cache
def _made_by() -> tuple[str, ...]:
    """The source of what makes heads: one that another version made is made anew."""
    return tuple(inspect.getsource(made) for made in (*models.KINDS, *MAKERS))


def kept_head(settings: Settings, data: Dataset, model: SharedModel, task: str) -> models.TaskHead:
    """The head of `task`, on the model's device; on disk it outlives rounds and restarts. It never leaves this machine.

    The model is left with its pretrained weights if the head is made here.
    """
    # A head out of the records that are tuned on would tell of them in every gradient, past any accountant.
    source = data.validation if settings.dp_sgd and settings.split == "train" else data.train
    seed = derive_seed(settings.seed, "head", task)
    made_by = [*_made_by()]
    if not isinstance(source.images, Tensor):
        made_by.append(decoder())
    machine = str(model.device), settings.threads, torch.__version__
    content = model.digest, data.classes, source.digests, settings.shots, seed
    named = settings.model, settings.weights, data.prompts()
    plugin = str(models.HEADS.plugin(settings.head) or "")
    key = derive_seed(settings.head, content, named, made_by, plugin, machine)
    path = tasks.cache_dir() / "heads" / f"{key:016x}.safetensors"
    if not path.exists():
        model.load(model.pretrained)
        made = models.HEADS[settings.head](
            models.HeadSource(
                model.module,
                source,
                data.classes,
                data.prompts(),
                settings.model,
                settings.weights,
                settings.shots,
                seed,
                settings.workers,
            )
        )
        with atomic_write(path, private=True) as temporary:
            save_file(made.state(), str(temporary), {"task": task, "classes": json.dumps(data.classes)})
    # Tensors out of a file are not aligned as torch's own are, and with that a product's last bits may differ.
    state = {name: tensor.clone() for name, tensor in load_file(str(path)).items()}
    return models.restored(state).to(model.device)
