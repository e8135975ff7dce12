"""A party's errors go to the server: they say the rule, and what tells of its data or disk stays in its own log."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

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


def test_how_many_images_are_too_few_stays_in_the_partys_log(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings.parse(config | {"local-epochs": 0.001})
    grid = InProcessGrid(client_app, 3, settings.as_config())
    with caplog.at_level("WARNING", logger="flwr"):
        answer = client_app(Message(RecordDict({"info": ConfigRecord()}), 1, "query"), grid.contexts[1])
    assert answer.error.reason == "local-epochs=0.001: red has too few images for it"
    assert "red has 36 images" in caplog.text
