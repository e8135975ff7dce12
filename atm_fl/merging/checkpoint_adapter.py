"""Writing a merged vector as a LoRA adapter, by truncated singular value decompositions."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atm_fl.errors import SettingError
from atm_fl.merging.checkpoint_lora import Adapter
from atm_fl.merging.checkpoint_names import INPUTS
from atm_fl.merging.checkpoint_outputs import check_folder
from atm_fl.vectors.blocks import parts
from atm_fl.vectors.linalg import svd
from atm_fl.vectors.model_files import few
from atm_fl.vectors.tensor_files import save_vectors

if TYPE_CHECKING:
    from atm_fl.merging.checkpoint_files import Ready, Steps


def write_adapter(ready: Ready, steps: Steps, out: Path, rank: int, warn: Callable[[str], object]) -> None:
    """Write a PEFT folder `out` whose B · A is, for each matrix, the merged difference's nearest of `rank` (α = r).

    `warn` is told what is lost: ‖merged − B A‖ / ‖merged‖ (Frobenius) of all matrices together. SettingError if an
    entry that changes is no matrix of a linear layer, which an adapter does not hold.
    """
    check_folder(out)
    if rank < 1:
        raise SettingError(f"rank={rank}: it must be at least 1")
    layout, tensors, modules = ready.plan.layout, {}, []
    transposed = {bool(file.settings.get("fan_in_fan_out")) for file in ready.files if isinstance(file, Adapter)}
    if len(transposed) > 1:
        raise SettingError("the adapters differ in fan_in_fan_out: they are of different models")
    flipped = transposed == {True}
    lost = total = 0.0
    merged_entries: dict[int, torch.Tensor] = {}
    blocks_left = dict.fromkeys(range(len(layout.names)), 0)
    for item in steps.items:
        for block in item:
            blocks_left[block.entry] += 1
    for item in steps.items:
        for block in item:
            start = steps.parts.starts[block.entry]
            entry = merged_entries.setdefault(block.entry, torch.empty(layout.sizes[block.entry]))
            entry[block.elements.start - start : block.elements.stop - start] = steps.step(block)
            blocks_left[block.entry] -= 1
            if blocks_left[block.entry]:
                continue
            name, shape = layout.names[block.entry], layout.shapes[block.entry]
            steps.told.merged(name, 1.0)
            del merged_entries[block.entry]
            if not bool(entry.any()):
                continue
            if len(shape) != 2 or not name.endswith(".weight") or name.endswith(INPUTS):
                raise SettingError(
                    f"{name} {list(shape)} changes and is no matrix of a linear layer, which is all that an adapter "
                    f"holds; leave it out with --exclude {name}, or write a model"
                )
            matrix = entry.view(shape).T.contiguous() if flipped else entry.view(shape)
            left, values, right = svd(matrix, min(rank, *shape), torch.float32)
            # Eigenvalues come smallest first; a PEFT adapter has one rank, so that lower ones are filled up with zeros.
            up, down = torch.zeros(matrix.shape[0], rank), torch.zeros(rank, matrix.shape[1])
            up[:, : len(values)] = left * values.sqrt()
            down[: len(values)] = (right * values.sqrt()).T
            module = name.removesuffix(".weight")
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            modules.append(module)
            total += sum(float(matrix.view(-1)[chunk].double().square().sum()) for chunk in parts(matrix.numel()))
            lost += float((matrix - up @ down).double().square().sum())
    if not modules:
        raise SettingError("the merged vector is zero: there is no adapter to write")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(modules),
        "fan_in_fan_out": flipped,
        "bias": "none",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": str(ready.base.path),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        metadata = {"format": "pt", "atm-fl": json.dumps(ready.made)}
        save_vectors(folder / "adapter_model.safetensors", tensors, metadata)
        if out.is_dir():
            out.rmdir()
        os.replace(folder, out)
    steps.told.end()
    warn(
        f"rank {rank} holds {len(modules)} matrices ({few(modules)}) but for {(lost / total) ** 0.5:.2%} of their norm"
    )
