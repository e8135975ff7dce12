"""Drills: what goes wrong on a real federation, and what a run makes of it. docs/reliability.md has their outcomes.

`slow` ones start a SuperLink with TLS and SuperNodes as processes on loopback (tests/federation.py).
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import pytest
from conftest import make_folder
from federation import Cable, Federation, final, in_process, same, wait
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo

from atm_fl.clients.app import app as client_app
from atm_fl.deployment.keys import make_authority, make_key_pair
from atm_fl.errors import RunError
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.loop import run_loop
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.server.app import serve
from atm_fl.server.grid import LOST, InProcessGrid
from atm_fl.server.simulation import plain
from atm_fl.settings import Settings


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Two parties with a folder of images each."""
    names = ("red", "green")
    made = Federation(tmp_path / "f", [str(make_folder(tmp_path / "data" / n, i)) for i, n in enumerate(names)])
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def drill(tmp_path: Path, federation: Federation) -> dict[str, Any]:
    """A run config of two rounds on a federation's parties."""
    folders = ",".join(federation.data.values())
    return {"tasks": folders, "rounds": 2, "batch-size": 8, "run-dir": str(tmp_path / "run")}


def undisturbed(config: dict[str, Any]) -> Path:
    """The run directory of a plain loop with the same config."""
    return run_loop(Settings.parse({**config, "run-dir": config["run-dir"] + "-plain", "resume": False})).directory


def with_the_same_participants(config: dict[str, Any], directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run directory of a plain loop in which each round has the tasks that it had in `directory`."""
    tasks = {line["round"]: line["tasks"] for line in lines(directory, "merge")}
    with monkeypatch.context() as patch:
        patch.setattr(Settings, "part_taken", lambda _, task, number: float(task in tasks[number]))
        return undisturbed(config)


def lines(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(directory) if line["kind"] == kind]


# ------------------------------------------------------------------------------------------------- with real processes


def server_said(directory: Path) -> str:
    return plain(directory / "flower.log")


@pytest.mark.slow
def test_strangers_are_refused_and_the_run_does_not_notice(federation: Federation, drill: dict[str, Any]) -> None:
    """Wrong CA, unregistered key, a copied key used twice, and plain text against TLS, all during a run."""
    home = federation.home / "federation" / "parties"
    (home / "stranger").mkdir()
    make_key_pair(home / "stranger" / "key", home / "stranger.pub", "stranger")
    make_authority(federation.home / "other.crt", federation.home / "other.key")
    run = federation.run(drill)
    run.await_round(1)
    refused = {
        "wrong-ca": federation.start_supernode("red", called="wrong-ca", ca=str(federation.home / "other.crt")),
        "unregistered": federation.start_supernode("red", called="unregistered", key="stranger"),
        "copied": federation.start_supernode("red", called="copied"),
        "insecure": federation.start_supernode("red", "--insecure", called="insecure"),
    }
    httpx.get(f"https://{federation.address}/health", verify=str(federation.secrets / "ca.crt"), timeout=60)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{federation.address}/health", timeout=60)
    codes = {name: process.wait(300) for name, process in refused.items()}
    assert all(codes.values()), codes
    assert "certificate verify failed" in federation.said("wrong-ca").lower()
    assert "Exit Code: 305" in federation.said("unregistered")
    assert "Exit Code: 305" in federation.said("copied")
    assert "requires a secure TLS connection" in " ".join(federation.said("insecure").split())
    assert run.finish() == ""
    assert same(final(run.directory), final(undisturbed(drill)))


@pytest.mark.slow
def test_a_clientapp_and_a_supernode_that_are_killed_cost_no_round(
    federation: Federation, drill: dict[str, Any]
) -> None:
    """The ClientApp of one party in round 1, the SuperNode of the other in round 2; it returns."""
    run = federation.run(drill)
    federation.tuning("red", 1).kill()
    run.await_round(1)
    federation.tuning("green", 2)
    federation.kill("green")
    federation.return_supernode("green")
    assert run.finish() == ""
    said = server_said(run.directory)
    assert "red was lost: ClientApp stopped responding" in said
    assert "green was lost: " in said
    assert "green is asked again" in said
    assert not any(line["failures"] for line in lines(run.directory, "merge"))
    assert same(final(run.directory), final(undisturbed(drill)))


@pytest.mark.slow
def test_a_supernode_that_is_gone_for_good_is_left_out(
    federation: Federation, drill: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drill |= {"rounds": 3, "on-failure": "skip", "min-successful": 1, "node-timeout": 60.0}
    run = federation.run(drill)
    run.await_round(1)
    federation.kill("green")
    assert run.finish() == ""
    assert [line["tasks"] for line in lines(run.directory, "merge")] == [["red", "green"], ["red"], ["red"]]
    assert "round 2 goes on without green: " in server_said(run.directory)
    assert same(final(run.directory), final(with_the_same_participants(drill, run.directory, monkeypatch)))


@pytest.mark.slow
def test_a_superlink_and_a_serverapp_that_are_killed_lose_no_finished_round(
    federation: Federation, drill: dict[str, Any]
) -> None:
    """The SuperLink with all that its container holds in round 2, the ServerApp in round 3; each time, resume."""
    drill |= {"rounds": 3}
    run = federation.run(drill)
    run.await_round(1)
    federation.kill(run.name)
    federation.kill("superlink")
    federation.start_superlink()
    again = federation.run({**drill, "resume": True})
    again.await_round(2)
    federation.apps("superlink", "serverapp")[0].kill()
    assert "the Flower run failed" in again.finish()
    assert [line["round"] for line in lines(run.directory, "merge")] == [1, 2]
    assert federation.run({**drill, "resume": True}).finish() == ""
    assert [line["round"] for line in lines(run.directory, "merge")] == [1, 2, 3]
    assert same(final(run.directory), final(undisturbed(drill)))


@pytest.mark.slow
def test_a_network_that_is_cut_for_two_minutes_costs_no_round(federation: Federation, drill: dict[str, Any]) -> None:
    """Between one SuperNode and the SuperLink, while it tunes: not a byte passes, and nobody is told."""
    federation.kill("green")
    with Cable(federation.address) as cable:
        federation.return_supernode("green", through=cable.address)
        run = federation.run(drill)
        run.await_round(1)
        federation.tuning("green", 2)
        cable.cut.set()
        time.sleep(120)
        cable.cut.clear()
        assert run.finish() == ""
    said = server_said(run.directory)
    assert "green was lost: " in said
    assert "green is asked again" in said
    assert same(final(run.directory), final(undisturbed(drill)))


@pytest.mark.slow
def test_a_client_that_is_ten_times_slower_is_waited_for(federation: Federation, drill: dict[str, Any]) -> None:
    run = federation.run(drill)
    wait(lambda: "ROUND 1]" in federation.said("green"), "round 1", 900)
    with federation.slowed("green", 10):
        run.await_round(1, 1800)
    assert run.finish() == ""
    assert same(final(run.directory), final(undisturbed(drill)))


# ------------------------------------------------------------------------------------- in this process, faults injected


def flaky(code: int, task: str, times: int, number: int = 2) -> ClientApp:
    """The real ClientApp, but of a task's first answers in round `number` (0: at the roll call) so many are errors of
    this code."""
    left = [times]

    class Flaky(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            held = Settings.parse(context.run_config).party_names[int(context.node_config["partition-id"])]
            if (held, message.metadata.group_id or "0") == (task, str(number)) and left[0]:
                left[0] -= 1
                return Message(Error(code, "the power went"), reply_to=message)
            return client_app(message, context)

    return Flaky()


@pytest.mark.parametrize("code", LOST)
@pytest.mark.parametrize("down", ["fp32", "int8"])
def test_a_client_that_was_lost_is_asked_once_more_within_the_round(
    config: dict[str, Any], code: int, down: str
) -> None:
    config |= {"codec-down": down}
    run = in_process(Settings.parse(config), flaky(code, "red", 1))
    assert same(final(run.directory), final(undisturbed(config)))
    assert not any(line["failures"] for line in lines(run.directory, "merge"))
    [again] = [line for line in lines(run.directory, "tuning") if (line["task"], line["round"]) == ("red", 2)]
    assert again["bytes_down"] > 4 * run.layout.size  # the first message's bytes, and the whole base


@pytest.mark.parametrize("times", [1, 2])
def test_a_client_that_is_lost_while_it_is_sent_the_whole_base_is_asked_once_more(
    config: dict[str, Any], times: int
) -> None:
    """As one that came back without its disk, and whose network is cut at once."""
    losing = flaky(LOST[0], "red", times, 3)
    asked: list[Message] = []

    class Forgetful(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            about = message.metadata
            if (about.message_type, about.group_id, context.node_config["partition-id"]) != ("train", "3", 0):
                return client_app(message, context)
            asked.append(message)
            if len(asked) > 1:
                return losing(message, context)
            ClientState(str(message.content.config_records["info"]["run"]), "red").drop_base()
            return client_app(message, context)  # which asks for it

    settings = Settings.parse({**config, "codec-down": "int8"})
    if times == 1:
        run = in_process(settings, Forgetful())
        assert same(final(run.directory), final(undisturbed({**config, "codec-down": "int8"})))
        assert not any(line["failures"] for line in lines(run.directory, "merge"))
    else:
        with pytest.raises(RunError, match="round 3: 2 of 3 clients succeeded, 3 needed. red: the power went"):
            in_process(settings, Forgetful())
    assert len(asked) == 3


def test_a_node_that_is_lost_at_the_roll_call_is_asked_once_more(config: dict[str, Any]) -> None:
    run = in_process(Settings.parse(config), flaky(LOST[-1], "red", 1, 0))
    assert same(final(run.directory), final(undisturbed(config)))
    with pytest.raises(RunError, match="roll call: no party holds red; the power went"):
        in_process(Settings.parse({**config, "run-dir": config["run-dir"] + "-2"}), flaky(LOST[-1], "red", 2, 0))


def test_a_client_that_is_lost_twice_fails_by_policy(config: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="round 2: 2 of 3 clients succeeded, 3 needed. red: the power went"):
        in_process(Settings.parse(config), flaky(LOST[0], "red", 2))
    assert in_process(Settings.parse({**config, "resume": True})).rounds_done == 3
    assert same(final(config["run-dir"]), final(undisturbed(config)))


def test_an_error_of_the_client_itself_is_not_asked_again(config: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="round 2: 2 of 3.*red: the power went"):
        in_process(Settings.parse(config), flaky(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "red", 1))


class Offline(InProcessGrid):
    """Some nodes are offline from a round on, as a SuperLink tells it; `polls` counts looks at who is online."""

    def __init__(self, config: dict[str, Any], gone: dict[int, int]) -> None:
        super().__init__(client_app, 3, config)
        self.gone, self.now, self.polls = gone, 0, 0

    def get_node_ids(self) -> Iterable[int]:
        self.polls += 1
        return [node for node in self.contexts if self.gone.get(node, 99) > self.now]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self.now = max(int(message.metadata.group_id or 0) for message in sent) if sent else self.now
        return super().push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            message = self._waiting.get(message_id)
            if message and message.metadata.dst_node_id not in self.get_node_ids():
                yield Message(Error(ErrorCode.NODE_UNAVAILABLE, "offline"), reply_to=self._waiting.pop(message_id))
            else:
                yield from super().pull_messages([message_id])


def test_a_node_that_stays_away_is_waited_for_once(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config |= {"rounds": 4, "on-failure": "skip", "min-successful": 2, "node-timeout": 30.0}
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    for module in ("strategy", "grid"):
        monkeypatch.setattr(f"atm_fl.server.{module}.time", clock)
    settings = Settings.parse(config)
    run = serve(Offline(settings.as_config(), {2: 2}), settings)
    assert [line["tasks"] for line in lines(run.directory, "merge")] == [
        ["red", "green", "blue"],
        *[["red", "blue"]] * 3,
    ]
    assert sum(slept) == 30
    assert same(final(run.directory), final(with_the_same_participants(config, run.directory, monkeypatch)))


def test_a_reply_that_comes_after_its_round_is_in_no_round(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Green's reply of round 2 is at the SuperLink when round 3 begins, and stays there."""
    config |= {"on-failure": "skip", "min-successful": 2, "round-timeout": 0.2}

    class Late(InProcessGrid):
        here: ClassVar[list[Message]] = []

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for reply in super().pull_messages(message_ids):
                if (reply.metadata.src_node_id, reply.metadata.group_id) == (2, "2"):
                    self.here.append(reply)
                else:
                    yield reply

    settings = Settings.parse(config)
    run = serve(Late(client_app, 3, config), settings)
    assert len(Late.here) == 1
    merge = lines(run.directory, "merge")
    assert [line["tasks"] for line in merge] == [["red", "green", "blue"], ["red", "blue"], ["red", "green", "blue"]]
    assert merge[1]["failures"] == {"green": "no reply within 0.2 s"}
    assert same(final(run.directory), final(with_the_same_participants(config, run.directory, monkeypatch)))


def test_a_supernode_that_started_anew_is_asked_again(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its message went with the life before it, and the SuperLink says nothing about that."""

    class Forgetful(InProcessGrid):
        life = 1

        def get_nodes(self) -> Iterable[NodeInfo]:
            return [NodeInfo(node_id=node, last_activated_at=str(self.life)) for node in self.contexts]

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for message_id in message_ids:
                message = self._waiting[message_id]
                if (self.life, message.metadata.group_id, message.metadata.dst_node_id) == (1, "2", 3):
                    Forgetful.life = 2
                    del self._waiting[message_id]
                elif message_id in self._waiting:
                    yield from super().pull_messages([message_id])

    monkeypatch.setattr("atm_fl.server.grid.ROLL", 0.0)
    settings = Settings.parse(config)
    run = serve(Forgetful(client_app, 3, config), settings)
    assert not any(line["failures"] for line in lines(run.directory, "merge"))
    assert same(final(run.directory), final(undisturbed(config)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("runtime", [run_loop, in_process])
def test_a_full_disk_ends_the_run_in_one_line_and_loses_no_finished_round(
    config: dict[str, Any], small_disk: Path, runtime: Callable[[Settings], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    config |= {"run-dir": str(small_disk / "run")}
    ballast, advance = small_disk / "ballast", Run.advance

    def fill_after_round_one(run: Run, *moved: Any) -> None:
        advance(run, *moved)
        with open(ballast, "wb") as file, suppress(OSError):
            while run.rounds_done == 1:
                file.write(bytes(4096))
                file.flush()

    monkeypatch.setattr(Run, "advance", fill_after_round_one)
    with pytest.raises(RunError, match=r"^the disk of run-dir='.*' is full; make room and go on with resume=true$"):
        runtime(Settings.parse(config))
    monkeypatch.setattr(Run, "advance", advance)
    ballast.unlink()
    runtime(Settings.parse({**config, "resume": True}))
    there = undisturbed({**config, "run-dir": str(small_disk.parent / "run")})
    assert same(final(config["run-dir"]), final(there))
