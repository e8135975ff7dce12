"""FedAvg as Flower's own templates have it: a state dict down, a state dict up, and another one down to evaluate."""

from __future__ import annotations

import math

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from made_up import first_base, marked, shapes, step
from torch import Tensor

server = ServerApp()
client = ClientApp()


def named(flat: Tensor) -> dict[str, Tensor]:
    """A flat tensor as a state dict."""
    layout = shapes()
    parts = flat.split([math.prod(shape) for shape in layout.values()])
    return {name: entry.view(shape) for (name, shape), entry in zip(layout.items(), parts, strict=True)}


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Some rounds of FedAvg."""
    config, clients = context.run_config, int(context.run_config["clients"])
    elements = sum(map(math.prod, shapes().values()))
    strategy = marked(FedAvg)(
        fraction_evaluate=float(config["evaluate"]), min_train_nodes=clients, min_available_nodes=clients
    )
    strategy.start(grid, ArrayRecord(named(first_base(elements))), int(config["rounds"]))


@client.train()
def train(message: Message, context: Context) -> Message:
    """The state dict plus a step."""
    state = message.content["arrays"].to_torch_state_dict()
    for name, entry in named(step(int(message.content["config"]["server-round"]))).items():
        state[name] += entry
    content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 1, "loss": 0.0})}
    return Message(RecordDict(content), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Take the state dict in."""
    message.content["arrays"].to_torch_state_dict()
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "accuracy": 0.0})}), reply_to=message)
