"""Exports: each format is loaded by its own library to the same features; cards, heads, predictions, a hub."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from conftest import make_folder
from federation import call, final
from safetensors.torch import load_file
from torch import Tensor

from atm_fl import models
from atm_fl.errors import RunError, SettingError
from atm_fl.exports import Predictor, export
from atm_fl.exports.card import _plain
from atm_fl.exports.hub import push
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.runs.run import Run
from atm_fl.settings import Settings


@pytest.fixture
def run(config: dict[str, Any]) -> Run:
    """A run of the small embedded ViT's code: one block, 5 tokens."""
    return run_loop(Settings.parse(config | {"rounds": 2}))


@pytest.fixture
def clip_run(clip: str, config: dict[str, Any]) -> Run:
    return run_loop(Settings.parse(config | {"model": clip, "weights": "random", "head": "zero-shot", "rounds": 1}))


def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def expected(run: Run) -> tuple[Tensor, Tensor]:
    """(the normalised pixels of `images`, their features by the run's last base)."""
    model = models.load_backbone(run.settings.model, run.settings.weights)
    state = model.state_dict()
    for name, value in final(run.directory).items():
        state[name].copy_(value)
    with torch.inference_mode():
        pixels = model.normalise(images())
        return pixels, model.vit(pixels)


def test_timm_loads_its_export(run: Run, tmp_path: Path) -> None:
    export(run.directory, "timm", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pixels, features = expected(run)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pixels), features)
    settings = timm.data.resolve_model_data_config(loaded)
    assert settings["input_size"] == (3, 32, 32)
    assert settings["mean"] == pytest.approx((0.5, 0.5, 0.5))


def test_open_clip_loads_its_export_with_the_text_tower(clip_run: Run, tmp_path: Path) -> None:
    export(clip_run.directory, "open_clip", tmp_path / "out")
    loaded, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    pixels, features = expected(clip_run)
    before = models.hubs.load_clip(clip_run.settings.model.removeprefix("open_clip/"), "random")
    words = open_clip.get_tokenizer("ViT-B-32")(["a red thing"])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_image(pixels), features)
        torch.testing.assert_close(loaded.encode_text(words), before.encode_text(words))


def test_transformers_loads_its_export_of_a_vit(run: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export(run.directory, "transformers", tmp_path / "vit")
    vit = transformers.AutoModel.from_pretrained(tmp_path / "vit").eval()
    pixels, features = expected(run)
    with torch.inference_mode():
        got = vit(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(got, features, rtol=1e-4, atol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit")
    chosen = processor(images=list(images()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(chosen, pixels, rtol=1e-4, atol=1e-4)


def test_transformers_loads_its_export_of_a_clip(clip_run: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export(clip_run.directory, "transformers", tmp_path / "clip")
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").eval()
    pixels, features = expected(clip_run)
    with torch.inference_mode():
        torch.testing.assert_close(tower(pixel_values=pixels).image_embeds, features, rtol=1e-4, atol=1e-5)


def test_safetensors_and_task_vector_are_the_model_and_its_difference(run: Run, tmp_path: Path) -> None:
    for to in ("safetensors", "task-vector"):
        export(run.directory, to, tmp_path / to)
    export(run.directory, "safetensors", tmp_path / "first", round=0)
    export(run.directory, "safetensors", tmp_path / "one", round=1)
    state = load_file(tmp_path / "safetensors" / "model.safetensors")
    vector = load_file(tmp_path / "task-vector" / "task_vector.safetensors")
    first = load_file(tmp_path / "first" / "model.safetensors")
    assert {f"vit.{name}" for name in state} == set(final(run.directory))
    pretrained = models.load_backbone("tiny").vit.state_dict()
    for name, value in state.items():
        assert torch.equal(value, final(run.directory)[f"vit.{name}"])
        assert torch.equal(first[name], pretrained[name])
        assert torch.equal(vector[name], value - pretrained[name])
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert any(not torch.equal(one[name], value) for name, value in state.items())


def test_dinov2s_layer_scales_and_other_sizes_go_through_every_library(tmp_path: Path, config: dict[str, Any]) -> None:
    @models.backbone("tiny_scaled")
    def tiny_scaled() -> models.Backbone:
        return models.Backbone(models.vit(28, 14, 24, 2, 3, init_values=0.5), 28, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))

    try:
        made = run_loop(Settings.parse(config | {"model": "tiny_scaled", "rounds": 1}))
        for to in ("timm", "transformers", "safetensors"):
            export(made.directory, to, tmp_path / to)  # which compares the features
            assert Predictor(tmp_path / to)(sorted(Path(config["tasks"].split(",")[0]).rglob("*.png"))[:2])
    finally:
        del models.BACKBONES["tiny_scaled"]


def test_predictions_are_the_partys_own_without_its_data(run: Run, config: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(config["tasks"].split(",")[0])
    files = sorted((folder / "test").rglob("*.png"))
    party = Party(run.settings, str(folder))
    party.model.load(run.base)
    with torch.inference_mode():
        logits = party.head(party.model.module(party.data.test.images))
    made = export(run.directory, "timm", tmp_path / "out")
    assert made.heads == ("red", "green", "blue")
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "test", pictures)
    shutil.rmtree(folder.parent)  # all data
    shutil.rmtree(run.directory)
    found = Predictor(tmp_path / "out")([pictures / file.relative_to(folder / "test") for file in files], task="red")
    for one, row in zip(found, logits.softmax(-1), strict=True):
        assert list(one.classes) == [f"class{place}" for place in row.argsort(descending=True, stable=True)]
        assert list(one.classes.values()) == pytest.approx(sorted(row.tolist(), reverse=True), abs=1e-5)


def test_the_commands_write_and_classify(
    run: Run,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert (
        call(monkeypatch, "export", str(run.directory), "--to", "timm", "--out", str(out), "--heads", "red,blue") == 0
    )
    assert "round 2, heads of red, blue" in capsys.readouterr().out
    picture = str(next(Path(config["tasks"].split(",")[0]).rglob("*.png")))
    assert call(monkeypatch, "predict", str(out), picture, "--task", "red", "--top", "2") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["task"] for row in rows] == ["red", "red"]
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"]) > 0
    assert call(monkeypatch, "predict", str(out), picture, "--format", "json") == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["task"] for each in objects] == ["red", "blue"]
    assert sum(objects[0]["classes"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"to": "tim"}, "to='tim' is unknown; did you mean 'timm'"),
        ({"to": "open_clip"}, "to='open_clip': model='tiny' is no CLIP"),
        ({"round": 7}, "round=7: .*there are 0, 1, 2"),
        ({"heads": ["pets"]}, "heads='pets': this machine keeps no head of 'pets'; it keeps red, green, blue"),
        ({"out": "."}, "out='.' is there already"),
    ],
)
def test_what_cannot_be_exported_is_said_and_nothing_is_left(
    run: Run, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        export(**{"run": run.directory, "out": tmp_path / "out", **change})
    assert not (tmp_path / "out").exists()


def test_a_format_that_would_change_the_model_is_refused(run: Run, tmp_path: Path, config: dict[str, Any]) -> None:
    @models.backbone("tiny_mean")
    def tiny_mean() -> models.Backbone:
        return models.Backbone(models.vit(32, 16, 16, 1, 2, global_pool="avg", fc_norm=False), 32)

    try:
        made = run_loop(Settings.parse(config | {"model": "tiny_mean", "rounds": 1, "run-dir": str(tmp_path / "mean")}))
        with pytest.raises(SettingError, match="gives other features with these weights than the run's model"):
            export(made.directory, "timm", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    finally:
        del models.BACKBONES["tiny_mean"]


def test_a_card_says_what_the_run_was_and_escapes_what_it_is_told(config: dict[str, Any], tmp_path: Path) -> None:
    odd = make_folder(tmp_path / "data" / "a_b<b>", 5)
    change = {"tasks": f"{config['tasks']},{odd}", "rounds": 1, "merge": "ties:density=0.5", "privacy": "dp-sgd"}
    made = run_loop(Settings.parse(config | change | {"dp-noise": 1.0}))
    export(made.directory, out=tmp_path / "out", heads=["red"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Merge `ties:density=0.5`" in text
    assert "| a_b\\<b\\> |" in text.replace("a\\_b", "a_b")
    assert "Spent by the whole run: ε " in text
    assert "| red | class0, class1, class2 |" in text
    assert "a party's own folder | not known to the run" in text
    assert "after 1 of 1 rounds" in text
    assert str(tmp_path) not in text
    assert "flwr " in text
    measured = [line for line in text.splitlines() if line.startswith("| mean |")]
    assert len(measured) == 1
    assert "–" not in measured[0]


@pytest.mark.parametrize("text", ["<script>", "a|b", "`x`", "[l](http://x)", "*b*", "__i__", "a\nb", "# h"])
def test_marks_are_no_marks(text: str) -> None:
    shown = _plain(text)
    assert "\n" not in shown
    for mark in "<|`[*#":
        assert shown.replace("\\" + mark, "").count(mark) == 0


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face's hub as an upload needs: repositories, commits, large files by LFS."""

    files: dict[str, bytes]
    large: dict[str, bytes]
    created: dict[str, Any]

    def do_POST(self) -> None:
        body = self._body()
        host = f"http://{self.headers['host']}"
        if self.headers.get("authorization") != "Bearer right":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = [] if {"library_name", "license", "tags"} <= front.keys() else [{"message": "no front matter"}]
            self._answer({"errors": wrong, "warnings": []})
        elif self.path == "/api/repos/create":
            type(self).created = json.loads(body)
            self._answer({"url": f"{host}/me/it", "id": "me/it"})
        elif "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self._answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": each["oid"], "size": each["size"], "actions": {"upload": {"href": f"{host}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.large[value["oid"]]
            self._answer({"commitUrl": f"{host}/me/it/commit/0", "commitOid": "0" * 40})
        else:
            self._answer({}, 404)

    def do_PUT(self) -> None:
        self.large[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"id": "me/it", "sha": "0" * 40, "siblings": [], "private": True})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    import huggingface_hub

    fresh = type("Fresh", (Hub,), {"files": {}, "large": {}})
    server = HTTPServer(("127.0.0.1", 0), fresh)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "right")
    yield fresh
    server.shutdown()
    server.server_close()


def test_a_push_brings_every_file_to_the_hub_and_no_head_unless_it_is_named(
    run: Run, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push_to = ["--to", "timm", "--push-to", "hf:me/it"]
    assert call(monkeypatch, "export", str(run.directory), *push_to, "--out", str(tmp_path / "out")) == 0
    assert "no heads" in capsys.readouterr().out
    here = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(here) == {"README.md", "atm-fl.json", "config.json", "model.safetensors"}
    assert hub.files == here
    assert hub.created.get("visibility") == "private" or hub.created["private"] is True, hub.created
    named = ["--heads", "red", "--out", str(tmp_path / "two")]
    assert call(monkeypatch, "export", str(run.directory), *push_to, *named) == 0
    assert "heads.safetensors" in hub.files


def test_a_hub_that_refuses_is_one_line_and_the_folder_stays(
    run: Run, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run.directory, out=tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(RunError, match="push-to='hf:me/it': the hub did not take .*which stays here .*401 Unauth"):
        push(tmp_path / "out", "hf:me/it")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(SettingError, match="push-to='me/it': write it as hf:USER/NAME"):
        push(tmp_path / "out", "me/it")
