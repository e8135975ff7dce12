"""Clients that refuse a base which moved further than `max-update-norm` allows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_runs import final, in_process, same

from atm_fl import vectors
from atm_fl.bounds import check_base
from atm_fl.errors import RunError, SettingError
from atm_fl.kept import Kept
from atm_fl.runs import Run, read_metrics
from atm_fl.settings import Settings
from clients.app import app as client_app
from server.app import serve
from server.grid import InProcessGrid

LIMIT = 2.0


@pytest.fixture
def trapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that after round 1 scales the patch embedding by a thousand, so that the vectors of round 2 hold it."""
    honest = Run.advance

    def advance(run: Run, merged: torch.Tensor) -> None:
        honest(run, merged)
        if run.rounds_done == 1:
            run.layout.views(run.base)["vit.patch_embed.proj.weight"].mul_(1000)
            run.digest = vectors.digest(run.base)

    monkeypatch.setattr(Run, "advance", advance)


@pytest.mark.parametrize("down", ["fp32", "int8"])
def test_an_honest_run_is_the_same_with_and_without(config: dict[str, Any], down: str) -> None:
    config |= {"codec-down": down}
    free = in_process(Settings.parse({**config, "run-dir": config["run-dir"] + "-free"}))
    bound = in_process(Settings.parse({**config, "max-update-norm": LIMIT}))
    assert same(final(free.directory), final(bound.directory))
    norms = [line["norm"] for line in read_metrics(bound.directory) if line["kind"] == "merge"]
    assert len(norms) == 3
    assert max(norms) < LIMIT
    with pytest.raises(RunError, match=r"red refuses the server's base of round 1: it is .* pretrained base"):
        in_process(
            Settings.parse({**config, "run-dir": config["run-dir"] + "-tight", "max-update-norm": min(norms) / 2})
        )


@pytest.mark.usefixtures("trapped")
def test_a_crafted_base_is_refused(config: dict[str, Any]) -> None:
    in_process(
        Settings.parse({**config, "run-dir": config["run-dir"] + "-free"})
    )  # without the setting it goes through
    with pytest.raises(
        RunError, match=r"round 2: 0 of 3 clients succeeded.* blue refuses the server's base of round 1"
    ):
        in_process(Settings.parse({**config, "max-update-norm": LIMIT}))


@pytest.mark.usefixtures("trapped")
def test_a_node_has_the_last_word_and_the_policy_decides_what_follows(config: dict[str, Any]) -> None:
    """Only red distrusts the server, by its own node-config; the run's settings say nothing. The others go on."""
    settings = Settings.parse({**config, "on-failure": "skip", "min-successful": 2})
    grid = InProcessGrid(client_app, 3, settings.as_config())
    grid.contexts[1].node_config["max-update-norm"] = LIMIT
    run = serve(grid, settings)
    merges = [line["tasks"] for line in read_metrics(run.directory) if line["kind"] == "merge"]
    assert merges == [["red", "green", "blue"], ["green", "blue"], ["green", "blue"]]
    warnings = [line["text"] for line in read_metrics(run.directory) if line["kind"] == "warning"]
    assert "red refuses the server's base of round 1" in warnings[0]
    assert f"max-update-norm={LIMIT:g} allows 2" in warnings[0]


def test_a_node_that_is_told_nonsense_says_so_before_the_first_round(config: dict[str, Any]) -> None:
    settings = Settings.parse(config)
    grid = InProcessGrid(client_app, 3, settings.as_config())
    grid.contexts[2].node_config["max-update-norm"] = -1.0
    with pytest.raises(RunError, match=r"max-update-norm=-1.0 in this SuperNode's --node-config: it must be 0 or more"):
        serve(grid, settings)


def test_the_bound_grows_with_rounds_missed_and_holds_within_a_round() -> None:
    zero, unit = torch.zeros(4), torch.tensor([1.0, 0, 0, 0])
    check_base("t", zero, 0, 1.0, {"pretrained base": (0, zero)})
    check_base("t", 3 * unit, 5, 1.0, {"base held": (2, zero)})
    check_base("t", unit, 2, 1.0, {"base held": (2, zero)})  # the round repeated after a resume
    for base, done, rounds in ((1e-3 * unit, 0, 0), (3.01 * unit, 5, 2), (1.01 * unit, 2, 2), (math.nan * unit, 5, 2)):
        with pytest.raises(RunError, match="t refuses"):
            check_base("t", base, done, 1.0, {"base held": (rounds, zero)})


def test_a_base_held_is_told_with_its_round_and_not_if_it_is_damaged() -> None:
    kept, base = Kept("0" * 16, "red"), torch.arange(5.0)
    assert kept.held() is None
    kept.save_base(base, vectors.digest(base), 7)
    held = kept.held()
    assert held is not None
    assert held[0] == 7
    assert torch.equal(held[1], base)
    kept.save_base(base, "of another base", 8)
    assert kept.held() is None


def test_a_start_that_no_party_knows_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="max-update-norm=1: with start='elsewhere' nobody"):
        Settings.parse({**config, "max-update-norm": 1, "start": "elsewhere"})
