"""Elastic weight consolidation: a party's own past model, and what mattered in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from atm_fl.clients.app import app as client_app
from atm_fl.errors import SettingError
from atm_fl.federation.client import Party, parties_of
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.loop import run_loop
from atm_fl.models import Head
from atm_fl.runs.metrics import read_metrics
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings
from atm_fl.tasks import Split
from atm_fl.training.ewc import RECORDS, Memory, fisher_diagonal
from atm_fl.vectors import Layout, bind

RUN = "0" * 16
ONE_STEP: dict[str, Any] = {"optimizer": "sgd", "batch-size": 200, "weight-decay": 0.0, "clip-norm": 0.0}
"""A round is one step of gradient descent on all images."""


def vector_of(party: Party, base: Tensor, number: int) -> Tensor:
    arrays = party.train(base, number, RUN).arrays
    assert arrays is not None
    return party.chain.decode(arrays, party.context(number))


class Pixels(nn.Module):
    """Two features of an image: a linear map of its mean colours."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 2, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.map(images.float().mean((2, 3)) / 255)


def test_the_fisher_information_is_that_of_the_models_own_predictions() -> None:
    """Of one record many times over, against the exact sum over classes: F = Σ_y p(y) (∂ log p(y) / ∂θ)²."""
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 4, 4), generator=random, dtype=torch.uint8)
    data = Split(image.expand(RECORDS, -1, -1, -1), torch.zeros(RECORDS, dtype=torch.int64))
    module = Pixels()
    module.map.weight.data = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.4, -0.3]])
    head = Head(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.7, 0.7]]), torch.zeros(3), 1.0)
    weight = module.map.weight.detach().clone().requires_grad_()
    features = functional.normalize((image.float().mean((2, 3)) / 255) @ weight.T, dim=-1)
    chances = functional.log_softmax(features @ head.weight.T, -1)[0]
    squares = [torch.autograd.grad(chance, weight, retain_graph=True)[0].square() for chance in chances]
    exact = sum(chance.exp().item() * square for chance, square in zip(chances, squares, strict=True))
    empirical = squares[0]
    flat = bind(module, Layout.of(module))
    drawn = torch.stack([fisher_diagonal(module, head, flat, data, seed) for seed in range(30)]).mean(0).view(2, 3)
    assert torch.allclose(drawn, exact, rtol=0.05)
    assert not torch.allclose(drawn, empirical, rtol=0.3)


def test_a_round_is_the_gradient_of_loss_and_penalty(config: dict[str, Any]) -> None:
    """One step of gradient descent in the second round, with the penalty differentiated by autograd."""
    rate, weight = 1e-4, 30.0
    settings = Settings.parse({**config, **ONE_STEP, "learning-rate": rate, "ewc": weight})
    party = parties_of(settings)[0]
    plain = parties_of(Settings.parse({**config, **ONE_STEP, "learning-rate": rate}))[0]
    first = party.model.pretrained
    anchor = first + vector_of(party, first, 1)
    kept = ClientState(RUN, party.client).last("ewc", 2)
    assert kept is not None
    assert torch.allclose(kept["anchor"], anchor, atol=1e-6)
    second = first + torch.randn(len(first), generator=torch.Generator().manual_seed(1)) / 10
    free = vector_of(plain, second, 2)
    penalty = second.clone().requires_grad_()
    (weight / 2 * (kept["fisher"] * (penalty - anchor).square()).sum()).backward()
    assert penalty.grad is not None
    assert float(penalty.grad.norm()) > 0.01 * float(free.norm()) / rate
    assert torch.allclose(vector_of(party, second, 2), free - rate * penalty.grad, atol=2e-6, rtol=1e-3)


def test_what_mattered_stays_and_the_rest_goes(config: dict[str, Any]) -> None:
    """The base has moved away from a party's last model: fifty steps of gradient descent, without and with a penalty
    as steep as their rate allows (rate · λ · max F = 1/2), bring back the elements of large information alone."""
    rate = 1e-6
    common = {**config, **ONE_STEP, "learning-rate": rate, "local-epochs": 50}
    first = parties_of(Settings.parse({**common, "ewc": 1.0}))[0]
    anchor = first.model.pretrained + vector_of(first, first.model.pretrained, 1)
    kept = ClientState(RUN, first.client).last("ewc", 2)
    assert kept is not None
    fisher = kept["fisher"]
    large, small = fisher > fisher.max() / 10, fisher < fisher.max() / 1e5
    assert min(int(large.sum()), int(small.sum())) >= 10
    moved = torch.randn(len(anchor), generator=torch.Generator().manual_seed(0)) / 100
    for weight, back in ((0.0, False), (float(0.5 / (rate * fisher.max())), True)):
        party = parties_of(Settings.parse({**common, "ewc": weight}))[0]
        left = moved + vector_of(party, anchor + moved, 2)
        assert (float(left[large].norm() / moved[large].norm()) < 0.1) == back
        assert 0.95 < float(left[small].norm() / moved[small].norm()) < 1.05


def test_the_memory_is_the_mean_of_the_rounds() -> None:
    random = torch.Generator().manual_seed(0)
    rounds = torch.rand(4, 5, generator=random)
    memory = Memory(torch.zeros(5), rounds[0], 1)
    for fisher in rounds[1:]:
        memory = Memory.of(memory.with_round(fisher + 1, fisher).state())
    assert torch.allclose(memory.fisher, rounds.mean(0))
    assert torch.equal(memory.anchor, rounds[-1] + 1)


@pytest.mark.parametrize("changed", [{}, {"private": "last-1"}, {"model": "tiny_resnet", "rounds": 2}])
def test_the_memory_outlives_the_process_and_its_loss_is_told(config: dict[str, Any], changed: dict[str, Any]) -> None:
    config |= {"ewc": 100.0} | changed
    whole = run_loop(Settings.parse(config))
    plain = run_loop(Settings.parse({**config, "ewc": 0.0, "run-dir": config["run-dir"] + "-plain"}))
    assert not torch.equal(plain.base, whole.base)
    last = config["rounds"]
    for name, lose in (("-broken", False), ("-lost", True)):
        settings = Settings.parse({**config, "rounds": last - 1, "run-dir": config["run-dir"] + name})
        run = serve(InProcessGrid(client_app, len(settings.task_names), settings.as_config()), settings)
        for client in settings.party_names if lose else ():
            for path in ClientState(run.id, client).folder.glob("ewc-*"):
                path.unlink()
        resumed = run_loop(Settings.parse({**config, "run-dir": config["run-dir"] + name, "resume": True}))
        said = {line["round"] for line in read_metrics(resumed.directory) if line.get("ewc_lost")}
        assert said == ({last} if lose else set())
        assert torch.equal(resumed.base, whole.base) != lose


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ewc": -1.0}, "ewc=-1.0: it must be 0 or more"),
        ({"ewc": float("nan")}, "ewc=nan: it must be 0 or more"),
        ({"ewc": 1.0, "trainable": "lora"}, "ewc=1.0: not with trainable='lora'"),
        ({"ewc": 1.0, "privacy": "dp-sgd", "dp-noise": 1.0}, "ewc=1.0: not with privacy='dp-sgd'"),
    ],
)
def test_what_it_does_not_go_with_is_refused(config: dict[str, Any], changed: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError) as error:
        Settings.parse(config | changed)
    assert words in str(error.value)
