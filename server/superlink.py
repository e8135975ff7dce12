"""`python -m server.superlink …`: Flower's SuperLink, of which other machines reach no more than they need.

Flower serves three APIs on one port: SuperNodes use the fleet API, which authenticates them; who may use the control
API can run code of their own on every party and register SuperNodes, and it asks nobody for a key. So that API and
the runtime API, over which the SuperLink's own processes fetch their work, answer callers on this machine alone (in a
container: `docker-compose exec superlink …`).
"""

from __future__ import annotations

from ipaddress import ip_address

from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

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


def _local(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and ip_address(client[0]).is_loopback


def main() -> None:
    """Run flower-superlink, its arguments unchanged, behind LocalControl."""
    extensions.get_middleware = lambda: (Middleware(LocalControl),)
    flower_superlink()


if __name__ == "__main__":
    main()
