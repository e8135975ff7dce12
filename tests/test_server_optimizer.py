"""Server optimizers against torch's and Flower's, and in runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as flower
from torch import Tensor

from atm_fl.errors import RunError, SettingError
from atm_fl.federation.loop import run_loop
from atm_fl.merging.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizer
from atm_fl.runs.run import Run
from atm_fl.settings import Settings
from atm_fl.vectors import digest

ROUNDS, SIZE, RATE, MOMENTUM, BETA2, EPSILON = 6, 50, 0.3, 0.8, 0.95, 1e-2


def deltas() -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(SIZE, generator=random) * 0.1 for _ in range(ROUNDS)]


def ours(name: str) -> Tensor:
    """Where the base, 0 at first, is after the rounds."""
    optimizer = ServerOptimizer(name, RATE, MOMENTUM, BETA2, EPSILON)
    base = torch.zeros(SIZE)
    for number, delta in enumerate(deltas(), 1):
        base = base + optimizer.step(delta, number)
    return base


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("none", lambda p: torch.optim.SGD(p, lr=RATE)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=RATE, momentum=MOMENTUM)),
        ("nesterov", lambda p: torch.optim.SGD(p, lr=RATE, momentum=MOMENTUM, nesterov=True)),
        ("adam", lambda p: torch.optim.Adam(p, lr=RATE, betas=(MOMENTUM, BETA2), eps=EPSILON)),
        ("adagrad", lambda p: torch.optim.Adagrad(p, lr=RATE, eps=EPSILON)),
    ],
)
def test_it_equals_torch_with_minus_the_merged_vector_as_gradient(
    name: str, make: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> None:
    base = torch.zeros(SIZE, requires_grad=True)
    optimizer = make([base])
    for delta in deltas():
        base.grad = -delta
        optimizer.step()
    torch.testing.assert_close(ours(name), base.detach(), rtol=1e-5, atol=1e-6)


def test_yogi_equals_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower.FedAvg, "aggregate_train", lambda self, number, replies: (replies, None))
    theirs = flower.FedYogi(eta=RATE, beta_1=MOMENTUM, beta_2=BETA2, tau=EPSILON)
    base = np.zeros(SIZE, np.float32)
    for number, delta in enumerate(deltas(), 1):
        theirs.current_arrays = {"w": base}
        arrays, _ = theirs.aggregate_train(number, ArrayRecord({"w": Array(base + delta.numpy())}))  # type: ignore[arg-type]
        assert arrays is not None
        base = arrays["w"].numpy()
    torch.testing.assert_close(ours("yogi"), torch.from_numpy(base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_resumed_run_equals_an_unbroken_one(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    config |= {"server-optimizer": f"{name}:learning-rate=0.01", "rounds": 3}
    whole = digest(run_loop(Settings.parse(config)).base)
    broken = config | {"run-dir": str(tmp_path / "broken")}
    run_loop(Settings.parse(broken | {"rounds": 2}))
    assert digest(run_loop(Settings.parse(broken | {"resume": True})).base) == whole


def test_momentum_goes_on_with_the_steps_of_earlier_rounds(config: dict[str, Any], tmp_path: Path) -> None:
    """With a merge that gives nothing any more, the base still moves by β₁ times its last step."""
    config |= {"server-optimizer": "momentum", "rounds": 1}
    run = run_loop(Settings.parse(config))
    first = run.base - Run(Settings.parse(config | {"run-dir": str(tmp_path / "other")})).base
    before = run.base.clone()
    run.advance(torch.zeros_like(before))
    torch.testing.assert_close(run.base - before, 0.9 * first, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"server-optimizer": "adm"}, "server-optimizer='adm'.*adam"),
        ({"server-optimizer": "momentum:momentum=1"}, "momentum=1: it must be at least 0 and below 1"),
        ({"server-optimizer": "none:learning-rate=0"}, "learning-rate=0: it must be above 0"),
        ({"merge": "tise"}, "merge='tise' is unknown; did you mean 'ties'"),
        ({"merge": "ties:densty=0.1"}, "no option 'densty'; did you mean 'density'"),
        ({"merge": "ties:density=2"}, "density=2: it must be above 0 and at most 1"),
        ({"merge": "ties:density"}, "'density' is not of the form key=value"),
        ({"merge": "ties:scaling=2"}, "scaling is a setting of its own; write scaling=2"),
        (
            {"merge": "multi-krum:f=1"},
            "merge='multi-krum' with scaling=1.0, f=1 needs at least 5 tasks, not 3",
        ),
        ({"task-scaling": "rad=2"}, "there is no task 'rad'; did you mean 'red'"),
        ({"task-scaling": "red=big"}, "task-scaling='red=big'"),
        ({"layer-scaling": "*.mlp=true"}, "factor of '\\*.mlp' must be a finite number"),
    ],
)
def test_settings_that_cannot_work_are_named(change: dict[str, Any], words: str, config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=words):
        Settings.parse(config | change)


def test_a_layer_that_is_not_there_ends_the_run_before_it_begins(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="layer-scaling: '\\*.mpl.\\*' matches no entry"):
        Run(Settings.parse(config | {"layer-scaling": "*.mpl.*=2"}))


def test_task_and_layer_scaling_multiply_vectors_and_entries(config: dict[str, Any], tmp_path: Path) -> None:
    def step(name: str, **change: Any) -> dict[str, Tensor]:
        settings = Settings.parse(config | {"rounds": 1, "run-dir": str(tmp_path / name)} | change)
        base = Run(settings).base
        run = run_loop(settings)
        return run.layout.views(run.base - base)

    plain = step("plain")
    layers = step("layers", **{"layer-scaling": "vit.blocks.0.mlp.*=0, vit.blocks.*=2"})
    assert not layers["vit.blocks.0.mlp.fc1.weight"].any()
    torch.testing.assert_close(layers["vit.blocks.0.attn.qkv.weight"], 2 * plain["vit.blocks.0.attn.qkv.weight"])
    assert torch.equal(layers["vit.pos_embed"], plain["vit.pos_embed"])
    alone = step("alone", **{"task-scaling": "red=3, green=0, blue=0"})
    red = step("red", tasks=config["tasks"].split(",")[0])
    torch.testing.assert_close(alone["vit.pos_embed"], red["vit.pos_embed"], rtol=1e-4, atol=1e-7)


def test_a_step_that_is_not_finite_ends_the_run(settings: Settings) -> None:
    run = Run(settings)
    with pytest.raises(RunError, match="not finite"):
        run.advance(torch.full_like(run.base, torch.inf))
