"""The mod of a ClientApp that sends the task vector by a codec instead of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor

from atm_fl.codecs import CODECS, Arrays, Codec, make_codec
from atm_fl.errors import SettingError
from atm_fl.flower.entries import AVERAGED, Entries
from atm_fl.models.buffers import BUFFERS, take_buffers
from atm_fl.options import read_choice
from atm_fl.seeds import derive_seed

WIRE = "atm-fl"
"""The ConfigRecord of an encoded reply, and a client's ArrayRecord of what its codec lost."""


class Wire:
    """A codec for the entries of anyone's model: the task vector encoded, the averaged entries as they are.

    SettingError if there is no such codec.
    """

    def __init__(self, codec: str) -> None:
        self.codec: Codec = make_codec(codec)
        self.name = str(read_choice("codec", codec, CODECS))

    def check(self, entries: Entries) -> None:
        """SettingError if the codec cannot hold the entries."""
        if entries.dtype != torch.float32:
            raise SettingError(
                f"codec={self.name!r}: codecs are of float32, and the model has float64 entries; convert them, or "
                "leave the codec out"
            )

    def about(self, entries: Entries) -> dict[str, str]:
        """What an encoded reply says of itself."""
        return {"codec": self.name, "layout": entries.layout.digest}

    def encode(self, vector: Tensor, buffers: Tensor, entries: Entries, seed: int) -> Arrays:
        """The arrays of a task vector [n] and the averaged entries [b]. ValueError if a value is not finite."""
        arrays = dict(self.codec.encode(vector, entries.merged, seed))
        return arrays | ({BUFFERS: buffers.numpy()} if len(buffers) else {})

    def decode(self, arrays: Arrays, entries: Entries) -> Tensor:
        """Vector and averaged entries, [n + b]. ValueError if the arrays are none."""
        buffers = take_buffers(arrays, entries.averaged)
        return torch.cat([self.codec.decode(arrays, entries.merged), buffers])


def encoded(codec: str, *, averaged: Sequence[str] = AVERAGED, seed: int = 0) -> Mod:
    """A mod that sends a train reply's task vector by a codec, not its weights: `ClientApp(mods=[encoded("int8")])`.

    The app goes on to receive and to return weights. The server says the same: `TaskVectorStrategy(codec="int8")`.
    Put it first in `mods`: those behind it see weights. What a sparse codec leaves out stays in the context's state,
    and is added to the next vector.

    codec: as the setting `codec-up`, "topk:density=0.05". averaged: as the strategy's. seed: of codecs that round at
    random, with the round and the client.

    SettingError if there is no such codec.
    """
    wire = Wire(codec)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.partition(".")[0] != "train":
            return call_next(message, context)
        sent = _only(message, "message")[1]
        entries = Entries.of(sent, averaged)
        wire.check(entries)
        base, size = entries.flat(sent), entries.merged.size
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        key, trained = _only(reply, "reply")
        weights = entries.flat(trained)
        vector = weights[:size] - base[:size]
        residual = context.state.array_records.get(WIRE)
        if wire.codec.error_feedback and residual is not None and (kept := residual["residual"].numpy()).size == size:
            vector += torch.from_numpy(np.array(kept))
        arrays = wire.encode(vector, weights[size:], entries, _seed(seed, message, context))
        if wire.codec.error_feedback:
            lost = vector - wire.codec.decode({k: v for k, v in arrays.items() if k != BUFFERS}, entries.merged)
            context.state[WIRE] = ArrayRecord({"residual": Array(lost.numpy())})
        reply.content[key] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        reply.content[WIRE] = ConfigRecord(wire.about(entries))  # type: ignore[arg-type]
        return reply

    return mod


def _only(message: Message, which: str) -> tuple[str, ArrayRecord]:
    """The key and record of the arrays."""
    records = message.content.array_records
    if len(records) != 1:
        raise ValueError(f"a {which} with {len(records)} ArrayRecords, where one holds the weights")
    return next(iter(records.items()))


def _seed(seed: int, message: Message, context: Context) -> int:
    rounds = [record["server-round"] for record in message.content.config_records.values() if "server-round" in record]
    node = context.node_config.get("partition-id", context.node_id)
    return derive_seed(seed, "codec", node, *rounds)
