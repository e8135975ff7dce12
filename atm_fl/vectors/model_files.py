"""Models on disk as people have them, each as named entries that are read when they are looked at.

A safetensors file; shards with their `*.index.json`; a Hugging Face folder; a run's folder, whose newest checkpoint is
meant, or one of its checkpoints; a `.pt` or `.bin` of `torch.save` (read by `weights_only`, which runs no code). LoRA
adapters are in merging/checkpoint_lora.py. What is mapped belongs to the system's page cache and goes when memory is
short. Nothing is ever written.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atm_fl.errors import SettingError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""safetensors' names of the types that can be read."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that are merged, in safetensors' spelling."""

WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.ckpt",
)
"""What holds weights in a model's folder; all else of it is copied."""

RUN_METADATA = "atm-fl"
"""Under which a run's checkpoint says in its metadata, as JSON, what it is: with a "layout", beside other things."""
STATE = "server-optimizer."
"""What the names of a server optimizer's moments begin with in a run's checkpoint."""


@dataclass(frozen=True)
class Entry:
    """dtype in safetensors' spelling, shape, and the entry's bytes within its file's data (begin, end)."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class Reader(Protocol):
    """One entry of a fine-tuned model, which knows its difference to the base's."""

    def difference(self, chunk: slice, before: Tensor, out: Tensor) -> None:
        """fine-tuned − base of the flat elements `chunk`, of base `before` (float32 or float64), to `out`, float32."""

    def ahead(self, chunk: slice) -> None:
        """Have the system read the elements `chunk` from the disk soon."""


class Checkpoint:
    """A model: its entries by name, in the order of its file or files, its metadata and its config.

    SettingError, which says what it is, if `path` is none that can be merged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self.files: dict[str, list[str]] = {}
        """Names of entries by the file they are in."""
        self._tensors: dict[str, Tensor] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self.config = _config(path)
        if self.config.get("quantization_config"):
            raise SettingError(
                f"{path} is quantized (quantization_config in its config.json): merge what it was made of"
            )
        weights = _weights_file(path)
        if weights.name.endswith(".index.json"):
            shards = read_json(weights).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise SettingError(f"{weights} is no index of shards: it has no weight_map")
            for name in dict.fromkeys(shards.values()):
                if Path(name).name != name:
                    raise SettingError(f"{weights} names the shard {name!r}, which is not beside it")
                self._read(weights.parent / name)
            if lacking := [name for name in shards if name not in self.entries]:
                raise SettingError(f"{weights} names {few(lacking)}, which its shards lack")
        else:
            self._read(weights)
        self.index = weights if weights.name.endswith(".safetensors.index.json") else None
        self.of_run = "layout" in _about_run(self.metadata)
        """Whether a run wrote it: its entries are those that were tuned, without the name of what wraps the model."""
        if self.of_run:
            self._as_model()
        for name, entry in self.entries.items():
            if entry.dtype not in DTYPES:
                kind = "fp8, " if entry.dtype.startswith("F8") else ""
                raise SettingError(
                    f"{path}: {name} is quantized ({kind}{entry.dtype}): its numbers mean little without their scales; "
                    "merge the model in bf16 or fp32"
                )

    def _read(self, file: Path) -> None:
        """Take in the entries of one file."""
        kind = _kind(file)
        if kind == "pickle":
            tensors = _unpickled(file)
            entries, end = {}, 0
            for name, tensor in tensors.items():
                dtype = next((key for key, value in DTYPES.items() if value == tensor.dtype), str(tensor.dtype))
                begin, end = end, end + tensor.nbytes
                entries[name] = Entry(dtype.replace("torch.float8", "F8"), tuple(tensor.shape), (begin, end))
            self._tensors |= tensors
        else:
            entries, metadata, begin = _header(file)
            self.metadata |= metadata
            whole = torch.from_numpy(np.memmap(file, np.uint8, "c"))
            descriptor = os.open(file, os.O_RDONLY)
            self._descriptors = [*getattr(self, "_descriptors", []), descriptor]
            for name, entry in entries.items():
                if entry.dtype in DTYPES:
                    self._tensors[name] = _typed(whole, begin, entry)
                    self._places[name] = descriptor, begin + entry.data_offsets[0]
        if twice := sorted(set(entries) & set(self.entries)):
            raise SettingError(f"{file}: {few(twice)} are in another shard too")
        self.entries |= entries
        self.files[file.name] = list(entries)

    def _as_model(self) -> None:
        """Leave out what a run keeps beside the model, and the first part of the names, if all have the same."""
        names = {name: name for name in self.entries if not name.startswith(STATE)}
        if len({name.partition(".")[0] for name in names}) == 1 and all("." in name for name in names):
            names = {name: name.partition(".")[2] for name in names}
        self.entries = {names[name]: entry for name, entry in self.entries.items() if name in names}
        self._tensors = {names[name]: tensor for name, tensor in self._tensors.items() if name in names}
        self._places = {names[name]: place for name, place in self._places.items() if name in names}
        self.files = {file: [names[name] for name in held if name in names] for file, held in self.files.items()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", []):
            os.close(descriptor)

    def read(self, name: str) -> Tensor:
        """The entry, contiguous, as it is stored; of a mapped file, nothing is read before it is looked at."""
        return self._tensors[name].contiguous()

    def is_float(self, name: str) -> bool:
        """Whether the entry is of those that are merged."""
        return self.entries[name].dtype in FLOATS

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def reader(self, name: str) -> Dense:
        """The entry `name` as one to merge."""
        return Dense(self.read(name).reshape(-1), self._places.get(name))

    def named_as(self, base: Checkpoint) -> None:
        """Take the base's names for the entries, where this kind of model has others."""


@dataclass(frozen=True)
class Dense:
    """An entry that is stored as it is: flat values, and the file descriptor and offset where they are."""

    values: Tensor
    place: tuple[int, int] | None = None

    def difference(self, chunk: slice, before: Tensor, out: Tensor) -> None:
        after = self.values[chunk]
        if before.dtype == torch.float64 or after.dtype == torch.float64:
            torch.sub(after.to(torch.promote_types(after.dtype, torch.float32)), before, out=out)
        elif after.dtype == torch.float32:
            torch.sub(after, before, out=out)
        else:
            out.copy_(after).sub_(before)

    def equal(self, chunk: slice, before: Tensor) -> Tensor:
        """Where the values are the base's, infinite ones and NaN too."""
        after = self.values[chunk].to(before.dtype)
        return (after == before) | (after.isnan() & before.isnan())

    def ahead(self, chunk: slice) -> None:
        if self.place:
            size = self.values.element_size()
            length = (chunk.stop - chunk.start) * size
            os.posix_fadvise(self.place[0], self.place[1] + chunk.start * size, length, os.POSIX_FADV_WILLNEED)


class Zero:
    """An entry that the model leaves as it is in the base."""

    def difference(self, chunk: slice, before: Tensor, out: Tensor) -> None:
        out.zero_()

    def ahead(self, chunk: slice) -> None:
        pass


def few(names: list[str]) -> str:
    """The first three."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _about_run(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file's metadata say of the run, or the merge, that wrote it; empty if neither did."""
    try:
        about = json.loads(metadata.get(RUN_METADATA, "{}"))
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def checkpoints(directory: Path) -> list[Path]:
    """A run's checkpoint files, oldest first."""
    return sorted(directory.glob("checkpoint/round-*.safetensors"))


def _weights_file(path: Path) -> Path:
    """The file, or the index of the files, that has a model's weights."""
    if not path.is_dir():
        if not path.exists():
            raise SettingError(f"{path} is not a file or folder")
        return path
    if of_run := checkpoints(path):
        return of_run[-1]
    names = ["model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors", "adapter_model.bin"]
    for name in [*names, "pytorch_model.bin.index.json", "pytorch_model.bin"]:
        if (path / name).exists():
            return path / name
    single = sorted(file for pattern in WEIGHTS for file in path.glob(pattern))
    if len(single) != 1:
        raise SettingError(
            f"{path} has no model.safetensors, but {few([file.name for file in single]) or 'no weights'}"
        )
    return single[0]


def _config(path: Path) -> dict[str, Any]:
    """A model's config.json: of its folder, or beside a file that has the name it has in one."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name.startswith(("model.safetensors", "pytorch_model.bin")):
        return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. SettingError if the file has none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SettingError(f"{path} is no JSON object")
    return content


def _kind(path: Path) -> str:
    """ "safetensors" or "pickle", by the file's first bytes. SettingError, which says what it is, if it is neither."""
    if not path.is_file():
        raise SettingError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error}") from error
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", head)
        raise SettingError(
            f"{path} is a git-lfs pointer, not the file of {int(size[1]) if size else '?'} bytes that it stands for; "
            "run `git lfs pull` in its folder"
        )
    if head.startswith(b"GGUF"):
        raise SettingError(f"{path} is a GGUF file, whose numbers are quantized; merge the model that it was made of")
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise SettingError(f"{path} is a web page (HTML), not a model: the download went wrong")
    return "pickle" if head.startswith((b"PK\x03\x04", b"\x80")) and head[8:9] != b"{" else "safetensors"


def _header(path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """The entries of a safetensors file in the order of their bytes, its metadata, and where its data begins."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, 100_000_000))
    if text.startswith(b"{") and 8 + length > size:
        raise SettingError(f"{path} is cut short: it ends within its header; download it again")
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        if size < 8 + length + max(ends, default=0):
            raise SettingError(f"{path} is cut short: {size} of {8 + length + max(ends)} bytes; download it again")
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, IndexError, OSError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{path} is not a safetensors file, nor one of torch.save ({error})") from error
    entries = {
        name: Entry(entry["dtype"], tuple(entry["shape"]), tuple(entry["data_offsets"]))
        for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    }
    return entries, metadata, 8 + length


def _typed(whole: Tensor, begin: int, entry: Entry) -> Tensor:
    """An entry of a mapped file, uint8 [bytes]."""
    first, end = (begin + offset for offset in entry.data_offsets)
    dtype, data = DTYPES[entry.dtype], whole[first:end]
    if first % dtype.itemsize:
        data = data.clone()  # not aligned, as other writers may leave it
    return data.view(dtype).view(entry.shape)


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of torch.save: at its top, or under the key where trainers put it."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SettingError(
            f"{path} cannot be read as weights alone (torch.load, weights_only): it is damaged, cut short, or has more "
            f"than tensors in it; convert it with safetensors.torch.save_file ({reason})"
        ) from error
    nested = (
        [loaded.get(key) for key in ("state_dict", "model_state_dict", "model")] if isinstance(loaded, dict) else []
    )
    for candidate in (*nested, loaded):
        tensors = candidate.items() if isinstance(candidate, Mapping) else ()
        state = {str(name): value.detach() for name, value in tensors if isinstance(value, Tensor)}
        if not state:
            continue
        if wrong := [name for name, value in state.items() if value.layout != torch.strided or value.is_quantized]:
            raise SettingError(f"{path}: {few(wrong)} are sparse or quantized")
        return state
    content = few([str(key) for key in loaded]) if isinstance(loaded, dict) else type(loaded).__name__
    raise SettingError(f"{path} has no state dict; it has {content}")
