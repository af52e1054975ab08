"""What an item costs the journal's thread, and the bare database: processor time, which a busy machine blurs least."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import apsw
import psycopg

from ostinato.v1 import types_pb2

from sidecar.journal.model import Sealed
from sidecar.journal.postgres import migrate as migrate_postgres
from sidecar.journal.sqlite import connect, migrate
from sidecar.journal.store import Store
from tests.bench.journal import TYPES, admission, open_postgres, open_sqlite, outcome
from tests.bench.table import Table, count, median
from tests.postgres import Postgres

GROUPS, ITEMS = (1, 64, 256), 5_120
"""Items in a commit, and in all."""

Rows = dict[str, list[tuple[object, ...]]]
"""Of one transaction, by table."""


class Watch:
    """Adds up this process's processor time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time()


def appended(journal: Store, group: int, done: Callable[[Sequence[Sealed]], object] = len) -> float:
    """Seconds an item: both of its entries sealed, written and committed. `done`: with each transaction's, not timed."""
    watch = Watch()
    for first in range(0, ITEMS, group):
        admissions = [admission(number) for number in range(first, first + group)]
        with watch:
            answers = journal.append_many(admissions, 1)
        admitted = [answer.entries[0] for answer in answers]
        done(admitted)
        outcomes = [outcome(entry.header) for entry in admitted]
        with watch:
            answers = journal.append_many(outcomes, 1)
        done([answer.entries[0] for answer in answers])
    journal.close()
    return watch.seconds / ITEMS


def rows_of(entries: Sequence[Sealed]) -> Rows:
    """What the journal has written for them: the same bytes."""
    headers = [entry.header for entry in entries]
    written: Rows = {
        "entries": [(e.header.index, e.header.SerializeToString(deterministic=True), e.entry_hash) for e in entries],
        "payloads": [(entry.header.index, entry.payload) for entry in entries],
    }
    if headers[0].kind == types_pb2.ENTRY_KIND_ADMITTED:
        written["admitted"] = [(header.sequence, header.index) for header in headers]
    else:
        written["ended"] = [(header.index, header.sequence) for header in headers]
        written["twins"] = [(header.input_digest, header.fingerprint_digest, header.index) for header in headers]
    return written


SQLITE = {
    "entries": "INSERT INTO entries VALUES (?, ?, ?)",
    "payloads": "INSERT INTO payloads VALUES (?, ?)",
    "admitted": "INSERT INTO items (sequence, admitted) VALUES (?, ?)",
    "ended": "UPDATE items SET outcome = ? WHERE sequence = ?",
    "twins": "INSERT OR IGNORE INTO twins VALUES (?, ?, ?)",
}
POSTGRES = {
    "entries": "INSERT INTO entries SELECT * FROM unnest({})",
    "payloads": "INSERT INTO payloads SELECT * FROM unnest({})",
    "admitted": "INSERT INTO items (sequence, admitted, owner) SELECT s, a, 'bench' FROM unnest({}) AS given (s, a)",
    "ended": "UPDATE items SET outcome = o FROM unnest({}) AS ended (o, s) WHERE sequence = s",
    "twins": "INSERT INTO twins SELECT * FROM unnest({}) ON CONFLICT DO NOTHING",
}


def bare_sqlite(db: apsw.Connection, transactions: Sequence[Rows]) -> float:
    """Seconds an item: these rows, in as many transactions."""
    watch = Watch()
    db.execute("BEGIN")
    migrate(db)
    db.execute("COMMIT")
    for rows in transactions:
        with watch:
            db.execute("BEGIN IMMEDIATE")
            for table, values in rows.items():
                db.executemany(SQLITE[table], values)
            db.execute("COMMIT")
    db.close()
    return watch.seconds / ITEMS


def bare_postgres(url: str, transactions: Sequence[Rows]) -> float:
    """Likewise, by columns, with the log's row locked first and updated last."""
    watch = Watch()
    with psycopg.connect(url, autocommit=True) as db:
        migrate_postgres(db)
        db.execute("INSERT INTO log VALUES (true, '', 0, '', 0)")
        for rows in transactions:
            columns = {table: [list(column) for column in zip(*values, strict=True)] for table, values in rows.items()}
            with watch, db.pipeline():
                db.execute("BEGIN")
                db.execute("SELECT FROM log FOR UPDATE")
                for table, given in columns.items():
                    types = ", ".join(f"%b::{TYPES[type(column[0])]}[]" for column in given)
                    db.execute(POSTGRES[table].format(types).encode(), given)
                db.execute("UPDATE log SET last_index = last_index + 1")
                db.execute("COMMIT")
    return watch.seconds / ITEMS


def measure(rounds: int) -> Table:
    """Each in turn, every time into a new file or schema."""
    seen: dict[tuple[str, int], list[float]] = {}
    with Postgres() as server:
        for _ in range(rounds):
            for group in GROUPS:
                written = list[Sequence[Sealed]]()
                with tempfile.TemporaryDirectory(prefix="ostinato-") as name:
                    file, _ = open_sqlite(Path(name) / "ours")
                    shared, _ = open_postgres(server.url(server.schema()))
                    times = {
                        "the journal in SQLite": appended(file, group, written.append),
                        "SQLite alone": bare_sqlite(connect(Path(name) / "bare"), list(map(rows_of, written))),
                        "the journal in PostgreSQL": appended(shared, group),
                        "PostgreSQL alone": bare_postgres(server.url(server.schema()), list(map(rows_of, written))),
                    }
                for what, seconds in times.items():
                    seen.setdefault((what, group), []).append(seconds)
    note = (
        "Admission and outcome of an item as in the journal's table, one thread, commits included; of PostgreSQL its client's "
        "part only. The databases alone are given the journal's rows ready made: the same bytes, in as many transactions."
    )
    table = Table("Appending, processor time", ["", "items in a commit", "microseconds an item"], note)
    for (what, group), taken in sorted(seen.items(), key=lambda case: case[0][1]):
        table.rows.append([what, str(group), count(1e6 * median(taken))])
    return table
