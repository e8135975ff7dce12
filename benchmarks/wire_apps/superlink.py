"""`python superlink.py stock|ours …`: a SuperLink, stock Flower's or ours, that counts the bytes of its SuperNodes.

The bodies of the fleet API's requests and responses add up in the file WIRE_FOLDER/bytes: up, down.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Counter:
    """ASGI middleware that counts bytes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.up = self.down = 0
        self.file = os.open(Path(os.environ["WIRE_FOLDER"]) / "bytes", os.O_CREAT | os.O_WRONLY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        if scope["type"] != "http" or not str(scope["path"]).startswith("/v1/fleet/"):
            return await self.app(scope, receive, send)

        async def counted_receive() -> Message:
            message = await receive()
            self.up += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            self.down += len(message.get("body", b""))
            await send(message)

        await self.app(scope, counted_receive, counted_send)
        os.pwrite(self.file, f"{self.up:20} {self.down:20}\n".encode(), 0)
        return None


def main() -> None:
    """Run the SuperLink with the arguments after the first."""
    whose = sys.argv.pop(1)
    if whose == "ours":
        from atm_fl.server.superlink import main as superlink
    else:
        from flwr.superlink.cli import flower_superlink as superlink
    from flwr.superlink import main as application

    create_app, sys.argv[0] = application.create_app, "flower-superlink"

    def counted(*args: object) -> ASGIApp:
        app = create_app(*args)  # type: ignore[arg-type]
        app.user_middleware.insert(0, Middleware(Counter))
        return app

    application.create_app = counted  # type: ignore[assignment]
    superlink()


if __name__ == "__main__":
    main()
