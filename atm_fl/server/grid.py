"""Two Grids: one that hands over replies one by one, one that runs the clients in this process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import SystemRandom
from threading import Event
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from atm_fl.server import boundary
from atm_fl.server.boundary import UNREADABLE
from atm_fl.server.fetch import Bound, Fetch

LOST = (
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
)
"""What the SuperLink reports of a party whose answer was lost, as opposed to one that answered with an error. The last
two: a message or a reply that is there in part, since the network was cut on its way."""
LONGEST_POLL = 1.0
CHANCE = SystemRandom()
ROLL = 5.0
"""Seconds between two looks at which SuperNodes have started anew."""


class StreamingGrid(Grid):
    """Any Grid, with a `send_and_receive` that yields replies one by one, as they come.

    Flower's own returns a list of all replies, so that a server's memory grows with its clients. Here one reply is
    fetched while the one before it is dealt with, and the others stay at the SuperLink. Polls start at 10 ms and
    lengthen with the wait (Flower's own sleeps 3 s between polls in deployment).

    bound: the most that a reply which comes over a network may hold; without it a reply has no vector.
    """

    def __init__(self, grid: Grid, bound: Bound | None = None) -> None:
        self.grid = grid
        self._fetch = Fetch(grid, bound or Bound.of_vector(0)) if isinstance(grid, HttpGrid) else None

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Push all messages, then yield the reply to each. One without a reply by the deadline is passed over.

        An error that the SuperLink itself reports gets the silent node's id as its source. A SuperNode that starts anew
        has forgotten its message, which nobody would report: it gets an error NODE_UNAVAILABLE.
        """
        lives = self._lives()
        waiting = self.ask(messages)
        del messages
        unwanted = Event()
        replies = self._replies(waiting, lives, timeout, unwanted)
        if isinstance(self.grid, InProcessGrid):  # to fetch a reply is a client's whole work there
            return replies
        return _fetched_ahead(replies, unwanted)

    def ask(self, messages: Iterable[Message]) -> dict[str, int]:
        """Push messages whose replies `answers` looks for; the node of each message, by the message's id."""
        sent = list(messages)
        for message in sent:
            message.metadata.ttl *= 1 - CHANCE.random() / 1000  # so that nobody foresees its id, by which objects go
        nodes = [message.metadata.dst_node_id for message in sent]
        return dict(zip(self.grid.push_messages(sent), nodes, strict=True))

    def answers(self, waiting: dict[str, int]) -> Iterator[Message]:
        """The replies that are here now, without waiting for any; their messages are taken out of `waiting`."""
        for message_id, node in list(waiting.items()):
            reply = self._pulled(message_id, node)
            if reply:
                del waiting[message_id]
                for another in reply[1:]:  # one message has one reply
                    boundary.forget(another)
                del reply[1:]
                reply[0].metadata.__dict__["_src_node_id"] = node
                yield reply.pop()

    def _replies(
        self, waiting: dict[str, int], lives: dict[int, str], timeout: float | None, unwanted: Event
    ) -> Iterator[Message]:
        try:
            yield from self._polled(waiting, lives, timeout, unwanted)
        finally:
            if self._fetch:
                self._fetch.forget()

    def _polled(
        self, waiting: dict[str, int], lives: dict[int, str], timeout: float | None, unwanted: Event
    ) -> Iterator[Message]:
        begin = looked = time.monotonic()
        while waiting and not unwanted.is_set():
            yield from self.answers(waiting)
            waited = time.monotonic() - begin
            if timeout is not None and waited > timeout:
                return
            if waiting and time.monotonic() - looked > ROLL:
                looked, now = time.monotonic(), self._lives()
                for message_id, node in list(waiting.items()):
                    if node in lives and now.get(node, lives[node]) != lives[node]:
                        del waiting[message_id]
                        yield _restarted(node)
            if waiting:
                unwanted.wait(min(LONGEST_POLL, max(0.01, waited / 50)))

    def _pulled(self, message_id: str, node: int) -> list[Message]:
        """The reply to a message, if it is here; one that is refused, lost or no message is its sender's error."""
        try:
            return self._fetch.reply(message_id) if self._fetch else list(self.grid.pull_messages([message_id]))
        except ObjectPullError:
            return [_failed(node, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "its reply was not sent to the end")]
        except boundary.Refused as error:
            return [_failed(node, ErrorCode.UNKNOWN, f"refused: {error}")]
        except UNREADABLE as error:
            return [_failed(node, ErrorCode.UNKNOWN, f"refused: a reply that cannot be read: {type(error).__name__}")]

    def _lives(self) -> dict[int, str]:
        """When each SuperNode that is online began to be."""
        return {node.node_id: node.last_activated_at for node in self.get_nodes()}

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self.grid.get_nodes()

    def set_run(self, run: Run) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Run:
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)


def _fetched_ahead(replies: Iterator[Message], unwanted: Event) -> Iterator[Message]:
    """The same replies, each fetched by a thread while the one before it is dealt with.

    unwanted: is set when nobody wants the rest.
    """

    def fetch() -> list[Message]:
        return [reply] if (reply := next(replies, None)) else []

    with ThreadPoolExecutor(1) as pool:
        try:
            coming = pool.submit(fetch)
            while fetched := coming.result():
                coming = pool.submit(fetch)
                yield fetched.pop()  # and keep it no longer than its taker does
        finally:
            unwanted.set()


def await_return(grid: Grid, nodes: set[int], until: float) -> set[int]:
    """Wait until all of `nodes` are online, but not past `until` on the monotonic clock; those that are."""
    while nodes - (online := set(grid.get_node_ids())) and time.monotonic() < until:
        time.sleep(min(1.0, max(0.0, until - time.monotonic())))
    return nodes & online


def _restarted(node: int) -> Message:
    return _failed(node, ErrorCode.NODE_UNAVAILABLE, "its SuperNode started anew while it was awaited")


def _failed(node: int, code: int, reason: str) -> Message:
    reply = Message(Error(code, reason), reply_to=Message(RecordDict(), node, "train"))
    reply.metadata.__dict__["_src_node_id"] = node
    return reply


class InProcessGrid(Grid):
    """A Grid of `clients` virtual nodes that runs the ClientApp in this process when a reply is pulled.

    No Ray, no SuperLink, no serialisation; node i is partition i. Messages and contexts are Flower's own. For tests and
    for research on one device.
    """

    def __init__(self, app: ClientApp, clients: int, run_config: dict[str, Any]) -> None:
        # Outside a Flower process nothing sets the identity that every Message needs.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
        self._app = app
        self.contexts = {
            partition + 1: Context(
                run_id=1,
                node_id=partition + 1,
                node_config={"partition-id": partition, "num-partitions": clients},
                state=RecordDict(),
                run_config=run_config,
            )
            for partition in range(clients)
        }
        self._waiting: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Run:
        raise RuntimeError("an in-process grid has no Run")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise RuntimeError("use the Message constructor")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"message-{self._sent}"
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            if message_id in self._waiting:
                message = self._waiting.pop(message_id)
                yield self._app(message, self.contexts[message.metadata.dst_node_id])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        return StreamingGrid(self).send_and_receive(messages, timeout=timeout)
