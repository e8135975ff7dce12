"""What Flower costs: seconds a round of the plain loop, the in-process Grid and Ray simulation, side by side.

    python benchmarks/overhead.py [--rounds 4] [--repeats 2] [--tasks digits,mnist,icons,radicals]

The configuration is the demo's (eight embedded tasks). A round's seconds are the time from one merge to the next, so
that sending, waiting and writing count; the first round of each run (start-up, caches) is left out; medians over all
steady rounds. Ray runs with one client at a time, to compare like with like, and with one a core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import processor
from atm_fl.settings import defaults

ROOT = Path(__file__).parents[1]
RUNTIMES = {
    "plain loop": ["--runtime", "plain"],
    "in-process Grid": ["--runtime", "in-process"],
    "Ray, one client at a time": ["--runtime", "ray", "--cpus", str(os.cpu_count())],
    "Ray, one client a core": ["--runtime", "ray", "--cpus", "1"],
}


def rounds(arguments: list[str], count: int, tasks: str, folder: str) -> list[float]:
    """Seconds of every steady round of one run."""
    command = [Path(sys.executable).with_name("atm-fl"), "run", ROOT / "configs/demo.toml", *arguments]
    command += ["-c", f"run-dir={folder}", "-c", f"rounds={count}", "-c", "test-every=0", "-c", f"tasks={tasks}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    times = [line["time"] for line in read_metrics(Path(folder)) if line["kind"] == "merge"]
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tasks", default=defaults()["tasks"])
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in RUNTIMES}
    for _ in range(args.repeats):
        for name, arguments in RUNTIMES.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds[name] += rounds(arguments, args.rounds, args.tasks, folder)
    plain = median(seconds["plain loop"])
    print(f"{os.cpu_count()} cores of {processor()}, 1 thread a client, tasks {args.tasks}")
    print(f"medians of {len(seconds['plain loop'])} rounds")
    for name, times in seconds.items():
        spread = f"{min(times):.2f}-{max(times):.2f}"
        print(f"{name:28} {median(times):6.2f} s a round ({spread}), {median(times) / plain:5.2f} x the plain loop")


if __name__ == "__main__":
    main()
