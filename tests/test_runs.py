"""Whole runs: equal runtimes, resume, run directories, failures."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import final, in_process, replace_info, same, tampered
from flwr.app import Array, ArrayRecord, Message
from flwr.clientapp import ClientApp

from atm_fl.clients.app import app as client_app
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.loop import run_loop
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_plain_loop_and_in_process_grid_end_with_the_same_bits(config: dict[str, Any], optimizer: str) -> None:
    config["optimizer"] = optimizer
    plain, flower = (Settings.parse({**config, "run-dir": config["run-dir"] + name}) for name in ("-plain", "-flower"))
    run_loop(plain)
    in_process(flower)
    assert same(final(plain.run_dir), final(flower.run_dir))
    lines = [
        [
            {key: value for key, value in line.items() if key != "time" and not key.startswith("seconds")}
            for line in read_metrics(Path(s.run_dir))
        ]
        for s in (plain, flower)
    ]
    assert lines[0] == lines[1]


def test_training_helps_every_task(settings: Settings) -> None:
    run = run_loop(dataclasses.replace(settings, rounds=6))
    lines = list(read_metrics(run.directory))
    assert sorted({line["round"] for line in lines if line["kind"] == "evaluation"}) == list(range(7))
    losses: dict[str, list[float]] = {}
    for line in lines:
        if line["kind"] == "tuning":
            losses.setdefault(line["task"], []).append(line["loss"])
    assert all(len(actual) == 6 and actual[-1] < actual[0] for actual in losses.values())


def test_every_client_and_round_has_its_own_seed_and_the_run_seed_matters(config: dict[str, Any]) -> None:
    first = run_loop(Settings.parse(config)).base
    again = run_loop(Settings.parse({**config, "run-dir": config["run-dir"] + "2"})).base
    other = run_loop(Settings.parse({**config, "run-dir": config["run-dir"] + "3", "seed": 1})).base
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("runtime", [run_loop, in_process])
def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(
    config: dict[str, Any], runtime: Callable[[Settings], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = runtime(Settings.parse({**config, "run-dir": config["run-dir"] + "-unbroken"}))

    class Killed(BaseException):
        pass

    advance = Run.advance

    def die_after_round_two(run: Run, *moved: Any) -> None:
        if run.rounds_done == 2:
            raise Killed
        advance(run, *moved)

    monkeypatch.setattr(Run, "advance", die_after_round_two)
    with pytest.raises(Killed):
        runtime(Settings.parse(config))
    monkeypatch.setattr(Run, "advance", advance)
    resumed = runtime(Settings.parse({**config, "resume": True}))
    assert same(final(unbroken.directory), final(resumed.directory))
    keys = [
        [(line["kind"], line["round"], line.get("task")) for line in read_metrics(r.directory)]
        for r in (unbroken, resumed)
    ]
    assert keys[0] == keys[1]


def test_resume_extends_a_finished_run(config: dict[str, Any]) -> None:
    longer = run_loop(Settings.parse({**config, "rounds": 5, "run-dir": config["run-dir"] + "-longer"}))
    run_loop(Settings.parse(config))
    extended = run_loop(Settings.parse({**config, "rounds": 5, "resume": True}))
    assert same(final(longer.directory), final(extended.directory))


def test_a_damaged_checkpoint_is_passed_over_and_said(config: dict[str, Any]) -> None:
    whole = run_loop(Settings.parse(config))

    def warnings() -> list[str]:
        return [line["text"] for line in read_metrics(whole.directory) if line["kind"] == "warning"]

    expected = final(whole.directory)
    newest = sorted(whole.directory.glob("checkpoint/*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    run_loop(Settings.parse({**config, "resume": True}))
    assert any("round-00003.safetensors is damaged" in text for text in warnings())
    assert same(final(whole.directory), expected)

    flipped = bytearray(newest.read_bytes())
    flipped[-5] ^= 1
    newest.write_bytes(bytes(flipped))
    run_loop(Settings.parse({**config, "resume": True}))
    assert any("digest does not match" in text for text in warnings())
    assert same(final(whole.directory), expected)

    for path in whole.directory.glob("checkpoint/*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(RunError, match="no whole checkpoint"):
        run_loop(Settings.parse({**config, "resume": True}))


def test_run_directories_are_not_mixed_up(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="resume=true, but run-dir=.* holds no checkpoint"):
        run_loop(Settings.parse({**config, "resume": True}))
    run_loop(Settings.parse(config))
    with pytest.raises(SettingError, match="holds a run already"):
        run_loop(Settings.parse(config))
    with pytest.raises(SettingError, match=r"holds a run with learning-rate=0.001, not 0.5"):
        run_loop(Settings.parse({**config, "resume": True, "learning-rate": 0.5}))


def test_ph_atm_starts_from_a_merged_model_and_tunes_on_validation(config: dict[str, Any]) -> None:
    merged = run_loop(Settings.parse({**config, "rounds": 1, "local-epochs": 3}))
    refine = {"start": str(merged.directory), "split": "validation", "run-dir": config["run-dir"] + "-ph"}
    run = run_loop(Settings.parse({**config, **refine, "rounds": 2}))
    lines = list(read_metrics(run.directory))
    before = {
        line["task"]: line["test"] for line in read_metrics(merged.directory) if line["round"] == 1 and "test" in line
    }
    assert {line["task"]: line["test"] for line in lines if line["round"] == 0} == before
    assert {line["images"] for line in lines if line["kind"] == "tuning"} == {10}  # of 12: a fifth is held out


def test_heads_outlive_a_restart(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from atm_fl.federation import client

    settings = Settings.parse(config)
    first = client.Party(settings, settings.task_names[0]).head.weight
    monkeypatch.setattr("atm_fl.models.heads.features", lambda *_: pytest.fail("the head was made again"))
    assert torch.equal(client.Party(settings, settings.task_names[0]).head.weight, first)


def test_a_failing_client_aborts_the_run_by_name_and_keeps_what_was_done(config: dict[str, Any]) -> None:
    def fail_in_round_two(message: Message, reply: Message) -> Message:
        if message.content.config_records["info"]["round"] == 2:
            from flwr.app import Error

            return Message(Error(2, "the disk is full"), reply_to=message)
        return reply

    settings = Settings.parse(config)
    with pytest.raises(RunError, match=r"round 2: 2 of 3 clients succeeded, 3 needed. green: the disk is full"):
        in_process(settings, tampered(fail_in_round_two, "green"))
    resumed = in_process(Settings.parse({**config, "resume": True}))
    unbroken = in_process(Settings.parse({**config, "run-dir": config["run-dir"] + "-unbroken"}))
    assert same(final(resumed.directory), final(unbroken.directory))


def replace_vector(values: np.ndarray) -> Callable[[Message, Message], Message]:
    def change(message: Message, reply: Message) -> Message:
        reply.content["arrays"] = ArrayRecord({"values": Array(values)})
        return reply

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace_vector(np.zeros(7, np.float32)), "green: refused: float32"),
        (replace_info("layout", "0123"), "green: refused: layout '0123', not"),
        (replace_info("base", "4567"), "green: refused: base '4567', not"),
        (replace_info("codec", "fp1"), "green: refused: codec 'fp1'"),
        (replace_info("task", "red"), "green: refused: task 'red', not 'green'"),
    ],
)
def test_replies_that_do_not_belong_are_refused_by_name(
    settings: Settings, change: Callable[[Message, Message], Message], words: str
) -> None:
    with pytest.raises(RunError, match=words):
        in_process(settings, tampered(change, "green"))


@pytest.mark.parametrize("record", ["arrays", "info", "metrics"])
def test_a_malformed_reply_is_refused_by_name(settings: Settings, record: str) -> None:
    def drop(message: Message, reply: Message) -> Message:
        del reply.content[record]
        return reply

    with pytest.raises(RunError, match=r"round 1: 2 of 3 clients succeeded, 3 needed. green: refused"):
        in_process(settings, tampered(drop, "green"))


def test_a_vector_that_is_not_finite_is_refused_by_name(settings: Settings) -> None:
    def poison(message: Message, reply: Message) -> Message:
        values = reply.content.array_records["arrays"]["values"].numpy().copy()
        values[3] = np.inf
        return replace_vector(values)(message, reply)

    with pytest.raises(RunError, match="green: refused: a value that is not finite"):
        in_process(settings, tampered(poison, "green"))


def test_skip_goes_on_without_the_failing_client(config: dict[str, Any]) -> None:
    drop = tampered(replace_info("base", "0"), "green")
    settings = Settings.parse({**config, "on-failure": "skip", "min-successful": 2})
    run = in_process(settings, drop)
    merged = [line for line in read_metrics(run.directory) if line["kind"] == "merge"]
    assert [line["tasks"] for line in merged] == [["red", "blue"]] * 3
    assert "base '0', not" in merged[0]["failures"]["green"]
    assert any("goes on without green" in line.get("text", "") for line in read_metrics(run.directory))
    strict = Settings.parse({**config, "on-failure": "skip", "min-successful": 3, "run-dir": config["run-dir"] + "2"})
    with pytest.raises(RunError, match="2 of 3 clients succeeded"):
        in_process(strict, drop)


def test_skip_alone_goes_on_with_the_one_client_that_is_left_and_not_with_none(config: dict[str, Any]) -> None:
    def drop(*names: str) -> ClientApp:
        return tampered(replace_info("base", "0"), names)

    run = in_process(Settings.parse({**config, "on-failure": "skip"}), drop("green", "red"))
    merged = [line for line in read_metrics(run.directory) if line["kind"] == "merge"]
    assert [line["tasks"] for line in merged] == [["blue"]] * 3
    nobody = Settings.parse({**config, "on-failure": "skip", "run-dir": config["run-dir"] + "2"})
    with pytest.raises(RunError, match="0 of 3 clients succeeded, 1 needed"):
        in_process(nobody, drop("green", "red", "blue"))


def test_skip_goes_on_without_a_party_that_fails_the_roll_call(config: dict[str, Any], folders: list[str]) -> None:
    shutil.rmtree(folders[1])
    run = in_process(Settings.parse({**config, "on-failure": "skip", "min-successful": 2}))
    merged = [line for line in read_metrics(run.directory) if line["kind"] == "merge"]
    assert merged[0]["tasks"] == ["red", "blue"]
    assert merged[0]["failures"] == {"green": "no party at the roll call"}
    all_needed = {**config, "on-failure": "skip", "min-successful": 3, "run-dir": config["run-dir"] + "2"}
    with pytest.raises(RunError, match="no party holds green"):
        in_process(Settings.parse(all_needed))


def test_a_run_directory_serves_one_process_at_a_time(config: dict[str, Any]) -> None:
    run = Run(Settings.parse(config))
    with pytest.raises(RunError, match="is in use by another process"):
        Run(Settings.parse(config))
    run.close()
    Run(Settings.parse(config)).close()


def test_the_roll_call_finds_bad_data_before_the_first_round(config: dict[str, Any], folders: list[str]) -> None:
    shutil.rmtree(Path(folders[1]) / "val")
    with pytest.raises(RunError, match="no party holds green; .*has no folder 'val'"):
        in_process(Settings.parse(config))
    assert not list(Path(config["run-dir"]).glob("checkpoint/*"))


def test_two_clients_with_one_task_are_refused(config: dict[str, Any], folders: list[str]) -> None:
    settings = Settings.parse(config)
    grid = InProcessGrid(client_app, 3, settings.as_config())
    grid.contexts[2].node_config = {"data": folders[0]}  # as a SuperNode's --node-config would say it
    with pytest.raises(RunError, match="nodes 1 and 2 both hold task 'red'"):
        serve(grid, settings)


def test_a_node_says_by_its_config_which_task_it_holds(config: dict[str, Any], folders: list[str]) -> None:
    settings = Settings.parse(config)
    grid = InProcessGrid(client_app, 3, settings.as_config())
    for node, folder in zip((3, 1, 2), folders, strict=True):
        grid.contexts[node].node_config = {"data": folder}
    run = serve(grid, settings)
    assert torch.equal(run.base, run_loop(Settings.parse({**config, "run-dir": config["run-dir"] + "2"})).base)


def test_too_few_parties_end_the_run_in_bounded_time(config: dict[str, Any]) -> None:
    settings = Settings.parse({**config, "node-timeout": 0.3})
    with pytest.raises(RunError, match="2 of 3 parties came online within node-timeout=0.3 s"):
        serve(InProcessGrid(client_app, 2, settings.as_config()), settings)


@pytest.mark.usefixtures("report")
def test_config_json_says_what_decides_the_result(settings: Settings) -> None:
    run = run_loop(dataclasses.replace(settings, rounds=1))
    actual = json.loads((run.directory / "config.json").read_text())
    assert actual["settings"]["learning-rate"] == settings.learning_rate
    assert actual["versions"]["torch"] == version("torch")
    assert actual["elements"] == run.layout.size
    assert (run.directory / "report.html").exists()
    assert list((run.directory / "tensorboard").iterdir())


@pytest.mark.slow
def test_ray_simulation_ends_with_the_same_bits(tmp_path: Path) -> None:
    from atm_fl.server.simulation import run_simulation

    config = {"tasks": "digits,mnist", "rounds": 2, "local-epochs": 1}
    plain, ray = (Settings.parse({**config, "run-dir": str(tmp_path / name)}) for name in ("plain", "ray"))
    run_loop(plain)
    run_simulation(ray, Path(__file__).parents[1])
    assert same(final(plain.run_dir), final(ray.run_dir))


@pytest.mark.slow
def test_a_failed_ray_run_is_an_error_that_says_why(tmp_path: Path) -> None:
    from atm_fl.server.simulation import run_simulation

    settings = Settings.parse({"tasks": f"digits,{tmp_path}/nothing", "rounds": 1, "run-dir": str(tmp_path / "run")})
    with pytest.raises(RunError, match="no party holds nothing.*does not exist on this machine"):
        run_simulation(settings, Path(__file__).parents[1])
