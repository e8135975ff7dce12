"""What a round costs on the wire: stock Flower's settings beside each of our codecs, on a real SuperLink.

    python benchmarks/wire.py [--scale full] [--rounds 3] [--clients 4] [--rows stock,fp32,fp16,int8]

For every row a SuperLink with TLS and SuperNode authentication, a SuperNode a client and a ServerApp are started on
loopback; all share this machine's cores. Clients return a made-up step instead of tuning, so that what is left is
the protocol: encoding, transport, decoding, merging, checkpoints, and the processes that Flower starts for every
message. The vectors have the layout of open_clip's ViT-B-16 image tower (86,192,640 float32), with another --scale a
smaller one's (see merging.py).

`stock` is Flower as it comes: FedAvg with a state dict of many arrays, the whole model down and up, but without its
second broadcast for evaluation (`stock-evaluate` is with it). `UP/DOWN` is ours, with these values of codec-up and
codec-down, started as the deployment starts it (docs/deployment.md); `int8` is `int8/int8`. Ours evaluates within the
round, and writes a checkpoint.

Columns are medians of the rounds after the first, in which ours sends the whole base. CPU is that of all processes,
which on a machine that is busy with other work says more than seconds. Bytes are the bodies of all requests and
responses between SuperNodes and SuperLink. Memory is the peak of the ServerApp's and the SuperLink's anonymous resident
memory. In brackets: how many times less than the first row, and of memory what part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
from flower_apps import Config, write_app
from merging import SCALES, image_tower, made_up

from atm_fl import models
from atm_fl.deployment.keys import make_authority, make_certificate, make_key_pair
from atm_fl.runs.run import processor
from atm_fl.server.deployment import register
from atm_fl.server.simulation import environment, flower_run
from atm_fl.settings import Settings

ROOT = Path(__file__).parents[1]
APPS = ROOT / "benchmarks" / "wire_apps"
ROWS = "stock,stock-evaluate,fp32,fp16,bf16,int8,int4,topk:0.01/int8"


@dataclass(frozen=True)
class WireRow:
    """What was measured of one row; lists have an entry a round."""

    seconds: list[float]
    cpu: list[float]
    """Of the SuperLink's process, in seconds."""
    all_cpu: list[float]
    """Of all processes."""
    up: list[int]
    down: list[int]
    server: int
    """The ServerApp's peak memory in bytes."""
    superlink: int

    def later(self, name: str) -> float:
        """The median over the rounds after the first."""
        return median(getattr(self, name)[1:] or getattr(self, name))


class Watch(threading.Thread):
    """Looks at a SuperLink and the ServerApp below it."""

    def __init__(self, superlink: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.folder = psutil.Process(superlink), folder
        self.samples: list[tuple[float, float, float, int, int]] = []
        """(time, the SuperLink's CPU seconds, those of all, bytes up, bytes down) so far."""
        self.peaks = {"server": 0, "superlink": 0}
        self.ended = threading.Event()

    def run(self) -> None:
        titles: dict[psutil.Process, str] = {}
        while not self.ended.wait(0.3):
            used, everyone = self.process.cpu_times(), 0.0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    everyone += sum(process.cpu_times()[:4])  # with those of its children that have ended
                    if process not in titles:
                        titles[process] = " ".join(process.cmdline())
                    if "flwr-serverapp" in titles[process]:
                        self._look("server", process)
            self._look("superlink", self.process)
            up, down = map(int, (self.folder / "bytes").read_text().split())
            self.samples.append((time.time(), used.user + used.system, everyone, up, down))

    def _look(self, name: str, process: psutil.Process) -> None:
        memory = process.memory_info()
        self.peaks[name] = max(self.peaks[name], memory.rss - memory.shared)

    def at(self, moment: float) -> tuple[float, float, int, int]:
        """(CPU seconds of the SuperLink, of all, bytes up, bytes down) at a moment."""
        return next((sample[1:] for sample in self.samples if sample[0] >= moment), self.samples[-1][1:])


@dataclass
class Federation:
    """A SuperLink and its SuperNodes, by the folder of their keys and files."""

    folder: Path
    clients: int
    whose: str
    """stock, or ours: which programs they are."""
    superlink: int = 0
    """The SuperLink's process."""
    port: int = 0
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of all its programs."""
        more = {"WIRE_FOLDER": str(self.folder), "ATM_FL_CACHE": str(self.folder / "cache")}
        more |= {"OMP_NUM_THREADS": "1", "SSL_CERT_FILE": str(self.folder / "ca.crt")}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return environment(self.folder / "flower") | more | {"PYTHONPATH": path}

    def start(self) -> None:
        """Bring it up, and wait until it answers."""
        (self.folder / "bytes").write_text("0 0")
        self.port = free_port()
        command = [sys.executable, str(APPS / "superlink.py"), self.whose, "--host=127.0.0.1", f"--port={self.port}"]
        command += [f"--ssl-ca-certfile={self.folder}/ca.crt", f"--ssl-certfile={self.folder}/superlink.crt"]
        command += [f"--ssl-keyfile={self.folder}/superlink.key", "--enable-supernode-auth"]
        command += ["--disable-runtime-dependency-installation"]
        if self.whose == "ours":
            command += [f"--database={self.folder}/superlink.db"]
        self.superlink = self._start("superlink", command)
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            time.sleep(0.1)
        address, authority = f"127.0.0.1:{self.port}", self.folder / "ca.crt"
        list(register(address, authority, self.folder / "keys"))
        for client in range(self.clients):
            command = ["flower-supernode"]
            if self.whose == "ours":
                command = [sys.executable, "-m", "atm_fl.clients.supernode"]
            command += [f"--superlink={address}", f"--root-certificates={authority}", f"--port={free_port()}"]
            command += [f"--auth-supernode-private-key={self.folder}/keys/{client}"]
            command += [f'--node-config=data="wire" task="{client}"']
            self._start(f"supernode-{client}", command, WIRE_CLIENT=str(client))

    def _start(self, name: str, command: list[str], **more: str) -> int:
        log = (self.folder / f"{name}.log").open("w")
        # A session of its own, since what it starts is to be found and ended with it.
        process = subprocess.Popen(
            command, env=self.variables | more, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.started.append(process)
        return process.pid

    def stop(self) -> None:
        """End all of its processes."""
        below: list[psutil.Process] = []
        for process in self.started:
            with suppress(psutil.NoSuchProcess):
                below += psutil.Process(process.pid).children(recursive=True)
        for process in [*self.started, *below]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.started:
            process.wait()


@contextmanager
def federation(folder: Path, clients: int, whose: str) -> Iterator[Federation]:
    """A federation that is up."""
    made = Federation(folder, clients, whose)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prepare(folder: Path, scale: str, clients: int) -> None:
    """Keys, the layout, and every client's step."""
    layout = image_tower(scale)
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    (folder / "layout.json").write_text(json.dumps(shapes))
    make_authority(folder / "ca.crt", folder / "ca.key")
    make_certificate(
        folder / "superlink.crt", folder / "superlink.key", folder / "ca.crt", folder / "ca.key", ["127.0.0.1"]
    )
    (folder / "keys").mkdir()
    for client in range(clients):
        make_key_pair(folder / "keys" / str(client), folder / "keys" / f"{client}.pub", str(client))
        made_up(layout, "gaussian", client).numpy().tofile(folder / f"{client}.f32")


def measure_row(name: str, folder: Path, scale: str, clients: int, rounds: int) -> WireRow:
    """One row, in a folder of its own."""
    prepare(folder, scale, clients)
    whose = "stock" if name.startswith("stock") else "ours"
    config: Config | Settings
    if whose == "stock":
        values = {"clients": clients, "rounds": rounds, "evaluate": float(name == "stock-evaluate")}
        config = Config(str(folder / "run"), values)
    else:
        up, _, down = name.partition("/")
        models.backbone("wire")(lambda: models.Backbone(models.vit(8, 8, 8, 1, 1), 8))  # its name has to be known here
        tasks = ",".join(f"./{client}" for client in range(clients))
        config = Settings.parse(
            {"tasks": tasks, "model": "wire", "rounds": rounds, "codec-up": up, "codec-down": down or up}
            | {"run-dir": str(folder / "run")}
        )
    modules = [APPS / f"{module}.py" for module in ("made_up", whose)]
    app = write_app(folder, f"wire-{whose}", modules, config.as_config())
    with federation(folder, clients, whose) as made:
        (folder / "flower").mkdir(exist_ok=True)
        (folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "wire"\n\n[superlink.wire]\naddress = "127.0.0.1:{made.port}"\n'
            f'root-certificates = "{folder}/ca.crt"\n'
        )
        watch = Watch(made.superlink, folder)
        watch.start()
        flower_run(config, app, "wire", made.variables)  # type: ignore[arg-type]
        watch.ended.set()
        watch.join()
    marks = [line.split() for line in (folder / "marks").read_text().splitlines()]
    begins = [number for number, (event, _) in enumerate(marks) if event == "begin"]
    ends = [*begins[1:], len(marks)]
    spans = []
    for begin, end in zip(begins, ends, strict=True):
        # Of ours the evaluation that closes the run is no part of its last round.
        events = marks[begin:end] if name == "stock-evaluate" else marks[begin : begin + 2]
        spans.append((float(marks[begin][1]), float(events[-1][1])))
    readings = [(watch.at(begin), watch.at(end)) for begin, end in spans]
    return WireRow(
        [end - begin for begin, end in spans],
        *([after[n] - before[n] for before, after in readings] for n in range(4)),  # type: ignore[arg-type]
        **watch.peaks,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="full", choices=SCALES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--keep", type=Path, help="a folder in which the rows' files and logs stay")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    print(
        f"{psutil.cpu_count()} cores of {processor()}, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}; "
        f"{args.clients} clients, {image_tower(args.scale).size:,} elements, {args.rounds} rounds"
    )
    head = "| | first round s | round s | SuperLink CPU s | CPU s | up MB | down MB | ServerApp MiB | SuperLink MiB |"
    print(head, "|---" * (head.count("|") - 1) + "|", sep="\n")
    stock: WireRow | None = None
    for name in args.rows.split(","):
        with ExitStack() as stack:
            if args.keep:
                folder = args.keep / name.replace("/", "-")
                folder.mkdir(parents=True)
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            row = measure_row(name, folder.resolve(), args.scale, args.clients, args.rounds)
        stock = stock or row
        columns = [name, f"{row.seconds[0]:.1f}"]
        for column, unit in (("seconds", 1), ("cpu", 1), ("all_cpu", 1), ("up", 1e6), ("down", 1e6)):
            ours, theirs = row.later(column), stock.later(column)
            columns.append(f"{ours / unit:,.1f} ({theirs / ours:.2f} ×)")
        for ours, theirs in ((row.server, stock.server), (row.superlink, stock.superlink)):
            columns.append(f"{ours / 2**20:,.0f} ({ours / theirs:.2f})")
        print("|", " | ".join(columns), "|", flush=True)


if __name__ == "__main__":
    main()
