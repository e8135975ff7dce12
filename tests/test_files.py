"""What a party keeps on its disk is its owner's alone."""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_IMODE
from typing import Any

import pytest
import torch

from atm_fl import tasks
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.loop import run_loop
from atm_fl.files import atomic_write
from atm_fl.settings import Settings


def modes(root: Path) -> tuple[set[int], set[int]]:
    """Modes of the folders that hold files below `root`, and of the files."""
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {S_IMODE(path.parent.stat().st_mode) for path in files}, {S_IMODE(path.stat().st_mode) for path in files}


@pytest.mark.parametrize("mask", [0, 0o022])
def test_what_a_party_keeps_is_its_owners_alone(
    mask: int, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    before = os.umask(mask)
    try:
        run_loop(Settings.parse({**config, "rounds": 1, "privacy": "dp-sgd", "dp-noise": 1.0}))
        kept = ClientState("0" * 16, "mnist")
        kept.save_base(torch.zeros(3), "digest")
        kept.save_secret("secret")
    finally:
        os.umask(before)
    for name in ("heads", "privacy", "runs"):
        assert modes(tasks.cache_dir() / name) == ({0o700}, {0o600}), name


def test_a_private_file_shuts_what_was_open(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with atomic_write(folder / "ledger.json", private=True) as temporary:
        temporary.write_text("{}")
        temporary.chmod(0o666)
    assert modes(folder) == ({0o700}, {0o600})
