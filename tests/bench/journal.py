"""The journal by itself: items made durable, against its database doing the same inserts with nothing around it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import count as counting
from pathlib import Path
from typing import Any

import apsw
import psycopg

from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.model import Admission, Opened, Outcome
from sidecar.journal.postgres import Connection, PostgresStore
from sidecar.journal.postgres import migrate as migrate_postgres
from sidecar.journal.sqlite import SqliteSettings, SqliteStore, connect, migrate
from sidecar.journal.store import Store
from sidecar.journal.writer import Journal
from tests.bench.loop import Round, closed_loop, middle, summary
from tests.bench.table import Table
from tests.postgres import Postgres

REQUESTERS = (1, 64, 256)
PROMPT_TOKENS, NEW_TOKENS = 200, 64
HEADER_BYTES = {"admitted": 139, "completed": 212}
"""As the journal's are here."""


def admission(number: int) -> Admission:
    """One unkeyed item."""
    parameters = types_pb2.ResolvedParameters(temperature=1, top_p=1, repetition_penalty=1, max_new_tokens=NEW_TOKENS)
    digest = sha256(number.to_bytes(8)).digest()
    payload = sequencer_pb2.AdmittedPayload(
        token_ids=range(number % 40_000, number % 40_000 + PROMPT_TOKENS),
        parameters=parameters,
        seed_derived=True,
        request_digest=digest,
        model_digest=digest,
    )
    return Admission((payload,), digest)


def outcome(admitted: types_pb2.EntryHeader) -> Outcome:
    """Its end."""
    output = types_pb2.Output(
        text="x" * 3 * NEW_TOKENS,
        token_ids=range(NEW_TOKENS),
        finish_reason=types_pb2.FINISH_REASON_LENGTH,
        seed=admitted.seed,
        grade=types_pb2.GRADE_EXACT,
    )
    payload = sequencer_pb2.CompletedPayload(output=output, timing=types_pb2.Timing(total_micros=1))
    return Outcome(admitted, types_pb2.ENTRY_KIND_COMPLETED, 1, payload, b"f" * 32)


def open_sqlite(path: Path) -> tuple[Store, Opened]:
    settings = SqliteSettings(reserve_bytes=0)
    return SqliteStore.open(path, writer="bench", version="0", new_log_id="0" * 32, now_millis=0, settings=settings)


def open_postgres(url: str) -> tuple[Store, Opened]:
    return PostgresStore.open(url, writer="bench", version="0", new_log_id="0" * 32, now_millis=0)


async def _ours(backend: Store, requesters: int, seconds: float) -> Round:
    journal, numbers = Journal(backend, now_millis=lambda: time.time_ns() // 10**6), counting()

    async def item() -> None:
        admitted = await journal.append(admission(next(numbers)))
        await journal.append(outcome(admitted.entries[0].header))

    try:
        return await closed_loop(requesters, seconds, item)
    finally:
        await journal.close()


def _bare(folder: Path, requesters: int, seconds: float) -> Round:
    """Transactions like those of a journal whose requesters all wait: one admits an item for each, the next ends them."""
    given = admission(1).items[0].SerializeToString()
    made = outcome(types_pb2.EntryHeader()).payload.SerializeToString()
    index, sequence, taken, began = 0, 0, list[float](), time.perf_counter()
    db = connect(folder / "bare.sqlite")
    db.execute("BEGIN")
    migrate(db)
    db.execute("COMMIT")
    while (sent := time.perf_counter()) < began + seconds:
        items = range(sequence, sequence + requesters)
        first = range(index, index + requesters)
        second = range(index + requesters, index + 2 * requesters)
        with _transaction(db):
            _entries(db, first, b"h" * HEADER_BYTES["admitted"], given)
            db.executemany("INSERT INTO items (sequence, admitted) VALUES (?, ?)", list(zip(items, first, strict=True)))
        with _transaction(db):
            _entries(db, second, b"h" * HEADER_BYTES["completed"], made)
            db.executemany("UPDATE items SET outcome = ? WHERE sequence = ?", list(zip(second, items, strict=True)))
            digests = [sha256(number.to_bytes(8)).digest() for number in items]
            db.executemany(
                "INSERT OR IGNORE INTO twins VALUES (?, ?, ?)",
                [(digest, b"f" * 32, number) for digest, number in zip(digests, second, strict=True)],
            )
        taken += [time.perf_counter() - sent] * requesters
        sequence, index = sequence + requesters, index + 2 * requesters
    db.close()
    return summary(taken, time.perf_counter() - began)


@contextmanager
def _transaction(db: apsw.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    yield
    db.execute("COMMIT")


def _entries(db: apsw.Connection, indexes: range, header: bytes, payload: bytes) -> None:
    db.executemany("INSERT INTO entries VALUES (?, ?, ?)", [(index, header, b"e" * 32) for index in indexes])
    db.executemany("INSERT INTO payloads VALUES (?, ?)", [(index, payload) for index in indexes])


def _bare_postgres(url: str, requesters: int, seconds: float) -> Round:
    """As `_bare`, in one statement a table, with the log's row locked first and updated last."""
    given = admission(1).items[0].SerializeToString()
    made = outcome(types_pb2.EntryHeader()).payload.SerializeToString()
    index, sequence, taken, began = 0, 0, list[float](), time.perf_counter()
    with psycopg.connect(url, autocommit=True) as db:
        migrate_postgres(db)
        db.execute("INSERT INTO log VALUES (true, '', 0, '', 0)")
        while (sent := time.perf_counter()) < began + seconds:
            items = list(range(sequence, sequence + requesters))
            first = list(range(index, index + requesters))
            second = list(range(index + requesters, index + 2 * requesters))
            for indexes, header, payload in ((first, "admitted", given), (second, "completed", made)):
                headers = [b"h" * HEADER_BYTES[header]] * requesters
                with db.pipeline():
                    db.execute("BEGIN")
                    db.execute("SELECT FROM log FOR UPDATE")
                with db.pipeline():
                    _rows(db, "entries", indexes, headers, [b"e" * 32] * requesters)
                    _rows(db, "payloads", indexes, [payload] * requesters)
                    if indexes is first:
                        _rows(db, "items (sequence, admitted, owner)", items, first, ["bench"] * requesters)
                    else:
                        db.execute(ENDED, (items, second))
                        digests = [sha256(number.to_bytes(8)).digest() for number in items]
                        _rows(db, "twins", digests, [b"f" * 32] * requesters, second)
                    db.execute("UPDATE log SET last_index = %s", (indexes[-1],))
                    db.execute("COMMIT")
            taken += [time.perf_counter() - sent] * requesters
            sequence, index = sequence + requesters, index + 2 * requesters
    return summary(taken, time.perf_counter() - began)


def _rows(db: Connection, table: str, *columns: list[Any]) -> None:
    types = ", ".join(f"%b::{TYPES[type(column[0])]}[]" for column in columns)
    db.execute(f"INSERT INTO {table} SELECT * FROM unnest({types})".encode(), columns)


ENDED = "UPDATE items SET outcome = o FROM unnest(%b::bigint[], %b::bigint[]) AS ended (s, o) WHERE sequence = s"
TYPES = {int: "bigint", bytes: "bytea", str: "text"}


async def measure(rounds: int, seconds: float) -> Table:
    """Each, in turn, every time into a new file or schema."""
    seen: dict[tuple[str, int], list[Round]] = {}
    with Postgres() as server:
        for _ in range(rounds):
            for requesters in REQUESTERS:

                def saw(name: str, round_: Round, requesters: int = requesters) -> None:
                    seen.setdefault((name, requesters), []).append(round_)

                with tempfile.TemporaryDirectory(prefix="ostinato-") as name:
                    folder, url = Path(name), server.url(server.schema())
                    saw("the journal in SQLite", await _ours(open_sqlite(folder / "ours.sqlite")[0], requesters, seconds))
                    saw("SQLite alone", _bare(folder, requesters, seconds))
                    saw("the journal in PostgreSQL", await _ours(open_postgres(url)[0], requesters, seconds))
                    saw("PostgreSQL alone", _bare_postgres(server.url(server.schema()), requesters, seconds))
    note = (
        f"An item is an admission with {PROMPT_TOKENS} token ids and, after it, an outcome with {NEW_TOKENS}: two synced "
        "commits. The databases alone insert the same rows from ready bytes, in transactions of as many as there are "
        "requesters; the journal also numbers, digests, chains, serialises, and answers each requester. PostgreSQL runs on the "
        "same cores, behind a unix socket."
    )
    table = Table("Journal", ["", "requesters", "items/s", "p50 ms", "p99 ms"], note)
    for name, requesters in sorted(seen, key=lambda case: case[1]):
        table.rows.append([name, str(requesters), *middle(seen[name, requesters]).cells()])
    return table
