"""What the paper's runs cost: floating-point operations, counted.

    python benchmarks/flops.py [configs/paper_pa_atm.toml …]

One training step's operations (forward and backward, torch.utils.flop_counter) of the config's backbone on one image,
times the images that its parties tune on: no weights are loaded and nothing is computed. Evaluation is one forward pass
an image of the validation split a round, and of the test split before the first round and at the end.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import open_clip
import torch

from atm_fl.cli.terminal import read_config
from atm_fl.models.flops import operations
from atm_fl.tasks.published import find_published, validation_count

SPEED = {"fp32 on an A100, 10 TFLOP/s sustained": 10e12, "bf16 on an A100, 100 TFLOP/s sustained": 100e12}
"""Assumed, not measured here."""


def tower_operations(name: str) -> tuple[int, int]:
    """FLOPs of one image's (forward, forward and backward) through an image tower of open_clip."""
    with torch.device("meta"):
        tower = open_clip.create_model(name, device="meta").visual.train()
        image = torch.empty(1, 3, *tower.image_size)
    return operations(tower, image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("pa_atm", "ph_atm", "baselines", "converged")
    configs = [Path(f"configs/paper_{name}.toml") for name in names]
    parser.add_argument("configs", nargs="*", type=Path, default=configs)
    for config in parser.parse_args().configs:
        settings = read_config(config, ["start=pretrained"])
        forward, step = tower_operations(settings.model.removeprefix("open_clip/"))
        sets = [find_published(name) for name in settings.task_names]
        held = [validation_count(data_set.train) for data_set in sets]
        images = (
            held
            if settings.split == "validation"
            else [data_set.train - v for data_set, v in zip(sets, held, strict=True)]
        )
        epochs = [settings.rounds * settings.of_task(task).local_epochs for task in settings.client_tasks]
        steps = round(sum(n * math.ceil(k / settings.batch_size) for n, k in zip(epochs, images, strict=True)))
        training = step * sum(n * count for n, count in zip(epochs, images, strict=True))
        evaluation = forward * (sum(held) * (settings.rounds + 1) + 2 * sum(data_set.test for data_set in sets))
        of_each = settings.task_epochs or f"{settings.local_epochs:g}"
        print(f"{config}: {settings.model}, {len(sets)} tasks, {settings.rounds} x {of_each} epochs")
        print(f"  an image: {forward / 1e9:.1f} GFLOP forward, {step / 1e9:.1f} with backward")
        print(f"  {sum(images):,} images an epoch, {steps:,} optimizer steps")
        print(f"  {training / 1e15:.0f} PFLOP of training, {evaluation / 1e15:.0f} of evaluation")
        for speed, rate in SPEED.items():
            print(f"  {(training + evaluation) / rate / 3600:.1f} h at {speed}")


if __name__ == "__main__":
    main()
