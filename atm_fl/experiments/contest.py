"""The contest: ATM against what it has to beat, from one set of checkpoints and with one budget of epochs.

A row is a contestant: a kind, settings over the study's own, and `tune`, settings with the values to try. All rows may
spend `epochs` epochs of every task's training split. Kinds:

single      every task tuned alone; its vectors are the checkpoints of all one-shot rows, and its base is "pretrained"
joint       all data in one place, one optimizer: the oracle without privacy
one-shot    one merge of the single-task vectors; with `greedy` of those that help, as a greedy soup
atm         a run of the loop: PA-ATM, and what is a setting of it (FedProx, server optimizers, other splits of the
            budget); the default
ph-atm      a row for every one-shot row, refining its merged model on the validation splits

Values are chosen by mean validation accuracy: of a one-shot row for every seed, of the others on the first seed, where
each candidate runs for `tuning-rounds` (all its rounds if not said). A row with `select` runs once and reports the one
of these rounds that is best on validation images that were not tuned on (`holdout`). `report` makes a row of its own of
each of these rounds. Test splits are only read for the tables.

`pairs` names pairs of rows whose difference is tested at the end of both (significance.py).

Every unit of work is a folder and resumes by itself.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atm_fl import tasks
from atm_fl.codecs import size_of
from atm_fl.errors import RunError, SettingError, did_you_mean
from atm_fl.experiments import contest_page
from atm_fl.experiments.joint import run_joint
from atm_fl.experiments.landscape import landscape
from atm_fl.experiments.significance import differences
from atm_fl.federation.aggregation import by_task, merge_tasks
from atm_fl.federation.chain import Chain
from atm_fl.federation.client import Party, parties_of
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.loop import run_loop
from atm_fl.files import atomic_write
from atm_fl.merging.scaling import scale_layers
from atm_fl.models import load_backbone
from atm_fl.models.flops import operations
from atm_fl.runs.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from atm_fl.runs.claims import claim
from atm_fl.runs.downlink import Downlink
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import processor
from atm_fl.settings import Settings
from atm_fl.training.evaluation import mean_accuracy
from atm_fl.transforms import Context
from atm_fl.vectors import Layout

RIGHTLY = "rightly.npz"
"""Of a unit: which test images its end classifies rightly, by client."""
KINDS = ("single", "joint", "one-shot", "atm", "ph-atm")
IDLE = {
    "joint": (
        *("merge", "scaling", "task-scaling", "layer-scaling", "codec-up", "transforms", "proportion", "alignment"),
        *(
            "keep-optimizer",
            "client-momentum",
            "gradient-surgery",
            "proximal",
            "ewc",
            "accumulate",
            "participation",
            "replay",
            "replay-vectors",
            "fraction",
        ),
        *("privacy", "dp-client-clip", "secure-aggregation"),
    ),
    "single": (
        *("merge", "scaling", "task-scaling", "layer-scaling", "server-optimizer", "codec-down", "proportion"),
        *("replay-vectors", "keep-optimizer", "client-momentum", "gradient-surgery", "ewc", "dp-client-clip"),
    ),
}
"""Kind → settings that have no effect on a row of it, which may not name them; [settings] may, for the other rows."""
BY_RUNS = ("atm", "joint", "ph-atm")
"""Kinds whose units are run directories."""
Choice = dict[str, Any]
"""Values of a row's tuned settings."""


@dataclass(frozen=True)
class ContestRow:
    """A contestant; see the module."""

    name: str
    kind: str = "atm"
    settings: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, list[Any]] = field(default_factory=dict)
    tuning_rounds: int = 0
    report: tuple[int, ...] = ()
    select: tuple[int, ...] = ()
    greedy: bool = False
    """Of one-shot: a model is in the merge if it helps (Wortsman et al. 2022, arXiv:2203.05482, recipe 1)."""
    base: str = ""
    """Of ph-atm: the one-shot row whose merged model it starts from."""

    def choices(self) -> list[Choice]:
        """All combinations of the tuned settings' values; one empty one without any."""
        return [dict(zip(self.tune, values, strict=True)) for values in product(*self.tune.values())]

    def attempts(self, clients: int) -> int:
        """How many merges of so many clients' models a one-shot row evaluates; of a greedy soup several a choice."""
        return len(self.choices()) * (2 * clients - 1 if self.greedy else 1)


@dataclass(frozen=True)
class Slice:
    """A landscape to draw, of the first seed: see landscape.py. `row` is a run that keeps all its checkpoints."""

    row: str
    one_shot: str
    grid: int = 9


@dataclass(frozen=True)
class Contest:
    """A contest's configuration: see configs/contest.toml.

    Units of work are in `folder`, tables and pages in its folder `name`: contests in one folder share what has the same
    name and settings.
    """

    folder: Path
    name: str
    seeds: list[int]
    epochs: int
    settings: dict[str, Any]
    rows: list[ContestRow]
    landscape: Slice | None = None
    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, values: dict[str, Any]) -> Contest:
        """The contest of a file's values. TypeError or KeyError for a wrong key, SettingError for a wrong setting."""
        rows = [_row(name, dict(row)) for name, row in values["rows"].items()]
        bases = [row.name for row in rows if row.kind == "one-shot"]
        expanded: list[ContestRow] = []
        for row in rows:
            refined = [replace(row, name=f"{row.name} from {base}", base=base) for base in bases]
            expanded += refined if row.kind == "ph-atm" else [row]
        if "landscape" in values:
            cut = {key.replace("-", "_"): value for key, value in values["landscape"].items()}
            values = values | {"landscape": Slice(**cut)}
        pairs = _named_pairs(values.get("pairs", []))
        study = cls(**values | {"folder": Path(values["folder"]), "rows": expanded, "pairs": pairs})
        for key in ("rounds", "local-epochs"):
            if key in study.settings:
                raise SettingError(
                    f"settings: {key}={study.settings[key]!r} would give every kind of row another budget than "
                    f"epochs={study.epochs}; name it in the rows that are to have it"
                )
        kinds = [row.kind for row in expanded]
        if "single" not in kinds and {"one-shot", "ph-atm"} & set(kinds):
            raise SettingError("a contest with one-shot or ph-atm rows needs a row of kind single")
        for row in study.rows:
            if idle := [key for key in IDLE.get(row.kind, ()) if key in {**row.settings, **row.tune}]:
                raise SettingError(
                    f"row {row.name!r}: {idle[0]} has no effect on rows of kind {row.kind}; leave it out"
                )
            if row.greedy and row.kind != "one-shot":
                raise SettingError(f"row {row.name!r}: greedy has no effect on rows of kind {row.kind}; leave it out")
            for choice in row.choices():
                settings = ContestUnit(study, row, study.seeds[0], choice).parse()
                if row.kind in ("single", "one-shot") and settings.secure_aggregation:
                    raise SettingError(
                        f"row {row.name!r}: secure-aggregation=true leaves no single vector to merge; "
                        f"it goes with rows of kind atm"
                    )
                if row.kind in ("single", "one-shot", "ph-atm") and settings.private:
                    raise SettingError(
                        f"row {row.name!r}: private={settings.private!r} goes with rows of kind atm and joint: a model "
                        "tuned alone shares nothing, and one merged model stands without its parties' entries"
                    )
                over = [number for number in (*row.report, *row.select) if not 0 < number <= settings.rounds]
                if over:
                    raise SettingError(f"row {row.name!r}: it has {settings.rounds} rounds, so none is {over[0]}")
        comparable = [row.name for row in study.rows if not row.select]
        for name in (name for pair in pairs for name in pair):
            if name not in comparable:
                known = did_you_mean(name, comparable)
                raise SettingError(
                    f"pairs: {name!r} is no row, or one with `select`, whose end is not what it reports{known}"
                )
        for one, other in pairs:
            of_one, of_other = (
                ContestUnit(study, study.row(name=name), study.seeds[0]).parse().party_names for name in (one, other)
            )
            if not set(of_one) & set(of_other):
                raise SettingError(f"pairs: {one!r} and {other!r} have no task in common; name rows that do")
        if study.landscape:
            for key, name, kind in (
                ("row", study.landscape.row, "atm"),
                ("one-shot", study.landscape.one_shot, "one-shot"),
            ):
                if not any((row.name, row.kind) == (name, kind) for row in study.rows):
                    raise SettingError(f"landscape: {key}={name!r} is no row of kind {kind}")
            drawn = ContestUnit(study, study.row("atm", study.landscape.row), study.seeds[0]).settings()
            for key, value, wanted in (("keep-checkpoints", drawn.keep_checkpoints, 0), ("private", drawn.private, "")):
                if value != wanted:
                    raise SettingError(
                        f"landscape: row={study.landscape.row!r} must have {key} = {wanted!r}, not {value!r}"
                    )
        return study

    @property
    def reports(self) -> Path:
        """Where its tables and pages go."""
        return self.folder / self.name

    def row(self, kind: str = "", name: str = "") -> ContestRow:
        """The first row of a kind, where one is given, and called `name`, where that is given."""
        return next(row for row in self.rows if kind in ("", row.kind) and name in ("", row.name))


def _named_pairs(value: Any) -> tuple[tuple[str, str], ...]:
    """The value of `pairs`. SettingError if it is not a list of pairs of names."""
    pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2] if isinstance(value, list) else []
    if value != pairs or not all(isinstance(name, str) for pair in pairs for name in pair):
        raise SettingError(f'pairs={value!r}: it takes pairs of rows, as [["one", "other"]]')
    return tuple((one, other) for one, other in pairs)


def _row(name: str, values: dict[str, Any]) -> ContestRow:
    """A row of a study's file: keys that are not the row's own are settings."""
    own = ("kind", "tune", "tuning-rounds", "report", "select", "greedy")
    row_keys = {key: values.pop(key) for key in own if key in values}
    kind = row_keys.setdefault("kind", "atm")
    if kind not in KINDS:
        raise SettingError(f"row {name!r}: kind={kind!r} is unknown{did_you_mean(str(kind), KINDS)}")
    for key in ("report", "select"):
        row_keys[key] = tuple(row_keys.get(key, ()))
    return ContestRow(name, settings=values, **{key.replace("-", "_"): value for key, value in row_keys.items()})


@dataclass(frozen=True)
class ContestUnit:
    """A piece of work that one process does: a row with one seed and, where it is tuned by runs, one choice."""

    study: Contest
    row: ContestRow
    seed: int
    choice: Choice = field(default_factory=dict)
    rounds: int = 0
    """Of a run: how far, 0 for all."""

    @property
    def folder(self) -> Path:
        """Where its results are; of runs, their run directory."""
        choices = [f"{key}={value}" for key, value in self.choice.items()] if self.row.kind != "one-shot" else []
        return self.study.folder / f"seed-{self.seed}" / "/".join(_slug(name) for name in [self.row.name, *choices])

    def parse(self) -> Settings:
        """Its settings to the end."""
        study, row = self.study, self.row
        budget = {"single": (1, study.epochs), "one-shot": (1, study.epochs)}.get(row.kind, (study.epochs, 1))
        values = {"rounds": budget[0], "local-epochs": budget[1], **study.settings}
        if row.kind == "ph-atm":
            values |= {"split": "validation", "start": str(ContestUnit(study, self._base, self.seed).folder)}
        return Settings.parse({**values, **row.settings, **self.choice, "seed": self.seed, "run-dir": str(self.folder)})

    @property
    def _base(self) -> ContestRow:
        return self.study.row("one-shot", self.row.base)

    def settings(self) -> Settings:
        """Its settings, as far as this unit goes; the rounds to report are evaluated on the test splits."""
        full = self.parse()
        stops = [*self.row.report, *self.row.select]
        return replace(full, rounds=self.rounds or full.rounds, test_every=math.gcd(*stops) or full.test_every)

    def __str__(self) -> str:
        choices = [f"{key} {value}" for key, value in self.choice.items()] + (
            [f"{self.rounds} rounds"] * bool(self.rounds)
        )
        return ", ".join([f"seed {self.seed}", self.row.name, *choices])


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-")


def phases(study: Contest) -> Iterator[list[ContestUnit]]:
    """Units that may run side by side; a later phase needs the results of the one before it."""
    first, *others = study.seeds
    runs = [row for row in study.rows if row.kind in ("atm", "joint")]
    tuned, plain = [row for row in runs if row.tune], [row for row in runs if not row.tune]
    yield [
        *(ContestUnit(study, row, seed) for row in plain for seed in study.seeds),
        *(ContestUnit(study, row, seed) for row in study.rows if row.kind == "single" for seed in study.seeds),
        *(ContestUnit(study, row, first, choice, row.tuning_rounds) for row in tuned for choice in row.choices()),
    ]
    yield [
        *(ContestUnit(study, row, seed, best_choice(study, row)) for row in tuned for seed in (first, *others)),
        *(ContestUnit(study, row, seed) for row in study.rows if row.kind == "one-shot" for seed in study.seeds),
    ]
    yield [ContestUnit(study, row, seed) for row in study.rows if row.kind == "ph-atm" for seed in study.seeds]
    if study.landscape:
        yield [ContestUnit(study, ContestRow("landscape", "landscape"), first)]


def run_unit(unit: ContestUnit) -> str:
    """Do one unit, or what is left of it. A run that ends with a RunError is kept as one that came to nothing."""
    if finished(unit):
        return f"{unit}: finished before"
    begin = time.monotonic()
    try:
        {"single": _single, "one-shot": _one_shot, "joint": _joint, "landscape": _landscape}.get(unit.row.kind, _run)(
            unit
        )
    except RunError as error:
        (unit.folder / "failed.txt").write_text(f"{error}\n")
        return f"{unit}: {error}"
    return f"{unit}: {time.monotonic() - begin:.0f} s"


def finished(unit: ContestUnit) -> bool:
    """Whether nothing is left to do."""
    if failed(unit):
        return True
    if unit.row.kind in ("single", "one-shot", "landscape"):
        return (unit.folder / "results.json").exists()
    settings = unit.settings()
    tested = [
        number for number, line in _curve(unit.folder).items() if len(line.get("test", ())) == len(settings.task_names)
    ]
    return max(tested, default=0) >= settings.rounds


def failed(unit: ContestUnit) -> bool:
    """Whether the run came to nothing."""
    return (unit.folder / "failed.txt").exists()


def _run(unit: ContestUnit) -> None:
    settings = unit.settings()
    parties = parties_of(settings)
    run = run_loop(replace(settings, resume=bool(checkpoints(unit.folder))), parties)
    _save_rightly(unit, _tested(parties))
    ClientState.forget(run.id)


def _joint(unit: ContestUnit) -> None:
    _save_rightly(unit, _tested(run_joint(unit.settings())))


def _tested(parties: Iterable[Party]) -> dict[str, np.ndarray]:
    """By client: which test images its last evaluation classified rightly, bool [n]."""
    return {party.client: party.rightly["test"].numpy() for party in parties}


def _save_rightly(unit: ContestUnit, rightly: dict[str, np.ndarray]) -> None:
    """Keep which test images the end of a unit classifies rightly, by client bool [n], for `pairs`."""
    with atomic_write(unit.folder / RIGHTLY) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **rightly)


def _rightly(study: Contest, row: ContestRow, seed: int) -> dict[str, np.ndarray] | None:
    """What `_save_rightly` kept of a row, by client bool [n]; None if there is nothing, as of a row without an end."""
    unit = ContestUnit(study, row, seed, best_choice(study, row))
    if not finished(unit) or failed(unit):
        return None
    if not (unit.folder / RIGHTLY).exists():
        logging.getLogger(__name__).warning(
            "pairs: %s is of an older atm-fl and has no %s; delete %s to do it again", unit, RIGHTLY, unit.folder
        )
        return None
    with np.load(unit.folder / RIGHTLY) as file:
        return dict(file)


def _test_groups(settings: Settings, of_task: Callable[[str, bool], np.ndarray | None]) -> dict[str, np.ndarray]:
    """By client: which test images show one thing, for the tasks that have such. of_task: of one task."""
    named = zip(settings.party_names, settings.task_names, strict=True)
    return {client: groups for client, task in named if (groups := of_task(task, settings.larger_test)) is not None}


def _pairs(study: Contest) -> list[dict[str, Any]]:
    """The tested differences of `pairs`, over the seeds and the tasks that both rows have."""
    outcomes, groups_of_task = [], cache(tasks.test_groups)
    for names in study.pairs:
        rows = [
            {seed: there for seed in study.seeds if (there := _rightly(study, study.row(name=name), seed))}
            for name in names
        ]
        seeds = sorted(rows[0].keys() & rows[1].keys())
        if not seeds:
            continue
        single = {}
        if any(row.kind == "single" for row in study.rows):
            alone = study.row("single")
            single = {seed: there for seed in seeds if (there := _rightly(study, alone, seed))}
        shared = [client for client in rows[0][seeds[0]] if client in rows[1][seeds[0]]]
        one, other = ([{client: row[seed][client] for client in shared} for seed in seeds] for row in rows)
        alone_too = []
        if len(single) == len(seeds):
            alone_too = [{client: model[client] for client in shared} for model in single.values()]
        row = study.row(name=names[0])
        settings = ContestUnit(study, row, seeds[0], best_choice(study, row)).settings()
        groups = _test_groups(settings, groups_of_task)
        tested = differences(one, other, alone_too, groups=groups, same=settings.task_of)
        outcomes.append({"rows": list(names), "seeds": seeds, "differences": {k: asdict(v) for k, v in tested.items()}})
    return outcomes


def _landscape(unit: ContestUnit) -> None:
    """Evaluate the plane through the pretrained, the one-shot and the ATM model that the study names."""
    study = unit.study
    assert study.landscape
    run = ContestUnit(study, study.row("atm", study.landscape.row), unit.seed)
    settings = run.settings()
    parties = [Party(settings, name) for name in settings.task_names]
    base, layout = parties[0].model.pretrained, parties[0].model.layout

    def load(folder: Path, rounds: int = 0) -> Tensor:
        return load_checkpoint(folder, layout, print, rounds)[1]

    merged = load(ContestUnit(study, study.row("one-shot", study.landscape.one_shot), unit.seed).folder)
    path = [load(run.folder, number) for number in range(1, settings.rounds + 1)]
    alone = {f"{task} alone": base + vector for task, vector in single_vectors(study, unit.seed).items()}
    plane = landscape(parties, base, merged, path, alone, study.landscape.grid)
    caption = f"Mean validation accuracy on the plane through the pretrained model, {study.landscape.one_shot} and the "
    caption += f"end of {study.landscape.row}, seed {unit.seed}; single-task models where they project to."
    with atomic_write(unit.folder / "results.json") as temporary:
        temporary.write_text(json.dumps({"caption": caption, **plane}))


# ------------------------------------------------------------------------------------------- single tasks and one-shot


def _claim(unit: ContestUnit, settings: Settings) -> None:
    """SettingError if the unit's folder holds results of another configuration."""
    decides = {"settings": settings.decisive(), "tune": unit.row.tune}
    claim(unit.folder / "config.json", decides, "choose another folder or delete it")


def _single(unit: ContestUnit) -> None:
    """Tune every task alone. Vectors stay on disk, so that a break loses one task."""
    settings = unit.settings()
    _claim(unit, settings)
    parties = _without_buffers(settings)
    base = parties[0].model.pretrained
    by_client: dict[str, dict[str, Any]] = {}
    for party in parties:
        path, numbers = unit.folder / f"{party.client}.safetensors", unit.folder / f"{party.client}.json"
        if not numbers.exists():
            update = party.train(base, 1)
            assert update.arrays is not None
            context = Context(settings, party.model.layout, 1, party.task, party.client)
            vector = party.chain.decode(update.arrays, context)
            with atomic_write(path) as temporary:
                save_file({"vector": vector}, str(temporary))
            after = party.evaluate(base + vector, ("validation", "test"))
            with atomic_write(unit.folder / f"{party.client}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, party.rightly["test"].numpy())
            with atomic_write(numbers) as temporary:
                sent = {"bytes_up": size_of(update.arrays)}
                temporary.write_text(json.dumps({"before": update.evaluation, "after": after, **update.tuning, **sent}))
        by_client[party.client] = json.loads(numbers.read_text())
    alone = {party.client: unit.folder / f"{party.client}.npy" for party in parties}
    if all(path.exists() for path in alone.values()):  # not of an older atm-fl
        _save_rightly(unit, {client: np.load(path) for client, path in alone.items()})
    with atomic_write(unit.folder / "results.json") as temporary:
        temporary.write_text(json.dumps(by_client, indent=1))


def _without_buffers(settings: Settings) -> list[Party]:
    """The parties of a model whose vectors are all that is merged; SettingError if it has buffers beside."""
    parties = parties_of(settings)
    if settings.buffers != "frozen" and parties[0].model.buffers.names:
        raise SettingError(
            f"buffers={settings.buffers!r}: one-shot merges are of the vectors alone; with model={settings.model!r} "
            "choose buffers='frozen'"
        )
    return parties


def single_vectors(study: Contest, seed: int) -> dict[str, Tensor]:
    """The single-task vectors of a seed, float32 [n], by client, in the order of the tasks."""
    folder = ContestUnit(study, study.row("single"), seed).folder
    names = Settings.parse(study.settings).party_names
    # Tensors out of a file are not aligned as torch's own are.
    return {client: load_file(str(folder / f"{client}.safetensors"))["vector"].clone() for client in names}


def _one_shot(unit: ContestUnit) -> None:
    """Merge the single-task vectors with every choice, keep the best on validation, and read its test accuracies."""
    study = unit.study
    settings = unit.settings()
    _claim(unit, settings)
    parties, vectors = _without_buffers(settings), single_vectors(study, unit.seed)
    base, layout = parties[0].model.pretrained, parties[0].model.layout
    single = json.loads((ContestUnit(study, study.row("single"), unit.seed).folder / "results.json").read_text())
    images = {client: trained["images"] for client, trained in single.items()}
    begin = time.perf_counter()
    tried: list[dict[str, Any]] = []

    def merged(choice: Choice, clients: list[str]) -> Tensor:
        chosen = replace(unit, choice=choice).settings()
        return _after_one_round(chosen, base, layout, {client: vectors[client] for client in clients}, images)

    def attempt(choice: Choice, clients: list[str]) -> dict[str, Any]:
        model = merged(choice, clients)
        accuracies = {party.client: party.evaluate(model, ("validation",))["validation"] for party in parties}
        tried.append({"choice": choice, "clients": clients, "validation": accuracies})
        return tried[-1]

    def greedy(choice: Choice) -> dict[str, Any]:
        soup, *others = sorted((attempt(choice, [client]) for client in vectors), key=_validation, reverse=True)
        for other in others:
            soup = max(attempt(choice, [*soup["clients"], *other["clients"]]), soup, key=_validation)
        return soup

    merges = (greedy(choice) if unit.row.greedy else attempt(choice, list(vectors)) for choice in unit.row.choices())
    best = max(merges, key=_validation)
    seconds = (time.perf_counter() - begin) / len(tried)
    model = merged(best["choice"], best["clients"])
    save_checkpoint(unit.folder, 1, model, layout)
    outcome = best | {"test": {party.client: party.evaluate(model, ("test",))["test"] for party in parties}}
    _save_rightly(unit, _tested(parties))
    with atomic_write(unit.folder / "results.json") as temporary:
        temporary.write_text(json.dumps(outcome | {"tried": tried, "seconds": seconds}, indent=1))


def _validation(outcome: dict[str, Any]) -> float:
    return mean_accuracy(outcome["validation"])


def _after_one_round(
    settings: Settings, base: Tensor, layout: Layout, vectors: dict[str, Tensor], images: dict[str, float]
) -> Tensor:
    """The model [n] that a run's server would make of the clients' decoded vectors in a first round."""
    chain = Chain(settings)
    bounded = {
        client: chain.bound(vector.clone(), Context(settings, layout, 1, settings.task_of[client], client))
        for client, vector in vectors.items()
    }
    merged = merge_tasks(by_task(bounded, images, settings), chain, Context(settings, layout, 1))
    step = settings.make_server_optimizer().step(scale_layers(merged, layout, settings.layer_scalings), 1)
    model = base.clone()
    Downlink(settings, layout).move(model, step, 1)
    return model


# ------------------------------------------------------------------------------------------------------- what came out


def best_choice(study: Contest, row: ContestRow) -> Choice:
    """Of a row that is tuned by runs: the choice of the best mean validation accuracy on the first seed; else none."""
    if not row.tune or row.kind not in BY_RUNS:
        return {}

    def score(choice: Choice) -> float:
        unit = ContestUnit(study, row, study.seeds[0], choice, row.tuning_rounds)
        line = _curve(unit.folder).get(unit.settings().rounds, {})
        return -1.0 if failed(unit) or "validation" not in line else mean_accuracy(line["validation"])

    return max(row.choices(), key=score)


def _curve(folder: Path, elements: int = 0) -> dict[int, dict[str, Any]]:
    """By round, of a run directory: accuracies by split and task, and steps, images, seconds and bytes so far.

    Bytes are those of the parties that tune; `down` is what one of them was sent in the round. elements: of a float32
    vector, whose bytes are counted where an older run did not record them.
    """
    by_round: dict[int, dict[str, Any]] = {}
    nothing = {"steps": 0, "images": 0, "seconds": 0.0, "bytes": 0}
    for line in read_metrics(folder) if (folder / "metrics.jsonl").exists() else ():
        point = by_round.setdefault(line["round"], nothing | {"down": 0})
        if line["kind"] == "evaluation":
            for split in line.keys() & {"validation", "test"}:
                point.setdefault(split, {})[line["task"]] = line[split]
        elif line["kind"] == "tuning":
            point["steps"] += line["steps"]
            point["images"] += line["images"]
            point["seconds"] += line.get("seconds_tune", 0.0) + line.get("seconds_evaluate", 0.0)
            if line["task"] != "joint":
                point["down"] = line.get("bytes_down", 4 * elements)
                point["bytes"] += line.get("bytes_up", 4 * elements) + point["down"]
            if "alignment" in line:
                point.setdefault("alignment", {})[line["task"]] = line["alignment"]
        elif line["kind"] == "merge":
            point["seconds"] += line["seconds_merge"]
    total = nothing
    for _, point in sorted(by_round.items()):
        total = {key: total[key] + point[key] for key in total}
        point |= total
    return by_round


@cache
def _operations(model: str, weights: str) -> int:
    """FLOPs of tuning on one image."""
    backbone = load_backbone(model, weights)
    return operations(backbone, *backbone.example())[1]


def results(study: Contest) -> dict[str, Any]:
    """What is finished, as contest_page takes it."""
    settings = Settings.parse(study.settings)
    elements = Layout.of(load_backbone(settings.model, settings.weights)).size
    rows: list[dict[str, Any]] = []
    alignment: dict[str, dict[str, dict[str, float]]] = {}
    for row in study.rows:
        for name, stop in [(row.name, 0)] if not row.report else [(f"{row.name}, {n} rounds", n) for n in row.report]:
            of_row = _row_results(study, row, stop, elements)
            rows.append({"name": name, "kind": row.kind, "model": _kind_of_model(study, row), **of_row})
        if row.kind == "single" and row == study.row("single"):
            rows.insert(0, _pretrained(study, row))
        if row.kind == "atm":
            curve = _curve(ContestUnit(study, row, study.seeds[0], best_choice(study, row)).folder)
            by_task: dict[str, dict[str, float]] = {}
            for number, line in sorted(curve.items()):
                for task, value in line.get("alignment", {}).items():
                    by_task.setdefault(task, {})[str(number)] = value
            alignment |= {row.name: by_task} if by_task else {}
    cut = ContestUnit(study, ContestRow("landscape", "landscape"), study.seeds[0]).folder / "results.json"
    return {
        "name": study.name,
        "command": "atm-fl compare",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{torch.multiprocessing.cpu_count()} cores of {processor()}",
        "tasks": list(settings.party_names),
        "seeds": study.seeds,
        "elements": elements,
        "rows": rows,
        "alignment": alignment,
        "pairs": _pairs(study),
        "landscape": json.loads(cut.read_text()) if study.landscape and cut.exists() else None,
    }


def _kind_of_model(study: Contest, row: ContestRow) -> str:
    """What a row's model is, if it is neither one for all tasks nor a whole one for each."""
    settings = ContestUnit(study, row, study.seeds[0]).parse()
    if row.kind == "single" and settings.trainable != Settings.parse(study.settings).trainable:
        return "the pretrained trunk, own entries a task"
    return "one trunk, own entries a task" if settings.private else ""


def _row_results(study: Contest, row: ContestRow, stop: int, elements: int) -> dict[str, Any]:
    """A row's numbers: of the round `stop`, 0 for the last or the selected one."""
    tuned: dict[str, Choice] = {}
    seeds: dict[str, dict[str, Any]] = {}
    by_runs, choice = row.kind in BY_RUNS, best_choice(study, row)
    for seed in study.seeds:
        unit = ContestUnit(study, row, seed, choice)
        if not finished(unit) or failed(unit):
            continue
        if by_runs:
            number, seeds[str(seed)] = _run_results(unit, stop, elements)
            tuned[str(seed)] = choice | ({"rounds": number} if row.select else {})
        else:
            made = json.loads((unit.folder / "results.json").read_text())
            alone = unit if row.kind == "single" else ContestUnit(study, study.row("single"), seed)
            single = json.loads((alone.folder / "results.json").read_text())
            tuned[str(seed)] = made["choice"] if row.kind == "one-shot" else {}
            if row.greedy:
                tuned[str(seed)] |= {"soup of": ", ".join(made["clients"])}
            seeds[str(seed)] = _flat_results(unit, made, single, elements)
    settings = ContestUnit(study, row, study.seeds[0], choice).parse()
    others, count = len(row.choices()) - 1, len(row.choices())
    rounds = row.tuning_rounds or settings.rounds
    searched = others * rounds * settings.local_epochs if by_runs else 0.0
    evaluations = row.attempts(len(settings.party_names)) if row.kind == "one-shot" else 0
    return {
        "tuned": tuned,
        "tuning": {
            "values": count if others else 0,
            "epochs": searched,
            "evaluations": evaluations if evaluations > 1 else 0,
        },
        "seeds": seeds,
    }


def _flat_results(unit: ContestUnit, made: dict[str, Any], single: dict[str, Any], elements: int) -> dict[str, Any]:
    """A seed's numbers of single-task tuning or of a one-shot merge, which costs that tuning and one exchange."""
    merged = unit.row.kind == "one-shot"
    settings = unit.settings()
    images = sum(trained["images"] for trained in single.values())
    return {
        "test": made["test"] if merged else {task: trained["after"]["test"] for task, trained in made.items()},
        "validation": mean_accuracy(
            made["validation"] if merged else {task: trained["after"]["validation"] for task, trained in made.items()}
        ),
        "steps": sum(trained["steps"] for trained in single.values()),
        "images": images,
        "flops": images * _operations(settings.model, settings.weights),
        "seconds": sum(trained["seconds_tune"] for trained in single.values()) + (made["seconds"] if merged else 0.0),
        # The base to every party, a vector back (float32 where it was not recorded), the merged model to every party.
        "bytes": sum(8 * elements + trained.get("bytes_up", 4 * elements) for trained in single.values())
        if merged
        else 0,
        "curve": [],
    }


def _pretrained(study: Contest, row: ContestRow) -> dict[str, Any]:
    """The row of the model before any tuning, out of the single-task row's results."""
    seeds = {}
    for seed in study.seeds:
        unit = ContestUnit(study, row, seed)
        if finished(unit):
            made = json.loads((unit.folder / "results.json").read_text())
            seeds[str(seed)] = {
                "test": {task: trained["before"]["test"] for task, trained in made.items()},
                "validation": mean(trained["before"]["validation"] for trained in made.values()),
                **{"steps": 0, "images": 0, "flops": 0, "seconds": 0.0, "bytes": 0, "curve": []},
            }
    none = {"values": 0, "epochs": 0.0, "evaluations": 0}
    return {"name": "pretrained", "kind": "pretrained", "tuned": {}, "tuning": none, "seeds": seeds}


def _run_results(unit: ContestUnit, stop: int, elements: int) -> tuple[int, dict[str, Any]]:
    """(The round, a seed's numbers at that round) of a run.

    Bytes: of the bases and vectors of all rounds so far, and of one base more to every party, which are to have it.
    """
    settings, curve = unit.settings(), _curve(unit.folder, elements)
    per_image = _operations(settings.model, settings.weights)
    number = stop or settings.rounds
    if unit.row.select:
        number = max(unit.row.select, key=lambda n: mean_accuracy(curve[n]["validation"]))

    def wire(rounds: int) -> int:
        return curve[rounds]["bytes"] + len(settings.task_names) * curve[rounds]["down"]

    points = [
        {
            "round": n,
            "steps": line["steps"],
            "flops": line["images"] * per_image,
            "bytes": wire(n),
            "validation": mean_accuracy(line["validation"]),
            "test": mean_accuracy(line["test"]) if "test" in line else None,
        }
        for n, line in sorted(curve.items())
        if "validation" in line
    ]
    at = curve[number]
    return number, {
        "test": at["test"],
        "validation": mean_accuracy(at["validation"]),
        "steps": at["steps"],
        "images": at["images"],
        "flops": at["images"] * per_image,
        "seconds": at["seconds"],
        "bytes": wire(number),
        "curve": points,
    }


def table(study: Contest) -> str:
    """Write results.json, table.md, results.csv and report.html into the contest's own folder; the tables' Markdown."""
    outcomes = results(study)
    with atomic_write(study.reports / "results.json") as temporary:
        temporary.write_text(json.dumps(outcomes, indent=1))
    contest_page.write(outcomes, study.reports)
    return contest_page.tables(outcomes)


def page(study: Contest) -> Path:
    """The page that `table` has written."""
    return study.reports / "report.html"


read = Contest.of
"""A study of the values in a TOML file: see `read_study`."""
