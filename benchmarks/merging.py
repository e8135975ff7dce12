"""What merges cost, beside PEFT, mergekit and fusion-bench, and beside a plain copy of the same bytes.

    pip install -e .[bench]
    python benchmarks/merging.py [--repeats 3] [--methods mean,ties] [--implementations ours,peft] [--resume]

Made-up task vectors with the layout of open_clip's ViT-B-16 image tower (86,192,640 float32 each) are merged by every
implementation that has the method, each measurement in a process of its own, after a small merge as a warm-up.
"ours-out" is ours into given memory, "ours-float32" with precision=float32, "ours-products" the same with polar factors
by products alone, as on a GPU. Times are medians of the merge alone: all vectors are in memory as ordinary tensors, and
what a peer needs prepared (its dictionaries, a base of zeros, copies if it overwrites its inputs) is prepared outside.
Processor seconds, of all threads, and their ratio to what copying as many bytes costs, say more than the clock where
other work runs beside it. The floor is the time in
which this machine's copy bandwidth, measured just before each repeat, reads every vector and writes one; "x floor" is
the median of the ratios. Memory is the peak of anonymous resident memory (mapped files don't count) above what was
there before the merge, in vectors, the result included. "One by one" is how a server merges: each vector is read from
disk into the same buffer, added, and gone.

Every measurement is written to `measurements.jsonl` in --folder as it comes; --resume takes those from there. The
vectors stay in --folder for the next run (14 GB with --scale full: 20 vectors, and as much in the system's temporary
folder while joint merges spill theirs).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from atm_fl.merging import make_merge, merges
from atm_fl.merging.kinds import Streaming
from atm_fl.runs.run import processor
from atm_fl.vectors import Layout, digest, single

SCALES = {"full": (768, 12, 512), "small": (384, 12, 384), "tiny": (192, 6, 128), "warm-up": (64, 1, 64)}
"""Width, blocks and outputs of the image tower."""
PEERS = ("peft", "mergekit", "fusion-bench")
RANDOM = ("dare", "dare-ties")
MANY = 20
"""Tasks of the second memory measurement."""


def image_tower(scale: str) -> Layout:
    """The entries of open_clip's ViT image tower with patches of 16 x 16 pixels of 224 x 224."""
    width, depth, outputs = SCALES[scale]
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (197, width),
        "proj": (width, outputs),
        "conv1.weight": (width, 3, 16, 16),
        "ln_pre.weight": (width,),
        "ln_pre.bias": (width,),
    }
    for number in range(depth):
        block = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
        }
        shapes |= {f"transformer.resblocks.{number}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_post.weight": (width,), "ln_post.bias": (width,)}
    layout = Layout(tuple(shapes), tuple(shapes.values()))
    assert scale != "full" or layout.size == 86_192_640
    return layout


def made_up(layout: Layout, spectrum: str, seed: int) -> Tensor:
    """A task vector: Gaussian, or per matrix a part of low rank with singular values ~ k^-0.7 and as much noise.

    A share that all tasks have in common gives them cosines of about 0.1, as fine-tuned models have.
    """
    vector = torch.empty(layout.size)
    of_task, common = (torch.Generator().manual_seed(number) for number in (seed + 1, 0))
    for view in layout.views(vector).values():
        matrix = view.view(len(view), -1) if view.dim() > 1 else view[None]
        rows, columns = matrix.shape
        rank = min(rows, columns) // 4 if spectrum == "low-rank" else 0
        matrix.zero_()
        for generator, share in ((of_task, 1.0), (common, 0.33)):
            sizes = torch.arange(1, rank + 1) ** -0.7
            sizes *= share / max(float(sizes.norm()), 1e-30)
            left = torch.randn(rows, rank, generator=generator)
            matrix.addmm_(left * sizes, torch.randn(rank, columns, generator=generator))
            matrix.add_(torch.randn(rows, columns, generator=generator), alpha=share)
    return vector.mul_(1e-4)


def vector_files(folder: Path, scale: str, spectrum: str, tasks: int) -> list[Path]:
    """Files of raw float32, written if they are not there yet."""
    files = [folder / f"{scale}-{spectrum}-{task:02}.f32" for task in range(tasks)]
    for task, file in enumerate(files):
        if not file.exists():
            temporary = file.with_suffix(".part")
            made_up(image_tower(scale), spectrum, task).numpy().tofile(temporary)
            temporary.replace(file)
    return files


def read(file: Path, vector: Tensor) -> Tensor:
    """Fill `vector` from a file."""
    with file.open("rb", buffering=0) as stream:
        if stream.readinto(memoryview(vector.numpy()).cast("B")) != vector.nbytes:  # type: ignore[arg-type]
            raise EOFError(f"{file} is too short; delete it")
    return vector


# What is measured: functions that prepare and return the call to be timed, of (merge, layout, vectors [tasks, n]).

Call = Callable[[], Any]


def ours(method: str, layout: Layout, vectors: Tensor) -> Call:
    tasks = {f"task{number}": vector for number, vector in enumerate(vectors)}
    return lambda: make_merge(method, layout).combine(tasks)


def ours_given_memory(method: str, layout: Layout, vectors: Tensor) -> Call:
    """Ours into memory that was written to before."""
    tasks = {f"task{number}": vector for number, vector in enumerate(vectors)}
    out = torch.ones(layout.size)
    return lambda: make_merge(method, layout).combine(tasks, out=out)


def ours_float32(method: str, layout: Layout, vectors: Tensor) -> Call:
    """Ours in the second precision, as it is made on the CPU."""
    tasks = {f"task{number}": vector for number, vector in enumerate(vectors)}
    return lambda: make_merge(method, layout, precision="float32").combine(tasks)


def ours_products(method: str, layout: Layout, vectors: Tensor) -> Call:
    """The same as it is made elsewhere: polar factors by products alone."""
    single.EIGENVECTORS = ()
    return ours_float32(method, layout, vectors)


def ours_per_entry(method: str, layout: Layout, vectors: Tensor) -> Call:
    """Ours on each entry by itself, for peers that trim tensors where we trim whole vectors."""

    def call() -> Tensor:
        merged, parts = [], [vector.split(layout.sizes) for vector in vectors]
        for number, (name, shape) in enumerate(zip(layout.names, layout.shapes, strict=True)):
            tasks = {f"task{task}": entries[number] for task, entries in enumerate(parts)}
            merged.append(make_merge(method, Layout((name,), (shape,))).combine(tasks))
        return torch.cat(merged)

    return call


def ours_one_by_one(method: str, layout: Layout, files: list[Path]) -> Call:
    buffer = read(files[0], torch.empty(layout.size))

    def call() -> Tensor:
        merge = make_merge(method, layout)
        for number, file in enumerate(files):
            merge.add(f"task{number}", read(file, buffer))
        return merge.result()

    return call


def settings(method: str, layout: Layout, count: int) -> tuple[float, Any]:
    """The weight of each task in a weighted sum that is our merge, and our merge, for its options."""
    merge: Any = make_merge(method, layout)
    return merge.scaling / (count if getattr(merge, "average", False) else 1), merge


PEFT = {
    "mean": "task_arithmetic",
    "task-arithmetic": "task_arithmetic",
    "magnitude": "magnitude_prune",
    "ties": "ties",
    "dare": "dare_linear",
    "dare-ties": "dare_ties",
}


def peft(method: str, layout: Layout, vectors: Tensor) -> Call:
    from peft.utils import merge_utils

    weight, options = settings(method, layout, len(vectors))
    weights = torch.full((len(vectors),), weight)
    views = [layout.views(vector) for vector in vectors]
    entries = {name: [view[name] for view in views] for name in layout.names}
    chosen = {"density": options.density} if hasattr(options, "density") else {}
    function = partial(getattr(merge_utils, PEFT[method]), weights=weights, **chosen)
    return lambda: {name: function(tensors) for name, tensors in entries.items()}


MERGEKIT = {
    "mean": "linear",
    "task-arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare": "dare_linear",
    "dare-ties": "dare_ties",
    "breadcrumbs": "breadcrumbs",
    "model-stock": "model_stock",
}


def mergekit_options(method: str, layout: Layout, count: int) -> dict[str, Any]:
    """mergekit's parameters that are our defaults."""
    weight, options = settings(method, layout, count)
    chosen = {} if method == "model-stock" else {"weight": weight}
    if hasattr(options, "density"):
        chosen["density"] = options.density
    if method == "breadcrumbs":
        chosen |= {"density": options.gamma - options.beta, "gamma": 1 - options.gamma}
    if method == "dare-ties":
        chosen["normalize"] = True
    return chosen


def mergekit(method: str, layout: Layout, vectors: Tensor) -> Call:
    from mergekit.merge_methods.api import merge_state_dicts

    models = {f"task{number}": layout.views(vector) for number, vector in enumerate(vectors)}
    chosen = mergekit_options(method, layout, len(vectors))
    if method == "mean":
        return lambda: merge_state_dicts(models, MERGEKIT[method], parameters=chosen)
    models["base"] = layout.views(torch.empty(layout.size).zero_())
    return lambda: merge_state_dicts(models, MERGEKIT[method], parameters=chosen, base="base")


# Not its TIES: that holds 49 vectors for 8 tasks, 17 GB.
FUSION_BENCH = ("mean", "task-arithmetic", "dare", "tsv-m", "iso-c", "iso-cts")


def fusion_bench(method: str, layout: Layout, vectors: Tensor) -> Call:
    from fusion_bench.method.dare.utils import module_random_drop_
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.simple_average import simple_average
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    from fusion_bench.utils.state_dict_arithmetic import state_dict_mul, state_dict_sum

    weight, options = settings(method, layout, len(vectors))
    models = [layout.views(vector) for vector in vectors]

    def dare() -> Any:
        for copy in copies:
            module_random_drop_(copy, 1 - options.density, rescale=True)
        return state_dict_mul(state_dict_sum(copies), weight)

    if method == "dare":  # it overwrites its inputs
        copies = [{name: view.clone() for name, view in model.items()} for model in models]
    calls: dict[str, Call] = {
        "mean": lambda: simple_average(models),
        "task-arithmetic": lambda: state_dict_mul(state_dict_sum(models), weight),
        "dare": dare,
        "tsv-m": lambda: compute_and_sum_svd_mem_reduction(models, accelerator=torch.device("cpu")),
        "iso-c": lambda: iso_c(models, accelerator="cpu"),
        "iso-cts": lambda: iso_cts(models, options.common, accelerator="cpu"),
    }
    return calls[method]


IMPLEMENTATIONS = {
    "ours": ours,
    "ours-out": ours_given_memory,
    "ours-float32": ours_float32,
    "ours-products": ours_products,
    "peft": peft,
    "mergekit": mergekit,
    "fusion-bench": fusion_bench,
}
HAS: dict[str, Any] = {
    "ours-out": ("mean", "task-arithmetic"),
    "ours-float32": ("iso-c", "tsv-m"),
    "ours-products": ("iso-c", "tsv-m"),
    "peft": PEFT,
    "mergekit": MERGEKIT,
    "fusion-bench": FUSION_BENCH,
}


# One measurement, in a process of its own.


@dataclass(frozen=True)
class Case:
    """What one process measures. by: an implementation, or "floor"."""

    method: str
    by: str
    tasks: int
    one_by_one: bool
    scale: str
    spectrum: str


SAMPLER = """
import os, select, sys
page, statm, peak = os.sysconf("SC_PAGESIZE"), os.open(f"/proc/{sys.argv[1]}/statm", os.O_RDONLY), 0
while True:
    asked = select.select([0], [], [], 0.002)[0]
    _, resident, shared, *_ = os.pread(statm, 200, 0).split()
    peak = max(peak, (int(resident) - int(shared)) * page)
    if asked:
        if not os.read(0, 1):
            break
        os.write(1, b"%d\\n" % peak)
        peak = 0
"""


class Sampler:
    """A helper process that watches this one's anonymous resident memory; no lock of ours can hold it up."""

    def __init__(self) -> None:
        command = [sys.executable, "-IS", "-c", SAMPLER, str(os.getpid())]
        self._helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def peak(self) -> int:
        """Bytes of the peak since the last call."""
        assert self._helper.stdin
        assert self._helper.stdout
        self._helper.stdin.write(b"?")
        return int(self._helper.stdout.readline())

    def close(self) -> None:
        assert self._helper.stdin
        self._helper.stdin.close()
        self._helper.wait()


def copy_seconds(size: int) -> tuple[float, float]:
    """Seconds, and processor seconds, to copy a vector to one that has been written before: each the best of nine."""
    source, target, best, least = torch.ones(size), torch.ones(size), math.inf, math.inf
    for _ in range(9):
        start, begin = time.perf_counter(), time.process_time()
        target.copy_(source)
        best, least = min(best, time.perf_counter() - start), min(least, time.process_time() - begin)
    return best, least


def measure_case(case: Case, repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds of each repeat, peak memory in vectors, and how far the result is from ours."""
    layout = image_tower(case.scale)
    if case.by == "floor":
        seconds, busy = copy_seconds(layout.size)
        return {"seconds": [seconds], "busy": [busy]}
    files = vector_files(folder, case.scale, case.spectrum, case.tasks)
    warm_layout = image_tower("warm-up")
    warm_files = vector_files(folder, "warm-up", case.spectrum, case.tasks)
    if case.one_by_one:
        prepare: Callable[[], Call] = partial(ours_one_by_one, case.method, layout, files)
        ours_one_by_one(case.method, warm_layout, warm_files)()
    else:
        vectors, warm = (torch.empty(case.tasks, item.size) for item in (layout, warm_layout))
        for number in range(case.tasks):
            read(files[number], vectors[number]), read(warm_files[number], warm[number])
        prepare = partial(IMPLEMENTATIONS[case.by], case.method, layout, vectors)
        IMPLEMENTATIONS[case.by](case.method, warm_layout, warm)()
    sampler, seconds, copies, peaks, result = Sampler(), [], [], [], None
    busy = []
    for _ in range(repeats):
        result = None
        copies.append(copy_seconds(layout.size))  # beside it, since other work may make both slower
        call = prepare()
        sampler.peak()
        before = sampler.peak()
        start, begin = time.perf_counter(), time.process_time()
        result = call()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - begin)
        peaks.append((sampler.peak() - before) / (4 * layout.size))
        del call
    sampler.close()
    row: dict[str, Any] = {"seconds": seconds, "busy": busy, "copies": copies, "peak": max(peaks)}
    if isinstance(result, dict):
        result = torch.cat([result[name].detach().reshape(-1) for name in layout.names])
    assert isinstance(result, Tensor)
    if case.by == "ours":
        return row | {"digest": digest(result)}
    per_entry = case.method == "ties"
    reference = (ours_per_entry if per_entry else ours)(case.method, layout, vectors)()
    norm = float(torch.linalg.vector_norm(reference, dtype=torch.float64))
    if case.method in RANDOM:
        share = float(torch.linalg.vector_norm(result, dtype=torch.float64)) / norm
        return row | {"difference": abs(share - 1), "compared": "norms (random)"}
    row["difference"] = float(torch.linalg.vector_norm(result - reference, dtype=torch.float64)) / norm
    return row | ({"compared": "ours per entry"} if per_entry else {})


# The whole run.


def installed(peer: str) -> bool:
    try:
        version(peer)
    except PackageNotFoundError:
        print(f"{peer} is not installed and left out: pip install -e .[bench]")
        return False
    return True


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Everything to measure, in order: the floor, each merge by each implementation, ours one by one."""
    make = partial(Case, scale=args.scale, spectrum=args.vectors)
    if not args.memory_only:
        yield make("copy", "floor", 1, False)
        for method in args.methods:
            for by in args.implementations:
                if by == "ours" or method in HAS[by]:
                    yield make(method, by, args.tasks, False)
    if "ours" in args.implementations and not args.times_only:
        for method in args.methods:
            for tasks in sorted({args.tasks, MANY}):
                yield make(method, "ours", tasks, True)


def run(case: Case, repeats: int, folder: Path) -> dict[str, Any]:
    """The measurement of a new process."""
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(case)), "--folder", str(folder)]
    command += ["--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"failed": f"exit {done.returncode}: {last}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def stored(file: Path) -> dict[Case, dict[str, Any]]:
    """The measurements of a file, the last of each case."""
    results = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        row = json.loads(line)
        if "failed" not in row and "busy" in row:
            results[Case(**row.pop("case"))] = row
    return results


def padded(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [header, rule, *lines]
    )


def report(args: argparse.Namespace, rows: dict[Case, dict[str, Any]]) -> None:
    """The tables and which of the demanded bounds are met."""
    layout = image_tower(args.scale)
    peers = ", ".join(
        f"{name} {version(name)}" for name in ("torch", *PEERS) if name in (*args.implementations, "torch")
    )
    print(f"\n{os.cpu_count()} cores of {processor()}, {time.strftime('%Y-%m-%d')}; {peers}")
    print(f"{args.tasks} {args.vectors} vectors of {layout.size:,} float32 ({4 * layout.size / 1e6:.0f} MB)")
    copies = [row["seconds"][0] for case, row in rows.items() if case.by == "floor"]
    floor = (args.tasks + 1) / 2 * copies[0] if copies else math.nan
    if copies:
        print(f"copy {8 * layout.size / copies[0] / 1e9:.1f} GB/s (read + write); floor {floor:.3g} s")
    print()
    at_once = {(case.method, case.by): row for case, row in rows.items() if not case.one_by_one and case.by != "floor"}
    single = {(case.method, case.tasks): row for case, row in rows.items() if case.one_by_one}
    seconds = {key: median(row["seconds"]) for key, row in at_once.items() if "failed" not in row}
    peaks = {key: row["peak"] for key, row in single.items() if "failed" not in row}

    def ratio(method: str, by: str) -> float | None:
        """How many times faster than a peer we are."""
        pair = seconds.get((method, by)), seconds.get((method, "ours"))
        return pair[0] / pair[1] if pair[0] and pair[1] else None

    lines: list[list[str]] = []
    beside_floor: dict[tuple[str, str], float] = {}
    for (method, by), row in at_once.items():
        if "failed" in row:
            lines.append([method, by, row["failed"], *[""] * 6])
            continue
        spread = f"{median(row['seconds']):.3g} ({min(row['seconds']):.3g}-{max(row['seconds']):.3g})"
        faster = ratio(method, by) if by != "ours" else None
        difference = f"{row['difference']:.1e} {row.get('compared', '')}".strip() if "difference" in row else ""
        lines.append([method, by, spread])
        lines[-1] += [f"{median(row['busy']):.3g}", f"{faster:.1f} x" if faster else ""]
        lines[-1] += [f"{row['peak']:.2f}", difference]
        copied = (args.tasks + 1) / 2
        pairs = list(zip(row["seconds"], row["busy"], row["copies"], strict=True))
        beside_floor[method, by] = median(second / (copied * copy) for second, _, (copy, _) in pairs)
        of_copy = median(busy / (copied * copy) for _, busy, (_, copy) in pairs)
        lines[-1][3:3] = [f"{beside_floor[method, by]:.1f}"]
        lines[-1][5:5] = [f"{of_copy:.1f}"]
    if lines:
        header = ["merge", "by", "seconds (min-max)", "x floor", "processor seconds", "x a copy's"]
        header += ["ours is faster", "extra memory", "differs from ours"]
        print(padded(header, lines), "\n\nExtra memory: in vectors, the result included.\n")
    kinds = {
        name: "streaming" if issubclass(merge_class, Streaming) else "joint" for name, merge_class in merges().items()
    }
    counts = sorted({tasks for _, tasks in single})
    lines = []
    for method in dict.fromkeys(method for method, _ in single):
        lines.append([method, kinds[method]])
        for count in counts:
            row = single.get((method, count), {"failed": "-"})
            lines[-1].append(row.get("failed") or f"{row['peak']:.2f} ({row['seconds'][0]:.3g} s)")
    if lines:
        header = ["one by one", "kind", *(f"extra memory, {count} tasks (seconds with reading)" for count in counts)]
        print(padded(header, lines), "\n")

    def bound(what: str, value: float | None, limit: float, least: bool = False) -> None:
        met = value is not None and (value >= limit if least else value <= limit)
        shown = "not measured" if value is None else f"{value:.3g}: {'met' if met else 'MISSED'}"
        print(f"{what} {'>=' if least else '<='} {limit:g}: {shown}")

    for method, by, limit in [("mean", "ours-out", 1.5), ("ties", "ours", 20.0), ("breadcrumbs", "ours", 20.0)]:
        bound(f"{method} by {by}, times the floor", beside_floor.get((method, by)), limit)
    faster_than = {("ties", "peft"): 20, ("breadcrumbs", "mergekit"): 20, ("dare", "peft"): 5}
    for (method, by), limit in faster_than.items():
        bound(f"{method}, faster than {by}", ratio(method, by), limit, least=True)
    for method in ("tsv-m", "iso-c"):
        bound(f"{method}, difference", at_once.get((method, "fusion-bench"), {}).get("difference"), 1e-4)
    for kind, limit in {"streaming": 2, "joint": 3}.items():
        for count in counts:
            merge_class = {method: peaks[method, count] for method in kinds if (method, count) in peaks}
            worst = max(
                (method for method in merge_class if kinds[method] == kind), key=merge_class.__getitem__, default=None
            )
            if worst:
                bound(f"{kind} merges, {count} tasks, most extra memory ({worst})", merge_class[worst], limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = partial(str.split, sep=",")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, help="repeats of the peers, if other")
    parser.add_argument("--scale", choices=[scale for scale in SCALES if scale != "warm-up"], default="full")
    parser.add_argument("--vectors", choices=["low-rank", "gaussian"], default="low-rank")
    parser.add_argument("--methods", type=listed, default=list(merges()), help="of ours, with commas between")
    parser.add_argument("--implementations", type=listed, default=list(IMPLEMENTATIONS))
    parser.add_argument("--memory-only", action="store_true", help="only ours, one by one")
    parser.add_argument("--times-only", action="store_true", help="not ours, one by one")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "atm-fl-merging")
    parser.add_argument("--resume", action="store_true", help="take what has been measured before from --folder")
    parser.add_argument("--measure", help="internal: measure this case in this process")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.measure:
        print("\n" + json.dumps(measure_case(Case(**json.loads(args.measure)), args.repeats, args.folder)))
        return
    if wrong := [name for name in args.methods if name not in merges()]:
        parser.error(f"--methods: no {', '.join(wrong)}; there are {', '.join(merges())}")
    if wrong := [name for name in args.implementations if name not in IMPLEMENTATIONS]:
        parser.error(f"--implementations: no {', '.join(wrong)}; there are {', '.join(IMPLEMENTATIONS)}")
    args.implementations = [by for by in args.implementations if by.startswith("ours") or installed(by)]
    file = args.folder / "measurements.jsonl"
    known, rows = stored(file) if args.resume else {}, {}
    for case in cases(args):
        if case in known:
            rows[case] = known[case]
            continue
        vector_files(args.folder, case.scale, case.spectrum, case.tasks)
        repeats = args.repeats if case.by == "ours" else args.peer_repeats or args.repeats
        rows[case] = run(case, 1 if case.one_by_one else repeats, args.folder)
        with file.open("a") as stream:
            date = time.strftime("%Y-%m-%dT%H:%M:%S")
            stream.write(json.dumps({"case": asdict(case), "date": date, **rows[case]}) + "\n")
        shown = {key: value for key, value in rows[case].items() if key != "digest"}
        print(f"{case.method} by {case.by}, {case.tasks} tasks{', one by one' * case.one_by_one}: {shown}", flush=True)
    report(args, rows)


if __name__ == "__main__":
    main()
