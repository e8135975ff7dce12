"""`TaskVectorStrategy` in apps of Flower's own kind: examples/flower_app, and clients that return what a test says."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Result
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from atm_fl.errors import RunError, SettingError
from atm_fl.flower import TaskVectorStrategy, encoded
from atm_fl.merging import make_merge
from atm_fl.server.grid import InProcessGrid
from atm_fl.server.simulation import superlink
from atm_fl.vectors import Layout

APP = Path(__file__).parents[1] / "examples" / "flower_app"
sys.path.insert(0, str(APP))

from quickstart.client_app import app as quickstart  # noqa: E402
from quickstart.task import Net  # noqa: E402

CONFIG = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def run(strategy: FedAvg, app: ClientApp = quickstart, clients: int = 3, rounds: int = 2, **more: Any) -> Result:
    """The example's server in this process, from the same weights and draws of nodes every time."""
    random.seed(0)
    torch.manual_seed(0)
    arrays = more.pop("arrays", None) or ArrayRecord(Net().state_dict())
    return strategy.start(InProcessGrid(app, clients, CONFIG | {"classes": 4}), arrays, rounds, **more)


def floats(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    held = {name: array.numpy() for name, array in arrays.items() if array.dtype.startswith("float")}
    return {name: array for name, array in held.items() if not name.endswith("num_batches_tracked")}


def same(one: ArrayRecord, other: ArrayRecord) -> bool:
    mine, others = floats(one), floats(other)
    return mine.keys() == others.keys() and all(np.array_equal(mine[name], others[name]) for name in mine)


Answer = Callable[[int, dict[str, np.ndarray], int], RecordDict | None]


def answering(answer: Answer, mods: Iterable[Any] = ()) -> ClientApp:
    """Clients that return what `answer(partition, sent weights, round)` says; an error if that is None."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        sent = {name: np.array(array.numpy()) for name, array in message.content["arrays"].items()}
        content = answer(int(context.node_config["partition-id"]), sent, message.content["config"]["server-round"])
        return Message(Error(7, "no disk") if content is None else content, reply_to=message)  # type: ignore[arg-type]

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "accuracy": 0.5})}), reply_to=message)

    return app


def reply(weights: dict[str, np.ndarray], examples: float = 1, **metrics: Any) -> RecordDict:
    arrays = ArrayRecord({name: Array(np.asarray(values)) for name, values in weights.items()})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": examples, **metrics})})


START = {
    "layer.weight": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6),
    "layer.bias": np.zeros(4, np.float32),
    "norm.running_mean": np.zeros(4, np.float32),
    "norm.running_var": np.ones(4, np.float32),
    "norm.num_batches_tracked": np.array(3),
}
"""Weights as a state dict has them."""


def start() -> ArrayRecord:
    return ArrayRecord({name: Array(values) for name, values in START.items()})


def tuned(partition: int, sent: dict[str, np.ndarray], number: int = 1) -> dict[str, np.ndarray]:
    """What an honest client returns."""
    draws = np.random.default_rng([partition, number])
    moved = {
        name: values + draws.normal(0, 0.1, values.shape).astype(np.float32)
        for name, values in sent.items()
        if values.dtype == np.float32
    }
    moved["norm.running_var"] = np.abs(moved["norm.running_var"])
    return {name: moved.get(name, values + partition) for name, values in sent.items()}


# --------------------------------------------------------------------------------------------------- beside FedAvg


def test_the_mean_ends_with_fedavgs_bits_and_metrics_in_the_quickstart_app() -> None:
    ours, theirs = run(TaskVectorStrategy()), run(FedAvg())
    assert same(ours.arrays, theirs.arrays)
    assert not same(ours.arrays, ArrayRecord(Net().state_dict()))
    assert ours.train_metrics_clientapp == theirs.train_metrics_clientapp
    assert ours.evaluate_metrics_clientapp == theirs.evaluate_metrics_clientapp


def flwr_run(variables: dict[str, str], merge: str, out: Path) -> dict[str, torch.Tensor]:
    """The final weights of the app under `flwr run`, as the app saves them."""
    config = f"out={json.dumps(str(out))} merge={json.dumps(merge)} num-server-rounds=2"
    federation = "num-supernodes=2 client-resources-num-cpus=1"
    command = ["flwr", "run", str(APP), "local", "--stream", "-c", config, "--federation-config", federation]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    log = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    started = re.search(r"started run (\d+)", log)
    assert started, log
    listing = ["flwr", "list", "local", "--run-id", started[1], "--format", "json"]
    deadline, status = time.monotonic() + 600, ""
    while "finished:" not in status:  # the stream of logs may break off before the run ends
        assert time.monotonic() < deadline, log + status
        status = subprocess.run(listing, env=variables, capture_output=True, text=True, timeout=120, check=False).stdout
    assert '"finished:completed"' in status, log
    weights: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
    return weights


@pytest.mark.slow
def test_the_mean_ends_with_fedavgs_bits_under_flwr_run(tmp_path: Path) -> None:
    """Two clients: FedAvg adds in the order of arrival, which of two numbers makes no difference."""
    with superlink(tmp_path / "flower") as variables:
        theirs = flwr_run(variables, "", tmp_path / "fedavg.pt")
        ours = flwr_run(variables, "mean", tmp_path / "mean.pt")
    torch.manual_seed(CONFIG["seed"])
    before = Net().state_dict()
    assert ours.keys() == theirs.keys() == before.keys()
    for name in (name for name, values in before.items() if values.is_floating_point()):
        assert torch.equal(ours[name], theirs[name]), name
        assert not torch.equal(ours[name], before[name]), name


@pytest.mark.parametrize("examples", [(1, 1, 1, 1), (7, 600, 31, 2)])
def test_the_mean_weighs_as_fedavg_does(examples: tuple[int, ...]) -> None:
    app = answering(lambda p, sent, number: reply(tuned(p, sent, number), examples[p]))
    ours, theirs = (run(strategy, app, 4, 3, arrays=start()) for strategy in (TaskVectorStrategy(), FedAvg()))
    assert same(ours.arrays, theirs.arrays)


def test_fedavgs_own_arguments_keep_their_meaning() -> None:
    asked: list[int] = []
    app = answering(lambda p, sent, number: asked.append(p) or reply(tuned(p, sent)))  # type: ignore[func-returns-value]
    seen: list[int] = []

    def central(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(number)
        return MetricRecord({"norm": float(np.abs(arrays["layer.weight"].numpy()).sum())})

    config = ConfigRecord({"lr": 0.1})
    strategy = TaskVectorStrategy(0.5, merge="ties", min_train_nodes=1, fraction_evaluate=0.0)
    result = run(strategy, app, 4, 2, arrays=start(), train_config=config, evaluate_fn=central)
    assert len(asked) == 4  # half of four, twice
    assert seen == [0, 1, 2]
    assert result.evaluate_metrics_serverapp.keys() == {0, 1, 2}
    assert not result.evaluate_metrics_clientapp
    assert config["lr"] == 0.1


def test_memory_does_not_grow_with_the_clients_as_fedavgs_does() -> None:
    specs = [f"{name}:{clients}" for name in ("mean", "ties", "fedavg") for clients in (2, 8)]
    script = Path(__file__).with_name("resident.py")
    done = subprocess.run(
        [sys.executable, script, *specs],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    peaks = {spec: float(peak) for spec, peak in (line.split() for line in done.stdout.splitlines())}
    grown = {name: peaks[f"{name}:8"] - peaks[f"{name}:2"] for name in ("mean", "ties", "fedavg")}
    model = 8  # MiB
    assert grown["fedavg"] > 4 * model
    assert grown["mean"] < model
    assert grown["ties"] < model


# --------------------------------------------------------------------------------------------------- what is merged


@pytest.mark.parametrize("name", ["tsv-m", "ties", "task-arithmetic", "median"])
def test_a_merge_gets_the_task_vectors_and_its_scaling(name: str) -> None:
    app = answering(lambda p, sent, number: reply(tuned(p, sent), 10**p))
    result = run(TaskVectorStrategy(merge=f"{name}:scaling=1.5"), app, 3, 1, arrays=start())
    layout = Layout(("layer.weight", "layer.bias"), ((4, 6), (4,)))
    flat = [torch.cat([torch.tensor(w[name]).reshape(-1) for name in layout.names]) for w in (START, *CLIENTS)]
    vectors = {str(p): vector - flat[0] for p, vector in enumerate(flat[1:])}
    expected = layout.views(flat[0] + make_merge(name, layout, scaling=1.5).combine(vectors))
    for entry, values in expected.items():
        np.testing.assert_allclose(result.arrays[entry].numpy(), values.numpy(), atol=1e-6)


CLIENTS = [tuned(p, START) for p in range(3)]


def test_running_statistics_are_averaged_by_examples_and_counters_stay_whatever_the_merge() -> None:
    app = answering(lambda p, sent, number: reply(tuned(p, sent), 1 + p))
    result = run(TaskVectorStrategy(merge="tsv-m:scaling=3.0"), app, 3, 1, arrays=start())
    for name in ("norm.running_mean", "norm.running_var"):
        expected = sum((1 + p) / 6 * CLIENTS[p][name] for p in range(3))
        np.testing.assert_allclose(result.arrays[name].numpy(), expected, rtol=1e-5, atol=1e-7)
    kept = result.arrays["norm.num_batches_tracked"].numpy()
    assert kept.dtype == np.int64
    assert int(kept) == 3


def test_a_client_may_be_scaled_and_a_server_optimizer_steps() -> None:
    app = answering(lambda p, sent, number: reply(tuned(p, sent), 1, part=p))
    scaled = TaskVectorStrategy(
        merge="task-arithmetic:scaling=1.0",
        client_scaling=lambda node, metrics: 2.0 if metrics["part"] == 1 else 0.0,
        server_optimizer="momentum:learning-rate=0.5",
    )
    result = run(scaled, app, 3, 1, arrays=start())
    expected = START["layer.weight"] + 0.5 * 2 * (CLIENTS[1]["layer.weight"] - START["layer.weight"])
    np.testing.assert_allclose(result.arrays["layer.weight"].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_entries_keep_their_own_types(dtype: type) -> None:
    weights = {"w": np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype))}
    app = answering(lambda p, sent, number: reply({"w": np.asfortranarray(sent["w"] + dtype(p))}))
    arrays = ArrayRecord({"w": Array(weights["w"])})
    for merge in ("mean", "task-arithmetic:scaling=0.5"):
        result = run(TaskVectorStrategy(merge=merge), app, 3, 1, arrays=arrays)
        actual = result.arrays["w"].numpy()
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, weights["w"] + (1 if merge == "mean" else 1.5))


def test_lora_clients_send_adapters_alone() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["hidden"]))
    adapters = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    assert {name.split(".")[-2] for name in adapters} == {"lora_A", "lora_B"}

    def answer(partition: int, sent: dict[str, np.ndarray], number: int) -> RecordDict:
        return reply({name: values + np.float32(0.1 * partition) for name, values in sent.items()})

    result = run(TaskVectorStrategy(), answering(answer), 3, 2, arrays=ArrayRecord(adapters))
    peft.set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    for name, value in peft.get_peft_model_state_dict(model).items():
        torch.testing.assert_close(value, adapters[name] + 0.2)  # the mean of 0, 0.1 and 0.2, twice
    other = run(TaskVectorStrategy(merge="tsv-m"), answering(answer), 3, 2, arrays=ArrayRecord(adapters))
    assert other.arrays.keys() == adapters.keys()
    assert not same(other.arrays, result.arrays)


# --------------------------------------------------------------------------------------------------- codecs


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk:density=0.5"])
def test_a_mod_encodes_the_vector_and_the_app_goes_on_with_weights(codec: str) -> None:
    def answer(partition: int, sent: dict[str, np.ndarray], number: int) -> RecordDict:
        return reply(tuned(partition, sent, number))

    merge = "task-arithmetic:scaling=0.5"
    plain = run(TaskVectorStrategy(merge=merge), answering(answer), 3, 1, arrays=start()).arrays
    mods = [encoded(codec)]
    sent = run(TaskVectorStrategy(merge=merge, codec=codec), answering(answer, mods), 3, 1, arrays=start()).arrays
    bound = {"fp32": 1e-6, "int8": 0.02, "topk:density=0.5": 0.2}[codec]
    for name, values in floats(plain).items():
        np.testing.assert_allclose(floats(sent)[name], values, atol=bound)
    assert codec == "fp32" or not same(plain, sent)


def test_what_a_sparse_codec_leaves_out_is_sent_in_the_next_round() -> None:
    app = answering(
        lambda p, sent, number: reply({"w": sent["w"] + np.array([1, 2, 3, 4], np.float32) * (number == 1)}),
        [encoded("topk:density=0.5")],
    )
    arrays = ArrayRecord({"w": Array(np.zeros(4, np.float32))})
    strategy = TaskVectorStrategy(codec="topk:density=0.5")
    np.testing.assert_allclose(run(strategy, app, 2, 1, arrays=arrays).arrays["w"].numpy(), [0, 0, 3, 4], rtol=1e-2)
    np.testing.assert_allclose(run(strategy, app, 2, 2, arrays=arrays).arrays["w"].numpy(), [1, 2, 3, 4], rtol=1e-2)


@pytest.mark.parametrize(
    ("server", "client", "message"),
    [
        ("", "int8", "encoded by 'int8'; TaskVectorStrategy\\(codec='int8'\\)"),
        ("int8", "", "not encoded; its ClientApp needs mods=\\[encoded\\('int8'\\)"),
        ("int8", "fp16", "encoded as .*fp16"),
    ],
)
def test_another_codec_is_named_with_the_fix(server: str, client: str, message: str) -> None:
    app = answering(lambda p, sent, number: reply(tuned(p, sent)), [encoded(client)] if client else [])
    with pytest.raises(RunError, match=message):
        run(TaskVectorStrategy(codec=server), app, 2, 1, arrays=start())


# --------------------------------------------------------------------------------------------------- failures

BAD: dict[str, Callable[[dict[str, np.ndarray]], RecordDict | None]] = {
    "an error": lambda w: None,
    "no arrays": lambda w: RecordDict({"metrics": MetricRecord({"num-examples": 1})}),
    "no metrics": lambda w: RecordDict({"arrays": reply(w)["arrays"]}),
    "missing entry": lambda w: reply({name: w[name] for name in list(w)[1:]}),
    "more entries": lambda w: reply({**w, "more": np.zeros(2)}),
    "shape": lambda w: reply({**w, "layer.bias": np.zeros((2, 2), np.float32)}),
    "dtype": lambda w: reply({**w, "layer.bias": np.zeros(4)}),
    "NaN": lambda w: reply({**w, "layer.bias": np.array([0, 0, 0, np.nan], np.float32)}),
    "infinity": lambda w: reply({**w, "norm.running_mean": np.array([0, 0, 0, np.inf], np.float32)}),
    "variance": lambda w: reply({**w, "norm.running_var": -np.ones(4, np.float32)}),
    "no bytes": lambda w: _with(w, Array("float32", (4,), "numpy.ndarray", b"\x93NUMPY")),
    "another kind": lambda w: _with(w, Array("float32", (4,), "pickle", b"cos")),
    "weight 0": lambda w: reply(w, 0),
    "weight NaN": lambda w: reply(w, float("nan")),
    "weight -1": lambda w: reply(w, -1),
}


def _with(weights: dict[str, np.ndarray], array: Array) -> RecordDict:
    content = reply(weights)
    content.array_records["arrays"]["layer.bias"] = array
    return content


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.integers(0, 3), st.sampled_from(sorted(BAD)), max_size=3),
    st.sampled_from(["mean", "tsv-m", "ties"]),
)
def test_malformed_replies_leave_the_honest_clients_result_as_it_is(bad: dict[int, str], merge: str) -> None:
    def with_bad(partition: int, sent: dict[str, np.ndarray], number: int) -> RecordDict | None:
        weights = tuned(partition, sent, number)
        return BAD[bad[partition]](weights) if partition in bad else reply(weights, 1 + partition, loss=0.5)

    def without(partition: int, sent: dict[str, np.ndarray], number: int) -> RecordDict | None:
        return None if partition in bad else reply(tuned(partition, sent, number), 1 + partition, loss=0.5)

    results = [
        run(TaskVectorStrategy(merge=merge, on_failure="skip"), answering(answer), 4, 2, arrays=start())
        for answer in (with_bad, without)
    ]
    assert same(results[0].arrays, results[1].arrays)
    assert results[0].train_metrics_clientapp == results[1].train_metrics_clientapp


@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_failure_ends_the_run_and_is_named(kind: str) -> None:
    app = answering(lambda p, sent, number: BAD[kind](tuned(p, sent)) if p == 1 else reply(tuned(p, sent)))
    with pytest.raises(RunError, match=r"round 1: 2 of 3 clients succeeded, 3 needed.* node 2: "):
        run(TaskVectorStrategy(), app, 3, 1, arrays=start())
    with pytest.raises(RunError, match="2 of 3 clients succeeded, 3 needed"):
        run(TaskVectorStrategy(on_failure="skip", min_successful=3), app, 3, 1, arrays=start())


def test_metrics_that_not_all_clients_have_are_left_out() -> None:
    lists = {0: {"loss": 1.0, "odd": [1.0, 2.0]}, 1: {"loss": 3.0, "odd": [1.0]}, 2: {"loss": 5.0, "more": 1}}
    app = answering(lambda p, sent, number: reply(tuned(p, sent), 1, **lists[p]))
    result = run(TaskVectorStrategy(), app, 3, 1, arrays=start())
    assert dict(result.train_metrics_clientapp[1]) == pytest.approx({"loss": 3.0})


# --------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge": "tsv"}, "merge='tsv'"),
        ({"merge": "ties:density=2"}, "density=2: it must be above 0 and at most 1"),
        ({"server_optimizer": "none:momentum=0.5"}, "has no option 'momentum'"),
        ({"codec": "int9"}, "codec='int9'"),
        ({"on_failure": "ignore"}, "on_failure='ignore'"),
        ({"min_successful": 2}, "min_successful=2 needs on_failure='skip'"),
        ({"averaged": ["*ema"]}, "averaged: '\\*ema' matches no"),
        ({"merge": "multi-krum:f=5"}, "needs at least"),
    ],
)
def test_what_cannot_work_is_refused_before_a_client_is_asked(arguments: dict[str, Any], message: str) -> None:
    app = answering(lambda p, sent, number: pytest.fail("it was asked"))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=message):
        run(TaskVectorStrategy(**arguments), app, 3, 1, arrays=start())


def test_flowers_local_dp_mod_on_training_bounds_vectors_and_leaves_counters() -> None:
    app = ClientApp()

    @app.train(mods=[LocalDpMod(clipping_norm=0.1, sensitivity=0.001, epsilon=10.0, delta=1e-5)])
    def train(message: Message, context: Context) -> Message:
        sent = {name: np.array(array.numpy()) for name, array in message.content["arrays"].items()}
        moved = {name: values + np.ones_like(values) * (values.dtype == np.float32) for name, values in sent.items()}
        return Message(reply(moved), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    arrays = run(TaskVectorStrategy(), app, clients=2, rounds=1, arrays=start()).arrays
    vector = np.concatenate([(floats(arrays)[name] - START[name]).ravel() for name in floats(start())])
    assert 0.09 < np.linalg.norm(vector) < 0.11
    assert len(np.unique(vector)) > len(vector) // 2
    counter = arrays["norm.num_batches_tracked"].numpy()
    assert (counter.dtype, int(counter)) == (np.int64, 3)


def test_a_wrapper_and_an_old_workflow_are_refused_before_any_round() -> None:
    app = answering(lambda p, sent, number: pytest.fail("it was asked"))  # type: ignore[arg-type]
    wrapped = DifferentialPrivacyServerSideFixedClipping(TaskVectorStrategy(), 1.0, 1.0, 3)
    with pytest.raises(SettingError, match="cannot be wrapped .* DifferentialPrivacy"):
        run(wrapped, app, 3, 1, arrays=start())  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="SecAgg"):
        TaskVectorStrategy().initialize_parameters(None)


# --------------------------------------------------------------------------------------------------- checkpoints


class Killed(BaseException):
    pass


@pytest.mark.parametrize("merge", ["mean", "tsv-m", "dare"])
@pytest.mark.parametrize("dies_in", [1, 3])
def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(tmp_path: Path, merge: str, dies_in: int) -> None:
    def options(folder: str) -> dict[str, Any]:
        optimizer = "adam:learning-rate=0.01"
        folder = str(tmp_path / folder)
        return {"merge": merge, "server_optimizer": optimizer, "checkpoint_dir": folder, "fraction_train": 0.5}

    def answer(partition: int, sent: dict[str, np.ndarray], number: int) -> RecordDict:
        if number == dies_in and alive.pop("once", False):
            raise Killed
        return reply(tuned(partition, sent, number), 1 + partition)

    alive: dict[str, bool] = {}
    whole = run(TaskVectorStrategy(**options("whole")), answering(answer), 6, 4, arrays=start())
    alive["once"] = True
    with pytest.raises(Killed):
        run(TaskVectorStrategy(**options("broken")), answering(answer), 6, 4, arrays=start())
    seen: list[int] = []

    def central(number: int, arrays: ArrayRecord) -> None:
        seen.append(number)

    again = run(TaskVectorStrategy(**options("broken")), answering(answer), 6, 4, arrays=start(), evaluate_fn=central)
    assert same(again.arrays, whole.arrays)
    assert seen == list(range(dies_in - 1, 5))
    assert list(again.train_metrics_clientapp) == list(range(dies_in, 5))
    finished = run(TaskVectorStrategy(**options("broken")), answering(answer), 6, 4, arrays=start())
    assert same(finished.arrays, whole.arrays)
    assert not finished.train_metrics_clientapp


def test_a_damaged_checkpoint_is_passed_over_and_another_runs_folder_refused(tmp_path: Path) -> None:
    app = answering(lambda p, sent, number: reply(tuned(p, sent, number)))
    whole = run(TaskVectorStrategy(checkpoint_dir=tmp_path), app, 2, 3, arrays=start()).arrays
    newest = sorted((tmp_path / "checkpoint").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-4])
    again = run(TaskVectorStrategy(checkpoint_dir=tmp_path), app, 2, 3, arrays=start())
    assert same(again.arrays, whole)
    assert list(again.train_metrics_clientapp) == [3]
    with pytest.raises(SettingError, match="merge='ties'.* holds a run with 'mean'; name another folder"):
        run(TaskVectorStrategy(checkpoint_dir=tmp_path, merge="ties"), app, 2, 3, arrays=start())
    with pytest.raises(SettingError, match="num_rounds=2: .* holds 3 rounds"):
        run(TaskVectorStrategy(checkpoint_dir=tmp_path), app, 2, 2, arrays=start())
