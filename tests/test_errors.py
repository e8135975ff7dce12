"""A party's errors go to the server: they say the rule, and what tells of its data or disk stays in its own log."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from PIL import Image

from atm_fl.clients.app import app as client_app
from atm_fl.errors import RunError, figures, with_figures
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings

ROOT = Path(__file__).parents[1]
TOLD_BY = (
    *["atm_fl/federation/shares.py", "atm_fl/federation/bounds.py", "atm_fl/privacy/budget.py"],
    *["atm_fl/privacy/accounting.py", "atm_fl/vectors/ring.py", "atm_fl/vectors/finite.py", "atm_fl/clients/app.py"],
)
SECRET = ("len(", "path", "largest", "holding", "tuned_on", "images", "labels")
"""What stands in an expression that tells of a party's records or its disk."""


def shown(raised: ast.Raise) -> list[str]:
    """The expressions in the text of a raised error, without those of its figures."""
    figure = {
        id(node)
        for call in ast.walk(raised)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "with_figures"
        for node in ast.walk(call.args[1])
    }
    return [
        ast.unparse(node.value)
        for node in ast.walk(raised)
        if isinstance(node, ast.FormattedValue) and id(node) not in figure
    ]


@pytest.mark.parametrize("file", TOLD_BY)
def test_no_error_of_a_party_has_a_figure_of_its_data_or_disk_in_its_text(file: str) -> None:
    raised = [node for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Raise)]
    assert raised
    allowed = {"len(names)", "len(settings.task_names)"}  # of the run, not of the party
    message = [text for node in raised for text in shown(node) if text not in allowed]
    assert [text for text in message if any(word in text for word in SECRET)] == []


def test_figures_are_kept_through_a_chain_and_are_not_in_the_text() -> None:
    error = RunError("refused")
    error.__cause__ = with_figures(ValueError("too long"), "it is 7")
    assert str(error) == "refused"
    assert str(error.__cause__) == "too long"
    assert figures(error) == ["it is 7"]


def torn(root: Path) -> None:
    picture = root / "train" / "secretclass" / "her name.png"
    picture.write_bytes(picture.read_bytes()[:60])


def without_a_split(root: Path) -> None:
    (root / "validation").rename(root / "secret name")


def one_colour(root: Path) -> None:
    for picture in (root / "train").rglob("*.png"):
        Image.new("RGB", (40, 40), (1, 2, 3)).save(picture)


def another_class(root: Path) -> None:
    (root / "test" / "secretclass").rename(root / "test" / "another secret")


def unreadable(root: Path) -> None:
    (root / "train").rename(root / "elsewhere")
    (root / "train").write_text("secret")


@pytest.mark.parametrize("spoil", [torn, without_a_split, one_colour, another_class, unreadable])
def test_what_is_wrong_with_a_partys_data_stays_in_its_log(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    root = tmp_path / "private place" / "red"
    for split in ("train", "validation", "test"):
        for label in ("secretclass", "other"):
            (root / split / label).mkdir(parents=True)
            for name in ("her name", "b"):
                Image.effect_noise((40, 40), 90).convert("RGB").save(root / split / label / f"{name}.png")
    spoil(root)
    reason = answered(config, caplog, {"data": str(root)})
    assert reason == "red: its data cannot be used; its own log says why"
    assert any(word in caplog.text for word in ("her name", "secret", "pictures are nothing but", "private place"))


def answered(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture, node: dict[str, Any], kind: str = "query"
) -> str:
    """The reason in the answer of a party's own machine."""
    settings = Settings.parse(config)
    grid = InProcessGrid(client_app, 3, settings.as_config())
    grid.contexts[1].node_config = node
    with caplog.at_level("WARNING", logger="flwr"):
        info = ConfigRecord({"run": "a-run", "round": 1})
        answer = client_app(Message(RecordDict({"info": info}), 1, kind), grid.contexts[1])
    return str(answer.error.reason)


@pytest.mark.parametrize("key", ["policy", "trusted-parties"])
@pytest.mark.parametrize(
    "content", [None, "secret = [", "secret = 1", "red ssh-ed25519 secret", "red secret\nred secret"]
)
def test_what_is_wrong_with_its_own_files_stays_in_its_log(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, content: str | None
) -> None:
    file = tmp_path / "secret place"
    if content is not None:
        file.write_text(content)
    reason = answered(config, caplog, {"task": "red", key: str(file)})
    assert reason == f"red: its {key} cannot be used; its own log says why"
    assert "secret" in caplog.text


def test_no_path_of_a_partys_is_in_what_it_tells(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "its place"
    monkeypatch.setenv("ATM_FL_CACHE", str(cache))
    (cache / "identity").mkdir(parents=True)
    (cache / "identity" / "mnist").write_text("no key")
    secure = {**config, "tasks": "mnist,digits,icons", "secure-aggregation": True}
    reason = answered(secure, caplog, {"task": "mnist"}, "query.keys")
    assert reason.startswith("mnist: (a path of its own) is no OpenSSH private key")
    assert f"{cache}/identity/mnist is no OpenSSH" in caplog.text


def test_how_many_images_are_too_few_stays_in_the_partys_log(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings.parse(config | {"local-epochs": 0.001})
    grid = InProcessGrid(client_app, 3, settings.as_config())
    with caplog.at_level("WARNING", logger="flwr"):
        answer = client_app(Message(RecordDict({"info": ConfigRecord()}), 1, "query"), grid.contexts[1])
    assert answer.error.reason == "local-epochs=0.001: red has too few images for it"
    assert "red has 36 images" in caplog.text
