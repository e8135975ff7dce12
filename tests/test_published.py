"""Published data sets: each is written small in its own format on disk, and read through the public face."""

from __future__ import annotations

import csv
import importlib
import io
import json
import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn

from atm_fl import cli, models, tasks
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.client import Party, Update
from atm_fl.settings import Settings
from atm_fl.tasks import leaks, prompts, published
from atm_fl.tasks.images import ImageFiles, decode
from atm_fl.training.evaluation import accuracy, classified_rightly

ROOT = Path(__file__).parents[1]
TRAIN, TEST = 20, 6
"""Images that each small data set has, unless its format asks for another number."""

random = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return random.integers(0, 256, shape, dtype=np.uint8)


def picture(file: Path, height: int = 30, width: int = 40) -> None:
    """A random image of soft spots, which stay much the same in JPEG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(6, 8, 3)).resize((width, height), Image.Resampling.BICUBIC).save(file)


def cycle(count: int, classes: int) -> list[int]:
    return [number % classes for number in range(count)]


def write_idx(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(
        struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


def make_cars(root: Path) -> None:
    for split, file, count in (
        ("train", "devkit/cars_train_annos", TRAIN),
        ("test", "cars_test_annos_withlabels", TEST),
    ):
        listed = []
        for number, label in enumerate(cycle(count, 2)):
            picture(root / "stanford_cars" / f"cars_{split}" / f"{number:05d}.jpg")
            listed.append((1, 2, 30, 20, label + 1, f"{number:05d}.jpg"))
        kind = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
        path = root / "stanford_cars" / f"{file}.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        savemat(path, {"annotations": np.array(listed, dtype=kind)})
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    savemat(root / "stanford_cars" / "devkit" / "cars_meta.mat", {"class_names": names})


def make_dtd(root: Path) -> None:
    names = ["banded", "polka-dotted"]
    for split, count in (("train", 12), ("val", 8), ("test", TEST)):
        lines = [f"{names[label]}/{names[label]}_{split}{i:04d}.jpg" for i, label in enumerate(cycle(count, 2))]
        for line in lines:
            picture(root / "dtd" / "dtd" / "images" / line)
        listed = root / "dtd" / "dtd" / "labels" / f"{split}1.txt"
        listed.parent.mkdir(exist_ok=True)
        listed.write_text("\n".join(lines) + "\n")


def make_eurosat(root: Path) -> None:
    for name in ("AnnualCrop", "SeaLake"):
        for number in range(20):
            picture(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", 64, 64)


def make_gtsrb(root: Path) -> None:
    for label in range(43):
        picture(root / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}" / "00000_00000.ppm", 20 + label, 25)
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number in range(TEST):
        picture(root / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm", 30, 30)
        lines.append(f"{number:05d}.ppm;30;30;5;5;25;25;{42 - number}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(lines) + "\n")


def make_idx(folder: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for split, count in (("train", TRAIN), ("t10k", TEST)):
            write_idx(root / folder / "raw" / f"{split}-images-idx3-ubyte", pixels(count, 28, 28))
            write_idx(root / folder / "raw" / f"{split}-labels-idx1-ubyte", np.array(cycle(count, 10)))

    return make


def make_emnist(root: Path) -> None:
    for split, count in (("train", TRAIN), ("test", TEST)):
        write_idx(root / "EMNIST" / "raw" / f"emnist-digits-{split}-images-idx3-ubyte", pixels(count, 28, 28))
        write_idx(root / "EMNIST" / "raw" / f"emnist-digits-{split}-labels-idx1-ubyte", np.array(cycle(count, 10)))


def make_resisc45(root: Path) -> None:
    names = ["airplane", "mobile_home_park"]
    folder = root / "resisc45"
    for start, split, count in ((1, "train", TRAIN), (100, "val", 4), (200, "test", TEST)):
        lines = [f"{names[label]}_{start + number:03d}.jpg" for number, label in enumerate(cycle(count, 2))]
        for line in lines:
            picture(folder / "NWPU-RESISC45" / line.rpartition("_")[0] / line)
        (folder / f"resisc45-{split}.txt").write_text("\n".join(lines) + "\n")


def make_svhn(root: Path) -> None:
    (root / "svhn").mkdir()
    for split, count in (("train", TRAIN), ("test", TEST)):
        labels = np.array(cycle(count, 10), np.uint8)
        labels[labels == 0] = 10  # as SVHN writes it
        savemat(root / "svhn" / f"{split}_32x32.mat", {"X": pixels(32, 32, 3, count), "y": labels[:, None]})


def make_sun397(root: Path) -> None:
    names = ["/a/abbey", "/a/apse/indoor"]
    for split, count in (("Training", TRAIN), ("Testing", TEST)):
        lines = [f"{names[label]}/sun_{split.lower()}{number}.jpg" for number, label in enumerate(cycle(count, 2))]
        for line in lines:
            picture(root / "SUN397" / line[1:])
        for partition, kept in (("01", lines), ("02", lines[:2])):
            file = root / "SUN397-partitions" / f"{split}_{partition}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text("\n".join(kept) + "\n")
    picture(root / "SUN397" / "a" / "abbey" / "sun_in_no_list.jpg")
    (root / "SUN397" / "ClassName.txt").write_text("\n".join(names) + "\n")


def make_cifar(
    folder: str, files: dict[str, int], meta: str, key: str, names: str, labels: str
) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / folder).mkdir()
        for file, count in files.items():
            entry = {"data": pixels(count, 3072), labels: cycle(count, 2)}
            (root / folder / file).write_bytes(pickle.dumps(entry))
        (root / folder / meta).write_bytes(pickle.dumps({key: names.split()}))

    return make


def make_stl10(root: Path) -> None:
    folder = root / "stl10_binary"
    folder.mkdir()
    for split, count in (("train", TRAIN), ("test", TEST)):
        pixels(count, 3, 96, 96).tofile(folder / f"{split}_X.bin")
        (np.array(cycle(count, 2), np.uint8) + 1).tofile(folder / f"{split}_y.bin")
    (folder / "unlabeled_X.bin").touch()
    (folder / "class_names.txt").write_text("airplane\nbird\n")


def make_food101(root: Path) -> None:
    (root / "food-101" / "meta").mkdir(parents=True)
    for split, count in (("train", TRAIN), ("test", TEST)):
        listed = {name: [f"{name}/{split}{i}" for i in range(count // 2)] for name in ("apple_pie", "waffles")}
        for name in [*listed["apple_pie"], *listed["waffles"]]:
            picture(root / "food-101" / "images" / f"{name}.jpg")
        (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listed))


def make_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    names = ["Maine_Coon", "american_bulldog"]
    for split, count in (("trainval", TRAIN), ("test", TEST)):
        actual = [
            (f"{names[label]}_{split}{i}".replace("_test", "_9"), label) for i, label in enumerate(cycle(count, 2))
        ]
        for name, _ in actual:
            picture(folder / "images" / f"{name}.jpg")
        lines = [f"{name} {label + 1} {label + 1} 1" for name, label in actual]
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def make_flowers102(root: Path) -> None:
    folder = root / "flowers-102"
    for number in range(1, 2 * 102 + 5):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", 8, 9)
    labels = np.array([*cycle(102, 102), *cycle(106, 102)]) + 1
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    parts = {"trnid": range(1, 103), "valid": range(103, 107), "tstid": range(107, 209)}
    savemat(folder / "setid.mat", {name: np.array([ids]) for name, ids in parts.items()})


def make_fer2013(root: Path) -> None:
    (root / "fer2013").mkdir()
    with open(root / "fer2013" / "fer2013.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["emotion", "pixels", "Usage"])
        for usage, count in (("Training", TRAIN), ("PublicTest", 4), ("PrivateTest", 2)):
            for label in cycle(count, 7):
                table.writerow([label, " ".join(map(str, pixels(48 * 48))), usage])


def make_pcam(root: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (root / "pcam").mkdir()
    for split, count in (("train", TRAIN), ("test", TEST)):
        with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{split}_x.h5", "w") as file:
            file["x"] = pixels(count, 96, 96, 3)
        with h5py.File(root / "pcam" / f"camelyonpatch_level_2_split_{split}_y.h5", "w") as file:
            file["y"] = np.array(cycle(count, 2), np.uint8).reshape(-1, 1, 1, 1)


def make_sst2(root: Path) -> None:
    for split, count in (("train", 10), ("valid", 2), ("test", 3)):
        for name in ("negative", "positive"):
            for number in range(count):
                picture(root / "rendered-sst2" / split / name / f"{number}.png", 44, 44)


CIFAR10 = {f"data_batch_{number}": 4 for number in range(1, 6)} | {"test_batch": TEST}
CIFAR100 = {"train": TRAIN, "test": TEST}

# name: (maker, numbers that differ from (2 classes, TRAIN, TEST), first class, native shape or None of files)
SETS: dict[str, tuple[Callable[[Path], None], dict[str, int], str, tuple[int, ...] | None]] = {
    "cars": (make_cars, {}, "AM General Hummer SUV 2000", None),
    "dtd": (make_dtd, {}, "banded", None),
    "eurosat": (make_eurosat, {"train": 36, "test": 4}, "annual crop land", (3, 64, 64)),
    "gtsrb": (make_gtsrb, {"classes": 43, "train": 43}, prompts.GTSRB[0], None),
    "mnist-full": (make_idx("MNIST"), {"classes": 10}, "0", (1, 28, 28)),
    "resisc45": (make_resisc45, {}, "airplane", None),
    "svhn": (make_svhn, {"classes": 10}, "0", (3, 32, 32)),
    "sun397": (make_sun397, {}, "abbey", None),
    "cifar10": (
        make_cifar("cifar-10-batches-py", CIFAR10, "batches.meta", "label_names", "airplane automobile", "labels"),
        {},
        "airplane",
        (3, 32, 32),
    ),
    "cifar100": (
        make_cifar("cifar-100-python", CIFAR100, "meta", "fine_label_names", "aquarium_fish bear", "fine_labels"),
        {},
        "aquarium fish",
        (3, 32, 32),
    ),
    "stl10": (make_stl10, {}, "airplane", (3, 96, 96)),
    "food101": (make_food101, {}, "apple pie", None),
    "pets": (make_pets, {}, "Maine Coon", None),
    "flowers102": (make_flowers102, {"classes": 102, "train": 102, "test": 102}, "pink primrose", None),
    "fer2013": (make_fer2013, {"classes": 7}, "angry", (1, 48, 48)),
    "pcam": (make_pcam, {}, "lymph node", (3, 96, 96)),
    "emnist": (make_emnist, {"classes": 10}, "0", (1, 28, 28)),
    "fashionmnist": (make_idx("FashionMNIST"), {"classes": 10}, "T-shirt/top", (1, 28, 28)),
    "kmnist": (make_idx("KMNIST"), {"classes": 10}, "o", (1, 28, 28)),
    "sst2": (make_sst2, {}, "negative", None),
}


@pytest.fixture(autouse=True)
def _other_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own sums are those of the whole data sets; of the small ones only the files' being there counts."""
    from torchvision import datasets

    for name in ("cifar", "stl10", "svhn", "flowers102", "fer2013"):
        monkeypatch.setattr(getattr(datasets, name), "check_integrity", lambda file, md5=None: Path(file).is_file())


@pytest.fixture(autouse=True)
def _same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's images do not depend on the tests before it."""
    monkeypatch.setattr(sys.modules[__name__], "random", np.random.default_rng(0))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATM_FL_DATA", str(tmp_path / "published"))
    (tmp_path / "published").mkdir()
    return tmp_path / "published"


def small(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> published.Published:
    """Write the small data set `name` and declare its numbers in place of the whole one's."""
    make, numbers, *_ = SETS[name]
    make(root)
    task = replace(published.find_published(name), **({"classes": 2, "train": TRAIN, "test": TEST} | numbers))
    monkeypatch.setitem(tasks.TASKS, name, task)
    return task


def everything(split: tasks.Split) -> torch.Tensor:
    return torch.cat([images for images, _ in split.batches(batch_size=7)])


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["atm-fl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_all_twenty_are_declared_with_templates() -> None:
    declared = {name for name, task in tasks.TASKS.items() if isinstance(task, published.Published)}
    assert declared == set(SETS) == set(prompts.TEMPLATES)
    assert len(declared) == 20
    assert all("{}" in template for templates in prompts.TEMPLATES.values() for template in templates)


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_is_read_from_its_own_format(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small(name, root, monkeypatch)
    _, _, first, shape = SETS[name]
    assert task.on_disk()
    data = tasks.load(name, 16)
    assert len(data.classes) == task.classes
    assert data.classes[0] == first
    assert data.templates == prompts.TEMPLATES[name]
    assert len(data.validation) == max(1, task.train // 10)
    assert len(data.train) + len(data.validation) == task.train
    assert len(data.test) == task.test
    side = shape[1] if shape else 16
    actual = [everything(data.split(split)) for split in tasks.SPLITS]
    for images, split in zip(actual, tasks.SPLITS, strict=True):
        assert images.shape == (len(data.split(split)), 3, side, side)
        assert images.dtype == torch.uint8
    rows = [{image.numpy().tobytes() for image in images} for images in actual]
    assert len(set().union(*rows)) == sum(map(len, rows)) == task.train + task.test
    assert isinstance(data.train.images, torch.Tensor) == (shape is not None)
    labels = torch.cat([data.split(split).labels for split in tasks.SPLITS])
    assert labels.unique().tolist() == list(range(task.classes))
    again = tasks.load(name, 16)  # out of the cache where there is one
    assert [again.split(split).digests for split in tasks.SPLITS] == [data.split(s).digests for s in tasks.SPLITS]
    assert all(torch.equal(everything(again.split(s)), images) for s, images in zip(tasks.SPLITS, actual, strict=True))


def test_labels_belong_to_their_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small("sun397", root, monkeypatch)
    small("resisc45", root, monkeypatch)
    small("pets", root, monkeypatch)
    for name in ("sun397", "resisc45", "pets"):
        for split in tasks.SPLITS:
            data = tasks.load(name, 16)
            images, labels = data.split(split).images, data.split(split).labels
            assert isinstance(images, ImageFiles)
            for file, label in zip(images.files, labels.tolist(), strict=True):
                assert data.classes[label].replace(" ", "") in str(file).replace("_", "").replace("/", "")
    # SVHN writes 10 for zero; in the small one the labels count up from zero
    small("svhn", root, monkeypatch)
    assert tasks.load("svhn").test.labels.tolist() == [0, 1, 2, 3, 4, 5]
    # of an image kept in memory the pixels say where it came from
    write_idx(root / "MNIST" / "raw" / "train-images-idx3-ubyte", np.arange(TRAIN).repeat(784).reshape(-1, 28, 28))
    write_idx(root / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.arange(TRAIN) % 10)
    for what, content in (("images", pixels(TEST, 28, 28)), ("labels", np.arange(TEST))):
        write_idx(root / "MNIST" / "raw" / f"t10k-{what}-idx{content.ndim}-ubyte", content)
    monkeypatch.setitem(
        tasks.TASKS, "mnist-full", replace(published.find_published("mnist-full"), train=TRAIN, test=TEST)
    )
    data = tasks.load("mnist-full")
    for images, labels in data.train.batches(batch_size=4):
        assert (images[:, 0, 0, 0].long() % 10 == labels).all()
    assert torch.equal(data.validation.images[:, 0, 0, 0].long() % 10, data.validation.labels)  # type: ignore[call-overload]


def test_a_tenth_of_train_up_to_5000_is_held_out_the_same_each_time() -> None:
    for images, expected in ((20, 2), (3760, 376), (49999, 4999), (262144, 5000)):
        assert published.validation_count(images) == expected
    order = published.validation_first(3760)
    assert sorted(order) == list(range(3760))
    assert (np.diff(order[:376]) > 0).all()
    assert (np.diff(order[376:]) > 0).all()
    assert np.array_equal(order, published.validation_first(3760))
    # a newer numpy may draw otherwise; it must not move the splits of published numbers unseen
    assert order[:5].tolist() == [4, 12, 14, 21, 28]


@pytest.mark.parametrize(("height", "width"), [(30, 50), (50, 31), (16, 16), (9, 12)])
def test_a_file_is_decoded_as_by_hand(height: int, width: int, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", height, width)
    image = Image.open(tmp_path / "a.png")
    scale = 16 / min(height, width)
    wide, high = (16, int(height * scale)) if width <= height else (int(width * scale), 16)
    resized = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = round((wide - 16) / 2), round((high - 16) / 2)
    expected = np.asarray(resized.crop((left, top, left + 16, top + 16))).transpose(2, 0, 1)
    assert np.array_equal(decode(tmp_path / "a.png", 16).numpy(), expected)


def test_grey_and_transparent_files_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "LA", "RGBA", "P", "CMYK"):
        file = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (20, 20)).save(file)
        assert decode(file, 8).shape == (3, 8, 8)


def test_workers_give_the_same_batches_and_name_a_bad_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small("sst2", root, monkeypatch)
    train = tasks.load("sst2", 16).train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    before = torch.random.get_rng_state()
    alone, helped = (list(train.batches(order, 8, workers)) for workers in (0, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert [len(labels) for _, labels in alone] == [8, 8, 2]
    for (images, labels), (others, other_labels) in zip(alone, helped, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
    assert torch.equal(torch.cat([labels for _, labels in alone]), train.labels[order])
    assert isinstance(train.images, ImageFiles)
    bad = train.images.files[3]
    bad.write_bytes(bad.read_bytes()[:60])
    for workers in (0, 2):
        with pytest.raises(SettingError, match=f"^{bad} is not a readable image") as error:
            list(train.batches(None, 8, workers))
        assert "\n" not in str(error.value)


def test_splits_in_memory_and_in_files_are_used_alike(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small("sst2", root, monkeypatch)
    data = tasks.load("sst2", 32)
    model = models.Backbone(nn.Sequential(nn.Conv2d(3, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 32)
    memory = tasks.Split(everything(data.train), data.train.labels)
    heads = [models.prototypes(model, split, 2, 3, seed=0) for split in (data.train, memory)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert accuracy(classified_rightly(model, heads[0], data.train)) == accuracy(
        classified_rightly(model, heads[0], memory)
    )
    chosen = torch.tensor([4, 1])
    assert torch.equal(everything(data.train.take(chosen)), memory.take(chosen).images)  # type: ignore[arg-type]
    assert len(data.train.take(slice(3))) == 3
    assert data.train.to("cpu").digests == data.train.digests
    assert data.train.digests != data.train.take(slice(3)).digests


def vector_of(party: Party, update: Update) -> torch.Tensor:
    assert update.arrays is not None
    return party.settings.uplink.decode(update.arrays, party.model.layout)


def test_a_party_tunes_on_files_and_on_grey_images_as_on_images_in_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small("sst2", root, monkeypatch)
    small("mnist-full", root, monkeypatch)
    settings = Settings.parse({"tasks": "sst2,mnist-full", "model": "tiny", "batch-size": 4})
    for name in settings.task_names:
        party = Party(settings, name)
        vector = vector_of(party, party.train(party.model.pretrained, 1))
        assert vector.isfinite().all()
        assert vector.norm() > 0
        party.splits = {
            split: tasks.Split(everything(images).contiguous(), images.labels) for split, images in party.splits.items()
        }
        party.tuned_on = party.splits["train"]
        again = party.train(party.model.pretrained, 1)
        assert torch.equal(vector_of(party, again), vector)
        assert set(again.evaluation) == {"validation", "test"}


def test_grey_images_are_stored_once_and_given_as_rgb(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small("mnist-full", root, monkeypatch)
    data = tasks.load("mnist-full")
    assert isinstance(data.train.images, torch.Tensor)
    assert data.train.images.shape[1:] == (1, 28, 28)
    images, _ = next(data.train.batches(batch_size=4))
    assert torch.equal(images, data.train.images[:4].repeat(1, 3, 1, 1))
    model = models.Backbone(nn.Conv2d(3, 4, 5), 32)
    with torch.inference_mode():
        assert torch.equal(model(images), model(images.contiguous()))


@pytest.mark.parametrize("name", SETS)
def test_a_missing_data_set_is_one_line_with_the_command_that_brings_it(name: str, root: Path) -> None:
    if name == "pcam":
        pytest.importorskip("h5py")
    with pytest.raises(SettingError) as error:
        tasks.load(name)
    assert f"atm-fl prepare --tasks {name} --root {root}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not published.find_published(name).on_disk()


@pytest.mark.parametrize("number", ["classes", "train", "test"])
def test_another_number_than_the_declared_is_refused(number: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small("dtd", root, monkeypatch)
    wrong = replace(task, **{number: getattr(task, number) + 1})
    with pytest.raises(SettingError, match=f"instead of {getattr(wrong, number)}; remove {root / 'dtd'} and bring it"):
        wrong.load(16)


def test_the_mirror_of_cars_is_written_as_the_original_and_packages_are_asked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(label: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(pixels(20, 30, 3)).save(buffer, "JPEG")
        return {"image": {"bytes": buffer.getvalue(), "path": None}, "label": label}

    rows = {"train": [row(label) for label in cycle(TRAIN, 2)], "test": [row(label) for label in cycle(TEST, 2)]}
    published.write_cars(rows, ["A Car 2012", "B Car 2012"], root / "stanford_cars")
    task = replace(published.find_published("cars"), classes=2, train=TRAIN, test=TEST)
    data = task.load(16)
    assert data.classes == ("A Car 2012", "B Car 2012")
    assert data.test.labels.tolist() == cycle(TEST, 2)
    assert isinstance(data.test.images, ImageFiles)
    assert data.test.images.files[4].read_bytes() == rows["test"][4]["image"]["bytes"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        SettingError, match=r"needs the package 'datasets'; install it with pip install 'atm-fl\[data\]'"
    ):
        task.parts(root / "elsewhere", download=True)


def test_sentences_for_text_heads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small("fer2013", root, monkeypatch)
    sentences = tasks.load("fer2013").prompts()
    assert [len(actual) for actual in sentences] == [6, 6, 6, 12, 12, 18, 12]
    assert sentences[3][6] == "a photo of a smiling looking face."
    assert tasks.load("digits").prompts()[3] == ["a photo of a 3."]


def test_no_leaks_where_there_are_none_and_planted_ones_are_found(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small("pets", root, monkeypatch)
    assert call(monkeypatch, "tasks", "--leaks", "pets") == 0
    assert "of 6 test images 0 are in train, 0 more look like one there" in capsys.readouterr().out
    data = tasks.load("pets", leaks.SIZE)
    assert isinstance(data.test.images, ImageFiles)
    assert isinstance(data.train.images, ImageFiles)
    copied, target = data.train.images.files[5], data.test.images.files[2]
    target.write_bytes(copied.read_bytes())
    bright = data.test.images.files[4]
    image = np.asarray(Image.open(data.train.images.files[0]).convert("RGB"))
    Image.fromarray((image * 0.9).astype(np.uint8)).save(bright, quality=98)
    assert call(monkeypatch, "tasks", "--leaks", "pets") == 1
    said = capsys.readouterr().out
    assert f"of 6 test images 1 are in train (images/{target.name} = images/{copied.name}), 1 more look like" in said
    actual = leaks.find_leaks(data)[1]
    assert (actual.exact, actual.alike) == ([(2, 5)], [(4, 0)])
    assert call(monkeypatch, "tasks", "--leaks", "digits") == 0


def test_prepare_refuses_without_space_and_otherwise_checks_caches_and_tells(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    task = small("kmnist", root, monkeypatch)
    assert call(monkeypatch, "prepare", "--tasks", "kmnist") == 0
    said = capsys.readouterr().out
    assert "0.0 GB needed" in said
    assert "kmnist: of 6 test images 0 are in train" in said
    assert "10 classes, 18 training, 2 validation and 6 test images" in said
    assert len(list((root / ".arrays").rglob("*.npy"))) == 2
    monkeypatch.setitem(tasks.TASKS, "emnist", replace(published.find_published("emnist"), gigabytes=1e6))
    assert call(monkeypatch, "prepare", "--tasks", "kmnist,emnist") == 2
    error = capsys.readouterr().err
    assert "of the 1000000.0 GB that are needed" in error
    assert len(error.strip().splitlines()) == 1
    for wrong, words in (("digits", "there is nothing to prepare"), ("kmnits", "did you mean 'kmnist'?")):
        assert call(monkeypatch, "prepare", "--tasks", wrong) == 2
        assert words in capsys.readouterr().err

    def broken(root: Path, download: bool) -> published.Parts:
        raise OSError("no route to host")

    with pytest.raises(RunError, match=f"kmnist was not brought to {root}: no route to host"):
        replace(task, read=broken).parts(root, download=True)
    assert call(monkeypatch, "prepare", "--tasks", "fer2013") == 2
    assert f"to {root / 'fer2013' / 'fer2013.csv'} and run this again" in capsys.readouterr().err


def test_the_example_of_the_documentation_is_a_task(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (ROOT / "docs" / "data.md").read_text().split("```python\n")[1].split("```")[0]
    file = root / "mushrooms.py"
    file.write_text(code.replace("classes=9, train=6000, test=714", "classes=2, train=8, test=4"))
    monkeypatch.syspath_prepend(root)
    importlib.import_module("mushrooms")
    for split, count in (("train", 4), ("test", 2)):
        for name in ("agaric", "bolete"):
            for number in range(count):
                picture(root / "mushrooms" / split / name / f"{number}.png")
    try:
        data = tasks.load("mushrooms", 16)
    finally:
        del tasks.TASKS["mushrooms"]
    assert (len(data.train), len(data.validation), len(data.test)) == (7, 1, 4)
    assert data.prompts()[1] == ["a photo of a bolete."]


def test_the_documentation_lists_the_data_sets_as_they_are_declared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "tasks", "--markdown") == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "data.md").read_text()
