"""`atm-fl compare` and `study`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from atm_fl.cli.terminal import Jobs, OnlyReport, app, console


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(help="a contest's TOML file, as configs/contest.toml")],
    jobs: Jobs = None,
    only_report: OnlyReport = False,
) -> None:
    """Run a contest or its ablations, resuming what was begun; print the tables and write table.md, results.csv,
    results.json and report.html."""
    from atm_fl.experiments import contest, read_study

    found = read_study(config, contest)
    if not only_report:
        run_study(found, contest, jobs)
    console.print(contest.table(found), soft_wrap=True, highlight=False, markup=False)
    console.print(f"page: {found.reports / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


study = typer.Typer(no_args_is_help=True, help="Run a study, resuming what was begun, and print its table.")
app.add_typer(study, name="study")


@study.command("merges")
def study_merges(
    config: Annotated[Path, typer.Argument(help="a study's TOML file, as configs/merges.toml")],
    jobs: Jobs = None,
) -> None:
    """Which merges help inside ATM: docs/merging.md."""
    from atm_fl.experiments import merge_table, read_study

    found = read_study(config, merge_table)
    run_study(found, merge_table, jobs)
    text = merge_table.table(found)
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    page = found.folder / "table.md"
    page.write_text(text + "\n")
    console.print(f"table: {page}", highlight=False, markup=False)


@study.command("privacy")
def study_privacy(
    config: Annotated[Path, typer.Argument(help="a study's TOML file, as configs/privacy.toml")],
    jobs: Jobs = None,
    only_report: OnlyReport = False,
) -> None:
    """What settings protect, by attacks, and what they cost; also writes a page with plots: docs/privacy.md."""
    from atm_fl.experiments import privacy as kind
    from atm_fl.experiments import read_study

    found = read_study(config, kind)
    if not only_report:
        run_study(found, kind, jobs)
    console.print(kind.table(found), soft_wrap=True, highlight=False, markup=False)
    console.print(f"page: {kind.page(found)}", soft_wrap=True, highlight=False, markup=False)


def run_study(found: Any, kind: Any, jobs: int | None) -> None:
    """Run the units of a study phase by phase, `jobs` at a time, with a line for each that is done."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    begin = time.monotonic()
    with ProcessPoolExecutor(jobs or os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        for units in kind.phases(found):
            for done in as_completed([pool.submit(kind.run_unit, unit) for unit in units]):
                console.print(f"{(time.monotonic() - begin) / 60:5.1f} min: {done.result()}", highlight=False)
