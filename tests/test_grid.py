"""The Grid that hands over replies one by one: what it fetches ahead, and that it stops when it is told to."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from atm_fl.server.grid import InProcessGrid, StreamingGrid

CLIENTS = 4
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


class Elsewhere(StreamingGrid):
    """A Grid whose clients are not in this process; some never answer."""

    def __init__(self, silent: int = 0, broken: bool = False) -> None:
        super().__init__(InProcessGrid(app, CLIENTS, {}))
        self.silent, self.broken = silent, broken
        self.pulled: list[str] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            if self.broken:
                raise ConnectionError("cut")
            if int(message_id.split("-")[1]) > self.silent:
                self.pulled.append(message_id)
                yield from self.grid.pull_messages([message_id])


def asked(grid: Elsewhere) -> Iterator[Message]:
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    return StreamingGrid(grid).send_and_receive(messages)


def test_one_reply_is_fetched_while_another_is_dealt_with_and_no_more() -> None:
    grid = Elsewhere()
    replies = asked(grid)
    for done in range(1, CLIENTS + 1):
        assert not next(replies).has_error()
        until = time.monotonic() + 10
        while len(grid.pulled) < min(done + 1, CLIENTS) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(grid.pulled) == min(done + 1, CLIENTS)
    assert next(replies, None) is None


def test_nobody_is_waited_for_once_the_replies_are_unwanted() -> None:
    """A round that ends with an error must not wait for clients that are still at work, which has no end here."""
    replies = asked(Elsewhere(silent=1))
    assert not next(replies).has_error()
    begin = time.monotonic()
    replies.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 10


def test_what_goes_wrong_while_fetching_is_the_askers() -> None:
    with pytest.raises(ConnectionError, match="cut"):
        next(asked(Elsewhere(broken=True)))
