"""benchmarks/wire.py on a tiny layout: a real SuperLink with TLS, stock Flower's apps and ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_row_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "wire.py"), "--scale", "tiny", "--clients", "2"]
    command += ["--rounds", "2", "--rows", "stock,int8", "--keep", str(tmp_path / "kept")]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == ["stock", "int8"]
    model, stock, ours = 2 * 4 * 2_880_000 / 1e6, *([float(row[n].split()[0]) for n in (5, 6)] for row in rows[1:])
    for stocks, our in zip(stock, ours, strict=True):
        assert model <= stocks <= model * 1.02
        assert stocks / 4.5 < our < stocks / 3.9
    assert not list((tmp_path / "kept").glob("*/cache/runs/*/*/base.safetensors"))  # the run was ended properly
