"""FedAvg as Flower's own templates have it, on the work of benchmarks/clients.py: the same model, data and steps.

A process keeps its parties' pictures and heads, however many. A round evaluates the base on validation and tunes it, as
ours does.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from atm_fl import tasks
from atm_fl.federation.heads import kept_head
from atm_fl.federation.shared_model import SharedModel, shared_model
from atm_fl.models import Head
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tasks import Dataset
from atm_fl.training.evaluation import accuracy, classified_rightly

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of FedAvg; a line with the time in `marks` whenever one is merged."""
    config, parties = context.run_config, int(context.run_config["parties"])
    layout, base = SharedModel(Settings()).layout, SharedModel(Settings()).pretrained

    class Marked(FedAvg):
        def aggregate_train(self, *args):  # type: ignore[no-untyped-def]
            merged = super().aggregate_train(*args)
            with open(str(config["marks"]), "a") as file:
                file.write(f"{time.time()}\n")
            return merged

    strategy = Marked(fraction_evaluate=0.0, min_train_nodes=parties, min_available_nodes=parties)
    first = ArrayRecord({name: entry.clone() for name, entry in layout.views(base).items()})
    strategy.start(grid, first, int(config["rounds"]))


@cache
def party(folder: str) -> tuple[Dataset, Head]:
    """A party's data and its head."""
    torch.set_num_threads(1)
    settings, model = Settings(), shared_model(Settings())
    data = tasks.load(folder)
    return data, kept_head(settings, data, model, Path(folder).name)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate and tune the state dict that came."""
    folder = str(context.run_config["tasks"]).split(",")[int(context.node_config["partition-id"])]
    (data, head), settings, model = party(folder), Settings(), shared_model(Settings())
    state = message.content["arrays"].to_torch_state_dict()
    base = torch.cat([entry.reshape(-1) for entry in state.values()])
    model.load(base)
    validation = accuracy(classified_rightly(model.module, head, data.validation, 0))
    seed = derive_seed(0, "tune", data.name, int(message.content["config"]["server-round"]))
    vector, tuned = model.tune(base, head, data.train, settings, seed)
    content = {
        "arrays": ArrayRecord({name: entry.clone() for name, entry in model.layout.views(base + vector).items()}),
        "metrics": MetricRecord({"num-examples": tuned.images, "loss": tuned.loss, "validation": validation}),
    }
    return Message(RecordDict(content), reply_to=message)
