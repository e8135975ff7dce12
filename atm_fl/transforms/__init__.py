"""Transforms: what happens to a task vector between a client's optimizer and the merge, beside its encoding.

`atm_fl.federation.chain` has the order of them all. The setting `transforms` names those that a run adds, as
"name, name:option=value,option=value". To add one, register a class in a file::

    @transform("grid")
    class Grid(Transform):
        \"\"\"Elements are rounded to multiples of a step.\"\"\"

        step: float = option(1e-4, "distance of two multiples", gt=0)

        def client(self, vector, context):
            return vector.div_(self.step).round_().mul_(self.step)

A transform sees no data, so that what DP-SGD promises of a vector holds after it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar, dataclass_transform

from torch import Tensor

from atm_fl.errors import SettingError
from atm_fl.options import check_options, declare, option, options, read_choice
from atm_fl.plugins import Registry
from atm_fl.seeds import derive_seed
from atm_fl.vectors import Layout

if TYPE_CHECKING:
    from atm_fl.settings import Settings

__all__ = ["TRANSFORMS", "Context", "Transform", "make_transforms", "option", "transform"]


class State(Protocol):
    """Where a client keeps tensors from round to round: `federation.client_state.ClientState`."""

    def last(self, kind: str, round_number: int) -> dict[str, Tensor] | None: ...

    def save(self, kind: str, tensors: dict[str, Tensor], round_number: int, checkpoints: int = ...) -> None: ...

    def note(self, rounds: int, numbers: dict[str, float]) -> None: ...


@dataclass
class Context:
    """What a hook may know beside the vector: whose it is, when, and a place for state and numbers.

    task, client: "" where the vector is of all. state: of a client in a run; None at the server.
    """

    settings: Settings
    layout: Layout
    round_number: int
    task: str = ""
    client: str = ""
    state: State | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    """Of this round, to be recorded."""

    def seed(self, purpose: str) -> int:
        """Of what is drawn at random for `purpose`: of the run, the task and the round."""
        return derive_seed(self.settings.seed, purpose, self.task, self.round_number)

    def recall(self, kind: str) -> dict[str, Tensor] | None:
        """What this client kept as `kind` in its last round; {} if there was none. None if it is lost."""
        if self.state is None:
            return {}
        kept = self.state.last(kind, self.round_number)
        began = any(self.settings.part_taken(self.task, number) for number in range(1, self.round_number))
        return {} if kept is None and not began else kept

    def keep(self, kind: str, tensors: dict[str, Tensor], as_checkpoints: bool = False) -> None:
        """Keep float32 tensors for the client's next round, on its disk; nothing outside a run.

        as_checkpoints: for as many rounds at least as the run keeps checkpoints, whose models they are a part of.
        """
        if self.state is not None:
            checkpoints = self.settings.keep_checkpoints if as_checkpoints else 1
            self.state.save(kind, tensors, self.round_number, checkpoints)

    def note(self, numbers: dict[str, float]) -> None:
        """Write down, on the client's disk alone, what it measured of the base that it was sent."""
        if self.state is not None:
            self.state.note(self.round_number - 1, numbers)


class Transform:
    """One transform of one run. A hook may change the vector, float32 [n], and returns its own or another one."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, settings: Settings) -> None:
        """SettingError if it can't go with the other settings of the run."""

    def client(self, vector: Tensor, context: Context) -> Tensor:
        """At the client, before the vector is encoded."""
        return vector

    def server(self, vector: Tensor, context: Context) -> Tensor:
        """At the server, of each vector that arrived. A transform that has it does not go with secure aggregation."""
        return vector

    def total(self, scaled: Tensor, factor: float, context: Context) -> Tensor:
        """At the server, of `factor` times the vectors' sum. A transform that has it wants a merge of the sum alone."""
        return scaled

    def has(self, hook: str) -> bool:
        """Whether it does anything in the hook called `hook`."""
        return getattr(type(self), hook) is not getattr(Transform, hook)


TRANSFORMS: Registry[type[Transform]] = Registry("transform", options)
_Class = TypeVar("_Class", bound=type[Transform])


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
def transform(name: str) -> Callable[[_Class], _Class]:
    """Register the decorated class as the transform `name`; its options become keyword arguments."""
    return declare(TRANSFORMS, name)


def make_transforms(text: str) -> list[Transform]:
    """The transforms that `text` names, in its order: 'name, name:option=value,option=value'. SettingError if it can't.

    An item without a colon and with = is a further option of the transform before it.
    """
    chosen: dict[str, list[str]] = {}
    for item in (item.strip() for item in text.split(",") if text.strip()):
        name, _, first = item.partition(":")
        if "=" in name and chosen:
            next(reversed(chosen.values())).append(item)
        elif name in chosen:
            raise SettingError(f"transforms={text!r} names {name!r} twice; leave one out")
        else:
            chosen[name] = [first] if first else []
    made = []
    for name, items in chosen.items():
        choice = read_choice("transforms", f"{name}:{','.join(items)}" if items else name, TRANSFORMS)
        made.append(TRANSFORMS[name](**choice.values))
    return made
