"""`python -m server.superlink …`: Flower's SuperLink, of which other machines reach no more than they need.

Flower serves three APIs on one port: SuperNodes use the fleet API, which authenticates them; who may use the control
API can run code of their own on every party and register SuperNodes, and it asks nobody for a key. So that API and
the runtime API, over which the SuperLink's own processes fetch their work, answer callers on this machine alone (in a
container: `docker-compose exec superlink …`).

It also hands every request's body over whole. The layers that Flower stacks upon another each cost some tasks of the
event loop for every piece of a body, and a large array comes in hundreds of pieces. And it gives the memory of large
arrays back to the system at once, which glibc else keeps for each of the threads that had some: half of it in all.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from ipaddress import ip_address

from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atm_fl.deployment import pace

OPEN = ("/v1/fleet/", "/health")
"""What begins the paths that other machines may ask for."""


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
    """ASGI middleware: a request's body in one message. Flower gathers it itself, before it looks at who sent it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on when all of it is here, or its sender gone."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        pieces, last = [], False
        while not last:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            last = not message.get("more_body", False)
        whole: list[Message] = [{"type": "http.request", "body": b"".join(pieces), "more_body": False}]
        del pieces, message

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        return await self.app(scope, receive_whole, send)


def _local(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and ip_address(client[0]).is_loopback


def return_memory() -> None:
    """Have blocks of a megabyte and more mapped one by one, where the C library is glibc."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD; once set, it no longer grows


def main() -> None:
    """Run flower-superlink, its arguments unchanged, behind LocalControl."""
    pace.set_variables()
    return_memory()
    extensions.get_middleware = lambda: (Middleware(LocalControl), Middleware(WholeBodies))
    flower_superlink()


if __name__ == "__main__":
    main()
