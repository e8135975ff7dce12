"""CLIP with both towers: it is open_clip's, both are tuned and merged, and parties may have images or texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import make_folder
from federation import in_process
from test_texts import ROWS, write

from atm_fl import models
from atm_fl.attacks.scenario import Scenario, victims
from atm_fl.errors import SettingError
from atm_fl.experiments.joint import run_joint
from atm_fl.exports import Predictor, export
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.models import hubs
from atm_fl.models.trainable import levels, set_trainable
from atm_fl.privacy.dp_sgd import record_gradients
from atm_fl.settings import Settings
from atm_fl.tasks.images import decode
from atm_fl.tasks.texts import tokenise
from atm_fl.vectors import Layout

TEXTS = ["a photo of a cat.", "2", "a long text about many things, " * 20]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def name(clip: str) -> str:
    return clip.removeprefix("open_clip/")


@pytest.fixture
def mixed(name: str, tmp_path: Path) -> dict[str, Any]:
    """Two parties of images and two of texts, for three rounds."""
    moods = [(f"{label} the {number}th text", label) for label in ("good", "bad") for number in range(60)]
    places = [make_folder(tmp_path / "data" / colour, seed) for seed, colour in enumerate(("red", "green"))]
    places += [write(tmp_path / "pets.csv", ROWS), write(tmp_path / "moods.jsonl", moods)]
    return {
        "model": f"clip/{name}",
        "weights": "random",
        "head": "sentences",
        "tasks": ",".join(map(str, places)),
        "rounds": 3,
        "local-epochs": 4,
        "batch-size": 16,
        "learning-rate": 2e-3,
        "weight-decay": 0.0,
        "run-dir": str(tmp_path / "run"),
    }


def test_features_of_images_and_texts_are_open_clips(name: str) -> None:
    model, theirs = models.load_backbone(f"clip/{name}", "random"), hubs.load_clip(name, "random")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (theirs.visual.image_mean, theirs.visual.image_std))
    tokens = tokenise(TEXTS, model.tokenizer)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(images), theirs.encode_image((images / 255 - mean) / std), atol=1e-5, rtol=1e-4
        )
        wanted = theirs.encode_text(open_clip.get_tokenizer(name)(TEXTS))
        torch.testing.assert_close(model(tokens), wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(tokens[1:2, :4]), wanted[1:2], atol=1e-5, rtol=1e-4)


def test_heads_by_its_text_tower_are_clips_own_classifier(name: str, tmp_path: Path) -> None:
    model = models.load_backbone(f"clip/{name}", "random")
    prompts = [[f"a photo of a {label}.", f"art of the {label}."] for label in ("cat", "dog", "red bus")]
    source = models.HeadSource(model, None, ("cat", "dog", "bus"), prompts, f"clip/{name}", "random", 5, 0)  # type: ignore[arg-type]
    wanted = hubs.zero_shot(f"open_clip/{name}", "random", prompts)
    frozen = models.HEADS["zero-shot"](source)
    assert isinstance(frozen, models.Head)
    torch.testing.assert_close(frozen.weight, wanted.weight, atol=1e-6, rtol=1e-5)
    assert frozen.scale == pytest.approx(wanted.scale)
    live = models.restored(models.HEADS["sentences"](source).state())
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    one = hubs.zero_shot(f"open_clip/{name}", "random", [each[:1] for each in prompts])
    with torch.inference_mode():
        torch.testing.assert_close(live.logits(model, images), one.logits(model, images), atol=1e-4, rtol=1e-4)
        for parameter in (model.vit.text_projection, model.vit.visual.proj):
            before = live.logits(model, images)
            parameter.add_(torch.randn_like(parameter))
            assert not torch.allclose(live.logits(model, images), before, atol=1e-2)


@pytest.mark.parametrize("of", ["ViT-B-16", "RN50", "ViT-L-14"])
def test_the_last_blocks_are_those_of_each_tower_and_the_scale_is_nobodys(of: str) -> None:
    with torch.device("meta"):
        clip = open_clip.create_model(of, device="meta")
    model = models.Clip(clip, open_clip.SimpleTokenizer(), 224, 0.5, 0.5)
    set_trainable(model, "all")
    assert set(Layout.of(model).names) == {name for name, _ in model.named_parameters()} - {"vit.logit_scale"}
    set_trainable(model, "last-1")
    tuned = Layout.of(model).names
    count = len(clip.transformer.resblocks)
    of_text = {name for name in tuned if not name.startswith("vit.visual.")}
    begun = (f"vit.transformer.resblocks.{count - 1}.", "vit.ln_final.", "vit.text_projection")
    assert all(name.startswith(begun) for name in of_text)
    assert {start for start in begun if any(name.startswith(start) for name in of_text)} == set(begun)
    alone = models.Backbone(clip.visual, 224)
    set_trainable(alone, "last-1")
    assert [name.replace("vit.visual.", "vit.") for name in tuned if name not in of_text] == list(
        Layout.of(alone).names
    )
    assert levels(model)[1] == max(count, levels(alone)[1])


def test_a_federation_of_images_and_texts_learns_over_shared_towers(mixed: dict[str, Any], tmp_path: Path) -> None:
    few = mixed | {"rounds": 1, "local-epochs": 1}
    plain = run_loop(Settings.parse(few | {"run-dir": str(tmp_path / "plain")}))
    other = in_process(Settings.parse(few | {"run-dir": str(tmp_path / "flower")}))
    assert torch.equal(plain.base, other.base)
    run = run_loop(Settings.parse(mixed))
    for task in run.settings.task_names:
        party = Party(run.settings, task)
        pretrained = party.model.pretrained
        before, after = (party.evaluate(base, ("test",))["test"] for base in (pretrained, run.base))
        of_images = not task.endswith((".csv", ".jsonl"))
        assert after > (before if of_images else 0.9) >= before
        update = party.train(pretrained, 1)
        assert update.arrays is not None
        moved = {
            name.startswith("vit.visual."): True
            for name, entry in run.layout.views(party.settings.uplink.decode(update.arrays, run.layout)).items()
            if bool(entry.any())
        }
        assert set(moved) == ({True, False} if of_images else {False})  # texts leave the image tower where it is


@pytest.mark.parametrize(
    "more",
    [
        {"trainable": "lora", "codec-up": "int8"},
        {"trainable": "last-1", "merge": "tsv-m"},
        {"private": "vit.visual.*"},
        {"secure-aggregation": True, "proportion": 0.0},
        {"gradient-checkpointing": True, "precision": "bf16"},
        {"privacy": "dp-sgd", "dp-noise": 1.0, "local-epochs": 1},
        {"head": "prototypes"},
        {"head": "zero-shot"},
    ],
    ids=str,
)
def test_what_a_run_of_image_towers_can_do_one_of_both_can(more: dict[str, Any], mixed: dict[str, Any]) -> None:
    if "privacy" in more:  # one of each, for gradients of each record take their time
        more = more | {"tasks": ",".join(mixed["tasks"].split(",")[1:3])}
    run = run_loop(Settings.parse(mixed | {"rounds": 1, "local-epochs": 1, "weight-decay": 0.1} | more))
    assert bool(run.base.isfinite().all())
    before = Party(run.settings, run.settings.task_names[-1]).model.pretrained
    moved = run.layout.views(run.base[: run.layout.size] - before[: run.layout.size])
    of_images = {name.startswith("vit.visual.") for name, entry in moved.items() if bool(entry.any())}
    assert of_images == ({False} if "private" in more else {True, False})


def test_dp_sgd_takes_each_image_s_and_text_s_own_gradient(mixed: dict[str, Any]) -> None:
    settings = Settings.parse(mixed | {"privacy": "dp-sgd", "dp-noise": 1.0})
    for task in (settings.task_names[0], settings.task_names[-1]):
        party = Party(settings, task)
        model = party.model
        model.load(model.pretrained)
        inputs, labels = next(party.tuned_on.batches(batch_size=3))
        together = record_gradients(model.module, party.head, model.layout, model.shared, inputs, labels)
        for row, (one, label) in enumerate(zip(inputs, labels, strict=True)):
            assert model.flat.grad is not None
            model.flat.grad.zero_()
            party.head.loss(model.module, one[None], label[None]).backward()
            torch.testing.assert_close(together[row], model.flat.grad, atol=1e-4, rtol=1e-3)


def test_joint_training_takes_images_and_texts_in_one_batch(mixed: dict[str, Any]) -> None:
    settings = Settings.parse(mixed | {"rounds": 8, "local-epochs": 1})
    parties = run_joint(settings)
    assert all(party.rightly["test"].float().mean() > 0.9 for party in parties[2:])


def test_open_clip_loads_both_towers_and_predict_takes_images_and_texts(
    mixed: dict[str, Any], name: str, tmp_path: Path
) -> None:
    run = run_loop(Settings.parse(mixed | {"rounds": 1}))
    out = export(run.directory, "open_clip", tmp_path / "out").folder
    loaded, _ = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    state, before = loaded.state_dict(), hubs.load_clip(name, "random").state_dict()
    entries = run.layout.views(run.base)
    assert state.keys() - {key.removeprefix("vit.") for key in entries} == {"logit_scale"}
    assert torch.equal(state["logit_scale"], before["logit_scale"])
    assert all(torch.equal(state[key.removeprefix("vit.")], value) for key, value in entries.items())
    export(run.directory, "safetensors", tmp_path / "file")
    again = models.load_backbone(f"clip/{name}", str(tmp_path / "file" / "model.safetensors"))
    assert torch.equal(run.layout.flatten(again), run.base)

    picture = next((tmp_path / "data" / "red" / "test").rglob("*.png"))
    classify = Predictor(out)
    for given, task, place in (({"images": [picture]}, "red", 0), ({"texts": [ROWS[0][0]]}, "pets.csv", 2)):
        party = Party(run.settings, run.settings.task_names[place])
        party.model.load(run.base)
        inputs = decode(picture, 32)[None] if place == 0 else tokenise([ROWS[0][0]], party.model.module.tokenizer)
        with torch.inference_mode():
            wanted = party.head.logits(party.model.module, inputs).softmax(-1)[0]
        (found,) = classify(**given, task=task)  # type: ignore[arg-type]
        assert [found.classes[label] for label in party.data.classes] == pytest.approx(wanted.tolist(), abs=1e-5)
    for to in ("timm", "transformers"):
        with pytest.raises(SettingError, match=f"to='{to}'.*choose another format"):
            export(run.directory, to, tmp_path / to)


def test_what_does_not_go_with_sentences_is_refused(mixed: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"head='sentences': model='open_clip/{name}' reads no sentences"):
        run_loop(Settings.parse(mixed | {"model": f"open_clip/{name}"}))
    images = mixed["tasks"].split(",")[0]
    with pytest.raises(SettingError, match="head='sentences': the attacks know classifiers of features"):
        Scenario.parse({**mixed, "tasks": images, "attack": "inverting"})
    texts = {**mixed, "head": "prototypes", "tasks": mixed["tasks"].split(",")[2], "attack": "inverting"}
    of_texts = victims(Scenario.parse(texts))
    with pytest.raises(SettingError, match="task 'pets.csv' is of texts; the attacks look for images alone"):
        next(of_texts)
    for other in ("ViT-B-16-SigLIP", "xlm-roberta-base-ViT-B-32", "coca_ViT-B-32"):
        with pytest.raises(SettingError, match=f"model='clip/{other}': its text tower is not as CLIP's own"):
            Settings.parse(mixed | {"model": f"clip/{other}"})
    with pytest.raises(SettingError, match="model='clip/ViT-B-17' is unknown; did you mean"):
        Settings.parse(mixed | {"model": "clip/ViT-B-17"})
