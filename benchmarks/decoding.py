"""How fast folders of photographs are decoded, beside torchvision's ImageFolder with as many workers.

    python benchmarks/decoding.py [--images 400] [--pixels 400] [--size 224] [--workers 0,2] [--repeats 3]

JPEGs of `pixels` x `pixels` are generated and brought to `size`, in batches of 64: by ImageFolder (Resize, bicubic, and
CenterCrop) in a DataLoader; by ours out of their files, as a published data set's; by ours into memory, as a folder's
at the start of a run, and out of memory, as in every round. Each repeat runs all of them one after the other. Images a
second are medians, and so is the ratio to the ImageFolder of the same repeat. All files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from atm_fl.tables import markdown
from atm_fl.tasks import Split
from atm_fl.tasks.folder import FOLDERS, load_folder
from atm_fl.tasks.images import ImageFiles

BATCH = 64
REFERENCE = "torchvision's ImageFolder"


def write_folder(root: Path, images: int, pixels: int) -> None:
    """A task of two classes whose `train/` has nearly all of the pictures: clouds with grain, JPEG of quality 90."""
    random = np.random.default_rng(0)
    for (names, count), label in ((part, label) for part in _counts(images).items() for label in range(2)):
        folder = root / names / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((pixels, pixels), Image.Resampling.BICUBIC), np.float32)
            grain = random.normal(0, 8, (pixels, pixels, 1))
            Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)


def _counts(images: int) -> dict[str, int]:
    """Split's folder → pictures a class."""
    return {names[0]: images // 2 if split == "train" else 1 for split, names in FOLDERS.items()}


def drained(batches: Iterable[Any]) -> int:
    """How many images come out of `batches` of (images, labels)."""
    return sum(len(images) for images, _ in batches)


def reference(root: Path, size: int, workers: int) -> int:
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(size, bicubic), transforms.CenterCrop(size), transforms.PILToTensor()]
    data = datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
    return drained(DataLoader(data, BATCH, num_workers=workers))


def from_files(root: Path, size: int, workers: int) -> int:
    files = sorted((root / "train").rglob("*.jpg"))
    split = Split(ImageFiles(files, size), torch.zeros(len(files), dtype=torch.int64))
    return drained(split.batches(None, BATCH, workers))


def measure(root: Path, size: int, workers: int, repeats: int) -> list[tuple[str, ...]]:
    """Rows of (what, workers, images a second, ratio to the reference)."""
    kept: list[Split] = []

    def into_memory() -> int:
        data = load_folder(root, size, workers)
        kept[:] = [data.train]
        return sum(len(data.split(split)) for split in FOLDERS)

    ways: dict[str, Callable[[], int]] = {
        REFERENCE: lambda: reference(root, size, workers),
        "ours, out of files": lambda: from_files(root, size, workers),
        "ours, into memory": into_memory,
        "ours, out of memory": lambda: drained(kept[0].batches(None, BATCH)),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            begin = time.perf_counter()
            count = run()
            speeds[way].append(count / (time.perf_counter() - begin))
    rows = []
    for way, measured in speeds.items():
        ratio = median(mine / theirs for mine, theirs in zip(measured, speeds[REFERENCE], strict=True))
        rows.append((way, str(workers), f"{median(measured):,.0f}", f"{ratio:.2f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--pixels", type=int, default=400)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "task"
        write_folder(root, arguments.images, arguments.pixels)
        rows = []
        for workers in map(int, arguments.workers.split(",")):
            rows += measure(root, arguments.size, workers, arguments.repeats)
    print(markdown(("decoded by", "workers", "images a second", "x ImageFolder"), rows))
    turbo = features.version("libjpeg_turbo") or "not there"
    print(
        f"\n{arguments.images} JPEGs of {arguments.pixels} px to {arguments.size} px, {arguments.repeats} repeats, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}; Pillow {Image.__version__}, libjpeg-turbo {turbo}"
    )


if __name__ == "__main__":
    main()
