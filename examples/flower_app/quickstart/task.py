"""The model, the data and the training of one client: nothing here knows Flower."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

CLASSES = 10


class Net(nn.Module):
    """A small CNN with BatchNorm for images [n, 1, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16 * 16, 32)
        self.out = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(images))), 2)
        return self.out(F.relu(self.hidden(x.flatten(1))))


def load_data(partition: int, partitions: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A client's training images and labels, and everyone's test images and labels.

    Client p has `classes` of the ten, from p · 10 / partitions on; a class is shared out among those that have it.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    test = torch.arange(len(labels)) % 5 == 0
    owners = {
        c: [p for p in range(partitions) if (c - p * CLASSES // partitions) % CLASSES < classes] for c in range(CLASSES)
    }
    mine = torch.zeros(len(labels), dtype=torch.bool)
    for c, who in owners.items():
        places = torch.where(~test & (labels == c))[0]
        if partition in who:
            mine[places[who.index(partition) :: len(who)]] = True
    return images[mine], labels[mine], images[test], labels[test]


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, seed: int) -> float:
    """SGD; returns the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    total = 0.0
    for _ in range(epochs):
        total, batches = 0.0, torch.randperm(len(labels), generator=generator).split(32)
        for batch in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() / len(batches)
    return total


@torch.no_grad()
def test(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy."""
    net.eval()
    return float((net(images).argmax(1) == labels).float().mean())
