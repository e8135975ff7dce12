"""The ledger of records: the fewest rounds in which a federated row of a contest beats another row, beyond chance.

docs/records/NAME.json    one log a record, as `land` writes it; it stays when the record falls
docs/records.md           the table of what stands and what has fallen, between two marks, made from the logs alone

A record is of a kind: of which row it beats, on which tasks, with which kind of model. It stands until another of its
kind takes fewer rounds, or as many and fewer bytes, or until the row that it beats is overtaken: a row that exchanges
nothing is beaten, beyond chance, by one that trains the same entries in the same way with better settings. A baseline
is worth what its best tuning is worth.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from atm_fl.errors import SettingError
from atm_fl.experiments.contest import Contest, ContestUnit, best_choice, results
from atm_fl.files import atomic_write
from atm_fl.settings import defaults
from atm_fl.tables import markdown

ALPHA = 0.01
"""The p below which a difference is claimed."""
ALTERNATING = ("atm", "ph-atm")
"""Kinds of rows that no record is against: a record says in how few rounds alternating beats what does not."""
EXCHANGES = (*ALTERNATING, "one-shot")
"""Kinds of rows that can have a record: those that exchange vectors."""
BEGIN, END = "<!-- records: made by atm-fl records -->", "<!-- end of records -->"


@dataclass(frozen=True)
class Record:
    """A row that beats `reference` on the mean test accuracy. Accuracies and differences in 0..1, over all seeds.

    differences: by task, "mean" and "worst normalised task" (value, low, high of the 99 % interval, p). epochs: in all,
    mean over tasks. bytes and seconds: mean over seeds, as the contest's table has them. settings: those of the row
    that are not the defaults. commit: of the checkout that landed it. overtaken: the row that has since overtaken the
    reference, "" if none has.
    """

    row: str
    reference: str
    model: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    rounds: int
    epochs: float
    mean: float
    reference_mean: float
    differences: dict[str, dict[str, float]]
    bytes: int
    seconds: int
    settings: dict[str, Any]
    command: str
    commit: str
    date: str
    machine: str
    overtaken: str = ""

    @property
    def kind(self) -> tuple[str, str, tuple[str, ...]]:
        """What it can fall to another of."""
        return self.reference, self.model, self.tasks

    @property
    def place(self) -> tuple[int, int]:
        """Less is better."""
        return self.rounds, self.bytes


def _claimed(outcomes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those finished `pairs` of a contest whose first row is better: on all tasks, at least two seeds, p < ALPHA."""
    for pair in outcomes["pairs"]:
        of_mean = pair["differences"]["mean"]
        all_tasks = pair["differences"].keys() >= set(outcomes["tasks"])
        if all_tasks and len(pair["seeds"]) >= 2 and of_mean["value"] > 0 and of_mean["p"] < ALPHA:
            yield pair


def overtaken(study: Contest, outcomes: dict[str, Any]) -> dict[str, str]:
    """By their names, rows without exchanges that one of the same kind, `trainable` and `private` beats by better
    settings, and which. outcomes: the contest's `results`."""

    def trained(name: str) -> tuple[str, Any, Any]:
        row = study.row(name=name)
        settings = ContestUnit(study, row, study.seeds[0], best_choice(study, row)).settings()
        return row.kind, settings.trainable, settings.private

    pairs = (pair["rows"] for pair in _claimed(outcomes))
    return {
        worse: better
        for better, worse in pairs
        if study.row(name=better).kind not in EXCHANGES and trained(better) == trained(worse)
    }


def candidates(
    study: Contest, outcomes: dict[str, Any], weak: Mapping[str, str], command: str, commit: str
) -> list[Record]:
    """What of a contest's finished `pairs` is a record by itself. outcomes: its `results`; weak: what is overtaken."""
    rows, usual = {row["name"]: row for row in outcomes["rows"]}, defaults()
    found = []
    for pair in _claimed(outcomes):
        name, reference = pair["rows"]
        row = rows[name]
        if row["kind"] not in EXCHANGES or rows[reference]["kind"] in ALTERNATING or reference in weak:
            continue
        runs = [row["seeds"][str(seed)] for seed in pair["seeds"]]
        others = [rows[reference]["seeds"][str(seed)] for seed in pair["seeds"]]
        declared = study.row(name=name)
        settings = ContestUnit(study, declared, pair["seeds"][0], best_choice(study, declared)).settings()
        exchanges = 1 if row["kind"] == "one-shot" else settings.rounds
        found.append(
            Record(
                name,
                reference,
                row["model"],
                tuple(outcomes["tasks"]),
                tuple(pair["seeds"]),
                exchanges,
                settings.rounds * mean(settings.of_task(task).local_epochs for task in settings.client_tasks),
                mean(mean(run["test"].values()) for run in runs),
                mean(mean(run["test"].values()) for run in others),
                pair["differences"],
                round(mean(run["bytes"] for run in runs)),
                round(mean(run["seconds"] for run in runs)),
                {key: value for key, value in settings.decisive().items() if value != usual[key]},
                command,
                commit,
                outcomes["date"],
                outcomes["machine"],
            )
        )
    return found


def land(study: Contest, command: str, ledger: Path) -> list[str]:
    """Write the logs of what beats the standing records into `ledger`'s folder, and its table anew; what was done, a
    line each.

    ledger: a Markdown file, as docs/records.md, with the marks BEGIN and END. SettingError if it has none, or if the
    code is in no checkout or differs from its commit.
    """
    _split(ledger)
    commit, outcomes = _commit(), results(study)
    weak = overtaken(study, outcomes)
    lines = _fell(ledger, weak, tuple(outcomes["tasks"]))
    known = logs(ledger)
    for record in candidates(study, outcomes, weak, command, commit):
        before = standing(known).get(record.kind)
        if before and before.place <= record.place:
            lines.append(f"{record.row}: {before.row} stands against {record.reference}, with {before.rounds} rounds")
            continue
        slug = re.sub(r"[^a-z0-9]+", "-", f"{record.row} over {record.reference} {record.date}".lower()).strip("-")
        path = ledger.with_suffix("") / f"{slug}.json"
        _write(path, record)
        known.append(record)
        lines.append(f"{record.row}: a record against {record.reference}, {record.rounds} rounds → {path}")
    write_table(ledger)
    return lines or ["no row of the contest's pairs beats its reference with p < 0.01"]


def _fell(ledger: Path, weak: dict[str, str], tasks: tuple[str, ...]) -> list[str]:
    """Write into the logs of records against rows that were overtaken on `tasks` by which; a line each."""
    lines = []
    for path, record in _files(ledger):
        if record.overtaken or record.reference not in weak or record.tasks != tasks:
            continue
        _write(path, replace(record, overtaken=weak[record.reference]))
        lines.append(f"{record.row}: falls, for {weak[record.reference]} has overtaken {record.reference}")
    return lines


def _write(path: Path, record: Record) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")


def logs(ledger: Path) -> list[Record]:
    """All records that have ever landed. SettingError names a file that is none."""
    return [record for _, record in _files(ledger)]


def _files(ledger: Path) -> list[tuple[Path, Record]]:
    records = []
    for path in sorted(ledger.with_suffix("").glob("*.json")):
        try:
            fields = json.loads(path.read_text())
            record = Record(**fields | {name: tuple(fields[name]) for name in ("tasks", "seeds")})
        except (ValueError, TypeError, KeyError) as error:
            raise SettingError(f"{path} is no log of a record ({error}); take it out of the folder") from error
        records.append((path, record))
    return records


def standing(records: list[Record]) -> dict[tuple[str, str, tuple[str, ...]], Record]:
    """By kind, the records that stand; of equal ones the first to land."""
    best: dict[tuple[str, str, tuple[str, ...]], Record] = {}
    for record in sorted(records, key=lambda record: record.date):
        if record.overtaken:
            continue
        if record.kind not in best or record.place < best[record.kind].place:
            best[record.kind] = record
    return best


def write_table(ledger: Path) -> None:
    """Make the ledger's table anew from its logs. SettingError if it has no place for it."""
    before, after = _split(ledger)
    with atomic_write(ledger) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{table(logs(ledger))}\n\n{END}{after}")


def table(records: list[Record]) -> str:
    """What stands, and below what has fallen, in Markdown."""
    best = list(standing(records).values())
    parts = [_rows(best) if best else "None yet."]
    if fallen := [record for record in records if record not in best]:
        parts += ["Fallen:", _rows(fallen)]
    return "\n\n".join(parts)


def _rows(records: list[Record]) -> str:
    headings = ("beats", "method", "rounds", "epochs", "mean", "by", "p", "MB", "seconds", "seeds", "commit", "command")
    return markdown(headings, [_cells(record) for record in sorted(records, key=lambda record: record.reference)])


def _cells(record: Record) -> tuple[str, ...]:
    of_mean: Mapping[str, float] = record.differences["mean"]
    return (
        record.reference
        + (f" ({record.model})" if record.model else "")
        + (f"; overtaken by {record.overtaken}" if record.overtaken else ""),
        record.row,
        str(record.rounds),
        f"{record.epochs:g}",
        f"{100 * record.mean:.1f}",
        f"{100 * of_mean['value']:+.1f} ({100 * of_mean['low']:+.1f} to {100 * of_mean['high']:+.1f})",
        f"{of_mean['p']:.1g}",
        f"{record.bytes / 1e6:,.0f}",
        f"{record.seconds:,}",
        ", ".join(map(str, record.seeds)),
        record.commit[:9],
        f"`{record.command}`",
    )


def _split(ledger: Path) -> tuple[str, str]:
    """What is before and after the ledger's table."""
    try:
        before, rest = ledger.read_text().split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        raise SettingError(f"{ledger} has no place for records: a line {BEGIN} and a line {END}") from error
    return before, after


def _commit() -> str:
    """Of the checkout that this code is in. SettingError if there is none, or files differ from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        commit, changed = (
            git("rev-parse", "HEAD").strip(),
            git("status", "--porcelain", "--untracked-files=no", ":/atm_fl"),
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise SettingError("a record is of a commit: run this in a checkout of atm-fl with git") from error
    if changed:
        raise SettingError(f"a record is of a commit: commit or undo first what has changed:\n{changed.rstrip()}")
    return commit
