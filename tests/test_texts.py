"""Text tasks: files of rows, folders of text files, and the embedded ones."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atm_fl import tasks
from atm_fl.errors import SettingError
from atm_fl.tasks import texts

ROWS = [(f"a text about {label}, the {number}th", label) for label in ("cats", "dogs") for number in range(60)]


class Letters:
    """A tokenizer whose tokens are letters, 40 at most."""

    key = "letters"

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text[:40]] for text in texts]


def read(split: tasks.Split) -> list[str]:
    """The texts of a split, as Letters tokenised them."""
    assert isinstance(split.images, torch.Tensor)
    return ["".join(chr(token - 1) for token in row if token) for row in split.images.tolist()]


def write(path: Path, rows: Sequence[tuple[str, str]], columns: tuple[str, str] = ("text", "label")) -> Path:
    """Rows as a file of the format that `path` ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".jsonl" in path.name:
        content = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
        path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *rows])
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["pets.jsonl", "pets.jsonl.gz", "pets.csv", "pets.tsv"])
def test_one_file_of_rows_is_a_task_whose_splits_are_drawn(name: str, tmp_path: Path) -> None:
    data = tasks.load(str(write(tmp_path / name, ROWS)), 0, tokenizer=Letters())
    assert data.classes == ("cats", "dogs")
    everything = [text for split in tasks.SPLITS for text in read(data.split(split))]
    assert sorted(everything) == sorted(text[:40] for text, _ in ROWS)
    assert 0.05 < len(data.validation) / len(ROWS) < 0.3
    assert 0.1 < len(data.test) / len(ROWS) < 0.4
    for split in tasks.SPLITS:
        here = data.split(split)
        assert [data.classes[label] in text for text, label in zip(read(here), here.labels, strict=True)]


def test_a_parquet_file_is_read_as_the_rows_it_holds(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": [text for text, _ in ROWS], "label": [label == "dogs" for _, label in ROWS]})
    parquet.write_table(table, tmp_path / "pets.parquet")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "pets.parquet").read_bytes()[:200])
    data = tasks.load(str(tmp_path / "pets.parquet"), 0, tokenizer=Letters())
    assert data.classes == ("False", "True")
    with pytest.raises(SettingError, match="torn.parquet cannot be read"):
        tasks.load(str(tmp_path / "torn.parquet"), 0, tokenizer=Letters())


def test_a_folder_s_files_are_its_splits_and_its_description_names_columns_and_words(tmp_path: Path) -> None:
    root = tmp_path / "stars"
    columns = ("body", "stars")
    write(root / "train.csv", [("good", "10"), ("bad", "2"), ("fair", "10")], columns)
    write(root / "val.jsonl", [("so-so", "2")], columns)
    write(root / "test.tsv", [("great", "10")], columns)
    (root / "task.toml").write_text(
        'text = "body"\nlabel = "stars"\ntemplates = ["It is {}."]\n[classes]\n2 = "poor; dull"\n'
    )
    data = tasks.load(str(root), 0, tokenizer=Letters())
    assert data.classes == ("poor; dull", "10")
    assert data.prompts() == [["It is poor.", "It is dull."], ["It is 10."]]
    assert (read(data.train), read(data.validation), read(data.test)) == (["good", "bad", "fair"], ["so-so"], ["great"])
    assert data.train.labels.tolist() == [1, 0, 1]


def test_a_folder_of_text_files_a_class_is_the_task_of_the_same_rows(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[::2]), ("validation", ROWS[1::4]), ("test", ROWS[3::4])):
        for number, (text, label) in enumerate(rows):
            file = tmp_path / "pets" / split / label / f"{number:03}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    (tmp_path / "pets" / "train" / "cats" / "._000.txt").write_bytes(b"\xff\xfe\x00")
    data = tasks.load(str(tmp_path / "pets"), 0, tokenizer=Letters())
    assert read(data.train) == [text[:40] for text, _ in ROWS[::2]]
    assert (len(data.validation), len(data.test)) == (len(ROWS[1::4]), len(ROWS[3::4]))


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",))), min_size=1, max_size=20), st.data())
def test_a_batch_is_as_wide_as_its_longest_text_and_loses_no_token(written: list[str], data: st.DataObject) -> None:
    split = tasks.Split(texts.tokenise(written, Letters()), torch.zeros(len(written), dtype=torch.int64))
    order = torch.tensor(data.draw(st.permutations(range(len(written)))))
    size = data.draw(st.integers(1, 8))
    got = [row for batch, _ in split.batches(order, size) for row in batch.tolist()]
    widths = [batch.shape[1] for batch, _ in split.batches(order, size)]
    assert ["".join(chr(token - 1) for token in row if token) for row in got] == [written[i][:40] for i in order]
    chunks = [[written[i][:40] for i in chunk] for chunk in order.split(size)]
    assert widths == [max(1, *(len(text) for text in chunk)) for chunk in chunks]


def test_what_is_tokenised_is_kept_for_its_owner_alone_and_by_the_tokenizer(tmp_path: Path) -> None:
    class Once(Letters):
        calls = 0

        def __call__(self, texts: Sequence[str]) -> list[list[int]]:
            self.calls += 1
            return super().__call__(texts)

    once, other = Once(), Once()
    other.key = "other"
    first = texts.tokenise(["one", "two"], once)
    assert torch.equal(texts.tokenise(["one", "two"], once), first)
    texts.tokenise(["one", "two"], other)
    assert (once.calls, other.calls) == (1, 1)
    kept = list((tmp_path / "cache" / "texts").iterdir())
    assert {file.stat().st_mode & 0o777 for file in kept} == {0o600}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "words,label\nx,1\n", "a.csv, row 2, has no 'text' .it has words, label.; name the columns"),
        ("a.csv", "text,label\nx\n", "a.csv, row 2, has no 'label'"),
        ("a.csv", 'text,label\n"x,1\n', "a.csv cannot be read"),
        ("a.jsonl", '{"text": "x"', "a.jsonl cannot be read"),
        ("a.jsonl", "[1]\n", "a.jsonl, row 1, is no object"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "row 1, has no 'label'"),
        ("a.jsonl", '{"text": "x", "label": 1, "split": "dev"}\n', "row 1: split 'dev' is none of train, val"),
        ("a.jsonl", "", "has 0 label.s. in train"),
        ("a.jsonl.gz", "no gzip", "a.jsonl.gz cannot be read"),
        ("b/train.csv", "text,label\nx,1\ny,2\n", "b has no (validation|test) texts"),
        ("b/dev.csv", "text,label\nx,1\n", "dev.csv is of no split; call it train, validation or test"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_the_row_and_the_fix(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(SettingError, match=message):
        tasks.load(str(file if "/" not in name else file.parent), 0, tokenizer=Letters())


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("txt = 'x'", "'txt' is unknown; did you mean 'text'"),
        ("text = 3", "text = 3 is not what it takes"),
        ("templates = [1]", "templates = .1. is not"),
        ("text =", "is no TOML"),
        ("[classes]\nhorses = 'nags'", "words a label 'horses'"),
    ],
)
def test_a_description_that_is_wrong_is_refused(toml: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "pets" / "train.csv", ROWS)
    (tmp_path / "pets" / "task.toml").write_text(toml)
    with pytest.raises(SettingError, match=message):
        tasks.load(str(tmp_path / "pets"), 0, tokenizer=Letters())


def test_a_label_that_train_has_not_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "pets" / f"{split}.csv", ROWS if split == "train" else [("x", "horses")])
    with pytest.raises(SettingError, match="test has a label 'horses' that train has not"):
        tasks.load(str(tmp_path / "pets"), 0, tokenizer=Letters())


def test_a_model_that_does_not_read_what_a_task_is_of_is_refused(tmp_path: Path) -> None:
    for task in ("mails", str(write(tmp_path / "pets.csv", ROWS))):
        with pytest.raises(SettingError, match="is of texts, which the model does not read"):
            tasks.load(task)
    with pytest.raises(SettingError, match="'digits' is of images, which the model does not read"):
        tasks.load("digits", 0, tokenizer=Letters())


@pytest.mark.parametrize("name", sorted(name for name, task in tasks.TASKS.items() if isinstance(task, texts.TextTask)))
def test_an_embedded_text_task_has_enough_texts_none_twice_and_every_label_everywhere(name: str) -> None:
    rows = texts.packaged(name)
    everything = [text for split in tasks.SPLITS for text in rows.texts[split]]
    assert len(rows.texts["train"]) == 2000
    assert len(rows.texts["test"]) >= 1600
    assert len(set(everything)) == len(everything)
    assert set(rows.labels["train"]) == set(rows.labels["test"])
    data = tasks.load(name, 0, tokenizer=Letters())
    for split in tasks.SPLITS:
        assert set(data.split(split).labels.tolist()) == set(range(len(data.classes)))
    assert len(data.validation) > 200
