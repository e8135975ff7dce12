"""The one model of a process, shared by every party and round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

from atm_fl import models, vectors
from atm_fl.errors import SettingError
from atm_fl.models.buffers import Buffers, measured, shared_buffers
from atm_fl.models.trainable import Lora, set_trainable, shared_and_private
from atm_fl.privacy.dp_sgd import tune_privately
from atm_fl.privacy.noise import Noise
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tasks import Split
from atm_fl.training.ewc import Memory
from atm_fl.training.local import State, Tuned, task_vector, tune


class SharedModel:
    """The one backbone of a process, reused in place by every party and round; its entries are one flat tensor.

    SettingError if the device is not there, or the backbone has no such entries to train.
    """

    def __init__(self, settings: Settings) -> None:
        self.device = find_device(settings.device)
        self.module = models.load_backbone(settings.model, settings.weights)
        self.digest = vectors.digest(*vectors.shared_entries(self.module).values(), *measured(self.module).values())
        """Of the whole pretrained backbone."""
        set_trainable(self.module, settings.trainable)
        self.layout, self.private = shared_and_private(self.module, settings.private)
        """Of a task vector: the entries that are tuned and merged; and those that each party keeps."""
        self.shared_buffers = shared_buffers(self.module, settings.buffers)
        self.base_layout = self.layout + self.shared_buffers
        self.pretrained = self.base_layout.flatten(self.module)
        self.module.to(self.device)
        self.buffers = Buffers(self.module)
        for name, value in (
            ("precision", models.PRECISIONS[settings.precision]),
            ("channels_last", settings.channels_last),
        ):
            if hasattr(self.module, name):  # `check_model` refuses what a model has not
                setattr(self.module, name, value)
        tuned = self.layout + self.private
        self._first = self.private.views(self.private.flatten(self.module)) if self.private.names else {}
        self.flat: nn.Parameter = vectors.bind(self.module, tuned)
        """All that is tuned: the shared entries, and behind them the private ones."""
        self.shared, self.own = (
            _part(self.flat, part) for part in self.flat.split([self.layout.size, self.private.size])
        )
        lora = settings.trainable == "lora"
        self.lora = Lora(self.module, tuned, settings.lora_rank, settings.lora_alpha) if lora else None
        if settings.gradient_checkpointing:
            self.module.checkpoint_gradients()
        if settings.compile:
            getattr(self.module, "compile_passes", self.module.compile)()

    def load(self, base: Tensor, private: Mapping[str, Tensor] | None = None) -> None:
        """Set the model to `base`, float32 [of `base_layout`], and what a party keeps of it to its own.

        private: its entries and buffers by name; without one it is the pretrained one. Whatever else another party's
        passes have left in the model is gone. RuntimeError if the base has another size.
        """
        own = dict(private or {})
        parameters, measurements = base.split([self.layout.size, self.shared_buffers.size])
        self.shared.data.copy_(parameters)
        for name, entry in self.private.views(self.own.data).items():
            entry.copy_(own.pop(name, self._first[name]))
        self.buffers.reset()
        self.buffers.load(self.shared_buffers.views(measurements))
        self.buffers.load(own)
        if self.lora:
            self.lora.reset()

    def private_entries(self) -> dict[str, Tensor]:
        """The private entries as they are now, by name: copies, float32, on the CPU."""
        values = self.own.detach().cpu().clone()
        if self.lora:
            values += self.lora.vector()[self.layout.size :].cpu()
        return {name: entry.clone() for name, entry in self.private.views(values).items()}

    def flat_buffers(self) -> Tensor | None:
        """The shared buffers as they are now, float32 [b] on the CPU; None if there are none."""
        state = self.buffers.state()
        shared = [state[name].reshape(-1) for name in self.shared_buffers.names]
        return torch.cat(shared) if shared else None

    def tune(
        self,
        base: Tensor,
        head: models.TaskHead,
        data: Split,
        settings: Settings,
        seed: int,
        epoch_chunk: int = 0,
        noise: Noise | None = None,
        state: State | None = None,
        last_step: Tensor | None = None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tuned]:
        """Tune `base`, which is loaded, on `data`: (the task vector, float32 [n] on the CPU, what was done).

        The private entries are tuned with it. With `noise` they are held where they are, and the shared ones are tuned
        by DP-SGD that draws it. state: as `training.local.tune` takes and leaves it. last_step: the
        federation's, float32 [n]; not with LoRA. memory: of all that is tuned, on the device; neither with LoRA nor
        with noise.
        """
        if self.lora:
            self.lora.reset(derive_seed(seed, "lora"))
        flat = self.lora.flat if self.lora else self.flat
        last_step = None if last_step is None else last_step.to(self.device)
        with own_draws(self.device, derive_seed(seed, "passes")):
            if noise is None:
                tuned = tune(self.module, head, flat, data, settings, seed, epoch_chunk, state, last_step, memory)
            else:
                flat = flat if self.lora else self.shared
                layout = vectors.Layout.of(self.module) if self.lora else self.layout
                tuned = tune_privately(self.module, head, flat, layout, data, settings, noise, state, last_step)
        before = base[: self.layout.size].to(self.device)
        vector = self.lora.vector()[: self.layout.size] if self.lora else task_vector(self.shared, before)
        return vector.cpu(), tuned

    def tune_private(
        self, head: models.TaskHead, data: Split, settings: Settings, seed: int, epoch_chunk: int, state: State
    ) -> Tuned:
        """Tune the private entries alone, without noise, and hold the shared ones where they are."""
        with own_draws(self.device, derive_seed(seed, "passes")):
            return tune(self.module, head, self.own, data, settings, seed, epoch_chunk, state)


def _part(flat: nn.Parameter, part: Tensor) -> nn.Parameter:
    """A parameter that is a `part` of a flat one, in the same memory, its gradient too: an optimizer moves it alone."""
    assert flat.grad is not None
    values = nn.Parameter(part.detach())
    begin = part.storage_offset()
    values.grad = flat.grad[begin : begin + len(part)]
    return values


@contextmanager
def own_draws(device: torch.device, seed: int) -> Iterator[None]:
    """What passes draw from torch's own generators in the body (dropout) derives from `seed`, and moves no other's."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or the CPU without one. SettingError if it is not there."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device={name!r} cannot be used here: {error}") from error
    return device


@lru_cache(maxsize=1)
def shared_model(settings: Settings) -> SharedModel:
    """The process's model, loaded once. settings: of_model()."""
    return SharedModel(settings)
