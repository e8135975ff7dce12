"""Merges: from task vectors to the step that the base model takes.

A merge is a class that says in `_combine` how a set of task vectors becomes one. To add one, put a file beside this one
that registers a class of one of the kinds in `kinds.py`::

    @merge("sign-mean")
    class SignMean(Elementwise):
        \"\"\"The mean of the signs (one line for `atm-fl merges`; then the paper and the equation).\"\"\"

        size: float = option(0.01, "length of a step", gt=0)

        def block(self, stack, block, scratch):
            return stack.sign_().mean(0) * self.size

Its options can then be set in a run (`merge = "sign-mean:size=0.1"`), on the command line (`atm-fl merge --size 0.1`)
and in Python (`make_merge("sign-mean", layout, size=0.1)`), each checked as declared.

A merge that needs no more than the vectors' sum and number says so (`of_sum`), and how (`sum_factor`, `from_sum`). Then
it goes with secure aggregation, where there is only the sum, and with client-level DP, where the sum gets the noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, dataclass_transform

import torch
from torch import Tensor

from atm_fl.errors import SettingError, did_you_mean
from atm_fl.options import check_option, check_options, declare, option, options, type_name
from atm_fl.plugins import Registry
from atm_fl.vectors import Layout
from atm_fl.vectors.blocks import empty

__all__ = [
    "MERGES",
    "Merge",
    "check_option",
    "find_merge",
    "make_merge",
    "merge",
    "merges",
    "merges_of_sum",
    "option",
    "options",
    "type_name",
]


@dataclass(kw_only=True)
class Merge(ABC):
    """One merge of one set of task vectors; a new object serves every round.

    Either all vectors are at hand (`combine`), or they come one by one (`add`, then `result`). Vectors are float32 (or
    float64) [n], all on one device, where the result is too. None is ever altered. Vectors of half precision (bfloat16,
    float16) are merged in float32, and the result is rounded once to their dtype.

    layout: the vectors' entries, for merges that treat each in its own way.
    seed: of merges that draw random numbers; with the names of the tasks it decides them, whatever their order.
    """

    name: ClassVar[str]
    of_sum: ClassVar[bool] = False
    """Whether it is a function of the vectors' sum and their number alone, where all weights are 1."""
    robust: ClassVar[bool] = False
    """Whether it is there to withstand bad vectors."""
    surveys: ClassVar[bool] = False
    """Whether it reads the whole vectors once before it can merge a block; for the progress of merges of files."""
    layout: Layout
    seed: int = 0
    _dtype: torch.dtype | None = field(default=None, init=False, repr=False, compare=False)
    scaling: float = option(1.0, "factor on the merged vector (λ)")

    def __post_init__(self) -> None:
        check_options(self)

    def combine(
        self,
        vectors: Mapping[str, Tensor],
        weights: Mapping[str, float] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The merged vector of `vectors`, by task; weights default to 1.

        out: memory that it is written into and that is returned, contiguous [n] of the vectors' dtype and device, apart
            from theirs. Fresh memory costs as much again as a mean of few vectors.

        ValueError if there is no vector, or one or `out` does not fit; SettingError if the merge needs more of them.
        """
        for task, vector in vectors.items():
            self._check_vector(task, vector)
        if not vectors:
            raise ValueError("a merge needs at least one task vector")
        self.check_count(len(vectors))
        wide = {task: self._widened(vector) for task, vector in vectors.items()}
        weights = weights or dict.fromkeys(vectors, 1.0)
        if out is None:
            return self._rounded(self._combine(wide, weights, None))
        dtype, self._dtype = self._dtype, None
        self._check_out(out, dtype, vectors)
        merged = self._combine(wide, weights, out if out.dtype.itemsize >= 4 else None)
        return out if merged is out else out.copy_(merged)

    def min_tasks(self) -> int:
        """How many task vectors the merge needs."""
        return 1

    def check_count(self, count: int) -> None:
        """SettingError if `count` task vectors are too few for this merge."""
        if count < self.min_tasks():
            chosen = ", ".join(
                f"{item.name.replace('_', '-')}={getattr(self, item.name)}" for item in options(type(self))
            )
            raise SettingError(
                f"merge={self.name!r} with {chosen} needs at least {self.min_tasks()} tasks, not {count}"
            )

    @abstractmethod
    def add(self, task: str, vector: Tensor, weight: float = 1.0) -> None:
        """Take in the task vector of `task`; the tensor may be used again afterwards."""

    @abstractmethod
    def result(self) -> Tensor:
        """The merged vector of what was added. The errors of `combine`."""

    def sum_factor(self, count: int) -> float:
        """Of a merge `of_sum`: what the sum of `count` vectors is multiplied with before `from_sum` gets it."""
        raise ValueError(f"the merge {self.name!r} needs each vector, not their sum alone")

    def from_sum(self, scaled: Tensor, count: int, rounding: float = 0.0) -> Tensor:
        """Of a merge `of_sum`: the merged vector, given `sum_factor(count)` times the sum of `count` vectors, [n].

        rounding: standard deviation of the error of an element of the sum, where it is more than float32's own.
        """
        raise ValueError(f"the merge {self.name!r} needs each vector, not their sum alone")

    @abstractmethod
    def _combine(self, vectors: Mapping[str, Tensor], weights: Mapping[str, float], out: Tensor | None) -> Tensor: ...

    def _memory(self, like: Tensor, out: Tensor | None) -> Tensor:
        """Memory for a merged vector: `out` if it is given."""
        return empty(self.layout.size, like) if out is None else out

    def _widened(self, vector: Tensor) -> Tensor:
        """The vector in a dtype that sums are taken in; `_rounded` remembers its own."""
        self._dtype = torch.promote_types(self._dtype or vector.dtype, vector.dtype)
        return vector.float() if vector.dtype.itemsize < 4 else vector

    def _rounded(self, merged: Tensor) -> Tensor:
        """The merged vector in the dtype of the vectors."""
        dtype, self._dtype = self._dtype, None
        return merged if dtype is None else merged.to(dtype)

    def _check_out(self, out: Tensor, dtype: torch.dtype | None, vectors: Mapping[str, Tensor]) -> None:
        device = next(iter(vectors.values())).device
        shape = (self.layout.size,)
        if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)} on {out.device}; it must be {dtype} {shape} on {device}, "
                "contiguous"
            )
        for task, vector in vectors.items():
            begin, end = vector.data_ptr(), vector.data_ptr() + vector.itemsize * vector.stride(0) * len(vector)
            if begin < out.data_ptr() + out.nbytes and out.data_ptr() < end:
                raise ValueError(f"out has the memory of {task}, and no vector is ever altered")

    def _check_vector(self, task: str, vector: Tensor) -> None:
        if vector.shape != (self.layout.size,) or not vector.is_floating_point():
            raise ValueError(
                f"{task}: a vector of {vector.dtype} {tuple(vector.shape)} does not fit a layout of "
                f"{self.layout.size} elements"
            )


def _options_of_a_run(made: type[Merge]) -> list[Any]:
    return [item for item in options(made) if item.name != "scaling"]


MERGES: Registry[type[Merge]] = Registry("merge", _options_of_a_run, elsewhere=("scaling",))
_Class = TypeVar("_Class", bound=type[Merge])


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
def merge(name: str) -> Callable[[_Class], _Class]:
    """Register the decorated class as the merge `name`; its options become keyword arguments."""
    return declare(MERGES, name)


def merges() -> dict[str, type[Merge]]:
    """All merges by name, sorted."""
    return dict(sorted(MERGES.items()))


def merges_of_sum() -> list[str]:
    """The names of the merges that need the sum of the vectors alone, sorted."""
    return [name for name, merge_class in merges().items() if merge_class.of_sum]


def find_merge(name: str) -> type[Merge]:
    """The class of the merge `name`. SettingError, with the nearest known name, if there is none."""
    return MERGES.find(name)


def make_merge(name: str, layout: Layout, *, seed: int = 0, **chosen: Any) -> Merge:
    """A new object of the merge `name`. SettingError if it has no such option or an option's value cannot work."""
    merge_class = find_merge(name)
    known = [item.name for item in options(merge_class)]
    for key in chosen:
        if key not in known:
            dashed = [item.replace("_", "-") for item in known]
            raise SettingError(
                f"the merge {name!r} has no option {key.replace('_', '-')!r}"
                f"{did_you_mean(key.replace('_', '-'), dashed)}"
            )
    return merge_class(layout=layout, seed=seed, **chosen)
