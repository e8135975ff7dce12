"""`import atm_fl`: run, load, merge, compare, callbacks; what ends a run early; metric sinks of other packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import call, final, in_process, same

import atm_fl
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.loop import run_loop
from atm_fl.runs.checkpoints import checkpoints
from atm_fl.runs.run import Run
from atm_fl.settings import Settings


def test_the_import_is_light_and_every_name_is_there() -> None:
    code = "import atm_fl, sys; assert not {'torch', 'numpy'} & set(sys.modules); print(atm_fl.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == atm_fl.__version__
    for name in atm_fl.__all__:
        assert getattr(atm_fl, name)
        assert name in dir(atm_fl)
    with pytest.raises(AttributeError, match="no attribute 'rnu'"):
        _ = atm_fl.rnu


def test_run_is_the_plain_loop_of_the_same_settings(config: dict[str, Any], tmp_path: Path) -> None:
    names = config.pop("tasks").split(",")
    config.pop("run-dir")
    result = atm_fl.run(config | {"rounds": 9}, tasks=names, rounds=2, run_dir=tmp_path / "python")
    text = "".join(f"{key} = {value!r}\n" for key, value in config.items())
    (tmp_path / "mine.toml").write_text(text)
    again = atm_fl.run(tmp_path / "mine.toml", tasks=names, rounds=2, run_dir=tmp_path / "toml")
    loop = run_loop(Settings.parse(config | {"tasks": ",".join(names), "rounds": 2, "run-dir": str(tmp_path / "loop")}))
    assert same(final(result.directory), final(loop.directory))
    assert same(final(again.directory), final(loop.directory))
    assert (result.rounds, result.state) == (2, "finished")
    assert set(result.validation) == {0, 1, 2}
    assert set(result.test) == {0, 2}
    assert set(result.test[2]) == {"red", "green", "blue"}
    assert result.settings["learning-rate"] == config["learning-rate"]
    assert result.report().is_file()
    assert {f"vit.{name}" for name in result.state_dict()} == set(final(loop.directory))
    assert torch.equal(loop.layout.flatten(result.model()), loop.base)
    assert atm_fl.load(result.directory).test == result.test
    page = atm_fl.compare(result, again.directory, out=tmp_path / "page.html")
    assert "python" in page.read_text()
    first = result.export("safetensors", tmp_path / "base", round=0).folder / "model.safetensors"
    atm_fl.merge(first, [result, again], tmp_path / "M.safetensors", "mean", scaling=1.0)
    started = Run(Settings.parse(loop.settings.as_config() | {"start": str(tmp_path / "M.safetensors"),
                                                              "run-dir": str(tmp_path / "next")}))  # fmt: skip
    started.close()
    torch.testing.assert_close(started.base, loop.base)


def test_what_cannot_work_is_said_at_once(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="setting 'roundz' is unknown; did you mean 'rounds'"):
        atm_fl.run(config, roundz=2)
    with pytest.raises(SettingError, match="is not a file of settings"):
        atm_fl.run(tmp_path / "no.toml")
    with pytest.raises(SettingError, match="round-timeout=1.0: it has no effect with --runtime plain"):
        atm_fl.run(config, round_timeout=1.0)
    with pytest.raises(RunError, match="is not a run directory"):
        atm_fl.load(tmp_path)
    with pytest.raises(SettingError, match="two runs or more, not 1"):
        atm_fl.compare(tmp_path)


def test_callbacks_see_each_round_and_end_a_run(config: dict[str, Any]) -> None:
    seen: list[tuple[int, int]] = []

    def log(result: atm_fl.Result) -> None:
        seen.append((result.rounds, len(result.validation)))

    result = atm_fl.run(config, rounds=5, callbacks=[lambda result: result.rounds == 2, log])
    assert seen == [(1, 1), (2, 2)]
    assert (result.rounds, result.state) == (2, "stopped")
    assert set(result.test) == {0, 2}
    further = atm_fl.run(config, rounds=3, resume=True)
    unbroken = atm_fl.run(config, rounds=3, run_dir=config["run-dir"] + "-unbroken")
    assert same(final(further.directory), final(unbroken.directory))


@pytest.fixture
def worse(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run whose validation accuracy is 0.5, 0.7, 0.3, 0.3, … by round, whatever the model does."""
    from atm_fl.federation.client import Party

    def told(party: Party, base: torch.Tensor, splits: tuple[str, ...], *more: Any, **named: Any) -> dict[str, float]:
        rounds = getattr(party, "asked", 0)
        party.asked = rounds + 1  # type: ignore[attr-defined]
        return dict.fromkeys(splits, [0.5, 0.7, 0.3][min(rounds, 2)])

    monkeypatch.setattr(Party, "evaluate", told)
    return config | {"rounds": 6, "keep-checkpoints": 1}


def test_a_collapse_is_told_in_its_round_and_the_best_model_stays(
    worse: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = atm_fl.run(worse)
    (line,) = [line for line in result.metrics if line["kind"] == "warning"]
    assert line["round"] == 2
    text = (
        "round 2: the model has collapsed: validation accuracy 30.0 %, at the start 50.0 %, best in round 1 with 70.0 %"
    )
    assert line["text"].startswith(text)
    assert result.best_round == 1
    assert [path.stem for path in checkpoints(result.directory)] == ["round-00001", "round-00006"]
    assert call(monkeypatch, "report", str(result.directory)) == 0
    assert "best round on validation: 1 (70.0 %), checkpoint/round-00001.safetensors" in capsys.readouterr().out
    assert "Best round on validation: 1 (70.0 %)" in (result.directory / "report.html").read_text()


def test_a_finite_collapse_of_a_real_run_is_told(config: dict[str, Any]) -> None:
    """The tuned model is thrown far away, and every number stays finite."""
    change = {"tasks": "digits", "model": "vit_micro", "learning-rate": 0.5, "scaling": 20.0, "rounds": 1}
    result = atm_fl.run(config | change)
    (said,) = result.warnings
    assert "round 1: the model has collapsed" in said
    assert "best in round 0" in said


@pytest.mark.parametrize("runtime", ["plain", "in-process"])
def test_patience_ends_a_run_after_its_final_evaluation(worse: dict[str, Any], runtime: str) -> None:
    settings = Settings.parse(worse | {"patience": 2})
    (run_loop if runtime == "plain" else in_process)(settings)
    result = atm_fl.load(settings.run_dir)
    # the base of round 3 is measured in round 4, which ends then
    assert (result.rounds, result.state, result.best_round) == (4, "stopped", 1)
    assert set(result.test) == {0, 4}
    (stop,) = [line["text"] for line in result.metrics if line["kind"] == "stop"]
    assert stop == "no better validation accuracy in 2 rounds, as patience=2 says"
    assert [path.stem for path in checkpoints(result.directory)] == ["round-00001", "round-00004"]


def test_patience_below_0_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="patience=-1: it must be 0 or more"):
        Settings.parse(config | {"patience": -1})


def test_mlflow_gets_every_number_in_a_local_store(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    result = atm_fl.run(config, metric_sinks="mlflow", rounds=2)
    (one,) = mlflow.MlflowClient().search_runs(["0"])
    assert one.info.status == "FINISHED"
    assert one.data.params["rounds"] == "2"
    history = mlflow.MlflowClient().get_metric_history(one.info.run_id, "evaluation/red/validation")
    assert {each.step: each.value for each in history} == {
        number: pytest.approx(of_task["red"]) for number, of_task in result.validation.items()
    }


def test_wandb_gets_every_number_offline(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[dict[str, Any]] = []
    start = wandb.init

    def watched(**more: Any) -> Any:
        run = start(**more)
        log = run.log
        run.log = lambda values: (logged.append(dict(values)), log(values))
        return run

    monkeypatch.setattr(wandb, "init", watched)
    result = atm_fl.run(config, metric_sinks="wandb", rounds=2)
    assert list(result.directory.rglob("*.wandb"))
    found = {each["round"]: each["evaluation/red/validation"] for each in logged if "evaluation/red/validation" in each}
    assert found == {number: of_task["red"] for number, of_task in result.validation.items()}


def test_a_sink_without_its_package_is_one_clear_line(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SettingError, match=rf"metric-sinks='{name}' needs the package .*atm-fl\[{name}\]"):
            atm_fl.run(config, metric_sinks=name)
