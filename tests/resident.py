"""What test_flower_app.py has run in processes of its own: how much memory a server takes with so many clients.

    MALLOC_MMAP_THRESHOLD_=1048576 python tests/resident.py mean:2 mean:8 fedavg:2 fedavg:8

The variable has what is freed go back to the system at once. Without it malloc keeps some of it, now more, now less.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from atm_fl.flower import TaskVectorStrategy
from atm_fl.server.grid import InProcessGrid

ENTRIES, SIDE = 2, 1024
"""Matrices of float32: a model of 8 MiB."""


class Peak(threading.Thread):
    """Looks every millisecond at this process's anonymous resident memory, MiB; mapped files do not count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.001):
            self.most = max(self.most, anonymous())


def anonymous() -> float:
    """MiB."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGESIZE") / 2**20


def measured(name: str, clients: int) -> float:
    """MiB at most above what there was before a round of FedAvg, or of ours with the merge `name`."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        arrays = {key: Array(array.numpy() + np.float32(node)) for key, array in message.content["arrays"].items()}
        numbers = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": numbers}), reply_to=message)

    start = ArrayRecord({f"w{entry}": Array(np.zeros((SIDE, SIDE), np.float32)) for entry in range(ENTRIES)})
    common = {"fraction_evaluate": 0.0, "min_available_nodes": clients, "min_train_nodes": clients}
    strategy = FedAvg(**common) if name == "fedavg" else TaskVectorStrategy(merge=name, **common)
    before, peak = anonymous(), Peak()
    peak.start()
    strategy.start(InProcessGrid(app, clients, {}), start, 1)
    peak.ended.set()
    peak.join()
    return peak.most - before


def main() -> None:
    """Print a line for each NAME:CLIENTS among the arguments, each measured in a fork of this process."""
    for spec in sys.argv[1:]:
        if not (child := os.fork()):
            name, _, clients = spec.partition(":")
            print(spec, measured(name, int(clients)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{spec} failed")


if __name__ == "__main__":
    main()
