"""Which entries of a backbone are tuned, merged and sent: all, the attention, the last blocks, or low-rank updates.

`trainable = "lora"` (Hu et al. 2022, arXiv:2106.09685): W = W₀ + (α / r) B A for every weight matrix of the blocks, of
which a client tunes B and A only. What it returns is the dense difference Δ = (α / r) B A, so that merges mean what
they say: the mean of the Δₜ = Bₜ Aₜ, not the product of the means of B and A. B and A start anew every round (B = 0, so
that Δ = 0), from the client's own seed.

peft has LoRA too, but for open_clip's fused attention it adds Δ to the weights before every pass and subtracts it
afterwards, which replaces the parameters and leaves rounding in them; a parametrization leaves W₀ alone. The tests
compare the two on a ViT of timm's.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from atm_fl.errors import SettingError
from atm_fl.vectors import Layout, bind

BLOCK = re.compile(r"\b(?:res)?blocks\.(\d+)\.")
AFTER = re.compile(r"^vit\.(norm|fc_norm|ln_post|proj|attn_pool)\b")
"""What comes after the last block in timm's and open_clip's ViTs."""


def check_trainable(trainable: str) -> None:
    """SettingError if `trainable` is none of all, attention, lora, last-1, last-2, …"""
    if trainable not in ("all", "attention", "lora") and not re.fullmatch(r"last-[1-9]\d*", trainable):
        raise SettingError(f"trainable={trainable!r}: it takes all, attention, lora, or last-K for the last K blocks")


def set_trainable(module: nn.Module, trainable: str) -> None:
    """Freeze all entries of a backbone but those that are tuned: `Layout.of` then has them alone.

    last-K: the last K blocks and what comes after them. lora: the matrices that get a low-rank update. SettingError if
    nothing is left, or the backbone has fewer blocks.
    """
    check_trainable(trainable)
    names = dict(module.named_parameters())
    depth = 1 + max((int(match[1]) for name in names if (match := BLOCK.search(name))), default=-1)
    last = int(trainable.removeprefix("last-")) if trainable.startswith("last-") else 0
    if last > depth:
        raise SettingError(f"trainable={trainable!r}: the backbone has {depth} blocks")
    for name, parameter in names.items():
        block = BLOCK.search(name)
        wanted = {
            "all": True,
            "attention": block is not None and ".attn." in name,
            "lora": block is not None and parameter.dim() == 2,
        }.get(trainable, int(block[1]) >= depth - last if block else AFTER.search(name) is not None)
        parameter.requires_grad_(wanted)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise SettingError(f"trainable={trainable!r}: this backbone has no such entries")


class LoraUpdate(nn.Module):
    """A weight plus its low-rank update: W → W + scale · B A, with B [m, r] and A [r, n]."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.a = nn.Parameter(weight.new_zeros(rank, weight.shape[1]))

    def delta(self) -> Tensor:
        """The update alone, [m, n]."""
        return self.scale * (self.b @ self.a)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta()


class Lora:
    """Low-rank updates on all entries of a bound module's layout.

    flat: B and A of all of them as one parameter, for the optimizer; the module's own entries are frozen.
    """

    def __init__(self, module: nn.Module, layout: Layout, rank: int, alpha: float) -> None:
        self._layout = layout
        self._updates: dict[str, LoraUpdate] = {}
        for name in layout.names:
            owner, _, attribute = name.rpartition(".")
            holder = module.get_submodule(owner)
            weight = getattr(holder, attribute)
            weight.requires_grad_(False)
            self._updates[name] = LoraUpdate(weight, rank, alpha / rank)
            parametrize.register_parametrization(holder, attribute, self._updates[name])
        self.flat: nn.Parameter = bind(module, Layout.of(module))

    @torch.no_grad()
    def reset(self, seed: int | None = None) -> None:
        """Δ = 0. With a seed, A is drawn from it as `nn.Linear` draws its weights."""
        random = torch.Generator().manual_seed(seed or 0)
        for update in self._updates.values():
            update.b.zero_()
            if seed is not None:
                bound = 1 / math.sqrt(update.a.shape[1])
                update.a.copy_(torch.empty(update.a.shape).uniform_(-bound, bound, generator=random))

    @torch.no_grad()
    def vector(self) -> Tensor:
        """Δ of every entry, dense, as one task vector [n]."""
        return torch.cat([self._updates[name].delta().reshape(-1) for name in self._layout.names])
