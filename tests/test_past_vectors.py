"""Tasks that have left, merged again by their last vectors (`replay-vectors`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_folder
from federation import final, in_process, same
from test_participation import failing, lines

from atm_fl.codecs import CODECS, make_codec
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.client import parties_of
from atm_fl.federation.loop import run_loop
from atm_fl.runs.past_vectors import PastVectors
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.vectors import Layout


@pytest.fixture
def leaving(config: dict[str, Any]) -> dict[str, Any]:
    """Five rounds; green leaves after the second, blue after the third."""
    return config | {"rounds": 5, "participation": "green=1-2, blue=1-3", "replay-vectors": "fp32"}


def last(directory: str | Path) -> dict[str, str]:
    """Task → the last of the files of its vectors."""
    return {path.parent.name: path.stem for path in sorted(Path(directory).glob("vectors/*/*"))}


def elsewhere(config: dict[str, Any], name: str, **changed: Any) -> Settings:
    changed = {key.replace("_", "-"): value for key, value in changed.items()}
    return Settings.parse({**config, "run-dir": config["run-dir"] + name, **changed})


@pytest.mark.parametrize(
    "changed",
    [{}, {"merge": "tsv-m", "scaling": 1.5}, {"codec-up": "int8"}, {"task-scaling": "green=0.5", "merge": "ties"}],
    ids=lambda changed: ", ".join(changed),
)
def test_a_task_that_has_left_is_merged_again_by_its_last_vector(
    leaving: dict[str, Any], changed: dict[str, Any]
) -> None:
    """Bit by bit the loop of five lines, and in Flower's messages as in the plain loop."""
    settings = Settings.parse(leaving | changed)
    parties = parties_of(settings)
    base, held = parties[0].model.pretrained.clone(), {}
    for number in range(1, 6):
        for party in parties:
            if number <= {"red": 5, "green": 2, "blue": 3}[party.task]:
                arrays = party.train(base, number).arrays
                assert arrays is not None
                vector = party.chain.decode(arrays, party.context(number))
                held[party.task] = vector * settings.task_scalings.get(party.task, 1.0)
        base += settings.make_merge(parties[0].model.layout, number).combine(dict(held))
    run = run_loop(settings)
    assert torch.equal(run.base, base)
    assert [line.get("replayed") for line in lines(run.directory, "merge")] == [
        *(None, None, ["green"], ["green", "blue"], ["green", "blue"])
    ]
    assert last(run.directory) == {"blue": "round-00003", "green": "round-00002"}
    assert same(final(in_process(elsewhere(leaving | changed, "-flower")).directory), final(run.directory))


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "fp32"])
def test_by_a_codec_it_is_merged_again_as_the_codec_has_it(leaving: dict[str, Any], codec: str) -> None:
    leaving |= {"participation": "green=1-2", "rounds": 2, "replay-vectors": codec}
    settings = Settings.parse(leaving)
    run = run_loop(settings)
    (path,) = run.directory.glob("vectors/*/round-00002.safetensors")
    small = path.stat().st_size
    resumed = run_loop(Settings.parse({**leaving, "rounds": 3, "resume": True}))
    whole = run_loop(elsewhere(leaving, "-whole", rounds=3))
    assert torch.equal(resumed.base, whole.base)
    parties = parties_of(settings)
    base, held, layout = parties[0].model.pretrained.clone(), {}, parties[0].model.layout
    for number in (1, 2, 3):
        for party in parties:
            if number < 3 or party.task != "green":
                arrays = party.train(base, number).arrays
                assert arrays is not None
                held[party.task] = party.chain.decode(arrays, party.context(number)).clone()
        if number == 3:
            seed = derive_seed(settings.seed, "past vector", "green", 2)
            held["green"] = make_codec(codec).decode(make_codec(codec).encode(held["green"], layout, seed), layout)
        base += settings.make_merge(layout, number).combine(dict(held))
    assert torch.equal(whole.base, base)
    assert small < 4 * layout.size


def test_several_parties_of_a_task_leave_their_mean(leaving: dict[str, Any], tmp_path: Path) -> None:
    leaving["tasks"] += f",{make_folder(tmp_path / 'more' / 'green', 9, images=6)}"
    run = run_loop(Settings.parse(leaving))
    assert last(run.directory) == {"blue": "round-00003", "green": "round-00002"}
    assert lines(run.directory, "merge")[-1]["tasks"] == ["red", "green", "blue"]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_has_them_and_ends_with_the_same_bits(leaving: dict[str, Any], stop: int) -> None:
    whole = run_loop(Settings.parse(leaving))
    in_process(elsewhere(leaving, "-broken", rounds=stop))
    resumed = run_loop(elsewhere(leaving, "-broken", resume=True))
    assert torch.equal(resumed.base, whole.base)


def test_a_run_that_goes_back_has_those_of_then(leaving: dict[str, Any]) -> None:
    """Back behind the rounds in which they left; and with another participation, so that blue leaves earlier."""
    leaving |= {"keep-checkpoints": 0}
    whole = run_loop(Settings.parse(leaving))
    earlier = {**leaving, "participation": "green=1-2, blue=1-2"}
    planned = run_loop(elsewhere(earlier, "-planned"))
    for name, config, reference in (("-same", leaving, whole), ("-earlier", earlier, planned)):
        shutil.copytree(whole.directory, leaving["run-dir"] + name)
        if name == "-earlier":  # that of round 3 is of a time that is given up
            assert last(leaving["run-dir"] + name)["blue"] == "round-00003"
        back = run_loop(elsewhere(config, name, resume=True, resume_from=2))
        assert torch.equal(back.base, reference.base)


def test_no_more_stay_than_the_checkpoints_that_stay_can_want(leaving: dict[str, Any]) -> None:
    settings = Settings.parse(leaving | {"participation": "green=1-9, blue=1-4", "rounds": 9})
    directory = Path(settings.run_dir)
    past, layout = PastVectors(directory, settings), Layout(("x",), ((3,),))
    (directory / "checkpoint").mkdir(parents=True)
    for number in range(1, 9):
        past.keep(
            {"red": torch.ones(3), "green": torch.ones(3)} | ({"blue": torch.ones(3)} if number < 5 else {}),
            number,
            layout,
        )
        (directory / "checkpoint" / f"round-{number:05d}.safetensors").touch()
        (directory / "checkpoint" / f"round-{number - 2:05d}.safetensors").unlink(missing_ok=True)
    names = sorted(f"{path.parent.name}/{path.stem}" for path in directory.glob("vectors/*/*"))
    assert names == ["blue/round-00004", "green/round-00006", "green/round-00007", "green/round-00008"]


def test_a_party_that_fails_in_its_last_round_leaves_the_one_before(leaving: dict[str, Any]) -> None:
    leaving |= {"on-failure": "skip"}
    run = in_process(Settings.parse(leaving), failing("2", "green"))
    assert last(run.directory) == {"blue": "round-00003", "green": "round-00001"}
    assert [line["tasks"] for line in lines(run.directory, "merge")][1:] == [["red", "blue"]] + [
        ["red", "green", "blue"]
    ] * 3


def test_a_finished_run_goes_on_without_its_parties(leaving: dict[str, Any]) -> None:
    """One task, whose end was planned, has left; another goes on. What was not planned is said before any work."""
    leaving |= {"participation": "green=1-3, blue=1-3", "rounds": 3}
    run_loop(Settings.parse(leaving))
    with pytest.raises(SettingError, match=r"holds no vector of red, .* as 'red=1-4', so choose a later one"):
        run_loop(
            Settings.parse({**leaving, "participation": "red=1-3, green=1-3, blue=1-4", "resume": True, "rounds": 4})
        )
    more = run_loop(Settings.parse({**leaving, "resume": True, "rounds": 5}))
    assert lines(more.directory, "merge")[-1]["replayed"] == ["green", "blue"]
    whole = run_loop(elsewhere(leaving, "-whole", rounds=5))
    assert torch.equal(more.base, whole.base)


def test_a_damaged_one_is_said(leaving: dict[str, Any]) -> None:
    run = run_loop(Settings.parse({**leaving, "rounds": 3}))
    path = run.directory / "vectors" / "green" / "round-00002.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:-4] + b"\x00\x00\x80\x3f", b""):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match="round-00002.safetensors is damaged"):
            run_loop(Settings.parse({**leaving, "resume": True}))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"replay": 0.1}, "replay=0.1 and replay-vectors='fp32': give one of them"),
        ({"secure-aggregation": True}, "replay-vectors='fp32': not with secure-aggregation=true"),
        ({"participation": "green=2-"}, "replay-vectors='fp32': it needs a participation that ends"),
        ({"replay-vectors": "int5"}, "replay-vectors='int5'"),
    ],
)
def test_what_it_does_not_go_with_is_refused(leaving: dict[str, Any], changed: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError) as error:
        Settings.parse(leaving | changed)
    assert words in str(error.value)
