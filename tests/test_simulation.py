"""Ray simulation: what the machine has no room for is refused, and what ended a run is brought out of Flower's log."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
from federation import call
from hypothesis import given
from hypothesis import strategies as st

from atm_fl.errors import RunError
from atm_fl.server import simulation
from atm_fl.server.simulation import failure, run_simulation
from atm_fl.settings import Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cpus", "4096"), "--cpus=4096: this machine has 2 CPUs; reserve 2 at most"),
        (("--gpus", "1"), "--gpus=1: this machine has no GPU; leave --gpus out"),
        (("--cpus", "0"), "--cpus=0: a client needs a part of a CPU, as 0.5"),
        (("--gpus=-1",), "--gpus=-1: it must be 0 or more"),
    ],
)
def test_what_the_machine_has_not_is_refused_before_anything_starts(
    arguments: tuple[str, ...],
    message: str,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("it was started"))
    file = tmp_path / "run.toml"
    file.write_text("".join(f"{key} = {value!r}\n" for key, value in config.items()))
    assert call(monkeypatch, "run", str(file), *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def chain(links: list[bool]) -> str:
    """A traceback as Python prints it: an exception, and one a link, raised from it (True) or as it is handled."""
    try:
        raise_chain(links)
    except Exception:
        return traceback.format_exc()
    raise AssertionError


def raise_chain(links: list[bool]) -> None:
    if not links:
        raise ValueError("ActorPool is empty\nand more: of it")
    try:
        raise_chain(links[1:])
    except Exception as error:
        if links[0]:
            raise RuntimeError("Simulation Engine crashed.") from error
        raise KeyError("another")  # noqa: B904 (as it is handled)


@given(st.lists(st.booleans(), max_size=4), st.lists(st.booleans(), max_size=2))
def test_the_first_exception_of_the_last_chain_is_why_a_run_failed(
    tmp_path_factory: pytest.TempPathFactory, links: list[bool], before: list[bool]
) -> None:
    log = tmp_path_factory.mktemp("logs") / "flower.log"
    earlier = chain(before).replace("ActorPool is empty", "of another time")
    log.write_text(
        f"INFO : started\n\x1b[91mERROR \x1b[0m: {earlier}\nINFO : again\nERROR : {chain(links)}\n"
        "Exit Code: 700\nAn unhandled exception occurred in the simulation\n"
    )
    assert failure(log) == f"the Flower run failed: ValueError: ActorPool is empty (see {log})"


def test_our_own_error_goes_before_all_and_the_last_lines_where_there_is_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "flower.log"
    log.write_text(f"{chain([True])}\natm_fl.errors.RunError: round 2: 1 of 3 clients succeeded\nExit Code: 1\n")
    assert failure(log) == "round 2: 1 of 3 clients succeeded"
    log.write_text("one\ntwo\n")
    assert failure(log) == f"the Flower run failed: one two (see {log})"


@pytest.mark.slow
def test_a_cause_that_only_ray_knows_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container has fewer CPUs than its machine says."""
    monkeypatch.setattr(simulation, "check_resources", lambda cpus, gpus: None)
    settings = Settings.parse({"tasks": "digits,mnist", "rounds": 1, "run-dir": str(tmp_path / "run")})
    with pytest.raises(RunError, match="the Flower run failed: ValueError: ActorPool is empty"):
        run_simulation(settings, Path(__file__).parents[1], cpus=4096)
