"""What a hostile SuperLink can have a party's SuperNode hold in memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import repeat
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate import NodeStateFactory
from hypothesis import given
from hypothesis import strategies as st
from test_fetch import Change, bomb, deflated, first

from atm_fl.clients import supernode
from atm_fl.clients.received import RESPONSE, BoundedClient, Size, TooLarge, bounded, largest_message
from atm_fl.deployment.checks import machine_memory

MB = 10**6


class Node:
    """A SuperNode's real state, and Flower's own pull of one message, bounded by a policy."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, rule: str = "") -> None:
        for name in ("_task_id", "_run_id", "_node_id"):
            monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
        factory = ObjectStoreFactory()
        self.objects = factory.store()
        self.state = NodeStateFactory(objectstore_factory=factory).state()
        self.state.set_node_id(3)
        self.policy = folder / "policy.toml"
        self.policy.write_text(rule)
        self.pulled: list[str] = []
        # A run that this node knows, so that no app is fetched.
        self.run = Run.create_empty(1)
        self.state.store_run(self.run)

    def pull(self, arrays: dict[str, np.ndarray], change: Change | None = None) -> int | None:
        """Have the node pull a message, of whose objects `change` makes those that the SuperLink sends."""
        record = ArrayRecord({name: Array(values) for name, values in arrays.items()})
        message = Message(RecordDict({"arrays": record}), dst_node_id=3, message_type="train")
        contents, tree = deflated(message)
        if change:
            contents, tree = change(contents, tree)
        message.metadata.__dict__.update(_run_id=1, _message_id=tree.object_id)

        def pull_object(run_id: int, object_id: str) -> bytes:
            self.pulled.append(object_id)
            return contents[object_id]

        return bounded(flower._pull_and_store_message)(
            state=self.state,
            object_store=self.objects,
            node_config={"policy": str(self.policy)},
            receive=lambda: (message, tree),
            get_run=lambda _: self.run,
            get_fab=lambda *_: Fab("", b"", {}),
            pull_object=pull_object,
            confirm_message_received=lambda *_: None,
            trusted_entities=None,
        )

    @property
    def refusal(self) -> str:
        """What the SuperLink is told in the place of an answer; of the message nothing is kept."""
        (reply,) = self.state.get_messages_legacy(is_reply=True)
        assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert sum(len(self.objects.get(key) or b"") for key in self.pulled) == 0
        return reply.error.reason


def test_a_message_of_the_bound_is_taken_and_a_larger_one_refused_by_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path, monkeypatch, "largest-message = 1")
    assert node.pull({"values": np.arange(230_000, dtype=np.float32)}) == 1
    assert not node.state.get_messages_legacy(is_reply=True)
    node.pulled.clear()
    assert node.pull({f"{n}": np.arange(n, n + 50_000, dtype=np.float32) for n in range(40)}) == 1
    assert "refused by this party: a message of more than 1 MB, which is its policy's largest-message" in node.refusal
    assert len(node.pulled) < 40  # of 83 objects


def test_an_array_that_names_a_piece_again_and_again_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path, monkeypatch, "largest-message = 1")
    assert node.pull({"values": np.arange(5_000, dtype=np.float32)}, first(b"Array", bomb)) == 1
    assert "a message of more than 1 MB" in node.refusal


def test_without_the_rule_a_message_may_have_an_eighth_of_the_memory(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    assert largest_message({}) == machine_memory() // 8
    policy.write_text("rounds = 3")
    assert largest_message({"policy": str(policy)}) == machine_memory() // 8
    policy.write_text("largest-message = many")
    assert largest_message({"policy": str(policy)}) == machine_memory() // 8
    policy.write_text("largest-message = 5")
    assert largest_message({"policy": str(policy)}) == 5 * MB


@given(
    arrays=st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=4),
    sizes=st.lists(st.integers(1, 1000), min_size=5, max_size=5),
    order=st.randoms(use_true_random=False),
    most=st.integers(500, 6000),
)
def test_the_size_is_that_of_all_objects_and_of_the_joined_arrays(
    arrays: list[list[int]], sizes: list[int], order: Random, most: int
) -> None:
    """Whatever names what, and in whichever order objects come."""
    pieces = [bytes([number]) * size for number, size in enumerate(sizes)]
    ids = [get_object_id(piece) for piece in pieces]
    objects = dict(zip(ids, pieces, strict=True))
    for array in arrays:
        children = sorted({ids[number] for number in array})
        body = json.dumps({"arraychunk_ids": [children.index(ids[number]) for number in array]}).encode()
        content = f"Array {','.join(children)} {len(body)}".encode() + b"\0" + body
        objects[get_object_id(content)] = content
    taken = sum(map(len, objects.values()))
    unlike = {json.dumps(array) if array else "" for array in arrays}
    joined = sum(len(pieces[number]) for array in unlike if array for number in json.loads(array))
    size, queue = Size(most), list(objects.items())
    order.shuffle(queue)
    with pytest.raises(TooLarge) if max(taken, joined) > most else nullcontext():
        for object_id, content in queue:
            size.add(object_id, content)


# ------------------------------------------------------------------------------------------------- answers over HTTP


@contextmanager
def answering(body: Iterator[bytes], *headers: tuple[str, str]) -> Iterator[BoundedClient]:
    """A connection to a SuperLink on this machine that answers all requests so."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            with suppress(OSError):
                for piece in body:
                    self.wfile.write(piece)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        client = BoundedClient(f"http://127.0.0.1:{server.server_port}")
        yield client
        client.close()
        thread.join()


ENDLESS = repeat(bytes(2**20), 2**10)
"""A gigabyte."""
BOMB = gzip.compress(bytes(2**28))


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (ENDLESS, ()),
        (ENDLESS, (("content-length", str(2**30)),)),
        (iter([BOMB]), (("content-encoding", "gzip"),)),
    ],
)
def test_an_answer_of_any_length_costs_little_memory(body: Iterator[bytes], headers: Any) -> None:
    with answering(body, *headers) as client:
        tracemalloc.start()
        with pytest.raises(TooLarge, match="an answer of the SuperLink"):
            client.PullMessages(PullMessagesRequest())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2.5 * RESPONSE


def test_an_answer_within_the_bound_is_taken() -> None:
    message = PullMessagesResponse(messages_list=[ProtoMessage(metadata=Metadata(message_id="m" * 10**6))])
    with answering(iter([message.SerializeToString()]), ("content-type", "application/x-protobuf")) as client:
        assert client.PullMessages(PullMessagesRequest()) == message


def test_the_supernode_takes_messages_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python -m atm_fl.clients.supernode` sets up, at the moment at which Flower's own begins."""
    before = flower._pull_and_store_message, fleet_http_connection.FleetHttpClient
    seen: list[Any] = []
    monkeypatch.setattr(
        supernode, "flower_supernode", lambda: seen.append((fleet_http_connection.FleetHttpClient, pull_name()))
    )
    monkeypatch.setattr(supernode.os, "_exit", lambda code: None)
    for module, name in (
        (flower, "_pull_and_store_message"),
        (fleet_http_connection, "FleetHttpClient"),
        (flower, "time"),
        (flower, "subprocess"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    supernode.main()
    assert seen == [(BoundedClient, bounded.__module__)]
    assert before[1] is not BoundedClient


def pull_name() -> str:
    return flower._pull_and_store_message.__module__
