"""One connection to PostgreSQL that is made again when it is lost, and what its errors mean for a journal."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from google.protobuf.message import DecodeError
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ostinato.errors import JournalFull, JournalUnavailable

from sidecar.journal import JournalBroken, JournalUnusable

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
