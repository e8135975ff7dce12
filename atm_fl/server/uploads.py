"""How much of one reply a registered party may have the SuperLink keep.

Flower keeps what a party uploads in its database until the ServerApp has taken it, or the run ends: 17 MB an object,
and as many objects as 4 MiB of a message can name, a terabyte. A question has one answer there, so that a party
that is asked one thing at a time fills no more of the disk than one reply may have.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from threading import Lock

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import PushObjectRequest

LARGEST = "ATM_FL_LARGEST_REPLY"
"""The variable with the most MiB of one reply at the SuperLink, if it is not MOST."""
MOST = 8 * 2**10
"""A vector of two billion float32."""
log = logging.getLogger("flwr")


class Uploads:
    """The bytes that each party has uploaded of its reply to each question. For several threads."""

    def __init__(self, largest: int) -> None:
        """largest: the most bytes of one reply."""
        self._largest, self._lock = largest, Lock()
        self._begun: dict[int, tuple[str, str]] = {}
        """By party: its last session, and the question that it answers there."""
        self._bytes: Counter[tuple[int, str]] = Counter()

    def begin(self, request: PushMessagesRequest, answer: PushMessagesResponse) -> None:
        """Note a reply that was announced by `request`, and that Flower has taken if it wants objects of it."""
        if answer.objects_to_push:
            question = request.messages_list[0].metadata.reply_to_message_id
            with self._lock:
                self._begun[request.node.node_id] = answer.session_id, question

    def take(self, request: PushObjectRequest) -> None:
        """Count an object before it is kept.

        HTTPException: 403 if it is not of the reply that its sender announced last, 413 if that has too many bytes.
        """
        node, size = request.node.node_id, len(request.object_content)
        with self._lock:
            session, question = self._begun.get(node, ("", ""))
            if not session or session != request.session_id:
                raise HTTPException(403, "a party uploads what it announced last")
            if self._bytes[node, question] + size > self._largest:
                words = f"a reply has more than {self._largest >> 20} MiB: {LARGEST} at the SuperLink says how many"
                log.warning("refused an object of node %s: %s", node, words)
                raise HTTPException(413, words)
            self._bytes[node, question] += size


def largest_reply() -> int:
    """The most bytes of one reply, as LARGEST says it in MiB. SystemExit with the fix if it says no such number."""
    said = os.environ.get(LARGEST, "") or str(MOST)
    if not (said.isascii() and said.isdigit() and int(said)):
        raise SystemExit(f"{LARGEST}={said!r}: it must be a whole number of MiB, 1 or more")
    return int(said) * 2**20
