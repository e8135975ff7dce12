"""Writing a merged model: a safetensors file like the base, or a folder like the base's; all of it or nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atm_fl.errors import SettingError
from atm_fl.files import atomic_write
from atm_fl.vectors.model_files import WEIGHTS, Checkpoint
from atm_fl.vectors.tensor_files import bits, header_bytes

PIECE = 1 << 23
"""Bytes that are copied at once."""


class Output:
    """Files with their entries' places, to which several threads may write."""

    def __init__(self, places: Mapping[str, tuple[int, int]]) -> None:
        self._places = places

    def write(self, name: str, begin: int, data: Tensor) -> None:
        """Write contiguous data of the entry `name`, from its byte `begin` on."""
        descriptor, offset = self._places[name]
        rest, offset = bits(data).numpy().data, offset + begin
        while rest:
            count = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[count:], offset + count

    def copy(self, name: str, tensor: Tensor, begin: int = 0) -> None:
        """Write the contiguous tensor, from its byte `begin` on, as the entry `name`."""
        data = bits(tensor)
        for start in range(begin, len(data), PIECE):
            self.write(name, start, data[start : start + PIECE])


def is_folder(base: Checkpoint, out: Path) -> bool:
    """Whether a model that is a folder is written as one: yes, unless `out` has the name of a file."""
    return (base.path.is_dir() and out.suffix != ".safetensors") or (base.index is not None and not out.suffix)


@contextmanager
def output(base: Checkpoint, out: Path, made: Mapping[str, Any]) -> Iterator[Output]:
    """The files of a model like `base` at `out`, which are there when the body ends well, and not before.

    made: goes as JSON under "atm-fl" into every file's metadata. SettingError if `out` is a folder with content.
    """
    metadata = base.metadata | {"atm-fl": json.dumps(made)}
    if not is_folder(base, out):
        with atomic_write(out) as unfinished, _opened({unfinished: list(base.entries)}, base, metadata) as opened:
            yield opened
        return
    check_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        source = base.path if base.path.is_dir() else base.path.parent
        for file in sorted(source.iterdir()):
            if file.is_file() and not any(fnmatchcase(file.name, pattern) for pattern in WEIGHTS):
                shutil.copyfile(file, folder / file.name)
        if base.index:
            shutil.copyfile(base.index, folder / base.index.name)
        safe = all(name.endswith(".safetensors") for name in base.files)
        files = base.files if safe else {"model.safetensors": list(base.entries)}
        with _opened({folder / name: names for name, names in files.items()}, base, metadata) as opened:
            yield opened
        for name in files:
            with open(folder / name, "rb") as written:
                os.fsync(written.fileno())
        if out.is_dir():
            out.rmdir()
        os.replace(folder, out)


def check_folder(out: Path) -> None:
    """SettingError if there is something at `out` that a folder would replace."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SettingError(f"out={str(out)!r} is there already; a folder is not written over")


@contextmanager
def _opened(files: Mapping[Path, list[str]], base: Checkpoint, metadata: Mapping[str, str]) -> Iterator[Output]:
    places = {}
    with ExitStack() as stack:
        for path, names in files.items():
            entries: dict[str, dict[str, Any]] = {}
            end = 0
            for name in names:
                entry = base.entries[name]
                begin, end = end, end + entry.data_offsets[1] - entry.data_offsets[0]
                entries[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
            header = header_bytes(entries, metadata)
            file = stack.enter_context(path.open("wb", buffering=0))
            file.write(header)
            file.truncate(len(header) + end)
            for name in names:
                places[name] = file.fileno(), len(header) + entries[name]["data_offsets"][0]
        yield Output(places)


def fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers are finite when they are rounded to `dtype`."""
    # No value is larger than the root of the sum of squares, which takes half the time of the largest; it may itself
    # be too large.
    if math.sqrt(torch.dot(values, values)) < torch.finfo(dtype).max / 2:
        return True
    return bool(torch.stack(torch.aminmax(values)).to(dtype).isfinite().all())
