"""Task vectors, steps and bases ↔ the few arrays that travel. docs/wire.md has the table of codecs.

A codec is a name, with options where it has any, as in `int8`, `int4:block=128`, `topk:density=0.05`. Codecs that round
at random are unbiased: their errors average out over clients and rounds. With those that leave something out
(`error_feedback`) nothing is lost for good: the sender keeps what the encoding lost, the residual, and adds it to its
next vector.

Every decoder is made of additions and multiplications of single elements in a fixed order, so that arrays decode to the
same bits on every machine and with any number of threads; a server and its clients rely on it.
"""

from __future__ import annotations

from atm_fl.codecs.codec import CODECS, Arrays, Codec, codec, size_of
from atm_fl.codecs.floats import Bf16, Fp16, Fp32, exponent, half, lowered
from atm_fl.codecs.integers import (
    Int4,
    Int4Nearest,
    Int8,
    Int8Nearest,
    Integers,
    Ternary,
    entropy_decode,
    entropy_encode,
    filled,
)
from atm_fl.codecs.low_rank import LowRank
from atm_fl.codecs.sparse import TopK, largest_elements, pack_positions, unpack_positions
from atm_fl.errors import SettingError
from atm_fl.options import read_choice

__all__ = [
    "CODECS",
    "Arrays",
    "Bf16",
    "Codec",
    "Fp16",
    "Fp32",
    "Int4",
    "Int4Nearest",
    "Int8",
    "Int8Nearest",
    "Integers",
    "LowRank",
    "Ternary",
    "TopK",
    "codec",
    "entropy_decode",
    "entropy_encode",
    "exponent",
    "filled",
    "half",
    "largest_elements",
    "lowered",
    "make_codec",
    "pack_positions",
    "size_of",
    "unpack_positions",
]


def make_codec(text: str, setting: str = "codec") -> Codec:
    """The codec that `text` says, as `topk:density=0.05`. SettingError, naming `setting`, if there is no such codec."""
    choice = read_choice(setting, text, CODECS)
    try:
        return CODECS[choice.name](**choice.values)
    except ValueError as error:
        raise SettingError(f"{setting}={text!r}: {error}") from None
