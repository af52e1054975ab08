"""The journal in PostgreSQL: any number of sidecars, one order.

One row holds the last sequence, the last index and the newest hash. Every transaction locks it first, so transactions come
one after the other, and what a writer reads in one is what the log holds. Each leaves a token in its writer's row: when a
connection is lost during COMMIT, the next one waits for that lock and reads whether the token is there.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from ostinato.chain import GENESIS, entry_hash
from ostinato.errors import JournalFull, JournalUnavailable

from sidecar.journal import (
    Appended,
    Binding,
    CommitUnknown,
    Draft,
    Head,
    JournalBroken,
    JournalUnusable,
    Mark,
    Opened,
    Unfinished,
)
from sidecar.journal.database import Database
from sidecar.journal.known import Known, needs
from sidecar.journal.ledger import Ledger
from sidecar.journal.mark import check_mark
from sidecar.journal.postgres_reads import PostgresReads, twice, unusable
from sidecar.journal.postgres_schema import check, migrate
from sidecar.journal.postgres_tables import PostgresTables, Turn
from sidecar.journal.settings import PostgresSettings

PURGED_KEYS_MAX = 64
"""In one transaction."""
LOOKS_PER_LEASE = 4
"""At one's own lease and at those of others."""


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A transaction whose COMMIT may have been sent, and was not answered."""

    turn: Turn
    head: Head
    drafts: Sequence[Draft] = ()
    appended: list[Appended] = field(default_factory=list)
    taken: list[Unfinished] = field(default_factory=list)


class PostgresJournal(PostgresReads):
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
    ) -> tuple[PostgresJournal, Opened]:
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

    def _turn(self) -> Turn:
        return Turn(self.head.writer, self.head.epoch, self._settings.lease_seconds, secrets.token_bytes(16))

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
