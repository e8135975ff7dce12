"""Whole runs over the wire: codecs both ways, steps instead of bases, and what clients keep on their disks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import final, in_process, replace_info, same, tampered
from flwr.app import Array, ArrayRecord, Context, Error, Message
from flwr.clientapp import ClientApp
from safetensors import safe_open
from safetensors.torch import save_file

from atm_fl import tasks, vectors
from atm_fl.clients.app import app as client_app
from atm_fl.codecs import CODECS, make_codec, size_of
from atm_fl.errors import RunError, SettingError
from atm_fl.federation import client_state
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.loop import run_loop
from atm_fl.runs.checkpoints import load_checkpoint
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.settings import Settings

SPARSE = "topk:density=0.05"
PAIRS = [
    *[(up, "fp32") for up in CODECS],
    *[("fp32", down) for down in CODECS if down != "fp32"],
    ("topk:density=0.05", "int8"),
    ("int4", "topk:density=0.2"),
    ("low-rank:rank=2", "low-rank:rank=4"),
    ("int8", "int8"),
]


def lines(run: Run, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.directory) if line["kind"] == kind]


def disk(run: Run, task: str) -> Path:
    """The folder of one client's files."""
    return ClientState(run.id, task).folder


@pytest.mark.parametrize(("up", "down"), PAIRS)
def test_plain_loop_and_in_process_grid_end_with_the_same_bits(config: dict[str, Any], up: str, down: str) -> None:
    config |= {"codec-up": up, "codec-down": down}
    plain, flower = (Settings.parse({**config, "run-dir": config["run-dir"] + name}) for name in ("-plain", "-flower"))
    ran = run_loop(plain), in_process(flower)
    assert same(final(plain.run_dir), final(flower.run_dir))
    actual = [
        [{key: value for key, value in line.items() if not re.match("time|seconds", key)} for line in read_metrics(d)]
        for d in (ran[0].directory, ran[1].directory)
    ]
    assert actual[0] == actual[1]


@pytest.mark.parametrize(("up", "down"), [("bf16", "fp16"), ("int8", "int4"), (SPARSE, "bf16"), ("low-rank:2", SPARSE)])
def test_bytes_both_ways_are_those_of_the_arrays(config: dict[str, Any], up: str, down: str) -> None:
    run = in_process(Settings.parse({**config, "codec-up": up, "codec-down": down}))
    layout, vector = run.layout, torch.randn(run.layout.size)

    def size(text: str) -> float:
        return size_of(make_codec(text).encode(vector, layout))

    def packs(text: str) -> bool:
        return text.startswith(("int", "topk"))

    for line in lines(run, "tuning"):
        # positions and whole numbers are packed into a little more or less, as they fall
        assert line["bytes_up"] == pytest.approx(size(up), rel=0.1 * packs(up))
        # the first message only says that the base is the pretrained model
        expected = size(down) if line["round"] > 1 else 0
        assert line["bytes_down"] == pytest.approx(expected, rel=0.1 * packs(down))
        assert line["seconds_encode"] >= 0
        assert line["seconds_decode"] >= 0
        assert line["seconds_receive"] >= 0
    last = [line for line in lines(run, "evaluation") if line["round"] == 3]
    assert [line["bytes_down"] for line in last] == [run.bytes_down] * 3


def test_fp32_sends_the_whole_base_and_keeps_the_head_alone_on_disk(settings: Settings) -> None:
    run = in_process(settings)
    assert run.downlink.delta is None
    assert {line["bytes_down"] for line in lines(run, "tuning")} == {4 * run.layout.size}
    kept = (tasks.cache_dir() / "runs" / run.id).glob("*/*")
    assert [path.name for path in kept] == ["head.safetensors"] * 3


@pytest.mark.parametrize(("up", "down"), [(SPARSE, "fp32"), ("fp32", "int8"), (SPARSE, SPARSE), ("int4", "low-rank:2")])
@pytest.mark.parametrize("runtime", [run_loop, in_process])
def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(
    config: dict[str, Any], runtime: Callable[[Settings], Run], up: str, down: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config |= {"codec-up": up, "codec-down": down, "rounds": 4, "server-optimizer": "momentum"}
    unbroken = runtime(Settings.parse({**config, "run-dir": config["run-dir"] + "-unbroken"}))
    killed: list[Run] = []

    class Killed(BaseException):
        pass

    def die_after_round_two(run: Run, *moved: Any) -> None:
        if run.rounds_done == 2:
            killed.append(run)
            raise Killed
        advance(run, *moved)

    advance = Run.advance
    monkeypatch.setattr(Run, "advance", die_after_round_two)
    with pytest.raises(Killed):
        runtime(Settings.parse(config))
    monkeypatch.setattr(Run, "advance", advance)
    resumed = runtime(Settings.parse({**config, "resume": True}))
    assert resumed.id == killed[0].id != unbroken.id
    assert same(final(unbroken.directory), final(resumed.directory))
    assert not any("residual_lost" in line for line in lines(resumed, "tuning"))


def test_a_run_resumed_from_the_last_checkpoint_but_one_finds_its_residuals(config: dict[str, Any]) -> None:
    config |= {"codec-up": SPARSE, "codec-down": SPARSE, "rounds": 4}
    run = in_process(Settings.parse(config))
    expected = final(run.directory)
    newest = sorted(run.directory.glob("checkpoint/*.safetensors"))[-1]
    newest.write_bytes(b"")
    again = in_process(Settings.parse({**config, "resume": True}))
    assert same(final(again.directory), expected)
    assert not any("residual_lost" in line for line in lines(again, "tuning"))


def test_a_run_of_another_id_shares_no_residuals(config: dict[str, Any]) -> None:
    config |= {"codec-up": SPARSE}
    first = run_loop(Settings.parse(config))
    expected = final(first.directory)
    shutil.rmtree(first.directory)  # the same directory, and the same settings
    second = run_loop(Settings.parse(config))
    assert second.id != first.id
    assert same(final(second.directory), expected)


def test_a_client_without_the_residual_starts_from_zero_and_says_so(config: dict[str, Any]) -> None:
    config |= {"codec-up": SPARSE}
    whole = run_loop(Settings.parse({**config, "run-dir": config["run-dir"] + "-whole"}))
    run = run_loop(Settings.parse({**config, "rounds": 2}))
    shutil.rmtree(disk(run, "green"))
    resumed = run_loop(Settings.parse({**config, "resume": True}))
    said = [(line["round"], line["task"]) for line in lines(resumed, "tuning") if line.get("residual_lost")]
    assert said == [(3, "green")]
    assert not same(final(resumed.directory), final(whole.directory))


def test_a_task_that_joins_late_has_lost_no_residual(config: dict[str, Any]) -> None:
    run = run_loop(Settings.parse({**config, "codec-up": SPARSE, "participation": "green=2-"}))
    assert [line["task"] for line in lines(run, "tuning")].count("green") == 2
    assert not any("residual_lost" in line for line in lines(run, "tuning"))


def test_error_feedback_sends_in_the_end_what_was_left_out(config: dict[str, Any]) -> None:
    """Of one client, all steps and the last residual add up to its task vectors, had it sent them whole."""
    first = config["tasks"].split(",")[0]
    run = run_loop(Settings.parse({**config, "tasks": first, "rounds": 1, "codec-up": SPARSE}))
    whole = run_loop(Settings.parse({**config, "tasks": first, "rounds": 1, "run-dir": config["run-dir"] + "2"}))
    residual = ClientState(run.id, "red").last("residual", 2)
    assert residual is not None
    torch.testing.assert_close(run.base + residual["vector"], whole.base, rtol=0, atol=1e-6)
    assert not torch.equal(run.base, whole.base)


# ------------------------------------------------------------------------------------------------- steps, not bases


def before_message(spoil: Callable[[Path], object], task: str, kind: str, round_number: int) -> ClientApp:
    """The real ClientApp; before one message, `spoil` is done to one client's folder, and its process is new."""

    class Spoilt(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            metadata, partition = message.metadata, int(context.node_config["partition-id"])
            held = Settings.parse(context.run_config).party_names[partition]
            if (held, metadata.message_type, metadata.group_id) == (task, kind, str(round_number)):
                info = message.content.config_records["info"]
                if info["from"]:  # not when the whole base comes
                    client_state.forget_recent()
                    spoil(ClientState(str(info["run"]), task).folder)
            return client_app(message, context)

    return Spoilt()


def flip_a_bit(folder: Path) -> None:
    path = folder / "base.safetensors"
    content = bytearray(path.read_bytes())
    content[-400] ^= 1
    path.write_bytes(bytes(content))


def cut(folder: Path) -> None:
    path = folder / "base.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def pretend(folder: Path) -> None:
    """Another base, of another size, under the right digest."""
    path = folder / "base.safetensors"
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    save_file({"vector": torch.zeros(3)}, str(path), metadata)


@pytest.mark.parametrize("spoil", [shutil.rmtree, flip_a_bit, cut, pretend])
@pytest.mark.parametrize(("kind", "number"), [("train", 3), ("evaluate", 3)])
def test_a_client_without_the_right_base_is_sent_it_whole_within_the_round(
    config: dict[str, Any], spoil: Callable[[Path], object], kind: str, number: int
) -> None:
    settings = Settings.parse({**config, "codec-down": "int8"})
    run = in_process(settings, before_message(spoil, "red", kind, number))
    assert same(final(run.directory), final(run_loop(plain_twin(settings)).directory))
    asked = [
        (line["kind"], line["task"], line["round"])
        for line in read_metrics(run.directory)
        if line.get("bytes_down", 0) > 4 * run.layout.size
    ]
    assert asked == [("tuning" if kind == "train" else "evaluation", "red", number)]
    assert not any(line["failures"] for line in lines(run, "merge"))


def test_in_round_two_the_pretrained_model_stands_in_for_a_lost_base(config: dict[str, Any]) -> None:
    settings = Settings.parse({**config, "codec-down": "int8"})
    run = in_process(settings, before_message(shutil.rmtree, "red", "train", 2))
    assert same(final(run.directory), final(run_loop(plain_twin(settings)).directory))
    assert max(line["bytes_down"] for line in lines(run, "tuning")) < 1.1 * run.layout.size


def plain_twin(settings: Settings) -> Settings:
    return Settings.parse({**settings.as_config(), "run-dir": settings.run_dir + "-plain"})


def test_all_clients_may_lack_the_base_at_once(config: dict[str, Any]) -> None:
    settings = Settings.parse({**config, "codec-down": "bf16", "merge": "ties"})

    class Forgetful(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            shutil.rmtree(tasks.cache_dir() / "runs", ignore_errors=True)
            return client_app(message, context)

    run = in_process(settings, Forgetful())
    assert same(final(run.directory), final(run_loop(plain_twin(settings)).directory))


def test_a_client_that_asks_for_the_base_again_is_refused_by_name(config: dict[str, Any]) -> None:
    def ask(message: Message, reply: Message) -> Message:
        if message.content.config_records["info"]["round"] == 2:
            reply.content.config_records["info"]["needs-base"] = True
        return reply

    with pytest.raises(RunError, match=r"round 2: 2 of 3.*green: refused: needs-base True, not False"):
        in_process(Settings.parse({**config, "codec-down": "int8"}), tampered(ask, "green"))


def test_a_client_that_failed_in_the_round_before_asks_for_the_base(config: dict[str, Any]) -> None:
    """Under skip: its base is one step behind."""
    config |= {"codec-down": "int8", "on-failure": "skip", "min-successful": 2}

    class Absent(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            if (message.metadata.group_id, context.node_config["partition-id"]) == ("2", 0):
                return Message(Error(2, "no power"), reply_to=message)
            return client_app(message, context)

    run = in_process(Settings.parse(config), Absent())
    assert [line["tasks"] for line in lines(run, "merge")] == [
        ["red", "green", "blue"],
        ["green", "blue"],
        ["red", "green", "blue"],
    ]
    late = [line for line in lines(run, "tuning") if (line["task"], line["round"]) == ("red", 3)]
    assert late[0]["bytes_down"] > 4 * run.layout.size


def test_a_finished_run_that_goes_on_sends_the_whole_base_once(config: dict[str, Any]) -> None:
    config |= {"codec-down": "int8"}
    in_process(Settings.parse({**config, "rounds": 2}))
    run = in_process(Settings.parse({**config, "rounds": 4, "resume": True}))
    down = {line["round"]: line["bytes_down"] for line in lines(run, "tuning")}
    assert down[1] == 0
    assert down[3] == 4 * run.layout.size
    assert max(down[2], down[4]) < 1.1 * run.layout.size


def test_a_run_that_starts_from_another_model_sends_it(config: dict[str, Any]) -> None:
    first = in_process(Settings.parse({**config, "rounds": 1}))
    config |= {"codec-down": "int8", "start": str(first.directory), "run-dir": config["run-dir"] + "-on"}
    run = in_process(Settings.parse(config))
    assert {line["bytes_down"] for line in lines(run, "tuning") if line["round"] == 1} == {4 * run.layout.size}
    assert same(final(run.directory), final(run_loop(plain_twin(run.settings)).directory))


def test_a_finished_run_leaves_no_base_on_the_clients_disks(config: dict[str, Any]) -> None:
    run = in_process(Settings.parse({**config, "codec-down": "int8", "codec-up": SPARSE}))
    left = sorted(path.name for path in (tasks.cache_dir() / "runs" / run.id).glob("*/*"))
    residuals = [f"residual-0000{number}.safetensors" for number in (1, 2, 3) for _ in range(3)]
    assert left == ["head.safetensors"] * 3 + residuals


def test_the_base_moves_by_what_clients_decode_and_the_residual_is_in_the_checkpoint(config: dict[str, Any]) -> None:
    whole = run_loop(Settings.parse({**config, "rounds": 1, "run-dir": config["run-dir"] + "-whole"}))
    run = run_loop(Settings.parse({**config, "rounds": 1, "codec-down": SPARSE}))
    start = Run(Settings.parse({**config, "run-dir": config["run-dir"] + "-start"})).base
    assert run.downlink.delta is not None
    assert run.downlink.residual is not None
    decoded = make_codec(SPARSE).decode(run.downlink.delta, run.layout)
    assert torch.equal(run.base, start + decoded)
    torch.testing.assert_close(run.base + run.downlink.residual, whole.base, rtol=0, atol=1e-6)
    _, base, state = load_checkpoint(run.directory, run.layout, print)
    assert torch.equal(base, run.base)
    assert torch.equal(state["residual"], run.downlink.residual)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("up", "said"), [("int8", "fp32"), ("fp32", "int8"), (SPARSE, "topk")])
def test_another_codec_is_refused_by_name(config: dict[str, Any], up: str, said: str) -> None:
    with pytest.raises(RunError, match=f"green: refused: codec '{said}', not '{up}'"):
        in_process(Settings.parse({**config, "codec-up": up}), tampered(replace_info("codec", said), "green"))


def test_arrays_of_another_codec_are_refused_by_name(config: dict[str, Any]) -> None:
    def change(message: Message, reply: Message) -> Message:
        reply.content["arrays"] = ArrayRecord({"values": Array(np.zeros(7, np.int8))})
        return reply

    with pytest.raises(RunError, match=r"green: refused: arrays \['values'\] where codec int8 has \['largest'"):
        in_process(Settings.parse({**config, "codec-up": "int8"}), tampered(change, "green"))


def sent(change: Callable[[Message], None]) -> ClientApp:
    """The real ClientApp, with its train messages of round 2 changed on the way."""

    class Changed(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            if (message.metadata.message_type, message.metadata.group_id) == ("train", "2"):
                change(message)
            return client_app(message, context)

    return Changed()


@pytest.mark.parametrize(
    ("down", "key", "value", "words"),
    [
        ("fp32", "codec", "int8", "ValueError: the server's base came by codec int8, not fp32"),
        ("int8", "codec", "fp32", "ValueError: the server's base came by codec fp32, not int8"),
        ("fp32", "base", "1234", "ValueError: the server's base is not the one that its digest says"),
        ("fp32", "run", "../../home", "ValueError: run '../../home' is not the id of a run"),
    ],
)
def test_clients_refuse_a_message_that_does_not_fit(
    config: dict[str, Any], down: str, key: str, value: str, words: str
) -> None:
    def change(message: Message) -> None:
        message.content.config_records["info"][key] = value

    with pytest.raises(RunError, match=f"round 2: 0 of 3.*red: {words}"):
        in_process(Settings.parse({**config, "codec-down": down}), sent(change))


@pytest.mark.parametrize("runtime", [run_loop, in_process])
def test_a_task_vector_that_is_not_finite_ends_the_run_by_name(
    config: dict[str, Any], runtime: Callable[[Settings], Run]
) -> None:
    config |= {"optimizer": "sgd", "learning-rate": 1e30, "clip-norm": 0.0, "codec-up": "int8"}
    with pytest.raises(RunError, match="red's task vector of round 1 has a value that is not finite .*learning-rate"):
        runtime(Settings.parse(config))


def test_settings_that_are_no_codec_are_named(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="codec-down='int9': codec 'int9' is unknown; did you mean 'int8'"):
        Settings.parse({**config, "codec-down": "int9"})
    run_loop(Settings.parse({**config, "codec-up": "int8"}))
    with pytest.raises(SettingError, match="holds a run with codec-up='int8', not 'int4'"):
        run_loop(Settings.parse({**config, "codec-up": "int4", "resume": True}))


def test_a_run_from_before_there_were_codecs_resumes(config: dict[str, Any]) -> None:
    run = run_loop(Settings.parse({**config, "rounds": 2}))
    path = run.directory / "config.json"
    actual = json.loads(path.read_text())
    del actual["run"], actual["settings"]["codec-up"], actual["settings"]["codec-down"]
    path.write_text(json.dumps(actual))
    resumed = run_loop(Settings.parse({**config, "resume": True}))
    assert resumed.rounds_done == 3
    assert vectors.digest(resumed.base) == vectors.digest(run_loop(plain_twin(Settings.parse(config))).base)


@pytest.mark.slow
def test_ray_simulation_ends_with_the_same_bits(tmp_path: Path) -> None:
    from atm_fl.server.simulation import run_simulation

    config = {"tasks": "digits,mnist", "rounds": 3, "local-epochs": 1, "codec-up": SPARSE, "codec-down": "low-rank:4"}
    plain, ray = (Settings.parse({**config, "run-dir": str(tmp_path / name)}) for name in ("plain", "ray"))
    run_loop(plain)
    run_simulation(ray, Path(__file__).parents[1])
    assert same(final(plain.run_dir), final(ray.run_dir))
