"""Any folder of images as a task: `train/`, `val/` (or `validation/`) and `test/`, each with a folder a class."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atm_fl.errors import SettingError
from atm_fl.tasks import Dataset, Split
from atm_fl.tasks.pictures import formats, one_colour, read_pictures

FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
"""What a split's folder may be called."""

NO_DATA = {"__MACOSX", "@eaDir"}
"""Folders that systems leave behind, besides hidden ones."""


@dataclass
class Listing:
    """What is in a task's folder, before any picture is read.

    classes: their names; pictures: split → (file, label), sorted; passed_over: ending, "hidden" or "no file" → number
    of files that are no data; problems: what makes the folder no task, each a sentence with the fix.
    """

    root: Path
    classes: list[str] = field(default_factory=list)
    pictures: dict[str, list[tuple[Path, int]]] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def passed_over_told(self) -> str:
        """What is passed over, in words; "" if nothing is."""
        counts = ", ".join(f"{count} {ending}" for ending, count in sorted(self.passed_over.items()))
        return f"passed over as no pictures: {counts}" if counts else ""

    def told(self) -> str:
        """The same as a line that names the folder."""
        return f"{self.root}: {self.passed_over_told()}" if self.passed_over else ""


def list_folder(root: Path) -> Listing:
    """Look through a task's folder; what is wrong with it is among the listing's `problems`."""
    listing = Listing(root)
    if not root.is_dir():
        listing.problems.append(f"task folder {root} does not exist on this machine")
        return listing
    places: dict[str, Path] = {}
    for split, names in FOLDERS.items():
        there = [name for name in names if (root / name).is_dir()]
        if len(there) == 1:
            places[split] = root / there[0]
            continue
        wrong = f"both {' and '.join(there)}; keep one" if there else f"no folder {names[0]!r}"
        listing.problems.append(f"{root} has {wrong}; it needs train/, val/ and test/ with a folder a class")
    listing.classes = _class_folders(places["train"]) if "train" in places else []
    if "train" in places and len(listing.classes) < 2:
        listing.problems.append(
            f"{root / 'train'} has {len(listing.classes)} class folder(s); a task needs two classes or more"
        )
    for split, place in places.items():
        strangers = sorted(set(_class_folders(place)) - set(listing.classes)) if "train" in places else ()
        listing.problems += [f"{place} has a class {name!r} that {root / 'train'} has not" for name in strangers]
        for path in place.iterdir():  # beside the class folders, or in folders that are none
            if not path.is_dir() or _no_data(path.name):
                listing.passed_over.update(_kinds(path))
        pictures = listing.pictures[split] = []
        for label, name in enumerate(listing.classes):
            for file in sorted((place / name).rglob("*")):
                kind = _kind(file, place)
                if kind == "picture":
                    pictures.append((file, label))
                elif kind:
                    listing.passed_over[kind] += 1
        missing = sorted(set(range(len(listing.classes))) - {label for _, label in pictures})
        if missing and (split == "train" or len(missing) == len(listing.classes)):
            empty = missing if split == "train" else missing[:1]
            readable = ", ".join(sorted(formats()))
            listing.problems += [f"{place / listing.classes[label]} has no images ({readable})" for label in empty]
    return listing


def load_folder(root: Path, size: int, threads: int = 1) -> Dataset:
    """The data in `root`, resized to [n, 3, size, size]; `threads` decode. What is passed over is logged.

    SettingError names the folder or file that is wrong, or the split of which most pictures are of one and the same
    colour.
    """
    listing = list_folder(root)
    if listing.problems:
        raise SettingError(listing.problems[0])
    notes = [listing.told()]
    splits: dict[str, Any] = {}
    for split, pictures in listing.pictures.items():
        images = read_pictures((file for file, _ in pictures), size, threads)
        errors = [image for image in images if isinstance(image, SettingError)]
        if errors:
            more = f"; so are {len(errors) - 1} more: atm-fl tasks check {root}" if errors[1:] else ""
            raise SettingError(f"{errors[0]}{more}")
        colours = [image[:, 0, 0] if one_colour(image) else None for image in images]
        notes.append(blank_told([file for file, _ in pictures], colours, split))
        splits[split] = Split(torch.from_numpy(np.stack(images)), torch.tensor([label for _, label in pictures]))
    for note in filter(None, notes):
        logging.getLogger(__name__).warning("%s", note)
    return Dataset(root.name, tuple(listing.classes), splits["train"], splits["validation"], splits["test"])


def blank_told(files: list[Path], colours: list[np.ndarray | None], split: str) -> str:
    """A line on the pictures that show nothing, whose colours [3] are given (None: it shows something); "" if all do.

    SettingError if more than half of the split are of one and the same colour.
    """
    blank = {file: tuple(map(int, colour)) for file, colour in zip(files, colours, strict=True) if colour is not None}
    if not blank:
        return ""
    (colour, count), *_ = Counter(blank.values()).most_common(1)
    if 2 * count > len(files):
        raise SettingError(
            f"{count} of {len(files)} {split} pictures are nothing but the colour {colour}, the first is "
            f"{next(file for file, of in blank.items() if of == colour)}; save them with values that fill their range "
            "(docs/data.md)"
        )
    return f"{len(blank)} of {len(files)} {split} pictures are of one colour, the first is {next(iter(blank))}"


def _no_data(name: str) -> bool:
    return name.startswith(".") or name in NO_DATA


def _class_folders(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir() and not _no_data(path.name))


def _kinds(path: Path) -> Iterator[str]:
    """The kinds of a file, or of all files in a folder."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        kind = _kind(file, path.parent)
        if kind:
            yield "beside the class folders" if kind == "picture" else kind


def _kind(file: Path, place: Path) -> str:
    """ "picture", "" for a folder, or what a file in `place` is passed over as: "hidden", "no file" or its ending."""
    if file.is_dir():
        return ""
    if any(map(_no_data, file.relative_to(place).parts)):
        return "hidden"
    if file.exists() and not file.is_file():  # a pipe would be waited for
        return "no file"
    ending = file.suffix.lower()
    return "picture" if ending in formats() else ending or "without ending"
