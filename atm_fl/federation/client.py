"""A party: one task's private data and frozen head, and what it does in a round."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atm_fl import models, tasks
from atm_fl.codecs import Arrays
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.shared_model import shared_model
from atm_fl.files import atomic_write
from atm_fl.models.hubs import zero_shot
from atm_fl.privacy import client_level
from atm_fl.privacy.budget import Budget
from atm_fl.privacy.disclosure import disclosed
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tasks import Dataset, Split
from atm_fl.tasks.images import decoder
from atm_fl.training.evaluation import accuracy
from atm_fl.training.local import State, Tuned, full_gradient


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
    this party keeps files, where several of one task share a machine. ledgers, lifetime, lifetime_delta: see Budget.
    """

    def __init__(
        self,
        settings: Settings,
        task: str,
        name: str = "",
        client: str = "",
        ledgers: Path | None = None,
        lifetime: float = 0.0,
        lifetime_delta: float = 1e-5,
    ) -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.model = shared_model(settings.of_model())
        self.data: Dataset = tasks.load(task, self.model.module.image_size, settings.workers)
        self.task = name or self.data.name
        self.client = client or self.task
        self.head = self._make_head().to(self.model.device)
        self.splits = {name: self.data.split(name).to(self.model.device) for name in tasks.SPLITS}
        self.tuned_on = self.splits[settings.split]
        if settings.split == "validation" and settings.holdout:
            held, rest = self._parted(self.tuned_on, settings.holdout, "holdout")
            self.splits["validation"], self.tuned_on = held, rest
        source = str(Path(task).resolve()) if "/" in task else task
        self.budget = Budget(settings, self.task, self.tuned_on, ledgers, source, self.client, lifetime, lifetime_delta)
        if settings.chunks_per_epoch > len(self.tuned_on):
            raise SettingError(
                f"local-epochs={settings.local_epochs:g}: {self.task} has only {len(self.tuned_on)} images"
            )

    def _parted(self, data: Split, share: float, purpose: str) -> tuple[Split, Split]:
        """A random share of `data`, one image at least, and the rest; the same in every run."""
        random = torch.Generator().manual_seed(derive_seed(tasks.SPLIT_SEED, purpose, self.task))
        order = torch.randperm(len(data), generator=random).to(data.labels.device)
        count = max(1, round(share * len(data)))
        return data.take(order[:count]), data.take(order[count:])

    def evaluate(self, base: Tensor, splits: tuple[str, ...]) -> dict[str, float]:
        """Accuracy of `base`, float32 [n], with this party's head on each of `splits`."""
        torch.set_num_threads(self.settings.threads)
        self.model.load(base)
        return {
            split: accuracy(self.model.module, self.head, self.splits[split], self.settings.workers) for split in splits
        }

    def train(self, base: Tensor, round_number: int, run: str = "") -> Update:
        """Evaluate the received base, tune it for `local-epochs`, and return the task vector against it.

        A task that takes no part in the round only evaluates. run: the run's id, under which this machine keeps what
        a codec with error feedback lost and, with keep-optimizer, the optimizer's state; without one nothing is kept.
        RunError if the task vector is not finite.
        """
        settings = self.settings
        begin = time.perf_counter()
        evaluation = self.evaluate(base, evaluated_splits(settings, round_number - 1))
        part = settings.part_taken(self.task, round_number)
        if not part:
            return Update(None, evaluation, {})
        evaluated = time.perf_counter()
        data = self.tuned_on if part == 1 else self._parted(self.tuned_on, part, "replay")[0]
        epoch, epoch_chunk = divmod(round_number - 1, settings.chunks_per_epoch)
        seed = derive_seed(settings.seed, "tune", self.task, epoch * settings.chunks_per_epoch + 1)
        tuning: dict[str, float] = {}
        kept = ClientState(run, self.client) if run and settings.keep_optimizer else None
        state = self._taken_up(kept, "optimizer", round_number, tuning) if kept else {}
        if settings.private:
            vector, tuned = self._tune_privately(base, data, seed, round_number, run, state, tuning)
        else:
            if run:
                self.budget.expose(run)
            vector, tuned = self.model.tune(base, self.head, data, settings, seed, epoch_chunk, state=state)
            tuning["loss"] = tuned.loss
        if kept:
            kept.save("optimizer", state, round_number)
        tuning |= {
            "steps": tuned.steps,
            "images": tuned.images,
            **({} if settings.secure_aggregation else {"norm": float(vector.norm())}),
            "seconds_evaluate": evaluated - begin,
            "seconds_tune": time.perf_counter() - evaluated,
        }
        if settings.alignment:
            self.model.load(base)
            gradient = full_gradient(self.model.module, self.head, self.model.flat, data, settings.workers).cpu()
            tuning["alignment"] = float(torch.nn.functional.cosine_similarity(vector, -gradient, dim=0))
        begin = time.perf_counter()
        arrays = self._encode(vector, round_number, run, tuning)
        tuning["seconds_encode"] = time.perf_counter() - begin
        if settings.private:
            evaluation, tuning = disclosed(evaluation), disclosed(tuning)
        return Update(arrays, evaluation, tuning)

    def _tune_privately(
        self,
        base: Tensor,
        data: Split,
        seed: int,
        round_number: int,
        run: str,
        state: State,
        tuning: dict[str, float],
    ) -> tuple[Tensor, Tuned]:
        """As `SharedModel.tune` by DP-SGD, with the release in the ledger; `tuning` is told what it cost.

        A round that is repeated with the noise of before must come out as before, to the last bit; otherwise (other
        files under the same names, another version of torch) noise is drawn, and paid for, anew.
        """
        for anew in (False, True):
            release = self.budget.spend(run, round_number, base, anew)
            left = {name: value.clone() for name, value in state.items()}
            self.model.load(base)
            vector, tuned = self.model.tune(base, self.head, data, self.settings, seed, 0, release.noise, left)
            if self.budget.ledger.seal(release.entry, vector):
                break
        state.update(left)
        tuning |= release.numbers
        return vector, tuned

    def _encode(self, vector: Tensor, round_number: int, run: str, tuning: dict[str, float]) -> Arrays:
        """The task vector, which may be changed, as it travels. `tuning` is told of residuals that are gone."""
        settings, layout, codec = self.settings, self.model.layout, self.settings.uplink
        if settings.secure_aggregation:
            return {"words": self._words(vector, round_number)}
        kept = ClientState(run, self.client) if run and codec.error_feedback else None
        found = self._taken_up(kept, "residual", round_number, tuning) if kept else {}
        if found and len(found["vector"]) == len(vector):
            vector.add_(found["vector"])
        try:
            arrays = codec.encode(vector, layout, derive_seed(settings.seed, "codec", self.task, round_number))
        except ValueError as error:
            told = f"{self.task}'s task vector of round {round_number} has {error}; try a lower learning-rate"
            raise RunError(told) from error
        if kept:
            kept.save("residual", {"vector": vector.sub_(codec.decode(arrays, layout))}, round_number)
        return arrays

    def _words(self, vector: Tensor, round_number: int) -> np.ndarray:
        """The task vector, which may be changed, as it is added up: scaled and clipped here, where it is seen."""
        settings, ring = self.settings, self.settings.ring
        vector.mul_(settings.task_scalings.get(self.task, 1.0))
        if settings.dp_client_clip:
            rounding = ring.step / 2 * len(vector) ** 0.5  # the most that it can add to the norm
            client_level.clip(vector, max(0.0, settings.dp_client_clip - rounding))
        try:
            return ring.encode(vector)
        except ValueError as error:
            told = f"{self.task}'s task vector of round {round_number} has {error}; try a lower learning-rate"
            raise RunError(told) from error

    def _taken_up(self, kept: ClientState, kind: str, round_number: int, tuning: dict[str, float]) -> dict[str, Tensor]:
        """What was kept of the task's last round; empty if there is none, and `tuning` is told if it is lost."""
        found = kept.last(kind, round_number)
        if found is None and any(self.settings.part_taken(self.task, number) for number in range(1, round_number)):
            tuning[f"{kind}_lost"] = 1
        return found or {}

    def _make_head(self) -> models.Head:
        """The head, kept on disk so that it outlives rounds and restarts; it never leaves this machine."""
        settings, data, model = self.settings, self.data, self.model
        # A head out of the records that are tuned on would tell of them in every gradient, past any accountant.
        source = data.validation if settings.private and settings.split == "train" else data.train
        seed = derive_seed(settings.seed, "head", self.task)
        made_by = [inspect.getsource(made) for made in (models.Head, models.prototypes, models.linear_probe, zero_shot)]
        if not isinstance(source.images, Tensor):
            made_by.append(decoder())
        machine = str(model.device), settings.threads, torch.__version__
        content = model.digest, data.classes, source.digests, settings.shots, seed
        named = settings.model, settings.weights, data.prompts()
        plugin = str(models.HEADS.plugin(settings.head) or "")
        key = derive_seed(settings.head, content, named, made_by, plugin, machine)
        path = tasks.cache_dir() / "heads" / f"{key:016x}.safetensors"
        if not path.exists():
            model.load(model.pretrained)
            made = models.HEADS[settings.head](
                models.HeadSource(
                    model.module,
                    source,
                    data.classes,
                    data.prompts(),
                    settings.model,
                    settings.weights,
                    settings.shots,
                    seed,
                    settings.workers,
                )
            )
            with atomic_write(path, private=True) as part:
                save_file(made.state(), str(part))
        # Tensors out of a file are not aligned as torch's own are, and with that a product's last bits may differ.
        return models.Head(**{name: tensor.clone() for name, tensor in load_file(str(path)).items()})


def evaluated_splits(settings: Settings, rounds_done: int) -> tuple[str, ...]:
    """The splits on which the base after `rounds_done` rounds is evaluated: both at the ends, else now and then."""
    if rounds_done in (0, settings.rounds) or (settings.test_every and rounds_done % settings.test_every == 0):
        return "validation", "test"
    return () if rounds_done % settings.validate_every else ("validation",)
