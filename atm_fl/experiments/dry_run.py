"""What runs would cost, before anything is downloaded: a dry run of a contest's rows or of one run.

The model is built with random weights, and two batches of made-up images a task are tuned on, which proves that the
settings fit the model and gives the memory that a batch takes. Steps and images follow from the settings and from the
data sets' published sizes; floating-point operations are counted on one image (`models.flops`); hours are those
operations at a device's peak rate and an assumed share of it, which every answer names.

Of an image only its passes count: decoding is not in the hours. On a GPU the batches are whole and the memory is its
own; on the CPU they are of `FEW` images, and what a whole batch would take is reckoned from what autograd keeps of one
image and of two.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from atm_fl import models, tasks
from atm_fl.errors import SettingError, did_you_mean
from atm_fl.experiments.contest import BY_RUNS, Contest, ContestRow, ContestUnit
from atm_fl.federation.client import evaluated_splits
from atm_fl.federation.client_state import KEPT_ROUNDS
from atm_fl.federation.shared_model import SharedModel
from atm_fl.models.flops import operations
from atm_fl.models.hubs import PRETRAINED, RANDOM, clip_weights
from atm_fl.models.loading import is_path
from atm_fl.privacy.dp_sgd import steps_per_round
from atm_fl.settings import Settings, check_model
from atm_fl.tables import markdown
from atm_fl.tasks import Split
from atm_fl.tasks.published import Published, validation_count

FEW = 2
"""Images of a batch on the CPU."""
BATCHES = 2
HALF = ("bf16", "fp16")


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: dense peak rates in TFLOP/s, of float32 and of 16-bit tensor cores, and memory in GB."""

    fp32: float
    half: float
    memory: float


DEVICES = {
    "A100": Device(19.5, 312, 80),
    "A100-40GB": Device(19.5, 312, 40),
    "H100": Device(67, 989, 80),
    "L4": Device(30.3, 121, 24),
    "RTX-3090": Device(35.6, 71, 24),
    "RTX-4090": Device(82.6, 165, 24),
    "T4": Device(8.1, 65, 16),
    "V100": Device(15.7, 125, 32),
}
UTILISATION = {"fp32": 0.5, **dict.fromkeys(HALF, 0.33)}
"""Which part of the peak rate is assumed to be reached, by precision; not measured here."""


@dataclass(frozen=True)
class Sizes:
    """Images of a task's splits and its number of classes."""

    train: int
    validation: int
    test: int
    classes: int


@dataclass(frozen=True)
class Work:
    """What one run or unit does: optimizer steps, images tuned on and images evaluated, and bytes that it keeps."""

    steps: int = 0
    tuned: int = 0
    evaluated: int = 0
    disk: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.steps + other.steps,
            self.tuned + other.tuned,
            self.evaluated + other.evaluated,
            self.disk + other.disk,
        )


@dataclass(frozen=True)
class Tried:
    """What the batches of made-up images took: bytes on the device in training, and elements of base and vectors."""

    memory: int
    measured: bool
    """Whether `memory` is a GPU's own count, and not reckoned."""
    elements: int
    per_image: tuple[int, int]
    """FLOPs of a forward pass, and of one with the pass backward."""


def device_named(name: str) -> Device:
    """The device of that name. SettingError if the table lacks it."""
    if name not in DEVICES:
        raise SettingError(f"--device-name={name!r} is unknown{did_you_mean(name, DEVICES)}")
    return DEVICES[name]


def dry_run(rows: Iterable[tuple[str, str, list[ContestUnit] | Settings]], device_name: str) -> Iterator[str]:
    """The lines to print: a table with a line a row, the sum, and what was assumed.

    rows: (name, kind, its units, or the settings of one run).
    """
    device = device_named(device_name)
    table, total, hours = [], Work(), 0.0
    every: list[Settings] = []
    flops = 0
    for name, kind, units in rows:
        work, of_row = Work(), 0
        runs = [(units, None)] if isinstance(units, Settings) else [(unit.settings(), unit) for unit in units]
        tried = try_out(_of_tuning(runs[0][0]))
        for settings, unit in runs:
            tried = try_out(_of_tuning(settings))
            one = _work(kind, settings, tried.elements, unit.row.attempts(len(settings.party_names)) if unit else 1)
            forward, step = tried.per_image
            of_row += step * one.tuned + forward * one.evaluated
            work += one
            every.append(settings)
        settings = runs[0][0]
        rate = (device.half if settings.precision in HALF else device.fp32) * UTILISATION[settings.precision] * 1e12
        total, flops, hours = total + work, flops + of_row, hours + of_row / rate / 3600
        table.append([name, str(len(runs)), *_cells(work, of_row, of_row / rate / 3600, tried.memory)])
    table.append(["all", "", *_cells(total, flops, hours, max(try_out(_of_tuning(each)).memory for each in every))])
    head = (
        "row",
        "runs",
        "steps",
        "images tuned on",
        "evaluated",
        "PFLOP",
        f"h on one {device_name}",
        "GPU GB",
        "disk GB",
    )
    yield markdown(head, table, "|---:")
    yield ""
    yield from _notes(every, device_name, device)


def rows_of(study: Contest) -> Iterator[tuple[str, str, list[ContestUnit]]]:
    """A contest's rows with all the runs that they take."""
    for row in study.rows:
        yield row.name, row.kind, list(_units(study, row))


def _units(study: Contest, row: ContestRow) -> Iterator[ContestUnit]:
    """The runs of a row: of one tuned by runs all choices on the first seed, and the chosen one of all seeds."""
    first, *others = study.seeds
    choices = row.choices()
    if row.kind not in BY_RUNS or not row.tune:
        yield from (ContestUnit(study, row, seed) for seed in study.seeds)
        return
    for choice in choices:
        yield ContestUnit(study, row, first, choice, row.tuning_rounds)
    ends = study.seeds if row.tuning_rounds else others
    yield from (ContestUnit(study, row, seed, choices[0]) for seed in ends)


# ------------------------------------------------------------------------------------------------------- what is to do


@cache
def sizes_of(task: str) -> Sizes:
    """A task's sizes: a published data set's as they are known, whether it is here or not."""
    known = None if "/" in task else tasks.find(task)
    if isinstance(known, Published):
        held = validation_count(known.train)
        return Sizes(known.train - held, held, known.test, known.classes)
    data = tasks.load(task)
    return Sizes(len(data.train), len(data.validation), len(data.test), len(data.classes))


def _work(kind: str, settings: Settings, elements: int, attempts: int) -> Work:
    """What a run of a kind does. attempts: the merges that a one-shot row evaluates."""
    sizes = [sizes_of(task) for task in settings.task_names]
    part = settings.holdout if settings.split == "validation" and settings.holdout else 1
    held = {
        "validation": round(part * sum(size.validation for size in sizes)),
        "test": sum(size.test for size in sizes),
    }
    vector = 4 * elements
    if kind == "one-shot":
        return Work(evaluated=attempts * held["validation"] + held["test"], disk=vector)
    tuned_on = [_tuned_on(size, settings) for size in sizes]
    if kind == "joint":
        steps = settings.rounds * math.ceil(sum(tuned_on) / settings.batch_size)
        tuned = settings.rounds * sum(tuned_on)
    else:
        steps, tuned = map(sum, zip(*_rounds(settings, tuned_on), strict=True))
    splits = [split for done in range(settings.rounds) for split in evaluated_splits(settings, done)]
    evaluated = sum(held[split] for split in (*splits, "validation", "test"))
    kept = settings.keep_checkpoints + 2 if settings.keep_checkpoints else settings.rounds
    disk = min(kept, settings.rounds) * vector + len(sizes) * vector  # the vectors of a round, spilled or kept
    if settings.keep_optimizer:
        disk += min(KEPT_ROUNDS, settings.rounds) * 2 * len(sizes) * vector
    return Work(steps, tuned, evaluated, disk)


def _tuned_on(size: Sizes, settings: Settings) -> int:
    if settings.split == "train":
        return size.train
    return max(1, round((1 - settings.holdout) * size.validation))


def _rounds(settings: Settings, tuned_on: list[int]) -> Iterator[tuple[int, int]]:
    """(steps, images) of each task and round."""
    for task, count in zip(settings.client_tasks, tuned_on, strict=True):
        own = settings.of_task(task)
        for number in range(1, settings.rounds + 1):
            share = settings.part_taken(task, number)
            if not share:
                continue
            images = count if share == 1 else max(1, round(share * count))
            if own.dp_sgd:
                steps = steps_per_round(images, own)
                yield steps, steps * own.batch_size
            else:
                part, epochs = images / own.chunks_per_epoch, max(1, round(own.local_epochs))
                yield epochs * math.ceil(part / own.batch_size), round(epochs * part)


# ------------------------------------------------------------------------------------------------ what it is tried on


def _of_tuning(settings: Settings) -> Settings:
    """What of the settings a batch depends on; equal ones are tried once."""
    names = ("optimizer", "batch_size", "accumulate", "proximal", "clip_norm", "momentum", "tasks")
    kept = {name: getattr(settings, name) for name in names}
    return replace(settings.of_model(), **kept)


@cache
def try_out(settings: Settings) -> Tried:
    """Tune the settings' model, with random weights, on two batches of made-up images a task."""
    weights = RANDOM if settings.model.startswith(("open_clip/", "timm/")) else settings.weights
    if settings.model.startswith("transformers/"):
        raise SettingError(
            f"--dry-run: model={settings.model!r} is made by a download alone; choose one of open_clip's"
        )
    settings = replace(settings, weights=weights)
    model = SharedModel(settings)
    check_model(settings, model.module)
    if not model.module.image_size:
        raise SettingError(f"--dry-run: model={settings.model!r} reads texts; the made-up batches are of images")
    on_gpu = model.device.type == "cuda"
    batch = settings.batch_size if on_gpu else min(FEW, settings.batch_size)
    tuning = replace(settings, batch_size=batch, accumulate=settings.accumulate if on_gpu else 1)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    for number, task in enumerate(settings.task_names):
        data = made_up(BATCHES * batch, model.module.image_size, sizes_of(task).classes, number, model.device)
        head = _random_head(model.module, data, sizes_of(task).classes)
        model.load(model.pretrained)
        model.tune(model.pretrained, head, data, tuning, number)
    per_image = operations(model.module, *(inputs.to(model.device) for inputs in model.module.example()))
    if on_gpu:
        return Tried(torch.cuda.max_memory_allocated(model.device), True, model.layout.size, per_image)
    one, two = (kept_by_autograd(model.module, head, data.take(slice(0, count))) for count in (1, 2))
    whole = sum(tensor.nbytes for tensor in (*model.module.parameters(), *model.module.buffers()))
    tuned = (model.lora.flat if model.lora else model.flat).numel()
    moments = 0 if settings.optimizer == "sgd" and not settings.momentum else 1 if settings.optimizer == "sgd" else 2
    at_once = settings.batch_size // settings.accumulate
    memory = whole + 4 * (1 + moments) * tuned + one + (at_once - 1) * (two - one)
    return Tried(memory, False, model.layout.size, per_image)


def kept_by_autograd(module: nn.Module, head: models.Head, data: Split) -> int:
    """Bytes that a pass over `data` keeps for the way back, beside the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        images, labels = next(data.batches())
        head.loss(module, images, labels)
    return sum(kept.values())


def made_up(count: int, size: int, classes: int, seed: int, device: torch.device) -> Split:
    """Images of noise, uint8 [count, 3, size, size], with labels."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=random, dtype=torch.uint8)
    return Split(images, torch.randint(0, classes, (count,), generator=random)).to(device)


def _random_head(module: nn.Module, data: Split, classes: int) -> models.Head:
    images, _ = next(data.batches(batch_size=1))
    with torch.no_grad():
        width = module(images).shape[-1]
    return models.Head(torch.randn(classes, width), torch.zeros(classes)).to(data.labels.device)


# -------------------------------------------------------------------------------------------------------- what is said


def _cells(work: Work, flops: int, hours: float, memory: int) -> list[str]:
    counts = (work.steps, work.tuned, work.evaluated)
    return [*map("{:,}".format, counts), *map(_told, (flops / 1e15, hours, memory / 1e9, work.disk / 1e9))]


def _told(number: float) -> str:
    return f"{number:,.1f}" if number >= 1 else f"{number:.2g}"


def _notes(every: list[Settings], device_name: str, device: Device) -> Iterator[str]:
    """What must be brought, and what the figures rest on."""
    for model, weights in sorted({(settings.model, settings.weights) for settings in every}):
        if text := _download(model, weights, any(settings.head == "zero-shot" for settings in every)):
            yield f"download: {text}"
    names = dict.fromkeys(name for settings in every for name in settings.task_names if "/" not in name)
    published = [known for name in names if isinstance(known := tasks.find(name), Published)]
    missing = [known for known in published if not known.on_disk()]
    if missing:
        sets = ", ".join(f"{known.name} {known.gigabytes:g}" for known in missing)
        yield f"download: data sets, GB on disk: {sets}; {sum(known.gigabytes for known in missing):.1f} together"
    elif published:
        yield "download: no data set, all are here"
    precision = " and ".join(sorted({settings.precision for settings in every}))
    yield (
        f"hours: {device_name} with {device.fp32:g} TFLOP/s in fp32 and {device.half:g} in half precision (data "
        f"sheet), of which {UTILISATION['fp32']:.0%} and {UTILISATION['bf16']:.0%} are assumed; the rows are in "
        f"{precision}; passes alone, without decoding, one run after the other"
    )
    tried = [try_out(_of_tuning(settings)) for settings in every]
    how = "measured" if all(one.measured for one in tried) else f"reckoned from batches of {FEW} images"
    most = max(one.memory for one in tried)
    fits = "" if most <= 0.9 * device.memory * 1e9 else f"; more than a {device_name} has: accumulate, or checkpoint"
    private = ", without dp-sgd's gradients of single records" if any(settings.dp_sgd for settings in every) else ""
    yield f"GPU memory: of one client at a time, {how}{private}{fits}"
    yield (
        f"CPU memory: this dry run took {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB; a server "
        f"adds {4 * 4 * tried[0].elements / 1e9:.1f} GB (base, step, sum, one vector)"
    )
    yield "disk: checkpoints, single-task vectors, spilled vectors and optimizers' states; without the data sets"


def _download(model: str, weights: str, with_text: bool) -> str:
    """The weights that a model is downloaded with; "" if it needs none."""
    library, _, name = model.partition("/")
    if weights == RANDOM or is_path(weights) or library not in ("open_clip", "timm"):
        return ""
    if library == "timm":
        import timm

        with torch.device("meta"):
            whole = timm.create_model(name, pretrained=False)
        tag = PRETRAINED
    else:
        import open_clip

        with torch.device("meta"):
            whole = open_clip.create_model(name, pretrained=None, device="meta")
        tag = str(clip_weights(name, weights))
    count = sum(parameter.numel() for parameter in whole.parameters())
    more = ", image and text tower" if with_text or library == "open_clip" else ""
    return f"weights {tag} of {model}: {count:,} parameters{more}, {4 * count / 1e9:.2f} GB as float32, half as float16"
