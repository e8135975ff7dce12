"""Whole runs against one hostile side: whatever it sends, the run ends by policy and the honest side keeps its bits.

Hypothesis draws what green's client answers and what a server sends: other contents, names, bytes and sizes, the
replies of other messages, rounds and parties, the same twice, and in another order. All of Flower's own that is left
out is the SuperLink. What the parties tune is remembered, so that thousands of messages take minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain, cycle
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import pytest
from federation import final, in_process, same
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.logger import FLOWER_LOGGER
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_boundary import CHANGES, QUICK, Registered, mutations, raw

from atm_fl import vectors
from atm_fl.clients.app import app as client_app
from atm_fl.clients.app import party_of
from atm_fl.errors import RunError
from atm_fl.federation.client import Party, Update
from atm_fl.federation.loop import play_round
from atm_fl.runs.checkpoints import checkpoints
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.report import write_report
from atm_fl.runs.run import Run
from atm_fl.server import boundary
from atm_fl.server.app import serve
from atm_fl.server.boundary import UNREADABLE
from atm_fl.server.grid import LOST, InProcessGrid
from atm_fl.settings import Settings

ROUNDS = 8
MORE_MEMORY = 96 * 2**20
"""Bytes that hostile runs may take beyond the most that honest ones do: a few of the largest replies, 8 MiB each, and
what Hypothesis and the allocator keep."""
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "steps": {"codec-down": "int8"},
    "secure": {"secure-aggregation": True},
}
Change = Callable[[RecordDict], None]


# ------------------------------------------------------------------------------------------------------ what is drawn


@st.composite
def secret_mutations(draw: st.DrawFn) -> Change:
    """A change to what is told in secure aggregation: its entries, their names, kinds, sizes and order."""
    kind = draw(st.sampled_from(["drop", "swap", "all", "one", "more", "bit", "list"]))
    value = draw(
        st.one_of(st.binary(max_size=200), st.text(max_size=9), st.integers(-9, 9), st.booleans(), st.floats())
    )
    name, place = draw(st.sampled_from(["red", "green", "blue", "nobody", ""])), draw(st.integers(0, 10**4))

    def change(records: RecordDict) -> None:
        for title in ("keys", "shares", "confirm", "sign", "unmask", "sealed", "summed", "signatures", "parties"):
            if title not in records.config_records:
                continue
            record = dict(records.config_records[title])
            names = sorted(record)
            first = names[place % len(names)] if names else name
            if kind == "drop":
                record.pop(first, None)
            elif kind == "swap":
                record = dict(zip(names, [record[other] for other in names[::-1]], strict=True))
            elif kind == "all":
                record = dict.fromkeys(names, value)
            elif kind == "one":
                record[first] = value
            elif kind == "more":
                record |= {f"{name}{number}": value for number in range(place % 50)}
            elif kind == "bit" and isinstance(held := record.get(first), bytes) and held:
                at = place % len(held)
                record[first] = held[:at] + bytes([held[at] ^ 1]) + held[at + 1 :]
            else:
                record[first] = [name] * (place % 7)
            records[title] = ConfigRecord(record)

    return change


@st.composite
def size_mutations(draw: st.DrawFn) -> Change:
    """A change to how much there is."""
    kind = draw(st.sampled_from(["bytes", "arrays", "numbers", "strings", "long", "short"]))
    count = draw(st.integers(1, 400))

    def change(records: RecordDict) -> None:
        if kind == "bytes":
            records["arrays"] = ArrayRecord({"values": raw(bytes(2**23))})
        elif kind == "arrays":
            records["arrays"] = ArrayRecord({f"values-{number}": raw(b"") for number in range(count)})
        elif kind == "numbers":
            records["metrics"] = MetricRecord({f"tuning.{number}": 0.0 for number in range(50 * count)})
        elif kind == "strings":
            records["info"] = ConfigRecord({"task": "x" * 2**20, "base": "x" * count})
        elif "arrays" in records.array_records:
            held = readable(records)
            longer = {name: np.resize(array, len(array) + count) for name, array in held.items() if array.ndim == 1}
            shorter = {name: array[:-1] for name, array in held.items() if array.ndim == 1}
            chosen = longer if kind == "long" else shorter
            records["arrays"] = ArrayRecord({name: Array(array) for name, array in chosen.items()})

    return change


def readable(records: RecordDict) -> dict[str, np.ndarray]:
    """The arrays of a message that another change has left readable, by name."""
    arrays = {}
    for name, array in records.array_records["arrays"].items():
        with suppress(TypeError, ValueError, EOFError):
            arrays[name] = array.numpy()
    return arrays


@st.composite
def direction_mutations(draw: st.DrawFn) -> Change:
    """Another vector of the right form: longer, turned round, of one value."""
    factor = draw(st.sampled_from([-1.0, 0.0, 2.0, 1e4, 1e30, float("nan"), float("-inf")]))

    def change(records: RecordDict) -> None:
        if "arrays" in records.array_records:
            held = readable(records)
            with np.errstate(all="ignore"):
                changed = {name: (array * factor).astype(array.dtype) for name, array in held.items()}
            records["arrays"] = ArrayRecord({name: Array(array) for name, array in changed.items()})

    return change


ANY_CHANGE = st.one_of(mutations(), secret_mutations(), size_mutations(), direction_mutations())


class Deed:
    """One thing that green's client does with one message, in place of answering it."""

    def __init__(self, kind: str, changes: list[Change], number: int, text: str) -> None:
        self.kind, self.changes, self.number, self.text = kind, changes, number, text

    def replies(self, message: Message, honest: Message, past: list[RecordDict]) -> list[Message]:
        """What comes of it: replies, of which the first is the one, or one of the exceptions of unreadable bytes."""
        if self.kind == "unreadable":
            raise UNREADABLE[self.number % len(UNREADABLE)](self.text)
        if self.kind == "error":
            codes = [ErrorCode.UNKNOWN, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, *LOST]
            return [Message(Error(codes[self.number % len(codes)], self.text), reply_to=message)]
        if honest.has_error():
            return [honest]
        content = copy.deepcopy(honest.content)
        if self.kind == "replay" and past:
            content = copy.deepcopy(past[self.number % len(past)])
        if self.kind in ("change", "twice"):
            for change in self.changes:
                change(content)
        reply = Message(content, reply_to=message)
        if self.kind == "metadata":
            names = ("src_node_id", "dst_node_id", "message_type", "group_id", "reply_to_message_id", "ttl", "run_id")
            name = names[self.number % len(names)]
            held = getattr(reply.metadata, name)
            reply.metadata.__dict__[f"_{name}"] = self.text if isinstance(held, str) else self.number
        return [reply, reply, honest] if self.kind == "twice" else [reply]


HONEST = Deed("answer", [], 0, "")
"""To the roll call mostly: who is not there does nothing more."""
DEEDS = st.builds(
    Deed,
    st.sampled_from(["change"] * 6 + ["replay"] * 3 + ["twice", "error", "unreadable", "metadata"]),
    st.lists(ANY_CHANGE, min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.text(max_size=30),
)


# ------------------------------------------------------------------------------------------------- what it is done to


class HostileGrid(Registered):
    """A Grid on which green's client does one deed after another, and replies come in the order of `waits`. All are
    registered by their names, as in a deployment.

    heard: by round the last of green's task vectors that the server was handed, as it was sent.
    """

    def __init__(self, settings: Settings, deeds: Iterable[Deed], waits: list[int]) -> None:
        # The clients' settings are the same in all runs, so that they keep what they have loaded.
        super().__init__(client_app, 3, settings.as_config() | {"run-dir": "runs/fuzz"})
        called, *others = deeds
        self._deeds, self._waits = chain([called], cycle(others or [called])), cycle(waits)
        self._left: dict[str, int] = {}
        self._past: list[RecordDict] = []
        self.heard: dict[int, dict[str, np.ndarray] | None] = {}
        self.done = 0
        """Deeds so far."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in message_ids:
            left = self._left.setdefault(message_id, next(self._waits))
            self._left[message_id] -= 1
            if left > 0 or message_id not in self._waiting:
                continue
            message = self._waiting.pop(message_id)
            node = message.metadata.dst_node_id
            reply = self._app(message, self.contexts[node])
            replies = [reply]
            if node == 2:
                deed = next(self._deeds)
                self.done += deed is not HONEST
                replies = deed.replies(message, reply, self._past)
            if not reply.has_error():
                self._past = [*self._past[-20:], copy.deepcopy(reply.content)]
            if node == 2 and message.metadata.message_type == "train":
                self._hear(message, replies[0])
            yield from replies

    def _hear(self, message: Message, reply: Message) -> None:
        number = int(message.content.config_records["info"]["round"])  # type: ignore[arg-type]
        self.heard[number] = None
        record = None if reply.has_error() else reply.content.array_records.get("arrays")
        if record is not None:
            try:
                self.heard[number] = {name: array.numpy().copy() for name, array in record.items()}
            except Exception:  # no arrays, which the server has to see for itself
                self.heard[number] = None


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Update]:
    """Every update that was ever tuned, as it is before masks, by client, base, round and settings; tuned once.

    And pytest, which else keeps all that is logged, hears nothing of Flower's.
    """
    monkeypatch.setattr(FLOWER_LOGGER, "propagate", False)
    known: dict[Any, Update] = {}
    train = Party.train

    def recalled(self: Party, base: Any, round_number: int, run: str = "") -> Update:
        key = self.client, vectors.digest(base), round_number, self.settings.secure_aggregation
        if key not in known:
            known[key] = train(self, base, round_number, run)
            for old in list(known)[:-200]:
                del known[old]
        return copy.deepcopy(known[key])

    monkeypatch.setattr(Party, "train", recalled)
    return known


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """A list of one number: the most bytes that were resident while the body ran."""
    process, over, most = psutil.Process(), Event(), [0]

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], process.memory_info().rss)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def drawn_before(strategy: st.SearchStrategy[Any]) -> None:
    """Draw from a strategy, so that Hypothesis has made its tables, which take 180 MiB while they are made."""

    @hypothesis_settings(max_examples=50, **QUICK)  # type: ignore[arg-type]
    @given(strategy)
    def draw(_: object) -> None:
        pass

    draw()


class Fuzz:
    """One scenario's runs: what honest ones come to, and the check of one with a hostile client."""

    def __init__(self, config: dict[str, Any], scenario: str) -> None:
        self.config = {**config, **SCENARIOS[scenario], "rounds": ROUNDS, "metric-sinks": "", "keep-checkpoints": 0}
        self.config |= {"on-failure": "skip", "min-successful": 2}
        self.runs, self.replies = 0, 0
        self._served([], "abort")
        self.without = final(self._served([Deed("error", [], 0, "gone")], "skip").directory)

    def _settings(self, policy: str, **more: Any) -> Settings:
        self.runs += 1
        settings = self.config | {"run-dir": f"{self.config['run-dir']}-{self.runs}", "on-failure": policy}
        return Settings.parse(settings | ({} if policy == "skip" else {"min-successful": 0}) | more)

    def _served(self, deeds: list[Deed], policy: str) -> Run:
        settings = self._settings(policy)
        return serve(
            HostileGrid(settings, deeds, [0]) if deeds else InProcessGrid(client_app, 3, settings.as_config()), settings
        )

    def check(self, deeds: list[Deed], waits: list[int], policy: str) -> None:
        """Run, and look at all that is left of it."""
        settings = self._settings(policy)
        grid = HostileGrid(settings, deeds, waits)
        try:
            serve(grid, settings)
            message = ""
        except RunError as error:
            message = str(error)
        self.replies += grid.done
        self._check_error(message, settings)
        self._check_files(Path(settings.run_dir), message)
        hostile = range(1, len(checkpoints(Path(settings.run_dir))) + 1)
        self._check_weights(settings, grid, hostile, bool(message))
        if policy == "abort" and message and checkpoints(Path(settings.run_dir)):
            resumed = Settings.parse(settings.as_config() | {"resume": True})
            serve(InProcessGrid(client_app, 3, resumed.as_config()), resumed)
            assert len(checkpoints(Path(settings.run_dir))) == ROUNDS
            self._check_weights(settings, grid, hostile, True)  # it goes on with an honest green
        if self.runs % 40 == 0 and (Path(settings.run_dir) / "config.json").exists():
            write_report(Path(settings.run_dir))

    def _check_error(self, message: str, settings: Settings) -> None:
        """A run that may skip ends; one that may not names green. A spoilt sum alone has no name."""
        assert message.isprintable()
        assert len(message) < 2000
        if message:
            spoilt = settings.secure_aggregation and "whoever spoiled it" in message
            assert spoilt or (settings.on_failure == "abort" and ("green" in message or "node 2" in message)), message

    def _check_files(self, directory: Path, message: str) -> None:
        """No finished round is lost, and nothing strange is in the files."""
        text = (directory / "metrics.jsonl").read_text() if (directory / "metrics.jsonl").exists() else ""
        assert len(text) < 100_000
        lines = [line for line in read_metrics(directory) if line["kind"] == "merge"] if text else []
        done = [path.stem for path in checkpoints(directory)]
        assert [line["round"] for line in lines] == list(range(1, len(lines) + 1))
        assert done == [f"round-{number:05d}" for number in range(1, len(lines) + 1)]
        assert message or len(lines) == ROUNDS
        assert all({"red", "blue"} <= set(line["tasks"]) for line in lines)

    def _check_weights(self, settings: Settings, grid: HostileGrid, hostile: range, failed: bool) -> None:
        """Those of a run without green, or of the honest vectors and what green's client sent in `hostile` rounds."""
        directory = Path(settings.run_dir)
        if not checkpoints(directory):
            return
        merges = [line for line in read_metrics(directory) if line["kind"] == "merge"]
        if not failed and not any("green" in line["tasks"] for line in merges):
            assert same(final(directory), self.without)
        if settings.secure_aggregation:
            return  # what green's masked words stand for nobody knows
        replayed = self._settings("skip")
        with closing(Run(replayed)) as run:
            parties = {name: party_of(grid.contexts[node]) for node, name in enumerate(("red", "green", "blue"), 1)}
            for line in merges:
                number = line["round"]
                updates = []
                for name in line["tasks"]:
                    if name == "green" and number in hostile:
                        arrays = grid.heard[number]
                        assert arrays is not None
                        updates.append((name, Update(arrays, {}, {})))
                    else:
                        updates.append((name, parties[name].train(run.base, number)))
                play_round(run, updates)
        assert same(final(directory), final(replayed.run_dir))


def hostile_runs(fuzz: Fuzz, examples: int) -> None:
    """Check so many runs, each with other deeds."""

    @hypothesis_settings(max_examples=examples, **QUICK)  # type: ignore[arg-type]
    @given(
        st.one_of([st.just(HONEST)] * 5 + [DEEDS]),
        st.lists(DEEDS, min_size=ROUNDS + 2, max_size=ROUNDS + 2),
        st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=7, max_size=7),
        st.sampled_from(["skip", "skip", "skip", "abort"]),
    )
    def check(called: Deed, deeds: list[Deed], waits: list[int], policy: str) -> None:
        fuzz.check([called, *deeds], waits, policy)

    check()


def fuzz_the_server(config: dict[str, Any], examples: int, scenarios: Iterable[str]) -> int:
    """Play `examples` runs of each scenario, with bounded memory; how many replies were tampered with."""
    drawn_before(DEEDS)
    replies = 0
    for scenario in scenarios:
        with most_memory() as honest:
            fuzz = Fuzz({**config, "run-dir": f"{config['run-dir']}-{scenario}"}, scenario)
        with most_memory() as hostile:
            hostile_runs(fuzz, examples)
        print(
            f"{scenario}: {fuzz.replies} replies; {honest[0] >> 20} MiB of honest runs, {hostile[0] >> 20} of hostile"
        )
        assert hostile[0] < honest[0] + MORE_MEMORY
        replies += fuzz.replies
    return replies


@pytest.mark.slow
@pytest.mark.usefixtures("remembered")
def test_whatever_a_client_sends_a_run_ends_by_policy_with_the_honest_bits(config: dict[str, Any]) -> None:
    assert fuzz_the_server(config, 2, SCENARIOS) >= 40


@pytest.mark.slow
@pytest.mark.usefixtures("remembered")
def test_whatever_many_clients_send_runs_end_by_policy_with_the_honest_bits(config: dict[str, Any]) -> None:
    assert fuzz_the_server(config, 120, SCENARIOS) >= 2000


# --------------------------------------------------------------------------------------------------- a hostile server


class Sent:
    """All messages that red's client is sent in an honest run, with its context."""

    def __init__(self, settings: Settings) -> None:
        self.messages: list[Message] = []
        self.context: Context
        sent = self

        class Watching(ClientApp):
            def __call__(self, message: Message, context: Context) -> Message:
                if context.node_config["partition-id"] == 0:
                    sent.messages.append(copy.deepcopy(message))
                    sent.context = context
                return client_app(message, context)

        in_process(settings, Watching())


RECORDS = {"arrays", "info", "metrics", "keys", "shares", "confirm", "sign", "unmask"}


class HostileServer:
    """Speaks to red's real client; counts what it sent. `known`: the true updates, before masks."""

    def __init__(self, config: dict[str, Any], known: dict[Any, Update]) -> None:
        self.known, self.count = known, 0
        self.runs = [
            Sent(Settings.parse({**config, **SCENARIOS[name], "rounds": 2, "run-dir": f"{config['run-dir']}-{name}"}))
            for name in SCENARIOS
        ]
        self.honest = [self._trained(run) for run in self.runs[:1]]

    def _trained(self, run: Sent) -> Message:
        message = next(actual for actual in run.messages if actual.metadata.message_type == "train")
        return client_app(_again(message), run.context)

    def check(self, steps: list[tuple[int, int, list[Change], str]]) -> None:
        """Send messages of any run, in any order, changed; each has an answer that tells what it may, and no more."""
        for whose, which, changes, kind in steps:
            run = self.runs[whose % len(self.runs)]
            message = _again(run.messages[which % len(run.messages)], kind)
            for change in changes:
                change(message.content)
            self.count += 1
            answer = client_app(message, run.context)
            self._check_answer(answer, secure=whose % len(self.runs) == 2)
            for over in (message, answer):  # a real client's process answers one message and ends
                boundary.forget(over)
        again = self._trained(self.runs[0])
        assert not again.has_error()
        expected = self.honest[0].content.array_records["arrays"]
        for name, array in again.content.array_records["arrays"].items():
            assert np.array_equal(array.numpy(), expected[name].numpy())

    def _check_answer(self, answer: Message, secure: bool) -> None:
        if answer.has_error():
            assert "red" in answer.error.reason
            assert answer.error.reason.isprintable()
            assert len(answer.error.reason) < 600
            return
        assert set(answer.content) <= RECORDS
        assert answer.content.config_records["info"]["task"] == "red"
        words = answer.content.array_records.get("arrays") if secure else None
        for array in (words or {}).values():
            sent = array.numpy()
            assert not any(np.array_equal(sent, update.arrays["words"]) for update in self._true())

    def _true(self) -> list[Any]:
        return [update for update in self.known.values() if update.arrays and "words" in update.arrays]


def _again(message: Message, kind: str = "") -> Message:
    content = copy.deepcopy(message.content)
    return Message(content, 1, kind or message.metadata.message_type, group_id="1")


KINDS = ["", "", "", "", "query", "train", "evaluate", "query.keys", "query.shares", "query.confirm", "query.sign"]
STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 60),
        st.one_of(st.just([]), CHANGES, st.lists(ANY_CHANGE, min_size=1, max_size=2)),
        st.sampled_from([*KINDS, "query.unmask", "query.nonsense"]),
    ),
    min_size=3,
    max_size=8,
)


def fuzz_the_client(config: dict[str, Any], known: dict[Any, Update], examples: int) -> int:
    """Play `examples` sequences of messages to a client, with bounded memory; how many messages."""
    drawn_before(STEPS)
    with most_memory() as honest:
        server = HostileServer(config, known)

    @hypothesis_settings(max_examples=examples, **QUICK)  # type: ignore[arg-type]
    @given(STEPS)
    def check(steps: list[tuple[int, int, list[Change], str]]) -> None:
        server.check(steps)

    with most_memory() as hostile:
        check()
    print(f"{server.count} messages; {honest[0] >> 20} MiB of honest ones, {hostile[0] >> 20} MiB of hostile ones")
    assert hostile[0] < honest[0] + MORE_MEMORY
    return server.count


def test_whatever_a_server_sends_a_client_answers_and_tells_no_more(
    config: dict[str, Any], remembered: dict[Any, Update]
) -> None:
    assert fuzz_the_client(config, remembered, 50) >= 200


@pytest.mark.slow
def test_whatever_many_servers_send_a_client_answers_and_tells_no_more(
    config: dict[str, Any], remembered: dict[Any, Update]
) -> None:
    assert fuzz_the_client(config, remembered, 500) >= 2000
