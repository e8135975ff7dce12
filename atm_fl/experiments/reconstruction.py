"""What reconstruction attacks find under each setting, in one table and one page of pictures.

A row is a scenario of `atm_fl.attacks`. Rows that are done are kept in the study's folder and not done again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from atm_fl.attacks.measurement import BASELINES, FOUND, attacked, summary
from atm_fl.attacks.scenario import Scenario
from atm_fl.errors import SettingError
from atm_fl.files import atomic_write
from atm_fl.runs.pages import document, figure, told
from atm_fl.runs.pages import table as html_table
from atm_fl.settings import modern
from atm_fl.tables import markdown

SHOWN = 10
"""Images of a row that the page shows."""
HEAD = ["setting", "attack", "images", "steps", "ε", "PSNR", "best", "SSIM", "LPIPS"]
HEAD += [*BASELINES, "SSIM of the mean image", "LPIPS of it", "labels wrong", "uniform"]


@dataclass(frozen=True)
class ReconstructionUnit:
    """One row: its name, its scenario's values, and where its result is kept."""

    folder: Path
    name: str
    values: dict[str, Any]

    @property
    def path(self) -> Path:
        """Its result; the pictures are beside it."""
        return self.folder / f"{self.name.replace(' ', '-').replace('/', '-')}.json"

    @property
    def pictures(self) -> Path:
        """Its images by who made them, float32 [k, 3, s, s], safetensors."""
        return self.path.with_suffix(".safetensors")

    def result(self) -> dict[str, Any] | None:
        """What was measured, if it was with these values."""
        if not self.path.is_file():
            return None
        kept = json.loads(self.path.read_text())
        same = modern(kept["values"], strict=False) == modern(self.values, strict=False)
        return kept["result"] if same else None


@dataclass(frozen=True)
class ReconstructionStudy:
    """A study's configuration: see configs/reconstruction.toml."""

    folder: Path
    units: list[ReconstructionUnit]

    @classmethod
    def of(cls, values: dict[str, Any]) -> ReconstructionStudy:
        """The study of a file's values. KeyError or TypeError for a wrong key, SettingError for a wrong value."""
        folder, common, rows = Path(values.pop("folder")), values.pop("common"), values.pop("rows")
        if values:
            raise SettingError(f"{next(iter(values))!r} is none of folder, common, rows")
        units = [ReconstructionUnit(folder, name, common | row) for name, row in rows.items()]
        for unit in units:
            try:
                Scenario.parse(unit.values)
            except SettingError as error:
                raise SettingError(f"row {unit.name!r}: {error}") from error
        return cls(folder, units)


def phases(study: ReconstructionStudy) -> Iterator[list[ReconstructionUnit]]:
    """All rows; none needs another."""
    yield study.units


def run_unit(unit: ReconstructionUnit) -> str:
    """Measure one row, unless that was done."""
    if unit.result() is None:
        scenario = Scenario.parse(unit.values)
        outcomes = attacked(scenario)
        unit.folder.mkdir(parents=True, exist_ok=True)
        first = outcomes[: -(-SHOWN // scenario.images)]
        pictures = {"original": _stacked([outcome.truth for outcome in first])}
        for name in first[0].images:
            pictures[name] = _stacked([outcome.images[name] for outcome in first])
        with atomic_write(unit.pictures) as temporary:
            save_file(pictures, str(temporary))
        with atomic_write(unit.path) as temporary:
            temporary.write_text(json.dumps({"values": unit.values, "result": summary(scenario, outcomes)}))
    return unit.name


def _stacked(images: list[Tensor]) -> Tensor:
    return torch.cat(images)[:SHOWN].contiguous()


def table(study: ReconstructionStudy) -> str:
    """The rows that are done, in Markdown: means over all images; PSNR in dB, ± its mean's standard error."""
    return markdown(HEAD, map(_cells, _done(study)))


def page(study: ReconstructionStudy) -> Path:
    """Write report.html, the table and the first images of each row, into the study's folder; its path."""
    done = _done(study)
    parts = ["<h1>Reconstruction</h1>", html_table(HEAD, map(_cells, done), style="numbers dense")]
    for unit in done:
        pictures = load_file(str(unit.pictures))
        parts.append(figure(f"{unit.name}: first images", partial(grid, pictures)))
    path = study.folder / "report.html"
    path.write_text(document("Reconstruction", parts))
    return path


def _done(study: ReconstructionStudy) -> list[ReconstructionUnit]:
    return [unit for unit in study.units if unit.result() is not None]


def _cells(unit: ReconstructionUnit) -> list[str]:
    result = unit.result()
    assert result is not None
    guesses, labels, epsilon = result[FOUND], result["labels"], result["epsilon"]
    cells = [unit.name, result["attack"], str(result["images"]), str(result["steps"])]
    cells.append("–" if epsilon is None else f"{epsilon:.3g}")
    if guesses:
        cells += [
            f"{guesses['psnr']:.1f} ± {guesses['psnr_error']:.1f}",
            f"{guesses['psnr_best']:.1f}",
            f"{guesses['ssim']:.2f}",
            told(guesses.get("lpips")),
        ]
    else:
        cells += ["no equation", "–", "–", "–"]
    cells += [f"{result[name]['psnr']:.1f}" if result[name] else "–" for name in BASELINES]
    cells += [f"{result['mean image']['ssim']:.2f}", told(result["mean image"].get("lpips"))]
    return cells + ([f"{labels['found']:.2f}", f"{labels['uniform']:.2f}"] if labels else ["–", "–"])


def grid(pictures: dict[str, Tensor]) -> Figure:
    """A line of images for the originals, the attack and each baseline."""
    names = [name for name in ("original", FOUND, *BASELINES) if name in pictures]
    count, _, size, _ = pictures["original"].shape
    gap = max(1, size // 16)
    lines = [torch.cat(list(functional.pad(pictures[name], [gap] * 4, value=1.0)), dim=2) for name in names]
    drawing = Figure(figsize=(9, 0.4 + 8 * len(names) / max(count, SHOWN)), layout="constrained")
    axis = drawing.subplots()
    axis.imshow(torch.cat(lines, dim=1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_yticks([(size + 2 * gap) * (line + 0.5) for line in range(len(names))], names)
    axis.set_xticks([])
    axis.grid(False)
    return drawing


read = ReconstructionStudy.of
"""A study of the values in a TOML file: see `read_study`."""
