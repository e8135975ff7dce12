"""What a registered party can have the ServerApp fetch, hold and wait for, by way of Flower's own SuperLink.

The handlers of Flower's APIs, its state and its object store are the real ones; only HTTP is left out.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import make_folder
from fastapi import HTTPException
from federation import ROOT, Federation
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.constants import DEFAULT_TTL
from flwr.app.message import array, remove_content_from_message
from flwr.app.message import message as message_module
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_boundary import QUICK

from atm_fl.codecs import CODECS, make_codec
from atm_fl.flower import TaskVectorStrategy
from atm_fl.runs.metrics import read_metrics
from atm_fl.server import boundary
from atm_fl.server.fetch import PIECE, Bound
from atm_fl.server.grid import LOST, StreamingGrid
from atm_fl.server.superlink import flat, own_replies, own_session
from atm_fl.server.uploads import LARGEST, Uploads, largest_reply
from atm_fl.vectors import Layout

ELEMENTS = 1000
BOUND = Bound.of_vector(ELEMENTS)
Contents = dict[str, bytes]


class Superlink:
    """Flower's SuperLink without HTTP, a run on it, the parties `red` and `green`, and the run's HttpGrid."""

    def __init__(self, database: str = FLWR_IN_MEMORY_DB_NAME) -> None:
        self.state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
        self.nodes = {
            name: self.state.create_node(NOOP_FLWR_AID, "", name.encode(), 1000.0, name=name)
            for name in ("red", "green")
        }
        for node in self.nodes.values():
            self.state.activate_node(node, 1000.0)
        self.run_id = self.state.create_run(
            "a/b", "1", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        (run,) = self.state.get_run_info(run_ids=[self.run_id])
        assert run.primary_task_id
        self.state.claim_task(run.primary_task_id)
        self.state.activate_task(run.primary_task_id)
        self.task: Any = SimpleNamespace(run_id=self.run_id, task_id=run.primary_task_id)
        self.pulled: list[str] = []
        self.asked: set[str] = set()
        self.uploads = Uploads(2**30)
        self.ours = True
        """Whether requests are checked and changed as our launcher does, or taken as Flower has it."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self.run_id, SUPERLINK_NODE_ID
        self.grid = HttpGrid(token="of the run")
        self.grid._client = self  # type: ignore[assignment]
        self.grid.set_run(run)

    @property
    def kept(self) -> int:
        """Objects of replies that the SuperLink keeps; those of the messages stay until their parties have them."""
        store = self.state.object_store
        return len(store) - sum(object_id in store for object_id in self.asked)

    # what the ServerApp asks

    def GetNodes(self, request: Any) -> Any:
        return runtime_handlers.get_nodes(request, self.state, self.task)

    def PushMessages(self, request: Any) -> Any:
        return runtime_handlers.push_messages(flat(request) if self.ours else request, self.state, self.task)

    def PushObject(self, request: Any) -> Any:
        self.asked.add(request.object_id)
        return runtime_handlers.push_object(request, self.state, self.task)

    def PullMessages(self, request: Any) -> Any:
        return runtime_handlers.pull_messages(request, self.state, self.task)

    def PullObject(self, request: Any) -> Any:
        self.pulled.append(request.object_id)
        return runtime_handlers.pull_object(request, self.state, self.task)

    def ConfirmMessageReceived(self, request: Any) -> Any:
        return runtime_handlers.confirm_message_received(request, self.state, self.task)

    # what a party does

    def announce(self, message: Message, tree: ObjectTree, sender: str) -> tuple[str, list[str]]:
        """Send a message without its objects; the session in which they may follow, and which the SuperLink lacks."""
        message.metadata.__dict__["_message_id"] = tree.object_id
        request = PushMessagesRequest(
            node=Node(node_id=self.nodes[sender]),
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[tree],
        )
        answer = fleet_handlers.push_messages(own_replies(request) if self.ours else request, self.state)
        self.uploads.begin(request, answer)
        return answer.session_id, list(answer.objects_to_push)

    def send(self, sender: str, session: str, contents: Contents) -> None:
        """Send objects."""
        node = Node(node_id=self.nodes[sender])
        for object_id, content in contents.items():
            request = PushObjectRequest(node=node, run_id=self.run_id, object_id=object_id, object_content=content)
            request.session_id = session
            if self.ours:
                self.uploads.take(own_session(request))
            assert fleet_handlers.push_object(request, self.state).stored

    def delete(self, sender: str, object_id: str) -> None:
        """Say that an object has been received."""
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=self.nodes[sender]), run_id=self.run_id, message_object_id=object_id
        )
        fleet_handlers.confirm_message_received(request, self.state, self.state.object_store)

    def answer(self, name: str, asked: Message, content: RecordDict, change: Change | None = None) -> None:
        """A party's reply, of which `change` may make other objects."""
        reply = self.reply(name, asked, content)
        contents, tree = deflated(reply)
        if change:
            contents, tree = change(contents, tree)
        session, lacking = self.announce(reply, tree, name)
        self.send(name, session, {key: contents[key] for key in contents if key in lacking})

    def received(self, name: str) -> Message | None:
        """The next message for a party, without its objects."""
        node = Node(node_id=self.nodes[name])
        request = PullMessagesRequest(node=node)
        messages = fleet_handlers.pull_messages(request, self.state, self.state.object_store).messages_list
        return message_from_proto(messages[0]) if messages else None

    def reply(self, name: str, asked: Message, content: RecordDict) -> Message:
        reply = Message(content, reply_to=asked)
        reply.metadata.__dict__["_src_node_id"] = self.nodes[name]
        return reply


Change = Callable[[Contents, ObjectTree], tuple[Contents, ObjectTree]]


def deflated(message: Message) -> tuple[Contents, ObjectTree]:
    """A message's objects by id, children first, and their tree."""
    return {key: item.deflate() for key, item in get_all_nested_objects(message).items()}, get_object_tree(message)


def rebuilt(contents: Contents, tree: ObjectTree, change: Callable[[bytes], bytes]) -> tuple[Contents, ObjectTree]:
    """The same objects with other bytes, under the ids of those."""
    ids: dict[str, str] = {}
    made: Contents = {}
    for old, content in contents.items():
        content = change(content)
        for before, after in ids.items():
            content = content.replace(before.encode(), after.encode())
        ids[old] = get_object_id(content)
        made[ids[old]] = content

    def renamed(node: ObjectTree) -> ObjectTree:
        return ObjectTree(object_id=ids[node.object_id], children=[renamed(child) for child in node.children])

    return made, renamed(tree)


def vector(elements: int = ELEMENTS, by: str = "green") -> RecordDict:
    """The content of a reply, which shares no object with another party's."""
    values = np.arange(elements, dtype=np.float32) + len(by)
    numbers = {"tuning.loss": float(len(by))}
    return RecordDict(
        {
            "arrays": ArrayRecord({"values": Array(values)}),
            "metrics": MetricRecord(numbers),  # type: ignore[arg-type]
            "info": ConfigRecord({"task": by}),
        }
    )


@pytest.fixture
def superlink() -> Iterator[Superlink]:
    before = {name: TaskIdentity.__dict__.get(name) for name in ("_task_id", "_run_id", "_node_id")}
    yield Superlink()
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of Flower's SuperLink, to copy: half a second goes into its tables."""
    path = tmp_path_factory.mktemp("superlink") / "empty.db"
    LinkStateFactory(str(path), NoOpFederationManager(), ObjectStoreFactory(str(path))).state()
    return path


class Asked:
    """Both parties are asked; `replies` are those that come by `timeout`."""

    def __init__(
        self, superlink: Superlink, timeout: float = 5.0, bound: Bound = BOUND, content: RecordDict | None = None
    ) -> None:
        self.messages = {
            name: Message(content or RecordDict(), node, "train", group_id="1")
            for name, node in superlink.nodes.items()
        }
        self._names = {node: name for name, node in superlink.nodes.items()}
        grid = StreamingGrid(superlink.grid, bound)
        self._replies = grid.send_and_receive(self.messages.values(), timeout=timeout)

    def __getitem__(self, name: str) -> Message:
        return self.messages[name]

    def __iter__(self) -> Iterator[Message]:
        return self._replies

    @property
    def replies(self) -> dict[str, Message]:
        return {self._names[reply.metadata.src_node_id]: reply for reply in self}


def first(kind: bytes, changed: Callable[[bytes], bytes]) -> Change:
    """Change the objects of a kind."""

    def change(contents: Contents, tree: ObjectTree) -> tuple[Contents, ObjectTree]:
        return rebuilt(contents, tree, lambda c: changed(c) if c.startswith(kind + b" ") else c)

    return change


def with_body(content: bytes, body: bytes) -> bytes:
    head = content.partition(b"\0")[0].split(b" ")
    return b" ".join([*head[:2], str(len(body)).encode()]) + b"\0" + body


def bomb(content: bytes) -> bytes:
    """An array that names its one piece a hundred thousand times."""
    body = json.loads(content.partition(b"\0")[2])
    body["arraychunk_ids"] = [0] * 100_000
    return with_body(content, json.dumps(body).encode())


def test_replies_come_whole_and_nothing_of_them_stays(superlink: Superlink) -> None:
    asked = Asked(superlink)
    for name in superlink.nodes:
        superlink.answer(name, asked[name], vector(by=name))
    replies = asked.replies
    assert replies.keys() == superlink.nodes.keys()
    for name, reply in replies.items():
        expected = np.arange(ELEMENTS, dtype=np.float32) + len(name)
        np.testing.assert_array_equal(reply.content.array_records["arrays"]["values"].numpy(), expected)
        assert taken_in(reply, name) == ""
    assert superlink.kept == 0


@pytest.mark.parametrize("codec", [*CODECS, "topk:density=1.0", "low-rank:rank=300"])
def test_every_codecs_vector_is_within_the_bound(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million elements, in the smallest pieces."""
    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", PIECE)
    layout = Layout(("weight", "bias"), ((300, 3000), (100_000,)))
    encoded = make_codec(codec).encode(torch.randn(layout.size), layout, 0)
    content = vector()
    content["arrays"] = ArrayRecord({name: Array(values) for name, values in encoded.items()})
    superlink = Superlink()
    asked = Asked(superlink, bound=Bound.of_vector(layout.size))
    for name in superlink.nodes:
        superlink.answer(name, asked[name], content)
    assert not any(reply.has_error() for reply in asked.replies.values())


HELD = {
    "large": (vector(4 * 10**6), None, "arrays have more than 1056576 bytes"),
    "bomb": (vector(), first(b"Array", bomb), "arrays would have 4.* bytes of pieces that they name; 1056576 at most"),
    "many": (
        RecordDict({"arrays": ArrayRecord({str(n): Array(np.full(1, n)) for n in range(1000)})}),
        None,
        "a reply of .* objects; .* at most",
    ),
    "numbers": (
        RecordDict({"metrics": MetricRecord({"x": [1.0] * 10**6})}),
        None,
        "records have more than .* bytes",
    ),
    "twins": (  # arrays that share their pieces
        RecordDict(
            {
                "arrays": ArrayRecord(
                    {
                        str(n): Array(dtype=f"x{n}", shape=(), stype="numpy.ndarray", data=bytes(200_000))
                        for n in range(20)
                    }
                )
            }
        ),
        None,
        "arrays would have 4.* bytes of pieces",
    ),
}


@pytest.mark.parametrize("kind", HELD)
def test_what_a_reply_may_hold_is_asked_before_it_is_held(superlink: Superlink, kind: str) -> None:
    content, change, words = HELD[kind]
    asked = Asked(superlink)
    superlink.answer("green", asked["green"], content, change)
    superlink.answer("red", asked["red"], vector(by="red"))
    tracemalloc.start()
    replies = asked.replies
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not replies["red"].has_error()
    reason = boundary.reason(replies["green"])
    assert reason.startswith("refused: a reply ")
    assert re.search(words, reason), reason
    assert peak < 40 * 2**20
    assert superlink.kept == 0


# ------------------------------------------------------------------------------------------------- in another's name


def in_the_superlinks_name(superlink: Superlink, asked: Asked) -> Message:
    message = Message(vector(), SUPERLINK_NODE_ID, "train")
    message.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
    return message


def in_reds_name(superlink: Superlink, asked: Asked) -> Message:
    return superlink.reply("red", asked["red"], vector())


@pytest.mark.parametrize("forged", [in_the_superlinks_name, in_reds_name])
def test_a_party_sends_its_own_replies_alone(superlink: Superlink, forged: Callable[..., Message]) -> None:
    asked = Asked(superlink)
    message = forged(superlink, asked)
    contents, tree = deflated(message)
    with pytest.raises(HTTPException, match="403: a party sends its own replies alone"):
        superlink.announce(message, tree, "green")
    superlink.ours = False  # Flower takes the message, and hands it to whoever asks
    session, _ = superlink.announce(message, tree, "green")
    superlink.send("green", session, contents)
    flowers = superlink.grid.pull_messages([asked["red"].metadata.message_id])
    assert [reply.metadata.src_node_id for reply in flowers] == [message.metadata.src_node_id]


def test_what_is_no_reply_to_the_question_is_nobodys_answer(superlink: Superlink) -> None:
    """Also with a SuperLink that is not started by our launcher."""
    superlink.ours = False
    asked = Asked(superlink)
    message = in_the_superlinks_name(superlink, asked)
    contents, tree = deflated(message)
    superlink.send("green", superlink.announce(message, tree, "green")[0], contents)
    superlink.answer("red", asked["red"], vector(by="red"))
    replies = asked.replies
    assert replies.keys() == {"red"}
    assert replies["red"].content.config_records["info"]["task"] == "red"
    assert superlink.kept == 0


# -------------------------------------------------------------------------------------------- objects that are foreseen


def anyones(superlink: Superlink, asked: Message, trees: list[ObjectTree]) -> tuple[Message, ObjectTree]:
    """A reply of green's own of which its announcement says that it is made of `trees`."""
    reply = superlink.reply("green", asked, RecordDict())
    content = reply.deflate().replace(reply.content.object_id.encode(), ",".join(t.object_id for t in trees).encode())
    return reply, ObjectTree(object_id=get_object_id(content), children=trees)


def received_whole(superlink: Superlink, name: str) -> Message:
    """A party's next message, taken as Flower's SuperNode and its ClientApp do."""
    node = Node(node_id=superlink.nodes[name])
    answer = fleet_handlers.pull_messages(PullMessagesRequest(node=node), superlink.state, superlink.state.object_store)
    store, message_id = InMemoryObjectStore(), answer.messages_list[0].metadata.message_id
    for object_id in store.preregister(superlink.run_id, answer.message_object_trees[0]):
        pull = PullObjectRequest(node=node, run_id=superlink.run_id, object_id=object_id)
        store.put(object_id, fleet_handlers.pull_object(pull, superlink.state).object_content)
    ids = {node.object_id for node in iterate_object_tree(store.get_object_tree(message_id))}
    message = inflate_object_from_contents(message_id, {key: store.get(key) or b"" for key in ids})
    superlink.delete(name, message_id)
    assert isinstance(message, Message)
    return message


@dataclass(frozen=True)
class Foresight:
    """What green says of objects that others are about to send, and when.

    trees: by the number of an object, and those of what it is said to be made of; two exist nowhere. root:
    whether the first is announced as the message itself. sent: which objects green sends as they are. early: before
    the ServerApp asks; else before the other party answers. gone: whether it has them all deleted, as far as it can.
    """

    trees: list[tuple[int, list[tuple[int, list[int]]]]]
    root: bool
    sent: set[int]
    early: bool
    gone: bool


NUMBERS = st.integers(0, 15)
FORESIGHTS = st.builds(
    Foresight,
    trees=st.lists(
        st.tuples(
            NUMBERS,
            st.lists(
                st.tuples(NUMBERS, st.lists(NUMBERS, max_size=2, unique=True)), max_size=3, unique_by=lambda t: t[0]
            ),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda tree: tree[0],
    ),
    root=st.booleans(),
    sent=st.sets(NUMBERS),
    early=st.booleans(),
    gone=st.booleans(),
)


def foretell(superlink: Superlink, asked: Message, foresight: Foresight, foreseen: Contents) -> None:
    """Have green do what `foresight` has, in the place of its reply. The SuperLink may refuse it."""
    ids = [*foreseen, "a" * 64, "b" * 64]

    def node(number: int, children: Iterable[ObjectTree] = ()) -> ObjectTree:
        return ObjectTree(object_id=ids[number % len(ids)], children=children)

    trees = [
        node(top, [node(middle, map(node, below)) for middle, below in inner if (middle - top) % len(ids)])
        for top, inner in foresight.trees
    ]
    reply, tree = anyones(superlink, asked, trees)
    with suppress(HTTPException, ValueError):
        session, lacking = superlink.announce(reply, trees[0] if foresight.root else tree, "green")
        sent = {ids[number % len(ids)] for number in foresight.sent} & foreseen.keys() & set(lacking)
        superlink.send("green", session, {key: foreseen[key] for key in sent})
    for key in (tree.object_id, *foreseen) if foresight.gone else ():
        superlink.delete("green", key)


def check_foresight(superlink: Superlink, foresight: Foresight) -> None:
    """A question whose objects green foresees, and red's answer to it: both arrive as if green were not there."""
    question, answer = vector(by="the server"), vector(by="red")
    foreseen: Contents = {}
    for record in (question, answer):
        foreseen |= {key: item.deflate() for key, item in get_all_nested_objects(record).items()}
    previous = Asked(superlink, content=RecordDict())
    if foresight.early:
        foretell(superlink, previous["green"], foresight, foreseen)
    asked = Asked(superlink, content=question)
    if not foresight.early:
        foretell(superlink, asked["green"], foresight, foreseen)
    superlink.answer("red", asked["red"], answer)
    for name in superlink.nodes:
        received_whole(superlink, name)
        assert received_whole(superlink, name).content == question
    reply = next(iter(asked))
    while reply.has_error():
        reply = next(iter(asked))
    assert reply.metadata.src_node_id == superlink.nodes["red"]
    assert reply.content == answer


@hypothesis_settings(max_examples=200, **QUICK)  # type: ignore[arg-type]
@given(FORESIGHTS)
def test_what_a_party_says_of_anothers_objects_binds_nobody(superlink: Superlink, foresight: Foresight) -> None:
    check_foresight(Superlink(), foresight)


def check_foresight_in(database: Path, foresight: Foresight) -> None:
    with TemporaryDirectory() as folder:
        check_foresight(Superlink(str(shutil.copy(database, folder))), foresight)


@hypothesis_settings(max_examples=5, **QUICK)  # type: ignore[arg-type]
@given(FORESIGHTS)
@example(Foresight([(0, [(1, [])])], root=False, sent=set(), early=True, gone=False))
@example(Foresight([(0, [(1, [])])], root=True, sent=set(), early=True, gone=False))
def test_in_a_database_it_binds_nobody_either(superlink: Superlink, database: Path, foresight: Foresight) -> None:
    check_foresight_in(database, foresight)


@pytest.mark.slow
@hypothesis_settings(max_examples=100, **QUICK)  # type: ignore[arg-type]
@given(FORESIGHTS)
def test_in_a_database_it_never_binds_anybody(superlink: Superlink, database: Path, foresight: Foresight) -> None:
    check_foresight_in(database, foresight)


@pytest.mark.parametrize("where", ["memory", "database"])
def test_flower_alone_believes_who_comes_first(superlink: Superlink, database: Path, where: str) -> None:
    """What our launcher is for: when this fails, Flower has mended it, and `flat` may go."""
    false = Foresight([(1, [])], root=False, sent=set(), early=True, gone=False)
    with TemporaryDirectory() as folder:
        link = Superlink(FLWR_IN_MEMORY_DB_NAME if where == "memory" else str(shutil.copy(database, folder)))
        link.ours = False
        with pytest.raises((KeyError, ValueError, UnexpectedObjectContentError)):
            check_foresight(link, false)


def test_a_foreseen_object_is_taken_from_its_own_sender_alone(superlink: Superlink) -> None:
    """Flower takes one without a session as whosever awaits it, and then refuses it of whoever announced it."""
    asked = Asked(superlink)
    reply = superlink.reply("red", asked["red"], vector(by="red"))
    contents, tree = deflated(reply)
    session, _ = superlink.announce(reply, tree, "red")
    for key in contents:
        with pytest.raises(HTTPException, match="403: an object is sent in the session of its message alone"):
            superlink.send("green", "", {key: contents[key]})
    superlink.send("red", session, contents)
    assert not next(iter(asked)).has_error()


def test_nobody_foresees_the_id_of_a_question(superlink: Superlink, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its content and the very time be known: it would be a leaf of another's tree."""
    begin = datetime.now(UTC)
    monkeypatch.setattr(message_module, "now", lambda: begin)
    asked = [Asked(superlink)["red"].metadata for _ in range(2)]
    assert asked[0].created_at == asked[1].created_at
    assert asked[0].message_id != asked[1].message_id
    assert all(0.998 < metadata.ttl / DEFAULT_TTL <= 1 for metadata in asked)


# ----------------------------------------------------------------------------------------------------- half an upload


def test_who_stops_within_an_upload_holds_up_nobody(superlink: Superlink) -> None:
    asked = Asked(superlink, timeout=2.0)
    reply = superlink.reply("green", asked["green"], vector())
    contents, tree = deflated(reply)
    session, lacking = superlink.announce(reply, tree, "green")
    superlink.send("green", session, {key: contents[key] for key in lacking[1:]})  # all but a piece of its array
    begin = time.monotonic()
    superlink.answer("red", asked["red"], vector(by="red"))
    received = iter(asked)
    assert not next(received).has_error()
    assert time.monotonic() - begin < 1
    assert next(received, None) is None
    assert time.monotonic() - begin < 5
    assert superlink.pulled.count(lacking[0]) > 5  # this alone is asked for again and again
    assert superlink.pulled.count(lacking[-1]) <= 3
    assert superlink.kept == 0


def test_an_upload_that_ends_late_is_a_reply(superlink: Superlink) -> None:
    asked = Asked(superlink, timeout=60.0)
    replies = {name: superlink.reply(name, asked[name], vector(10, by=name)) for name in superlink.nodes}
    sent = {name: (*superlink.announce(reply, deflated(reply)[1], name),) for name, reply in replies.items()}

    def upload() -> None:
        for name, (session, lacking) in sent.items():
            contents = deflated(replies[name])[0]
            for key in lacking:
                time.sleep(0.05)
                superlink.send(name, session, {key: contents[key]})

    thread = Thread(target=upload)
    thread.start()
    answers = asked.replies
    thread.join()
    assert {name: answer.has_error() for name, answer in answers.items()} == {"red": False, "green": False}


def test_an_upload_that_is_given_up_is_a_lost_reply(superlink: Superlink) -> None:
    asked = Asked(superlink)
    reply = superlink.reply("green", asked["green"], vector())
    superlink.announce(reply, deflated(reply)[1], "green")
    superlink.state.object_store.delete(reply.metadata.message_id)
    superlink.answer("red", asked["red"], vector(by="red"))
    replies = asked.replies
    assert not replies["red"].has_error()
    assert replies["green"].error.code in LOST


# ------------------------------------------------------------------------------------------- what the SuperLink keeps


def test_no_party_fills_the_superlinks_disk(superlink: Superlink) -> None:
    """One reply's room a question, however often and with whatever objects it is announced."""
    superlink.uploads = Uploads(largest=2**20)
    asked = Asked(superlink, timeout=1.0)
    room = 0

    def upload(first: int) -> None:
        """Announce a reply of eight pieces of 300,000 bytes, and send those that are wanted."""
        nonlocal room
        pieces = [ArrayChunk(bytes([number]) * 300_000).deflate() for number in range(first, first + 8)]
        contents = {get_object_id(piece): piece for piece in pieces}
        reply, tree = anyones(superlink, asked["green"], [ObjectTree(object_id=key) for key in contents])
        session, lacking = superlink.announce(reply, tree, "green")
        for key in set(lacking) & set(contents):
            with pytest.raises(HTTPException, match=r"413: .* 1 MiB") if room + 300_000 > 2**20 else nullcontext():
                superlink.send("green", session, {key: contents[key]})
                room += len(contents[key])

    upload(0)
    assert room > 900_000
    upload(0)  # again
    with suppress(HTTPException, AssertionError):  # another one to the same question, of which Flower wants nothing
        upload(8)
    upload(0)
    superlink.answer("red", asked["red"], vector(by="red"))
    assert asked.replies.keys() == {"red"}
    again = Asked(superlink)
    for name in superlink.nodes:
        superlink.answer(name, again[name], vector(by=name))
    assert again.replies.keys() == {"red", "green"}
    assert superlink.kept == 0


def test_an_upload_is_of_what_its_sender_announced_last(superlink: Superlink) -> None:
    asked = Asked(superlink, timeout=1.0)
    reply = superlink.reply("green", asked["green"], vector())
    contents, tree = deflated(reply)
    session, lacking = superlink.announce(reply, tree, "green")
    for sender, said in (("red", session), ("green", superlink.announce(reply, tree, "green")[0] + "x")):
        with pytest.raises(HTTPException, match="403: a party uploads what it announced last"):
            superlink.send(sender, said, {lacking[0]: contents[lacking[0]]})


@pytest.mark.parametrize("said", ["0", "-1", "8 GiB", "1e3", "²"])
def test_the_largest_reply_is_a_number_of_mebibytes(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LARGEST, said)
    with pytest.raises(SystemExit, match=f"{LARGEST}={said!r}: it must be a whole number of MiB"):
        largest_reply()
    monkeypatch.setenv(LARGEST, "3")
    assert largest_reply() == 3 * 2**20


# -------------------------------------------------------------------------------------------------------- any objects

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("0" * 64)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)),
    max_leaves=8,
)
KINDS = ["Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk", "MetricRecord", "ConfigRecord"]
BODIES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.just(b"[" * 100_000),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("dtype", "shape", "stype", "arraychunk_ids"), JSON)).map(
        lambda value: json.dumps(value).encode()
    ),
)


@st.composite
def object_changes(draw: st.DrawFn) -> Change:
    """Of objects of one kind another kind, other bodies, other children; of the tree, less."""
    what = draw(st.sampled_from(["kind", "body", "children", "tree", "repeat"]))
    kind, other = draw(st.sampled_from(KINDS)), draw(st.sampled_from(KINDS))
    body, number = draw(BODIES), draw(st.integers(0, 9))

    def changed(content: bytes) -> bytes:
        head, _, held = content.partition(b"\0")
        name, children, size = head.split(b" ")
        if name != kind.encode():
            return content
        if what == "kind":
            return b" ".join([other.encode(), children, size]) + b"\0" + held
        if what == "repeat":
            return with_body(content, held.replace(b"[0]", json.dumps([0] * 10 ** (number % 6)).encode()))
        if what == "children":
            chosen = children.split(b",")[: number % 3] + [b"0" * 64] * (number % 2)
            return b" ".join([name, b",".join(chosen), size]) + b"\0" + held
        return with_body(content, body)

    def change(contents: Contents, tree: ObjectTree) -> tuple[Contents, ObjectTree]:
        if what == "tree":
            del tree.children[0].children[number % 3].children[:]
            wanted = {node.object_id for node in iterate_object_tree(tree)}
            return {key: content for key, content in contents.items() if key in wanted}, tree
        return rebuilt(contents, tree, changed)

    return change


def check_objects(change: Change) -> None:
    superlink = Superlink()
    asked = Asked(superlink, timeout=10.0)
    try:
        superlink.answer("green", asked["green"], vector(), change)
    except HTTPException:  # a message that its id does not belong to, which Flower's own takes
        superlink.ours = False
        superlink.answer("green", asked["green"], vector(), change)
    superlink.answer("red", asked["red"], vector(by="red"))
    replies = asked.replies
    assert taken_in(replies["red"], "red") == ""
    assert len(taken_in(replies["green"], "green")) < 1000
    assert superlink.kept == 0


def taken_in(reply: Message, name: str) -> str:
    """Why a reply is refused; "" if it is not."""
    if reply.has_error():
        assert boundary.reason(reply).startswith("refused: a reply ")
        return boundary.reason(reply)
    try:
        boundary.check_info(reply, {"task": name})
        boundary.update(reply, ELEMENTS, True, ())
    except boundary.Refused as error:
        return str(error)
    return ""


@hypothesis_settings(max_examples=100, **QUICK)  # type: ignore[arg-type]
@given(object_changes())
def test_whatever_objects_a_reply_is_of_it_is_read_or_refused(superlink: Superlink, change: Change) -> None:
    check_objects(change)


@pytest.mark.slow
@hypothesis_settings(max_examples=2000, **QUICK)  # type: ignore[arg-type]
@given(object_changes())
def test_whatever_objects_many_replies_are_of_they_are_read_or_refused(superlink: Superlink, change: Change) -> None:
    check_objects(change)


# ---------------------------------------------------------------------------------------------------- other apps' runs


def test_anyones_app_takes_no_more_than_its_weights_and_some(superlink: Superlink) -> None:
    """TaskVectorStrategy: green sends 100 MiB where 4 kB of weights went out, and is left out by name."""
    weights = ArrayRecord({"weight": Array(np.zeros(ELEMENTS, np.float32))})
    numbers: Any = MetricRecord({"num-examples": 1})
    sizes, over = {"red": ELEMENTS, "green": 25 * 2**20}, Event()

    def parties() -> None:
        while not over.wait(0.01):
            for name, elements in sizes.items():
                if asked := superlink.received(name):
                    values = np.ones(elements, np.float32) * np.arange(elements, dtype=np.float32)
                    arrays = ArrayRecord({"weight": Array(values)})
                    superlink.answer(name, asked, RecordDict({"arrays": arrays, "metrics": numbers}))

    thread = Thread(target=parties)
    thread.start()
    strategy = TaskVectorStrategy(fraction_evaluate=0.0, min_available_nodes=2, on_failure="skip")
    try:
        result = strategy.start(superlink.grid, weights, num_rounds=1, timeout=60)
    finally:
        over.set()
        thread.join()
    np.testing.assert_array_equal(result.arrays["weight"].numpy(), np.arange(ELEMENTS, dtype=np.float32))
    assert superlink.kept == 0


# ------------------------------------------------------------------------------------------------- with real processes

HOSTILE = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.clientapp import ClientApp
from atm_fl.clients.app import app as honest

class Hostile(ClientApp):
    def __call__(self, message, context):
        reply = honest(message, context)
        if message.metadata.message_type == "train" and str(context.node_config["data"]).endswith("green"):
            first = message.content.config_records["info"]["round"] == 1
            values = np.zeros(2**28, np.float32) if first else np.arange(2**27, dtype=np.float32)
            reply.content["arrays"] = ArrayRecord({"values": Array(values)})
        return reply

app = Hostile()
"""


@pytest.mark.slow
def test_over_real_processes_a_giant_reply_costs_the_serverapp_no_memory(tmp_path: Path) -> None:
    """TLS on loopback; of green's replies the first is 1 GiB, mostly one piece named again and again, the second
    512 MiB that are all there."""
    names = ("red", "green", "blue")
    folders = [str(make_folder(tmp_path / "data" / name, seed)) for seed, name in enumerate(names)]
    federation = Federation(tmp_path / "federation", folders)
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("server", "clients"):
        shutil.copytree(ROOT / name, changed / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, changed)
    (changed / "clients" / "app.py").write_text(HOSTILE)
    config: dict[str, Any] = {"tasks": ",".join(f"./{name}" for name in names), "rounds": 2, "batch-size": 8}
    config |= {"device": "cpu", "node-timeout": 240.0, "on-failure": "skip", "min-successful": 2}
    most = 0
    try:
        federation.start()
        run = federation.run({**config, "run-dir": str(tmp_path / "run")}, changed)
        while run.process.poll() is None:
            for process in federation.apps("superlink", "serverapp"):
                with suppress(psutil.NoSuchProcess):
                    most = max(most, process.memory_info().rss)
            time.sleep(0.02)
        assert run.finish() == ""
    finally:
        federation.stop()
    merges = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "merge"]
    print([line["failures"] for line in merges], most >> 20)
    assert [line["tasks"] for line in merges] == [["red", "blue"]] * 2
    assert all("refused: a reply whose arrays have more than" in line["failures"]["green"] for line in merges)
    assert most < 1300 * 2**20  # without these replies 1000
