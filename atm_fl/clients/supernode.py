"""`python -m atm_fl.clients.supernode …`: Flower's SuperNode, which outlives its SuperLink.

Flower's own gives up for good when a TLS handshake breaks off, which is what a proxy or a published port does while the
SuperLink behind it restarts; and its process then stays there doing nothing, since a server thread keeps it. This one
tries again, and ends if it cannot go on, so that what supervises it starts it anew. Its naps are short (pace.py).

It also gives a ClientApp's process START seconds until its first sign of life. Flower's own gives 30, then reports a
failure and lets the process be: on a machine so busy that Python takes longer to start, each new try makes it busier.
Who starts those processes is `clients/superexec.py`, which apps they may run is `clients/signed.py`, and how much
of the SuperLink's messages is taken in is `clients/received.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from datetime import timedelta

import httpx
from flwr.supercore.date import now
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli import flower_supernode
from flwr.supernode.nodestate import InMemoryNodeState, nodestate_factory

from atm_fl.clients.received import BoundedClient, bounded
from atm_fl.clients.signed import guarded
from atm_fl.deployment import pace

START = 300.0
"""Seconds; a process that has given one is then watched as by Flower's own."""


class PatientState(InMemoryNodeState):
    """Flower's state of a SuperNode, in which a process that was started has longer to say that it is there."""

    def claim_task(self, task_id: int) -> str | None:
        """Flower's, with a later end."""
        token = super().claim_task(task_id)
        with self.lock_task_store:
            if record := self.task_token_store.get(task_id):
                record.active_until = now() + timedelta(seconds=START)
        return token


class OurSuperExec:
    """The module `subprocess` with a `Popen` that starts clients/superexec.py where flower-superexec is meant."""

    @staticmethod
    def Popen(command: list[str]) -> subprocess.Popen[bytes]:
        """Start it."""
        assert command[0] == "flower-superexec"
        return subprocess.Popen([sys.executable, "-m", "atm_fl.clients.superexec", *command[1:]])


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
    start_client_internal.time = pace.CappedSleep  # type: ignore[assignment]
    start_client_internal.subprocess = OurSuperExec  # type: ignore[assignment]
    start_client_internal._pull_and_store_message = bounded(guarded(start_client_internal._pull_and_store_message))
    fleet_http_connection.FleetHttpClient = BoundedClient  # type: ignore[misc]
    nodestate_factory.InMemoryNodeState = PatientState  # type: ignore[misc]
    fleet_http_connection.make_simple_http_retry_invoker = patient_invoker
    try:
        flower_supernode()
    except Exception:
        traceback.print_exc()
    os._exit(1)  # a SuperNode that is told to end does so within flower_supernode


if __name__ == "__main__":
    main()
