"""Small Flower apps out of files of this folder, for benchmarks that run Flower's own side by side with ours."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Config:
    """A run config of such an app, as `flower_run` takes it."""

    run_dir: str
    values: dict[str, object]

    def as_config(self) -> dict[str, object]:
        """The values."""
        return self.values


def write_app(folder: Path, name: str, modules: list[Path], config: dict[str, object]) -> Path:
    """Write the app `name` into `folder`/app: its server and client are those of the last of its modules."""
    app = folder / "app"
    app.mkdir()
    for file in [*modules, ROOT / "LICENSE"]:
        shutil.copy(file, app)
    module = modules[-1].stem
    (app / "pyproject.toml").write_text(
        f"""[project]
name = "{name}"
version = "0.1.0"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "atm-fl"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "{module}:server"
clientapp = "{module}:client"
[tool.flwr.app.config]
"""
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())
    )
    return app
