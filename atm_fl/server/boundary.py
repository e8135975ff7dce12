"""The one place where what a client sent becomes something that the server uses.

Records, names, types and sizes stand on the lists here. Whatever is not on them is a `Refused`, whose text names the
rule; the run's failure policy decides what follows. Nothing is reserved for what a reply declares and does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from flwr.app import ArrayRecord, Message
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from atm_fl.codecs import Arrays
from atm_fl.errors import printable
from atm_fl.federation.client import Update
from atm_fl.vectors.npy import read_arrays

MOST = 2**53
"""The largest count that a float holds to the unit."""
TUNING = {
    **dict.fromkeys(("steps", "images"), (0, MOST)),
    **dict.fromkeys(("seconds_evaluate", "seconds_tune", "seconds_encode", "seconds_receive"), (0, MOST)),
    **dict.fromkeys(("residual_lost", "optimizer_lost", "buffers_lost", "private_lost"), (0, 1)),
    **dict.fromkeys(("tuned_from_lost", "ewc_lost"), (0, 1)),
    **dict.fromkeys(("epsilon", "epsilon_rdp"), (0, math.inf)),
    "noise": (0, MOST),
    "norm": (0, MOST),
    "alignment": (-1.001, 1.001),
    "loss": (-math.inf, math.inf),
}
"""The numbers about a round that a client may tell: least and largest. Only `loss` may be NaN, of a batch that half
precision did not hold."""
RECORDS = {"arrays", "info", "metrics"}
INFO = {"task": str, "codec": str, "layout": str, "base": str, "needs-base": bool}
SECRET_BYTES = 4096
"""Of one key or sealed share; ours have at most 160."""


UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    DecodeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What Flower raises when it makes a message of bytes that are none."""


class Refused(ValueError):
    """A reply that is not what was asked for; the text names the rule that it broke."""


def reason(reply: Message) -> str:
    """A client's own error, in one line that is safe to show."""
    return printable(str(reply.error.reason or f"error {reply.error.code}"))


def shown(value: object) -> str:
    """A value that a client sent, cut short."""
    if isinstance(value, str):
        return f"'{printable(value, 80)}'"
    return printable(repr(value), 80) if value is None or isinstance(value, (bool, float)) else _kind(value)


def _kind(value: object) -> str:
    """A whole number that is not too long to write, or a value's type."""
    return str(value) if isinstance(value, int) and abs(value) < 2**64 else f"a {type(value).__name__}"


def info(reply: Message) -> dict[str, Any]:
    """The strings of a reply. Refused if it has no content, or records or strings that are not on the lists."""
    if not reply.has_content():
        raise Refused("a reply without content")
    record = reply.content.config_records.get("info")
    if record is None:
        raise Refused("a reply without info")
    for name, value in record.items():
        if type(value) is not INFO.get(name):
            raise Refused(f"info {shown(name)}: {shown(value)}, which it cannot be")
    return {"needs-base": False, **record}


def forget(reply: Message) -> None:
    """Free what a reply holds. It is a reference cycle, whose bytes would wait for the garbage collector, which counts
    objects: a client that is refused round after round would fill the memory."""
    if reply.has_content():
        for name in list(reply.content):
            del reply.content[name]


def check_info(reply: Message, expected: Mapping[str, object], also: Collection[str] = ()) -> None:
    """Refused if the reply's strings are not the `expected` ones, or it has records beside RECORDS and `also`."""
    said = info(reply)
    wrong = [
        f"{key} {shown(said.get(key))}, not {value!r}" for key, value in expected.items() if said.get(key) != value
    ]
    if wrong:
        raise Refused("; ".join(wrong))
    others = set(reply.content) - RECORDS - set(also)
    if others:
        raise Refused(f"a record {shown(min(others))}")


def update(reply: Message, elements: int, takes_part: bool, splits: Collection[str]) -> Update:
    """The update in a train reply of a vector of so many elements. The reply's arrays are freed.

    splits: which accuracies are due.
    """
    numbers = reply.content.metric_records.get("metrics")
    if numbers is None:
        raise Refused("a reply without metrics")
    due = {f"evaluation.{split}": (0.0, 1.0) for split in splits}
    limits = {f"tuning.{name}": bounds for name, bounds in TUNING.items()}
    checked = _numbers(numbers, due | limits)
    parts: dict[str, dict[str, float]] = {"evaluation": {}, "tuning": {}}
    for name, value in checked.items():
        kind, _, key = name.partition(".")
        parts[kind][key] = value
    record = reply.content.array_records.get("arrays")
    if not takes_part:
        return Update(None, parts["evaluation"], {})
    if record is None:
        raise Refused("a reply without arrays")
    return Update(_arrays(record, elements), parts["evaluation"], parts["tuning"])


def accuracies(reply: Message) -> dict[str, float]:
    """The accuracies in an evaluate reply."""
    numbers = reply.content.metric_records.get("metrics")
    if numbers is None:
        raise Refused("a reply without metrics")
    due = {f"evaluation.{split}": (0.0, 1.0) for split in ("validation", "test")}
    return {name.removeprefix("evaluation."): value for name, value in _numbers(numbers, due).items()}


def secrets(reply: Message, name: str, parties: int) -> dict[str, Any]:
    """The record `name` of a reply of secure aggregation among so many parties, none of it too long.

    Of what kind its entries are is the protocol's to check, which knows whose fault another is.
    """
    if not reply.has_content():
        raise Refused("a reply without content")
    record = reply.content.config_records.get(name)
    if record is None:
        raise Refused(f"a reply without {name}")
    if len(record) > parties:
        raise Refused(f"{name} with {len(record)} entries, among {parties} parties")
    for key, value in record.items():
        entries = value if isinstance(value, list) else [value]
        if len(entries) > parties or any(_length(entry) > SECRET_BYTES for entry in entries):
            raise Refused(f"{name} {shown(key)} that is longer than any such thing")
    return dict(record)


def _length(value: object) -> int:
    return len(value) if isinstance(value, (bytes, str)) else 8


def _numbers(record: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The numbers of a record, all of which must be within the `bounds` of their names."""
    for name, value in record.items():
        if name not in bounds:
            raise Refused(f"a number {shown(name)}, which was not asked for")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Refused(f"{name}: a {type(value).__name__}, not a number")
        least, most = bounds[name]
        if not least <= value <= most and not (name == "tuning.loss" and value != value):
            raise Refused(f"{name} {shown(value)}, not from {least:g} to {most:g}")
    return dict(record)


def _arrays(record: ArrayRecord, elements: int) -> Arrays:
    # Flower's messages are reference cycles: without `pop` their bytes would wait for the garbage collector.
    contents = {}
    for name in list(record):
        array = record.pop(name)
        if array.stype != "numpy.ndarray":
            raise Refused(f"an array of kind {shown(array.stype)}")
        contents[name] = array.data
    try:
        return read_arrays(contents, elements)
    except ValueError as error:
        raise Refused(str(error)) from None
