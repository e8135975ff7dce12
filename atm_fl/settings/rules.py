"""What settings cannot be, by themselves and together: checked once, before any work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atm_fl import models, tasks
from atm_fl.errors import SettingError
from atm_fl.merging import find_merge, merges_of_sum
from atm_fl.merging.scaling import check_tasks
from atm_fl.models.buffers import measured, mixing
from atm_fl.models.trainable import check_trainable
from atm_fl.neighbours import least_neighbours, shares_needed
from atm_fl.settings.text import kebab
from atm_fl.sinks import SINKS
from atm_fl.transforms import make_transforms
from atm_fl.vectors import Layout

if TYPE_CHECKING:
    from atm_fl.settings.schema import Settings


OF_DEPLOYMENT = {"codec-up": "int4", "codec-down": "int4"}
"""What runs of the runtime `deployment`, whose bottleneck is the wire, take if neither file nor `-c` says otherwise."""


def _some_leave(run: Settings) -> bool:
    return any(math.isfinite(last) for _, last in run.participations.values())


_ENDS = "a participation that ends, as participation='mnist=1-5'"
NEEDS: dict[str, tuple[str, Callable[[Settings], bool]]] = {
    "lora_rank": ("trainable='lora'", lambda run: run.trainable == "lora"),
    "lora_alpha": ("trainable='lora'", lambda run: run.trainable == "lora"),
    "shots": ("head='prototypes'", lambda run: run.head not in ("linear-probe", "zero-shot", "answers", "sentences")),
    "holdout": ("split='validation'", lambda run: run.split == "validation"),
    "replay": (_ENDS, _some_leave),
    "replay_vectors": (_ENDS, _some_leave),
    "fraction": (
        "more tasks, for of these it is all",
        lambda run: max(1, round(run.fraction * len(set(run.client_tasks)))) < len(set(run.client_tasks)),
    ),
    "larger_test": (
        "a task whose source has more images, as 'scripts'",
        lambda run: any(getattr(tasks.TASKS.get(name), "more_test", False) for name in run.task_names),
    ),
    "private_epochs": ("private", lambda run: bool(run.private)),
    "private_learning_rate": (
        "private, and private-epochs or dp-sgd, by which these entries are tuned alone",
        lambda run: bool(run.private) and (run.dp_sgd or bool(run.private_epochs)),
    ),
    "momentum": ("optimizer='sgd'", lambda run: run.optimizer != "adamw"),
    "clip_norm": ("privacy='none'; with dp-sgd it is dp-clip", lambda run: not run.dp_sgd),
    "dp_epsilon": ("privacy='dp-sgd'", lambda run: run.privacy == "dp-sgd"),
    "dp_noise": ("privacy='dp-sgd'", lambda run: run.privacy == "dp-sgd"),
    "dp_delta": (
        "privacy='dp-sgd' or dp-client-noise",
        lambda run: run.privacy == "dp-sgd" or bool(run.dp_client_noise),
    ),
    "dp_clip": ("privacy='dp-sgd' or 'clip-only'", lambda run: run.dp_sgd),
    "dp_rank": ("privacy='dp-sgd' or 'clip-only'", lambda run: run.dp_sgd),
    "dp_policy": ("dp-epsilon", lambda run: bool(run.dp_epsilon)),
    "dp_client_noise": ("dp-client-clip, in units of which it is", lambda run: bool(run.dp_client_clip)),
    "secure_threshold": ("secure-aggregation=true", lambda run: run.secure_aggregation),
    "secure_neighbours": ("secure-aggregation=true", lambda run: run.secure_aggregation),
    "secure_range": ("secure-aggregation=true", lambda run: run.secure_aggregation),
    "min_successful": (
        "on-failure=skip, for on-failure='abort' ends a run at the first failure, or tasks with a '*'",
        lambda run: run.on_failure == "skip" or run.is_open,
    ),
    "resume_from": ("resume=true", lambda run: run.resume),
}
"""What a setting needs to have an effect: in words, and whether a run has it. Without it the default alone is taken."""


def idle(settings: Settings) -> Iterator[tuple[str, Any, str]]:
    """(name, default, what it needs) of the settings that are not at their defaults and have no effect."""
    for item in fields(settings):
        needs, there = NEEDS.get(item.name, ("", None))
        if there and getattr(settings, item.name) != item.default and not there(settings):
            yield item.name, item.default, needs


def _whole(number: float) -> bool:
    """Whether a number is whole, up to rounding."""
    return abs(number - round(number)) < 1e-6


def check(settings: Settings) -> None:
    """SettingError names the first setting whose value cannot work, and the fix."""
    for item in fields(settings):
        value, choices = getattr(settings, item.name), item.metadata["choices"]
        if choices and value not in choices:
            raise SettingError(f"{kebab(item.name)}={value!r}: it takes one of {', '.join(choices)}")
    for name in ("rounds", "batch_size", "accumulate", "lora_rank", "shots", "threads", "validate_every"):
        if getattr(settings, name) < 1:
            raise SettingError(f"{kebab(name)}={getattr(settings, name)}: it must be at least 1")
    for name in (
        "final_learning_rate",
        "private_epochs",
        "private_learning_rate",
        "weight_decay",
        "momentum",
        "client_momentum",
        "proximal",
        "ewc",
        "clip_norm",
        "max_update_norm",
        "test_every",
        "keep_checkpoints",
        "patience",
        "resume_from",
        "proportion",
        "min_successful",
        "seed",
        "workers",
    ):
        if not 0 <= getattr(settings, name) < math.inf:
            raise SettingError(f"{kebab(name)}={getattr(settings, name)}: it must be 0 or more")
    if 0 < settings.proportion < 1:
        raise SettingError(f"proportion={settings.proportion:g}: it must be at least 1, or 0 for any length")
    for name in ("holdout", "replay"):
        if not 0 <= getattr(settings, name) < 1:
            raise SettingError(f"{kebab(name)}={getattr(settings, name)}: it must be at least 0 and below 1")
    for name, epochs in (("local-epochs", settings.local_epochs), ("private-epochs", settings.private_epochs or 1)):
        if not (epochs >= 1 and epochs == round(epochs)) and not (0 < epochs < 1 and _whole(1 / epochs)):
            raise SettingError(f"{name}={epochs:g}: it must be a whole number, or 1/m as 0.5, 0.25, 0.2, 0.1")
    if settings.keep_optimizer and settings.optimizer == "sgd" and not settings.momentum:
        raise SettingError("keep-optimizer=true: sgd with momentum=0 has no state; choose adamw, or a momentum")
    dense = ("proximal", "ewc", "alignment", "keep_optimizer", "client_momentum", "gradient_surgery", "private_epochs")
    for name in dense:
        if getattr(settings, name) and settings.trainable == "lora":
            raise SettingError(
                f"{kebab(name)}={getattr(settings, name)}: not with trainable='lora', which tunes B and A"
            )
    if settings.replay_vectors and settings.replay:
        raise SettingError(
            f"replay={settings.replay:g} and replay-vectors={settings.replay_vectors!r}: give one of them; who still "
            "tunes sends new vectors"
        )
    if settings.replay_vectors and settings.secure_aggregation:
        raise SettingError(
            f"replay-vectors={settings.replay_vectors!r}: not with secure-aggregation=true, whose server sees no "
            "single vector to keep"
        )
    check_privacy(settings)
    check_sums(settings)
    check_open(settings)
    check_transforms(settings)
    if settings.batch_size % settings.accumulate:
        raise SettingError(f"accumulate={settings.accumulate}: it must divide batch-size={settings.batch_size}")
    positive = (
        "learning_rate",
        "lora_alpha",
        "node_timeout",
        "round_timeout",
    )
    for name in positive:
        if not 0 < getattr(settings, name) < math.inf:
            raise SettingError(f"{kebab(name)}={getattr(settings, name)}: it must be a positive number")
    if not 0 < settings.fraction <= 1:
        raise SettingError(f"fraction={settings.fraction:g}: it must be above 0 and at most 1")
    if not math.isfinite(settings.scaling):
        raise SettingError(f"scaling={settings.scaling}: it must be a finite number")
    try:
        torch.device("cpu" if settings.device == "auto" else settings.device)
    except RuntimeError:
        raise SettingError(f"device={settings.device!r} is no device; it takes auto, cpu, cuda, cuda:1, …") from None
    models.check_backbone(settings.model, settings.weights)
    check_trainable(settings.trainable, settings.private)
    if settings.head == "zero-shot" and not settings.model.startswith(
        ("open_clip/", "clip/", "transformers/", "minilm")
    ):
        raise SettingError(
            f"head='zero-shot': model={settings.model!r} has no text tower; choose prototypes or an open_clip model"
        )
    if settings.max_update_norm and settings.start != "pretrained":
        raise SettingError(
            f"max-update-norm={settings.max_update_norm:g}: with start={settings.start!r} nobody could check the first "
            f"base"
        )
    fewest = fewest_tasks(settings)
    settings.make_merge(Layout((), ()), 0).check_count(
        settings.needed if settings.is_open else min(settings.needed, fewest)
    )
    check_tasks("task-scaling", settings.task_scalings, settings.client_tasks)
    check_tasks("task-epochs", settings.epochs_of_tasks, settings.client_tasks)
    check_tasks("participation", settings.participations, settings.client_tasks)
    for task, epochs in settings.epochs_of_tasks.items():
        if epochs < 1 or epochs != round(epochs):
            raise SettingError(f"task-epochs={settings.task_epochs!r}: {task} must have a whole number, 1 or more")
    settings.layer_scalings, settings.uplink, settings.downlink, settings.past_codec, settings.make_server_optimizer()
    holders, named = Counter(settings.client_tasks), Counter(settings.party_names)
    for task, name in zip(settings.client_tasks, settings.task_names, strict=True):
        own_folder = "/" in name and not name.startswith(tasks.HUB)
        if (holders[task] > 1 and not own_folder) or named[task] > 1:
            raise SettingError(
                f"tasks={settings.tasks!r} names {task!r} twice; several clients of one task are folders of images, "
                "as ./pets,./pets"
            )
    for name in settings.task_names:
        tasks.check(name)
    for name in settings.sinks:
        SINKS.find(name, f"metric-sinks={settings.metric_sinks!r}: metric sink {name!r}")
    check_secure(settings)
    if settings.min_successful > len(settings.task_names) and not settings.is_open:
        raise SettingError(
            f"min-successful={settings.min_successful}: there are only {len(settings.task_names)} clients in tasks"
        )
    for name, _, needs in idle(settings):
        value = getattr(settings, name)
        told = f"{value:g}" if isinstance(value, float) else repr(value)
        raise SettingError(f"{kebab(name)}={told}: it needs {needs}")


def check_privacy(settings: Settings) -> None:
    for name in ("dp_epsilon", "dp_noise"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise SettingError(f"{kebab(name)}={getattr(settings, name)}: it must be 0 or more")
    if not 0 < settings.dp_delta < 1:
        raise SettingError(f"dp-delta={settings.dp_delta:g}: it must be between 0 and 1, below 1 / the records")
    if not settings.dp_clip > 1e-20:
        raise SettingError(
            f"dp-clip={settings.dp_clip:g}: it must be a positive number above 1e-20, which float32 holds, or inf"
        )
    given = {kebab(name): getattr(settings, name) for name in ("dp_epsilon", "dp_noise") if getattr(settings, name)}
    if len(given) == 2:
        raise SettingError(f"dp-epsilon={settings.dp_epsilon:g} and dp-noise={settings.dp_noise:g}: give one of them")
    if given and settings.dp_clip == math.inf:
        raise SettingError("dp-clip=inf: noise in proportion to it is infinite; choose a finite dp-clip")
    if settings.privacy == "dp-sgd" and not given:
        raise SettingError(
            "privacy='dp-sgd' without noise protects nothing: give dp-epsilon or dp-noise; to clip records' "
            "gradients alone, privacy='clip-only'"
        )
    if settings.dp_sgd and settings.split == "validation" and not settings.holdout:
        raise SettingError(
            f"holdout=0: with privacy={settings.privacy!r} and split='validation' accuracies would be told of the very "
            "records that are tuned on; choose a holdout above 0"
        )
    if settings.dp_sgd and settings.private and settings.trainable == "lora":
        raise SettingError(
            f"private={settings.private!r}: not with trainable='lora' and privacy={settings.privacy!r}, whose noise is "
            "on the B and A of all entries"
        )
    if settings.dp_rank < 0:
        raise SettingError(f"dp-rank={settings.dp_rank}: it must be 0 or more")
    if settings.dp_rank:
        for name in ("keep_optimizer", "client_momentum", "gradient_surgery"):
            if value := getattr(settings, name):
                raise SettingError(f"{kebab(name)}={value}: not with dp-rank, whose directions are each round's own")
        if settings.trainable == "lora":
            raise SettingError("dp-rank: not with trainable='lora', which has few directions by itself")
        if settings.model.startswith(("transformers/", "causal-lm/", "minilm")):
            raise SettingError(f"dp-rank: its made-up images are nothing to model={settings.model!r}; leave it out")
    for name, wrong in (("replay", 0.0), ("ewc", 0.0), ("alignment", False), ("precision", "fp32")):
        if settings.dp_sgd and getattr(settings, name) != wrong:
            raise SettingError(f"{name}={getattr(settings, name)!r}: not with privacy={settings.privacy!r}")


def check_sums(settings: Settings) -> None:
    """What goes with a bound on whole parties: what is made of the sum of all of them in every round."""
    for name in ("dp_client_clip", "dp_client_noise"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise SettingError(f"{kebab(name)}={getattr(settings, name)}: it must be 0 or more")
    for key, wanted in (
        ("secure-aggregation=true", settings.secure_aggregation),
        (f"dp-client-clip={settings.dp_client_clip:g}", settings.dp_client_clip),
        *((f"transforms={made.name!r}", made.has("total")) for made in make_transforms(settings.transforms)),
    ):
        if wanted and not find_merge(settings.merge_choice.name).of_sum:
            raise SettingError(
                f"merge={settings.merge!r}: not with {key}, which bounds what a sum tells; choose a merge of the sum "
                f"alone: {', '.join(merges_of_sum())}"
            )
        if wanted and settings.is_open:
            raise SettingError(f"tasks={settings.tasks!r}: a '*' is not with {key}, whose sums are over known parties")
        if wanted and (settings.participation or settings.fraction < 1):
            name, value = (
                ("participation", repr(settings.participation))
                if settings.participation
                else ("fraction", f"{settings.fraction:g}")
            )
            raise SettingError(f"{name}={value}: not with {key}, whose sums are over all parties")
        if wanted and len(set(settings.client_tasks)) < len(settings.client_tasks):
            raise SettingError(f"tasks={settings.tasks!r}: several clients of one task, not with {key}")


def check_open(settings: Settings) -> None:
    """What an open run cannot be, of which nobody knows at its start who will be in it."""
    if not settings.is_open:
        return
    if settings.fraction < 1:
        raise SettingError(
            f"fraction={settings.fraction:g}: not with tasks={settings.tasks!r}, for parties draw it from the tasks "
            "that are named"
        )
    if settings.max_update_norm:
        raise SettingError(
            f"max-update-norm={settings.max_update_norm:g}: not with tasks={settings.tasks!r}, for who joins knows no "
            "base before; parties have a rule of this name"
        )


def check_closed(settings: Settings) -> None:
    """SettingError if `tasks` lets others join where nobody comes later."""
    if settings.is_open:
        raise SettingError(
            f"tasks={settings.tasks!r}: only a deployment has parties that come online later; name all, and who joins "
            "when in participation, as 'pets=3-'"
        )


def check_transforms(settings: Settings) -> None:
    """What each transform asks for, and that a server sees the single vectors that its hook is of."""
    for made in make_transforms(settings.transforms):
        made.check(settings)
        if made.has("server") and settings.secure_aggregation:
            raise SettingError(
                f"transforms={made.name!r}: not with secure-aggregation=true, whose server sees no single vector"
            )


def check_secure(settings: Settings) -> None:
    count, threshold = len(settings.task_names), settings.threshold
    if not settings.secure_aggregation:
        return
    if count < 3:
        raise SettingError("secure-aggregation=true: it needs 3 tasks, for of two each learns the other's vector")
    if not count / 2 < threshold <= count:
        raise SettingError(
            f"secure-threshold={threshold}: it must be more than half of the {count} tasks and at most all of them"
        )
    if (neighbours := settings.secure_neighbours) and (neighbours % 2 or not 2 <= neighbours < count):
        raise SettingError(
            f"secure-neighbours={neighbours}: it must be an even number from 2 on, below the {count} tasks; 0: all"
        )
    try:
        shares_needed(count, neighbours, threshold)
    except ValueError as error:
        enough = least_neighbours(count, threshold)
        fix = f"{enough} or more, or 0" if enough else "0"
        raise SettingError(f"secure-neighbours={neighbours}: {error}; take {fix} for all others") from error
    if settings.needed < threshold:
        raise SettingError(
            f"min-successful={settings.min_successful}: secure-threshold={threshold} parties must be there; raise it"
        )
    if not 0 < settings.secure_range < math.inf:
        raise SettingError(f"secure-range={settings.secure_range}: it must be a positive number")
    if settings.codec_up != "fp32":
        raise SettingError(f"codec-up={settings.codec_up!r}: not with secure-aggregation=true, whose masks need words")
    if settings.alignment:
        raise SettingError("alignment=true: not with secure-aggregation=true, for it tells of single vectors")


def fewest_tasks(settings: Settings) -> int:
    """The least number of tasks that take part in a round. SettingError if none does in one.

    Of an open run, of those that are named.
    """
    if settings.is_open and not settings.task_names:
        return 0
    # Who takes part changes where a task begins or ends; between, every round has as many.
    spans = settings.participations.values()
    changes = {1} | {start for start, _ in spans} | {int(end) + 1 for _, end in spans if end < settings.rounds}
    rounds = sorted(number for number in changes if number <= settings.rounds)
    counts = {n: sum(settings.part_taken(task, n) > 0 for task in set(settings.client_tasks)) for n in rounds}
    empty = next((number for number, count in counts.items() if not count), None)
    if empty:
        raise SettingError(f"participation={settings.participation!r}: no task takes part in round {empty}")
    return min(counts.values())


def check_model(settings: Settings, module: nn.Module) -> None:
    """SettingError for what the settings cannot be with the model that they name, once it is loaded."""
    says = isinstance(module, models.LanguageModel)
    if says != (settings.head == "answers") and not models.HEADS.plugin(settings.head):
        fix = "choose head='answers'" if says else "choose another head, or a language model as causal-lm/NAME"
        gives = "answers and no features" if says else "features and no answers"
        raise SettingError(f"head={settings.head!r}: model={settings.model!r} gives {gives}; {fix}")
    if settings.head == "sentences" and not hasattr(module, "tokenizer"):
        raise SettingError(
            f"head='sentences': model={settings.model!r} reads no sentences; choose both towers, model='clip/…', a "
            "model of texts, or another head"
        )
    needs = {
        "precision": "precision",
        "channels_last": "channels_last",
        "gradient_checkpointing": "checkpoint_gradients",
    }
    for name, needed in needs.items():
        if getattr(settings, name) != getattr(type(settings)(), name) and not hasattr(module, needed):
            raise SettingError(
                f"{kebab(name)}={getattr(settings, name)!r}: model={settings.model!r} is no Backbone, which does that"
            )
    rule, named, mixes = settings.buffers, f"model={settings.model!r}", "mixes the records of a batch"
    frozen = rule == "frozen"
    if rule != "mean" and not measured(module):
        raise SettingError(f"buffers={rule!r}: {named} has no such buffers; leave it at 'mean'")
    if settings.dp_sgd and (layer := next(mixing(module, frozen), None)):
        fix = "choose buffers='frozen' or" if next(mixing(module, True), None) is None else "choose"
        raise SettingError(
            f"privacy={settings.privacy!r}: the BatchNorm {layer!r} of {named} {mixes}, and no record's gradient is "
            f"its own; {fix} another model"
        )
    if frozen or not measured(module):
        return
    if settings.dp_sgd:
        raise SettingError(f"privacy={settings.privacy!r}: {named} measures its records; choose buffers='frozen'")
    if settings.gradient_checkpointing:
        raise SettingError(
            f"gradient-checkpointing=true: {named} would measure every batch twice; choose buffers='frozen'"
        )
    if rule == "mean" and settings.dp_client_clip:
        raise SettingError(
            f"dp-client-clip={settings.dp_client_clip:g}: the buffers of {named} would travel beside what is clipped; "
            "choose buffers='frozen' or 'private'"
        )
    if rule == "mean" and (merge := find_merge(settings.merge_choice.name)).robust:
        raise SettingError(
            f"merge={merge.name!r}: a bad party would have the mean of the buffers of {named}; choose buffers='frozen' "
            "or 'private'"
        )
