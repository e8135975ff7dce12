"""What a SuperNode takes in of what its SuperLink sends: no more than this machine can hold.

Flower's SuperNode keeps a message in memory, whatever its size, and hands it to the ClientApp's process, which joins
each array of the pieces that it names, and one piece may be named often. Both are counted here while the pieces come,
before anything is joined. All else that a SuperLink answers is short: beyond RESPONSE it is given up. And it is taken
as it is, for a megabyte of a compressed answer may be a gigabyte.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Lock
from typing import Any

import httpx
from flwr.app import Array, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supernode.fleet_http_client import FleetHttpClient

from atm_fl.clients.signed import Pull, refuse
from atm_fl.deployment.checks import machine_memory
from atm_fl.errors import SettingError
from atm_fl.policy import policy_of

RESPONSE = 64 * 2**20
"""The most bytes of one answer of the SuperLink: one piece of an array, an app, a message without its objects."""
SHARE = 8
"""A message may have so great a part of the memory: it is held by the SuperNode and by the ClientApp, there as pieces
and joined, beside the model and its gradients."""


class TooLarge(Exception):
    """More than this party takes in; the text says how much that is."""


def largest_message(node_config: dict[str, Any]) -> int:
    """The most bytes of one message, and of its arrays once they are joined: the policy's rule `largest-message`, or a
    part of this machine's memory. A policy that can't be read is the ClientApp's to report."""
    with suppress(SettingError):
        if megabytes := policy_of(node_config).largest_message:
            return megabytes * 10**6
    return machine_memory() // SHARE


class Size:
    """Of one message's objects, as they come, in any order and from several threads."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, Lock()
        self._taken, self._joined = 0, 0
        self._sizes: dict[str, int] = {}
        self._named: Counter[str] = Counter()
        """How often arrays name each piece."""

    def add(self, object_id: str, content: bytes) -> None:
        """Count an object. TooLarge once all, or what arrays would have once joined, are beyond the bound."""
        names = Counter(_pieces(content))
        with self._lock:
            self._taken += len(content)
            self._sizes[object_id] = len(content)
            self._joined += self._named[object_id] * len(content)
            self._named += names
            self._joined += sum(often * self._sizes.get(piece, 0) for piece, often in names.items())
            if max(self._taken, self._joined) > self._most:
                raise TooLarge(
                    f"refused by this party: a message of more than {self._most // 10**6} MB, which is its policy's "
                    "largest-message or, without the rule, an eighth of its machine's memory"
                )


def _pieces(content: bytes) -> list[str]:
    """The ids of the pieces that an array names, in all the places in which it does; none if `content` is no array."""
    if not content.startswith(b"Array "):
        return []
    try:
        children = get_object_head_values_from_object_content(content)[1]
        return [children[place] for place in json.loads(get_object_body(content, Array))["arraychunk_ids"]]
    except (ValueError, TypeError, LookupError, RecursionError):
        return []  # the ClientApp cannot join it either


def bounded(pull: Pull) -> Pull:
    """Flower's `_pull_and_store_message`, which gives up a message that is too large, and answers it by an error."""

    def pull_and_store(
        *,
        state: Any,
        object_store: Any,
        node_config: dict[str, Any],
        receive: Callable[[], tuple[Message, Any] | None],
        pull_object: Callable[[int, str], bytes],
        **others: Any,
    ) -> int | None:
        messages: list[Message] = []
        refused: list[TooLarge] = []
        size = Size(largest_message(node_config))

        def receive_noted() -> tuple[Message, Any] | None:
            received = receive()
            messages.extend([received[0]] if received else [])
            return received

        def pull_counted(run_id: int, object_id: str) -> bytes:
            content = pull_object(run_id, object_id)
            try:
                size.add(object_id, content)
            except TooLarge as error:
                refused.append(error)
                raise
            return content

        run_id = pull(
            state=state,
            object_store=object_store,
            node_config=node_config,
            receive=receive_noted,
            pull_object=pull_counted,
            **others,
        )
        if not refused:
            return run_id
        return refuse(messages[-1], ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(refused[0]), state, object_store)

    return pull_and_store


class _Bounded(httpx.SyncByteStream):
    """An answer's body; TooLarge beyond RESPONSE bytes."""

    def __init__(self, body: httpx.SyncByteStream) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._body:
            size += len(piece)
            if size > RESPONSE:
                raise TooLarge(f"an answer of the SuperLink has more than {RESPONSE} bytes")
            yield piece

    def close(self) -> None:
        """Close the connection's part of it."""
        self._body.close()


def _bound(answer: httpx.Response) -> None:
    """What httpx calls with an answer of which the head is there."""
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise TooLarge("an answer of the SuperLink is compressed, which nobody asked for")
    assert isinstance(answer.stream, httpx.SyncByteStream)
    answer.stream = _Bounded(answer.stream)


class BoundedClient(FleetHttpClient):
    """Flower's connection to a SuperLink, which takes bounded answers alone."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._client.headers["accept-encoding"] = "identity"
        self._client.event_hooks["response"].append(_bound)
