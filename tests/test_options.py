"""One syntax for what is chosen by name with options: written and read again, old spellings, and a run of before."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atm_fl.attacks.poisoning import ATTACKS
from atm_fl.codecs import CODECS, make_codec
from atm_fl.errors import SettingError
from atm_fl.experiments import read_study, reconstruction
from atm_fl.federation.loop import run_loop
from atm_fl.merging import MERGES
from atm_fl.merging.server_optimizer import SERVER_OPTIMIZERS
from atm_fl.options import Choice, read_choice, type_name
from atm_fl.plugins import Registry
from atm_fl.settings import OldSpelling, Settings, defaults, modern, sections, stored
from atm_fl.vectors import digest

REGISTRIES = {"merge": MERGES, "codec-up": CODECS, "server-optimizer": SERVER_OPTIMIZERS, "attack": ATTACKS}
THINGS = [(setting, registry, name) for setting, registry in REGISTRIES.items() for name in registry]


def values_of(item: Any) -> st.SearchStrategy[Any]:
    """Values within an option's bounds; a codec's block is even."""
    if type_name(item) == "bool":
        return st.booleans()
    if type_name(item) == "str":
        return st.sampled_from(item.metadata["among"])
    bounds = item.metadata["bounds"]
    low, high = max(bounds["ge"], bounds["gt"], -1e6), min(bounds["le"], bounds["lt"], 1e6)
    if type_name(item) == "int":
        return st.integers(int(low), int(high)).map(lambda number: number // 2 * 2 if item.name == "block" else number)
    return st.floats(low, high, exclude_min=low == bounds["gt"], exclude_max=high == bounds["lt"])


@pytest.mark.parametrize(("setting", "registry", "name"), THINGS, ids=[f"{s}-{n}" for s, _, n in THINGS])
@given(data=st.data())
def test_what_is_written_is_read_again(setting: str, registry: Registry[Any], name: str, data: st.DataObject) -> None:
    items = registry.options(registry[name])
    chosen = {item.name: data.draw(values_of(item)) for item in items}
    values = {item.name: chosen[item.name] for item in items if chosen[item.name] != item.default}
    choice = Choice(name, values)
    assert read_choice(setting, str(choice), registry) == choice
    # the order and blanks of what a person writes do not matter, and defaults may be said
    items_text = [f" {key.replace('_', '-')} = {str(value).lower()}" for key, value in reversed(chosen.items())]
    assert read_choice(setting, f"{name}:{','.join(items_text)}" if chosen else name, registry) == choice
    if setting in defaults() and name not in ("multi-krum", "consensus", "trimmed-mean"):  # which may need more tasks
        assert Settings.parse({setting: str(choice)}).as_config()[setting] == str(choice)


NUMBERS = [
    (s, r, name, item) for s, r, name in THINGS for item in r.options(r[name]) if type_name(item) in ("int", "float")
]


@pytest.mark.parametrize(
    ("setting", "registry", "name", "item"), NUMBERS, ids=[f"{s}-{n}-{item.name}" for s, _, n, item in NUMBERS]
)
def test_an_error_names_setting_value_option_and_fix(
    setting: str, registry: Registry[Any], name: str, item: Any
) -> None:
    dashed = item.name.replace("_", "-")
    for text, words in (
        (f"{name}:{dashed}x=1", f"has no option '{dashed}x'; did you mean '{dashed}'?"),
        (f"{name}:{dashed}=big", f"{dashed}='big': it must be a"),
        (f"{name}:{dashed}", "is not of the form key=value" if setting != "codec-up" else "it must be a"),
        (f"{name}:{dashed}=-1e9", f"{dashed}=-1000000000.0: it must be"),
        (
            f"{name}:{dashed}=0.25,{dashed}=0.25",
            "it must be" if type_name(item) == "int" else f"{dashed} is there twice",
        ),
        (f"{name[:-1]}:{dashed}=1", "is unknown"),
    ):
        with pytest.raises(SettingError) as error:
            read_choice(setting, text, registry)
        assert str(error.value).startswith(f"{setting}={text!r}")
        assert words in str(error.value)


def test_a_word_that_is_none_of_the_options_words_is_refused_with_those_that_are() -> None:
    for wrong in ("half", "1", "true"):
        with pytest.raises(SettingError) as error:
            read_choice("merge", f"iso-c:precision={wrong}", MERGES)
        assert str(error.value).startswith(f"merge='iso-c:precision={wrong}': precision=")
        assert str(error.value).endswith(": it must be exact or float32")


def test_what_takes_no_options_says_so() -> None:
    for setting, registry, name in (("codec-up", CODECS, "fp16"), ("attack", ATTACKS, "free-ride")):
        with pytest.raises(SettingError, match=f"'{name}' takes no options; write {setting}='{name}'"):
            read_choice(setting, f"{name}:x=1", registry)


OLD = [
    ({"merge": "ties", "merge-options": "density = 0.1"}, {"merge": "ties:density=0.1"}),
    ({"merge": "breadcrumbs", "merge-options": "beta=0.7, gamma=0.9"}, {"merge": "breadcrumbs:beta=0.7,gamma=0.9"}),
    (
        {"codec-up": "topk:0.05", "codec-down": "int8:64"},
        {"codec-up": "topk:density=0.05", "codec-down": "int8:block=64"},
    ),
    ({"codec-up": "low-rank:16"}, {"codec-up": "low-rank:rank=16"}),
    ({"server-learning-rate": 0.5}, {"server-optimizer": "none:learning-rate=0.5"}),
    (
        {"server-optimizer": "adam", "server-learning-rate": 1e-3, "server-epsilon": 1e-4, "server-beta2": 0.9},
        {"server-optimizer": "adam:learning-rate=0.001,beta2=0.9,epsilon=0.0001"},
    ),
    ({"server-optimizer": "momentum:momentum=0.5", "server-learning-rate": 0.75}, {
        "server-optimizer": "momentum:learning-rate=0.75,momentum=0.5"
    }),
    ({"server-optimizer": "adagrad", "server-momentum": 0.5}, {"server-optimizer": "adagrad"}),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), OLD)
def test_an_old_spelling_is_its_new_one_and_one_line_says_so(old: dict[str, Any], new: dict[str, Any]) -> None:
    with pytest.warns(OldSpelling) as message:
        assert Settings.parse(old) == Settings.parse(new)
    texts = [str(warning.message) for warning in message]
    assert len(texts) == (2 if "codec-down" in old else 1)
    assert all(f"write {key}={value!r}" in " ".join(texts) for key, value in new.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Settings.parse(new)
        assert stored(old) == Settings.parse(new).decisive()


@pytest.mark.parametrize("name", CODECS)
def test_every_codecs_old_number_is_its_option(name: str) -> None:
    for item in CODECS.options(CODECS[name]):
        number = 0.25 if type_name(item) == "float" else 4
        assert make_codec(f"{name}:{number}") == make_codec(f"{name}:{item.name}={number}")


def _of_before(settings: dict[str, Any], **old: Any) -> dict[str, Any]:
    """What a version before the one syntax wrote."""
    plain = {"merge-options": "", "server-learning-rate": 1.0, "server-momentum": 0.9, "server-beta2": 0.99}
    return {**settings, **plain, "server-epsilon": 0.001, **old}


def test_a_run_of_before_resumes(config: dict[str, Any], tmp_path: Path) -> None:
    chosen = {"merge": "ties:density=0.1", "codec-up": "topk:density=0.2"}
    chosen["server-optimizer"] = "momentum:learning-rate=0.5,momentum=0.5"
    whole = digest(run_loop(Settings.parse(config | chosen)).base)
    broken = config | chosen | {"run-dir": str(tmp_path / "broken"), "rounds": 2}
    path = run_loop(Settings.parse(broken)).directory / "config.json"
    known = json.loads(path.read_text())
    old = {"merge": "ties", "merge-options": "density=0.1", "codec-up": "topk:0.2", "server-optimizer": "momentum"}
    old |= {"server-learning-rate": 0.5, "server-momentum": 0.5}
    path.write_text(json.dumps(known | {"settings": _of_before(known["settings"], **old)}))
    again = broken | {"rounds": 3, "resume": True}
    for other in ({"merge": "ties:density=0.3"}, {"server-optimizer": "momentum:momentum=0.5"}):
        with pytest.raises(SettingError, match=f"holds a run with {next(iter(other))}="):
            run_loop(Settings.parse(again | other))
    assert digest(run_loop(Settings.parse(again)).base) == whole


def test_what_a_plugin_that_is_gone_was_called_stays() -> None:
    assert modern({"merge": "of-a-plugin:size=1", "codec-up": "gone:3"}, strict=False) == {
        "merge": "of-a-plugin:size=1",
        "codec-up": "gone:3",
    }


def test_a_row_of_a_study_of_before_is_done(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(f'folder = "{tmp_path}"\n[common]\ntasks = "mnist"\n[rows]\nrow = {{ codec-up = "topk:0.05" }}\n')
    with pytest.warns(OldSpelling):
        (unit,) = read_study(file, reconstruction).units
    unit.path.write_text(json.dumps({"values": unit.values, "result": {"done": True}}))
    file.write_text(file.read_text().replace("topk:0.05", "topk:density=0.05"))
    (unit,) = read_study(file, reconstruction).units
    assert unit.result() == {"done": True}


def test_every_setting_is_in_one_section() -> None:
    names = [item.name.replace("_", "-") for items in sections().values() for item in items]
    assert names == list(defaults())
    assert len(sections()) == 8
