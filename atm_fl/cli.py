"""`atm-fl`: run, resume, report and list, thin over the library."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from typer.core import TyperCommand, TyperOption

from atm_fl.errors import RunError, SettingError

console = Console()
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Runtime(StrEnum):
    """Where the clients of a run live."""

    RAY = "ray"
    IN_PROCESS = "in-process"
    PLAIN = "plain"
    DEPLOYMENT = "deployment"


Superlink = Annotated[str, typer.Option(help="where the SuperLink of a federation is: host:port")]
Authority = Annotated[Path, typer.Option(help="the certificate that a federation's SuperLink is trusted by")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _say(f"atm-fl {version('atm-fl')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and end")
    ] = False,
) -> None:
    """Federated learning by alternating tuning and merging (ATM, arXiv:2411.03055) on Flower."""


def main() -> None:
    """Entry point: errors that a user can mend are one line and exit status 2 (a setting) or 1 (a run)."""
    try:
        app()
    except SettingError as error:
        sys.exit(_complain(error, 2))
    except RunError as error:
        sys.exit(_complain(error, 1))


def _complain(error: Exception, status: int) -> int:
    Console(stderr=True, soft_wrap=True).print(f"[red]atm-fl:[/red] {escape(str(error))}", highlight=False)
    return status


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
) -> None:
    """Run a configuration to its end and print its table. The exit status is 0 only if the run completed."""
    from atm_fl.progress import progress
    from atm_fl.runs import check_run_dir, swept_if_failed, told_if_full
    from atm_fl.settings import OF_DEPLOYMENT

    settings = read_config(config, override or [], OF_DEPLOYMENT if runtime is Runtime.DEPLOYMENT else {})
    folder = Path(settings.run_dir)
    with _terminated_as_exit(), swept_if_failed(folder), told_if_full(folder), ExitStack() as running:
        check_run_dir(settings)
        console.print(
            f"{config.name}: {len(settings.task_names)} tasks, {settings.rounds} rounds → {escape(settings.run_dir)}"
        )
        running.enter_context(progress(settings, console))
        if runtime is Runtime.RAY:
            from server.simulation import simulate

            simulate(settings, app_dir.resolve(), cpus, gpus)
        elif runtime is Runtime.DEPLOYMENT:
            from server.deployment import submit

            submit(settings, app_dir.resolve(), superlink, ca)
        elif runtime is Runtime.IN_PROCESS:
            from clients.app import app as client_app
            from server.app import logs_to, serve
            from server.grid import InProcessGrid

            with logs_to(Path(settings.run_dir) / "flower.log"):
                serve(InProcessGrid(client_app, len(settings.task_names), settings.as_config()), settings)
        else:
            from atm_fl.loop import run_loop

            run_loop(settings)
    report([Path(settings.run_dir)])


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
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


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="runs' directories, finished or not")],
    out: Annotated[Path, typer.Option(help="of several runs: the page to write")] = Path("comparison.html"),
) -> None:
    """Print a run's table and write its report.html and accuracy.png, or lay several runs side by side in one page."""
    from atm_fl.report import print_table, write_report

    if len(run_dirs) > 1:
        _compare_runs(run_dirs, out)
        return
    page = write_report(run_dirs[0])
    print_table(run_dirs[0])
    _say(f"picture: {run_dirs[0] / 'accuracy.png'}\nreport:  {page}")


def _compare_runs(run_dirs: list[Path], out: Path) -> None:
    from atm_fl.comparison import CAPTION, HEADINGS, Summary, accuracy_rows, names_of, write_comparison

    page = write_comparison(run_dirs, out)
    summaries = [Summary.of(path, name) for path, name in zip(run_dirs, names_of(run_dirs), strict=True)]
    _print_table(HEADINGS, [run.cells() for run in summaries])
    _print_table(("task", *(run.name for run in summaries)), accuracy_rows(summaries))
    _say(f"{CAPTION}\nreport: {page}")


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="a folder with runs in it, at any depth")] = Path("runs")) -> None:
    """List a folder's runs: merge, rounds, accuracy, worst task, ε, bytes, state."""
    from atm_fl.comparison import CAPTION, HEADINGS, list_runs

    rows = [run.cells() for run in list_runs(folder)]
    if not rows:
        _say(f"no run in {folder}")
        return
    _print_table(HEADINGS, rows)
    _say(CAPTION)


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

    console.print(table() if markdown else template(), soft_wrap=True, markup=False, highlight=False, end="")


@app.command()
def ledger(delta: Annotated[float, typer.Option(help="the δ at which ε is told")] = 1e-5) -> None:
    """What all runs on this machine have released of each source of records: ε, ∞ for runs without privacy."""
    from atm_fl.privacy.accounting import epsilon
    from atm_fl.privacy.ledger import Ledger, ledger_path

    path = ledger_path()
    for source, runs, releases, last, history in Ledger(path).sources() if path.exists() else ():
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(last))
        line = f"{source}: ε {epsilon(history, delta):.3f}, runs {runs}, releases {releases}, last {day}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"ε at δ = {delta:g}, of each source's latest records; {path}", soft_wrap=True, highlight=False)


@app.command()
def tasks(
    build: Annotated[bool, typer.Option(help="count what is on disk, by reading it")] = False,
    leaks: Annotated[str, typer.Option(help="a task: which of its validation and test images are in train?")] = "",
    workers: Annotated[int, typer.Option(min=0, help="processes that decode images for --leaks")] = 0,
    markdown: Annotated[bool, typer.Option(help="the published data sets as the table of docs/data.md")] = False,
) -> None:
    """List the tasks with their sources and licences, or check one for leaks (exit status 1 if there are any)."""
    from atm_fl import tasks as registry
    from atm_fl.tasks.published import Published, data_root

    if leaks:
        if _say_leaks(leaks, workers):
            raise typer.Exit(1)
        return
    head = ("task", "classes", "train", "test", "GB", "licence", "source")
    table = Table("task", "classes, images and where they are; source and licence", box=SIMPLE, pad_edge=False)
    table.columns[0].no_wrap = True
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, found in sorted(registry.tasks().items(), key=lambda item: isinstance(item[1], Published)):
        numbers, there = [""] * 4, "embedded"
        if isinstance(found, Published):
            numbers = [str(found.classes), str(found.train), str(found.test), f"{found.gigabytes:g}"]
            there = "yes" if found.on_disk() else "no"
            lines.append("| " + " | ".join([name, *numbers, found.licence, found.source]) + " |")
        if not markdown and (there == "embedded" or (build and there == "yes")):
            try:
                data = registry.load(name)
            except SettingError as error:  # a package that is not installed
                table.add_row(escape(name), escape(str(error)))
                continue
            counted = f"{len(data.train)} + {len(data.validation)}"
            numbers[:3] = [str(len(data.classes)), counted, str(len(data.test))]
        classes, train, test, size = (number or "?" for number in numbers)
        place = there if there == "embedded" else f"{size} GB, {'on disk' if there == 'yes' else 'not on disk'}"
        table.add_row(
            escape(name),
            f"{classes:>4} classes {train:>10} train {test:>6} test  {place}\n"
            + escape(f"{found.source}. {found.licence}"),
        )
    if markdown:
        console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
    else:
        console.print(table, highlight=False)
        console.print(
            f"published data sets are looked for in {data_root()}", soft_wrap=True, highlight=False, markup=False
        )


def _say_leaks(name: str, workers: int) -> bool:
    """Print a task's leaks; whether an image of validation or test is in train."""
    from atm_fl import tasks as registry
    from atm_fl.tasks.leaks import SIZE, describe, find_leaks

    data = registry.load(name, SIZE)
    found = find_leaks(data, workers)
    for leaks in found:
        console.print(describe(data, leaks), soft_wrap=True, highlight=False, markup=False)
    return any(leaks.exact for leaks in found)


@app.command()
def prepare(
    tasks: Annotated[str, typer.Option(help="published data sets, separated by commas; see `atm-fl tasks`")],
    root: Annotated[Path | None, typer.Option(help="where to; default $ATM_FL_DATA or ~/.cache/atm-fl/data")] = None,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode images")] = 0,
) -> None:
    """Download published data sets, check them, and say which test images are also in train."""
    from atm_fl.tasks import leaks
    from atm_fl.tasks import published as library

    folder = (root or library.data_root()).expanduser().resolve()
    chosen = [library.find_published(name.strip()) for name in tasks.split(",")]
    needed, free = library.space(chosen, folder)
    console.print(
        f"{folder}: {needed:.1f} GB needed, {free:.1f} GB free", soft_wrap=True, highlight=False, markup=False
    )
    if needed > free:
        raise SettingError(
            f"{folder} has {free:.1f} GB free of the {needed:.1f} GB that are needed; choose another --root"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for found in chosen:
        console.print(f"{found.name}: {found.source}", soft_wrap=True, highlight=False, markup=False)
        found.parts(folder, download=True)
        data = found.load(leaks.SIZE, folder)
        for leak in leaks.find_leaks(data, workers):
            console.print(leaks.describe(data, leak), soft_wrap=True, highlight=False, markup=False)
        console.print(
            f"{found.name}: {len(data.classes)} classes, {len(data.train)} training, {len(data.validation)} validation "
            f"and {len(data.test)} test images",
            highlight=False,
        )
    if folder != library.data_root().resolve():
        console.print(f"runs find it with ATM_FL_DATA={folder}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def merges(markdown: Annotated[bool, typer.Option(help="as the table of docs/merging.md")] = False) -> None:
    """List the merges with their options and defaults."""
    from atm_fl.merging import merges as registry
    from atm_fl.merging import options

    head = ("merge", "options", "definition", "paper")
    table = Table(*head, box=SIMPLE)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, found in registry().items():
        text = found.__doc__ or ""
        definition = text.strip().partition("\n")[0]
        chosen = [f"{item.name.replace('_', '-')}={item.default}" for item in options(found)]
        papers = re.findall(r"arXiv:[\d.]+\d", text)
        table.add_row(name, "\n".join(chosen), definition, "\n".join(papers))
        lines.append(f"| {name} | {', '.join(chosen)} | {definition} | {', '.join(papers)} |")
    console.print("\n".join(lines) if markdown else table, soft_wrap=markdown, markup=False, highlight=False)


class MergeCommand(TyperCommand):
    """`atm-fl merge` with the options of all merges besides its own; those that are given are in `ctx.obj` by name.

    They are looked up when the command is called: to know the merges, torch must be imported.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_option = super().get_params(ctx)
        return [*own, *_merge_options(), help_option]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            raise SettingError(error.format_message()) from error
        given = {str(option.name): ctx.params.pop(str(option.name), None) for option in _merge_options()}
        ctx.obj = {name: value for name, value in given.items() if value is not None}
        return rest


@cache
def _merge_options() -> list[TyperOption]:
    """An option for each that any merge declares; the help says which do, what it means to them and the default."""
    from atm_fl.merging import merges as registry
    from atm_fl.merging import options, type_name

    declared: dict[str, dict[str, Any]] = {}
    for name, found in registry().items():
        for item in options(found):
            declared.setdefault(item.name, {})[name] = item
    made = []
    for key, items in declared.items():
        meanings: dict[str, list[str]] = {}
        for name, item in items.items():
            meanings.setdefault(f"{item.metadata['meaning']} (default {item.default})", []).append(name)
        *few, most = sorted(meanings.items(), key=lambda entry: len(entry[1]))
        if len(items) == len(registry()):
            most = most[0], ["all others" if few else "all"]
        told = [f"{', '.join(names)}: {meaning}" for meaning, names in [*few, most]]
        dashed, kind = key.replace("_", "-"), type_name(next(iter(items.values())))
        made.append(
            TyperOption(
                param_decls=[f"--{dashed}/--no-{dashed}" if kind == "bool" else f"--{dashed}"],
                type={"bool": bool, "int": int, "float": float}[kind],
                default=None,
                help=escape("; ".join(told)),
                rich_help_panel="Options of the methods",
            )
        )
    return made


@app.command(cls=MergeCommand)
def merge(
    ctx: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="models fine-tuned from the base, safetensors")],
    base: Annotated[Path, typer.Option(help="the model they were fine-tuned from, safetensors")],
    out: Annotated[Path, typer.Option(help="the file to write")],
    method: Annotated[str, typer.Option(help="how to merge; see `atm-fl merges`")] = "mean",
    task_scaling: Annotated[str, typer.Option(help="factors on single files, as 'A=0.5, C=2'")] = "",
    layer_scaling: Annotated[str, typer.Option(help="factors on the merged tensors, as '*.mlp.*=1.5'")] = "",
    seed: Annotated[int, typer.Option(help="of methods that draw random numbers")] = 0,
) -> None:
    """Merge files of any model, fine-tuned from one base, into one: base + merged."""
    from atm_fl.merge_files import merge_files
    from atm_fl.scaling import read_factors

    begin = time.monotonic()
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with _terminated_as_exit(), bar:
        line = bar.add_task("", total=1)
        try:
            done = merge_files(
                base,
                files,
                out,
                method,
                chosen=ctx.obj,
                task_scaling=read_factors("task-scaling", task_scaling),
                layer_scaling=read_factors("layer-scaling", layer_scaling),
                seed=seed,
                progress=lambda stage, share: bar.update(line, description=escape(stage), completed=share),
                warn=lambda text: console.print(f"warning: {text}", soft_wrap=True, highlight=False, markup=False),
            )
        except OSError as error:
            raise RunError(f"{out} was not written: {error}") from error
    console.print(
        f"{method} of {len(files)} files: {done.tensors} tensors, {done.elements:,} elements, "
        f"{time.monotonic() - begin:.1f} s → {out}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


@app.command("settings")
def list_settings() -> None:
    """List every setting with its default, and the plugins with what they add."""
    from atm_fl.plugins import loaded
    from atm_fl.settings import Settings, kebab

    table = Table("setting", "default", "meaning")
    for item in fields(Settings):
        choices, names = item.metadata["choices"], item.metadata["names"]
        told = [" | ".join(choices)] if choices else []
        if names is not None and not choices and (more := [name for name in names if names.plugin(name)]):
            told = [f"from plugins: {', '.join(more)}"]
        meaning = item.metadata["meaning"] + "".join(f" ({text})" for text in told)
        table.add_row(kebab(item.name), str(item.default), escape(meaning))
    console.print(table)
    for plugin, things in loaded().items():
        console.print(f"{plugin.name}: {', '.join(things)}", soft_wrap=True, highlight=False, markup=False)


Jobs = Annotated[int | None, typer.Option(help="runs at a time; default: one a core")]
OnlyReport = Annotated[bool, typer.Option("--report", help="run nothing: report what is finished")]


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
        _run_study(found, contest, jobs)
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
    _run_study(found, merge_table, jobs)
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
        _run_study(found, kind, jobs)
    console.print(kind.table(found), soft_wrap=True, highlight=False, markup=False)
    console.print(f"page: {kind.page(found)}", soft_wrap=True, highlight=False, markup=False)


def _run_study(found: Any, kind: Any, jobs: int | None) -> None:
    """Run the units of a study phase by phase, `jobs` at a time, with a line for each that is done."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    begin = time.monotonic()
    with ProcessPoolExecutor(jobs or os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        for units in kind.phases(found):
            for done in as_completed([pool.submit(kind.run_unit, unit) for unit in units]):
                console.print(f"{(time.monotonic() - begin) / 60:5.1f} min: {done.result()}", highlight=False)


attack = typer.Typer(no_args_is_help=True, help="Attack what parties send, and measure it: docs/privacy.md.")
app.add_typer(attack, name="attack")


@attack.command()
def reconstruct(
    config: Annotated[Path, typer.Argument(help="a TOML file of scenarios, as configs/reconstruction.toml")],
    jobs: Jobs = None,
    only_report: OnlyReport = False,
) -> None:
    """Look for the images behind task vectors; print what is found under each setting, and write the pictures."""
    from atm_fl.experiments import read_study, reconstruction

    found = read_study(config, reconstruction)
    if not only_report:
        _run_study(found, reconstruction, jobs)
    console.print(reconstruction.table(found), soft_wrap=True, highlight=False, markup=False)
    console.print(f"page: {reconstruction.page(found)}", soft_wrap=True, highlight=False, markup=False)


deploy = typer.Typer(no_args_is_help=True, help="Set up a federation of real machines: docs/deployment.md.")
app.add_typer(deploy, name="deploy")


@deploy.command()
def init(
    parties: Annotated[
        str,
        typer.Option(
            help="the parties by their tasks, as mnist,digits; with data of their own: birds=/srv/birds; where the "
            "name is a known task's too: ./pets=/srv/pets, or published:pets=/srv/data"
        ),
    ] = "",
    host: Annotated[
        str, typer.Option(help="the parties are on other machines, which reach this one by this name or address")
    ] = "",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="the port they reach it by; 0: the one it has, at first 8000")
    ] = 0,
    renew: Annotated[bool, typer.Option(help="make a new certificate for the SuperLink; restart it then")] = False,
    root: Annotated[Path, typer.Option(help="the checkout, where docker-compose.yml is")] = Path(),
) -> None:
    """Make certificates, keys and compose files, or add parties to those that are there."""
    from atm_fl.deployment.federation import lay_out

    for folder in lay_out(root, parties, host, port, renew):
        then = "carry it to its machine, and there: sh join" if host else "starts with docker-compose up -d"
        console.print(f"{folder}: {then}", soft_wrap=True, highlight=False, markup=False)


@deploy.command()
def check(
    superlink: Superlink,
    ca: Authority,
    key: Annotated[Path | None, typer.Option(help="the party's private key")] = None,
    task: Annotated[str, typer.Option(help="its task, a registered one")] = "",
    data: Annotated[Path | None, typer.Option(help="its data folder")] = None,
    policy: Annotated[Path | None, typer.Option(help="its policy.toml: what it bounds is shown")] = None,
    disk: Annotated[float, typer.Option(help="GB of disk that must be free")] = 2.0,
    memory: Annotated[float, typer.Option(help="GB of memory that must be free")] = 1.5,
) -> None:
    """Say in one line each what would keep a party on this machine from joining; exit status 1 if anything would."""
    from atm_fl.deployment.checks import Machine, check

    found = list(check(Machine(superlink, ca, key, task, data, policy, disk, memory)))
    for name, line, good in found:
        console.print(f"{'ok   ' if good else 'WRONG'} {name}: {line}", soft_wrap=True, highlight=False, markup=False)
    if not all(good for *_, good in found):
        raise typer.Exit(1)


@deploy.command()
def register(
    superlink: Superlink = "127.0.0.1:8000",
    ca: Authority = Path("/etc/atm-fl/ca.crt"),
    keys: Annotated[Path, typer.Option(help="the folder of the parties' public keys, NAME.pub")] = Path(
        "/etc/atm-fl/parties"
    ),
) -> None:
    """On the SuperLink's machine: let the parties whose public keys are there join, and no others."""
    from server.deployment import register

    for line in register(superlink, ca, keys):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


@deploy.command()
def identity(client: Annotated[str, typer.Argument(help="the party's name in runs, which is its task's")]) -> None:
    """On a party's machine: its long-term public key, as a line of trusted-parties; made if it has none."""
    from atm_fl.privacy.identity import public_line

    print(public_line(client))


Config = Annotated[Path, typer.Argument(help="the attacked run: a TOML file of settings, as in configs/")]
Override = Annotated[list[str] | None, typer.Option("-c", help="key=value over the file's, as often as needed")]


@attack.command()
def membership(
    config: Config,
    folder: Annotated[Path, typer.Option(help="where models' answers, table and curves are kept; it resumes there")],
    override: Override = None,
    task: Annotated[str, typer.Option(help="the attacked party's, an embedded one")] = "mnist",
    members: Annotated[
        int, typer.Option(min=50, help="images it tunes on; as many are asked of that it does not")
    ] = 1000,
    count: Annotated[int, typer.Option("--models", help="runs to follow, each attacked with the rest")] = 16,
) -> None:
    """Was this image among those a party tuned on? Loss threshold, LiRA and RMIA on every round's models."""
    from atm_fl.attacks import membership as attacks

    found = attacks.study(read_config(config, override or []), task, folder, members, count, _say)
    console.print(attacks.write(found, folder), soft_wrap=True, highlight=False, markup=False)


@attack.command()
def audit(
    config: Config,
    override: Override = None,
    task: Annotated[str, typer.Option(help="whose records the canaries are among")] = "mnist",
    canaries: Annotated[int, typer.Option(help="images with a wrong label, each put in by a coin")] = 500,
    guesses: Annotated[int, typer.Option(help="coins that the auditor guesses")] = 100,
) -> None:
    """Is the claimed ε of DP-SGD true? Whether noise is ever repeated, and a lower bound by canaries.

    The bound is taken as it runs, and with the noise secretly off. Exits with 1 if releases share noise.
    """
    from atm_fl.attacks.audit import CONFIDENCE, SHARED, audit, shared_noise

    settings = read_config(config, override or [])
    distances = shared_noise(settings, task)
    told = ", ".join(f"{change} {distance:.3f}" for change, distance in distances.items())
    _say(f"one round's two releases, in units of two independent noises, by what was done to one record: {told}")
    repeated = distances.pop("repeated")
    if repeated or min(distances.values()) < SHARED:
        raise RunError("the noise of one release is in another: their difference tells of single records")
    for silent in (False, True):
        found = audit(settings, task, canaries, guesses, silent)
        _say(
            f"noise {'off' if silent else 'on'}: claimed ε {found.claimed:.3f}, true ε at least {found.bound:.3f} "
            f"({CONFIDENCE:.0%}; {found.correct} of {found.guesses} guesses right, {canaries} canaries)"
        )


@attack.command()
def poison(
    config: Config,
    folder: Annotated[Path, typer.Option(help="where the runs go; finished ones are not run again")],
    override: Override = None,
    attacks: Annotated[str, typer.Option(help="separated by commas; docs/privacy.md lists them")] = "none,sign-flip",
    attackers: Annotated[str, typer.Option(help="tasks whose parties attack")] = "mnist,digits",
    merge: Annotated[list[str] | None, typer.Option(help="a defence, as multi-krum:f=2; as often as needed")] = None,
) -> None:
    """What do malicious parties do to honest tasks, and what do robust merges do about it, and to honest tasks?"""
    from atm_fl.attacks import poisoning

    chosen, named = ([item.strip() for item in text.split(",")] for text in (attacks, attackers))
    results = poisoning.studies(read_config(config, override or []), chosen, merge or ["mean"], named, folder, _say)
    text = poisoning.table(results)
    (folder / "table.md").write_text(text + "\n")
    _say(text)


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def read_config(path: Path, overrides: list[str], defaults: dict[str, Any] | None = None) -> Any:
    """Settings from a TOML file and `key=value` overrides; relative directories become absolute.

    defaults: values of keys that are in neither, where they are not the settings' own.
    """
    from atm_fl.settings import Settings

    if not path.is_file():
        raise SettingError(f"{path} is not a file; the configurations are in configs/")
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"{path} is not valid TOML: {error}") from error
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
    for key in ("run-dir", "start"):
        if isinstance(values.get(key), str) and values[key] != "pretrained":
            values[key] = str(Path(values[key]).resolve())
    settings = Settings.parse(values)
    return replace(settings, run_dir=str(Path(settings.run_dir).resolve()))


def _value(text: str) -> Any:
    """A value of -c: TOML where it parses (numbers, true, "quoted"), a plain string otherwise."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
