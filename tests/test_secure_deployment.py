"""Secure aggregation deployed: real processes, TLS and SuperNode authentication on loopback, and a party killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import make_folder
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from test_runs import final, same

from atm_fl.deployment import keys
from atm_fl.runs import read_metrics
from atm_fl.settings import Settings
from clients.app import app as client_app
from server.app import serve
from server.deployment import register, submit
from server.grid import InProcessGrid
from server.simulation import QUIET

ROOT = Path(__file__).parents[1]
NAMES = ("red", "green", "blue", "grey")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(done: Callable[[], Any], seconds: float) -> Any:
    """What `done` returns, once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, at once."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a module of ours in a process with a home of its own."""
    started = []

    def begin(name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        home = tmp_path / name
        home.mkdir()
        variables = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "FLWR_HOME": str(home), "OMP_NUM_THREADS": "1"}
        variables |= {"ATM_FL_CACHE": str(home / "cache")}
        variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(home / "log", "w") as log:
            command = [sys.executable, "-m", module, *arguments]
            started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log, cwd=home))
        return started[-1]

    yield begin
    for process in started:
        kill(process)


@pytest.mark.slow
def test_a_party_killed_within_a_round_is_out_of_an_otherwise_right_sum(
    tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four parties over TLS; one is killed when its keys are shared and its vector is not there yet."""
    folders = [make_folder(tmp_path / "data" / name, seed) for seed, name in enumerate(NAMES)]
    home, public = tmp_path / "federation", tmp_path / "federation" / "parties"
    public.mkdir(parents=True)
    ca, address = home / "ca.crt", f"127.0.0.1:{free_port()}"
    keys.make_authority(ca, home / "ca.key")
    keys.make_certificate(home / "link.crt", home / "link.key", ca, home / "ca.key", ["127.0.0.1"], 2)
    superlink = ["--host=127.0.0.1", f"--port={address.split(':')[1]}", f"--ssl-ca-certfile={ca}"]
    superlink += [f"--ssl-certfile={home}/link.crt", f"--ssl-keyfile={home}/link.key", "--enable-supernode-auth"]
    start("superlink", "server.superlink", *superlink, f"--database={home}/state.db")

    def answers() -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", int(address.split(":")[1])), 1).close()
            return True
        return False

    wait_for(answers, 300)
    for name in NAMES:
        keys.make_key_pair(home / name, public / f"{name}.pub", name)
    assert len(list(register(address, ca, public))) == 4
    nodes = {}
    for name, folder in zip(NAMES, folders, strict=True):
        node = [f"--superlink={address}", f"--root-certificates={ca}", f"--auth-supernode-private-key={home}/{name}"]
        node += ["--host=127.0.0.1", f"--port={free_port()}", f'--node-config=data="{folder}"']
        nodes[name] = start(name, "clients.supernode", *node)

    config = {"tasks": ",".join(f"./{name}" for name in NAMES), "rounds": 1, "batch-size": 8, "device": "cpu"}
    config |= {"secure-aggregation": True, "on-failure": "skip", "min-successful": 3, "node-timeout": 240.0}
    settings = Settings.parse({**config, "run-dir": str(tmp_path / "run")})
    killed: list[str] = []

    def kill_grey_at_work() -> None:
        """When a process was started for grey after its secrets were shared, it is for its vector."""
        cache = tmp_path / "grey" / "cache"

        def at_work() -> bool:
            for path in cache.glob("runs/*/grey/secret.json"):
                with suppress(OSError, psutil.NoSuchProcess, ValueError):
                    if json.loads(path.read_text())["stage"] == "shared":
                        below = psutil.Process(nodes["grey"].pid).children(recursive=True)
                        return any(one.create_time() > path.stat().st_mtime + 0.05 for one in below)
            return False

        wait_for(at_work, 1500)
        kill(nodes["grey"])
        killed.append("grey")

    watcher = threading.Thread(target=kill_grey_at_work, daemon=True)
    watcher.start()
    submit(settings, ROOT, address, ca)
    assert killed == ["grey"]
    (secret,) = (tmp_path / "grey" / "cache").glob("runs/*/grey/secret.json")
    assert json.loads(secret.read_text())["stage"] == "shared"
    assert not [path for name in NAMES[:3] for path in (tmp_path / name / "cache").glob("runs/**/secret*")]
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
    for context, folder in zip(grid.contexts.values(), folders, strict=True):
        context.node_config = {"data": str(folder)}
    serve(grid, local)
    assert same(final(tmp_path / "run"), final(tmp_path / "local"))
