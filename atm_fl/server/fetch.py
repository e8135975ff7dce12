"""A reply out of the SuperLink's objects: what it may hold is asked before it is fetched, and again before it is built.

A registered party uploads what it likes: any number of objects, and arrays that name one piece again and again, so that
a megabyte of names makes terabytes. Flower's own `HttpGrid.pull_messages` fetches all of them, waits up to two hours
for those that are missing, joins what the names say, and returns what a party sent in the SuperLink's name beside the
replies that were asked for. It has no hook between these steps, so they are taken here one by one, with Flower's own
pieces. Of other Grids nothing is fetched: in a simulation the parties are processes of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Self

from flwr.app import Array, Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.superlink.grid.http_grid import HttpGrid

from atm_fl.server.boundary import UNREADABLE, Refused
from atm_fl.vectors.npy import MOST_ARRAYS, SLACK, most_bytes

PIECE = 2**16
"""The smallest pieces, in bytes, into which a party may cut its arrays. Flower's own have 5 MiB, ours 16."""
NAMED = 512
"""Bytes that it may take to name an object in others: its id, its place, a name."""


@dataclass(frozen=True)
class Bound:
    """The most that one reply may hold.

    arrays: bytes of its arrays as they travel. others: bytes of all else, numbers, strings and the objects' names.
    objects: Flower's objects, which are records, arrays and pieces of arrays.
    """

    arrays: int
    others: int
    objects: int

    @classmethod
    def of(cls, arrays: int, entries: int) -> Self:
        """Of a reply with so many arrays, `entries`, that have so many bytes together."""
        objects = 64 + 4 * entries + arrays // PIECE
        return cls(arrays, SLACK + NAMED * objects, objects)

    @classmethod
    def of_vector(cls, elements: int) -> Self:
        """Of a reply with a vector of so many elements, by any codec."""
        return cls.of(most_bytes(elements), MOST_ARRAYS)


class NotYet(Exception):
    """An object that its sender has announced and not sent yet; its id."""


class Fetch:
    """The replies on an HttpGrid, each within a bound.

    A reply whose objects are not all at the SuperLink yet is passed over, so that nobody waits for a sender who stops
    in between; then it is asked for the one that was missing, and for the others once that is there.
    """

    def __init__(self, grid: HttpGrid, bound: Bound) -> None:
        self._grid, self._bound = grid, bound
        self._begun: dict[str, tuple[str, list[str], str]] = {}
        """By message: the id of its reply, those of all objects of that, and the one that was missing last."""

    def reply(self, message_id: str) -> list[Message]:
        """The reply to a message, none if it is not all there.

        Refused if it is beyond the bound. ObjectPullError if its upload was given up. What Flower raises of bytes that
        are no message, as UNREADABLE has it. Each once: then the SuperLink is rid of it.
        """
        begun = self._begun.get(message_id) or self._begin(message_id)
        if begun is None:
            return []
        reply_id, objects, missing = begun
        try:
            self._pull(missing)
            contents = pull_objects(objects, _counted(self._pull, self._bound))
            _check_joined(contents, self._bound)
            message = inflate_object_from_contents(reply_id, contents)
        except NotYet as error:
            self._begun[message_id] = reply_id, objects, str(error)
            return []
        except (ObjectPullError, *UNREADABLE):
            self._forget(message_id, reply_id)
            raise
        self._forget(message_id, reply_id)
        if not isinstance(message, Message):
            raise Refused(f"a {type(message).__name__} in the place of a message")
        return [message]

    def forget(self) -> None:
        """Have the SuperLink rid of the replies that were begun and nobody waits for any more."""
        for message_id, (reply_id, _, _) in list(self._begun.items()):
            self._forget(message_id, reply_id)

    def _begin(self, message_id: str) -> tuple[str, list[str], str] | None:
        """As in `_begun`, of a reply that the SuperLink has announced; None if it has not."""
        answer = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=[message_id]))
        begun = None
        for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            reply_id = message.metadata.message_id
            # The SuperLink adds what was sent to itself, and believes whoever says that it comes from itself.
            if begun or message.metadata.reply_to_message_id != message_id:
                self._confirm(reply_id)
                continue
            objects = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
            begun = self._begun[message_id] = reply_id, objects, reply_id
        if begun and len(begun[1]) > self._bound.objects:
            self._forget(message_id, begun[0])
            raise Refused(f"a reply of {len(begun[1])} objects; {self._bound.objects} at most")
        return begun

    def _pull(self, object_id: str) -> bytes:
        """An object. NotYet if it has not been sent, ObjectPullError if it never will be."""
        client, run_id = self._grid._runtime_client, self._grid.run.run_id
        try:
            return make_pull_object_fn_protobuf(client.PullObject, self._grid.node, run_id)(object_id)
        except ObjectUnavailableError:
            raise NotYet(object_id) from None

    def _forget(self, message_id: str, reply_id: str) -> None:
        del self._begun[message_id]
        self._confirm(reply_id)

    def _confirm(self, reply_id: str) -> None:
        """Have the SuperLink delete a message with its objects."""
        self._grid._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=reply_id
            )
        )


def _counted(pull: Callable[[str], bytes], bound: Bound) -> Callable[[str], bytes]:
    """`pull` of one reply's objects: Refused once they are more than `bound`. For several threads."""
    lock = Lock()
    taken = {"arrays": 0, "others": 0}

    def counted(object_id: str) -> bytes:
        content = pull(object_id)
        kind, most = ("arrays", bound.arrays) if _kind(content) == "ArrayChunk" else ("others", bound.others)
        with lock:
            taken[kind] += len(content)
            if taken[kind] > most:
                what = "arrays" if kind == "arrays" else "records"
                raise Refused(f"a reply whose {what} have more than {most} bytes, which is the most here")
        return content

    return counted


def _kind(content: bytes) -> str:
    """The class that an object's bytes are said to be of."""
    return content[:40].partition(b" ")[0].decode(errors="replace")


def _check_joined(contents: Mapping[str, bytes], bound: Bound) -> None:
    """Refused if the arrays in `contents`, by id, are more than `bound` once joined of the pieces they name."""
    size = 0
    for content in contents.values():
        if _kind(content) == "Array":
            pieces = get_object_head_values_from_object_content(content)[1]
            named = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            size += sum(len(contents[pieces[place]]) for place in named)
    if size > bound.arrays:
        raise Refused(f"a reply whose arrays would have {size} bytes of pieces that they name; {bound.arrays} at most")
