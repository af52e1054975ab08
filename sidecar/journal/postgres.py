"""The journal in PostgreSQL: any number of sidecars, one order.

One row holds the last sequence, the last index and the newest hash. Every transaction locks it first, so transactions come
one after the other, and what a writer reads in one is what the log holds. Each leaves a token in its writer's row: when a
connection is lost during COMMIT, the next one waits for that lock and reads whether the token is there.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ostinato.chain import GENESIS
from ostinato.errors import JournalFull, JournalUnavailable, RecordDamaged
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.derived import check_recent, check_unfinished
from sidecar.journal.diagnosis import RESTORE
from sidecar.journal.ledger import SECRET_BYTES, Known, Ledger, Needs, needs
from sidecar.journal.model import (
    Appended,
    CommitUnknown,
    Draft,
    Head,
    JournalBroken,
    JournalUnusable,
    Log,
    Sealed,
    Unfinished,
)
from sidecar.journal.sql import HEADS, KEYED_TWINS, OPENINGS, SCHEMA, Opening, SqlStore, SqlTables, Use, checked_secret
from sidecar.journal.store import COLUMNS, Damaged, Name, Row, StoreSettings, check_entries, sealed_of

Connection = psycopg.Connection[tuple[Any, ...]]
T = TypeVar("T")

BACKOFF_SECONDS, BACKOFF_SECONDS_MAX = 0.1, 2.0
"""The first and the longest pause between attempts to connect; it doubles."""
LOCK_WAITS_PER_LEASE = 4
"""A statement waits for a lock for this part of a lease; then its store looks at the session that holds the lock."""
OPERATOR = "operator"
"""The writer whose entries say what an operator did to a log that may be in use."""
LOCK_WAITS_MAX = 2 * LOCK_WAITS_PER_LEASE
"""Waits for one lock. A stopped session is ended after one lease, and a session at work may need another."""
RENEWALS_PER_LEASE = 4
"""How often a writer renews its lease and looks at the leases of others."""

log = logging.getLogger(__name__)

_PARAMETERS: Mapping[str, str] = {
    "connect_timeout": "5",
    "client_encoding": "UTF8",
    "target_session_attrs": "read-write",  # a standby may lag behind, and takes no entries
    # These find a server that does not answer any more. They do not bound a commit that the server is working on.
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""Defaults for what the URL does not set."""

# A statement may take as long as it needs, and a commit that was acknowledged is durable. A session that is idle within a
# transaction is ended, since it may hold the log's lock, and a wait for that lock is bounded. `transaction_timeout` is off: it
# would end a large transaction that is at work, and not one whose client does not read. Each statement sees what was committed
# before it. Settings that the server does not have are left out; a stricter `synchronous_commit` stays.
_SESSION = """SELECT set_config(name, wanted, false) FROM pg_settings JOIN (VALUES
    ('statement_timeout', '0'), ('lock_timeout', %s), ('transaction_timeout', '0'),
    ('idle_in_transaction_session_timeout', %s), ('default_transaction_isolation', 'read committed'),
    ('synchronous_commit', 'on')) AS ours (name, wanted) USING (name)
  WHERE name <> 'synchronous_commit' OR setting IN ('off', 'local', 'remote_write')"""


UNREADABLE = "the URL cannot be read; special characters in it are percent-encoded"
_HOSTS, _NAME = re.compile(r"[\w.,:-]*|/[^@]*|@[\w./-]*"), re.compile(r"[^@/:?#]*")
LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1|[/@].*|")
"""Hosts on this machine, unix sockets among them; empty: libpq's own socket."""


def _parameters(url: str) -> dict[str, Any]:
    """Those that the URL names. Raises JournalUnusable if it cannot be read, or if its host or name may be a part of a
    password, which messages would show."""
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise JournalUnusable(UNREADABLE) from None
    if not (_HOSTS.fullmatch(str(given.get("host", ""))) and _NAME.fullmatch(str(given.get("dbname", "")))):
        raise JournalUnusable(UNREADABLE)
    return given


def check_verified(url: str) -> None:
    """Raises JournalUnusable for a server on the network whose certificate and name would not be verified. libpq's environment
    counts; a service file counts as the network, without an sslmode."""
    given = _parameters(url)
    ours = {each.keyword.decode(): (each.val or b"").decode() for each in psycopg.pq.Conninfo.get_defaults()}
    ours |= {name: str(value) for name, value in given.items()}
    hosts = (ours.get("hostaddr") or ours.get("host") or "").split(",")
    remote = [host for host in hosts if not LOOPBACK.fullmatch(host)]
    if "service" in given:
        remote, ours["sslmode"] = ["the service"], str(given.get("sslmode", ""))
    if remote and ours.get("sslmode") != "verify-full":
        raise JournalUnusable(
            f"the certificate of {', '.join(remote)} would not be verified: add sslmode=verify-full to the URL, with "
            "sslrootcert=FILE or sslrootcert=system, or allow it with --allow-unverified-database"
        )


class LogLocked(JournalUnavailable):
    """Another session holds a lock that was waited for. Nothing has changed, and the connection can be used."""


class Database:
    """A connection that is made when it is needed, and again when it was lost. Not thread-safe.

    `lease_seconds` bounds how long the session may be idle within a transaction, and a part of it how long a statement waits
    for a lock; 0: no bound. `seconds` is a monotonic clock."""

    def __init__(
        self, url: str, *, name: str, lease_seconds: float = 0.0, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        given, ours = _parameters(url), {**_PARAMETERS, "application_name": f"ostinato {name}"}
        self._parameters = make_conninfo(url, **{name: value for name, value in ours.items() if name not in given})
        self.lease_seconds = lease_seconds
        self._seconds = seconds
        self._connection: Connection | None = None
        self._connected_at = seconds()
        self._backoff_seconds, self._retry_at = BACKOFF_SECONDS, seconds()
        self._failure, self._has_been_connected = "", False

    @property
    def connected_seconds(self) -> float:
        """How long the connection has existed; 0 without one."""
        return self._seconds() - self._connected_at if self._connection is not None else 0.0

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """A connection in autocommit mode. Raises JournalUnavailable (it cannot be made, or was lost: undone, unless a commit
        was sent), LogLocked, JournalFull and RecordDamaged (undone), and JournalBroken."""
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
            if _is_lost(error):
                raise JournalUnavailable(f"the database was lost: {error}") from error
            raise JournalBroken(f"{type(error).__name__}: {error}") from error
        except RecordDamaged:
            self._roll_back(connection)
            raise
        except BaseException:
            self.drop()  # and with it the open transaction
            raise

    def drop(self) -> None:
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
        if self._seconds() < self._retry_at:
            raise JournalUnavailable(self._failure)
        try:
            connection = self._opened()
        except psycopg.Error as error:
            self._retry_at = self._seconds() + self._backoff_seconds
            self._backoff_seconds = min(2 * self._backoff_seconds, BACKOFF_SECONDS_MAX)
            failure, self._failure = self._failure, "the database cannot be reached: " + " ".join(str(error).split())
            if failure != self._failure and self._has_been_connected:  # before that, the caller of `open` reports it
                log.warning(self._failure)
            raise JournalUnavailable(self._failure) from error
        self._backoff_seconds, self._failure = BACKOFF_SECONDS, ""
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


def _is_lost(error: psycopg.Error) -> bool:
    """Whether a new connection may succeed."""
    kinds = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)
    return isinstance(error, kinds) or error.diag.severity_nonlocalized in ("FATAL", "PANIC")


_LOCK = 0x4F535449
"""`OSTI`: the advisory lock of a migration. Sidecars that start at the same time wait for it."""

DIALECT = {
    "int": "bigint",
    "text": "text",
    "name": "bytea",  # a text here cannot hold a zero
    "bytes": "bytea",
    "strict": "",
    "keyed": "",
    "temp": "pg_temp",
    "genesis": "decode(repeat('00', 32), 'hex')",
    "nothing": "''",
    "opened": "position('\\x10011a20'::bytea in substring(header, 1, 14)) > 0",
}
_NEW = """
-- `secret` is 32 random bytes, which no output ever shows: derived seeds, and the tags in `twins`, depend on them.
CREATE TABLE log (
  only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row), log_id text NOT NULL,
  last_index bigint NOT NULL, head_hash bytea NOT NULL, last_sequence bigint NOT NULL, secret bytea
) WITH (fillfactor = 10);

-- `committed` is the token of the writer's newest transaction: it shows whether a commit was durable whose answer was lost.
CREATE TABLE writers (
  name text PRIMARY KEY, epoch bigint NOT NULL, lease_until timestamptz NOT NULL, committed bytea NOT NULL
) WITH (fillfactor = 10);

-- `verified` is the AUDITED entry of kind VERIFY: part of the item's answer.
-- `owner` is the writer that has to finish it; `attempt` rises with each new start of the item.
CREATE TABLE items (
  sequence bigint PRIMARY KEY, admitted bigint NOT NULL, outcome bigint, verified bigint,
  owner text NOT NULL, attempt integer NOT NULL DEFAULT 1
);
CREATE INDEX unfinished ON items (owner, sequence) WHERE outcome IS NULL;
"""
MIGRATIONS: tuple[str, ...] = (HEADS, "ALTER TABLE log ADD COLUMN secret bytea;" + KEYED_TWINS, OPENINGS)
"""The n-th makes version n + 1 of version n. Never edit one that was released."""
_MAINTAINED_FROM = 3
"""The oldest version that commands work with as it is. They never migrate a log, which sidecars may be using."""


def migrate(db: Connection) -> None:
    """Bring a journal, or an empty schema, to the newest version. JournalUnusable: the message says why not."""
    with db.transaction():
        db.execute("SET LOCAL lock_timeout = 0")  # another sidecar's migration may take long
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        version, newest = _known_version(db), len(MIGRATIONS) + 1
        for statements in MIGRATIONS[version - 1 :] if version else (_NEW, SCHEMA):
            db.execute(statements.format(**DIALECT).encode())
        db.execute("UPDATE ostinato SET version = %s", (newest,))


def check(db: Connection) -> None:
    """JournalUnusable: the server may lose what it has acknowledged."""
    for name in ("fsync", "full_page_writes"):
        if _one(db, f"SHOW {name}") != "on":
            raise JournalUnusable(f"the server runs with {name} off: what it acknowledges can be lost")


def _known_version(db: Connection) -> int:
    """Raises JournalUnusable for one that a newer sidecar has made."""
    version, newest = _version(db), len(MIGRATIONS) + 1
    if version > newest:
        raise JournalUnusable(f"the journal has version {version}; this sidecar knows up to {newest}: run a newer one")
    return version


def _version(db: Connection) -> int:
    """0: the schema is empty."""
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


_LOG = "SELECT log_id, last_index, head_hash, last_sequence FROM log"
_LOCK_LOG = "SELECT log_id, last_index, head_hash, last_sequence FROM log FOR UPDATE"
# Ends the session that has locked the log's row and has waited for its client for a whole lease. Its writer's lease has
# expired, since a lease is renewed between transactions only. A session at work is left alone: it may be committing, or waiting
# for a standby.
_END_STOPPED = """SELECT pid, application_name, pg_terminate_backend(pid)
  FROM log JOIN pg_stat_activity ON backend_xid = log.xmax
  WHERE wait_event_type = 'Client' AND state_change < clock_timestamp() - make_interval(secs => %s)"""
_RENEW = """UPDATE writers SET lease_until = clock_timestamp() + make_interval(secs => %s)
  WHERE name = %s AND epoch = %s RETURNING epoch"""
_BEGIN_SESSION = """UPDATE writers SET lease_until = clock_timestamp() + make_interval(secs => %s), committed = %s
  WHERE name = %s AND epoch = %s RETURNING epoch"""
_BEGIN_EPOCH = """INSERT INTO writers AS known VALUES (%s, 1, clock_timestamp() + make_interval(secs => %s), '')
  ON CONFLICT (name) DO UPDATE SET epoch = known.epoch + 1, lease_until = excluded.lease_until, committed = ''
  RETURNING epoch"""
_DEAD = """SELECT FROM writers WHERE name <> %s AND lease_until < clock_timestamp()
  AND EXISTS (SELECT FROM items WHERE owner = writers.name AND outcome IS NULL)"""
_FENCE = """UPDATE writers SET epoch = epoch + 1 WHERE name <> %s AND lease_until < clock_timestamp()
  AND EXISTS (SELECT FROM items WHERE owner = writers.name AND outcome IS NULL) RETURNING name, epoch"""

_TAKE = """WITH taken AS (UPDATE items SET owner = %s, attempt = attempt + 1
    WHERE outcome IS NULL AND owner = ANY(%s) RETURNING sequence, admitted, attempt)
  SELECT sealed.*, attempt FROM taken JOIN sealed ON entry_index = admitted ORDER BY sequence"""
_WRITE_HEAD = "UPDATE log SET last_index = %s, head_hash = %b, last_sequence = %s"
_WRITE_ITEMS = """INSERT INTO items (sequence, admitted, owner)
  SELECT * FROM unnest(?::bigint[], ?::bigint[], ?::text[])"""
_REOPEN = "UPDATE items SET owner = %s, attempt = attempt + 1 WHERE outcome IS NULL AND owner = %s"
_REPAIR_LOG = """UPDATE log SET last_sequence = %s, last_index = entry_index, head_hash = entry_hash
  FROM (SELECT entry_index, entry_hash FROM entries ORDER BY entry_index DESC LIMIT 1) AS newest"""
_REPAIR_WRITER = """INSERT INTO writers VALUES (%s, %s, '-infinity', '')
  ON CONFLICT (name) DO UPDATE SET epoch = greatest(writers.epoch, excluded.epoch)"""
_SCHEMA = """SELECT quote_ident(nspname) FROM pg_class AS c JOIN pg_namespace AS n ON c.relnamespace = n.oid
  WHERE c.oid = 'items'::regclass"""

_PARAMETER = re.compile(r"\?(?:::(\w+)(\[\])?)?")
Encoder = Callable[[Any], object] | None


@cache
def _translated(statement: str) -> tuple[bytes, tuple[Encoder, ...]]:
    """The statement for psycopg, and how each of its parameters is encoded. Arrays travel in binary."""
    encoders: list[Encoder] = []

    def placeholder(parameter: re.Match[str]) -> str:
        kind, array = parameter.groups()
        if kind == "name":
            encoders.append((lambda names: [name.encode() for name in names]) if array else str.encode)
            return f"%b::bytea{array or ''}"
        encoders.append(None)
        return f"%b::{kind}[]" if array else "%s"

    return _PARAMETER.sub(placeholder, statement).encode(), tuple(encoders)


def _encoded(parameters: Sequence[object], encoders: Sequence[Encoder]) -> list[object]:
    return [encode(each) if encode is not None else each for each, encode in zip(parameters, encoders, strict=True)]


def _decoded(cursor: psycopg.Cursor[Row]) -> Iterator[Row]:
    names = [COLUMNS[column.name] is Name for column in cursor.description or ()]
    try:
        for row in cursor:
            yield (
                tuple(value.decode() if name else value for value, name in zip(row, names, strict=True)) if any(names) else row
            )
    except UnicodeDecodeError:
        raise Damaged("a row holds a name that is not UTF-8") from None


@dataclass(frozen=True, slots=True)
class WriterSession:
    """The writer and the epoch of a transaction, and how long other writers wait for it."""

    writer: str
    epoch: int
    lease_seconds: float
    token: bytes = b""
    """Of one transaction."""


class PostgresTables(SqlTables):
    """Adds the rows of `log` and `writers`. Raises psycopg.Error; LockNotAvailable: a lock was not free."""

    dialect = DIALECT

    def __init__(self, db: Connection) -> None:
        self._db = db

    def select(self, statement: str, *parameters: object) -> Iterator[Row]:
        """Sent at once, also in a pipeline; the rows are read later."""
        text, encoders = _translated(statement)
        return _decoded(self._db.execute(text, _encoded(parameters, encoders)))

    def execute(self, statement: str, *parameters: object) -> int:
        text, encoders = _translated(statement)
        return self._db.execute(text, _encoded(parameters, encoders)).rowcount

    def each(self, statement: str, rows: Sequence[Row]) -> None:
        if rows:
            self.execute(statement, *map(list, zip(*rows, strict=True)))

    # ---- transactions: each locks the row of `log` first, so that they come one after the other

    def begin(
        self, session: WriterSession, needs: Needs, now_millis: int, drop_millis: int | None = None
    ) -> tuple[Head, Known]:
        """Begin a transaction: the log is this writer's until its end. JournalBroken: a newer epoch of it has begun."""
        with self._db.pipeline():
            self._db.execute("BEGIN")
            head = self._db.execute(_LOCK_LOG)
            owned = self._db.execute(_BEGIN_SESSION, (session.lease_seconds, session.token, session.writer, session.epoch))
            known = self.look_up(needs, now_millis, drop_millis)
        _check_owned(owned.fetchone())
        return _head(head.fetchone(), session), known()

    def begin_epoch(self, writer: str, lease_seconds: float, new_log_id: str, new_secret: bytes) -> tuple[Head, bytes]:
        """Begin a transaction with the writer's next epoch: its head, and the log's secret. A new journal gets this log id, and
        one without a secret this one."""
        self._db.execute("BEGIN")
        self._db.execute("INSERT INTO log VALUES (true, %s, 0, %b, 0) ON CONFLICT DO NOTHING", (new_log_id, GENESIS))
        head = self._db.execute(_LOCK_LOG).fetchone()
        secret = self._db.execute("UPDATE log SET secret = coalesce(secret, %b) RETURNING secret", (new_secret,)).fetchone()
        row = self._db.execute(_BEGIN_EPOCH, (writer, lease_seconds)).fetchone()
        assert row is not None
        assert secret is not None
        return _head(head, WriterSession(writer, row[0], lease_seconds)), checked_secret(bytes(secret[0]))

    def fence(self, writer: str) -> list[tuple[str, int]]:
        """Begin an epoch of every other writer whose lease has run out over unfinished items: their names and epochs."""
        return sorted(self._db.execute(_FENCE, (writer,)).fetchall())

    def take(self, writer: str, owners: Iterable[str]) -> list[Unfinished]:
        """Make these writers' unfinished items this one's, for another attempt."""
        rows = self._db.execute(_TAKE, (writer, list(owners)))
        return [Unfinished(sealed_of(row[:-1]), row[-1]) for row in rows]

    def commit(self, ledger: Ledger, settings: StoreSettings, now_millis: int) -> None:
        """Write all that the ledger made, drop what the settings do not keep, and end the transaction."""
        head = ledger.head
        with self._db.pipeline():
            self.write(ledger, settings, now_millis)
            if ledger.entries:
                self._db.execute(_WRITE_HEAD, (head.index, head.entry_hash, head.last_sequence))
            self._db.execute("COMMIT")

    def _write_items(self, admitted: Sequence[types_pb2.EntryHeader]) -> None:
        self.each(_WRITE_ITEMS, [(header.sequence, header.index, header.writer) for header in admitted])

    item_columns = (*SqlTables.item_columns, "owner", "attempt")
    items_differ = f"""{SqlTables.items_differ}
      OR (made.outcome IS NULL AND (there.owner <> made.owner OR there.attempt <> made.attempt))"""

    def repair_log(self, epochs: Mapping[str, int], last_sequence: int, lost_sequence: int) -> None:
        self._db.execute(_REPAIR_LOG, (last_sequence,))
        for each in epochs.items():
            self._db.execute(_REPAIR_WRITER, each)

    def reopen(self, opened: Sealed) -> None:
        payload = sequencer_pb2.OpenedPayload.FromString(opened.payload)
        self._db.execute(_REOPEN, (payload.taken_over_by or opened.header.writer, opened.header.writer))

    def shadow_items(self) -> str:
        schema = _one(self._db, _SCHEMA)
        self._db.execute("CREATE TEMP TABLE items (LIKE items INCLUDING ALL)")
        return str(schema)

    # ---- between them

    def log(self) -> Log | None:
        row = self._db.execute(_LOG).fetchone()
        writers: dict[str, int] = dict(self._db.execute("SELECT name, epoch FROM writers ORDER BY name").fetchall())
        return None if row is None else Log(row[0], writers, *row[1:])

    def head(self, session: WriterSession) -> Head:
        return _head(self._db.execute(_LOG).fetchone(), session)

    def committed(self, session: WriterSession) -> bool:
        """Whether the writer's transaction with this token is durable. Waits until its old connection has ended it."""
        with self._db.transaction():
            self._db.execute(_LOCK_LOG)
            row = self._db.execute("SELECT committed FROM writers WHERE name = %s", (session.writer,)).fetchone()
        return row is not None and row[0] == session.token

    def renew(self, session: WriterSession) -> None:
        """Renew the lease. JournalBroken: a newer epoch of this writer has begun."""
        _check_owned(self._db.execute(_RENEW, (session.lease_seconds, session.writer, session.epoch)).fetchone())

    def release(self, session: WriterSession) -> None:
        """End the lease now."""
        self._db.execute(_RENEW, (-1, session.writer, session.epoch))

    def dead(self, writer: str) -> bool:
        """Whether `fence` would find a writer."""
        return bool(self._db.execute(_DEAD, (writer,)).rowcount)

    def end_stopped(self, lease_seconds: float) -> None:
        """End the session that has held the log's lock for a lease while its client did nothing. Its transaction is undone; the
        client finds its connection closed."""
        try:
            ended = self._db.execute(_END_STOPPED, (lease_seconds,)).fetchall()
        except psycopg.errors.InsufficientPrivilege as error:
            log.warning("a stopped session holds the log's lock and cannot be ended", extra={"error": str(error)})
            return
        for pid, name, _ in ended:
            log.warning("a stopped session was ended: it held the log's lock", extra={"pid": pid, "application_name": name})


def _check_owned(row: object) -> None:
    if row is None:
        raise JournalBroken("fenced: a newer epoch of this writer has begun")


def _head(row: Row | None, session: WriterSession) -> Head:
    assert row is not None, "the log has one row"
    log_id, index, entry_hash, last_sequence = row
    return Head(log_id, session.writer, session.epoch, index, entry_hash, last_sequence)


@dataclass(frozen=True, slots=True)
class _InDoubt:
    """A transaction whose COMMIT may have been sent, and was not answered."""

    session: WriterSession
    head: Head
    drafts: Sequence[Draft] = ()
    appended: list[Appended] = field(default_factory=list)
    taken: list[Unfinished] = field(default_factory=list)


class PostgresStore(SqlStore):
    """A journal that other writers may share."""

    name = "the database"
    poll_seconds = 0.05

    def __init__(
        self,
        database: Database,
        settings: StoreSettings,
        *,
        version: str = "",
        seconds: Callable[[], float] = time.monotonic,
        maintenance: bool = False,
    ) -> None:
        self._database, self._settings, self._version, self._seconds = database, settings, version, seconds
        self._maintenance = maintenance
        self._maintain_at = seconds()
        self._in_doubt: _InDoubt | None = None
        self._taken: list[Unfinished] = []

    @classmethod
    def open(
        cls, location: str, opening: Opening, settings: StoreSettings, *, seconds: Callable[[], float] = time.monotonic
    ) -> PostgresStore:
        """As in `SqlStore`. `seconds` is a monotonic clock."""
        database = Database(location, name=opening.writer, lease_seconds=settings.lease_seconds, seconds=seconds)
        store = cls(database, settings, version=opening.version, seconds=seconds)

        def begin() -> None:
            with database.connected() as db:
                check(db)
                migrate(db)
                _check_tables(db)
                store._begin_epoch(PostgresTables(db), opening)

        try:
            with _unusable():
                store._waiting(begin)
        except BaseException:
            database.drop()
            raise
        return store

    @classmethod
    def open_for_maintenance(cls, location: str, use: Use) -> PostgresStore:
        """As in `SqlStore`. Sidecars may use it, so that an existing one is never migrated."""
        store = cls(Database(location, name="maintenance"), StoreSettings(), maintenance=True)
        with _unusable(), store._database.connected() as db:
            if use == "make":
                check(db)
                migrate(db)
            elif db.execute("SELECT to_regclass('ostinato')").fetchone() == (None,):
                raise JournalUnusable("there is no journal in this database")
            elif (version := _known_version(db)) < _MAINTAINED_FROM:
                raise JournalUnusable(
                    f"the journal has version {version}, and commands work with version {_MAINTAINED_FROM} or newer: use the "
                    "program that made it, or copy it and start a sidecar, which migrates it; the older program then refuses it"
                )
        return store

    def _read(self, read: Callable[[PostgresTables], T]) -> T:
        def once() -> T:
            with self._database.connected() as db:
                return read(PostgresTables(db))

        with _unusable() if self._maintenance else nullcontext():
            return self._waiting(lambda: _twice(once))

    def close(self) -> None:
        """End the lease, if the database is there, and close the connection."""
        if not self._maintenance and self._database.connected_seconds:
            with suppress(JournalUnavailable, JournalFull, JournalBroken), self._database.connected() as db:
                PostgresTables(db).release(self._session())
        self._database.drop()

    # ---- for a writer

    @property
    def reserved(self) -> bool:
        return True  # while the server has no room, admissions are refused

    def append_many(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        try:
            return self._waiting(lambda: _twice(lambda: self._resolve(drafts) or self._append(drafts, now_millis)))
        except JournalUnavailable as error:
            if self._in_doubt is not None and self._in_doubt.drafts:
                raise CommitUnknown(error.message) from error
            raise

    def newest(self) -> Head:
        self.head = self._read(lambda tables: tables.head(self._session()))
        return self.head

    def release_reserve(self) -> None:
        pass

    def restore_reserve(self) -> bool:
        with suppress(JournalUnavailable):
            self.newest()
            return True
        return False

    def idle_seconds(self) -> float | None:
        return max(0.0, self._maintain_at - self._seconds())

    def maintain(self, now_millis: int, *, idle: bool) -> Sequence[Unfinished]:
        """Renew the lease, and take over what writers without one have not finished."""
        if self._seconds() >= self._maintain_at:
            self._maintain_at = self._seconds() + self._settings.lease_seconds / RENEWALS_PER_LEASE
            with suppress(JournalFull):
                self._read(lambda tables: tables.renew(self._session()))
                try:
                    self._waiting(lambda: self._take_over(now_millis))
                except RecordDamaged as error:
                    log.error("items of another writer are not taken over: one is damaged", extra={"why": error.message})
        taken, self._taken = self._taken, []
        return taken

    def _begin_epoch(self, tables: PostgresTables, opening: Opening) -> None:
        writer, settings = opening.writer, self._settings
        head, self._secret = tables.begin_epoch(writer, settings.lease_seconds, opening.new_log_id, opening.new_secret)
        ledger = self._first_entries(tables, head, opening)
        unfinished = tables.take(writer, [writer])
        check_unfinished(each.admitted for each in unfinished)
        tables.commit(ledger, settings, opening.now_millis)
        self.head, self.to_recover = ledger.head, unfinished

    def _append(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        session = self._session()
        with self._transaction() as tables:
            drop_millis = now_millis if self._settings.digests_only else None
            with self._damage(drafts):
                head, known = tables.begin(session, needs(drafts, self._secret), self._expiry(now_millis), drop_millis)
            ledger = Ledger(head, known, now_millis, self._secret, self._settings.signer)
            appended = [ledger.append(draft) for draft in drafts]
            self._in_doubt = _InDoubt(session, ledger.head, drafts, appended)
            tables.commit(ledger, self._settings, now_millis)
        return appended

    @contextmanager
    def _transaction(self) -> Iterator[PostgresTables]:
        """The body sets `_in_doubt` before it commits. After JournalUnavailable that transaction is in doubt."""
        try:
            with self._database.connected() as db:
                yield PostgresTables(db)
        except JournalFull:
            self._in_doubt = None
            raise
        assert self._in_doubt is not None, "the body says what it commits"
        self.head, self._in_doubt = self._in_doubt.head, None

    def _resolve(self, drafts: Sequence[Draft] = ()) -> list[Appended]:
        """What the transaction in doubt has appended; nothing if there is none, or it is not durable."""
        if self._in_doubt is None:
            return []
        assert not self._in_doubt.drafts or list(self._in_doubt.drafts) == list(drafts), "what is in doubt goes first"
        with self._database.connected() as db:
            durable = PostgresTables(db).committed(self._in_doubt.session)
        resolved, self._in_doubt = self._in_doubt, None
        if not durable:
            return []
        self.head = resolved.head
        self._taken += resolved.taken
        return resolved.appended

    def _take_over(self, now_millis: int) -> None:
        """Only from writers seen without a lease for as long as one lasts: after an outage of the server all have run out."""
        if self._in_doubt is not None and self._in_doubt.drafts:
            return
        self._resolve()
        watched = self._database.connected_seconds >= self._settings.lease_seconds
        if not watched or not self._read(lambda tables: tables.dead(self.head.writer)):
            return
        session = self._session()
        with self._transaction() as tables:
            head, known = tables.begin(session, needs((), self._secret), now_millis)
            ledger = Ledger(head, known, now_millis, self._secret, self._settings.signer)
            fenced = tables.fence(session.writer)
            for writer, epoch in fenced:
                ledger.fence(writer, epoch, self._version)
            taken = tables.take(session.writer, [writer for writer, _ in fenced])
            check_entries(each.admitted for each in taken)
            self._in_doubt = _InDoubt(session, ledger.head, taken=taken)
            tables.commit(ledger, self._settings, now_millis)
        self._taken += taken

    def _session(self) -> WriterSession:
        return WriterSession(self.head.writer, self.head.epoch, self._settings.lease_seconds, secrets.token_bytes(16))

    def _waiting(self, once: Callable[[], T]) -> T:
        """Wait for locks, and end a stopped session that holds one. LogLocked: a lock was not free in time."""
        for _ in range(LOCK_WAITS_MAX - 1):
            try:
                return once()
            except LogLocked:
                with suppress(JournalUnavailable), self._database.connected() as db:
                    PostgresTables(db).end_stopped(self._database.lease_seconds)
        return once()

    # ---- for maintenance

    def drop(self, sequences: Sequence[int], reason: str, now_millis: int) -> int:
        """As in `SqlStore`, by a writer of its own, since the log may be in use. The server overwrites what was dropped when it
        vacuums."""
        if not sequences:
            return 0
        with _unusable(), self._database.connected() as db:
            tables = PostgresTables(db)
            head, secret = tables.begin_epoch(OPERATOR, 0.0, "", os.urandom(SECRET_BYTES))
            ledger = Ledger(head, Known(), now_millis, secret)
            ledger.open(self._version)
            tables.record_earlier(ledger, head.index)
            ledger.prune(sequences, reason)
            dropped = tables.drop_payloads(sequences)
            tables.commit(ledger, self._settings, now_millis)
            return dropped

    @contextmanager
    def snapshot(self) -> Iterator[SqlTables]:
        """As in `SqlStore`. JournalUnusable also if the connection is lost: later reads would be of another moment."""
        with _unusable(), self._database.connected() as db:
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            yield PostgresTables(db)
            db.execute("ROLLBACK")

    @contextmanager
    def changing(self) -> Iterator[SqlTables]:
        with _unusable(), self._database.connected() as db:
            db.execute("BEGIN")
            db.execute(_LOCK_LOG)
            yield PostgresTables(db)
            db.execute("COMMIT")

    @contextmanager
    def importing(self, log: Log, writer: str, secret: bytes) -> Iterator[SqlTables]:
        """As in `SqlStore`. Every writer keeps what is its own."""
        with _unusable(), self._database.connected() as db:
            db.execute("BEGIN")
            row = (log.log_id, log.index, log.entry_hash, log.last_sequence, secret)
            if not db.execute("INSERT INTO log VALUES (true, %s, %s, %b, %s, %b) ON CONFLICT DO NOTHING", row).rowcount:
                raise JournalUnusable("this journal is not empty any more")
            for each in log.writers.items():
                db.execute("INSERT INTO writers VALUES (%s, %s, '-infinity', '')", each)
            yield PostgresTables(db)
            db.execute("COMMIT")


def _check_tables(db: Connection) -> None:
    """Raises JournalUnusable for tables that are not what the newest entries say. Of one moment: other writers go on."""
    db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    if (log := PostgresTables(db).log()) is not None and log.index:
        check_recent(PostgresTables(db), log)
    db.execute("ROLLBACK")


def _twice(once: Callable[[], T]) -> T:
    """Try again on a new connection: the old one may have broken while it was not in use."""
    try:
        return once()
    except LogLocked:
        raise
    except JournalUnavailable:
        return once()


@contextmanager
def _unusable() -> Iterator[None]:
    """Where a journal is opened or maintained."""
    try:
        yield
    except (JournalUnavailable, JournalFull, JournalBroken) as error:
        raise JournalUnusable(str(error)) from error
    except RecordDamaged as error:
        raise JournalUnusable(f"the journal is damaged: {error.message}: {RESTORE}") from error
