"""What a server and a client make of each other's messages when the other side is hostile or broken."""

from __future__ import annotations

import copy
import io
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import final, in_process, same, tampered
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from atm_fl.clients.app import app as client_app
from atm_fl.errors import RunError, SettingError, printable
from atm_fl.federation.bounds import too_long
from atm_fl.federation.loop import run_loop
from atm_fl.runs.checkpoints import checkpoints
from atm_fl.runs.directory import told_if_full
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.server import boundary
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings
from atm_fl.settings.rules import fewest_tasks
from atm_fl.vectors.npy import read_array, read_arrays

SKIP: dict[str, Any] = {"on-failure": "skip", "min-successful": 2}
INFO = {"task": "green", "codec": "fp32", "layout": "l", "base": "b", "needs-base": False}
SIZE = 100


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape: str, dtype: str = "<f4", content: bytes = b"") -> bytes:
    """A .npy file of which the header declares what it likes."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, values=np.zeros(SIZE, np.float32))
    return file.getvalue()


def raw(content: bytes, kind: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(SIZE,), stype=kind, data=content)


BAD_ARRAYS = [
    b"",
    b"\x93NUMPY",
    zipped(),
    b"PK\x05\x06" + bytes(18),
    header("(100000000000000,)"),
    header("(-1,)"),
    header("(True,)", content=bytes(4)),
    header("(100, 10000000000000)"),
    header("(25,)", "|O", bytes(200)),
    header("(25,)", "<M8[s]", bytes(200)),
    header("((((((((((((((((((((", "<f4"),
    npy(np.zeros(SIZE, np.float32))[:-1],
    npy(np.zeros(SIZE, np.float32)) + b"\0",
]


@pytest.mark.parametrize("content", BAD_ARRAYS)
def test_bytes_that_are_no_array_of_their_own_size_are_refused_before_memory_is_reserved(content: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match="no array|declares|not of numbers|dimensions"):
        read_array(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16, np.uint8, np.uint32])
def test_arrays_of_numbers_are_read_as_numpy_reads_them(dtype: type) -> None:
    array = np.arange(SIZE).astype(dtype)
    actual = read_array(npy(array))
    assert actual.dtype == array.dtype
    assert actual.flags.writeable
    np.testing.assert_array_equal(actual, array)


def test_more_arrays_or_bytes_than_a_vector_has_are_refused() -> None:
    with pytest.raises(ValueError, match="9 arrays; 8 at most"):
        read_arrays({str(n): b"" for n in range(9)}, SIZE)
    with pytest.raises(ValueError, match="arrays of 2000000 bytes"):
        read_arrays({"values": bytes(2_000_000)}, SIZE)


# --------------------------------------------------------------------------------------------------- the server's side


def reply_of(
    arrays: dict[str, Array] | None = None, metrics: dict[str, Any] | None = None, info: dict[str, Any] | None = None
) -> Message:
    """A train reply; a good one if nothing is said."""
    InProcessGrid(client_app, 1, {})  # sets the identity that a Message needs
    content = RecordDict(
        {
            "arrays": ArrayRecord(arrays or {"values": Array(np.ones(SIZE, np.float32))}),
            "metrics": MetricRecord({"tuning.loss": 0.5} if metrics is None else metrics),
            "info": ConfigRecord(INFO if info is None else info),
        }
    )
    return Message(content, reply_to=Message(RecordDict(), 1, "train"))


def taken_in(reply: Message) -> Any:
    boundary.check_info(reply, INFO)
    return boundary.update(reply, SIZE, True, ("validation",))


def test_a_good_reply_passes() -> None:
    actual = taken_in(reply_of(metrics={"evaluation.validation": 0.5, "tuning.loss": float("nan"), "tuning.steps": 3}))
    assert actual.arrays["values"].tolist() == [1.0] * SIZE
    assert actual.evaluation == {"validation": 0.5}
    assert actual.tuning.keys() == {"loss", "steps"}


@pytest.mark.parametrize(
    "name",
    [
        "evaluation.task",
        "evaluation.round",
        "evaluation.kind",
        "tuning.round",
        "tuning.time",
        "tuning.bytes_up",
        "loss",
    ],
)
def test_numbers_that_were_not_asked_for_are_refused(name: str) -> None:
    with pytest.raises(boundary.Refused, match=f"a number '{name}', which was not asked for"):
        taken_in(reply_of(metrics={name: 1.0}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("evaluation.validation", float("nan")),
        ("evaluation.validation", 1.5),
        ("tuning.images", 10**400),
        ("tuning.images", -1),
        ("tuning.norm", float("inf")),
        ("tuning.seconds_tune", float("nan")),
        ("tuning.epsilon", float("nan")),
        ("tuning.steps", [1, 2]),
    ],
)
def test_numbers_that_cannot_be_are_refused(name: str, value: Any) -> None:
    with pytest.raises(boundary.Refused, match=name):
        taken_in(reply_of(metrics={name: value}))


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, "task None, not 'green'"),
        (INFO | {"task": ["green"]}, "info 'task': a list, which it cannot be"),
        (INFO | {"more": "x"}, "info 'more'"),
        (INFO | {"needs-base": "yes"}, "info 'needs-base'"),
        (INFO | {"codec": "\x1b[2J" + "x" * 10**6}, r"codec '\\x1b\[2Jx+…', not 'fp32'"),
    ],
)
def test_strings_that_are_not_on_the_list_are_refused_and_shown_short(info: dict[str, Any], words: str) -> None:
    with pytest.raises(boundary.Refused, match=words) as error:
        taken_in(reply_of(info=info))
    assert len(str(error.value)) < 300


def test_what_does_not_print_is_escaped() -> None:
    assert printable("a\x1b]0;owned\x07\nb\u202e\x9b") == r"a\x1b]0;owned\x07\nb\u202e\x9b"
    assert len(printable("x" * 10**7)) == 501


NAMES = st.sampled_from(
    ["values", "words", "evaluation.task", "evaluation.round", "tuning.round", "tuning.images", "evaluation.validation"]
)
NUMBERS = st.one_of(st.floats(), st.integers(), st.lists(st.floats(), max_size=3), st.just(10**400))
STRINGS = st.one_of(st.text(max_size=20), st.binary(max_size=20), st.booleans(), st.integers(-(2**63), 2**63 - 1))
GOOD = npy(np.ones(SIZE, np.float32))
CONTENTS = st.one_of(
    st.sampled_from(BAD_ARRAYS),
    st.binary(max_size=300),
    st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)).map(
        lambda at: GOOD[: at[0]] + bytes([at[1]]) + GOOD[at[0] + 1 :]
    ),
    st.integers(0, len(GOOD)).map(lambda end: GOOD[:end]),
    st.sampled_from([1e30, np.nan, np.inf, 3e38]).map(lambda value: npy(np.full(SIZE, value, np.float32))),
)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[RecordDict], None]:
    """A change to a message's content: its records, their entries, names, bytes."""
    kind = draw(st.sampled_from(["drop", "arrays", "metrics", "info", "more", "stype"]))
    name, content, number, string = draw(NAMES), draw(CONTENTS), draw(NUMBERS), draw(STRINGS)
    record = draw(st.sampled_from(["arrays", "metrics", "info"]))
    key = draw(st.sampled_from([*INFO, "round", "run", "from", "x\x1b[2J"]))

    def change(records: RecordDict) -> None:
        if kind == "drop":
            records.pop(record, None)
        elif kind in ("arrays", "stype"):
            held = ArrayRecord({name: raw(content, "numpy.ndarray" if kind == "arrays" else string_of(string))})
            records["arrays"] = held
        elif kind == "metrics":
            records["metrics"] = MetricRecord({name: number})
        elif kind == "info":
            records["info"] = ConfigRecord({**records.get("info", {}), key: string})
        else:
            records[f"{record}-2"] = ConfigRecord({key: string})

    return change


def string_of(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def check_the_boundary(changes: list[Callable[[RecordDict], None]]) -> None:
    reply = reply_of()
    for change in changes:
        change(reply.content)
    try:
        update = taken_in(reply)
        if update.arrays is not None:
            Settings().uplink.decode(update.arrays, LAYOUT)
    except ValueError as error:  # Refused, or what the codec refuses
        message = str(error)
    else:
        message = ""
    assert len(message) < 1000
    assert message.isprintable()
    if message:
        return
    assert update.arrays["values"].shape == (SIZE,)
    assert update.evaluation.keys() <= {"validation"}
    assert all(0 <= value <= 1 for value in update.evaluation.values())
    json.dumps([update.evaluation, update.tuning])


def _layout() -> Any:
    from atm_fl.vectors import Layout

    return Layout(("weight",), ((SIZE,),))


LAYOUT = _layout()
CHANGES = st.lists(mutations(), min_size=1, max_size=3)
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@hypothesis_settings(max_examples=200, **QUICK)  # type: ignore[arg-type]
@given(CHANGES)
def test_whatever_a_reply_holds_it_is_taken_in_or_refused(changes: list[Callable[[RecordDict], None]]) -> None:
    check_the_boundary(changes)


@pytest.mark.slow
@hypothesis_settings(max_examples=5000, **QUICK)  # type: ignore[arg-type]
@given(CHANGES)
def test_whatever_many_replies_hold_they_are_taken_in_or_refused(changes: list[Callable[[RecordDict], None]]) -> None:
    check_the_boundary(changes)


# ---------------------------------------------------------------------------------------------------------- whole runs


def bad_content(content: bytes) -> Callable[[Message, Message], Message]:
    def change(message: Message, reply: Message) -> Message:
        reply.content["arrays"] = ArrayRecord({"values": raw(content)})
        return reply

    return change


def bad_number(name: str) -> Callable[[Message, Message], Message]:
    def change(message: Message, reply: Message) -> Message:
        reply.content["metrics"] = MetricRecord({name: 7})
        return reply

    return change


def giant(message: Message, reply: Message) -> Message:
    size = len(reply.content.array_records["arrays"]["values"].numpy())
    reply.content["arrays"] = ArrayRecord({"values": Array(np.full(size, 1e30, np.float32))})
    return reply


def escape(message: Message, reply: Message) -> Message:
    return Message(Error(2, "\x1b[2J\x1b]0;owned\x07" + "x" * 10**6), reply_to=message)


def empty(message: Message, reply: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def unreadable(message: Message, reply: Message) -> Message:
    raise ValueError("no such object")


HOSTILE = {
    "bytes": bad_content(b""),
    "zip": bad_content(zipped()),
    "declares": bad_content(header("(100000000000000,)")),
    "task": bad_number("evaluation.task"),
    "round": bad_number("tuning.round"),
    "giant": giant,
    "escape": escape,
    "empty": empty,
    "unreadable": unreadable,
}


@pytest.fixture
def two(config: dict[str, Any]) -> dict[str, Any]:
    """Two rounds of three parties, under skip."""
    return {**config, **SKIP, "rounds": 2}


def without_green(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in which green takes no part."""
    taken = Settings.part_taken
    with monkeypatch.context() as patch:
        patch.setattr(Settings, "part_taken", lambda s, task, n: 0.0 if task == "green" else taken(s, task, n))
        return run_loop(Settings.parse({**config, "run-dir": config["run-dir"] + "-honest"})).directory


def check_skipped(directory: Path, honest: Path) -> None:
    """The run ended by policy, and with the weights of one without green; nothing strange is in its files."""
    assert same(final(directory), final(honest))
    merges = [line for line in read_metrics(directory) if line["kind"] == "merge"]
    assert [line["tasks"] for line in merges] == [["red", "blue"]] * 2
    assert all("green" in line["failures"] for line in merges)
    text = (directory / "metrics.jsonl").read_text()
    assert "\x1b" not in text
    assert "\\u001b" not in text
    assert len(text) < 30_000


def test_no_reply_of_one_client_ends_a_run_or_touches_the_others_weights(
    two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = without_green(two, monkeypatch)
    for name, change in HOSTILE.items():
        run = in_process(Settings.parse({**two, "run-dir": f"{two['run-dir']}-{name}"}), tampered(change, "green"))
        check_skipped(run.directory, honest)


@pytest.mark.parametrize("kind", ["keys", "shares", "unmask"])
def test_secrets_that_are_no_bytes_are_a_dropout(two: dict[str, Any], kind: str) -> None:
    def strings(message: Message, reply: Message) -> Message:
        record = reply.content.config_records[kind]
        reply.content[kind] = ConfigRecord(dict.fromkeys(record, "a string"))
        return reply

    run = in_process(
        Settings.parse({**two, "secure-aggregation": True, "rounds": 1}), tampered(strings, "green", f"query.{kind}")
    )
    lines = list(read_metrics(run.directory))
    assert "green: refused: " in " ".join(line.get("text", "") for line in lines)


def check_a_run(two: dict[str, Any], change: Callable[[RecordDict], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mutated client, a run has the weights of one in whose rounds those take part that it merged."""

    def mutate(message: Message, reply: Message) -> Message:
        if not reply.has_error():
            change(reply.content)
        return reply

    directory = Path(two["run-dir"] + f"-{time.monotonic_ns()}")
    run = in_process(Settings.parse({**two, "run-dir": str(directory)}), tampered(mutate, "green"))
    merges = [line for line in read_metrics(directory) if line["kind"] == "merge"]
    assert len(merges) == run.rounds_done == 2
    if not any("green" in line["tasks"] for line in merges):
        assert same(final(directory), final(without_green({**two, "run-dir": str(directory)}, monkeypatch)))


@pytest.mark.slow
def test_whatever_one_client_sends_the_run_ends_by_policy(two: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    @hypothesis_settings(max_examples=100, **QUICK)  # type: ignore[arg-type]
    @given(mutations())
    def check(change: Callable[[RecordDict], None]) -> None:
        check_a_run(two, change, monkeypatch)

    check()


def test_under_abort_it_ends_by_name_and_the_base_stays(config: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"green: refused: its vector's norm is .*proportion=20 allows"):
        in_process(Settings.parse(config), tampered(giant, "green"))
    assert not checkpoints(Path(config["run-dir"]))


def test_any_vector_goes_without_the_setting(two: dict[str, Any]) -> None:
    run = in_process(Settings.parse({**two, "proportion": 0.0, "rounds": 1}), tampered(giant, "green"))
    assert float(run.base.double().norm()) > 1e29


def test_an_honest_run_is_the_same_with_a_narrow_and_without_a_bound(two: dict[str, Any]) -> None:
    bases = []
    for place, value in enumerate((0.0, 20.0)):
        more = {"proportion": value, "run-dir": f"{two['run-dir']}-{place}", "local-epochs": 4.0}
        bases.append(in_process(Settings.parse({**two, **more, "server-optimizer": "momentum"})).base)
    assert torch.equal(*bases)


def test_what_is_out_of_proportion() -> None:
    assert too_long({"a": 1.0, "b": 2.0, "c": 1e30}, 0.0, 10.0, 20.0).keys() == {"c"}
    assert not too_long({"a": 1e-30, "b": 2.0}, 0.0, 10.0, 20.0)  # one who sends nothing has nobody refused
    assert not too_long({"a": 150.0}, 0.0, 10.0, 20.0)  # nothing to compare with: 20 bases
    assert too_long({"a": 250.0}, 0.0, 10.0, 20.0)
    assert not too_long({"a": 0.1, "b": 0.1, "late": 30.0}, 2.0, 10.0, 20.0)  # usual in the first round
    assert too_long({"a": 0.1, "b": 0.1, "c": 41.0}, 2.0, 10.0, 20.0)
    assert too_long({"a": float("nan"), "b": 1.0}, 0.0, 1.0, 20.0).keys() == {"a"}


def test_the_roll_call_survives_a_client_without_info(two: dict[str, Any]) -> None:
    app = tampered(empty, "green", "query")
    run = in_process(Settings.parse(two), app)
    assert "green" in next(line for line in read_metrics(run.directory) if line["kind"] == "merge")["failures"]
    with pytest.raises(RunError, match="no party holds green; node 2: refused: a reply without info"):
        in_process(
            Settings.parse({**two, "on-failure": "abort", "min-successful": 0, "run-dir": two["run-dir"] + "2"}), app
        )


class Registered(InProcessGrid):
    """Nodes that are registered under names."""

    names: tuple[str, ...] = ("red", "green", "blue")

    def get_nodes(self) -> Any:
        return [NodeInfo(node_id=node, name=name) for node, name in zip(self.contexts, self.names, strict=True)]


def test_a_registered_node_holds_its_own_task_alone(two: dict[str, Any], folders: list[str]) -> None:
    settings = Settings.parse(two)
    grid = Registered(client_app, 3, settings.as_config())
    grid.contexts[2].node_config = {"data": folders[0]}  # green says that it is red
    run = serve(grid, settings)
    merges = [line for line in read_metrics(run.directory) if line["kind"] == "merge"]
    assert [line["tasks"] for line in merges] == [["red", "blue"]] * 2
    again = Settings.parse({**two, "on-failure": "abort", "min-successful": 0, "run-dir": two["run-dir"] + "2"})
    with pytest.raises(RunError, match=r"node 2 \(green\): refused: it is registered as 'green' and says.* 'red'"):
        serve(grid, again)


# --------------------------------------------------------------------------------------------------- the client's side


def fuzzed(message: Message, changes: list[Callable[[RecordDict], None]]) -> Message:
    content = copy.deepcopy(message.content)
    for change in changes:
        change(content)
    return Message(content, message.metadata.dst_node_id, message.metadata.message_type, group_id="1")


@pytest.fixture
def received(config: dict[str, Any]) -> tuple[Message, Context]:
    """A message that a client was sent to train on, and the client's context."""
    held: list[tuple[Message, Context]] = []

    class Watching(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            if message.metadata.message_type == "train" and not held:
                held.append((copy.deepcopy(message), context))
            return client_app(message, context)

    in_process(Settings.parse({**config, "rounds": 1}), Watching())
    return held[0]


def check_the_client(received: tuple[Message, Context], changes: list[Callable[[RecordDict], None]]) -> None:
    message, context = received
    answer = client_app(fuzzed(message, changes), context)
    if answer.has_error():
        assert "red" in answer.error.reason
        assert answer.error.reason.isprintable()
    elif answer.content.config_records["info"]["needs-base"]:  # of one that it has not
        assert set(answer.content) == {"info", "metrics"}
    else:
        assert set(answer.content) == {"arrays", "info", "metrics"}


@hypothesis_settings(max_examples=40, **QUICK)  # type: ignore[arg-type]
@given(changes=CHANGES)
def test_a_client_answers_any_message_with_an_error_by_name(
    received: tuple[Message, Context], changes: list[Callable[[RecordDict], None]]
) -> None:
    check_the_client(received, changes)


@pytest.mark.slow
@hypothesis_settings(max_examples=1000, **QUICK)  # type: ignore[arg-type]
@given(changes=CHANGES)
def test_a_client_answers_any_of_many_messages(
    received: tuple[Message, Context], changes: list[Callable[[RecordDict], None]]
) -> None:
    check_the_client(received, changes)


def test_a_client_answers_a_kind_of_message_that_it_does_not_know(received: tuple[Message, Context]) -> None:
    message, context = received
    answer = client_app(Message(copy.deepcopy(message.content), 1, "query.nonsense"), context)
    assert answer.error.reason.startswith("red: ValueError")


# ------------------------------------------------------------------------------------------------- going back, files


def test_resume_from_goes_back_and_keeps_what_was_after(config: dict[str, Any]) -> None:
    run = run_loop(Settings.parse({**config, "keep-checkpoints": 0}))
    whole = final(run.directory)
    with pytest.raises(SettingError, match=r"resume-from=7: .* there are 1, 2, 3"):
        run_loop(Settings.parse({**config, "resume": True, "resume-from": 7}))
    with pytest.raises(SettingError, match="resume-from=1: it needs resume=true"):
        Settings.parse({**config, "resume-from": 1})
    back = run_loop(Settings.parse({**config, "resume": True, "resume-from": 1, "keep-checkpoints": 0}))
    assert same(final(back.directory), whole)
    aside = sorted(path.name for path in (run.directory / "set-aside").rglob("*") if path.is_file())
    assert aside == ["metrics.jsonl", "round-00002.safetensors", "round-00003.safetensors"]
    assert [path.stem for path in checkpoints(run.directory)] == ["round-00001", "round-00002", "round-00003"]


def test_the_best_checkpoint_stays_whatever_a_minority_says(config: dict[str, Any]) -> None:
    run = Run(Settings.parse({**config, "rounds": 9, "keep-checkpoints": 1}))
    accuracies = [0.5, 0.9, 0.2, 0.1]
    for number, accuracy in enumerate(accuracies):
        for task in ("red", "green"):
            run.record("evaluation", number, task=task, validation=accuracy)
        run.record("evaluation", number, task="blue", validation=1.0 if number == 3 else 0.0)
        run.advance(torch.zeros(run.layout.size))
    run.close()
    assert [path.stem for path in checkpoints(run.directory)] == ["round-00001", "round-00004"]


def test_a_damaged_line_in_the_middle_is_left_out_and_said(config: dict[str, Any]) -> None:
    run = run_loop(Settings.parse({**config, "rounds": 2}))
    path = run.directory / "metrics.jsonl"
    lines = path.read_text().splitlines()
    damaged = "\n".join([*lines[:3], '{"kind": "tun\x00', "12", *lines[4:]]) + '\n{"kind'
    path.write_text(damaged)
    assert list(read_metrics(run.directory)) == [json.loads(line) for line in [*lines[:3], *lines[4:]]]
    again = run_loop(Settings.parse({**config, "rounds": 3, "resume": True}))
    warnings = [line["text"] for line in read_metrics(again.directory) if line["kind"] == "warning"]
    assert any("lines 4, 5 of metrics.jsonl are damaged and left out; the old file is in" in text for text in warnings)
    assert (run.directory / "set-aside" / "1" / "metrics.jsonl").read_text() == damaged
    assert {line["round"] for line in read_metrics(again.directory)} == {0, 1, 2, 3}


def test_a_run_dir_that_cannot_be_made_is_one_clear_error(config: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SettingError, match="run-dir='.*file' is a file; choose a directory"):
        run_loop(Settings.parse({**config, "run-dir": str(file)}))
    for wrong in (str(file / "run"), "/proc/nothing/run", str(tmp_path / ("x" * 300)), "a\0b"):
        with pytest.raises(SettingError, match="can't be made or written to"):
            run_loop(Settings.parse({**config, "run-dir": wrong}))


def test_a_full_disk_before_the_first_checkpoint_does_not_advise_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="make room and start it again: no round was finished"), told_if_full(tmp_path):
        raise OSError(28, "No space left on device")


def test_three_million_rounds_are_checked_at_once(config: dict[str, Any]) -> None:
    begin = time.monotonic()
    Settings.parse({**config, "rounds": 3_000_000, "participation": "red=2-5, green=7-2000000"})
    assert time.monotonic() - begin < 5


SPANS = st.tuples(st.integers(1, 12), st.one_of(st.none(), st.integers(0, 12)))


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(SPANS, min_size=3, max_size=3), st.integers(1, 14), st.sampled_from([0.2, 0.5, 1.0]), st.booleans())
def test_the_fewest_of_all_rounds_are_those_of_a_walk(
    spans: list[tuple[int, int | None]], rounds: int, fraction: float, replay: bool
) -> None:
    text = ", ".join(
        f"{task}={start}-{'' if more is None else start + more}"
        for task, (start, more) in zip(("mnist", "digits", "icons"), spans, strict=True)
    )
    settings = Settings(
        tasks="mnist,digits,icons", participation=text, rounds=rounds, fraction=fraction, replay=0.5 * replay
    )
    counts = [sum(settings.part_taken(task, n) > 0 for task in settings.client_tasks) for n in range(1, rounds + 1)]
    if 0 in counts:
        with pytest.raises(SettingError, match=f"no task takes part in round {counts.index(0) + 1}$"):
            fewest_tasks(settings)
    else:
        assert fewest_tasks(settings) == min(counts)
