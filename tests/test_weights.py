"""`weights` and `start` take models as people have them: every shape of file, said what is dropped, refused by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from federation import call, final, same
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atm_fl import models
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.loop import run_loop
from atm_fl.models import hubs
from atm_fl.models.loading import match_names
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.settings import Settings
from atm_fl.vectors.model_files import checkpoints

NAME = "timm/vit_tiny_patch16_224"


def drawn(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module with other values in every entry."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=random) / 10)
    return module


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """timm's ViT-Ti, of one block, with its classifier of 7 classes."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **more: create(*args, **{"depth": 1, **more}))
    return drawn(timm.create_model(NAME.removeprefix("timm/"), num_classes=7))


def as_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    save_file(state, path / "m.safetensors")
    return path / "m.safetensors"


def as_pickle(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path / "m.pt")
    return path / "m.pt"


def as_trainers_pickle(state: dict[str, Tensor], path: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path / "m.pth")
    return path / "m.pth"


def as_shards(state: dict[str, Tensor], path: Path) -> Path:
    names = list(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: state[name] for name in held}, path / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path / "model.safetensors.index.json"


def as_folder(state: dict[str, Tensor], path: Path) -> Path:
    return as_shards(state, path).parent


@pytest.mark.parametrize("write", [as_safetensors, as_pickle, as_trainers_pickle, as_shards, as_folder])
def test_weights_of_every_shape_are_loaded_and_the_classifier_is_dropped_and_said(
    small: Any, tmp_path: Path, write: Callable[[dict[str, Tensor], Path], Path]
) -> None:
    file = write(small.state_dict(), tmp_path)
    loaded = models.load_backbone(NAME, str(file))
    expected = {name: value for name, value in small.state_dict().items() if not name.startswith("head.")}
    assert {name: (value == expected[name]).all() for name, value in loaded.vit.state_dict().items()} == dict.fromkeys(
        expected, torch.tensor(True)
    )
    (note,) = loaded.notes
    assert "2 entries are no part of the model and are dropped: " in note
    assert "head.weight" in note


def test_transformers_folder_of_a_vit_gives_its_features(small: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = drawn(
        transformers.ViTModel(
            transformers.ViTConfig(hidden_size=192, num_hidden_layers=1, num_attention_heads=3, intermediate_size=768,
                                   layer_norm_eps=1e-6, hidden_act="gelu"),
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "vit")
    loaded = models.load_backbone(NAME, str(tmp_path / "vit"))
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        expected = theirs(pixel_values=loaded.normalise(images)).last_hidden_state[:, 0]
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-5)


def test_transformers_folder_of_a_clip_gives_its_features_and_its_text_tower(clip: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=text | {"hidden_act": "gelu", "projection_dim": 16},
        vision_config=vision | {"hidden_act": "gelu", "projection_dim": 16, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    theirs = drawn(transformers.CLIPModel(config)).eval()
    theirs.save_pretrained(tmp_path / "clip")
    loaded = models.load_backbone(clip, str(tmp_path / "clip"))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    words = open_clip.get_tokenizer(clip.removeprefix("open_clip/"))(["a red thing"])
    whole = hubs.load_clip(clip.removeprefix("open_clip/"), "random")
    models.load_weights(whole, str(tmp_path / "clip"))
    with torch.inference_mode():
        expected = theirs.visual_projection(theirs.vision_model(loaded.normalise(images)).pooler_output)
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-5)
        text_states = theirs.text_model(words).last_hidden_state
        end = text_states[torch.arange(len(words)), words.argmax(-1)]
        torch.testing.assert_close(whole.encode_text(words), theirs.text_projection(end), rtol=1e-4, atol=1e-5)


def test_a_clips_visual_tower_and_the_whole_clip_are_loaded(clip: str, tmp_path: Path) -> None:
    whole = drawn(hubs.load_clip(clip.removeprefix("open_clip/"), "random"))
    save_file(whole.visual.state_dict(), tmp_path / "tower.safetensors")
    torch.save({f"visual.{name}": value for name, value in whole.visual.state_dict().items()}, tmp_path / "visual.pt")
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    for name in ("tower.safetensors", "visual.pt", "whole.pt"):
        loaded = models.load_backbone(clip, str(tmp_path / name))
        assert torch.equal(loaded.vit.proj, whole.visual.proj), name
        assert bool(loaded.notes) == (name == "whole.pt")
    prompts = [["a red thing"], ["a blue thing"]]
    assert len(hubs.zero_shot(clip, str(tmp_path / "whole.pt"), prompts).weight) == 2
    with pytest.raises(SettingError, match="head='zero-shot' needs a whole CLIP, with its text tower: .*lacks"):
        hubs.zero_shot(clip, str(tmp_path / "tower.safetensors"), prompts)


def test_a_runs_folder_and_checkpoint_are_weights_and_start_and_go_on_from_the_same_base(
    config: dict[str, Any], tmp_path: Path
) -> None:
    run = run_loop(Settings.parse(config | {"server-optimizer": "momentum"}))
    newest = checkpoints(run.directory)[-1]
    for path in (run.directory, newest):
        loaded = models.load_backbone("tiny", str(path))
        assert torch.equal(run.layout.flatten(loaded), run.base)
        assert not loaded.notes
        started = Run(Settings.parse(config | {"start": str(path), "run-dir": str(tmp_path / f"s{len(path.parts)}")}))
        assert torch.equal(started.base, run.base)
        started.close()


def merged_file(config: dict[str, Any], tmp_path: Path) -> tuple[Path, Run]:
    """What a merge of files writes: the names of the model's own library, in float32."""
    run = run_loop(Settings.parse(config | {"run-dir": str(tmp_path / "donor")}))
    state = {name.removeprefix("vit."): value for name, value in final(run.directory).items()}
    save_file(state, tmp_path / "M.safetensors", {"atm-fl": json.dumps({"method": "mean"})})
    return tmp_path / "M.safetensors", run


def test_a_merged_file_starts_a_run_as_the_run_itself_does(config: dict[str, Any], tmp_path: Path) -> None:
    file, donor = merged_file(config, tmp_path)
    ends = []
    for start in (file, donor.directory):
        change = {"start": str(start), "split": "validation", "run-dir": f"{config['run-dir']}-{start.name}"}
        ends.append(run_loop(Settings.parse(config | change)))
    assert same(final(ends[0].directory), final(ends[1].directory))
    assert not torch.equal(ends[0].base, donor.base)


def test_what_a_part_of_the_model_starts_and_what_starts_it(config: dict[str, Any], tmp_path: Path) -> None:
    config = config | {"model": "vit_micro", "rounds": 1}
    part = run_loop(Settings.parse(config | {"trainable": "last-1"}))
    whole = run_loop(Settings.parse(config | {"start": str(part.directory), "run-dir": str(tmp_path / "all")}))
    (said,) = [line["text"] for line in read_metrics(whole.directory) if line["kind"] == "warning"]
    assert "are the pretrained model's" in said
    pretrained = models.load_backbone("vit_micro").state_dict()
    before = Run(Settings.parse(config | {"start": str(part.directory), "run-dir": str(tmp_path / "again")}))
    first = before.layout.views(before.base)
    before.close()
    for name, value in first.items():
        assert torch.equal(value, final(part.directory).get(name, pretrained[name])), name
    change = {"trainable": "last-1", "start": str(whole.directory), "run-dir": str(tmp_path / "refused")}
    with pytest.raises(SettingError, match="trainable='last-1' does not tune differ from the pretrained"):
        Run(Settings.parse(config | change))
    with pytest.raises(SettingError, match="lacks .* entries: .*; a run that tuned a part"):
        models.load_backbone("vit_micro", str(part.directory))
    # as weights, the whole one is what every party has: a part of it may be tuned
    run_loop(Settings.parse(config | {"trainable": "last-1", "weights": str(whole.directory),
                                      "run-dir": str(tmp_path / "further")}))  # fmt: skip
    with pytest.raises(SettingError, match="is a run with weights='pretrained', not .*choose its weights"):
        Run(Settings.parse(config | {"weights": str(whole.directory), "start": str(part.directory),
                                     "run-dir": str(tmp_path / "other")}))  # fmt: skip


@pytest.mark.parametrize("setting", ["weights", "start"])
def test_files_that_are_no_such_model_are_refused_by_name(config: dict[str, Any], tmp_path: Path, setting: str) -> None:
    state = final(run_loop(Settings.parse(config | {"rounds": 1})).directory)
    bare = {name.removeprefix("vit."): value for name, value in state.items()}
    strange = {f"layers.{number}.w": torch.ones(2) for number in range(9)} | {"pos_embed": bare["pos_embed"]}
    narrow = bare | {"blocks.0.mlp.fc1.bias": torch.ones(3)}
    lacking = {name: value for name, value in bare.items() if not name.startswith("norm.")}
    notes = {"text": "no tensors"}
    for content, message in (
        (strange, rf"{setting}='.*' is of another model: \d+ of \d+ entries are not in it.*the file has layers.0.w"),
        (narrow, r"is of another model: blocks.0.mlp.fc1.bias has the shape \[3\], in the model it has \[64\]"),
        (lacking, r"lacks 2 of .*norm"),
        (notes, "has no state dict; it has text"),
    ):
        torch.save(content, tmp_path / "m.pt")
        change = {setting: str(tmp_path / "m.pt"), "run-dir": str(tmp_path / "refused")}
        with pytest.raises(SettingError, match=message):
            Run(Settings.parse(config | change))
    with pytest.raises(SettingError, match=f"{setting}='nowhere.pt'"):
        Run(Settings.parse(config | {setting: "nowhere.pt", "run-dir": str(tmp_path / "refused")}))


def test_runs_are_merged_from_the_pretrained_model_by_its_name_and_the_file_starts_a_run(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config | {"model": "vit_micro", "rounds": 1}
    runs = [
        run_loop(
            Settings.parse(config | {"seed": seed, "server-optimizer": "momentum", "run-dir": str(tmp_path / name)})
        )
        for seed, name in enumerate(("a", "b"))
    ]
    out = tmp_path / "M.safetensors"
    folders = [str(run.directory) for run in runs]
    assert call(monkeypatch, "merge", "--base", "vit_micro", *folders, "--scaling", "0.5", "--out", str(out)) == 0
    pretrained = runs[0].layout.flatten(models.load_backbone("vit_micro"))
    expected = pretrained + 0.5 * ((runs[0].base - pretrained) + (runs[1].base - pretrained)) / 2
    started = Run(Settings.parse(config | {"start": str(out), "run-dir": str(tmp_path / "next")}))
    started.close()
    torch.testing.assert_close(started.base, expected)
    assert call(monkeypatch, "merge", "--base", "vit_micor", *folders, "--out", str(out)) == 2
    assert "vit_micor is not a file or folder" in capsys.readouterr().err


def test_a_damaged_start_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    run = run_loop(Settings.parse(config | {"keep-checkpoints": 1, "rounds": 1}))
    (path,) = checkpoints(run.directory)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="no whole checkpoint"):
        Run(Settings.parse(config | {"start": str(run.directory), "run-dir": str(tmp_path / "next")}))


@pytest.mark.parametrize("theirs", ["", "module.", "model.visual.", "a.b.c."])
@pytest.mark.parametrize("ours", ["", "vit."])
def test_names_are_matched_under_every_prefix(theirs: str, ours: str) -> None:
    for parts in itertools.product(["block", "norm", "w", "0"], repeat=3):
        stems = [".".join(parts[:count]) for count in (1, 2, 3)]
        shapes = {f"{stem}.{number}": torch.empty(number + 1) for number, stem in enumerate(stems)}
        wanted = {ours + name: tensor for name, tensor in shapes.items()}
        held = {theirs + name: tensor for name, tensor in shapes.items()} | {"text.other": torch.empty(9)}
        assert match_names(wanted, held) == {ours + name: theirs + name for name in shapes}


def test_the_file_of_the_embedded_model_gives_the_embedded_model() -> None:
    file = Path(models.__file__).parents[1] / "weights" / "vit_micro.safetensors"
    loaded = models.load_backbone("vit_micro", str(file))
    assert same(loaded.vit.state_dict(), load_file(file))
