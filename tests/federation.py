"""What tests of whole runs share, and a real federation on loopback: a SuperLink with TLS and SuperNodes.

All are Flower's own programs as containers run them, started by our launchers; nothing is simulated. A drill kills,
stops or slows them down, and looks at the run's directory and at what they logged.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from atm_fl import cli
from atm_fl.clients.app import app as client_app
from atm_fl.deployment.federation import lay_out
from atm_fl.errors import RunError
from atm_fl.runs.checkpoints import checkpoints
from atm_fl.runs.run import Run
from atm_fl.server.app import serve
from atm_fl.server.deployment import register
from atm_fl.server.grid import InProcessGrid
from atm_fl.server.simulation import QUIET, plain
from atm_fl.settings import Settings

ROOT = Path(__file__).parents[1]


class Federation:
    """One SuperLink and a SuperNode for each folder of `data`, whose last parts are the parties' names."""

    def __init__(self, home: Path, data: list[str]) -> None:
        self.home, self.data = home, {Path(folder).name: folder for folder in data}
        home.mkdir()
        shutil.copy(ROOT / "docker-compose.yml", home)
        lay_out(home, ",".join(f"{name}={folder}" for name, folder in self.data.items()))
        self.secrets = home / "federation" / "superlink"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, **settings: str) -> None:
        """The SuperLink, and once it answers and knows the keys, all SuperNodes."""
        self.start_superlink()
        list(register(self.address, self.secrets / "ca.crt", self.secrets / "parties"))
        for name in self.data:
            self.start_supernode(name, **settings)

    def start_superlink(self) -> None:
        """Start the SuperLink, again with the same database, and wait until it answers."""
        port = self.address.split(":")[1]
        files = [f"--ssl-{kind}={self.secrets / name}" for kind, name in CERTIFICATES.items()]
        self.spawn(
            "superlink",
            *[sys.executable, "-m", "atm_fl.server.superlink", "--host=127.0.0.1", f"--port={port}", *files],
            *["--enable-supernode-auth", "--disable-runtime-dependency-installation"],
            f"--database={self.home / 'superlink.db'}",
        )
        wait(self._answers, "the SuperLink")

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(self.address.split(":"), 1):  # type: ignore[arg-type]
            return True
        return False

    def start_supernode(self, name: str, *more: str, key: str = "", **settings: str) -> subprocess.Popen[bytes]:
        """Start a party's SuperNode; settings: another authority `ca`, address `through` which it goes, `policy`, and
        name of its log, `called`. key: whose key it holds. more: arguments in place of those for TLS."""
        held = key or name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        trust = more or (f"--root-certificates={settings.get('ca', self.secrets / 'ca.crt')}",)
        return self.spawn(
            settings.get("called", name),
            *[
                sys.executable,
                "-m",
                "atm_fl.clients.supernode",
                f"--superlink={settings.get('through') or self.address}",
            ],
            *[f"--port={port}", *trust],
            f"--auth-supernode-private-key={self.home / 'federation' / 'parties' / held / 'key'}",
            f'--node-config=data="{self.data[name]}"'
            + (f' policy="{settings["policy"]}"' if "policy" in settings else ""),
        )

    def return_supernode(self, name: str, through: str = "") -> None:
        """Start a killed SuperNode again and again, as a restart policy does, until the SuperLink lets it in."""

        def let_in() -> bool:
            if self.processes[name].poll() is not None:
                self.start_supernode(name, through=through)
            return "SuperNode ID" in self.said(name)[before:]

        before = len(self.said(name))
        wait(let_in, f"the return of {name}")

    def spawn(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a program with a cache and FLWR_HOME of its own; what it says goes to NAME.log."""
        folder = self.home / "machines" / name
        folder.mkdir(parents=True, exist_ok=True)
        environment = {"FLWR_HOME": str(folder / "flower"), "ATM_FL_CACHE": str(folder / "cache"), "HOME": str(folder)}
        environment["ATM_FL_APPS"] = str(self.secrets / "apps")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        variables = {
            **os.environ,
            **QUIET,
            **environment,
            "PATH": path,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        with open(self.home / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self.processes[name]

    def said(self, name: str) -> str:
        """All that a program has logged, without colours."""
        return plain(self.home / f"{name}.log")

    def below(self, name: str) -> list[psutil.Process]:
        """The processes that a program has started, theirs too."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.processes[name].pid).children(recursive=True)
        return []

    def apps(self, name: str, kind: str) -> list[psutil.Process]:
        """The running `kind`, clientapp or serverapp, below a program."""
        processes = []
        for process in self.below(name):
            with suppress(psutil.Error):
                if any(f"flwr-{kind}" in word for word in (process.name(), *process.cmdline())):
                    processes.append(process)
        return processes

    def tuning(self, name: str, round_number: int) -> psutil.Process:
        """Wait until a party's ClientApp is at work in a round."""
        processes: list[psutil.Process] = []

        def at_work() -> bool:
            said = self.said(name).partition(f"ROUND {round_number}]")[2]
            if "Received successfully" in said:
                processes[:] = sorted(self.apps(name, "clientapp"), key=psutil.Process.create_time)[-1:]
            return bool(processes)

        wait(at_work, f"{name} in round {round_number}")
        return processes[0]

    def kill(self, name: str) -> None:
        """SIGKILL to a program and, as where a container dies, to all that it started."""
        for process in (psutil.Process(self.processes[name].pid), *self.below(name)):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.processes[name].wait()

    @contextmanager
    def slowed(self, name: str, times: int) -> Iterator[None]:
        """Let the ClientApps of a party run one part of `times` of the time."""
        over = Event()

        def brake() -> None:
            while not over.wait(0.02):
                stopped = self.apps(name, "clientapp")
                for process in stopped:
                    with suppress(psutil.Error):
                        process.suspend()
                over.wait(0.02 * (times - 1))
                for process in stopped:
                    with suppress(psutil.Error):
                        process.resume()

        thread = Thread(target=brake)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def run(self, config: dict[str, Any], app: Path = ROOT) -> Submitted:
        """Submit a run of the checkout `app`'s apps, which goes on beside the drill."""
        return Submitted(self, Settings.parse(config), app)

    def stop(self) -> None:
        """Kill all that is left of what was started."""
        for name in self.processes:
            if self.processes[name].poll() is None:
                self.kill(name)
        for process in psutil.process_iter(["environ"]):  # what was orphaned by a kill
            if str(self.home / "machines") in str((process.info["environ"] or {}).get("FLWR_HOME")):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


class Submitted:
    """A run that was submitted to a federation with `atm-fl run --runtime deployment`."""

    def __init__(self, federation: Federation, settings: Settings, app: Path) -> None:
        self.federation, self.directory = federation, Path(settings.run_dir)
        words = [word for key, value in settings.as_config().items() for word in ("-c", f"{key}={_toml(value)}")]
        empty = federation.home / "empty.toml"
        empty.touch()
        authority = federation.secrets / "ca.crt"
        self.process = federation.spawn(
            f"run-{len(federation.processes)}",
            *[
                sys.executable,
                "-c",
                "from atm_fl.cli import main; main()",
                "run",
                str(empty),
                "--runtime",
                "deployment",
            ],
            *["--superlink", federation.address, "--ca", str(authority), "--app", str(app), *words],
        )
        self.name = next(reversed(federation.processes))

    def await_round(self, number: int, seconds: float = 900) -> None:
        """Wait until so many rounds are done."""
        wait(lambda: self._rounds() >= number or self._over(number), f"round {number}", seconds)

    def _rounds(self) -> int:
        """Finished ones: those whose checkpoint is written."""
        return max((int(path.stem.split("-")[1]) for path in checkpoints(self.directory)), default=0)

    def _over(self, number: int) -> bool:
        if self.process.poll() is not None and self._rounds() < number:
            raise AssertionError(f"the run ended before round {number}: {self.federation.said(self.name)[-2000:]}")
        return False

    def finish(self, seconds: float = 1800) -> str:
        """Wait for its end; returns "" if it completed, or the error that the operator is told."""
        status = self.process.wait(seconds)
        said = self.federation.said(self.name)
        return "" if not status else said.strip()[-3000:]


class Cable:
    """A TCP proxy to an address, on a port of its own. While `cut` is set nothing passes and nobody is told."""

    def __init__(self, to: str) -> None:
        self._to = to.split(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = Event()

    def __enter__(self) -> Cable:
        Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self._to[0], int(self._to[1])))
                for one, other in ((near, far), (far, near)):
                    Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                while self.cut.is_set():
                    time.sleep(0.1)
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


CERTIFICATES = {"ca-certfile": "ca.crt", "certfile": "superlink.crt", "keyfile": "superlink.key"}


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def wait(condition: Callable[[], object], what: str, seconds: float = 600) -> None:
    """Wait until `condition()` is true; RunError if it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RunError(f"{what} did not come within {seconds:g} s")
        time.sleep(0.1)


def final(run_dir: str | Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint of a run."""
    loaded = load_file(str(sorted(Path(run_dir).glob("checkpoint/*.safetensors"))[-1]))
    return {name: tensor.clone() for name, tensor in loaded.items()}  # the loaded ones are views of the file


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_process(settings: Settings, app: ClientApp = client_app) -> Run:
    return serve(InProcessGrid(app, len(settings.task_names), settings.as_config()), settings)


def tampered(
    change: Callable[[Message, Message], Message], task: str | tuple[str, ...], kind: str = "train"
) -> ClientApp:
    """The real ClientApp, with the replies of one task's client (or several's) changed by `change(message, reply)`."""

    class Tampered(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            partition = int(context.node_config["partition-id"])
            held = Settings.parse(context.run_config).task_names[partition]
            return change(message, reply) if held.endswith(task) and message.metadata.message_type == kind else reply

    return Tampered()


def replace_info(key: str, value: str) -> Callable[[Message, Message], Message]:
    def change(message: Message, reply: Message) -> Message:
        reply.content.config_records["info"][key] = value
        return reply

    return change


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of `atm-fl` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["atm-fl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)
