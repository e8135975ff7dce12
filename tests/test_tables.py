"""One Markdown table, read back by a parser of Markdown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from atm_fl.errors import SettingError
from atm_fl.runs.claims import claim, holds
from atm_fl.settings import Settings
from atm_fl.tables import markdown


def test_a_table_has_a_head_a_rule_and_a_line_for_each_row() -> None:
    assert markdown(("a", "b"), [("1", "2"), ["3", "4"]]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| 1 | 2 |",
        "| 3 | 4 |",
    ]
    assert markdown(["a", "b", "c"], [], "|---:") == "| a | b | c |\n|---|---:|---:|"


def test_a_folder_is_its_configurations_alone_whatever_version_spelled_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    ours = {"settings": Settings.parse({"codec-up": "topk:density=0.2"}).decisive(), "members": 3}
    old = {"settings": {"codec-up": "topk:0.2", "server-momentum": 0.9}, "members": 3}
    assert not holds(path, ours)
    assert claim(path, old, "delete it") == old
    assert holds(path, ours)
    assert claim(path, ours, "delete it") == old
    for other in (ours | {"members": 4}, ours | {"settings": {}}, ours | {"tune": {"scaling": [1.0, 2.0]}}):
        with pytest.raises(
            SettingError, match=re.escape(f"{tmp_path} holds results of another configuration; delete it")
        ):
            claim(path, other, "delete it")
    assert holds(path, ours | {"tune": {"codec-up": ["topk:0.2"]}})
