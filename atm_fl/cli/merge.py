"""`atm-fl merges` and `merge`."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from typer.core import TyperCommand, TyperOption

from atm_fl import tables
from atm_fl.cli.terminal import app, console, say, terminated_as_exit
from atm_fl.errors import RunError, SettingError


@app.command()
def merges(markdown: Annotated[bool, typer.Option(help="as the table of docs/merging.md")] = False) -> None:
    """List the merges with their options and defaults."""
    from atm_fl.merging import merges as registry
    from atm_fl.merging import options

    head = ("merge", "options", "definition", "paper")
    table = Table(*head, box=SIMPLE)
    rows = []
    for name, merge_class in registry().items():
        text = merge_class.__doc__ or ""
        definition = text.strip().partition("\n")[0]
        chosen = [f"{item.name.replace('_', '-')}={item.default}" for item in options(merge_class)]
        papers = re.findall(r"arXiv:[\d.]+\d", text)
        table.add_row(name, "\n".join(chosen), definition, "\n".join(papers))
        rows.append((name, ", ".join(chosen), definition, ", ".join(papers)))
    if markdown:
        say(tables.markdown(head, rows))
    else:
        console.print(table, markup=False, highlight=False)


class MergeCommand(TyperCommand):
    """`atm-fl merge` with the options of all merges besides its own; those that are given are in `ctx.obj` by name.

    They are looked up when the command is called: to know the merges, torch must be imported.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *parameters, help_option = super().get_params(ctx)
        return [*parameters, *_merge_options(), help_option]

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
    for name, merge_class in registry().items():
        for item in options(merge_class):
            declared.setdefault(item.name, {})[name] = item
    made = []
    for key, items in declared.items():
        meanings: dict[str, list[str]] = {}
        for name, item in items.items():
            meanings.setdefault(f"{item.metadata['meaning']} (default {item.default})", []).append(name)
        *few, most = sorted(meanings.items(), key=lambda entry: len(entry[1]))
        if len(items) == len(registry()):
            most = most[0], ["all others" if few else "all"]
        lines = [f"{', '.join(names)}: {meaning}" for meaning, names in [*few, most]]
        dashed, kind = key.replace("_", "-"), type_name(next(iter(items.values())))
        made.append(
            TyperOption(
                param_decls=[f"--{dashed}/--no-{dashed}" if kind == "bool" else f"--{dashed}"],
                type={"bool": bool, "int": int, "float": float, "str": str}[kind],
                default=None,
                help=escape("; ".join(lines)),
                rich_help_panel="Options of the methods",
            )
        )
    return made


@app.command(cls=MergeCommand)
def merge(
    ctx: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(
            help="models fine-tuned from the base: files, folders, runs, LoRA adapters; or one recipe, .toml or .yaml"
        ),
    ],
    base: Annotated[
        Path | None, typer.Option(help="the model they were fine-tuned from: a file, a folder, or a model's name")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the file to write; of a base that is a folder, a new folder")
    ] = None,
    method: Annotated[str, typer.Option(help="how to merge, as ties:density=0.1; see `atm-fl merges`")] = "mean",
    task_scaling: Annotated[str, typer.Option(help="factors on single files, as 'A=0.5, C=2'")] = "",
    layer_scaling: Annotated[str, typer.Option(help="factors on the merged tensors, as '*.mlp.*=1.5'")] = "",
    seed: Annotated[int, typer.Option(help="of methods that draw random numbers")] = 0,
    only: Annotated[
        list[str] | None, typer.Option(help="merge only tensors that match, as '*.mlp.*'; repeatable")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="leave tensors that match as in the base, as 'head.*'; repeatable")
    ] = None,
    rows: Annotated[
        str, typer.Option(help="common: of tensors of other lengths, merge the rows that all have")
    ] = "same",
    to: Annotated[str, typer.Option(help="model, or adapter: a PEFT LoRA adapter of --rank")] = "model",
    rank: Annotated[int, typer.Option(help="of --to adapter")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what each tensor gets, and write nothing")] = False,
) -> None:
    """Merge models, fine-tuned from one base, into one: base + merged."""
    from atm_fl.merging import MERGES
    from atm_fl.merging.checkpoint_files import merge_files, prepare
    from atm_fl.merging.recipes import read_recipe
    from atm_fl.merging.scaling import read_factors
    from atm_fl.options import read_choice

    choice = read_choice("--method", method, MERGES)
    for name in choice.values.keys() & ctx.obj:
        option = f"--{name.replace('_', '-')}"
        raise SettingError(f"--method {method} and {option} {ctx.obj[name]}: say it once")

    def warn(text: str) -> None:
        say(f"warning: {text}")

    recipe = None
    if files[0].suffix in (".toml", ".yaml", ".yml"):
        sources = {str(name): ctx.get_parameter_source(str(name)) for name in ctx.params}
        given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
        beside = [name for name in given if name not in ("files", "out", "dry_run")] + list(ctx.obj)
        if len(files) > 1 or beside:
            more = f"--{beside[0].replace('_', '-')}" if beside else str(files[1])
            raise SettingError(f"{files[0]} is a recipe, which says all but --out itself; remove {more}")
        recipe = read_recipe(files[0])
        out = out or recipe.out
    elif base is None:
        raise SettingError("--base is missing: the model that the files were fine-tuned from")
    arguments: dict[str, Any] = {
        "method": choice.name,
        "chosen": choice.values | ctx.obj,
        "task_scaling": read_factors("task-scaling", task_scaling),
        "layer_scaling": read_factors("layer-scaling", layer_scaling),
        "seed": seed,
        "only": only or [],
        "exclude": exclude or [],
        "rows": rows,
        "warn": warn,
    }
    if out is None and not dry_run:
        raise SettingError("--out is missing: the file or folder to write")
    begin = time.monotonic()
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with terminated_as_exit(), named_base(base or Path()) as base, bar:
        if dry_run:
            plans = recipe.plans(warn) if recipe else [prepare(base, files, **arguments)]
            for plan in plans:
                for line in plan.lines():
                    say(line)
            return
        assert out
        line_number = bar.add_task("", total=1)

        def progress(stage: str, share: float) -> None:
            bar.update(line_number, description=escape(stage), completed=share)

        try:
            if recipe:
                done = recipe.run(out, progress, warn)
            else:
                done = merge_files(base, files, out, to=to, rank=rank, progress=progress, **arguments)
        except OSError as error:
            raise RunError(f"{out} was not written: {error}") from error
    what = str(files[0]) if recipe else f"{method} of {len(files)} files"
    say(f"{what}: {done.tensors} tensors, {done.elements:,} elements, {time.monotonic() - begin:.1f} s → {out}")


@contextmanager
def named_base(base: Path) -> Iterator[Path]:
    """The base's file: `base`, or, where there is none, that of the pretrained model of this name while the body runs.

    So models that runs tuned are merged without a file of what they began with.
    """
    from safetensors.torch import save_file

    from atm_fl import models

    name = str(base)
    if base.exists() or not (name in models.BACKBONES or name.partition("/")[0] in models.FAMILIES):
        yield base
        return
    module = models.load_backbone(name)
    with tempfile.TemporaryDirectory(prefix="atm-fl-") as folder:
        file = Path(folder) / f"{name.replace('/', '-')}.safetensors"
        state = {name.partition(".")[2]: tensor for name, tensor in module.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
        yield file
