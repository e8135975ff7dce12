"""ATM's theory in float64: task vectors as gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from atm_fl import models, vectors
from atm_fl.merging import make_merge
from atm_fl.settings import Settings
from atm_fl.tasks import Split
from atm_fl.training.local import task_vector, tune

IMAGES, CLASSES, TASKS = 24, 3, 3


class Problem:
    """A tiny float64 ViT and three tasks of random images; losses and gradients by plain autograd, not by our code."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.model = models.load_backbone("tiny").double()
        self.layout = vectors.Layout.of(self.model)
        self.flat = vectors.bind(self.model, self.layout)
        # A fresh ViT's class token is all but zero, and its layer norm's curvature with it unbounded: start elsewhere.
        self.base = 0.2 * torch.randn(self.layout.size, generator=random, dtype=torch.float64)
        self.heads = [
            models.Head(torch.randn(CLASSES, 16, generator=random).double(), torch.zeros(CLASSES).double())
            for _ in range(TASKS)
        ]
        self.data = [
            Split(
                torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=random).byte(),
                torch.randint(0, CLASSES, (IMAGES,), generator=random),
            )
            for _ in range(TASKS)
        ]

    def gradient(self, base: Tensor, task: int) -> Tensor:
        """∇L_t(base) by torch.func on the module, independent of the flat binding."""

        def loss(flat: Tensor) -> Tensor:
            named = self.layout.views(flat)
            features = torch.func.functional_call(self.model, named, (self.data[task].images,))
            return functional.cross_entropy(self.heads[task](features), self.data[task].labels)

        return torch.func.grad(loss)(base)

    def vector(self, base: Tensor, task: int, rate: float, steps: int = 1) -> Tensor:
        """τ_t after `steps` full-batch steps of our own tuning."""
        settings = Settings.parse(
            {"optimizer": "sgd", "learning-rate": rate, "weight-decay": 0.0, "clip-norm": 0.0, "batch-size": IMAGES,
             "local-epochs": steps, "model": "tiny"}
        )  # fmt: skip
        self.flat.data.copy_(base)
        tune(self.model, self.heads[task], self.flat, self.data[task], settings, seed=0)
        return task_vector(self.flat, base)

    def round(self, base: Tensor, rate: float, steps: int = 1) -> Tensor:
        """base after one round of mean-merged ATM."""
        merge = make_merge("mean", self.layout)
        for task in range(TASKS):
            merge.add(str(task), self.vector(base, task, rate, steps))
        return base + merge.result()

    def joint(self, base: Tensor, rate: float, steps: int = 1) -> Tensor:
        """base after `steps` of joint gradient descent on the mean loss."""
        for _ in range(steps):
            base = base - rate * torch.stack([self.gradient(base, task) for task in range(TASKS)]).mean(0)
        return base


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_one_full_batch_step_gives_minus_rate_times_gradient(problem: Problem) -> None:
    for task in range(TASKS):
        expected = -0.1 * problem.gradient(problem.base, task)
        assert relative(problem.vector(problem.base, task, 0.1), expected) < 1e-12


def test_mean_merged_atm_with_one_step_is_joint_gradient_descent(problem: Problem) -> None:
    ours = theirs = problem.base
    for _ in range(5):
        ours, theirs = problem.round(ours, 0.1), problem.joint(theirs, 0.1)
    assert relative(ours - problem.base, theirs - problem.base) < 1e-10


@pytest.mark.parametrize("steps", [2, 4])
def test_over_more_steps_the_difference_is_of_second_order_in_the_rate(problem: Problem, steps: int) -> None:
    rates = [1e-5, 2e-5, 4e-5]
    difference: Callable[[float], float] = lambda rate: float(  # noqa: E731
        (problem.round(problem.base, rate, steps) - problem.joint(problem.base, rate, steps)).norm()
    )
    slope = np.polyfit(np.log(rates), np.log([difference(rate) for rate in rates]), 1)[0]
    assert 1.8 < slope < 2.2


def test_binding_and_flat_optimizer_equal_plain_adamw(problem: Problem) -> None:
    """Our flat, fused AdamW with clipping against torch's on the module's own parameters, both in float32."""
    data, head = problem.data[0], models.Head(problem.heads[0].weight.float(), problem.heads[0].bias.float())
    settings = Settings.parse({"model": "tiny", "batch-size": 7, "local-epochs": 2, "clip-norm": 0.5})
    ours, theirs = models.load_backbone("tiny"), models.load_backbone("tiny")
    flat = vectors.bind(ours, vectors.Layout.of(ours))
    tuned = tune(ours, head, flat, data, settings, seed=5)

    optimizer = torch.optim.AdamW(theirs.parameters(), settings.learning_rate, weight_decay=0.1, foreach=False)
    random = torch.Generator().manual_seed(5)
    for _ in range(2):
        for batch in torch.randperm(IMAGES, generator=random).split(7):
            optimizer.zero_grad()
            functional.cross_entropy(head(theirs(data.images[batch])), data.labels[batch]).backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            optimizer.step()
    assert tuned.steps == 8
    assert tuned.images == 2 * IMAGES
    torch.testing.assert_close(flat.detach(), vectors.Layout.of(theirs).flatten(theirs), rtol=1e-4, atol=1e-6)
