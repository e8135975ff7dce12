"""`atm-fl compare` and `study`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atm_fl.cli.terminal import DeviceName, DryRun, Jobs, OnlyReport, app, say

if TYPE_CHECKING:
    from atm_fl.experiments import Study


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="a contest's TOML file, as configs/contest.toml")],
    jobs: Jobs = None,
    only_report: OnlyReport = False,
    dry_run: DryRun = False,
    device_name: DeviceName = "A100",
) -> None:
    """Run a contest or its ablations, resuming what was begun; print the tables and write table.md, results.csv,
    results.json and report.html."""
    from atm_fl.experiments import contest, read_study

    if dry_run:
        from atm_fl.experiments import dry_run as dry

        for line in dry.dry_run(dry.rows_of(read_study(config, contest)), device_name):
            say(line)
        return
    run_study(config, contest, jobs, only_report)


@app.command()
def records(
    config: Annotated[Path, typer.Argument(help="a contest's TOML file, whose rows are finished")],
    ledger: Annotated[Path, typer.Option(help="the table, whose logs are in the folder of its name")] = Path(
        "docs/records.md"
    ),
) -> None:
    """Land what of a contest's `pairs` is a record: docs/records.md."""
    from atm_fl.experiments import contest, read_study
    from atm_fl.experiments.records import land

    for line in land(read_study(config, contest), f"atm-fl compare {config}", ledger):
        say(line)


@app.command()
def curriculum(
    run: Annotated[Path, typer.Argument(help="a run whose first round has all tasks")],
    by: Annotated[str, typer.Option(help="loss (easy tasks first) or alignment (those first that agree)")] = "loss",
    every: Annotated[int, typer.Option(help="rounds until the next task joins")] = 1,
    reverse: Annotated[bool, typer.Option("--reverse", help="the other way round")] = False,
) -> None:
    """Choose an order in which tasks join by a run's first round, and print it as the setting participation."""
    from atm_fl.experiments.curriculum import curriculum

    say(curriculum(run, by, every, reverse))


study = typer.Typer(no_args_is_help=True, help="Run a study, resuming what was begun, and print its table.")
app.add_typer(study, name="study")


@study.command("merges")
def study_merges(
    config: Annotated[Path, typer.Argument(help="a study's TOML file, as configs/merges.toml")],
    jobs: Jobs = None,
    only_report: OnlyReport = False,
) -> None:
    """Which merges help inside ATM: docs/merging.md."""
    from atm_fl.experiments import merge_table

    run_study(config, merge_table, jobs, only_report)


@study.command("privacy")
def study_privacy(
    config: Annotated[Path, typer.Argument(help="a study's TOML file, as configs/privacy.toml")],
    jobs: Jobs = None,
    only_report: OnlyReport = False,
) -> None:
    """What settings protect, by attacks, and what they cost; also writes a page with plots: docs/attacks.md."""
    from atm_fl.experiments import privacy

    run_study(config, privacy, jobs, only_report)


def run_study(config: Path, kind: Study[Any, Any], jobs: int | None, only_report: bool) -> None:
    """Read a study's file, run its units phase by phase, `jobs` at a time, and print its table and where its page is.

    only_report: run nothing.
    """
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    from atm_fl.experiments import end_with_parent, read_study

    study, begin = read_study(config, kind), time.monotonic()
    if not only_report:
        with ProcessPoolExecutor(jobs or os.cpu_count() or 1, get_context("spawn"), end_with_parent) as pool:
            for units in kind.phases(study):
                for done in as_completed([pool.submit(kind.run_unit, unit) for unit in units]):
                    say(f"{(time.monotonic() - begin) / 60:5.1f} min: {done.result()}")
    say(kind.table(study))
    path = kind.page(study)
    say(f"{'page' if path.suffix == '.html' else 'table'}: {path}")
