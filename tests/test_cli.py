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

from atm_fl import cli
from atm_fl.errors import RunError, SettingError
from atm_fl.experiments import contest, read_study
from atm_fl.settings import Settings, defaults

ROOT = Path(__file__).parents[1]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of `atm-fl` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["atm-fl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


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
        ({"min-successful": 9}, "min-successful=9: there are only 8 clients"),
        ({"device": "gpu"}, "device='gpu'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_mend(wrong: dict[str, Any], words: str, monkeypatch) -> None:
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
    from server import deployment

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
    assert cli.read_config(tmp_path / "plain.toml", []).codec_up == "fp32"


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


@pytest.mark.parametrize("file", ["contest", "ablations", "paper_contest"])
def test_every_contest_is_valid(file: str) -> None:
    assert read_study(ROOT / "configs" / f"{file}.toml", contest).rows


def test_a_message_keeps_its_square_brackets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert call(monkeypatch, "run", "[/red] [dinov2]") == 2
    assert "[/red] [dinov2] is not a file" in capsys.readouterr().err


def test_the_library_knows_nothing_of_flower() -> None:
    code = "import sys, atm_fl.loop, atm_fl.report, atm_fl.experiments.contest; sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_documentation_lists_the_merges_as_they_are_declared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "merges", "--markdown") == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "merging.md").read_text()


SLEEPER = """
import signal, sys, time
from atm_fl.cli import _terminated_as_exit
with _terminated_as_exit():
    try:
        print("at work", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)
        print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_and_a_second_signal_let_a_command_end_what_it_started(number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True) as process:
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
        found = psutil.process_iter(["environ"])
        return [each for each in found if (each.info["environ"] or {}).get("FLWR_HOME") == home]

    deadline = time.monotonic() + 120
    while not any("flwr-serverapp" in " ".join(each.cmdline()) for each in ours()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(ours()) > 1
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    time.sleep(2)
    assert ours() == []
