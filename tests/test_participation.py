"""Which clients are in a round: tasks that are drawn, how many must succeed, several clients of one task."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_folder
from federation import final, in_process, same, tampered
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from atm_fl.clients.app import app as client_app
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.aggregation import mean
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings


def lines(directory: str | Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(Path(directory)) if line["kind"] == kind]


def merged(directory: str | Path) -> list[list[str]]:
    return [line["tasks"] for line in lines(directory, "merge")]


def elsewhere(config: dict[str, Any], name: str = "-other") -> Settings:
    return Settings.parse({**config, "run-dir": config["run-dir"] + name})


# ------------------------------------------------------------------------------------------------------------- fraction


def test_a_fraction_of_the_tasks_is_drawn_for_each_round_by_seed(config: dict[str, Any]) -> None:
    config |= {"fraction": 0.67, "rounds": 12, "validate-every": 5}
    settings = Settings.parse(config)
    drawn = [[task for task in settings.party_names if settings.part_taken(task, n)] for n in range(1, 13)]
    assert {len(tasks) for tasks in drawn} == {2}
    assert len({tuple(tasks) for tasks in drawn}) == 3
    other = Settings.parse({**config, "seed": 1})
    assert drawn != [[task for task in other.party_names if other.part_taken(task, n)] for n in range(1, 13)]
    assert merged(run_loop(settings).directory) == drawn


@pytest.mark.parametrize("codecs", [{}, {"codec-up": "topk:0.05", "codec-down": "int8"}])
def test_runtimes_agree_on_a_fraction_and_a_resume_draws_the_same(
    config: dict[str, Any], codecs: dict[str, str]
) -> None:
    config |= {"fraction": 0.4, "rounds": 5, "validate-every": 3, **codecs}
    run = run_loop(Settings.parse(config))
    assert all(len(tasks) == 1 for tasks in merged(run.directory))
    flower = elsewhere(config)
    in_process(Settings.parse({**flower.as_config(), "rounds": 3}))
    again = in_process(Settings.parse({**flower.as_config(), "resume": True}))
    assert same(final(run.directory), final(again.directory))


def test_who_has_nothing_to_do_is_sent_nothing(config: dict[str, Any]) -> None:
    sent: list[tuple[str, str]] = []

    class Counting(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            batch = list(messages)
            sent.extend((m.metadata.message_type, m.metadata.group_id) for m in batch)
            return super().push_messages(batch)

    settings = Settings.parse({**config, "fraction": 0.34, "rounds": 4, "validate-every": 2})
    serve(Counting(client_app, 3, settings.as_config()), settings)
    trained = [sent.count(("train", str(number))) for number in range(1, 5)]
    assert trained == [3, 1, 3, 1]  # bases 0 and 2 are evaluated by all
    assert sent.count(("evaluate", "4")) == 3


def test_participation_comes_before_the_draw(config: dict[str, Any]) -> None:
    settings = Settings.parse({**config, "fraction": 0.5, "participation": "red=3-", "rounds": 6})
    counts = [[settings.part_taken(t, n) > 0 for t in settings.party_names] for n in range(1, 7)]
    assert [sum(row) for row in counts] == [1, 1, 2, 2, 2, 2]
    assert not any(row[0] for row in counts[:2])


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_fraction_that_cannot_work_is_said(config: dict[str, Any], fraction: float) -> None:
    with pytest.raises(SettingError, match="fraction=.*: it must be above 0 and at most 1"):
        Settings.parse({**config, "fraction": fraction})


def test_a_merge_needs_enough_tasks_in_a_fraction(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="needs at least 3 tasks, not 2"):
        Settings.parse({**config, "fraction": 0.67, "merge": "multi-krum:f=0"})


# ------------------------------------------------------------------------------------------------------- min-successful


def failing(rounds: str, *tasks: str) -> ClientApp:
    """The real ClientApp, which fails in these rounds' training for these tasks."""

    class Failing(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            held = Settings.parse(context.run_config).party_names[int(context.node_config["partition-id"])]
            if held in tasks and message.metadata.message_type == "train" and message.metadata.group_id in rounds:
                return Message(Error(2, "no power"), reply_to=message)
            return client_app(message, context)

    return Failing()


def test_those_that_only_evaluate_do_not_count_as_successes(config: dict[str, Any]) -> None:
    config |= {"participation": "red=2-", "on-failure": "skip", "min-successful": 2}
    with pytest.raises(RunError, match="round 1: 1 of 2 clients succeeded, 2 needed. green: no power"):
        in_process(Settings.parse(config), failing("1", "green"))
    run = in_process(elsewhere(config), failing("1", "red"))  # it would only have evaluated
    assert merged(run.directory)[0] == ["green", "blue"]


def test_a_round_of_fewer_tasks_than_must_succeed_needs_all_of_them(config: dict[str, Any]) -> None:
    config |= {"fraction": 0.34, "on-failure": "skip", "min-successful": 2}
    assert all(len(tasks) == 1 for tasks in merged(in_process(Settings.parse(config)).directory))
    with pytest.raises(RunError, match="0 of 1 clients succeeded, 1 needed"):
        in_process(elsewhere(config), failing("123", "red", "green", "blue"))


# ----------------------------------------------------------------------------------------- several clients of one task


@pytest.fixture
def halves(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The tasks red, held by three clients with 36, 36 and 9 images, and green."""
    red, green = config["tasks"].split(",")[:2]
    more = make_folder(tmp_path / "more" / "red", 7)
    less = make_folder(tmp_path / "less" / "red", 8)
    for label in range(3):
        for number in range(3, 12):
            (less / "train" / f"class{label}" / f"{number}.png").unlink()
    return config | {"tasks": f"{red},{green},{more},{less}", "rounds": 1}


def test_two_clients_of_one_task_with_equal_images_are_their_mean_and_then_one_task(halves: dict[str, Any]) -> None:
    red, green, more, _ = halves["tasks"].split(",")
    settings = Settings.parse({**halves, "tasks": f"{red},{green},{more}"})
    assert settings.party_names == ("red", "green", "red.2")
    run = run_loop(settings)
    start = Run(elsewhere(halves, "-start")).base
    vectors = []
    for folder in (red, more, green):
        arrays = Party(settings, folder).train(start, 1).arrays
        assert arrays is not None
        vectors.append(torch.from_numpy(arrays["values"]).double())
    expected = start.double() + ((vectors[0] + vectors[1]) / 2 + vectors[2]) / 2
    torch.testing.assert_close(run.base.double(), expected, rtol=0, atol=1e-7)
    assert merged(run.directory) == [["red", "green"]]
    assert [line["task"] for line in lines(run.directory, "tuning")] == ["red", "green", "red.2"]


def test_a_clients_weight_within_its_task_is_its_images() -> None:
    random = torch.Generator().manual_seed(0)
    vectors = [torch.randn((1 << 20) + 3, generator=random) for _ in range(3)]
    expected = torch.stack(vectors).double().mul(torch.tensor([[36.0], [36.0], [9.0]]).double()).sum(0) / 81
    assert torch.equal(mean(vectors, [36, 36, 9]), expected.float())
    assert mean(vectors[:1], [9]) is vectors[0]


@pytest.mark.parametrize("codecs", [{}, {"codec-up": "topk:0.05", "codec-down": "int8"}])
def test_runtimes_agree_on_several_clients_of_one_task(halves: dict[str, Any], codecs: dict[str, str]) -> None:
    halves |= {"rounds": 3, "participation": "red=2-", "task-scaling": "red=0.5", **codecs}
    run, flower = run_loop(Settings.parse(halves)), in_process(elsewhere(halves))
    assert same(final(run.directory), final(flower.directory))
    assert merged(run.directory) == merged(flower.directory) == [["green"], ["red", "green"], ["red", "green"]]
    images = {line["task"]: line["images"] for line in lines(flower.directory, "tuning")}
    assert images == {"red": 36, "green": 36, "red.2": 36, "red.3": 9}
    assert not any("residual_lost" in line for line in lines(flower.directory, "tuning"))


def test_parties_of_a_deployment_say_which_task_they_hold(halves: dict[str, Any], tmp_path: Path) -> None:
    """By node config, under the task's name, whatever their folders are called; the run knows no paths."""
    red, green, more, _ = halves["tasks"].split(",")
    north = tmp_path / "red-north"
    shutil.copytree(more, north)
    settings = Settings.parse({**halves, "tasks": "./red,./green,./red"})
    grid = InProcessGrid(client_app, 3, settings.as_config())
    for node, config in enumerate(({"data": red}, {"data": str(north), "task": "red"}, {"data": green}), 1):
        grid.contexts[node].node_config = config
    run = serve(grid, settings)
    assert torch.equal(run.base, run_loop(elsewhere({**halves, "tasks": f"{red},{green},{more}"})).base)


def test_one_of_several_clients_may_fail(halves: dict[str, Any]) -> None:
    halves |= {"on-failure": "skip", "min-successful": 3}
    run = in_process(Settings.parse(halves), failing("1", "red.2"))
    assert lines(run.directory, "merge")[0]["failures"] == {"red.2": "no power"}
    red, green, _, less = halves["tasks"].split(",")
    other = elsewhere({**halves, "tasks": f"{red},{green},{less}"})
    assert torch.equal(run.base, run_loop(other).base)


@pytest.mark.parametrize("images", [0.0, -3.0, float("inf"), float("nan")])
def test_images_that_are_no_weight_are_refused_by_name(halves: dict[str, Any], images: float) -> None:
    def lie(message: Message, reply: Message) -> Message:
        reply.content.metric_records["metrics"]["tuning.images"] = images
        return reply

    with pytest.raises(
        RunError,
        match=r"red: refused: (tuning.images .*, not from 0 |images .*, not the positive number that)",
    ):
        in_process(Settings.parse(halves), tampered(lie, "data/red"))


def test_more_clients_than_the_setting_names_end_the_roll_call(halves: dict[str, Any]) -> None:
    red = halves["tasks"].split(",")[0]
    asked = Settings.parse({**halves, "tasks": f"{red},{red}"})
    there = {**halves, "tasks": f"{red},{red},{red}"}
    with pytest.raises(RunError, match="roll call: nodes 1 and 2 and 3 both hold task 'red'"):
        serve(InProcessGrid(client_app, 3, there), asked)


def test_only_folders_may_be_named_twice(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="names 'mnist' twice; several clients of one task are folders of images"):
        Settings.parse({**config, "tasks": "mnist,mnist", "model": "vit_micro"})
    red = Path(config["tasks"].split(",")[0])
    shutil.copytree(red, red.parent / "red.2")
    with pytest.raises(SettingError, match="twice"):
        Settings.parse({**config, "tasks": f"{red},{red},{red.parent / 'red.2'}"})
