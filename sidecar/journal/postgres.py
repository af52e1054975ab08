"""The journal in PostgreSQL: any number of sidecars, one order.

One row holds the last sequence, the last index and the newest hash. Every transaction locks it first, so transactions come
one after the other, and what a writer reads in one is what the log holds. Each leaves a token in its writer's row: when a
connection is lost during COMMIT, the next one waits for that lock and reads whether the token is there.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg
from google.protobuf.message import DecodeError
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ostinato.chain import GENESIS, OUTCOMES, entry_hash
from ostinato.errors import JournalFull, JournalUnavailable
from ostinato.v1 import types_pb2

from sidecar.journal.ledger import NUMBER_MAX, Known, Ledger, Needs, needs, verifications
from sidecar.journal.mark import check_mark
from sidecar.journal.model import (
    FINGERPRINTS,
    Appended,
    Binding,
    CommitUnknown,
    Draft,
    Head,
    ItemEntries,
    JournalBroken,
    JournalUnusable,
    Key,
    Log,
    Mark,
    Opened,
    Sealed,
    Unfinished,
)

Connection = psycopg.Connection[tuple[Any, ...]]

BACKOFF_SECONDS, BACKOFF_SECONDS_MAX = 0.1, 2.0
"""Between attempts to connect; doubled from the one to the other."""
LOCK_WAITS_PER_LEASE = 4
"""A statement that has waited for a lock so long is cancelled, to look at the session that holds it."""

log = logging.getLogger(__name__)

_PARAMETERS: Mapping[str, str] = {
    "connect_timeout": "5",
    "client_encoding": "UTF8",
    "target_session_attrs": "read-write",  # a standby shows another order, and takes no entries
    # A server that is gone without a word: never a bound on a commit that it is at work on.
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""Unless the URL has them."""

# A session that may take as long as it needs, and is durable when it says so; but it must not keep the log's lock while it does
# nothing, nor wait for that lock without a look at who holds it. `transaction_timeout` would end a large transaction that is at
# work, and not one whose client does not read. Each statement has to see what was committed before it. What this server does
# not know, or has stricter, stays.
_SESSION = """SELECT set_config(name, wanted, false) FROM pg_settings JOIN (VALUES
    ('statement_timeout', '0'), ('lock_timeout', %s), ('transaction_timeout', '0'),
    ('idle_in_transaction_session_timeout', %s), ('default_transaction_isolation', 'read committed'),
    ('synchronous_commit', 'on')) AS ours (name, wanted) USING (name)
  WHERE name <> 'synchronous_commit' OR setting IN ('off', 'local', 'remote_write')"""


class LogLocked(JournalUnavailable):
    """Another session holds a lock that was waited for. Nothing has changed, and the connection is as it was."""


class Database:
    """Connects when it is needed. Not thread-safe. `seconds` is a monotonic clock. `lease_seconds` bounds how long a session
    may be idle within a transaction and, by its share, how long a statement waits for a lock; 0: nothing does."""

    def __init__(
        self, url: str, *, name: str, lease_seconds: float = 0.0, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        ours = {**_PARAMETERS, "application_name": f"ostinato {name}"}
        try:
            given = conninfo_to_dict(url)
        except psycopg.ProgrammingError:
            raise JournalUnusable("the URL cannot be read; special characters in it are percent-encoded") from None
        self._parameters = make_conninfo(url, **{name: value for name, value in ours.items() if name not in given})
        self.lease_seconds = lease_seconds
        self._seconds = seconds
        self._connection: Connection | None = None
        self._connected_at = seconds()
        self._backoff_seconds, self._retry_at = BACKOFF_SECONDS, seconds()
        self._said, self._has_been_connected = "", False
        self._pinned, self._lost = False, ""

    @property
    def connected_seconds(self) -> float:
        """How long the connection has held; 0 without one."""
        return self._seconds() - self._connected_at if self._connection is not None else 0.0

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """In autocommit mode. Raises JournalUnavailable (not reached, or lost: undone, unless it was a commit), LogLocked
        (undone), JournalFull (undone) and JournalBroken."""
        connection = self._connection or self._connect()
        try:
            yield connection
        except psycopg.errors.DiskFull as error:
            self.drop()
            raise JournalFull(f"the database has no room: {error}") from error
        except psycopg.errors.LockNotAvailable as error:
            self._roll_back(connection)
            raise LogLocked("another session holds the log's lock") from error
        except psycopg.Error as error:
            self.drop()
            if _lost(error):
                self._lost = " ".join(str(error).split())
                raise JournalUnavailable(f"the database was lost: {error}") from error
            raise JournalBroken(f"{type(error).__name__}: {error}") from error
        except BaseException as error:
            self.drop()  # with whatever transaction stands open
            if isinstance(error, DecodeError):
                raise JournalBroken(f"an entry cannot be read: {error}") from error
            raise

    @contextmanager
    def pinned(self) -> Iterator[Connection]:
        """As `connected`, for a transaction of many calls: until the end a connection that is lost is not replaced."""
        with self.connected() as connection:
            self._pinned = True
            try:
                yield connection
            finally:
                self._pinned = False

    def drop(self) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                connection.close()

    def _roll_back(self, connection: Connection) -> None:
        try:
            connection.rollback()
        except psycopg.Error:
            self.drop()

    def _connect(self) -> Connection:
        if self._pinned:
            raise JournalUnavailable(f"the connection was lost within a transaction, which has to begin again: {self._lost}")
        if self._seconds() < self._retry_at:
            raise JournalUnavailable(self._said)
        try:
            connection = self._opened()
        except psycopg.Error as error:
            self._retry_at = self._seconds() + self._backoff_seconds
            self._backoff_seconds = min(2 * self._backoff_seconds, BACKOFF_SECONDS_MAX)
            said, self._said = self._said, "the database cannot be reached: " + " ".join(str(error).split())
            if said != self._said and self._has_been_connected:  # else the journal cannot be opened, and its caller says why
                log.warning(self._said)
            raise JournalUnavailable(self._said) from error
        self._backoff_seconds, self._said = BACKOFF_SECONDS, ""
        self._connection, self._connected_at, self._has_been_connected = connection, self._seconds(), True
        return connection

    def _opened(self) -> Connection:
        connection: Connection = psycopg.connect(self._parameters, autocommit=True)
        try:
            connection.execute(_SESSION, (_millis(self.lease_seconds / LOCK_WAITS_PER_LEASE), _millis(self.lease_seconds)))
        except BaseException:
            connection.close()
            raise
        return connection


def _millis(seconds: float) -> str:
    return str(math.ceil(seconds * 1000))


def _lost(error: psycopg.Error) -> bool:
    """Whether another connection may do better."""
    kinds = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)
    return isinstance(error, kinds) or error.diag.severity_nonlocalized in ("FATAL", "PANIC")


_LOCK = 0x4F535449
"""`OSTI`: of the advisory lock that sidecars which start at once wait for."""

# As in SQLite: the record is `entries` and `payloads`; `items`, `keys` and `twins` say where to look in it. Names that clients
# choose are bytes, since a text here cannot hold a zero.
_FIRST = """
CREATE TABLE log (
  only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row), log_id text NOT NULL,
  last_index bigint NOT NULL, head_hash bytea NOT NULL, last_sequence bigint NOT NULL
) WITH (fillfactor = 10);

-- `committed` is the token of the writer's newest transaction: whether it was durable, if nobody heard.
CREATE TABLE writers (
  name text PRIMARY KEY, epoch bigint NOT NULL, lease_until timestamptz NOT NULL, committed bytea NOT NULL
) WITH (fillfactor = 10);

CREATE TABLE entries (entry_index bigint PRIMARY KEY, header bytea NOT NULL, entry_hash bytea NOT NULL);

-- Apart, so that they can be dropped and the chain stays.
CREATE TABLE payloads (entry_index bigint PRIMARY KEY, payload bytea NOT NULL);

CREATE VIEW sealed AS
  SELECT entries.entry_index, entries.header, coalesce(previous.entry_hash, decode(repeat('00', 32), 'hex')) AS previous_hash,
         entries.entry_hash, coalesce(payloads.payload, '') AS payload
  FROM entries
  LEFT JOIN entries AS previous ON previous.entry_index = entries.entry_index - 1
  LEFT JOIN payloads ON payloads.entry_index = entries.entry_index;

-- `verified` is the AUDITED entry of kind VERIFY: part of the item's answer.
-- `owner` is the writer that has to finish it, `attempt` rises whenever that is begun anew.
CREATE TABLE items (
  sequence bigint PRIMARY KEY, admitted bigint NOT NULL, outcome bigint, verified bigint,
  owner text NOT NULL, attempt integer NOT NULL DEFAULT 1
);
CREATE INDEX unfinished ON items (owner, sequence) WHERE outcome IS NULL;

-- `unfinished` counts the batch's items without an outcome; the last outcome sets the day on which the key may be bound again.
CREATE TABLE keys (
  first_sequence bigint NOT NULL UNIQUE, count integer NOT NULL, request_digest bytea NOT NULL,
  tenant bytea NOT NULL, key bytea NOT NULL, unfinished integer NOT NULL, expires_millis bigint,
  PRIMARY KEY (key, tenant)
);
CREATE INDEX expiring ON keys (expires_millis) WHERE expires_millis IS NOT NULL;

-- The first COMPLETED entry of every input and fingerprint.
CREATE TABLE twins (
  input_digest bytea NOT NULL, fingerprint_digest bytea NOT NULL, entry_index bigint NOT NULL,
  PRIMARY KEY (input_digest, fingerprint_digest)
);

-- Beside the record: what the sidecars remember, by name.
CREATE TABLE notes (name bytea PRIMARY KEY, value bytea NOT NULL);
"""

MIGRATIONS: tuple[str, ...] = (_FIRST,)
"""The n-th makes version n of version n - 1. Never edit one that was released."""


def migrate(db: Connection) -> None:
    """Bring a journal, or an empty schema, to the newest version. JournalUnusable: the message says why not."""
    with db.transaction():
        db.execute("SET LOCAL lock_timeout = 0")  # another one's migration takes as long as it takes
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        version = _version(db)
        if version > len(MIGRATIONS):
            raise JournalUnusable(
                f"the journal has version {version}; this sidecar knows up to {len(MIGRATIONS)}: run a newer one"
            )
        for migration in MIGRATIONS[version:]:
            db.execute(migration)
        db.execute("UPDATE ostinato SET version = %s", (len(MIGRATIONS),))


def check(db: Connection) -> None:
    """JournalUnusable: a server that would forget what it has acknowledged."""
    for name in ("fsync", "full_page_writes"):
        if _one(db, f"SHOW {name}") != "on":
            raise JournalUnusable(f"the server runs with {name} off: what it acknowledges can be lost")


def _version(db: Connection) -> int:
    """0: there is nothing yet."""
    if _one(db, "SELECT to_regclass('ostinato') IS NULL"):
        if _one(db, "SELECT to_regclass('log') IS NOT NULL OR to_regclass('entries') IS NOT NULL"):
            raise JournalUnusable("this schema is not a journal, and has tables of the same names: give it one of its own")
        db.execute("CREATE TABLE ostinato (version integer NOT NULL)")
        db.execute("INSERT INTO ostinato VALUES (0)")
    return int(str(_one(db, "SELECT version FROM ostinato")))


def _one(db: Connection, query: str) -> object:
    row = db.execute(query).fetchone()
    assert row is not None
    return row[0]


_HEAD = "SELECT log_id, last_index, head_hash, last_sequence FROM log"
_LOCK_LOG = "SELECT log_id, last_index, head_hash, last_sequence FROM log FOR UPDATE"
# A session that has locked the log's row and has waited for its client for a whole lease. Its writer's lease is over: one is
# renewed between transactions only. Not a session that is at work: it may be committing, or waiting for a standby.
_END_STOPPED = """SELECT pid, application_name, pg_terminate_backend(pid)
  FROM log JOIN pg_stat_activity ON backend_xid = log.xmax
  WHERE wait_event_type = 'Client' AND state_change < clock_timestamp() - make_interval(secs => %s)"""
_RENEW = """UPDATE writers SET lease_until = clock_timestamp() + make_interval(secs => %s)
  WHERE name = %s AND epoch = %s RETURNING epoch"""
_TURN = """UPDATE writers SET lease_until = clock_timestamp() + make_interval(secs => %s), committed = %s
  WHERE name = %s AND epoch = %s RETURNING epoch"""
_EPOCH = """INSERT INTO writers AS known VALUES (%s, 1, clock_timestamp() + make_interval(secs => %s), '')
  ON CONFLICT (name) DO UPDATE SET epoch = known.epoch + 1, lease_until = excluded.lease_until, committed = ''
  RETURNING epoch"""
_DEAD = """SELECT FROM writers WHERE name <> %s AND lease_until < clock_timestamp()
  AND EXISTS (SELECT FROM items WHERE owner = writers.name AND outcome IS NULL)"""
_FENCE = """UPDATE writers SET epoch = epoch + 1 WHERE name <> %s AND lease_until < clock_timestamp()
  AND EXISTS (SELECT FROM items WHERE owner = writers.name AND outcome IS NULL) RETURNING name, epoch"""

_ENTRIES = "SELECT * FROM sealed WHERE entry_index >= %s ORDER BY entry_index LIMIT %s"
_ENTRIES_BARE = """SELECT entry_index, header, previous_hash, entry_hash, ''::bytea FROM sealed
  WHERE entry_index >= %s ORDER BY entry_index LIMIT %s"""
_ADMITTED = """SELECT sealed.* FROM items JOIN sealed ON entry_index = admitted
  WHERE sequence BETWEEN %s AND %s ORDER BY sequence LIMIT %s"""
_UNFINISHED = """SELECT sealed.* FROM items JOIN sealed ON entry_index = admitted
  WHERE outcome IS NULL AND sequence BETWEEN %s AND %s ORDER BY sequence LIMIT %s"""
_OUTCOMES = "SELECT sealed.* FROM items JOIN sealed ON entry_index = outcome WHERE sequence BETWEEN %s AND %s"
_VERIFIED = "SELECT sealed.* FROM items JOIN sealed ON entry_index = verified WHERE sequence BETWEEN %s AND %s"
_TAKEN = """WITH taken AS (UPDATE items SET owner = %s, attempt = attempt + 1
    WHERE outcome IS NULL AND owner = ANY(%s) RETURNING sequence, admitted, attempt)
  SELECT sealed.*, attempt FROM taken JOIN sealed ON entry_index = admitted ORDER BY sequence"""
_STILL_UNFINISHED = "SELECT sequence FROM items WHERE outcome IS NULL AND sequence = ANY(%s::bigint[])"
_TWINS = "SELECT sealed.* FROM twins JOIN sealed USING (entry_index) WHERE input_digest = ANY(%b::bytea[]) ORDER BY entry_index"
_BINDINGS = """SELECT tenant, key, request_digest, first_sequence, count FROM keys
  WHERE key = ANY(%b::bytea[]) AND (expires_millis IS NULL OR expires_millis > %s)"""

_WRITE_ENTRIES = """WITH made AS (INSERT INTO entries SELECT * FROM unnest(%b::bigint[], %b::bytea[], %b::bytea[]))
  INSERT INTO payloads SELECT * FROM unnest(%b::bigint[], %b::bytea[])"""
_WRITE_ITEMS = "INSERT INTO items (sequence, admitted, owner) SELECT * FROM unnest(%b::bigint[], %b::bigint[], %b::text[])"
_BIND = """INSERT INTO keys SELECT first, n, digest, tenant, key, n
    FROM unnest(%b::bigint[], %b::integer[], %b::bytea[], %b::bytea[], %b::bytea[]) AS bound (first, n, digest, tenant, key)
  ON CONFLICT (key, tenant) DO UPDATE SET first_sequence = excluded.first_sequence, count = excluded.count,
    request_digest = excluded.request_digest, unfinished = excluded.unfinished, expires_millis = NULL"""
_END = """UPDATE items SET outcome = ended.entry_index FROM unnest(%b::bigint[], %b::bigint[]) AS ended (sequence, entry_index)
  WHERE items.sequence = ended.sequence"""
_VERIFY = """UPDATE items SET verified = audited.entry_index
  FROM unnest(%b::bigint[], %b::bigint[]) AS audited (sequence, entry_index) WHERE items.sequence = audited.sequence"""
_END_KEYED = """UPDATE keys SET unfinished = unfinished - n, expires_millis = CASE unfinished WHEN n THEN %s::bigint END
  FROM unnest(%b::bigint[], %b::integer[]) AS ended (first, n) WHERE first_sequence = first"""
_WRITE_TWINS = """INSERT INTO twins SELECT * FROM unnest(%b::bytea[], %b::bytea[], %b::bigint[]) ON CONFLICT DO NOTHING"""
_WRITE_NOTES = """INSERT INTO notes SELECT * FROM unnest(%b::bytea[], %b::bytea[])
  ON CONFLICT (name) DO UPDATE SET value = excluded.value"""
_PURGE = """DELETE FROM keys WHERE first_sequence IN
  (SELECT first_sequence FROM keys WHERE expires_millis <= %s ORDER BY expires_millis LIMIT %s)"""

_DROP_ENDED = """DELETE FROM payloads WHERE entry_index IN (SELECT unnest(ARRAY[admitted, outcome])
  FROM items JOIN unnest(%b::bigint[], %b::bigint[]) AS ended (sequence, first) USING (sequence)
  WHERE NOT EXISTS (SELECT FROM keys WHERE first_sequence = first))"""
_DROP_EXPIRED = """WITH expired AS
    (SELECT first_sequence, count FROM keys WHERE expires_millis <= %s ORDER BY expires_millis LIMIT %s),
  bound AS (UPDATE keys SET expires_millis = NULL FROM expired WHERE keys.first_sequence = expired.first_sequence)
  DELETE FROM payloads WHERE entry_index IN (SELECT unnest(ARRAY[admitted, outcome]) FROM items JOIN expired
    ON sequence BETWEEN expired.first_sequence AND expired.first_sequence + expired.count - 1)"""


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WriterSession:
    """Whose transactions these are, and how long others wait for them."""

    writer: str
    epoch: int
    lease_seconds: float
    token: bytes = b""
    """Of one transaction."""


class PostgresTables:
    """Rows as values, on one connection."""

    def __init__(self, db: Connection) -> None:
        self._db = db

    # ---- transactions: the log's row is locked first, always, so that they come one after the other

    def begin(self, turn: WriterSession, needs: Needs, now_millis: int) -> tuple[Head, Known]:
        """Begin a transaction: the log is this writer's until its end. JournalBroken: a newer epoch of it has begun."""
        with self._db.pipeline():
            self._db.execute("BEGIN")
            head = self._db.execute(_LOCK_LOG)
            owned = self._db.execute(_TURN, (turn.lease_seconds, turn.token, turn.writer, turn.epoch))
            bindings = self._db.execute(_BINDINGS, ([key.encode() for _, key in needs.keys], now_millis))
            unfinished = self._db.execute(_STILL_UNFINISHED, (list(needs.sequences),))
            found = self._db.execute(_TWINS, (list(needs.input_digests),))
        _check_owned(owned.fetchone())
        twins = defaultdict[bytes, tuple[Sealed, ...]](tuple)
        for twin in map(_sealed, found):
            twins[twin.header.input_digest] += (twin,)
        met = {twin.header.fingerprint_digest for earlier in twins.values() for twin in earlier}
        fingerprints = self._fingerprints() if met and len(met | needs.fingerprint_digests) > 1 else {}
        known = Known(_bindings(bindings), frozenset(sequence for (sequence,) in unfinished), twins, fingerprints)
        return _head(head.fetchone(), turn), known

    def _fingerprints(self) -> dict[bytes, Mapping[str, str]]:
        noted = map(types_pb2.Fingerprint.FromString, self.notes(FINGERPRINTS).values())
        return {fingerprint.digest: fingerprint.fields for fingerprint in noted}

    def begin_epoch(self, writer: str, lease_seconds: float, new_log_id: str, genesis: bytes) -> Head:
        """Begin a transaction with the writer's next epoch; a new journal gets this log id."""
        self._db.execute("BEGIN")
        self._db.execute("INSERT INTO log VALUES (true, %s, 0, %b, 0) ON CONFLICT DO NOTHING", (new_log_id, genesis))
        head = self._db.execute(_LOCK_LOG).fetchone()
        row = self._db.execute(_EPOCH, (writer, lease_seconds)).fetchone()
        assert row is not None
        return _head(head, WriterSession(writer, row[0], lease_seconds))

    def fence(self, writer: str) -> list[tuple[str, int]]:
        """Begin an epoch of every other writer whose lease has run out over unfinished items."""
        return sorted(self._db.execute(_FENCE, (writer,)).fetchall())

    def take(self, writer: str, owners: Iterable[str]) -> list[Unfinished]:
        """Make these writers' unfinished items this one's, for another attempt."""
        rows = self._db.execute(_TAKEN, (writer, list(owners)))
        return [Unfinished(_sealed(row), row[-1]) for row in rows]

    def write_entries(self, entries: Sequence[Sealed], verified: Sequence[types_pb2.EntryHeader]) -> None:
        """The record, and what says where to look in it. `verified`: of those of kind VERIFY."""
        headers = [entry.header for entry in entries]
        admitted = [h for h in headers if h.kind == types_pb2.ENTRY_KIND_ADMITTED]
        ended = [h for h in headers if h.kind in OUTCOMES]
        completed = [h for h in ended if h.kind == types_pb2.ENTRY_KIND_COMPLETED]
        indexes, serialised = [h.index for h in headers], [h.SerializeToString(deterministic=True) for h in headers]
        hashes, payloads = [e.entry_hash for e in entries], [e.payload for e in entries]
        self._write(_WRITE_ENTRIES, indexes, serialised, hashes, indexes, payloads)
        self._write(_WRITE_ITEMS, *_columns((h.sequence, h.index, h.writer) for h in admitted))
        self._write(_END, [h.sequence for h in ended], [h.index for h in ended])
        self._write(_VERIFY, [h.sequence for h in verified], [h.index for h in verified])
        self._write(_WRITE_TWINS, *_columns((h.input_digest, h.fingerprint_digest, h.index) for h in completed))

    def write_notes(self, notes: Mapping[str, bytes]) -> None:
        self._write(_WRITE_NOTES, [name.encode() for name in notes], list(notes.values()))

    def commit(self, ledger: Ledger, now_millis: int, key_ttl_millis: int, purge: int, digests_only: bool) -> None:
        """All that the ledger made, less what is not kept, of at most so many expired keys; then end the transaction."""
        ended = [entry.header for entry in ledger.entries if entry.header.kind in OUTCOMES]
        batches = Counter(h.first_sequence for h in ended)
        with self._db.pipeline():
            self.write_entries(ledger.entries, ledger.verified)
            self._write(
                _BIND,
                *_columns(
                    (b.first_sequence, b.count, b.request_digest, a.tenant.encode(), a.key.encode()) for a, b in ledger.bound
                ),
            )
            self._write(_END_KEYED, list(batches), list(batches.values()), first=now_millis + key_ttl_millis)
            self.write_notes(ledger.notes)
            if digests_only:
                self._write(_DROP_ENDED, [h.sequence for h in ended], [h.first_sequence for h in ended])
                self._db.execute(_DROP_EXPIRED, (now_millis, purge))
            elif ledger.bound:
                self._db.execute(_PURGE, (now_millis, purge))
            head = ledger.head
            if ledger.entries:
                self._db.execute(
                    "UPDATE log SET last_index = %s, head_hash = %b, last_sequence = %s",
                    (head.index, head.entry_hash, head.last_sequence),
                )
            self._db.execute("COMMIT")

    def _write(self, query: str, *columns: Sequence[object], first: object = None) -> None:
        """Rows by columns; nothing if there are none."""
        if columns and columns[0]:
            self._db.execute(query, columns if first is None else (first, *columns))

    # ---- between them

    def committed(self, turn: WriterSession) -> bool:
        """Whether the writer's transaction with this token is durable. Waits until its old connection is through with it."""
        with self._db.transaction():
            self._db.execute(_LOCK_LOG)
            row = self._db.execute("SELECT committed FROM writers WHERE name = %s", (turn.writer,)).fetchone()
        return row is not None and row[0] == turn.token

    def renew(self, turn: WriterSession) -> None:
        """Hold the lease. JournalBroken: a newer epoch of this writer has begun."""
        _check_owned(self._db.execute(_RENEW, (turn.lease_seconds, turn.writer, turn.epoch)).fetchone())

    def release(self, turn: WriterSession) -> None:
        """Let the lease end now."""
        self._db.execute(_RENEW, (-1, turn.writer, turn.epoch))

    def end_stopped(self, lease_seconds: float) -> None:
        """End the session that has kept the log's lock for a lease while its client stood still. Its transaction is undone; the
        client finds its connection gone."""
        try:
            ended = self._db.execute(_END_STOPPED, (lease_seconds,)).fetchall()
        except psycopg.errors.InsufficientPrivilege as error:
            _log.warning("a session that stands still has the log's lock and cannot be ended", extra={"error": str(error)})
            return
        for pid, name, _ in ended:
            said = {"pid": pid, "application_name": name}
            _log.warning("a session that stood still was ended: it had the log's lock", extra=said)

    def dead(self, writer: str) -> bool:
        """Whether `fence` would find a writer."""
        return bool(self._db.execute(_DEAD, (writer,)).rowcount)

    def head(self, turn: WriterSession) -> Head:
        return _head(self._db.execute(_HEAD).fetchone(), turn)

    def bindings(self, keys: Iterable[tuple[str, str]], now_millis: int) -> dict[tuple[str, str], Binding]:
        """Those of the keys that are bound and have not expired; maybe the same keys of other tenants too."""
        return _bindings(self._db.execute(_BINDINGS, ([key.encode() for _, key in keys], now_millis)))

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        query = _ENTRIES if payloads else _ENTRIES_BARE
        return [_sealed(row) for row in self._db.execute(query, (min(from_index, NUMBER_MAX), limit))]

    def unfinished(self, first: int, last: int, limit: int) -> list[Sealed]:
        rows = self._db.execute(_UNFINISHED, (min(first, NUMBER_MAX), min(last, NUMBER_MAX), limit))
        return [_sealed(row) for row in rows]

    def items(self, first: int, last: int, limit: int) -> list[ItemEntries]:
        rows = self._db.execute(_ADMITTED, (min(first, NUMBER_MAX), min(last, NUMBER_MAX), limit))
        admitted = [_sealed(row) for row in rows]
        if not admitted:
            return []
        bounds = admitted[0].header.sequence, admitted[-1].header.sequence
        # The verdicts first: what has come in between is then without one, and never a verdict without its outcome.
        verified = {audited.header.sequence: audited for audited in map(_sealed, self._db.execute(_VERIFIED, bounds))}
        ended = {outcome.header.sequence: outcome for outcome in map(_sealed, self._db.execute(_OUTCOMES, bounds))}
        numbers = [(item, item.header.sequence) for item in admitted]
        return [ItemEntries(item, ended.get(number), verified.get(number)) for item, number in numbers]

    def notes(self, prefix: str) -> dict[str, bytes]:
        start = prefix.encode()
        query = "SELECT name, value FROM notes WHERE substring(name FROM 1 FOR %s) = %b ORDER BY name"
        return {name.decode(): value for name, value in self._db.execute(query, (len(start), start))}


def _columns(rows: Iterable[tuple[object, ...]]) -> list[list[object]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _check_owned(row: object) -> None:
    if row is None:
        raise JournalBroken("fenced: a newer epoch of this writer has begun")


def _head(row: tuple[Any, ...] | None, turn: WriterSession) -> Head:
    assert row is not None, "the log has one row"
    log_id, index, entry_hash, last_sequence = row
    return Head(log_id, turn.writer, turn.epoch, index, entry_hash, last_sequence)


def _sealed(row: tuple[Any, ...]) -> Sealed:
    return Sealed(types_pb2.EntryHeader.FromString(row[1]), *row[2:5])


def _bindings(rows: Iterable[tuple[Any, ...]]) -> dict[tuple[str, str], Binding]:
    return {(tenant.decode(), key.decode()): Binding(*rest) for tenant, key, *rest in rows}


T = TypeVar("T")

LOCK_WAITS_MAX = 2 * LOCK_WAITS_PER_LEASE
"""For one lock: a session that stands still is ended after one lease, and what is at work may take another."""


class PostgresReads:
    """Each on the connection that there is, or on a new one. Any may raise JournalUnavailable or JournalBroken."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def binding(self, tenant: str, key: str, now_millis: int) -> Binding | None:
        """What a key stands for, if it is bound and has not expired."""
        return self.read(lambda tables: tables.bindings([(tenant, key)], now_millis)).get((tenant, key))

    def items(self, first: int, last: int, limit: int) -> list[ItemEntries]:
        """Ascending, at most limit, without unknown numbers."""
        return self.read(lambda tables: tables.items(first, last, limit))

    def unfinished(self, first: int, last: int, limit: int) -> list[Sealed]:
        """ADMITTED entries of items without an outcome, as `items`."""
        return self.read(lambda tables: tables.unfinished(first, last, limit))

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        """Consecutive entries, at most limit; empty beyond the head."""
        return self.read(lambda tables: tables.entries(from_index, limit, payloads=payloads))

    def notes(self, prefix: str) -> dict[str, bytes]:
        """Every note whose name begins with it, by name."""
        return self.read(lambda tables: tables.notes(prefix))

    def read(self, read: Callable[[PostgresTables], T]) -> T:
        """Raises JournalUnavailable, JournalBroken."""

        def once() -> T:
            with self._database.connected() as db:
                return read(PostgresTables(db))

        return self.waiting(lambda: twice(once))

    def waiting(self, once: Callable[[], T]) -> T:
        """What may have to wait for a lock, which a sidecar that stands still does not keep. LogLocked: it is kept for long."""
        for _ in range(LOCK_WAITS_MAX - 1):
            try:
                return once()
            except LogLocked:
                with suppress(JournalUnavailable), self._database.connected() as db:
                    PostgresTables(db).end_stopped(self._database.lease_seconds)
        return once()


def twice(once: Callable[[], T]) -> T:
    """On a new connection where the old one broke while it was not in use."""
    try:
        return once()
    except LogLocked:
        raise
    except JournalUnavailable:
        return once()


@contextmanager
def unusable() -> Iterator[None]:
    """Where a journal is opened, not used."""
    try:
        yield
    except (JournalUnavailable, JournalFull, JournalBroken) as error:
        raise JournalUnusable(str(error)) from error


PURGED_KEYS_MAX = 64
"""In one transaction."""
LOOKS_PER_LEASE = 4
"""At one's own lease and at those of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresSettings:
    """For how long a journal holds what."""

    idempotency_ttl_seconds: int = 86_400
    """From the outcome of a batch's last item."""
    lease_seconds: float = 10.0
    """After so long without a sign of life another writer may take over a writer's items."""

    digests_only: bool = False
    """As in SqliteSettings."""

    def __post_init__(self) -> None:
        if self.idempotency_ttl_seconds < 0 or self.lease_seconds <= 0:
            raise ValueError("idempotency_ttl_seconds must not be negative, and lease_seconds must be positive")


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A transaction whose COMMIT may have been sent, and was not answered."""

    turn: WriterSession
    head: Head
    drafts: Sequence[Draft] = ()
    appended: list[Appended] = field(default_factory=list)
    taken: list[Unfinished] = field(default_factory=list)


class PostgresStore(PostgresReads):
    """An open journal. Synchronous and not thread-safe: `grouped` gives it a thread of its own.

    Any method may raise JournalUnavailable (nothing has changed; try later) or JournalBroken (only `close` may be called).
    """

    head: Head
    """After the newest entry that is known here."""
    reserved = True
    """Room is the server's to keep; while it has none, admissions are refused."""
    poll_seconds = 0.05
    """How often to look for what other writers append."""

    def __init__(self, database: Database, settings: PostgresSettings, version: str, seconds: Callable[[], float]) -> None:
        super().__init__(database)
        self._settings, self._version, self._seconds = settings, version, seconds
        self._maintain_at = seconds()
        self._doubt: _Doubt | None = None
        self._taken: list[Unfinished] = []

    @classmethod
    def open(
        cls,
        url: str,
        *,
        writer: str,
        version: str,
        new_log_id: str,
        now_millis: int,
        settings: PostgresSettings | None = None,
        mark: Mark | None = None,
        seconds: Callable[[], float] = time.monotonic,
    ) -> tuple[PostgresStore, Opened]:
        """Open or create, and begin the writer's next epoch. JournalUnusable: the message says why.

        `new_log_id`, 32 hexadecimal digits, names the journal if it is created now. One that does not hold what `mark` says is
        refused, and stays as it was. `seconds` is a monotonic clock.
        """
        assert len(bytes.fromhex(new_log_id)) == 16
        settings = settings or PostgresSettings()
        database = Database(url, name=writer, lease_seconds=settings.lease_seconds, seconds=seconds)
        journal = cls(database, settings, version, seconds)

        def begin() -> list[Unfinished]:
            with database.connected() as db:
                check(db)
                migrate(db)
                return journal._begin_epoch(PostgresTables(db), writer, new_log_id, now_millis, mark)

        try:
            with unusable():
                unfinished = journal.waiting(begin)
        except BaseException:
            database.drop()
            raise
        return journal, Opened(journal.head, tuple(unfinished))

    def _begin_epoch(
        self, tables: PostgresTables, writer: str, new_log_id: str, now_millis: int, mark: Mark | None
    ) -> list[Unfinished]:
        head = tables.begin_epoch(writer, self._settings.lease_seconds, new_log_id, GENESIS)
        newest = [
            (entry.header.index, entry.entry_hash, entry_hash(entry.previous_hash, entry.header))
            for entry in tables.entries(head.index, 2, payloads=False)
        ]
        if newest != ([(head.index, head.entry_hash, head.entry_hash)] if head.index else []):
            raise JournalUnusable(f"the newest entry, {head.index}, is damaged: restore a copy that verifies")
        if mark is not None:
            marked = tables.entries(mark.index, 1, payloads=False)
            check_mark(mark, head.log_id, head.index, head.last_sequence, marked[0].entry_hash if marked else None)
        ledger = Ledger(head, Known(), now_millis)
        ledger.open(self._version)
        unfinished = tables.take(writer, [writer])
        self._write(tables, ledger, now_millis)
        self.head = ledger.head
        return unfinished

    # ---- appending

    def append_many(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        """One transaction: all of them in this order, durable on return, or none. JournalFull: nothing has changed.
        CommitUnknown: append the same drafts again, before any others."""
        try:
            return self.waiting(lambda: twice(lambda: self._resolve(drafts) or self._append(drafts, now_millis)))
        except JournalUnavailable as error:
            if self._doubt is not None and self._doubt.drafts:
                raise CommitUnknown(error.message) from error
            raise

    def _append(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        turn = self._turn()
        with self._transaction() as tables:
            head, known = tables.begin(turn, needs(drafts), self._expiry(now_millis))
            ledger = Ledger(head, known, now_millis)
            appended = [ledger.append(draft) for draft in drafts]
            self._doubt = _Doubt(turn, ledger.head, drafts, appended)
            self._write(tables, ledger, now_millis)
        return appended

    @contextmanager
    def _transaction(self) -> Iterator[PostgresTables]:
        """Whatever the body commits. After JournalUnavailable it is in doubt, unless it had not come to that."""
        try:
            with self._database.connected() as db:
                yield PostgresTables(db)
        except JournalFull:
            self._doubt = None
            raise
        assert self._doubt is not None, "the body says what it commits"
        self.head, self._doubt = self._doubt.head, None

    def _write(self, tables: PostgresTables, ledger: Ledger, now_millis: int) -> None:
        ttl_millis, only = self._settings.idempotency_ttl_seconds * 1000, self._settings.digests_only
        tables.commit(ledger, now_millis, ttl_millis, PURGED_KEYS_MAX, only)

    def _expiry(self, now_millis: int) -> int:
        """Keys that expire up to then are not bound any more."""
        return 0 if self._settings.digests_only else now_millis

    def binding(self, tenant: str, key: str, now_millis: int) -> Binding | None:
        """As in `PostgresReads`."""
        return super().binding(tenant, key, self._expiry(now_millis))

    def _resolve(self, drafts: Sequence[Draft] = ()) -> list[Appended]:
        """What the transaction in doubt has appended; nothing if there is none, or it is not durable."""
        if self._doubt is None:
            return []
        assert not self._doubt.drafts or list(self._doubt.drafts) == list(drafts), "what is in doubt goes first"
        with self._database.connected() as db:
            durable = PostgresTables(db).committed(self._doubt.turn)
        doubt, self._doubt = self._doubt, None
        if not durable:
            return []
        self.head = doubt.head
        self._taken += doubt.taken
        return doubt.appended

    def _turn(self) -> WriterSession:
        return WriterSession(self.head.writer, self.head.epoch, self._settings.lease_seconds, secrets.token_bytes(16))

    def newest(self) -> Head:
        """The head, with what other writers have appended."""
        self.head = self.read(lambda tables: tables.head(self._turn()))
        return self.head

    # ---- upkeep

    def release_reserve(self) -> None:
        """There is none."""

    def restore_reserve(self) -> bool:
        """Whether there is a database to append to."""
        with suppress(JournalUnavailable):
            self.newest()
            return True
        return False

    def idle_seconds(self) -> float | None:
        """When `maintain` has to be called, whether there is work or not."""
        return max(0.0, self._maintain_at - self._seconds())

    def maintain(self, now_millis: int, *, idle: bool) -> Sequence[Unfinished]:
        """Hold the lease, and take over what writers without one have left: those items."""
        if self._seconds() >= self._maintain_at:
            self._maintain_at = self._seconds() + self._settings.lease_seconds / LOOKS_PER_LEASE
            with suppress(JournalFull):
                self.read(lambda tables: tables.renew(self._turn()))
                self.waiting(lambda: self._take_over(now_millis))
        taken, self._taken = self._taken, []
        return taken

    def _take_over(self, now_millis: int) -> None:
        """Only what has been seen without a lease for as long as one lasts: after an outage of the server all have run out."""
        if self._doubt is not None and self._doubt.drafts:
            return
        self._resolve()
        watched = self._database.connected_seconds >= self._settings.lease_seconds
        if not watched or not self.read(lambda tables: tables.dead(self.head.writer)):
            return
        turn = self._turn()
        with self._transaction() as tables:
            head, known = tables.begin(turn, needs(()), now_millis)
            ledger = Ledger(head, known, now_millis)
            fenced = tables.fence(turn.writer)
            for writer, epoch in fenced:
                ledger.fence(writer, epoch, self._version)
            taken = tables.take(turn.writer, [writer for writer, _ in fenced])
            self._doubt = _Doubt(turn, ledger.head, taken=taken)
            self._write(tables, ledger, now_millis)
        self._taken += taken

    def close(self) -> None:
        """End the lease, if the database is there, and let go of it."""
        if self._database.connected_seconds:
            with suppress(JournalUnavailable, JournalFull, JournalBroken), self._database.connected() as db:
                PostgresTables(db).release(self._turn())
        self._database.drop()


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
    def filling(self, log: Log, writer: str) -> Iterator[_Importer]:
        """See `Kept`. Every writer keeps what is its own."""
        with unusable(), self._database.pinned() as db:
            db.execute("BEGIN")
            row = (log.log_id, log.index, log.entry_hash, log.last_sequence)
            if not db.execute(_WRITE_LOG, row).rowcount:
                raise JournalUnusable("this journal is not empty any more")
            for each in log.writers.items():
                db.execute(_WRITE_WRITER, each)
            yield _Importer(db, log)
            db.execute("COMMIT")

    def close(self) -> None:
        """Let go of the database."""
        self._database.drop()


class _Importer:
    """Implements `Importer`."""

    def __init__(self, db: Connection, log: Log) -> None:
        self._db, self._tables, self._log = db, PostgresTables(db), log

    def entries(self, entries: Sequence[Sealed]) -> None:
        """See `Importer`."""
        self._tables.write_entries(entries, verifications(entries))
        # What is unfinished is begun anew by each epoch of its writer.
        admitted = [entry.header for entry in entries if entry.header.kind == types_pb2.ENTRY_KIND_ADMITTED]
        attempts = [1 + self._log.writers.get(header.writer, header.epoch) - header.epoch for header in admitted]
        again = [(header.sequence, attempt) for header, attempt in zip(admitted, attempts, strict=True) if attempt > 1]
        if again:
            self._db.execute(_WRITE_ATTEMPTS, ([sequence for sequence, _ in again], [attempt for _, attempt in again]))

    def keys(self, keys: Sequence[Key]) -> None:
        """See `Importer`."""
        for key in keys:
            last = key.first_sequence + key.count - 1
            bound = key.first_sequence, key.count, key.request_digest, key.tenant.encode(), key.key.encode()
            self._db.execute(_WRITE_KEY, (*bound, key.expires_millis, key.first_sequence, last))

    def notes(self, notes: Mapping[str, bytes]) -> None:
        """See `Importer`."""
        self._tables.write_notes(notes)
