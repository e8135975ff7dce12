"""How older versions wrote settings, and what that is today: `name:key=value,key=value` where there are options.

merge-options="density=0.1" is merge="ties:density=0.1"; server-learning-rate, server-momentum, server-beta2 and
server-epsilon are options of server-optimizer; a codec's one number has a name, topk:0.01 is topk:density=0.01.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from multiprocessing import parent_process
from typing import Any

from atm_fl.codecs import CODECS
from atm_fl.errors import SettingError
from atm_fl.merging import MERGES
from atm_fl.merging.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizer
from atm_fl.options import options, read_choice, respelled
from atm_fl.plugins import Registry
from atm_fl.settings.text import kebab

CHOSEN: dict[str, Registry[Any]] = {
    "merge": MERGES,
    "server-optimizer": SERVER_OPTIMIZERS,
    "codec-up": CODECS,
    "codec-down": CODECS,
}
"""The settings that name a thing with options, and the registry of such things."""
DEFAULTS = {"merge": "mean", "server-optimizer": "none"}
"""Of those whose options were settings of their own."""
SERVER_OPTIONS = {f"server-{kebab(item.name)}": item for item in options(ServerOptimizer)}


class OldSpelling(FutureWarning):
    """A setting is written as older versions wrote it. The message has today's spelling."""


def modern(values: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """A config by kebab-case key in today's spelling, options at their defaults left out. Warns of an old spelling.

    strict: SettingError for what cannot work; else, of what a finished run has in its files, it stays as it is, and
    nothing is said.
    """
    config = dict(values)
    old = {"merge": _fold_merge_options(config), "server-optimizer": _fold_server_options(config)}
    for key, registry in CHOSEN.items():
        text = config.get(key)
        if not isinstance(text, str):
            continue
        if respelled(text, registry) != text:
            old[key] = f"{key}={text!r}"
        try:
            config[key] = str(read_choice(key, text, registry))
        except SettingError:
            if strict:
                raise
    if strict and parent_process() is None:
        for key, written in old.items():
            if written:
                today = config.get(key, DEFAULTS.get(key))
                warnings.warn(f"{written}: an old spelling; write {key}={today!r}", OldSpelling, stacklevel=3)
    return config


def _fold_merge_options(config: dict[str, Any]) -> str:
    """Move `merge-options` into `merge`, in place; what was written, "" if it was not there."""
    given = config.pop("merge-options", "")
    if not isinstance(given, str):
        raise SettingError(f"merge-options={given!r}: write them after the merge's name, as merge='ties:density=0.1'")
    if not given.strip():
        return ""
    _extend(config, "merge", given)
    return f"merge-options={given!r}"


def _fold_server_options(config: dict[str, Any]) -> str:
    """Move `server-learning-rate` and the like into `server-optimizer`; those that it does not take had no effect."""
    name = str(config.get("server-optimizer", DEFAULTS["server-optimizer"])).partition(":")[0].strip()
    taken = SERVER_OPTIMIZERS[name].takes if name in SERVER_OPTIMIZERS else ()
    pairs = [(item, config.pop(key)) for key, item in SERVER_OPTIONS.items() if key in config]
    given = [(item, value) for item, value in pairs if value != item.default]
    more = ",".join(f"{kebab(item.name)}={value!r}" for item, value in given if item.name in taken)
    if more:
        _extend(config, "server-optimizer", more)
    return ", ".join(f"server-{kebab(item.name)}={value!r}" for item, value in given)


def _extend(config: dict[str, Any], key: str, more: str) -> None:
    """Add options to a text that names a thing, in place."""
    text = str(config.get(key, DEFAULTS[key]))
    config[key] = f"{text}{',' if ':' in text else ':'}{more}"
