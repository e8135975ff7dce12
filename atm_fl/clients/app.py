"""The ClientApp: one party's answers to the server's roll call, train and evaluate messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain
from logging import WARNING
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from torch import Tensor

from atm_fl import tasks, vectors
from atm_fl.clients import secure
from atm_fl.clients.kept import KeptParties
from atm_fl.clients.mods import NamedErrors
from atm_fl.codecs import Arrays, make_codec
from atm_fl.errors import RunError, SettingError, printable
from atm_fl.federation.bounds import check_base
from atm_fl.federation.client import Party
from atm_fl.federation.client_state import ClientState
from atm_fl.models.buffers import take_buffers
from atm_fl.policy import Policy, policy_of
from atm_fl.privacy.budget import Account
from atm_fl.settings import Settings
from atm_fl.vectors.npy import read_arrays

app = NamedErrors()


def _made(settings: Settings, policy: Policy, task: str, name: str, client: str = "") -> Party:
    account = Account(lifetime=policy.lifetime_epsilon, delta=policy.delta or 1e-5)
    party = Party(settings, task, name, client, account)
    if policy.noise and party.budget.noise < policy.noise:
        raise RunError(
            f"{party.task}: refused by this party's policy, noise={policy.noise:g}: the run's noise multiplier is "
            f"{party.budget.noise:.3g}"
        )
    return party


_parties = KeptParties(_made)


@lru_cache(maxsize=4, typed=True)
def _parsed(*config: Any) -> Settings:
    return Settings.parse(dict(zip(config[::2], config[1::2], strict=True)))


def settings_of(context: Context) -> Settings:
    """The run's settings, checked once in a process: of many parties that takes as long as a short round."""
    return _parsed(*chain.from_iterable(context.run_config.items()))


def party_of(context: Context) -> Party:
    """The party behind this node, kept in this process as long as there is room (`kept.MOST`).

    In deployment `node-config` says it: task="mnist", or data="/path" (a folder) or data="hf:OWNER/NAME" with an
    optional task for its name. In simulation, partition i holds the i-th of the setting `tasks`. RunError, before any
    data are read, for a run that its `trusted-parties` rules out.
    """
    settings, node = settings_of(context), context.node_config
    policy = policy_of(node)
    if policy.apps and not node.get("apps-checked"):
        raise RunError(
            "this party's policy has the rule apps, which its SuperNode does not keep; start it as python -m "
            "atm_fl.clients.supernode"
        )
    secure.check(settings, secure.trusted(context))
    if "task" in node or "data" in node:
        data, name = str(node.get("data", node.get("task"))), tasks.called(str(node.get("task", "")))
        held = name or tasks.called(data)
        policy.check(settings, held)
        policy.check_imports(settings, held)
        return _parties(settings, policy, data, name)
    if "partition-id" not in node:
        raise SettingError(
            "this SuperNode has no task; start it with --node-config 'task=\"NAME\"' or 'data=\"/path\"'"
        )
    partition, names = int(node["partition-id"]), settings.task_names
    if partition >= len(names):
        raise SettingError(f"partition {partition} has no task: tasks={settings.tasks!r} names only {len(names)}")
    policy.check(settings, settings.client_tasks[partition])
    return _parties(settings, policy, names[partition], "", settings.party_names[partition])


def check_plugins(settings: Settings, said: Mapping[str, object]) -> None:
    """RunError if a plugin that server and parties run is another one here than at the server.

    said: "codec 'sign'" → digest, as the server tells. It can tell what it likes: nothing is loaded for it, and what
    this party has it had before. So this finds a forgotten upgrade, before the first round, and no hostile server.
    """
    ours = settings.plugins(of_all=True)
    for thing in (*ours, *said):
        here, there = ours.get(thing), said.get(thing)
        if there != (here.digest if here else None):
            server = printable(there, 80) if isinstance(there, str) else "no plugin"
            raise RunError(
                f"the {printable(thing, 80)} is {here or 'no plugin'} here, and {server} at the server; have the same "
                "file on both"
            )


def update_limit(settings: Settings, context: Context) -> float:
    """How far this node lets the base move from one message to the next; 0: anywhere.

    Its own policy's or `node-config`'s, which no server decides, goes before the run's.
    """
    limit = policy_of(context.node_config).max_update_norm or settings.max_update_norm
    return float(context.node_config.get("max-update-norm", limit))


def received_base(message: Message, party: Party, limit: float = 0.0) -> Tensor | None:
    """The base model that a message makes known, float32 [n]: its own, or the one before plus the message's step.

    The one before is the kept one, or the pretrained model. None if it is neither, or the sum is not the server's to
    the last bit. The base is kept for the next step, unless this is the message that ends the run. ValueError for a
    message that does not fit this party's model; RunError for a base that moved further than `limit` allows.
    """
    info, model, down = message.content.config_records["info"], party.model, party.settings.codec_down
    layout = model.base_layout
    if info["layout"] != layout.digest:
        raise ValueError(f"the server's base has layout {info['layout']!s}, this party's model {layout.digest}")
    digest, before = str(info["base"]), str(info["from"])
    expected = down if before else "fp32"
    if info["codec"] != expected:
        raise ValueError(f"the server's base came by codec {info['codec']!s}, not {expected}")
    contents = {name: array.data for name, array in message.content.array_records["arrays"].items()}
    arrays = read_arrays(contents, layout.size)
    kept = ClientState(str(info["run"]), party.client)
    if not before:
        base = make_codec(expected).decode(arrays, layout)
    else:
        stored = kept.base(before)
        base = model.pretrained.clone() if stored is None else stored
        if len(base) != layout.size:
            return None
        if arrays:
            parameters, buffers = base.split([model.layout.size, model.shared_buffers.size])
            buffers.copy_(take_buffers(arrays, model.shared_buffers))
            make_codec(expected).add(arrays, model.layout, parameters)
    if vectors.digest(base) != digest:
        if before:
            return None
        raise ValueError("the server's base is not the one that its digest says")
    last = message.metadata.message_type == "evaluate"
    if limit:
        held = kept.held()
        sent_before = party.model.pretrained if held is None else held
        try:
            check_base(party.task, base, limit, sent_before, "pretrained one" if held is None else "one before")
            # Else many small steps, in messages that are no rounds, would lead anywhere. The share is for rounding.
            most = limit * party.settings.rounds * (1 + 1e-6)
            check_base(
                party.task, base, most, party.model.pretrained, f"pretrained one after {party.settings.rounds} rounds"
            )
        except RunError as error:
            log(WARNING, "%s", error)
            raise
    if last:
        kept.take_secret()  # of a round that this party dropped out of
    if limit or (party.settings.downlink and not last):
        kept.save_base(base, digest)  # with a limit also the last: the run may be resumed
    elif last:
        kept.drop_base()
    return base


def reply(
    message: Message,
    context: Context,
    party: Party,
    metrics: dict[str, float],
    arrays: Arrays | None = None,
    needs_base: bool = False,
) -> Message:
    """A reply with the numbers that this party tells, who sends it, and a task vector's arrays if there are some.

    Or the wish for the base.
    """
    metrics = policy_of(context.node_config).told(metrics)
    base = message.content.config_records["info"].get("base", "")
    info = {
        "task": party.task,
        "codec": party.settings.uplink_name,
        "layout": party.model.base_layout.digest,
        "base": base,
    }
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
    """Compare plugins, load the data, make the head, and say which task this is: what can fail does so before the first
    round."""
    said = message.content.config_records.get("plugins")
    if said is not None:  # an older server says nothing
        check_plugins(settings_of(context), said)
    party = party_of(context)
    return reply(message, context, party, {"images": len(party.data.train.labels)})


@app.query("keys")
def secure_keys(message: Message, context: Context) -> Message:
    """Secure aggregation: this round's public keys."""
    return secured(message, context, "keys", secure.keys)


@app.query("shares")
def secure_shares(message: Message, context: Context) -> Message:
    """Secure aggregation: this party's secrets, shared among the others and sealed."""
    return secured(message, context, "shares", secure.shares)


@app.query("confirm")
def secure_confirm(message: Message, context: Context) -> Message:
    """Secure aggregation: whose shares this party has."""
    return secured(message, context, "confirm", secure.confirm)


@app.query("sign")
def secure_sign(message: Message, context: Context) -> Message:
    """Secure aggregation: this party's signature on what is to be unmasked."""
    return secured(message, context, "sign", secure.sign)


@app.query("unmask")
def secure_unmask(message: Message, context: Context) -> Message:
    """Secure aggregation: what takes the masks off the sum."""
    return secured(message, context, "unmask", secure.reveal)


def secured(
    message: Message, context: Context, name: str, step: Callable[[Message, Party, Mapping[str, bytes]], ConfigRecord]
) -> Message:
    """A reply with a record of secure aggregation, which is what `step` returns."""
    party = party_of(context)
    record = step(message, party, secure.trusted(context))
    answer = reply(message, context, party, {})
    answer.content[name] = record
    return answer


@app.train()
def train(message: Message, context: Context) -> Message:
    """Evaluate the received base, tune it, and return the task vector."""
    party, info = party_of(context), message.content.config_records["info"]
    number = int(info["round"])  # type: ignore[arg-type]
    if not 1 <= number <= party.settings.rounds:
        raise RunError(f"{party.task} refuses round {number} of a run of rounds={party.settings.rounds}")
    begin = time.perf_counter()
    base = received_base(message, party, update_limit(party.settings, context))
    if base is None:
        return reply(message, context, party, {}, needs_base=True)
    seconds = time.perf_counter() - begin
    update = party.train(base, number, str(info["run"]))
    if party.settings.secure_aggregation and update.arrays:
        secure.mask(message, party, secure.trusted(context), update.arrays["words"])
    metrics = {f"evaluation.{name}": value for name, value in update.evaluation.items()}
    metrics |= {f"tuning.{name}": value for name, value in update.tuning.items()}
    return reply(message, context, party, metrics | {"tuning.seconds_receive": seconds}, update.arrays)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received base on the validation and test splits."""
    party = party_of(context)
    base = received_base(message, party, update_limit(party.settings, context))
    if base is None:
        return reply(message, context, party, {}, needs_base=True)
    info = message.content.config_records["info"]
    after = party.context(int(info["round"]) + 1, str(info["run"]))  # type: ignore[arg-type]
    accuracies = party.evaluate(base, ("validation", "test"), after, end=True)
    return reply(message, context, party, {f"evaluation.{name}": value for name, value in accuracies.items()})
