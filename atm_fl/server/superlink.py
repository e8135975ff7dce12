"""`python -m atm_fl.server.superlink …`: Flower's SuperLink, of which other machines reach no more than they need.

Flower serves three APIs on one port: SuperNodes use the fleet API, which authenticates them; who may use the control
API can run code of their own on every party and register SuperNodes, and it asks nobody for a key. So that API and
the runtime API, over which the SuperLink's own processes fetch their work, answer callers on this machine alone (in a
container: `docker-compose exec superlink …`).

It also hands every request's body over whole. The layers that Flower stacks upon another each cost some tasks of the
event loop for every piece of a body, and a large array comes in hundreds of pieces. Flower reads a body before it asks
who sent it, and any length of it; here a body is read up to a limit of its route, and beyond ANYONE bytes only from a
sender whose key is registered. It also believes a registered party of whom a message is, so that one could answer in
another's name, or send messages in the SuperLink's; here each sends its own replies and nothing else. And it gives the
memory of large arrays back to the system at once, which glibc else keeps for each of the threads that had some: half of
it in all.

Objects go by the hash of their bytes, and Flower keeps one tree of all: who announces an object first says of which
others it is made, long before its bytes are there, and whoever announces it otherwise is refused. A record that is
foreseen could so be taken from the party, or the ServerApp, that sends it. Here nobody says anything of an object but
of the message that it sends itself: that is made of all others, and those of none (`flat`). A receiver needs no more,
for it asks for all of them and joins them by what their bytes say. And a message is its sender's own, since its id must
be the hash of what is announced of it, with the sender in it (`own_replies`). What it may hold is in uploads.py.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
from base64 import b64decode
from collections import defaultdict
from contextlib import nullcontext, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TypeVar

from fastapi import HTTPException
from flwr.common.serde import fab_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest, PushObjectResponse
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore import sql_mixin
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atm_fl.deployment import pace
from atm_fl.server.uploads import Uploads, largest_reply

OPEN = ("/v1/fleet/", "/health")
"""What begins the paths that other machines may ask for."""
MIB = 2**20
ANYONE = 64 * 2**10
"""Bytes of a body that are read from a sender who is not known: what asks to be let in has less than 1,000."""
CHUNK = "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"
"""The variable by which Flower cuts arrays, whatever the model's size: no object that is sent holds more bytes."""
APPS = "ATM_FL_APPS"
"""The variable that names the folder of apps' signatures, if it is not /etc/atm-fl/apps."""
AT_ONCE = 8
"""Bodies of more than ANYONE bytes that are held of one party at a time; the rest of them waits in its sockets."""
PATIENCE = 60
"""Seconds for which one request waits until another has written to the database; Flower's own are 5. To delete a reply
of half a gigabyte takes longer where the disk is slow, and on "database is locked" every SuperNode ends."""
Messages = TypeVar("Messages", PushMessagesRequest, PushAppMessagesRequest)
log = logging.getLogger("flwr")


def body_limit(path: str) -> int:
    """The most bytes of a request's body for `path`, from a sender who may ask for it."""
    if path == "/v1/fleet/push-object" or path.startswith("/v1/runtime/"):
        return int(os.environ.get(CHUNK, pace.VARIABLES[CHUNK])) + MIB  # one object, and what goes with it
    if path.startswith("/v1/fleet/"):
        return 4 * MIB  # a message without its objects: 70 bytes for each chunk
    if path.startswith("/v1/control/"):
        return 16 * MIB  # an app, of 10 MB at most, and its run config
    return ANYONE


class LocalControl:
    """ASGI middleware: 403 to other machines, for all paths but those of OPEN."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed; refuse the rest."""
        if scope["type"] == "lifespan" or str(scope["path"]).startswith(OPEN) or _local(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse("only from the SuperLink's own machine", 403)(scope, receive, send)


class WholeBodies:
    """ASGI middleware: a request's body in one message, if it is not longer than `body_limit`; 413 if it is.

    A body that is refused isn't kept: by its Content-Length before any of it is read, else once it is too long.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._slots: defaultdict[bytes, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(AT_ONCE))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on when all of it is here, or its sender gone."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, length = str(scope["path"]), _content_length(scope)
        limit, sender = body_limit(path), b""
        if path.startswith("/v1/fleet/"):
            if length is None or length > ANYONE:
                sender = await run_in_threadpool(registered_key, scope)
            limit = limit if sender else ANYONE
        async with self._slots[sender] if sender else nullcontext():
            if length is not None and length > limit:
                return await _refuse(scope, receive, send, limit)
            pieces, size, last = [], 0, False
            while not last:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > limit:
                    pieces.clear()
                    return await _refuse(scope, receive, send, limit)
                last = not message.get("more_body", False)
            whole: list[Message] = [{"type": "http.request", "body": b"".join(pieces), "more_body": False}]
            del pieces, message

            async def receive_whole() -> Message:
                return whole.pop() if whole else await receive()

            return await self.app(scope, receive_whole, send)


def registered_key(scope: Scope) -> bytes:
    """The public key of the party that signed a request's headers, b"" if no registered one did.

    Flower's own check, which waits for the body but looks at it for no more than which node it speaks of; Flower does
    the whole of it again.
    """
    request = Request({**scope, "state": {}})
    try:
        key = b64decode(request.headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, ""), validate=True)
        request.state.protobuf_request = ActivateNodeRequest(public_key=key)
        authenticate_node(request)
    except (HTTPException, ValueError):
        return b""
    return key if get_linkstate(request).get_node_id_by_public_key(key) is not None else b""


def _content_length(scope: Scope) -> int | None:
    """Bytes of the body, as the sender says; None if it doesn't."""
    said = Headers(scope=scope).get("content-length", "")
    return int(said) if said.isascii() and said.isdigit() else None


async def _refuse(scope: Scope, receive: Receive, send: Send, limit: int) -> None:
    """413, with the rule. The server throws away what of the body is still to come."""
    path = str(scope["path"])
    words = f"{path}: the body is longer than {limit} bytes, which is the most "
    if limit < body_limit(path):
        words += "that is read from a sender whose key is not registered"
    elif path == "/v1/fleet/push-object":
        words += f"for one object: the party's {CHUNK} must be no more than the SuperLink's, {limit - MIB}"
    else:
        words += "for this path"
    log.warning("refused a request of %s: %r", (scope.get("client") or ["?"])[0], words)
    await PlainTextResponse(words, 413)(scope, receive, send)


def _local(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and ip_address(client[0]).is_loopback


def with_signatures(fab: Fab) -> Fab:
    """An app as it is handed to parties: with the signatures that APPS/HASH.json has of it (`atm-fl deploy sign`).

    Flower's own come with an app from its hub; one that is uploaded has none. Whom to believe is for the party.
    """
    file = Path(os.environ.get(APPS, "/etc/atm-fl/apps"), f"{fab.hash_str}.json")
    try:
        signatures = json.loads(file.read_text()) if file.exists() else {}
        return Fab(fab.hash_str, fab.content, {**fab.verifications, **signatures})
    except (OSError, ValueError, TypeError) as error:
        log.error("the signatures in %s cannot be read: %s", file, error)
        return fab


def own_replies(request: PushMessagesRequest) -> PushMessagesRequest:
    """The request by which a party sends its replies, `flat`; 403 if one of them is no reply, or another party's.

    Who sends the request is known here, for Flower has authenticated it as `node`.
    """
    sender, what = request.node.node_id, ""
    if len(request.messages_list) != len(request.message_object_trees):
        what = "messages without their trees"
    for message, tree in zip(request.messages_list, request.message_object_trees, strict=False):
        if not message.metadata.reply_to_message_id:
            what = "no reply"
        elif message.metadata.src_node_id != sender:
            what = f"one in the name of node {message.metadata.src_node_id}"
        elif not tree.object_id == message.metadata.message_id == _message_id(message, tree):
            what = "one whose id is not its own"
    if what:
        log.warning("refused a message of node %s: %s", sender, what)
        raise HTTPException(403, "a party sends its own replies alone")
    return flat(request)


def own_session(request: PushObjectRequest) -> PushObjectRequest:
    """The request by which a party sends an object; 403 if it doesn't name the session in which it announced that.

    Without one Flower takes it as sent by whoever is about to send it, and refuses theirs, which ends a ServerApp.
    """
    if not request.session_id:
        log.warning("refused an object of node %s: no session", request.node.node_id)
        raise HTTPException(403, "an object is sent in the session of its message alone")
    return request


def flat(request: Messages) -> Messages:
    """The request with trees that say of which objects each message is made, and nothing of what these are made."""
    for tree in request.message_object_trees:
        objects = dict.fromkeys(node.object_id for node in iterate_object_tree(tree))
        del objects[tree.object_id], tree.children[:]
        tree.children.extend(ObjectTree(object_id=object_id) for object_id in objects)
    return request


def _message_id(message: ProtoMessage, tree: ObjectTree) -> str:
    """The hash of the object that Flower makes of a message with the content that its tree names."""
    bare = ProtoMessage(metadata=message.metadata, error=message.error if message.HasField("error") else None)
    bare.metadata.message_id = ""
    body = bare.SerializeToString(deterministic=True)
    head = f"Message {','.join(child.object_id for child in tree.children)} {len(body)}"
    return get_object_id(head.encode() + b"\0" + body)


def be_patient() -> None:
    """Let requests wait PATIENCE for the database, from the next that is opened."""
    patient = ("busy_timeout", str(1000 * PATIENCE))
    sql_mixin.SQLITE_PRAGMAS = (*sql_mixin.SQLITE_PRAGMAS, patient)  # type: ignore[assignment]


def return_memory() -> None:
    """Have blocks of a megabyte and more mapped one by one, where the C library is glibc."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD; once set, it no longer grows


def main() -> None:
    """Run flower-superlink, its arguments unchanged, behind LocalControl."""
    pace.set_variables()
    return_memory()
    be_patient()
    extensions.get_middleware = lambda: (Middleware(LocalControl), Middleware(WholeBodies))
    push, push_object, send = fleet_handlers.push_messages, fleet_handlers.push_object, runtime_handlers.push_messages
    uploads = Uploads(largest_reply())

    def push_reply(request: PushMessagesRequest, state: LinkState) -> PushMessagesResponse:
        answer = push(own_replies(request), state)
        uploads.begin(request, answer)
        return answer

    def push_counted(request: PushObjectRequest, state: LinkState) -> PushObjectResponse:
        uploads.take(own_session(request))
        return push_object(request, state)

    fleet_handlers.push_messages, fleet_handlers.push_object = push_reply, push_counted
    runtime_handlers.push_messages = lambda request, state, task: send(flat(request), state, task)
    fleet_handlers.fab_to_proto = lambda fab: fab_to_proto(with_signatures(fab))
    flower_superlink()


if __name__ == "__main__":
    main()
