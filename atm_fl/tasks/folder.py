"""Any folder of images as a task: `train/`, `val/` (or `validation/`) and `test/`, each with a folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from atm_fl.errors import SettingError
from atm_fl.tasks import Dataset, Split, to_square

FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
"""What a split's folder may be called."""


def load_folder(root: Path, size: int) -> Dataset:
    """The data in `root`, resized to [n, 3, size, size]. SettingError names the folder or file that is wrong."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not root.is_dir():
        raise SettingError(f"task folder {root} does not exist on this machine")
    places: dict[str, str] = {}
    for split, names in FOLDERS.items():
        there = [name for name in names if (root / name).is_dir()]
        if len(there) != 1:
            wrong = f"both {' and '.join(there)}; keep one" if there else f"no folder {names[0]!r}"
            raise SettingError(f"{root} has {wrong}; it needs train/, val/ and test/ with a folder a class")
        places[split] = there[0]
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    if len(classes) < 2:
        raise SettingError(f"{root / 'train'} has {len(classes)} class folder(s); a task needs two classes or more")
    splits: dict[str, Any] = {}
    for split, folder in places.items():
        strangers = sorted({p.name for p in (root / folder).iterdir() if p.is_dir()} - set(classes))
        if strangers:
            raise SettingError(f"{root / folder} has a class {strangers[0]!r} that {root / 'train'} has not")
        found = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((root / folder / name).rglob("*"))
            if file.suffix.lower() in IMG_EXTENSIONS
        ]
        missing = sorted(set(range(len(classes))) - {label for _, label in found})
        if missing and (split == "train" or len(missing) == len(classes)):
            raise SettingError(f"{root / folder / classes[missing[0]]} has no images ({', '.join(IMG_EXTENSIONS)})")
        images = np.stack([_read(file, size) for file, _ in found])
        splits[split] = Split(torch.from_numpy(images), torch.tensor([label for _, label in found]))
    return Dataset(root.name, tuple(classes), splits["train"], splits["validation"], splits["test"])


def _read(file: Path, size: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return to_square(np.asarray(image.convert("RGB")), size)
    except (OSError, SyntaxError, ValueError) as error:
        raise SettingError(f"{file} is not a readable image ({error}); replace or remove it") from error
