"""The journal by itself, beside its database doing the same inserts: items a second, processor time and bytes an item."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import count as counting
from pathlib import Path
from typing import Any

import apsw
import psycopg

from ostinato.chain import NONCE_BYTES
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.maintenance import prune
from sidecar.journal.model import Admission, Outcome, Sealed
from sidecar.journal.postgres import Connection, PostgresStore
from sidecar.journal.postgres import migrate as migrate_postgres
from sidecar.journal.sql import Opening
from sidecar.journal.sqlite import SqliteStore, connect, migrate
from sidecar.journal.store import Store, StoreSettings
from sidecar.journal.writer import Journal
from tests.bench.table import Options, Round, Table, closed_loop, count, median, middle, summary
from tests.postgres import Postgres

REQUESTERS = (1, 64, 256)
NEW = Opening(writer="bench", version="0", new_log_id="0" * 32, new_secret=bytes(32), now_millis=1)
PROMPT_TOKENS, NEW_TOKENS = 200, 64
HEADER_BYTES = {"admitted": 142, "completed": 250}
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
        nonce=digest[:NONCE_BYTES],
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
    twins = sha256(admitted.sequence.to_bytes(8)).digest()
    timing, nonce = types_pb2.Timing(total_micros=1), twins[:NONCE_BYTES]
    payload = sequencer_pb2.CompletedPayload(output=output, timing=timing, nonce=nonce)
    return Outcome(admitted, types_pb2.ENTRY_KIND_COMPLETED, 1, payload, b"f" * 32, twins)


def open_sqlite(path: Path) -> Store:
    return SqliteStore.open(str(path), NEW, StoreSettings())


def open_postgres(url: str) -> Store:
    return PostgresStore.open(url, NEW, StoreSettings())


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
    index, sequence, taken = 0, 0, list[float]()
    db = connect(folder / "bare.sqlite")
    db.execute("BEGIN")
    migrate(db)
    db.execute("COMMIT")
    began = time.perf_counter()
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
                "INSERT OR IGNORE INTO twins VALUES (?, ?, ?, x'')",
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
    index, sequence, taken = 0, 0, list[float]()
    with psycopg.connect(url, autocommit=True) as db:
        migrate_postgres(db)
        db.execute("INSERT INTO log VALUES (true, '', 0, '', 0)")
        began = time.perf_counter()
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
                        _rows(db, "twins", digests, [b"f" * 32] * requesters, second, [b""] * requesters)
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


async def journal(options: Options) -> list[Table]:
    """Each, in turn, every time into a new file or schema."""
    seen: dict[tuple[str, int], list[Round]] = {}
    with Postgres() as server:
        for _ in range(options.rounds):
            for requesters in REQUESTERS:

                def saw(name: str, round_: Round, requesters: int = requesters) -> None:
                    seen.setdefault((name, requesters), []).append(round_)

                with tempfile.TemporaryDirectory(prefix="ostinato-") as name:
                    folder, url = Path(name), server.url(server.schema())
                    saw(
                        "the journal in SQLite",
                        await _ours(open_sqlite(folder / "ours.sqlite"), requesters, options.seconds),
                    )
                    saw("SQLite alone", _bare(folder, requesters, options.seconds))
                    saw("the journal in PostgreSQL", await _ours(open_postgres(url), requesters, options.seconds))
                    saw("PostgreSQL alone", _bare_postgres(server.url(server.schema()), requesters, options.seconds))
    note = (
        f"An item is an admission with {PROMPT_TOKENS} token ids and, after it, an outcome with {NEW_TOKENS}: two synced "
        "commits. The databases alone insert the same rows from ready bytes, in transactions of as many as there are "
        "requesters; the journal also numbers, digests, chains, serialises, and answers each requester. PostgreSQL runs on the "
        "same cores, behind a unix socket."
    )
    table = Table("Journal", ["", "requesters", "items/s", "p50 ms", "p99 ms"], note)
    for name, requesters in sorted(seen, key=lambda case: case[1]):
        table.rows.append([name, str(requesters), *middle(seen[name, requesters]).cells()])
    return [table]


GROUPS, APPENDED = (1, 64, 256), 5_120
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
    for first in range(0, APPENDED, group):
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
    return watch.seconds / APPENDED


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
        written["twins"] = [(header.input_digest, header.fingerprint_digest, header.index, b"") for header in headers]
    return written


SQLITE = {
    "entries": "INSERT INTO entries VALUES (?, ?, ?)",
    "payloads": "INSERT INTO payloads VALUES (?, ?)",
    "admitted": "INSERT INTO items (sequence, admitted) VALUES (?, ?)",
    "ended": "UPDATE items SET outcome = ? WHERE sequence = ?",
    "twins": "INSERT OR IGNORE INTO twins VALUES (?, ?, ?, ?)",
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
    return watch.seconds / APPENDED


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
    return watch.seconds / APPENDED


def appending(options: Options) -> list[Table]:
    """Each in turn, every time into a new file or schema."""
    seen: dict[tuple[str, int], list[float]] = {}
    with Postgres() as server:
        for _ in range(options.rounds):
            for group in GROUPS:
                written = list[Sequence[Sealed]]()
                with tempfile.TemporaryDirectory(prefix="ostinato-") as name:
                    file = open_sqlite(Path(name) / "ours")
                    shared = open_postgres(server.url(server.schema()))
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
    return [table]


GROWN = 20_000
GROUP = 64
"""Items in a commit: their admissions in one, their outcomes in the next."""


def _keyed(draft: Admission, number: int) -> Admission:
    return Admission(draft.items, draft.request_digest, f"key-{number:032}")


def grown(path: Path, *, keyed: bool, settings: StoreSettings) -> float:
    """Bytes an item, of the file once it is closed. Every item has ended."""
    journal = SqliteStore.open(str(path), NEW, settings)
    empty = path.stat().st_size
    for first in range(0, GROWN, GROUP):
        drafts = [admission(number) for number in range(first, first + GROUP)]
        admitted = journal.append_many([_keyed(d, first + n) if keyed else d for n, d in enumerate(drafts)], 1)
        ended: list[Outcome] = [outcome(answer.entries[0].header) for answer in admitted]
        journal.append_many(ended, 1)
        journal.maintain(1, idle=False)
    journal.close()
    return (path.stat().st_size - empty) / GROWN


def pruned(path: Path) -> float:
    """Bytes an item that are in use after all payloads were dropped; the rest of the file is free to be used again."""
    store = SqliteStore.open_for_maintenance(str(path), "change")
    for _ in prune(store, lambda header: header.kind != types_pb2.ENTRY_KIND_UNSPECIFIED, 1):
        pass
    used = store._tables.bytes_used()
    store.close()
    return used / GROWN


def growth(_: Options) -> list[Table]:
    note = (
        f"{GROWN:,} items that have ended, one in a request, {PROMPT_TOKENS} token ids in and {NEW_TOKENS} out; the file "
        "closed. A keyed item keeps its payloads for --idempotency-ttl-seconds in both settings."
    )
    table = Table("Growth of the journal", ["", "bytes an item"], note)
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder:
        for name, only in (("--payloads full", False), ("--payloads digests", True)):
            settings = StoreSettings(digests_only=only)
            for what, keyed in (("", False), (", with a key", True)):
                path = Path(folder) / f"{only}{keyed}.sqlite"
                table.rows.append([name + what, count(grown(path, keyed=keyed, settings=settings))])
        table.rows.append(["--payloads full, all of it pruned", count(pruned(Path(folder) / "FalseFalse.sqlite"))])
    return [table]
