"""The party's ledger: all that it ever released of its records, on its own disk, and the keys of recent noise."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from atm_fl import vectors
from atm_fl.files import private_folder
from atm_fl.privacy.accounting import Spent
from atm_fl.tasks import Split, cache_dir

SCHEMA = """
CREATE TABLE IF NOT EXISTS releases (
    id INTEGER PRIMARY KEY, source TEXT, version TEXT, run TEXT, client TEXT, round INTEGER, occasion TEXT,
    rate REAL, noise REAL, steps INTEGER, time REAL, key BLOB, vector TEXT
);
CREATE TABLE IF NOT EXISTS records (version TEXT, record BLOB, PRIMARY KEY (version, record)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS versions ON records (record, version);
CREATE INDEX IF NOT EXISTS runs ON releases (run, client);
"""
KEPT_KEYS = 3
"""Rounds of a run whose keys of noise are kept: a lost round can be repeated that long, then its key is deleted."""
CHARGED = """source = :source OR version IN (
    SELECT theirs.version FROM records AS ours JOIN records AS theirs USING (record) WHERE ours.version = :version
)"""


@dataclass(frozen=True)
class Holding:
    """The records that a party tunes on: where they are from, and a hash of each.

    source: a registered task's name or a folder's path: all that was ever released of it is charged, whatever has
    become of its files since. version: of the records; one that shares a record with this one is charged as well.
    """

    source: str
    version: str
    records: frozenset[bytes]

    @classmethod
    def of(cls, source: str, data: Split) -> Holding:
        """Hashes images, not labels; of images in files their names and sizes, so that none is read."""
        if isinstance(data.images, Tensor):
            items: Iterator[bytes] = (image.numpy().tobytes() for image in data.images.cpu())
        else:
            items = (f"{file.parent.name}/{file.name} {file.stat().st_size}".encode() for file in data.images.files)
        records = frozenset(hashlib.sha256(item).digest()[:12] for item in items)
        return cls(source, hashlib.sha256(b"".join(sorted(records))).hexdigest()[:16], records)


@dataclass(frozen=True)
class Entry:
    """One release as it stands in the ledger.

    key: 32 secret bytes, from which its noise is drawn; None if it is deleted. vector: the digest of what was released
    under it; "" as long as nothing was.
    """

    id: int
    key: bytes | None
    vector: str


def ledger_path() -> Path:
    """Where this machine's ledger is."""
    return cache_dir() / "privacy" / "ledger.sqlite"


class Ledger:
    """A SQLite file for its owner's eyes only. What is entered stays; every call is a transaction or part of one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the ledger: nobody else reads or writes it until the end, and an error undoes what was written."""
        private_folder(self.path.parent)
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600))
        with closing(sqlite3.connect(self.path, timeout=600, isolation_level=None)) as file:
            file.execute("BEGIN EXCLUSIVE")
            try:
                for statement in SCHEMA.split(";"):
                    file.execute(statement)
                yield file
            except BaseException:
                file.execute("ROLLBACK")
                raise
            file.execute("COMMIT")

    def history(self, holding: Holding) -> list[Spent]:
        """All that was ever released of the records: by their source, and by each record that was elsewhere too."""
        with self.transaction() as file:
            return read_history(file, holding)

    def seal(self, entry: Entry, vector: Tensor) -> bool:
        """Note what is about to be released under an entry; False if that was something else before."""
        digest = vectors.digest(vector)
        with self.transaction() as file:
            (released,) = file.execute("SELECT vector FROM releases WHERE id = ?", (entry.id,)).fetchone()
            if not released:
                file.execute("UPDATE releases SET vector = ? WHERE id = ?", (digest, entry.id))
        return released in ("", digest)

    def sources(self) -> list[tuple[str, int, int, float, list[Spent]]]:
        """Of each source: (its name, runs, releases, time of the last, all that its latest version has to pay)."""
        with self.transaction() as file:
            rows = file.execute(
                "SELECT source, COUNT(DISTINCT run), COUNT(*), MAX(time), version FROM releases GROUP BY source"
            ).fetchall()
            return [
                (source, runs, count, last, read_history(file, Holding(source, version, frozenset())))
                for source, runs, count, last, version in rows
            ]


def read_history(file: sqlite3.Connection, holding: Holding) -> list[Spent]:
    """`Ledger.history` within a transaction; the holding's records are those entered under its version."""
    _enter_records(file, holding)
    rows = file.execute(
        f"SELECT rate, noise, steps FROM releases WHERE {CHARGED}",
        {"source": holding.source, "version": holding.version},
    )
    return [Spent(*row) for row in rows]


def read_run(file: sqlite3.Connection, run: str, client: str) -> list[Spent]:
    """What one client of one run released."""
    query = "SELECT rate, noise, steps FROM releases WHERE run = ? AND client = ?"
    return [Spent(*row) for row in file.execute(query, (run, client))]


def find(file: sqlite3.Connection, occasion: str) -> Entry | None:
    """The last release on exactly this occasion, if its noise can be drawn again."""
    row = file.execute(
        "SELECT id, key, vector FROM releases WHERE occasion = ? ORDER BY id DESC LIMIT 1", (occasion,)
    ).fetchone()
    return Entry(*row) if row and row[1] is not None else None


def enter(
    file: sqlite3.Connection, holding: Holding, run: str, client: str, number: int, occasion: str, spent: Spent
) -> Entry:
    """Enter a release, with a fresh key of the operating system's; keys of rounds long past are deleted."""
    _enter_records(file, holding)
    key = os.urandom(32)
    cursor = file.execute(
        "INSERT INTO releases VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '')",
        (
            holding.source,
            holding.version,
            run,
            client,
            number,
            occasion,
            spent.rate,
            spent.noise,
            spent.steps,
            time.time(),
            key,
        ),
    )
    file.execute(
        "UPDATE releases SET key = NULL WHERE run = ? AND client = ? AND round <= ?", (run, client, number - KEPT_KEYS)
    )
    assert cursor.lastrowid is not None
    return Entry(cursor.lastrowid, key, "")


def take_over(file: sqlite3.Connection, path: Path, holding: Holding) -> None:
    """Enter what a ledger of atm-fl 0.1 (a JSON file a data set) says was spent; the file is renamed then."""
    for run, rounds in json.loads(path.read_text()).items():
        for occasion, values in rounds.items():
            enter(file, holding, f"{run} of {path.name}", "", 0, occasion, Spent(*values))
    path.rename(path.with_suffix(".json.entered"))


def _enter_records(file: sqlite3.Connection, holding: Holding) -> None:
    if file.execute("SELECT 1 FROM records WHERE version = ? LIMIT 1", (holding.version,)).fetchone() is None:
        rows = ((holding.version, record) for record in holding.records)
        file.executemany("INSERT OR IGNORE INTO records VALUES (?, ?)", rows)
