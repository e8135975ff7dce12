"""Which entries of a base are merged with which of the fine-tuned models, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from atm_fl.errors import SettingError
from atm_fl.merging.checkpoint_lora import Adapter
from atm_fl.vectors import Layout
from atm_fl.vectors.model_files import Checkpoint, Reader, Zero, few
from atm_fl.vectors.tensor_files import bits

INPUTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
"""Ends of the names of embeddings of words, which `tie_word_embeddings` ties."""
OUTPUTS = ("lm_head.weight", "embed_out.weight", "decoder.weight")
"""Ends of the names that it ties to them."""
HEADS = ("classifier", "head", "heads", "fc", "score", "classification_head")
"""Modules that are classifiers, as Hugging Face, timm and torchvision name them."""


@dataclass(frozen=True)
class Plan:
    """What becomes of each entry of the base.

    layout: what is merged; a shape has fewer rows than the base's where files have fewer (`rows="common"`).
    readers: of each file, the entries of the layout in its order.
    tied: name → the name in the layout that it has the values of.
    kept: name → why it stays as it is in the base.
    """

    layout: Layout
    readers: list[list[Reader]]
    tied: dict[str, str]
    kept: dict[str, str]


def make_plan(
    base: Checkpoint,
    files: Sequence[Checkpoint],
    warn: Callable[[str], object],
    *,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rows: str = "same",
) -> Plan:
    """Find the entries to merge: floats that match a pattern of `only` (if there are any) and none of `exclude`, and
    that every file has; of adapters, those that any changes.

    rows: "same", or "common": of entries that differ in their first dimension alone the rows that all have are merged.
    warn: is told of all that is different.

    SettingError if an entry does not fit, a pattern matches nothing, or a file is of another model.
    """
    for key, patterns in (("only", only), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in base.entries):
                raise SettingError(
                    f"{key}={pattern!r} matches no entry of the base, whose first are {few(list(base.entries))}; "
                    "* stands for any text"
                )
    if rows not in ("same", "common"):
        raise SettingError(f"rows={rows!r}: it is 'same' or 'common'")

    def why_not(name: str) -> str:
        if only and not any(fnmatchcase(name, pattern) for pattern in only):
            return "not among --only"
        return next((f"--exclude {pattern}" for pattern in exclude if fnmatchcase(name, pattern)), "")

    kept = {name: reason for name in base.entries if (reason := why_not(name))}
    wanted = [name for name in base.entries if name not in kept]
    aliases = base_aliases(base, [name for name in wanted if base.is_float(name)])
    for file in files:
        file.named_as(base)
    names = [
        {name: file_name for name in wanted if (file_name := own_name(base, file, name, aliases))} for file in files
    ]
    for file, known in zip(files, names, strict=True):
        check_file(base, file, known, rows)
        tell_differences(base, file, known, wanted, warn)
    complete = [known for file, known in zip(files, names, strict=True) if not isinstance(file, Adapter)]
    for name in wanted:
        if not base.is_float(name):
            kept[name] = "no float"
        elif any(name not in known for known in complete):
            kept[name] = (
                f"not in {few([str(f.path) for f, known in zip(files, names, strict=True) if name not in known])}"
            )
        elif not complete and all(name not in known for known in names):
            kept[name] = "no adapter changes it"
    merged = [name for name in wanted if name not in kept]
    tied = tied_names(base, files, names, merged, aliases)
    if tied:
        pairs = [f"{name} = {first}" for name, first in tied.items()]
        warn(f"{len(tied)} tied, merged once and written under every name: {few(pairs)}")
    merged = [name for name in merged if name not in tied]
    check_heads(base, files, merged, warn)
    readers: list[list[Reader]] = [
        [file.reader(known[name]) if name in known else Zero() for name in merged]
        for file, known in zip(files, names, strict=True)
    ]
    shapes = []
    for name in merged:
        shape = base.shape(name)
        having = [file.shape(known[name]) for file, known in zip(files, names, strict=True) if name in known]
        least = min([shape, *having], key=lambda each: each[:1])
        if least != shape:
            warn(
                f"{name}: its first {least[0]} of {shape[0]} rows are merged, which all have; the others are the base's"
            )
        shapes.append(least)
    return Plan(Layout(tuple(merged), tuple(shapes)), readers, tied, kept)


def own_name(base: Checkpoint, file: Checkpoint, name: str, aliases: dict[str, set[str]]) -> str | None:
    """The name that a file has for the base's entry: its own, or that of what it is tied to in the base."""
    if name in file.entries:
        return name
    tied = [each for each in file.entries if each in aliases.get(name, ())]
    if not tied and ties_words(base) and base.is_float(name):
        ends = OUTPUTS if name.endswith(INPUTS) else INPUTS if name.endswith(OUTPUTS) else ()
        tied = [each for each in file.entries if ends and each.endswith(ends) and each not in base.entries]
    return tied[0] if tied and file.shape(tied[0]) == base.shape(name) else None


def ties_words(base: Checkpoint) -> bool:
    """Whether the base's config ties its output to its embeddings."""
    return any(
        chunk.get("tie_word_embeddings") is True for chunk in (base.config, base.config.get("text_config") or {})
    )


def base_aliases(base: Checkpoint, names: Sequence[str]) -> dict[str, set[str]]:
    """name → the others that are the same entry: equal bits and shape in the base, or tied by its config.

    Entries of a single value are none of them: biases of zeros are equal, but nothing ties them.
    """
    groups: dict[object, list[list[str]]] = {}
    for name in names:
        flat = base.read(name).reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)]
        if bool((sample == sample[:1]).all()):
            continue
        alike = groups.setdefault((flat.dtype, base.shape(name), bits(sample.clone()).numpy().tobytes()), [])
        for group in alike:
            if torch.equal(bits(base.read(group[0])), bits(base.read(name))):
                group.append(name)
                break
        else:
            alike.append([name])
    tied = [group for alike in groups.values() for group in alike if len(group) > 1]
    if ties_words(base):
        words = [name for name in names if name.endswith(INPUTS)]
        outputs = [name for name in names if name.endswith(OUTPUTS)]
        tied += [[word, out] for word in words for out in outputs if base.shape(word) == base.shape(out)]
    aliases: dict[str, set[str]] = {}
    for group in tied:
        for name in group:
            aliases.setdefault(name, set()).update(other for other in group if other != name)
    return aliases


def tied_names(
    base: Checkpoint,
    files: Sequence[Checkpoint],
    names: Sequence[dict[str, str]],
    merged: Sequence[str],
    aliases: dict[str, set[str]],
) -> dict[str, str]:
    """Aliases in the base that no file has set free: name → the first of them, whose values it gets."""
    tied: dict[str, str] = {}
    for number, name in enumerate(merged):
        for first in merged[:number]:
            if first in tied or first not in aliases.get(name, ()):
                continue
            pairs = [(file, known.get(first), known.get(name)) for file, known in zip(files, names, strict=True)]
            if all(one == other or same_bits(file, one, other) for file, one, other in pairs):
                tied[name] = first
                break
    return tied


def same_bits(file: Checkpoint, one: str | None, other: str | None) -> bool:
    """Whether a file has the same values under two names."""
    if one is None or other is None or isinstance(file, Adapter):
        return False
    return torch.equal(bits(file.read(one)), bits(file.read(other)))


def check_file(base: Checkpoint, file: Checkpoint, known: dict[str, str], rows: str) -> None:
    """SettingError if the file is of another model, or an entry's shape or kind is another than in the base."""
    matching = [name for name in file.entries if name in base.entries] + [
        file_name for name, file_name in known.items() if file_name != name
    ]
    if 2 * len(set(matching)) < len(file.entries) or not matching:
        strange = [name for name in file.entries if name not in base.entries]
        raise SettingError(
            f"{file.path}: {len(strange)} of its {len(file.entries)} names are not in the base, so it has no "
            f"floating-point tensor in common or is of another model; the base has {few(list(base.entries))}, "
            f"it has {few(strange)}{_prefix_hint(base, strange)}"
        )
    for name, file_name in known.items():
        ours, theirs = base.shape(name), file.shape(file_name)
        if ours != theirs and not (rows == "common" and ours[1:] == theirs[1:] and len(ours) == len(theirs) > 0):
            longer = len(ours) == len(theirs) > 0 and ours[1:] == theirs[1:]
            hint = "--rows common merges the rows that all have, " * longer
            raise SettingError(
                f"{file.path}: {file_name} has the shape {list(theirs)}, in the base {list(ours)}; {hint}"
                f"--exclude {name!r} leaves it out"
            )
        if file.is_float(file_name) != base.is_float(name):
            kinds = [one.entries[each].dtype for one, each in ((file, file_name), (base, name))]
            raise SettingError(f"{file.path}: {name} is {kinds[0]}, in the base {kinds[1]}")


def _prefix_hint(base: Checkpoint, strange: Sequence[str]) -> str:
    """A prefix that most of the names would have to lose, or get, to be the base's."""
    for prefix in ("module.", "_orig_mod.", "model.", "base_model.model.", "transformer."):
        if 2 * sum(name.removeprefix(prefix) in base.entries for name in strange) > len(strange):
            return f"; without the prefix {prefix!r} they would match: rename them"
        if 2 * sum(prefix + name in base.entries for name in strange) > len(strange):
            return f"; with the prefix {prefix!r} they would match: rename them"
    return ""


def tell_differences(
    base: Checkpoint,
    file: Checkpoint,
    known: dict[str, str],
    wanted: Sequence[str],
    warn: Callable[[str], object],
) -> None:
    """Warn of what a file lacks, has beside the base, or has otherwise without being a float."""
    extra = [name for name in file.entries if name not in base.entries and name not in known.values()]
    missing = [name for name in wanted if base.is_float(name) and name not in known]
    different = [
        name
        for name, file_name in known.items()
        if not base.is_float(name)
        and (
            file.shape(file_name) != base.shape(name)
            or not torch.equal(bits(file.read(file_name)), bits(base.read(name)))
        )
    ]
    if missing and not isinstance(file, Adapter):
        warn(f"{file.path} lacks {len(missing)} that stay as in the base for all: {few(missing)}")
    if extra:
        warn(f"{file.path} has {len(extra)} that the base lacks and that are left out: {few(extra)}")
    if different:
        warn(f"{file.path} has {len(different)} that are no floats and differ from the base's: {few(different)}")


def check_heads(
    base: Checkpoint, files: Sequence[Checkpoint], merged: Sequence[str], warn: Callable[[str], object]
) -> None:
    """Classifiers of different tasks have no mean. SettingError if configs say that they are; else `warn` of them."""
    heads = [name for name in merged if set(name.split(".")[:-1]) & set(HEADS)]
    if not heads or len(files) < 2:
        return
    labels = {str(file.path): file.config["id2label"] for file in files if file.config.get("id2label")}
    different = [path for path, table in labels.items() if table != next(iter(labels.values()))]
    if different:
        raise SettingError(
            f"{few(heads)} are classifiers of different classes (id2label of {next(iter(labels))} and "
            f"{few(different)}), which have no mean; leave them out with --exclude {heads[0].rpartition('.')[0]}.*"
        )
    if len(labels) < len(files):
        warn(f"{few(heads)} are merged: if they classify for different tasks, leave them out with --exclude")
