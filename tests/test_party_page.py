"""A party's own page: real pictures and answers of a real run, for whoever has the data."""

from __future__ import annotations

import base64
import html
import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import call
from PIL import Image

from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.runs.run import Run
from atm_fl.settings import Settings

HOSTILE = '<script>alert(1) &amp; "<b>"'


@pytest.fixture
def finished(config: dict[str, Any], folders: list[str]) -> Run:
    """A round of three tasks, of which red's first class has a name that is markup."""
    for split in ("train", "val", "test"):
        (Path(folders[0]) / split / "class0").rename(Path(folders[0]) / split / HOSTILE)
    return run_loop(Settings.parse(config | {"rounds": 1}))


def test_the_page_shows_the_partys_pictures_with_the_models_answers(
    finished: Run, folders: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert call(monkeypatch, "report", str(finished.directory), "--party", "red") == 0
    path = finished.directory / "party-red.html"
    page = path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    party = Party(finished.settings, folders[0])
    accuracy = party.evaluate(finished.base, ("test",))["test"]
    count = len(party.splits["test"])
    assert f"right on {round(accuracy * count)} of {count} test pictures of red ({100 * accuracy:.1f} %)" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")

    images, labels = next(party.splits["test"].batches())
    known = {
        picture.numpy().tobytes(): party.data.classes[label] for picture, label in zip(images, labels, strict=True)
    }
    shown = re.findall(r'alt="([^"]*)" src="data:image/png;base64,([^"]+)"><figcaption>(.) (.+?), (\d+) %(.*?)<', page)
    assert len(shown) >= min(12, count)
    for label, png, mark, answer, _, rest in shown:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))).transpose(2, 0, 1)
        assert known[pixels.tobytes()] == html.unescape(label)
        assert mark == ("✓" if answer == label else "✗")
        assert rest == ("" if answer == label else f", not {label}")
    spread, *mistakes = page.split("<h2>")[1:]
    wrong = count - round(accuracy * count)
    assert [part.count("<img") for part in mistakes] == ([min(6, wrong)] if wrong else [])
    probabilities = [int(number) for part in mistakes for number in re.findall(r", (\d+) %, not", part)]
    assert probabilities == sorted(probabilities, reverse=True)
    assert spread.count("<img") == min(12, count)

    # a party that has its data elsewhere sees the same
    moved = shutil.move(folders[0], tmp_path / "elsewhere")
    assert call(monkeypatch, "report", str(finished.directory), "--party", f"red={moved}") == 0
    assert path.read_text() == page


@pytest.mark.usefixtures("report")
def test_who_lacks_the_pictures_gets_none(
    finished: Run, folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As a deployment's server: it has the run's directory and no party's folder."""
    shutil.rmtree(folders[1])
    for party, words in (("green", folders[1]), ("rde", "did you mean 'red'?")):
        assert call(monkeypatch, "report", str(finished.directory), "--party", party) == 2
        assert words in capsys.readouterr().err
    assert not list(finished.directory.glob("party-*"))
    assert "<img" not in (finished.directory / "report.html").read_text()
