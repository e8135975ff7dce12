"""FedAvg by BlazeFL's server on the work of benchmarks/clients.py: its pool of threads, of which there is one.

What a client does BlazeFL leaves to whoever uses it: here the same steps as ours, on the process's one model.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from blazefl.contrib.fedavg import FedAvgBaseServerHandler, FedAvgDownlinkPackage, FedAvgUplinkPackage
from blazefl.core import ThreadPoolClientTrainer
from clients_apps.party import party

from atm_fl.models import load_backbone
from atm_fl.settings import Settings


class Selector:
    """The server's model."""

    def select_model(self, model_name: str) -> Any:
        return load_backbone(model_name)


class Clients(ThreadPoolClientTrainer[FedAvgUplinkPackage, FedAvgDownlinkPackage]):
    """All parties, one after the other."""

    def __init__(self, folders: list[str], settings: Settings) -> None:
        self.folders, self.settings, self.number = folders, settings, 0
        self.num_parallels, self.device, self.device_count = 1, "cpu", 0
        self.cache: list[FedAvgUplinkPackage] = []
        self.stop_event = threading.Event()

    def worker(self, cid: int, device: str, payload: Any, stop_event: threading.Event) -> FedAvgUplinkPackage:
        """A party's work of a round."""
        base = payload.model_parameters
        vector, tuned, validation = party(self.folders[cid], self.settings).tune(base, self.settings, self.number)
        metrics = {"loss": tuned.loss, "validation": validation}
        return FedAvgUplinkPackage(cid, base + vector, tuned.images, metrics)

    def uplink_package(self) -> list[FedAvgUplinkPackage]:
        """The replies of a round, which are forgotten here."""
        packages, self.cache = self.cache, []
        return packages


def run(folders: list[str], settings: Settings, marks: Path) -> None:
    """`rounds` of all parties; a line with the time in `marks` whenever one is merged."""
    clients, selector, data = Clients(folders, settings), Selector(), None  # type: ignore[abstract]
    server = FedAvgBaseServerHandler(
        selector, settings.model, data, settings.rounds, len(folders), 1.0, "cpu", settings.batch_size, seed=0
    )
    while not server.if_stop():
        clients.number += 1
        clients.local_process(server.downlink_package(), server.sample_clients())
        for package in clients.uplink_package():
            server.load(package)
        with marks.open("a") as file:
            file.write(f"{time.time()}\n")
