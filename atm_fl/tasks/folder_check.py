"""All that is wrong with a task's folder, or worth knowing, in one report."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from atm_fl.errors import SettingError
from atm_fl.tasks.folder import blank_told, list_folder
from atm_fl.tasks.leaks import SIZE, compare, difference_hash, exact_hash
from atm_fl.tasks.pictures import Facts, one_colour, read_picture, squeeze

EXAMPLES = 3
"""Pairs and files that a line names; unreadable files are all named."""


@dataclass(frozen=True)
class Picture:
    """What is remembered of one readable file: facts, hashes, and its colour if it shows nothing (else None)."""

    file: Path
    label: int
    facts: Facts
    exact: bytes
    bits: int
    colour: np.ndarray | None


@dataclass
class FolderReport:
    """errors: what a run fails on or is misled by; notes: what is worth knowing; counts: split → images by class."""

    root: Path
    classes: list[str]
    counts: dict[str, list[int]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_folder(root: Path, threads: int = 1) -> FolderReport:
    """Read every picture of a task's folder once, in `threads`, and report on all of them."""
    listing = list_folder(root)
    report = FolderReport(root, listing.classes, errors=list(listing.problems))
    splits: dict[str, list[Picture]] = {}
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for split, listed in listing.pictures.items():
            read = list(pool.map(lambda item: _read(*item), listed))
            report.errors += [str(item) for item in read if isinstance(item, SettingError)]
            splits[split] = [item for item in read if isinstance(item, Picture)]
            labels = Counter(picture.label for picture in splits[split])
            report.counts[split] = [labels[label] for label in range(len(listing.classes))]
    if listing.told():
        report.notes.append(listing.told())
    for split, pictures in splits.items():
        try:
            blank = _blank(pictures, split)
        except SettingError as error:
            report.errors.append(str(error))
        else:
            report.notes += [blank] if blank else []
        report.notes += _repeated(split, pictures, listing.classes)
    train = splits.get("train", [])
    for split in splits.keys() - {"train"}:
        _leaks(report, split, splits[split], train)
    if splits.get("test") and splits.get("validation"):
        _leaks(report, "test", splits["test"], splits["validation"], "validation")
    report.notes += _facts([picture for pictures in splits.values() for picture in pictures])
    return report


def _read(file: Path, label: int) -> Picture | SettingError:
    try:
        image, facts = read_picture(file)
    except SettingError as error:
        return error
    pixels = squeeze(image, SIZE).copy()  # torch wants what can be written to
    tensor = torch.from_numpy(pixels)
    colour = pixels[:, 0, 0].copy() if one_colour(pixels) else None
    return Picture(file, label, facts, exact_hash(tensor), int(difference_hash(tensor[None])[0]), colour)


def _blank(pictures: list[Picture], split: str) -> str:
    colours = [picture.colour for picture in pictures]
    return blank_told([picture.file for picture in pictures], colours, split)


def _repeated(split: str, pictures: list[Picture], classes: list[str]) -> list[str]:
    """Pictures that are more than once in one split, and those of them that are of two classes."""
    groups: dict[bytes, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.exact, []).append(picture)
    repeated = [group for group in groups.values() if len(group) > 1]
    mixed = [group for group in repeated if len({picture.label for picture in group}) > 1]
    lines = []
    for kind, chosen in (("are copies of others there", repeated), ("of them under another class", mixed)):
        if chosen:
            copies = sum(len(group) - 1 for group in chosen)
            shown = ", ".join(f"{_name(group[1])} = {_name(group[0])}" for group in chosen[:EXAMPLES])
            lines.append(f"{split}: {copies} pictures {kind} ({shown}{', …' if len(chosen) > EXAMPLES else ''})")
    return lines


def _leaks(
    report: FolderReport, split: str, pictures: list[Picture], others: list[Picture], other: str = "train"
) -> None:
    """Pictures of a split that are in another too: equal ones are errors, those that look alike a note."""
    sides = [
        ([picture.exact for picture in side], np.array([picture.bits for picture in side], np.uint64))
        for side in (pictures, others)
    ]
    leaks = compare(split, *sides[0], *sides[1])
    for pairs, words, lines in (
        (leaks.exact, f"are in {other} too", report.errors),
        (leaks.alike, f"look like one of {other}", report.notes),
    ):
        if pairs:
            shown = ", ".join(f"{_name(pictures[one])} = {_name(others[two])}" for one, two in pairs[:EXAMPLES])
            more = ", …" if len(pairs) > EXAMPLES else ""
            lines.append(f"{split}: {len(pairs)} of {len(pictures)} pictures {words} ({shown}{more})")


def _facts(pictures: list[Picture]) -> list[str]:
    """Modes with formats, sizes, and how many are turned or of several frames."""
    if not pictures:
        return []
    facts = [picture.facts for picture in pictures]
    modes = Counter(f"{fact.mode} {fact.format}" for fact in facts).most_common()
    short = sorted(min(fact.size) for fact in facts)
    lines = [
        "modes: " + ", ".join(f"{count} {mode}" for mode, count in modes),
        f"shorter sides: {short[0]} to {short[-1]} pixels, half of them below {short[len(short) // 2] + 1}",
    ]
    turned = sum(fact.orientation != 1 for fact in facts)
    if turned:
        lines.append(f"{turned} pictures are stored turned (EXIF) and read upright")
    moving = [picture for picture in pictures if picture.facts.frames > 1]
    if moving:
        lines.append(f"{len(moving)} files have several frames or pages, the first is read ({_name(moving[0])})")
    return lines


def _name(picture: Picture) -> str:
    return f"{picture.file.parent.name}/{picture.file.name}"
