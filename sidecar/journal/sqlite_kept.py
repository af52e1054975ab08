"""A journal in a SQLite file that no sidecar has open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import apsw
from google.protobuf.message import DecodeError

from sidecar.journal import ItemEntries, JournalUnusable, Sealed
from sidecar.journal.keeping import Key, Log
from sidecar.journal.ledger import NUMBER_MAX, verifications
from sidecar.journal.schema import connect, migrate
from sidecar.journal.tables import Tables


class SqliteKept:
    """Implements `Kept`; locked against sidecars until it is closed."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if not create and not path.exists():
            raise JournalUnusable(f"{path} does not exist")
        self._path, self._created = path, not path.exists()
        self._db = connect(path)
        self._tables = Tables(self._db)
        with self._transaction():
            migrate(self._db)
        self._db.pragma("secure_delete", True)  # what is dropped is overwritten

    def log(self) -> Log | None:
        """See `Kept`."""
        with self._readable():
            row = self._db.execute("SELECT log_id, writer, epoch FROM journal").get
            newest = self._tables.newest()
        if row is None or newest is None:
            return None
        log_id, writer, epoch = row
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
        except (apsw.Error, DecodeError) as error:
            raise JournalUnusable(f"{self._path}: {error}") from error


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
