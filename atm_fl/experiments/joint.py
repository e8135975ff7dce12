"""Joint multitask fine-tuning: all tasks' data in one place, the oracle without privacy that ATM is held against."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from atm_fl.errors import SettingError
from atm_fl.federation.client import Party, evaluated_splits
from atm_fl.federation.shared_model import own_draws
from atm_fl.models.buffers import train_mode
from atm_fl.runs.run import Run
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.training.local import make_optimizer


def run_joint(settings: Settings) -> None:
    """Tune the pretrained model on the union of the tasks' splits for `rounds` epochs, with one optimizer throughout.

    A batch is drawn from all tasks' images; each image goes through its own task's frozen head. The run directory is an
    ordinary one, an epoch a round, with the single "task" joint in its tuning lines. It cannot resume, since the
    optimizer's state is not kept: what is there begins anew.
    """
    if settings.buffers == "private":
        raise SettingError("buffers='private': a joint model has no parties; choose 'mean' or 'frozen'")
    shutil.rmtree(Path(settings.run_dir), ignore_errors=True)
    parties = [Party(settings, name) for name in settings.task_names]
    model, heads = parties[0].model, [party.head for party in parties]
    sizes = [len(party.tuned_on) for party in parties]
    owner = torch.repeat_interleave(torch.arange(len(parties)), torch.tensor(sizes))
    place = torch.cat([torch.arange(size) for size in sizes])
    optimizer, flat = make_optimizer(model.flat, settings), model.flat
    assert flat.grad is not None
    with closing(Run(settings)) as run:
        for epoch in range(1, settings.rounds + 1):
            for party in parties:
                if splits := evaluated_splits(settings, epoch - 1):
                    run.record("evaluation", epoch - 1, task=party.task, **party.evaluate(run.base, splits))
            model.load(run.base)
            random = torch.Generator().manual_seed(derive_seed(settings.seed, "joint", epoch))
            begin, total = time.perf_counter(), 0.0
            train_mode(model.module, frozen=settings.buffers == "frozen")
            batches = torch.randperm(len(owner), generator=random).split(settings.batch_size)
            held = [[place[batch[owner[batch] == number]] for batch in batches] for number in range(len(parties))]
            readers = [
                party.tuned_on.parts(
                    [positions.to(model.device) for positions in parts if len(positions)], settings.workers
                )
                for party, parts in zip(parties, held, strict=True)
            ]
            with own_draws(model.device, derive_seed(settings.seed, "joint passes", epoch)):
                for step, batch in enumerate(batches):
                    flat.grad.zero_()
                    present = [number for number, parts in enumerate(held) if len(parts[step])]
                    taken = [next(readers[number]) for number in present]
                    features = model.module(torch.cat([images for images, _ in taken]))
                    parts = features.split([len(labels) for _, labels in taken])
                    loss = sum(
                        functional.cross_entropy(heads[number](features_of_party), labels, reduction="sum")
                        for number, features_of_party, (_, labels) in zip(present, parts, taken, strict=True)
                    )
                    assert isinstance(loss, torch.Tensor)
                    (loss / len(batch)).backward()
                    if settings.clip_norm:
                        nn.utils.clip_grad_norm_(flat, settings.clip_norm)
                    optimizer.step()
                    total += loss.item()
            model.module.eval()
            vector = flat.detach().cpu() - run.base[: run.layout.size]
            run.record(
                "tuning",
                epoch,
                task="joint",
                loss=total / len(owner),
                steps=len(batches),
                images=len(owner),
                norm=float(vector.norm()),
                seconds_tune=time.perf_counter() - begin,
            )
            run.advance(vector, model.flat_buffers())
        for party in parties:
            run.record(
                "evaluation", run.rounds_done, task=party.task, **party.evaluate(run.base, ("validation", "test"))
            )
