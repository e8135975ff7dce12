"""Mods of the ClientApp."""

from __future__ import annotations

import re
import traceback
from logging import ERROR, WARNING
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode
from flwr.common.logger import log

from atm_fl.errors import OwnFileError, RunError, SettingError, figures, printable
from atm_fl.tasks import cache_dir, called


def named_errors(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Turn an exception into an error reply in one line, the same in every runtime; the traceback goes to the log."""
    try:
        return call_next(message, context)
    except (RunError, SettingError) as error:
        reason = str(error)
        kept = figures(error)
        if isinstance(error, OwnFileError) and _deployed(context):
            reason, kept = f"its {error.what} cannot be used; its own log says why", [reason, *kept]
        for figure in kept:
            log(WARNING, "%s: %s", _task(context), figure)
    except Exception as error:
        log(ERROR, traceback.format_exc())
        reason = f"{type(error).__name__}: {error}"
    task = _task(context)
    if _deployed(context) and (told := _without_paths(reason, context)) != reason:
        log(WARNING, "%s: %s", task, reason)
        reason = told
    text = reason if re.search(rf"\b{re.escape(task)}\b", reason) else f"{task}: {reason}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, printable(" ".join(text.split()))), reply_to=message)


def _deployed(context: Context) -> bool:
    """Whether this is a party's own machine, of which the server knows nothing, and no part of a simulation."""
    return "task" in context.node_config or "data" in context.node_config


def _without_paths(text: str, context: Context) -> str:
    """The text without what lies where this party keeps its files."""
    node = context.node_config
    named = [value for key in ("data", "policy", "trusted-parties") if isinstance(value := node.get(key), str)]
    places = [*named, *(str(Path(path).resolve()) for path in named), str(cache_dir()), str(Path.home())]
    for place in sorted((place.rstrip("/") for place in places if place.strip("/")), key=len, reverse=True):
        text = re.sub(rf"{re.escape(place)}[^'\"\s,;:)]*", "(a path of its own)", text)
    return text


def _task(context: Context) -> str:
    """What this node calls itself in an error, whatever the server sent."""
    node, tasks = context.node_config, str(context.run_config.get("tasks", "")).split(",")
    named, place = node.get("task") or node.get("data"), node.get("partition-id")
    if not named and isinstance(place, int) and place < len(tasks):
        named = tasks[place]
    return called(str(named or f"node {context.node_id}").strip())


class NamedErrors(ClientApp):
    """A ClientApp of which every message gets an answer: of one that no function is for, an error too."""

    def __call__(self, message: Message, context: Context) -> Message:
        return named_errors(message, context, super().__call__)
