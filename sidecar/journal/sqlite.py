"""The journal in one SQLite file: one sidecar, one connection, one transaction for a group of drafts.

Write-ahead log, synced at every commit. The file is locked while it is open.
"""

from __future__ import annotations

import errno
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import apsw

from ostinato.chain import GENESIS
from ostinato.errors import JournalFull, RecordDamaged
from ostinato.v1 import types_pb2
from serving import files

from sidecar.journal.derived import check_recent, check_unfinished
from sidecar.journal.diagnosis import RESTORE, cut, damaged, full_fault, header_fault, place_fault
from sidecar.journal.ledger import NUMBER_MAX, SECRET_BYTES, Known, Ledger, needs
from sidecar.journal.model import (
    Appended,
    Draft,
    Head,
    JournalBroken,
    JournalUnusable,
    Log,
    Outcome,
    Sealed,
    Unfinished,
)
from sidecar.journal.sql import HEADS, KEYED_TWINS, NOTES, OPENINGS, SCHEMA, Opening, SqlStore, SqlTables, Use, checked_secret
from sidecar.journal.store import COLUMNS, Damaged, Name, Row, StoreSettings

T = TypeVar("T")

CHECKPOINT_PAGES = 1_000
"""From here on the write-ahead log is copied into the file when no work waits."""
CHECKPOINT_PAGES_MAX = 16_000
"""From here on, whatever waits."""
UNREADABLE = (apsw.Error, Damaged)
"""What any statement may raise."""


_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Reserve:
    """Disk space held back for outcomes, as a file of allocated blocks beside the journal: when the disk is full, admitted work
    can still end."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path, self._size_bytes = path, size_bytes
        self.held = path.exists()

    def take(self) -> bool:
        """Hold the space. False: the disk does not have it."""
        if not self._size_bytes:
            self.held = True
            return True
        handle = files.opened(self._path, os.O_RDWR | os.O_CREAT)
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
        """Free the space, for the journal to use."""
        self._path.unlink(missing_ok=True)
        self.held = False


APPLICATION_ID = 0x4F535449
"""`OSTI` in the file's header."""
WAL_BYTES_MAX = 64 << 20
"""What the write-ahead log is cut to, once it has been copied into the file."""

DIALECT = {
    "int": "INTEGER",
    "text": "TEXT",
    "name": "TEXT",
    "bytes": "BLOB",
    "strict": " STRICT",
    "keyed": " STRICT, WITHOUT ROWID",
    "temp": "temp",
    "genesis": "zeroblob(32)",
    "nothing": "x''",
    "opened": "instr(substr(header, 1, 14), x'10011a20') > 0",
}
_NEW = """
-- `lost_sequence` is the newest sequence that a LOST entry stands for. `secret` is 32 random bytes, which no output ever shows:
-- derived seeds, and the tags in `twins`, depend on them.
CREATE TABLE journal (
  only INTEGER PRIMARY KEY CHECK (only = 1), log_id TEXT NOT NULL, writer TEXT NOT NULL, epoch INTEGER NOT NULL,
  lost_sequence INTEGER NOT NULL DEFAULT 0, secret BLOB
) STRICT;

-- `verified` is the AUDITED entry of kind VERIFY: part of the item's answer.
CREATE TABLE items (sequence INTEGER PRIMARY KEY, admitted INTEGER NOT NULL, outcome INTEGER, verified INTEGER) STRICT;
CREATE INDEX unfinished ON items (sequence) WHERE outcome IS NULL;
"""
MIGRATIONS: tuple[str, ...] = (
    NOTES,
    "ALTER TABLE items ADD COLUMN verified INTEGER",
    "ALTER TABLE journal ADD COLUMN lost_sequence INTEGER NOT NULL DEFAULT 0",
    HEADS,
    "ALTER TABLE journal ADD COLUMN secret BLOB;" + KEYED_TWINS,
    OPENINGS,
)
"""The n-th makes version n + 1 of version n, in the transaction that opens the journal. Never edit one that was released."""
VERSION = len(MIGRATIONS) + 1
"""Of a new journal."""


_OPEN = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_NOFOLLOW


def placed(path: Path) -> Path:
    """The journal's path without links. Raises JournalUnusable for a link that another user made."""
    try:
        return files.resolved(path)
    except OSError as error:
        raise JournalUnusable(f"{path} cannot be read by {files.user()}: {error.strerror or error}") from error


def connect(path: Path, vfs: str | None = None, *, create: bool = True) -> apsw.Connection:
    """Open the journal's file, with `create` also a new one, and lock it against every other process until it is closed.

    It may be empty, or of an older version: call `migrate` next. `vfs` names SQLite's file layer. JournalUnusable: the message
    says why.
    """
    if vfs is None and (fault := place_fault(path, create=create)):
        raise JournalUnusable(fault)
    try:
        if create:
            _create(path)
        db = apsw.Connection(os.fspath(path), vfs=vfs, flags=_OPEN)
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
    version = db.pragma("user_version")
    for statements in MIGRATIONS[version - 1 :] if version else (_NEW, SCHEMA):
        db.execute(statements.format(**DIALECT))
    db.pragma("user_version", VERSION)
    db.pragma("application_id", APPLICATION_ID)


def _is_empty(db: apsw.Connection) -> bool:
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
    if version > VERSION:
        raise JournalUnusable(
            f"{path} has version {version}; this sidecar knows up to {VERSION}: run a newer one, or, if none has had "
            f"this file, {RESTORE}"
        )


def _create(path: Path) -> None:
    """Create an empty file that only its owner can read, and whose name survives a power loss; nothing if it exists.

    An existing file must not be opened here: closing it would release a lock that this process holds on it.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    files.sync_folder(path.parent)


_OWNER = "SELECT log_id, writer, epoch FROM journal"
_BEGIN_EPOCH = "UPDATE journal SET epoch = epoch + 1 RETURNING log_id, writer, epoch"
_EPOCH = "SELECT epoch FROM journal"
_NEWEST = "SELECT * FROM sealed ORDER BY entry_index DESC LIMIT 1"
_LAST_SEQUENCE = "SELECT max(lost_sequence, (SELECT coalesce(max(sequence), 0) FROM items)) AS sequence FROM journal"
_WRITE_ITEMS = "INSERT INTO items (sequence, admitted) SELECT * FROM unnest(?::bigint[], ?::bigint[])"
_BYTES_USED = """SELECT (page_count - freelist_count) * page_size
  FROM pragma_page_count, pragma_freelist_count, pragma_page_size"""


_UNNEST = re.compile(r"(SELECT \* FROM|,|\n? *FROM) unnest\(([^)]*)\)(?:\s+AS r \(([^)]*)\))?")


@cache
def _translated(statement: str) -> str:
    return re.sub(r"\?::\w+", "?", re.sub(r"= ANY\(\?::\w+\[\]\)", "IN carray(?)", statement))


@cache
def _for_each_row(statement: str) -> str:
    """`unnest(...)`, the rows, becomes `VALUES (?1, ?2)`, or `r.name` the parameter of its place."""
    found = _UNNEST.search(statement)
    assert found is not None
    _, types, names = found.groups()
    if names is None:
        values = ", ".join(f"?{place}" for place in range(1, types.count("?") + 1))
        return _UNNEST.sub(f"VALUES ({values})", statement)
    statement = _UNNEST.sub("", statement)
    for place, name in enumerate(names.split(", "), start=1):
        statement = re.sub(rf"\br\.{name}\b", f"?{place}", statement)
    return statement


_KINDS = {column: str if kind is Name else kind for column, kind in COLUMNS.items()}


def _table(statement: str) -> str:
    """Where a damaged row is."""
    tables = re.findall(r"(?:FROM|UPDATE) (\w+)", statement)
    return "entries" if tables[-1] == "sealed" else str(tables[-1])


def _bound(parameter: Any) -> Any:
    """A list, which must not be empty, is bound as an array."""
    if not isinstance(parameter, list):
        return parameter
    return apsw.carray(array("q", parameter) if isinstance(parameter[0], int) else tuple(parameter))


class SqliteTables(SqlTables):
    """Adds what the one row of `journal` holds, and what SQLite knows of its file. Raises UNREADABLE."""

    dialect = DIALECT

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def select(self, statement: str, *parameters: object) -> Iterator[Row]:
        """Raises Damaged for pages that are no part of the table, and for values of other types: STRICT holds for what is
        written, not for what is read."""
        kinds: tuple[type | tuple[type, ...], ...] | None = None
        try:
            cursor = self._db.execute(_translated(statement), tuple(map(_bound, parameters)))
            for row in cursor:
                kinds = kinds or tuple(_KINDS[column] for column, _ in cursor.get_description())
                if not all(map(isinstance, row, kinds)):
                    raise Damaged(f"table {_table(statement)}: a row holds values of other types")
                yield row
        except UnicodeDecodeError:
            raise Damaged(f"table {_table(statement)}: a row holds text that is not UTF-8") from None
        except apsw.CorruptError as error:
            raise Damaged(f"table {_table(statement)} cannot be read: {error}") from error

    def execute(self, statement: str, *parameters: object) -> int:
        self._db.execute(_translated(statement), tuple(map(_bound, parameters)))
        return self._db.changes()

    def each(self, statement: str, rows: Sequence[Row]) -> None:
        if rows:  # preparing a statement takes a microsecond, and every commit has half a dozen
            self._db.executemany(_for_each_row(statement), rows)

    def begin_epoch(self, new_log_id: str, writer: str) -> tuple[str, str, int]:
        """Log id, owner and epoch, one higher than before; a new journal gets this log id and owner."""
        self._db.execute("INSERT OR IGNORE INTO journal VALUES (1, ?, ?, 0, 0, NULL)", (new_log_id, writer))
        log_id, owner, epoch = self._row(_BEGIN_EPOCH)
        return log_id, owner, epoch

    def secret(self, new: bytes) -> bytes:
        """The log's; this one from now on if it has none."""
        self._db.execute("UPDATE journal SET secret = ? WHERE secret IS NULL", (new,))
        return checked_secret(bytes(self._row("SELECT secret FROM journal")[0]))

    def epoch(self) -> int:
        return int(self._row(_EPOCH)[0])

    def newest(self) -> Sealed | None:
        return next(iter(self._sealed(_NEWEST)), None)

    def last_sequence(self) -> int:
        return int(self._row(_LAST_SEQUENCE)[0])

    def write_record(self, entries: Sequence[Sealed]) -> None:
        super().write_record(entries)
        for header in (entry.header for entry in entries if entry.header.kind == types_pb2.ENTRY_KIND_LOST):
            self._db.execute("UPDATE journal SET lost_sequence = ?", (header.first_sequence + header.count - 1,))

    def _write_items(self, admitted: Sequence[types_pb2.EntryHeader]) -> None:
        self.each(_WRITE_ITEMS, [(header.sequence, header.index) for header in admitted])

    def log(self) -> Log | None:
        newest = self.newest()
        if newest is None:
            return None
        log_id, writer, epoch = self._row(_OWNER)
        if newest.header.log_id != log_id:
            raise Damaged(f"table journal names log {log_id!r}, and entry {newest.header.index} another")
        return Log(log_id, {writer: epoch}, newest.header.index, newest.entry_hash, self.last_sequence())

    def repair_log(self, epochs: Mapping[str, int], last_sequence: int, lost_sequence: int) -> None:
        newest = self.newest()
        assert newest is not None
        self._db.execute("UPDATE journal SET log_id = ?, lost_sequence = ?", (newest.header.log_id, lost_sequence))
        if len(epochs) == 1:
            self._db.execute("UPDATE journal SET writer = ?, epoch = ?", next(iter(epochs.items())))
        for owner in epochs.items():
            self._db.execute("UPDATE journal SET epoch = ? WHERE writer = ?", owner[::-1])

    def reopen(self, opened: Sealed) -> None:
        pass  # there is one owner, and attempts are counted from epochs

    def shadow_items(self) -> str:
        items = self._db.execute("SELECT sql FROM main.sqlite_schema WHERE type = 'table' AND name = 'items'").get
        self._db.execute(items.replace("CREATE TABLE", "CREATE TEMP TABLE", 1))
        return "main"

    def structure(self, *, whole: bool) -> str:
        """What is wrong with tables and indexes as SQLite sees them; empty: nothing. Without `whole`: of the keys, and of the
        roots of the rest, in a time that does not grow with the journal."""
        if whole:
            checks = ["PRAGMA integrity_check(1)"]
        else:
            names = ("journal", "entries", "payloads", "items", "twins", "notes", "heads")
            checks = ["PRAGMA integrity_check(keys)", *(f"SELECT 'ok' FROM {name} LIMIT 1" for name in names)]  # noqa: S608
        for check in checks:
            for (said,) in self._db.execute(check):
                if said != "ok":
                    return " ".join(str(said).removeprefix("*** in database main ***").split())
        return ""

    def bytes_used(self) -> int:
        """Of the file, less the pages that are free to be used again."""
        return int(self._db.execute(_BYTES_USED).get)

    def _row(self, statement: str) -> Row:
        for row in self.select(statement):
            return row
        raise Damaged(f"table {_table(statement)}: its row is missing")


class SqliteStore(SqlStore):
    """A journal in a file, which is locked against every other process until `close`."""

    poll_seconds = None

    def __init__(self, path: Path, db: apsw.Connection, settings: StoreSettings, *, maintenance: bool = False) -> None:
        self.name = str(path)
        self._path, self._db, self._tables, self._settings = path, db, SqliteTables(db), settings
        self._reserve = Reserve(path.with_name(path.name + ".reserve"), settings.reserve_bytes)
        self._maintenance = maintenance
        self._wal_pages, self._remove = 0, False

    @classmethod
    def open(cls, location: str, opening: Opening, settings: StoreSettings, *, vfs: str | None = None) -> SqliteStore:
        """As in `SqlStore`. `vfs` names SQLite's file layer."""
        path = placed(Path(location))
        db = connect(path, vfs)
        try:
            store = cls(path, db, settings)
            db.set_wal_hook(store._committed)
            if settings.journal_bytes_max:
                db.pragma("max_page_count", settings.journal_bytes_max // int(db.pragma("page_size")))
            try:
                store._begin(opening)
            except JournalFull:
                if not store.reserved:
                    raise
                store.release_reserve()  # it has room for an epoch
                store._begin(opening)
            store.restore_reserve()
            return store
        except JournalUnusable as error:
            db.close()
            raise JournalUnusable(f"{path}: {error}") from error
        except (apsw.Error, OSError, JournalBroken, JournalFull, RecordDamaged) as error:
            db.close()
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise JournalUnusable(reason(path, cause, bytes_max=settings.journal_bytes_max)) from error
        except BaseException:
            db.close()
            raise

    @classmethod
    def open_for_maintenance(cls, location: str, use: Use) -> SqliteStore:
        """As in `SqlStore`. `close` removes a file that is made here, if it is still empty."""
        path = placed(Path(location))
        new = use == "make" and not path.exists()
        db = connect(path, create=use == "make")
        store = cls(path, db, StoreSettings(), maintenance=True)
        store._remove = new
        try:
            if use == "copy and change":
                store._keep_copy()
            with store._errors() if use == "read" else store._transaction():
                if use == "read":
                    db.execute("BEGIN IMMEDIATE")  # `close` undoes it
                migrate(db)
            if use != "make" and store.log() is None:
                raise JournalUnusable(f"{path} has no entries: name the journal's file")
            with store._errors():
                db.pragma("secure_delete", True)  # what is dropped is overwritten
        except BaseException:
            db.close()
            if store.copy is not None:
                store.copy.unlink()  # no table was made again
            raise
        return store

    def _read(self, read: Callable[[SqlTables], T]) -> T:
        with self._errors():
            return read(self._tables)

    def close(self) -> None:
        """Unlock the file. The write-ahead log is gone then, with what was dropped."""
        empty = self._remove and self.log() is None
        self._db.close()
        if empty:
            self._path.unlink()

    # ---- for a writer

    @property
    def reserved(self) -> bool:
        return self._reserve.held

    def append_many(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        known = self._known(drafts, now_millis)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            ledger = Ledger(self.head, known, now_millis, self._secret, self._settings.signer)
            appended = [ledger.append(draft) for draft in drafts]
            self._tables.write(ledger, self._settings, now_millis)
            if not all(isinstance(draft, Outcome) for draft in drafts) and not (self.reserved and self._room()):
                raise JournalFull("no room for new work in the journal")
            self._db.execute("COMMIT")
        except BaseException as error:
            with self._errors():
                self._undo(error)
                raise
        self.head = ledger.head
        return appended

    def _known(self, drafts: Sequence[Draft], now_millis: int) -> Known:
        """Read what they need, before their transaction: after a damaged page was read in one, SQLite writes nothing more. No
        one else writes the file."""
        drop_millis = now_millis if self._settings.digests_only else None
        reading: Sequence[Draft] = ()
        try:
            if self._tables.epoch() != self.head.epoch:
                raise JournalBroken("fenced: a newer epoch of this writer has begun")
            reading = drafts
            return self._tables.look_up(needs(drafts, self._secret), self._expiry(now_millis), drop_millis)()
        except Exception:
            with self._errors(), self._damage(reading):
                raise

    def newest(self) -> Head:
        return self.head

    def release_reserve(self) -> None:
        self._reserve.release()

    def restore_reserve(self) -> bool:
        with self._errors():
            return self._room() and self._reserve.take()

    def idle_seconds(self) -> float | None:
        return None

    def maintain(self, now_millis: int, *, idle: bool) -> tuple[()]:
        """Copy a write-ahead log that has grown into the file."""
        if self._wal_pages >= (CHECKPOINT_PAGES if idle else CHECKPOINT_PAGES_MAX):
            self._wal_pages = 0
            with self._errors(), suppress(apsw.FullError):
                self._db.wal_checkpoint()
        return ()

    def _begin(self, opening: Opening) -> None:
        tables = self._tables
        with self._transaction():
            migrate(self._db)
            if fault := tables.structure(whole=False):
                raise JournalUnusable(f"its file is damaged: {fault}: {RESTORE}")
            log = tables.log()
            log_id, owner, epoch = tables.begin_epoch(opening.new_log_id, opening.writer)
            if owner != opening.writer:
                raise JournalUnusable(f"this journal is of sidecar {owner!r}, not {opening.writer!r}: each has its own")
            unfinished = tables.unfinished(1, NUMBER_MAX, NUMBER_MAX)
            check_unfinished(unfinished)
            if log is not None:
                check_recent(tables, log)
            self._secret = tables.secret(opening.new_secret)
            end = (log.index, log.entry_hash, log.last_sequence) if log is not None else (0, GENESIS, 0)
            ledger = self._first_entries(tables, Head(log_id, owner, epoch, *end), opening)
            tables.write(ledger, self._settings, opening.now_millis)
        self.head = ledger.head
        self.to_recover = [Unfinished(entry, 1 + epoch - entry.header.epoch) for entry in unfinished]

    def _room(self) -> bool:
        """Whether journal_bytes_max leaves the reserve untouched."""
        bytes_max = self._settings.journal_bytes_max
        return not bytes_max or self._tables.bytes_used() + self._settings.reserve_bytes <= bytes_max

    def _committed(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

    # ---- for maintenance

    def structure(self) -> str:
        with self._errors():
            return self._tables.structure(whole=True)

    def drop(self, sequences: Sequence[int], reason: str, now_millis: int) -> int:
        if not sequences:
            return 0
        with self._transaction():  # of the owner, in its newest epoch: no other process has the file
            log = self._tables.log()
            assert log is not None
            ((writer, epoch),) = log.writers.items()
            head = Head(log.log_id, writer, epoch, log.index, log.entry_hash, log.last_sequence)
            ledger = Ledger(head, Known(), now_millis, self._tables.secret(os.urandom(SECRET_BYTES)))
            self._tables.record_earlier(ledger, log.index)
            ledger.prune(sequences, reason)
            self._tables.write_entries(ledger.entries)
            return self._tables.drop_payloads(sequences)

    @contextmanager
    def snapshot(self) -> Iterator[SqlTables]:
        with self._errors():  # no other process has the file
            self._db.execute("SAVEPOINT snapshot")
            try:
                yield self._tables
            finally:
                self._db.execute("ROLLBACK TO snapshot")
                self._db.execute("RELEASE snapshot")

    @contextmanager
    def changing(self) -> Iterator[SqlTables]:
        with self._transaction():
            yield self._tables

    def _keep_copy(self) -> None:
        copy = self._path.with_name(self._path.name + ".before-rebuild")
        try:
            os.close(files.opened(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise JournalUnusable(f"{copy} is there already: move it away") from None
        self.copy = copy
        with self._errors(), closing(apsw.Connection(str(copy))) as there, there.backup("main", self._db, "main") as pages:
            pages.step()

    @contextmanager
    def importing(self, log: Log, writer: str, secret: bytes) -> Iterator[SqlTables]:
        with self._transaction():
            row = (log.log_id, writer, log.writers.get(writer, 0), secret)
            self._db.execute("INSERT INTO journal VALUES (1, ?, ?, ?, 0, ?)", row)
            yield self._tables
        self._remove = False

    # ---- errors

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Committed at the end. Errors: see `_undo`."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            with self._errors():
                self._undo(error)
                raise

    def _undo(self, error: BaseException) -> None:
        """Undo a transaction that ends with JournalFull, or a database that is full, and raise JournalFull; or with
        RecordDamaged. After any other error it is not known what is durable; nothing is retried."""
        full = isinstance(error, apsw.FullError | JournalFull)
        if (full or self._maintenance or isinstance(error, RecordDamaged)) and self._db.in_transaction:
            self._db.execute("ROLLBACK")
        if full and not self._maintenance:
            raise JournalFull(str(error)) from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Reading what is damaged raises Damaged: only its caller cannot go on. After any other error of SQLite it is not known
        what is on the disk."""
        try:
            yield
        except UNREADABLE as error:
            if self._maintenance:
                raise JournalUnusable(reason(self._path, error)) from error
            if isinstance(error, Damaged):
                raise
            malformed = isinstance(error, apsw.CorruptError | apsw.NotADBError)
            why = damaged(self._path, str(error)) if malformed else f"{self._path}: {type(error).__name__}: {error}"
            raise JournalBroken(why) from error


# ---- errors

_DISK = (apsw.IOError, apsw.CantOpenError, apsw.PermissionsError)
_REFUSAL = (OSError, apsw.ReadOnlyError, *_DISK)
"""Raised where this user may not use the file or its folder, and for other reasons as well."""
_DAMAGE = (apsw.CorruptError, apsw.NotADBError, apsw.ReadOnlyError, apsw.SQLError, apsw.ConstraintError, apsw.MismatchError)
"""Raised by SQLite where the content is not what this program wrote: another table, column or type."""


def reason(path: Path, error: Exception, *, bytes_max: int = 0) -> str:
    """The line for an error of SQLite, of the operating system, or of reading a row.

    It may open and close the file, which releases this process's lock on it: call it only for a journal that is not used any
    more. `bytes_max`: the bound that was set for the file; 0: none.
    """
    if isinstance(error, apsw.BusyError):
        return f"{path} is in use by another sidecar or command: stop that first"
    if isinstance(error, apsw.FullError):
        return full_fault(path, bytes_max)
    if isinstance(error, _REFUSAL) and (fault := place_fault(path, create=True)):
        return fault
    if isinstance(error, OSError):
        return f"{path} cannot be opened: {error.filename or path}: {error.strerror or error}"
    if isinstance(error, _DISK):
        code = getattr(error, "extendedresult", "unknown")
        return f"{path} cannot be read or written: {error} (SQLite's code {code}): look at its disk"
    if not isinstance(error, apsw.Error):
        return damaged(path, str(error))
    if fault := header_fault(path):
        return fault
    return damaged(path, str(error)) if isinstance(error, _DAMAGE) else f"{path} cannot be used: {error}"
