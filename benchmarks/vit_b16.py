"""One PA-ATM round of open_clip's ViT-B-16 (86,192,640 shared elements) in Ray simulation: seconds and peak memory.

    python benchmarks/vit_b16.py [--clients 4] [--images 32] [--batch-size 8] [--model open_clip/ViT-B-16]

Every client has a folder of made-up images and a zero-shot head; the weights are random, so that nothing is downloaded.
Memory is each process's peak of anonymous resident memory (mapped files don't count), looked at ten times a second;
Flower's own processes and Ray's daemons are summed up as "others".
"""

from __future__ import annotations

import argparse
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
from atm_fl.settings import Settings

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
    """The peak of anonymous memory of every process that this one starts, by kind."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    memory, title = process.memory_info(), " ".join(process.cmdline())
                    kind = "client" if "ClientApp" in title else "server" if "flwr-simulation" in title else "others"
                    peak = self.peaks[kind]
                    peak[process.pid] = max(peak[process.pid], memory.rss - memory.shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--model", default="open_clip/ViT-B-16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tasks = [made_up_task(folder / f"task{number}", args.images, number) for number in range(args.clients)]
        settings = Settings.parse(
            {
                "tasks": ",".join(map(str, tasks)),
                "model": args.model,
                "weights": "random",
                "head": "zero-shot",
                "learning-rate": 1e-5,
                "batch-size": args.batch_size,
                "threads": args.threads,
                "rounds": 1,
                "run-dir": str(folder / "run"),
            }
        )
        watch, begin = Watch(), time.monotonic()
        watch.start()
        run_simulation(settings, ROOT, cpus=args.threads)
        seconds = time.monotonic() - begin
        watch.ended.set()
        lines = list(read_metrics(folder / "run"))
        tuned = [line for line in lines if line["kind"] == "tuning"]
        (merged,) = (line for line in lines if line["kind"] == "merge")
    print(f"{psutil.cpu_count()} cores of {processor()}, {time.strftime('%Y-%m-%d')}; {args.model}, one round")
    print(
        f"{args.clients} clients, {args.images} images each, batch {args.batch_size}, {args.threads} threads a client"
    )
    tune, evaluate = (sum(line[key] for line in tuned) / len(tuned) for key in ("seconds_tune", "seconds_evaluate"))
    print(f"a client: {tune:.1f} s of tuning, {evaluate:.1f} s of evaluation")
    print(f"server: {merged['seconds']:.1f} s a round, of which {merged['seconds_merge']:.1f} s merging")
    print(f"all, with starting Flower and Ray and the last evaluation: {seconds:.0f} s")
    for kind, peaks in watch.peaks.items():
        total = sum(peaks.values()) if kind == "others" else max(peaks.values())
        print(f"peak memory, {kind}: {total / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
