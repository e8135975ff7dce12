"""What is chosen by name, with options: one syntax for merges, codecs, server optimizers, attacks and defences.

    name:key=value,key=value        ties        topk:density=0.05        adam:learning-rate=0.001,epsilon=0.0001

A thing declares its options as dataclass fields (`option`): type, default, meaning and bounds. `read_choice` reads and
checks a text, and `str` of what it returns writes it: options in the declared order, those at their defaults left out.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from atm_fl.errors import SettingError, did_you_mean
from atm_fl.plugins import Registry

_Class = TypeVar("_Class", bound=type)


def option(
    default: Any,
    meaning: str,
    *,
    ge: float = -math.inf,
    gt: float = -math.inf,
    le: float = math.inf,
    lt: float = math.inf,
    among: tuple[str, ...] = (),
) -> Any:
    """An option: its default, a line of documentation, and its bounds (≥ `ge`, > `gt`, ≤ `le`, < `lt`) or, of a text,
    the words `among` which it is."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return field(default=default, metadata={"meaning": meaning, "bounds": bounds, "among": among})


def options(made: Any) -> list[Any]:
    """The options of a dataclass as its fields: name, type, default, metadata."""
    return [item for item in fields(made) if "bounds" in item.metadata]


def type_name(item: Any) -> str:
    """An option's type: "float", "int", "bool" or "str", whether or not its file has annotations as strings."""
    return getattr(item.type, "__name__", item.type)


def declare(registry: Registry[Any], name: str) -> Callable[[_Class], _Class]:
    """Register the decorated class as `name`, which it then knows: a dataclass, its options keyword arguments."""

    def declared(made: Any) -> Any:
        made.name = name
        return made if "__dataclass_fields__" in vars(made) else dataclass(kw_only=True)(made)

    return registry.register(name, declared)


def check_option(name: str, value: Any, item: Any) -> None:
    """SettingError if `value` is not of the option's type or is outside its bounds."""
    kind = type_name(item)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right = {
        "float": number and math.isfinite(value),
        "int": isinstance(value, int) and number,
        "bool": isinstance(value, bool),
        "str": value in item.metadata.get("among", ()),
    }
    if not right[kind]:
        words = {"float": "a finite number", "int": "a whole number", "bool": "true or false"}
        words["str"] = " or ".join(item.metadata["among"])
        raise SettingError(f"{name.replace('_', '-')}={value!r}: it must be {words[kind]}")
    bounds = item.metadata.get("bounds")
    if (
        bounds
        and kind != "str"
        and not (bounds["ge"] <= value <= bounds["le"] and (bounds["gt"] < value < bounds["lt"] or kind == "bool"))
    ):
        words_ = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        limits = " and ".join(f"{words_[end]} {bound:g}" for end, bound in bounds.items() if math.isfinite(bound))
        raise SettingError(f"{name.replace('_', '-')}={value!r}: it must be {limits}")


def check_options(made: Any) -> None:
    """`check_option` of all options of an object."""
    for item in options(made):
        check_option(item.name, getattr(made, item.name), item)


@dataclass(frozen=True)
class Choice:
    """A name and those of its options, by Python name, that are not at their defaults."""

    name: str
    values: dict[str, Any]

    @property
    def options(self) -> str:
        """The options as text: key=value,key=value."""
        return ",".join(f"{key.replace('_', '-')}={_text(value)}" for key, value in self.values.items())

    def __str__(self) -> str:
        return f"{self.name}:{self.options}" if self.values else self.name


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(value)


def read_choice(setting: str, text: str, registry: Registry[Any]) -> Choice:
    """What a text names. SettingError with the setting, the text, and the nearest known name or option."""
    said = f"{setting}={text!r}"
    name = text.partition(":")[0].strip()
    alone = name == text and setting == registry.kind
    thing = registry.find(name, said if alone else f"{said}: {registry.kind} {name!r}")
    _, colon, rest = respelled(text, registry).partition(":")
    if not colon:
        return Choice(name, {})
    known = {item.name.replace("_", "-"): item for item in registry.options(thing)}
    if not known and not registry.elsewhere:
        raise SettingError(f"{said}: {registry.kind} {name!r} takes no options; write {setting}={name!r}")
    given: dict[str, Any] = {}
    for key, value in read_items(said, rest):
        if key in registry.elsewhere:
            raise SettingError(f"{said}: {key} is a setting of its own; write {key}={value}")
        if key not in known:
            raise SettingError(f"{said}: {registry.kind} {name!r} has no option {key!r}{did_you_mean(key, known)}")
        if key in given:
            raise SettingError(f"{said}: {key} is there twice; leave one out")
        try:
            given[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            given[key] = value
        try:
            check_option(key, given[key], known[key])
        except SettingError as error:
            raise SettingError(f"{said}: {error}") from None
        if type_name(known[key]) == "float":
            given[key] = float(given[key])
    return Choice(
        name, {item.name: given[key] for key, item in known.items() if given.get(key, item.default) != item.default}
    )


def respelled(text: str, registry: Registry[Any]) -> str:
    """An old text in today's spelling: a codec's one number after the colon (`topk:0.01`) now has a name."""
    name, colon, number = text.partition(":")
    items = list(registry.options(registry[name])) if registry.bare and name in registry else []
    if not colon or "=" in number or len(items) != 1:
        return text
    return f"{name}:{items[0].name.replace('_', '-')}={number}"


def read_items(said: str, text: str) -> Iterator[tuple[str, str]]:
    """(key, value) of each item of 'key=value, key=value'. SettingError, beginning with `said`, if it is not that."""
    for item in text.split(","):
        key, separator, value = (side.strip() for side in item.partition("="))
        if not separator or not key:
            raise SettingError(f"{said}: {item.strip()!r} is not of the form key=value, with commas between")
        yield key, value
