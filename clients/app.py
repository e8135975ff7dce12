"""The ClientApp: one party's answers to the server's roll call, train and evaluate messages."""

from __future__ import annotations

import math
import time
from functools import lru_cache
from logging import WARNING

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from torch import Tensor

from atm_fl import vectors
from atm_fl.bounds import check_base
from atm_fl.codecs import Arrays, make_codec
from atm_fl.errors import RunError, SettingError
from atm_fl.kept import Kept
from atm_fl.npy import read_arrays
from atm_fl.party import Party
from atm_fl.settings import Settings
from clients import secure
from clients.mods import NamedErrors

app = NamedErrors()


@lru_cache(maxsize=64)
def _party(settings: Settings, task: str, name: str, client: str = "") -> Party:
    return Party(settings, task, name, client)


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
    return _party(settings, names[partition], "", settings.party_names[partition])


def update_limit(settings: Settings, context: Context) -> float:
    """How far this node lets the base move in a round; 0: anywhere.

    `max-update-norm` of its own `node-config`, which no server decides, goes before the run's.
    """
    own = context.node_config.get("max-update-norm", settings.max_update_norm)
    if isinstance(own, bool) or not isinstance(own, (int, float)) or not 0 <= own < math.inf:
        raise SettingError(f"max-update-norm={own!r} in this SuperNode's --node-config: it must be 0 or more")
    return float(own)


def received_base(message: Message, party: Party, limit: float = 0.0) -> Tensor | None:
    """The base model that a message makes known, float32 [n]: its own, or the one before plus the message's step.

    The one before is the kept one, or the pretrained model. None if it is neither, or the sum is not the server's to
    the last bit. The base is kept for the next step, unless this is the message that ends the run. ValueError for a
    message that does not fit this party's model; RunError for a base that moved further than `limit` allows.
    """
    info, model, down = message.content.config_records["info"], party.model, party.settings.codec_down
    if info["layout"] != model.layout.digest:
        raise ValueError(f"the server's base has layout {info['layout']!s}, this party's model {model.layout.digest}")
    digest, before = str(info["base"]), str(info["from"])
    expected = down if before else "fp32"
    if info["codec"] != expected:
        raise ValueError(f"the server's base came by codec {info['codec']!s}, not {expected}")
    contents = {name: array.data for name, array in message.content.array_records["arrays"].items()}
    arrays = read_arrays(contents, model.layout.size)
    kept = Kept(str(info["run"]), party.client)
    if not before:
        base = make_codec(expected).decode(arrays, model.layout)
    else:
        found = kept.base(before)
        base = model.pretrained.clone() if found is None else found
        if len(base) != model.layout.size:
            return None
        if arrays:
            make_codec(expected).add(arrays, model.layout, base)
    if vectors.digest(base) != digest:
        if before:
            return None
        raise ValueError("the server's base is not the one that its digest says")
    last = message.metadata.message_type == "evaluate"
    done = int(info["round"]) - (not last)  # type: ignore[arg-type]
    if limit:
        known, held = {"pretrained base": (0, party.model.pretrained)}, kept.held()
        try:
            check_base(party.task, base, done, limit, known | ({"base held": held} if held else {}))
        except RunError as error:
            log(WARNING, "%s", error)
            raise
    if last:
        kept.drop_base()
        kept.take_secret()  # of a round that this party dropped out of
    elif party.settings.downlink or limit:
        kept.save_base(base, digest, done)
    return base


def reply(
    message: Message, party: Party, metrics: dict[str, float], arrays: Arrays | None = None, needs_base: bool = False
) -> Message:
    """A reply with numbers, who sends it, and a task vector's arrays if there are some; or the wish for the base."""
    base = message.content.config_records["info"].get("base", "")
    info = {"task": party.task, "codec": party.settings.travels, "layout": party.model.layout.digest, "base": base}
    content = RecordDict(
        {
            "metrics": MetricRecord(metrics),  # type: ignore[arg-type]
            "info": ConfigRecord(info | {"needs-base": needs_base}),
        }
    )
    if arrays is not None:
        content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return Message(content, reply_to=message)


@app.query()
def roll_call(message: Message, context: Context) -> Message:
    """Load the data, make the head, and say which task this is: what can fail does so before the first round."""
    party = party_of(context)
    update_limit(party.settings, context)
    return reply(message, party, {"images": len(party.data.train.labels)})


@app.query("keys")
def secure_keys(message: Message, context: Context) -> Message:
    """Secure aggregation: this round's public keys."""
    party = party_of(context)
    return secured(message, party, "keys", secure.keys(message, party))


@app.query("shares")
def secure_shares(message: Message, context: Context) -> Message:
    """Secure aggregation: this party's secrets, shared among the others and sealed."""
    party = party_of(context)
    return secured(message, party, "shares", secure.shares(message, party))


@app.query("unmask")
def secure_unmask(message: Message, context: Context) -> Message:
    """Secure aggregation: what takes the masks off the sum."""
    party = party_of(context)
    return secured(message, party, "unmask", secure.reveal(message, party))


def secured(message: Message, party: Party, name: str, record: ConfigRecord) -> Message:
    """A reply with a record of secure aggregation."""
    answer = reply(message, party, {})
    answer.content[name] = record
    return answer


@app.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate the received base, tune it, and return the task vector."""
    party, info = party_of(context), message.content.config_records["info"]
    begin = time.perf_counter()
    base = received_base(message, party, update_limit(party.settings, context))
    if base is None:
        return reply(message, party, {}, needs_base=True)
    seconds = time.perf_counter() - begin
    update = party.train(base, int(info["round"]), str(info["run"]))  # type: ignore[arg-type]
    if party.settings.secure_aggregation and update.arrays:
        secure.mask(message, party, update.arrays["words"])
    metrics = {f"evaluation.{name}": value for name, value in update.evaluation.items()}
    metrics |= {f"tuning.{name}": value for name, value in update.tuning.items()}
    return reply(message, party, metrics | {"tuning.seconds_receive": seconds}, update.arrays)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received base on the validation and test splits."""
    party = party_of(context)
    base = received_base(message, party, update_limit(party.settings, context))
    if base is None:
        return reply(message, party, {}, needs_base=True)
    accuracies = party.evaluate(base, ("validation", "test"))
    return reply(message, party, {f"evaluation.{name}": value for name, value in accuracies.items()})
