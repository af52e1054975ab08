"""What a journal looks like in PostgreSQL, and how an older one becomes a newer one."""

from __future__ import annotations

from sidecar.journal import JournalUnusable
from sidecar.journal.database import Connection

_LOCK = 0x4F535449
"""`OSTI`: of the advisory lock that sidecars which start at once wait for."""

# As in SQLite: the record is `entries` and `payloads`; `items`, `keys` and `twins` say where to look in it. Names that clients
# choose are bytes, since a text here cannot hold a zero.
_FIRST = """
CREATE TABLE log (
  only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row), log_id text NOT NULL,
  last_index bigint NOT NULL, head_hash bytea NOT NULL, last_sequence bigint NOT NULL
) WITH (fillfactor = 10);

-- `committed` is the token of the writer's newest transaction: whether it was durable, if nobody heard.
CREATE TABLE writers (
  name text PRIMARY KEY, epoch bigint NOT NULL, lease_until timestamptz NOT NULL, committed bytea NOT NULL
) WITH (fillfactor = 10);

CREATE TABLE entries (entry_index bigint PRIMARY KEY, header bytea NOT NULL, entry_hash bytea NOT NULL);

-- Apart, so that they can be dropped and the chain stays.
CREATE TABLE payloads (entry_index bigint PRIMARY KEY, payload bytea NOT NULL);

CREATE VIEW sealed AS
  SELECT entries.entry_index, entries.header, coalesce(previous.entry_hash, decode(repeat('00', 32), 'hex')) AS previous_hash,
         entries.entry_hash, coalesce(payloads.payload, '') AS payload
  FROM entries
  LEFT JOIN entries AS previous ON previous.entry_index = entries.entry_index - 1
  LEFT JOIN payloads ON payloads.entry_index = entries.entry_index;

-- `verified` is the AUDITED entry of kind VERIFY: part of the item's answer.
-- `owner` is the writer that has to finish it, `attempt` rises whenever that is begun anew.
CREATE TABLE items (
  sequence bigint PRIMARY KEY, admitted bigint NOT NULL, outcome bigint, verified bigint,
  owner text NOT NULL, attempt integer NOT NULL DEFAULT 1
);
CREATE INDEX unfinished ON items (owner, sequence) WHERE outcome IS NULL;

-- `unfinished` counts the batch's items without an outcome; the last outcome sets the day on which the key may be bound again.
CREATE TABLE keys (
  first_sequence bigint NOT NULL UNIQUE, count integer NOT NULL, request_digest bytea NOT NULL,
  tenant bytea NOT NULL, key bytea NOT NULL, unfinished integer NOT NULL, expires_millis bigint,
  PRIMARY KEY (key, tenant)
);
CREATE INDEX expiring ON keys (expires_millis) WHERE expires_millis IS NOT NULL;

-- The first COMPLETED entry of every input and fingerprint.
CREATE TABLE twins (
  input_digest bytea NOT NULL, fingerprint_digest bytea NOT NULL, entry_index bigint NOT NULL,
  PRIMARY KEY (input_digest, fingerprint_digest)
);

-- Beside the record: what the sidecars remember, by name.
CREATE TABLE notes (name bytea PRIMARY KEY, value bytea NOT NULL);
"""

MIGRATIONS: tuple[str, ...] = (_FIRST,)
"""The n-th makes version n of version n - 1. Never edit one that was released."""


def migrate(db: Connection) -> None:
    """Bring a journal, or an empty schema, to the newest version. JournalUnusable: the message says why not."""
    with db.transaction():
        db.execute("SET LOCAL lock_timeout = 0")  # another one's migration takes as long as it takes
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        version = _version(db)
        if version > len(MIGRATIONS):
            raise JournalUnusable(
                f"the journal has version {version}; this sidecar knows up to {len(MIGRATIONS)}: run a newer one"
            )
        for migration in MIGRATIONS[version:]:
            db.execute(migration)
        db.execute("UPDATE ostinato SET version = %s", (len(MIGRATIONS),))


def check(db: Connection) -> None:
    """JournalUnusable: a server that would forget what it has acknowledged."""
    for name in ("fsync", "full_page_writes"):
        if _one(db, f"SHOW {name}") != "on":
            raise JournalUnusable(f"the server runs with {name} off: what it acknowledges can be lost")


def _version(db: Connection) -> int:
    """0: there is nothing yet."""
    if _one(db, "SELECT to_regclass('ostinato') IS NULL"):
        if _one(db, "SELECT to_regclass('log') IS NOT NULL OR to_regclass('entries') IS NOT NULL"):
            raise JournalUnusable("this schema is not a journal, and has tables of the same names: give it one of its own")
        db.execute("CREATE TABLE ostinato (version integer NOT NULL)")
        db.execute("INSERT INTO ostinato VALUES (0)")
    return int(str(_one(db, "SELECT version FROM ostinato")))


def _one(db: Connection, query: str) -> object:
    row = db.execute(query).fetchone()
    assert row is not None
    return row[0]
