"""How the base's steps travel to the clients: whole, or by `codec-down`."""

from __future__ import annotations

import torch
from torch import Tensor

from atm_fl.codecs import Arrays
from atm_fl.models.buffers import BUFFERS
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.vectors import Layout


class Downlink:
    """The server's sending end. The base moves by what clients will decode, so that theirs and ours stay bit-equal."""

    def __init__(self, settings: Settings, layout: Layout) -> None:
        self._settings, self._layout, self._codec = settings, layout, settings.downlink
        self.delta: Arrays | None = {} if self._codec and settings.start == "pretrained" else None
        """The base's last step as it travels; empty at the start and after a resume, where clients have the base. None
        if the whole base travels: always with codec-down=fp32, and first from another start than the pretrained."""
        self.residual: Tensor | None = None
        """What the encoding of that step lost, float32 [n], if `codec-down` has error feedback."""

    def move(self, base: Tensor, step: Tensor, round_number: int, buffers: Tensor | None = None) -> None:
        """base ← base + the round's step, both float32 [n], as the clients will decode it; `step` may be changed.

        buffers: what is behind the base's n entries from now on, float32 [b]; it travels beside the step as it is.
        """
        parameters = base[: self._layout.size]
        if buffers is not None:
            base[self._layout.size :] = buffers
        self._step(parameters, step, round_number)
        if buffers is not None and self.delta is not None:
            self.delta[BUFFERS] = buffers.numpy()

    def _step(self, base: Tensor, step: Tensor, round_number: int) -> None:
        codec = self._codec
        if codec is None:
            base.add_(step)
            return
        if self.residual is not None:
            step.add_(self.residual)
        threads = torch.get_num_threads()
        torch.set_num_threads(self._settings.threads)  # sums in another order give other bits
        self.delta = codec.encode(step, self._layout, derive_seed(self._settings.seed, "codec", round_number))
        torch.set_num_threads(threads)
        if codec.error_feedback:
            decoded = codec.decode(self.delta, self._layout)
            base.add_(decoded)
            self.residual = step.sub_(decoded)
        else:
            codec.add(self.delta, self._layout, base)
