"""The arrays of anyone's model as one flat vector, and back.

What becomes of an entry follows from its type and name:

    floating point                         merged
    … with a name of the `averaged`        their mean, weighted by examples: BatchNorm's running statistics
    whole numbers and booleans             stay as they were sent: counters of batches, masks, tables
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from atm_fl.errors import SettingError, printable
from atm_fl.models.buffers import check_buffers
from atm_fl.vectors import Layout
from atm_fl.vectors.finite import check_finite, is_finite
from atm_fl.vectors.npy import read_array

AVERAGED = ("*running_mean", "*running_var")
"""The names of BatchNorm's running statistics in a state dict of PyTorch."""
NUMPY = "numpy.ndarray"


@dataclass(frozen=True)
class Entries:
    """The entries of a model's arrays: n elements that are merged and b behind them that are averaged.

    kinds: each entry's dtype and shape, in the order of the record. dtype: of the flat vector, float32, or float64 if
    an entry is.
    """

    kinds: dict[str, tuple[np.dtype, tuple[int, ...]]]
    merged: Layout
    averaged: Layout
    dtype: torch.dtype

    @classmethod
    def of(cls, arrays: ArrayRecord, averaged: Sequence[str] = AVERAGED) -> Entries:
        """The entries of a record. SettingError if one is of no such type, none is merged, or a pattern has no effect.

        averaged: patterns, with * and ?, of the names of entries that are averaged.
        """
        kinds = {name: (np.dtype(array.dtype), tuple(array.shape)) for name, array in arrays.items()}
        for name, (dtype, _) in kinds.items():
            if dtype.kind not in "fiub" or dtype.itemsize > 8:
                raise SettingError(
                    f"initial_arrays: {name!r} is {dtype}; entries are floating-point numbers of up to 64 bits, whole "
                    "numbers or booleans, so leave it out or convert it"
                )
        floats = [name for name, (dtype, _) in kinds.items() if dtype.kind == "f"]
        behind = [name for name in floats if any(fnmatchcase(name, pattern) for pattern in averaged)]
        for pattern in averaged:
            if pattern not in AVERAGED and not any(fnmatchcase(name, pattern) for name in floats):
                raise SettingError(f"averaged: {pattern!r} matches no floating-point entry; the first: {floats[:3]}")
        first = [name for name in floats if name not in behind]
        if not any(kinds[name][1].count(0) == 0 for name in first):
            raise SettingError(f"initial_arrays: no floating-point entry to merge among {len(kinds)}")

        def layout(names: list[str]) -> Layout:
            return Layout(tuple(names), tuple(kinds[name][1] for name in names))

        wide = any(kinds[name][0].itemsize > 4 for name in floats)
        return cls(kinds, layout(first), layout(behind), torch.float64 if wide else torch.float32)

    @property
    def layout(self) -> Layout:
        """Of the flat vector [n + b]."""
        return self.merged + self.averaged

    def flat(self, arrays: ArrayRecord, taken: bool = False) -> Tensor:
        """The floating-point entries as one vector [n + b]. taken: the arrays are taken out of the record on the way.

        ValueError, naming the entry, if the record has other entries, or one is of another type or shape, holds a value
        that is not finite or, as a variance, one below 0.
        """
        missing, extra = self.kinds.keys() - arrays.keys(), arrays.keys() - self.kinds.keys()
        if missing or extra:
            told = [f"without {_some(missing)}"] * bool(missing) + [f"with {_some(extra)}"] * bool(extra)
            raise ValueError(f"arrays {' and '.join(told)}, unlike those that were sent")
        vector = torch.empty(self.layout.size, dtype=self.dtype)
        views = self.layout.views(vector)
        for name, (dtype, shape) in self.kinds.items():
            array = arrays.pop(name) if taken else arrays[name]
            values = _values(name, array, len(shape))
            if values.dtype != dtype or values.shape != shape:
                raise ValueError(
                    f"{printable(name, 80)}: {values.dtype}{list(values.shape)}, but {dtype}{list(shape)} was sent"
                )
            if name in views:
                views[name].copy_(torch.from_numpy(values))
                if not is_finite(views[name]):
                    raise ValueError(f"{printable(name, 80)}: a value that is not finite (NaN or infinity)")
        check_buffers(vector[self.merged.size :], self.averaged)
        return vector

    def record(self, vector: Tensor, kept: ArrayRecord) -> ArrayRecord:
        """The arrays of a vector [n + b], in their own types and order; what is no floating-point entry is `kept`'s.

        ValueError if a value does not fit its type.
        """
        views = self.layout.views(vector)
        arrays = {}
        for name, (dtype, _) in self.kinds.items():
            if name in views:
                values = views[name].numpy().astype(dtype)
                check_finite(torch.from_numpy(values))
                arrays[name] = Array(values)
            else:
                arrays[name] = kept[name]
        return ArrayRecord(arrays)


def _values(name: str, array: Array, dimensions: int) -> np.ndarray:
    if array.stype != NUMPY:
        raise ValueError(f"{printable(name, 80)}: an array of kind {printable(str(array.stype), 80)}, not {NUMPY}")
    try:
        return read_array(array.data, dimensions)
    except ValueError as error:
        raise ValueError(f"{printable(name, 80)}: {error}") from None


def _some(names: set[str]) -> str:
    """Some names, safe to show."""
    shown = ", ".join(printable(name, 80) for name in sorted(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
