"""Joint multitask fine-tuning: all tasks' data in one place, the oracle without privacy that ATM is held against."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from atm_fl.errors import SettingError
from atm_fl.federation.client import Party, evaluated_splits
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.shared_model import own_draws
from atm_fl.models import Head, TaskHead
from atm_fl.models.buffers import train_mode
from atm_fl.runs.run import Run
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.training.local import make_optimizer, set_rate


def run_joint(settings: Settings) -> list[Party]:
    """Tune the pretrained model on the union of the tasks' splits for `rounds` epochs, with one optimizer throughout.

    A batch is drawn from all tasks' images; each image goes through its own task's frozen head and, with `private`,
    through its own task's private entries, all of which the one optimizer tunes beside the shared ones. The run
    directory is an ordinary one, an epoch a round, with the single "task" joint in its tuning lines. It cannot resume,
    since the optimizer's state is not kept: what is there begins anew. Returns the tasks' parties, which have evaluated
    its end.
    """
    if settings.buffers == "private":
        raise SettingError("buffers='private': a joint model has no parties; choose 'mean' or 'frozen'")
    shutil.rmtree(Path(settings.run_dir), ignore_errors=True)
    parties = [Party(settings, name) for name in settings.task_names]
    model, heads = parties[0].model, [party.head for party in parties]
    sizes = [len(party.tuned_on) for party in parties]
    owner = torch.repeat_interleave(torch.arange(len(parties)), torch.tensor(sizes))
    place = torch.cat([torch.arange(size) for size in sizes])
    size, flat = model.layout.size, model.flat
    model.load(model.pretrained)
    everything, own = _with_all_private(flat, size, len(parties))
    texts = any(party.tuned_on.of_texts for party in parties)
    apart = bool(own) or texts or not all(isinstance(head, Head) for head in heads)
    assert everything.grad is not None
    optimizer = make_optimizer(everything, settings)
    with closing(Run(settings)) as run:
        for epoch in range(1, settings.rounds + 1):
            for party in parties:
                if splits := evaluated_splits(settings, epoch - 1):
                    known = party.context(epoch, run.id)
                    run.record("evaluation", epoch - 1, task=party.task, **party.evaluate(run.base, splits, known))
            model.load(run.base)
            everything.data[:size] = flat.data[:size]
            random = torch.Generator().manual_seed(derive_seed(settings.seed, "joint", epoch))
            begin, total, of_epoch = time.perf_counter(), 0.0, settings.of_round(epoch)
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
                    everything.grad.zero_()
                    present = [number for number, parts in enumerate(held) if len(parts[step])]
                    # Models that differ in their private entries, texts of other lengths, and heads that ask the model
                    # themselves make a pass for each task.
                    for together in [[number] for number in present] if apart else [present]:
                        if own:
                            _enter(flat, size, everything, own[together[0]])
                        taken = [next(readers[number]) for number in together]
                        loss = _loss(model.module, [heads[number] for number in together], taken)
                        (loss / len(batch)).backward()
                        if own:
                            _leave(flat, size, everything, own[together[0]])
                        total += loss.item()
                    if settings.clip_norm:
                        nn.utils.clip_grad_norm_(everything, settings.clip_norm)
                    set_rate(optimizer, of_epoch, step / len(batches))
                    optimizer.step()
            model.module.eval()
            vector = everything.detach()[:size].cpu() - run.base[:size]
            for party, part in zip(parties, own, strict=False):
                entries = model.private.views(everything.detach()[part].cpu())
                party.context(epoch, run.id).keep("private", {name: entry.clone() for name, entry in entries.items()})
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
            known = party.context(run.rounds_done + 1, run.id)
            accuracies = party.evaluate(run.base, ("validation", "test"), known, end=True)
            run.record("evaluation", run.rounds_done, task=party.task, **accuracies)
        ClientState.forget(run.id)
    return parties


def _loss(model: nn.Module, heads: list[TaskHead], taken: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the losses of (inputs, labels), each with its head; of several in one pass of the model."""
    if len(taken) == 1:
        return heads[0].loss(model, *taken[0], "sum")
    parts = model(torch.cat([inputs for inputs, _ in taken])).split([len(labels) for _, labels in taken])
    there = nn.Identity()  # of features there is nothing left to compute
    losses = (
        head.loss(there, part, labels, "sum") for head, part, (_, labels) in zip(heads, parts, taken, strict=True)
    )
    return sum(losses, torch.zeros(()))


def _with_all_private(flat: nn.Parameter, size: int, parties: int) -> tuple[nn.Parameter, list[slice]]:
    """(one parameter of the `size` shared elements and of every party's private ones, where each party's are).

    Without private ones it is `flat` itself, and they are nowhere.
    """
    private = len(flat) - size
    if not private:
        return flat, []
    whole = nn.Parameter(torch.cat([flat.detach()[:size], *[flat.detach()[size:]] * parties]))
    whole.grad = torch.zeros_like(whole)
    return whole, [slice(size + number * private, size + (number + 1) * private) for number in range(parties)]


def _enter(flat: nn.Parameter, size: int, everything: nn.Parameter, own: slice) -> None:
    """Make the model, whose entries are `flat`, one party's."""
    assert flat.grad is not None
    flat.data[:size], flat.data[size:] = everything.data[:size], everything.data[own]
    flat.grad.zero_()


def _leave(flat: nn.Parameter, size: int, everything: nn.Parameter, own: slice) -> None:
    """Take one party's gradients over."""
    assert flat.grad is not None
    assert everything.grad is not None
    everything.grad[:size] += flat.grad[:size]
    everything.grad[own] = flat.grad[size:]
