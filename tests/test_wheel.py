"""The package as pip installs it: its apps and configurations are found from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from atm_fl.files import packaged
from atm_fl.server.simulation import installed_app

ROOT = Path(__file__).parents[1]


def test_every_configuration_is_found_where_there_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in sorted((ROOT / "configs").glob("*.toml")):
        assert packaged(Path("configs") / file.name).read_text() == file.read_text()
    own = tmp_path / "configs" / "demo.toml"
    own.parent.mkdir()
    own.write_text("rounds = 1\n")
    assert packaged(Path("configs/demo.toml")) == Path("configs/demo.toml")
    assert packaged(Path("configs/none.toml")) == Path("configs/none.toml")


def test_the_app_of_the_package_is_the_checkouts_to_the_byte(tmp_path: Path) -> None:
    """So that a run from either has one signature."""
    assert build_fab_from_disk(installed_app(tmp_path / "app")) == build_fab_from_disk(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["in-process", "ray"])
def test_an_installed_wheel_runs_a_configuration_of_its_own_from_another_folder(tmp_path: Path, runtime: str) -> None:
    source, wheels, site, place = (tmp_path / name for name in ("source", "wheels", "site", "elsewhere"))
    for name in ("atm_fl", "server", "clients", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(wheels)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    place.mkdir()
    search = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    command = ["run", "configs/demo.toml", "--runtime", runtime]
    for choice in ("tasks=mnist,digits", "rounds=1", "local-epochs=0.1", f"run-dir={place / 'run'}"):
        command += ["-c", choice]
    bin_folder = str(Path(sys.executable).parent)
    done = subprocess.run(
        [sys.executable, "-c", "import atm_fl; print(atm_fl.__file__); from atm_fl.cli import main; main()", *command],
        cwd=place,
        env=os.environ | {"PYTHONPATH": search, "PATH": bin_folder + os.pathsep + os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(site) in done.stdout
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"atm_fl", "bin"}
    assert (place / "run" / "report.html").exists()
