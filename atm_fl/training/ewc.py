"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796) of a party's own model, from round to round.

In each round a party adds λ/2 Σᵢ Fᵢ (θᵢ − aᵢ)² to its loss (setting `ewc`, λ). The anchor a is the party's own model at
the end of its last round: the base, which moves each round, is nobody's optimum, while this is the last point that the
party's records themselves led to. What the merge has changed since then is pulled back where those records notice it.

F is the diagonal of the Fisher information, the mean over records of squared gradients of log p(y | x), with each y
drawn from the model's own p(· | x). With the records' labels in place of y (the "empirical Fisher") F would vanish
where the model fits its records, which is what is to be kept, and it is no Fisher information (Kunstner et al. 2019,
arXiv:1905.12558). A round's F is taken at its own anchor, and a party keeps the mean over its rounds so far. (A sum, as
over different tasks, would count the same records again, and λ would grow with the rounds.) Of a head that says answers
y is a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from atm_fl.models import TaskHead
from atm_fl.tasks import Split

RECORDS = 100
"""At most so many records, drawn anew each round, each of which has a pass of its own."""


@dataclass(frozen=True)
class Memory:
    """What a party keeps of its past rounds: the last model that it tuned and the Fisher information, float32 [k].

    rounds: of how many rounds the Fisher information is the mean.
    """

    anchor: Tensor
    fisher: Tensor
    rounds: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Self:
        """From what `state` returned."""
        return cls(state["anchor"], state["fisher"], int(state["rounds"]))

    def state(self) -> dict[str, Tensor]:
        """Tensors, float32 on the CPU, by name."""
        rounds = torch.tensor([float(self.rounds)])
        return {"anchor": self.anchor.cpu(), "fisher": self.fisher.cpu(), "rounds": rounds}

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return type(self)(self.anchor.to(device), self.fisher.to(device), self.rounds)

    def pull(self, flat: Tensor) -> Tensor:
        """The gradient of the penalty without λ at `flat`: F (θ − a), [k]."""
        return self.fisher * (flat - self.anchor)

    def with_round(self, anchor: Tensor, fisher: Tensor) -> Self:
        """The memory of one round more, which ended at `anchor` with this Fisher information."""
        mean = self.fisher + (fisher - self.fisher) / (self.rounds + 1)
        return type(self)(anchor, mean, self.rounds + 1)


def fisher_diagonal(
    model: nn.Module, head: TaskHead, flat: nn.Parameter, data: Split, seed: int, workers: int = 0
) -> Tensor:
    """F at what `flat` holds, which stays, float32 [k]: of `RECORDS` records of `data` and labels drawn by `seed`."""
    assert flat.grad is not None
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data), generator=random)[:RECORDS]
    fisher = torch.zeros_like(flat.grad)
    for record, _ in data.batches(chosen.to(data.labels.device), 1, workers):
        with torch.no_grad():
            probabilities = head.logits(model, record).float().softmax(-1)
        label = torch.multinomial(probabilities.cpu(), 1, generator=random)[:, 0]
        flat.grad.zero_()
        head.loss(model, record, label.to(data.labels.device)).backward()
        fisher.addcmul_(flat.grad, flat.grad, value=1 / len(chosen))
    return fisher
