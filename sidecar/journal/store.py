"""The journal in a relational database: what a sidecar reads and writes, whichever database it is.

`Tables` has the statements, `Store` the operations. `sql` adds what else is the same in both databases: schema, start and
maintenance. `sqlite` and `postgres` add what differs: connections and their errors, transactions and locks, room, leases.

Statements are written for PostgreSQL, with `?` for a parameter. The type `name` stands for strings that clients choose: text in
SQLite, bytes in PostgreSQL, whose text cannot hold a zero. A statement that takes its rows from `unnest(...)` is run once for
all rows in PostgreSQL, and once for each row in SQLite, where a statement costs no round trip.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import groupby
from types import NoneType
from typing import Any, Protocol, TypeVar

from google.protobuf.message import DecodeError
from msgspec.structs import replace

from ostinato.chain import BATCH_ITEMS_MAX, OUTCOMES, SEQUENCE_MAX, entry_hash, payload_digest
from ostinato.digest import DIGEST_BYTES, fingerprint_digest
from ostinato.errors import RecordDamaged
from ostinato.signature import SignedTree, Signer
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.ledger import NUMBER_MAX, Known, Ledger, Needs, verifications
from sidecar.journal.model import (
    FINGERPRINTS,
    WITNESSED,
    Appended,
    Binding,
    Draft,
    Head,
    ItemEntries,
    Sealed,
    Signature,
    Twin,
    Unfinished,
)

T = TypeVar("T")
Row = tuple[Any, ...]

PAGE = 1_000
"""Entries that a loop over a journal reads at a time."""
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
# The signed heads that cover some entries, each with the hashes of all entries that it covers.
_HEADS = """SELECT first_index, last_index, key_id, signature, entry_hash
  FROM heads JOIN entries ON entry_index BETWEEN first_index AND last_index
  WHERE last_index IN (SELECT (SELECT min(last_index) FROM heads WHERE last_index >= covered.entry_index)
    FROM entries AS covered WHERE covered.entry_index = ANY(?::bigint[]))
  ORDER BY last_index, entry_index"""
_LAST_SIGNED = "SELECT last_index FROM heads ORDER BY last_index DESC LIMIT 1"
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
BIND = """INSERT INTO keys (first_sequence, count, request_digest, tenant, key, unfinished)
  SELECT * FROM unnest(?::bigint[], ?::integer[], ?::bytea[], ?::name[], ?::name[], ?::integer[])
  ON CONFLICT (key, tenant) DO UPDATE SET first_sequence = excluded.first_sequence, count = excluded.count,
    request_digest = excluded.request_digest, unfinished = excluded.unfinished, expires_millis = NULL"""
END_KEYED = """UPDATE keys SET unfinished = unfinished - r.n, expires_millis = CASE unfinished WHEN r.n THEN r.expires END
  FROM unnest(?::bigint[], ?::integer[], ?::bigint[]) AS r (first, n, expires) WHERE first_sequence = r.first"""

_PURGE = """DELETE FROM keys WHERE first_sequence IN
  (SELECT first_sequence FROM keys WHERE expires_millis <= ? ORDER BY expires_millis, first_sequence LIMIT ?)"""
_BIND_FOR_GOOD = _PURGE.replace("DELETE FROM keys", "UPDATE keys SET expires_millis = NULL")
_EXPIRED = "SELECT first_sequence, count FROM keys WHERE expires_millis <= ? ORDER BY expires_millis, first_sequence LIMIT ?"
_DROP_EXPIRED = """WITH expired AS (SELECT first_sequence, count FROM keys
    WHERE expires_millis <= ? ORDER BY expires_millis, first_sequence LIMIT ?),
  dropped AS (SELECT admitted, outcome FROM expired
    JOIN items ON sequence BETWEEN first_sequence AND first_sequence + count - 1)
  DELETE FROM payloads WHERE entry_index IN (SELECT admitted FROM dropped UNION ALL SELECT outcome FROM dropped)"""
_DROP_PROMPTS = """DELETE FROM payloads WHERE entry_index IN
  (SELECT items.admitted FROM items, unnest(?::bigint[], ?::bigint[]) AS r (sequence, first)
    WHERE items.sequence = r.sequence AND NOT EXISTS (SELECT 1 FROM keys WHERE first_sequence = r.first))"""
_DROP_ANSWERS = _DROP_PROMPTS.replace("items.admitted", "items.outcome")


class Tables(ABC):
    """Rows as values, in the transaction that is open. Raises the database's errors, and Damaged."""

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
            dropped = list[range]()
            with suppress(Damaged):  # what is found so far is dropped; reads of the others say that they are damaged
                dropped += (range(first, first + count) for first, count in expired)
            return Known(bindings, sequences, twins, fingerprints, heads, tuple(dropped), damaged)

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

    def _sealed(self, statement: str, *parameters: object) -> list[Sealed]:
        return [sealed_of(row) for row in self.select(statement, *parameters)]

    # ---- writing

    def write(self, ledger: Ledger, settings: StoreSettings, now_millis: int) -> None:
        """All that the ledger made. Then drop what the settings do not keep."""
        self.write_entries(ledger.entries)
        each, digests_only = self.each, settings.digests_only
        if heads := ledger.sign():
            self.write_signatures([Signature(head.last_index, head.first_index, head.key_id, head.signature) for head in heads])
        if ledger.bound:
            each(BIND, [(b.first_sequence, b.count, b.request_digest, a.tenant, a.key, b.count) for a, b in ledger.bound])
        if outcomes := [entry.header for entry in ledger.entries if entry.header.kind in OUTCOMES]:
            expires_millis = now_millis + settings.idempotency_ttl_seconds * 1000
            batches = Counter(header.first_sequence for header in outcomes)
            each(END_KEYED, [(first, count, expires_millis) for first, count in batches.items()])
        if ledger.notes:
            self.write_notes(ledger.notes)
        if ledger.twins:
            self._write_twins(
                (tag, header, ledger.output_tag(output) if digests_only else b"") for tag, header, output in ledger.twins
            )
        if digests_only:
            for statement in (_DROP_PROMPTS, _DROP_ANSWERS):
                each(statement, [(header.sequence, header.first_sequence) for header in outcomes])
            self.execute(_DROP_EXPIRED, now_millis, PURGED_KEYS_MAX)
            self.execute(_BIND_FOR_GOOD, now_millis, PURGED_KEYS_MAX)
        elif ledger.bound:  # as many keys as come may go
            self.execute(_PURGE, now_millis, PURGED_KEYS_MAX)

    def write_entries(self, entries: Sequence[Sealed]) -> None:
        """The record, and the tables that say where to look in it."""
        self.write_record(entries)
        self.index(entries)

    def write_record(self, entries: Sequence[Sealed]) -> None:
        rows = [(e.header.index, e.header.SerializeToString(deterministic=True), e.entry_hash) for e in entries]
        self.each(_WRITE_ENTRIES, rows)
        self.each(_WRITE_PAYLOADS, [(e.header.index, e.payload) for e in entries if e.payload])

    def index(self, entries: Sequence[Sealed]) -> None:
        """Where to look for items in these entries."""
        headers = [entry.header for entry in entries]
        if admitted := [header for header in headers if header.kind == types_pb2.ENTRY_KIND_ADMITTED]:
            self._write_items(admitted)
        self.each(_WRITE_OUTCOMES, [(header.sequence, header.index) for header in headers if header.kind in OUTCOMES])
        self.each(_WRITE_VERIFIED, [(header.sequence, header.index) for header in verifications(entries)])

    def _write_twins(self, twins: Iterable[tuple[bytes, types_pb2.EntryHeader, bytes]]) -> None:
        """Tag, COMPLETED entry and output tag of each."""
        rows = [(tag, header.fingerprint_digest, header.index, output_tag) for tag, header, output_tag in twins]
        self.each(_WRITE_TWINS, rows)

    @abstractmethod
    def _write_items(self, admitted: Sequence[types_pb2.EntryHeader]) -> None: ...

    def write_signatures(self, signatures: Sequence[Signature]) -> None:
        self.each(_WRITE_HEADS, [astuple(each) for each in signatures])

    def write_notes(self, notes: Mapping[str, bytes]) -> None:
        self.each(_WRITE_NOTES, list(notes.items()))


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


def check_entries(entries: Iterable[Sealed]) -> None:
    """Raises RecordDamaged for a header or a payload that is not the one that was written, as the entry's hash shows."""
    for entry in entries:
        if entry_hash(entry.previous_hash, entry.header) != entry.entry_hash:
            raise RecordDamaged(f"entry {entry.header.index} is damaged: its hash is not that of its header")
        if entry.payload and payload_digest(entry.payload) != entry.header.payload_digest:
            raise RecordDamaged(f"the payload of entry {entry.header.index} is damaged: it is not what was written")


def check_batch(items: Sequence[ItemEntries], tenant: str, key: str, binding: Binding) -> None:
    """Raises RecordDamaged if these items are not the batch of this key, as far as their payloads are kept."""
    first, count = binding.first_sequence, binding.count
    named = f"a key is bound to sequences {first} to {first + count - 1}, which are"
    if [(each.admitted.header.first_sequence, each.admitted.header.count) for each in items] != [(first, count)] * count:
        raise RecordDamaged(f"{named} no batch")
    for each in items:
        if each.admitted.payload:
            given = each.admitted.read(sequencer_pb2.AdmittedPayload)
            if (given.tenant, given.idempotency_key) != (tenant, key):
                raise RecordDamaged(f"{named} another key's")
            if binding.request_digest not in (b"", given.request_digest):
                raise RecordDamaged(f"{named} of another request")


def _witnessed_index(note: bytes) -> int:
    """0: the note is damaged, and the head is recorded again."""
    with suppress(DecodeError):
        payload = sequencer_pb2.Entry.FromString(note).payload
        return sequencer_pb2.WitnessedPayload.FromString(payload).head.last_index
    return 0


def _bindings(rows: Iterable[Row]) -> dict[tuple[str, str], Binding]:
    bindings = {(tenant, key): Binding(*rest) for tenant, key, *rest in rows}
    for each in bindings.values():
        placed = 1 <= each.first_sequence <= SEQUENCE_MAX and 1 <= each.count <= BATCH_ITEMS_MAX
        if not placed or len(each.request_digest) not in (0, DIGEST_BYTES):
            raise Damaged(f"table keys is damaged: what it says of the batch from sequence {each.first_sequence}")
    return bindings


class Store(Protocol):
    """What the writer needs of a journal's database. Synchronous; one thread at a time uses it.

    Any method may raise JournalBroken: only `close` may be called after that. A store that other writers share may also raise
    JournalUnavailable (nothing has changed, try later), and `append_many` CommitUnknown.
    """

    to_recover: Sequence[Unfinished]
    """What this writer has to finish, as it was when the journal was opened. Ascending."""

    @property
    def head(self) -> Head:
        """After the newest entry that is known here."""

    @property
    def reserved(self) -> bool:
        """Whether room is held back for outcomes; without it admissions are refused."""

    @property
    def poll_seconds(self) -> float | None:
        """How often to look for what other writers append; None: there are none."""

    def newest(self) -> Head:
        """The head, with what other writers have appended."""

    def append_many(self, drafts: Sequence[Draft], now_millis: int) -> list[Appended]:
        """One transaction: all of them in this order, durable on return, or none. JournalFull, and RecordDamaged of what one of
        them needs: nothing has changed. CommitUnknown: append the same drafts again, before any others."""

    # As `Journal` has them.
    def binding(self, tenant: str, key: str, now_millis: int) -> Binding | None: ...
    def items(self, first: int, last: int, limit: int) -> Sequence[ItemEntries]: ...
    def unfinished(self, first: int, last: int, limit: int) -> Sequence[Sealed]: ...
    def entries(self, from_index: int, limit: int, *, payloads: bool) -> Sequence[Sealed]: ...
    def notes(self, prefix: str) -> Mapping[str, bytes]: ...
    def newest_signed(self) -> types_pb2.SignedHead | None: ...

    def release_reserve(self) -> None:
        """Let outcomes use the room that was held back; admissions are refused until it is restored."""

    def restore_reserve(self) -> bool:
        """Hold room back again. False: there is not enough yet, or no database."""

    def idle_seconds(self) -> float | None:
        """When `maintain` has to be called at the latest; None: only after work."""

    def maintain(self, now_millis: int, *, idle: bool) -> Sequence[Unfinished]:
        """Upkeep; more of it when no work waits. Items of other writers that this one has taken over."""

    def close(self) -> None: ...
