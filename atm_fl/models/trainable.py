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
from collections.abc import Iterator
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from atm_fl.errors import SettingError
from atm_fl.vectors import Layout, bind

BLOCK = re.compile(r"\b(?:res)?blocks\.(\d+)\.")
"""The blocks of timm's and open_clip's ViTs."""
AFTER = re.compile(r"^vit\.(norm|fc_norm|ln_post|proj|attn_pool)\b")
"""What comes after the last block in timm's and open_clip's ViTs, in whatever order they hold it."""


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
    level, depth = levels(module)
    last = int(trainable.removeprefix("last-")) if trainable.startswith("last-") else 0
    if last > depth:
        raise SettingError(f"trainable={trainable!r}: the backbone has {depth} blocks")
    attention = tuple(name for name, part in module.named_modules() if type(part).__name__.endswith("Attention"))
    for name, parameter in names.items():
        block = 1 <= level[name] <= depth
        wanted = {
            "all": True,
            "attention": block and (".attn." in name or name.startswith(tuple(f"{part}." for part in attention))),
            "lora": block and parameter.dim() == 2 and name.endswith("weight"),
        }.get(trainable, level[name] > depth - last)
        parameter.requires_grad_(wanted)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise SettingError(f"trainable={trainable!r}: this backbone has no such entries")


def levels(module: nn.Module) -> tuple[dict[str, int], int]:
    """How deep each entry is, and the number of blocks: 0 before the first, its block's number, behind the last more.

    Blocks are those that timm groups the entries of a model of its own in (`group_matcher`). In a ViT, and in a model
    of anyone else, they are the members of the outermost lists and sequences whose members are all of one class, in the
    order of the module; what lies between two belongs to the one after it.
    """
    for prefix, part in module.named_modules():
        if hasattr(part, "group_matcher") and not isinstance(part, VisionTransformer):
            return _timm_levels(module, prefix, part)
    blocks = list(_blocks(module))
    place = {name: number for number, (name, _) in enumerate(module.named_modules())}

    def level(name: str) -> int:
        inside = [number for number, block in enumerate(blocks, 1) if name.startswith(f"{block}.")]
        passed = sum(place[block] < place[name.rpartition(".")[0]] for block in blocks)
        if inside or not (AFTER.match(name) or passed == len(blocks)):
            return inside[0] if inside else passed + 1 if passed else 0
        return len(blocks) + 1

    return {name: level(name) for name, _ in module.named_parameters()}, len(blocks)


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """The names of a module's blocks."""
    children = list(module.named_children())
    kinds = {type(child) for _, child in children}
    grown = [child for _, child in children if next(child.parameters(), None) is not None]
    alike = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(kinds) == 1 and len(grown) == len(children)
    if alike and (len(children) > 1 or next(children[0][1].children(), None) is not None):
        yield from (f"{prefix}{name}" for name, _ in children)
        return
    for name, child in children:
        yield from _blocks(child, f"{prefix}{name}.")


def _timm_levels(module: nn.Module, prefix: str, part: Any) -> tuple[dict[str, int], int]:
    """`levels` by the groups of a timm model that is `part` of the module; what matches none is behind the blocks."""
    start = f"{prefix}." if prefix else ""
    unmatched, matcher = "\0", part.group_matcher(coarse=False)
    groups = group_with_matcher(iter([*part.named_parameters(), (unmatched, None)]), matcher, reverse=True)
    behind = groups[unmatched]
    return {name: groups.get(name.removeprefix(start), behind) for name, _ in module.named_parameters()}, behind - 1


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
