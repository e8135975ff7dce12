"""Plugins: the page's examples from a scratch folder, in real runs; what is broken or unknown is one clear line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PluginFiles
from federation import call
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from atm_fl import plugins
from atm_fl.attacks import poisoning
from atm_fl.attacks.scenario import Scenario
from atm_fl.clients.app import app as client_app
from atm_fl.clients.app import check_plugins
from atm_fl.codecs import CODECS
from atm_fl.errors import RunError, SettingError
from atm_fl.exports import export
from atm_fl.federation.loop import run_loop
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings

ROOT = Path(__file__).parents[1]
PAGE = re.findall(r"## (.+?)\n.*?```python\n(.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.DOTALL)


@pytest.fixture
def page(plugin_files: PluginFiles) -> Path:
    """Each example of the page in a file of its own."""
    return plugin_files(**{re.sub(r"\W+", "_", title): code for title, code in PAGE})


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch):
    yield
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    plugins.load()


def test_the_page_has_one_short_example_of_each_kind(page: Path) -> None:
    added = [thing.split(" '")[0] for things in plugins.loaded().values() for thing in things]
    assert sorted(added) == sorted(set(plugins.BUILT_IN) - {"model library"})
    for title, code in PAGE:
        assert len([line for line in code.splitlines() if line.strip()]) <= 12, title


def run(config: dict[str, Any], where: str, **changed: Any) -> tuple[Run, Run]:
    """The same settings as a plain loop and through Flower's apps."""
    runs = []
    for runtime in ("plain", "grid"):
        settings = Settings.parse({**config, "run-dir": f"{config['run-dir']}-{where}-{runtime}", **changed})
        grid = InProcessGrid(client_app, len(settings.task_names), settings.as_config())
        runs.append(run_loop(settings) if runtime == "plain" else serve(grid, settings))
    return runs[0], runs[1]


CHOICES = {
    "a codec": {"codec-up": "sign"},
    "a step's codec": {"codec-down": "sign"},
    "a transform": {"transforms": "grid:step=0.001"},
    "a defence": {"merge": "sign-mean:size=0.02"},
    "a head": {"head": "random"},
    "a local optimizer": {"optimizer": "adagrad"},
    "a server optimizer": {"server-optimizer": "lazy"},
    "a model": {"model": "smaller"},
}


@pytest.mark.usefixtures("page")
def test_each_changes_what_a_run_makes_alike_with_and_without_flower(config: dict[str, Any]) -> None:
    config["rounds"] = 2
    without = {"plain": run(config, "without")[0].base}
    for place, (what, chosen) in enumerate(CHOICES.items()):
        plain, flower = run(config, str(place), **chosen)
        assert torch.equal(plain.base, flower.base), what
        assert not any(plain.base.equal(base) for base in without.values()), what
        without[what] = plain.base
        noted = json.loads((plain.directory / "config.json").read_text())["plugins"]
        (thing,), value = noted, next(iter(chosen.values()))
        assert repr(str(value).partition(":")[0]) in thing
        assert re.fullmatch(r"\w+\.py [0-9a-f]{16}", noted[thing])


@pytest.mark.usefixtures("page")
def test_an_export_format_is_one_to_export_to(config: dict[str, Any], tmp_path: Path) -> None:
    made = run_loop(Settings.parse(config | {"rounds": 1}))
    export(made.directory, "npz", tmp_path / "out")
    weights = np.load(tmp_path / "out" / "model.npz")
    assert {f"vit.{name}" for name in weights} == set(made.layout.names)


@pytest.mark.usefixtures("page")
def test_a_published_task_is_a_party(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATM_FL_DATA", str(tmp_path))
    random = np.random.default_rng(0)
    images = {
        chunk: random.integers(0, 255, (n, 16, 16, 3), dtype=np.uint8) for chunk, n in (("train", 20), ("test", 10))
    }
    np.savez(tmp_path / "flat.npz", **images)
    plain, flower = run(config, "task", tasks=f"{config['tasks']},flat", rounds=1)
    assert torch.equal(plain.base, flower.base)
    names = {line["task"] for line in read_metrics(plain.directory) if line["kind"] == "tuning"}
    assert "flat" in names


@pytest.mark.usefixtures("page")
def test_a_sink_gets_every_line_and_tensorboard_only_when_it_is_asked_for(config: dict[str, Any]) -> None:
    for made in run(config, "sink", **{"metric-sinks": "lines", "rounds": 1}):
        lines = [f"{line['round']} {line['kind']}" for line in read_metrics(made.directory)]
        assert (made.directory / "lines.txt").read_text().splitlines() == lines
        assert not (made.directory / "tensorboard").exists()


@pytest.mark.usefixtures("page")
def test_an_attack_is_measured_against_a_defence(config: dict[str, Any], tmp_path: Path, page: Path) -> None:
    settings = Settings.parse({**config, "rounds": 1})
    chosen = ["mean", "sign-mean:size=0.001"]
    results = poisoning.studies(settings, ["none", "echo"], chosen, ["red"], tmp_path / "poison", lambda text: None)
    names = {(row["attack"], row["merge"]) for row in results}
    assert names == {(a, m) for a in ("none", "echo") for m in ("mean", "sign-mean size=0.001")}
    norms = {
        name: next(line["norm"] for line in read_metrics(tmp_path / "poison" / name) if line["kind"] == "merge")
        for name in ("none-mean", "echo-mean", "echo-sign-mean-size=0.001", "none-sign-mean-size=0.001")
    }
    assert norms["echo-mean"] != norms["none-mean"]
    size = len(Run(Settings.parse({**config, "run-dir": str(tmp_path / "size")})).base)
    assert norms["echo-sign-mean-size=0.001"] <= 0.001 * size**0.5 * 1.0001  # whatever an attacker sends
    changed = page.parent / "changed"
    changed.mkdir()
    (changed / "echo.py").write_text((page / "An_attack.py").read_text() + "# another")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugins.VARIABLE, str(changed))
        with pytest.raises(
            SettingError, match=r"the attack 'echo' of An_attack\.py \w+, not echo\.py \w+; choose another"
        ):
            poisoning.studies(settings, ["echo"], ["mean"], ["red"], tmp_path / "poison", lambda text: None)


def test_the_command_line_runs_with_them_in_a_process_of_its_own(
    page: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    config |= {"model": "smaller", "rounds": 1, "codec-up": "sign", "metric-sinks": "lines"}
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    command = [sys.executable, "-c", "from atm_fl.cli import main; main()", "run", str(file), "--runtime", "in-process"]
    variables = {**os.environ, plugins.VARIABLE: page.name, "PYTHONPATH": str(ROOT)}  # a relative folder
    done = subprocess.run(command, cwd=page.parent, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (Path(config["run-dir"]) / "lines.txt").read_text().count("tuning") == 3


class Elsewhere(ClientApp):
    """The real ClientApp on machines whose plugins are those of another folder, of all parties or those of `tasks`."""

    def __init__(self, home: Path, *tasks: str) -> None:
        super().__init__()
        self.home, self.tasks = home, tasks

    def __call__(self, message: Message, context: Context) -> Message:
        task = Path(Settings.parse(context.run_config).task_names[int(context.node_config["partition-id"])]).name
        with pytest.MonkeyPatch.context() as patch:
            if not self.tasks or task in self.tasks:
                patch.setenv(plugins.VARIABLE, str(self.home))
            return client_app(message, context)


@pytest.fixture
def others(page: Path, tmp_path: Path) -> Path:
    """The files of the page, each a little different."""
    home = tmp_path / "others"
    home.mkdir()
    for file in page.glob("*.py"):
        (home / file.name).write_text(file.read_text() + "# another")
    return home


@pytest.mark.parametrize("what", CHOICES)
def test_a_party_with_another_file_of_what_both_run_is_named_before_the_first_round(
    what: str, config: dict[str, Any], others: Path
) -> None:
    settings = Settings.parse({**config, **CHOICES[what], "rounds": 1})
    grid = InProcessGrid(Elsewhere(others, "green"), len(settings.task_names), settings.as_config())
    if what in ("a defence", "a server optimizer"):  # the server alone runs them
        serve(grid, settings)
        return
    with pytest.raises(RunError) as error:
        serve(grid, settings)
    (name,) = {str(value).partition(":")[0] for value in CHOICES[what].values()}
    words = rf"no party holds green; green: the [a-z ]+ '{name}' is \w+\.py \w{{16}} here, and \w{{16}} at the server"
    assert re.search(words, str(error.value)), error.value
    assert not list(read_metrics(Path(settings.run_dir)))


def test_a_party_with_another_file_is_left_out_where_a_failure_is(config: dict[str, Any], others: Path) -> None:
    settings = Settings.parse({**config, "codec-up": "sign", "rounds": 1, "on-failure": "skip"})
    done = serve(InProcessGrid(Elsewhere(others, "green"), 3, settings.as_config()), settings)
    assert [line["tasks"] for line in read_metrics(done.directory) if line["kind"] == "merge"] == [["red", "blue"]]


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize("sent", [{}, {"codec 'sign'": 7}, {"codec 'sign'": "\x1b[2J" * 999}, {"x" * 9999: "y"}])
def test_a_party_only_compares_what_a_server_says_of_its_plugins(sent: dict[str, Any], config: dict[str, Any]) -> None:
    """Nothing that it sends is loaded; what it sends is shown in one line."""
    settings = Settings.parse({**config, "codec-up": "sign"})
    with pytest.raises(RunError) as error:
        check_plugins(settings, sent)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400
    check_plugins(settings, {thing: plugin.digest for thing, plugin in settings.plugins().items()})


@pytest.mark.usefixtures("page")
def test_a_party_without_a_file_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    settings = Settings.parse({**config, "codec-up": "sign"})
    with pytest.raises(RunError, match=r"no party holds red, green, blue; red, green, blue: .*'sign' is unknown"):
        serve(InProcessGrid(Elsewhere(tmp_path / "none"), 3, settings.as_config()), settings)


def test_another_file_under_the_same_name_does_not_resume(plugin_files: PluginFiles, config: dict[str, Any]) -> None:
    code = dict(PAGE)["A codec"]
    plugin_files(sign=code)
    config |= {"codec-up": "sign", "rounds": 1}
    run_loop(Settings.parse(config))
    config |= {"rounds": 2, "resume": True}
    home = plugin_files(other="pass")
    Run(Settings.parse(config)).close()  # what decides nothing may change
    (home / "sign.py").rename(home / "gone")
    plugin_files(renamed=code + "# another")
    (home / "moved").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugins.VARIABLE, os.pathsep.join([str(home), str(home / "moved")]))
        with pytest.raises(SettingError, match=r"whose codec 'sign' was sign\.py \w+, not renamed\.py \w+; bring back"):
            Run(Settings.parse(config))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1\nimport nothing_of_the_kind", r"bad\.py, line 2: ModuleNotFoundError: No module named"),
        ("def", r"bad\.py: SyntaxError: invalid syntax"),
        ("raise SystemExit('no')", r"bad\.py, line 1: SystemExit: no"),
        *[
            (code, r"bad\.py, line \d+: the " + words + " is there already; rename it")
            for code, words in (
                ("from atm_fl.codecs import codec\ncodec('int8')(type('C', (), {}))", "codec 'int8'"),
                (
                    "from atm_fl.merging import *\nfrom atm_fl.merging import merge\nmerge('ties')(type('C', (), {}))",
                    "merge 'ties'",
                ),
                ("from atm_fl.models import head\nhead('zero-shot')(len)", "head 'zero-shot'"),
                ("from atm_fl.models import backbone\nbackbone('vit_micro')(len)", "model 'vit_micro'"),
                ("from atm_fl.optimizers import optimizer\noptimizer('sgd')(len)", "optimizer 'sgd'"),
                (
                    "from atm_fl.merging.server_optimizer import server_optimizer as s\ns('adam')(len)",
                    "server-optimizer 'adam'",
                ),
                ("from atm_fl.sinks import sink\nsink('tensorboard')(len)", "metric sink 'tensorboard'"),
                ("from atm_fl.attacks.poisoning import attack\nattack('alie')(len)", "attack 'alie'"),
                ("from atm_fl.tasks import task\ntask('mnist', licence='', source='')(len)", "task 'mnist'"),
            )
        ],
    ],
)
def test_a_broken_file_or_a_name_that_is_taken_is_one_line_and_leaves_nothing(
    code: str, words: str, plugin_files: PluginFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    home = plugin_files(a="from atm_fl.codecs import codec, Fp32\ncodec('fine')(type('Fine', (Fp32,), {}))", bad=code)
    for _ in range(2):  # it stays an error
        assert call(monkeypatch, "settings") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(words, line), line
    (home / "bad.py").write_text("")
    assert call(monkeypatch, "settings") == 0
    assert "codec 'fine'" in capsys.readouterr().out
    assert CODECS["int8"].__module__.startswith("atm_fl.codecs.")


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"codec-up": "sing"}, "codec 'sing' is unknown; did you mean 'sign'?"),
        ({"transforms": "gird"}, "transform 'gird' is unknown; did you mean 'grid'?"),
        ({"transforms": "grid:stop=1"}, "'grid' has no option 'stop'; did you mean 'step'?"),
        ({"transforms": "grid:step=0"}, "transforms='grid:step=0': step=0: it must be above 0"),
        ({"transforms": "grid,grid"}, "names 'grid' twice; leave one out"),
        ({"transforms": "grid", "codec-up": "int8"}, "codec-up='int8': not with the transform 'grid'"),
        ({"model": "smaler"}, "model='smaler' is unknown; did you mean 'smaller'?"),
        ({"merge": "sign-meen"}, "merge='sign-meen' is unknown; did you mean 'sign-mean'?"),
        ({"tasks": "flatt"}, "task 'flatt' is unknown; did you mean 'flat'?"),
        ({"head": "chance"}, "it takes one of answers, sentences, prototypes, linear-probe, zero-shot, random"),
        ({"optimizer": "adam"}, "it takes one of adamw, sgd, adagrad"),
        ({"server-optimizer": "lzy"}, "server-optimizer='lzy' is unknown; did you mean 'lazy'?"),
        ({"metric-sinks": "line"}, "metric sink 'line' is unknown; did you mean 'lines'?"),
    ],
)
def test_an_unknown_name_is_told_those_of_plugins(wrong: dict[str, Any], words: str, config: dict[str, Any]) -> None:
    with pytest.raises(SettingError) as error:
        Settings.parse({**config, **wrong})
    assert words in str(error.value)


def test_lists_show_them(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("atm_fl.cli.terminal.console.width", 250)
    for command, words in (
        ("merges", ["sign-mean", "size=0.01"]),
        ("tasks", ["flat", "made up"]),
        ("settings", ["adamw | sgd | adagrad", "from plugins: sign", f"{page / 'An_attack.py'}: attack 'echo'"]),
    ):
        call(monkeypatch, command)
        out = capsys.readouterr().out
        assert all(word in out for word in words), command


def test_an_entry_point_is_loaded_and_its_error_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pointed_at.py").write_text(dict(PAGE)["A defence, which is a merge"].replace("sign-mean", "pointed"))
    monkeypatch.syspath_prepend(tmp_path)
    good, bad = (EntryPoint(name, name, plugins.GROUP) for name in ("pointed_at", "not_there"))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [good, bad])
    monkeypatch.setattr(plugins._loader, "named", None)
    with pytest.raises(SettingError, match="plugin entry point not_there = not_there: ModuleNotFoundError"):
        plugins.load()
    monkeypatch.setattr(plugins, "entry_points", lambda group: [good])
    assert "pointed" in repr(plugins.loaded())
    (plugin,) = (plugin for plugin in plugins.loaded() if "pointed_at" in plugin.name)
    assert len(plugin.digest) == 16
    plugins._forget(plugin)


def test_a_file_that_cannot_be_read_is_said(plugin_files: PluginFiles) -> None:
    (plugin_files() / "gone.py").symlink_to("nowhere")
    with pytest.raises(SettingError, match=r"gone\.py cannot be read \(No such file or directory\); chmod"):
        plugins.load()


def test_a_folder_that_is_none_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(SettingError, match="ATM_FL_PLUGINS: .*nowhere is not a folder"):
        Settings.parse({})
    monkeypatch.undo()


@pytest.mark.usefixtures("page")
def test_a_reconstruction_that_does_not_know_the_optimizer_is_refused() -> None:
    with pytest.raises(SettingError, match="optimizer='adagrad': the attacks know adamw and sgd alone"):
        Scenario.parse({"optimizer": "adagrad", "tasks": "mnist"})


def test_without_any_nothing_is_noted(config: dict[str, Any]) -> None:
    made = Run(Settings.parse(config))
    made.close()
    assert "plugins" not in json.loads((made.directory / "config.json").read_text())
