"""Clients that refuse a base which moved further than `max-update-norm` allows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from federation import final, in_process, same
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as tries
from hypothesis import strategies as st

from atm_fl import vectors
from atm_fl.clients.app import app as client_app
from atm_fl.clients.app import received_base
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.bounds import check_base
from atm_fl.federation.client import Party
from atm_fl.federation.client_state import ClientState
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings

LIMIT = 2.0


@pytest.fixture
def trapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that after round 1 scales the patch embedding by a thousand, so that the vectors of round 2 hold it."""
    honest = Run.advance

    def advance(run: Run, merged: torch.Tensor, buffers: torch.Tensor | None) -> None:
        honest(run, merged, buffers)
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
    with pytest.raises(RunError, match=r"red refuses the server's base: it is .* one before"):
        in_process(
            Settings.parse({**config, "run-dir": config["run-dir"] + "-tight", "max-update-norm": min(norms) / 2})
        )


@pytest.mark.usefixtures("trapped")
def test_a_crafted_base_is_refused(config: dict[str, Any]) -> None:
    in_process(
        Settings.parse({**config, "run-dir": config["run-dir"] + "-free"})
    )  # without the setting it goes through
    with pytest.raises(RunError, match=r"round 2: 0 of 3 clients succeeded.* blue refuses the server's base"):
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
    assert "red refuses the server's base" in warnings[0]
    assert f"max-update-norm={LIMIT:g};" in warnings[0]


def test_a_node_that_is_told_nonsense_says_so_before_the_first_round(config: dict[str, Any]) -> None:
    settings = Settings.parse(config)
    grid = InProcessGrid(client_app, 3, settings.as_config())
    grid.contexts[2].node_config["max-update-norm"] = -1.0
    with pytest.raises(RunError, match=r"max-update-norm=-1.0 in this SuperNode's --node-config: it must be 0 or more"):
        serve(grid, settings)


@seed(0)
@tries(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-3, 3)), min_size=1, max_size=8))
def test_a_server_that_lies_about_rounds_moves_the_base_no_further(
    settings: Settings, tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, float]]
) -> None:
    """Whatever round the server says it is, each message may move the base that was taken before by the limit.

    And all of them together by no more than the run's three rounds could.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ATM_FL_CACHE", str(tmp_path_factory.mktemp("cache")))
        party = Party(settings, settings.task_names[0])
        direction = torch.zeros(party.model.layout.size)
        direction[0] = 1.0
        held = party.model.pretrained
        for number, length in moves:
            base = held + length * direction
            moved, drifted = (float((base - before).double().norm()) for before in (held, party.model.pretrained))
            if moved <= 1.0 and drifted <= 3.0:
                assert torch.equal(received(party, base, number), base)
                held = base
            else:
                with pytest.raises(RunError, match="red refuses the server's base"):
                    received(party, base, number)


def test_small_steps_lead_no_further_than_the_runs_rounds(settings: Settings) -> None:
    party = Party(settings, settings.task_names[0])
    step = torch.zeros(party.model.layout.size)
    step[0] = 0.9
    base = party.model.pretrained
    for _ in range(3):
        base = base + step
        received(party, base, 1)
    with pytest.raises(RunError, match="from the pretrained one after 3 rounds"):
        received(party, base + step, 1)


@pytest.mark.parametrize("number", [0, -1, 4, 10**6])
def test_no_round_is_served_that_the_run_does_not_have(config: dict[str, Any], number: int) -> None:
    settings = Settings.parse(config)
    grid = InProcessGrid(client_app, 3, settings.as_config())
    content = RecordDict({"info": ConfigRecord({"round": number, "run": "0" * 16})})
    (answer,) = grid.send_and_receive([Message(content, 1, "train")])
    assert answer.error.reason == f"red refuses round {number} of a run of rounds=3"


def received(party: Party, base: torch.Tensor, number: int) -> torch.Tensor:
    """What a client makes of a whole base that is said to be of round `number`."""
    InProcessGrid(client_app, 1, {})  # sets the identity that a message needs
    info = {"layout": party.model.layout.digest, "base": vectors.digest(base), "from": "", "codec": "fp32"}
    content = {"info": ConfigRecord({**info, "run": "0" * 16, "round": number})}
    message = Message(RecordDict({**content, "arrays": ArrayRecord({"values": Array(base.numpy())})}), 1, "train")
    taken = received_base(message, party, 1.0)
    assert taken is not None
    return taken


def test_no_base_moves_that_is_no_number() -> None:
    zero = torch.zeros(4)
    check_base("t", zero, 1.0, zero, "one before")
    with pytest.raises(RunError, match="t refuses the server's base: it is nan"):
        check_base("t", math.nan * zero, 1.0, zero, "one before")


def test_a_finished_run_may_be_resumed_under_a_bound(config: dict[str, Any]) -> None:
    bounded = {**config, "max-update-norm": LIMIT}
    in_process(Settings.parse(bounded))
    in_process(Settings.parse({**bounded, "rounds": 4, "resume": True}))


def test_a_base_held_is_not_told_if_it_is_damaged() -> None:
    kept, base = ClientState("1" * 16, "red"), torch.arange(5.0)
    assert kept.held() is None
    kept.save_base(base, vectors.digest(base))
    held = kept.held()
    assert held is not None
    assert torch.equal(held, base)
    kept.save_base(base, "of another base")
    assert kept.held() is None


def test_a_start_that_no_party_knows_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="max-update-norm=1: with start='elsewhere' nobody"):
        Settings.parse({**config, "max-update-norm": 1, "start": "elsewhere"})
