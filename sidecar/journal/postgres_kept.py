"""A journal in PostgreSQL as its operator sees it, whether sidecars use it or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ostinato.v1 import types_pb2

from sidecar.journal import ItemEntries, JournalUnusable, Sealed
from sidecar.journal.database import Connection, Database
from sidecar.journal.keeping import Key, Log
from sidecar.journal.ledger import verifications
from sidecar.journal.postgres_reads import PostgresReads, unusable
from sidecar.journal.postgres_schema import check, migrate
from sidecar.journal.postgres_tables import PostgresTables

_KEYS = """SELECT tenant, key, request_digest, first_sequence, count, expires_millis FROM keys WHERE first_sequence >= %s
  ORDER BY first_sequence LIMIT %s"""
_DROP = """DELETE FROM payloads WHERE entry_index IN
  (SELECT unnest(ARRAY[admitted, outcome]) FROM items WHERE sequence = ANY(%b::bigint[]))"""
_WRITE_KEY = """INSERT INTO keys SELECT %s, %s, %b, %b, %b, count(*), %s FROM items
  WHERE sequence BETWEEN %s AND %s AND outcome IS NULL"""
# By the primary key: `items` has no index on `admitted`.
_WRITE_ATTEMPTS = """UPDATE items SET attempt = begun.attempt
  FROM unnest(%b::bigint[], %b::integer[]) AS begun (sequence, attempt) WHERE items.sequence = begun.sequence"""
_WRITE_WRITER = "INSERT INTO writers VALUES (%s, %s, '-infinity', '')"
_WRITE_LOG = "INSERT INTO log VALUES (true, %s, %s, %b, %s) ON CONFLICT DO NOTHING"


class PostgresKept:
    """Implements `Kept`."""

    name = "the database"
    """See `Kept`."""

    def __init__(self, url: str, *, create: bool = False) -> None:
        self._database = Database(url, name="keeping")
        self._reads = PostgresReads(self._database)
        with unusable(), self._database.connected() as db:
            if create:
                check(db)
                migrate(db)
            elif db.execute("SELECT to_regclass('ostinato')").fetchone() == (None,):
                raise JournalUnusable("there is no journal in this database")

    def log(self) -> Log | None:
        """See `Kept`."""
        with unusable(), self._database.connected() as db:
            row = db.execute("SELECT log_id, last_index, head_hash, last_sequence FROM log").fetchone()
            writers = dict(db.execute("SELECT name, epoch FROM writers ORDER BY name").fetchall())
        if row is None:
            return None
        log_id, index, entry_hash, last_sequence = row
        return Log(log_id, writers, index, entry_hash, last_sequence)

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        """See `Kept`."""
        with unusable():
            return self._reads.entries(from_index, limit, payloads=payloads)

    def items(self, first: int, last: int, limit: int) -> list[ItemEntries]:
        """See `Kept`."""
        with unusable():
            return self._reads.items(first, last, limit)

    def keys(self, from_sequence: int, limit: int) -> list[Key]:
        """See `Kept`."""
        with unusable(), self._database.connected() as db:
            rows = db.execute(_KEYS, (from_sequence, limit)).fetchall()
        return [Key(tenant.decode(), key.decode(), *rest) for tenant, key, *rest in rows]

    def notes(self, prefix: str) -> dict[str, bytes]:
        """See `Kept`."""
        with unusable():
            return self._reads.notes(prefix)

    def structure(self) -> str:
        """See `Kept`: what a server stores is its own to check."""
        return ""

    def drop(self, sequences: Sequence[int]) -> int:
        """See `Kept`. The server overwrites what was dropped when it vacuums."""
        with unusable(), self._database.connected() as db:
            return db.execute(_DROP, (list(sequences),)).rowcount

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """See `Kept`. JournalUnusable also if the connection is lost: what comes after would be of another moment."""
        with unusable(), self._database.pinned() as db:
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield
            db.execute("COMMIT")

    @contextmanager
    def filling(self, log: Log, writer: str) -> Iterator[_Filler]:
        """See `Kept`. Every writer keeps what is its own."""
        with unusable(), self._database.pinned() as db:
            db.execute("BEGIN")
            row = (log.log_id, log.index, log.entry_hash, log.last_sequence)
            if not db.execute(_WRITE_LOG, row).rowcount:
                raise JournalUnusable("this journal is not empty any more")
            for each in log.writers.items():
                db.execute(_WRITE_WRITER, each)
            yield _Filler(db, log)
            db.execute("COMMIT")

    def close(self) -> None:
        """Let go of the database."""
        self._database.drop()


class _Filler:
    """Implements `Filler`."""

    def __init__(self, db: Connection, log: Log) -> None:
        self._db, self._tables, self._log = db, PostgresTables(db), log

    def entries(self, entries: Sequence[Sealed]) -> None:
        """See `Filler`."""
        self._tables.write_entries(entries, verifications(entries))
        # What is unfinished is begun anew by each epoch of its writer.
        admitted = [entry.header for entry in entries if entry.header.kind == types_pb2.ENTRY_KIND_ADMITTED]
        attempts = [1 + self._log.writers.get(header.writer, header.epoch) - header.epoch for header in admitted]
        again = [(header.sequence, attempt) for header, attempt in zip(admitted, attempts, strict=True) if attempt > 1]
        if again:
            self._db.execute(_WRITE_ATTEMPTS, ([sequence for sequence, _ in again], [attempt for _, attempt in again]))

    def keys(self, keys: Sequence[Key]) -> None:
        """See `Filler`."""
        for key in keys:
            last = key.first_sequence + key.count - 1
            bound = key.first_sequence, key.count, key.request_digest, key.tenant.encode(), key.key.encode()
            self._db.execute(_WRITE_KEY, (*bound, key.expires_millis, key.first_sequence, last))

    def notes(self, notes: Mapping[str, bytes]) -> None:
        """See `Filler`."""
        self._tables.write_notes(notes)
