"""A party's own floor: `policy.toml`, which no server sees or changes.

A run's settings come from the server's side; a party obeys them only within its policy. What a run asks beyond it is
refused before any data are read, by one line that names the rule. `atm-fl policy` prints every rule.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from atm_fl.errors import OwnFileError, RunError, SettingError, did_you_mean
from atm_fl.models.imported import is_imported
from atm_fl.models.trainable import items
from atm_fl.settings import Settings, kebab
from atm_fl.tables import markdown

TELL = ("validation", "test", "loss", "norm", "alignment", "counts")
"""What a party may tell beside its vector: accuracies, the training loss, its vector's norm and alignment, numbers of
images."""
COUNTS = ("images", "steps")


def rule(default: Any, meaning: str, settings: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A rule with what leaves all open as its default. settings: those of a run that it bounds, by commas."""
    return field(default=default, metadata={"meaning": meaning, "settings": settings, "choices": choices})


@dataclass(frozen=True)
class Policy:
    """All rules of a party. Without a file nothing is bounded."""

    tasks: tuple[str, ...] = rule(
        (), "tasks that it lends, by name or pattern; none named: its own, whatever it is", "tasks"
    )
    splits: tuple[str, ...] = rule(
        ("train", "validation"), "splits that may be tuned on", "split", ("train", "validation")
    )
    models: tuple[str, ...] = rule(
        (), "models, by name or pattern as 'open_clip/*'; none named: any but a function's path", "model"
    )
    trainable: tuple[str, ...] = rule((), "what may be tuned, as 'last-*'; none named: anything", "trainable")
    privacy: str = rule("none", "dp-sgd: every run must tune with DP-SGD", "privacy", ("none", "dp-sgd"))
    epsilon: float = rule(
        0.0, "the most ε of one run: it must say dp-epsilon, at most this, and stop there", "dp-epsilon, dp-policy"
    )
    delta: float = rule(
        0.0, "the most δ, and the δ at which lifetime-epsilon is counted (1e-5 if not said)", "dp-delta"
    )
    noise: float = rule(0.0, "the least noise multiplier σ of a run that says dp-noise", "dp-noise")
    clip: float = rule(0.0, "the greatest norm to which records' gradients are clipped", "dp-clip, privacy")
    lifetime_epsilon: float = rule(
        0.0, "the most ε of the training records over all runs, of split=train and dp-sgd alone", "privacy, split"
    )
    secure_aggregation: bool = rule(False, "only sums of vectors may be sent", "secure-aggregation")
    least_parties: int = rule(0, "parties that a sum must be of at least", "tasks, secure-threshold")
    trusted_parties: str = rule(
        "",
        "a file of the parties' public keys; sums only among those named there (docs/privacy.md)",
        "secure-aggregation",
    )
    apps: tuple[str, ...] = rule(
        (),
        "who must have signed an app (ssh-ed25519 …), or apps by their bytes (sha256:…); none named: any app runs",
    )
    weights: tuple[str, ...] = rule(
        (), 'files of weights that may be read, by path or pattern; [""]: none; none named: any', "weights"
    )
    devices: tuple[str, ...] = rule((), "where to compute, as 'cpu' or 'cuda:*'; none named: anywhere", "device")
    threads: int = rule(0, "the most CPU threads", "threads")
    workers: int = rule(0, "the most processes that decode images", "workers")
    batch_size: int = rule(0, "the largest batch", "batch-size")
    local_epochs: float = rule(0.0, "the most epochs a round", "local-epochs, task-epochs")
    rounds: int = rule(0, "the most rounds of a run", "rounds")
    tell: tuple[str, ...] = rule(TELL, "numbers that it tells beside its vector", "", TELL)
    max_update_norm: float = rule(
        0.0, "L2 norm by which the base may move from one message to the next", "max-update-norm"
    )
    largest_message: int = rule(
        0, "the most MB of one message, as it comes and as it is joined; 0: an eighth of the machine's memory"
    )

    @classmethod
    def read(cls, path: Path) -> Policy:
        """The policy in a TOML file. SettingError, naming file, key and fix, if it cannot be one."""
        try:
            table = tomllib.loads(path.read_text())
        except OSError as error:
            raise OwnFileError(
                "policy", f'policy {path} cannot be read ({error.strerror}); name it with policy="…"'
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise OwnFileError("policy", f"policy {path} is no TOML: {error}") from error
        known = {kebab(item.name): item for item in fields(cls)}
        values = {}
        for key, value in table.items():
            if key not in known:
                raise OwnFileError("policy", f"policy {path}: rule {key!r} is unknown{did_you_mean(key, known)}")
            try:
                values[known[key].name] = _typed(value, known[key])
            except ValueError as error:
                raise OwnFileError("policy", f"policy {path}: {key}={value!r}: {error}") from None
        if values.get("trusted_parties"):
            values["trusted_parties"] = str(path.parent / values["trusted_parties"])
        return cls(**values)

    def check(self, settings: Settings, task: str) -> None:
        """RunError, naming the rule, if a run of `settings` asks this party, which holds `task`, for more."""
        for name, broken in _BROKEN.items():
            value = getattr(self, name)
            if value and (reason := broken(value, settings, task)):
                shown = ", ".join(value) if isinstance(value, tuple) else value
                raise RunError(f"{task}: refused by this party's policy, {kebab(name)}={shown}: {reason}")

    def check_imports(self, settings: Settings, task: str) -> None:
        """RunError if a run's model is a function's path that `models` does not name: importing it would run code that
        is no part of the app, at the word of whoever began the run."""
        if is_imported(settings.model) and not _named(self.models, settings.model):
            raise RunError(
                f"{task}: refused by this party: model={settings.model!r} would be imported here, which wants a policy "
                "whose models names it"
            )

    def bounds(self) -> list[str]:
        """The rules that bound something, as they stand in the file."""
        return [
            f"{kebab(item.name)}={_toml(value)}"
            for item in fields(self)
            if (value := getattr(self, item.name)) != item.default
        ]

    def told(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Those of `numbers`, by their names in a reply ("tuning.loss"), that this party tells."""
        return {name: value for name, value in numbers.items() if _kind(name) in (*self.tell, "")}


def _kind(name: str) -> str:
    """Which of TELL a number is; "" for what is always told."""
    last = name.rpartition(".")[2]
    return "counts" if last in COUNTS else last if last in TELL else ""


def _typed(value: Any, item: Any) -> Any:
    """A rule's value as it is declared. ValueError says what it must be."""
    choices, default = item.metadata["choices"], item.default
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ValueError('it must be a list of strings, as ["a", "b"]')
        wrong = next((entry for entry in value if choices and entry not in choices), None)
        if wrong is not None:
            raise ValueError(f"it takes {', '.join(choices)}{did_you_mean(wrong, choices)}")
        if not value and item.name == "splits":
            raise ValueError("it must name one at least")
        if item.name == "apps":
            return tuple(_app(entry) for entry in value)
        return tuple(value)
    if isinstance(default, bool | str):
        if type(value) is not type(default):
            raise ValueError("it must be true or false" if isinstance(default, bool) else "it must be a string")
        if choices and value not in choices:
            raise ValueError(f"it takes one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError("it must be a number, 0 or more")
    if isinstance(default, int) and value != int(value):
        raise ValueError("it must be a whole number")
    return type(default)(value)


def _app(entry: str) -> str:
    """Who may sign apps, without the key's comment, or one app. ValueError if it is neither."""
    kind, _, rest = entry.partition(" ")
    key = rest.partition(" ")[0]
    if kind == "ssh-ed25519":
        with suppress(ValueError, UnsupportedAlgorithm):
            load_ssh_public_key(f"{kind} {key}".encode())
            return f"{kind} {key}"
    if re.fullmatch("sha256:[0-9a-f]{64}", entry):
        return entry
    raise ValueError(f"{entry!r} is neither a public key, ssh-ed25519 AAAA…, nor an app, sha256: and 64 hex digits")


def _device(name: str) -> str:
    """What a run's `device` is on this machine."""
    import torch  # seconds, for whoever only reads a policy

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _named(patterns: tuple[str, ...], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


_BROKEN: dict[str, Callable[[Any, Settings, str], str]] = {
    "tasks": lambda value, run, task: "" if _named(value, task) else f"it does not name {task!r}",
    "splits": lambda value, run, task: "" if run.split in value else f"the run tunes on split={run.split!r}",
    "models": lambda value, run, task: "" if _named(value, run.model) else f"the run has model={run.model!r}",
    "trainable": lambda value, run, task: (
        "" if all(_named(value, item) for item in items(run.trainable)) else f"the run has trainable={run.trainable!r}"
    ),
    "privacy": lambda value, run, task: (
        "" if value == "none" or run.privacy == value else f"the run has privacy={run.privacy!r}"
    ),
    "epsilon": lambda value, run, task: (
        f"the run has privacy={run.privacy!r}"
        if run.privacy != "dp-sgd"
        else f"the run has dp-epsilon={run.dp_epsilon:g}"
        if not 0 < run.dp_epsilon <= value
        else f"the run has dp-policy={run.dp_policy!r}, which goes on past it"
        if run.dp_policy != "stop"
        else ""
    ),
    "delta": lambda value, run, task: "" if run.dp_delta <= value else f"the run has dp-delta={run.dp_delta:g}",
    "noise": lambda value, run, task: (
        "" if run.dp_epsilon or run.dp_noise >= value else f"the run has dp-noise={run.dp_noise:g}"
    ),
    "clip": lambda value, run, task: (
        f"the run has privacy={run.privacy!r}, which clips no record's"
        if not run.dp_sgd
        else ""
        if run.dp_clip <= value
        else f"the run has dp-clip={run.dp_clip:g}"
    ),
    "lifetime_epsilon": lambda value, run, task: (
        f"the run has privacy={run.privacy!r}, whose ε is infinite"
        if run.privacy != "dp-sgd"
        else f"the run has split={run.split!r}, of whose records other runs' heads and accuracies tell without noise"
        if run.split != "train"
        else ""
    ),
    "secure_aggregation": lambda value, run, task: (
        "" if run.secure_aggregation else "the run has secure-aggregation=false"
    ),
    "least_parties": lambda value, run, task: (
        f"the run has {len(run.task_names)} parties"
        if len(run.task_names) < value
        else f"the run has secure-threshold={run.threshold}"
        if run.secure_aggregation and run.threshold < value
        else ""
    ),
    "weights": lambda value, run, task: (
        ""
        if not os.path.lexists(run.weights) or _named(value, os.path.realpath(run.weights))
        else f"the run has weights={run.weights!r}"
    ),
    "devices": lambda value, run, task: (
        ""
        if _named(value, _device(run.device))
        else f"the run has device={run.device!r}, which is {_device(run.device)} here"
    ),
    "threads": lambda value, run, task: "" if run.threads <= value else f"the run has threads={run.threads}",
    "workers": lambda value, run, task: "" if run.workers <= value else f"the run has workers={run.workers}",
    "batch_size": lambda value, run, task: (
        "" if run.batch_size <= value else f"the run has batch-size={run.batch_size}"
    ),
    "local_epochs": lambda value, run, task: (
        "" if (epochs := run.of_task(task).local_epochs) <= value else f"the run has local-epochs={epochs:g}"
    ),
    "rounds": lambda value, run, task: "" if run.rounds <= value else f"the run has rounds={run.rounds}",
}
"""Rule → what a run does that breaks it, "" if nothing. A rule at its default is not asked. The others (`tell`,
`apps`, `max-update-norm`, `trusted-parties`, `largest-message`) bound what this party does, not what a run may say."""


NODE = {
    "task": "the task that this party holds, by its registered name",
    "data": "the folder of images that it holds; `task` may give it another name in the run",
    "policy": "its policy.toml",
    "max-update-norm": "the policy's rule of this name, for a party without a policy",
    "trusted-parties": "the policy's rule of this name, for a party without a policy",
    "apps-checked": "set by atm_fl/clients/supernode.py, which keeps the rule `apps`",
    "partition-id": "set by a simulation",
    "num-partitions": "set by a simulation",
}
"""What a SuperNode's `--node-config` may say."""


def policy_of(node: Mapping[str, Any]) -> Policy:
    """The policy that a SuperNode's `--node-config` names; one that bounds nothing if it names none.

    SettingError for a key that nobody reads, or a value that cannot work: a party that means to protect itself must not
    be misheard.
    """
    for key in node:
        if key not in NODE:
            hint = did_you_mean(key, NODE)
            if key in {kebab(item.name) for item in fields(Policy)}:
                hint = "; it is a rule of the policy: --node-config 'policy=\"/path/policy.toml\"'"
            raise SettingError(f"{key}={node[key]!r} in this SuperNode's --node-config is unknown{hint}")
    path = node.get("policy", "")
    if not isinstance(path, str):
        raise SettingError(f"policy={path!r} in this SuperNode's --node-config: it must be a path")
    policy = _read(Path(path), Path(path).stat().st_mtime_ns if Path(path).is_file() else 0) if path else Policy()
    limit = node.get("max-update-norm", policy.max_update_norm)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < float("inf"):
        raise SettingError(f"max-update-norm={limit!r} in this SuperNode's --node-config: it must be 0 or more")
    for key, value in (("max-update-norm", policy.max_update_norm), ("trusted-parties", policy.trusted_parties)):
        if key in node and value and node[key] != value:
            raise SettingError(
                f"{key}={node[key]!r} in this SuperNode's --node-config, and {value!r} in {path}: say one"
            )
    return policy


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> Policy:
    return Policy.read(path)


def template(**rules: Any) -> str:
    """A policy.toml with every rule, its meaning and its default, all commented out but `rules`, by their values."""
    lines = ["# What this party lends, and no run gets past. A rule that is commented out bounds nothing."]
    for item in fields(Policy):
        choices = item.metadata["choices"]
        meaning = item.metadata["meaning"] + (f" ({', '.join(choices)})" if choices else "")
        line = f"{kebab(item.name)} = {_toml(rules.get(item.name, item.default))}"
        lines += ["", f"# {meaning}", line if item.name in rules else f"# {line}"]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(entry) for entry in value)}]"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else f"{value:g}"


def table() -> str:
    """The Markdown table of docs/privacy.md: what a run's settings decide, and what the party's policy does."""
    rows = []
    for item in fields(Policy):
        bounded = ", ".join(f"`{name.strip()}`" for name in item.metadata["settings"].split(",") if name.strip())
        rows.append((f"`{kebab(item.name)}`", bounded or "–", item.metadata["meaning"]))
    return markdown(("rule of the party", "bounds the run's", "meaning"), rows)
