"""No setting is accepted without effect: each value but the default changes what a run does, or is refused by name.

`EFFECTS` says of every declared setting which values are tried, beside which others, and where their effect is seen. A
setting that is declared and not in it fails here. The walk itself, some 150 runs, is slow.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import make_clip, make_folder
from federation import call, tampered
from flwr.app import Array, ArrayRecord, Error, Message
from flwr.clientapp import ClientApp

from atm_fl.clients.app import app as client_app
from atm_fl.codecs import CODECS, make_codec
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.client import Party, Update
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.loop import run_loop
from atm_fl.merging import MERGES, find_merge, make_merge
from atm_fl.merging.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizer
from atm_fl.options import check_option, type_name
from atm_fl.plugins import Registry
from atm_fl.privacy.noise import Noise
from atm_fl.runs.metrics import read_metrics
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings, kebab
from atm_fl.settings.rules import NEEDS
from atm_fl.transforms import TRANSFORMS, Context, Transform, transform
from atm_fl.vectors import Layout, digest

Config = dict[str, Any]


@dataclass(frozen=True)
class Effect:
    """Where a setting's effect is seen.

    seen: "bits" of the final base, "lines" of metrics.jsonl, "files" of the run's directory, "error" of its end, or a
    function of a config that returns what is compared. values: those that are tried, by default all others that the
    declaration names. beside: settings of both runs; they may hold another value of the setting itself than its
    default. before: what else a run has that went before in the same directory. idle: why it may be seen nowhere
    without `beside`.
    """

    seen: str | Callable[[Config], Any]
    values: tuple[Any, ...] = ()
    beside: Config = field(default_factory=dict)
    before: Config | None = None
    idle: str = ""


# ------------------------------------------------------------------------------------------------ what is seen of a run


def seen(config: Config, app: ClientApp = client_app, grid: type[InProcessGrid] = InProcessGrid) -> Config:
    """All that is to be seen of a run, but for times: its error, or its base, its metrics and its files."""
    try:
        settings = Settings.parse(config)
        run = serve(grid(app, len(settings.task_names), settings.as_config()), settings)
    except (SettingError, RunError) as error:
        return {"error": str(error).replace(config["run-dir"], "run-dir")}
    lines = [
        {key: value for key, value in line.items() if key != "time" and not key.startswith("seconds")}
        for line in read_metrics(run.directory)
    ]
    paths = [str(path.relative_to(run.directory)) for path in run.directory.rglob("*")]
    return {"bits": digest(run.base), "lines": lines, "files": sorted({path.partition("events")[0] for path in paths})}


def _fails(message: Message, reply: Message) -> Message:
    return Message(Error(0, "red is out of order"), reply_to=message)


def _long(message: Message, reply: Message) -> Message:
    arrays = reply.content.array_records["arrays"]
    longer = {name: Array(array.numpy() * 1e4) for name, array in arrays.items()}
    reply.content["arrays"] = ArrayRecord(longer)
    return reply


def with_a_failure(config: Config) -> Any:
    """How a run ends in which one client fails."""
    return seen(config, tampered(_fails, "red"))


def with_a_long_vector(config: Config) -> Any:
    """How a run ends in which one client's vector is 10,000 times as long as it was."""
    return seen(config, tampered(_long, "red"))


def with_a_slow_client(config: Config) -> Any:
    """How a run ends in which one client's replies come half a second late."""

    class Slow(InProcessGrid):
        asked: ClassVar[dict[str, float]] = {}

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            (message_id,) = message_ids
            message = self._waiting.get(message_id)
            training = message is not None and message.metadata.message_type == "train"
            late = training and message is not None and message.metadata.dst_node_id == 1
            if late and time.monotonic() - self.asked.setdefault(message_id, time.monotonic()) < 0.5:
                return []
            return super().pull_messages([message_id])

    return seen(config, grid=Slow)


def with_one_party_away(config: Config) -> Any:
    """How a run ends to which one party does not come."""

    class Away(InProcessGrid):
        def get_node_ids(self) -> Iterable[int]:
            return list(self.contexts)[1:]

    return seen(config, grid=Away)


def counted(target: str) -> Callable[[Config], int]:
    """A probe: how many calls a run makes of what is called `target`."""

    def probe(config: Config) -> int:
        calls: list[object] = []
        with pytest.MonkeyPatch.context() as patched:
            module, _, name = target.rpartition(".")
            before = getattr(import_module(module), name)

            def noted(*args: Any, **more: Any) -> Any:
                calls.append(1)
                return before(*args, **more)

            patched.setattr(target, noted)
            assert "error" not in seen(config)
        return len(calls)

    return probe


def compiled(config: Config) -> int:
    """How many modules a run compiles; nothing is."""
    calls: list[object] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.Module, "compile", lambda module, *args, **more: calls.append(module))
        assert "error" not in seen(config)
    return len(calls)


def threads(config: Config) -> int:
    """On how many threads torch computes."""
    assert "error" not in seen(config)
    return torch.get_num_threads()


def decoders(config: Config) -> set[int]:
    """How many threads decode the folders."""
    sizes: set[int] = set()

    class Noted(ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            sizes.add(count)
            super().__init__(count)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("atm_fl.tasks.pictures.ThreadPoolExecutor", Noted)
        assert "error" not in seen(config)
    return sizes


def reordered(config: Config) -> int:
    """How often images are brought to channels-last order."""
    calls: list[object] = []
    before = torch.Tensor.contiguous

    def noted(tensor: torch.Tensor, **more: Any) -> torch.Tensor:
        calls.extend([1] * (more.get("memory_format") is torch.channels_last))
        return before(tensor, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "contiguous", noted)
        assert "error" not in seen(config)
    return len(calls)


def place(config: Config) -> bool:
    """Whether the run is where `elsewhere` says."""
    assert "error" not in seen(config)
    return Path(config["run-dir"]).name == "elsewhere" and (Path(config["run-dir"]) / "config.json").exists()


def finished(config: Config) -> list[str]:
    """The private entries that each party ends with; accuracies of so few images hardly tell them apart."""
    settings = Settings.parse(config)
    run = serve(InProcessGrid(client_app, len(settings.task_names), settings.as_config()), settings)
    states = [ClientState(run.id, client) for client in settings.party_names]
    kept = [state.at("finished", run.rounds_done + 1) or state.last("private", run.rounds_done + 1) for state in states]
    return [digest(tensor) for entries in kept for _, tensor in sorted((entries or {}).items())]


# ------------------------------------------------------------------------------------------------------------ the table

DP: Config = {"privacy": "dp-sgd", "dp-noise": 1.0}
SECURE: Config = {"secure-aggregation": True}
OWN: Config = {"private": "last-1"}
BOUND = "a bound that nothing reaches"
MACHINE = "the same bits, by other means"
FAULT = "nothing fails"

SHARPER = {"trimmed-mean": "trimmed-mean:trim=0.4", "clipped-mean": "clipped-mean:max-norm=0.001"}
"""Merges that are the mean where nothing is cut: of three tasks a fifth is none."""

EFFECTS: dict[str, Effect] = {
    "tasks": Effect("bits", ("{red},{blue}", "{blue},{green},{red}")),
    "model": Effect("bits", ("vit_micro",)),
    "weights": Effect("error", ("random",), {"model": "{clip}"}),
    "trainable": Effect("bits", ("attention", "last-1", "lora", "*norm*,attention")),
    "private": Effect("bits", ("last-1", "*norm*")),
    "lora_rank": Effect("bits", (2,), {"trainable": "lora"}),
    "lora_alpha": Effect("bits", (4.0,), {"trainable": "lora"}),
    "buffers": Effect("bits", beside={"model": "tiny_resnet"}),
    "head": Effect("bits"),
    "shots": Effect("bits", (1, 2)),
    "start": Effect("bits", ("{started}",)),
    "rounds": Effect("bits", (2,)),
    "patience": Effect("bits", (1,), {"rounds": 6}, idle="of one round none is too many"),
    "local_epochs": Effect("bits", (2.0, 0.5)),
    "task_epochs": Effect("bits", ("red=2",)),
    "split": Effect("bits"),
    "holdout": Effect("bits", (0.0, 0.5), {"split": "validation"}),
    "participation": Effect("bits", ("red=2-",), {"rounds": 2}),
    "replay": Effect("bits", (0.5,), {"rounds": 2, "participation": "red=1-1"}),
    "replay_vectors": Effect("bits", tuple(CODECS), {"rounds": 2, "participation": "red=1-1"}),
    "fraction": Effect("bits", (0.5, 0.9)),
    "merge": Effect("bits", tuple(SHARPER.get(name, name) for name in MERGES if name not in ("mean", "pcgrad"))),
    "scaling": Effect("bits", (0.5, -1.0)),
    "task_scaling": Effect("bits", ("red=0.5",)),
    "layer_scaling": Effect("bits", ("*norm*=0.5",)),
    "server_optimizer": Effect(
        "bits",
        tuple(name for name in SERVER_OPTIMIZERS if name != "none"),
        {"rounds": 2},
        idle="momentum begins in round 2",
    ),
    "codec_up": Effect("bits", tuple(name for name in CODECS if name != "fp32")),
    "codec_down": Effect("bits", tuple(name for name in CODECS if name != "fp32")),
    "transforms": Effect("bits", ("halved",)),
    "optimizer": Effect("bits"),
    "keep_optimizer": Effect("bits", (True,), {"rounds": 2}, idle="of one round nothing is kept"),
    "client_momentum": Effect("bits", (0.5,), {"rounds": 2}, idle="of one round there is no step before"),
    "gradient_surgery": Effect("bits", (True,), {"rounds": 2}, idle="of one round there is no step before"),
    "learning_rate": Effect("bits", (1e-2,)),
    "final_learning_rate": Effect("bits", (1e-5, 1e-2)),
    "private_epochs": Effect(finished, (1.0, 0.5), OWN),
    "private_learning_rate": Effect(finished, (1e-2,), OWN | {"private-epochs": 1.0}),
    "weight_decay": Effect("bits", (0.0,)),
    "momentum": Effect("bits", (0.9,), {"optimizer": "sgd"}),
    "batch_size": Effect("bits", (3,)),
    "accumulate": Effect("bits", (2,)),
    "proximal": Effect("bits", (0.1,)),
    "ewc": Effect("bits", (10.0,), {"rounds": 2}, idle="of one round there is none before"),
    "clip_norm": Effect("bits", (1e-3,)),
    "precision": Effect("bits"),
    "gradient_checkpointing": Effect(counted("torch.utils.checkpoint.checkpoint"), (True,), idle=MACHINE),
    "channels_last": Effect(reordered, (True,), idle=MACHINE),
    "compile": Effect(compiled, (True,), idle=MACHINE),
    "workers": Effect(decoders, (2,), idle=MACHINE),
    "privacy": Effect("bits"),
    "dp_epsilon": Effect("bits", (4.0,), {"privacy": "dp-sgd", "dp-epsilon": 8.0}),
    "dp_noise": Effect("bits", (2.0,), DP),
    "dp_delta": Effect("lines", (1e-3,), DP),
    "dp_clip": Effect("bits", (1e-3,), DP),
    "dp_rank": Effect("bits", (2,), DP),
    "dp_policy": Effect(
        "error",
        ("warn",),
        {"privacy": "dp-sgd", "dp-epsilon": 2.0, "rounds": 3, "resume": True},
        before={"rounds": 1, "resume": False},
    ),
    "dp_client_clip": Effect("bits", (1e-3,)),
    "dp_client_noise": Effect("bits", (1.0,), {"dp-client-clip": 1e-3}),
    "secure_aggregation": Effect("lines", (True,)),
    "secure_threshold": Effect(with_a_failure, (3,), SECURE | {"on-failure": "skip"}),
    "secure_neighbours": Effect(with_a_failure, (2,), SECURE | {"on-failure": "skip"}),
    "secure_range": Effect("bits", (2.0, 1e-7), SECURE),
    "max_update_norm": Effect("error", (1e-6,)),
    "proportion": Effect(with_a_long_vector, (0.0, 1e6), idle=BOUND),
    "min_successful": Effect(with_a_failure, (3,), {"on-failure": "skip"}),
    "on_failure": Effect(with_a_failure, idle=FAULT),
    "node_timeout": Effect(with_one_party_away, (0.1,), {"node-timeout": 0.2}, idle=FAULT),
    "round_timeout": Effect(with_a_slow_client, (0.2,), idle=FAULT),
    "seed": Effect("bits", (1,)),
    "threads": Effect(threads, (2,), idle=MACHINE),
    "device": Effect("error", ("cuda:99",)),
    "alignment": Effect("lines", (True,)),
    "larger_test": Effect("lines", (True,), {"tasks": "solar,{blue}"}),
    "validate_every": Effect("lines", (2,), {"rounds": 2}, idle="of one round both ends are evaluated"),
    "test_every": Effect("lines", (1,), {"rounds": 2}, idle="of one round both ends are evaluated"),
    "run_dir": Effect(place, ("{elsewhere}",), idle="the same run, elsewhere"),
    "keep_checkpoints": Effect("files", (0,), {"rounds": 4}, idle="there is one"),
    "metric_sinks": Effect("files", ("",)),
    "resume": Effect("error", (True,), {"rounds": 2}, before={"rounds": 1, "resume": False}),
    "resume_from": Effect("files", (1,), {"rounds": 2, "resume": True}, before={"resume": False, "resume-from": 0}),
}


# ------------------------------------------------------------------------------------------------------------- the walk


@transform("halved")
class Halved(Transform):
    """A transform of one line."""

    def client(self, vector: torch.Tensor, context: Context) -> torch.Tensor:
        return vector / 2


del TRANSFORMS["halved"]  # other tests see this package's own alone


class World:
    """Three tiny tasks, and what is seen of runs of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.references: dict[str, Any] = {}
        self.names = {name: str(make_folder(folder / name, 3, 2, 6)) for name in ("red", "green", "blue")}
        self.names |= {
            "clip": make_clip(folder),
            "started": str(folder / "started"),
            "elsewhere": str(folder / "elsewhere"),
        }
        self.base: Config = {"tasks": "{red},{green},{blue}", "model": "tiny", "rounds": 1, "batch-size": 4}
        self.base |= {"learning-rate": 1e-3}
        seen(self.written({"run-dir": "{started}"}))

    def written(self, chosen: Config) -> Config:
        """A config of its own directory, with folders for the names in braces."""
        self.count += 1
        config = self.base | {"run-dir": str(self.folder / f"run-{self.count}")} | chosen
        return {key: value.format(**self.names) if isinstance(value, str) else value for key, value in config.items()}

    def look(self, effect: Effect, chosen: Config) -> Any:
        """What is seen of a run of `chosen` settings, where the effect says."""
        config = self.written(chosen)
        if effect.before is not None:
            assert "error" not in seen(config | effect.before)
        return effect.seen(config) if callable(effect.seen) else seen(config)

    def reference(self, effect: Effect, chosen: Config) -> Any:
        """The same, and that it is the same twice, so that what differs from it differs for a reason."""
        key = json.dumps([str(effect.seen) if callable(effect.seen) else "", chosen, effect.before])
        if key not in self.references:
            self.references[key] = first = self.look(effect, chosen)
            assert self.look(effect, chosen) == first
        return self.references[key]


@pytest.fixture(autouse=True)
def _same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that a run draws again."""
    monkeypatch.setattr("atm_fl.privacy.budget.Noise", lambda multiplier, key: Noise(multiplier, bytes(32)))
    monkeypatch.setitem(TRANSFORMS._things, "halved", Halved)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ATM_FL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patched.setattr("atm_fl.server.app.write_report", lambda directory: directory)
        return World(tmp_path_factory.mktemp("walk"))


def declared(item: Field[Any]) -> tuple[Any, ...]:
    """The values but the default that a setting's declaration names."""
    return tuple(value for value in item.metadata["choices"] if value != item.default)


@pytest.mark.parametrize("item", fields(Settings), ids=lambda item: kebab(item.name))
def test_every_declared_setting_says_where_its_effect_is_seen(item: Field[Any]) -> None:
    assert item.name in EFFECTS, f"say in EFFECTS where the setting {kebab(item.name)} is seen"
    values = EFFECTS[item.name].values or declared(item)
    assert values
    assert set(declared(item)) <= set(values)


def test_nothing_is_said_of_a_setting_that_is_not_declared() -> None:
    assert set(EFFECTS) <= {item.name for item in fields(Settings)}


@pytest.mark.slow
@pytest.mark.parametrize("item", fields(Settings), ids=lambda item: kebab(item.name))
def test_every_value_of_a_setting_changes_the_run_or_is_refused_by_name(item: Field[Any], world: World) -> None:
    effect, key = EFFECTS[item.name], kebab(item.name)
    values = effect.values or declared(item)
    plain = Effect("bits")
    for value in values:
        if not effect.idle:
            alone = world.look(plain, {key: value})
            if "error" in alone:
                assert f"{key}=" in alone["error"]
            else:
                assert alone != world.reference(plain, {})
        if effect.idle or effect.beside:
            reference = world.reference(effect, effect.beside)
            outcome = world.look(effect, effect.beside | {key: value})
            if callable(effect.seen):
                assert outcome != reference
            elif "error" in outcome:
                assert f"{key}=" in outcome["error"]
            else:
                assert outcome.get(effect.seen) != reference.get(effect.seen)


def test_what_needs_another_setting_says_so_and_the_table_of_needs_has_no_stranger(world: World) -> None:
    names = {item.name: item for item in fields(Settings)}
    assert set(NEEDS) <= set(names)
    for name, (needs, _) in NEEDS.items():
        effect = EFFECTS[name]
        value = effect.values[-1] if effect.values else declared(names[name])[0]
        other = {"shots": {"head": "linear-probe"}, "clip_norm": DP}.get(name, {})  # of the default, idle beside this
        with pytest.raises(SettingError) as error:
            Settings.parse(world.written(other | {kebab(name): value}))
        told = f"{value:g}" if isinstance(value, float) else repr(value)
        assert str(error.value) == f"{kebab(name)}={told}: it needs {needs}"


# --------------------------------------------------------------------------------------- options of merges, codecs, …

LAYOUT = Layout(("attn.qkv.weight", "b.weight", "b.bias"), ((48, 16), (16, 24), (16,)))


def others(item: Any) -> list[Any]:
    """Some values but the default within an option's bounds."""
    default = item.default
    if type_name(item) == "str":
        return [word for word in item.metadata["among"] if word != default]
    wanted = [not default] if type_name(item) == "bool" else [default / 2, default * 2, default + 1, default - 1, 0.5]
    if type_name(item) == "int":
        wanted = [int(value) for value in (*wanted, 2, 4, default + 2)]
    values = []
    for value in wanted:
        try:
            check_option(item.name, value, item)
        except SettingError:
            continue
        values.append(value)
    return [value for value in values if value != default]


def vectors(count: int = 8) -> list[torch.Tensor]:
    """Vectors that have something in common."""
    random = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, LAYOUT.size, generator=random) * torch.linspace(0.5, 2, count)[:, None]
    return list(drawn + torch.randn(LAYOUT.size, generator=random))


def merged(name: str, chosen: Config) -> Any:
    merge = make_merge(name, LAYOUT, seed=1, **chosen)
    return digest(merge.combine({f"t{number}": vector for number, vector in enumerate(vectors())}))


def test_pcgrad_is_another_merge_where_tasks_are_at_odds() -> None:
    """Else it is the mean, as of the walk's three tasks."""
    one, *_ = vectors()
    at_odds = {"a": one, "b": one.flip(0) - one}
    assert not torch.equal(*(make_merge(name, LAYOUT).combine(at_odds) for name in ("mean", "pcgrad")))


def coded(name: str, chosen: Config) -> Any:
    text = ",".join(f"{kebab(key)}={str(value).lower()}" for key, value in chosen.items())
    codec = make_codec(f"{name}:{text}" if text else name, "codec-up")
    arrays = codec.encode(vectors(1)[0], LAYOUT, 1)
    return {key: (array.tobytes(), array.shape) for key, array in arrays.items()}


def stepped(name: str, chosen: Config) -> Any:
    optimizer = ServerOptimizer(name, **chosen)
    return [digest(optimizer.step(vector.clone(), number)) for number, vector in enumerate(vectors(3), 1)]


MADE: list[tuple[Registry[Any], Callable[[str, Config], Any]]] = [
    (MERGES, merged),
    (CODECS, coded),
    (SERVER_OPTIMIZERS, stepped),
]
OPTIONS = [
    (make, name, item) for registry, make in MADE for name in registry for item in registry.options(registry[name])
]
OPTIONS += [(merged, name, item) for name in MERGES for item in fields(find_merge(name)) if item.name == "scaling"]


@pytest.mark.parametrize(("make", "name", "item"), OPTIONS, ids=[f"{name}-{item.name}" for _, name, item in OPTIONS])
def test_every_option_changes_what_is_made_with_it(make: Callable[[str, Config], Any], name: str, item: Any) -> None:
    before = make(name, {})
    assert make(name, {}) == before
    outcomes = []
    for value in others(item):
        with suppress(SettingError):  # a value that cannot go with the other options
            outcomes.append(make(name, {item.name: value}) != before)
    assert any(outcomes)


# ----------------------------------------------------------------------------------------------------- the plain loop


@pytest.mark.parametrize(
    "chosen",
    [
        {"on-failure": "skip"},
        {"node-timeout": 1.0},
        {"round-timeout": 1.0},
        {"max-update-norm": 1.0},
        {"secure-aggregation": True, "secure-threshold": 3},
        {"secure-aggregation": True, "secure-neighbours": 2},
    ],
    ids=lambda chosen: next(reversed(chosen)),
)
def test_a_plain_loop_refuses_what_only_messages_have(
    chosen: Config, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = tmp_path / "run.toml", world.written(chosen)
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    assert call(monkeypatch, "run", str(file), "--runtime", "plain") == 2
    key = next(reversed(chosen))
    assert f"{key}={chosen[key]!r}: it has no effect with --runtime plain" in capsys.readouterr().err
    assert not Path(config["run-dir"]).exists()


def test_a_plain_loop_refuses_a_vector_out_of_proportion_as_the_apps_do(world: World) -> None:
    class Longer(Party):
        def train(self, base: torch.Tensor, round_number: int, run: str = "") -> Update:
            update = super().train(base, round_number, run)
            assert update.arrays is not None
            return replace(update, arrays={name: array * 1e4 for name, array in update.arrays.items()})

    for proportion in (20.0, 0.0):
        settings = Settings.parse(world.written({"proportion": proportion}))
        kinds = [Longer, Party, Party]
        parties = [kind(settings, name) for kind, name in zip(kinds, settings.task_names, strict=True)]
        if proportion:
            with pytest.raises(RunError, match=r"round 1: red: refused: its vector's norm .* proportion=20 allows"):
                run_loop(settings, parties)
        else:
            assert run_loop(settings, parties).rounds_done == 1
