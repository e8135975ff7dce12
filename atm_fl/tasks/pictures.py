"""The one decoder of picture files: whatever Pillow reads becomes RGB of 8 bits, upright.

| a file's pixels | become |
|---|---|
| 8 bits, grey or RGB | the same bits |
| 16 bits (and 12 of TIFF) | their type's whole range is 0..255 |
| float | the first of 0..1, 0..255, 0..65535 that holds them all, else their own extremes, is 0..255 |
| 32 bits | the same, without 0..1 |
| a palette, CMYK, YCbCr, HSV | Pillow's conversion, without colour profiles |
| alpha, a transparent colour | laid over white; over black where all that can be seen is nearly white |

Orientation (EXIF) is applied. Of an animation or several pages the first picture counts. Pillow's limit on the number
of pixels stays an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atm_fl.errors import SettingError

if TYPE_CHECKING:
    from PIL.Image import Image

NOT_DECODED = {"EPS", "MPEG"}
"""Formats that Pillow names but that are not read: EPS is a program for Ghostscript, MPEG has no decoder."""

NEARLY_WHITE = 224
"""From this value of every channel on, what can be seen of a transparent picture is laid over black."""

ONE_COLOUR = 3
"""A picture whose channels each span at most so many of 255 levels shows nothing."""

MARGIN = 2
"""How many times the wanted size a JPEG at least has when it leaves its decoder, which can halve it on the way: several
times as fast for a photograph of many pixels. A pixel of the result moves by half a level on average and by 5 at most
(noise of full contrast: by 4 and 25), 900 px brought to 224."""

_UPRIGHT: tuple[int | None, ...] = (None, None, 0, 3, 1, 5, 4, 6, 2)
"""EXIF's orientation 1..8 → PIL.Image.Transpose that makes it upright."""


@dataclass(frozen=True)
class Facts:
    """What a file says of itself: Pillow's mode and format, (width, height) upright, frames, EXIF's orientation."""

    mode: str
    format: str
    size: tuple[int, int]
    frames: int
    orientation: int


@cache
def formats() -> dict[str, str]:
    """Endings (".png", in small letters) of the files that are read → Pillow's name of the format."""
    from PIL import Image, ImageFile

    Image.init()

    def decodes(name: str) -> bool:
        opener = Image.OPEN[name][0] if name in Image.OPEN else None
        stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        return opener is not None and not stub and name not in NOT_DECODED

    return {ending: name for ending, name in Image.registered_extensions().items() if decodes(name)}


def read_picture(file: Path, size: int = 0) -> tuple[Image, Facts]:
    """The picture in `file`, RGB, and what it was. SettingError names the file that cannot be read.

    size: what its shorter side will be brought to, so that a JPEG's decoder may halve it as long as it stays `MARGIN`
    times as large; 0: it is wanted whole.
    """
    from PIL import Image

    try:
        # Of a path Pillow would map a turned TIFF with its sides exchanged, and its rows would be torn.
        with open(file, "rb") as stream, Image.open(stream, formats=_by_ending(file.suffix.lower())) as image:
            if size:
                image.draft(image.mode, (MARGIN * size, MARGIN * size))
            orientation, frames = _orientation(image), int(getattr(image, "n_frames", 1))
            facts = image.mode, str(image.format)
            rgb = to_rgb(image)
    except Exception as error:  # of torn files Pillow's decoders raise errors of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingError(f"{file} is not a readable image ({reason}); replace or remove it") from error
    return rgb, Facts(*facts, rgb.size, frames, orientation)


@cache
def _by_ending(ending: str) -> tuple[str, ...]:
    """All formats that are read, first the one that `ending` promises: each is tried until one fits the content."""
    promised = formats().get(ending, "")
    return tuple(sorted(set(formats().values()), key=lambda name: (name != promised, name)))


def read_pictures(files: Iterable[Path], size: int, threads: int = 1) -> list[Any]:
    """For each of `files` its picture by `squeeze`, uint8 [3, size, size], or the SettingError that it is."""

    def read(file: Path) -> np.ndarray | SettingError:
        try:
            return squeeze(read_picture(file, size)[0], size)
        except SettingError as error:
            return error

    with ThreadPoolExecutor(max(1, threads)) as pool:  # Pillow decodes and resizes without the interpreter's lock
        return list(pool.map(read, files))


def squeeze(image: Image, size: int) -> np.ndarray:
    """An RGB picture brought to uint8 [3, size, size], whatever its sides were (bicubic)."""
    from PIL.Image import Resampling

    return np.asarray(image.resize((size, size), Resampling.BICUBIC)).transpose(2, 0, 1)


def to_rgb(image: Image) -> Image:
    """An opened picture as RGB of 8 bits, upright; see the head of this module. ValueError if it is not finite."""
    from PIL import Image

    scale = _full_scale(image)  # what a file says of itself is gone once it is turned
    image.load()
    turn = _UPRIGHT[_orientation(image)]  # a TIFF is turned by Pillow as it is loaded
    upright = image if turn is None else image.transpose(Image.Transpose(turn))
    if upright.mode == "F" or upright.mode.startswith("I"):
        return Image.fromarray(_to_bytes(np.asarray(upright), scale)).convert("RGB")
    if image.has_transparency_data:
        return _opaque(upright.convert("RGBA"))
    return upright.convert("RGB")


def one_colour(pixels: np.ndarray) -> bool:
    """Whether a picture, uint8 [3, h, w], shows nothing: no channel spans more than `ONE_COLOUR` levels."""
    flat = pixels.reshape(3, -1)
    return bool((flat.max(1).astype(int) - flat.min(1)).max() <= ONE_COLOUR)


def _orientation(image: Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # EXIF that cannot be read says nothing, and the picture is there
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _full_scale(image: Image) -> float:
    """The value that is white in a picture of 16 bits; 0 if its own values are to say it."""
    if image.mode.startswith("I;16"):
        tags: Any = getattr(image, "tag_v2", {})
        return float(2 ** tags.get(258, (16,))[0] - 1)
    return 65535.0 if image.mode == "I" and image.format in ("PNG", "PPM") else 0.0


def _to_bytes(values: np.ndarray, scale: float) -> np.ndarray:
    """Numbers [h, w] as uint8 [h, w], rounded; scale: the value that becomes 255, 0: by their extremes."""
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite")
    wide = values.astype(np.float64)
    low, high = float(wide.min()), float(wide.max())
    start = 0.0
    if not scale:
        ranges = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
        scale = next((top for top in ranges if low >= 0 and high <= top), 0.0)
    if not scale:
        start, scale = low, high - low or 1.0
    return np.floor((wide - start) / scale * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _opaque(image: Image) -> Image:
    """An RGBA picture over its background."""
    from PIL import Image

    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    pixels = np.asarray(image)
    seen = pixels[pixels[..., 3] > 0, :3]
    level = 0 if seen.size and seen.min() >= NEARLY_WHITE else 255
    backdrop = Image.new("RGBA", image.size, (level, level, level, 255))
    return Image.alpha_composite(backdrop, image).convert("RGB")
