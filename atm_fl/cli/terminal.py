"""What the commands share: the console, the app, reading a configuration."""

from __future__ import annotations

import signal
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from atm_fl.errors import SettingError, figures
from atm_fl.files import packaged

console = Console()
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


Superlink = Annotated[str, typer.Option(help="where the SuperLink of a federation is: host:port")]
Authority = Annotated[Path, typer.Option(help="the certificate that a federation's SuperLink is trusted by")]


def complain(error: Exception, status: int) -> int:
    Console(stderr=True, soft_wrap=True).print(
        f"[red]atm-fl:[/red] {escape('. '.join([str(error), *figures(error)]))}", highlight=False
    )
    return status


@contextmanager
def terminated_as_exit() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (a closed terminal) end the body as Ctrl-C does, so that what it started ends with it.

    A SIGHUP that is ignored, as under nohup, stays so. Another signal doesn't break off what the first one ends.
    """
    numbers = [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in numbers}
    caught = [number for number in numbers if before[number] != signal.SIG_IGN]

    def end(number: int, _: object) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])


Jobs = Annotated[int | None, typer.Option(help="runs at a time; default: one a core")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="run nothing: try the model with random weights on made-up images, and say what it would all cost",
    ),
]
DeviceName = Annotated[str, typer.Option(help="of --dry-run: the GPU that hours are reckoned for")]
OnlyReport = Annotated[bool, typer.Option("--report", help="run nothing: report what is finished")]


Config = Annotated[Path, typer.Argument(help="the attacked run: a TOML file of settings, as in configs/")]
Override = Annotated[list[str] | None, typer.Option("-c", help="key=value over the file's, as often as needed")]


def say(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def read_config(path: Path, overrides: list[str], defaults: dict[str, Any] | None = None) -> Any:
    """Settings from a TOML file and `key=value` overrides; relative directories become absolute.

    defaults: values of keys that are in neither, where they are not the settings' own.
    """
    from atm_fl.models.loading import is_path
    from atm_fl.settings import Settings, read_toml

    values, path = read_toml(path), packaged(path)
    if isinstance(values.get("rows"), dict):
        from atm_fl.experiments import command_for

        raise SettingError(f"{path} is a study, not a run's settings: use {command_for(values)} {path}")
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator:
            raise SettingError(f"-c {item!r}: write it as key=value")
        values[key.strip()] = _value(value.strip())
    elsewhere = dict(defaults or {})
    if values.get("secure-aggregation"):
        elsewhere.pop("codec-up", None)  # masked vectors have no codec
    values = elsewhere | values
    # Flower runs the ServerApp in a directory of its own.
    for key in ("run-dir", "start", "weights"):
        name = values.get(key)
        if isinstance(name, str) and name != "pretrained" and (key != "weights" or is_path(name)):
            values[key] = str(Path(name).expanduser().resolve())
    settings = Settings.parse(values)
    return replace(settings, run_dir=str(Path(settings.run_dir).resolve()))


def _value(text: str) -> Any:
    """A value of -c: TOML where it parses (numbers, true, "quoted"), a plain string otherwise."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
