"""`export`: a folder out of a run's directory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atm_fl.errors import SettingError, did_you_mean
from atm_fl.exports.card import card
from atm_fl.exports.formats import FORMATS, Format
from atm_fl.federation.client_state import ClientState
from atm_fl.models import KINDS, Backbone, Clip, TextModel, both_towers, load_library_model
from atm_fl.models.trainable import set_trainable, shared_and_private
from atm_fl.runs.checkpoints import rounds_of, whole_checkpoint
from atm_fl.runs.report import Record
from atm_fl.runs.start import first_base
from atm_fl.settings import Settings
from atm_fl.tasks.texts import token_table
from atm_fl.vectors import Layout
from atm_fl.vectors.model_files import checkpoints

ABOUT = "atm-fl.json"
HEADS = "heads.safetensors"
LAST = 10**5
"""A round after every other: what is kept in five digits."""


@dataclass(frozen=True)
class Export:
    """What was written: the folder, the round whose model it is, the tasks whose heads are in it, and what to say."""

    folder: Path
    round: int
    heads: tuple[str, ...]
    notes: tuple[str, ...]


def export(
    run: str | Path, to: str = "safetensors", out: str | Path = "export", round: int | None = None,
    heads: Collection[str] | None = None, party: str | None = None,
) -> Export:  # fmt: skip
    """Write the model of a run's directory to the new folder `out`, as the format `to`, with its model card.

    round: of whose checkpoint; by default the newest, 0 is the first base. heads: the clients whose heads, which this
    machine keeps, go into the folder; by default all that it keeps. They are made of private data: hand on a folder
    with heads only as their parties would.

    party: of a run with `private` entries, the client whose own go into the model, and whose head alone can; by default
    the only one of which this machine keeps some, "none" for the pretrained ones. They are as private as heads, and no
    DP-SGD covers them.

    SettingError if there is no such run, round, format, head or party, if `out` is there already, or if the library has
    no such model: what was written is loaded again by it, and has to give the same features.
    """
    directory, folder = Path(run), Path(out)
    if folder.exists():
        raise SettingError(f"out={str(out)!r} is there already; a folder is not written over")
    chosen = FORMATS.find(to, f"to={to!r}")()
    record, settings = Record.read(directory), settings_of(directory)
    notes: list[str] = []
    owner = owner_of(record.config["run"], settings, party)
    number, model = model_of(directory, round, notes, owner)
    held = _heads(record.config["run"], settings, heads, owner)
    about = {"format": to, "model": settings.model, "image_size": model.image_size}
    if isinstance(model, Backbone):
        about |= {"mean": _listed(model.mean), "std": _listed(model.std)}
    about |= {"run": record.config["run"], "round": number}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        chosen.write(model, settings, unfinished)
        _check(chosen, model, unfinished, about, to)
        (unfinished / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        if held:
            _write_heads(unfinished / HEADS, held)
        classes = {task: names for task, (_, names) in held.items()}
        (unfinished / "README.md").write_text(card(record, number, folder.name, chosen, model, classes, owner))
        os.replace(unfinished, folder)
    return Export(folder, number, tuple(held), tuple(notes))


def settings_of(directory: Path) -> Settings:
    """The settings of a run's directory. SettingError if it is none, or a plugin is not here that it needs."""
    values = dict(Record.read(directory).settings)
    return Settings.parse(values | {"run-dir": str(directory), "resume": False})


def owner_of(run: str, settings: Settings, party: str | None) -> str:
    """The client whose private entries make the model whole; "" for the pretrained ones, or where none are private.

    SettingError if the run has no such client, or if it is to be named and is not.
    """
    if not settings.private:
        if party not in (None, "none"):
            raise SettingError(f"party={party!r}: the run has no private entries; leave it out")
        return ""
    if party not in (None, "none", *settings.party_names):
        raise SettingError(f"party={party!r} is not of this run{did_you_mean(str(party), settings.party_names)}")
    if party is not None:
        return "" if party == "none" else party
    kept = [client for client in settings.party_names if ClientState(run, client).last("private", LAST)]
    if len(kept) > 1:
        raise SettingError(
            f"party: private={settings.private!r} makes each party's model its own, and this machine keeps those of "
            f"{', '.join(kept)}; name one, or none for the pretrained entries"
        )
    return kept[0] if kept else ""


def _own_entries(run: str, settings: Settings, owner: str, rounds: int) -> dict[str, Tensor]:
    """A party's private entries after so many rounds; none before its first. SettingError if they are not there."""
    state = ClientState(run, owner)
    kept = state.at("finished", rounds + 1) or state.last("private", rounds + 1)
    began = any(settings.part_taken(settings.task_of[owner], number) for number in range(1, rounds + 1))
    if kept is None and began:
        raise SettingError(
            f"party={owner!r}: this machine keeps no private entries of it after {rounds} rounds; it keeps those of as "
            "many of the last rounds as keep-checkpoints says, and of three at least"
        )
    return kept or {}


def model_of(directory: Path, round: int | None, notes: list[str], owner: str = "") -> tuple[int, Backbone | TextModel]:
    """(round, the model after it) of a run's directory, in evaluation mode. SettingError if it has no such checkpoint.

    notes: what there is to say is appended. owner: see `owner_of`.
    """
    settings, run = settings_of(directory), Record.read(directory).config["run"]
    model = load_library_model(settings.model, settings.weights)
    if settings.private and not owner:
        notes.append(f"private={settings.private!r}: these entries are the pretrained model's, no party's own")
    if round == 0:
        set_trainable(model, settings.trainable)
        layout, _ = shared_and_private(model, settings.private)
        return 0, _loaded(model, layout.views(first_base(settings, model, layout, notes.append)))
    there = [rounds_of(path) for path in checkpoints(directory)]
    if round is not None and round not in there:
        raise SettingError(
            f"round={round}: {directory} has no checkpoint after so many rounds; there are "
            f"{', '.join(map(str, [0, *there]))}"
        )
    path, about, base, _ = whole_checkpoint(directory, notes.append, round or 0)
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    names = [name for name in shapes if name in model.state_dict()]
    layout = Layout(tuple(names), tuple(shapes[name] for name in names))
    number = int(about["rounds"])
    own = _own_entries(run, settings, owner, number) if owner else {}
    return number, _loaded(model, layout.views(base) | own)


def _loaded(model: Backbone | TextModel, values: dict[str, Tensor]) -> Backbone | TextModel:
    state = model.state_dict()
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    return model.eval()


def _listed(values: Tensor) -> list[float]:
    """Three channels of values in 0..255."""
    return [float(value) for value in values.flatten().expand(3)]


def _check(chosen: Format, model: Backbone | TextModel, folder: Path, about: dict[str, Any], to: str) -> None:
    """SettingError unless the library's own loader gives a model that makes of inputs what `model` makes of them."""
    read = chosen.read(folder, about)
    if read is None:
        return
    random = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        if isinstance(model, Clip):
            again = both_towers(read.eval(), model.tokenizer.library)
            images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=random)
            texts = torch.from_numpy(token_table(["a photo of a cat.", "2"], model.tokenizer))
            expected, got = (torch.cat([each(images), each(texts)]) for each in (model, again))
        elif isinstance(model, Backbone):
            size = model.image_size
            images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=random)
            pixels = model.normalise(images)
            expected, got = model.vit(pixels), read.eval()(pixels)
        else:
            most = model.network.config.vocab_size + 1
            given = [torch.randint(1, most, each.shape, generator=random, dtype=each.dtype) for each in model.example()]
            expected, got = model(*given), read.eval()(*given)
    scale = float(expected.abs().max())
    if expected.shape != got.shape or not torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * scale):
        raise SettingError(
            f"to={to!r}: the library gives other features with these weights than the run's model {about['model']!r}; "
            "choose another format"
        )


def _heads(
    run: str, settings: Settings, wanted: Collection[str] | None, owner: str
) -> dict[str, tuple[dict[str, Tensor], tuple[str, ...]]]:
    """Client → (its head's tensors, its classes) of those that this machine keeps of a run."""
    held = {client: head for client in settings.party_names if (head := ClientState(run, client).head())}
    if settings.private:
        if wanted and (other := [client for client in wanted if client != owner]):
            raise SettingError(
                f"heads={','.join(wanted)!r}: {other[0]}'s goes with its own private entries; choose "
                f"party={other[0]!r} and its head alone"
            )
        held = {client: head for client, head in held.items() if client == owner}
    if wanted is None:
        return held
    if missing := [client for client in wanted if client not in held]:
        raise SettingError(
            f"heads={','.join(wanted)!r}: this machine keeps no head of {missing[0]!r}; it keeps "
            f"{', '.join(held) or 'none of this run'}"
        )
    return {client: held[client] for client in wanted}


def _write_heads(path: Path, held: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]]) -> None:
    tensors = {f"{client}.{name}": value for client, (head, _) in held.items() for name, value in head.items()}
    classes = {client: list(names) for client, (_, names) in held.items()}
    save_file(tensors, path, {"classes": json.dumps(classes)})


def read_heads(path: Path) -> dict[str, tuple[dict[str, Tensor], tuple[str, ...]]]:
    """What `_write_heads` wrote; empty if there is no such file."""
    if not path.is_file():
        return {}
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        classes = json.loads((file.metadata() or {})["classes"])
    tensors = load_file(path)
    held = {}
    for client, names in classes.items():
        parts = next(kind.parts for kind in KINDS if f"{client}.{kind.parts[0]}" in tensors)
        held[client] = ({name: tensors[f"{client}.{name}"] for name in parts}, tuple(names))
    return held
