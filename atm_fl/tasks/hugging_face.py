"""Data sets of the Hugging Face hub as tasks: `hf:OWNER/NAME`, or `hf:OWNER/NAME/CONFIGURATION`.

`atm-fl prepare` brings one by the package `datasets` and writes it as a folder of ours, of texts or of pictures:

    $ATM_FL_DATA/hf/OWNER/NAME/CONFIGURATION/       "default" where the name says none
        train.jsonl, validation.jsonl, test.jsonl   or train/CLASS/train-0000000.jpeg …, val/, test/
        source.json                                 revision, columns, and what was left out

A run reads that folder and nothing else, so that nobody who begins one has a party's machine download anything. Where
validation or test items are not given they are drawn from train by their digest, as texts.py does it: 15 % and 25 %.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from atm_fl.errors import RunError, SettingError
from atm_fl.tasks import HUB, TEST, VALIDATION
from atm_fl.tasks.folder import FOLDERS, NO_DATA
from atm_fl.tasks.pictures import formats
from atm_fl.tasks.published import data_root
from atm_fl.tasks.texts import SPLIT_NAMES, drawn

SOURCE = "source.json"
_NAME = re.compile(r"hf:[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/\w[\w.+-]*)?", re.ASCII)
_CLASS_TYPES = re.compile("string|large_string|bool|u?int[0-9]+")
"""Of a column that may hold labels without being a ClassLabel."""


def check(name: str) -> None:
    """SettingError if `name` is not written as a data set of the hub."""
    if not _NAME.fullmatch(name):
        raise SettingError(
            f"task {name!r}: write it as hf:OWNER/NAME or hf:OWNER/NAME/CONFIGURATION; the data set's page on the hub "
            "says who its owner is"
        )


def place(name: str, root: Path) -> Path:
    """Where `prepare` puts the data set `name` under `root`."""
    check(name)
    owner, title, *configuration = name.removeprefix(HUB).split("/")
    return root.joinpath("hf", owner, title, *(configuration or ["default"]))


def found(name: str) -> Path:
    """Where the data set `name` is under `data_root()`. SettingError, with the command that brings it, if it is not."""
    root = data_root()
    folder = place(name, root)
    if not folder.exists():
        raise SettingError(
            f"task {name!r} is not in {root}; bring it with: atm-fl prepare --tasks {name} --root {root}"
        )
    return folder


def here() -> list[str]:
    """The data sets of the hub that are under `data_root()`, in order."""
    root = data_root() / "hf"
    folders = (file.parent.relative_to(root).as_posix() for file in root.glob(f"*/*/*/{SOURCE}"))
    return sorted(HUB + folder.removesuffix("/default") for folder in folders)


def bring(name: str, root: Path, item: str = "", label: str = "") -> Iterator[str]:
    """Download the data set `name` and write it under `root`, unless it is there. Yields lines that say what was done.

    item, label: the column of texts or pictures and the one of labels, "" for what the features say. SettingError if
    they do not say it, or names the data that can be no task; RunError, with the reason, if it could not be had.
    """
    folder = place(name, root)
    if folder.exists():
        if item or label:
            raise SettingError(f"{name} is already in {folder}; remove it to bring it with columns that you name")
        return
    library, (builder, splits) = _library(), _downloaded(name)
    if "train" not in splits:
        raise SettingError(f"{name} has no split 'train' (it has {', '.join(splits)})")
    features = splits["train"].features
    label = _label_column(name, features, label, library)
    item = _item_column(name, features, item, label, library)
    classes = getattr(features[label], "names", None)
    of_pictures = isinstance(features[item], library.Image)

    kept: dict[str, Any] = {}
    left_out = {}
    for split, whole in splits.items():
        if split not in SPLIT_NAMES:
            left_out[split] = "it is no train, validation or test split"
            continue
        rows = whole.select_columns([item, label])
        rows = rows.cast_column(item, library.Image(decode=False)) if of_pictures else rows
        index = _complete(rows, item, label, bool(classes))
        if len(index) < len(rows):
            left_out[split] = f"{len(rows) - len(index)} of {len(rows)} rows, which have no label or no content"
        if len(index):
            kept[split] = rows.select(index)

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for split, rows in kept.items():
        pairs = ((row[item], classes[row[label]] if classes else str(row[label])) for row in rows)
        if of_pictures:
            given = {SPLIT_NAMES[each] for each in kept}
            _write_pictures(name, split, pairs, given, part)
        else:
            _write_texts(pairs, part / f"{SPLIT_NAMES[split]}.jsonl")
    about = {"data set": name, "configuration": builder.config.name, "revision": builder.hash}
    about |= {"columns": {"item": item, "label": label}, "left out": left_out}
    (part / SOURCE).write_text(json.dumps(about, indent=1) + "\n")
    part.rename(folder)

    yield f"{name}: {'pictures' if of_pictures else 'texts'} are its column {item!r}, labels {label!r}"
    for split, why in left_out.items():
        yield f"{name}: left out of {split!r}: {why}"


def _library() -> Any:
    """The package `datasets`, imported when a data set is brought: it takes a second."""
    try:
        return importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise SettingError("a data set of the hub needs the package datasets; pip install 'atm-fl[data]'") from error


def _downloaded(name: str) -> tuple[Any, Mapping[str, Any]]:
    """Its builder and its splits, as the package has them."""
    owner, title, *configuration = name.removeprefix(HUB).split("/")
    try:
        builder = _library().load_dataset_builder(f"{owner}/{title}", *configuration)
        builder.download_and_prepare()
        return builder, builder.as_dataset()
    except Exception as error:  # the package, and those it calls, raise errors of many kinds
        raise RunError(f"{name} was not brought: {' '.join(str(error).split())}") from error


def _label_column(name: str, features: Mapping[str, Any], said: str, library: Any) -> str:
    def fits(column: str) -> bool:
        of = features[column]
        return isinstance(of, library.ClassLabel) or bool(
            isinstance(of, library.Value) and _CLASS_TYPES.fullmatch(of.dtype)
        )

    classes = [column for column in features if isinstance(features[column], library.ClassLabel)]
    likely = classes or [column for column in features if column == "label" and fits(column)]
    return _column(name, "labels", "--label", said, likely, "label", [column for column in features if fits(column)])


def _item_column(name: str, features: Mapping[str, Any], said: str, label: str, library: Any) -> str:
    pictures = [column for column, of in features.items() if isinstance(of, library.Image)]
    texts = [
        column
        for column, of in features.items()
        if column != label and isinstance(of, library.Value) and of.dtype in ("string", "large_string")
    ]
    usual = "image" if pictures else "text"
    return _column(name, "texts or pictures", "--item", said, pictures or texts, usual, pictures + texts)


def _column(name: str, what: str, option: str, said: str, likely: list[str], usual: str, able: list[str]) -> str:
    """The column that is said, or of the likely ones the only or the usual one. able: those that may be said."""
    if said in able:
        return said
    if said:
        raise SettingError(
            f"{option} {said!r}: {name} has no such column of {what}; it has {', '.join(able) or 'none'}"
        )
    if len(likely) == 1 or usual in likely:
        return usual if usual in likely else likely[0]
    if not able:
        raise SettingError(f"{name} has no column of {what}, and so is no task of ours")
    raise SettingError(f"{name} does not say which column is of {what}; choose with {option}: {', '.join(able)}")


def _complete(rows: Any, item: str, label: str, of_classes: bool) -> np.ndarray:
    """The rows that have both, int64 [n]. A ClassLabel is -1 where it is not told, as in a contest's test split."""
    table = rows.with_format("arrow")[:]
    there = table[item].is_valid().to_numpy() & table[label].is_valid().to_numpy()
    if of_classes:
        there &= table[label].fill_null(-1).to_numpy() >= 0
    return there.nonzero()[0]


def _write_texts(pairs: Iterator[tuple[str, str]], file: Path) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)


def _write_pictures(
    name: str, split: str, pairs: Iterator[tuple[Mapping[str, Any], str]], given: Collection[str], root: Path
) -> None:
    """A file a picture, its bytes as they came. given: the splits that the data set has."""
    wanted = {each: share for each, share in (("validation", VALIDATION), ("test", TEST)) if each not in given}
    labels: dict[str, str] = {}
    for number, (picture, label) in enumerate(pairs):
        content = picture["bytes"] or Path(picture["path"]).read_bytes()
        into = drawn(content, wanted) if split == "train" else SPLIT_NAMES[split]
        folder = _class_folder(name, label)
        if labels.setdefault(folder, label) != label:
            raise SettingError(f"{name} has classes {labels[folder]!r} and {label!r}, which are one folder")
        file = root / FOLDERS[into][0] / folder / f"{split}-{number:07}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(_ending(f"{name}, {split} row {number}", content)).write_bytes(content)


def _class_folder(name: str, label: str) -> str:
    """A class's folder: its name with spaces for slashes."""
    folder = label.replace("/", " ").strip()
    if not folder or folder.startswith(".") or folder in NO_DATA or "\0" in folder:
        raise SettingError(f"{name} has a class {label!r}, which can be no folder; write it as a folder of your own")
    return folder


def _ending(where: str, content: bytes) -> str:
    from PIL import Image

    try:
        with Image.open(BytesIO(content)) as image:
            kind = str(image.format)
    except Exception as error:  # of torn files Pillow raises errors of any kind
        raise SettingError(f"{where}, is not a readable image ({error})") from error
    own = f".{kind.lower()}"
    return own if own in formats() else next(ending for ending, of in formats().items() if of == kind)
