"""DP-SGD and its accounting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from atm_fl.clients.app import app as client_app
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.client import Party, Update
from atm_fl.federation.loop import run_loop
from atm_fl.models import heads
from atm_fl.privacy.accounting import Spent, calibrate, epsilon
from atm_fl.privacy.dp_sgd import clipped_sum, record_gradients
from atm_fl.privacy.noise import party_secret
from atm_fl.runs.checkpoints import checkpoints
from atm_fl.runs.metrics import read_metrics
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings
from atm_fl.vectors import Layout

DP = {"privacy": "dp-sgd", "batch-size": 12, "dp-noise": 1.0, "learning-rate": 0.01}


@pytest.fixture(autouse=True)
def _own_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' tasks hold the same records: what one test spends another would pay."""
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))


def vector_of(update: Update) -> Tensor:
    """The task vector, float32 [n], of an update that travels as fp32."""
    assert update.arrays is not None
    return torch.from_numpy(update.arrays["values"])


def looped(party: Party, images: Tensor, labels: Tensor) -> Tensor:
    """Gradients of one record after the other, by plain autograd."""
    flat, gradients = party.model.flat, []
    assert flat.grad is not None
    for image, label in zip(images, labels, strict=True):
        flat.grad.zero_()
        functional.cross_entropy(party.head(party.model.module(image[None])), label[None]).backward()
        gradients.append(flat.grad.clone())
    return torch.stack(gradients)


@pytest.mark.parametrize("model", ["tiny", "vit_micro", "clip"])
def test_gradients_by_record_equal_a_loops(config: dict[str, Any], model: str, clip: str) -> None:
    chosen = {"model": clip, "weights": "random"} if model == "clip" else {"model": model}
    settings = Settings.parse({**config, **DP, **chosen})
    party = Party(settings, settings.task_names[0])
    party.model.load(party.model.pretrained)
    images, labels = next(party.tuned_on.batches(torch.arange(6), 6))
    layout = Layout.of(party.model.module)
    before = party.model.module(images)
    ours = record_gradients(party.model.module, party.head, layout, party.model.flat, images, labels)
    theirs = looped(party, images, labels)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6
    assert torch.equal(party.model.module(images), before)  # no layer was replaced


def test_without_noise_and_clip_it_is_gradient_descent(config: dict[str, Any]) -> None:
    """With batches of all records, four steps are four of plain full-batch SGD."""
    plain = {"batch-size": 36, "optimizer": "sgd", "learning-rate": 0.05, "weight-decay": 0.0, "clip-norm": 0.0}
    plain |= {"local-epochs": 4, "head": "prototypes", "shots": 1}
    settings = Settings.parse({**config, **plain})
    unclipped = {"privacy": "clip-only", "dp-clip": math.inf, "clip-norm": 10.0}  # its default has no effect there
    private = Settings.parse({**config, **plain, **unclipped, "accumulate": 3})
    one, other = (Party(actual, settings.task_names[0]) for actual in (settings, private))
    other.head = one.head
    base = one.model.pretrained
    first, second = one.train(base, 1), other.train(base, 1)
    plain_vector = vector_of(first)
    assert float((plain_vector - vector_of(second)).norm() / plain_vector.norm()) < 1e-5
    assert second.tuning["epsilon"] == math.inf
    assert "loss" not in second.tuning


def test_a_step_is_the_clipped_sum_and_noise_of_the_right_size(config: dict[str, Any]) -> None:
    """One full-batch SGD step with rate 1: without noise the closed form, with noise a deviation of σ C / batch."""
    common = {"batch-size": 36, "optimizer": "sgd", "learning-rate": 1.0, "weight-decay": 0.0}
    clip, noise = 0.3, 2.0
    quiet = Settings.parse({**config, **common, "privacy": "clip-only", "dp-clip": clip})
    party = Party(quiet, quiet.task_names[0])
    base = party.model.pretrained
    party.model.load(base)
    gradients = looped(party, *next(party.tuned_on.batches(None, 36)))
    norms = gradients.norm(dim=1)
    assert bool((norms > clip).any())
    expected = -(gradients * (clip / norms).clamp_max(1.0)[:, None]).sum(0) / 36
    vector = vector_of(party.train(base, 1))
    torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-7)
    noisy = Settings.parse({**config, **common, "privacy": "dp-sgd", "dp-clip": clip, "dp-noise": noise})
    drawn = vector_of(Party(noisy, noisy.task_names[0]).train(base, 1))
    assert float((drawn - expected).std()) == pytest.approx(noise * clip / 36, rel=0.05)


@pytest.mark.parametrize(
    ("rate", "noise", "steps"), [(0.01, 1.0, 1000), (0.027, 1.0, 375), (0.1, 2.0, 100), (1.0, 5.0, 10), (0.05, 0.7, 60)]
)
def test_epsilon_is_what_opacus_counts(rate: float, noise: float, steps: int) -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    ours = epsilon([Spent(rate, noise, steps)], 1e-5)
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history, rdp.history = [(noise, rate, steps)], [(noise, rate, steps)]
    assert ours == pytest.approx(prv.get_epsilon(1e-5), rel=0.02)
    looser = epsilon([Spent(rate, noise, steps)], 1e-5, "rdp")
    assert looser == pytest.approx(rdp.get_epsilon(1e-5), rel=0.02)
    assert looser > ours


def test_noise_is_calibrated_from_above() -> None:
    noise = calibrate(3.0, 1e-5, 0.05, 100)
    assert epsilon([Spent(0.05, noise, 100)], 1e-5) <= 3.0
    assert epsilon([Spent(0.05, 0.99 * noise, 100)], 1e-5) > 3.0


def test_parts_of_a_history_add_up_in_any_order() -> None:
    parts = [Spent(0.1, 1.0, 10), Spent(0.2, 2.0, 5), Spent(0.1, 1.0, 20)]
    assert epsilon(parts, 1e-5) == epsilon(parts[::-1], 1e-5) == epsilon([Spent(0.1, 1.0, 30), parts[1]], 1e-5)
    assert epsilon([], 1e-5) == 0
    assert epsilon([*parts, Spent(0.1, 0.0, 1)], 1e-5) == math.inf


def spent_by_round(run_dir: str | Path, task: str = "red") -> list[float]:
    return [
        line["epsilon"] for line in read_metrics(Path(run_dir)) if line["kind"] == "tuning" and line["task"] == task
    ]


def test_epsilon_grows_over_rounds_and_a_restart_and_runtimes_agree(config: dict[str, Any]) -> None:
    whole = run_loop(Settings.parse({**config, **DP, "rounds": 4}))
    actual = spent_by_round(whole.directory)
    assert actual == sorted(actual)
    assert actual[0] > 0
    expected = [epsilon([Spent(12 / 36, 1.0, 3 * number)], 1e-5) for number in range(1, 5)]
    assert actual == pytest.approx(expected)

    # rounds that are done again in another process, after a restart and in another runtime go on and cost once
    again = Settings.parse({**config, **DP, "rounds": 2, "run-dir": config["run-dir"] + "-again"})
    serve(InProcessGrid(client_app, 3, again.as_config()), again)
    resumed = Settings.parse({**again.as_config(), "rounds": 4, "resume": True})
    run = serve(InProcessGrid(client_app, 3, resumed.as_config()), resumed)
    assert spent_by_round(run.directory) == pytest.approx(expected)


def test_a_round_that_is_lost_is_repeated_to_the_bit_and_costs_once(config: dict[str, Any]) -> None:
    settings = Settings.parse({**config, **DP, "keep-checkpoints": 0})
    run = run_loop(settings)
    bases = {path.name: path.read_bytes() for path in checkpoints(run.directory)}
    for path in checkpoints(run.directory)[-2:]:
        path.unlink()
    again = run_loop(Settings.parse({**config, **DP, "keep-checkpoints": 0, "resume": True}))
    assert {path.name: path.read_bytes() for path in checkpoints(run.directory)} == bases
    assert spent_by_round(again.directory)[-1] == epsilon([Spent(12 / 36, 1.0, 9)], 1e-5)


def test_the_secret_is_the_owners_alone(tmp_path: Path) -> None:
    secret = party_secret(tmp_path)
    assert len(secret) == 64
    assert party_secret(tmp_path) == secret
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("report")
def test_a_run_stops_or_warns_when_its_budget_is_spent(config: dict[str, Any]) -> None:
    target = {"privacy": "dp-sgd", "batch-size": 12, "dp-epsilon": 3.0, "learning-rate": 0.01, "rounds": 2}
    run = run_loop(Settings.parse({**config, **target}))
    assert 2.9 < spent_by_round(run.directory)[-1] <= 3.0
    longer = {**config, **target, "rounds": 3, "resume": True}
    with pytest.raises(RunError, match=r"red: round 3 would bring its ε to 3\.\d+, over dp-epsilon=3"):
        run_loop(Settings.parse(longer))
    in_flower = Settings.parse(longer)
    with pytest.raises(RunError, match=r"red: .*round 3 would bring its ε"):
        serve(InProcessGrid(client_app, 3, in_flower.as_config()), in_flower)
    run_loop(Settings.parse({**longer, "dp-policy": "warn"}))
    warned = [line["text"] for line in read_metrics(run.directory) if line["kind"] == "warning"]
    assert any("red: its ε is" in text for text in warned)
    assert "ε by RDP" in (run.directory / "report.html").read_text()


def test_heads_of_a_private_run_are_made_from_images_that_are_not_tuned_on(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    make = heads.prototypes
    monkeypatch.setattr(heads, "prototypes", lambda model, data, *rest: used.append(data) or make(model, data, *rest))
    for split in ("train", "validation"):
        settings = Settings.parse({**config, **DP, "split": split, "shots": 2, "seed": 7})
        party = Party(settings, settings.task_names[0])
        assert used.pop() is (party.data.validation if split == "train" else party.data.train)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dp-noise": 1.0}, "dp-noise=1: it needs privacy='dp-sgd'"),
        ({"privacy": "dp-sgd", "dp-noise": 1.0, "dp-epsilon": 3.0}, "give one of them"),
        ({"privacy": "dp-sgd", "dp-noise": 1.0, "dp-clip": math.inf}, "choose a finite dp-clip"),
        ({"privacy": "dp-sgd"}, "privacy='dp-sgd' without noise protects nothing: give dp-epsilon or dp-noise"),
        ({"privacy": "clip-only", "dp-noise": 1.0}, "dp-noise=1: it needs privacy='dp-sgd'"),
        ({"privacy": "dp-sgd", "dp-noise": 1.0, "split": "validation", "holdout": 0.0}, "holdout=0: with privacy"),
        ({"privacy": "clip-only", "split": "validation", "holdout": 0.0}, "holdout=0: with privacy"),
        ({"privacy": "dp-sgd", "dp-clip": 0.0}, "dp-clip=0: it must be a positive number"),
        ({"privacy": "dp-sgd", "dp-delta": 1.0}, "dp-delta=1: it must be between 0 and 1"),
        ({"privacy": "dp-sgd", "dp-epsilon": -1.0}, "dp-epsilon=-1.0: it must be 0 or more"),
        ({"privacy": "dp-sgd", "dp-noise": 1.0, "alignment": True}, "alignment=True: not with privacy"),
        ({"privacy": "dp-sgd", "dp-noise": 1.0, "replay": 0.1}, "replay=0.1: not with privacy"),
    ],
)
def test_private_settings_that_cannot_work_are_said(config: dict[str, Any], wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Settings.parse({**config, **wrong})


def test_low_rank_updates_train_privately_too(config: dict[str, Any]) -> None:
    settings = Settings.parse({**config, **DP, "trainable": "lora", "rounds": 1})
    party = Party(settings, settings.task_names[0])
    assert float(vector_of(party.train(party.model.pretrained, 1)).norm()) > 0


def test_a_record_on_which_a_crafted_base_overflows_does_not_show() -> None:
    """No noise hides a NaN: a gradient that is not finite counts as zero, and the others' sum is as without it."""
    gradients = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    without = clipped_sum(gradients[:2].clone(), 1.0)
    gradients[2, 0], gradients[3, 1], gradients[4] = float("nan"), float("inf"), 3e38
    total = clipped_sum(gradients, 1.0)
    assert float((total - without).norm()) <= 1.0 + 1e-6


def test_half_a_secret_is_none(tmp_path: Path) -> None:
    """What a crash left would be a key that anybody can guess."""
    (tmp_path / "secret").write_text("")
    with pytest.raises(RunError, match="holds no secret of 32 bytes"):
        party_secret(tmp_path)


def test_a_base_on_which_some_images_overflow_gives_a_vector_of_numbers(config: dict[str, Any]) -> None:
    """A scale of the patch embedding at which brighter images have no gradient: the server would see that they are."""
    folder = config["tasks"].split(",")[0]
    private = {"privacy": "dp-sgd", "dp-noise": 8.0, "batch-size": 36, "optimizer": "sgd", "learning-rate": 1e-3}
    party = Party(Settings.parse({**config, **private, "tasks": folder}), folder)
    model = party.model
    images, labels = next(iter(party.tuned_on.batches(torch.arange(36), 36, 0)))
    low, high, lost = 0.0, 38.0, 0
    while not 0 < lost < 36:
        assert high - low > 1e-4
        middle = (low + high) / 2
        base = model.pretrained.clone()
        model.layout.views(base)["vit.patch_embed.proj.weight"].mul_(10**middle)
        model.load(base)
        gradients = record_gradients(model.module, party.head, model.layout, model.flat, images, labels)
        lost = int((~gradients.isfinite().all(dim=1)).sum())
        low, high = (middle, high) if lost == 0 else (low, middle)
    arrays = party.train(base, 1).arrays
    assert arrays is not None
    assert bool(torch.from_numpy(arrays["values"]).isfinite().all())


def test_a_party_counts_no_rounds_without_a_target(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three million rounds, announced by a server, would hold it for a minute."""
    settings = Settings.parse({**config, "rounds": 3_000_000, "participation": "red=2-5"})
    monkeypatch.setattr(Settings, "part_taken", None)
    assert Party(settings, config["tasks"].split(",")[0]).task == "red"
