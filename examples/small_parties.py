"""Folders of small parties out of embedded tasks, for configs/small_parties.toml: when does it pay to federate?

    python examples/small_parties.py data/small

makes data/small/1/mnist, data/small/2/mnist, …: parties of one task, with other training and validation images each and
the same test images. Made again they are the same files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from atm_fl import tasks


def write(folder: Path, data: tasks.Dataset, split: str, index: np.ndarray) -> None:
    """The images `index`, int64 [k], of a split as `folder`/CLASS/NUMBER.png."""
    whole = data.split(split)
    assert isinstance(whole.images, torch.Tensor)
    for number in index.tolist():
        image, label = whole.images[number].numpy(), int(whole.labels[number])
        file = folder / data.classes[label].replace("/", "-") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(file)


def party(folder: Path, data: tasks.Dataset, number: int, images: int) -> None:
    """The party's share: `images` for training, every class among them, and a quarter as many for validation."""
    for split, name, size in (("train", "train", images), ("validation", "val", images // 4)):
        labels = data.split(split).labels.numpy()
        order = np.random.default_rng(0).permutation(len(labels))
        # every class in turn, so that a small share has them all
        rank = np.empty(len(labels), dtype=int)
        for label in range(len(data.classes)):
            of_class = order[labels[order] == label]
            rank[of_class] = np.arange(len(of_class))
        order = order[np.argsort(rank[order], kind="stable")]
        write(folder / name, data, split, order[(number - 1) * size : number * size])
    write(folder / "test", data, "test", np.arange(len(data.test)))


def main() -> None:
    """Write the folders that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", default="radicals,mnist,digits,bluemarble")
    parser.add_argument("--parties", type=int, default=3, help="of each task")
    parser.add_argument("--images", type=int, default=120, help="training images of each party")
    chosen = parser.parse_args()
    for name in chosen.tasks.split(","):
        data = tasks.load(name)
        for number in range(1, chosen.parties + 1):
            party(chosen.folder / str(number) / name, data, number, chosen.images)


if __name__ == "__main__":
    main()
