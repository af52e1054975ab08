"""The tables beside the record, made again from it and compared: `items` and `keys`, and the row of the log.

They say where to look in the entries, and nothing else. `Rebuilt` makes them in temporary tables, with the statements of a
writer where there are any: `items` shadows the table of that name. `batches` are the keys: with tenant and key where a prompt
of the batch is kept, and without them where it was dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from google.protobuf.message import DecodeError

from ostinato.chain import OUTCOMES, entry_hash, payload_digest
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.diagnosis import REBUILD, RESTORE
from sidecar.journal.ledger import ITEMS
from sidecar.journal.model import JournalUnusable, Log, Sealed
from sidecar.journal.sql import SqlTables
from sidecar.journal.store import BIND, END_KEYED

CHECKED_ENTRIES = 4_096
"""Of the newest entries a start checks hashes and tables, of the tables also those since the oldest unfinished item."""
PAYLOADS_READ = 64
"""Entries, with their payloads, that a start has in memory at a time."""
UNKNOWN = -1
"""When a key expires, if the epoch that ended its batch did not record how long it keeps keys."""

_ALONE = frozenset({types_pb2.ENTRY_KIND_OPENED, types_pb2.ENTRY_KIND_PRUNED})
"""Kinds whose entries change rows that earlier entries made."""

_BIND, _END = BIND.replace("INTO keys", "INTO batches"), END_KEYED.replace("UPDATE keys", "UPDATE batches")
_BIND_UNKNOWN = """INSERT INTO batches (first_sequence, count, unfinished)
  SELECT * FROM unnest(?::bigint[], ?::bigint[], ?::bigint[])"""
_PRUNE = """INSERT INTO pruned SELECT items.sequence FROM items, unnest(?::bigint[], ?::bigint[]) AS r (first, last)
  WHERE items.sequence BETWEEN r.first AND r.last AND items.outcome IS NOT NULL ON CONFLICT DO NOTHING"""

_OTHER_ITEM = """SELECT sequence FROM {main}.items AS there LEFT JOIN items AS made USING (sequence)
  WHERE sequence >= ? AND (made.sequence IS NULL OR {differs}) ORDER BY sequence LIMIT 1"""
_MISSING_ITEM = """SELECT sequence FROM items AS made LEFT JOIN {main}.items AS there USING (sequence)
  WHERE sequence >= ? AND there.sequence IS NULL ORDER BY sequence LIMIT 1"""
# A key may be bound for longer than it has to be, as after an import.
_OTHER_KEY = """SELECT first_sequence FROM {main}.keys AS there LEFT JOIN batches AS made USING (first_sequence)
  WHERE first_sequence >= ? AND (made.first_sequence IS NULL OR there.count <> made.count OR there.unfinished <> made.unfinished
    OR there.key <> made.key OR there.tenant <> made.tenant OR there.request_digest <> made.request_digest
    OR (there.expires_millis IS NOT NULL AND made.expires_millis IS NULL)
    OR (there.expires_millis <> made.expires_millis AND made.expires_millis >= 0))
  ORDER BY first_sequence LIMIT 1"""
_MISSING_KEY = """SELECT first_sequence FROM batches AS made LEFT JOIN {main}.keys AS there USING (first_sequence)
  WHERE first_sequence >= ? AND there.first_sequence IS NULL AND made.key IS NOT NULL
    AND (made.unfinished > 0 OR made.expires_millis > ?) ORDER BY first_sequence LIMIT 1"""
_UNPRUNED = """SELECT sequence FROM items WHERE NOT EXISTS (SELECT 1 FROM pruned WHERE pruned.sequence = items.sequence) AND (
    NOT EXISTS (SELECT 1 FROM payloads WHERE entry_index = admitted)
    OR (outcome IS NOT NULL AND NOT EXISTS (SELECT 1 FROM payloads WHERE entry_index = outcome)))
  ORDER BY sequence LIMIT 1"""
_OLDEST_UNFINISHED = "SELECT sequence, admitted FROM items WHERE outcome IS NULL ORDER BY sequence LIMIT 1"

_REPAIR_ITEMS = ("DELETE FROM {main}.items", "INSERT INTO {main}.items ({columns}) SELECT {columns} FROM items")
_REPAIR_KEYS = (
    "UPDATE batches SET bound = 1 WHERE first_sequence IN (SELECT first_sequence FROM {main}.keys)",
    # The names of keys whose prompts were dropped are only there.
    "DELETE FROM {main}.keys WHERE first_sequence NOT IN (SELECT first_sequence FROM batches WHERE key IS NULL)",
    """DELETE FROM {main}.keys WHERE EXISTS
      (SELECT 1 FROM batches AS made WHERE made.key = keys.key AND made.tenant = keys.tenant)""",
    """UPDATE {main}.keys SET count = made.count, unfinished = made.unfinished,
        expires_millis = CASE WHEN made.expires_millis >= 0 THEN made.expires_millis END
      FROM batches AS made WHERE made.first_sequence = keys.first_sequence""",
)
_BIND_AGAIN = """INSERT INTO {main}.keys (first_sequence, count, request_digest, tenant, key, unfinished, expires_millis)
  SELECT first_sequence, count, request_digest, tenant, key, unfinished, CASE WHEN expires_millis >= 0 THEN expires_millis END
  FROM batches WHERE key IS NOT NULL AND (bound = 1 OR unfinished > 0 OR expires_millis > ?)"""


_BATCHES = """CREATE TEMP TABLE batches (
  first_sequence {int} PRIMARY KEY, count {int} NOT NULL, unfinished {int} NOT NULL, request_digest {bytes},
  tenant {name}, key {name}, expires_millis {int}, bound {int} NOT NULL DEFAULT 0, UNIQUE (key, tenant))"""
_PRUNED = "CREATE TEMP TABLE pruned (sequence {int} PRIMARY KEY)"


@contextmanager
def rebuilding(tables: SqlTables) -> Iterator[Rebuilt]:
    """In the transaction that is open, which must be undone after an error. Until the end, `items` of these tables is the one
    that is made."""
    main = tables.shadow_items()
    for statement in (_BATCHES, _PRUNED):
        tables.execute(statement.format(**tables.dialect))
    yield Rebuilt(tables, main)
    for name in ("items", "batches", "pruned"):
        tables.execute(f"DROP TABLE {tables.dialect['temp']}.{name}")


class Rebuilt:
    """The tables, made of entries that are added in order: of all, or of the newest."""

    def __init__(self, tables: SqlTables, main: str) -> None:
        self._tables, self._main = tables, main
        self.epochs: dict[str, int] = {}
        """The newest epoch of each writer."""
        self.last_sequence: int | None = None
        """None: no entry that was added says it."""
        self._newest: Sealed | None = None
        self._first: int | None = None
        """The first sequence of the first whole batch."""
        self._newest_millis = self._lost_sequence = 0
        self._opened: dict[str, sequencer_pb2.OpenedPayload] = {}
        """The newest of each writer."""
        self._batch: list[Sealed] = []
        """Of the batch whose items are being added: its first, and the first that has its payload."""

    def add(self, entries: Sequence[Sealed]) -> None:
        """The next entries, with the payloads that `needs_payload` says, if they are kept."""
        self._newest = entries[-1]
        for kind, group in groupby(entries, key=lambda entry: entry.header.kind if entry.header.kind in _ALONE else None):
            consecutive = list(group)
            for header in (entry.header for entry in consecutive):
                self.epochs[header.writer] = header.epoch
                self._newest_millis = max(self._newest_millis, header.time_unix_millis)
                if header.kind == types_pb2.ENTRY_KIND_ADMITTED:
                    self.last_sequence = header.sequence
                elif header.kind == types_pb2.ENTRY_KIND_LOST:
                    self.last_sequence = self._lost_sequence = header.first_sequence + header.count - 1
            if kind == types_pb2.ENTRY_KIND_OPENED:
                for entry in consecutive:
                    self._opened[entry.header.writer] = sequencer_pb2.OpenedPayload.FromString(entry.payload)
                    self._tables.reopen(entry)
            elif kind == types_pb2.ENTRY_KIND_PRUNED:
                payloads = [sequencer_pb2.PrunedPayload.FromString(entry.payload) for entry in consecutive]
                self._tables.each(_PRUNE, [(each.first, each.last) for payload in payloads for each in payload.ranges])
            else:
                self._add_items(consecutive)

    def _add_items(self, entries: Sequence[Sealed]) -> None:
        tables = self._tables
        tables.index(entries)
        bound, unknown = dict[tuple[str, str], tuple[object, ...]](), list[tuple[object, ...]]()
        for entry in entries:
            header = entry.header
            if header.kind != types_pb2.ENTRY_KIND_ADMITTED:
                continue
            if header.sequence == header.first_sequence:
                self._first, self._batch = self._first or header.sequence, [entry]
            elif self._batch and not self._batch[-1].payload and entry.payload:
                self._batch.append(entry)
            if self._batch and header.sequence == header.first_sequence + header.count - 1:
                first, count = header.first_sequence, header.count
                if not self._batch[-1].payload:
                    unknown.append((first, count, count))
                else:
                    given = sequencer_pb2.AdmittedPayload.FromString(self._batch[-1].payload)
                    if given.idempotency_key:
                        names = given.tenant, given.idempotency_key
                        bound[names] = (first, count, given.request_digest, *names, count)
        tables.each(_BIND, list(bound.values()))
        tables.each(_BIND_UNKNOWN, unknown)
        ended, expires, dropped = Counter[int](), dict[int, int](), list[tuple[int, int]]()
        for header, payload in ((entry.header, entry.payload) for entry in entries if entry.header.kind in OUTCOMES):
            opened = self._opened.get(header.writer, sequencer_pb2.OpenedPayload())
            ended[header.first_sequence] += 1
            known = opened.HasField("idempotency_ttl_millis")
            expires[header.first_sequence] = header.time_unix_millis + opened.idempotency_ttl_millis if known else UNKNOWN
            if opened.digests_only and not payload:
                dropped.append((header.sequence, header.sequence))
        tables.each(_END, [(first, count, expires[first]) for first, count in ended.items()])
        tables.each(_PRUNE, dropped)

    def fault(self, log: Log, *, whole: bool) -> str:
        """Where the tables are not what the entries say; empty: nowhere. `whole`: all entries were added."""
        newest = self._newest
        end = (newest.header.log_id, newest.header.index, newest.entry_hash) if newest is not None else None
        if whole and (log.log_id, log.index, log.entry_hash) != end:
            return f"the log is {log.log_id} to entry {log.index}, and that is not the newest entry"
        for writer, epoch in log.writers.items():
            if (found := self.epochs.get(writer, 0 if whole else epoch)) != epoch:
                return f"writer {writer!r} has epoch {epoch}, and its newest entry {found}"
        last_sequence = self.last_sequence or 0 if whole else self.last_sequence
        if last_sequence not in (None, log.last_sequence):
            return f"the last sequence is {log.last_sequence}, and that of the entries {last_sequence}"
        if self._first is None and not whole:
            return ""
        first = 0 if whole or self._first is None else self._first
        return (
            self._found(_OTHER_ITEM, "table items: the row of sequence {} is not what the entries say", first)
            or self._found(_MISSING_ITEM, "table items: sequence {} has no row", first)
            or self._found(_OTHER_KEY, "table keys: the row of the batch from sequence {} is not what the entries say", first)
            or self._found(
                _MISSING_KEY, "table keys: the key of the batch from sequence {} is not bound", first, self._newest_millis
            )
        )

    def missing_payload(self) -> str:
        """One that is missing, without an entry that says so; empty: none. All entries were added. Of a log without forms
        nothing: it does not record what it drops."""
        if self._newest is None or not self._newest.header.form:
            return ""
        return self._found(_UNPRUNED, "a payload of sequence {} is missing, and no PRUNED entry says so")

    def _found(self, statement: str, what: str, *parameters: object) -> str:
        text = statement.replace("{main}", self._main).replace("{differs}", self._tables.items_differ)
        return next((what.format(sequence) for (sequence,) in self._tables.select(text, *parameters)), "")

    def write_items(self) -> None:
        """Put the items that were made in the place of those that are there."""
        self._repair(_REPAIR_ITEMS)

    def repair(self) -> None:
        """Put what was made in the place of what is there. All entries were added."""
        self.write_items()
        self._repair(_REPAIR_KEYS)
        self._tables.execute(_BIND_AGAIN.replace("{main}", self._main), self._newest_millis)
        self._tables.repair_log(self.epochs, self.last_sequence or 0, self._lost_sequence)

    def _repair(self, statements: Sequence[str]) -> None:
        columns = ", ".join(self._tables.item_columns)
        for statement in statements:
            self._tables.execute(statement.replace("{main}", self._main).replace("{columns}", columns))


LACKS = "payload: is missing, and none of this kind is ever dropped"


def lacks_payload(entry: Sealed) -> bool:
    """Whether its payload is missing and is no item's, which may be dropped."""
    header = entry.header
    return not entry.payload and header.kind not in ITEMS and header.payload_digest != payload_digest(b"")


def needs_payload(header: types_pb2.EntryHeader) -> bool:
    """Whether the tables depend on the entry's payload: of a batch, on that of its first item."""
    first = header.kind == types_pb2.ENTRY_KIND_ADMITTED and header.sequence == header.first_sequence
    return first or header.kind in (types_pb2.ENTRY_KIND_OPENED, types_pb2.ENTRY_KIND_AUDITED)


def check_unfinished(unfinished: Iterable[Sealed]) -> None:
    """Raises JournalUnusable for an item that is not what was admitted: it is about to run again."""
    for entry in unfinished:
        header, sound = entry.header, entry_hash(entry.previous_hash, entry.header) == entry.entry_hash
        sound = sound and payload_digest(entry.payload) == header.payload_digest
        if not sound or header.kind != types_pb2.ENTRY_KIND_ADMITTED:
            raise JournalUnusable(f"entry {header.index} is damaged, and its item has not ended: {RESTORE}")


def check_recent(tables: SqlTables, log: Log) -> None:
    """Check the newest entries, and what the tables say of them: those since the oldest unfinished item, and CHECKED_ENTRIES at
    least. In the transaction that is open. Raises JournalUnusable."""
    if fault := _recent_fault(tables, log):
        raise JournalUnusable(f"its tables are damaged: {fault}: {REBUILD}")


def _recent_fault(tables: SqlTables, log: Log) -> str:
    """Of the tables; empty: nothing was found. Raises JournalUnusable for an entry that is damaged or lacks its payload."""
    index = max(1, log.index - CHECKED_ENTRIES + 1)
    for sequence, admitted in tables.select(_OLDEST_UNFINISHED):
        oldest = tables.entries(admitted, 1, payloads=False)
        if not oldest or (header := oldest[0].header).kind != types_pb2.ENTRY_KIND_ADMITTED or header.sequence != sequence:
            return f"table items: entry {admitted} does not admit sequence {sequence}"
        index = min(index, admitted - (sequence - header.first_sequence))
    try:
        with rebuilding(tables) as rebuilt:
            while page := tables.entries(index, PAYLOADS_READ, payloads=False):
                page = tables.with_payloads(page, needs_payload)
                for entry in page:
                    _check_entry(entry, index, log)
                    index += 1
                rebuilt.add(page)
            if index <= log.index:
                raise JournalUnusable(f"entry {index} is damaged or missing: {RESTORE}")
            return rebuilt.fault(log, whole=False)
    except DecodeError:
        return f"entry {index} or one of the next: its payload cannot be read"


def _check_entry(entry: Sealed, index: int, log: Log) -> None:
    """Raises JournalUnusable if it is not the log's entry of this index, or lacks a payload that the tables depend on."""
    header, wrong_end = entry.header, index == log.index and entry.entry_hash != log.entry_hash
    if header.index != index or wrong_end or entry_hash(entry.previous_hash, header) != entry.entry_hash:
        raise JournalUnusable(f"entry {index} is damaged or missing: {RESTORE}")
    if header.log_id != log.log_id:
        raise JournalUnusable(f"table journal is damaged: it names log {log.log_id!r}, and entry {index} another: {RESTORE}")
    if needs_payload(header) and lacks_payload(entry):
        raise JournalUnusable(f"entry {index}: {LACKS}: {RESTORE}")
