"""`atm-fl run`, `report`, `settings`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from atm_fl.cli.deploy import deploy
from atm_fl.cli.terminal import (
    Authority,
    DeviceName,
    DryRun,
    Superlink,
    app,
    console,
    read_config,
    say,
    terminated_as_exit,
)
from atm_fl.errors import SettingError


class Runtime(StrEnum):
    """Where the clients of a run live."""

    RAY = "ray"
    IN_PROCESS = "in-process"
    PLAIN = "plain"
    DEPLOYMENT = "deployment"


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"atm-fl {version('atm-fl')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    """Federated learning by alternating tuning and merging (ATM, arXiv:2411.03055) on Flower."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="a TOML file of settings, as in configs/")],
    override: Annotated[
        list[str] | None,
        typer.Option("-c", help="key=value over the file's, as often as needed; see `atm-fl settings`"),
    ] = None,
    runtime: Annotated[
        Runtime,
        typer.Option(
            help="ray: simulation by `flwr run`; in-process: the same apps without Ray; plain: no Flower; "
            "deployment: a federation, from its SuperLink's machine or container"
        ),
    ] = Runtime.RAY,
    app_dir: Annotated[Path, typer.Option("--app", help="the checkout whose apps `flwr run` ships")] = Path(),
    cpus: Annotated[float, typer.Option(help="CPUs that Ray reserves for one client")] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs, or parts of one, that Ray reserves for one client")] = 0,
    superlink: Superlink = "127.0.0.1:8000",
    ca: Authority = Path("/etc/atm-fl/ca.crt"),
    dry_run: DryRun = False,
    device_name: DeviceName = "A100",
) -> None:
    """Run a configuration to its end and print its table. The exit status is 0 only if the run completed."""
    from atm_fl.runs.directory import check_run_dir, swept_if_failed, told_if_full
    from atm_fl.runs.progress import progress
    from atm_fl.settings import OF_DEPLOYMENT

    settings = read_config(config, override or [], OF_DEPLOYMENT if runtime is Runtime.DEPLOYMENT else {})
    if runtime is Runtime.PLAIN:
        from atm_fl.federation.loop import check_plain

        check_plain(settings)
    if dry_run:
        from atm_fl.experiments import dry_run as dry

        for line in dry.dry_run([(config.stem, "atm", settings)], device_name):
            say(line)
        return
    folder = Path(settings.run_dir)
    with terminated_as_exit(), swept_if_failed(folder), told_if_full(folder), ExitStack() as running:
        check_run_dir(settings)
        say(f"{config.name}: {len(settings.task_names)} tasks, {settings.rounds} rounds → {settings.run_dir}")
        running.enter_context(progress(settings, console))
        if runtime is Runtime.RAY:
            from atm_fl.server.simulation import run_simulation

            run_simulation(settings, app_dir.resolve(), cpus, gpus)
        elif runtime is Runtime.DEPLOYMENT:
            from atm_fl.server.deployment import submit

            submit(settings, app_dir.resolve(), superlink, ca)
        elif runtime is Runtime.IN_PROCESS:
            from atm_fl.clients.app import app as client_app
            from atm_fl.server.app import logs_to, serve
            from atm_fl.server.grid import InProcessGrid
            from atm_fl.settings import check_closed

            check_closed(settings)
            with logs_to(Path(settings.run_dir) / "flower.log"):
                serve(InProcessGrid(client_app, len(settings.task_names), settings.as_config()), settings)
        else:
            from atm_fl.federation.loop import run_loop

            run_loop(settings)
    report([Path(settings.run_dir)])


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="runs' directories, finished or not")],
    out: Annotated[Path, typer.Option(help="of several runs: the page to write")] = Path("comparison.html"),
    party: Annotated[
        str,
        typer.Option(
            help="of one run: a party's own page instead, test pictures with the model's answers; NAME, or NAME=FOLDER "
            "where its data is there on this machine"
        ),
    ] = "",
) -> None:
    """Print a run's table and write its report.html and accuracy.png, or lay several runs side by side in one page."""
    from atm_fl.runs.report import print_table, write_report

    if party:
        from atm_fl.federation.party_page import write_party_page

        if len(run_dirs) > 1:
            raise SettingError(f"--party {party}: of one run, not of {len(run_dirs)}")
        client, _, folder = party.partition("=")
        say(f"page: {write_party_page(run_dirs[0], client, folder)}")
        return
    if len(run_dirs) > 1:
        _compare_runs(run_dirs, out)
        return
    page = write_report(run_dirs[0])
    print_table(run_dirs[0])
    say(f"picture: {run_dirs[0] / 'accuracy.png'}\nreport:  {page}")


def _compare_runs(run_dirs: list[Path], out: Path) -> None:
    from atm_fl.runs.comparison import CAPTION, HEADINGS, Summary, accuracy_rows, names_of, write_comparison

    page = write_comparison(run_dirs, out)
    summaries = [Summary.of(path, name) for path, name in zip(run_dirs, names_of(run_dirs), strict=True)]
    _print_table(HEADINGS, [run.cells() for run in summaries])
    _print_table(("task", *(run.name for run in summaries)), accuracy_rows(summaries))
    say(f"{CAPTION}\nreport: {page}")


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="a folder with runs in it, at any depth")] = Path("runs")) -> None:
    """List a folder's runs: merge, rounds, accuracy, worst task, ε, bytes, state."""
    from atm_fl.runs.comparison import CAPTION, HEADINGS, list_runs

    rows = [run.cells() for run in list_runs(folder)]
    if not rows:
        say(f"no run in {folder}")
        return
    _print_table(HEADINGS, rows)
    say(CAPTION)


def _print_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table whose cells are wrapped, never cut, where the terminal is too narrow."""
    table = Table(*headings, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table, highlight=False)


@app.command()
def policy(markdown: Annotated[bool, typer.Option(help="as the table of docs/privacy.md")] = False) -> None:
    """A party's own floor: a policy.toml with every rule, its meaning, and what bounds nothing."""
    from atm_fl.policy import table, template

    say((table() if markdown else template()).removesuffix("\n"))


@app.command()
def ledger(delta: Annotated[float, typer.Option(help="the δ at which ε is told")] = 1e-5) -> None:
    """What all runs on this machine have released of each source of records: ε, ∞ for runs without privacy."""
    from atm_fl.privacy.accounting import epsilon
    from atm_fl.privacy.ledger import Ledger, ledger_path

    path = ledger_path()
    for source, runs, releases, last, history in Ledger(path).sources() if path.exists() else ():
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
        line = f"{source}: ε {epsilon(history, delta):.3f}, runs {runs}, releases {releases}, last {day}"
        say(line)
    say(f"ε at δ = {delta:g}, of each source's latest records; {path}")


@app.command("settings")
def list_settings() -> None:
    """List every setting with its default, by section, and the plugins with what they add."""
    from atm_fl.plugins import loaded
    from atm_fl.settings import kebab, sections

    table = Table("setting", "default", "meaning")
    for title, items in sections().items():
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for item in items:
            choices, names = item.metadata["choices"], item.metadata["names"]
            limits = [" | ".join(choices)] if choices else []
            if names is not None and not choices and (more := [name for name in names if names.plugin(name)]):
                limits = [f"from plugins: {', '.join(more)}"]
            meaning = item.metadata["meaning"] + "".join(f" ({text})" for text in limits)
            table.add_row(kebab(item.name), str(item.default), escape(meaning))
    console.print(table)
    for plugin, things in loaded().items():
        say(f"{plugin.name}: {', '.join(things)}")


@deploy.command()
def identity(client: Annotated[str, typer.Argument(help="the party's name in runs, which is its task's")]) -> None:
    """On a party's machine: its long-term public key, as a line of trusted-parties; made if it has none."""
    from atm_fl.privacy.identity import public_line

    print(public_line(client))
