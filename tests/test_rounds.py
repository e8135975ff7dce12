"""What a party does in a round: parts of an epoch, late and leaving tasks, FedProx, held-out images, alignment."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atm_fl.clients.app import app as client_app
from atm_fl.errors import SettingError
from atm_fl.experiments.joint import run_joint
from atm_fl.federation import client as party_module
from atm_fl.federation.client import Party, Update, parties_of
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.loop import run_loop
from atm_fl.federation.shared_model import shared_model
from atm_fl.optimizers import OPTIMIZERS
from atm_fl.runs.metrics import read_metrics
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings
from atm_fl.tasks import Split


def vector_of(update: Update) -> Tensor:
    """The task vector, float32 [n], of an update that travels as fp32."""
    assert update.arrays is not None
    return torch.from_numpy(update.arrays["values"])


def lines(run_dir: str | Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(Path(run_dir)) if line["kind"] == kind]


def seen_images(party: Party, rounds: range, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The positions in the party's training split of the images that it tunes on, round by round."""
    batches, images = Split.batches, []
    with monkeypatch.context() as patch:
        for number in rounds:
            seen: list[int] = []

            def record(
                split: Split, order: Tensor | None = None, *rest: Any, seen: list[int] = seen, **more: Any
            ) -> Any:
                if order is not None:
                    seen.extend(order.tolist())
                return batches(split, order, *rest, **more)

            patch.setattr(Split, "batches", record)
            party.train(party.model.pretrained, number)
            images.append(seen)
    return images


def test_parts_of_an_epoch_are_disjoint_and_whole(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.parse({**config, "local-epochs": 0.25, "rounds": 8})
    party = Party(settings, settings.task_names[0])
    parts = seen_images(party, range(1, 9), monkeypatch)
    assert [len(chunk) for chunk in parts] == [9] * 8  # of 36 images
    first, second = list(chain(*parts[:4])), list(chain(*parts[4:]))
    assert sorted(first) == sorted(second) == list(range(36))
    assert first != second
    assert seen_images(party, range(2, 3), monkeypatch) == parts[1:2]  # a resumed run sees the same


@pytest.mark.parametrize("epochs", [0.3, 1.5, 0, -1, 0.75])
def test_epochs_are_whole_or_one_part_of_m(config: dict[str, Any], epochs: float) -> None:
    with pytest.raises(SettingError, match=rf"local-epochs={epochs:g}: it must be a whole number, or 1/m"):
        Settings.parse({**config, "local-epochs": epochs})


def test_an_epoch_in_more_parts_than_images_is_refused(config: dict[str, Any]) -> None:
    settings = Settings.parse({**config, "local-epochs": 0.01})
    with pytest.raises(SettingError, match="local-epochs=0.01: red has too few images for it"):
        Party(settings, settings.task_names[0])


PARTICIPATION = {"participation": "green=2-, blue=1-2", "rounds": 4}


@pytest.mark.parametrize("replay", [0.0, 0.25])
def test_tasks_join_and_leave_but_are_always_evaluated(config: dict[str, Any], replay: float) -> None:
    plain = Settings.parse({**config, **PARTICIPATION, "replay": replay})
    run_loop(plain)
    tuned = {(line["round"], line["task"]): line["images"] for line in lines(plain.run_dir, "tuning")}
    expected = {(n, "red"): 36 for n in range(1, 5)} | {(n, "green"): 36 for n in range(2, 5)}
    expected |= {(1, "blue"): 36, (2, "blue"): 36} | ({(3, "blue"): 9, (4, "blue"): 9} if replay else {})
    assert tuned == expected
    evaluated = [(line["round"], line["task"]) for line in lines(plain.run_dir, "evaluation")]
    assert sorted(evaluated) == sorted((n, task) for n in range(5) for task in ("red", "green", "blue"))
    merged = [line["tasks"] for line in lines(plain.run_dir, "merge")]
    late = ["red", "green", "blue"] if replay else ["red", "green"]
    assert merged == [["red", "blue"], ["red", "green", "blue"], late, late]

    flower = Settings.parse({**plain.as_config(), "run-dir": plain.run_dir + "-flower"})
    base = serve(InProcessGrid(client_app, 3, flower.as_config()), flower).base
    again = run_loop(Settings.parse({**plain.as_config(), "resume": True})).base
    assert torch.equal(base, again)


def test_a_vector_from_a_task_that_takes_no_part_is_not_merged(config: dict[str, Any]) -> None:
    """A client that does not know the run's participation: its vector is left out."""
    settings = Settings.parse({**config, **PARTICIPATION, "rounds": 1})
    eager = InProcessGrid(client_app, 3, {**settings.as_config(), "participation": ""})
    run = serve(eager, settings)
    assert [line["tasks"] for line in lines(run.directory, "merge")] == [["red", "blue"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("green", "'green' is not of the form"),
        ("green=3-2", "'green=3-2' is not of the form"),
        ("green=0-", "'green=0-' is not of the form"),
        ("grean=2-", "there is no task 'grean'; did you mean 'green'"),
        ("red=2-, green=2-, blue=2-", "no task takes part in round 1"),
    ],
)
def test_a_participation_that_cannot_work_is_said(config: dict[str, Any], text: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Settings.parse({**config, "participation": text})


def test_a_merge_needs_enough_tasks_in_every_round(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="needs at least 3 tasks, not 2"):
        Settings.parse({**config, "participation": "red=2-", "merge": "multi-krum:f=0"})


def test_fedprox_is_the_gradient_of_its_loss(config: dict[str, Any]) -> None:
    """Two full-batch SGD steps against their closed form: the first is plain, the second is pulled back by μ τ₁."""
    rate, mu = 0.05, 0.7
    common = {"optimizer": "sgd", "learning-rate": rate, "weight-decay": 0.0, "clip-norm": 0.0, "batch-size": 36}
    settings = Settings.parse({**config, **common, "local-epochs": 2, "proximal": mu})
    party = Party(settings, settings.task_names[0])
    base = party.model.pretrained
    flat, head, data = party.model.flat, party.head, party.tuned_on

    def gradient(at: Tensor) -> Tensor:
        party.model.load(at)
        return party_module.full_gradient(party.model.module, head, flat, data)

    first = -rate * gradient(base)
    second = first - rate * (gradient(base + first) + mu * first)
    update = party.train(base, 1)
    torch.testing.assert_close(vector_of(update), second, rtol=1e-3, atol=1e-6)


def test_alignment_is_one_for_one_step_of_gradient_descent(config: dict[str, Any]) -> None:
    """The paper's Theorem: one full-batch step is exactly −η times the gradient."""
    common = {"optimizer": "sgd", "learning-rate": 0.01, "weight-decay": 0.0, "clip-norm": 0.0, "batch-size": 36}
    settings = Settings.parse({**config, **common, "alignment": True, "rounds": 1})
    run_loop(settings)
    assert [line["alignment"] for line in lines(settings.run_dir, "tuning")] == pytest.approx([1.0] * 3, abs=1e-4)


@pytest.mark.parametrize("name", ["proximal", "alignment"])
def test_what_needs_dense_parameters_is_refused_with_lora(config: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=f"{name}=.*: not with trainable='lora'"):
        Settings.parse({**config, name: {"proximal": 0.1, "alignment": True}[name], "trainable": "lora"})


def test_held_out_validation_images_are_not_tuned_on(config: dict[str, Any]) -> None:
    settings = Settings.parse({**config, "split": "validation", "holdout": 0.25})
    party = Party(settings, settings.task_names[0])
    held = party.splits["validation"]
    assert (len(held), len(party.tuned_on)) == (3, 9)
    assert isinstance(held.images, Tensor)
    assert isinstance(party.tuned_on.images, Tensor)
    every = {image.numpy().tobytes() for image in torch.cat([held.images, party.tuned_on.images])}
    assert every == {image.numpy().tobytes() for image in party.data.validation.images}  # type: ignore[union-attr]
    whole = Party(Settings.parse({**config, "split": "validation", "holdout": 0.0}), settings.task_names[0])
    assert len(whole.tuned_on) == len(whole.splits["validation"]) == 12


def test_validation_now_and_then_and_all_checkpoints(config: dict[str, Any]) -> None:
    settings = Settings.parse({**config, "rounds": 5, "validate-every": 2, "keep-checkpoints": 0})
    run = run_loop(settings)
    assert sorted({line["round"] for line in lines(run.directory, "evaluation")}) == [0, 2, 4, 5]
    assert len(list(run.directory.glob("checkpoint/*"))) == 5


@pytest.mark.parametrize("kind", ["plain", "dp-sgd", "private and dp-sgd", "joint"])
def test_the_learning_rate_falls_by_equal_steps_over_all_rounds(
    config: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    class Noted(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setitem(OPTIMIZERS, "sgd", lambda parameter, settings: Noted([parameter], lr=settings.learning_rate))
    config |= {"optimizer": "sgd", "learning-rate": 0.04, "final-learning-rate": 0.01, "rounds": 3, "batch-size": 12}
    config["tasks"] = config["tasks"].split(",")[0]
    if "dp-sgd" in kind:
        config |= {"privacy": "clip-only", "private": "*norm*" if "private" in kind else ""}
    if kind == "joint":
        run_joint(Settings.parse(config))
    else:
        run_loop(Settings.parse(config))
    steps = 3 * 36 // 12
    expected = [0.04 - 0.03 * step / steps for step in range(steps)]
    if "private" in kind:  # in each round the shared entries, then the own ones
        expected = [rate for number in range(3) for rate in expected[3 * number : 3 * number + 3] * 2]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "optimizer",
    [{}, {"optimizer": "sgd", "momentum": 0.9, "learning-rate": 0.01}, {"final-learning-rate": 1e-5}],
)
def test_with_its_optimizer_kept_one_party_s_parts_of_an_epoch_are_the_epoch(
    config: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    config |= {"tasks": config["tasks"].split(",")[0], "batch-size": 9, **optimizer}

    def end(name: str, **settings: Any) -> Tensor:
        return run_loop(Settings.parse({**config, **settings, "run-dir": config["run-dir"] + name})).base

    whole = end("-whole", rounds=1)
    kept = end("-kept", rounds=4, **{"local-epochs": 0.25, "keep-optimizer": True})
    anew = end("-anew", rounds=4, **{"local-epochs": 0.25})
    moved = (whole - shared_model(Settings.parse(config).of_model()).pretrained).norm()
    # AdamW makes much of rounding where gradients are next to nothing
    assert float((kept - whole).norm() / moved) < 1e-3
    assert float((anew - whole).norm() / moved) > 0.05


def test_a_kept_optimizer_outlives_the_process(config: dict[str, Any]) -> None:
    config |= {"keep-optimizer": True, "rounds": 3}
    whole = run_loop(Settings.parse(config))
    config |= {"run-dir": config["run-dir"] + "-broken"}
    settings = Settings.parse({**config, "rounds": 2})
    serve(InProcessGrid(client_app, len(settings.task_names), settings.as_config()), settings)
    resumed = run_loop(Settings.parse({**config, "resume": True}))
    assert torch.equal(resumed.base, whole.base)
    assert not any("optimizer_lost" in line for line in lines(resumed.directory, "tuning"))


def test_a_lost_optimizer_starts_anew_and_says_so(config: dict[str, Any]) -> None:
    config |= {"keep-optimizer": True}
    run = run_loop(Settings.parse({**config, "rounds": 2}))
    ClientState.forget(run.id)
    resumed = run_loop(Settings.parse({**config, "rounds": 3, "resume": True}))
    said = {line["round"] for line in lines(resumed.directory, "tuning") if line.get("optimizer_lost")}
    assert said == {3}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"local-epochs": 2.0},
        {"local-epochs": 0.5},
        {"privacy": "dp-sgd", "dp-noise": 1.0},
        {"private": "last-1"},
        {"keep-optimizer": True},
    ],
)
def test_client_momentum_adds_its_part_of_the_last_step_to_a_vector(
    config: dict[str, Any], changed: dict[str, Any]
) -> None:
    """At a learning rate of next to nothing a vector is that alone, of a round after none in two the half of it."""
    config |= {"client-momentum": 0.3, "learning-rate": 1e-12, "weight-decay": 0.0, **changed}
    party = parties_of(Settings.parse(config))[0]
    random = torch.Generator().manual_seed(0)
    layout, run = party.model.layout, "0" * 16
    bases = [party.model.pretrained + torch.randn(layout.size, generator=random) / 100 for _ in range(3)]
    for number, base, step in (
        (1, bases[0], torch.zeros(layout.size)),
        (2, bases[1], bases[1] - bases[0]),
        (4, bases[2], (bases[2] - bases[1]) / 2),
    ):
        arrays = party.train(base, number, run).arrays
        assert arrays is not None
        vector = party.chain.decode(arrays, party.context(number))
        assert torch.allclose(vector, 0.3 * step, atol=2e-6)  # of weights around 1, moved step by step


@pytest.mark.parametrize("changed", [{}, {"private": "last-1"}, {"privacy": "clip-only", "dp-clip": 1e6}])
def test_gradient_surgery_takes_back_nothing_of_the_last_step(config: dict[str, Any], changed: dict[str, Any]) -> None:
    """One step of SGD on all images: the whole vector is known from the gradient, with and against the last step."""
    one_step = {"optimizer": "sgd", "batch-size": 200, "weight-decay": 0.0, "learning-rate": 0.1}
    party = parties_of(Settings.parse(config | one_step | changed | {"gradient-surgery": True}))[0]
    plain = parties_of(Settings.parse(config | one_step | changed))[0]
    random, run = torch.Generator().manual_seed(0), "0" * 16
    base = party.model.pretrained.double()

    def vector(of: Party, base: Tensor, number: int) -> Tensor:
        arrays = of.train(base.float(), number, run).arrays
        assert arrays is not None
        return of.chain.decode(arrays, of.context(number)).double()

    against = 0
    for number in range(1, 7):
        before, base = base, base + torch.randn(len(base), generator=random).double() / 100
        free, last = vector(plain, base, number), base - before
        against += number > 1 and float(free @ last) < 0
        if number > 1 and float(free @ last) < 0:
            free = free - (free @ last) / (last @ last) * last
        assert torch.allclose(vector(party, base, number), free, atol=1e-6, rtol=1e-3)
    assert 1 <= against <= 4  # of five rounds


def test_client_momentum_outlives_the_process_and_its_loss_is_told(config: dict[str, Any]) -> None:
    config |= {"client-momentum": 0.5}
    whole = run_loop(Settings.parse(config))
    plain = run_loop(Settings.parse({**config, "client-momentum": 0.0, "run-dir": config["run-dir"] + "-plain"}))
    assert not torch.equal(plain.base, whole.base)
    for name, lose in (("-broken", False), ("-lost", True)):
        settings = Settings.parse({**config, "rounds": 2, "run-dir": config["run-dir"] + name})
        run = serve(InProcessGrid(client_app, len(settings.task_names), settings.as_config()), settings)
        if lose:
            ClientState.forget(run.id)
        resumed = run_loop(Settings.parse({**config, "run-dir": config["run-dir"] + name, "resume": True}))
        said = {line["round"] for line in lines(resumed.directory, "tuning") if line.get("tuned_from_lost")}
        assert said == ({3} if lose else set())
        assert torch.equal(resumed.base, whole.base) != lose


def test_a_task_with_epochs_of_its_own_tunes_as_if_all_had_them(config: dict[str, Any]) -> None:
    folders = config["tasks"].split(",")

    def update(folder: str, **changed: Any) -> Update:
        settings = Settings.parse({**config, **changed})
        return Party(settings, folder).train(shared_model(settings.of_model()).pretrained, 1)

    for folder, epochs in zip(folders, (3.0, 1.0, 2.0), strict=True):
        own = update(folder, **{"task-epochs": "red=3, blue=2"})
        all_alike = update(folder, **{"local-epochs": epochs})
        assert own.arrays is not None
        assert all_alike.arrays is not None
        assert own.tuning["steps"] == all_alike.tuning["steps"]
        assert all(np.array_equal(own.arrays[name], array) for name, array in all_alike.arrays.items())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("rde=2", "there is no task 'rde'; did you mean 'red'?"),
        ("red=0", "red must have a whole number, 1 or more"),
        ("red=0.5", "red must have a whole number, 1 or more"),
        ("red=two", "task-epochs='red=two'"),
    ],
)
def test_epochs_that_a_task_cannot_have_are_refused(config: dict[str, Any], value: str, words: str) -> None:
    with pytest.raises(SettingError) as error:
        Settings.parse({**config, "task-epochs": value})
    assert words in str(error.value)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_a_client_momentum_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(SettingError, match="client-momentum=.*: it must be 0 or more"):
        Settings.parse({"client-momentum": value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"optimizer": "sgd"}, "sgd with momentum=0 has no state"), ({"trainable": "lora"}, "not with trainable='lora'")],
)
def test_an_optimizer_that_cannot_be_kept_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=f"keep-optimizer=.*{words}"):
        Settings.parse({"keep-optimizer": True, **settings})
