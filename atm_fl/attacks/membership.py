"""Membership inference: was this image among those that a party tuned on?

The attacker is the strongest of its kind: it knows the party's head, the images in question with their labels, and all
other parties' vectors, and it looks at the local model (base + the party's vector, which an honest-but-curious server
sees, but for secure aggregation) or at the merged one (which every peer sees). The rounds are the run's own
(`loop.play_round`). It tunes models of its own on random halves of the images in
question, from the same pretrained base by the same settings, and compares:

- loss: Yeom et al. 2018 (arXiv:1709.01604), the confidence alone;
- LiRA: Carlini et al. 2022 (arXiv:2112.03570), online: for each image a Gaussian of its confidence in models that were
  tuned on it and one in models that were not;
- RMIA: Zarifzadeh et al. 2024 (arXiv:2312.03262), online: how often the image's likelihood ratio exceeds that of images
  from the population.

A confidence is φ = log(p / (1 − p)), p the model's probability of the right label: the loss is log(1 + exp(−φ)).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atm_fl import models, tasks
from atm_fl.errors import SettingError
from atm_fl.federation.client import Party, Update
from atm_fl.federation.loop import play_round
from atm_fl.federation.shared_model import shared_model
from atm_fl.files import atomic_write
from atm_fl.models import EVALUATION_BATCH, TaskHead
from atm_fl.privacy.budget import Account, Budget
from atm_fl.runs.claims import claim
from atm_fl.runs.run import Run
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tables import markdown
from atm_fl.tasks import Split
from atm_fl.transforms import Context

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = (0.01, 0.001)
"""False-positive rates at which the true-positive rate is told."""
RESAMPLES = 200
POPULATION = 500
"""Images, at most, with which RMIA compares."""
FORMAT = 2
"""Of a study's files. Those of format 1 followed a round without codec-down, client-level DP and secure aggregation."""
UNSEEN = "No local model: with secure-aggregation=true the server sees the sum of the vectors, and no single one."
GAMMA = 2.0
"""RMIA's threshold on the likelihood ratio, the paper's default."""


@torch.inference_mode()
def confidences(model: nn.Module, head: TaskHead, data: Split) -> Tensor:
    """φ, float32 [n], of the right label of every item of `data`."""
    scores = []
    for images, labels in data.batches(batch_size=EVALUATION_BATCH):
        logits = head.logits(model, images)
        right = logits.gather(1, labels[:, None])
        scores.append(right[:, 0] - logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1))
    return torch.cat(scores).cpu()


def lira(target: Tensor, references: Tensor, members: Tensor, shared: bool = True) -> Tensor:
    """log N(φ; in) − log N(φ; out) for each image, float64 [n]; above 0: rather a member.

    target: φ of the attacked model, [n]; references: of reference models, [r, n]; members: bool [r, n], what they were
    tuned on. The two Gaussians' means are each image's own; their variances too, or with `shared` the mean over all
    images, as the paper has it for few models. An image that is on one side only gets the other side's mean moved by
    the mean shift.
    """
    confidence, sides = references.double(), {True: members, False: ~members}
    means, counts = {}, {}
    for side, chosen in sides.items():
        counts[side] = chosen.sum(0)
        means[side] = (confidence * chosen).sum(0) / counts[side].clamp_min(1)
    both = (counts[True] > 0) & (counts[False] > 0)
    shift = (means[True] - means[False])[both].mean()
    means[True] = torch.where(counts[True] > 0, means[True], means[False] + shift)
    means[False] = torch.where(counts[False] > 0, means[False], means[True] - shift)
    score = torch.zeros_like(means[True])
    for side, chosen in sides.items():
        squares = ((confidence - means[side]) ** 2 * chosen).sum(0)
        freedom = (counts[side] - 1).clamp_min(0)
        variance = squares.sum() / freedom.sum() if shared else squares / freedom
        density = torch.distributions.Normal(means[side], variance.sqrt().clamp_min(1e-6))
        score += (1 if side else -1) * density.log_prob(target.double())
    return score


def rmia(target: Tensor, references: Tensor, members: Tensor, target_population: Tensor, population: Tensor) -> Tensor:
    """The part of the population that each image's likelihood ratio exceeds γ times, float64 [n] in 0..1.

    target, references, members: as for `lira`; φ of the population's images in the attacked model, [k], and in the
    reference models, [r, k], none of which was tuned on them. An image's ratio is p(x | target) / p(x), with p(x) the
    mean of its probability in models with it and in models without it, each side weighing the same.
    """
    likelihood = references.double().sigmoid()
    sides = [(likelihood * side).sum(0) / side.sum(0) for side in (members, ~members)]
    known = torch.where(sides[0].isnan(), sides[1], torch.where(sides[1].isnan(), sides[0], (sides[0] + sides[1]) / 2))
    ratio = target.double().sigmoid() / known
    others = (target_population.double().sigmoid() / population.double().sigmoid().mean(0)).sort().values
    return torch.searchsorted(others, ratio / GAMMA, right=True).double() / len(others)


@dataclass(frozen=True)
class MembershipLeak:
    """How well a score tells members from others: the area under the ROC curve, and TPR by FPR of `RATES`.

    Each with a 95 % interval (low, high) by bootstrap over the images.
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr: dict[float, float]
    tpr_interval: dict[float, tuple[float, float]]


class Curve:
    """The ROC curve of `scores`, in which a high one says member; sorted once, for any weights of the decisions."""

    def __init__(self, scores: Tensor, members: Tensor) -> None:
        flat = scores.flatten().numpy()
        self._order = np.argsort(-flat, kind="stable")
        self._member = members.flatten().numpy()[self._order]
        # Equal scores are let through together.
        self._ends = np.append(np.flatnonzero(np.diff(flat[self._order])), len(flat) - 1)

    def rates(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """False- and true-positive rates from (0, 0) to (1, 1), one point a distinct score."""
        ordered = np.ones(len(self._order)) if weights is None else weights[self._order]
        sides = [np.append(0, np.cumsum(ordered * side)[self._ends]) for side in (~self._member, self._member)]
        return sides[0] / sides[0][-1], sides[1] / sides[1][-1]


def membership_leak(scores: Tensor, members: Tensor) -> MembershipLeak:
    """The leak of `scores`, [t, n] of t attacked models on n images each, with `members`, bool [t, n].

    Decisions on all models make one curve. An image's decisions depend on each other, so that the bootstrap draws
    whole images.
    """
    curve = Curve(scores, members)

    def numbers(weights: np.ndarray | None) -> list[float]:
        false, true = curve.rates(weights)
        area = float(np.trapezoid(true, false))
        return [area, *(float(true[false <= rate + 1e-12].max()) for rate in RATES)]

    random = np.random.default_rng(0)
    count = scores.shape[1]
    drawn = [
        numbers(np.tile(np.bincount(random.integers(0, count, count), minlength=count), len(scores)))
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0).tolist()
    area, *rates = numbers(None)
    intervals = dict(zip(RATES, zip(low[1:], high[1:], strict=True), strict=True))
    return MembershipLeak(area, (low[0], high[0]), dict(zip(RATES, rates, strict=True)), intervals)


@dataclass(frozen=True)
class MembershipTarget:
    """Images of one task of which an attacker asks whether they were tuned on, the head, and RMIA's population."""

    task: str
    images: Split
    population: Split
    head: models.Head

    def half(self, settings: Settings, number: int) -> Tensor:
        """What the model `number` is tuned on: a random half of the images, bool [n], drawn by itself."""
        random = torch.Generator().manual_seed(derive_seed(settings.seed, "members", self.task, number))
        chosen = torch.zeros(len(self.images), dtype=torch.bool)
        chosen[torch.randperm(len(chosen), generator=random)[: len(chosen) // 2]] = True
        return chosen


def membership_target(settings: Settings, task: str, members: int) -> MembershipTarget:
    """Twice `members` images of everything that an embedded task's source has; head and population from the rest.

    No image is in two of the three. SettingError if the source has too few images, or the task is not embedded.
    """
    source = tasks.find(task)
    if not isinstance(source, tasks.Embedded):
        raise SettingError(f"--task {task}: the attack needs an embedded task, to draw its images from the source")
    arrays = tasks.split_source(source.build(), cap=10**9)
    pixels, labels = (
        np.concatenate([arrays[f"{split}_{what}"] for split in tasks.SPLITS]) for what in ("images", "labels")
    )
    everything = Split(torch.from_numpy(pixels), torch.from_numpy(labels))
    random = torch.Generator().manual_seed(derive_seed(settings.seed, "question", task))
    order = torch.randperm(len(everything), generator=random)
    asked, rest = everything.take(order[: 2 * members]), everything.take(order[2 * members :])
    classes = len(arrays["classes"])
    shots = torch.cat([(rest.labels == label).nonzero()[: settings.shots, 0] for label in range(classes)])
    population = torch.ones(len(rest), dtype=torch.bool).index_fill(0, shots, False).nonzero()[:, 0]
    if len(shots) < classes * settings.shots or len(population) < 100:
        raise SettingError(
            f"--members {members}: {task} has {len(everything)} images, too few for twice as many, a head and a "
            "population; ask for fewer"
        )
    model = shared_model(settings.of_model())
    model.load(model.pretrained)
    head = models.prototypes(model.module, rest.take(shots), classes, settings.shots, settings.seed)
    return MembershipTarget(task, asked, rest.take(population[:POPULATION]), head)


def trajectory(
    settings: Settings,
    asked: MembershipTarget,
    number: int,
    others: Callable[[int, Tensor], Iterator[tuple[str, Update]]],
    run: str,
    folder: Path,
) -> Tensor:
    """Follow a run in which the task tunes on the half `number`: φ, float32 [rounds, models, n + population].

    Of the `models_seen` in each round. others: (round, base) → the other clients' updates by client. run: under which
    the party keeps residuals; folder: of its ledger, and for the run's directory, which is deleted at the end.
    """
    chosen = replace(settings, seed=derive_seed(settings.seed, "reference", number) if number else settings.seed)
    ledgers, place = folder / "privacy", folder / "followed"
    party = Party(chosen, asked.task, account=Account(ledgers))
    party.tuned_on = asked.images.take(asked.half(settings, number).nonzero()[:, 0]).to(party.model.device)
    party.head = asked.head.to(party.model.device)
    party.budget = Budget(chosen, asked.task, party.tuned_on, Account(ledgers))
    data = [split.to(party.model.device) for split in (asked.images, asked.population)]

    def answers(model: Tensor) -> Tensor:
        party.model.load(model)
        return torch.cat([confidences(party.model.module, party.head, split) for split in data])

    followed = []
    shutil.rmtree(place, ignore_errors=True)
    with closing(Run(replace(settings, run_dir=str(place), resume=False, resume_from=0))) as server:
        while server.rounds_done < settings.rounds:
            round_number = server.rounds_done + 1
            sent, update = others(round_number, server.base), party.train(server.base, round_number, run)
            if not settings.secure_aggregation:
                local = server.base
                if update.arrays is not None:
                    context = Context(settings, server.layout, round_number, party.task, party.client)
                    local = server.base + party.chain.decode(update.arrays, context)
                followed.append(answers(local))
            play_round(server, chain(sent, [(asked.task, update)]))
            followed.append(answers(server.base))
    shutil.rmtree(place)
    return torch.stack(followed).view(settings.rounds, len(models_seen(settings)), -1)


def models_seen(settings: Settings) -> tuple[str, ...]:
    """The models of a round that an attacker may see: "local", but for secure aggregation, and "merged"."""
    return ("merged",) if settings.secure_aggregation else ("local", "merged")


def save_updates(path: Path, updates: dict[str, Update]) -> None:
    """Keep clients' updates as they travel, with what they say of their tuning."""
    arrays: dict[str, np.ndarray] = {}
    numbers: dict[str, str] = {}
    for client, update in updates.items():
        if update.arrays is not None:
            arrays |= {f"{client}/{name}": array for name, array in update.arrays.items()}
            numbers[client] = json.dumps(update.tuning)
    with atomic_write(path) as temporary:
        save_arrays(arrays, temporary, numbers)


def load_updates(path: Path) -> Iterator[tuple[str, Update]]:
    """The kept updates by client; of those who took no part there are none."""
    with safe_open(str(path), "np") as file:
        names = [tuple(name.rsplit("/", 1)) for name in file.keys()]  # noqa: SIM118 (no dictionary)
        for client, tuning in (file.metadata() or {}).items():
            arrays = {name: file.get_tensor(f"{client}/{name}") for owner, name in names if owner == client}
            yield client, Update(arrays, {}, json.loads(tuning))


def study(
    settings: Settings,
    task: str,
    folder: Path,
    members: int = 1000,
    count: int = 16,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Attack one task of a run of `settings`: {"rows": [{"round", "model", "attack", "leak", "roc"}, …], "note": …}.

    model: "local" or "merged"; roc: some 200 points of the curve, false-positive rates and true-positive ones; note:
    why a model is not there, or "".

    `count` runs are followed, each with a half of 2 · `members` images of its own; each is attacked with the others as
    its references. In the first all parties tune; what they send stays in `folder` and is what the other parties send
    in the others. Runs that are finished there are not followed again. SettingError if it holds a study of other
    settings.
    """
    if task not in settings.party_names:
        raise SettingError(f"--task {task}: it is not in tasks={settings.tasks!r}")
    if count < 4:
        raise SettingError(f"--models {count}: it must be at least 4")
    if settings.private:
        raise SettingError(
            f"private={settings.private!r}: the attack asks a whole model, and what is seen of this one lacks a "
            "party's own entries; leave it out"
        )
    if settings.start != "pretrained":
        raise SettingError(f"start={settings.start!r}: the attack follows runs from the pretrained weights only")
    about = {"settings": settings.decisive(), "rounds": settings.rounds, "task": task, "members": members}
    about["format"] = FORMAT
    config = folder / "config.json"
    asked = membership_target(settings, task, members)
    about = claim(config, about, "choose another --folder")  # as it is there: seeds derive from it
    named = [pair for pair in zip(settings.party_names, settings.task_names, strict=True) if pair[0] != task]
    run = f"{derive_seed(str(folder.resolve()), about):016x}"

    def others(round_number: int, base: Tensor) -> Iterator[tuple[str, Update]]:
        path = folder / f"others-{round_number:05d}.safetensors"
        if not path.exists():
            parties = (
                Party(settings, name, client=client, account=Account(folder / "privacy")) for client, name in named
            )
            save_updates(path, {party.client: party.train(base, round_number, run) for party in parties})
        return load_updates(path)

    confidences_of_models = []
    for number in range(count):
        path = folder / f"run-{number:03d}.safetensors"
        if not path.exists():
            followed = trajectory(settings, asked, number, others, f"{derive_seed(run, number):016x}", folder)
            with atomic_write(path) as temporary:
                save_file({"confidences": followed}, str(temporary))
            say(f"run {number + 1} of {count}")
        confidences_of_models.append(load_file(str(path))["confidences"])
    confidence, halves = (
        torch.stack(confidences_of_models),
        torch.stack([asked.half(settings, number) for number in range(count)]),
    )
    asks = halves.shape[1]
    rows, models = [], models_seen(settings)
    for place, which in ((r, w) for r in range(settings.rounds) for w in range(len(models))):
        seen, population = confidence[:, place, which, :asks], confidence[:, place, which, asks:]
        for attack, scores in attacks(seen, halves, population).items():
            leak = membership_leak(scores, halves)
            false, true = Curve(scores, halves).rates()
            kept = np.unique(np.geomspace(1, len(false), 200).astype(int)) - 1
            points = [[float(f"{value:.6g}") for value in axis[kept]] for axis in (false, true)]
            rows.append({"round": place + 1, "model": models[which], "attack": attack, "leak": leak, "roc": points})
    return {"rows": rows, "note": "" if "local" in models else UNSEEN}


def attacks(seen: Tensor, halves: Tensor, population: Tensor) -> dict[str, Tensor]:
    """Scores [t, n] of each attack on each of t models, all others of which are its references.

    seen: φ [t, n]; halves: bool [t, n], what they were tuned on; population: φ [t, k].
    """
    scores: dict[str, list[Tensor]] = {"loss": [], "LiRA": [], "RMIA": []}
    for number in range(len(seen)):
        rest = [other for other in range(len(seen)) if other != number]
        scores["loss"].append(seen[number].double())
        scores["LiRA"].append(lira(seen[number], seen[rest], halves[rest]))
        scores["RMIA"].append(rmia(seen[number], seen[rest], halves[rest], population[number], population[rest]))
    return {name: torch.stack(values) for name, values in scores.items()}


def table(result: dict[str, Any]) -> str:
    """A study's numbers as a Markdown table, with 95 % intervals, and its note below."""
    head = ["round", "model", "attack", "AUC", *(f"TPR at {rate:.1%} FPR" for rate in RATES)]
    lines: list[list[str]] = []
    for row in result["rows"]:
        leak: MembershipLeak = row["leak"]
        cells = [f"{leak.auc:.3f} ({leak.auc_interval[0]:.3f}–{leak.auc_interval[1]:.3f})"]
        for rate in RATES:
            low, high = leak.tpr_interval[rate]
            cells.append(f"{leak.tpr[rate]:.2%} ({low:.2%}–{high:.2%})")
        lines.append([str(row["round"]), row["model"], row["attack"], *cells])
    return markdown(head, lines) + (f"\n\n{result['note']}" if result["note"] else "")


def write(result: dict[str, Any], folder: Path) -> str:
    """Write table.md, result.json and roc.png (logarithmic axes) of a study to `folder`; returns the table."""
    from atm_fl.runs.fonts import save_figure

    text = table(result)
    (folder / "table.md").write_text(text + "\n")
    (folder / "result.json").write_text(json.dumps(result, default=vars, indent=1))
    save_figure(lambda: _draw_curves(result), folder / "roc.png", dpi=120)
    return text


def _draw_curves(result: dict[str, Any]) -> Figure:
    """The ROC curves of each model of the last round, a panel a model."""
    from matplotlib.figure import Figure

    last = max(row["round"] for row in result["rows"])
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    picture = Figure(figsize=(4.5 * len(models), 4.5), layout="constrained")
    for axes, model in zip(picture.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        for row in result["rows"]:
            if row["round"] == last and row["model"] == model:
                axes.loglog(*row["roc"], label=f"{row['attack']}, AUC {row['leak'].auc:.3f}")
        axes.plot([1e-4, 1], [1e-4, 1], color="grey", linestyle=":", label="guessing")
        axes.set(xlim=(1e-4, 1), ylim=(1e-4, 1), title=f"{model} model of round {last}", xlabel="false-positive rate")
        axes.legend()
    picture.axes[0].set_ylabel("true-positive rate")
    return picture
