"""PEFT LoRA adapters as fine-tuned models: what they change of a base, by the dense difference that they stand for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atm_fl.errors import SettingError
from atm_fl.vectors.model_files import Checkpoint, Entry, Reader, few, read_json


@dataclass(frozen=True)
class LoraDelta:
    """The difference scale · up · down [m, n] of a LoRA, up [m, r], down [r, n], computed row by row."""

    up: Tensor
    down: Tensor
    scale: float

    def difference(self, chunk: slice, before: Tensor, out: Tensor) -> None:
        width = self.down.shape[1]
        if chunk.step not in (None, 1):
            places = torch.arange(chunk.start, chunk.stop, chunk.step)
            for some, target in zip(places.split(1 << 16), out.split(1 << 16), strict=True):
                left, right = self.up[some // width], self.down[:, some % width].T
                torch.sum(left * right, 1, out=target).mul_(self.scale)
            return
        first = chunk.start // width
        rows = self.up[first : -(-chunk.stop // width)] @ self.down
        out.copy_(rows.reshape(-1)[chunk.start - first * width :][: len(out)]).mul_(self.scale)

    def ahead(self, chunk: slice) -> None:
        pass


@dataclass
class Pair:
    """What a LoRA stores for one module: A [r, n, …] and B [m, r, …], and whether its weight is stored transposed."""

    a: Tensor | None = None
    b: Tensor | None = None
    transposed: bool = False


class Adapter(Checkpoint):
    """A PEFT LoRA adapter's folder: its entries are the base's that it changes, by B · A times α / r (or α / √r).

    Hu et al. 2021 (arXiv:2106.09685), Kalajdzievski 2023 (rsLoRA, arXiv:2312.03732). SettingError if it is another kind
    of adapter or is none of `base`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.settings = read_json(path / "adapter_config.json")
        kind = str(self.settings.get("peft_type", "")).upper()
        if kind != "LORA" or self.settings.get("use_dora"):
            raise SettingError(
                f"{path} is a {'DoRA' if kind == 'LORA' else kind} adapter; only LoRA is a plain difference"
            )
        self._pairs: dict[str, Pair] = {}
        self._whole: dict[str, str] = {}
        for key in self.entries:
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            module, dot, kind = name.partition(".lora_")
            if not dot:
                self._whole[name.replace(".modules_to_save.default.", ".")] = key
                continue
            side = re.fullmatch(r"(embedding_)?([AB])(\.default)?(\.weight)?", kind)
            if not side:
                raise SettingError(f"{path}: {key} is no part of a LoRA that is known here (only A and B are)")
            pair = self._pairs.setdefault(module, Pair())
            pair.transposed = bool(side[1]) or bool(self.settings.get("fan_in_fan_out"))
            setattr(pair, side[2].lower(), self.read(key).float())
        for module, pair in self._pairs.items():
            if pair.a is None or pair.b is None or pair.a.shape[0] != pair.b.shape[1]:
                raise SettingError(f"{path}: {module} has no pair of lora_A [r, n] and lora_B [m, r]")
        self._readers: dict[str, Reader] = {}

    def named_as(self, base: Checkpoint) -> None:
        wanted = {f"{module}.weight": pair for module, pair in self._pairs.items()}
        stored, self.entries = self.entries, {}
        unknown: list[str] = []
        for name in [*wanted, *self._whole]:
            # A base's file may lack the prefix that the model with a head has, or have one that the adapter lacks.
            fits = [each for each in base.entries if each.endswith("." + name) or name.endswith("." + each)]
            base_name = name if name in base.entries else fits[0] if len(fits) == 1 else None
            if base_name is None and name in self._whole:
                self.entries[name] = stored[self._whole[name]]  # a head of its own, which is left out with a warning
                continue
            if base_name is None:
                unknown.append(name)
                continue
            entry = base.entries[base_name]
            if name in self._whole:
                key = self._whole[name]
                self.entries[base_name], self._readers[base_name] = stored[key], super().reader(key)
                continue
            pair = wanted[name]
            assert pair.a is not None
            assert pair.b is not None
            down, up = pair.a.flatten(1), pair.b.flatten(1)
            if pair.transposed:
                up, down = down.T, up.T
            if up.shape[0] * down.shape[1] != math.prod(entry.shape) or up.shape[0] != entry.shape[0]:
                raise SettingError(
                    f"{self.path}: its difference of {base_name} is {[up.shape[0], down.shape[1]]}, in the base it is "
                    f"{list(entry.shape)}"
                )
            self.entries[base_name] = Entry("F32", entry.shape, (0, 0))
            self._readers[base_name] = LoraDelta(up.contiguous(), down.contiguous(), self._scale(name, pair.a.shape[0]))
        if unknown:
            raise SettingError(
                f"{self.path} is an adapter of another model: {few(unknown)} are not in {base.path}, which has "
                f"{few(list(base.entries))}"
            )

    def _scale(self, name: str, rank: int) -> float:
        """α / r, or α / √r of rsLoRA, with the module's own α if the config gives one."""
        module = name.removesuffix(".weight")
        alpha = self.settings.get("lora_alpha", rank)
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return float(alpha) / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def reader(self, name: str) -> Reader:  # type: ignore[override]
        return self._readers[name]


def open_checkpoint(path: Path) -> Checkpoint:
    """The model at `path`, an adapter as such. SettingError if it is none that can be merged."""
    if path.name.startswith("adapter_model.") and (path.parent / "adapter_config.json").is_file():
        path = path.parent
    if path.name.startswith("adapter_model."):
        raise SettingError(f"{path} is a LoRA adapter without its adapter_config.json, which has its α")
    if (path / "adapter_config.json").is_file():
        return Adapter(path)
    checkpoint = Checkpoint(path)
    if lora := [name for name in checkpoint.entries if ".lora_" in name]:
        raise SettingError(f"{path} has {few(lora)}: of an adapter, give the folder with its adapter_config.json")
    return checkpoint
