"""What a journal looks like in SQLite, and how an older one becomes a newer one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import apsw

from sidecar.journal import JournalUnusable
from sidecar.journal.diagnosis import RESTORE, cut, damaged, place_fault, reason

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
