"""`atm-fl tasks`, `tasks check` and `prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from atm_fl import tables
from atm_fl.cli.terminal import app, console, say
from atm_fl.errors import SettingError

listing = typer.Typer()
app.add_typer(listing, name="tasks")


@listing.callback(invoke_without_command=True)
def tasks(
    context: typer.Context,
    build: Annotated[bool, typer.Option(help="count what is on disk, by reading it")] = False,
    leaks: Annotated[str, typer.Option(help="a task: which of its validation and test images are in train?")] = "",
    workers: Annotated[int, typer.Option(min=0, help="processes that decode images for --leaks")] = 0,
    markdown: Annotated[bool, typer.Option(help="the published data sets as the table of docs/data.md")] = False,
) -> None:
    """List the tasks with their sources and licences, or check one for leaks (exit status 1 if there are any)."""
    from atm_fl import tasks as registry
    from atm_fl.tasks import hugging_face
    from atm_fl.tasks.published import Published, data_root
    from atm_fl.tasks.texts import UNREAD

    if context.invoked_subcommand:
        return
    if leaks:
        if _say_leaks(leaks, workers):
            raise typer.Exit(1)
        return
    head = ("task", "classes", "train", "test", "GB", "licence", "source")
    table = Table("task", "classes, images and where they are; source and licence", box=SIMPLE, pad_edge=False)
    table.columns[0].no_wrap = True
    rows = []
    for name, source in sorted(registry.TASKS.items(), key=lambda item: isinstance(item[1], Published)):
        numbers, there = [""] * 4, "embedded"
        if isinstance(source, Published):
            numbers = [str(source.classes), str(source.train), str(source.test), f"{source.gigabytes:g}"]
            there = "yes" if source.on_disk() else "no"
            rows.append([name, *numbers, source.licence, source.source])
        if not markdown and (there == "embedded" or (build and there == "yes")):
            try:
                data = registry.load(name, tokenizer=UNREAD)
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
            + escape(f"{source.source}. {source.licence}"),
        )
    if markdown:
        say(tables.markdown(head, rows))
    else:
        console.print(table, highlight=False)
        say(f"published data sets are looked for in {data_root()}")
        if brought := hugging_face.here():
            say(f"data sets of the hub that are there: {', '.join(brought)}")


@listing.command("check")
def check(
    folder: Annotated[Path, typer.Argument(help="a task's folder, with train/, val/ and test/")],
    workers: Annotated[int, typer.Option(min=0, help="threads that read pictures")] = 0,
) -> None:
    """Read every picture of a folder: counts, torn files, copies, leaks, blank ones (exit status 1 if any is wrong)."""
    from atm_fl.tasks.folder_check import check_folder

    report = check_folder(folder, workers)
    table = Table("class", *report.counts, box=SIMPLE, pad_edge=False)
    for label, name in enumerate(report.classes):
        table.add_row(escape(name), *(str(counts[label]) for counts in report.counts.values()))
    table.add_row("all", *(str(sum(counts)) for counts in report.counts.values()))
    console.print(table, highlight=False)
    for line in report.notes:
        say(line)
    for line in report.errors:
        say(f"wrong: {line}")
    if report.errors:
        raise typer.Exit(1)
    say(f"{folder}: a task")


def _say_leaks(name: str, workers: int) -> bool:
    """Print a task's leaks; whether an image of validation or test is in train."""
    from atm_fl import tasks as registry
    from atm_fl.tasks.leaks import SIZE, describe, find_leaks

    data = registry.load(name, SIZE)
    leaks_found = find_leaks(data, workers)
    for leaks in leaks_found:
        say(describe(data, leaks))
    return any(leaks.exact for leaks in leaks_found)


@app.command()
def prepare(
    tasks: Annotated[
        str, typer.Option(help="published data sets (`atm-fl tasks`), or hf:OWNER/NAME of the hub, separated by commas")
    ],
    root: Annotated[Path | None, typer.Option(help="where to; default $ATM_FL_DATA or ~/.cache/atm-fl/data")] = None,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode images")] = 0,
    item: Annotated[str, typer.Option(help="of a data set of the hub: the column of its texts or pictures")] = "",
    label: Annotated[str, typer.Option(help="the same: the column of its labels")] = "",
) -> None:
    """Download data sets, check them, and say which test images are also in train."""
    from atm_fl.tasks import HUB, hugging_face, leaks
    from atm_fl.tasks import published as library

    folder = (root or library.data_root()).expanduser().resolve()
    names = [name.strip() for name in tasks.split(",")]
    of_hub = [name for name in names if name.startswith(HUB)]
    if (item or label) and not len(of_hub) == len(names) == 1:
        raise SettingError("--item and --label name columns of one data set of the hub; prepare it by itself")
    for name in of_hub:
        hugging_face.check(name)
    chosen = [library.find_published(name) for name in names if name not in of_hub]
    needed, free = library.space(chosen, folder)
    if chosen:
        say(f"{folder}: {needed:.1f} GB needed, {free:.1f} GB free")
    if needed > free:
        raise SettingError(
            f"{folder} has {free:.1f} GB free of the {needed:.1f} GB that are needed; choose another --root"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for data_set in chosen:
        say(f"{data_set.name}: {data_set.source}")
        data_set.parts(folder, download=True)
        data = data_set.load(leaks.SIZE, folder)
        for leak in leaks.find_leaks(data, workers):
            say(leaks.describe(data, leak))
        say(
            f"{data_set.name}: {len(data.classes)} classes, {len(data.train)} training, "
            f"{len(data.validation)} validation and {len(data.test)} test images"
        )
    for name in of_hub:
        for line in hugging_face.bring(name, folder, item, label):
            say(line)
        _say_brought(name, hugging_face.place(name, folder), workers)
    if folder != library.data_root().resolve():
        say(f"runs find it with ATM_FL_DATA={folder}")


def _say_brought(name: str, folder: Path, workers: int) -> None:
    """Read what was brought of a data set of the hub as a run will, and say what is in it, of pictures leaks too."""
    from atm_fl import tasks as registry
    from atm_fl.tasks import leaks
    from atm_fl.tasks.texts import UNREAD

    data = registry.load(str(folder), leaks.SIZE, workers, UNREAD)
    for leak in [] if data.test.of_texts else leaks.find_leaks(data, workers):
        say(leaks.describe(data, leak))
    counts = ", ".join(f"{len(data.split(split))} {split}" for split in registry.SPLITS)
    say(f"{name}: {len(data.classes)} classes, {counts} {'texts' if data.test.of_texts else 'pictures'}, in {folder}")
