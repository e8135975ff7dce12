"""Does the server's memory grow with its clients? Peak anonymous resident memory with 4 and with 16 clients.

    python benchmarks/server_memory.py

The real strategy and grids merge made-up vectors of a 20 M-parameter ViT for two rounds, each count of clients in a
process of its own. The clients live in the same process, one at a time, and cost one vector whatever their number.
Spilled vectors are mapped files: they are the system's page cache, go when memory is short, and do not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from atm_fl import models
from atm_fl.codecs import Fp32
from atm_fl.runs.run import Run
from atm_fl.server.grid import InProcessGrid, StreamingGrid
from atm_fl.server.strategy import AtmStrategy
from atm_fl.settings import Settings
from atm_fl.vectors import Layout

COUNTS = (4, 16)


@models.backbone("twenty_million")
def twenty_million() -> models.Backbone:
    """A ViT of 20 M parameters with random weights."""
    return models.Backbone(models.vit(32, 8, 512, 6, 8), 32)


def made_up(message: Message, context: Context) -> Message:
    """A client's reply with a random task vector."""
    info = message.content.config_records["info"]
    size = message.content.array_records["arrays"]["values"].shape[0]
    layout = Layout(("all",), ((size,),))
    vector = torch.randn(size, generator=torch.Generator().manual_seed(context.node_id)).mul_(1e-3)
    content = {
        "metrics": MetricRecord({"tuning.norm": float(vector.norm())}),
        "info": ConfigRecord({**info, "task": f"task{context.node_id}"}),
    }
    if message.metadata.message_type == "train":
        content["arrays"] = ArrayRecord({name: Array(array) for name, array in Fp32().encode(vector, layout).items()})
    return Message(RecordDict(content), reply_to=message)


class Peak(threading.Thread):
    """Looks every few milliseconds how much anonymous memory the process has resident."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.pages = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.003):
            _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
            self.pages = max(self.pages, resident - shared)


def peak(clients: int) -> None:
    """Run two rounds and print elements and peak MiB of this process."""
    watch = Peak()
    watch.start()
    app = ClientApp()
    app.train()(made_up)
    app.evaluate()(made_up)
    with tempfile.TemporaryDirectory() as folder:
        tasks = ",".join(f"./task{node}" for node in range(1, clients + 1))
        run = Run(Settings.parse({"model": "twenty_million", "tasks": tasks, "rounds": 2, "run-dir": folder}))
        strategy = AtmStrategy(run, dict(enumerate(run.settings.party_names, 1)))
        strategy.start(StreamingGrid(InProcessGrid(app, clients, {})), strategy.arrays(), 2)
    watch.ended.set()
    watch.join()
    print(run.layout.size, watch.pages * os.sysconf("SC_PAGESIZE") / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, help="internal: measure this count in this process")
    args = parser.parse_args()
    if args.clients:
        return peak(args.clients)
    peaks = {}
    for count in COUNTS:
        command = [sys.executable, __file__, "--clients", str(count)]
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout
        elements, peaks[count] = map(float, output.split()[-2:])
        print(f"{count:3} clients, vectors of {elements:,.0f} elements: peak {peaks[count]:.0f} MiB")
    print(f"ratio {peaks[COUNTS[1]] / peaks[COUNTS[0]]:.3f}")


if __name__ == "__main__":
    main()
