"""The embedded tasks as they are built from their packages, and folders of images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder
from PIL import Image

from atm_fl import tasks
from atm_fl.errors import SettingError
from atm_fl.settings import Settings, defaults
from atm_fl.tasks.folder import load_folder


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_folder_s_validation_images_may_be_in_either_folder(name: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "task", seed=0)
    before = load_folder(root, 32)
    (root / "val").rename(root / name)
    assert torch.equal(load_folder(root, 32).validation.images, before.validation.images)
    for both in {"val", "validation"} - {name}:
        (root / both).mkdir()
    with pytest.raises(SettingError, match="both val and validation; keep one"):
        load_folder(root, 32)


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize("name", Settings().task_names)
def test_an_embedded_task_has_enough_images_and_disjoint_stratified_splits(name: str) -> None:
    data = tasks.load(name)
    splits = [data.split(split) for split in tasks.SPLITS]
    assert sum(len(split.labels) for split in splits) >= 1000
    for split in splits:
        assert split.images.shape[1:] == (3, 32, 32)
        assert split.images.dtype == torch.uint8
        assert len(split.images) == len(split.labels)
    everything = [rows(split.images) for split in splits]
    assert sum(map(len, everything)) == len(set().union(*everything)) == sum(len(split.labels) for split in splits)
    shares = [np.bincount(split.labels, minlength=len(data.classes)) / len(split.labels) for split in splits]
    assert min(share.min() for share in shares) > 0
    assert max(np.abs(share - shares[0]).max() for share in shares) < 0.03
    actual = tasks.find(name)
    assert actual.licence
    assert actual.source


def test_a_task_is_the_same_when_it_is_built_again() -> None:
    actual = tasks.find("digits")
    assert isinstance(actual, tasks.Embedded)
    built = tasks.split_source(actual.build())
    loaded = tasks.load("digits")
    assert np.array_equal(built["train_images"], loaded.train.images.numpy())
    assert np.array_equal(built["test_labels"], loaded.test.labels.numpy())


def test_groups_are_not_parted_and_duplicates_go() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (300, 8, 8), dtype=np.uint8)
    images[1] = images[0]
    groups = np.arange(300) // 3
    # a group's images carry its number in one corner, so that it can be read back after the split
    for index, group in enumerate(groups):
        images[index] = group * 2
        images[index, 4:] += np.uint8(index % 3)
    images[1] = images[0]
    split = tasks.split_source(tasks.Source(images, groups % 2, ["even", "odd"], groups))
    members = [set(split[f"{name}_images"][:, 0, 0, 0] // 2) for name in tasks.SPLITS]
    assert sum(len(split[f"{name}_labels"]) for name in tasks.SPLITS) == 299
    assert sum(map(len, members)) == len(set.union(*members))


def test_a_larger_test_split_has_what_is_left_over_of_things_that_were_not_tuned_on() -> None:
    """Pictures carry their thing's number in a corner; things come twice, and 30 more for the test only."""

    def pictures(things: np.ndarray, shade: int) -> np.ndarray:
        images = np.full((len(things), 32, 32, 3), shade, dtype=np.uint8)
        images[:, 0, 0] = things[:, None]
        return images

    things = np.arange(100).repeat(2)
    drawn = pictures(things, 200)
    drawn[1::2] = pictures(things[1::2], 100)  # of one thing both pictures differ
    again = np.arange(130)

    def further(tuned_on: frozenset[int]) -> tasks.Source:
        unseen = np.array([thing for thing in again if thing not in tuned_on])
        return tasks.Source(pictures(unseen, 50), unseen % 2, ["even", "odd"], unseen)

    source = tasks.Source(drawn, things % 2, ["even", "odd"], things, further)
    plain = tasks.split_source(replace(source, for_test=None), cap=120, larger_test=60)
    split = tasks.split_source(source, cap=120, larger_test=60)

    def shown(part: str) -> list[int]:
        return split[f"{part}_images"][:, 0, 0, 0].tolist()

    assert all(
        np.array_equal(plain[f"{part}_{kind}"], split[f"{part}_{kind}"])
        for part in tasks.SPLITS
        for kind in ("images", "labels")
    )
    assert not {*shown("train"), *shown("validation")} & {*shown("test"), *shown("more_test")}
    assert split["more_test_groups"].tolist() == shown("more_test")
    assert len(shown("test")) + len(shown("more_test")) == 60
    assert np.bincount(np.concatenate([split["test_labels"], split["more_test_labels"]])).tolist() == [30, 30]
    left_over = len(plain["more_test_labels"])
    assert shown("more_test")[:left_over] == plain["more_test_images"][:, 0, 0, 0].tolist()  # is taken first


@pytest.mark.parametrize("name", sorted(name for name in tasks.TASKS if isinstance(tasks.TASKS[name], tasks.Embedded)))
def test_an_embedded_task_says_whether_it_has_a_larger_test_split(name: str) -> None:
    embedded = tasks.find(name)
    assert isinstance(embedded, tasks.Embedded)
    data = tasks.load(name)
    larger = data.with_larger_test()
    assert embedded.more_test == (data.more_test is not None) == (len(larger.test) > len(data.test))
    assert torch.equal(larger.test.images[: len(data.test)], data.test.images)  # type: ignore[index,arg-type]
    if data.test_groups is not None:
        assert larger.test_groups is not None
        assert len(larger.test_groups) == len(larger.test)
        assert np.array_equal(tasks.test_groups(name, larger=True), larger.test_groups)


def test_a_folder_is_a_task_with_no_code(tmp_path: Path) -> None:
    data = tasks.load(str(make_folder(tmp_path / "pets", 0)), size=48)
    assert data.name == "pets"
    assert data.classes == ("class0", "class1", "class2")
    assert data.train.images.shape == (36, 3, 48, 48)
    assert data.validation.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def remove_images(root: Path) -> None:
    for file in (root / "train" / "class1").iterdir():
        file.unlink()


def one_class(root: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("class1", "class2"):
            shutil.rmtree(root / split / name)


def corrupt(root: Path) -> None:
    file = root / "train" / "class0" / "3.png"
    file.write_bytes(file.read_bytes()[:60])


def stranger(root: Path) -> None:
    (root / "test" / "class9").mkdir()
    Image.new("RGB", (8, 8)).save(root / "test" / "class9" / "0.png")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_images, "train/class1 has no images"),
        (one_class, r"has 1 class folder\(s\); a task needs two classes or more"),
        (corrupt, "train/class0/3.png is not a readable image"),
        (stranger, "has a class 'class9' that .*train has not"),
        (lambda root: shutil.rmtree(root / "test"), "has no folder 'test'"),
        (shutil.rmtree, "does not exist on this machine"),
    ],
)
def test_a_bad_folder_is_one_clear_line(tmp_path: Path, damage, words: str) -> None:
    root = make_folder(tmp_path / "pets", 0)
    damage(root)
    with pytest.raises(SettingError, match=words) as error:
        tasks.load(str(root))
    assert "\n" not in str(error.value)


def test_the_default_tasks_are_all_that_are_embedded() -> None:
    embedded = {name for name, actual in tasks.TASKS.items() if isinstance(actual, tasks.Embedded)}
    assert set(str(defaults()["tasks"]).split(",")) == embedded
