"""What a SuperLink reads of a request before anybody is authenticated, and the memory that a flood costs it."""

from __future__ import annotations

import asyncio
import http.client
import ssl
from base64 import b64encode
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from federation import Federation
from flwr.supercore import sql_mixin
from flwr.supercore.date import now
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from sqlalchemy import text

from atm_fl.server.superlink import ANYONE, AT_ONCE, CHUNK, MIB, PATIENCE, WholeBodies, be_patient, body_limit

PUSH = "/v1/fleet/push-object"


class Party:
    """A key pair, and the headers by which a SuperNode shows it."""

    def __init__(self) -> None:
        self.secret = ec.generate_private_key(ec.SECP384R1())
        self.public = public_key_to_bytes(self.secret.public_key())

    def headers(self, signer: Party | None = None, late: float = 0.0) -> list[tuple[bytes, bytes]]:
        """Signed by `signer`, itself if it is nobody else, `late` seconds ago."""
        moment = (now() - timedelta(seconds=late)).isoformat()
        signature = sign_message((signer or self).secret, moment.encode())
        values = {"public-key": b64encode(self.public), "timestamp": moment.encode(), "signature": b64encode(signature)}
        return [(f"flwr-{name}".encode(), value) for name, value in values.items()]


class Line:
    """One request through WholeBodies: what was read of it, what the app was handed, what came back."""

    def __init__(self, path: str, *bodies: bytes, headers: Any = (), known: tuple[Party, ...] = ()) -> None:
        self.read, self.handed, self.sent = 0, [], list[Any]()
        self._bodies = iter(bodies)
        keys = [party.public for party in known]
        state = SimpleNamespace(get_node_id_by_public_key=lambda key: 7 if key in keys else None)
        app = SimpleNamespace(state=SimpleNamespace(linkstate_factory=SimpleNamespace(state=lambda: state)))
        self.scope = {"type": "http", "path": path, "headers": list(headers), "client": ("192.0.2.9", 1), "app": app}

    async def receive(self) -> dict[str, Any]:
        body = next(self._bodies, None)
        self.read += len(body or b"")
        return {"type": "http.request", "body": body or b"", "more_body": body is not None}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def go(self) -> Line:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            self.handed.append((await receive())["body"])

        asyncio.run(WholeBodies(app)(self.scope, self.receive, self.send))
        return self

    @property
    def refusal(self) -> str:
        """What a refused sender is told."""
        assert not self.handed
        assert self.sent[0]["status"] == 413
        return self.sent[1]["body"].decode()


def length(size: int) -> tuple[bytes, bytes]:
    return b"content-length", str(size).encode()


@pytest.mark.parametrize("path", ["/health", "/", "/v1/fleet/activate-node", PUSH, "/v1/control/start-run", "/docs"])
def test_a_long_body_is_refused_by_its_length_before_any_of_it_is_read(path: str) -> None:
    line = Line(path, b"x", headers=[length(1500 * MIB)]).go()
    assert line.read == 0
    assert f"{path}: the body is longer than" in line.refusal


@pytest.mark.parametrize("path", ["/health", "/v1/fleet/push-messages", PUSH, "/v1/control/start-run", "/v1/runtime/x"])
@pytest.mark.parametrize("said", [[], [length(1)], [length(-1)], [(b"content-length", b"x")]])
def test_a_body_that_keeps_coming_is_read_to_the_limit_and_no_further(path: str, said: list[Any]) -> None:
    line = Line(path, *[bytes(MIB)] * 50, headers=said).go()
    assert line.refusal
    assert line.read <= (ANYONE if path.startswith(("/health", "/v1/fleet")) else body_limit(path)) + MIB


def test_a_registered_partys_chunk_is_handed_over_whole() -> None:
    party, chunk = Party(), [bytes(MIB)] * 16
    said = Line(PUSH, *chunk, headers=[*party.headers(), length(16 * MIB)], known=(party,)).go()
    streamed = Line(PUSH, *chunk, headers=party.headers(), known=(party,)).go()
    assert said.handed == streamed.handed == [bytes(16 * MIB)]


def test_nobody_else_sends_more_than_asks_to_be_let_in() -> None:
    party, stranger = Party(), Party()
    for headers in (
        [],
        stranger.headers(),
        party.headers(signer=stranger),
        party.headers(late=3600),
        [(b"flwr-public-key", b"%%"), *party.headers()[1:]],
        party.headers()[:2],
    ):
        line = Line(PUSH, bytes(ANYONE), b"x", headers=headers, known=(party,)).go()
        assert line.refusal.endswith("from a sender whose key is not registered")
        assert Line(PUSH, bytes(ANYONE), headers=headers, known=(party,)).go().handed == [bytes(ANYONE)]  # Flower's 401


def test_a_party_whose_chunks_are_larger_is_told_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    party = Party()
    line = Line(PUSH, headers=[*party.headers(), length(50 * MIB)], known=(party,)).go()
    assert line.refusal.endswith(f"{CHUNK} must be no more than the SuperLink's, {16 * MIB}")
    monkeypatch.setenv(CHUNK, str(64 * MIB))
    assert body_limit(PUSH) == 65 * MIB
    assert Line(PUSH, b"x", headers=[*party.headers(), length(50 * MIB)], known=(party,)).go().handed == [b"x"]


def test_of_one_party_a_few_bodies_are_held_at_once_and_another_need_not_wait() -> None:
    party, other = Party(), Party()
    under_way = list[bytes]()

    async def flood() -> None:
        done = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            under_way.append(scope["who"])
            await receive()
            await done.wait()

        bodies = WholeBodies(app)
        tasks = []
        for who, sender in [(b"one", party)] * (3 * AT_ONCE) + [(b"other", other)]:
            line = Line(PUSH, bytes(MIB), headers=[*sender.headers(), length(MIB)], known=(party, other))
            tasks.append(asyncio.create_task(bodies({**line.scope, "who": who}, line.receive, line.send)))
        while len(under_way) < AT_ONCE + 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert sorted(under_way) == [b"one"] * AT_ONCE + [b"other"]
        done.set()
        await asyncio.gather(*tasks)

    asyncio.run(flood())
    assert len(under_way) == 3 * AT_ONCE + 1


def test_a_request_waits_a_minute_for_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    be_patient()
    store = SqlObjectStore(str(tmp_path / "superlink.db"))
    store.initialize()
    with store.session() as session:
        assert session.execute(text("PRAGMA busy_timeout")).scalar() == 1000 * PATIENCE


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """A SuperLink with TLS and authentication, and nobody else."""
    made = Federation(tmp_path / "federation", [])
    made.start_superlink()
    yield made
    made.stop()


def flood(federation: Federation, path: str, size: int, streamed: bool) -> tuple[int, str]:
    """Post `size` bytes without a key; the status and text that come back, "" where the line was cut."""
    context = ssl.create_default_context(cafile=str(federation.secrets / "ca.crt"))
    line = http.client.HTTPSConnection(federation.address, context=context, timeout=120)
    body = (bytes(MIB) for _ in range(size // MIB))
    line.request("POST", path, body, {} if streamed else {"content-length": str(size)}, encode_chunked=streamed)
    answer = line.getresponse()
    try:
        return answer.status, answer.read().decode()
    finally:
        line.close()


def grown(federation: Federation, size: int) -> float:
    """MiB by which the SuperLink's resident memory grew at most while it was flooded on several paths."""
    process = psutil.Process(federation.processes["superlink"].pid)
    before = most = process.memory_info().rss
    for path in ("/health", PUSH, "/v1/control/start-run", "/v1/runtime/push-object"):
        for streamed in (False, True):
            status, words = flood(federation, path, size, streamed)
            assert status == 413
            assert "the body is longer than" in words
            most = max(most, process.memory_info().rss)
    print(f"{before / MIB:.0f} MiB, under the flood {most / MIB:.0f} MiB")
    return (most - before) / MIB


def test_a_flood_without_a_key_is_answered_and_costs_little_memory(federation: Federation) -> None:
    assert grown(federation, 96 * MIB) < 80


@pytest.mark.slow
def test_a_flood_of_gigabytes_costs_no_more(federation: Federation) -> None:
    assert grown(federation, 1500 * MIB) < 120
