"""A party's own floor: what its policy.toml bounds, no run's settings get past."""

from __future__ import annotations

import os
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, seed
from hypothesis import settings as tries
from hypothesis import strategies as st
from typer.testing import CliRunner

from atm_fl.cli.terminal import app
from atm_fl.clients.app import _parties
from atm_fl.clients.app import app as client_app
from atm_fl.errors import RunError, SettingError
from atm_fl.federation import client as party_module
from atm_fl.policy import _BROKEN, TELL, Policy, policy_of, table, template
from atm_fl.privacy.accounting import Spent, epsilon
from atm_fl.runs.metrics import read_metrics
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings, kebab

DP = {"privacy": "dp-sgd", "dp-epsilon": 3.0}
NOISE = {"privacy": "dp-sgd", "dp-noise": 1.0}
RULES: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ('tasks = ["green", "blu*"]', {}, {"tasks": "green"}, "tasks=green, blu*: it does not name 'red'"),
    ('splits = ["train"]', {"split": "validation"}, {}, "splits=train: the run tunes on split='validation'"),
    ('models = ["open_clip/*"]', {}, {"model": "open_clip/ViT-B-16"}, "models=open_clip/*: the run has model='tiny'"),
    ('trainable = ["last-*"]', {}, {"trainable": "last-1"}, "trainable=last-*: the run has trainable='all'"),
    ('privacy = "dp-sgd"', {"privacy": "clip-only"}, DP, "privacy=dp-sgd: the run has privacy='clip-only'"),
    ("epsilon = 3", DP | {"dp-epsilon": 3.1}, DP, "epsilon=3.0: the run has dp-epsilon=3.1"),
    ("epsilon = 3", DP | {"dp-policy": "warn"}, DP, "epsilon=3.0: the run has dp-policy='warn'"),
    ("epsilon = 3", NOISE, DP, "epsilon=3.0: the run has dp-epsilon=0"),
    ("epsilon = 3", {}, DP, "epsilon=3.0: the run has privacy='none'"),
    ("delta = 1e-6", DP, DP | {"dp-delta": 1e-7}, "delta=1e-06: the run has dp-delta=1e-05"),
    ("noise = 2", NOISE, NOISE | {"dp-noise": 2.0}, "noise=2.0: the run has dp-noise=1"),
    ("noise = 2", {}, NOISE | {"dp-noise": 2.0}, "noise=2.0: the run has dp-noise=0"),
    ("clip = 0.5", DP, DP | {"dp-clip": 0.5}, "clip=0.5: the run has dp-clip=1"),
    ("clip = 0.5", {}, DP | {"dp-clip": 0.5}, "clip=0.5: the run has privacy='none', which clips no record's"),
    (
        "lifetime-epsilon = 9",
        DP | {"split": "validation"},
        DP,
        "lifetime-epsilon=9.0: the run has split='validation', of whose records other runs' heads and accuracies tell",
    ),
    ("lifetime-epsilon = 9", {}, DP, "lifetime-epsilon=9.0: the run has privacy='none', whose ε is infinite"),
    (
        "secure-aggregation = true",
        {},
        {"secure-aggregation": True},
        "secure-aggregation=True: the run has secure-aggregation=false",
    ),
    ("least-parties = 4", {}, {"tasks": "red,green,blue,grey"}, "least-parties=4: the run has 3 parties"),
    (
        "least-parties = 3",
        {"secure-aggregation": True, "secure-threshold": 2},
        {"secure-aggregation": True, "secure-threshold": 3},
        "least-parties=3: the run has secure-threshold=2",
    ),
    (
        'devices = ["cuda:*"]',
        {"device": "cpu"},
        {"device": "cuda:1"},
        "devices=cuda:*: the run has device='cpu', which",
    ),
    ("threads = 1", {"threads": 2}, {"threads": 1}, "threads=1: the run has threads=2"),
    ("workers = 1", {"workers": 2}, {"workers": 1}, "workers=1: the run has workers=2"),
    ("batch-size = 4", {}, {"batch-size": 4}, "batch-size=4: the run has batch-size=8"),
    ("local-epochs = 0.5", {}, {"local-epochs": 0.5}, "local-epochs=0.5: the run has local-epochs=1"),
    (
        "local-epochs = 1",
        {"task-epochs": "red=2"},
        {"task-epochs": "green=2"},
        "local-epochs=1.0: the run has local-epochs=2",
    ),
    ("rounds = 2", {}, {"rounds": 2}, "rounds=2: the run has rounds=3"),
]
"""(the policy's line, settings that break it, settings that keep it, what is said)."""


def grid_with(config: dict[str, Any], tmp_path: Path, policy: str) -> tuple[InProcessGrid, Settings]:
    """An in-process federation whose first party, red, has a policy."""
    settings = Settings.parse(config)
    grid = InProcessGrid(client_app, len(settings.task_names), settings.as_config())
    file = tmp_path / "policy.toml"
    file.write_text(policy)
    grid.contexts[1].node_config["policy"] = str(file)
    return grid, settings


@pytest.mark.parametrize(("line", "breaks", "keeps", "message"), RULES)
def test_a_run_that_asks_for_more_is_refused_before_data_are_read(
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    breaks: dict[str, Any],
    keeps: dict[str, Any],
    message: str,
) -> None:
    grid, settings = grid_with({**config, **breaks, "rounds": 3}, tmp_path, line)
    _parties.clear()
    loaded: list[str] = []
    load = party_module.tasks.load
    monkeypatch.setattr(party_module.tasks, "load", lambda name, size: loaded.append(name) or load(name, size))
    with pytest.raises(RunError) as error:
        serve(grid, settings)
    assert f"red: refused by this party's policy, {message}" in str(error.value)
    assert not any(name.endswith("/red") for name in loaded)
    folders = dict(zip(("red", "green", "blue"), config["tasks"].split(","), strict=True))
    if "tasks" in keeps:
        keeps = {**keeps, "tasks": ",".join(folders.get(name, f"./{name}") for name in keeps["tasks"].split(","))}
    good = Settings.parse({**config, **keeps})
    Policy.read(tmp_path / "policy.toml").check(good, "green" if "green" in line else "red")


def test_every_rule_is_tested_here() -> None:
    lines = {line.partition(" =")[0] for line, *_ in RULES}
    assert lines | {"weights"} == {kebab(name) for name in _BROKEN}
    assert {item.name for item in fields(Policy)} - set(_BROKEN) == {
        "tell",
        "apps",
        "max_update_norm",
        "trusted_parties",
        "largest_message",
    }


def test_weights_are_read_where_the_rule_says_whatever_the_way_there(config: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("lent", "own"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vit.safetensors").touch()
    (tmp_path / "lent" / "link.safetensors").symlink_to(tmp_path / "own" / "vit.safetensors")
    settings = Settings.parse(config)
    policy = Policy(weights=(f"{os.path.realpath(tmp_path)}/lent/*",))

    def asked(weights: str) -> Settings:
        return replace(settings, weights=weights)

    for name in ("pretrained", "random", "laion2b_s34b_b88k"):  # are no files
        policy.check(asked(name), "red")
    policy.check(asked(str(tmp_path / "lent" / "vit.safetensors")), "red")
    for other in ("own/vit.safetensors", "lent/../own/vit.safetensors", "lent/link.safetensors"):
        with pytest.raises(RunError, match="red: refused by this party's policy, weights=.*: the run has weights="):
            policy.check(asked(f"{tmp_path}/{other}"), "red")
    Policy(weights=("",)).check(asked("pretrained"), "red")
    with pytest.raises(RunError, match="weights=: the run has weights="):
        Policy(weights=("",)).check(asked(str(tmp_path / "lent" / "vit.safetensors")), "red")


def test_the_device_that_auto_is_here_counts(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.parse({**config, "device": "auto"})
    policy = Policy(devices=("cpu",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    policy.check(settings, "red")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(RunError, match="devices=cpu: the run has device='auto', which is cuda here"):
        policy.check(settings, "red")


def test_the_noise_that_a_target_leads_to_counts_as_well(config: dict[str, Any], tmp_path: Path) -> None:
    grid, settings = grid_with({**config, "privacy": "dp-sgd", "dp-epsilon": 2.0}, tmp_path, "noise = 2")
    with pytest.raises(
        RunError, match=r"red: refused by this party's policy, noise=2: the run's noise multiplier is 1"
    ):
        serve(grid, settings)


def test_a_lifetime_ends_a_run_and_any_later_one(config: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    run = {**config, **NOISE, "batch-size": 12}
    first = epsilon([Spent(12 / 36, 1.0, 3)], 1e-5)
    line = f"lifetime-epsilon = {1.01 * first}"
    grid, settings = grid_with(run, tmp_path, line)
    with pytest.raises(RunError, match="round 2 would bring its ε over all runs over this party's lifetime-epsilon="):
        serve(grid, settings)
    spent = [
        line["epsilon"]
        for line in read_metrics(Path(run["run-dir"]))
        if line.get("task") == "red" and "epsilon" in line
    ]
    assert spent == pytest.approx([first])
    grid, settings = grid_with({**run, "seed": 1, "run-dir": run["run-dir"] + "-2"}, tmp_path, line)
    with pytest.raises(RunError, match="round 1 would bring its ε over all runs over this party's lifetime-epsilon="):
        serve(grid, settings)


@pytest.mark.parametrize("tell", [(), ("validation",), ("test", "norm"), ("loss", "counts"), ("alignment",), TELL])
@pytest.mark.usefixtures("report")
def test_what_a_party_does_not_tell_is_sent_nowhere_and_the_run_completes(
    config: dict[str, Any], tmp_path: Path, tell: tuple[str, ...]
) -> None:
    grid, settings = grid_with({**config, "alignment": True}, tmp_path, f"tell = {list(tell)}")
    run = serve(grid, settings)
    sent = {
        name
        for line in read_metrics(run.directory)
        if line["kind"] in ("tuning", "evaluation") and line["task"] == "red"
        for name in line
    }
    of = {
        "validation": {"validation"},
        "test": {"test"},
        "loss": {"loss"},
        "norm": {"norm"},
        "alignment": {"alignment"},
        "counts": {"images", "steps"},
    }
    for kind, names in of.items():
        assert bool(names & sent) == (kind in tell), kind
    assert "green" in (run.directory / "report.html").read_text()


def test_the_partys_bound_goes_before_the_runs(config: dict[str, Any], tmp_path: Path) -> None:
    grid, settings = grid_with({**config, "max-update-norm": 100.0}, tmp_path, "max-update-norm = 1e-6")
    with pytest.raises(RunError, match=r"red refuses the server's base: .* max-update-norm=1e-06"):
        serve(grid, settings)


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epsilom = 3", "rule 'epsilom' is unknown; did you mean 'epsilon'?"),
        ("dp-epsilon = 3", "rule 'dp-epsilon' is unknown"),
        ("epsilon = -1", "epsilon=-1: it must be a number, 0 or more"),
        ("epsilon = true", "epsilon=True: it must be a number, 0 or more"),
        ("epsilon = inf", "epsilon=inf: it must be a number, 0 or more"),
        ("rounds = 2.5", "rounds=2.5: it must be a whole number"),
        ('privacy = "dp"', "privacy='dp': it takes one of none, dp-sgd"),
        ("privacy = 3", "privacy=3: it must be a string"),
        ('secure-aggregation = "yes"', "secure-aggregation='yes': it must be true or false"),
        ('tell = ["validatio"]', "it takes validation, test, loss, norm, alignment, counts"),
        ("splits = []", "splits=[]: it must name one at least"),
        ('models = "tiny"', "models='tiny': it must be a list of strings"),
        ("epsilon == 3", "is no TOML"),
    ],
)
def test_a_policy_that_cannot_be_read_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(text)
    with pytest.raises(SettingError) as error:
        Policy.read(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"privacy": "dp-sgd"},
            "privacy='dp-sgd' in this SuperNode's --node-config is unknown; it is a rule of the policy",
        ),
        ({"dp-epsilon": 3.0}, "dp-epsilon=3.0 in this SuperNode's --node-config is unknown"),
        ({"secure-aggregation": True}, "it is a rule of the policy"),
        ({"polcy": "x"}, "did you mean 'policy'?"),
        ({"policy": "/nowhere/policy.toml"}, "policy /nowhere/policy.toml cannot be read"),
        ({"policy": 3}, "it must be a path"),
        ({"max-update-norm": True}, "it must be 0 or more"),
    ],
)
def test_nothing_in_a_node_config_is_passed_over(config: dict[str, Any], node: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as error:
        policy_of(node)
    assert message in str(error.value)
    settings = Settings.parse(config)
    grid = InProcessGrid(client_app, 3, settings.as_config())
    grid.contexts[2].node_config.update(node)
    with pytest.raises(RunError) as refused:
        serve(grid, settings)
    assert message in str(refused.value)


@seed(0)
@tries(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.one_of(st.integers(), st.floats(), st.text(), st.booleans()))
def test_no_key_but_the_known_ones_is_taken(key: str, value: Any) -> None:
    known = {
        *(
            "task",
            "data",
            "policy",
            "max-update-norm",
            "trusted-parties",
            "apps-checked",
            "partition-id",
            "num-partitions",
        )
    }
    if key not in known:
        with pytest.raises(SettingError, match="is unknown"):
            policy_of({key: value})


def test_the_template_has_every_rule_and_bounds_nothing(tmp_path: Path) -> None:
    assert tomllib.loads(template()) == {}
    file = tmp_path / "policy.toml"
    file.write_text("\n".join(line.removeprefix("# ") for line in template().splitlines() if " = " in line))
    assert Policy.read(file) == Policy()
    assert Policy().bounds() == []
    assert set(tomllib.loads(file.read_text())) == {kebab(item.name) for item in fields(Policy)}


def test_the_docs_have_the_table_and_the_command_prints_it() -> None:
    text = (Path(__file__).parent.parent / "docs" / "privacy.md").read_text()
    assert table() in text
    assert table() in CliRunner().invoke(app, ["policy", "--markdown"], env={"COLUMNS": "400"}).output
    assert CliRunner().invoke(app, ["policy"]).output.strip() == template().strip()
