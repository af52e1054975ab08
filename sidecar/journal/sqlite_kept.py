"""A journal in a SQLite file that no sidecar has open."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sidecar.journal import ItemEntries, JournalUnusable, Sealed
from sidecar.journal.diagnosis import reason
from sidecar.journal.keeping import Key, Log
from sidecar.journal.ledger import NUMBER_MAX, verifications
from sidecar.journal.schema import connect, migrate
from sidecar.journal.tables import UNREADABLE, Damaged, Tables


class SqliteKept:
    """Implements `Kept`; locked against sidecars until it is closed."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._path, self._created = path, create and not os.path.lexists(path)
        self._db = connect(path, create=create)
        self._tables = Tables(self._db)
        try:
            with self._transaction():
                migrate(self._db)
            if not create and self.log() is None:
                raise JournalUnusable(f"{path} has no entries: name the journal's file")
            with self._readable():
                self._db.pragma("secure_delete", True)  # what is dropped is overwritten
        except BaseException:
            self._db.close()
            raise

    @property
    def name(self) -> str:
        """See `Kept`."""
        return str(self._path)

    def log(self) -> Log | None:
        """See `Kept`."""
        with self._readable():
            owner, newest = self._tables.owner(), self._tables.newest()
            if owner is None or newest is None:
                return None
            log_id, writer, epoch = owner
            if newest.header.log_id != log_id:
                raise Damaged(f"table journal names log {log_id!r}, and entry {newest.header.index} another")
            return Log(log_id, {writer: epoch}, newest.header.index, newest.entry_hash, self._tables.last_sequence())

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        """See `Kept`."""
        with self._readable():
            return self._tables.entries(from_index, limit, payloads=payloads)

    def items(self, first: int, last: int, limit: int) -> list[ItemEntries]:
        """See `Kept`."""
        with self._readable():
            return self._tables.items(first, min(last, NUMBER_MAX), limit) if first <= NUMBER_MAX else []

    def keys(self, from_sequence: int, limit: int) -> list[Key]:
        """See `Kept`."""
        with self._readable():
            return [Key(*row) for row in self._tables.keys(from_sequence, limit)]

    def notes(self, prefix: str) -> dict[str, bytes]:
        """See `Kept`."""
        with self._readable():
            return self._tables.notes(prefix)

    def drop(self, sequences: Sequence[int]) -> int:
        """See `Kept`."""
        before = self._db.total_changes()
        with self._transaction():
            self._tables.drop_payloads((sequence, sequence) for sequence in sequences)
        return self._db.total_changes() - before

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """See `Kept`: nobody else has the file."""
        yield

    @contextmanager
    def filling(self, log: Log, writer: str) -> Iterator[_Filler]:
        """See `Kept`."""
        with self._transaction():
            self._db.execute("INSERT INTO journal VALUES (1, ?, ?, ?, 0)", (log.log_id, writer, log.writers.get(writer, 0)))
            yield _Filler(self._tables)
        self._created = False

    def structure(self) -> str:
        """See `Kept`."""
        with self._readable():
            return self._tables.structure(whole=True)

    def bytes_used(self) -> int:
        """Of the file, less what is free to be used again."""
        with self._readable():
            return self._tables.pages_used() * int(self._db.pragma("page_size"))

    def close(self) -> None:
        """Unlock the file; without what was dropped, also in the write-ahead log. One that was made for nothing is removed."""
        empty = self._created and self.log() is None
        self._db.close()
        if empty:
            self._path.unlink()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._readable(), self._db:
            yield

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            raise JournalUnusable(reason(self._path, error)) from error


class _Filler:
    """Implements `Filler`."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def entries(self, entries: Sequence[Sealed]) -> None:
        """See `Filler`."""
        self._tables.write_entries(entries, verifications(entries))

    def keys(self, keys: Sequence[Key]) -> None:
        """See `Filler`."""
        self._tables.write_keys(
            (key.first_sequence, key.count, key.request_digest, key.tenant, key.key, key.expires_millis) for key in keys
        )

    def notes(self, notes: Mapping[str, bytes]) -> None:
        """See `Filler`."""
        self._tables.write_notes(notes)
