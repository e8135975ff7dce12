"""Merging models on disk, block by block, at the disk's speed and in little memory.

read: the base and models that were fine-tuned from it (vectors/model_files.py), which are mapped and never altered.
What is merged are the tensors of floating point (fp64, fp32, fp16, bf16) that checkpoint_names.py chooses; all else
stays as in the base. Differences are taken in float32, or float64 where a tensor is float64, and are merged in float32.

held: a few blocks for each thread. Merges that need something of the whole vectors first (TIES its thresholds, others
norms or inner products) go through the files once more. Merges of matrices hold one entry of every file, two entries at
a time with two threads. Merges of neither kind (pcb, plugins of their own kind) hold one or three vectors of all
merged elements, and the others in a temporary file.

written: base + merged, summed up in float32 (float64 where the base is) and rounded once, with the base's names,
shapes, dtypes and metadata (checkpoint_outputs.py). The key "atm-fl" of the metadata says in JSON how it was made. What
differs in no file is the base's, bit by bit. It appears when it is complete: a crash leaves what was there before, or
nothing.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from atm_fl.errors import RunError, SettingError
from atm_fl.merging import Merge, make_merge, options
from atm_fl.merging.checkpoint_lora import Adapter, open_checkpoint
from atm_fl.merging.checkpoint_names import Plan, make_plan
from atm_fl.merging.checkpoint_outputs import Output, fits, is_folder, output
from atm_fl.merging.checkpoint_vectors import BaseParts, FileVector
from atm_fl.merging.kinds import Elementwise, LinearCombination, Streaming, TensorWise
from atm_fl.merging.scaling import Factor, check_tasks, factors
from atm_fl.vectors.blocks import Block, blocks, in_parallel, parts, stretches
from atm_fl.vectors.mapped import MappedVectors
from atm_fl.vectors.model_files import Checkpoint, few

Progress = Callable[[str, float], object]
"""(what is being done, part of all the work that is done, 0 to 1)"""

TaskFactors = Mapping[str, Factor | Mapping[str, Factor]]
"""Task → a factor on its vector, or factors by patterns of names."""

ROWS = 4
"""A block of files is as long as one that works on so many rows: their several buffers stay in cache."""

IN_MEMORY = 1 << 26
"""Elements of one entry of all files that are held in memory; more are put into a temporary file."""

AHEAD = 8
"""Stretches of blocks that are read ahead."""


@dataclass(frozen=True)
class Merged:
    """What `merge_files` merged: names of tensors (tied ones count each) and the elements of the vector."""

    tensors: int
    elements: int


@dataclass(frozen=True)
class Ready:
    """A merge of files that was checked, before it is computed.

    factors: of each file, one for each entry of the layout, before the merge; layers: those after it.
    """

    base: Checkpoint
    files: list[Checkpoint]
    tasks: list[str]
    plan: Plan
    merge: Merge
    factors: list[list[float]]
    layers: list[float]
    made: dict[str, Any]

    def lines(self) -> list[str]:
        """What each tensor of the base gets, a line each."""
        layout, lines = self.plan.layout, []
        row = {name: number for number, name in enumerate(layout.names)}
        for name, entry in self.base.entries.items():
            head = f"{name} {entry.dtype} {list(entry.shape)}: "
            if name in self.plan.kept:
                lines.append(f"{head}as in the base ({self.plan.kept[name]})")
                continue
            if name in self.plan.tied:
                lines.append(f"{head}as {self.plan.tied[name]} (tied)")
                continue
            number = row[name]
            scaled = [(task, of_file[number]) for task, of_file in zip(self.tasks, self.factors, strict=True)]
            weights = ", ".join(f"{task} x {factor:g}" if factor != 1 else task for task, factor in scaled)
            after = f", then x {self.layers[number]:g}" if self.layers[number] != 1 else ""
            rows = f", its first {layout.shapes[number][0]} rows" if layout.shapes[number] != entry.shape else ""
            lines.append(f"{head}{self.merge.name} of {weights}{after}{rows}")
        return lines


def prepare(
    base: Path,
    files: Sequence[Path],
    method: str = "mean",
    *,
    chosen: Mapping[str, Any] | None = None,
    task_scaling: TaskFactors | None = None,
    layer_scaling: Mapping[str, Factor] | None = None,
    seed: int = 0,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rows: str = "same",
    warn: Callable[[str], object] = warnings.warn,
) -> Ready:
    """Look at all files and options of a merge, as `merge_files` describes them. SettingError if one cannot work."""
    start, others = open_checkpoint(base), [open_checkpoint(path) for path in files]
    if isinstance(start, Adapter):
        raise SettingError(f"{base} is a LoRA adapter: the base is the model that it was made on")
    plan = make_plan(start, others, warn, only=only, exclude=exclude, rows=rows)
    layout = plan.layout
    if not layout.size:
        raise SettingError(
            f"{base} and the files to merge have no floating-point tensor in common; the base has "
            f"{few(list(start.entries))}, {files[0]} has {few(list(others[0].entries))}"
        )
    merge = make_merge(method, layout, seed=seed, **chosen or {})
    merge.check_count(len(files))
    tasks, task_scaling, layer_scaling = task_names(files), task_scaling or {}, layer_scaling or {}
    check_tasks("task-scaling", task_scaling, tuple(tasks))
    used = {item.name: getattr(merge, item.name) for item in options(type(merge))}
    scalings = {"task-scaling": dict(task_scaling), "layer-scaling": dict(layer_scaling)}
    made = {"method": method, "options": used, **scalings, "seed": seed, "base": base.name, "files": tasks}
    selection = {"only": list(only), "exclude": list(exclude), "rows": "" if rows == "same" else rows}
    made |= {key: value for key, value in selection.items() if value}
    by_task = [factors(layout.names, task_scaling.get(task, 1.0), f"task-scaling of {task}") for task in tasks]
    layers = factors(layout.names, layer_scaling, "layer-scaling")
    return Ready(start, others, tasks, plan, merge, by_task, layers, made)


def merge_files(
    base: Path,
    files: Sequence[Path],
    out: Path,
    method: str = "mean",
    *,
    to: str = "model",
    rank: int = 16,
    progress: Progress = lambda stage, share: None,
    warn: Callable[[str], object] = warnings.warn,
    **more: Any,
) -> Merged:
    """Merge the fine-tuned `files` on the `base` they started from into `out` by the merge `method`.

    base, files: safetensors files, indexes of shards, folders of Hugging Face models, files of torch.save; files also
        folders of LoRA adapters.
    out: a safetensors file; of a base that is a folder, a new folder like it, unless it is named *.safetensors.
    to: "model", or "adapter": `out` is a PEFT adapter that has the merged vector by its best approximation of `rank`.

    What more may be given (`prepare`):

    chosen: the merge's options, by name.
    task_scaling: factors on single files' vectors before the merge, by name (`task_names`), or by name and pattern.
    layer_scaling: factors on the merged vector's entries by pattern; several for a gradient over the model's depth.
    seed: for merges that draw random numbers; with the names of the files (`task_names`) it decides them.
    only, exclude: patterns of names that are merged, and of those that stay as in the base.
    rows: "common" merges the first rows of entries of other lengths, as vocabularies are.
    warn: is told of what was left out, was different or is tied.

    SettingError if a file, the method or an option cannot work; RunError if the result does not fit the base's dtype.
    Either leaves `out` as it was.
    """
    if to not in ("model", "adapter"):
        raise SettingError(f"to={to!r}: it is 'model' or 'adapter'")
    check_paths(base, files, out)
    ready = prepare(base, files, method, warn=warn, **more)
    merged = Merged(len(ready.plan.layout.names) + len(ready.plan.tied), ready.plan.layout.size)
    if to == "adapter":
        from atm_fl.merging.checkpoint_adapter import write_adapter

        write_adapter(ready, Steps(ready, _Told(ready, progress, out)), out, rank, warn)
        return merged
    if out.is_dir() and not is_folder(ready.base, out):
        raise SettingError(f"out={str(out)!r} is a directory; name a file")
    with output(ready.base, out, ready.made) as opened:
        _write(ready, Steps(ready, _Told(ready, progress, out)), opened)
    return merged


class _Told:
    """Tells how far the work is, from several threads: elements that are read before the merge, then entries' work."""

    def __init__(self, ready: Ready, progress: Progress, out: Path) -> None:
        layout, merge, count = ready.plan.layout, ready.merge, len(ready.files)
        if isinstance(merge, TensorWise):
            works = [merge.work(shape) for shape in layout.shapes]
        else:
            works = [float(count * size) for size in layout.sizes]
        self.work = dict(zip(layout.names, works, strict=True))
        self._survey = float(count * layout.size) if merge.surveys else 0.0
        self._total = self._survey + sum(works)
        self._stages = f"reading {len(ready.files)} files", f"writing {out.name}"
        self._progress, self._lock, self._read, self._done = progress, threading.Lock(), 0.0, 0.0

    def read(self, elements: int) -> None:
        """So many elements of a vector were looked at, before anything is merged."""
        with self._lock:
            if not self._done and self._survey:
                self._read = min(self._survey, self._read + elements)
                self._progress(self._stages[0], self._read / self._total)

    def merged(self, name: str, share: float) -> None:
        """A share of an entry was merged and written."""
        with self._lock:
            self._done += self.work[name] * share
            self._progress(self._stages[1], min(1.0, (self._survey + self._done) / self._total))

    def end(self) -> None:
        self._progress(self._stages[1], 1.0)


class Steps:
    """The merged vector, computed block by block where it is asked for."""

    def __init__(self, ready: Ready, facts: _Told) -> None:
        self.ready, self.told, self.merge, layout = ready, facts, ready.merge, ready.plan.layout
        self.parts = BaseParts(ready.base, layout)
        self.vectors = [
            FileVector(file, self.parts, readers, factors, done=facts.read)
            for file, readers, factors in zip(ready.files, ready.plan.readers, ready.factors, strict=True)
        ]
        vectors, rows = cast(list[Tensor], self.vectors), ROWS
        self._pieces, self._whole, self._own = None, None, threading.local()
        if isinstance(self.merge, (Streaming, Elementwise, LinearCombination)):
            rows = max(ROWS, len(vectors))
            self._pieces = self.merge.pieces(ready.tasks, vectors)
        elif not isinstance(self.merge, TensorWise):
            for task, vector in zip(ready.tasks, self.vectors, strict=True):
                self.merge.add(task, vector.whole())
            self._whole = self.merge.result()
        if isinstance(self.merge, TensorWise):
            entries = [[Block(n, slice(*self.parts.starts[n : n + 2]))] for n in range(len(layout.names))]
            # An eigendecomposition hardly gains from a second core. Largest first, to end together.
            self.items = sorted(entries, key=lambda item: -facts.work[layout.names[item[0].entry]])
        else:
            self.items = list(stretches(blocks(layout, rows)))

    def step(self, block: Block) -> Tensor:
        """The merged elements of a block, float32 [w], with the layers' factors; they last until the next."""
        size = block.elements.stop - block.elements.start
        if self._pieces:
            if not hasattr(self._own, "target") or len(self._own.target) < size:
                self._own.target = torch.empty(size)
            step = self._own.target[:size]
            self._pieces(block, step)
        elif self._whole is not None:
            step = self._whole[block.elements].clone()
        else:
            step = self._entry(block)
        if self.ready.layers[block.entry] != 1:
            step.mul_(self.ready.layers[block.entry])
        return step

    def _entry(self, block: Block) -> Tensor:
        """The merged entry of a merge of matrices."""
        assert isinstance(self.merge, TensorWise)
        layout, size = self.ready.plan.layout, block.elements.stop - block.elements.start
        spill = MappedVectors() if size * len(self.vectors) > IN_MEMORY else None
        held = {}
        for task, vector in zip(self.ready.tasks, self.vectors, strict=True):
            held[task] = torch.empty(size) if spill is None else torch.empty(0)
            for chunk in parts(size):
                values = vector[block.elements.start + chunk.start : block.elements.start + chunk.stop]
                if spill is None:
                    held[task][chunk] = values
                else:
                    spill.append(task, values)
        if spill:
            held = spill.vectors()
            spill.close()
        shape = layout.shapes[block.entry]
        tensors = [values.view(shape) for values in held.values()]
        merged = self.merge.entry(layout.names[block.entry], tensors).reshape(-1)
        return torch.mul(merged, self.merge.scaling, out=torch.empty(size))

    def ahead(self, item: list[Block]) -> None:
        """Have the system read what the item needs."""
        for block in item:
            start = self.parts.starts[block.entry]
            chunk = slice(block.elements.start - start, block.elements.stop - start)
            for vector in self.vectors:
                vector.ahead(block.entry, chunk)
            self.parts.entries[block.entry].ahead(chunk)


def _write(ready: Ready, steps: Steps, out: Output) -> None:
    """Compute and write everything: merged entries by blocks in several threads, then what is the base's."""
    base, plan, facts = ready.base, ready.plan, steps.told
    written_as: dict[str, list[str]] = {name: [name] for name in plan.layout.names}
    for name, first in plan.tied.items():
        written_as[first].append(name)

    def work(number: int) -> None:
        if number + AHEAD < len(steps.items):
            steps.ahead(steps.items[number + AHEAD])
        for block in steps.items[number]:
            name, start = plan.layout.names[block.entry], steps.parts.starts[block.entry]
            step = steps.step(block)
            for piece in parts(len(step), ROWS):
                first = block.elements.start - start + piece.start
                chunk = slice(first, first + piece.stop - piece.start)
                values = _summed(name, steps.parts, block.entry, chunk, step[piece])
                for each in written_as[name]:
                    out.write(each, chunk.start * values.element_size(), values)
                facts.merged(name, len(values) / plan.layout.sizes[block.entry])

    for item in steps.items[:AHEAD]:
        steps.ahead(item)
    in_parallel(work, range(len(steps.items)), torch.device("cpu"))
    for name in base.entries:
        if name in plan.kept:
            out.copy(name, base.read(name))
    for number, (name, shape) in enumerate(zip(plan.layout.names, plan.layout.shapes, strict=True)):
        if shape != base.shape(name):  # the rows that not all have
            tensor = base.read(name)
            for each in written_as[name]:
                out.copy(each, tensor, plan.layout.sizes[number] * tensor.element_size())
    facts.end()


def _summed(name: str, base: BaseParts, entry: int, chunk: slice, step: Tensor) -> Tensor:
    """base + step in the base's dtype; where no element changes, the base's bits. RunError if one does not fit."""
    stored = base.entries[entry].values[chunk]
    if step.sum() == 0 and not step.any():  # `any` alone takes twenty times as long
        return stored
    total = torch.add(base.part(entry, chunk), step)
    rounded = total.to(stored.dtype)
    if not fits(total, stored.dtype):
        rounded = torch.where(step == 0, stored, rounded)
        if bool(((step != 0) & ~rounded.isfinite()).any()):
            raise RunError(f"{name}: base + merged does not fit {stored.dtype}; a smaller scaling may help")
    return rounded


def check_paths(base: Path, files: Sequence[Path], out: Path) -> None:
    """SettingError if a file would be read twice, or `out` is one of those read, whatever the paths look like."""
    seen: set[Path] = set()
    for path in [base, *files]:
        if path.resolve() in seen:
            raise SettingError(f"{path} is given twice; the base is not to be among the files to merge")
        seen.add(path.resolve())
        inside = path.is_dir() and (path.resolve() == out.resolve() or path.resolve() in out.resolve().parents)
        if inside or (path.exists() and out.exists() and path.samefile(out)):
            raise SettingError(f"out={str(out)!r} is the file {path} that is to be read; inputs are never altered")


def task_names(files: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, with as many of its folders before it as make all names different."""
    paths = [Path(os.path.abspath(path)) for path in files]
    bare = [path if path.is_dir() else path.with_suffix("") for path in paths]
    for count in range(1, max((len(path.parts) for path in paths), default=0)):
        names = ["/".join(path.parts[-count:]) for path in bare]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
