"""Models by the path of a function: package.module:function."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from atm_fl.clients.app import app as client_app
from atm_fl.errors import RunError, SettingError
from atm_fl.federation.loop import run_loop
from atm_fl.models import load_backbone
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings

PACKAGE = """
import os
import torch
open(os.environ["IMPORTED"], "a").write("x")


class Small(torch.nn.Module):
    image_size = 16

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten())

    def forward(self, images):
        return self.layers(torch.nn.functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, 8))


def small():
    return Small()


def table():
    return {"image_size": 16}


four = 4
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `lent` whose parent and module leave a trace when they are imported."""
    folder = tmp_path / "site" / "lent"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text('import os\nopen(os.environ["IMPORTED"], "a").write("p")\n')
    (folder / "nets.py").write_text(PACKAGE)
    (folder / "hungry.py").write_text("import nowhere_at_all\n")
    trace = tmp_path / "trace"
    trace.touch()
    monkeypatch.setenv("IMPORTED", str(trace))
    monkeypatch.syspath_prepend(str(folder.parent))
    yield trace
    for name in [name for name in sys.modules if name.partition(".")[0] == "lent"]:
        del sys.modules[name]


def test_it_is_tuned_and_merged_as_any_model(config: dict[str, Any], package: Path) -> None:
    runs = []
    for runtime in ("plain", "grid"):
        settings = Settings.parse(config | {"model": "lent.nets:small", "run-dir": f"{config['run-dir']}-{runtime}"})
        grid = InProcessGrid(client_app, len(settings.task_names), settings.as_config())
        runs.append(run_loop(settings) if runtime == "plain" else serve(grid, settings))
    assert torch.equal(runs[0].base, runs[1].base)
    assert set(runs[0].layout.names) == {"layers.0.weight", "layers.0.bias"}
    assert not torch.equal(
        runs[0].base, torch.cat([p.flatten() for p in load_backbone("lent.nets:small").parameters()])
    )
    noted = json.loads((runs[0].directory / "config.json").read_text())["plugins"]
    assert noted["model 'lent.nets:small'"].startswith("nets.py ")


def test_a_run_whose_module_has_changed_is_not_resumed(config: dict[str, Any], package: Path) -> None:
    config |= {"model": "lent.nets:small", "rounds": 1}
    run_loop(Settings.parse(config))
    with (package.parent / "site" / "lent" / "nets.py").open("a") as file:
        file.write("\n")
    with pytest.raises(SettingError, match=r"whose model 'lent\.nets:small' was nets\.py"):
        run_loop(Settings.parse(config | {"rounds": 2, "resume": True}))


@pytest.mark.parametrize("digest_known", [True, False])
@pytest.mark.parametrize("policy", ["", 'models = ["vit_*", "other:*"]'])
def test_a_party_imports_nothing_that_its_policy_does_not_name(
    config: dict[str, Any],
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    digest_known: bool,
) -> None:
    """The settings, the comparison of plugins and the roll call come from the server: none of them imports a thing.

    digest_known: whether the server says the module's digest rightly, or that it has no such plugin.
    """
    if digest_known:
        monkeypatch.setattr("atm_fl.clients.app.check_plugins", lambda settings, said: None)
    grid = InProcessGrid(client_app, 3, config | {"model": "lent.nets:small"})
    for number, folder in enumerate(config["tasks"].split(","), 1):
        context = grid.contexts[number]
        context.node_config.clear()
        context.node_config["data"] = folder
        if policy:
            (tmp_path / "policy.toml").write_text(policy)
            context.node_config["policy"] = str(tmp_path / "policy.toml")
    reason = r"policy.*models|models.*policy" if digest_known else "and no plugin at the server"
    with pytest.raises(RunError, match=reason):
        serve(grid, Settings.parse(config))
    assert package.read_text() == ""


def test_a_party_imports_what_its_policy_names(config: dict[str, Any], package: Path, tmp_path: Path) -> None:
    asked = config | {"model": "lent.nets:small", "rounds": 1}
    grid = InProcessGrid(client_app, 3, asked)
    (tmp_path / "policy.toml").write_text('models = ["lent.nets:*"]')
    for number, folder in enumerate(config["tasks"].split(","), 1):
        grid.contexts[number].node_config.clear()
        grid.contexts[number].node_config |= {"data": folder, "policy": str(tmp_path / "policy.toml")}
    assert serve(grid, Settings.parse(asked)).rounds_done == 1


def test_a_file_of_weights_may_fill_it(config: dict[str, Any], package: Path, tmp_path: Path) -> None:
    first = load_backbone("lent.nets:small")
    torch.nn.init.ones_(first.layers[0].weight)
    save_file(first.state_dict(), str(tmp_path / "ones.safetensors"))
    again = load_backbone("lent.nets:small", str(tmp_path / "ones.safetensors"))
    assert torch.equal(again.layers[0].weight, torch.ones(8, 3, 3, 3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lent.nets:large", "has no function 'large'"),
        ("lent.nets:four", "has no function 'four'"),
        ("lent.nets:table", "is a dict without what atm_fl.models.Encoder asks for"),
        ("lent.nests:small", "there is no module 'lent.nests' here"),
        ("lend.nets:small", "there is no module 'lend' here"),
        ("lent.hungry:small", "lent.hungry needs 'nowhere_at_all', which is not installed"),
    ],
)
@pytest.mark.usefixtures("package")
def test_what_cannot_be_had_is_said(name: str, message: str, config: dict[str, Any]) -> None:
    with pytest.raises(SettingError) as error:
        run_loop(Settings.parse(config | {"model": name}))
    assert f"model={name!r}" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("name", [":", "a:", ":b", "a:b:c", "a b:c", "a:b()", "a..b:c", "../a:b", "a/b:c"])
def test_what_is_no_path_is_refused_when_settings_are_read(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="is no path of a function"):
        Settings.parse(config | {"model": name})
