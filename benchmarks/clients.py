"""What many parties cost: seconds a party and round, memory and disk, of our runtimes and of other engines.

    python benchmarks/clients.py [--parties 8,64,256,1000] [--runtimes plain,in-process,ray,flower,pfl,blazefl] \
        [--merges mean,tsv-m,secure] [--neighbours 0] [--rounds 3]

Parties are folders of a few pictures of the eight embedded tasks, several parties a task, which differ in their
pictures; each tunes for one short epoch. `plain` is the loop without Flower; `in-process` and `ray` are our apps.
The others are FedAvg of the same model, data and steps, each in its engine's own simulation (benchmarks/clients_apps):
`flower`, pfl-research (`pfl`) and BlazeFL (`blazefl`). Ray and Flower have one client at a time (--at-once: more), as
all others have.

pfl and BlazeFL are not asked for by default. BlazeFL needs Python 3.12; pfl 0.6 runs on 3.10 to 3.12 and asks for an
older dp-accounting than ours, of which FedAvg uses nothing, so it can't be an extra:

    pip install -e .[bench-clients]                                           # BlazeFL
    pip install multiprocess prv-accountant; pip install --no-deps pfl==0.6.0

Every cell is a run of its own, for one count of parties all cells one after the other, so that their ratios are of one
time. Columns: seconds of the first round from the start of the program, in which parties are made; seconds a party and
round, the median of the rounds after it, and CPU seconds of all processes, their mean, which on a machine that is busy
with other work say more; in brackets how many times those of the first runtime with the same merge; the peak of the
server's anonymous resident memory (in `plain` and `in-process` the parties live in the server's process) and of all
processes together; the peak of what was on disk: the run's directory, the parties' files, vectors spilled by the
server.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from flower_apps import Config, write_app
from PIL import Image

from atm_fl import tasks
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import processor
from atm_fl.seeds import derive_seed
from atm_fl.server.simulation import flower_run, superlink
from atm_fl.settings import Settings, defaults
from atm_fl.tables import markdown

ROOT = Path(__file__).parents[1]
CLASSES = 4
"""Of each task, the first ones."""
MERGES: dict[str, dict[str, str]] = {
    "mean": {"merge": "mean"},
    "tsv-m": {"merge": "tsv-m", "scaling": "1.5"},
    "secure": {"merge": "mean", "secure-aggregation": "true"},
}
RUNTIMES = ("plain", "in-process", "ray", "flower")
ENGINES = {"pfl": "pfl_fedavg", "blazefl": "blazefl_fedavg"}
"""Those that run in a process of Python, by their modules in clients_apps."""
PEERS = ("flower", *ENGINES)
"""What is not ours, and makes a mean."""


@dataclass(frozen=True)
class Cell:
    """What was measured of one run."""

    first: float
    later: float
    """Seconds a round."""
    cpu: float
    """Of all processes, CPU seconds a round after the first."""
    server: int
    everyone: int
    disk: int


class Watch(threading.Thread):
    """Looks at a process and all below it: memory that is theirs alone, and what is on disk."""

    def __init__(self, process: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.folder = psutil.Process(process), folder
        self.server = self.everyone = self.disk = 0
        self.used: list[tuple[float, float]] = []
        """(time, CPU seconds so far) of all processes."""
        self.ended = threading.Event()

    def run(self) -> None:
        names: dict[int, str] = {}
        walked = 0.0
        while not self.ended.wait(0.25):
            total, server, spilled, used = 0, 0, 0, 0.0
            with suppress(psutil.Error):
                for process in [self.process, *self.process.children(recursive=True)]:
                    with suppress(psutil.Error, OSError):
                        if process.pid not in names:
                            names[process.pid] = " ".join(process.cmdline())
                        memory = process.memory_info()
                        own = memory.rss - memory.shared
                        total += own
                        used += sum(process.cpu_times()[:4])  # with those of its children that have ended
                        if process == self.process or "flwr-serverapp" in names[process.pid]:
                            server = own if "flwr-serverapp" in names[process.pid] else max(server, own)
                            spilled += _spilled(process.pid)
            self.server, self.everyone = max(self.server, server), max(self.everyone, total)
            self.used.append((time.time(), used))
            if time.monotonic() - walked > 3 or spilled > self.disk:
                walked = time.monotonic()
                self.disk = max(self.disk, spilled + _size(self.folder))

    def at(self, moment: float) -> float:
        """CPU seconds at a moment."""
        times, used = zip(*self.used, strict=True)
        return float(np.interp(moment, times, used))


def _spilled(process: int) -> int:
    """Bytes on disk of a process's files that have no name any more."""
    size = 0
    for descriptor in os.scandir(f"/proc/{process}/fd"):
        with suppress(OSError):
            facts = os.stat(descriptor.path)
            size += facts.st_blocks * 512 if not facts.st_nlink and os.readlink(descriptor.path)[0] == "/" else 0
    return size


def _size(folder: Path) -> int:
    """Bytes on disk of a folder."""
    size = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with suppress(OSError):
                size += os.lstat(os.path.join(place, file)).st_blocks * 512
    return size


def make_parties(folder: Path, count: int, pictures: int) -> list[str]:
    """Write `count` parties' folders of pictures: so many of a class to train on, and two of each other split."""
    names = str(defaults()["tasks"]).split(",")
    made, data = [], {name: tasks.load(name) for name in names}
    for number in range(count):
        name = names[number % len(names)]
        place = folder / f"{number}" / name
        for split, most in (("train", pictures), ("validation", 2), ("test", 2)):
            source = data[name].split(split)
            assert isinstance(source.images, torch.Tensor)
            random = torch.Generator().manual_seed(derive_seed(0, "benchmark", number, split))
            for label in range(CLASSES):
                of_class = (source.labels == label).nonzero()[:, 0]
                chosen = of_class[torch.randperm(len(of_class), generator=random)[:most]]
                of_label = place / {"validation": "val"}.get(split, split) / f"{label}"
                of_label.mkdir(parents=True)
                for index in chosen.tolist():
                    pixels = source.images[index].expand(3, -1, -1).permute(1, 2, 0).numpy()
                    Image.fromarray(pixels).save(of_label / f"{index}.png", compress_level=1)
        alone = folder / "alone" / f"{name}-{number}"
        alone.parent.mkdir(exist_ok=True)
        alone.symlink_to(place)
        made.append(str(place))
    return made


def tasks_of_their_own(parties: list[str]) -> list[str]:
    """The same folders under names that differ: under secure aggregation no two parties are of one task."""
    paths = [Path(place) for place in parties]
    return [str(path.parents[1] / "alone" / f"{path.name}-{path.parent.name}") for path in paths]


def measure(runtime: str, merge: str, parties: list[str], rounds: int, at_once: int, neighbours: int) -> Cell:
    """One run, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        named = tasks_of_their_own(parties) if merge == "secure" else parties
        settings = {"tasks": ",".join(named), "rounds": rounds, "run-dir": str(folder / "run"), "batch-size": 8}
        (folder / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        cpus = (os.cpu_count() or 1) / at_once
        if runtime in PEERS:
            command = [sys.executable, __file__, "--peer", runtime, str(folder), "--cpus", str(cpus)]
        else:
            program = str(Path(sys.executable).with_name("atm-fl"))
            command = [program, "run", str(folder / "run.toml"), "--runtime", runtime]
            command += ["--cpus", str(cpus)] if runtime == "ray" else []
            command += [part for key, value in MERGES[merge].items() for part in ("-c", f"{key}={value}")]
            masked = merge == "secure" and runtime != "plain"
            command += ["-c", f"secure-neighbours={neighbours}"] if masked else []
        variables = {**os.environ, "ATM_FL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        begin = time.time()
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        watch = Watch(process.pid, folder)
        watch.start()
        said = process.communicate()[1]
        watch.ended.set()
        watch.join()
        if process.returncode:
            raise SystemExit(f"{runtime}, {merge}, {len(parties)} parties: {said[-2000:]}")
        if runtime in PEERS:
            times = [float(line) for line in (folder / "marks").read_text().split()]
        else:
            opened = (folder / "run" / "config.json").stat().st_mtime
            times = [opened + line["time"] for line in read_metrics(folder / "run") if line["kind"] == "merge"]
    later = median(after - before for before, after in pairwise(times))
    cpu = (watch.at(times[-1]) - watch.at(times[0])) / (len(times) - 1)
    return Cell(times[0] - begin, later, cpu, watch.server, watch.everyone, watch.disk)


def peer(runtime: str, folder: Path, cpus: float) -> None:
    """Run another engine's FedAvg on the parties of `folder`/run.toml."""
    settings = tomllib.loads((folder / "run.toml").read_text())
    parties, marks = settings["tasks"].split(","), folder / "marks"
    if runtime in ENGINES:
        engine = importlib.import_module(f"clients_apps.{ENGINES[runtime]}")
        given = {key.replace("-", "_"): settings[key] for key in ("rounds", "batch-size")}
        return engine.run(parties, replace(Settings(), **given), marks)
    values = {"tasks": settings["tasks"], "parties": len(parties), "rounds": settings["rounds"]}
    values |= {"batch-size": settings["batch-size"], "marks": str(marks)}
    modules = [ROOT / "benchmarks" / "clients_apps" / f"{name}.py" for name in ("party", "stock")]
    app = write_app(folder, "clients-stock", modules, values)
    config = Config(str(folder / "run"), values)
    with superlink(folder / "flower") as variables:
        federation = f"num-supernodes={len(parties)} client-resources-num-cpus={cpus:g}"
        flower_run(config, app, "local", variables, "--federation-config", federation)  # type: ignore[arg-type]


def rows(args: argparse.Namespace, count: int, folder: Path) -> Iterable[list[str]]:
    """The table's rows of one count of parties, as they are measured."""
    parties = make_parties(folder, count, args.pictures)
    plain: dict[str, Cell] = {}
    for merge in args.merges.split(","):
        for runtime in args.runtimes.split(","):
            if runtime in PEERS and merge != "mean":  # FedAvg is a mean
                continue
            cell = measure(runtime, merge, parties, args.rounds, args.at_once, args.neighbours)
            first = plain.setdefault(merge, cell)
            mib = [f"{size / 2**20:,.0f}" for size in (cell.server, cell.everyone)]
            seconds = [f"{cell.first:.1f}", f"{cell.later / count:.3f} ({cell.later / first.later:.2f} ×)"]
            seconds.append(f"{cell.cpu / count:.3f} ({cell.cpu / first.cpu:.2f} ×)")
            yield [f"{count}", merge, runtime, *seconds, *mib, f"{cell.disk / 1e6:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parties", default="8,64,256,1000")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="the first is what ratios are to")
    parser.add_argument("--merges", default=",".join(MERGES))
    parser.add_argument("--neighbours", type=int, default=0, help="of secure: secure-neighbours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=8, help="of a class, to train on")
    parser.add_argument("--at-once", type=int, default=1, help="clients at a time in Ray and Flower")
    parser.add_argument("--peer", nargs=2, metavar=("ENGINE", "FOLDER"), help="internal: run another engine")
    parser.add_argument("--cpus", type=float, default=1, help="internal: of a client of it")
    args = parser.parse_args()
    if args.peer:
        return peer(args.peer[0], Path(args.peer[1]), args.cpus)
    print(
        f"{psutil.cpu_count()} cores of {processor()}, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}; "
        f"{CLASSES * args.pictures} pictures a party, {args.rounds} rounds"
    )
    head = ["parties", "merge", "runtime", "first round s", "s a party and round", "CPU s a party and round"]
    head += ["server MiB", "all MiB", "disk MB"]
    print(markdown(head, []))
    for count in map(int, args.parties.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(args, count, Path(folder)):
                print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
