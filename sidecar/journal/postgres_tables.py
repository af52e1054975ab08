"""What is read from the PostgreSQL tables and written to them. Raises psycopg.Error; LockNotAvailable: a lock was not free."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from ostinato.chain import OUTCOMES
from ostinato.v1 import types_pb2

from sidecar.journal import FINGERPRINTS, Binding, Head, ItemEntries, JournalBroken, Sealed, Unfinished
from sidecar.journal import postgres_queries as sql
from sidecar.journal.database import Connection
from sidecar.journal.known import Known, Needs
from sidecar.journal.ledger import NUMBER_MAX, Ledger

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
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

    def begin(self, turn: Turn, needs: Needs, now_millis: int) -> tuple[Head, Known]:
        """Begin a transaction: the log is this writer's until its end. JournalBroken: a newer epoch of it has begun."""
        with self._db.pipeline():
            self._db.execute("BEGIN")
            head = self._db.execute(sql.LOCK)
            owned = self._db.execute(sql.TURN, (turn.lease_seconds, turn.token, turn.writer, turn.epoch))
            bindings = self._db.execute(sql.BINDINGS, ([key.encode() for _, key in needs.keys], now_millis))
            unfinished = self._db.execute(sql.STILL_UNFINISHED, (list(needs.sequences),))
            found = self._db.execute(sql.TWINS, (list(needs.input_digests),))
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
        head = self._db.execute(sql.LOCK).fetchone()
        row = self._db.execute(sql.EPOCH, (writer, lease_seconds)).fetchone()
        assert row is not None
        return _head(head, Turn(writer, row[0], lease_seconds))

    def fence(self, writer: str) -> list[tuple[str, int]]:
        """Begin an epoch of every other writer whose lease has run out over unfinished items."""
        return sorted(self._db.execute(sql.FENCE, (writer,)).fetchall())

    def take(self, writer: str, owners: Iterable[str]) -> list[Unfinished]:
        """Make these writers' unfinished items this one's, for another attempt."""
        rows = self._db.execute(sql.TAKEN, (writer, list(owners)))
        return [Unfinished(_sealed(row), row[-1]) for row in rows]

    def write_entries(self, entries: Sequence[Sealed], verified: Sequence[types_pb2.EntryHeader]) -> None:
        """The record, and what says where to look in it. `verified`: of those of kind VERIFY."""
        headers = [entry.header for entry in entries]
        admitted = [h for h in headers if h.kind == types_pb2.ENTRY_KIND_ADMITTED]
        ended = [h for h in headers if h.kind in OUTCOMES]
        completed = [h for h in ended if h.kind == types_pb2.ENTRY_KIND_COMPLETED]
        indexes, serialised = [h.index for h in headers], [h.SerializeToString(deterministic=True) for h in headers]
        hashes, payloads = [e.entry_hash for e in entries], [e.payload for e in entries]
        self._write(sql.WRITE_ENTRIES, indexes, serialised, hashes, indexes, payloads)
        self._write(sql.WRITE_ITEMS, *_columns((h.sequence, h.index, h.writer) for h in admitted))
        self._write(sql.END, [h.sequence for h in ended], [h.index for h in ended])
        self._write(sql.VERIFY, [h.sequence for h in verified], [h.index for h in verified])
        self._write(sql.WRITE_TWINS, *_columns((h.input_digest, h.fingerprint_digest, h.index) for h in completed))

    def write_notes(self, notes: Mapping[str, bytes]) -> None:
        self._write(sql.WRITE_NOTES, [name.encode() for name in notes], list(notes.values()))

    def commit(self, ledger: Ledger, now_millis: int, key_ttl_millis: int, purge: int, digests_only: bool) -> None:
        """All that the ledger made, less what is not kept, of at most so many expired keys; then end the transaction."""
        ended = [entry.header for entry in ledger.entries if entry.header.kind in OUTCOMES]
        batches = Counter(h.first_sequence for h in ended)
        with self._db.pipeline():
            self.write_entries(ledger.entries, ledger.verified)
            self._write(
                sql.BIND,
                *_columns(
                    (b.first_sequence, b.count, b.request_digest, a.tenant.encode(), a.key.encode()) for a, b in ledger.bound
                ),
            )
            self._write(sql.END_KEYED, list(batches), list(batches.values()), first=now_millis + key_ttl_millis)
            self.write_notes(ledger.notes)
            if digests_only:
                self._write(sql.DROP_ENDED, [h.sequence for h in ended], [h.first_sequence for h in ended])
                self._db.execute(sql.DROP_EXPIRED, (now_millis, purge))
            elif ledger.bound:
                self._db.execute(sql.PURGE, (now_millis, purge))
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

    def committed(self, turn: Turn) -> bool:
        """Whether the writer's transaction with this token is durable. Waits until its old connection is through with it."""
        with self._db.transaction():
            self._db.execute(sql.LOCK)
            row = self._db.execute("SELECT committed FROM writers WHERE name = %s", (turn.writer,)).fetchone()
        return row is not None and row[0] == turn.token

    def renew(self, turn: Turn) -> None:
        """Hold the lease. JournalBroken: a newer epoch of this writer has begun."""
        _check_owned(self._db.execute(sql.RENEW, (turn.lease_seconds, turn.writer, turn.epoch)).fetchone())

    def release(self, turn: Turn) -> None:
        """Let the lease end now."""
        self._db.execute(sql.RENEW, (-1, turn.writer, turn.epoch))

    def end_stopped(self, lease_seconds: float) -> None:
        """End the session that has kept the log's lock for a lease while its client stood still. Its transaction is undone; the
        client finds its connection gone."""
        try:
            ended = self._db.execute(sql.END_STOPPED, (lease_seconds,)).fetchall()
        except psycopg.errors.InsufficientPrivilege as error:
            _log.warning("a session that stands still has the log's lock and cannot be ended", extra={"error": str(error)})
            return
        for pid, name, _ in ended:
            said = {"pid": pid, "application_name": name}
            _log.warning("a session that stood still was ended: it had the log's lock", extra=said)

    def dead(self, writer: str) -> bool:
        """Whether `fence` would find a writer."""
        return bool(self._db.execute(sql.DEAD, (writer,)).rowcount)

    def head(self, turn: Turn) -> Head:
        return _head(self._db.execute(sql.HEAD).fetchone(), turn)

    def bindings(self, keys: Iterable[tuple[str, str]], now_millis: int) -> dict[tuple[str, str], Binding]:
        """Those of the keys that are bound and have not expired; maybe the same keys of other tenants too."""
        return _bindings(self._db.execute(sql.BINDINGS, ([key.encode() for _, key in keys], now_millis)))

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        query = sql.ENTRIES if payloads else sql.ENTRIES_BARE
        return [_sealed(row) for row in self._db.execute(query, (min(from_index, NUMBER_MAX), limit))]

    def unfinished(self, first: int, last: int, limit: int) -> list[Sealed]:
        rows = self._db.execute(sql.UNFINISHED, (min(first, NUMBER_MAX), min(last, NUMBER_MAX), limit))
        return [_sealed(row) for row in rows]

    def items(self, first: int, last: int, limit: int) -> list[ItemEntries]:
        rows = self._db.execute(sql.ADMITTED, (min(first, NUMBER_MAX), min(last, NUMBER_MAX), limit))
        admitted = [_sealed(row) for row in rows]
        if not admitted:
            return []
        bounds = admitted[0].header.sequence, admitted[-1].header.sequence
        # The verdicts first: what has come in between is then without one, and never a verdict without its outcome.
        verified = {audited.header.sequence: audited for audited in map(_sealed, self._db.execute(sql.VERIFIED, bounds))}
        ended = {outcome.header.sequence: outcome for outcome in map(_sealed, self._db.execute(sql.OUTCOMES, bounds))}
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


def _head(row: tuple[Any, ...] | None, turn: Turn) -> Head:
    assert row is not None, "the log has one row"
    log_id, index, entry_hash, last_sequence = row
    return Head(log_id, turn.writer, turn.epoch, index, entry_hash, last_sequence)


def _sealed(row: tuple[Any, ...]) -> Sealed:
    return Sealed(types_pb2.EntryHeader.FromString(row[1]), *row[2:5])


def _bindings(rows: Iterable[tuple[Any, ...]]) -> dict[tuple[str, str], Binding]:
    return {(tenant.decode(), key.decode()): Binding(*rest) for tenant, key, *rest in rows}
