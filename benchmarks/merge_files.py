"""How fast files are merged, beside what the disk needs for their bytes, and in how much memory.

    python benchmarks/merge_files.py [--gigabytes 1] [--files 3] [--shards 1] [--methods mean,ties] [--cold]

Made-up bf16 models of a language model's shapes and their base are merged by `atm-fl merge`'s function, each
measurement in a process of its own. The floor is the bytes of all inputs and the output over the bandwidth with which
this disk (or, warm, its cache) was measured to copy one of the files. Processor seconds, of all threads, say more than
the clock where other work runs beside it. Memory: the peaks of anonymous and of all resident memory, above what the
process had before. --cold drops the files from the cache first (posix_fadvise), and the output is on the disk (fsync)
before the clock stops.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

WORDS, WIDTH = 64_000, 2_048


def shapes(elements: int) -> dict[str, tuple[int, ...]]:
    """A model of about so many elements: embeddings and layers of attention and MLP."""
    by_name: dict[str, tuple[int, ...]] = {"embed.weight": (min(WORDS, max(8, elements // 4 // WIDTH)), WIDTH)}
    left, layer = elements - by_name["embed.weight"][0] * WIDTH, 0
    while left > 0:
        rows = min(4 * WIDTH, max(1, left // WIDTH))
        by_name |= {f"layers.{layer}.mlp.weight": (rows, WIDTH), f"layers.{layer}.norm.weight": (WIDTH,)}
        left, layer = left - rows * WIDTH, layer + 1
    return by_name


def make(folder: Path, args: argparse.Namespace) -> None:
    """The base in args.shards files and the models tuned from it, of args.gigabytes each."""
    names = shapes(int(args.gigabytes * 5e8))
    for number in range(args.files + 1):
        model = folder / ("base" if number == 0 else f"tuned{number}")
        model.mkdir(exist_ok=True)
        listed = list(names)
        size = -(-len(listed) // args.shards)
        index = {}
        for shard in range(args.shards):
            file = "model.safetensors" if args.shards == 1 else f"model-{shard + 1:05}.safetensors"
            state = {}
            for name in listed[shard * size : (shard + 1) * size]:
                random = torch.Generator().manual_seed(listed.index(name))
                tensor = torch.randn(names[name], generator=random).mul_(0.02)
                if number:
                    tensor.add_(torch.randn(names[name], generator=random.manual_seed(number)), alpha=1e-3)
                state[name] = tensor.bfloat16()
                index[name] = file
            save_file(state, model / file)
        if args.shards > 1:
            (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def memory() -> tuple[int, int]:
    """Anonymous and all resident bytes of this process."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    page = os.sysconf("SC_PAGESIZE")
    return (resident - shared) * page, resident * page


def measure(folder: Path, method: str, cold: bool) -> dict[str, float]:
    """One merge: seconds and peaks of memory in GB."""
    from atm_fl.merging.checkpoint_files import merge_files

    models = sorted(path for path in folder.iterdir() if path.name.startswith("tuned"))
    if cold:
        drop(folder)
    before, peaks, ended = memory(), [0, 0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            peaks[:] = [max(peak, now - first) for peak, now, first in zip(peaks, memory(), before, strict=True)]

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begin, busy = time.perf_counter(), time.process_time()
    merge_files(folder / "base", models, folder / "out", method)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    ended.set()
    watcher.join()
    shutil.rmtree(folder / "out")
    return {"seconds": seconds, "busy": busy, "anonymous": peaks[0] / 1e9, "resident": peaks[1] / 1e9}


def drop(folder: Path) -> None:
    """Have the system forget what it has in memory of the files."""
    for path in folder.glob("*/*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bandwidth(folder: Path, cold: bool) -> float:
    """Bytes a second, read and written, of a plain copy of the base that is on the disk at its end."""
    if cold:
        drop(folder)
    files = sorted((folder / "base").glob("*.safetensors"))
    begin, copy = time.perf_counter(), folder / "copy"
    for path in files:
        shutil.copyfile(path, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    copy.unlink()
    return 2 * sum(path.stat().st_size for path in files) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of each model")
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default="mean,task-arithmetic,dare,ties,breadcrumbs")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the models are made and stay; default: a temporary one")
    parser.add_argument("--measure", help="internal: measure this method in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.folder, args.measure, args.cold)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "base").is_dir():
            make(folder, args)
        sizes = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
        written = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        rate = median(bandwidth(folder, args.cold) for _ in range(args.repeats))
        floor = (sizes + written) / rate
        what = f"{args.files} files of {written / 1e9:.2f} GB and their base, {args.shards} shards"
        print(f"{what}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        state = "cold" if args.cold else "warm"
        print(f"copy {rate / 1e9:.2f} GB/s (read + write, fsync, {state}); floor {floor:.2f} s\n")
        header = ["merge", "seconds", "x floor", "processor seconds", "anonymous GB", "resident GB"]
        print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
        for method in args.methods.split(","):
            command = [sys.executable, __file__, "--folder", str(folder), "--measure", method, *["--cold"] * args.cold]
            rows = []
            for _ in range(args.repeats):
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                rows.append(json.loads(output.splitlines()[-1]))
            seconds, busy, anonymous, resident = (median(row[key] for row in rows) for key in rows[0])
            times = f"{seconds:.2f} | {seconds / floor:.1f} | {busy:.2f}"
            print(f"| {method} | {times} | {anonymous:.2f} | {resident:.2f} |", flush=True)


if __name__ == "__main__":
    main()
