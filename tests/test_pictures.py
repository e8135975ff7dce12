"""Pictures as people have them: every mode, turned, torn, hidden, and in formats that Pillow reads."""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_folder
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from atm_fl import cli
from atm_fl.errors import SettingError
from atm_fl.federation.client import Party
from atm_fl.settings import Settings
from atm_fl.tasks import images
from atm_fl.tasks.folder import list_folder, load_folder
from atm_fl.tasks.images import decode
from atm_fl.tasks.pictures import formats, read_picture, squeeze

random = np.random.default_rng(0)

STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}
"""How an upright array is stored in a file of EXIF's orientation 1..8, by the EXIF standard (row 0, column 0 are …)."""


def rgb(file: Path) -> np.ndarray:
    return np.asarray(read_picture(file)[0])


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def save(file: Path, array: np.ndarray, mode: str | None = None, orientation: int = 1, **more: Any) -> Path:
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.ascontiguousarray(array))
    if mode:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, exif=exif, **more)
    return file


@st.composite
def upright_pictures(draw: st.DrawFn) -> tuple[str, np.ndarray, np.ndarray]:
    """(kind, the array of a picture, what it should be decoded to: computed without Pillow)."""
    kind = draw(
        st.sampled_from(["L", "RGB", "1", "LA", "RGBA", "P", "I;16", "I;16B", "I", "F unit", "F byte", "F any"])
    )
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    source = np.random.default_rng(draw(st.integers(0, 2**32)))
    byte = source.integers(0, 256, (height, width), dtype=np.uint8)
    colour = source.integers(0, 256, (height, width, 3), dtype=np.uint8)
    colour[0, 0] = 0  # something dark can be seen: the background is white
    if kind == "1":
        return kind, byte > 127, grey(np.where(byte > 127, 255, 0))
    if kind == "P":
        index = byte % 5
        return kind, index, colour_table()[index]
    if kind in ("LA", "RGBA"):
        alpha = source.choice([0, 1, 100, 254, 255], (height, width)).astype(np.uint8)
        alpha[0, 0] = 255
        opaque = colour if kind == "RGBA" else grey(colour[..., 0])
        weight = alpha[..., None] / 255
        return (
            kind,
            np.dstack([colour if kind == "RGBA" else colour[..., 0], alpha]),
            opaque * weight + 255 - 255 * weight,
        )
    if kind in ("I;16", "I;16B"):
        words = source.integers(0, 65536, (height, width)).astype(np.uint16)
        return kind, words.astype(">u2" if kind == "I;16B" else "<u2"), grey(words / 65535 * 255)
    if kind == "I":
        wide = source.integers(-1000, 70000, (height, width)).astype(np.int32)
        wide[0, 0] = -1001  # no range of the table holds it
        return kind, wide, grey((wide - wide.min()) / (np.ptp(wide) or 1) * 255)
    if kind.startswith("F"):
        unit = source.random((height, width)).astype(np.float32)
        if kind == "F unit":
            return kind, unit, grey(unit * 255.0)
        if kind == "F byte":
            unit[0, 0] = 1
            return kind, unit * 255, grey(unit * 255.0)
        unit[0, 0] = -0.5
        low, span = unit.min(), np.ptp(unit) or 1
        return kind, unit, grey((unit.astype(float) - low) / span * 255)
    return kind, colour if kind == "RGB" else byte, colour if kind == "RGB" else grey(byte)


def colour_table() -> np.ndarray:
    return np.arange(15, dtype=np.uint8).reshape(5, 3) * 17


@given(picture=upright_pictures(), orientation=st.integers(1, 8))
@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_mode_depth_and_orientation_is_decoded_to_what_numpy_says(
    picture: tuple[str, np.ndarray, np.ndarray], orientation: int, tmp_path: Path
) -> None:
    kind, array, expected = picture
    stored = np.ascontiguousarray(STORED[orientation](array))
    image = Image.fromarray(stored)
    if kind == "P":
        image.putpalette(colour_table().tobytes())
    tiff = kind[0] in "FI" and kind != "I;16"
    file = save(tmp_path / f"a.{'tif' if tiff else 'png'}", image, orientation=orientation)
    decoded = rgb(file)
    assert decoded.shape == expected.shape
    exact = kind in ("L", "RGB", "1", "P")
    assert np.abs(decoded - expected).max() <= (0 if exact else 1.01 if kind in ("LA", "RGBA") else 0.51)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_both_sizes_of_a_turned_file_are_those_of_the_upright_one(
    ending: str, orientation: int, tmp_path: Path
) -> None:
    array = np.zeros((24, 40, 3), np.uint8)
    array[:12, :20] = 250, 20, 20  # its first quarter is red
    more: dict[str, Any] = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    decoded = rgb(save(tmp_path / f"a.{ending}", STORED[orientation](array), orientation=orientation, **more))
    assert np.abs(decoded.astype(int) - array).max() <= 40
    assert decode(tmp_path / f"a.{ending}", 8)[0, 0, 0] > 200


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp"])
def test_ordinary_files_are_decoded_to_the_bits_of_a_bare_conversion(mode: str, ending: str, tmp_path: Path) -> None:
    file = save(tmp_path / f"a.{ending}", random.integers(0, 256, (30, 40, 3), dtype=np.uint8), mode)
    with Image.open(file) as image:
        assert np.array_equal(rgb(file), np.asarray(image.convert("RGB")))


def test_a_shape_that_is_in_alpha_alone_is_seen_black_or_white(tmp_path: Path) -> None:
    for level in (0, 255):
        pixels = np.full((20, 20, 4), level, np.uint8)
        pixels[..., 3] = 0
        pixels[5:15, 5:15, 3] = 255
        decoded = rgb(save(tmp_path / "a.png", pixels))
        assert (decoded[10, 10] == level).all()
        assert (decoded[0, 0] == 255 - level).all()


def test_a_transparent_colour_is_laid_over_white_too(tmp_path: Path) -> None:
    pixels = np.zeros((6, 6), np.uint8)
    pixels[:3] = 40
    file = save(tmp_path / "a.png", pixels, transparency=0)
    assert rgb(file)[:, :, 0].tolist() == [[40] * 6] * 3 + [[255] * 6] * 3


def test_sixteen_bits_of_rgb_are_not_cut_to_their_low_byte(tmp_path: Path) -> None:
    import struct
    import zlib

    words = random.integers(0, 65536, (4, 5, 3)).astype(">u2")

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.tobytes() for row in words)
    head = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert np.abs(rgb(tmp_path / "a.png") - words / 257).max() <= 1


def test_cmyk_is_ink(tmp_path: Path) -> None:
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0] = 255  # cyan
    image = Image.frombytes("CMYK", (16, 16), ink.tobytes())
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.tif")
    for name in ("a.jpg", "a.tif"):
        assert np.abs(rgb(tmp_path / name).astype(int) - (0, 255, 255)).max() <= 3


def test_of_an_animation_the_first_frame_counts_and_is_said(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (200, 100, 50)]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        more: dict[str, Any] = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **more)
        picture, facts = read_picture(tmp_path / name)
        assert facts.frames == 3
        assert np.asarray(picture)[0, 0].tolist() == [200, 0, 0]


def test_float_pixels_that_are_not_finite_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", np.array([[0, np.nan]], np.float32))
    with pytest.raises(SettingError, match="a.tif is not a readable image .it has pixels that are not finite"):
        read_picture(tmp_path / "a.tif")


def test_pillow_s_limit_on_pixels_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(tmp_path / "bomb.png", np.zeros((40, 40), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(SettingError, match="bomb.png is not a readable image .*decompression bomb"):
        read_picture(file)


def test_a_program_in_a_picture_s_clothes_is_not_run(tmp_path: Path) -> None:
    from PIL import EpsImagePlugin  # noqa: F401 (Pillow would open it, with Ghostscript)

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert ".eps" not in formats()
    with pytest.raises(SettingError, match="a.png is not a readable image"):
        read_picture(tmp_path / "a.png")


def test_a_picture_whose_exif_cannot_be_read_is_still_there(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert rgb(tmp_path / "a.jpg").shape == (6, 8, 3)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_halved_by_its_decoder_within_the_stated_bound(tmp_path: Path, orientation: int) -> None:
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((900, 1200), 3)
    pixels = (np.asarray(coarse) + random.normal(0, 8, (1200, 900, 1))).clip(0, 255).astype(np.uint8)
    file = save(tmp_path / "a.jpg", pixels, orientation=orientation)
    whole, halved = read_picture(file)[0], read_picture(file, 200)[0]
    assert halved.size == (whole.width // 2, whole.height // 2)
    off = np.abs(squeeze(whole, 200).astype(int) - squeeze(halved, 200))
    assert off.mean() < 0.7
    assert off.max() <= 6
    assert read_picture(file, 226)[0].size == whole.size  # 900 px are not four times as many


# ------------------------------------------------------------------------------------------------------------- folders


def nearest_mean(root: Path) -> float:
    """Test accuracy of the nearest class mean of a folder's pixels."""
    data = load_folder(root, 16)
    flat = [split.images.flatten(1).double() for split in (data.train, data.test)]
    means = torch.stack([flat[0][data.train.labels == label].mean(0) for label in range(len(data.classes))])
    return float((torch.cdist(flat[1], means).argmin(1) == data.test.labels).double().mean())


def shapes(root: Path, write: Callable[[Path, np.ndarray], object], ending: str) -> Path:
    """Two classes whose pictures differ in which half is lit, given to `write` as grey levels 0..1 [16, 16]."""
    for split, count in (("train", 4), ("val", 2), ("test", 4)):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                levels = random.random((16, 16)) * 0.2
                levels[:, 8 * label : 8 * label + 8] += 0.7
                write(folder / f"{number}.{ending}", levels)
    return root


def alpha_only(file: Path, levels: np.ndarray) -> None:
    pixels = np.zeros((*levels.shape, 4), np.uint8)
    pixels[..., 3] = levels * 255
    save(file, pixels)


def turned(file: Path, levels: np.ndarray) -> None:
    orientation = int(random.integers(1, 9))
    save(file, STORED[orientation]((levels * 255).astype(np.uint8)), orientation=orientation)


@pytest.mark.parametrize(
    ("write", "ending"),
    [
        (lambda file, levels: save(file, (levels * 65535).astype(np.uint16)), "png"),
        (lambda file, levels: save(file, levels.astype(np.float32)), "tif"),
        (lambda file, levels: save(file, (levels * 1e6).astype(np.float32)), "tiff"),
        (lambda file, levels: save(file, (levels * 4e6).astype(np.int32)), "tiff"),
        (alpha_only, "png"),
        (turned, "jpg"),
        (lambda file, levels: save(file, (levels * 255).astype(np.uint8)), "jfif"),
        (lambda file, levels: save(file, (levels * 255).astype(np.uint8)), "gif"),
        (lambda file, levels: save(file, (levels * 255).astype(np.uint8)), "jp2"),
    ],
    ids=["16 bits", "float", "float of any range", "32 bits", "alpha alone", "turned", "jfif", "gif", "jp2"],
)
def test_classes_that_can_be_seen_are_learned_from_files_of_any_kind(write: Any, ending: str, tmp_path: Path) -> None:
    assert nearest_mean(shapes(tmp_path / "task", write, ending)) == 1.0


def test_hidden_files_and_folders_are_no_data_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "pets", 0)
    before = load_folder(root, 16)
    assert not caplog.records
    for folder in ("train/.ipynb_checkpoints", "train/__MACOSX/class0", "val/class1/.thumbs"):
        (root / folder).mkdir(parents=True)
        (root / folder / "0.png").write_bytes(b"junk")
    (root / "train" / "class0" / "._0.png").write_bytes(b"junk")
    (root / "train" / ".DS_Store").write_bytes(b"junk")
    after = load_folder(root, 16)
    assert after.classes == before.classes
    assert torch.equal(after.train.images, before.train.images)
    assert list_folder(root).passed_over == {"hidden": 5}
    assert "passed over as no pictures: 5 hidden" in caplog.text


def test_what_is_passed_over_is_said_by_ending(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "pets", 0)
    for number in range(3):
        (root / "train" / "class0" / f"{number}.HEIC").write_bytes(b"junk")
    (root / "test" / "class0" / "Thumbs.db").write_bytes(b"junk")
    (root / "test" / "class0" / "README").write_bytes(b"junk")
    Image.new("RGB", (8, 8)).save(root / "val" / "stray.png")
    os.mkfifo(root / "val" / "class0" / "pipe.png")
    (root / "val" / "class0" / "folder.png").mkdir()
    with caplog.at_level(logging.WARNING):
        load_folder(root, 16)
    message = "1 .db, 3 .heic, 1 beside the class folders, 1 no file, 1 without ending"
    assert f"passed over as no pictures: {message}" in caplog.text


def test_a_split_of_which_most_pictures_show_nothing_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(tmp_path / "pets", 0)
    files = sorted((root / "train").rglob("*.png"))
    for file in files[:5]:
        Image.new("RGB", (8, 8), (7, 7, 7)).save(file)
    load_folder(root, 16)
    assert f"5 of 36 train pictures are of one colour, the first is {files[0]}" in caplog.text
    for file in files[:20]:
        Image.new("RGB", (8, 8), (7, 7, 7)).save(file)
    with pytest.raises(SettingError, match=r"20 of 36 train pictures are nothing but the colour \(7, 7, 7\)"):
        load_folder(root, 16)


def test_threads_decode_a_folder_to_the_same_bits(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pets", 0)
    assert torch.equal(load_folder(root, 48).train.images, load_folder(root, 48, threads=3).train.images)


def test_a_head_made_of_wrongly_decoded_files_is_not_taken_again(
    settings: Settings, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atm_fl import tasks

    stored = load_folder(Path(folders[0]), 32)
    listed = list_folder(Path(folders[0])).pictures["train"]
    split = tasks.Split(
        images.ImageFiles([file for file, _ in listed], 32), torch.tensor([label for _, label in listed])
    )
    data = tasks.Dataset("red", stored.classes, split, stored.validation, stored.test)
    monkeypatch.setattr(tasks, "load", lambda *_: data)
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    for text in ("one decoder", "one decoder", "another"):
        monkeypatch.setattr("atm_fl.federation.heads.decoder", lambda text=text: text)
        Party(settings, "red")
    assert len(list((tmp_path / "cache" / "heads").glob("*.safetensors"))) == 2


# ------------------------------------------------------------------------------------------------- atm-fl tasks check


def spoil(root: Path) -> None:
    """One of every fault in a folder of three classes with 12, 4 and 4 pictures each."""
    train, test = root / "train" / "class0", root / "test" / "class0"
    (train / "0.png").write_bytes((train / "0.png").read_bytes()[:60])
    (train / "1.png").write_bytes(b"")
    (train / "2.png").unlink()
    (train / "2.png").symlink_to(root / "nowhere.png")
    Image.new("RGB", (8, 8), (7, 7, 7)).save(train / "3.png")
    (root / "train" / "class1" / "copy.png").write_bytes((train / "4.png").read_bytes())
    (test / "0.png").write_bytes((train / "5.png").read_bytes())
    (test / "1.png").write_bytes((root / "val" / "class0" / "1.png").read_bytes())
    save(train / "6.png", random.integers(0, 65535, (9, 30)).astype(np.uint16), orientation=6)
    Image.new("RGB", (16, 16)).save(train / "7.gif", save_all=True, append_images=[Image.new("RGB", (16, 16), "red")])
    (train / "8.heic").write_bytes(b"junk")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / ".hidden" / "x.png").write_bytes(b"junk")
    (root / "val" / "class9").mkdir()
    other = root / "train" / "class2"
    for name in ("0.png", "2.png"):
        (other / name).unlink()
    save(other / "0.tif", random.random((16, 16)).astype(np.float32))
    alpha_only(other / "1.png", random.random((16, 16)))
    Image.frombytes("CMYK", (16, 16), random.bytes(16 * 16 * 4)).save(other / "2.jfif", "JPEG")
    (other / "._3.png").write_bytes(b"junk")
    Image.new("RGB", (200, 200)).save(other / "bomb.png")


def test_tasks_check_reports_every_fault_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "pets", 0)
    spoil(root)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    monkeypatch.setattr("sys.argv", ["atm-fl", "tasks", "check", str(root), "--workers", "2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    message = capsys.readouterr().out
    for name, reason in (("0", ".*"), ("1", "cannot identify.*"), ("2", ".*No such file.*")):
        assert re.search(f"wrong: {root}/train/class0/{name}.png is not a readable image .{reason}; replace", message)
    assert re.search(f"wrong: {root}/train/class2/bomb.png is not a readable image .*decompression bomb", message)
    for line in (
        f"wrong: {root}/val has a class 'class9' that {root}/train has not",
        "wrong: test: 1 of 12 pictures are in train too (class0/0.png = class0/5.png)",
        "wrong: test: 1 of 12 pictures are in validation too (class0/1.png = class0/1.png)",
        f"{root}: passed over as no pictures: 1 .heic, 2 hidden",
        f"2 of 35 train pictures are of one colour, the first is {root}/train/class0/3.png",
        "train: 1 pictures are copies of others there (class1/copy.png = class0/4.png)",
        "train: 1 pictures of them under another class (class1/copy.png = class0/4.png)",
        "modes: 54 RGB PNG, 1 I;16 PNG, 1 P GIF, 1 F TIFF, 1 RGBA PNG, 1 CMYK JPEG",
        "shorter sides: 8 to 16 pixels",
        "1 pictures are stored turned (EXIF) and read upright",
        "1 files have several frames or pages, the first is read (class0/7.gif)",
    ):
        assert line in message
    assert re.search(r"class0\s+10\s+4\s+4\s+class1\s+13\s+4\s+4\s+class2\s+12\s+4\s+4", message)


def test_tasks_check_of_a_good_folder_ends_well_and_the_plain_form_still_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "pets", 0)
    for arguments, line in ((["check", str(root)], f"{root}: a task"), (["--markdown"], "| cars | 196 |")):
        monkeypatch.setattr("sys.argv", ["atm-fl", "tasks", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        assert line in capsys.readouterr().out
