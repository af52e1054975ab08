"""What is read from the SQLite tables and written to them, in whatever transaction stands open."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import NoneType
from typing import Any

import apsw
from google.protobuf.message import DecodeError

from ostinato.canonical import DIGEST_BYTES
from ostinato.chain import OUTCOMES
from ostinato.digest import fingerprint_digest
from ostinato.v1 import types_pb2

from sidecar.journal import FINGERPRINTS, Binding, ItemEntries, Sealed, Unfinished
from sidecar.journal.known import Known, Needs
from sidecar.journal.ledger import NUMBER_MAX, Ledger

_BEGIN_EPOCH = "UPDATE journal SET epoch = epoch + 1 RETURNING log_id, writer, epoch"
_ENTRIES = "SELECT * FROM sealed WHERE entry_index >= ? ORDER BY entry_index LIMIT ?"
_ENTRIES_BARE = """SELECT entry_index, header, previous_hash, entry_hash, x'' FROM sealed
  WHERE entry_index >= ? ORDER BY entry_index LIMIT ?"""
_LAST_SEQUENCE = "SELECT max(lost_sequence, (SELECT coalesce(max(sequence), 0) FROM items)) FROM journal"
_NEWEST = "SELECT * FROM sealed ORDER BY entry_index DESC LIMIT 1"
_ADMITTED = """SELECT sealed.* FROM items JOIN sealed ON entry_index = admitted
  WHERE sequence BETWEEN ? AND ? ORDER BY sequence LIMIT ?"""
_OUTCOMES = "SELECT sealed.* FROM items JOIN sealed ON entry_index = outcome WHERE sequence BETWEEN ? AND ?"
_VERIFIED = "SELECT sealed.* FROM items JOIN sealed ON entry_index = verified WHERE sequence BETWEEN ? AND ?"
_UNFINISHED = """SELECT sealed.* FROM items JOIN sealed ON entry_index = admitted
  WHERE outcome IS NULL AND sequence BETWEEN ? AND ? ORDER BY sequence LIMIT ?"""
_STILL_UNFINISHED = "SELECT sequence FROM items WHERE outcome IS NULL AND sequence IN carray(?)"
_TWINS = "SELECT sealed.* FROM twins JOIN sealed USING (entry_index) WHERE input_digest IN carray(?) ORDER BY entry_index"
_BINDINGS = """SELECT tenant, key, request_digest, first_sequence, count FROM keys
  WHERE key IN carray(?) AND (expires_millis IS NULL OR expires_millis > ?)"""
_END_KEYED = """UPDATE keys SET unfinished = unfinished - 1, expires_millis = CASE unfinished WHEN 1 THEN ?2 END
  WHERE first_sequence = ?1"""
_PURGE = """DELETE FROM keys WHERE first_sequence IN
  (SELECT first_sequence FROM keys WHERE expires_millis <= ? ORDER BY expires_millis LIMIT ?)"""
_KEYS = """SELECT tenant, key, request_digest, first_sequence, count, expires_millis FROM keys WHERE first_sequence >= ?
  ORDER BY first_sequence LIMIT ?"""
_WRITE_KEYS = """INSERT INTO keys SELECT ?1, ?2, ?3, ?4, ?5, count(*), ?6 FROM items
  WHERE sequence BETWEEN ?1 AND ?1 + ?2 - 1 AND outcome IS NULL"""
_EXPIRED = """SELECT first_sequence, first_sequence + count - 1 FROM keys WHERE expires_millis <= ?
  ORDER BY expires_millis LIMIT ?"""
_BIND_FOR_GOOD = "UPDATE keys SET expires_millis = NULL WHERE first_sequence = ?"
_KEYED = "SELECT first_sequence FROM keys WHERE first_sequence IN carray(?)"
_DROP = """DELETE FROM payloads WHERE entry_index IN (SELECT admitted FROM items WHERE sequence BETWEEN ?1 AND ?2
  UNION ALL SELECT outcome FROM items WHERE sequence BETWEEN ?1 AND ?2)"""
_NOTES = "SELECT name, value FROM notes WHERE substr(name, 1, length(?1)) = ?1 ORDER BY name"
_PAGES_USED = "SELECT page_count - freelist_count FROM pragma_page_count, pragma_freelist_count"


_Kind = type | tuple[type, ...]


class Damaged(Exception):
    """A row holds what no journal writes; the message names it."""


UNREADABLE = (apsw.Error, Damaged)
"""What any statement may raise."""


class Tables:
    """Rows as values. Raises UNREADABLE."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def begin_epoch(self, new_log_id: str, writer: str) -> tuple[str, str, int]:
        """Log id, owner and epoch, one higher than before; a new journal gets this log id and owner."""
        self._db.execute("INSERT OR IGNORE INTO journal VALUES (1, ?, ?, 0, 0)", (new_log_id, writer))
        log_id, owner, epoch = self._row("journal", _BEGIN_EPOCH, (), str, str, int)
        return log_id, owner, epoch

    def owner(self) -> tuple[str, str, int] | None:
        """Log id, owner and epoch; None: the journal is empty."""
        return next(self._rows("journal", "SELECT log_id, writer, epoch FROM journal", (), str, str, int), None)

    def epoch(self) -> int:
        (epoch,) = self._row("journal", "SELECT epoch FROM journal", (), int)
        return int(epoch)

    def newest(self) -> Sealed | None:
        return next(iter(self._sealed(_NEWEST)), None)

    def last_sequence(self) -> int:
        (sequence,) = self._row("items", _LAST_SEQUENCE, (), int)
        return int(sequence)

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        return self._sealed(_ENTRIES if payloads else _ENTRIES_BARE, min(from_index, NUMBER_MAX), limit)

    def items(self, first: int, last: int, limit: int) -> list[ItemEntries]:
        admitted = self._sealed(_ADMITTED, min(first, NUMBER_MAX), min(last, NUMBER_MAX), limit)
        if not admitted:
            return []
        bounds = admitted[0].header.sequence, admitted[-1].header.sequence
        ended = {outcome.header.sequence: outcome for outcome in self._sealed(_OUTCOMES, *bounds)}
        verified = {audited.header.sequence: audited for audited in self._sealed(_VERIFIED, *bounds)}
        numbers = [(item, item.header.sequence) for item in admitted]
        return [ItemEntries(item, ended.get(number), verified.get(number)) for item, number in numbers]

    def left(self, epoch: int) -> tuple[Unfinished, ...]:
        """What earlier epochs of the one writer left."""
        left = self.unfinished(1, NUMBER_MAX, NUMBER_MAX)
        return tuple(Unfinished(item, 1 + epoch - item.header.epoch) for item in left)

    def unfinished(self, first: int, last: int, limit: int) -> list[Sealed]:
        return self._sealed(_UNFINISHED, min(first, NUMBER_MAX), min(last, NUMBER_MAX), limit)

    def bindings(self, keys: frozenset[tuple[str, str]], now_millis: int) -> dict[tuple[str, str], Binding]:
        """Those of the keys that are bound and have not expired; maybe the same keys of other tenants too."""
        if not keys:
            return {}
        given = (apsw.carray(tuple(key for _, key in keys)), now_millis)
        rows = self._rows("keys", _BINDINGS, given, str, str, bytes, int, int)
        return {(tenant, key): Binding(*rest) for tenant, key, *rest in rows}

    def known(self, needs: Needs, now_millis: int) -> Known:
        unfinished, twins = frozenset[int](), defaultdict[bytes, tuple[Sealed, ...]](tuple)
        if needs.sequences:
            rows = self._rows("items", _STILL_UNFINISHED, (apsw.carray(array("q", needs.sequences)),), int)
            unfinished = frozenset(sequence for (sequence,) in rows)
        if needs.input_digests:
            for twin in self._sealed(_TWINS, apsw.carray(tuple(needs.input_digests))):
                twins[twin.header.input_digest] += (twin,)
        met = {twin.header.fingerprint_digest for earlier in twins.values() for twin in earlier}
        fingerprints = self._fingerprints() if met and len(met | needs.fingerprint_digests) > 1 else {}
        return Known(self.bindings(needs.keys, now_millis), unfinished, twins, fingerprints)

    def _fingerprints(self) -> dict[bytes, Mapping[str, str]]:
        """By digest; without those that are damaged, as `sidecar.fingerprints` leaves them out."""
        found: dict[bytes, Mapping[str, str]] = {}
        for value in self.notes(FINGERPRINTS).values():
            with suppress(DecodeError):
                fingerprint = types_pb2.Fingerprint.FromString(value)
                if fingerprint_digest(fingerprint.fields) == fingerprint.digest:
                    found[fingerprint.digest] = fingerprint.fields
        return found

    def write(self, ledger: Ledger, key_ttl_millis: int) -> None:
        """All that the ledger made."""
        self.write_entries(ledger.entries, ledger.verified)
        self._many(
            "INSERT OR REPLACE INTO keys VALUES (?1, ?2, ?3, ?4, ?5, ?2, NULL)",
            [(b.first_sequence, b.count, b.request_digest, a.tenant, a.key) for a, b in ledger.bound],
        )
        ended = [e.header for e in ledger.entries if e.header.kind in OUTCOMES]
        self._many(_END_KEYED, [(h.first_sequence, h.time_unix_millis + key_ttl_millis) for h in ended])
        self.write_notes(ledger.notes)

    def write_entries(self, entries: Sequence[Sealed], verified: Sequence[types_pb2.EntryHeader]) -> None:
        """The record, and what says where to look in it. `verified`: of those of kind VERIFY."""
        self._many(
            "INSERT INTO entries VALUES (?, ?, ?)",
            [(e.header.index, e.header.SerializeToString(deterministic=True), e.entry_hash) for e in entries],
        )
        self._many("INSERT INTO payloads VALUES (?, ?)", [(e.header.index, e.payload) for e in entries if e.payload])
        admitted = [e.header for e in entries if e.header.kind == types_pb2.ENTRY_KIND_ADMITTED]
        self._many("INSERT INTO items (sequence, admitted) VALUES (?, ?)", [(h.sequence, h.index) for h in admitted])
        ended = [e.header for e in entries if e.header.kind in OUTCOMES]
        self._many("UPDATE items SET outcome = ? WHERE sequence = ?", [(h.index, h.sequence) for h in ended])
        self._many(
            "INSERT OR IGNORE INTO twins VALUES (?, ?, ?)",
            [(h.input_digest, h.fingerprint_digest, h.index) for h in ended if h.kind == types_pb2.ENTRY_KIND_COMPLETED],
        )
        self._many("UPDATE items SET verified = ? WHERE sequence = ?", [(h.index, h.sequence) for h in verified])
        lost = [e.header for e in entries if e.header.kind == types_pb2.ENTRY_KIND_LOST]
        self._many("UPDATE journal SET lost_sequence = ?", [(h.first_sequence + h.count - 1,) for h in lost])

    def write_notes(self, notes: Mapping[str, bytes]) -> None:
        self._many("INSERT OR REPLACE INTO notes VALUES (?, ?)", list(notes.items()))

    def write_keys(self, keys: Iterable[tuple[int, int, bytes, str, str, int | None]]) -> None:
        """Of entries that are there: first sequence, count, request digest, tenant, key, and when it expires."""
        self._many(_WRITE_KEYS, list(keys))

    def drop_payloads(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Of the items with these sequences, first to last: what went in and what came out."""
        self._many(_DROP, list(ranges))

    def drop_ended(self, entries: Sequence[Sealed]) -> None:
        """The payloads of the items that these entries end, but for those with a key."""
        ended = [e.header for e in entries if e.header.kind in OUTCOMES]
        if ended:
            rows = self._rows("keys", _KEYED, (apsw.carray(array("q", {h.first_sequence for h in ended})),), int)
            keyed = {first for (first,) in rows}
            self.drop_payloads((h.sequence, h.sequence) for h in ended if h.first_sequence not in keyed)

    def drop_expired(self, now_millis: int, limit: int) -> None:
        """The payloads of at most so many batches whose keys have expired. The keys stay bound for good."""
        expired = list(self._rows("keys", _EXPIRED, (now_millis, limit), int, int))
        self.drop_payloads(expired)
        self._many(_BIND_FOR_GOOD, [(first,) for first, _ in expired])

    def keys(self, from_sequence: int, limit: int) -> list[tuple[str, str, bytes, int, int, int | None]]:
        """Tenant, key, request digest, first sequence, count, and when it expires."""
        return list(self._rows("keys", _KEYS, (from_sequence, limit), str, str, bytes, int, int, (int, NoneType)))

    def notes(self, prefix: str) -> dict[str, bytes]:
        return dict(self._rows("notes", _NOTES, (prefix,), str, bytes))

    def purge_keys(self, now_millis: int, limit: int) -> None:
        """Forget at most so many of the keys that have expired."""
        self._db.execute(_PURGE, (now_millis, limit))

    def structure(self, *, whole: bool) -> str:
        """What is wrong with tables and indexes as SQLite sees them; empty: nothing. Without `whole`: of the keys, and of the
        roots of the rest, in a time that does not grow with the journal."""
        if whole:
            checks = ["PRAGMA quick_check(1)"]
        else:
            names = ("journal", "entries", "payloads", "items", "twins", "notes")
            checks = ["PRAGMA quick_check(keys)", *(f"SELECT 'ok' FROM {name} LIMIT 1" for name in names)]  # noqa: S608
        for check in checks:
            for (said,) in self._db.execute(check):
                if said != "ok":
                    return " ".join(str(said).removeprefix("*** in database main ***").split())
        return ""

    def pages_used(self) -> int:
        """Of the file, less those that are free to be used again."""
        return int(self._db.execute(_PAGES_USED).get)

    def _many(self, statement: str, rows: Sequence[tuple[apsw.SQLiteValue, ...]]) -> None:
        if rows:  # a statement for none takes a microsecond as well, and every commit has half a dozen
            self._db.executemany(statement, rows)

    def _sealed(self, query: str, *bindings: object) -> list[Sealed]:
        found = []
        for row in self._rows("entries", query, bindings, int, bytes, bytes, bytes, bytes):
            index, serialized, previous_hash, entry_hash, payload = row
            try:
                header = types_pb2.EntryHeader.FromString(serialized)
            except DecodeError:
                raise Damaged(f"entry {index}: its header cannot be read") from None
            if header.index != index:
                raise Damaged(f"entry {index}: its header says {header.index}")
            if not len(previous_hash) == len(entry_hash) == DIGEST_BYTES:
                raise Damaged(f"entry {index}: its hash, or the one before, has not {DIGEST_BYTES} bytes")
            found.append(Sealed(header, previous_hash, entry_hash, payload))
        return found

    def _row(self, table: str, query: str, bindings: tuple[object, ...], *kinds: _Kind) -> tuple[Any, ...]:
        """The one row, as `_rows`."""
        for row in self._rows(table, query, bindings, *kinds):
            return row
        raise Damaged(f"table {table}: a row is missing")

    def _rows(self, table: str, query: str, bindings: tuple[object, ...], *kinds: _Kind) -> Iterator[tuple[Any, ...]]:
        """With values of these kinds. Raises Damaged for any other: STRICT holds for what is written, not for what is read."""
        try:
            for row in self._db.execute(query, bindings):
                if not all(map(isinstance, row, kinds)):
                    raise Damaged(f"table {table}: a row holds values of other types")
                yield row
        except UnicodeDecodeError:
            raise Damaged(f"table {table}: a row holds text that is not UTF-8") from None
