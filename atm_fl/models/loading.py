"""Weights from files: whatever shape people have them in, found by name in a module's own entries.

Read are the files of `vectors.model_files`: safetensors, shards, a `.pt` that holds tensors alone, a Hugging Face
folder, a run's checkpoints. Names may have another prefix (`module.`, `visual.` of a whole CLIP), and may be
transformers' own for a ViT, a DINOv2 or a CLIP: transformers_names.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from atm_fl.errors import SettingError
from atm_fl.models.transformers_names import converted
from atm_fl.vectors.model_files import Checkpoint, few

PREFIXES = 4
"""At most so many parts of a name before a model's own."""


def is_path(weights: str) -> bool:
    """Whether a setting's value is a file or folder that is here: a folder only if it is written with a slash."""
    path = Path(weights).expanduser()
    return path.is_file() or ("/" in weights and path.is_dir())


@dataclass(frozen=True)
class Fitted:
    """What a file has of the entries that were asked for.

    tensors: by the names that were asked for, with their shapes, in the file's dtypes. missing: those it lacks.
    unused: the file's own names of all else. partial: whether the file is a run's, which holds what the run tuned.
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    unused: list[str]
    partial: bool


def fit(path: Path, wanted: Mapping[str, Tensor], setting: str) -> Fitted:
    """Find the entries `wanted` (name → a tensor of its shape) in the file or folder `path`.

    setting: which names the file, for errors. SettingError if it cannot be read, is of another model (most of the names
    asked for match nothing, and it is no run's), or has an entry of another shape.
    """
    checkpoint = Checkpoint(path.expanduser())
    stored = {name: checkpoint.read(name) for name in checkpoint.entries}
    namings = [stored, converted(stored)]
    matches = [match_names(wanted, held) for held in namings]
    held, names = max(zip(namings, matches, strict=True), key=lambda pair: len(pair[1]))
    tensors = {name: held[theirs] for name, theirs in names.items()}
    missing = [name for name in wanted if name not in names]
    if not names or (2 * len(missing) > len(wanted) and not checkpoint.of_run):
        raise SettingError(
            f"{setting}={str(path)!r} is of another model: {len(missing)} of {len(wanted)} entries are not in it; the "
            f"model has {few(missing)}, the file has {few(list(stored))}"
        )
    if other := [name for name, tensor in tensors.items() if tensor.shape != wanted[name].shape]:
        first = other[0]
        raise SettingError(
            f"{setting}={str(path)!r} is of another model: {names[first]} has the shape {list(tensors[first].shape)}, "
            f"in the model it has {list(wanted[first].shape)}" + (f" ({few(other)})" if len(other) > 1 else "")
        )
    used = set(names.values())
    unused = [name for name in held if name not in used]
    if unused and checkpoint.of_run:
        raise SettingError(f"{setting}={str(path)!r} is a run of another model, which has no {few(unused)}")
    return Fitted(tensors, missing, unused, checkpoint.of_run)


def match_names(wanted: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, str]:
    """Name asked for → name in the file, by the one pair of prefixes under which most of them are equal.

    Those of equal shape count first. A model's own name may have a prefix too, of what wraps it.
    """
    prefixes: dict[str, list[str]] = {}
    for name in held:
        for prefix, rest in _splits(name):
            prefixes.setdefault(rest, []).append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for name, tensor in wanted.items():
        for ours, rest in _splits(name):
            for theirs in prefixes.get(rest, ()):
                votes[ours, theirs] += 1000 if held[theirs + rest].shape == tensor.shape else 1
    if not votes:
        return {}
    ours, theirs = max(votes, key=lambda pair: (votes[pair], -len(pair[0]) - len(pair[1])))
    pairs = {name: theirs + name.removeprefix(ours) for name in wanted if name.startswith(ours)}
    return {name: file_name for name, file_name in pairs.items() if file_name in held}


def _splits(name: str) -> list[tuple[str, str]]:
    """A name as (prefix, rest), from no prefix on."""
    parts = name.split(".")
    return [
        (".".join(parts[:count]) + "." if count else "", ".".join(parts[count:]))
        for count in range(min(PREFIXES, len(parts)))
    ]


def load_weights(module: nn.Module, weights: str) -> list[str]:
    """Load the file `weights` into all of the module's entries. Returns what is to be said of it, a sentence each.

    SettingError if one is missing: a run that tuned a part of the model has that part alone (`start` takes it).
    """
    wanted = module.state_dict()
    found = fit(Path(weights), wanted, "weights")
    if lacking := [name for name in found.missing if wanted[name].is_floating_point()]:
        advice = "; a run that tuned a part of a model can be the setting start" if found.partial else ""
        raise SettingError(
            f"weights={weights!r} lacks {len(lacking)} of the model's {len(wanted)} entries: {few(lacking)}{advice}"
        )
    with torch.no_grad():
        for name, tensor in found.tensors.items():
            wanted[name].copy_(tensor)
    return dropped("weights", weights, found)


def dropped(setting: str, path: str, found: Fitted) -> list[str]:
    """What is said of a file's entries that are no part of the model, as a classifier's; nothing if there are none."""
    if not found.unused:
        return []
    count = len(found.unused)
    return [f"{setting}={path!r}: {count} entries are no part of the model and are dropped: {few(found.unused)}"]
