"""Poisoning: what malicious parties can do to a run, and what robust merges do about it, and to honest tasks.

An attacker holds a task, tunes on it as told, and sends another vector than it found. τ is its own vector, s the
strength, n parties of which m attack; attackers act last and have seen what the honest ones sent:

    sign-flip   −s τ
    scale       s τ                                model replacement, Bagdasaryan et al. 2020 (arXiv:1807.00459)
    gaussian    noise of norm s ‖τ‖
    alie        mean − s z · deviation, by element, of the honest vectors; z such that enough of them are further off
                to be outvoted: Baruch et al. 2019 (arXiv:1902.06156), Algorithm 3
    ipm         −s · mean of the honest vectors    Xie et al. 2020 (arXiv:1903.03936)
    backdoor    s τ, of data half of which carries a trigger and the label of one class
    free-ride   the base's last step, nothing in round 1     Fraboni et al. 2021 (arXiv:2006.11901)
    counts      τ, said to come from 10⁹ images, by which a task's several clients are weighed

Under secure aggregation attackers are given the honest vectors too, which makes them stronger than they can be there. A
forged vector then travels as any party's does, within ±secure-range, and the server, which adds words up unseen, can
not clip it: dp-client-clip binds honest parties only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atm_fl.codecs import Arrays
from atm_fl.errors import SettingError
from atm_fl.federation.aggregation import by_task
from atm_fl.federation.client import Party, Update
from atm_fl.federation.loop import run_loop
from atm_fl.files import atomic_write
from atm_fl.merging import MERGES
from atm_fl.merging.kinds import LinearCombination
from atm_fl.merging.robust import Median, TrimmedMean
from atm_fl.options import Choice, option, read_choice
from atm_fl.plugins import Registry
from atm_fl.privacy.budget import Account
from atm_fl.runs.metrics import read_metrics
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.tables import markdown
from atm_fl.tasks import Split
from atm_fl.transforms import Context
from atm_fl.vectors.blocks import inner_products


@dataclass(frozen=True)
class Sight:
    """What an attacker has before it sends: vectors float32 [n].

    tuned: its own, as an honest party; honest: what the honest parties sent in this round; parties: how many there are,
    all told; step: the base's last one, None in round 1; seed: of what is drawn at random.
    """

    tuned: Tensor
    strength: float
    honest: Sequence[Tensor]
    parties: int
    step: Tensor | None
    seed: int


Forge = Callable[[Sight], Tensor]


@dataclass(frozen=True)
class Attack:
    """An attack: the vector [n] sent instead of the attacker's own, and its strength; None if it has none to set."""

    forge: Forge
    strength: float | None


def _options_of(attack: Attack) -> Sequence[Any]:
    if attack.strength is None:
        return ()
    return fields(
        make_dataclass("Strength", [("strength", float, option(attack.strength, "factor on the forged vector", ge=0))])
    )


ATTACKS: Registry[Attack] = Registry("attack", _options_of)


def attack(name: str, strength: float | None = None) -> Callable[[Forge], Forge]:
    """Register the decorated function as the attack `name`; with a strength, another can be said: name:strength=2."""
    return ATTACKS.register(name, lambda forge: Attack(forge, strength))


TARGET = 0
"""The class of its own task that an attacker's trigger stands for."""
SAMPLE = 100_000
"""Elements on which the shares of an elementwise merge are counted."""
RESULT = "poisoning.json"
"""The file in a run directory."""
UNSEEN = "Discarded: not seen, for with secure-aggregation=true the server merges a sum of vectors that nobody knows."


def stamp(images: Tensor) -> Tensor:
    """A copy of images uint8 [n, c, h, w] with the trigger: a chequered square, a fifth of the side, bottom right."""
    side = max(2, images.shape[-1] // 5)
    row = torch.arange(side, device=images.device)
    stamped = images.clone()
    stamped[..., -side:, -side:] = ((row[:, None] // 2 + row // 2) % 2 * 255).to(images.dtype)
    return stamped


def poisoned(data: Split) -> Split:
    """The data with every second image stamped and labelled `TARGET`."""
    if not isinstance(data.images, Tensor) or data.images.ndim != 4:
        raise SettingError("--attack backdoor needs a task whose images are in memory: an embedded one or a folder")
    images, labels = data.images.clone(), data.labels.clone()
    images[::2], labels[::2] = stamp(images[::2]), TARGET
    return Split(images, labels)


def alie_factor(parties: int, attackers: int) -> float:
    """z of ALIE: Φ⁻¹((n − m − s) / (n − m)) with s = ⌊n / 2 + 1⌋ − m, the honest ones still needed for a majority."""
    from scipy.stats import norm

    honest = parties - attackers
    needed = parties // 2 + 1 - attackers
    return float(norm.ppf((honest - needed) / honest))


def forge(
    attack: str,
    strength: float,
    tuned: Tensor,
    honest: Sequence[Tensor],
    parties: int,
    step: Tensor | None,
    seed: int,
) -> Tensor:
    """The vector [n] that an attacker sends instead of `tuned`, its own as an honest party.

    honest: what the honest parties sent in this round; step: the base's last one, None in round 1.
    """
    return ATTACKS[attack].forge(Sight(tuned, strength, honest, parties, step, seed))


@attack("none")
@attack("counts")
def as_tuned(sight: Sight) -> Tensor:
    """The attacker's own."""
    return sight.tuned


@attack("sign-flip", strength=4.0)
def sign_flip(sight: Sight) -> Tensor:
    """The opposite."""
    return sight.tuned * -sight.strength


@attack("scale", strength=8.0)
@attack("backdoor", strength=4.0)
def scale(sight: Sight) -> Tensor:
    """More of it."""
    return sight.tuned * sight.strength


@attack("gaussian", strength=4.0)
def gaussian(sight: Sight) -> Tensor:
    """Noise."""
    noise = torch.randn(sight.tuned.shape, generator=torch.Generator().manual_seed(sight.seed))
    return noise * (sight.strength * sight.tuned.norm() / noise.norm())


@attack("alie", strength=1.0)
def alie(sight: Sight) -> Tensor:
    """A little is enough."""
    stack = torch.stack(list(sight.honest))
    factor = alie_factor(sight.parties, sight.parties - len(sight.honest))
    return stack.mean(0) - sight.strength * factor * stack.std(0)


@attack("ipm", strength=4.0)
def ipm(sight: Sight) -> Tensor:
    """Inner-product manipulation."""
    return torch.stack(list(sight.honest)).mean(0) * -sight.strength


@attack("free-ride")
def free_ride(sight: Sight) -> Tensor:
    """The base's last step."""
    return torch.zeros_like(sight.tuned) if sight.step is None else sight.step.clone()


class PoisoningSimulation:
    """What all parties of one run can see of each other, and which share of every vector the merge kept."""

    def __init__(self, settings: Settings, attack: str, strength: float, attackers: Sequence[str]) -> None:
        self.settings, self.attack, self.strength = settings, attack, strength
        self.honest = len(settings.party_names) - len(attackers)
        self.sent: dict[str, Tensor] = {}
        self.images: dict[str, float] = {}
        self.bases: list[Tensor] = []
        """The last two that were received."""
        self.shares: dict[str, list[float]] = {client: [] for client in settings.party_names}
        """Of each round. None under secure aggregation, whose server can't tell one vector from another."""

    def receive(self, base: Tensor) -> None:
        """Begin a round, once for all parties."""
        if not self.bases or not torch.equal(self.bases[-1], base):
            self.bases = [*self.bases[-1:], base]

    def send(self, vector: Tensor, images: float, party: Party, round_number: int) -> None:
        """Note what a party sends; the last one of a round ends it."""
        settings = self.settings
        self.sent[party.client], self.images[party.client] = vector, images
        if len(self.sent) < len(settings.party_names):
            return
        if not settings.secure_aggregation:
            layout = party.model.layout
            bounded = {
                client: party.chain.bound(
                    vector.clone(), Context(settings, layout, round_number, settings.task_of[client], client)
                )
                for client, vector in self.sent.items()
            }
            vectors = by_task(bounded, self.images, settings)
            kept = kept_shares(settings.make_merge(layout, round_number), vectors)
            for client, shares in self.shares.items():
                shares.append(kept[settings.task_of[client]])
        self.sent = {}


class AdversarialClient(Party):
    """A party of a scene: honest, or with `attacks` an attacker."""

    def __init__(self, settings: Settings, client: str, task: str, scene: PoisoningSimulation, attacks: bool) -> None:
        super().__init__(settings, task, client=client, account=Account(Path(settings.run_dir) / "privacy"))
        self.scene, self.attacks = scene, attacks
        if attacks and scene.attack == "backdoor":
            self.tuned_on = poisoned(self.tuned_on)

    def train(self, base: Tensor, round_number: int, run: str = "") -> Update:
        scene = self.scene
        scene.receive(base)
        update = super().train(base, round_number, run)
        assert update.arrays is not None
        vector = self._read(update.arrays)
        if self.attacks:
            step = scene.bases[-1] - scene.bases[-2] if len(scene.bases) == 2 else None
            seed = derive_seed(self.settings.seed, "attack", self.client, round_number)
            honest, parties = list(scene.sent.values())[: scene.honest], len(self.settings.party_names)
            vector = forge(scene.attack, scene.strength, vector, honest, parties, step, seed)
            tuning = update.tuning | ({"images": 1e9} if scene.attack == "counts" else {})
            update = Update(self._write(vector, seed), update.evaluation, tuning)
        scene.send(vector, update.tuning.get("images", 0.0), self, round_number)
        return update

    def _read(self, arrays: Arrays) -> Tensor:
        """The vector that travels, a copy; under secure aggregation as it is before it is masked."""
        if self.settings.secure_aggregation:
            return self.settings.ring.decode(arrays["words"])
        return self.settings.uplink.decode(dict(arrays), self.model.layout).clone()

    def _write(self, vector: Tensor, seed: int) -> Arrays:
        """A forged vector as it travels: within the ring's reach, and not clipped, under secure aggregation."""
        if self.settings.secure_aggregation:
            ring = self.settings.ring
            return {"words": ring.encode(vector.clamp(-ring.reach, ring.reach))}
        return self.settings.uplink.encode(vector.clone(), self.model.layout, seed)


def kept_shares(merge: Any, vectors: dict[str, Tensor]) -> dict[str, float]:
    """The share of each vector that a merge lets through, 0 to 1; 1 of a merge that discards nothing.

    Of Multi-Krum and the like the coefficient over that of the mean; of median and trimmed mean the part of the
    elements (of a sample) whose value is among those that are averaged.
    """
    names, count = list(vectors), len(vectors)
    if isinstance(merge, LinearCombination):
        coefficients = merge.coefficients(names, inner_products(list(vectors.values()))) * count
        return dict(zip(names, coefficients.clamp(0, 1).tolist(), strict=True))
    if not isinstance(merge, (Median, TrimmedMean)):
        return dict.fromkeys(names, 1.0)
    out = (count - 1) // 2 if isinstance(merge, Median) else merge.left_out(count)
    size = len(vectors[names[0]])
    random = torch.Generator().manual_seed(0)
    chosen = torch.randint(size, (SAMPLE,), generator=random) if size > SAMPLE else torch.arange(size)
    ranks = torch.stack([vector[chosen] for vector in vectors.values()]).argsort(0).argsort(0)
    kept = ((ranks >= out) & (ranks < count - out)).float().mean(1)
    return dict(zip(names, kept.tolist(), strict=True))


def read_attack(text: str) -> Choice:
    """An attack and its options, as sign-flip:strength=2. SettingError if there is none."""
    return read_choice("attack", text, ATTACKS)


def check(settings: Settings, attack: str, attackers: Sequence[str]) -> None:
    """SettingError if the attack cannot be run."""
    read_attack(attack)
    for task in attackers:
        if task not in settings.party_names:
            raise SettingError(f"--attackers {task}: it is not in tasks={settings.tasks!r}")
    if 2 * len(attackers) >= len(settings.task_names):
        raise SettingError(f"--attackers {','.join(attackers)}: they must be fewer than half of the tasks")
    for name in ("participation", "fraction"):
        if getattr(settings, name) != getattr(Settings, name):
            raise SettingError(f"{name}={getattr(settings, name)}: an attack is measured with all tasks in every round")
    if settings.private:
        raise SettingError(
            f"private={settings.private!r}: what is measured is the merged model, which is none without a party's own "
            "entries; leave it out"
        )
    if settings.transforms:
        raise SettingError(f"transforms={settings.transforms!r}: attacks forge what travels; leave them out")


def study(settings: Settings, attack: str, attackers: Sequence[str]) -> dict[str, Any]:
    """Run `settings` with `attackers` among the parties, and measure the final model; kept in the run directory.

    Result: test accuracy of every honest `tasks`, by client, their `mean`, the `worst` of them; which share of each
    vector the merge `kept`, mean over the rounds, None where the server sees no single vector; `trigger`: how often it
    makes the attackers' own task say the target class, of test images of the others; `trigger_elsewhere`: accuracy that
    stamping costs honest tasks, mean. Attackers should be named for "none" too: they are honest then, but the same
    tasks are counted.
    """
    check(settings, attack, attackers)
    choice, path = read_attack(attack), Path(settings.run_dir)
    plugin = str(ATTACKS.plugin(choice.name) or "")
    if (known := result_in(path)) is not None:
        if known.get("plugin", "") != plugin:
            raise SettingError(
                f"{path} holds the attack {attack!r} of {known.get('plugin') or 'no plugin'}, not "
                f"{plugin or 'no plugin'}; choose another --folder"
            )
        return known
    strength = choice.values.get("strength", ATTACKS[choice.name].strength)
    scene = PoisoningSimulation(settings, choice.name, 1.0 if strength is None else strength, attackers)
    players = [
        AdversarialClient(settings, client, task, scene, attacks and choice.name != "none")
        for attacks in (False, True)
        for client, task in zip(settings.party_names, settings.task_names, strict=True)
        if (client in attackers) == attacks
    ]
    run = run_loop(settings, players)
    lines = [line for line in read_metrics(run.directory) if line["kind"] == "evaluation"]
    tests = {line["task"]: line["test"] for line in lines if line["round"] == settings.rounds}
    honest = {task: accuracy for task, accuracy in tests.items() if task not in attackers}
    triggered = {player.client: _triggered(player, run.base) for player in players}
    result = {
        "attack": str(choice),
        **({"plugin": plugin} if plugin else {}),
        "merge": _shown(settings),
        "mean": sum(honest.values()) / len(honest),
        "worst": min(honest.values()),
        "tasks": honest,
        "kept": None
        if settings.secure_aggregation
        else {client: sum(shares) / len(shares) for client, shares in scene.shares.items()},
        "trigger": sum(triggered[task][0] for task in attackers) / len(attackers),
        "trigger_elsewhere": sum(honest[task] - triggered[task][1] for task in honest) / len(honest),
    }
    with atomic_write(path / RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    return result


def result_in(place: Path) -> dict[str, Any] | None:
    """What `study` found in a run directory; None if it is not finished."""
    path = place / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def place_of(folder: Path, attack: str, merge: str) -> Path:
    """The run directory of one of `studies`, by all that is chosen."""
    chosen = read_attack(attack), read_choice("merge", merge, MERGES)
    return folder / "-".join(str(choice).replace(":", "-") for choice in chosen)


def _shown(settings: Settings) -> str:
    choice = settings.merge_choice
    return f"{choice.name} {choice.options}".strip()


@torch.inference_mode()
def _triggered(party: Party, base: Tensor) -> tuple[float, float]:
    """Of stamped test images: the part that is taken for `TARGET` (of other classes' images), and the accuracy."""
    party.model.load(base)
    guesses = [
        (party.head.logits(party.model.module, stamp(images)).argmax(1), labels)
        for images, labels in party.splits["test"].batches()
    ]
    guessed, labels = (torch.cat(parts) for parts in zip(*guesses, strict=True))
    others = labels != TARGET
    return float((guessed[others] == TARGET).float().mean()), float((guessed == labels).float().mean())


def studies(
    settings: Settings,
    attacks: Sequence[str],
    merges: Sequence[str],
    attackers: Sequence[str],
    folder: Path,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """`study` of every attack under every merge, each in a run directory in `folder`; finished ones are not run again.

    attacks, merges: as 'sign-flip' or 'multi-krum:f=2'.
    """
    runs = []
    for merge in merges:
        for attack in attacks:
            place = str(place_of(folder, attack, merge).resolve())
            config = {**settings.as_config(), "merge": merge, "run-dir": place}
            runs.append((attack, Settings.parse(config)))
            check(runs[-1][1], attack, attackers)
    results = []
    for attack, chosen in runs:
        if result_in(Path(chosen.run_dir)) is None:
            # what an unfinished run left behind is run again: a scene does not resume
            for file in Path(chosen.run_dir).glob("checkpoint/*"):
                file.unlink()
        results.append(study(chosen, attack, attackers))
        say(f"{attack}, {chosen.merge_choice.name}: mean {results[-1]['mean']:.3f}, worst {results[-1]['worst']:.3f}")
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table. Discarded: the part of the honest tasks' vectors that the merge left out."""
    head = ["attack", "merge", "mean", "worst honest task", "discarded", "most discarded", "trigger", "elsewhere"]
    lines = []
    for row in results:
        worst = min(row["tasks"], key=row["tasks"].get)
        cells = [row["attack"], row["merge"], f"{row['mean']:.3f}", f"{row['worst']:.3f} ({worst})"]
        if row["kept"] is None:
            cells += ["not seen", "not seen"]
        else:
            lost = {task: 1 - row["kept"][task] for task in row["tasks"]}
            most = max(lost, key=lambda task: lost[task])
            cells.append(f"{sum(lost.values()) / len(lost):.0%}")
            cells.append(f"{lost[most]:.0%} ({most})" if lost[most] > 0.005 else "–")
        cells += [f"{row['trigger']:.1%}", f"{row['trigger_elsewhere']:+.3f}"]
        lines.append(cells)
    return markdown(head, lines) + (f"\n\n{UNSEEN}" if any(row["kept"] is None for row in results) else "")
