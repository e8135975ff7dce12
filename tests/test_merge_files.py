"""Merging files: the same as merging in memory, whatever the files hold, and inputs stay as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from atm_fl import cli
from atm_fl.errors import RunError, SettingError
from atm_fl.merging import checkpoint_files, make_merge, merges, options
from atm_fl.merging.checkpoint_files import Checkpoint, task_names
from atm_fl.vectors import Layout

NAMES = ("a", "b", "c", "d", "e")


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A small model with a matrix, a convolution, a bias, a scalar, an empty tensor and integers."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"block.weight": (6, 8), "block.bias": (6,), "conv.weight": (4, 3, 2, 2), "scale": (), "none": (0, 3)}
    tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    return tensors | {"steps": torch.tensor([3, 4]), "flags": torch.tensor([True, False, True])}


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.safetensors", model(0), format="pt", note="α")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"{name}.safetensors", model(seed)) for seed, name in enumerate(NAMES, 1)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "merged.safetensors"


def merge(
    base: Path, files: list[Path], out: Path, *arguments: Any, **more: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors written, and what was said."""
    said: list[str] = []
    checkpoint_files.merge_files(base, files, out, *arguments, warn=said.append, **more)
    return load_file(out), said


@pytest.mark.parametrize("method", sorted(merges()))
def test_files_merge_as_vectors_in_memory_do(method: str, base: Path, files: list[Path], out: Path) -> None:
    before = [path.read_bytes() for path in (base, *files)]
    written, said = merge(base, files, out, method, chosen={"scaling": 0.7}, seed=5)
    assert said == []
    assert [path.read_bytes() for path in (base, *files)] == before

    start = model(0)
    names = [name for name in Checkpoint(base).entries if start[name].is_floating_point()]
    layout = Layout(tuple(names), tuple(tuple(start[name].shape) for name in names))
    flats = [torch.cat([model(seed)[name].reshape(-1) for name in names]) for seed in range(len(NAMES) + 1)]
    vectors = {name: flat - flats[0] for name, flat in zip(NAMES, flats[1:], strict=True)}
    merged = make_merge(method, layout, seed=5, scaling=0.7).combine(vectors)
    expected = start | {name: start[name] + step for name, step in layout.views(merged).items()}
    assert list(written) == list(load_file(base))
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_the_file_is_like_the_base_and_says_how_it_was_made(base: Path, files: list[Path], out: Path) -> None:
    merge(base, files[:2], out, "ties", chosen={"density": 0.5}, seed=2)
    with safe_open(out, "pt") as written, safe_open(base, "pt") as start:
        metadata = written.metadata()
        made = json.loads(metadata.pop("atm-fl"))
        assert metadata == start.metadata()
        assert list(written.keys()) == list(start.keys())
    assert made == {
        "method": "ties",
        "options": {"scaling": 1.0, "density": 0.5},
        "task-scaling": {},
        "layer-scaling": {},
        "seed": 2,
        "base": "base.safetensors",
        "files": ["a", "b"],
    }
    assert Checkpoint(out).entries == Checkpoint(base).entries
    assert int.from_bytes(out.read_bytes()[:8], "little") % 8 == 0
    again = out.with_name("again.safetensors")
    merge(base, files[:2], again, "ties", chosen={"density": 0.5}, seed=2)
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_rounded_once(dtype: torch.dtype, tmp_path: Path, files: list[Path], out: Path) -> None:
    base = write(tmp_path / "base.safetensors", model(0, dtype))
    written, _ = merge(base, files[:2], out, "mean")  # the files' float32 is no hindrance
    for name, tensor in model(0, dtype).items():
        assert written[name].dtype == tensor.dtype
        if tensor.is_floating_point():
            wide = torch.promote_types(dtype, torch.float32)
            steps = [(model(seed)[name].to(wide) - tensor.to(wide)).float() for seed in (1, 2)]
            assert torch.equal(written[name], (tensor.to(wide) + (steps[0] + steps[1]) * 0.5).to(dtype))
    alone = write(tmp_path / "alone.safetensors", model(1, dtype))
    unchanged = write(tmp_path / "unchanged.safetensors", model(0, dtype))
    written, _ = merge(base, [unchanged], out, "mean")
    assert all(torch.equal(written[name], tensor) for name, tensor in model(0, dtype).items())
    written, _ = merge(base, [alone], out, "mean")
    torch.testing.assert_close(
        written["conv.weight"], model(1, dtype)["conv.weight"], rtol=max(1e-6, torch.finfo(dtype).eps), atol=1e-6
    )


def test_single_files_and_layers_have_their_factors(base: Path, files: list[Path], out: Path) -> None:
    written, _ = merge(base, files[:2], out, task_scaling={"a": 0.0, "b": 2.0}, layer_scaling={"block.*": 0.5})
    start, second = model(0), model(2)
    torch.testing.assert_close(written["conv.weight"], second["conv.weight"])
    half = (start["block.weight"] + second["block.weight"]) / 2
    torch.testing.assert_close(written["block.weight"], half)
    with pytest.raises(SettingError, match="there is no task 'q'"):
        merge(base, files[:2], out, task_scaling={"q": 1.0})
    with pytest.raises(SettingError, match="'blk.\\*' matches no entry"):
        merge(base, files[:2], out, layer_scaling={"blk.*": 1.0})


def test_what_is_not_in_every_file_is_said(base: Path, tmp_path: Path, out: Path) -> None:
    less = {name: tensor for name, tensor in model(1).items() if name not in ("scale", "block.bias", "steps")}
    more = model(2) | {f"head.{number}": torch.ones(2) for number in range(5)}
    files = [write(tmp_path / "less.safetensors", less), write(tmp_path / "more.safetensors", more)]
    written, said = merge(base, files, out, "mean")
    assert said == [
        f"{files[0]} lacks 2 that stay as in the base for all: block.bias, scale",
        f"{files[1]} has 5 that the base lacks and that are left out: head.0, head.1, head.2, …",
    ]
    assert set(written) == set(model(0))
    assert torch.equal(written["scale"], model(0)["scale"])
    assert not torch.equal(written["block.weight"], model(0)["block.weight"])


def test_entries_that_are_no_floats_are_the_bases(base: Path, tmp_path: Path, out: Path) -> None:
    other = write(tmp_path / "a.safetensors", model(1) | {"steps": torch.tensor([3, 5])})
    written, said = merge(base, [other], out, "mean")
    assert said == [f"{other} has 1 that are no floats and differ from the base's: steps"]
    assert torch.equal(written["steps"], torch.tensor([3, 4]))


def test_tied_weights_are_merged_once(tmp_path: Path, out: Path) -> None:
    def tied(seed: int, twice: bool = True) -> dict[str, Tensor]:
        tensors = model(seed) | {"norm.0": torch.ones(5), "norm.1": torch.ones(5)}  # equal, and not tied
        return tensors | {"out.weight": model(seed if twice else seed + 9)["block.weight"].clone()}

    base = write(tmp_path / "base.safetensors", tied(0))
    files = [write(tmp_path / f"{name}.safetensors", tied(seed)) for seed, name in enumerate("ab", 1)]
    written, said = merge(base, files, out, "dare", chosen={"density": 0.5})
    assert said == ["1 tied, merged once and written under every name: out.weight = block.weight"]
    assert torch.equal(written["out.weight"], written["block.weight"])
    files.append(write(tmp_path / "c.safetensors", tied(3, twice=False)))
    written, said = merge(base, files, out, "dare", chosen={"density": 0.5})
    assert said == []
    assert not torch.equal(written["out.weight"], written["block.weight"])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scale": torch.zeros(2)}, "a.safetensors: scale has the shape [2], in the base []"),
        ({"steps": torch.zeros(2)}, "a.safetensors: steps is F32, in the base I64"),
        ({"block.bias": torch.zeros(6, dtype=torch.int32)}, "a.safetensors: block.bias is I32, in the base F32"),
        ({"block.bias": torch.full((6,), torch.nan)}, "a.safetensors: block.bias is not finite"),
        ({"block.bias": torch.tensor([0, 0, 0, 0, 0, -torch.inf])}, "a.safetensors: block.bias is not finite"),
        ({"block.bias": torch.full((6,), 1e300, dtype=torch.float64)}, "a.safetensors: block.bias is not finite"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(
    changed: dict[str, Tensor], words: str, base: Path, tmp_path: Path, out: Path
) -> None:
    with pytest.raises(SettingError) as error:
        merge(base, [write(tmp_path / "a.safetensors", model(1) | changed)], out)
    assert words in str(error.value)
    assert not out.exists()


def test_the_file_that_is_not_finite_is_named(tmp_path: Path, files: list[Path], out: Path) -> None:
    base = write(tmp_path / "base.safetensors", model(0) | {"scale": torch.tensor(torch.inf)})
    with pytest.raises(SettingError, match="base.safetensors: scale is not finite"):
        merge(base, files, out)


def test_nothing_in_common_is_an_error(base: Path, tmp_path: Path, out: Path) -> None:
    other = {f"model.{name}": tensor for name, tensor in model(1).items()}
    with pytest.raises(SettingError, match=r"7 of its 7 names are not in the base.*the base has .*block.* has model\."):
        merge(base, [write(tmp_path / "a.safetensors", other)], out)


def test_inputs_are_never_written_over(base: Path, files: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(files[0])
    for target in (base, files[0], link, tmp_path / "none" / ".." / "a.safetensors"):
        (tmp_path / "none").mkdir(exist_ok=True)
        with pytest.raises(SettingError, match="inputs are never altered"):
            merge(base, files, target)
    for twice in ([files[0], link], [base, *files]):
        with pytest.raises(SettingError, match="is given twice"):
            merge(base, twice, tmp_path / "out.safetensors")
    with pytest.raises(SettingError, match="is a directory"):
        merge(base, files, tmp_path)


def test_files_of_other_kinds_are_refused(base: Path, files: list[Path], tmp_path: Path, out: Path) -> None:
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "model.pt")
    (tmp_path / "empty.safetensors").touch()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files[0].read_bytes()[:-1])
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    for name, words in {
        "model.pt": "convert it with safetensors.torch.save_file",
        "empty.safetensors": "is not a safetensors file",
        "cut.safetensors": "is cut short",
        "model.safetensors.index.json": "has no weight_map",
        "missing.safetensors": "is not a file",
    }.items():
        for arguments in ((base, [files[0], tmp_path / name]), (tmp_path / name, files)):
            with pytest.raises(SettingError, match=words) as error:
                merge(*arguments, out)
            assert name in str(error.value)
            assert "\n" not in str(error.value)


def test_a_result_that_does_not_fit_its_dtype_is_not_written(tmp_path: Path, files: list[Path], out: Path) -> None:
    base = write(tmp_path / "base.safetensors", model(0, torch.float16))
    with pytest.raises(RunError, match=r"base \+ merged does not fit torch.float16"):
        merge(base, files, out, "mean", chosen={"scaling": 1e6})
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e38), (torch.bfloat16, 1e38), (torch.float16, 6e4)])
def test_values_whose_sums_are_beyond_their_dtype_are_merged(dtype: torch.dtype, large: float, tmp_path: Path) -> None:
    """The quick looks at a block, by its sum or the sum of its squares, are not the last word."""
    models = [{"weight": torch.full((64,), factor * large).to(dtype)} for factor in (1.0, 0.5, 0.25)]
    models[1]["weight"][:32] = -models[1]["weight"][:32]
    first, *others = [write(tmp_path / f"{number}.safetensors", each) for number, each in enumerate(models)]
    merged, _ = merge(first, others, tmp_path / "out", "mean")
    exact = sum(each["weight"].double() for each in models[1:]) / 2
    torch.testing.assert_close(merged["weight"].double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_where_only_the_sum_of_the_steps_is_nothing_they_are_made(base: Path, tmp_path: Path, out: Path) -> None:
    tuned = model(0)
    tuned["block.bias"] += torch.tensor([1.0, -1, 2, -2, 4, -4])
    merged, _ = merge(base, [write(tmp_path / "a.safetensors", tuned)], out, "mean")
    torch.testing.assert_close(merged["block.bias"], tuned["block.bias"])


def test_an_end_in_the_middle_leaves_the_old_file(base: Path, files: list[Path], out: Path) -> None:
    out.parent.mkdir()
    out.write_bytes(b"old")

    def stop(stage: str, share: float) -> None:
        if stage == "writing merged.safetensors" and share > 0.9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, files, out, progress=stop)
    assert out.read_bytes() == b"old"
    assert list(out.parent.iterdir()) == [out]
    merge(base, files, out)
    assert out.read_bytes() != b"old"


def test_progress_goes_from_0_to_1(base: Path, files: list[Path], out: Path) -> None:
    reports: list[tuple[str, float]] = []
    merge(base, files[:2], out, "ties", progress=lambda stage, share: reports.append((stage, share)))
    assert list(dict(reports)) == ["reading 2 files", "writing merged.safetensors"]
    shares = [share for _, share in reports]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_tasks_are_named_by_as_little_as_tells_them_apart() -> None:
    assert task_names([Path("x/a.safetensors"), Path("y/b.safetensors")]) == ["a", "b"]
    assert task_names([Path("x/m.safetensors"), Path("y/m.safetensors")]) == ["x/m", "y/m"]
    assert task_names([Path("/x/1/m.st"), Path("/y/1/m.st"), Path("/x/2/m.st")]) == ["x/1/m", "y/1/m", "x/2/m"]
    assert task_names([Path("/x/m.st"), Path("/x/m.pt")]) == ["/x/m.st", "/x/m.pt"]


def test_a_caller_who_does_not_listen_is_warned_by_python(base: Path, tmp_path: Path, out: Path) -> None:
    other = write(tmp_path / "a.safetensors", model(1) | {"more": torch.zeros(1)})
    with pytest.warns(UserWarning, match="left out: more"):
        checkpoint_files.merge_files(base, [other], out)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of `atm-fl merge` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["atm-fl", "merge", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_command_merges(
    base: Path, files: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save_file(model(1) | {"more": torch.zeros(1)}, files[0])
    arguments = ["--base", base, "--out", out, "--method", "dare", "--density", 0.5, "--scaling", -0.5, "--seed", 3]
    assert call(monkeypatch, *arguments, *files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"warning: {files[0]} has 1 that the base lacks and that are left out: more"
    assert lines[1].startswith("dare of 5 files: 5 tensors, 103 elements, ")
    assert lines[1].endswith(str(out))
    expected, _ = merge(base, files, out.with_name("x"), "dare", chosen={"density": 0.5, "scaling": -0.5}, seed=3)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out).items())


def test_the_precision_of_a_merge_is_an_option_like_others(
    base: Path, files: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = merge(base, files, out.with_name("x"), "iso-c", chosen={"precision": "float32"})
    for arguments in (["iso-c:precision=float32"], ["iso-c", "--precision", "float32"]):
        assert call(monkeypatch, "--base", base, "--out", out, "--method", *arguments, *files) == 0
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out).items())
    assert call(monkeypatch, "--base", base, "--out", out, "--method", "iso-c", *files) == 0
    exact = load_file(out)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in exact.items())
    assert all(torch.allclose(tensor, expected[name], atol=0.05) for name, tensor in exact.items())


def test_the_help_shows_every_option_of_every_merge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for actual in merges().values():
        for item in options(actual):
            assert f"--{item.name.replace('_', '-')} " in text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--densty", "0.2"], "--densty"),
        (["--method", "mean", "--density", "0.2"], "the merge 'mean' has no option 'density'"),
        (["--method", "ties", "--density", "1.5"], "density=1.5: it must be above 0 and at most 1"),
        (["--method", "ties", "--density", "nan"], "density=nan: it must be a finite number"),
        (["--method", "ties", "--density", "much"], "'much' is not a valid float"),
        (["--method", "tie"], "merge 'tie' is unknown; did you mean 'ties'?"),
        (["--method", "multi-krum", "--f", "2"], "needs at least 7 tasks"),
        (["none.safetensors"], "none.safetensors is not a file"),
    ],
)
def test_a_wrong_argument_is_one_line_and_a_status(
    wrong: list[str],
    words: str,
    base: Path,
    files: list[Path],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert call(monkeypatch, "--base", base, "--out", out, *wrong, *files) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("atm-fl: ")
    assert len(said.strip().splitlines()) == 1
    assert not out.exists()


def test_what_is_required_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert call(monkeypatch, "--out", "x", "a.safetensors") == 2
    assert "--base" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_line_and_a_status(
    base: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "--base", base, "--out", base / "out.safetensors", *files) == 1
    said = capsys.readouterr().err
    assert "was not written" in said
    assert len(said.strip().splitlines()) == 1
