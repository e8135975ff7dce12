"""A party: one task's private data and frozen head, and what it does in a round."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from atm_fl import tasks
from atm_fl.codecs import Arrays
from atm_fl.errors import OwnFileError, RunError, SettingError
from atm_fl.federation.chain import Chain
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.heads import kept_head
from atm_fl.federation.shared_model import shared_model
from atm_fl.federation.shares import random_share, split_up
from atm_fl.privacy.budget import Account, Budget
from atm_fl.privacy.disclosure import disclosed
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings, check_model
from atm_fl.tasks import Dataset, Split
from atm_fl.training.evaluation import accuracy, classified_rightly
from atm_fl.training.ewc import Memory, fisher_diagonal
from atm_fl.training.local import State, Tuned, full_gradient
from atm_fl.transforms import Context
from atm_fl.vectors.finite import is_finite


@dataclass(frozen=True)
class Update:
    """A party's answer to one round: its task vector as it travels (setting `codec-up`) and numbers about the round.

    Without arrays where the task takes no part in the round.
    """

    arrays: Arrays | None
    evaluation: dict[str, float]
    tuning: dict[str, float]


class Party:
    """One client's side of the protocol, without any transport.

    Loads the task's data and makes (or finds on this machine's disk) its head; what is wrong with them is raised here,
    before any round. `name` is the task's name in the run where it is not the data's own, `client` that under which
    this party keeps files, where several of one task share a machine; account: what it may spend of its privacy.
    """

    def __init__(
        self, settings: Settings, task: str, name: str = "", client: str = "", account: Account | None = None
    ) -> None:
        torch.set_num_threads(settings.threads)
        self.settings, self.chain = settings, Chain(settings)
        self.model = shared_model(settings.of_model())
        check_model(settings, self.model.module)
        self.data = self._data(task)
        self.task = name or self.data.name
        self.settings = settings = settings.of_task(self.task)
        self.client = client or self.task
        self.rightly: dict[str, Tensor] = {}
        """By split: which records the last evaluation classified rightly, bool [n]. Stays here."""
        self.head = kept_head(settings, self.data, self.model, self.task)
        self.splits, self.tuned_on = split_up(self.data, settings, self.task, self.model.device)
        source = str(tasks.place(task).resolve()) if "/" in task else task
        self.budget = Budget(settings, self.task, self.tuned_on, account, source, self.client)

    def _data(self, task: str) -> Dataset:
        model, workers = self.model.module, self.settings.workers
        try:
            data = tasks.load(task, model.image_size, workers, getattr(model, "tokenizer", None))
        except (SettingError, OSError, ValueError) as error:
            raise OwnFileError("data", str(error)) from error
        return data.with_larger_test() if self.settings.larger_test else data

    def context(self, round_number: int, run: str = "") -> Context:
        """What this party has at the start of a round. run: the run's id; without one nothing was kept."""
        state = ClientState(run, self.client) if run else None
        return Context(self.settings, self.model.layout, round_number, self.task, self.client, state)

    def evaluate(
        self, base: Tensor, splits: tuple[str, ...], context: Context | None = None, end: bool = False
    ) -> dict[str, float]:
        """Accuracy, as this party tells it, of `base`, of the model's `base_layout`, with its head on each of `splits`.

        context: of the round that comes next, from which this party has its private entries and buffers. Under DP-SGD
        private entries are tuned without noise, so that an accuracy with them would tell of the records that they were
        tuned on: then the accuracies are those with the pretrained ones, which follow from the base alone, and those of
        the party's own model stay on its disk (`Context.note`).

        end: of a run, whose last base it is: this party tunes its private entries on it for `private-epochs` before.
        """
        torch.set_num_threads(self.settings.threads)
        if not (self.settings.dp_sgd and self.settings.private):
            self._load(base, context)
            if context and end:
                self._finish(context)
            return self._accuracies(splits)
        if context and splits:
            self._load(base, context)
            if end:
                self._finish(context)
            context.note(self._accuracies(splits))
        self.model.load(base)
        return self._accuracies(splits)

    def _accuracies(self, splits: tuple[str, ...]) -> dict[str, float]:
        for split in splits:
            self.rightly[split] = classified_rightly(
                self.model.module, self.head, self.splits[split], self.settings.workers
            )
        return {split: accuracy(self.rightly[split]) for split in splits}

    def train(self, base: Tensor, round_number: int, run: str = "") -> Update:
        """Evaluate the received base, tune it for `local-epochs`, and return the task vector against it.

        A task that takes no part in the round only evaluates. run: the run's id, under which this machine keeps what
        a codec with error feedback lost and, with keep-optimizer, the optimizer's state; without one nothing is kept.
        RunError if the task vector is not finite.
        """
        settings, begin = self.settings, time.perf_counter()
        context = self.context(round_number, run)
        evaluation = self.evaluate(base, evaluated_splits(settings, round_number - 1), context)
        share = settings.part_taken(self.task, round_number)
        if not share:
            return Update(None, evaluation, {})
        if run:
            ClientState(run, self.client).save_head(self.head.state(), self.data.classes)
        numbers, evaluated = context.numbers, time.perf_counter()
        data = self.tuned_on if share == 1 else random_share(self.tuned_on, share, "replay", self.task)[0]
        vector, tuned = self._tune(base, data, context, run)
        buffers = self.model.flat_buffers()
        if settings.private:
            self._keep_private(base, data, context)
        if settings.buffers == "private":
            context.keep("buffers", self.model.buffers.state())
        numbers |= {"steps": tuned.steps, "images": tuned.images}
        if not settings.secure_aggregation:
            numbers["norm"] = float(vector.norm())
        numbers |= {"seconds_evaluate": evaluated - begin, "seconds_tune": time.perf_counter() - evaluated}
        if settings.alignment:
            numbers["alignment"] = self._alignment(base, data, vector, context)
        begin = time.perf_counter()
        arrays = self.chain.encode(vector, context, buffers)
        numbers["seconds_encode"] = time.perf_counter() - begin
        if settings.dp_sgd:
            return Update(arrays, disclosed(evaluation), disclosed(numbers))
        return Update(arrays, evaluation, numbers)

    def _load(self, base: Tensor, context: Context | None) -> None:
        """Load `base` and, where the run has them, this party's own entries and buffers."""
        private: dict[str, Tensor] = {}
        if context:
            for kind in self.settings.own_kinds:
                kept = context.recall(kind)
                if kept is None:
                    context.numbers[f"{kind}_lost"] = 1
                private |= kept or {}
        self.model.load(base, private)

    def _finish(self, context: Context) -> None:
        """Tune the private entries of the loaded model alone, for `private-epochs`, and keep them as the run's end has
        them; a run that goes on does so with those of its last round.

        RunError if they are not finite. Under DP-SGD that would tell of records: then those of before stay.
        """
        if not self.settings.private_epochs:
            return
        before, seed = self.model.own.detach().clone(), derive_seed(self.settings.seed, "private end", self.task)
        self.model.tune_private(self.head, self.tuned_on, self.settings.of_private_end, seed, 0, {})
        if not is_finite(self.model.own.detach()):
            if not self.settings.dp_sgd:
                raise RunError(
                    f"{self.task}'s private entries after private-epochs are not finite; try a lower "
                    "private-learning-rate"
                )
            self.model.own.data.copy_(before)
        context.keep("finished", self.model.private_entries(), as_checkpoints=True)

    def _keep_private(self, base: Tensor, data: Split, context: Context) -> None:
        """Keep the private entries, which were tuned with the vector; by DP-SGD they were not, and are tuned now.

        RunError if they are not finite. Under DP-SGD that would tell of records: then those of before stay.
        """
        state: State = {}
        before: dict[str, Tensor] = {}
        if self.settings.dp_sgd:
            self._load(base, context)
            before = self.model.private_entries()
            if self.settings.keep_optimizer:
                state = context.recall("own_optimizer") or {}
            seed, chunk = self._seed_and_chunk(context)
            settings = self.settings.of_private(context.round_number)
            loss = self.model.tune_private(self.head, data, settings, seed, chunk, state).loss
            context.note({"loss": loss})
        entries = self.model.private_entries()
        if not all(bool(entry.isfinite().all()) for entry in entries.values()):
            if not before:
                raise RunError(
                    f"{self.task}'s private entries of round {context.round_number} are not finite; try a lower "
                    "learning-rate"
                )
            entries, state = before, {}
        context.keep("private", entries, as_checkpoints=True)
        if state:
            context.keep("own_optimizer", state)

    def _tune(self, base: Tensor, data: Split, context: Context, run: str) -> tuple[Tensor, Tuned]:
        """(the task vector, what was done) of the round's local training, which begins at `base`, loaded."""
        settings = self.settings.of_round(context.round_number)
        seed, chunk = self._seed_and_chunk(context)
        kept = context.recall("optimizer") if settings.keep_optimizer else {}
        if kept is None:
            context.numbers["optimizer_lost"] = 1
        wanted = settings.client_momentum or settings.gradient_surgery
        state, last_step = kept or {}, self._last_step(base, context) if wanted else None
        if settings.dp_sgd:
            vector, tuned = self._tune_privately(base, data, context, run, seed, state, last_step)
        else:
            if run:
                self.budget.expose(run)
            memory = self._memory(context) if settings.ewc else None
            vector, tuned = self.model.tune(
                base, self.head, data, settings, seed, chunk, None, state, last_step, memory
            )
            context.numbers["loss"] = tuned.loss
            if settings.ewc:
                self._remember(memory, data, context)
        if settings.keep_optimizer:
            context.keep("optimizer", state)
        return vector, tuned

    def _memory(self, context: Context) -> Memory | None:
        """What this party's past rounds have left for `ewc`; None at first."""
        kept = context.recall("ewc")
        if kept is None:
            context.numbers["ewc_lost"] = 1
        return Memory.of(kept).to(self.model.device) if kept else None

    def _remember(self, before: Memory | None, data: Split, context: Context) -> None:
        """Keep the model, as it was just tuned, and what matters in it; nothing of one that is not finite."""
        flat = self.model.flat
        if not is_finite(flat.detach()):  # the vector is refused in a moment
            return
        seed = context.seed("ewc")
        fisher = fisher_diagonal(self.model.module, self.head, flat, data, seed, self.settings.workers)
        anchor = flat.detach().clone()
        memory = before.with_round(anchor, fisher) if before else Memory(anchor, fisher, 1)
        if is_finite(memory.fisher):
            context.keep("ewc", memory.state())

    def _last_step(self, base: Tensor, context: Context) -> Tensor | None:
        """The base's step a round since this party's last one, float32 [n]; None at first.

        It is the client-level momentum of FedCM (Xu et al. 2021, arXiv:2106.10874), and the alignment term of FedPAC
        (arXiv:2602.19271): the party knows the step by itself, and nothing more travels.
        """
        base = base[: self.model.layout.size]
        last = context.recall("tuned_from")
        context.keep("tuned_from", {"base": base, "round": torch.tensor([float(context.round_number)])})
        if last is None:
            context.numbers["tuned_from_lost"] = 1
        if not last:
            return None
        rounds = context.round_number - float(last["round"])
        return (base - last["base"]) / rounds

    def _seed_and_chunk(self, context: Context) -> tuple[int, int]:
        """(the seed of a round's order of images, which part of the epoch it is)."""
        epoch, chunk = divmod(context.round_number - 1, self.settings.chunks_per_epoch)
        first = epoch * self.settings.chunks_per_epoch + 1
        return derive_seed(self.settings.seed, "tune", self.task, first), chunk

    def _tune_privately(
        self, base: Tensor, data: Split, context: Context, run: str, seed: int, state: State, last_step: Tensor | None
    ) -> tuple[Tensor, Tuned]:
        """As `SharedModel.tune` by DP-SGD, with the release in the ledger and what it cost in the context's numbers.

        A round that is repeated with the noise of before must come out as before, to the last bit; otherwise (other
        files under the same names, another version of torch) noise is drawn, and paid for, anew.
        """
        settings = self.settings.of_round(context.round_number)
        for anew in (False, True):
            release = self.budget.spend(run, context.round_number, base, anew)
            left = {name: value.clone() for name, value in state.items()}
            self.model.load(base)
            vector, tuned = self.model.tune(base, self.head, data, settings, seed, 0, release.noise, left, last_step)
            if self.budget.ledger.seal(release.entry, vector):
                break
        state.update(left)
        context.numbers |= release.numbers
        return vector, tuned

    def _alignment(self, base: Tensor, data: Split, vector: Tensor, context: Context) -> float:
        """The cosine of a task vector with minus the full-batch gradient at the base."""
        self._load(base, context)
        gradient = full_gradient(self.model.module, self.head, self.model.flat, data, self.settings.workers).cpu()
        return float(torch.nn.functional.cosine_similarity(vector, -gradient[: len(vector)], dim=0))


def parties_of(settings: Settings) -> list[Party]:
    """All parties of a run, in one process."""
    named = zip(settings.party_names, settings.task_names, strict=True)
    return [Party(settings, task, client=client) for client, task in named]


def evaluated_splits(settings: Settings, rounds_done: int) -> tuple[str, ...]:
    """The splits on which the base after `rounds_done` rounds is evaluated: both at the ends, else now and then."""
    if rounds_done in (0, settings.rounds) or (settings.test_every and rounds_done % settings.test_every == 0):
        return "validation", "test"
    return () if rounds_done % settings.validate_every else ("validation",)
