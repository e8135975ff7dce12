"""The way of a task vector from a client's optimizer to the merge, and the one place that has its order.

    client          chosen.client …  [bounds]  wire.encode ─┐      [bounds]: under secure aggregation here,
    server   ┌─ wire.decode  … chosen.server  [bounds]  ◄───┘      where single vectors are seen last
             └─ sum  noise.total  chosen.total … ─► merge

chosen: the setting `transforms`, at the server in reverse order, so that one can undo at one end what it does at the
other. bounds: `task-scaling`, then `dp-client-clip`. Whatever a run chooses comes before the bounds, and after the
noise: what client-level DP promises holds for any choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atm_fl.codecs import Arrays
from atm_fl.errors import RunError
from atm_fl.models.buffers import BUFFERS
from atm_fl.privacy.client_level import Clip, Noise
from atm_fl.settings import Settings
from atm_fl.transforms import Context, Transform, make_transforms
from atm_fl.transforms.task_scaling import TaskScaling
from atm_fl.transforms.wire import CodecWire, RingWire
from atm_fl.vectors.finite import check_finite


class Chain:
    """The transforms of one run in their order, for both ends of the wire."""

    def __init__(self, settings: Settings) -> None:
        self.chosen = make_transforms(settings.transforms)
        self.bounds: list[Transform] = [TaskScaling(settings.task_scalings)]
        self.totals = [transform for transform in self.chosen if transform.has("total")]
        """Those that have a say on the sum."""
        if settings.dp_client_clip:
            self.bounds.append(Clip(settings.dp_client_clip))
        if settings.dp_client_noise:
            self.totals.insert(0, Noise(settings.dp_client_noise, settings.dp_client_clip))
        self.codec = CodecWire(settings.uplink)
        self.ring = RingWire(settings.ring) if settings.secure_aggregation else None
        """Instead of the codec, under secure aggregation."""

    def encode(self, vector: Tensor, context: Context, buffers: Tensor | None = None) -> Arrays:
        """Client: a task vector, float32 [n], which may be changed, as it travels. RunError if it can't.

        buffers: the shared ones, float32 [b]; they go as they are, but under secure aggregation, behind the vector.
        """
        for transform in self.chosen:
            vector = _fitting(transform, transform.client(vector, context), context)
        for bound in self.bounds if self.ring else ():
            vector = bound.client(vector, context)
        try:
            if self.ring:
                return self.ring.encode(vector if buffers is None else torch.cat([vector, buffers]), context)
            if buffers is None:
                return self.codec.encode(vector, context)
            check_finite(buffers)
            return self.codec.encode(vector, context) | {BUFFERS: buffers.numpy()}
        except ValueError as error:
            raise RunError(
                f"{context.task}'s task vector of round {context.round_number} has {error}; try a lower learning-rate"
            ) from error

    def decode(self, arrays: Arrays, context: Context, room: Tensor | None = None) -> Tensor:
        """Server: the vector that arrived, float32 [n], perhaps in `room`. ValueError if it is none."""
        vector = self.codec.decode(arrays, context.layout, room)
        for transform in reversed(self.chosen):
            if transform.has("server"):
                vector = _fitting(transform, transform.server(vector, context), context)
                check_finite(vector)
        return vector

    def bound(self, vector: Tensor, context: Context) -> Tensor:
        """Server: a decoded vector, which may be changed, as it may enter the merge."""
        for bound in self.bounds:
            vector = bound.server(vector, context)
        return vector

    def total(self, scaled: Tensor, factor: float, context: Context) -> Tensor:
        """Server: `factor` times the vectors' sum, [n], which may be changed, as the merge gets it."""
        for transform in self.totals:
            scaled = _fitting(transform, transform.total(scaled, factor, context), context)
        return scaled


def _fitting(transform: Transform, vector: Tensor, context: Context) -> Tensor:
    """What a hook has made. RunError if that is no vector of the model."""
    if not isinstance(vector, Tensor) or vector.dtype != torch.float32 or vector.shape != (context.layout.size,):
        made = f"{vector.dtype}{list(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        name = getattr(transform, "name", type(transform).__name__)
        raise RunError(f"the transform {name!r} has made {made}, not float32[{context.layout.size}]; fix its file")
    return vector
