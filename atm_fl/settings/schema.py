"""The settings of a run: every key of `configs/*.toml` and of `[tool.flwr.app.config]`, checked once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from atm_fl import merging, models, tasks
from atm_fl.codecs import CODECS, Codec, make_codec
from atm_fl.errors import SettingError, did_you_mean
from atm_fl.merging import Merge, make_merge
from atm_fl.merging.scaling import read_factors
from atm_fl.merging.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizer
from atm_fl.models.buffers import RULES as BUFFERS
from atm_fl.optimizers import OPTIMIZERS
from atm_fl.options import Choice, read_choice
from atm_fl.plugins import Plugin, Registry
from atm_fl.seeds import derive_seed
from atm_fl.settings.participation import ANYONE, read_participation
from atm_fl.settings.rules import OF_DEPLOYMENT, check, idle
from atm_fl.settings.spelling import CHOSEN, modern
from atm_fl.settings.text import kebab, typed
from atm_fl.sinks import SINKS
from atm_fl.transforms import TRANSFORMS
from atm_fl.vectors import Layout
from atm_fl.vectors.ring import Ring


def setting(
    default: Any,
    meaning: str,
    *,
    decides: bool = True,
    later: bool = False,
    choices: Iterable[str] = (),
    names: Registry[Any] | None = None,
    section: str = "",
) -> Any:
    """A setting with its default and a line of documentation. `decides`: whether it can change a run's weights.

    later: whether it is younger than files and keys made of `Settings.decisive`, which lacks it at its default.

    names: what it names things of, several with commas, or one with options after a colon, where it has no `choices`.
    section: of this setting and those that follow it.
    """
    names = choices if isinstance(choices, Registry) else names
    metadata = {
        "meaning": meaning,
        "decides": decides,
        "later": later,
        "choices": choices,
        "names": names,
        "section": section,
    }
    return field(default=default, metadata=metadata)


NOTHING = 1e-30
"""A learning rate to end with, where 0 would mean the same throughout."""
OF_ONE_SIDE = ("tasks", "merge", "server_optimizer")
"""Settings that name what the server alone runs, or the party that holds the data."""


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Make one with `Settings.parse`, which checks every value."""

    tasks: str = setting(
        "solar,bluemarble,icons,strokes,scripts,radicals,mnist,digits",
        "the parties' tasks in order, separated by commas; one with a slash is a folder of images, and folders of one "
        "name are several parties of one task; hf:OWNER/NAME is a data set of the Hugging Face hub that was brought by "
        "`atm-fl prepare`; with a '*' among them others may join a deployment's run later",
        names=tasks.TASKS,
        section="Tasks and model",
    )
    model: str = setting(
        "vit_micro",
        "the shared backbone; also open_clip/ViT-B-16, timm/vit_small_patch16_224, transformers/…, clip/…, "
        "causal-lm/…, or package.module:function of yours",
        names=models.BACKBONES,
    )
    weights: str = setting(
        "pretrained",
        "of the model: pretrained, a file or a Hugging Face folder (every party needs it); of open_clip's and timm's "
        "also random, and open_clip's tags",
    )
    trainable: str = setting(
        "all",
        "what is tuned and merged: all, attention, last-K (blocks), names of entries or patterns as '*norm*', several "
        "with commas; or lora",
    )
    private: str = setting(
        "",
        "which of these entries each party tunes, keeps on its own disk and never sends, in the same words, as "
        "'last-1' or '*norm*'; see docs/privacy.md",
        later=True,
    )
    lora_rank: int = setting(8, "the rank r of lora")
    lora_alpha: float = setting(16.0, "its α: updates are α / r times B A")
    buffers: str = setting(
        "mean",
        "what becomes of BatchNorm's running statistics: a base has the mean of the parties' own; private: each party "
        "keeps its own; frozen: the pretrained ones stay",
        later=True,
        choices=BUFFERS,
    )
    head: str = setting("prototypes", "how a party makes its head", choices=models.HEADS)
    shots: int = setting(5, "images a class behind a prototype")
    start: str = setting(
        "pretrained",
        "first base: 'pretrained', a run's folder whose merged model to go on from, or a file of weights; the server "
        "alone needs it",
    )
    rounds: int = setting(10, "rounds K of tuning and merging", decides=False, section="Rounds")
    patience: int = setting(
        0,
        "rounds without a better mean validation accuracy after which a run ends; 0: never",
        decides=False,
    )
    local_epochs: float = setting(
        1.0, "epochs E that a client tunes a round; 1/m: the m-th part of an epoch, the next part in the next round"
    )
    task_epochs: str = setting(
        "", "whole epochs a round of single tasks in place of local-epochs, as 'cars=35, dtd=76'", later=True
    )
    split: str = setting("train", "what a client tunes on", choices=("train", "validation"))
    holdout: float = setting(
        0.2, "part of the validation split that is not tuned on when split=validation; its accuracy is measured there"
    )
    participation: str = setting(
        "", "rounds in which a task takes part, as 'mnist=1-5, digits=6-'; every task is evaluated in every round"
    )
    replay: float = setting(0.0, "part of its data on which a task whose last round is past still tunes each round")
    replay_vectors: str = setting(
        "",
        "merge the last vector of a task whose last round is past again in each round, without its parties; the server "
        "keeps it in run-dir by this codec: fp32, int4, topk:density=0.05, …",
        later=True,
        names=CODECS,
    )
    fraction: float = setting(1.0, "part of the tasks whose turn it is that take part in a round, drawn for each round")
    merge: str = setting(
        "mean",
        "how the task vectors become one step, with its options: ties:density=0.1; see `atm-fl merges`",
        names=merging.MERGES,
        section="Merging",
    )
    scaling: float = setting(
        0.0, "factor on the merged vector (λ; the mean's is T times the paper's α); 0: the merge's own"
    )
    task_scaling: str = setting("", "factors on single tasks' vectors before the merge, as 'mnist=0.5, digits=2'")
    layer_scaling: str = setting(
        "", "factors on the merged vector's entries, as '*.mlp.*=1.5, *norm*=0.5'; first match"
    )
    server_optimizer: str = setting(
        "none",
        "what the server makes of the merged vectors of all rounds: none, momentum, nesterov, adam, yogi or adagrad, "
        "with options: adam:learning-rate=0.001,momentum=0.9,beta2=0.99,epsilon=0.001",
        names=SERVER_OPTIMIZERS,
    )
    codec_up: str = setting(
        "fp32",
        "how task vectors travel: fp32, fp16, bf16, int8, int4, topk:density=0.05, low-rank:rank=16, …; in a "
        f"deployment {OF_DEPLOYMENT['codec-up']} if not said; see docs/wire.md",
        names=CODECS,
        section="Transport",
    )
    codec_down: str = setting(
        "fp32",
        "how the base's step travels after round 1, and so how far it goes; fp32: the whole base travels; in a "
        f"deployment {OF_DEPLOYMENT['codec-down']} if not said",
        names=CODECS,
    )
    transforms: str = setting(
        "",
        "what happens to a task vector besides, as 'grid:step=1e-4, mine', in this order at the client before it is "
        "encoded; see docs/plugins.md",
        later=True,
        names=TRANSFORMS,
    )
    optimizer: str = setting("adamw", "the clients' optimizer", choices=OPTIMIZERS, section="Training")
    keep_optimizer: bool = setting(
        False, "keep its state (AdamW's moments) on the party's disk from round to round; false: new every round"
    )
    client_momentum: float = setting(
        0.0,
        "how much of the last merged step each party adds to its vector, spread over its steps (FedCM, FedPAC)",
        later=True,
    )
    gradient_surgery: bool = setting(
        False, "free each of the clients' gradients of what opposes the last merged step (PCGrad)", later=True
    )
    learning_rate: float = setting(2e-4, "its learning rate, at the start of the run")
    final_learning_rate: float = setting(
        0.0, "that at the end of the run, which it nears by equal steps; 0: the same throughout", later=True
    )
    private_epochs: float = setting(
        0.0,
        "epochs for which each party tunes its private entries alone on the run's last base, at a learning rate that "
        "falls to nothing",
        later=True,
    )
    private_learning_rate: float = setting(
        0.0, "where private entries are tuned alone, by private-epochs or beside dp-sgd; 0: learning-rate", later=True
    )
    weight_decay: float = setting(0.1, "its weight decay")
    momentum: float = setting(0.0, "its momentum, of sgd only")
    batch_size: int = setting(32, "images a step")
    accumulate: int = setting(1, "parts of a batch that go through the model one after another; it divides batch-size")
    proximal: float = setting(
        0.0,
        "FedProx's μ: adds μ/2 ‖θ − θ₀‖² to the clients' loss; θ₀: the base, private entries as a round found them",
    )
    ewc: float = setting(
        0.0,
        "EWC's λ: adds λ/2 Σ Fᵢ (θᵢ − aᵢ)² to the clients' loss; a: the party's own model after its last round, F: its "
        "Fisher information of the rounds so far, both on its own disk",
        later=True,
    )
    clip_norm: float = setting(10.0, "gradient norm above which a gradient is scaled down; 0: never; not of dp-sgd")
    precision: str = setting(
        "fp32", "of the backbone's passes: autocast to bf16 or fp16", choices=("fp32", "bf16", "fp16")
    )
    gradient_checkpointing: bool = setting(False, "compute activations again instead of keeping them")
    channels_last: bool = setting(False, "hand images over in channels-last order")
    compile: bool = setting(False, "torch.compile the backbone: seconds to minutes at the start of every process")
    workers: int = setting(
        0,
        "processes that decode images that are not in memory; threads that decode a folder at the start",
        decides=False,
    )
    privacy: str = setting(
        "none",
        "dp-sgd: bound what a task vector tells of any one training record; clip-only: the same without noise, which "
        "bounds nothing",
        choices=("none", "dp-sgd", "clip-only"),
        section="Privacy",
    )
    dp_epsilon: float = setting(0.0, "of dp-sgd: the ε that the whole run may cost a party's records; 0: dp-noise says")
    dp_noise: float = setting(0.0, "of dp-sgd: the noise multiplier σ, instead of dp-epsilon; 0: dp-epsilon says")
    dp_delta: float = setting(1e-5, "of dp-sgd: δ")
    dp_clip: float = setting(1.0, "of dp-sgd: the norm C to which a record's gradient is clipped; inf: never")
    dp_rank: int = setting(
        0,
        "of dp-sgd: tune matrices alone, in so many directions of each of their sides, found on made-up images; 0: all",
        later=True,
    )
    dp_policy: str = setting("stop", "when a run's ε would pass dp-epsilon", decides=False, choices=("stop", "warn"))
    dp_client_clip: float = setting(
        0.0,
        "the norm C to which each party's whole task vector is scaled down; 0: never; for merges of the sum alone",
    )
    dp_client_noise: float = setting(
        0.0, "σ: noise of σ C on the sum of the vectors, before the merge: hides whole parties, see docs/privacy.md"
    )
    secure_aggregation: bool = setting(False, "the server learns the sum of the task vectors, and no single one")
    secure_threshold: int = setting(
        0, "of secure-aggregation: parties that must be there to unmask a sum; 0: just over half", decides=False
    )
    secure_neighbours: int = setting(
        0, "of secure-aggregation: parties that each masks with and shares its secrets among; 0: all", decides=False
    )
    secure_range: float = setting(1.0, "of secure-aggregation: the largest magnitude of an element of a task vector")
    max_update_norm: float = setting(
        0.0,
        "L2 norm by which the base may move in a round: a client refuses one that moved further; 0: it may go anywhere",
        decides=False,
        section="Reliability",
    )
    proportion: float = setting(
        20.0,
        "how many times as long as usual in this round and the past a client's task vector may be; 0: any length",
        decides=False,
    )
    min_successful: int = setting(
        0,
        "clients that must succeed in a round under skip, of those that take part in it; 0: one, or secure-threshold",
        decides=False,
    )
    on_failure: str = setting(
        "abort", "when a client fails: end the run, or go on without it", decides=False, choices=("abort", "skip")
    )
    node_timeout: float = setting(300.0, "seconds to wait for the parties to come online", decides=False)
    round_timeout: float = setting(
        3600.0, "seconds to a round's deadline: who is later has failed in that round; not of plain", decides=False
    )
    seed: int = setting(0, "from which every client's and round's random numbers derive", section="Run")
    threads: int = setting(1, "CPU threads of one client; sums in another order give other bits")
    device: str = setting("auto", "where clients compute: cpu, cuda, cuda:1, …; auto: a GPU if there is one")
    alignment: bool = setting(
        False, "measure each task vector's cosine with minus the full-batch gradient of its loss", decides=False
    )
    larger_test: bool = setting(
        False, "test embedded images on more than the test split, where their source has more", later=True
    )
    validate_every: int = setting(1, "evaluate the validation split every so many rounds", decides=False)
    test_every: int = setting(
        0, "also evaluate the test split every so many rounds; 0: before the first and at the end", decides=False
    )
    run_dir: str = setting("runs/latest", "the run's directory", decides=False)
    keep_checkpoints: int = setting(2, "checkpoints that stay in run-dir, the newest; 0: all", decides=False)
    metric_sinks: str = setting(
        "tensorboard", "where metrics go besides metrics.jsonl, separated by commas", decides=False, names=SINKS
    )
    resume: bool = setting(
        False, "go on from the last checkpoint in run-dir, with more tasks if some are added", decides=False
    )
    resume_from: int = setting(
        0, "of resume: go back to the checkpoint after so many rounds; 0: the newest", decides=False
    )

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Settings:
        """Settings from a run config with kebab-case keys; missing keys take their defaults.

        SettingError names the first key that is unknown or has a value that cannot work, and the fix. Old spellings
        (`settings.spelling`) are read, with a warning of `OldSpelling`.
        """
        known = {kebab(item.name): item for item in fields(cls)}
        config = modern(config)
        values = {}
        for key, value in config.items():
            if key not in known:
                raise SettingError(f"setting {key!r} is unknown{did_you_mean(key, known)}")
            values[known[key].name] = typed(key, value, known[key].type)
        settings = cls(**values)
        check(settings)
        return settings

    @cached_property
    def task_names(self) -> tuple[str, ...]:
        """The parties' tasks in order; of an open run those that are named, or have joined."""
        return tuple(name for name in self._listed if name != ANYONE)

    @property
    def is_open(self) -> bool:
        """Whether parties that `tasks` does not name may join while the run goes on: it has a `*`."""
        return ANYONE in self._listed

    @property
    def _listed(self) -> list[str]:
        return [name.strip() for name in self.tasks.split(",")]

    def joined(self, task: str, first: int) -> Settings:
        """These settings once `task` has joined the run with the round `first`; named or not."""
        added = task if task in tasks.TASKS else f"./{task}"
        names = self.tasks if task in self.party_names else f"{self.tasks},{added}"
        periods = self.participation
        if task not in self.participations and (task in self.client_tasks or names != self.tasks):
            periods = ", ".join(filter(None, [periods, f"{task}={first}-"]))
        return replace(self, tasks=names, participation=periods)

    @cached_property
    def party_names(self) -> tuple[str, ...]:
        """The clients' names in the run: their tasks', and of several clients of one task the second is pets.2."""
        before: Counter[str] = Counter()
        names = []
        for task in self.client_tasks:
            names.append(f"{task}.{before[task] + 1}" if before[task] else task)
            before[task] += 1
        return tuple(names)

    @cached_property
    def client_tasks(self) -> tuple[str, ...]:
        """Each client's task, as it is called in the run."""
        return tuple(map(tasks.called, self.task_names))

    @cached_property
    def task_of(self) -> dict[str, str]:
        """Client → task."""
        return dict(zip(self.party_names, self.client_tasks, strict=True))

    def of_model(self) -> Settings:
        """These settings with all at their defaults but those that make the model; equal ones can share it."""
        kept = ["model", "weights", "trainable", "private", "lora_rank", "lora_alpha", "buffers", "device", "precision"]
        kept += ["gradient_checkpointing", "channels_last", "compile"]
        return Settings(**{name: getattr(self, name) for name in kept})

    @property
    def sinks(self) -> tuple[str, ...]:
        """The names in `metric-sinks`."""
        return tuple(name.strip() for name in self.metric_sinks.split(",") if name.strip())

    @property
    def needed(self) -> int:
        """Clients that must succeed for a round to count: all, or under skip `min-successful` (or as few as can).

        So in an open run, whose parties may leave; under abort those that have not left must succeed as well.
        """
        if self.on_failure == "abort" and not self.is_open:
            return len(self.task_names)
        return self.min_successful or (self.threshold if self.secure_aggregation else 1)

    @property
    def task_scalings(self) -> dict[str, float]:
        """`task-scaling` as a table."""
        return read_factors("task-scaling", self.task_scaling)

    @cached_property
    def epochs_of_tasks(self) -> dict[str, float]:
        """`task-epochs` as a table."""
        return read_factors("task-epochs", self.task_epochs)

    def of_task(self, task: str) -> Settings:
        """These settings as the clients of `task` have them: with its own `local-epochs`."""
        epochs = self.epochs_of_tasks.get(task)
        return self if epochs is None else replace(self, local_epochs=float(epochs), task_epochs="")

    def of_round(self, round_number: int) -> Settings:
        """These settings as a round has them: with the learning rates at its start and its end."""
        first, last = self.learning_rate, self.final_learning_rate
        if not last:
            return self
        begin, end = (first + (last - first) * done / self.rounds for done in (round_number - 1, round_number))
        return replace(self, learning_rate=begin, final_learning_rate=end)

    def of_private(self, round_number: int) -> Settings:
        """These settings as the passes of a round have them that tune private entries alone."""
        rate = self.private_learning_rate
        return replace(self, learning_rate=rate, final_learning_rate=0.0) if rate else self.of_round(round_number)

    @property
    def of_private_end(self) -> Settings:
        """These settings as the passes at a run's end have them, of `private-epochs`."""
        rate = self.private_learning_rate or self.final_learning_rate or self.learning_rate
        return replace(self, local_epochs=self.private_epochs, learning_rate=rate, final_learning_rate=NOTHING)

    @property
    def layer_scalings(self) -> dict[str, float]:
        """`layer-scaling` as a table."""
        return read_factors("layer-scaling", self.layer_scaling)

    @property
    def dp_sgd(self) -> bool:
        """Whether clients tune with DP-SGD, be it without its noise (clip-only)."""
        return self.privacy != "none"

    @property
    def own_kinds(self) -> tuple[str, ...]:
        """What each party keeps of the model as its own: its "private" entries, its "buffers"."""
        return ("private",) * bool(self.private) + ("buffers",) * (self.buffers == "private")

    @property
    def threshold(self) -> int:
        """`secure-threshold`, or just over half of the parties."""
        return self.secure_threshold or len(self.task_names) // 2 + 1

    @property
    def ring(self) -> Ring:
        """What task vectors are added up in under secure aggregation."""
        return Ring(self.secure_range, len(self.task_names))

    @property
    def uplink_name(self) -> str:
        """How task vectors travel: `codec-up`, or "ring" under secure aggregation."""
        return "ring" if self.secure_aggregation else self.codec_up

    @property
    def chunks_per_epoch(self) -> int:
        """Rounds that one epoch is spread over: m for local-epochs = 1/m."""
        return max(1, round(1 / self.local_epochs))

    @cached_property
    def participations(self) -> dict[str, tuple[int, float]]:
        """`participation` as a table: task → (first, last) round; the others take part in all."""
        return read_participation(self.participation)

    def part_taken(self, task: str, round_number: int) -> float:
        """The part of its epochs that `task` tunes in a round: 1, 0 if it takes no part, `replay` when it is past."""
        share = self.planned(task, round_number)
        return share if share and (self.fraction == 1 or task in _drawn(self, round_number)) else 0.0

    def planned(self, task: str, round_number: int) -> float:
        """The same by `participation` alone."""
        first, last = self.participations.get(task, (1, math.inf))
        return self.replay if round_number > last else float(round_number >= first)

    def make_merge(self, layout: Layout, round_number: int) -> Merge:
        """The merge of one round. SettingError if `merge` or `scaling` cannot work."""
        choice = self.merge_choice
        strength = {"scaling": self.scaling} if self.scaling else {}
        seed = derive_seed(self.seed, "merge", round_number)
        return make_merge(choice.name, layout, seed=seed, **choice.values, **strength)

    @property
    def merge_choice(self) -> Choice:
        """`merge` as a name and its options. SettingError if it is none."""
        return read_choice("merge", self.merge, merging.MERGES)

    @property
    def uplink(self) -> Codec:
        """`codec-up` as a codec. SettingError if it is none."""
        return make_codec(self.codec_up, "codec-up")

    @property
    def past_codec(self) -> Codec | None:
        """`replay-vectors` as a codec; None without it. SettingError if it is none."""
        return make_codec(self.replay_vectors, "replay-vectors") if self.replay_vectors else None

    @property
    def downlink(self) -> Codec | None:
        """`codec-down` as the codec of the base's steps; None if the whole base travels. SettingError if it is none."""
        codec = make_codec(self.codec_down, "codec-down")
        return None if codec.name == "fp32" else codec

    def make_server_optimizer(self) -> ServerOptimizer:
        """The optimizer of a run, at its start."""
        choice = read_choice("server-optimizer", self.server_optimizer, SERVER_OPTIMIZERS)
        return ServerOptimizer(choice.name, **choice.values)

    def decisive(self) -> dict[str, Any]:
        """The settings that decide a run's weights, by kebab-case key; `later` ones only if not at their default."""
        return {
            kebab(item.name): getattr(self, item.name)
            for item in fields(self)
            if item.metadata["decides"] and not (item.metadata["later"] and getattr(self, item.name) == item.default)
        }

    def plugins(self, of_all: bool = False) -> dict[str, Plugin]:
        """What decides a run's weights and comes from plugins: "codec 'sign'" → its plugin.

        of_all: without what one side alone runs, OF_ONE_SIDE: what server and parties must have alike.
        """
        files = {}
        for item in fields(self):
            registry = item.metadata["names"]
            if registry is None or not item.metadata["decides"] or (of_all and item.name in OF_ONE_SIDE):
                continue
            text = getattr(self, item.name)
            for name in [text] if kebab(item.name) in CHOSEN else text.split(","):
                if registry is models.BACKBONES and models.is_imported(name):
                    files[f"{registry.kind} {name!r}"] = models.imported_plugin(name)
                    continue
                name = name.partition(":")[0].strip()
                if plugin := registry.plugin(name):
                    files[f"{registry.kind} {name!r}"] = plugin
        return files

    def as_config(self) -> dict[str, Any]:
        """All settings by kebab-case key, as `parse` takes them."""
        return {kebab(name): value for name, value in asdict(self).items()}

    @classmethod
    def of_config(cls, values: Mapping[str, Any]) -> Settings:
        """From what `as_config` returned, unchecked; what is not among the values has its default."""
        return cls(**{item.name: values[kebab(item.name)] for item in fields(cls) if kebab(item.name) in values})


@lru_cache(maxsize=16)
def _drawn(settings: Settings, round_number: int) -> set[str]:
    """The tasks that are drawn for a round: `fraction` of those whose turn it is, one at least."""
    planned = [task for task in dict.fromkeys(settings.client_tasks) if settings.planned(task, round_number)]
    random = torch.Generator().manual_seed(derive_seed(settings.seed, "fraction", round_number))
    order = torch.randperm(len(planned), generator=random).tolist()
    return {planned[place] for place in order[: max(1, round(settings.fraction * len(planned)))]}


def defaults() -> dict[str, Any]:
    """Every setting's default by kebab-case key."""
    return Settings().as_config()


def stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """What decided a run, by kebab-case key, of a file of any version: in today's spelling.

    A run from before a setting was there ran with its default, and so did one with a setting that had no effect.
    """
    known = Settings().decisive() | modern(values, strict=False)
    return known | {kebab(name): default for name, default, _ in idle(Settings.of_config(known))}


def sections() -> dict[str, list[Field[Any]]]:
    """The settings by section, in order."""
    table: dict[str, list[Field[Any]]] = {}
    title = ""
    for item in fields(Settings):
        title = item.metadata["section"] or title
        table.setdefault(title, []).append(item)
    return table
