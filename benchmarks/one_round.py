"""One PA-ATM round in Ray simulation: seconds, and peak memory of each process.

    python benchmarks/one_round.py configs/demo_text.toml           # the first round of a run
    python benchmarks/one_round.py [--clients 4] [--images 32] [--batch-size 8] [--model open_clip/ViT-B-16]

Without a file every client has a folder of made-up images and a zero-shot head; the weights are random, so that nothing
is downloaded. Memory is each process's peak of anonymous resident memory (mapped files don't count), looked at ten
times a second, with its CPU seconds beside; Flower's own processes and Ray's daemons are summed up as "others".
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import processor
from atm_fl.server.simulation import run_simulation
from atm_fl.settings import Settings, read_toml

CLASSES = 2
ROOT = Path(__file__).parents[1]


def made_up_task(folder: Path, images: int, seed: int) -> Path:
    """A folder task of noise: `images` to train on and a quarter as many in val and test."""
    random = np.random.default_rng(seed)
    for split, count in (("train", images), ("val", images // 4), ("test", images // 4)):
        for number in range(count):
            place = folder / split / f"class{number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (224, 224, 3), np.uint8)).save(place / f"{number}.png")
    return folder


class Watch(threading.Thread):
    """The peak of anonymous memory of every process that this one starts, and its CPU seconds, by kind."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self.used: dict[str, dict[int, float]] = defaultdict(dict)
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    memory, title = process.memory_info(), " ".join(process.cmdline())
                    kind = "client" if "ClientApp" in title else "server" if "flwr-simulation" in title else "others"
                    peak = self.peaks[kind]
                    peak[process.pid] = max(peak[process.pid], memory.rss - memory.shared)
                    self.used[kind][process.pid] = sum(process.cpu_times()[:2])


def of_made_up_images(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Settings of a run whose every client has noise."""
    tasks = [made_up_task(folder / f"task{number}", args.images, number) for number in range(args.clients)]
    return {
        "tasks": ",".join(map(str, tasks)),
        "model": args.model,
        "weights": "random",
        "head": "zero-shot",
        "learning-rate": 1e-5,
        "batch-size": args.batch_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a run's settings, in place of the made-up images")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--model", default="open_clip/ViT-B-16")
    parser.add_argument("--threads", type=int, default=2, help="of a client; so many CPUs are its own")
    args = parser.parse_args()
    of_noise = ("clients", "images", "batch_size", "model")
    if args.config and any(getattr(args, name) != parser.get_default(name) for name in of_noise):
        parser.error("--clients, --images, --batch-size and --model are of made-up images; write them into the file")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        values = read_toml(args.config) if args.config else of_made_up_images(args, folder)
        own = {"rounds": 1, "threads": args.threads, "run-dir": str(folder / "run")}
        settings = Settings.parse({**values, **own})
        watch, begin = Watch(), time.monotonic()
        watch.start()
        run_simulation(settings, ROOT, cpus=args.threads)
        seconds = time.monotonic() - begin
        watch.ended.set()
        lines = list(read_metrics(folder / "run"))
    tuned = [line for line in lines if line["kind"] == "tuning"]
    (merged,) = (line for line in lines if line["kind"] == "merge")
    print(f"{psutil.cpu_count()} cores of {processor()}, {time.strftime('%Y-%m-%d')}, load {load:.1f} before")
    print(
        f"{settings.model}, one round; {len(tuned)} clients of {args.threads} threads, batches of {settings.batch_size}"
    )
    tune, evaluate, steps = (
        sum(line[key] for line in tuned) / len(tuned) for key in ("seconds_tune", "seconds_evaluate", "steps")
    )
    print(f"a client: {tune:.1f} s of tuning ({steps:.0f} steps), {evaluate:.1f} s of evaluation")
    print(f"server: {merged['seconds']:.1f} s a round, of which {merged['seconds_merge']:.1f} s merging")
    print(f"all, with starting Flower and Ray and the last evaluation: {seconds:.0f} s")
    for kind, peaks in watch.peaks.items():
        total = sum(peaks.values()) if kind == "others" else max(peaks.values())
        used = sum(watch.used[kind].values())
        print(f"{kind}: peak memory {total / 2**20:.0f} MiB, {used:.0f} CPU seconds")


if __name__ == "__main__":
    main()
