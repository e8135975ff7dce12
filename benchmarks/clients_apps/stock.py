"""FedAvg as Flower's own templates have it, on the work of benchmarks/clients.py: the same model, data and steps.

A process keeps its parties' pictures and heads, however many. A round evaluates the base on validation and tunes it, as
ours does.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from party import party

from atm_fl.federation.shared_model import shared_model
from atm_fl.settings import Settings

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of FedAvg; a line with the time in `marks` whenever one is merged."""
    config, parties = context.run_config, int(context.run_config["parties"])
    model = shared_model(Settings().of_model())

    class Marked(FedAvg):
        def aggregate_train(self, *args):  # type: ignore[no-untyped-def]
            merged = super().aggregate_train(*args)
            with open(str(config["marks"]), "a") as file:
                file.write(f"{time.time()}\n")
            return merged

    strategy = Marked(fraction_evaluate=0.0, min_train_nodes=parties, min_available_nodes=parties)
    first = ArrayRecord({name: entry.clone() for name, entry in model.layout.views(model.pretrained).items()})
    strategy.start(grid, first, int(config["rounds"]))


@client.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate and tune the state dict that came."""
    folder = str(context.run_config["tasks"]).split(",")[int(context.node_config["partition-id"])]
    settings = replace(Settings(), batch_size=int(context.run_config["batch-size"]))
    state = message.content["arrays"].to_torch_state_dict()
    base = torch.cat([entry.reshape(-1) for entry in state.values()])
    number = int(message.content["config"]["server-round"])
    vector, tuned, validation = party(folder, settings).tune(base, settings, number)
    views = shared_model(settings.of_model()).layout.views(base + vector)
    content = {
        "arrays": ArrayRecord({name: entry.clone() for name, entry in views.items()}),
        "metrics": MetricRecord({"num-examples": tuned.images, "loss": tuned.loss, "validation": validation}),
    }
    return Message(RecordDict(content), reply_to=message)
