"""Noise of DP-SGD: no two releases share it, whatever they have in common; and the ledger that charges for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_folder
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as tries
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import kstest
from torch import Tensor
from typer.testing import CliRunner

from atm_fl.attacks import audit
from atm_fl.cli.terminal import app
from atm_fl.errors import RunError
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.privacy.accounting import Spent, epsilon
from atm_fl.privacy.budget import Account, Budget, _digest
from atm_fl.privacy.disclosure import DISCLOSED
from atm_fl.privacy.ledger import Holding, Ledger
from atm_fl.privacy.noise import GRID, Noise, add_noise
from atm_fl.runs.metrics import read_metrics
from atm_fl.settings import Settings
from atm_fl.tasks import Split, cache_dir

RUN = "0123456789abcdef"
RECORDS = 36
STEP = {"optimizer": "sgd", "learning-rate": 1.0, "weight-decay": 0.0, "batch-size": RECORDS, "momentum": 0.0}
DP = {**STEP, "privacy": "dp-sgd", "dp-noise": 8.0, "dp-clip": 0.5}
"""One full-batch step: the vector is the clipped mean gradient and one noise of σ C / batch on each element."""
DEVIATION = 8.0 * 0.5 / RECORDS


@pytest.fixture(autouse=True)
def _own_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))


def release(settings: Settings, folder: str, run: str = RUN, client: str = "") -> Tensor:
    """What a party that has just started sends in round 1 of the run, float32 [n]."""
    party = Party(settings, folder, client=client)
    arrays = party.train(party.model.pretrained, 1, run).arrays
    assert arrays is not None
    return torch.from_numpy(arrays["values"])


def noises_between(one: Tensor, other: Tensor) -> float:
    """The distance of two releases in units of two independent noises: 1 ± 0.03, or near 0 if they share noise."""
    return float((one - other).norm()) / (2 * len(one)) ** 0.5 / DEVIATION


def edit(folder: Path, change: str, item: int, colour: int) -> None:
    """Replace, add or remove one training image."""
    files = sorted((folder / "train").glob("*/*.png"))
    file = files[item % len(files)]
    picture = Image.fromarray(np.full((16, 16, 3), colour, np.uint8))
    if change == "remove":
        file.unlink()
    else:
        picture.save(file if change == "replace" else file.with_name(f"added-{item}-{colour}.png"))


@seed(0)
@tries(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    change=st.sampled_from(["replace", "add", "remove"]),
    item=st.integers(0, RECORDS - 1),
    colour=st.integers(0, 255),
    target=st.sampled_from([{}, {"dp-noise": 0.0, "dp-epsilon": 0.25, "dp-policy": "warn"}]),
)
def test_releases_of_neighbouring_data_differ_by_two_independent_noises(
    config: dict[str, Any], tmp_path: Path, change: str, item: int, colour: int, target: dict[str, Any]
) -> None:
    """The same TOML, run, client, round and base: nothing differs but one record, in the files of one folder."""
    folder = tmp_path / "edited"
    for old in (folder, cache_dir() / "privacy"):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(config["tasks"].split(",")[0], folder)
    settings = Settings.parse({**config, **DP, **target, "tasks": str(folder), "rounds": 1})
    first = release(settings, str(folder))
    assert torch.equal(release(settings, str(folder)), first)  # a lost round, done again by a party that was restarted
    edit(folder, change, item, colour)
    second = release(settings, str(folder))
    if target:
        assert float((first - second).norm() / first.norm()) > 1.2
    else:
        assert noises_between(first, second) == pytest.approx(1, abs=0.05)
    assert abs(float(torch.nn.functional.cosine_similarity(first, second, dim=0))) < 0.1


@pytest.mark.parametrize("what", ["client", "run", "base", "setting", "no run"])
def test_noise_is_shared_with_no_other_client_run_base_or_setting(config: dict[str, Any], what: str) -> None:
    settings, folder = Settings.parse({**config, **DP}), config["tasks"].split(",")[0]
    first = release(settings, folder, client="red")
    if what == "client":
        second = release(settings, folder, client="red.2")
    elif what == "run":
        second = release(settings, folder, run=RUN[::-1], client="red")
    elif what == "setting":
        second = release(Settings.parse({**config, **DP, "seed": 1}), folder, client="red")
    elif what == "base":
        party = Party(settings, folder, client="red")
        arrays = party.train(party.model.pretrained * (1 + 1e-6), 1, RUN).arrays
        assert arrays is not None
        second = torch.from_numpy(arrays["values"])
    else:
        first, second = (release(settings, folder, run="") for _ in range(2))
    assert noises_between(first, second) == pytest.approx(1, abs=0.05)


def test_a_repetition_that_would_not_be_the_same_is_drawn_and_paid_for_anew(config: dict[str, Any]) -> None:
    """Whatever the ledger does not know of changed (here the head): the old noise must not be under the new vector."""
    settings, folder = Settings.parse({**config, **DP}), config["tasks"].split(",")[0]
    party = Party(settings, folder)
    base = party.model.pretrained
    first = party.train(base, 1, RUN)
    party.head.weight.data.neg_()
    second = party.train(base, 1, RUN)
    assert first.arrays is not None
    assert second.arrays is not None
    one, other = (torch.from_numpy(update.arrays["values"]) for update in (first, second) if update.arrays)
    assert noises_between(one, other) == pytest.approx(1, abs=0.05)
    assert first.tuning["epsilon"] == epsilon([Spent(1.0, 8.0, 1)], 1e-5)
    assert second.tuning["epsilon"] == epsilon([Spent(1.0, 8.0, 2)], 1e-5)


@pytest.mark.slow
def test_another_process_repeats_a_lost_round_and_nothing_else(config: dict[str, Any], tmp_path: Path) -> None:
    folder = config["tasks"].split(",")[0]
    chosen = json.dumps({**config, **DP, "model": "vit_micro"})
    script = (
        "import json, sys, torch; from atm_fl.settings import Settings; from test_noise import release; "
        f"torch.save(release(Settings.parse(json.loads(sys.argv[1])), {folder!r}), sys.argv[2])"
    )

    def elsewhere(name: str) -> Tensor:
        path = tmp_path / name
        environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
        subprocess.run([sys.executable, "-c", script, chosen, str(path)], check=True, env=environment)
        return torch.load(path)

    first = elsewhere("first")
    assert torch.equal(elsewhere("again"), first)
    edit(Path(folder), "replace", 5, 200)
    assert noises_between(first, elsewhere("edited")) == pytest.approx(1, abs=0.05)


def test_noise_is_gaussian_and_on_a_grid_coarser_than_a_floats_bits() -> None:
    deviation = 0.37
    sums = torch.linspace(-1, 1, 400_000)
    noised = sums.clone()
    add_noise(noised, deviation, Noise(1.0, bytes(32)).generator())
    assert kstest(((noised - sums) / deviation).numpy(), "norm").pvalue > 1e-3
    step = 2.0 ** np.floor(np.log2(deviation * GRID))
    assert bool((noised.double() / step == (noised.double() / step).round()).all())
    again = sums.clone()
    add_noise(again, deviation, Noise(1.0, bytes(32)).generator())
    assert torch.equal(again, noised)
    add_noise(again, deviation, Noise.fresh(1.0).generator())
    assert not torch.equal(again, noised)


# ---------------------------------------------------------------------------------------------------------- the ledger


def split(*colours: int) -> Split:
    """Grey images."""
    images = torch.stack([torch.full((3, 4, 4), colour, dtype=torch.uint8) for colour in colours])
    return Split(images, torch.zeros(len(colours), dtype=torch.int64))


def charged(settings: Settings, source: str, data: Split) -> list[Spent]:
    return Budget(settings, "any", data, source=source).ledger.history(Holding.of(source, data))


@seed(0)
@tries(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sets(st.integers(0, 9), min_size=1)), min_size=1, max_size=6))
def test_a_record_pays_for_every_version_and_source_that_it_was_in(
    config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, held: list[tuple[str, set[int]]]
) -> None:
    """Against the definition: a data set pays for releases of its source, and of any data that share a record."""
    folder = tmp_path_factory.mktemp("ledgers")
    settings = Settings.parse({**config, **DP, "rounds": 1})
    for number, (source, colours) in enumerate(held):
        budget = Budget(settings, "any", split(*sorted(colours)), Account(folder), source=source)
        budget.spend(f"{number:016x}", 1, torch.zeros(3))
        expected = sum(other == source or bool(theirs & colours) for other, theirs in held[: number + 1])
        assert len(budget.ledger.history(budget.holding)) == expected


def test_editing_or_moving_the_data_begins_no_new_budget(config: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(config["tasks"].split(",")[0])
    settings = Settings.parse({**config, **DP})
    release(settings, str(folder))
    edit(folder, "replace", 0, 7)
    release(settings, str(folder), run="f" * 16)
    moved = folder.rename(tmp_path / "elsewhere")
    party = Party(settings, str(moved))
    assert len(party.budget.ledger.history(party.budget.holding)) == 2
    unrelated = Party(settings, str(make_folder(tmp_path / "unrelated", 99)))
    assert unrelated.budget.ledger.history(unrelated.budget.holding) == []


def test_runs_without_privacy_are_in_the_ledger(config: dict[str, Any]) -> None:
    run_loop(Settings.parse({**config, "rounds": 2}))
    settings = Settings.parse({**config, **DP})
    party = Party(settings, settings.task_names[0])
    history = party.budget.ledger.history(party.budget.holding)
    assert epsilon(history, 1e-5) == float("inf")
    assert len(history) == 1


@pytest.mark.parametrize(
    "changed",
    [{}, {"seed": 1}, {"dp-noise": 0.0, "dp-epsilon": 0.5}, {"dp-delta": 0.99}, {"dp-noise": 1e-9}, {"tasks": "moved"}],
)
def test_a_lifetime_stops_any_run_whatever_its_seed_or_configuration(
    config: dict[str, Any], tmp_path: Path, changed: dict[str, Any]
) -> None:
    settings, folder = Settings.parse({**config, **DP}), config["tasks"].split(",")[0]
    once = epsilon([Spent(1.0, 8.0, 1)], 1e-5)
    party = Party(settings, folder, account=Account(lifetime=1.05 * once))
    party.train(party.model.pretrained, 1, RUN)
    if changed.get("tasks"):
        folder = shutil.copytree(folder, tmp_path / "moved").as_posix()
    later = Party(
        Settings.parse({**config, **DP, **changed, "tasks": folder}), folder, account=Account(lifetime=1.05 * once)
    )
    with pytest.raises(RunError, match=r"round 1 would bring its ε over all runs over this party's lifetime-epsilon="):
        later.train(later.model.pretrained, 1, "f" * 16)
    plain = Party(Settings.parse(config), folder, account=Account(lifetime=1.05 * once))
    with pytest.raises(RunError, match="a run without dp-sgd would bring its ε"):
        plain.train(plain.model.pretrained, 1, "e" * 16)
    assert epsilon(party.budget.ledger.history(party.budget.holding), 1e-5) == once  # what was refused costs nothing


def test_what_older_ledgers_say_is_taken_over(config: dict[str, Any]) -> None:
    data = split(1, 2, 3)
    old = cache_dir() / "privacy" / f"{_digest(*data.digests)}.json"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps({"run a": {"round 1": [0.1, 1.0, 10], "round 2": [0.1, 1.0, 10]}, "b": {"x": [1, 2, 3]}}))
    settings = Settings.parse({**config, **DP})
    expected = [Spent(0.1, 1.0, 10), Spent(0.1, 1.0, 10), Spent(1.0, 2.0, 3)]
    assert charged(settings, "a", data) == expected
    assert charged(settings, "a", data) == expected  # once


def test_the_ledger_is_its_owners_alone_and_forgets_old_keys(config: dict[str, Any]) -> None:
    budget = Budget(Settings.parse({**config, **DP}), "any", split(1, 2))
    for number in range(1, 7):
        budget.spend(RUN, number, torch.zeros(3))
    with budget.ledger.transaction() as file:
        kept = [number for (number,) in file.execute("SELECT round FROM releases WHERE key IS NOT NULL ORDER BY round")]
    assert kept == [4, 5, 6]
    assert budget.ledger.path.stat().st_mode & 0o777 == 0o600
    assert budget.ledger.path.parent.stat().st_mode & 0o777 == 0o700


def test_the_command_tells_what_each_source_has_spent(config: dict[str, Any]) -> None:
    assert CliRunner().invoke(app, ["ledger"]).exit_code == 0
    red, green, _ = config["tasks"].split(",")
    release(Settings.parse({**config, **DP}), red)
    run_loop(Settings.parse({**config, "tasks": green, "rounds": 1}))
    output = CliRunner().invoke(app, ["ledger"]).output
    once = epsilon([Spent(1.0, 8.0, 1)], 1e-5)
    assert f"{red}: ε {once:.3f}, runs 1, releases 1, last 20" in output
    assert f"{green}: ε inf, runs 1, releases 1, last 20" in output


def test_an_error_leaves_the_ledger_as_it_was(tmp_path: Path, config: dict[str, Any]) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with suppress(ZeroDivisionError), ledger.transaction() as file:
        file.execute("INSERT INTO records VALUES ('v', 'r')")
        raise ZeroDivisionError
    with ledger.transaction() as file:
        assert file.execute("SELECT * FROM records").fetchall() == []


# ---------------------------------------------------------------------------------------------------------- and beside


def test_a_private_party_sends_no_number_that_is_not_on_the_list(config: dict[str, Any]) -> None:
    """Over all settings that make a party send more, the loss, the drawn batches and their time never travel."""
    plain = {"task", "kind", "round", "time", "seconds_decode", "bytes_up", "bytes_down"}  # the server's own
    for number, changed in enumerate(
        ({}, {"keep-optimizer": True, "optimizer": "adamw"}, {"codec-up": "topk:0.1"}, {"privacy": "clip-only"})
    ):
        changed = {"dp-noise": 0.0} | changed if "privacy" in changed else changed
        run = run_loop(Settings.parse({**config, **DP, **changed, "run-dir": f"{config['run-dir']}-{number}"}))
        sent = {
            name for line in read_metrics(run.directory) if line["kind"] in ("tuning", "evaluation") for name in line
        }
        assert sent - plain <= set(DISCLOSED)
        assert {"epsilon", "validation", "test"} <= sent


def test_the_docs_list_what_a_private_party_sends() -> None:
    text = (Path(__file__).parent.parent / "docs" / "privacy.md").read_text()
    for name, why in DISCLOSED.items():
        assert f"| `{name}` | {why} |" in text


def test_the_audit_finds_noise_that_is_shared(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.parse({**config, **DP})
    honest = audit.shared_noise(settings, settings.task_names[0])
    assert honest.pop("repeated") == 0
    assert all(distance == pytest.approx(1, abs=0.05) for distance in honest.values())
    monkeypatch.setattr("atm_fl.privacy.budget.Noise", lambda multiplier, key: Noise(multiplier, bytes(32)))
    shared = audit.shared_noise(settings, settings.task_names[0])
    assert shared["replaced"] < audit.SHARED  # of other numbers of records the same key draws other batches and noise


def test_the_command_ends_with_1_if_noise_is_shared(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "private.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in {**config, **DP}.items()))
    arguments = ["attack", "audit", str(file), "--task", config["tasks"].split(",")[0], "--canaries", "10"]
    done = CliRunner().invoke(app, [*arguments, "--guesses", "4"])
    assert done.exit_code == 0, done.output
    assert "repeated 0.000" in done.output
    monkeypatch.setattr("atm_fl.privacy.budget.Noise", lambda multiplier, key: Noise(multiplier, bytes(32)))
    done = CliRunner().invoke(app, [*arguments, "--guesses", "4"])
    assert isinstance(done.exception, RunError)
