"""Which of its data a party tunes on, and which it only evaluates on."""

from __future__ import annotations

import torch

from atm_fl import tasks
from atm_fl.errors import SettingError, with_figures
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tasks import Dataset, Split


def split_up(data: Dataset, settings: Settings, task: str, device: torch.device) -> tuple[dict[str, Split], Split]:
    """(the splits by name, what is tuned on); `holdout` is taken off a validation split that is tuned on.

    SettingError if that is less than an image for each part of an epoch.
    """
    splits = {name: data.split(name).to(device) for name in tasks.SPLITS}
    tuned_on = splits[settings.split]
    if settings.split == "validation" and settings.holdout:
        splits["validation"], tuned_on = random_share(tuned_on, settings.holdout, "holdout", task)
    if settings.chunks_per_epoch > len(tuned_on):
        raise with_figures(
            SettingError(f"local-epochs={settings.local_epochs:g}: {task} has too few images for it"),
            f"{task} has {len(tuned_on)} images; a round takes one at least",
        )
    return splits, tuned_on


def random_share(data: Split, share: float, purpose: str, task: str) -> tuple[Split, Split]:
    """A random share of `data`, one image at least, and the rest; the same in every run."""
    random = torch.Generator().manual_seed(derive_seed(tasks.SPLIT_SEED, purpose, task))
    order = torch.randperm(len(data), generator=random).to(data.labels.device)
    count = max(1, round(share * len(data)))
    return data.take(order[:count]), data.take(order[count:])
