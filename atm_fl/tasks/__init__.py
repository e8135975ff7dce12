"""Tasks: classification data sets of images or texts, one registry, fixed splits.

Embedded tasks come with pip packages: a source is a function that returns every image it has; this module resizes,
removes duplicates, splits and caches. Published data sets are read from disk as they are: see `published.py`. To add an
embedded task put one small file beside this one::

    @task("flowers", licence="CC0", source="PyPI flowers 1.0")
    def flowers() -> Source:
        return Source(images, labels, classes)

Every module of this package is imported when the registry is first asked, so the file is all it takes. Text tasks are
in texts.py.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from atm_fl import vectors
from atm_fl.errors import SettingError
from atm_fl.files import atomic_write
from atm_fl.plugins import Registry
from atm_fl.tasks.images import ImageFiles, decode_batches

IMAGE_SIZE = 32
SPLITS = ("train", "validation", "test")
CAP = 2000
"""Images kept of a source: enough for a clear result, few enough that a round of eight tasks takes seconds."""
VALIDATION, TEST = 0.15, 0.25
LARGER_TEST = 2500
"""Images at most of a larger test split: the test split's own, and more from beyond `CAP`."""
SPLIT_SEED = 0
HUB = "hf:"
"""What the name of a task begins with that is a data set of the Hugging Face hub; see hugging_face.py."""


@dataclass(frozen=True)
class Split:
    """Images or texts and their labels, int64 [n].

    images: uint8 [n, 3, h, w] in memory (or [n, 1, h, w], grey), files that are decoded when a batch is taken, or texts
    as int32 [n, l] (texts.py). All are read through `batches`, and chosen from by `take`.
    """

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def of_texts(self) -> bool:
        """Whether its items are texts."""
        return isinstance(self.images, Tensor) and self.images.ndim == 2

    @property
    def by_length(self) -> Tensor | None:
        """An order of its texts, int64 [n], the shortest first, so that batches are narrow; None if it has others."""
        if not isinstance(self.images, Tensor) or not self.of_texts:
            return None
        return self.images.gt(0).sum(1).argsort(stable=True)

    def take(self, index: Tensor | slice) -> Split:
        """The split of the items at `index`, int64 [k], in that order, or a slice of it; files are not decoded."""
        images = self.images[index] if isinstance(self.images, Tensor) else self.images.take(index)
        return Split(images, self.labels[index])

    def followed_by(self, other: Split) -> Split:
        """The items of both, this one's first; TypeError for images that are not in memory."""
        if not isinstance(self.images, Tensor) or not isinstance(other.images, Tensor):
            raise TypeError("images that are not in memory can't be joined")
        return Split(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))

    def to(self, device: str | torch.device) -> Split:
        """This split on `device`; of files only the labels move, their images follow batch by batch."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        return Split(images, self.labels.to(device))

    def batches(
        self, order: Tensor | None = None, batch_size: int = 256, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 [k, 3, h, w] and labels int64 [k] of the items in `order`, all by default; the last may be less.

        Of texts int32 [k, l], l the longest of the batch.

        Files are decoded by `workers` processes ahead of the reader, with 0 in this one; the batches are the same.
        SettingError names the file that is not an image.
        """
        if order is None:
            order = torch.arange(len(self), device=self.labels.device)
        return self.parts(order.split(batch_size), workers)

    def parts(self, parts: Sequence[Tensor], workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """`batches` of the items of each of `parts`, int64 [k] on the labels' device."""
        if isinstance(self.images, Tensor):
            pixels: Iterator[Tensor] = (_batch(self.images[chunk]) for chunk in parts)
        else:
            pixels = decode_batches(self.images, [chunk.cpu() for chunk in parts], workers)
        yield from zip(pixels, (self.labels[chunk] for chunk in parts), strict=True)

    @property
    def digests(self) -> tuple[str, str]:
        """Short hashes of images and labels. Equal ones mean equal data; of files names and sizes are hashed."""
        images = vectors.digest(self.images) if isinstance(self.images, Tensor) else self.images.digest
        return images, vectors.digest(self.labels)


def _batch(items: Tensor) -> Tensor:
    """Grey images [k, 1, h, w] as [k, 3, h, w]; texts [k, l] without the columns in which all have ended."""
    if items.ndim == 2:
        return items[:, : max(1, int((items > 0).sum(1).max()))]
    return items.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Dataset:
    """One task's data: class names, the three fixed, disjoint splits, and templates of sentences for text heads.

    A class name may hold several wordings with a semicolon between them.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    templates: tuple[str, ...] = ("a photo of a {}.",)
    test_groups: np.ndarray | None = None
    """Of each test image the number of what it shows, int64 [n], where several show one thing, as one letter in two
    weights; None where each shows its own."""
    more_test: Split | None = None
    """Test images beyond the test split, of things that no other split shows; None where the source has no more."""
    more_test_groups: np.ndarray | None = None
    """As `test_groups`, of `more_test`; one number is one thing in both."""

    def with_larger_test(self) -> Dataset:
        """This data set with `more_test` at the end of its test split; itself where there is no more."""
        if self.more_test is None:
            return self
        groups = self.test_groups
        if groups is not None and self.more_test_groups is not None:
            groups = np.concatenate([groups, self.more_test_groups])
        test = self.test.followed_by(self.more_test)
        return replace(self, test=test, test_groups=groups, more_test=None, more_test_groups=None)

    def split(self, name: str) -> Split:
        """The split called `name`: "train", "validation" or "test"."""
        if name not in SPLITS:
            raise SettingError(f"split={name!r} is unknown; it takes one of {', '.join(SPLITS)}")
        return getattr(self, name)

    def prompts(self) -> list[list[str]]:
        """For each class its sentences: every template with every wording of the class name."""
        return [
            [template.format(wording.strip()) for wording in name.split(";") for template in self.templates]
            for name in self.classes
        ]


@dataclass(frozen=True)
class Source:
    """What a source function returns.

    images: a list of uint8 arrays [h, w] or [h, w, 3], or one array of them; labels: ints; classes: their names.
    groups: items that must not be parted between splits (renderings of one glyph, say) share a group number.
    for_test: makes further images that only a larger test split may take, in their order, of the same classes and
    numbers of groups, given the groups that are tuned on, of which it shows none; without groups each shows its own.
    """

    images: Sequence[np.ndarray] | np.ndarray
    labels: Sequence[int] | np.ndarray
    classes: Sequence[str]
    groups: Sequence[int] | np.ndarray | None = None
    for_test: Callable[[frozenset[int]], Source] | None = None


class Tokenizer(Protocol):
    """What turns texts into a model's tokens; a model that reads text has one as its attribute `tokenizer`."""

    key: str
    """Says what it makes of a text: tokenizers of one key do the same."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's tokens, with the model's marks of beginning and end, cut at the model's length."""


@dataclass(frozen=True)
class Task(ABC):
    """A registered task: where its images come from and under which licence."""

    name: str
    licence: str
    source: str

    @abstractmethod
    def load(self, size: int, *, tokenizer: Tokenizer | None = None) -> Dataset:
        """The task's data; images that are not kept at a size of their own are brought to `size` pixels.

        tokenizer: the model's, None if it reads no texts. SettingError if the model does not read what the task is of.
        """


@dataclass(frozen=True)
class Embedded(Task):
    """A task out of an installed package, and the function that builds it. Its images are 32 x 32.

    more_test: whether its data have `Dataset.more_test`.
    """

    build: Callable[[], Source]
    more_test: bool = False

    def load(self, size: int, *, tokenizer: Tokenizer | None = None) -> Dataset:
        """The first call builds the data (seconds) and caches them under `cache_dir()`; `size` is the backbone's."""
        module = inspect.getsource(inspect.getmodule(self.build))  # type: ignore[arg-type]
        recipe = f"{module}{inspect.getsource(split_source)}{CAP, LARGER_TEST, SPLIT_SEED}"
        path = cache_dir() / "tasks" / f"{self.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.npz"
        if not path.exists():
            try:
                arrays = split_source(self.build())
            except ModuleNotFoundError as error:
                raise SettingError(
                    f"task {self.name!r} needs the package {error.name!r}; install it with pip"
                ) from error
            with atomic_write(path) as temporary:
                np.savez_compressed(temporary, allow_pickle=False, **arrays)
        with np.load(path) as stored:
            return _dataset(self.name, dict(stored))


TASKS: Registry[Task] = Registry("task")


def task(
    name: str, *, licence: str, source: str, more_test: bool = False
) -> Callable[[Callable[[], Source]], Callable[[], Source]]:
    """Register the decorated source function under `name`, with a line of licence and provenance.

    more_test: whether its source has images for a larger test split (`Dataset.more_test`).
    """
    return TASKS.register(name, lambda build: Embedded(name, licence, source, build, more_test))


def find(name: str) -> Task:
    """The task called `name`; SettingError names the nearest one if there is none."""
    return TASKS.find(name, f"task {name!r}")


def called(name: str) -> str:
    """What a task is called in a run: a folder by its last part, hf:OWNER/NAME by NAME, and with a configuration by
    NAME-CONFIGURATION."""
    if name.startswith(HUB):
        return "-".join(name.removeprefix(HUB).split("/")[1:])
    return name.rstrip("/").rsplit("/", 1)[-1]


def check(name: str) -> None:
    """SettingError if `name` has no slash in it (a folder, which may stand on a party's machine) and is unknown, or is
    no proper name of a data set of the hub."""
    if name.startswith(HUB):
        from atm_fl.tasks import hugging_face

        hugging_face.check(name)
    elif "/" not in name:
        find(name)


def place(name: str) -> Path:
    """Where on this machine the data of a task with a slash in its name are: its folder or file.

    SettingError, with the command that brings it, for a data set of the hub that is not here.
    """
    from atm_fl.tasks import hugging_face

    return hugging_face.found(name) if name.startswith(HUB) else Path(name)


def load(name: str, size: int = IMAGE_SIZE, workers: int = 0, tokenizer: Tokenizer | None = None) -> Dataset:
    """The data of a task: a registered one or, with a slash in its name, a folder, a file, or a data set of the hub
    that was brought to this machine.

    size: what images are brought to, 0 for a model that reads none; tokenizer: None for one that reads no texts.
    workers: threads that decode a folder, with 0 this one. SettingError if the model does not read what the task is of.
    """
    from atm_fl.tasks.folder import load_folder
    from atm_fl.tasks.texts import TextTask, is_text, load_texts

    check(name)
    path = place(name) if "/" in name else None
    of_texts = is_text(path) if path else isinstance(find(name), TextTask)
    if not size and not of_texts:
        raise SettingError(f"task {name!r} is of images, which the model does not read; take one that does")
    if not path:
        return find(name).load(size, tokenizer=tokenizer)
    data = load_texts(path, tokenizer) if of_texts else load_folder(path, size, workers)
    return replace(data, name=called(name)) if name.startswith(HUB) else data


def test_groups(name: str, larger: bool) -> np.ndarray | None:
    """`Dataset.test_groups` of a task, or of its `with_larger_test`; only data that may have them are read."""
    known = None if "/" in name else find(name)
    if not isinstance(known, Embedded):
        return None
    data = known.load(IMAGE_SIZE)
    return (data.with_larger_test() if larger else data).test_groups


def cache_dir() -> Path:
    """Where built tasks are kept: $ATM_FL_CACHE, by default ~/.cache/atm-fl."""
    return Path(os.environ.get("ATM_FL_CACHE", "~/.cache/atm-fl")).expanduser()


def to_square(image: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """An image [h, w] or [h, w, 3] of any uint8 kind as RGB [3, size, size]."""
    from PIL import Image

    resized = Image.fromarray(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


def split_source(source: Source, cap: int = CAP, larger_test: int = LARGER_TEST) -> dict[str, np.ndarray]:
    """Resize, drop exact duplicates, keep about `cap` images, and split by group, stratified by class.

    What the cap leaves over, and what the source has `for_test`, becomes "more_test": per class as many as bring its
    test images to its share of `larger_test`, without what shows a thing of the training or validation split.
    """
    images, labels, groups = _without_duplicates(*_squares(source, 0))
    own = len(images)

    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(int(group), []).append(index)
    strata: dict[int, list[list[int]]] = {}
    for indices in members.values():
        strata.setdefault(int(labels[indices[0]]), []).append(indices)

    random = np.random.default_rng(SPLIT_SEED)
    chosen: dict[str, list[int]] = {name: [] for name in SPLITS}
    left_over: list[int] = []
    for label in sorted(strata):
        parts = [strata[label][i] for i in random.permutation(len(strata[label]))]
        keep = min(1.0, cap / len(labels)) * sum(map(len, parts))
        taken = 0
        for positions in parts:
            if taken >= keep:
                left_over.extend(positions)
                continue
            name = "test" if taken < TEST * keep else "validation" if taken < (TEST + VALIDATION) * keep else "train"
            chosen[name].extend(positions)
            taken += len(positions)
    if source.for_test:
        tuned_on = frozenset(groups[chosen["train"] + chosen["validation"]].tolist())
        more = _squares(source.for_test(tuned_on), len(source.images))
        images, labels, groups = _without_duplicates(
            *(np.concatenate(pair) for pair in zip((images, labels, groups), more, strict=True))
        )
        left_over.extend(range(own, len(labels)))
    chosen["more_test"] = _fill(chosen["test"], left_over, labels, larger_test)
    arrays = {"classes": np.array(list(source.classes))}
    for name, indices in chosen.items():
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = images[indices], labels[indices]
    if source.groups is not None:
        for name in ("test", "more_test"):
            arrays[f"{name}_groups"] = groups[chosen[name]]
    return arrays


def _squares(source: Source, first_group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images uint8 [n, 3, s, s], labels int64 [n], groups int [n], numbered from `first_group` if it has none)."""
    images = np.stack([to_square(image) for image in source.images])
    labels = np.asarray(source.labels, dtype=np.int64)
    groups = np.arange(first_group, first_group + len(labels)) if source.groups is None else np.asarray(source.groups)
    return images, labels, groups


def _without_duplicates(
    images: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of equal images the first alone, in their order."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    first = np.sort(np.unique(np.array(digests, dtype="V32"), return_index=True)[1])
    return images[first], labels[first], groups[first]


def _fill(test: list[int], left: list[int], labels: np.ndarray, size: int) -> list[int]:
    """Of the indices `left` the first of each class that bring `test` to its share of `size`; classes keep their parts
    of `test`."""
    counts = np.bincount(labels[test], minlength=labels.max() + 1)
    wanted = (counts * (size / max(1, len(test)))).astype(int) - counts
    more = []
    for index in left:
        if wanted[labels[index]] > 0:
            wanted[labels[index]] -= 1
            more.append(index)
    return more


def _dataset(name: str, arrays: dict[str, np.ndarray]) -> Dataset:
    train, validation, test = (
        Split(torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]))
        for split in SPLITS
    )
    classes = tuple(map(str, arrays["classes"]))
    more = Split(torch.from_numpy(arrays["more_test_images"]), torch.from_numpy(arrays["more_test_labels"]))
    return Dataset(
        name,
        classes,
        train,
        validation,
        test,
        test_groups=arrays.get("test_groups"),
        more_test=more if len(more) else None,
        more_test_groups=arrays.get("more_test_groups"),
    )
