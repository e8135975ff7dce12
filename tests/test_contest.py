"""The contest, on tiny tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PluginFiles, make_folder
from safetensors.torch import load_file
from test_transforms import HEAD, SUM, THERE_AND_BACK

from atm_fl.errors import SettingError
from atm_fl.experiments import contest, read_study
from atm_fl.experiments.joint import run_joint
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.runs.checkpoints import checkpoints, load_checkpoint
from atm_fl.seeds import derive_seed
from atm_fl.settings import Settings
from atm_fl.training.evaluation import mean_accuracy
from atm_fl.vectors import Layout

ROWS = """
[rows]
single = { kind = "single" }
joint = { kind = "joint", tune = { learning-rate = [1e-3, 2e-3] }, tuning-rounds = 1 }
average = { kind = "one-shot" }
ties = { kind = "one-shot", merge = "ties", tune = { merge = ["ties:density=0.2", "ties:density=0.5"], scaling = [1] } }
atm = { tune = { scaling = [1.0, 1.5] }, tuning-rounds = 1, report = [2, 4], rounds = 4 }
parts = { rounds = 8, local-epochs = 0.5, validate-every = 2, alignment = true, keep-checkpoints = 0 }
huge = { merge = "task-arithmetic", scaling = 1e38 }
PH = { kind = "ph-atm", rounds = 2, select = [1, 2] }

[landscape]
row = "parts"
one-shot = "average"
grid = 3
"""


def write(path: Path, config: dict[str, Any], rows: str = ROWS) -> Path:
    for key in ("rounds", "run-dir"):
        config.pop(key, None)
    lines = [f'folder = "{path.parent}/contest"\nname = "report"\nseeds = [0, 1]\nepochs = 4\n[settings]']
    lines += [f"{key} = {json.dumps(value)}" for key, value in config.items()]
    path.write_text("\n".join(lines) + rows)
    return path


def run(study: contest.Contest) -> list[str]:
    return [contest.run_unit(unit) for units in contest.phases(study) for unit in units]


@pytest.fixture
def study(config: dict[str, Any], tmp_path: Path) -> contest.Contest:
    return read_study(write(tmp_path / "contest.toml", config), contest)


@pytest.mark.parametrize("key", ["rounds", "local-epochs"])
def test_settings_that_would_change_each_rows_budget_are_refused(
    key: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """By them single-task models would be tuned for less than joint training."""
    rows = f'\n{key} = 2\n[rows]\nx = {{ kind = "single" }}\n'
    with pytest.raises(SettingError, match=f"settings: {key}=2 would give .* than epochs=4; name it in the rows"):
        read_study(write(tmp_path / "contest.toml", config, rows), contest)


NOT_DEFAULT: dict[str, Any] = {
    "merge": "tsv-m",
    "scaling": 2.0,
    "task-scaling": "red=0.5",
    "layer-scaling": "*norm*=0.5",
    "codec-up": "int8",
    "codec-down": "int8",
    "transforms": "",
    "proportion": 7.0,
    "alignment": True,
    "keep-optimizer": True,
    "client-momentum": 0.5,
    "gradient-surgery": True,
    "proximal": 0.1,
    "ewc": 10.0,
    "accumulate": 2,
    "participation": "red=2-",
    "replay": 0.5,
    "replay-vectors": "fp32",
    "fraction": 0.5,
    "privacy": "clip-only",
    "dp-client-clip": 0.01,
    "secure-aggregation": True,
    "server-optimizer": "momentum",
}
BESIDE = {"replay": {"participation": "red=1-1"}, "replay-vectors": {"participation": "red=1-1"}}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in contest.IDLE.items() for key in keys])
def test_a_setting_without_effect_on_a_row_is_refused(
    kind: str, key: str, config: dict[str, Any], tmp_path: Path
) -> None:
    value = json.dumps(NOT_DEFAULT[key])
    for words in (f"{key} = {value}", f"tune = {{ {key} = [{value}] }}"):
        rows = f'\n[rows]\nsingle = {{ kind = "single" }}\nx = {{ kind = "{kind}", {words} }}\n'
        with pytest.raises(SettingError, match=f"row 'x': {key} has no effect on rows of kind {kind}; leave it out"):
            read_study(write(tmp_path / "contest.toml", config, rows), contest)


def test_what_is_refused_of_joint_rows_is_without_effect(config: dict[str, Any]) -> None:
    """Their models have the same bits; so nothing is refused there that would do something.

    But for `privacy`: heads are then made of other records, and still nothing is clipped or noised.
    """
    config = {**config, "rounds": 2, "run-dir": config["run-dir"] + "-joint"}

    def base(settings: dict[str, Any]) -> list[torch.Tensor]:
        run_joint(Settings.parse({**config, **settings}))
        return list(load_file(checkpoints(Path(config["run-dir"]))[-1]).values())

    before = base({})
    for key in set(contest.IDLE["joint"]) - {"privacy"}:
        after = base({key: NOT_DEFAULT[key], **BESIDE.get(key, {})})
        assert all(map(torch.equal, before, after)), key


def test_a_contest_runs_resumes_and_counts(study: contest.Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run(study)
    assert any("not finite" in line for line in printed)
    text = contest.table(study)
    actual = json.loads((study.reports / "results.json").read_text())
    rows = {row["name"]: row for row in actual["rows"]}
    assert [row["name"] for row in actual["rows"]] == [
        *("pretrained", "single", "joint", "average", "ties", "atm, 2 rounds", "atm, 4 rounds", "parts", "huge"),
        *("PH from average", "PH from ties"),
    ]
    assert rows["huge"]["seeds"] == {}
    assert all(len(row["seeds"]) == 2 for name, row in rows.items() if name != "huge")
    assert "| parts" in text
    assert "| huge" not in text
    assert (study.reports / "report.html").exists()

    # 36 training images a task, batches of 8, 4 epochs: the same images everywhere, an even count of steps
    images = {name: row["seeds"]["0"]["images"] for name, row in rows.items() if row["seeds"]}
    assert {images[name] for name in ("single", "joint", "average", "ties", "atm, 4 rounds", "parts")} == {3 * 4 * 36}
    assert images["atm, 2 rounds"] == 3 * 2 * 36
    assert images["PH from ties"] in (30, 60)  # 10 of 12 validation images a round
    assert rows["single"]["seeds"]["0"]["steps"] == 3 * 4 * 5
    assert rows["joint"]["seeds"]["0"]["steps"] == 4 * 14
    elements = actual["elements"]
    assert rows["atm, 4 rounds"]["seeds"]["0"]["bytes"] == 4 * elements * 3 * (4 + 4 + 1)
    assert rows["average"]["seeds"]["0"]["bytes"] == 4 * elements * 3 * 3
    assert rows["joint"]["seeds"]["0"]["bytes"] == 0
    assert rows["atm, 4 rounds"]["tuning"] == {"values": 2, "epochs": 1.0, "evaluations": 0}
    assert rows["ties"]["tuning"] == {"values": 2, "epochs": 0.0, "evaluations": 2}
    assert set(actual["alignment"]) == {"parts"}
    assert all(-1 <= value <= 1 for task in actual["alignment"]["parts"].values() for value in task.values())

    # the plane goes through the pretrained model, the merged one and the end of the path
    cut = actual["landscape"]
    places = {place["name"]: place for place in cut["points"]}
    assert (places["pretrained"]["x"], places["pretrained"]["y"]) == (0, 0)
    assert places["one-shot"]["y"] == pytest.approx(0, abs=1e-3 * places["one-shot"]["x"])
    assert set(places) == {"pretrained", "one-shot", "red alone", "green alone", "blue alone"} | {
        f"round {number}" for number in range(1, 9)
    }
    assert [len(line) for line in cut["accuracy"]] == [3, 3, 3]

    # a second go does no work at all
    for name in ("run_loop", "run_joint", "Party"):
        monkeypatch.setattr(contest, name, lambda *_: pytest.fail("a finished unit ran again"))
    run(study)
    assert contest.table(study) == text


def test_choices_are_made_on_validation(study: contest.Contest) -> None:
    run(study)
    ties = next(row for row in study.rows if row.name == "ties")
    made = json.loads((contest.ContestUnit(study, ties, 1).folder / "results.json").read_text())
    scores = [mean_accuracy(tried["validation"]) for tried in made["tried"]]
    assert len(scores) == 2
    assert made["choice"] == made["tried"][scores.index(max(scores))]["choice"]


def test_an_average_is_what_its_checkpoint_holds_and_where_ph_atm_starts(study: contest.Contest) -> None:
    run(study)
    average = next(row for row in study.rows if row.name == "average")
    backbone = contest.load_backbone("tiny", "pretrained")
    layout = Layout.of(backbone)
    _, base, _ = load_checkpoint(contest.ContestUnit(study, average, 1).folder, layout, pytest.fail)
    vectors = contest.single_vectors(study, 1)
    settings = Settings.parse(study.settings)
    assert list(vectors) == list(settings.party_names)
    start = layout.flatten(backbone)
    torch.testing.assert_close(base, start + torch.stack(list(vectors.values())).mean(0))
    refined = next(row for row in study.rows if row.base == "average")
    lines = list(contest.read_metrics(contest.ContestUnit(study, refined, 1).folder))
    before = {line["task"]: line["test"] for line in lines if line["round"] == 0 and line["kind"] == "evaluation"}
    made = json.loads((contest.ContestUnit(study, average, 1).folder / "results.json").read_text())
    assert before == made["test"]


BY_THE_SERVER: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scaled tasks and layers": {"task-scaling": "red=0.5, blue=2", "layer-scaling": "*.mlp.*=1.5, *norm*=0.5"},
    "client-level clip and noise": {"dp-client-clip": 0.05, "dp-client-noise": 0.5},
    "a transform of the sum": {"transforms": "signs"},
    "a transform of every vector": {"transforms": "doubled, there-and-back"},
    "momentum": {"server-optimizer": "momentum:learning-rate=0.5"},
    "steps by ternary": {"codec-down": "ternary", "codec-up": "int8"},
    "several clients a task": {"tasks": "{red},{red_elsewhere},{green}"},
}


@pytest.mark.parametrize("changed", BY_THE_SERVER.values(), ids=BY_THE_SERVER)
def test_a_one_shot_row_is_what_a_run_of_one_round_makes(
    config: dict[str, Any],
    folders: list[str],
    plugin_files: PluginFiles,
    changed: dict[str, Any],
    tmp_path: Path,
) -> None:
    plugin_files(transforms=HEAD + THERE_AND_BACK + SUM)
    config |= changed
    elsewhere = make_folder(tmp_path / "other" / "red", 7)
    config["tasks"] = config["tasks"].format(red=folders[0], red_elsewhere=elsewhere, green=folders[1])
    rows = '\n[rows]\nsingle = { kind = "single" }\naverage = { kind = "one-shot" }\n'
    chosen = replace(read_study(write(tmp_path / "contest.toml", dict(config), rows), contest), seeds=[0], epochs=1)
    run(chosen)
    made = run_loop(Settings.parse({**config, "rounds": 1}))
    unit = contest.ContestUnit(chosen, chosen.row("one-shot"), 0)
    assert torch.equal(load_checkpoint(unit.folder, made.layout, pytest.fail)[1], made.base)


def test_joint_training_of_one_task_is_plain_fine_tuning(config: dict[str, Any], folders: list[str]) -> None:
    """One epoch of joint training over a single task against torch's own SGD on the same batches."""
    settings = Settings.parse({**config, "tasks": folders[0], "rounds": 1, "optimizer": "sgd", "learning-rate": 0.05})
    run_joint(settings)
    party = Party(settings, folders[0])
    layout, (_, base, _) = party.model.layout, load_checkpoint(Path(settings.run_dir), party.model.layout, pytest.fail)
    module, head = contest.load_backbone("tiny", "pretrained"), party.head
    optimizer = torch.optim.SGD(module.parameters(), 0.05, weight_decay=0.1)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(derive_seed(0, "joint", 1)))
    for images, labels in party.tuned_on.batches(order, 8):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(module(images)), labels).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        optimizer.step()
    torch.testing.assert_close(base, layout.flatten(module), rtol=1e-5, atol=1e-6)


def test_a_greedy_soup_is_of_the_models_that_help(config: dict[str, Any], tmp_path: Path) -> None:
    rows = '\n[rows]\nsingle = { kind = "single" }\nsoup = { kind = "one-shot", greedy = true, scaling = 1.0 }\n'
    study = replace(read_study(write(tmp_path / "contest.toml", dict(config), rows), contest), seeds=[0])
    run(study)
    unit = contest.ContestUnit(study, study.row("one-shot"), 0)
    parties = [Party(unit.settings(), name) for name in unit.settings().task_names]
    base, vectors = parties[0].model.pretrained, contest.single_vectors(study, 0)

    def accuracy(clients: list[str], split: str = "validation") -> float:
        model = base + torch.stack([vectors[client] for client in clients]).mean(0)
        return mean_accuracy({party.client: party.evaluate(model, (split,))[split] for party in parties})

    soup: list[str] = []
    for client in sorted(vectors, key=lambda client: accuracy([client]), reverse=True):
        if not soup or accuracy([*soup, client]) >= accuracy(soup):
            soup.append(client)
    made = json.loads((unit.folder / "results.json").read_text())
    assert made["clients"] == soup
    assert mean_accuracy(made["test"]) == accuracy(soup, "test")
    assert len(made["tried"]) == unit.row.attempts(len(parties)) == 5
    row = contest.results(study)["rows"][-1]
    assert row["tuned"] == {"0": {"soup of": ", ".join(soup)}}
    assert row["tuning"] == {"values": 0, "epochs": 0.0, "evaluations": 5}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("[rows]\na = { greedy = true }", "row 'a': greedy has no effect on rows of kind atm; leave it out"),
        ("[rows]\na = { kind = 'two-shot' }", "kind='two-shot' is unknown; did you mean 'one-shot'"),
        ("[rows]\na = { kind = 'one-shot' }", "needs a row of kind single"),
        (
            "secure-aggregation = true\n[rows]\ns = { kind = 'single' }",
            "row 's': secure-aggregation=true leaves no single vector to merge",
        ),
        ("[rows]\na = { merge = 'meen' }", "merge='meen' is unknown"),
        ("[rows]\na = { tune = { scalign = [1.0] } }", "setting 'scalign' is unknown"),
        ("[rows]\na = { report = [5] }", "row 'a': it has 4 rounds, so none is 5"),
        (
            "[rows]\ns = {kind = 'single'}\na = {}\no = {kind = 'one-shot'}\n[landscape]\nrow = 'a'\none-shot = 'o'",
            "landscape: row='a' must have keep-checkpoints = 0, not 2",
        ),
        (
            "[rows]\na = {}\n[landscape]\nrow = 'a'\none-shot = 'b'",
            "landscape: one-shot='b' is no row of kind one-shot",
        ),
        ("[rowz]\na = {}", "is not a study, which has "),
    ],
)
def test_a_contest_that_cannot_work_is_said_before_any_work(
    config: dict[str, Any], tmp_path: Path, rows: str, words: str
) -> None:
    path = write(tmp_path / "contest.toml", config, "\n" + rows)
    with pytest.raises(SettingError, match=words):
        read_study(path, contest)
