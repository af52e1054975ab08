"""What is read from the PostgreSQL tables and written to them. Raises psycopg.Error."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ostinato.chain import OUTCOMES
from ostinato.v1 import types_pb2

from sidecar.journal import FINGERPRINTS, Binding, Head, ItemEntries, JournalBroken, Sealed, Unfinished
from sidecar.journal.database import Connection
from sidecar.journal.ledger import NUMBER_MAX, Known, Ledger, Needs

_HEAD = "SELECT log_id, last_index, head_hash, last_sequence FROM log"
_LOCK = "SELECT log_id, last_index, head_hash, last_sequence FROM log FOR UPDATE"
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
_WRITE_ITEMS = "INSERT INTO items (sequence, admitted, owner) SELECT *, %s::text FROM unnest(%b::bigint[], %b::bigint[])"
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
            head = self._db.execute(_LOCK)
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
        head = self._db.execute(_LOCK).fetchone()
        row = self._db.execute(_EPOCH, (writer, lease_seconds)).fetchone()
        assert row is not None
        return _head(head, Turn(writer, row[0], lease_seconds))

    def fence(self, writer: str) -> list[tuple[str, int]]:
        """Begin an epoch of every other writer whose lease has run out over unfinished items."""
        return sorted(self._db.execute(_FENCE, (writer,)).fetchall())

    def take(self, writer: str, owners: Iterable[str]) -> list[Unfinished]:
        """Make these writers' unfinished items this one's, for another attempt."""
        rows = self._db.execute(_TAKEN, (writer, list(owners)))
        return [Unfinished(_sealed(row), row[-1]) for row in rows]

    def commit(self, ledger: Ledger, now_millis: int, key_ttl_millis: int, purge: int) -> None:
        """All that the ledger made, and forget at most so many expired keys; then end the transaction."""
        entries, headers = ledger.entries, [entry.header for entry in ledger.entries]
        admitted = [h for h in headers if h.kind == types_pb2.ENTRY_KIND_ADMITTED]
        ended = [h for h in headers if h.kind in OUTCOMES]
        completed = [h for h in ended if h.kind == types_pb2.ENTRY_KIND_COMPLETED]
        batches = Counter(h.first_sequence for h in ended)
        indexes = [h.index for h in headers]
        with self._db.pipeline():
            serialised = [h.SerializeToString(deterministic=True) for h in headers]
            hashes, payloads = [e.entry_hash for e in entries], [e.payload for e in entries]
            self._write(_WRITE_ENTRIES, indexes, serialised, hashes, indexes, payloads)
            owned = [h.sequence for h in admitted], [h.index for h in admitted]
            self._write(_WRITE_ITEMS, *owned, first=ledger.head.writer)
            self._write(
                _BIND,
                *_columns(
                    (b.first_sequence, b.count, b.request_digest, a.tenant.encode(), a.key.encode()) for a, b in ledger.bound
                ),
            )
            self._write(_END, [h.sequence for h in ended], [h.index for h in ended])
            self._write(_VERIFY, [h.sequence for h in ledger.verified], [h.index for h in ledger.verified])
            self._write(_END_KEYED, list(batches), list(batches.values()), first=now_millis + key_ttl_millis)
            self._write(_WRITE_TWINS, *_columns((h.input_digest, h.fingerprint_digest, h.index) for h in completed))
            self._write(_WRITE_NOTES, [name.encode() for name in ledger.notes], list(ledger.notes.values()))
            self._db.execute(_PURGE, (now_millis, purge))
            head = ledger.head
            if entries:
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
            self._db.execute(_LOCK)
            row = self._db.execute("SELECT committed FROM writers WHERE name = %s", (turn.writer,)).fetchone()
        return row is not None and row[0] == turn.token

    def renew(self, turn: Turn) -> None:
        """Hold the lease. JournalBroken: a newer epoch of this writer has begun."""
        _check_owned(self._db.execute(_RENEW, (turn.lease_seconds, turn.writer, turn.epoch)).fetchone())

    def release(self, turn: Turn) -> None:
        """Let the lease end now."""
        self._db.execute(_RENEW, (-1, turn.writer, turn.epoch))

    def dead(self, writer: str) -> bool:
        """Whether `fence` would find a writer."""
        return bool(self._db.execute(_DEAD, (writer,)).rowcount)

    def head(self, turn: Turn) -> Head:
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


def _head(row: tuple[Any, ...] | None, turn: Turn) -> Head:
    assert row is not None, "the log has one row"
    log_id, index, entry_hash, last_sequence = row
    return Head(log_id, turn.writer, turn.epoch, index, entry_hash, last_sequence)


def _sealed(row: tuple[Any, ...]) -> Sealed:
    return Sealed(types_pb2.EntryHeader.FromString(row[1]), *row[2:5])


def _bindings(rows: Iterable[tuple[Any, ...]]) -> dict[tuple[str, str], Binding]:
    return {(tenant.decode(), key.decode()): Binding(*rest) for tenant, key, *rest in rows}
