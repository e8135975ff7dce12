"""Transforms from a file of their own: where in a vector's way their hooks are, and what holds whatever they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PluginFiles
from test_plugins import run

from atm_fl.errors import RunError, SettingError
from atm_fl.federation.chain import Chain
from atm_fl.federation.loop import run_loop
from atm_fl.runs.run import Run
from atm_fl.settings import Settings, defaults
from atm_fl.transforms import Context, make_transforms

HEAD = "import torch\nfrom atm_fl.transforms import Transform, option, transform\n"
TIMES = """
@transform("times")
class Times(Transform):
    factor: float = option(4.0, "factor at the client", gt=0)
    def client(self, vector, context):
        return vector * self.factor
"""
THERE_AND_BACK = """
@transform("there-and-back")
class ThereAndBack(Transform):
    def client(self, vector, context):
        return (vector + 1).flip(0)
    def server(self, vector, context):
        return vector.flip(0) - 1
@transform("doubled")
class Doubled(Transform):
    def client(self, vector, context):
        return vector * 2
    def server(self, vector, context):
        return vector / 2
"""
SUM = """
@transform("signs")
class Signs(Transform):
    def total(self, scaled, factor, context):
        context.numbers["norm_before"] = float(scaled.norm())
        return scaled.sign() * 1e-3
"""
LEAVES_OUT = """
@transform("halves")
class Halves(Transform):
    def client(self, vector, context):
        last = context.recall("halves")
        vector = vector + last["rest"] if last else vector
        first = torch.arange(len(vector)) % 2 == context.round_number % 2
        context.keep("halves", {"rest": vector * ~first})
        return vector * first
"""
SECURE = {"secure-aggregation": True}


def settings_of(config: dict[str, Any], name: str, **more: Any) -> Settings:
    changed = {key.replace("_", "-"): value for key, value in more.items()}
    return Settings.parse({**config, "run-dir": f"{config['run-dir']}-{name}", **changed})


def test_a_server_undoes_in_reverse_order_what_clients_did(plugin_files: PluginFiles, config: dict[str, Any]) -> None:
    """Not commuting: 2 (v + 1) is undone to v by halving first."""
    plugin_files(back=HEAD + THERE_AND_BACK)
    plain, flower = run(config, "there", transforms="there-and-back, doubled", rounds=1)
    without, _ = run(config, "without", rounds=1)
    assert torch.equal(plain.base, flower.base)
    torch.testing.assert_close(plain.base, without.base, rtol=0, atol=1e-6)
    settings, layout = Settings.parse({**config, "transforms": "there-and-back, doubled"}), without.layout
    vector, context = torch.randn(layout.size), Context(Settings(), layout, 1, "red")
    sent = Chain(settings).encode(vector.clone(), context)
    (travelled,) = sent.values()
    torch.testing.assert_close(torch.from_numpy(travelled), 2 * (vector + 1).flip(0))
    torch.testing.assert_close(Chain(settings).decode(sent, context), vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize("secure", [False, True])
def test_client_level_clip_holds_whatever_a_transform_does(
    plugin_files: PluginFiles,
    config: dict[str, Any],
    secure: bool,
) -> None:
    """The mean of three vectors clipped to 0.01 is no longer than that, though each was made 10⁴ times as long."""
    plugin_files(times=HEAD + TIMES)
    bound = {"dp-client-clip": 0.01, "secure-aggregation": secure, "rounds": 1, "proportion": 0.0}
    for made in run(config, "long", transforms="times:factor=1e4", **bound):
        pretrained = Run(settings_of(config, f"none-{made.directory.name}")).base
        assert 0.005 < float((made.base - pretrained).norm()) < 0.0101


@pytest.mark.parametrize("secure", [False, True])
def test_a_transform_of_the_sum_gets_it_after_the_noise(
    plugin_files: PluginFiles,
    config: dict[str, Any],
    secure: bool,
) -> None:
    plugin_files(signs=HEAD + SUM)
    chosen = {"dp-client-clip": 1.0, "dp-client-noise": 2.0, "secure-aggregation": secure, "rounds": 1}
    made, _ = run(config, f"sum-{secure}", transforms="signs", **chosen)
    step = made.base - Run(settings_of(config, "pretrained")).base
    torch.testing.assert_close(step.abs(), torch.full_like(step, 1e-3), rtol=0, atol=1e-6)
    lines = [json.loads(line) for line in (made.directory / "metrics.jsonl").read_text().splitlines()]
    (message,) = [line for line in lines if line["kind"] == "merge"]
    assert message["norm_before"] == pytest.approx(2.0 / 3 * made.layout.size**0.5, rel=0.05)  # σ C / 3 in each element
    assert message["epsilon"] > 0


def test_what_a_client_keeps_is_there_in_its_next_round_and_after_a_resume(
    plugin_files: PluginFiles,
    config: dict[str, Any],
) -> None:
    plugin_files(halves=HEAD + LEAVES_OUT)
    whole, flower = run(config, "whole", transforms="halves")
    assert torch.equal(whole.base, flower.base)
    run_loop(settings_of(config, "broken", transforms="halves", rounds=2))
    resumed = run_loop(settings_of(config, "broken", transforms="halves", resume=True))
    assert torch.equal(resumed.base, whole.base)
    with pytest.raises(SettingError, match="holds a run with transforms='halves', not ''"):
        Run(settings_of(config, "broken", resume=True))


def test_what_makes_no_vector_of_the_model_is_named(plugin_files: PluginFiles, config: dict[str, Any]) -> None:
    plugin_files(times=HEAD + TIMES.replace("vector * self.factor", "vector[1:]"))
    with pytest.raises(RunError, match=r"the transform 'times' has made torch.float32\[\d+\], not float32\[\d+\]; fix"):
        run_loop(settings_of(config, "short", transforms="times"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"transforms": "doubled", **SECURE}, "transforms='doubled': not with secure-aggregation=true"),
        ({"transforms": "signs", "merge": "ties"}, "merge='ties': not with transforms='signs'"),
        ({"transforms": "signs", "fraction": 0.5}, "fraction=0.5: not with transforms='signs'"),
        ({"transforms": "times:factor"}, "'factor' is not of the form key=value"),
        ({"transforms": "factor=2"}, "transform 'factor=2' is unknown"),
    ],
)
def test_transforms_that_cannot_work_are_said(
    plugin_files: PluginFiles,
    config: dict[str, Any],
    wrong: dict[str, Any],
    words: str,
) -> None:
    plugin_files(all=HEAD + TIMES + THERE_AND_BACK + SUM)
    with pytest.raises(SettingError) as error:
        Settings.parse({**config, **wrong})
    assert words in str(error.value)


def test_commas_part_transforms_and_their_options(plugin_files: PluginFiles) -> None:
    plugin_files(all=HEAD + TIMES.replace("    def", '    other: int = option(1, "another")\n    def') + THERE_AND_BACK)
    first, second, third = make_transforms("doubled, times:factor=2,other=3, there-and-back")
    assert (first.name, third.name) == ("doubled", "there-and-back")
    assert vars(second) == {"factor": 2, "other": 3}
    assert make_transforms("") == make_transforms(" ") == []


def test_keys_and_files_from_before_there_were_transforms_stay(config: dict[str, Any], tmp_path: Path) -> None:
    """A DP-SGD ledger and a server's noise are keyed by the settings that decide: without transforms as ever."""
    assert "transforms" in defaults()
    assert "transforms" not in Settings.parse(config).decisive()
