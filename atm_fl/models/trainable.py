"""Which entries of a backbone are tuned, merged and sent: all, the attention, the last blocks, or low-rank updates.

Of those that are tuned some may be `private`: each party keeps its own, from round to round, and what is merged and
sent is the rest (FedPer, Arivazhagan et al. 2019, arXiv:1912.00818; FedRep, Collins et al. 2021, arXiv:2102.07078).

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
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from atm_fl.errors import SettingError
from atm_fl.vectors import Layout, bind

LAST = r"last-([1-9]\d*)"
BLOCK = re.compile(r"\b(?:res)?blocks\.(\d+)\.")
"""The blocks of timm's and open_clip's ViTs."""
AFTER = re.compile(r"^vit\.(norm|fc_norm|ln_post|proj|attn_pool)\b")
"""What comes after the last block in timm's and open_clip's ViTs, in whatever order they hold it."""


def items(text: str) -> tuple[str, ...]:
    """What a list with commas names."""
    return tuple(item.strip() for item in text.split(",")) if text.strip() else ()


def check_trainable(trainable: str, private: str = "") -> None:
    """SettingError if an item of one of the settings is none of all, attention, last-1, last-2, …, lora (of trainable,
    alone), a name with a dot, or a pattern."""
    for name, text in (("trainable", trainable), ("private", private)):
        words = ("all", "attention", "lora") if name == "trainable" else ("all", "attention")
        wrong = (item for item in items(text) if item not in words and not re.fullmatch(rf"{LAST}|.*[.*?[].*", item))
        if (name == "trainable" and not items(text)) or next(wrong, None) is not None:
            raise SettingError(
                f"{name}={text!r}: it takes {', '.join(words)}, or last-K for the last K blocks, or names of entries "
                "and patterns as '*norm*'; several with commas"
            )
    if "lora" in items(trainable) and trainable != "lora":
        raise SettingError(f"trainable={trainable!r}: lora goes with nothing beside it; choose trainable='lora'")


def set_trainable(module: nn.Module, trainable: str) -> None:
    """Freeze all entries of a backbone but those that are tuned: `Layout.of` then has them alone.

    last-K: the last K blocks and what comes after them. lora: the matrices that get a low-rank update. SettingError if
    an item of the list names nothing, or the backbone has fewer blocks.
    """
    check_trainable(trainable)
    chosen = named_entries(module, "trainable", trainable)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)


def shared_and_private(module: nn.Module, private: str) -> tuple[Layout, Layout]:
    """The layouts of what is tuned and shared, and of what is tuned and stays with each party: the setting `private`.

    Of a module whose entries `set_trainable` has frozen. SettingError if an item of the list names nothing that is
    tuned, or if nothing is left to share.
    """
    tuned = Layout.of(module)
    chosen = named_entries(module, "private", private, frozenset(tuned.names))
    if tuned.names and chosen.issuperset(tuned.names):
        raise SettingError(
            f"private={private!r}: that is all that is tuned, and nothing is left to merge; name less of it"
        )
    return tuned.without(chosen), tuned.only(chosen)


def named_entries(module: nn.Module, setting: str, text: str, among: frozenset[str] | None = None) -> frozenset[str]:
    """The entries of a backbone that a list names, of those in `among` or of all. SettingError, naming the setting, if
    an item names none of them, or more blocks than there are."""
    untuned: frozenset[str] = getattr(module, "untuned", frozenset())
    shapes = {
        name: p.dim()
        for name, p in module.named_parameters()
        if (among is None or name in among) and name not in untuned
    }
    level, depth = levels(module)
    attention = tuple(f"{name}." for name, part in module.named_modules() if type(part).__name__.endswith("Attention"))

    def meant(item: str, name: str) -> bool:
        block = 1 <= level[name] <= depth
        if item == "all":
            return True
        if item == "attention":
            return block and (".attn." in name or name.startswith(attention))
        if item == "lora":
            return block and shapes[name] == 2 and name.endswith("weight")
        if last := re.fullmatch(LAST, item):
            return level[name] > depth - int(last[1])
        return fnmatchcase(name, item)

    found: set[str] = set()
    for item in items(text):
        if (last := re.fullmatch(LAST, item)) and int(last[1]) > depth:
            raise SettingError(f"{setting}={text!r}: the backbone has {depth} blocks")
        of_item = {name for name in shapes if meant(item, name)}
        if not of_item:
            which = "no such entries" if among is None else f"nothing that is tuned by the name {item!r}"
            raise SettingError(f"{setting}={text!r}: this backbone has {which}")
        found |= of_item
    return frozenset(found)


def levels(module: nn.Module) -> tuple[dict[str, int], int]:
    """How deep each entry is, and the number of blocks: 0 before the first, its block's number, behind the last more.

    Blocks are those that timm groups the entries of a model of its own in (`group_matcher`). In a ViT, and in a model
    of anyone else, they are the members of the outermost lists and sequences whose members are all of one class, in the
    order of the module; what lies between two belongs to the one after it. A model that has `levels` says so itself.
    """
    own: Any = getattr(module, "levels", None)
    if own:
        return own()
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
