"""The ClientApp: one party's answers to the server's roll call, train and evaluate messages."""

from __future__ import annotations

from functools import lru_cache

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from atm_fl import codecs
from atm_fl.errors import SettingError
from atm_fl.party import Party
from atm_fl.settings import Settings
from clients.mods import named_errors

app = ClientApp(mods=[named_errors])


@lru_cache(maxsize=64)
def _party(settings: Settings, task: str, name: str) -> Party:
    return Party(settings, task, name)


def party_of(context: Context) -> Party:
    """The party behind this node, kept for the life of the process.

    In deployment `node-config` says it: task="mnist", or data="/path" (a folder of images) with an optional task for
    its name. In simulation, partition i holds the i-th of the setting `tasks`.
    """
    settings, node = Settings.parse(context.run_config), context.node_config
    if "task" in node or "data" in node:
        return _party(settings, str(node.get("data", node.get("task"))), str(node.get("task", "")))
    if "partition-id" not in node:
        raise SettingError(
            "this SuperNode has no task; start it with --node-config 'task=\"NAME\"' or 'data=\"/path\"'"
        )
    partition, names = int(node["partition-id"]), settings.task_names
    if partition >= len(names):
        raise SettingError(f"partition {partition} has no task: tasks={settings.tasks!r} names only {len(names)}")
    return _party(settings, names[partition], "")


def received_base(message: Message, party: Party) -> Tensor:
    """The base model in a message, float32 [n]. ValueError if it does not fit this party's model."""
    info = message.content.config_records["info"]
    if info["layout"] != party.model.layout.digest:
        raise ValueError(
            f"the server's base has layout {info['layout']!s}, this party's model {party.model.layout.digest}"
        )
    arrays = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
    return codecs.decode(arrays, str(info["codec"]), party.model.layout.size)


def reply(message: Message, party: Party, metrics: dict[str, float], vector: Tensor | None = None) -> Message:
    """A reply with numbers, who sends it, and a task vector if there is one."""
    base = message.content.config_records["info"].get("base", "")
    content = RecordDict(
        {
            "metrics": MetricRecord(metrics),  # type: ignore[arg-type]
            "info": ConfigRecord(
                {"task": party.task, "codec": codecs.FP32, "layout": party.model.layout.digest, "base": base}
            ),
        }
    )
    if vector is not None:
        content["arrays"] = ArrayRecord({name: Array(array) for name, array in codecs.encode(vector).items()})
    return Message(content, reply_to=message)


@app.query()
def roll_call(message: Message, context: Context) -> Message:
    """Load the data, make the head, and say which task this is: what can fail does so before the first round."""
    party = party_of(context)
    return reply(message, party, {"images": len(party.data.train.labels)})


@app.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate the received base, tune it, and return the task vector."""
    party = party_of(context)
    round_number = int(message.content.config_records["info"]["round"])  # type: ignore[arg-type]
    update = party.train(received_base(message, party), round_number)
    metrics = {f"evaluation.{name}": value for name, value in update.evaluation.items()}
    metrics |= {f"tuning.{name}": value for name, value in update.tuning.items()}
    return reply(message, party, metrics, update.vector)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received base on the validation and test splits."""
    party = party_of(context)
    accuracies = party.evaluate(received_base(message, party), ("validation", "test"))
    return reply(message, party, {f"evaluation.{name}": value for name, value in accuracies.items()})
