"""Merging checkpoint files of any model, tensor by tensor.

read: safetensors files, the base and models that were fine-tuned from it. They are mapped into memory and never
altered; what is mapped belongs to the system's page cache and goes when memory is short. What is merged are the tensors
of floating point (fp64, fp32, fp16, bf16) that the base and every fine-tuned file have; all else stays as in the base.

held: one float32 vector of the merged elements that every file fills in its turn with fine-tuned − base, what the merge
keeps (one vector if it is streaming; if it is joint, a temporary file for all vectors and one vector for the result),
and one or two tensors on their way. Differences are taken in float32, or float64 where a tensor is float64, and are
merged in float32.

written: one safetensors file like the base, with its names, shapes, dtypes and metadata: base + merged, summed up in
float32 (float64 where the base is) and rounded once. The key "atm-fl" of its metadata says in JSON how it was made. It
appears when it is complete: a crash leaves the file that was there before, or none.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atm_fl.errors import RunError, SettingError
from atm_fl.files import atomic_write
from atm_fl.merging import Merge, make_merge, options
from atm_fl.merging.scaling import check_layer_scaling, check_task_scaling, scale_layers
from atm_fl.vectors import Layout
from atm_fl.vectors.blocks import empty
from atm_fl.vectors.finite import is_finite
from atm_fl.vectors.tensor_files import bits, write_entries

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that are merged, in safetensors' spelling. Numbers of 8 bits and less mean little without their scales."""

Progress = Callable[[str, float], object]
"""(what is being done, part of all the reading and writing that is done, 0 to 1)"""


class Checkpoint:
    """A safetensors file: its metadata, and its entries (dtype, shape, data_offsets) by name in the order of the file.

    SettingError if it is no such file.
    """

    def __init__(self, path: Path) -> None:
        if path.name.endswith(".index.json"):
            raise SettingError(f"{path} is the index of a model in several files: save the model as one file first")
        if not path.is_file():
            raise SettingError(f"{path} is not a file")
        self.path = path
        try:
            self.open()
        except (SafetensorError, OSError) as error:
            raise SettingError(
                f"{path} is not a safetensors file ({error}); convert it with safetensors.torch.save_file"
            ) from error
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries: dict[str, dict[str, Any]] = dict(
            sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
        )

    def open(self) -> Any:
        """The file, mapped: `get_tensor(name)` gives a tensor that is read when it is looked at."""
        return safe_open(self.path, "pt")

    def is_float(self, name: str) -> bool:
        """Whether the entry is of those that are merged."""
        return self.entries[name]["dtype"] in FLOATS

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])


@dataclass(frozen=True)
class Merged:
    """What `merge_files` merged: names of tensors (tied ones count each) and the elements of the vector."""

    tensors: int
    elements: int


def merge_files(
    base: Path,
    files: Sequence[Path],
    out: Path,
    method: str = "mean",
    *,
    chosen: Mapping[str, Any] | None = None,
    task_scaling: Mapping[str, float] | None = None,
    layer_scaling: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, share: None,
    warn: Callable[[str], object] = warnings.warn,
) -> Merged:
    """Merge the fine-tuned `files` on the `base` they started from into `out` by the merge `method`.

    chosen: the merge's options, by name.
    task_scaling: factors on single files' vectors before the merge, by name (`task_names`).
    layer_scaling: factors on the merged vector's entries, as `scaling.scale_layers` takes them.
    seed: for merges that draw random numbers; with the names of the files (`task_names`) it decides them.
    warn: is told of what was left out, was different or is tied.

    SettingError if a file, the method or an option cannot work; RunError if the result does not fit the base's dtype.
    Either leaves `out` as it was.
    """
    check_paths(base, files, out)
    start, others = Checkpoint(base), [Checkpoint(path) for path in files]
    names = common_entries(start, others, warn)
    tied = tied_entries(start, others, names)
    if tied:
        pairs = [f"{name} = {first}" for name, first in tied.items()]
        warn(f"{len(tied)} tied, merged once and written under every name: {few(pairs)}")
    names = [name for name in names if name not in tied]
    layout = Layout(tuple(names), tuple(start.shape(name) for name in names))
    if not layout.size:
        raise SettingError(
            f"{base} and the files to merge have no floating-point tensor in common; the base has "
            f"{few(list(start.entries))}, {files[0]} has {few(list(others[0].entries))}"
        )
    merge = make_merge(method, layout, seed=seed, **chosen or {})
    merge.check_count(len(files))
    tasks, task_scaling, layer_scaling = task_names(files), task_scaling or {}, layer_scaling or {}
    check_task_scaling(task_scaling, tuple(tasks))
    check_layer_scaling(layer_scaling, layout)

    total = layout.size * (len(files) + 1)

    def tell(stage: str, elements: int) -> None:
        progress(stage, elements / total)

    vector = merged_vector(merge, start, dict(zip(tasks, others, strict=True)), task_scaling, tell)
    merged = layout.views(scale_layers(vector, layout, layer_scaling))
    used = {item.name: getattr(merge, item.name) for item in options(type(merge))}
    scalings = {"task-scaling": dict(task_scaling), "layer-scaling": dict(layer_scaling)}
    made = {"method": method, "options": used, **scalings, "seed": seed, "base": base.name, "files": tasks}

    def contents() -> Iterator[Tensor]:
        tensors, done = start.open(), layout.size * len(files)
        for name in start.entries:
            tensor, step = tensors.get_tensor(name), merged.get(tied.get(name, name))
            if step is not None:
                tensor = (tensor + step).to(tensor.dtype)
                if not is_finite(tensor):
                    raise RunError(f"{name}: base + merged does not fit {tensor.dtype}; a smaller scaling may help")
                done += step.numel() if name in merged else 0
            yield tensor
            tell(f"writing {out.name}", done)

    with atomic_write(out) as part:
        # Every entry keeps its offset.
        write_entries(part, start.entries, contents(), start.metadata | {"atm-fl": json.dumps(made)})
    return Merged(len(names) + len(tied), layout.size)


def check_paths(base: Path, files: Sequence[Path], out: Path) -> None:
    """SettingError if a file would be read twice, or `out` is one of those read, whatever the paths look like."""
    seen: set[Path] = set()
    for path in [base, *files]:
        if path.resolve() in seen:
            raise SettingError(f"{path} is given twice; the base is not to be among the files to merge")
        seen.add(path.resolve())
        if path.exists() and out.exists() and path.samefile(out):
            raise SettingError(f"out={str(out)!r} is the file {path} that is to be read; inputs are never altered")
    if out.is_dir():
        raise SettingError(f"out={str(out)!r} is a directory; name a file")


def task_names(files: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, with as many of its folders before it as make all names different."""
    paths = [Path(os.path.abspath(path)) for path in files]
    for count in range(1, max((len(path.parts) for path in paths), default=0)):
        names = ["/".join(path.with_suffix("").parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def common_entries(base: Checkpoint, others: Sequence[Checkpoint], warn: Callable[[str], object]) -> list[str]:
    """The base's floating-point entries that every file has too, in its order; `warn` is told of all that is different.

    SettingError if an entry has another shape than in the base, or is a float in one and not in the other.
    """
    kept = [name for name in base.entries if base.is_float(name)]
    for file in others:
        for name in file.entries:
            if name not in base.entries:
                continue
            if file.shape(name) != base.shape(name):
                raise SettingError(
                    f"{file.path}: {name} has the shape {list(file.shape(name))}, in the base {list(base.shape(name))}"
                )
            if file.is_float(name) != base.is_float(name):
                found, expected = (one.entries[name]["dtype"] for one in (file, base))
                raise SettingError(f"{file.path}: {name} is {found}, in the base {expected}")
        found_in, found_base = file.open(), base.open()
        missing = [name for name in base.entries if base.is_float(name) and name not in file.entries]
        extra = [name for name in file.entries if name not in base.entries]
        different = [
            name
            for name in base.entries
            if name in file.entries
            and not base.is_float(name)
            and not torch.equal(bits(found_in.get_tensor(name)), bits(found_base.get_tensor(name)))
        ]
        if missing:
            warn(f"{file.path} lacks {len(missing)} that stay as in the base for all: {few(missing)}")
        if extra:
            warn(f"{file.path} has {len(extra)} that the base lacks and that are left out: {few(extra)}")
        if different:
            warn(f"{file.path} has {len(different)} that are no floats and differ from the base's: {few(different)}")
        kept = [name for name in kept if name in file.entries]
    return kept


def tied_entries(base: Checkpoint, others: Sequence[Checkpoint], names: Sequence[str]) -> dict[str, str]:
    """Entries that are stored twice: name → the first name with the same bits in the base and in every file.

    Entries of a single value are none of them: biases of zeros are equal, but nothing ties them.
    """
    files = [file.open() for file in (base, *others)]
    firsts: dict[object, list[str]] = {}
    tied = {}
    for name in names:
        flat = files[0].get_tensor(name).reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)]
        if bool((sample == sample[:1]).all()):
            continue
        alike = firsts.setdefault((flat.dtype, base.shape(name), bits(sample.clone()).numpy().tobytes()), [])
        for first in alike:
            if all(torch.equal(bits(file.get_tensor(first)), bits(file.get_tensor(name))) for file in files):
                tied[name] = first
                break
        else:
            alike.append(name)
    return tied


def merged_vector(
    merge: Merge,
    base: Checkpoint,
    others: Mapping[str, Checkpoint],
    task_scaling: Mapping[str, float],
    tell: Callable[[str, int], None],
) -> Tensor:
    """The merged vector, float32 [n], of files by name. SettingError, naming file and tensor, if one is not finite."""
    vector = empty(merge.layout.size, torch.empty(0))
    views, start = merge.layout.views(vector), base.open()
    done = 0
    for task, file in others.items():
        tensors = file.open()
        for name, view in views.items():
            before, after = start.get_tensor(name), tensors.get_tensor(name)
            torch.sub(after.to(torch.promote_types(after.dtype, torch.float32)), before, out=view)
            if not is_finite(view):
                wrong = file.path if is_finite(before) else base.path
                raise SettingError(f"{wrong}: {name} is not finite (NaN, infinite or beyond float32)")
            done += view.numel()
            tell(f"reading {task}", done)
        merge.add(task, vector.mul_(task_scaling.get(task, 1.0)))
    # The merge has what it needs, and its result may need the space.
    del vector, views, view
    tell(f"merging {len(others)} files", done)
    return merge.result()


def few(names: Sequence[str]) -> str:
    """The first three."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
