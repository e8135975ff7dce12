"""The first base of a run: the pretrained model, or what the setting `start` names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from atm_fl import vectors
from atm_fl.errors import SettingError
from atm_fl.models.loading import Fitted, dropped, fit
from atm_fl.runs.checkpoints import whole_checkpoint
from atm_fl.settings import Settings, defaults, stored
from atm_fl.vectors.model_files import checkpoints, few

PRETRAINED = "pretrained"


def first_base(settings: Settings, module: nn.Module, layout: vectors.Layout, warn: Callable[[str], object]) -> Tensor:
    """The first base, float32 [n], of a run whose pretrained model is `module` and tunes the entries of `layout`.

    `start` is a run's folder (its newest whole checkpoint) or any file of weights that models.loading reads. What a
    run did not tune is the pretrained model's, in this one as in that one; `warn` is told.

    SettingError if the file is of another model, or if what this run does not tune is other than the pretrained's: a
    base has what is tuned alone, and all else is the pretrained model's at every party.
    """
    if settings.start == PRETRAINED:
        return layout.flatten(module)
    path = Path(settings.start)
    if checkpoints(path):
        path = whole_checkpoint(path, warn)[0]
    state = module.state_dict()
    found = fit(path, state, "start")
    lacking = [name for name in layout.names if name in found.missing]
    if lacking and not found.partial:
        raise SettingError(
            f"start={settings.start!r} lacks {len(lacking)} of the {len(layout.names)} entries that are tuned: "
            f"{few(lacking)}"
        )
    if lacking:
        _check_pretrained(settings, path)
        warn(f"start={settings.start!r} tuned {len(found.tensors)} entries; {len(lacking)} are the pretrained model's")
    _check_frozen(settings, found, state, layout)
    for text in dropped("start", settings.start, found):
        warn(text)
    return torch.cat([found.tensors.get(name, state[name]).detach().float().reshape(-1) for name in layout.names])


def _check_pretrained(settings: Settings, checkpoint: Path) -> None:
    """SettingError if the run of a checkpoint had another pretrained model, which has the entries that it lacks."""
    config = checkpoint.parents[1] / "config.json"
    if not config.is_file():
        return
    theirs, ours = defaults() | stored(json.loads(config.read_text())["settings"]), settings.as_config()
    for key in ("model", "weights"):
        if theirs[key] != ours[key]:
            raise SettingError(
                f"start={settings.start!r} is a run with {key}={theirs[key]!r}, not {ours[key]!r}, and has only "
                f"what it tuned; choose its {key}"
            )


def _check_frozen(settings: Settings, found: Fitted, state: dict[str, Tensor], layout: vectors.Layout) -> None:
    """SettingError if an entry that is not tuned has other values than the pretrained model's."""
    tuned = set(layout.names)
    other = [
        name
        for name, tensor in found.tensors.items()
        if name not in tuned and not torch.equal(state[name].to(tensor.dtype), tensor)
    ]
    if other:
        kept = f"or private={settings.private!r} keeps at the parties " if settings.private else ""
        fix = "private=''" if settings.private else "trainable='all'"
        raise SettingError(
            f"start={settings.start!r}: {len(other)} entries that trainable={settings.trainable!r} does not tune "
            f"{kept}differ from the pretrained model's, which every party has: {few(other)}; give all parties the file "
            f"as weights, or choose {fix}"
        )
