"""`python -m clients.supernode …`: Flower's SuperNode, which outlives its SuperLink.

Flower's own gives up for good when a TLS handshake breaks off, which is what a proxy or a published port does while the
SuperLink behind it restarts; and its process then stays there doing nothing, since a server thread keeps it. This one
tries again, and ends if it cannot go on, so that what supervises it starts it anew. Its naps are short (pace.py).
"""

from __future__ import annotations

import os
import traceback

import httpx
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli import flower_supernode

from atm_fl.deployment import pace


def patient_invoker() -> RetryInvoker:
    """Flower's retries, and also one after a handshake that broke off; a wrong certificate stays final."""
    invoker = make_simple_http_retry_invoker()
    gives_up = invoker.should_giveup
    assert gives_up is not None
    invoker.should_giveup = lambda error: not _broke_off(error) and gives_up(error)
    return invoker


def _broke_off(error: Exception) -> bool:
    return isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower()


def main() -> None:
    """Run flower-supernode, its arguments unchanged."""
    pace.set_variables()
    start_client_internal.time = pace.ShortNaps  # type: ignore[assignment]
    fleet_http_connection.make_simple_http_retry_invoker = patient_invoker
    try:
        flower_supernode()
    except Exception:
        traceback.print_exc()
    os._exit(1)  # a SuperNode that is told to end does so within flower_supernode


if __name__ == "__main__":
    main()
