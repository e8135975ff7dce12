"""Pages that are made from the declarations when the site is built: settings, merges, codecs, tasks, the API."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mkdocs_gen_files
from mkdocs_gen_files import Nav

import atm_fl
from atm_fl import codecs, merging, tasks
from atm_fl.attacks import poisoning
from atm_fl.exports.formats import FORMATS
from atm_fl.merging.server_optimizer import SERVER_OPTIMIZERS
from atm_fl.models.backbones import BACKBONES
from atm_fl.models.heads import HEADS
from atm_fl.optimizers import OPTIMIZERS
from atm_fl.plugins import Registry
from atm_fl.settings import kebab, sections
from atm_fl.sinks import SINKS
from atm_fl.tables import markdown
from atm_fl.transforms import TRANSFORMS


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return markdown(head, ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in rows))


def first_line(thing: object) -> str:
    """The first paragraph of a docstring, as one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def option_text(registry: Registry[Any], made: object) -> str:
    """The options of a thing with their defaults."""
    return ", ".join(f"`{kebab(item.name)}={item.default}`" for item in registry.options(made))


def rows_of(registry: Registry[Any], things: Iterable[tuple[str, Any]]) -> list[tuple[str, str, str]]:
    """A line for each of a registry's `things`: its name, options and definition."""
    return [
        (f"`{name}`", option_text(registry, made), first_line(getattr(made, "step", made))) for name, made in things
    ]


def write(path: str, title: str, *parts: str) -> None:
    """A page of the site."""
    with mkdocs_gen_files.open(f"reference/{path}", "w") as page:
        page.write("\n\n".join([f"# {title}", *parts]) + "\n")


def settings() -> None:
    """All settings of a run."""
    tables = []
    for title, items in sections().items():
        rows = [
            (
                f"`{kebab(item.name)}`",
                f"`{item.default}`" if item.default != "" else "",
                ", ".join(item.metadata["choices"]),
                item.metadata["meaning"],
            )
            for item in items
        ]
        tables += [f"## {title}", table(("setting", "default", "takes", "meaning"), rows)]
    write(
        "settings.md",
        "Settings",
        "Keys of a run's TOML, of `-c key=value`, and of Flower's run config. `atm-fl settings` prints them. "
        "What has options is written `name:key=value,key=value`.",
        *tables,
    )


def merges() -> None:
    """All merges with their options."""
    rows = []
    for name, made in merging.merges().items():
        options = option_text(merging.MERGES, made)
        papers = ", ".join(
            f"[{key}](https://arxiv.org/abs/{key})" for key in re.findall(r"arXiv:([\d.]+\d)", made.__doc__ or "")
        )
        rows.append((f"`{name}`", options, first_line(made), papers))
    write(
        "merges.md",
        "Merges",
        "[Merging](../merging.md) says how they are used.",
        table(("merge", "options", "definition", "paper"), rows),
    )


def codec_page() -> None:
    """All codecs."""
    rows = rows_of(codecs.CODECS, sorted(codecs.CODECS.items()))
    write(
        "codecs.md",
        "Codecs",
        "Of `codec-up` and `codec-down`: [the wire](../wire.md).",
        table(("codec", "options", "what travels"), rows),
    )


def task_page() -> None:
    """All registered tasks."""
    rows = [(f"`{name}`", task.source, task.licence) for name, task in tasks.TASKS.items()]
    write("tasks.md", "Tasks", table(("task", "source", "licence"), rows))


NAMED: tuple[tuple[str, str, Registry[Any]], ...] = (
    ("Models", "`model`; `timm/…`, `open_clip/…`, `clip/…`, `transformers/…`, `causal-lm/…` are models too", BACKBONES),
    ("Heads", "`head`", HEADS),
    ("Optimizers of the clients", "`optimizer`", OPTIMIZERS),
    ("Transforms", "`transforms`; none comes with atm-fl: [a file of your own](../plugins.md) adds one", TRANSFORMS),
    ("Server optimizers", "`server-optimizer`", SERVER_OPTIMIZERS),
    ("Metric sinks", "`metric-sinks`", SINKS),
    ("Export formats", "`atm-fl export RUN --to`", FORMATS),
)
"""All else that is chosen by name: a heading, where it is named, the registry."""


def named() -> None:
    """A table for each registry that has no page of its own."""
    parts = []
    for title, where, registry in NAMED:
        rows = rows_of(registry, registry.items())
        parts += [f"## {title}", f"By {where}.", *([table(("name", "options", "what it is"), rows)] if rows else [])]
    write("named.md", "Models, heads, optimizers and others", *parts)


def attacks() -> None:
    """What a malicious party can do in `atm-fl attack poison`."""
    text = inspect.getdoc(poisoning) or ""
    write(
        "attacks.md",
        "Attacks",
        "From `atm_fl/attacks/poisoning.py`; the others are in [the guide](../privacy.md).",
        text,
    )


def api(nav: Nav) -> None:
    """A page for each module of the package, from its docstrings."""
    for name in ["atm_fl", *(module.name for module in pkgutil.walk_packages(atm_fl.__path__, "atm_fl."))]:
        path = f"api/{name}.md"
        with mkdocs_gen_files.open(f"reference/{path}", "w") as page:
            page.write(f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n")
        nav["API", name] = path


nav = Nav()
for title, path, make in (
    ("Settings", "settings.md", settings),
    ("Merges", "merges.md", merges),
    ("Codecs", "codecs.md", codec_page),
    ("Tasks", "tasks.md", task_page),
    ("Models and others by name", "named.md", named),
    ("Attacks", "attacks.md", attacks),
):
    make()
    nav[title] = path
api(nav)
with mkdocs_gen_files.open("reference/SUMMARY.md", "w") as summary:
    summary.writelines(nav.build_literate_nav())
with mkdocs_gen_files.open("changelog.md", "w") as page:
    page.write(Path("CHANGELOG.md").read_text())
