"""The journal in one SQLite file: one sidecar, one connection, one transaction for a group of drafts.

Write-ahead log, synced at every commit. The file is locked while it is open.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import apsw
from google.protobuf.message import DecodeError

from ostinato.chain import GENESIS, OUTCOMES, entry_hash, payload_digest
from ostinato.digest import DIGEST_BYTES, fingerprint_digest
from ostinato.errors import JournalFull
from ostinato.v1 import types_pb2

from sidecar.journal.diagnosis import RESTORE, cut, damaged, place_fault, reason
from sidecar.journal.ledger import NUMBER_MAX, Known, Ledger, Needs, needs, verifications
from sidecar.journal.maintenance import PAGE
from sidecar.journal.mark import check_mark
from sidecar.journal.model import (
    FINGERPRINTS,
    Appended,
    Binding,
    Draft,
    Head,
    ItemEntries,
    JournalBroken,
    JournalUnusable,
    Key,
    Log,
    Mark,
    Opened,
    Outcome,
    Sealed,
    Unfinished,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteSettings:
    """How much a journal may hold, and for how long."""

    idempotency_ttl_seconds: int = 86_400
    """From the outcome of a batch's last item."""
    journal_bytes_max: int = 0
    """Of the file, the write-ahead log not counted; 0: no bound but the disk."""
    reserve_bytes: int = 64 << 20
    """Held back for outcomes, of the disk and of journal_bytes_max; 0: nothing."""
    digests_only: bool = False
    """Drop an item's payloads with its outcome; with a key, when that would expire, and then it stays bound for good."""

    def __post_init__(self) -> None:
        if min(self.idempotency_ttl_seconds, self.journal_bytes_max, self.reserve_bytes) < 0:
            raise ValueError("idempotency_ttl_seconds, journal_bytes_max and reserve_bytes must not be negative")
        if self.journal_bytes_max and self.journal_bytes_max <= 2 * self.reserve_bytes:
            raise ValueError("journal_bytes_max must be more than twice reserve_bytes")


_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Reserve:
    """A file of really allocated blocks, beside the journal."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path, self._size_bytes = path, size_bytes
        self.held = path.exists()
        """Whether the space is held back: outcomes can count on it."""

    def take(self) -> bool:
        """Hold the space. False: there is not so much."""
        if not self._size_bytes:
            self.held = True
            return True
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, self._size_bytes)
            os.posix_fallocate(handle, 0, self._size_bytes)
            self.held = True
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self.release()
        finally:
            os.close(handle)
        return self.held

    def release(self) -> None:
        """Give the space to whoever writes next."""
        self._path.unlink(missing_ok=True)
        self.held = False


APPLICATION_ID = 0x4F535449
"""`OSTI` in the file's header: this is no other program's database."""

WAL_BYTES_MAX = 64 << 20
"""What the write-ahead log is cut to, once it has been copied into the file."""

# The record is `entries` and `payloads`; `items`, `keys` and `twins` say where to look in it.
_FIRST = """
CREATE TABLE journal (
  only INTEGER PRIMARY KEY CHECK (only = 1), log_id TEXT NOT NULL, writer TEXT NOT NULL, epoch INTEGER NOT NULL
) STRICT;

CREATE TABLE entries (entry_index INTEGER PRIMARY KEY, header BLOB NOT NULL, entry_hash BLOB NOT NULL) STRICT;

-- Apart, so that they can be dropped and the chain stays.
CREATE TABLE payloads (entry_index INTEGER PRIMARY KEY, payload BLOB NOT NULL) STRICT;

CREATE VIEW sealed AS
  SELECT entries.entry_index, entries.header, coalesce(previous.entry_hash, zeroblob(32)) AS previous_hash,
         entries.entry_hash, coalesce(payloads.payload, x'') AS payload
  FROM entries
  LEFT JOIN entries AS previous ON previous.entry_index = entries.entry_index - 1
  LEFT JOIN payloads ON payloads.entry_index = entries.entry_index;

CREATE TABLE items (sequence INTEGER PRIMARY KEY, admitted INTEGER NOT NULL, outcome INTEGER) STRICT;
CREATE INDEX unfinished ON items (sequence) WHERE outcome IS NULL;

-- `unfinished` counts the batch's items without an outcome; the last outcome sets the day on which the key may be bound again.
CREATE TABLE keys (
  first_sequence INTEGER PRIMARY KEY, count INTEGER NOT NULL, request_digest BLOB NOT NULL,
  tenant TEXT NOT NULL, key TEXT NOT NULL, unfinished INTEGER NOT NULL, expires_millis INTEGER,
  UNIQUE (key, tenant)
) STRICT;
CREATE INDEX expiring ON keys (expires_millis) WHERE expires_millis IS NOT NULL;

-- The first COMPLETED entry of every input and fingerprint.
CREATE TABLE twins (
  input_digest BLOB NOT NULL, fingerprint_digest BLOB NOT NULL, entry_index INTEGER NOT NULL,
  PRIMARY KEY (input_digest, fingerprint_digest)
) STRICT, WITHOUT ROWID;
"""

_SECOND = """
-- Beside the record: what the sidecar remembers, by name.
CREATE TABLE notes (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
"""

_THIRD = """
-- The AUDITED entry of kind VERIFY: part of the item's answer.
ALTER TABLE items ADD COLUMN verified INTEGER;
"""

_FOURTH = """
-- The newest sequence that a LOST entry stands for.
ALTER TABLE journal ADD COLUMN lost_sequence INTEGER NOT NULL DEFAULT 0;
"""

MIGRATIONS: tuple[str, ...] = (_FIRST, _SECOND, _THIRD, _FOURTH)
"""The n-th makes version n of version n - 1, in the transaction that opens the journal. Never edit one that was released."""


def connect(path: Path, vfs: str | None = None, *, create: bool = True) -> apsw.Connection:
    """The journal's file, created if need be and wanted, locked against every other process until it is closed.

    It may be empty, or of an older version: `migrate` comes next. `vfs` names SQLite's file layer. JournalUnusable: the message
    says why.
    """
    if vfs is None and (fault := place_fault(path, create=create)):
        raise JournalUnusable(fault)
    try:
        if create:
            _create(path)
        db = apsw.Connection(os.fspath(path), vfs=vfs)
    except (OSError, apsw.Error) as error:
        raise JournalUnusable(reason(path, error)) from error
    try:
        db.pragma("locking_mode", "EXCLUSIVE")
        if vfs is None and (fault := cut(path, db.pragma("page_size"), db.pragma("page_count"))):
            raise JournalUnusable(fault)
        _check(db, path)
        if not create and _is_empty(db):
            raise JournalUnusable(f"{path} is empty: there is no journal in it; name the journal's file")
        if db.pragma("journal_mode", "WAL") != "wal":
            raise JournalUnusable(f"{path}: this file layer cannot keep a write-ahead log")
        db.pragma("synchronous", "FULL")
        db.pragma("journal_size_limit", WAL_BYTES_MAX)
        db.pragma("temp_store", "MEMORY")
    except BaseException as error:
        db.close()
        if isinstance(error, apsw.Error | OSError):
            raise JournalUnusable(reason(path, error)) from error
        raise
    return db


def migrate(db: apsw.Connection) -> None:
    """Bring a journal, or an empty database, to the newest version. Inside a transaction."""
    for number in range(db.pragma("user_version"), len(MIGRATIONS)):
        db.execute(MIGRATIONS[number])
        db.pragma("user_version", number + 1)
    db.pragma("application_id", APPLICATION_ID)


def _is_empty(db: apsw.Connection) -> bool:
    """Whether the database has no tables."""
    return bool(db.execute("SELECT count(*) FROM sqlite_schema").get == 0)


def _check(db: apsw.Connection, path: Path) -> None:
    empty, ours = _is_empty(db), db.pragma("application_id") == APPLICATION_ID
    if not empty and not ours:
        if db.execute("SELECT count(*) FROM sqlite_schema WHERE name IN ('journal', 'sealed')").get == 2:
            raise JournalUnusable(damaged(path, "its header, bytes 68 to 71, is not that of a journal, and its tables are"))
        raise JournalUnusable(f"{path} is not a journal but another program's database: name the journal's file")
    version = db.pragma("user_version")
    if ours and not empty and version < 1:
        raise JournalUnusable(damaged(path, f"its header, bytes 60 to 63, says version {version}"))
    if version > len(MIGRATIONS):
        raise JournalUnusable(
            f"{path} has version {version}; this sidecar knows up to {len(MIGRATIONS)}: run a newer one, or, if none has had "
            f"this file, {RESTORE}"
        )


def _create(path: Path) -> None:
    """An empty file that only its owner can read, and whose name survives a power loss; nothing if there is one.

    One that exists must not even be opened: closing it would drop whatever lock this process holds on it.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


CHECKPOINT_PAGES = 1_000
"""From here on the write-ahead log is copied into the file when nothing else waits."""
CHECKPOINT_PAGES_MAX = 16_000
"""From here on, whatever waits."""
PURGED_KEYS_MAX = 64
"""In one transaction."""
CHECKED_ENTRIES = 4_096
"""Of the newest ones the hashes are checked at every start: what it reads, and what it goes on from, is what was written."""


class SqliteStore:
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
    ) -> tuple[SqliteStore, Opened]:
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
    def filling(self, log: Log, writer: str) -> Iterator[_Importer]:
        """See `Kept`."""
        with self._transaction():
            self._db.execute("INSERT INTO journal VALUES (1, ?, ?, ?, 0)", (log.log_id, writer, log.writers.get(writer, 0)))
            yield _Importer(self._tables)
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


class _Importer:
    """Implements `Importer`."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def entries(self, entries: Sequence[Sealed]) -> None:
        """See `Importer`."""
        self._tables.write_entries(entries, verifications(entries))

    def keys(self, keys: Sequence[Key]) -> None:
        """See `Importer`."""
        self._tables.write_keys(
            (key.first_sequence, key.count, key.request_digest, key.tenant, key.key, key.expires_millis) for key in keys
        )

    def notes(self, notes: Mapping[str, bytes]) -> None:
        """See `Importer`."""
        self._tables.write_notes(notes)
