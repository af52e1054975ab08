"""What both databases share beside reads and writes: the schema, the beginning of an epoch, and what an operator does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

from msgspec.structs import replace

from ostinato.errors import RecordDamaged
from ostinato.signature import PublicKeys
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.diagnosis import remedy
from sidecar.journal.ledger import SECRET_BYTES, Known, Ledger, twins_tag
from sidecar.journal.model import (
    USAGE,
    Binding,
    Draft,
    Head,
    ItemEntries,
    JournalBroken,
    JournalUnusable,
    Key,
    Log,
    Mark,
    Outcome,
    Sealed,
    Signature,
    Unfinished,
)
from sidecar.journal.store import Damaged, Store, StoreSettings, Tables, check_entries

T = TypeVar("T")
Use = Literal["read", "change", "copy and change", "make"]
"""What for a journal is opened by a command. One that is only read is not migrated; a copy is of all that is there before."""

EPOCHS_READ = 16
"""OPENED entries that are read at a time to find that of an entry's epoch: with one writer it is the first."""


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


_KEYS = """SELECT tenant, key, request_digest, first_sequence, count, expires_millis FROM keys
  WHERE first_sequence >= ? ORDER BY first_sequence LIMIT ?"""
_SIGNATURES = "SELECT last_index, first_index, key_id, signature FROM heads WHERE last_index >= ? ORDER BY last_index LIMIT ?"
_OPENINGS = """SELECT * FROM sealed WHERE entry_index IN
  (SELECT entry_index FROM entries WHERE {opened} AND entry_index < ? ORDER BY entry_index DESC LIMIT ?)
  ORDER BY entry_index DESC"""
_IMPORT_KEYS = """INSERT INTO keys SELECT r.first, r.n, r.digest, r.tenant, r.key,
    (SELECT count(*) FROM items WHERE outcome IS NULL AND sequence BETWEEN r.first AND r.first + r.n - 1), r.expires
  FROM unnest(?::bigint[], ?::integer[], ?::bytea[], ?::name[], ?::name[], ?::bigint[])
    AS r (first, n, digest, tenant, key, expires)"""
_KEPT = """SELECT sequence FROM items
  WHERE sequence = ANY(?::bigint[]) AND EXISTS (SELECT 1 FROM payloads WHERE entry_index = outcome)"""
_DROPPED = """SELECT sequence FROM items
  WHERE outcome IS NOT NULL AND NOT EXISTS (SELECT 1 FROM payloads WHERE entry_index = outcome) ORDER BY sequence"""
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


class SqlTables(Tables):
    """Adds what a start and an operator need."""

    dialect: Mapping[str, str]
    """The database's own words in SCHEMA and other statements, by what they mean."""
    item_columns: tuple[str, ...] = ("sequence", "admitted", "outcome", "verified")
    items_differ = " OR ".join(f"there.{name} IS DISTINCT FROM made.{name}" for name in ("admitted", "outcome", "verified"))
    """Whether a row of `items` is another than the one that was made of the entries."""

    @abstractmethod
    def log(self) -> Log | None:
        """None: it is empty."""

    def keys(self, from_sequence: int, limit: int) -> list[Key]:
        """By first sequence, ascending."""
        return [Key(*row) for row in self.select(_KEYS, from_sequence, limit)]

    def signatures(self, from_index: int, limit: int) -> list[Signature]:
        """By last index, ascending."""
        return [Signature(*row) for row in self.select(_SIGNATURES, from_index, limit)]

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

    def kept(self, sequences: Sequence[int]) -> list[int]:
        """Those of the items that have ended whose payloads are kept."""
        return [sequence for (sequence,) in self.select(_KEPT, list(sequences))] if sequences else []

    @abstractmethod
    def repair_log(self, epochs: Mapping[str, int], last_sequence: int, lost_sequence: int) -> None:
        """Set the row of the log, and of its writers, to what the entries say."""

    @abstractmethod
    def reopen(self, opened: Sealed) -> None:
        """What an OPENED entry makes of its writer's unfinished items."""

    @abstractmethod
    def shadow_items(self) -> str:
        """From now on `items` is an empty temporary table of the same columns. The schema in which the other is."""

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

    def import_twins(self, secret: bytes, twins: Iterable[tuple[bytes, Sealed]]) -> None:
        """What has to be compared with these COMPLETED entries, by `twins_of`, ascending."""
        self._write_twins((twins_tag(secret, name), entry.header, b"") for name, entry in twins)

    def import_keys(self, keys: Sequence[Key]) -> None:
        """After all entries."""
        self.each(
            _IMPORT_KEYS,
            [(key.first_sequence, key.count, key.request_digest, key.tenant, key.key, key.expires_millis) for key in keys],
        )


def checked_secret(secret: bytes) -> bytes:
    """Raises Damaged if it is no log's secret."""
    if len(secret) != SECRET_BYTES:
        raise Damaged(f"the log's secret has {len(secret)} bytes instead of {SECRET_BYTES}")
    return secret


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


@lru_cache(maxsize=1)
def _public(pem: str) -> PublicKeys:
    keys = PublicKeys()
    keys.add(pem.encode())
    return keys


class SqlStore(ABC):
    """Reads, and what an operator does to a journal. Opened for maintenance, it raises JournalUnusable and does not append."""

    head: Head
    name: str
    """For errors. Not a database's URL, which may hold a password."""
    copy: Path | None = None
    """That was made at the opening. None: there is none; a database has its own means."""
    _settings: StoreSettings
    _maintenance: bool
    _secret = b""
    """The log's."""
    to_recover: Sequence[Unfinished] = ()
    """See `Store`."""

    @classmethod
    @abstractmethod
    def open(cls, location: str, opening: Opening, settings: StoreSettings) -> Store:
        """Open or create, and begin the writer's next epoch. `location`: path or URL. JournalUnusable: the message says why;
        the journal stays as it was."""

    @classmethod
    @abstractmethod
    def open_for_maintenance(cls, location: str, use: Use) -> SqlStore:
        """An existing journal, or one that may be made. JournalUnusable: the message says why."""

    @abstractmethod
    def _read(self, read: Callable[[SqlTables], T]) -> T: ...

    @contextmanager
    def _damage(self, drafts: Sequence[Draft]) -> Iterator[None]:
        """Around what an append reads for these drafts; none: for itself. RecordDamaged: nothing has changed. The outcome of an
        item cannot be refused, so for outcomes it is JournalBroken."""
        try:
            yield
        except RecordDamaged as error:
            if all(isinstance(draft, Outcome) for draft in drafts):
                raise JournalBroken(f"{self.name} is damaged: {error.message}: {remedy(error.message)}") from error
            raise

    def _first_entries(self, tables: SqlTables, head: Head, opening: Opening) -> Ledger:
        """Those of this head's epoch, to be written. Raises JournalUnusable for a journal that is not what the mark says."""
        if (mark := opening.mark) is not None:
            check_mark(mark, head, tables.entries(mark.index, 1, payloads=False))
        settings = self._settings
        ledger = Ledger(head, Known(), opening.now_millis, self._secret, settings.signer)
        # What is derived from the entries depends on these.
        recorded = sequencer_pb2.OpenedPayload(digests_only=settings.digests_only)
        recorded.idempotency_ttl_millis = settings.idempotency_ttl_seconds * 1000
        ledger.open(opening.version, recorded)
        tables.record_earlier(ledger, head.index)
        return ledger

    # ---- reads

    def entries(self, from_index: int, limit: int, *, payloads: bool) -> list[Sealed]:
        return self._read(lambda tables: tables.entries(from_index, limit, payloads=payloads))

    def items(self, first: int, last: int, limit: int) -> list[ItemEntries]:
        return self._read(lambda tables: self._with_signed(tables, tables.items(first, last, limit)))

    def _with_signed(self, tables: SqlTables, items: list[ItemEntries]) -> list[ItemEntries]:
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
        covered = f"the signed head of entries {head.first_index} to {head.last_index} is damaged"
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

    @abstractmethod
    def drop(self, sequences: Sequence[int], reason: str, now_millis: int) -> int:
        """The payloads of these items' admissions and outcomes, for good, and a PRUNED entry that says so; how many there were.
        All of the items have ended."""

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[SqlTables]:
        """All that is read within it is of one moment. What is changed is undone."""

    @abstractmethod
    def changing(self) -> AbstractContextManager[SqlTables]:
        """All that is changed within it is durable at the end, or undone. No writer appends meanwhile."""

    @abstractmethod
    def importing(self, log: Log, writer: str, secret: bytes) -> AbstractContextManager[SqlTables]:
        """Makes an empty journal this log at the end, or leaves it empty. `writer`: its owner, where only one may write.
        `secret`: 32 random bytes, the log's from now on."""

    @abstractmethod
    def close(self) -> None: ...
