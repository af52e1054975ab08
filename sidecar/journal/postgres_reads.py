"""What is read from a journal in PostgreSQL, by whoever holds a connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from ostinato.errors import JournalFull, JournalUnavailable

from sidecar.journal import Binding, ItemEntries, JournalBroken, JournalUnusable, Sealed
from sidecar.journal.database import LOCK_WAITS_PER_LEASE, Database, LogLocked
from sidecar.journal.postgres_tables import PostgresTables

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
