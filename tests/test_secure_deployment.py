"""Secure aggregation deployed: real processes, TLS and SuperNode authentication on loopback, and a party killed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_folder
from federation import ROOT, Federation, final, same, wait
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from atm_fl.clients.app import app as client_app
from atm_fl.runs.metrics import read_metrics
from atm_fl.server.app import serve
from atm_fl.server.deployment import submit
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings

NAMES = ("red", "green", "blue", "grey")


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Four parties with a folder of images each."""
    folders = [make_folder(tmp_path / "data" / name, seed) for seed, name in enumerate(NAMES)]
    made = Federation(tmp_path / "federation", [str(folder) for folder in folders])
    yield made
    made.stop()


@pytest.mark.slow
def test_a_party_killed_within_a_round_is_out_of_an_otherwise_right_sum(
    tmp_path: Path, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TLS; one is killed when its keys are shared and its vector is not there yet."""
    federation.start()
    machines = federation.home / "machines"
    config = {"tasks": ",".join(f"./{name}" for name in NAMES), "rounds": 1, "batch-size": 8, "device": "cpu"}
    config |= {"local-epochs": 40}  # so that the vector takes seconds
    config |= {"secure-aggregation": True, "on-failure": "skip", "min-successful": 3, "node-timeout": 240.0}
    settings = Settings.parse({**config, "run-dir": str(tmp_path / "run")})
    killed: list[str] = []

    def kill_grey_at_work() -> None:
        """Its SuperNode has the message that asks for the vector."""

        def at_work() -> bool:
            return "Received successfully" in federation.said("grey").partition("Receiving: train message")[2]

        wait(at_work, "grey at work", 1500)
        federation.kill("grey")
        killed.append("grey")

    watcher = threading.Thread(target=kill_grey_at_work, daemon=True)
    watcher.start()
    submit(settings, ROOT, federation.address, federation.secrets / "ca.crt")
    assert killed == ["grey"]
    (secret,) = (machines / "grey" / "cache").glob("runs/*/grey/secret.json")
    assert json.loads(secret.read_text())["stage"] == "opened"
    assert not [path for name in NAMES[:3] for path in (machines / name / "cache").glob("runs/**/secret*")]
    (line,) = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "merge"]
    assert line["tasks"] == ["red", "green", "blue"]
    assert list(line["failures"]) == ["grey"]

    # the same bits as without any network, where that client fails before it sends its vector
    class Dropping(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            if message.metadata.message_type == "train" and str(context.node_config["data"]).endswith("grey"):
                return Message(Error(2, "gone"), reply_to=message)
            return client_app(message, context)

    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    local = Settings.parse({**config, "run-dir": str(tmp_path / "local")})
    grid = InProcessGrid(Dropping(), 4, local.as_config())
    for context, folder in zip(grid.contexts.values(), federation.data.values(), strict=True):
        context.node_config = {"data": folder}
    serve(grid, local)
    assert same(final(tmp_path / "run"), final(tmp_path / "local"))
