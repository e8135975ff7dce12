"""Whether a run may have its directory, and what becomes of it when the run fails."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from atm_fl.errors import RunError, SettingError
from atm_fl.runs.checkpoints import checkpoints, rounds_of
from atm_fl.settings import Settings, defaults, stored

TASKS_OF_ROUNDS = ("tasks", "participation")
"""What may change between a run and its resumption."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def check_run_dir(settings: Settings) -> None:
    """SettingError if `run-dir` holds a run and `resume` is false, holds one of another configuration, or has no
    checkpoint to resume from. A directory without a checkpoint holds nothing worth keeping and may be used again."""
    directory, start = Path(settings.run_dir), settings.start
    make_run_dir(directory)
    if start != "pretrained" and not settings.resume and not Path(start).exists():
        raise SettingError(f"start={start!r} is neither 'pretrained' nor the folder of a run or a file of weights")
    if not checkpoints(directory):
        if settings.resume:
            raise SettingError(f"resume=true, but run-dir={str(directory)!r} holds no checkpoint")
        return
    if settings.resume_from:
        there = [rounds_of(path) for path in checkpoints(directory)]
        if settings.resume_from not in there:
            raise SettingError(
                f"resume-from={settings.resume_from}: run-dir={str(directory)!r} has no checkpoint after so many "
                f"rounds; there are {', '.join(map(str, there))}"
            )
    config = directory / "config.json"
    if not config.exists():
        raise SettingError(f"run-dir={str(directory)!r} holds checkpoints but no config.json; choose another run-dir")
    known = json.loads(config.read_text())
    theirs, ours = (defaults() | decisive for decisive in (stored(known["settings"]), settings.decisive()))
    other = next((key for key in ours if theirs[key] != ours[key] and key not in TASKS_OF_ROUNDS), None)
    if not other and not _goes_on(settings, theirs, settings.resume_from or rounds_of(checkpoints(directory)[-1])):
        other = next(key for key in TASKS_OF_ROUNDS if theirs[key] != ours[key])
    if other:
        more = "; resume=true takes further tasks behind them" if other == "tasks" else ""
        more = "; resume=true takes another for the rounds to come alone" if other == "participation" else more
        raise SettingError(
            f"run-dir={str(directory)!r} holds a run with {other}={theirs.get(other)!r}, not {ours[other]!r}{more}; "
            "choose another run-dir"
        )
    before, now = known.get("plugins", {}), noted_plugins(settings)
    changed = next((thing for thing in {**before, **now} if before.get(thing) != now.get(thing)), None)
    if changed:
        raise SettingError(
            f"run-dir={str(directory)!r} holds a run whose {changed} was {before.get(changed, 'no plugin')}, not "
            f"{now.get(changed, 'no plugin')}; bring back that file, or choose another run-dir"
        )
    if not settings.resume:
        raise SettingError(
            f"run-dir={str(directory)!r} holds a run already; go on from it with -c resume=true, choose another "
            "run-dir, or delete it"
        )


def _goes_on(settings: Settings, theirs: Mapping[str, Any], done: int) -> bool:
    """Whether tasks and participation are those of the run that is there, or may follow on its `done` rounds.

    theirs: what decided it. Further tasks may come behind the old ones, or be let in by a `*`, and who takes part in
    the rounds to come may change: what is done was done by the same parties.
    """
    before = replace(settings, tasks=theirs["tasks"], participation=theirs["participation"])
    if all(getattr(before, key) == getattr(settings, key) for key in TASKS_OF_ROUNDS):
        return True
    past = range(1, done + 1)
    return (
        settings.resume
        and settings.task_names[: len(before.task_names)] == before.task_names
        and all(
            before.planned(task, number) == settings.planned(task, number)
            for task in before.client_tasks
            for number in past
        )
    )


def noted_plugins(settings: Settings) -> dict[str, str]:
    """What a run's config.json says of the plugins that decide its weights: file names and digests."""
    return {thing: str(plugin) for thing, plugin in settings.plugins().items()}


def make_run_dir(directory: Path) -> None:
    """SettingError if `directory` is a file, or can't be made or written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "lock", "a"):
            pass
    except FileExistsError:
        raise SettingError(f"run-dir={str(directory)!r} is a file; choose a directory") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in FULL:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingError(
            f"run-dir={str(directory)!r} can't be made or written to ({reason}); choose another directory"
        ) from None


@contextmanager
def swept_if_failed(directory: Path) -> Iterator[None]:
    """If the body fails before anything was measured, remove the run's directory, unless it was there before.

    A log of Flower's that the error names stays.
    """
    made = not directory.exists()
    try:
        yield
    except BaseException as error:
        log, metrics = directory / "flower.log", directory / "metrics.jsonl"
        empty = not checkpoints(directory) and not (metrics.exists() and metrics.stat().st_size)
        if made and empty and str(log) not in str(error):
            shutil.rmtree(directory, ignore_errors=True)
        raise


def lock(directory: Path) -> Any:
    """Hold a run's directory until the returned file is closed or the process ends. RunError if it is held already."""
    file = open(directory / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"run-dir={str(directory)!r} is in use by another process; wait for it or end it") from None
    return file


@contextmanager
def told_if_full(directory: Path) -> Iterator[None]:
    """Make a RunError, in one line, of what a full disk raises: the checkpoint before it is whole and stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) not in FULL and "os error 28" not in str(error):
            raise
        remedy = "go on with resume=true" if checkpoints(directory) else "start it again: no round was finished"
        raise RunError(f"the disk of run-dir={str(directory)!r} is full; make room and {remedy}") from error
