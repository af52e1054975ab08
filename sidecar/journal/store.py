"""The journal in a relational database: what is read, written and maintained, whichever database it is.

`Tables` has the statements, `Store` the operations. `sqlite` and `postgres` add what differs: connections and their errors,
transactions and locks, room, leases and takeover.

Statements are written for PostgreSQL, with `?` for a parameter. The type `name` stands for strings that clients choose: text in
SQLite, bytes in PostgreSQL, whose text cannot hold a zero. A statement that takes its rows from `unnest(...)` is run once for
all rows in PostgreSQL, and once for each row in SQLite, where a statement costs no round trip.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, TypeVar

from google.protobuf.message import DecodeError
from msgspec.structs import replace

from ostinato.chain import OUTCOMES, entry_hash, payload_digest
from ostinato.digest import DIGEST_BYTES, fingerprint_digest
from ostinato.errors import RecordDamaged
from ostinato.signature import PublicKeys, SignedTree, Signer
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.diagnosis import remedy
from sidecar.journal.ledger import NUMBER_MAX, SECRET_BYTES, Known, Ledger, Needs, twins_tag, verifications
from sidecar.journal.model import (
    FINGERPRINTS,
    USAGE,
    WITNESSED,
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
    Signature,
    Twin,
    Unfinished,
)

T = TypeVar("T")
Row = tuple[Any, ...]

PAGE = 1_000
"""Entries that a loop over a journal reads at a time."""
EPOCHS_READ = 16
"""OPENED entries that are read at a time to find that of an entry's epoch: with one writer it is the first."""
PURGED_KEYS_MAX = 64
"""Expired keys that one transaction drops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How much a journal may hold, and for how long."""

    idempotency_ttl_seconds: int = 86_400
    """From the outcome of a batch's last item."""
    digests_only: bool = False
    """Drop an item's payloads with its outcome. With a key: when the key would expire; the key then stays bound for good."""
    signer: Signer | None = None
    """Signs every transaction. None: they are not signed."""
    journal_bytes_max: int = 0
    """Of a file, its write-ahead log not counted; 0: no bound but the disk."""
    reserve_bytes: int = 0
    """Held back for outcomes, of the disk and of journal_bytes_max, where the journal is a file; 0: nothing."""
    lease_seconds: float = 10.0
    """Where writers share a journal: after so long without a sign of life another may take over a writer's items."""

    @property
    def recorded(self) -> sequencer_pb2.OpenedPayload:
        """What an epoch's first entry says of them: what is derived from the entries depends on it."""
        return sequencer_pb2.OpenedPayload(
            idempotency_ttl_millis=self.idempotency_ttl_seconds * 1000, digests_only=self.digests_only
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What begins a writer's next epoch."""

    writer: str
    version: str
    """Of this program."""
    new_log_id: str
    """32 hexadecimal digits: the journal's name, if it is created now."""
    new_secret: bytes
    """32 random bytes: the log's secret from now on, if it has none."""
    now_millis: int
    mark: Mark | None = None
    """Where the journal ended: one that does not hold that is refused, and stays as it was."""

    def __post_init__(self) -> None:
        assert len(bytes.fromhex(self.new_log_id)) == 16
        assert len(self.new_secret) == SECRET_BYTES


class Name:
    """Of a column that holds strings chosen by clients."""


COLUMNS: Mapping[str, type | tuple[type, ...]] = {
    "entry_index": int,
    "header": bytes,
    "previous_hash": bytes,
    "entry_hash": bytes,
    "payload": bytes,
    "sequence": int,
    "admitted": int,
    "outcome": (int, NoneType),
    "verified": (int, NoneType),
    "tenant": Name,
    "key": Name,
    "request_digest": bytes,
    "first_sequence": int,
    "count": int,
    "expires_millis": (int, NoneType),
    "name": Name,
    "value": bytes,
    "log_id": str,
    "writer": str,
    "epoch": int,
    "first_index": int,
    "last_index": int,
    "key_id": str,
    "signature": bytes,
    "secret": bytes,
    "tag": bytes,
    "output_tag": bytes,
}
"""The types of what is read, by name."""


class Damaged(RecordDamaged):
    """A row holds what no journal writes; the message names it."""


# The newest schema. The record is `entries` and `payloads`; `items`, `keys` and `twins` say where to look in it. Each database
# has its own `items`, and its own row of the log.
HEADS = """
-- The signed heads, one for each transaction that was signed. The entries say the rest of each.
CREATE TABLE heads (
  last_index {int} PRIMARY KEY, first_index {int} NOT NULL, key_id {text} NOT NULL, signature {bytes} NOT NULL
){strict};
"""
NOTES = """
-- Beside the record: what the sidecars remember, by name.
CREATE TABLE notes (name {name} PRIMARY KEY, value {bytes} NOT NULL){keyed};
"""
OPENINGS = """
-- Few other entries have these bytes: kind OPENED, and the begin of the log's id.
CREATE INDEX openings ON entries (entry_index) WHERE {opened};
"""
TWINS = """
-- The first COMPLETED entry of every input and fingerprint. `tag` is keyed, and of the tenant and the input. `output_tag` is
-- keyed too, and empty unless the payload may be dropped.
CREATE TABLE twins (
  tag {bytes} NOT NULL, fingerprint_digest {bytes} NOT NULL, entry_index {int} NOT NULL, output_tag {bytes} NOT NULL,
  PRIMARY KEY (tag, fingerprint_digest)
){keyed};
"""
_RECORD = """
CREATE TABLE entries (entry_index {int} PRIMARY KEY, header {bytes} NOT NULL, entry_hash {bytes} NOT NULL){strict};

-- Apart, so that they can be dropped and the chain stays.
CREATE TABLE payloads (entry_index {int} PRIMARY KEY, payload {bytes} NOT NULL){strict};

CREATE VIEW sealed AS
  SELECT entries.entry_index, entries.header, coalesce(previous.entry_hash, {genesis}) AS previous_hash, entries.entry_hash,
         coalesce(payloads.payload, {nothing}) AS payload
  FROM entries
  LEFT JOIN entries AS previous ON previous.entry_index = entries.entry_index - 1
  LEFT JOIN payloads ON payloads.entry_index = entries.entry_index;

-- `unfinished` counts the batch's items without an outcome; the last outcome sets the day on which the key may be bound again.
CREATE TABLE keys (
  first_sequence {int} PRIMARY KEY, count {int} NOT NULL, request_digest {bytes} NOT NULL,
  tenant {name} NOT NULL, key {name} NOT NULL, unfinished {int} NOT NULL, expires_millis {int},
  UNIQUE (key, tenant)
){strict};
CREATE INDEX expiring ON keys (expires_millis) WHERE expires_millis IS NOT NULL;
"""
SCHEMA = _RECORD + OPENINGS + TWINS + NOTES + HEADS
KEYED_TWINS = "DROP TABLE twins;" + TWINS
"""For a journal whose rows had neither tenant nor key: they are not compared with any more."""


_ADMITTED, _AUDITED = (types_pb2.ENTRY_KIND_ADMITTED,), (types_pb2.ENTRY_KIND_AUDITED,)

_ENTRIES = "SELECT * FROM sealed WHERE entry_index >= ? ORDER BY entry_index LIMIT ?"
_ENTRIES_BARE = """SELECT entry_index, header, previous_hash, entry_hash FROM sealed
  WHERE entry_index >= ? ORDER BY entry_index LIMIT ?"""
_ITEMS = """SELECT sequence, admitted, outcome, verified FROM items
  WHERE sequence BETWEEN ? AND ? ORDER BY sequence LIMIT ?"""
_ENTRIES_AT = "SELECT * FROM sealed WHERE entry_index = ANY(?::bigint[])"
_UNFINISHED = """SELECT sealed.* FROM items JOIN sealed ON entry_index = admitted
  WHERE outcome IS NULL AND sequence BETWEEN ? AND ? ORDER BY sequence LIMIT ?"""
_STILL_UNFINISHED = "SELECT sequence FROM items WHERE outcome IS NULL AND sequence = ANY(?::bigint[])"
_TWINS = """SELECT sealed.*, tag, output_tag FROM twins JOIN sealed USING (entry_index)
  WHERE tag = ANY(?::bytea[]) ORDER BY entry_index"""
_BINDINGS = """SELECT tenant, key, request_digest, first_sequence, count FROM keys
  WHERE key = ANY(?::name[]) AND (expires_millis IS NULL OR expires_millis > ?)"""
_KEYS = """SELECT tenant, key, request_digest, first_sequence, count, expires_millis FROM keys
  WHERE first_sequence >= ? ORDER BY first_sequence LIMIT ?"""
# The signed heads that cover some entries, each with the hashes of all entries that it covers.
_HEADS = """SELECT first_index, last_index, key_id, signature, entry_hash
  FROM heads JOIN entries ON entry_index BETWEEN first_index AND last_index
  WHERE last_index IN (SELECT (SELECT min(last_index) FROM heads WHERE last_index >= covered.entry_index)
    FROM entries AS covered WHERE covered.entry_index = ANY(?::bigint[]))
  ORDER BY last_index, entry_index"""
_SIGNATURES = "SELECT last_index, first_index, key_id, signature FROM heads WHERE last_index >= ? ORDER BY last_index LIMIT ?"
_LAST_SIGNED = "SELECT last_index FROM heads ORDER BY last_index DESC LIMIT 1"
_OPENINGS = """SELECT * FROM sealed WHERE entry_index IN
  (SELECT entry_index FROM entries WHERE {opened} AND entry_index < ? ORDER BY entry_index DESC LIMIT ?)
  ORDER BY entry_index DESC"""
_NOTES = "SELECT name, value FROM notes WHERE substr(name, 1, length(?::name)) = ?::name ORDER BY name"

_WRITE_ENTRIES = "INSERT INTO entries SELECT * FROM unnest(?::bigint[], ?::bytea[], ?::bytea[])"
_WRITE_PAYLOADS = "INSERT INTO payloads SELECT * FROM unnest(?::bigint[], ?::bytea[])"
_WRITE_OUTCOMES = """UPDATE items SET outcome = r.entry_index FROM unnest(?::bigint[], ?::bigint[]) AS r (sequence, entry_index)
  WHERE items.sequence = r.sequence"""
_WRITE_VERIFIED = _WRITE_OUTCOMES.replace("SET outcome", "SET verified")
_WRITE_HEADS = "INSERT INTO heads SELECT * FROM unnest(?::bigint[], ?::bigint[], ?::text[], ?::bytea[])"
_WRITE_TWINS = """INSERT INTO twins SELECT * FROM unnest(?::bytea[], ?::bytea[], ?::bigint[], ?::bytea[])
  ON CONFLICT DO NOTHING"""
_WRITE_NOTES = """INSERT INTO notes SELECT * FROM unnest(?::name[], ?::bytea[])
  ON CONFLICT (name) DO UPDATE SET value = excluded.value"""
_BIND = """INSERT INTO keys (first_sequence, count, request_digest, tenant, key, unfinished)
  SELECT * FROM unnest(?::bigint[], ?::integer[], ?::bytea[], ?::name[], ?::name[], ?::integer[])
  ON CONFLICT (key, tenant) DO UPDATE SET first_sequence = excluded.first_sequence, count = excluded.count,
    request_digest = excluded.request_digest, unfinished = excluded.unfinished, expires_millis = NULL"""
_END_KEYED = """UPDATE keys SET unfinished = unfinished - r.n, expires_millis = CASE unfinished WHEN r.n THEN r.expires END
  FROM unnest(?::bigint[], ?::integer[], ?::bigint[]) AS r (first, n, expires) WHERE first_sequence = r.first"""
_IMPORT_KEYS = """INSERT INTO keys SELECT r.first, r.n, r.digest, r.tenant, r.key,
    (SELECT count(*) FROM items WHERE outcome IS NULL AND sequence BETWEEN r.first AND r.first + r.n - 1), r.expires
  FROM unnest(?::bigint[], ?::integer[], ?::bytea[], ?::name[], ?::name[], ?::bigint[])
    AS r (first, n, digest, tenant, key, expires)"""

_PURGE = """DELETE FROM keys WHERE first_sequence IN
  (SELECT first_sequence FROM keys WHERE expires_millis <= ? ORDER BY expires_millis, first_sequence LIMIT ?)"""
_BIND_FOR_GOOD = _PURGE.replace("DELETE FROM keys", "UPDATE keys SET expires_millis = NULL")
_EXPIRED = "SELECT first_sequence, count FROM keys WHERE expires_millis <= ? ORDER BY expires_millis, first_sequence LIMIT ?"
_KEPT = """SELECT sequence FROM items
  WHERE sequence = ANY(?::bigint[]) AND EXISTS (SELECT 1 FROM payloads WHERE entry_index = outcome)"""
_DROPPED = """SELECT sequence FROM items
  WHERE outcome IS NOT NULL AND NOT EXISTS (SELECT 1 FROM payloads WHERE entry_index = outcome) ORDER BY sequence"""
_DROP_EXPIRED = """WITH expired AS (SELECT first_sequence, count FROM keys
    WHERE expires_millis <= ? ORDER BY expires_millis, first_sequence LIMIT ?),
  dropped AS (SELECT admitted, outcome FROM expired
    JOIN items ON sequence BETWEEN first_sequence AND first_sequence + count - 1)
  DELETE FROM payloads WHERE entry_index IN (SELECT admitted FROM dropped UNION ALL SELECT outcome FROM dropped)"""
_DROP = """WITH dropped AS (SELECT admitted, outcome FROM items WHERE sequence = ANY(?::bigint[]))
  DELETE FROM payloads WHERE entry_index IN (SELECT admitted FROM dropped UNION ALL SELECT outcome FROM dropped)"""
_FORGET = """DELETE FROM twins WHERE entry_index IN (SELECT outcome FROM items WHERE sequence = ANY(?::bigint[]))
  OR (length(output_tag) = 0 AND NOT EXISTS (SELECT 1 FROM payloads WHERE payloads.entry_index = twins.entry_index))"""
_FORGET_NOTES = "DELETE FROM notes WHERE substr(name, 1, length(?::name)) = ?::name"
_FORGET_REQUESTS = """UPDATE keys SET request_digest = ?
  WHERE EXISTS (SELECT 1 FROM items
    WHERE sequence = ANY(?::bigint[]) AND sequence BETWEEN first_sequence AND first_sequence + count - 1)
  AND NOT EXISTS (SELECT 1 FROM items JOIN payloads ON entry_index = admitted
    WHERE sequence BETWEEN first_sequence AND first_sequence + count - 1 AND NOT sequence = ANY(?::bigint[]))"""
_DROP_PROMPTS = """DELETE FROM payloads WHERE entry_index IN
  (SELECT items.admitted FROM items, unnest(?::bigint[], ?::bigint[]) AS r (sequence, first)
    WHERE items.sequence = r.sequence AND NOT EXISTS (SELECT 1 FROM keys WHERE first_sequence = r.first))"""
_DROP_ANSWERS = _DROP_PROMPTS.replace("items.admitted", "items.outcome")


class Tables(ABC):
    """Rows as values, in the transaction that is open. Raises the database's errors, and Damaged."""

    dialect: Mapping[str, str]
    """The database's own words in SCHEMA and other statements, by what they mean."""
    item_columns: tuple[str, ...] = ("sequence", "admitted", "outcome", "verified")
    items_differ = " OR ".join(f"there.{name} IS DISTINCT FROM made.{name}" for name in ("admitted", "outcome", "verified"))
    """Whether a row of `items` is another than the one that was made of the entries."""

    @abstractmethod
    def select(self, statement: str, *parameters: object) -> Iterator[Row]: ...

    @abstractmethod
    def execute(self, statement: str, *parameters: object) -> int:
        """How many rows it changed."""

    @abstractmethod
    def each(self, statement: str, rows: Sequence[Row]) -> None:
        """Run a statement with `unnest(...)` for these rows; nothing if there are none."""

    # ---- reading

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        return self._sealed(_ENTRIES if payloads else _ENTRIES_BARE, min(from_index, NUMBER_MAX), limit)

    def items(self, first: int, last: int, limit: int) -> list[ItemEntries]:
        """Raises RecordDamaged for an item whose row names an entry that is not its own."""
        rows = list(self.select(_ITEMS, min(first, NUMBER_MAX), min(last, NUMBER_MAX), limit))
        if not rows:
            return []
        found = self._sealed(_ENTRIES_AT, [index for _, *indexes in rows for index in indexes if index is not None])
        entries = {entry.header.index: entry for entry in found}
        entries |= {e.header.index: e for e in self._with_trees([e for e in found if e.header.kind in OUTCOMES])}

        def entry_of(sequence: int, index: int, kinds: Collection[types_pb2.EntryKind.ValueType]) -> Sealed:
            entry = entries.get(index)
            if entry is None or entry.header.sequence != sequence or entry.header.kind not in kinds:
                raise RecordDamaged(f"the journal's record of sequence {sequence} is damaged: entry {index} is not its own")
            return entry

        return [
            ItemEntries(
                entry_of(sequence, admitted, _ADMITTED),
                None if outcome is None else entry_of(sequence, outcome, OUTCOMES),
                None if verified is None else entry_of(sequence, verified, _AUDITED),
            )
            for sequence, admitted, outcome, verified in rows
        ]

    def with_payloads(self, entries: Sequence[Sealed], needed: Callable[[types_pb2.EntryHeader], bool]) -> list[Sealed]:
        """The same entries, those that are needed with their payloads."""
        wanted = [entry.header.index for entry in entries if needed(entry.header)]
        found = {entry.header.index: entry for entry in self._sealed(_ENTRIES_AT, wanted)} if wanted else {}
        return [found.get(entry.header.index, entry) for entry in entries]

    def unfinished(self, first: int, last: int, limit: int) -> list[Sealed]:
        return self._sealed(_UNFINISHED, min(first, NUMBER_MAX), min(last, NUMBER_MAX), limit)

    def bindings(self, keys: Iterable[tuple[str, str]], now_millis: int) -> dict[tuple[str, str], Binding]:
        """Those of the keys that are bound and have not expired; it may hold the same keys of other tenants too."""
        return _bindings(self.select(_BINDINGS, [key for _, key in keys], now_millis))

    def keys(self, from_sequence: int, limit: int) -> list[Key]:
        """By first sequence, ascending."""
        return [Key(*row) for row in self.select(_KEYS, from_sequence, limit)]

    def notes(self, prefix: str) -> dict[str, bytes]:
        return dict(self.select(_NOTES, prefix, prefix))

    def look_up(self, needs: Needs, now_millis: int, drop_millis: int | None = None) -> Callable[[], Known]:
        """Ask for what is needed; the function returned reads the answers. In between may lie the end of a pipeline. With
        `drop_millis`, batches whose keys have expired then are to lose their payloads."""
        select = self.select
        bound = select(_BINDINGS, [key for _, key in needs.keys], now_millis) if needs.keys else ()
        unfinished = select(_STILL_UNFINISHED, list(needs.sequences)) if needs.sequences else ()
        earlier = select(_TWINS, list(needs.twins)) if needs.twins else ()
        expired = select(_EXPIRED, drop_millis, PURGED_KEYS_MAX) if drop_millis is not None else ()
        witnessed = [(log_id, select(_NOTES, WITNESSED + log_id, WITNESSED + log_id)) for log_id in needs.witnessed]

        def known() -> Known:
            bindings = _bindings(bound)
            sequences = frozenset(sequence for (sequence,) in unfinished)
            twins, damaged = defaultdict[bytes, tuple[Twin, ...]](tuple), dict[bytes, str]()
            try:
                for *row, tag, output_tag in earlier:
                    try:
                        twin = Twin(sealed_of(tuple(row)), output_tag)
                        check_entries([twin.entry])
                    except RecordDamaged as error:
                        damaged[tag] = error.message
                        continue
                    if twin.entry.payload or output_tag:
                        twins[tag] += (twin,)
            except Damaged as error:
                damaged |= dict.fromkeys(needs.twins - twins.keys(), error.message)
            met = {twin.entry.header.fingerprint_digest for found in twins.values() for twin in found}
            fingerprints = self._fingerprints() if met and len(met | needs.fingerprint_digests) > 1 else {}
            heads = {log_id: _witnessed_index(value) for log_id, rows in witnessed for _, value in rows}
            dropped = tuple(range(first, first + count) for first, count in expired)
            return Known(bindings, sequences, twins, fingerprints, heads, dropped, damaged)

        return known

    def _fingerprints(self) -> dict[bytes, Mapping[str, str]]:
        """By digest, without those that are damaged."""
        found: dict[bytes, Mapping[str, str]] = {}
        with suppress(Damaged):
            for value in self.notes(FINGERPRINTS).values():
                with suppress(DecodeError):
                    fingerprint = types_pb2.Fingerprint.FromString(value)
                    if fingerprint_digest(fingerprint.fields) == fingerprint.digest:
                        found[fingerprint.digest] = fingerprint.fields
        return found

    def signatures(self, from_index: int, limit: int) -> list[Signature]:
        """By last index, ascending."""
        return [Signature(*row) for row in self.select(_SIGNATURES, from_index, limit)]

    def newest_signed(self) -> types_pb2.SignedHead | None:
        for (last,) in self.select(_LAST_SIGNED):
            [newest] = self._with_trees(self._sealed(_ENTRIES_BARE, last, 1))
            return newest.signed.head if newest.signed is not None else None
        return None

    def _with_trees(self, entries: Sequence[Sealed]) -> list[Sealed]:
        """The same entries, with their signed transactions. Raises RecordDamaged."""
        if not entries:
            return []
        trees = dict[int, SignedTree]()
        rows = self.select(_HEADS, [entry.header.index for entry in entries])
        for (first, last, key_id, signature), covered in groupby(rows, key=lambda row: row[:4]):
            hashes = [row[4] for row in covered]
            if len(hashes) != last - first + 1:
                raise RecordDamaged(f"the signed head of entries {first} to {last} is damaged: it has {len(hashes)} entries")
            tree = SignedTree()
            tree.restore(entries[0].header.log_id, first, hashes, key_id, signature)
            trees |= dict.fromkeys(range(first, last + 1), tree)
        return [replace(entry, signed=trees.get(entry.header.index)) for entry in entries] if trees else list(entries)

    def signing_key(self, header: types_pb2.EntryHeader) -> str:
        """The id of the key that signs this entry's epoch, as its OPENED entry says; empty: none does. Raises RecordDamaged."""
        index, statement = header.index, _OPENINGS.format(**self.dialect)
        while page := self._sealed(statement, index, EPOCHS_READ):
            for entry in page:
                found, index = entry.header, entry.header.index
                if (found.kind, found.writer, found.epoch) == (types_pb2.ENTRY_KIND_OPENED, header.writer, header.epoch):
                    check_entries([entry])
                    return sequencer_pb2.OpenedPayload.FromString(entry.payload).signing_key_id
        raise RecordDamaged(f"entry {header.index}: no entry opens epoch {header.epoch} of writer {header.writer!r}")

    def _sealed(self, statement: str, *parameters: object) -> list[Sealed]:
        return [sealed_of(row) for row in self.select(statement, *parameters)]

    # ---- writing

    def write(self, ledger: Ledger, settings: StoreSettings, now_millis: int) -> None:
        """All that the ledger made. Then drop what the settings do not keep."""
        self.write_entries(ledger.entries)
        each, heads = self.each, ledger.sign()
        self.write_signatures([Signature(head.last_index, head.first_index, head.key_id, head.signature) for head in heads])
        each(_BIND, [(b.first_sequence, b.count, b.request_digest, a.tenant, a.key, b.count) for a, b in ledger.bound])
        outcomes = [entry.header for entry in ledger.entries if entry.header.kind in OUTCOMES]
        expires_millis = now_millis + settings.idempotency_ttl_seconds * 1000
        batches = Counter(header.first_sequence for header in outcomes)
        each(_END_KEYED, [(first, count, expires_millis) for first, count in batches.items()])
        self.write_notes(ledger.notes)
        self._write_twins(
            (tag, header, ledger.output_tag(output) if settings.digests_only else b"") for tag, header, output in ledger.twins
        )
        if settings.digests_only:
            for statement in (_DROP_PROMPTS, _DROP_ANSWERS):
                each(statement, [(header.sequence, header.first_sequence) for header in outcomes])
            self.execute(_DROP_EXPIRED, now_millis, PURGED_KEYS_MAX)
            self.execute(_BIND_FOR_GOOD, now_millis, PURGED_KEYS_MAX)
        elif ledger.bound:  # as many keys as come may go
            self.execute(_PURGE, now_millis, PURGED_KEYS_MAX)

    def write_entries(self, entries: Sequence[Sealed]) -> None:
        """The record, and the tables that say where to look in it."""
        rows = [(e.header.index, e.header.SerializeToString(deterministic=True), e.entry_hash) for e in entries]
        self.each(_WRITE_ENTRIES, rows)
        self.each(_WRITE_PAYLOADS, [(e.header.index, e.payload) for e in entries if e.payload])
        self.index(entries)

    def index(self, entries: Sequence[Sealed]) -> None:
        """Where to look for items in these entries."""
        headers, each = [entry.header for entry in entries], self.each
        self._write_items([header for header in headers if header.kind == types_pb2.ENTRY_KIND_ADMITTED])
        outcomes = [header for header in headers if header.kind in OUTCOMES]
        each(_WRITE_OUTCOMES, [(header.sequence, header.index) for header in outcomes])
        each(_WRITE_VERIFIED, [(header.sequence, header.index) for header in verifications(entries)])

    def _write_twins(self, twins: Iterable[tuple[bytes, types_pb2.EntryHeader, bytes]]) -> None:
        """Tag, COMPLETED entry and output tag of each."""
        rows = [(tag, header.fingerprint_digest, header.index, output_tag) for tag, header, output_tag in twins]
        self.each(_WRITE_TWINS, rows)

    @abstractmethod
    def log(self) -> Log | None:
        """None: it is empty."""

    @abstractmethod
    def repair_log(self, epochs: Mapping[str, int], last_sequence: int, lost_sequence: int) -> None:
        """Set the row of the log, and of its writers, to what the entries say."""

    @abstractmethod
    def reopen(self, opened: Sealed) -> None:
        """What an OPENED entry makes of its writer's unfinished items."""

    @abstractmethod
    def shadow_items(self) -> str:
        """From now on `items` is an empty temporary table of the same columns. The schema in which the other is."""

    @abstractmethod
    def _write_items(self, admitted: Sequence[types_pb2.EntryHeader]) -> None: ...

    def write_signatures(self, signatures: Sequence[Signature]) -> None:
        self.each(_WRITE_HEADS, [astuple(each) for each in signatures])

    def write_notes(self, notes: Mapping[str, bytes]) -> None:
        self.each(_WRITE_NOTES, list(notes.items()))

    def import_entries(self, entries: Sequence[Sealed]) -> None:
        """The next entries of a journal that is imported. Everything has been checked."""
        for kind, group in groupby(entries, key=lambda entry: entry.header.kind == types_pb2.ENTRY_KIND_OPENED):
            consecutive = list(group)
            self.write_entries(consecutive)
            for opened in consecutive if kind else ():
                self.reopen(opened)

    def import_twins(self, secret: bytes, twins: Iterable[tuple[bytes, Sealed]]) -> None:
        """What has to be compared with these COMPLETED entries, by `twins_of`, ascending."""
        self._write_twins((twins_tag(secret, name), entry.header, b"") for name, entry in twins)

    def import_keys(self, keys: Sequence[Key]) -> None:
        """After all entries."""
        self.each(
            _IMPORT_KEYS,
            [(key.first_sequence, key.count, key.request_digest, key.tenant, key.key, key.expires_millis) for key in keys],
        )

    def kept(self, sequences: Sequence[int]) -> list[int]:
        """Those of the items that have ended whose payloads are kept."""
        return [sequence for (sequence,) in self.select(_KEPT, list(sequences))] if sequences else []

    def record_earlier(self, ledger: Ledger, newest_index: int) -> None:
        """Record which payloads were dropped while prunes were not recorded: before entries had forms. `newest_index`: of the
        newest entry that is not the ledger's."""
        forms = [entry.header.form for entry in self.entries(newest_index, 1, payloads=False)]
        if forms == [0] and (dropped := [sequence for (sequence,) in self.select(_DROPPED)]):
            ledger.prune(dropped, "earlier")

    def drop_payloads(self, sequences: Sequence[int]) -> int:
        """Of these items' admissions and outcomes; how many there were. A tenant's bytes are then counted again."""
        if not sequences:
            return 0
        self.execute(_FORGET_NOTES, USAGE, USAGE)
        return self.execute(_DROP, list(sequences))

    def forget(self, sequences: Sequence[int]) -> None:
        """Nothing is compared any more with these items, nor with any whose payload was dropped; and of a keyed batch that is
        dropped with these, the request is not known any more. Reads all twins and keys."""
        self.execute(_FORGET, list(sequences) or [0])
        if sequences:
            self.execute(_FORGET_REQUESTS, b"", list(sequences), list(sequences))


def sealed_of(row: Row) -> Sealed:
    index, serialized, previous_hash, entry_hash, payload = row if len(row) > 4 else (*row, b"")
    try:
        header = types_pb2.EntryHeader.FromString(serialized)
    except DecodeError:
        raise Damaged(f"entry {index}: its header cannot be read") from None
    if header.index != index:
        raise Damaged(f"entry {index}: its header says {header.index}")
    if not len(previous_hash) == len(entry_hash) == DIGEST_BYTES:
        raise Damaged(f"entry {index}: its hash, or the one before, has not {DIGEST_BYTES} bytes")
    return Sealed(header, previous_hash, entry_hash, payload)


def checked_secret(secret: bytes) -> bytes:
    """Raises Damaged if it is no log's secret."""
    if len(secret) != SECRET_BYTES:
        raise Damaged(f"the log's secret has {len(secret)} bytes instead of {SECRET_BYTES}")
    return secret


def check_entries(entries: Iterable[Sealed]) -> None:
    """Raises RecordDamaged for a header or a payload that is not the one that was written, as the entry's hash shows."""
    for entry in entries:
        if entry_hash(entry.previous_hash, entry.header) != entry.entry_hash:
            raise RecordDamaged(f"entry {entry.header.index} is damaged: its hash is not that of its header")
        if entry.payload and payload_digest(entry.payload) != entry.header.payload_digest:
            raise RecordDamaged(f"the payload of entry {entry.header.index} is damaged: it is not what was written")


def check_mark(mark: Mark, head: Head, marked: Sequence[Sealed]) -> None:
    """Check that a journal with this head holds what the mark says was durable. `marked`: its entry with the mark's index, if
    there is one. Raises JournalUnusable that says what is lost, and what to do."""
    if head.log_id != mark.log_id:
        raise JournalUnusable(
            f"the high-water mark is of log {mark.log_id}, and this journal is another or new: put that log's journal back, "
            "or remove the mark to begin without it"
        )
    if marked and marked[0].entry_hash == mark.entry_hash:
        return
    found = f"has another entry {mark.index}" if marked else f"ends at entry {head.index}, sequence {head.last_sequence}"
    through = max(mark.last_sequence, head.last_sequence)
    raise JournalUnusable(
        f"its end is lost: it {found}, and entry {mark.index}, sequence {mark.last_sequence} was durable: put a newer copy "
        f"back, or accept the loss: python -m sidecar accept-loss --through {through}"
    )


def check_batch(items: Sequence[ItemEntries], tenant: str, key: str, binding: Binding) -> None:
    """Raises RecordDamaged if these items are not the batch of this key, as far as their payloads are kept."""
    first, count = binding.first_sequence, binding.count
    named = f"a key is bound to sequences {first} to {first + count - 1}, which are"
    if [(each.admitted.header.first_sequence, each.admitted.header.count) for each in items] != [(first, count)] * count:
        raise RecordDamaged(f"{named} no batch")
    for each in items:
        if each.admitted.payload:
            given = sequencer_pb2.AdmittedPayload.FromString(each.admitted.payload)
            if (given.tenant, given.idempotency_key) != (tenant, key):
                raise RecordDamaged(f"{named} another key's")


def _witnessed_index(note: bytes) -> int:
    """0: the note is damaged, and the head is recorded again."""
    with suppress(DecodeError):
        payload = sequencer_pb2.Entry.FromString(note).payload
        return sequencer_pb2.WitnessedPayload.FromString(payload).head.last_index
    return 0


def _bindings(rows: Iterable[Row]) -> dict[tuple[str, str], Binding]:
    return {(tenant, key): Binding(*rest) for tenant, key, *rest in rows}


@lru_cache(maxsize=1)
def _public(pem: str) -> PublicKeys:
    keys = PublicKeys()
    keys.add(pem.encode())
    return keys


class Store(Protocol):
    """What the writer needs of a journal's database. Synchronous; one thread at a time uses it.

    Any method may raise JournalBroken: only `close` may be called after that. A store that other writers share may also raise
    JournalUnavailable (nothing has changed, try later), and `append_many` CommitUnknown.
    """

    @property
    def head(self) -> Head:
        """After the newest entry that is known here."""
        ...

    @property
    def reserved(self) -> bool:
        """Whether room is held back for outcomes; without it admissions are refused."""
        ...

    @property
    def poll_seconds(self) -> float | None:
        """How often to look for what other writers append; None: there are none."""
        ...

    def newest(self) -> Head:
        """The head, with what other writers have appended."""
        ...

    def append_many(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        """One transaction: all of them in this order, durable on return, or none. JournalFull, and RecordDamaged of what one of
        them needs: nothing has changed. CommitUnknown: append the same drafts again, before any others."""
        ...

    def binding(self, tenant: str, key: str, now_millis: int) -> Binding | None:
        """What a key stands for, if it is bound and has not expired."""
        ...

    def items(self, first: int, last: int, limit: int) -> Sequence[ItemEntries]:
        """Ascending, at most limit, without unknown numbers."""
        ...

    def unfinished(self, first: int, last: int, limit: int) -> Sequence[Sealed]:
        """ADMITTED entries of items without an outcome, as `items`."""
        ...

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> Sequence[Sealed]:
        """Consecutive entries, at most limit; empty beyond the head."""
        ...

    def notes(self, prefix: str) -> Mapping[str, bytes]:
        """Every note whose name begins with prefix, by name."""
        ...

    def newest_signed(self) -> types_pb2.SignedHead | None:
        """The newest signed head, of any writer; None: no transaction was signed."""
        ...

    def release_reserve(self) -> None:
        """Let outcomes use the room that was held back; admissions are refused until it is restored."""
        ...

    def restore_reserve(self) -> bool:
        """Hold room back again. False: there is not enough yet, or no database."""
        ...

    def idle_seconds(self) -> float | None:
        """When `maintain` has to be called at the latest; None: only after work."""
        ...

    def maintain(self, now_millis: int, *, idle: bool) -> Sequence[Unfinished]:
        """Upkeep; more of it when no work waits. Items of other writers that this one has taken over."""
        ...

    def close(self) -> None: ...


class SqlStore(ABC):
    """Reads, and what an operator does to a journal. Opened for maintenance, it raises JournalUnusable and does not append."""

    head: Head
    name: str
    """For errors. Not a database's URL, which may hold a password."""
    _settings: StoreSettings
    _maintenance: bool
    _secret = b""
    """The log's."""

    @classmethod
    @abstractmethod
    def open(cls, location: str, opening: Opening, settings: StoreSettings) -> tuple[Store, Opened]:
        """Open or create, and begin the writer's next epoch. `location`: path or URL. JournalUnusable: the message says why;
        the journal stays as it was."""

    @classmethod
    @abstractmethod
    def open_for_maintenance(cls, location: str, *, create: bool = False) -> SqlStore:
        """An existing journal, or with `create` maybe an empty one. JournalUnusable: the message says why."""

    @abstractmethod
    def _read(self, read: Callable[[Tables], T]) -> T: ...

    @contextmanager
    def _damage(self, drafts: Sequence[Draft]) -> Iterator[None]:
        """Around what an append reads. RecordDamaged: nothing has changed. The outcome of an item cannot be refused, so for
        outcomes it is JournalBroken."""
        try:
            yield
        except RecordDamaged as error:
            if all(isinstance(draft, Outcome) for draft in drafts):
                raise JournalBroken(f"{self.name} is damaged: {error.message}: {remedy(error.message)}") from error
            raise

    def _first_entries(self, tables: Tables, head: Head, opening: Opening) -> Ledger:
        """Those of this head's epoch, to be written. Raises JournalUnusable for a journal that is not what the mark says."""
        if (mark := opening.mark) is not None:
            check_mark(mark, head, tables.entries(mark.index, 1, payloads=False))
        ledger = Ledger(head, Known(), opening.now_millis, self._secret, self._settings.signer)
        ledger.open(opening.version, self._settings.recorded)
        tables.record_earlier(ledger, head.index)
        return ledger

    # ---- reads

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        return self._read(lambda tables: tables.entries(from_index, limit, payloads=payloads))

    def items(self, first: int, last: int, limit: int) -> list[ItemEntries]:
        return self._read(lambda tables: self._with_signed(tables, tables.items(first, last, limit)))

    def _with_signed(self, tables: Tables, items: list[ItemEntries]) -> list[ItemEntries]:
        """The same items, with what is wrong with their signed heads. Raises RecordDamaged for a head that was altered."""
        key_ids, found = dict[tuple[str, int], str](), list[ItemEntries]()
        for each in items:
            if each.outcome is not None and not self._maintenance:
                header, signed = each.outcome.header, each.outcome.signed
                epoch = (header.writer, header.epoch)
                if epoch not in key_ids:
                    key_ids[epoch] = tables.signing_key(header)
                if signed is not None:
                    self._check_head(signed.head, key_ids[epoch])
                elif key_ids[epoch]:
                    why = f"entry {header.index} has lost its signed head: it is served without a signature"
                    each = replace(each, unsigned=why)
            found.append(each)
        return found

    def _check_head(self, head: types_pb2.SignedHead, key_id: str) -> None:
        """Raises RecordDamaged if it is not by the key with this id, as far as the key is known here."""
        signer, covered = (
            self._settings.signer,
            f"the signed head of entries {head.first_index} to {head.last_index} is damaged",
        )
        if head.key_id != key_id:
            raise RecordDamaged(f"{covered}: it names key {head.key_id!r}, and the epoch signs with {key_id!r}")
        signer = self._settings.signer
        if signer is not None and key_id == signer.key_id and not _public(signer.public_pem).verify(head):
            raise RecordDamaged(f"{covered}: its signature is not by key {key_id}")

    def unfinished(self, first: int, last: int, limit: int) -> list[Sealed]:
        return self._read(lambda tables: tables.unfinished(first, last, limit))

    def notes(self, prefix: str) -> dict[str, bytes]:
        return self._read(lambda tables: tables.notes(prefix))

    def newest_signed(self) -> types_pb2.SignedHead | None:
        head = self._read(lambda tables: tables.newest_signed())
        if head is not None:
            self._check_head(head, head.key_id)
        return head

    def binding(self, tenant: str, key: str, now_millis: int) -> Binding | None:
        return self._read(lambda tables: tables.bindings([(tenant, key)], self._expiry(now_millis))).get((tenant, key))

    def _expiry(self, now_millis: int) -> int:
        """Keys that expire up to then are not bound any more."""
        return 0 if self._settings.digests_only else now_millis

    # ---- for an operator

    def log(self) -> Log | None:
        """None: it is empty."""
        return self._read(lambda tables: tables.log())

    def structure(self) -> str:
        """What is wrong with the database itself, apart from what entries say; empty: nothing that can be seen."""
        return ""

    def kept(self, sequences: Sequence[int]) -> list[int]:
        return self._read(lambda tables: tables.kept(sequences))

    @abstractmethod
    def drop(self, sequences: Sequence[int], reason: str, now_millis: int) -> int:
        """The payloads of these items' admissions and outcomes, for good, and a PRUNED entry that says so; how many there were.
        All of the items have ended."""

    def forget(self, sequences: Sequence[int]) -> None:
        """As `Tables.forget`."""
        with self.changing() as tables:
            tables.forget(sequences)

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[Tables]:
        """All that is read within it is of one moment. What is changed is undone."""

    @abstractmethod
    def changing(self) -> AbstractContextManager[Tables]:
        """All that is changed within it is durable at the end, or undone. No writer appends meanwhile."""

    def keep_copy(self) -> Path | None:
        """Of all that is there, before it is changed; None: the database has its own means."""
        return None

    @abstractmethod
    def importing(self, log: Log, writer: str, secret: bytes) -> AbstractContextManager[Tables]:
        """Makes an empty journal this log at the end, or leaves it empty. `writer`: its owner, where only one may write.
        `secret`: 32 random bytes, the log's from now on."""

    @abstractmethod
    def close(self) -> None: ...
