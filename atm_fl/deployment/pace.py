"""How Flower's programs are paced in a deployment: larger chunks, and shorter naps between its polls.

Of Flower's own values (5 MB; 1 s; 3 s and 0.5 s) the first makes many requests, and the naps make a round seconds
longer than its work. The launchers, `atm_fl/server/superlink.py` and `atm_fl/clients/supernode.py`, take these for the
programs that they are and start; a variable that is set already stays.
"""

from __future__ import annotations

import os
import time

VARIABLES = {
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(16 * 2**20),  # bytes; the SuperLink holds several at once
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",  # seconds until a message's process is started
}
LONGEST_NAP = 1.0
"""Seconds between a SuperNode's polls, each of which costs the SuperLink some 10 ms of CPU."""


def set_variables() -> None:
    """Set those of VARIABLES that are not set, for the processes that this one starts."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)


class CappedSleep:
    """The module `time` with a `sleep` that takes LONGEST_NAP seconds at most, to be put in a Flower module's place."""

    @staticmethod
    def sleep(seconds: float) -> None:
        """Sleep, but not for long."""
        time.sleep(min(seconds, LONGEST_NAP))
