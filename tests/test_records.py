"""The ledger of records: what lands, what stands, what falls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_contest import run, write
from test_significance import PAIRS, ROWS

from atm_fl.errors import SettingError
from atm_fl.experiments import contest, read_study, records
from atm_fl.experiments.records import BEGIN, END, Record, candidates, land, logs, standing, write_table

MEAN = {"value": 0.02, "low": 0.01, "high": 0.03, "p": 0.001}
RECORD = Record(
    "TSV-M",
    "joint",
    "",
    ("mnist", "digits"),
    (0, 1, 2),
    20,
    10.0,
    0.78,
    0.76,
    {"mean": MEAN},
    10**9,
    600,
    {"merge": "tsv-m"},
    "atm-fl compare contest.toml",
    "0" * 40,
    "2026-11-27",
    "2 cores",
)


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(records, "_commit", lambda: "0123456789" * 4)
    path = tmp_path / "docs" / "records.md"
    path.parent.mkdir()
    path.write_text(f"# Records\n\nwords\n\n{BEGIN}\n{END}\n\nmore words\n")
    return path


def landed(monkeypatch: pytest.MonkeyPatch, ledger: Path, record: Record) -> list[str]:
    monkeypatch.setattr(records, "results", lambda _: {"tasks": record.tasks})
    monkeypatch.setattr(records, "overtaken", lambda *_: {})
    monkeypatch.setattr(records, "candidates", lambda *_: [record])
    return land(None, "", ledger)  # type: ignore[arg-type]


def test_a_record_falls_to_fewer_rounds_or_as_many_and_fewer_bytes(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stands() -> list[str]:
        return [record.row for record in standing(logs(ledger)).values()]

    landed(monkeypatch, ledger, RECORD)
    for change, wins in (
        ({"row": "slower", "rounds": 21}, False),
        ({"row": "larger", "bytes": 2 * 10**9}, False),
        ({"row": "equal"}, False),
        ({"row": "leaner", "bytes": 10**8}, True),
        ({"row": "faster", "rounds": 5, "bytes": 10**10}, True),
    ):
        before = stands()
        (line,) = landed(monkeypatch, ledger, replace(RECORD, **change))
        assert ("a record against joint" in line) == wins
        assert stands() == ([change["row"]] if wins else before)
        assert (f"{before[0]} stands against joint" in line) != wins
    text = ledger.read_text()
    assert text.index("| joint | faster | 5 |") < text.index("Fallen:") < text.index("| joint | TSV-M | 20 |")
    assert text.index("Fallen:") < text.index("| joint | leaner | 20 |")
    assert "slower" not in text
    assert text.startswith("# Records\n\nwords\n")
    assert text.endswith("\n\nmore words\n")


@pytest.mark.parametrize(
    "change", [{"reference": "single-task"}, {"model": "one trunk"}, {"tasks": ("mnist", "solar")}]
)
def test_records_of_other_kinds_stand_side_by_side(
    change: dict[str, Any], ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    landed(monkeypatch, ledger, RECORD)
    (line,) = landed(monkeypatch, ledger, replace(RECORD, row="other", rounds=99, **change))
    assert "a record against" in line
    assert {record.row for record in standing(logs(ledger)).values()} == {"TSV-M", "other"}
    assert "Fallen" not in ledger.read_text()


def test_a_record_falls_when_the_row_that_it_beats_is_overtaken(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    landed(monkeypatch, ledger, RECORD)
    landed(monkeypatch, ledger, replace(RECORD, row="other", reference="single"))
    monkeypatch.setattr(records, "overtaken", lambda *_: {"joint": "joint, better rate"})
    monkeypatch.setattr(records, "candidates", lambda *_: [])
    monkeypatch.setattr(records, "results", lambda _: {"tasks": ["mnist"]})
    land(None, "", ledger)  # type: ignore[arg-type]
    assert len(standing(logs(ledger))) == 2
    monkeypatch.setattr(records, "results", lambda _: {"tasks": RECORD.tasks})
    (line,) = land(None, "", ledger)  # type: ignore[arg-type]
    assert line == "TSV-M: falls, for joint, better rate has overtaken joint"
    assert [record.row for record in standing(logs(ledger)).values()] == ["other"]
    text = ledger.read_text()
    assert text.index("| single | other |") < text.index("Fallen:")
    assert text.index("Fallen:") < text.index("| joint; overtaken by joint, better rate | TSV-M |")
    assert land(None, "", ledger) == ["no row of the contest's pairs beats its reference with p < 0.01"]  # type: ignore[arg-type]


def test_a_row_is_overtaken_by_one_that_trains_the_same_entries_in_the_same_way(
    config: dict[str, Any], tmp_path: Path
) -> None:
    rows = """
"joint, other rate" = { kind = "joint", learning-rate = 1e-3 }
"joint, own bias" = { kind = "joint", private = "*bias" }
"single, bias" = { kind = "single", trainable = "*bias" }
"atm, other rate" = { learning-rate = 1e-3 }
"""
    study = read_study(write(tmp_path / "contest.toml", config, ROWS + rows), contest)

    def weak(better: str, worse: str, p: float = 0.001, value: float = 0.02, seeds: tuple[int, ...] = (0, 1)) -> Any:
        tested = {"red": MEAN, "mean": {"value": value, "p": p}}
        pair = {"rows": [better, worse], "seeds": list(seeds), "differences": tested}
        return records.overtaken(study, {"tasks": ["red"], "pairs": [pair]})

    assert weak("joint, other rate", "joint") == {"joint": "joint, other rate"}
    for change in ({"p": 0.01}, {"value": -0.02}, {"seeds": (0,)}):
        assert weak("joint, other rate", "joint", **change) == {}
    for pair in (
        ("joint, own bias", "joint"),
        ("single", "single, bias"),
        ("single", "joint"),
        ("atm", "joint"),
        ("atm, other rate", "atm"),
    ):
        assert weak(*pair) == {}


def test_nothing_has_a_record_against_a_row_that_is_overtaken() -> None:
    pair = {"rows": ["atm", "joint"], "seeds": [0, 1], "differences": {"red": MEAN, "mean": MEAN}}
    rows = [{"name": "atm", "kind": "atm"}, {"name": "joint", "kind": "joint"}]
    outcomes = {"rows": rows, "pairs": [pair], "tasks": ["red"]}
    assert candidates(None, outcomes, {"joint": "joint, better rate"}, "", "") == []  # type: ignore[arg-type]


def test_the_table_is_made_from_the_logs_alone(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    landed(monkeypatch, ledger, RECORD)
    (log,) = (ledger.parent / "records").glob("*.json")
    before = ledger.read_text()
    write_table(ledger)
    assert ledger.read_text() == before
    assert (
        "| joint | TSV-M | 20 | 10 | 78.0 | +2.0 (+1.0 to +3.0) | 0.001 | 1,000 | 600 | 0, 1, 2 | 000000000 |" in before
    )
    log.unlink()
    write_table(ledger)
    assert "None yet." in ledger.read_text()
    log.write_text("{}")
    with pytest.raises(SettingError, match="is no log of a record"):
        write_table(ledger)


def test_a_ledger_without_a_place_for_the_table_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "records.md").write_text("# Records\n")
    for name in ("records.md", "nowhere.md"):
        with pytest.raises(SettingError, match="has no place for records"):
            land(None, "", tmp_path / name)  # type: ignore[arg-type]
    assert not (tmp_path / "records").exists()


def test_only_a_tested_difference_of_a_row_that_exchanges_is_a_record(
    config: dict[str, Any], tmp_path: Path, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "contest.toml", config, ROWS)
    both = PAIRS.replace("]]", '], ["joint", "atm"], ["average", "atm"], ["atm", "single"]]')
    path.write_text(both + path.read_text())
    study = read_study(path, contest)
    run(study)
    of_contest = contest.results(study)
    outcomes = {tuple(pair["rows"]): pair["differences"]["mean"] for pair in of_contest["pairs"]}
    monkeypatch.setattr(records, "ALPHA", 2.0)  # of so few images hardly anything is beyond chance
    made = {(record.row, record.reference): record for record in candidates(study, of_contest, {}, "compare", "c")}
    assert set(made) == {
        rows
        for rows, of_mean in outcomes.items()
        if of_mean["value"] > 0 and rows[0] in ("atm", "average") and rows[1] != "atm"
    }
    assert made
    for (row, reference), record in made.items():
        assert record.mean - record.reference_mean == pytest.approx(outcomes[row, reference]["value"])
        assert record.rounds == (1 if row == "average" else study.epochs)
        assert record.seeds == (0, 1)
        assert record.bytes > 0
    monkeypatch.setattr(records, "ALPHA", 0.0)
    assert candidates(study, of_contest, {}, "compare", "c") == []
    assert land(study, "compare", ledger) == ["no row of the contest's pairs beats its reference with p < 0.01"]


def test_the_repositorys_ledger_is_that_of_its_logs() -> None:
    ledger = Path(__file__).parents[1] / "docs" / "records.md"
    inside = ledger.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert inside == records.table(logs(ledger))
    for record in standing(logs(ledger)).values():
        assert record.differences["mean"]["p"] < 0.01
        assert json.dumps(record.settings)
