"""Open runs, `tasks="…,*"`: parties that join while the run goes on, and parties that leave it.

In one process: a Grid whose nodes come online and go by the round, registered under names as in a deployment. That the
weights are right is held against a plain loop whose `participation` says beforehand what happened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_folder
from federation import Federation, call, final, in_process, same, wait
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from atm_fl.clients.app import app as client_app
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.report import Record, accuracy_table, write_report
from atm_fl.runs.run import Run
from atm_fl.server.app import serve
from atm_fl.server.deployment import register
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings

NAMES = ("red", "green", "blue")
Spans = dict[str, tuple[int, int]]
"""Name → the round in which its node is online first, and that in which it is not any more."""


class Coming(InProcessGrid):
    """Nodes that are registered under their tasks' names, and are online in some rounds only.

    A message's round tells the time: in the round after that of the last one that was sent, it is later.
    """

    def __init__(self, folders: dict[str, str], spans: Spans, config: dict[str, Any], app: ClientApp) -> None:
        super().__init__(app, len(folders), config)
        self.names = dict(enumerate(folders, 1))
        self.spans, self.now, self.asked = spans, int(config.get("done", 0)), list[str]()
        for context, folder in zip(self.contexts.values(), folders.values(), strict=True):
            context.node_config = {"data": folder}

    def get_nodes(self) -> Iterable[NodeInfo]:
        for node, name in self.names.items():
            first, end = self.spans.get(name, (0, 99))
            if first <= self.now + 1 < end:
                yield NodeInfo(node_id=node, name=name)

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self.asked += [self.names[m.metadata.dst_node_id] for m in sent if m.metadata.message_type == "query"]
        ids = list(super().push_messages(sent))
        if any(message.metadata.message_type == "train" for message in sent):
            self.now = max(int(message.metadata.group_id) for message in sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            message = self._waiting.get(message_id)
            node = message.metadata.dst_node_id if message else 0
            # one that goes with round n is lost in round n, after it was sent its message
            if message and self.spans.get(self.names[node], (0, 99))[1] <= self.now:
                yield Message(Error(ErrorCode.NODE_UNAVAILABLE, "offline"), reply_to=self._waiting.pop(message_id))
            else:
                yield from super().pull_messages([message_id])


@pytest.fixture
def data(folders: list[str]) -> dict[str, str]:
    return dict(zip(NAMES, folders, strict=True))


@pytest.fixture
def opened(config: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """Five rounds that begin with red and green."""
    more: dict[str, Any] = {"rounds": 5, "node-timeout": 0.1, "metric-sinks": ""}
    return {**config, "tasks": f"{data['red']},{data['green']},*", **more}


def play(
    config: dict[str, Any], data: dict[str, str], spans: Spans, app: ClientApp = client_app, done: int = 0
) -> tuple[Run, Coming]:
    settings = Settings.parse(config)
    grid = Coming(data, spans, settings.as_config(), app)
    grid.now = done
    return serve(grid, settings), grid


def lines(directory: str | Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(Path(directory)) if line["kind"] == kind]


def merged(directory: str | Path) -> list[list[str]]:
    return [line["tasks"] for line in lines(directory, "merge")]


def events(directory: str | Path) -> list[tuple[int, str, str]]:
    return [(line["round"], line["task"], line["event"]) for line in lines(directory, "membership")]


def planned(config: dict[str, Any], data: dict[str, str], participation: str, **more: Any) -> dict[str, Any]:
    """The final weights of a plain loop of the same tasks of which all is known before."""
    tasks = ",".join(more.pop("order", data.values()))
    values = {**config, "tasks": tasks, "participation": participation, "run-dir": config["run-dir"] + "-planned"}
    return final(run_loop(Settings.parse({**values, **more})).directory)


# --------------------------------------------------------------------------------------------------- coming and leaving

CHOICES: list[dict[str, Any]] = [
    {},
    {"codec-up": "topk:0.05", "codec-down": "int8", "server-optimizer": "momentum"},
    {"merge": "tsv-m", "private": "*norm*", "keep-optimizer": True, "client-momentum": 0.5},
    {"model": "tiny_resnet", "merge": "ties:density=0.5"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_who_comes_later_takes_part_from_then_on_as_if_it_had_been_planned(
    opened: dict[str, Any], data: dict[str, str], choice: dict[str, Any]
) -> None:
    opened |= choice
    run, _ = play(opened, data, {"blue": (3, 99)})
    assert merged(run.directory) == [["red", "green"]] * 2 + [["red", "green", "blue"]] * 3
    assert events(run.directory) == [(3, "blue", "joined")]
    assert same(final(run.directory), planned(opened, data, "blue=3-"))
    measured = [line["round"] for line in lines(run.directory, "evaluation") if line["task"] == "blue"]
    assert measured == [2, 3, 4, 5]  # the base that it was sent first, and all after it
    assert not any("lost" in key for line in lines(run.directory, "tuning") for key in line)


def test_a_second_party_of_a_task_comes_later_if_the_task_is_named_twice(
    opened: dict[str, Any], data: dict[str, str], tmp_path: Path
) -> None:
    """Nobody else can: it is a warning that says how."""
    red = str(make_folder(tmp_path / "other" / "red", 9, classes=2, images=40))
    held = {**data, "red.2": red}
    known = f"{data['red']},{data['green']},{data['blue']}"
    run, _ = play({**opened, "tasks": f"{known},*"}, held, {"red.2": (3, 99)})
    [warning] = [line["text"] for line in lines(run.directory, "warning")]
    assert "(red.2) cannot join: " in warning
    assert "a second party of a task needs tasks to name it twice" in warning
    twice = {**opened, "tasks": f"{known},{red},*", "on-failure": "skip", "run-dir": opened["run-dir"] + "-twice"}
    run, _ = play(twice, held, {"red.2": (3, 99)})
    tuned = [line["round"] for line in lines(run.directory, "tuning") if line["task"] == "red.2"]
    assert tuned == [3, 4, 5]
    assert events(run.directory) == [(1, "red.2", "is away"), (3, "red.2", "is back")]
    assert not any(line["failures"] for line in lines(run.directory, "merge"))


def test_who_leaves_is_no_failure_and_is_in_again_when_it_is_back(opened: dict[str, Any], data: dict[str, str]) -> None:
    class Twice(Coming):
        """Green is offline in rounds 2 and 3."""

        def get_nodes(self) -> Iterable[NodeInfo]:
            yield from (node for node in super().get_nodes() if node.name != "green" or self.now + 1 not in (2, 3))

    settings = Settings.parse(opened)
    run = serve(Twice(data, {}, settings.as_config(), client_app), settings)
    assert events(run.directory) == [(1, "blue", "joined"), (2, "green", "is away"), (4, "green", "is back")]
    assert merged(run.directory) == [
        ["red", "green", "blue"],
        ["red", "blue"],
        ["red", "blue"],
        ["red", "green", "blue"],
        ["red", "green", "blue"],
    ]
    assert not any(line["failures"] for line in lines(run.directory, "merge"))


@pytest.mark.parametrize("policy", ["abort", "skip"])
def test_who_leaves_within_a_round_is_waited_for_once_and_is_no_failure(
    opened: dict[str, Any], data: dict[str, str], policy: str
) -> None:
    run, _ = play({**opened, "on-failure": policy}, data, {"green": (0, 3)})
    assert events(run.directory) == [(1, "blue", "joined"), (3, "green", "is away")]
    assert merged(run.directory) == [["red", "green", "blue"]] * 2 + [["red", "blue"]] * 3
    assert not any(line["failures"] for line in lines(run.directory, "merge"))
    order = [data["red"], data["green"], data["blue"]]
    assert same(final(run.directory), planned(opened, data, "green=1-2", order=order))


def test_a_run_without_a_name_begins_with_as_many_as_must_succeed(opened: dict[str, Any], data: dict[str, str]) -> None:
    opened |= {"tasks": "*", "min-successful": 2}
    run, _ = play(opened, data, {"red": (4, 99)})
    assert merged(run.directory) == [["blue", "green"]] * 3 + [["blue", "green", "red"]] * 2
    order = [data["blue"], data["green"], data["red"]]
    assert same(final(run.directory), planned(opened, data, "red=4-", order=order, **{"min-successful": 0}))
    with pytest.raises(RunError, match="1 of 2 parties came online within node-timeout=0.1 s"):
        play({**opened, "run-dir": opened["run-dir"] + "-2"}, data, dict.fromkeys(("red", "green"), (9, 99)))


# ------------------------------------------------------------------------------------------------------ kill and resume


class Killed(BaseException):
    """The end of a ServerApp in the midst of a round."""


def killing(number: int, name: str) -> ClientApp:
    """The real ClientApp; when `name` tunes in this round, the server dies."""

    class Killing(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            held = Path(str(context.node_config["data"])).name
            if (message.metadata.message_type, message.metadata.group_id, held) == ("train", str(number), name):
                raise Killed
            return client_app(message, context)

    return Killing()


@pytest.mark.parametrize("number", [2, 3, 4, 5])
@pytest.mark.parametrize("down", ["fp32", "int8"])
def test_a_killed_run_ends_with_the_bits_of_the_unbroken_one(
    opened: dict[str, Any], data: dict[str, str], number: int, down: str
) -> None:
    opened |= {"codec-down": down, "server-optimizer": "adam"}
    spans = {"blue": (3, 99), "red": (0, 5)}
    whole, _ = play({**opened, "run-dir": opened["run-dir"] + "-whole"}, data, spans)
    assert merged(whole.directory)[2:] == [["red", "green", "blue"]] * 2 + [["green", "blue"]]
    with pytest.raises(Killed):
        play(opened, data, spans, killing(number, "green"))
    again, _ = play({**opened, "resume": True}, data, spans, done=number - 1)
    assert same(final(again.directory), final(whole.directory))
    assert merged(again.directory) == merged(whole.directory)
    assert events(again.directory) == events(whole.directory)


def test_who_was_away_is_not_waited_for_on_resume_and_others_are(opened: dict[str, Any], data: dict[str, str]) -> None:
    spans = {"red": (0, 3)}
    play({**opened, "rounds": 3}, data, spans)
    again, grid = play({**opened, "resume": True, "rounds": 4}, data, spans, done=3)
    assert merged(again.directory)[-1] == ["green", "blue"]
    assert grid.asked == ["green", "blue"]
    last, _ = play({**opened, "resume": True}, data, {**spans, "blue": (0, 5)}, done=4)
    assert merged(last.directory)[-1] == ["green"]
    with pytest.raises(RunError, match="1 of 2 parties came online"):  # who is named begins the run
        play({**opened, "run-dir": opened["run-dir"] + "-2"}, data, dict.fromkeys(("red", "blue"), (2, 99)))
    with pytest.raises(RunError, match="roll call: no party holds red"):
        play({**opened, "run-dir": opened["run-dir"] + "-3"}, data, {"red": (2, 99)})


def test_a_run_goes_back_before_a_task_joined(opened: dict[str, Any], data: dict[str, str]) -> None:
    opened |= {"keep-checkpoints": 0}
    play(opened, data, {"blue": (3, 99)})
    again, _ = play({**opened, "resume": True, "resume-from": 1}, data, {"blue": (4, 99)}, done=1)
    assert events(again.directory) == [(4, "blue", "joined")]
    assert same(final(again.directory), planned(opened, data, "blue=4-"))


# ------------------------------------------------------------------------------------------------------ hostile parties


def saying(name: str, change: Callable[[Message, Message], Message], kind: str = "query") -> ClientApp:
    """The real ClientApp; what `name` answers to messages of a kind is changed."""

    class Saying(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            answer = client_app(message, context)
            held = Path(str(context.node_config["data"])).name
            return change(message, answer) if (held, message.metadata.message_type) == (name, kind) else answer

    return Saying()


def claims(task: str) -> Callable[[Message, Message], Message]:
    def change(message: Message, answer: Message) -> Message:
        answer.content.config_records["info"]["task"] = task
        return answer

    return change


def failing(message: Message, answer: Message) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "blue's disk \x1b[31m is broken"), reply_to=message)


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize(
    ("registered", "app", "words"),
    [
        ("blue", saying("blue", claims("red")), "registered as 'blue' and says that it is 'red'"),
        ("blue", saying("blue", claims("gold")), "registered as 'blue' and says that it is 'gold'"),
        ("", saying("blue", claims("gold")), "has to be registered under its task's name"),
        ("", client_app, "has to be registered under its task's name"),
        ("a,b", saying("blue", claims("a,b")), "its name must be of letters"),
        ("*", saying("blue", claims("*")), "its name must be of letters"),
        ("../up", saying("blue", claims("../up")), "its name must be of letters"),
        ("blue", saying("blue", failing), r"blue's disk \\x1b[31m is broken"),
    ],
)
def test_who_cannot_join_is_said_and_touches_nothing(
    opened: dict[str, Any], data: dict[str, str], first: int, registered: str, app: ClientApp, words: str
) -> None:
    settings = Settings.parse(opened)
    grid = Coming(data, {}, settings.as_config(), app)
    grid.names[3] = registered
    grid.spans = {registered: (first, 99)}
    run = serve(grid, settings)
    assert merged(run.directory) == [["red", "green"]] * 5
    assert not events(run.directory)
    [warning] = [line["text"] for line in lines(run.directory, "warning")]
    assert words.replace("\\\\", "\\") in warning
    assert "cannot join" in warning
    assert same(final(run.directory), planned(opened, dict(list(data.items())[:2]), ""))


def test_nobody_takes_the_place_of_one_that_is_there(opened: dict[str, Any], data: dict[str, str]) -> None:
    """Once it has left, a node with a new key under its name is the party."""

    class Renewed(Coming):
        """Of two nodes that are registered as green the second starts in round 2, and anew in round 4, when the first
        has left."""

        def get_nodes(self) -> Iterable[NodeInfo]:
            number = self.now + 1
            for node in super().get_nodes():
                if (node.node_id == 2 and number < 4) or node.node_id == 1:
                    yield node
                elif node.node_id == 3 and number >= 2:
                    yield NodeInfo(node_id=3, name="green", last_activated_at=str(number // 4))

    settings = Settings.parse(opened)
    run = serve(
        Renewed({**data, "blue": data["green"]}, {}, settings.as_config(), client_app),
        settings,
    )
    [warning] = [line["text"] for line in lines(run.directory, "warning")]
    assert warning == "node 3 (green) cannot join: green is there already"
    assert merged(run.directory) == [["red", "green"]] * 5
    assert not events(run.directory)
    assert same(final(run.directory), planned(opened, dict(list(data.items())[:2]), ""))


def test_one_that_never_answers_holds_up_nobody(opened: dict[str, Any], data: dict[str, str]) -> None:
    class Silent(Coming):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            ids = [i for i in message_ids if i in self._waiting and self._waiting[i].metadata.dst_node_id != 3]
            return super().pull_messages(ids)

    settings = Settings.parse(opened)
    run = serve(Silent(data, {"blue": (2, 99)}, settings.as_config(), client_app), settings)
    assert merged(run.directory) == [["red", "green"]] * 5


def test_a_newcomer_is_bound_as_the_others_are(opened: dict[str, Any], data: dict[str, str]) -> None:
    """By `proportion`, and by what a reply may say; on-failure decides."""

    def lie(message: Message, answer: Message) -> Message:
        answer.content.config_records["info"]["task"] = "red"
        return answer

    app = saying("blue", lie, "train")
    run, _ = play({**opened, "on-failure": "skip"}, data, {"blue": (3, 99)}, app)
    assert merged(run.directory) == [["red", "green"]] * 5
    assert [list(line["failures"]) for line in lines(run.directory, "merge")] == [[], [], *[["blue"]] * 3]
    with pytest.raises(RunError, match="round 3: 2 of 3 clients succeeded, 3 needed. blue: refused: task 'red'"):
        play({**opened, "run-dir": opened["run-dir"] + "-2"}, data, {"blue": (3, 99)}, app)


@pytest.mark.parametrize("policy", ["abort", "skip"])
def test_as_many_as_must_succeed_have_to_stay(opened: dict[str, Any], data: dict[str, str], policy: str) -> None:
    opened |= {"min-successful": 2, "on-failure": policy}
    with pytest.raises(RunError, match="round 4: 1 of 3 clients succeeded, 2 needed.*: it has left"):
        play(opened, data, {"red": (0, 3), "green": (0, 4)})
    assert merged(opened["run-dir"])[-1] == ["green", "blue"]
    with pytest.raises(RunError, match="round 2: 0 of 2 clients succeeded, 1 needed"):
        play(
            {**opened, "min-successful": 0, "run-dir": opened["run-dir"] + "-2"},
            data,
            {"blue": (9, 99)} | dict.fromkeys(("red", "green"), (0, 2)),
        )


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"secure-aggregation": True}, "a '*' is not with secure-aggregation=true"),
        ({"dp-client-clip": 1.0}, "a '*' is not with dp-client-clip=1"),
        ({"dp-client-clip": 1.0, "dp-client-noise": 1.0}, "a '*' is not with dp-client-clip=1"),
        ({"fraction": 0.5}, "fraction=0.5: not with tasks="),
        ({"max-update-norm": 1.0}, "max-update-norm=1: not with tasks="),
        ({"merge": "multi-krum:f=0"}, "needs at least 3 tasks, not 1"),
        ({"participation": "blue=3-"}, "participation"),
    ],
)
def test_what_cannot_go_with_unknown_parties_is_refused_by_name(
    opened: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingError, match=words.replace("*", r"\*")):
        Settings.parse({**opened, **more})
    if "merge" in more:
        Settings.parse({**opened, **more, "min-successful": 3})


@pytest.mark.parametrize("runtime", ["plain", "in-process", "ray"])
def test_where_nobody_comes_later_an_open_run_is_refused(
    opened: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, runtime: str
) -> None:
    del opened["node-timeout"]
    file = tmp_path / "run.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in opened.items()))
    assert call(monkeypatch, "run", str(file), "--runtime", runtime) == 2
    assert "participation, as 'pets=3-'" in " ".join(capfd.readouterr().err.split())


def test_a_stranger_that_is_online_does_not_end_a_closed_run(config: dict[str, Any], data: dict[str, str]) -> None:
    """Nor is it asked: it would load its data for nothing."""
    config |= {"tasks": f"{data['red']},{data['green']}", "node-timeout": 0.1}
    run, grid = play(config, data, {})
    assert merged(run.directory) == [["red", "green"]] * 3
    assert grid.asked == ["red", "green"]
    with pytest.raises(RunError, match="1 of 2 parties came online"):  # a stranger is none of them
        play({**config, "run-dir": config["run-dir"] + "-2"}, data, {"green": (9, 99)})


def test_parties_policies_keep_their_meaning(
    opened: dict[str, Any], data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tasks` of its own; `least-parties` counts those that are named, for nobody promises others."""
    for text, words in (('tasks = ["gold"]', "tasks=gold"), ("least-parties = 3", "the run has 2 parties")):
        (tmp_path / "policy.toml").write_text(text)
        settings = Settings.parse({**opened, "run-dir": f"{opened['run-dir']}-{words[:5]}"})
        grid = Coming(data, {"blue": (2, 99)}, settings.as_config(), client_app)
        grid.contexts[3].node_config = {"data": data["blue"], "policy": str(tmp_path / "policy.toml")}
        run = serve(grid, settings)
        assert merged(run.directory) == [["red", "green"]] * 5
        [warning] = [line["text"] for line in lines(run.directory, "warning")]
        assert "refused by this party's policy" in warning
        assert words in warning


@pytest.mark.slow  # a minute of calibration
def test_a_newcomer_by_dp_sgd_has_the_noise_of_all_rounds(opened: dict[str, Any], data: dict[str, str]) -> None:
    """As it does not know how many it has missed: what it spends stays below `dp-epsilon`."""
    opened |= {"privacy": "dp-sgd", "dp-epsilon": 20.0, "batch-size": 32}
    newcomer = Party(Settings.parse(opened), data["blue"])
    named = Party(Settings.parse({**opened, "tasks": ",".join(data.values())}), data["blue"])
    planned = {**opened, "tasks": ",".join(data.values()), "participation": "blue=4-"}
    assert newcomer.budget.noise == named.budget.noise
    assert newcomer.budget.noise > Party(Settings.parse(planned), data["blue"]).budget.noise


# --------------------------------------------------------------------------------------------------- what is told of it


@pytest.mark.usefixtures("report")
def test_the_report_has_a_newcomer_from_its_first_round(opened: dict[str, Any], data: dict[str, str]) -> None:
    run, _ = play({**opened, "metric-sinks": "tensorboard"}, data, {"blue": (3, 99), "red": (0, 5)})
    page = (run.directory / "report.html").read_text()
    assert "round 3: blue joined; round 5: red is away." in page
    record = Record.read(run.directory)
    assert record.tasks == ("red", "green", "blue")
    assert list(record.series("evaluation", "validation", "blue")) == [2, 3, 4, 5]
    settings = Settings.parse(record.settings)
    assert settings.party_names == ("red", "green", "blue")
    assert settings.participations == {"blue": (3, float("inf"))}
    blue = next(row for row in accuracy_table(run.directory, "validation").rows if row.name == "blue")
    assert blue.accuracies[0] is None
    assert blue.accuracies[-1] is not None
    write_report(run.directory)
    board = EventAccumulator(str(run.directory / "tensorboard")).Reload()
    means: dict[int, list[float]] = {}
    for line in lines(run.directory, "evaluation"):
        means.setdefault(line["round"], []).append(line["validation"])
    shown = {event.step: event.value for event in board.Scalars("evaluation/mean/validation")}
    assert shown == pytest.approx({n: sum(values) / len(values) for n, values in means.items()}, abs=1e-6)


def test_a_newcomer_s_low_accuracy_ends_no_run_by_patience(opened: dict[str, Any], data: dict[str, str]) -> None:
    """And what is the best round is told among those that have the same tasks."""

    def tells(value: Callable[[int], float]) -> Callable[[Message, Message], Message]:
        def change(message: Message, answer: Message) -> Message:
            metrics = answer.content.metric_records["metrics"]
            metrics["evaluation.validation"] = value(int(message.metadata.group_id))
            return answer

        return change

    class Told(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            answer = client_app(message, context)
            if message.metadata.message_type in ("train", "evaluate"):
                held, number = Path(str(context.node_config["data"])).name, int(message.metadata.group_id)
                low = 0.0 if held == "blue" else 0.8
                return tells(lambda _: low + 0.01 * number)(message, answer)
            return answer

    run, _ = play({**opened, "patience": 1, "keep-checkpoints": 1}, data, {"blue": (3, 99)}, Told())
    assert run.rounds_done == 5
    assert Record.read(run.directory).best_round("validation") in (4, 5)


# ------------------------------------------------------------------------- a finished run goes on with other tasks

Runtime = Callable[[Settings], Run]
RUNTIMES: dict[str, Runtime] = {"plain": run_loop, "in-process": in_process}


@pytest.mark.parametrize("choice", CHOICES[1:3], ids=str)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_finished_run_goes_on_with_more_tasks_as_if_that_had_been_planned(
    config: dict[str, Any], data: dict[str, str], choice: dict[str, Any], runtime: str
) -> None:
    """The server optimizer's moments, the counters of rounds and all that parties keep go on; then others leave."""
    config |= {**choice, "server-optimizer": "adam", "metric-sinks": ""}
    play_on = RUNTIMES[runtime]
    two = {**config, "tasks": f"{data['red']},{data['green']}", "rounds": 2}
    play_on(Settings.parse(two))
    three = {**two, "tasks": ",".join(data.values()), "rounds": 3, "resume": True}
    play_on(Settings.parse(three))
    run = play_on(Settings.parse({**three, "participation": "green=1-3", "rounds": 4}))
    assert merged(run.directory) == [["red", "green"]] * 2 + [["red", "green", "blue"], ["red", "blue"]]
    assert events(run.directory) == [(3, "blue", "joined")]
    assert not any("lost" in key for line in lines(run.directory, "tuning") for key in line)
    assert same(final(run.directory), planned({**config, "rounds": 4}, data, "blue=3-, green=1-3"))


def test_one_that_is_killed_before_its_first_new_round_goes_on_all_the_same(
    config: dict[str, Any], data: dict[str, str]
) -> None:
    config |= {"metric-sinks": "", "rounds": 2, "tasks": f"{data['red']},{data['green']}"}
    run_loop(Settings.parse(config))
    more = {**config, "tasks": ",".join(data.values()), "rounds": 3, "resume": True}
    Run(Settings.parse(more)).close()
    run = run_loop(Settings.parse(more))
    assert events(run.directory) == [(3, "blue", "joined")]
    assert Record.read(run.directory).settings["participation"] == "blue=3-"
    assert same(final(run.directory), planned({**config, "rounds": 3}, data, "blue=3-"))


def test_secure_sums_go_on_with_one_party_more(config: dict[str, Any], data: dict[str, str], tmp_path: Path) -> None:
    """All know who is in them when the run goes on."""
    grey = str(make_folder(tmp_path / "data" / "grey", 7))
    config |= {"secure-aggregation": True, "dp-client-clip": 1.0, "dp-client-noise": 0.01, "rounds": 1}
    ends = []
    for name, play_on in RUNTIMES.items():
        values = {**config, "run-dir": f"{config['run-dir']}-{name}"}
        play_on(Settings.parse(values))
        more = {"tasks": f"{config['tasks']},{grey}", "rounds": 2, "resume": True}
        ends.append(play_on(Settings.parse({**values, **more})))
    assert merged(ends[0].directory) == [["red", "green", "blue"], ["red", "green", "blue", "grey"]]
    assert same(final(ends[0].directory), final(ends[1].directory))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tasks": "{green},{red},{blue}"}, "holds a run with tasks=.*resume=true takes further tasks behind them"),
        ({"tasks": "{red},{blue}"}, "holds a run with tasks="),
        ({"tasks": "{red}"}, "holds a run with tasks="),
        ({"participation": "green=1-1"}, "participation='', not 'green=1-1'; resume=true takes another for the rounds"),
        ({"participation": "red=2-"}, "holds a run with participation="),
        ({"tasks": "{red},{green},{blue}", "resume": False}, "holds a run with tasks="),
        ({"tasks": "{red},{green},{blue}", "merge": "ties"}, "holds a run with merge="),
    ],
)
def test_what_would_change_rounds_that_are_done_is_refused(
    config: dict[str, Any], data: dict[str, str], more: dict[str, Any], words: str
) -> None:
    config |= {"metric-sinks": "", "rounds": 2, "tasks": f"{data['red']},{data['green']}"}
    run_loop(Settings.parse(config))
    changed = {key: value.format(**data) if isinstance(value, str) else value for key, value in more.items()}
    with pytest.raises(SettingError, match=words):
        run_loop(Settings.parse({**config, "rounds": 4, "resume": True, **changed}))


def test_a_closed_run_goes_on_as_an_open_one(opened: dict[str, Any], data: dict[str, str]) -> None:
    named = opened["tasks"].removesuffix(",*")
    play({**opened, "tasks": named, "rounds": 2}, data, {})
    run, _ = play({**opened, "rounds": 4, "resume": True}, data, {"blue": (4, 99)}, done=2)
    assert events(run.directory) == [(4, "blue", "joined")]
    named += f",{data['blue']}"
    last, _ = play({**opened, "tasks": named, "resume": True}, data, {}, done=4)
    assert merged(last.directory)[-2:] == [["red", "green", "blue"]] * 2
    assert same(final(last.directory), planned(opened, data, "blue=4-"))


# ------------------------------------------------------------------------------------------------- with real processes


@pytest.mark.slow
def test_a_party_is_added_to_a_running_federation_and_another_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blue's key is registered in round 1, green's SuperNode is stopped, and the ServerApp is killed and resumed."""
    folders = [str(make_folder(tmp_path / "data" / name, seed)) for seed, name in enumerate(NAMES)]
    federation = Federation(tmp_path / "f", folders)
    config = {"tasks": "./red,./green,*", "rounds": 40, "batch-size": 8, "device": "cpu", "local-epochs": 4.0}
    config |= {"run-dir": str(tmp_path / "run"), "node-timeout": 60.0, "codec-down": "int8"}
    keys = federation.secrets / "parties"
    (keys / "blue.pub").rename(tmp_path / "blue.pub")
    try:
        federation.start_superlink()
        assert len(list(register(federation.address, federation.secrets / "ca.crt", keys))) == 2
        for name in ("red", "green"):
            federation.start_supernode(name)
        run = federation.run(config)
        run.await_round(1)
        (tmp_path / "blue.pub").rename(keys / "blue.pub")
        list(register(federation.address, federation.secrets / "ca.crt", keys))
        federation.start_supernode("blue")
        wait(lambda: "blue" in merged(run.directory)[-1], "blue's first round")
        federation.processes["green"].terminate()
        federation.processes["green"].wait(120)
        wait(lambda: "green" not in merged(run.directory)[-1], "a round without green")
        federation.apps("superlink", "serverapp")[0].kill()
        assert "the Flower run failed" in run.finish()
        done = len(merged(run.directory))
        assert federation.run({**config, "resume": True, "rounds": done + 2}).finish() == ""
    finally:
        federation.stop()
    (joined, *_), tasks = events(run.directory), merged(run.directory)
    assert joined[1:] == ("blue", "joined")
    assert tasks[joined[0] - 2 :][:2] == [["red", "green"], ["red", "green", "blue"]]
    assert tasks[-3:] == [["red", "blue"]] * 3
    assert not any(line["failures"] for line in lines(run.directory, "merge"))
    assert "blue joined" in (run.directory / "report.html").read_text()
    monkeypatch.setattr(Settings, "part_taken", lambda _, task, number: float(task in tasks[number - 1]))
    again = {**config, "tasks": ",".join(folders), "rounds": done + 2, "run-dir": str(tmp_path / "plain")}
    del again["node-timeout"]
    assert same(final(run.directory), final(run_loop(Settings.parse(again)).directory))
