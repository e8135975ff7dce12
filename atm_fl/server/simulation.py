"""Ray simulation with an honest end: its own SuperLink, `flwr run`, and the run's real status.

Flower's `flwr run` on a local address starts a SuperLink that outlives it, keeps the environment of the first run, and
exits 0 even when the run failed. Here the SuperLink belongs to the call, and a failed run is a RunError.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

import atm_fl
from atm_fl.errors import RunError, SettingError
from atm_fl.plugins import absolute
from atm_fl.settings import Settings, check_closed

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}
"""Keeps Flower and Ray from calling home, and Flower from installing torch into a new environment for every run."""
START_TIMEOUT = 60.0
CHAINED = ("The above exception was the direct cause of", "During handling of the above exception, another")
"""What Python writes between two tracebacks of one chain."""


def run_simulation(settings: Settings, app: Path, cpus: float = 1, gpus: float = 0) -> None:
    """Run `settings` with one virtual SuperNode a task. Logs go to flower.log in the run directory.

    app: the folder with pyproject.toml, by default this one, or else the apps that are installed; cpus, gpus: what Ray
    reserves for one client. SettingError, before anything is started, if the machine has fewer. RunError, with the
    ServerApp's own message, if the run did not complete.
    """
    check_closed(settings)
    check_resources(cpus, gpus)
    if app == Path.cwd() and not (app / "pyproject.toml").exists():
        app = installed_app(Path(settings.run_dir) / "flower" / "app")
    check_app(app)
    federation = f"num-supernodes={len(settings.task_names)} client-resources-num-cpus={cpus:g}"
    federation += f" client-resources-num-gpus={gpus:g}" if gpus else ""
    with superlink(Path(settings.run_dir) / "flower") as variables:
        flower_run(settings, app, "local", variables, "--federation-config", federation)


def check_resources(cpus: float, gpus: float) -> None:
    """SettingError if this machine has no room for a client that reserves so many CPUs and GPUs."""
    for flag, wanted, kind, there in (
        ("--cpus", cpus, "CPU", os.cpu_count() or 1),
        ("--gpus", gpus, "GPU", torch.cuda.device_count()),
    ):
        if wanted > there:
            fix = f"reserve {there} at most" if there else f"leave {flag} out"
            raise SettingError(f"{flag}={wanted:g}: this machine has {there or 'no'} {kind}{'s' * (there > 1)}; {fix}")
    if not cpus > 0:
        raise SettingError(f"--cpus={cpus:g}: a client needs a part of a CPU, as 0.5")
    if not gpus >= 0:
        raise SettingError(f"--gpus={gpus:g}: it must be 0 or more")


def installed_app(folder: Path) -> Path:
    """The apps of the installed package in a new `folder`, as `flwr run` wants them."""
    shutil.copytree(
        Path(atm_fl.__file__).parent / "deployment" / "app",
        folder,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return folder


def check_app(app: Path) -> None:
    """SettingError if `app` is not the folder whose apps `flwr run` can ship."""
    if not (app / "pyproject.toml").exists():
        raise SettingError(
            f"{app} has no pyproject.toml; Flower needs the checkout of atm-fl to run its apps. Call this from there, "
            "name it with --app, or use --runtime in-process"
        )


def flower_run(settings: Settings, app: Path, superlink: str, variables: dict[str, str], *more: str) -> None:
    """`flwr run` on the SuperLink that the environment `variables` names `superlink`; RunError if it did not complete.

    Logs go to flower.log in the run directory.
    """
    folder = Path(settings.run_dir)
    config, log = folder / "flower" / "run.toml", folder / "flower.log"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.as_config().items()))
    command = ["flwr", "run", str(app), superlink, "--stream", "-c", str(config), *more]
    with open(log, "w") as out:
        subprocess.run(command, env=variables, stdout=out, stderr=subprocess.STDOUT, check=False)
    started = re.search(r"started run (\d+)", plain(log))
    status = ""
    while started and "finished:" not in status:  # the stream of logs may break off before the run ends
        listing = ["flwr", "list", superlink, "--run-id", started[1], "--format", "json"]
        status = subprocess.run(listing, env=variables, capture_output=True, text=True, check=False).stdout
        if '"status"' not in status:
            break
        time.sleep(0 if "finished:" in status else 2)
    if '"finished:completed"' not in status:
        raise RunError(failure(log))


def plain(log: Path) -> str:
    """A log's text without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))


def failure(log: Path) -> str:
    """Why a run failed: our own error in its log, what its last traceback began with, or the log's last lines."""
    text = plain(log)
    ours = re.findall(r"(?:RunError|SettingError): (.+)", text)
    if ours:
        return ours[-1]
    lines = [line for line in (line.strip(" │╭╮╰╯─") for line in text.splitlines()) if line]
    return f"the Flower run failed: {cause(text) or ' '.join(lines[-3:]) or 'no output'} (see {log})"


def cause(text: str) -> str:
    """The exception that the last chain of tracebacks in a log began with, as "ValueError: …"; "" if there is none."""
    first, chained = "", False
    for trace in re.split(r"Traceback \(most recent call last\):", text)[1:]:
        if raised := re.search(r"^(?!\s|During |The above )[\w.]+(?::.*)?$", trace, re.MULTILINE):
            first = first if chained and first else raised[0]
        chained = any(words in trace for words in CHAINED)
    return first


def environment(home: Path) -> dict[str, str]:
    """The variables under which Flower's programs are found, keep quiet, and read `home`/config.toml."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **absolute(), **QUIET, "FLWR_HOME": str(home.resolve()), "PATH": path}


@contextmanager
def superlink(home: Path) -> Iterator[dict[str, str]]:
    """A SuperLink in simulation mode on a free loopback port; yields the environment in which "local" names it."""
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    variables = environment(home)
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-file", str(home / "superlink.log")]
    # A session of its own: Ctrl-C should reach us alone, and we end what the SuperLink started.
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunError(f"the local SuperLink did not start; see {home / 'superlink.log'}")
            time.sleep(0.1)
        yield variables
    finally:
        # Flower's executors and Ray's daemons have sessions of their own, and outlive the SuperLink.
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for left in started:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.kill()
        shutil.rmtree(home / "apps", ignore_errors=True)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
