"""The journal in one SQLite file: one sidecar, one connection, one transaction for a group of drafts.

Write-ahead log, synced at every commit; the file is locked for as long as it is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import apsw

from ostinato.chain import GENESIS, entry_hash, payload_digest
from ostinato.errors import JournalFull
from ostinato.v1 import types_pb2

from sidecar.journal import (
    Appended,
    Binding,
    Draft,
    Head,
    ItemEntries,
    JournalBroken,
    JournalUnusable,
    Mark,
    Opened,
    Outcome,
    Sealed,
    Unfinished,
)
from sidecar.journal.diagnosis import RESTORE, reason
from sidecar.journal.known import Known, needs
from sidecar.journal.ledger import Ledger
from sidecar.journal.mark import check_mark
from sidecar.journal.reserve import Reserve
from sidecar.journal.schema import connect, migrate
from sidecar.journal.settings import SqliteSettings
from sidecar.journal.tables import UNREADABLE, Tables
from sidecar.journal.verify import PAGE

CHECKPOINT_PAGES = 1_000
"""From here on the write-ahead log is copied into the file when nothing else waits."""
CHECKPOINT_PAGES_MAX = 16_000
"""From here on, whatever waits."""
PURGED_KEYS_MAX = 64
"""In one transaction."""
CHECKED_ENTRIES = 4_096
"""Of the newest ones the hashes are checked at every start: what it reads, and what it goes on from, is what was written."""


class SqliteJournal:
    """An open journal. Synchronous and not thread-safe: `grouped` gives it a thread of its own.

    Any method may raise JournalBroken; after that only `close` may be called.
    """

    head: Head
    """After the newest entry that is known here."""
    poll_seconds = None
    """How often to look for what other writers append; None: there are none."""

    def __init__(self, db: apsw.Connection, reserve: Reserve, settings: SqliteSettings) -> None:
        self._db, self._tables, self._reserve, self._settings = db, Tables(db), reserve, settings
        self._page_bytes = int(db.pragma("page_size"))
        self._wal_pages = 0
        db.set_wal_hook(self._committed)
        if settings.journal_bytes_max:
            db.pragma("max_page_count", settings.journal_bytes_max // self._page_bytes)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        writer: str,
        version: str,
        new_log_id: str,
        now_millis: int,
        settings: SqliteSettings | None = None,
        mark: Mark | None = None,
        vfs: str | None = None,
    ) -> tuple[SqliteJournal, Opened]:
        """Open or create, and begin the writer's next epoch. JournalUnusable: the message says why.

        `new_log_id`, 32 hexadecimal digits, names the journal if it is created now. A journal that is damaged, or does not hold
        what `mark` says, is refused, and stays as it was. `vfs` names SQLite's file layer.
        """
        assert len(bytes.fromhex(new_log_id)) == 16
        settings = settings or SqliteSettings()
        db = connect(path, vfs)
        try:
            journal = cls(db, Reserve(path.with_name(path.name + ".reserve"), settings.reserve_bytes), settings)
            left = journal._begin(writer, version, new_log_id, now_millis, mark)
            journal.restore_reserve()
            return journal, Opened(journal.head, left)
        except JournalUnusable as error:
            db.close()
            raise JournalUnusable(f"{path}: {error}") from error
        except (apsw.Error, OSError, JournalBroken, JournalFull) as error:
            db.close()
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise JournalUnusable(reason(path, cause, bytes_max=settings.journal_bytes_max)) from error
        except BaseException:
            db.close()
            raise

    @property
    def reserved(self) -> bool:
        """Whether room is held back for outcomes; without it admissions are refused."""
        return self._reserve.held

    def append_many(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        """One transaction: all of them in this order, durable on return, or none. JournalFull: nothing has changed."""
        with self._transaction():
            if self._tables.epoch() != self.head.epoch:
                raise JournalBroken("fenced: a newer epoch of this writer has begun")
            ledger = Ledger(self.head, self._tables.known(needs(drafts), self._expiry(now_millis)), now_millis)
            appended = [ledger.append(draft) for draft in drafts]
            self._write(ledger)
            self._purge(ledger, now_millis)
            if not all(isinstance(draft, Outcome) for draft in drafts) and not (self.reserved and self._room()):
                raise JournalFull("no room for new work in the journal")
        self.head = ledger.head
        return appended

    def binding(self, tenant: str, key: str, now_millis: int) -> Binding | None:
        """What a key stands for, if it is bound and has not expired."""
        with _sqlite():
            return self._tables.bindings(frozenset({(tenant, key)}), self._expiry(now_millis)).get((tenant, key))

    def items(self, first: int, last: int, limit: int) -> list[ItemEntries]:
        """Ascending, at most limit, without unknown numbers."""
        with _sqlite():
            return self._tables.items(first, last, limit)

    def unfinished(self, first: int, last: int, limit: int) -> list[Sealed]:
        """ADMITTED entries of items without an outcome, as `items`."""
        with _sqlite():
            return self._tables.unfinished(first, last, limit)

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        """Consecutive entries, at most limit; empty beyond the head."""
        with _sqlite():
            return self._tables.entries(from_index, limit, payloads=payloads)

    def notes(self, prefix: str) -> dict[str, bytes]:
        """Every note whose name begins with it, by name."""
        with _sqlite():
            return self._tables.notes(prefix)

    def release_reserve(self) -> None:
        """Let outcomes have the room that was held back; admissions are refused until it is restored."""
        self._reserve.release()

    def restore_reserve(self) -> bool:
        """Hold room back again. False: there is not enough yet."""
        with _sqlite():
            return self._room() and self._reserve.take()

    def newest(self) -> Head:
        """The head, with what other writers have appended."""
        return self.head

    def idle_seconds(self) -> float | None:
        """When `maintain` has to be called, whether there is work or not; None: never."""
        return None

    def maintain(self, now_millis: int, *, idle: bool) -> tuple[()]:
        """Upkeep; more of it when nobody waits. Items of other writers that became this one's to finish."""
        if self._wal_pages >= (CHECKPOINT_PAGES if idle else CHECKPOINT_PAGES_MAX):
            self._wal_pages = 0
            with _sqlite(), suppress(apsw.FullError):
                self._db.wal_checkpoint()
        return ()

    def close(self) -> None:
        """Unlock the file."""
        self._db.close()

    def _begin(self, writer: str, version: str, new_log_id: str, now_millis: int, mark: Mark | None) -> tuple[Unfinished, ...]:
        """What earlier epochs left."""
        try:
            return self._begin_epoch(writer, version, new_log_id, now_millis, mark)
        except JournalFull:
            if not self.reserved:
                raise
            self.release_reserve()
            return self._begin_epoch(writer, version, new_log_id, now_millis, mark)

    def _begin_epoch(
        self, writer: str, version: str, new_log_id: str, now_millis: int, mark: Mark | None
    ) -> tuple[Unfinished, ...]:
        with self._transaction():
            migrate(self._db)
            if fault := self._tables.structure(whole=False):
                raise JournalUnusable(f"its file is damaged: {fault}: {RESTORE}")
            log_id, owner, epoch = self._tables.begin_epoch(new_log_id, writer)
            if owner != writer:
                raise JournalUnusable(f"this journal is of sidecar {owner!r}, not {writer!r}: each has its own")
            head = Head(log_id, writer, epoch, *self._newest(log_id))
            if mark is not None:
                marked = self._tables.entries(mark.index, 1, payloads=False)
                check_mark(mark, log_id, head.index, head.last_sequence, marked[0].entry_hash if marked else None)
            left = self._tables.left(epoch)
            _check_left(left)
            ledger = Ledger(head, Known(), now_millis)
            ledger.open(version)
            self._write(ledger)
        self.head = ledger.head
        return left

    def _newest(self, log_id: str) -> tuple[int, bytes, int]:
        """Index and hash of the newest entry, and the last sequence."""
        newest = self._tables.newest()
        if newest is None:
            return 0, GENESIS, 0
        index = newest.header.index
        for first in range(max(1, index - CHECKED_ENTRIES + 1), index + 1, PAGE):
            _check_page(log_id, first, self._tables.entries(first, min(PAGE, index + 1 - first), payloads=False))
        return index, newest.entry_hash, self._tables.last_sequence()

    def _write(self, ledger: Ledger) -> None:
        self._tables.write(ledger, self._settings.idempotency_ttl_seconds * 1000)

    def _purge(self, ledger: Ledger, now_millis: int) -> None:
        """Let go of what the settings do not keep."""
        if self._settings.digests_only:
            self._tables.drop_ended(ledger.entries)
            self._tables.drop_expired(now_millis, PURGED_KEYS_MAX)
        elif ledger.bound:  # for as many as come, more go
            self._tables.purge_keys(now_millis, PURGED_KEYS_MAX)

    def _expiry(self, now_millis: int) -> int:
        """Keys that expire up to then are not bound any more."""
        return 0 if self._settings.digests_only else now_millis

    def _room(self) -> bool:
        """Whether journal_bytes_max leaves the reserve untouched."""
        if not self._settings.journal_bytes_max:
            return True
        return self._tables.pages_used() * self._page_bytes + self._settings.reserve_bytes <= self._settings.journal_bytes_max

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Committed at the end. JournalFull: undone. After any other error what is durable is not known; nothing is retried."""
        with _sqlite():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except (apsw.FullError, JournalFull) as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise JournalFull(str(error)) from error

    def _committed(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK


def _check_page(log_id: str, first: int, page: Sequence[Sealed]) -> None:
    """Raises JournalUnusable for consecutive entries, from the first index on, that are not what was written in this log."""
    for index, sealed in enumerate(page, first):
        if sealed.header.index != index or entry_hash(sealed.previous_hash, sealed.header) != sealed.entry_hash:
            raise JournalUnusable(f"entry {index} is damaged or missing: {RESTORE}")
        if sealed.header.log_id != log_id:
            raise JournalUnusable(f"table journal is damaged: it names log {log_id!r}, and entry {index} another: {RESTORE}")


def _check_left(left: Sequence[Unfinished]) -> None:
    """Raises JournalUnusable for unfinished items that are not what was admitted: they would run again."""
    for each in left:
        header, payload = each.admitted.header, each.admitted.payload
        sound = entry_hash(each.admitted.previous_hash, header) == each.admitted.entry_hash
        if not (sound and header.kind == types_pb2.ENTRY_KIND_ADMITTED and payload_digest(payload) == header.payload_digest):
            raise JournalUnusable(f"entry {header.index} is damaged, and its item has not ended: {RESTORE}")


@contextmanager
def _sqlite() -> Iterator[None]:
    """What SQLite cannot do, or is no row of a journal, leaves open what is on the disk."""
    try:
        yield
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise JournalBroken(f"the journal's file is damaged ({error}): {RESTORE}") from error
    except UNREADABLE as error:
        raise JournalBroken(f"{type(error).__name__}: {error}") from error
