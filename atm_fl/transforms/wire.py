"""The two ways over the wire: a codec's arrays for each vector, or words that are only ever read as a sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from atm_fl.codecs import Arrays, Codec
from atm_fl.transforms import Context
from atm_fl.vectors import Layout
from atm_fl.vectors.ring import Ring, check_words


@dataclass(frozen=True)
class CodecWire:
    """Arrays of `codec-up`. With error feedback a client adds what the encoding of its last vector lost."""

    codec: Codec

    def encode(self, vector: Tensor, context: Context) -> Arrays:
        """The arrays of a vector [n], which may be changed. ValueError if a value is not finite."""
        feedback = self.codec.error_feedback and context.state is not None
        residual = context.recall("residual") if feedback else {}
        if residual is None:
            context.numbers["residual_lost"] = 1
        elif residual and len(residual["vector"]) == len(vector):
            vector.add_(residual["vector"])
        arrays = self.codec.encode(vector, context.layout, context.seed("codec"))
        if feedback:
            context.keep("residual", {"vector": vector.sub_(self.codec.decode(arrays, context.layout))})
        return arrays

    def decode(self, arrays: Arrays, layout: Layout, room: Tensor | None = None) -> Tensor:
        """As `Codec.decode`."""
        return self.codec.decode(arrays, layout, room)


@dataclass(frozen=True)
class RingWire:
    """Words of secure aggregation's ring, which a client masks and a server adds up."""

    ring: Ring

    def encode(self, vector: Tensor, context: Context) -> Arrays:
        """The words of a vector [n]. ValueError if a value is not finite or beyond the ring's reach."""
        return {"words": self.ring.encode(vector)}

    def words(self, arrays: Arrays, layout: Layout) -> np.ndarray:
        """The words [n] that arrived, masked or not. ValueError if they are none."""
        if set(arrays) != {"words"}:
            raise ValueError(f"arrays {sorted(arrays)} where ['words'] was expected")
        check_words(arrays["words"], layout.size)
        return arrays["words"]
