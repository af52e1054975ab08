"""One connection to PostgreSQL that is made again when it is lost, and what its errors mean for a journal."""

from __future__ import annotations

import logging
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

# A session that may take as long as it needs, and is durable when it says so; but it must not sit on the log's lock. Each
# statement has to see what was committed before it. What this server does not know, or has stricter, stays.
_SESSION = """SELECT set_config(name, wanted, false) FROM pg_settings JOIN (VALUES
    ('statement_timeout', '0'), ('lock_timeout', '0'), ('transaction_timeout', '0'),
    ('idle_in_transaction_session_timeout', %s), ('default_transaction_isolation', 'read committed'),
    ('synchronous_commit', 'on')) AS ours (name, wanted) USING (name)
  WHERE name <> 'synchronous_commit' OR setting IN ('off', 'local', 'remote_write')"""


class Database:
    """Connects when it is needed. Not thread-safe. `seconds` is a monotonic clock."""

    def __init__(
        self, url: str, *, name: str, idle_transaction_seconds: float, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        ours = {**_PARAMETERS, "application_name": f"ostinato {name}"}
        try:
            given = conninfo_to_dict(url)
        except psycopg.ProgrammingError:
            raise JournalUnusable("the URL cannot be read; special characters in it are percent-encoded") from None
        self._parameters = make_conninfo(url, **{name: value for name, value in ours.items() if name not in given})
        self._idle_millis = str(round(idle_transaction_seconds * 1000))
        self._seconds = seconds
        self._connection: Connection | None = None
        self._connected_at = seconds()
        self._backoff_seconds, self._retry_at = BACKOFF_SECONDS, seconds()
        self._said = ""

    @property
    def connected_seconds(self) -> float:
        """How long the connection has held; 0 without one."""
        return self._seconds() - self._connected_at if self._connection is not None else 0.0

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """In autocommit mode. Raises JournalUnavailable (not reached, or lost: undone, unless it was a commit), JournalFull
        (undone) and JournalBroken."""
        connection = self._connection or self._connect()
        try:
            yield connection
        except psycopg.errors.DiskFull as error:
            self.drop()
            raise JournalFull(f"the database has no room: {error}") from error
        except psycopg.Error as error:
            self.drop()
            if _lost(error):
                raise JournalUnavailable(f"the database was lost: {error}") from error
            raise JournalBroken(f"{type(error).__name__}: {error}") from error
        except BaseException as error:
            self.drop()  # with whatever transaction stands open
            if isinstance(error, DecodeError):
                raise JournalBroken(f"an entry cannot be read: {error}") from error
            raise

    def drop(self) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                connection.close()

    def _connect(self) -> Connection:
        if self._seconds() < self._retry_at:
            raise JournalUnavailable(self._said)
        try:
            connection: Connection = psycopg.connect(self._parameters, autocommit=True)
            connection.execute(_SESSION, (self._idle_millis,))
        except psycopg.Error as error:
            self._retry_at = self._seconds() + self._backoff_seconds
            self._backoff_seconds = min(2 * self._backoff_seconds, BACKOFF_SECONDS_MAX)
            said, self._said = self._said, "the database cannot be reached: " + " ".join(str(error).split())
            if said != self._said:
                log.warning(self._said)
            raise JournalUnavailable(self._said) from error
        self._backoff_seconds, self._said = BACKOFF_SECONDS, ""
        self._connection, self._connected_at = connection, self._seconds()
        return connection


def _lost(error: psycopg.Error) -> bool:
    """Whether another connection may do better."""
    kinds = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)
    return isinstance(error, kinds) or error.diag.severity_nonlocalized in ("FATAL", "PANIC")
