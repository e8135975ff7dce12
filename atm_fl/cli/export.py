"""`atm-fl export` and `predict`."""

from __future__ import annotations

import csv
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from atm_fl.cli.terminal import app, say


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="the run's directory")],
    to: Annotated[
        str, typer.Option(help="timm, open_clip, transformers, safetensors or task-vector: whose loader is to take it")
    ] = "safetensors",
    out: Annotated[Path | None, typer.Option(help="the new folder; default: RUN's name and the format")] = None,
    round: Annotated[
        int | None, typer.Option(help="of whose checkpoint; default the newest, 0 is the first base")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="the clients whose heads, with their classes, go into the folder, separated by commas, or none; "
            "default: all that this machine keeps, with --push-to none"
        ),
    ] = None,
    party: Annotated[
        str | None,
        typer.Option(
            help="of a run with private entries: the client whose own go into the model, or none for the pretrained "
            "ones; default: the only one of which this machine keeps some"
        ),
    ] = None,
    push_to: Annotated[str, typer.Option(help="also upload it: hf:USER/NAME")] = "",
) -> None:
    """Write a run's model as a folder that another library loads, with a model card made from the run."""
    from atm_fl import exports
    from atm_fl.exports.hub import check_target, push

    if push_to:
        check_target(push_to)
    chosen: list[str] | None = [] if heads == "none" or (heads is None and push_to) else None
    if heads not in (None, "none"):
        chosen = [name.strip() for name in str(heads).split(",")]
    folder = out or Path(f"{run.resolve().name}-{to}")
    made = exports.export(run, to, folder, round, chosen, party)
    for note in made.notes:
        say(f"warning: {note}")
    held = f"heads of {', '.join(made.heads)}" if made.heads else "no heads"
    say(f"round {made.round}, {held} → {made.folder}")
    if push_to:
        say(push(made.folder, push_to))


class Shape(StrEnum):
    """How predictions are printed."""

    CSV = "csv"
    JSON = "json"


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT", help="a folder of `atm-fl export` with heads in it")],
    images: Annotated[list[Path] | None, typer.Argument(help="picture files")] = None,
    text: Annotated[list[str] | None, typer.Option(help="a text, of a model of texts; --text for each")] = None,
    task: Annotated[str | None, typer.Option(help="whose head; default: every one")] = None,
    top: Annotated[int, typer.Option(min=1, help="classes a picture or text, the most probable first")] = 5,
    shape: Annotated[Shape, typer.Option("--format", help="csv: a line a class; json: an object a line")] = Shape.CSV,
) -> None:
    """Classify pictures or texts with an exported model: classes with their probabilities on standard output."""
    from atm_fl.errors import SettingError
    from atm_fl.exports import Predictor

    if bool(images) == bool(text):
        raise SettingError("predict takes pictures, or texts with --text: one of the two")
    kind = "text" if text else "image"

    writer = csv.writer(sys.stdout, lineterminator="\n")
    if shape is Shape.CSV:
        writer.writerow((kind, "task", "class", "probability"))
    for one in Predictor(folder).predict(images or (), task, text or ()):
        best = list(one.classes.items())[:top]
        if shape is Shape.JSON:
            print(json.dumps({kind: one.item, "task": one.task, "classes": dict(best)}, ensure_ascii=False))
        else:
            writer.writerows((one.item, one.task, name, f"{value:.6f}") for name, value in best)
