"""What the guides say is there: commands that parse, files, tests by their names, and imports."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

import atm_fl.cli  # noqa: F401 (registers the commands)
from atm_fl.cli.terminal import app
from atm_fl.merging import MERGES
from atm_fl.settings import defaults

ROOT = Path(__file__).parents[1]
GUIDES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pretraining/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "atm_fl" / "deployment" / "party" / "README.md",
]
each_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str) -> list[str]:
    """The fenced blocks, with lines that go on joined."""
    return [
        block.replace("\\\n", " ") for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after each `atm-fl` that a block calls."""
    for line in "\n".join(blocks(text)).splitlines():
        called = re.match(
            r"(?:\S*=\S+ |docker-compose exec (?:-T )?\w+ |\.venv/bin/|\$ )*atm-fl (?!tar )(.+)", line.strip()
        )
        if called:
            yield shlex.split(re.split(r" [|>&]", called[1])[0], comments=True)


def parse(words: list[str]) -> None:
    """click.UsageError unless a command takes these words."""
    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        if command.invoke_without_command and (not words or words[0].startswith("-")):
            break  # as `atm-fl tasks --leaks dtd` beside `atm-fl tasks check`
        name, *words = words or [""]
        chosen = command.commands.get(name)
        if chosen is None:
            raise click.UsageError(f"no command {name!r}")
        command = chosen
    command.make_context(command.name, words, ignore_unknown_options=command.name == "merge")  # a merge's own options


def test_a_command_that_is_not_there_is_noticed() -> None:
    text = "```\natm-fl run x.toml --no-such  # words\ndocker-compose exec superlink atm-fl depoly init\n```"
    for words in command_lines(text):
        with pytest.raises(click.UsageError):
            parse(words)
    assert len(list(command_lines(text))) == 2
    assert sum(len(list(command_lines(guide.read_text()))) for guide in GUIDES) > 30


@each_guide
def test_every_command_line_parses(guide: Path) -> None:
    for words in command_lines(guide.read_text()):
        try:
            parse(words)
        except click.UsageError as error:
            raise AssertionError(f"{guide}: atm-fl {shlex.join(words)}: {error.format_message()}") from error


@each_guide
def test_every_file_and_test_that_it_names_is_there(guide: Path) -> None:
    text = guide.read_text()
    rooms = "atm_fl|server|clients|tests|configs|deploy|pretraining|benchmarks"
    named = {path for path in re.findall(rf"`((?:{rooms})/[\w./-]+)", text) if not path.endswith("/")}
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]
    for file, test in re.findall(r"(test_\w+\.py)::(test_\w+)", text):
        tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.MULTILINE)
        assert [name for name in tests if name.startswith(test)], f"{file}::{test}"


def test_each_attack_of_the_security_page_names_a_test_that_plays_it() -> None:
    rows = re.findall(r"^\| (?!attack|-)(.+?) \| (.+?) \| .+ \|$", (ROOT / "docs" / "security.md").read_text(), re.M)
    assert len(rows) > 30
    file = ""
    for attack, cell in rows:
        played = [word for word in re.findall(r"`([^`]+)`", cell) if not word.startswith("atm-fl ")]
        assert played or "the same" in cell, attack
        for word in played:
            found = re.fullmatch(r"(?:(test_\w+\.py)(?:::)?)?(…?)(\w*?)_?…?", word)
            assert found, f"{attack}: {word}"
            file = found[1] or file
            tests = re.findall(r"^def test_(\w+)", (ROOT / "tests" / file).read_text(), re.MULTILINE)
            part = found[3].removeprefix("test_")
            named = [test for test in tests if (part in test if found[2] else test.startswith(part))]
            assert named, f"{attack}: no {word} in {file}"


@each_guide
def test_every_import_of_ours_works(guide: Path) -> None:
    for block in blocks(guide.read_text()):
        for line in re.findall(r"^(?:from atm_fl[\w.]* import [\w, ]+|import atm_fl[\w.]*)$", block, re.M):
            for node in ast.parse(line).body:
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    missing = [name.name for name in node.names if not hasattr(module, name.name)]
                    assert not missing, line


def rows_with_defaults(guide: Path) -> list[str]:
    """The rows of tables that say settings' defaults."""
    tables = re.findall(r"^\| setting \| default \|.*\n\|[-| ]+\n((?:\|.*\n)+)", guide.read_text(), re.MULTILINE)
    return "".join(tables).splitlines()


def test_the_guides_have_such_tables() -> None:
    assert sum(len(rows_with_defaults(guide)) for guide in GUIDES) >= 11


@each_guide
def test_every_default_in_a_table_is_the_settings_own(guide: Path) -> None:
    for row in rows_with_defaults(guide):
        names, value = (cell.strip() for cell in row.split("|")[1:3])
        for name in re.findall(r"`([a-z0-9-]+)`", names):
            mine = defaults()[name]
            shown = value.strip("`").partition(" ")[0]
            assert shown == str(mine).lower() or (isinstance(mine, int | float) and float(shown) == mine), row


def test_the_readme_counts_the_merges_that_there_are() -> None:
    words = {18: "Eighteen", 19: "Nineteen", 20: "Twenty", 21: "Twenty-one", 22: "Twenty-two", 23: "Twenty-three"}
    assert f"{words[len(MERGES)]} merges" in (ROOT / "README.md").read_text()
