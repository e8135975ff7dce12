"""Settings and the command line: every mistake is one line and a status, before any work starts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest
from federation import call
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from atm_fl import tasks as registry
from atm_fl.cli import terminal
from atm_fl.errors import RunError, SettingError
from atm_fl.experiments import contest, read_study
from atm_fl.federation import shared_model
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.progress import _print_rounds
from atm_fl.settings import Settings, defaults

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"tasks": "mnist,digit"}, "task 'digit' is unknown; did you mean 'digits'?"),
        ({"tasks": "mnist,mnist"}, "names 'mnist' twice"),
        ({"merge": "means"}, "merge='means' is unknown; did you mean 'mean'?"),
        ({"model": "vit"}, "model='vit' is unknown"),
        ({"learning_rate": 1}, "setting 'learning_rate' is unknown; did you mean 'learning-rate'?"),
        ({"rounds": 0}, "rounds=0: it must be at least 1"),
        ({"local-epochs": -1}, "local-epochs=-1"),
        ({"batch-size": 0}, "batch-size=0"),
        ({"learning-rate": float("nan")}, "learning-rate=nan: it must be a positive number"),
        ({"learning-rate": -0.1}, "learning-rate=-0.1"),
        ({"learning-rate": "fast"}, "learning-rate='fast': it must be a number"),
        ({"rounds": 2.5}, "rounds=2.5: it must be a whole number"),
        ({"rounds": True}, "rounds=True: it must be a whole number"),
        ({"scaling": float("inf")}, "scaling=inf"),
        ({"optimizer": "adam"}, "optimizer='adam': it takes one of adamw, sgd"),
        ({"on-failure": "retry"}, "on-failure='retry': it takes one of abort, skip"),
        ({"min-successful": 9, "on-failure": "skip"}, "min-successful=9: there are only 8 clients"),
        ({"min-successful": 2}, "min-successful=2: it needs on-failure=skip"),
        ({"device": "gpu"}, "device='gpu'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_fix(wrong: dict[str, Any], words: str, monkeypatch) -> None:
    with pytest.raises(SettingError) as error:
        Settings.parse(wrong)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_line_says_so_in_one_line_with_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = str(ROOT / "configs" / "demo.toml")
    for wrong in ("rounds=0", "tasks=mnist,nist", "nonsense=1", "rounds", "start=nowhere", "resume=true"):
        assert call(monkeypatch, "run", config, "-c", wrong, "-c", f"run-dir={tmp_path}/run") == 2
        said = capsys.readouterr()
        assert said.err.startswith("atm-fl: ")
        assert len(said.err.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()
    assert call(monkeypatch, "run", str(tmp_path / "none.toml")) == 2
    assert "is not a file" in capsys.readouterr().err
    broken = tmp_path / "broken.toml"
    broken.write_text("rounds = = 3")
    assert call(monkeypatch, "run", str(broken)) == 2
    assert "is not valid TOML" in capsys.readouterr().err


@pytest.mark.usefixtures("report")
@pytest.mark.parametrize("runtime", ["plain", "in-process"])
def test_a_run_ends_with_a_table_and_a_report(
    runtime: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    assert call(monkeypatch, "run", str(file), "--runtime", runtime, "-c", "rounds=1") == 0
    said = capsys.readouterr().out
    assert "mean" in said
    assert "report.html" in said.replace("\n", "")
    assert call(monkeypatch, "run", str(file), "--runtime", runtime, "-c", "rounds=1") == 2
    assert call(monkeypatch, "run", str(file), "--runtime", runtime, "-c", "resume=true", "-c", "rounds=2") == 0
    assert call(monkeypatch, "report", config["run-dir"]) == 0


@pytest.mark.parametrize("runtime", ["plain", "in-process"])
def test_a_failed_run_has_a_status(
    runtime: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "run.toml"
    config["tasks"] = config["tasks"].rsplit(",", 1)[0] + ",/no/such/folder"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    assert call(monkeypatch, "run", str(file), "--runtime", runtime) in (1, 2)
    assert "/no/such/folder does not exist" in capsys.readouterr().err.replace("\n", "")


def test_a_deployment_sends_int4_unless_it_is_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from atm_fl.server import deployment

    taken: list[tuple[str, str]] = []

    def submit(settings: Settings, *_: Any) -> None:
        taken.append((settings.codec_up, settings.codec_down))
        raise RunError("enough")

    monkeypatch.setattr(deployment, "submit", submit)
    (tmp_path / "plain.toml").write_text("rounds = 1\n")
    (tmp_path / "says.toml").write_text('codec-down = "fp16"\n')
    for file, more in (("plain", []), ("says", []), ("says", ["-c", "codec-up=fp32"])):
        where = [str(tmp_path / f"{file}.toml"), "-c", f"run-dir={tmp_path / 'run'}"]
        assert call(monkeypatch, "run", *where, "--runtime", "deployment", *more) == 1
    assert taken == [("int4", "int4"), ("int4", "fp16"), ("fp32", "fp16")]
    assert terminal.read_config(tmp_path / "plain.toml", []).codec_up == "fp32"


@pytest.mark.parametrize("command", ["tasks", "merges", "settings", "--help"])
def test_it_explains_itself(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert call(monkeypatch, command) == 0
    assert capsys.readouterr().out


def test_pyproject_lists_every_setting_with_its_default() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"] == defaults()


@pytest.mark.parametrize(
    "file", [path.stem for path in (ROOT / "configs").glob("*.toml") if "rows" not in tomllib.loads(path.read_text())]
)
def test_every_configuration_is_valid(file: str) -> None:
    Settings.parse(tomllib.loads((ROOT / "configs" / f"{file}.toml").read_text()))


@pytest.mark.parametrize("file", ["contest", "ablations", "paper_contest", "records", "small_parties"])
def test_every_contest_is_valid(file: str) -> None:
    assert read_study(ROOT / "configs" / f"{file}.toml", contest).rows


def test_a_message_keeps_its_square_brackets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert call(monkeypatch, "run", "[/red] [dinov2]") == 2
    assert "[/red] [dinov2] is not a file" in capsys.readouterr().err


def test_it_says_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert call(monkeypatch, "--version") == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"atm-fl {project['version']}\n"


def test_the_tasks_are_listed_whole_at_80_columns_with_their_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(terminal, "console", Console(width=80))
    # Not by deleting the others: they would come back in another order, which later tests see.
    monkeypatch.setattr(registry.TASKS, "_things", {name: registry.TASKS[name] for name in ("digits", "pcam")})
    assert call(monkeypatch, "tasks") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "…" not in words
    assert "10 classes 1074 + 269 train 454 test embedded UCI Optical Recognition" in words
    assert "2 classes 262144 train 32768 test 23.5 GB, not on disk" in words
    assert "needs atm-fl[data]). CC0" in words  # Rich would take the brackets for a style


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("contest", "atm-fl compare"),
        ("codecs", "atm-fl compare"),
        ("merges", "atm-fl study merges"),
        ("privacy", "atm-fl study privacy"),
        ("reconstruction", "atm-fl attack reconstruct"),
    ],
)
def test_a_study_given_to_run_is_told_its_command(
    file: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = ROOT / "configs" / f"{file}.toml"
    assert call(monkeypatch, "run", str(path)) == 2
    assert f"is a study, not a run's settings: use {command} {path}" in capsys.readouterr().err


def test_a_run_or_a_broken_file_given_to_compare_is_told_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "compare", str(ROOT / "configs" / "demo.toml")) == 2
    assert "is not a study, which has [rows]; for a run's settings use atm-fl run" in capsys.readouterr().err
    (tmp_path / "broken.toml").write_text("rows = = 3")
    assert call(monkeypatch, "compare", str(tmp_path / "broken.toml")) == 2
    assert "is not valid TOML" in capsys.readouterr().err
    assert call(monkeypatch, "compare", str(tmp_path / "none.toml")) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert call(monkeypatch, "compare", str(ROOT / "configs" / "reconstruction.toml")) == 2
    assert "is it one for atm-fl attack reconstruct?" in capsys.readouterr().err


def test_what_fails_for_all_parties_is_said_once_and_leaves_no_folder(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    for runtime in ("plain", "in-process"):
        monkeypatch.setattr(shared_model, "find_device", _no_device)
        # a model on the CPU may be left in this process by another test
        assert call(monkeypatch, "run", str(file), "--runtime", runtime, "-c", "device=cuda") in (1, 2)
        said = capsys.readouterr()
        assert said.err.count("cannot be used here") == 1, said.err
        assert not Path(config["run-dir"]).exists()


def _no_device(name: str) -> None:
    raise SettingError(f"device={name!r} cannot be used here: no driver")


def test_a_failed_run_keeps_a_folder_that_was_there(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file, folder = tmp_path / "run.toml", Path(config["run-dir"])
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    shared_model.shared_model.cache_clear()
    monkeypatch.setattr(shared_model, "find_device", _no_device)
    assert call(monkeypatch, "run", str(file), "--runtime", "plain") == 2
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_piped_run_in_process_prints_rounds_and_no_logs_or_colours(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in (config | {"rounds": 2}).items()))
    assert call(monkeypatch, "run", str(file), "--runtime", "in-process") == 0
    said = capfd.readouterr()
    assert "round 2/2: validation" in said.out
    assert "\x1b" not in said.out + said.err
    assert "INFO" not in said.out + said.err
    log = (Path(config["run-dir"]) / "flower.log").read_text()
    assert "INFO" in log
    assert "\x1b" not in log
    # Flower's users find the accuracies in Flower's own result
    assert "test.mean" in log
    assert "validation.mean" in log
    # and TensorBoard has the mean of every evaluated round
    board = EventAccumulator(str(Path(config["run-dir"]) / "tensorboard")).Reload()
    lines = [line for line in read_metrics(Path(config["run-dir"])) if line["kind"] == "evaluation"]
    for event in board.Scalars("evaluation/mean/validation"):
        values = [line["validation"] for line in lines if line["round"] == event.step]
        assert event.value == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert [event.step for event in board.Scalars("evaluation/mean/validation")] == [0, 1, 2]
    assert 2 in [event.step for event in board.Scalars("evaluation/mean/test")]


def test_a_round_s_line_says_epsilon_and_the_time_left(capsys: pytest.CaptureFixture) -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "evaluation", "round": number, "task": "mnist", "validation": 0.5} for number in range(3)
    ]
    for number, seconds in ((1, 10.0), (2, 20.0)):
        lines.append({"kind": "tuning", "round": number, "task": "mnist", "epsilon": 0.75 * number})
        lines.append({"kind": "merge", "round": number, "seconds": seconds})
    settings = Settings.parse({"tasks": "mnist", "rounds": 10})
    _print_rounds(lines, settings, Console(width=120), -1, False)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "start : validation 50.0 % over 1 tasks",
        "round 1/10: validation 50.0 % over 1 tasks, ε 0.75, 10.0 s, about 1 min 30 s left",
    ]


def test_the_library_knows_nothing_of_flower() -> None:
    code = "import sys, atm_fl.federation.loop, atm_fl.runs.report, atm_fl.experiments.contest; "
    code += "sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_documentation_lists_the_merges_as_they_are_declared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "merges", "--markdown") == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "merging.md").read_text()


SLEEPER = """
import signal, sys, time
from atm_fl.cli.terminal import terminated_as_exit
with terminated_as_exit():
    try:
        print("at work", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)
        print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_and_a_second_signal_let_a_command_end_what_it_started(number: int) -> None:
    # The tests may themselves run under nohup.
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)" + SLEEPER
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "at work\n"
        for _ in range(3):
            process.send_signal(number)
            time.sleep(0.1)
        assert process.stdout.read() == "ended\n"
    assert process.returncode == 128 + number


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + SLEEPER.replace("sleep(60)", "sleep(1)")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.read() == "ended\n"
    assert process.returncode == 0


@pytest.mark.slow
def test_a_closed_terminal_leaves_no_superlink_behind(config: dict[str, Any], tmp_path: Path) -> None:
    words = [
        word
        for key, value in (config | {"rounds": 500, "model": "vit_micro"}).items()
        for word in ("-c", f"{key}={value}")
    ]
    (tmp_path / "empty.toml").touch()
    command = [sys.executable, "-c", "from atm_fl.cli import main; main()", "run", str(tmp_path / "empty.toml")]
    process = subprocess.Popen([*command, "--app", str(ROOT), *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    home = str(Path(config["run-dir"]) / "flower")

    def ours() -> list[psutil.Process]:
        processes = psutil.process_iter(["environ"])
        return [each for each in processes if (each.info["environ"] or {}).get("FLWR_HOME") == home]

    deadline = time.monotonic() + 120
    while not any("flwr-serverapp" in " ".join(each.cmdline()) for each in ours()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(ours()) > 1
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    time.sleep(2)
    assert ours() == []
