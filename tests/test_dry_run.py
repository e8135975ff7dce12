"""Dry runs: what runs would cost, against what runs did, and against closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from atm_fl import cli, models
from atm_fl.errors import SettingError
from atm_fl.experiments import contest, dry_run
from atm_fl.federation.loop import run_loop
from atm_fl.models.flops import operations
from atm_fl.runs.metrics import read_metrics
from atm_fl.settings import Settings
from atm_fl.tasks import Split

PUBLISHED = "cars,dtd,eurosat,gtsrb,mnist-full,resisc45,svhn,sun397"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"local-epochs": 2.0, "accumulate": 4},
        {"local-epochs": 0.5, "validate-every": 2},
        {"participation": "red=2-", "test-every": 1},
        {"split": "validation", "holdout": 0.5, "batch-size": 4},
    ],
)
def test_steps_and_images_are_those_of_the_run(config: dict[str, Any], more: dict[str, Any]) -> None:
    settings = Settings.parse({**config, **more})
    lines = list(read_metrics(run_loop(settings).directory))
    tuned = [line for line in lines if line["kind"] == "tuning"]
    work = dry_run._work("atm", settings, 10, 1)
    assert (work.steps, work.tuned) == (sum(line["steps"] for line in tuned), sum(line["images"] for line in tuned))
    held = {"validation": 6 if settings.split == "validation" else 12, "test": 12}
    counts = [held[split] for line in lines if line["kind"] == "evaluation" for split in held if split in line]
    assert work.evaluated == sum(counts)


def study(config: dict[str, Any], tmp_path: Path) -> Path:
    settings = {key: value for key, value in config.items() if key not in ("rounds", "run-dir")}
    text = f'folder = "{tmp_path / "study"}"\nname = "report"\nseeds = [0, 1]\nepochs = 4\n[settings]\n'
    text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    text += """[rows]
single = { kind = "single" }
joint = { kind = "joint" }
mean = { kind = "one-shot", tune = { scaling = [0.5, 1.0, 2.0] } }
soup = { kind = "one-shot", greedy = true }
atm = { tune = { learning-rate = [1e-3, 1e-2] } }
short = { tune = { learning-rate = [1e-3, 1e-2] }, tuning-rounds = 1 }
refined = { kind = "ph-atm" }
"""
    (tmp_path / "study.toml").write_text(text)
    return tmp_path / "study.toml"


def test_a_contest_has_a_line_a_row_with_the_runs_that_it_takes(config: dict[str, Any], tmp_path: Path) -> None:
    answer = CliRunner().invoke(cli.app, ["compare", str(study(config, tmp_path)), "--dry-run"])
    assert answer.exit_code == 0, answer.output
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in answer.output.splitlines() if "|" in line]
    by_name = {row[0]: row[1:5] for row in rows[2:]}
    # 36 images to tune on, 12 and 12 to evaluate in each of 3 tasks; batches of 8; 4 epochs
    assert by_name["single"] == ["2", f"{2 * 3 * 4 * 5}", "864", f"{2 * 2 * 72}"]
    assert by_name["joint"] == ["2", f"{2 * 4 * 14}", "864", f"{2 * (5 * 36 + 2 * 36)}"]
    assert by_name["mean"] == ["2", "0", "0", f"{2 * (3 * 36 + 36)}"]
    assert by_name["soup"] == ["2", "0", "0", f"{2 * (5 * 36 + 36)}"]
    assert by_name["atm"][:3] == ["3", f"{3 * 4 * 15}", f"{3 * 4 * 108:,}"]
    assert by_name["short"][:2] == ["4", f"{(2 * 4 + 2) * 15}"]
    assert by_name["refined from mean"][0] == "2"
    assert not (tmp_path / "study").exists()


def test_hours_are_operations_at_a_part_of_the_peak(config: dict[str, Any]) -> None:
    settings = replace(Settings.parse(config), precision="bf16")
    lines = list(dry_run.dry_run([("run", "atm", settings)], "H100"))
    cells = [cell.strip() for cell in lines[0].splitlines()[2].strip("|").split("|")]
    tiny = models.load_backbone("tiny")
    forward, step = operations(tiny, *tiny.example())
    work = dry_run._work("atm", settings, 10, 1)
    flops = step * work.tuned + forward * work.evaluated
    assert float(cells[5]) == pytest.approx(flops / 1e15, rel=0.1)
    assert float(cells[6]) == pytest.approx(flops / (0.33 * 989e12) / 3600, rel=0.1)
    assert any("989" in line and "33%" in line and "assumed" in line for line in lines)


class Squares(nn.Module):
    """Features whose way back keeps each image's float32 pixels, and nothing else that grows with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() * self.factor).sum((1, 2, 3))[:, None]


def test_what_autograd_keeps_is_counted_once_and_without_parameters() -> None:
    head, size = models.Head(torch.ones(2, 1), torch.zeros(2)), 64
    data = Split(torch.ones(2, 3, size, size, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    one, two = (dry_run.kept_by_autograd(Squares(), head, data.take(slice(0, count))) for count in (1, 2))
    assert two - one == pytest.approx(3 * size * size * 4, abs=200)


def test_what_is_to_be_downloaded_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATM_FL_DATA", str(tmp_path))
    settings = Settings.parse({"tasks": PUBLISHED, "model": "open_clip/ViT-B-16", "head": "zero-shot"})
    tried = dry_run.Tried(10**9, False, 10, (1, 3))
    monkeypatch.setattr(dry_run, "try_out", lambda settings: tried)
    told = "\n".join(dry_run.dry_run([("run", "atm", settings)], "A100"))
    assert "weights openai of open_clip/ViT-B-16: 149,620,737 parameters" in told
    assert "sun397 80" in told
    assert "214,692" in "\n".join(dry_run.dry_run([("run", "atm", replace(settings, rounds=1))], "A100"))
    monkeypatch.setattr(dry_run, "try_out", lambda settings: replace(tried, memory=10**11))
    assert "more than a A100 has" in "\n".join(dry_run.dry_run([("run", "atm", settings)], "A100"))


def test_it_refuses_what_it_cannot_reckon(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="--device-name='A10' is unknown; did you mean 'A100'"):
        list(dry_run.dry_run([("run", "atm", Settings.parse(config))], "A10"))
    with pytest.raises(SettingError, match="made by a download alone"):
        dry_run.try_out(replace(Settings.parse(config), model="transformers/some"))


@pytest.mark.slow
def test_the_published_experiments_are_tried_without_a_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The contest of the paper with ViT-B/32 in place of ViT-B/16, of 224 px: a minute or two on a CPU."""
    text = (Path(__file__).parents[1] / "configs" / "paper_contest.toml").read_text()
    file = tmp_path / "paper.toml"
    file.write_text(text.replace("ViT-B-16", "ViT-B-32"))
    from atm_fl.experiments import read_study

    lines = list(dry_run.dry_run(dry_run.rows_of(read_study(file, contest)), "A100"))
    rows = lines[0].splitlines()[2:]
    assert len(rows) == len(read_study(file, contest).rows) + 1
    assert "16,810" in lines[0]


def test_operations_are_the_closed_form_of_a_vit() -> None:
    """Of width w, n tokens, a block: 12 w² a token in its layers, 2 n w a token in attention; times two, and w 3 p²."""
    tiny, tokens, width, patch = models.load_backbone("tiny"), 5, 16, 16
    block = 2 * tokens * (12 * width**2 + 2 * tokens * width)
    forward, step = operations(tiny, *tiny.example())
    patches = 2 * (tokens - 1) * width * 3 * patch**2
    assert (forward, step) == (block + patches, 3 * block + 2 * patches)  # nobody wants a gradient of the pixels
