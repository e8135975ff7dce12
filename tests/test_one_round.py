"""One server round: what an attack follows is the run itself, whatever setting changes a vector on its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PluginFiles, make_folder
from federation import final, same
from safetensors.torch import load_file
from test_transforms import HEAD as HEAD_OF_A_TRANSFORM
from test_transforms import THERE_AND_BACK

from atm_fl import vectors
from atm_fl.attacks import membership, poisoning
from atm_fl.attacks.scenario import Scenario
from atm_fl.errors import SettingError
from atm_fl.experiments.privacy import HEAD, Line
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.merging import Merge
from atm_fl.privacy.budget import Account, Budget
from atm_fl.privacy.ledger import ledger_path
from atm_fl.privacy.noise import Noise
from atm_fl.runs.checkpoints import checkpoints, load_checkpoint
from atm_fl.runs.metrics import read_metrics
from atm_fl.settings import Settings

CLIENT_LEVEL: dict[str, Any] = {"dp-client-clip": 0.05, "dp-client-noise": 0.5}
SECURE: dict[str, Any] = {"secure-aggregation": True, "proportion": 0.0}
CHANGED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "int8 up": {"codec-up": "int8"},
    "ternary up, with error feedback": {"codec-up": "ternary"},
    "int8 down": {"codec-down": "int8"},
    "ternary down, with error feedback": {"codec-down": "ternary"},
    "dp-sgd": {"privacy": "dp-sgd", "dp-noise": 1.0},
    "client-level clip": {"dp-client-clip": 0.05},
    "client-level noise": CLIENT_LEVEL,
    "secure aggregation": SECURE,
    "secure aggregation, iso-c": SECURE | {"merge": "iso-c"},
    "secure aggregation, client-level noise": SECURE | CLIENT_LEVEL,
    "secure aggregation, scaled tasks": SECURE | {"task-scaling": "noise=0.5, red=2"},
    "scaled tasks": {"task-scaling": "noise=0.5, red=2"},
    "scaled layers": {"layer-scaling": "*.mlp.*=1.5, *norm*=0.5"},
    "momentum": {"server-optimizer": "momentum"},
    "several clients a task": {"tasks": "noise,{red},{other_red},{green}"},
    "participation": {"participation": "noise=2-, red=1-1"},
    "past vectors": {"participation": "red=1-1", "replay-vectors": "fp32"},
    "fraction": {"fraction": 0.5},
    "tsv-m": {"merge": "tsv-m"},
    "kept moments": {"keep-optimizer": True},
    "client momentum": {"client-momentum": 0.5},
    "gradient surgery": {"gradient-surgery": True},
    "ewc": {"ewc": 100.0},
}


class FollowedOnce(Exception):
    """Ends a study after its first run."""


def followed_bases(settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests of the merged models that the attack's first run puts its images through, by round."""
    seen: list[str] = []
    answer = membership.confidences

    def noted(model: Any, head: Any, data: Any) -> torch.Tensor:
        digest = vectors.digest(vectors.Layout.of(model).flatten(model))
        seen.append(digest)
        return answer(model, head, data)

    def stop(line: str) -> None:
        raise FollowedOnce

    monkeypatch.setattr(membership, "confidences", noted)
    with pytest.raises(FollowedOnce):
        membership.study(settings, "noise", folder, members=80, count=4, say=stop)
    monkeypatch.setattr(membership, "confidences", answer)
    assert seen[::2] == seen[1::2]  # the images in question, and the population
    merged = seen[::2] if settings.secure_aggregation else seen[2::4]
    return merged


def run_bases(settings: Settings, folder: Path) -> list[str]:
    """Digests of the run's own bases, by round, in which the attacked party has the attack's images and head."""
    asked = membership.membership_target(settings, "noise", 80)
    parties = []
    for client, task in zip(settings.party_names, settings.task_names, strict=True):
        party = Party(settings, task, client=client, account=Account(folder))
        if client == "noise":
            party.tuned_on = asked.images.take(asked.half(settings, 0).nonzero()[:, 0])
            party.head = asked.head
            party.budget = Budget(settings, "noise", party.tuned_on, Account(folder))
        parties.append(party)
    run = run_loop(settings, parties)
    bases = []
    for path in checkpoints(run.directory)[-settings.rounds :]:
        number = int(path.stem.rsplit("-", 1)[1])
        bases.append(vectors.digest(load_checkpoint(run.directory, run.layout, str, number)[1]))
    return bases


@pytest.fixture
def run(config: dict[str, Any], folders: list[str], noise: str) -> dict[str, Any]:
    """Two rounds of the noise and two other tasks."""
    config |= {"tasks": f"{noise},{folders[0]},{folders[1]}", "rounds": 2, "batch-size": 20, "validate-every": 9}
    return config | {"keep-checkpoints": 0}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_the_attack_follows_the_runs_own_bases(
    run: dict[str, Any], folders: list[str], changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atm_fl.privacy.budget.Noise", lambda multiplier, key: Noise(multiplier, bytes(32)))
    chosen = {**run, **changed}
    other = make_folder(tmp_path / "other" / "red", 7)
    chosen["tasks"] = chosen["tasks"].format(red=folders[0], other_red=other, green=folders[1])
    settings = Settings.parse(chosen)
    bases = run_bases(settings, tmp_path / "ledgers")
    assert len(set(bases)) == 2
    assert followed_bases(settings, tmp_path / "study", monkeypatch) == bases


def test_client_level_noise_is_in_what_is_reported(run: dict[str, Any], tmp_path: Path) -> None:
    answers = []
    for noise_multiplier in (0.0, 50.0):
        chosen = {"rounds": 1, "dp-client-clip": 0.01, "dp-client-noise": noise_multiplier}
        folder = tmp_path / f"study-{noise_multiplier:g}"
        membership.study(Settings.parse(run | chosen), "noise", folder, members=80, count=4, say=str)
        (round_1,) = load_file(str(folder / "run-000.safetensors"))["confidences"]
        answers.append(dict(zip(("local", "merged"), round_1, strict=True)))
    assert torch.equal(answers[0]["local"], answers[1]["local"])  # the server sees the vector before its own noise
    assert float((answers[0]["merged"] - answers[1]["merged"]).abs().mean()) > 0.01


def test_an_unfinished_study_goes_on_from_what_was_sent(run: dict[str, Any], tmp_path: Path) -> None:
    """Arrays of a codec, ring words and numbers of images come back from the disk as they were."""
    for name, changed in {"ternary": {"codec-up": "ternary"}, "secure": SECURE}.items():
        settings, folder = Settings.parse(run | changed), tmp_path / name
        arguments = (settings, "noise", folder, 80, 4, str)
        result = membership.study(*arguments)
        (folder / "run-000.safetensors").unlink()
        assert membership.study(*arguments) == result
        assert not (folder / "followed").exists()


def test_no_local_model_is_attacked_where_none_is_seen(run: dict[str, Any], tmp_path: Path) -> None:
    settings = Settings.parse(run | SECURE)
    result = membership.study(settings, "noise", tmp_path / "study", members=80, count=4, say=str)
    assert [(row["round"], row["model"]) for row in result["rows"]] == [(1, "merged")] * 3 + [(2, "merged")] * 3
    assert membership.write(result, tmp_path / "study").endswith(membership.UNSEEN)
    assert (tmp_path / "study" / "roc.png").exists()


@pytest.fixture
def five(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """One round of five tasks."""
    folders = [str(make_folder(tmp_path / "five" / name, seed)) for seed, name in enumerate("abcde")]
    return config | {"tasks": ",".join(folders), "rounds": 1, "batch-size": 12}


def merged_norm(run_dir: Path) -> float:
    (line,) = (line for line in read_metrics(run_dir) if line["kind"] == "merge")
    return line["norm"]


@pytest.mark.parametrize("changed", [SECURE, SECURE | CLIENT_LEVEL, SECURE | {"task-scaling": "b=0.5"}])
def test_players_whom_nobody_attacks_are_a_secure_run(
    five: dict[str, Any], changed: dict[str, Any], tmp_path: Path
) -> None:
    plain = run_loop(Settings.parse(five | changed))
    played = Settings.parse(five | changed | {"run-dir": str(tmp_path / "played")})
    result = poisoning.study(played, "none", ["b"])
    assert same(final(plain.directory), final(played.run_dir))
    assert result["kept"] is None
    assert "| not seen | not seen |" in poisoning.table([result])
    assert poisoning.table([result]).endswith(poisoning.UNSEEN)


def test_several_clients_of_a_task_are_played_and_one_of_them_can_attack(five: dict[str, Any], tmp_path: Path) -> None:
    """A second client of task b lies about its images, and its vector is nearly all of b's."""
    other = make_folder(tmp_path / "other" / "b", 9)
    five["tasks"] += f",{other}"
    plain = run_loop(Settings.parse(five))
    results = {}
    for attack in ("none", "counts"):
        played = Settings.parse(five | {"run-dir": str(tmp_path / attack)})
        results[attack] = poisoning.study(played, attack, ["b.2"])
        assert set(results[attack]["tasks"]) == set("abcde")
        assert set(results[attack]["kept"]) == {*"abcde", "b.2"}
        assert same(final(plain.directory), final(played.run_dir)) == (attack == "none")


@pytest.mark.parametrize("attack", [name for name in poisoning.ATTACKS if name != "none"])
def test_every_attack_runs_under_secure_aggregation(five: dict[str, Any], attack: str, tmp_path: Path) -> None:
    """Also one whose vector is beyond the ring's reach: it is sent as far as words go."""
    settings = Settings.parse(five | SECURE | {"secure-range": 0.02})
    assert set(poisoning.study(settings, attack, ["b"])["tasks"]) == set("acde")


@pytest.mark.parametrize("changed", [{"task-scaling": "a=3, b=0.1"}, {"dp-client-clip": 0.01}, {"codec-up": "int8"}])
def test_shares_are_told_of_the_vectors_that_the_server_merges(
    five: dict[str, Any], changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a task's two clients, of which one lies about its images, where a task may have several."""
    attacker = "b"
    if "dp-client-clip" not in changed:
        five["tasks"] += f",{make_folder(tmp_path / 'other' / 'b', 9)}"
        attacker = "b.2"
    merged: list[dict[str, torch.Tensor]] = []
    asked_of: list[dict[str, torch.Tensor]] = []
    combine, kept_shares = Merge.combine, poisoning.kept_shares

    def noted(merge: Merge, vectors: dict[str, torch.Tensor], *more: Any, **named: Any) -> torch.Tensor:
        merged.append({task: vector.clone() for task, vector in vectors.items()})
        return combine(merge, vectors, *more, **named)

    def asked(merge: Merge, vectors: dict[str, torch.Tensor]) -> dict[str, float]:
        asked_of.append(vectors)
        return kept_shares(merge, vectors)

    monkeypatch.setattr(Merge, "combine", noted)
    monkeypatch.setattr(poisoning, "kept_shares", asked)
    poisoning.study(Settings.parse(five | changed), "counts", [attacker])
    assert [list(vectors) for vectors in asked_of] == [list("abcde")]
    assert all(torch.equal(merged[0][task], vector) for task, vector in asked_of[0].items())


def test_a_transform_that_no_attack_knows_is_named(five: dict[str, Any], plugin_files: PluginFiles) -> None:
    plugin_files(back=HEAD_OF_A_TRANSFORM + THERE_AND_BACK)
    changed = Settings.parse(five | {"transforms": "doubled"})
    with pytest.raises(SettingError, match="transforms='doubled': attacks forge what travels; leave them out"):
        poisoning.study(changed, "sign-flip", ["b"])
    with pytest.raises(SettingError, match="transforms='doubled': the attacks know none; leave them out"):
        Scenario.parse(five | {"transforms": "doubled"})


def test_a_clip_that_the_client_makes_does_not_bind_the_one_who_lies(five: dict[str, Any], tmp_path: Path) -> None:
    norms = {}
    for name, changed in {"server": {}, "client": SECURE}.items():
        settings = Settings.parse(five | changed | {"dp-client-clip": 0.01, "run-dir": str(tmp_path / name)})
        poisoning.study(settings, "scale", ["b"])
        norms[name] = merged_norm(tmp_path / name)
    assert norms["server"] <= 0.01 < norms["client"]


def test_no_attack_charges_this_machines_ledger(
    run: dict[str, Any], five: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where nobody asks for privacy: what was rehearsed was not told to anyone."""
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    both: list[dict[str, Any]] = [{}, {"privacy": "dp-sgd", "dp-noise": 1.0}]
    for privacy in both:
        chosen = {**privacy, "rounds": 1}
        place = tmp_path / ("private" if privacy else "plain")
        membership.study(Settings.parse(run | chosen), "noise", place / "study", members=80, count=4, say=str)
        poisoning.study(Settings.parse(five | chosen | {"run-dir": str(place / "poison")}), "sign-flip", ["b"])
        assert (place / "study" / "privacy" / "ledger.sqlite").exists()
    assert not ledger_path().exists()


def test_an_attack_on_a_run_where_parties_are_away_is_refused(five: dict[str, Any]) -> None:
    for changed, message in (({"participation": "a=1-1"}, "participation=a=1-1"), ({"fraction": 0.5}, "fraction=0.5")):
        with pytest.raises(SettingError, match=f"{message}: an attack is measured with all tasks in every round"):
            poisoning.study(Settings.parse(five | changed), "sign-flip", ["b"])


def test_no_images_are_sought_in_a_vector_that_nobody_sees(five: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="secure-aggregation=true: the server sees no single vector"):
        Scenario.parse(five | SECURE)


def test_a_row_without_local_models_has_a_place_in_the_privacy_table() -> None:
    merged = [{"round": 1, "model": "merged", "attack": "RMIA", "leak": {"tpr": {"0.01": 0.25}}}]
    line = Line("secure", [], None, None, None, None, merged, None)
    assert line.members_found is None
    cells = dict(zip(HEAD, line.cells(), strict=True))
    assert list(cells.values()).count("25.0%") == 1
