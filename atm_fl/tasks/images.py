"""Images that stay in their files until a batch needs them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atm_fl.errors import SettingError
from atm_fl.tasks import pictures
from atm_fl.tasks.pictures import read_picture


@dataclass(frozen=True)
class ImageFiles:
    """Files of images of any size and format; `images[index]` decodes those at `index` to uint8 [k, 3, size, size]."""

    files: Sequence[Path]
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([decode(self.files[i], self.size) for i in index.tolist()])

    def take(self, index: Tensor | slice) -> ImageFiles:
        """The files at `index`, int64 [k], in that order, or a slice of them."""
        chosen = self.files[index] if isinstance(index, slice) else [self.files[i] for i in index.tolist()]
        return ImageFiles(chosen, self.size)

    @property
    def digest(self) -> str:
        """A short hash of the files' names and sizes and of the size they are decoded to; no image is read."""
        text = "\n".join([str(self.size), *(f"{file.parent.name}/{file.name} {_bytes(file)}" for file in self.files)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise SettingError(f"{file} cannot be read ({error.strerror}); bring the data set again") from error


@cache
def decoder() -> str:
    """What decodes files, as text: what is kept of decoded files is kept under it."""
    return inspect.getsource(pictures) + inspect.getsource(decode)


def decode(file: Path, size: int) -> Tensor:
    """RGB uint8 [3, size, size]: the shorter side is brought to `size` (bicubic), the centre cut out, as CLIP does it.

    SettingError names the file if it is not a readable image.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    rgb = read_picture(file, size)[0]
    return pil_to_tensor(center_crop(resize(rgb, [size], InterpolationMode.BICUBIC), [size, size]))


def decode_batches(images: ImageFiles, parts: Sequence[Tensor], workers: int) -> Iterator[Tensor]:
    """`images[part]` for each of `parts`, decoded ahead by `workers` processes, with 0 in this one."""
    source: Any = images  # all that a loader wants of its source is an item for what the sampler yields
    # It draws seeds for its workers; with a generator of its own it does not disturb the draws of the run.
    loader = torch.utils.data.DataLoader(
        source, sampler=parts, batch_size=None, num_workers=workers, generator=torch.Generator()
    )
    try:
        yield from loader
        return
    except SettingError as error:
        # A worker's error arrives with its traceback as text; its last line is the message.
        message = str(error).strip().rpartition("\n")[2].removeprefix("atm_fl.errors.SettingError: ")
        error.__traceback__ = None
    # Raised anew and unchained: the caught one's traceback, a cycle, holds the workers, which are to end now.
    raise SettingError(message)
