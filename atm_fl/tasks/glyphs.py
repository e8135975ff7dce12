"""Glyphs of real fonts that pip packages carry: icons, writing systems and Chinese characters."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from atm_fl.tasks import CAP, IMAGE_SIZE, Source, task
from atm_fl.tasks.photos import package_dir

SCRIPTS = {  # writing system (as Unicode names its letters): Noto font file
    "latin": "NotoSans",
    "greek": "NotoSans",
    "cyrillic": "NotoSans",
    **{
        script: f"NotoSans{script.title()}"
        for script in ("arabic bengali devanagari ethiopic georgian hebrew kannada khmer thai").split()
    },
}


def render(
    characters: list[str], font_file: Path, weights: list[int] | None = None, size: int = IMAGE_SIZE
) -> list[np.ndarray]:
    """White glyphs on black [size, size], centred, scaled to fit; `weights`: that of a variable font for each."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(font_file), 4 * size)
    images = []
    for index, character in enumerate(characters):
        if weights is not None:
            font.set_variation_by_axes([weights[index]])
        left, top, right, bottom = font.getbbox(character)
        side = int(max(right - left, bottom - top, 1) * 1.15)
        canvas = Image.new("L", (side, side))
        origin = ((side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top)
        ImageDraw.Draw(canvas).text(origin, character, font=font, fill=255)
        images.append(np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS)))
    return images


def icon_font(name: str) -> tuple[Path, dict[str, str]]:
    """An icon font of QtAwesome: its file, and its icons' names with their characters."""
    fonts = package_dir("qtawesome") / "fonts"
    (charmap,) = fonts.glob(f"{name}-charmap-*.json")
    (file,) = fonts.glob(f"{name}-[0-9]*.ttf")
    return file, {icon: chr(int(code, 16)) for icon, code in json.loads(charmap.read_text()).items()}


@task("icons", source="Material Design Icons 6 (PyPI qtawesome)", licence="Apache-2.0")
def icons() -> Source:
    """Which of the sixteen largest families an icon belongs to: account, arrow, battery … An outline variant stays in
    its icon's split."""
    file, characters = icon_font("materialdesignicons6-webfont")
    families = [name for name, _ in Counter(icon.split("-")[0] for icon in characters).most_common(16)]
    chosen = sorted(icon for icon in characters if icon.split("-")[0] in families)
    bare = {icon: "-".join(word for word in icon.split("-") if word not in ("outline", "variant")) for icon in chosen}
    group = {name: number for number, name in enumerate(sorted(set(bare.values())))}
    return Source(
        render([characters[icon] for icon in chosen], file),
        [families.index(icon.split("-")[0]) for icon in chosen],
        families,
        [group[bare[icon]] for icon in chosen],
    )


@task("strokes", source="Phosphor icons 1.3 (PyPI qtawesome)", licence="MIT", more_test=True)
def strokes() -> Source:
    """In which of five styles an icon is drawn; test icons are unseen in every style."""
    file, characters = icon_font("phosphor")
    styles = ["thin", "light", "regular", "bold", "fill"]
    bare = sorted(icon for icon in characters if icon.split("-")[-1] not in styles)
    complete = [
        [icon if style == "regular" else f"{icon}-{style}" for style in styles]
        for icon in bare
        if all(f"{icon}-{style}" in characters for style in styles if style != "regular")
    ]
    drawn = render([characters[icon] for row in complete for icon in row], file)
    return Source(drawn, list(range(5)) * len(complete), styles, np.repeat(np.arange(len(complete)), 5))


@task(
    "scripts",
    source="Noto Sans, 12 writing systems in weights 100-900 (PyPI manimgx-fonts)",
    licence="OFL-1.1",
    more_test=True,
)
def scripts() -> Source:
    """To which writing system a letter belongs; test letters are unseen in every weight."""
    from fontTools.ttLib import TTFont

    random = np.random.default_rng(0)
    folder = package_dir("manimgx_fonts")
    images, labels, groups = [], [], []
    alphabets = []
    each = CAP // len(SCRIPTS)
    for label, (script, font) in enumerate(SCRIPTS.items()):
        file = folder / f"{font}[wght].ttf"
        letters = [
            chr(code)
            for code in sorted(TTFont(file).getBestCmap())
            if unicodedata.name(chr(code), "").startswith(script.upper()) and unicodedata.category(chr(code))[0] == "L"
        ]
        alphabets.append((file, letters))
        letters = [letters[i] for i in sorted(random.permutation(len(letters))[:each])]
        copies = -(-each // len(letters))
        drawn = [letter for letter in letters for _ in range(copies)]
        images += render(drawn, file, random.integers(100, 901, len(drawn)).tolist())
        labels += [label] * len(drawn)
        groups += [ord(letter) for letter in drawn]

    def for_test(tuned_on: frozenset[int]) -> Source:
        random = np.random.default_rng(1)
        images, labels, groups = [], [], []
        for label, (file, letters) in enumerate(alphabets):
            drawn = [letters[i] for i in random.permutation(len(letters))] * (7 * each)
            drawn = drawn[: 7 * each]  # of small alphabets only a quarter of these is unseen: the test split's letters
            weights = random.integers(100, 901, len(drawn)).tolist()
            unseen = [i for i, letter in enumerate(drawn) if ord(letter) not in tuned_on][: 2 * each]
            images += render([drawn[i] for i in unseen], file, [weights[i] for i in unseen])
            labels += [label] * len(unseen)
            groups += [ord(drawn[i]) for i in unseen]
        return Source(images, labels, list(SCRIPTS), groups)

    return Source(images, labels, list(SCRIPTS), groups, for_test)


@task("radicals", source="Noto Sans CJK, weights 100-900 (PyPI manimgx-fonts-cjk)", licence="OFL-1.1", more_test=True)
def radicals() -> Source:
    """Under which of the twelve largest radicals a Chinese character stands in the Kangxi dictionary.

    Unicode orders U+4E00..U+9FA5 by radical, and each radical's own character opens its section.
    """
    openers = sorted(
        (unicodedata.normalize("NFKC", chr(code)), unicodedata.name(chr(code)).removeprefix("KANGXI RADICAL ").lower())
        for code in range(0x2F00, 0x2FD6)
    )
    starts = [ord(character) for character, _ in openers]
    sections = {
        openers[i][1]: range(starts[i], starts[i + 1] if i + 1 < len(starts) else 0x9FA6) for i in range(len(starts))
    }
    largest = sorted(sections, key=lambda name: (-len(sections[name]), name))[:12]
    random = np.random.default_rng(0)
    characters, labels = [], []
    more, more_labels = [], []
    for label, name in enumerate(largest):
        drawn = random.permutation(sections[name])
        picked, unseen = sorted(drawn[: CAP // 12]), drawn[CAP // 12 : 3 * CAP // 12]
        characters += [chr(code) for code in picked]
        labels += [label] * len(picked)
        more += [chr(code) for code in unseen]
        more_labels += [label] * len(unseen)
    file = package_dir("manimgx_fonts_cjk") / "NotoSansCJK-VF.otf.ttc"
    weights, more_weights = (random.integers(100, 901, len(those)).tolist() for those in (characters, more))
    return Source(
        render(characters, file, weights),
        labels,
        largest,
        for_test=lambda tuned_on: Source(render(more, file, more_weights), more_labels, largest),
    )
