"""How fast files are merged, beside what the disk needs for their bytes, and in how much memory.

    python benchmarks/merge_files.py [--gigabytes 1] [--files 3] [--shards 1] [--methods mean,ties] [--cold]
    python benchmarks/merge_files.py --by ours,mergekit        # with `pip install -e .[bench]`

Made-up bf16 models of a language model's shapes and their base are merged by `atm-fl merge`'s function and by
mergekit's (`mergekit-pytorch`, options that mean the same, float32 inside and bf16 written), each measurement in a
process of its own. The floor is the bytes of all inputs and the output over the bandwidth with which this disk (or,
warm, its cache) copies the base just before each measurement; all numbers are medians, of ratios those of single pairs.
Processor seconds, of all threads, and their ratio to what copying the same bytes costs, say more than the clock where
other work runs beside it. Memory: the peaks of anonymous and of all resident memory, above what the process had before,
libraries loaded. --cold drops the files from the cache first (posix_fadvise), and the output is on the disk (fsync)
before the clock stops.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

WORDS, WIDTH = 64_000, 2_048
DRAWN = 4_194_301
"""Normal numbers that models are made of, a prime number."""
DIFFERENT = 3
"""Tuned models that differ; more of them are copies."""


def shapes(elements: int) -> dict[str, tuple[int, ...]]:
    """A model of about so many elements: embeddings and layers of attention and MLP."""
    by_name: dict[str, tuple[int, ...]] = {"embed.weight": (min(WORDS, max(8, elements // 4 // WIDTH)), WIDTH)}
    left, layer = elements - by_name["embed.weight"][0] * WIDTH, 0
    while left > 0:
        rows = min(4 * WIDTH, max(1, left // WIDTH))
        by_name |= {f"layers.{layer}.mlp.weight": (rows, WIDTH), f"layers.{layer}.norm.weight": (WIDTH,)}
        left, layer = left - rows * WIDTH, layer + 1
    return by_name


def noise(drawn: torch.Tensor, shape: tuple[int, ...], number: int) -> torch.Tensor:
    """Normal numbers: those `drawn`, again and again from a place that goes with the number. New ones take minutes."""
    size = math.prod(shape)
    start = number * 7_919 * 8_192 % len(drawn)
    return drawn.repeat(-(-(start + size) // len(drawn)))[start : start + size].reshape(shape).clone()


def make(folder: Path, args: argparse.Namespace) -> None:
    """The base in args.shards files and the models tuned from it, of args.gigabytes each."""
    names = shapes(int(args.gigabytes * 5e8))
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))
    for number in range(args.files + 1):
        model = folder / ("base" if number == 0 else f"tuned{number}")
        if number > DIFFERENT:
            shutil.copytree(folder / f"tuned{number - DIFFERENT}", model)
            continue
        model.mkdir(exist_ok=True)
        listed = list(names)
        size = -(-len(listed) // args.shards)
        index = {}
        for shard in range(args.shards):
            file = "model.safetensors" if args.shards == 1 else f"model-{shard + 1:05}.safetensors"
            state = {}
            for name in listed[shard * size : (shard + 1) * size]:
                tensor = noise(drawn, names[name], listed.index(name)).mul_(0.02)
                if number:
                    tensor.add_(noise(drawn, names[name], number * len(listed) + listed.index(name)), alpha=1e-3)
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


def ours(folder: Path, method: str, models: list[Path]) -> Callable[[], object]:
    from atm_fl.merging.checkpoint_files import merge_files

    return lambda: merge_files(folder / "base", models, folder / "out", method)


def mergekit(folder: Path, method: str, models: list[Path]) -> Callable[[], object]:
    from mergekit.scripts.merge_raw_pytorch import main as merge_raw_pytorch
    from merging import MERGEKIT, mergekit_options

    from atm_fl.vectors import Layout

    def weights(model: Path) -> str:
        (file,) = model.glob("*.safetensors")
        return str(file)

    recipe: dict[str, Any] = {
        "merge_method": MERGEKIT[method],
        "models": [{"model": weights(path)} for path in models],
        "parameters": mergekit_options(method, Layout((), ()), len(models)),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method != "mean":
        recipe["base_model"] = weights(folder / "base")
    file = folder / "mergekit.yaml"
    file.write_text(json.dumps(recipe))

    def call() -> None:
        merge_raw_pytorch.main([str(file), str(folder / "out")], standalone_mode=False)
        for path in (folder / "out").iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())

    return call


BY = {"ours": ours, "mergekit": mergekit}


def measure(folder: Path, method: str, by: str, cold: bool) -> dict[str, float]:
    """One merge: seconds and peaks of memory in GB."""
    models = sorted(path for path in folder.iterdir() if path.name.startswith("tuned"))
    call = BY[by](folder, method, models)
    if cold:
        drop(folder)
    before, peaks, ended = memory(), [0, 0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            peaks[:] = [max(peak, now - first) for peak, now, first in zip(peaks, memory(), before, strict=True)]

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begin, busy = time.perf_counter(), time.process_time()
    call()
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


def bandwidth(folder: Path, cold: bool) -> tuple[float, float]:
    """Bytes a second, and a processor's second, of a plain copy of the base that is on the disk at its end."""
    if cold:
        drop(folder)
    files = sorted((folder / "base").glob("*.safetensors"))
    begin, busy, copy = time.perf_counter(), time.process_time(), folder / "copy"
    for path in files:
        shutil.copyfile(path, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    copy.unlink()
    size = 2 * sum(path.stat().st_size for path in files)
    return size / seconds, size / busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of each model")
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default="mean,task-arithmetic,dare,ties,breadcrumbs")
    parser.add_argument("--by", default="ours", help="ours, or ours,mergekit (of one shard)")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the models are made and stay; default: a temporary one")
    parser.add_argument("--measure", help="internal: measure this method in this process")
    args = parser.parse_args()
    if args.shards > 1 and "mergekit" in args.by:
        parser.error("--by mergekit: mergekit-pytorch reads models of one file; leave --shards out")
    if args.measure:
        print("\n" + json.dumps(measure(args.folder, args.measure, args.by, args.cold)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "base").is_dir():
            make(folder, args)
        sizes = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
        written = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        what = f"{args.files} files of {written / 1e9:.2f} GB and their base, {args.shards} shards"
        state = "cold" if args.cold else "warm"
        print(f"{what}, {state}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        header = ["merge", "by", "seconds", "copy, GB/s", "x floor", "processor seconds", "x a copy's"]
        header += ["anonymous GB", "resident GB", "ours is faster"]
        print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
        for method in args.methods.split(","):
            rows: dict[str, list[dict[str, float]]] = {by: [] for by in args.by.split(",")}
            for _ in range(args.repeats):
                for by, measured in rows.items():
                    rate, busy_rate = bandwidth(folder, args.cold)
                    command = [sys.executable, __file__, "--folder", str(folder), "--measure", method, "--by", by]
                    done = subprocess.run([*command, *["--cold"] * args.cold], check=True, stdout=subprocess.PIPE)
                    row = json.loads(done.stdout.decode().splitlines()[-1])
                    row |= {"rate": rate / 1e9, "floors": row["seconds"] * rate / (sizes + written)}
                    measured.append(row | {"busy floors": row["busy"] * busy_rate / (sizes + written)})
            for by, measured in rows.items():
                middle = {key: median(row[key] for row in measured) for key in measured[0]}
                faster = median(
                    row["seconds"] / mine["seconds"] for row, mine in zip(measured, rows["ours"], strict=True)
                )
                cells = [f"{middle['seconds']:.2f}", f"{middle['rate']:.2f}", f"{middle['floors']:.1f}"]
                cells += [f"{middle[key]:.2f}" for key in ("busy", "busy floors", "anonymous", "resident")]
                print(f"| {method} | {by} | {' | '.join(cells)} | {faster:.1f} x |", flush=True)


if __name__ == "__main__":
    main()
