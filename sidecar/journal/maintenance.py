"""Maintenance of a journal, without an epoch: verify it, make its tables again, and drop payloads."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from google.protobuf.message import DecodeError

from ostinato import enums
from ostinato.chain import OUTCOMES, PAYLOADS, check_link, check_nonce, sealed_input, sealed_output
from ostinato.signature import PublicKeys, SignedTree
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.derived import LACKS, lacks_payload, rebuilding
from sidecar.journal.diagnosis import REBUILD, RESTORE
from sidecar.journal.model import JournalUnusable, Sealed, Signature
from sidecar.journal.sql import SqlStore, SqlTables
from sidecar.journal.store import PAGE


class Unsound(JournalUnusable):
    """A fault was found. It begins with the entry's index and kind, `entry 7, ADMITTED:`, or with the table."""

    def __init__(self, name: str, fault: str, remedy: str = RESTORE) -> None:
        super().__init__(f"{name} is damaged: {fault}: {remedy}")
        self.fault = fault


def pages(read: Callable[..., Sequence[Sealed]], name: str, *, payloads: bool = True) -> Iterator[Sequence[Sealed]]:
    """All entries. `read` is `entries` of the store or its tables, `name` the store's. Raises Unsound for the first that is
    damaged: neither it nor what follows can be trusted."""
    checker, index = Checker(payloads=payloads), 1
    while page := read(index, PAGE, payloads=payloads):
        for sealed in page:
            if faults := checker.check(sealed):
                raise Unsound(name, f"{name_of(sealed.header)}: {'; '.join(faults)}; entries to {index - 1} are sound")
            index += 1
        yield page
    for entry in checker.missing.values() if payloads else ():
        raise Unsound(name, f"entry {entry}, ADMITTED: its payload is missing, and its item has not ended")


def verify(store: SqlStore, keys: PublicKeys, on_page: Callable[[int], None]) -> Heads:
    """Check all entries, the tables beside them, and the signed heads. `on_page` is given the last index of each page. Raises
    Unsound, and JournalUnusable for the log of another key."""
    with store.snapshot() as tables:
        log = tables.log()
        heads = Heads(signatures_of(tables), keys, log.index if log is not None else 0)
        with rebuilding(tables) as rebuilt:
            for page in pages(tables.entries, store.name):
                rebuilt.add(page)
                heads.add(page)
                on_page(page[-1].header.index)
            if log is not None and (fault := rebuilt.fault(log, whole=True)):
                raise Unsound(store.name, fault, REBUILD)
            missing = rebuilt.missing_payload()
        tables.notes("")  # raises an error if they cannot be read
    if fault := missing or store.structure() or heads.fault:
        raise Unsound(store.name, fault)
    if heads.foreign:
        raise JournalUnusable(
            f"{store.name} is not the log of this key: {heads.foreign}: "
            f"if the log has had that key, give it as another --key; otherwise {RESTORE}"
        )
    if keys and heads.index and not heads.verified.total():
        raise JournalUnusable(f"{store.name}: no head of it is signed by key {' or '.join(keys)}")
    return heads


def rebuild(store: SqlStore) -> None:
    """Make the tables beside the entries again. Raises Unsound, and changes nothing, if an entry is not sound."""
    with store.changing() as tables, rebuilding(tables) as rebuilt:
        for page in pages(tables.entries, store.name):
            rebuilt.add(page)
        rebuilt.repair()


def signatures_of(tables: SqlTables) -> Iterator[Signature]:
    """All of them, by last index, ascending."""
    index = 1
    while page := tables.signatures(index, PAGE):
        yield from page
        index = page[-1].last_index + 1


class Heads:
    """Checks the signed heads beside sound entries, which are added in order.

    If there are keys, their signatures are verified, and each epoch and head that is signed must be of one of them. An entry
    must be covered by a head of the key that its epoch's OPENED entry names, if it names one. PRUNED entries need none:
    commands make them, without the key. Nor do those before a LOST entry and its epoch: the end of a transaction may be what
    was lost, and its head with it.
    """

    def __init__(self, signatures: Iterator[Signature], keys: PublicKeys, last_index: int) -> None:
        """`last_index`: of the log."""
        self._signatures, self._keys, self._last_index = signatures, keys, last_index
        self.verified = Counter(dict.fromkeys(keys, 0))
        """Heads by key id, for each key that was given."""
        self.index = 0
        """Of the newest entry that was added."""
        self.covered = 0
        """Entries that the verified heads cover."""
        self.foreign = ""
        """The first epoch or head of a key that was not given, if some were; empty: none."""
        self._fault = self._uncovered = ""
        self._uncovered_index = 0
        """Of the newest entry that no head covers."""
        self._signing_key: dict[str, str] = {}
        """The key id of each writer's epoch."""
        self._hashes: list[bytes] = []
        """Of the entries so far that the next head covers."""
        self._head = self._next_head()

    @property
    def fault(self) -> str:
        """What is wrong with a head, or the first entry that should be covered and is not; empty: nothing."""
        return self._fault or self._uncovered

    def add(self, entries: Sequence[Sealed]) -> None:
        for entry in entries:
            header = entry.header
            self.index = header.index
            head = self._head if self._head is not None and self._head.first_index <= header.index else None
            if head is not None:
                self._hashes.append(entry.entry_hash)
                if head.last_index == header.index:
                    self._end_head(head, header.log_id)
            if header.kind == types_pb2.ENTRY_KIND_OPENED:
                key_id = sequencer_pb2.OpenedPayload.FromString(entry.payload).signing_key_id
                self._signing_key[header.writer] = key_id
                if key_id:
                    self._check_key(f"{name_of(header)}: its epoch", key_id)
            self._check_covered(header, head.key_id if head is not None else "")

    def _next_head(self) -> Signature | None:
        """Heads are of transactions that come one after the other."""
        head = next(self._signatures, None)
        if head is not None and not self.index < head.first_index <= head.last_index <= self._last_index:
            self._fault = f"{_name_of_head(head)}: they are no transaction of this log"
            return None
        return head

    def _end_head(self, head: Signature, log_id: str) -> None:
        if head.key_id in self._keys:
            tree = SignedTree()
            tree.restore(log_id, head.first_index, self._hashes, head.key_id, head.signature)
            if not self._keys.verify(tree.head):
                self._fault = self._fault or f"{_name_of_head(head)}: its signature is not by key {head.key_id}"
            self.verified[head.key_id] += 1
            self.covered += len(self._hashes)
        self._check_key(f"{_name_of_head(head)}: it", head.key_id)
        self._hashes, self._head = [], self._next_head()

    def _check_key(self, signed: str, key_id: str) -> None:
        if self._keys and key_id not in self._keys:
            self.foreign = self.foreign or f"{signed} is signed by key {key_id}, which was not given"

    def _check_covered(self, header: types_pb2.EntryHeader, head_key_id: str) -> None:
        key_id = self._signing_key.get(header.writer, "")
        if key_id and head_key_id != key_id and header.kind != types_pb2.ENTRY_KIND_PRUNED:
            self._uncovered = self._uncovered or f"{name_of(header)}: no signed head of key {key_id} covers it"
            self._uncovered_index = header.index
        elif self._uncovered and header.index == self._uncovered_index + 2:
            if header.kind != types_pb2.ENTRY_KIND_LOST:
                self._fault = self._fault or self._uncovered
            self._uncovered = ""


def _name_of_head(head: Signature) -> str:
    return f"head of entries {head.first_index} to {head.last_index}"


def name_of(header: types_pb2.EntryHeader) -> str:
    """`entry 7, ADMITTED`."""
    return f"entry {header.index}, {enums.word(types_pb2.EntryKind, header.kind)}"


class Checker:
    """Checks entries, in order, against the invariants of `ledger.Ledger`. `payloads`: the entries have them, if they are
    kept."""

    def __init__(self, *, payloads: bool = True) -> None:
        self._payloads = payloads
        self.unfinished: set[int] = set()
        """Sequences without an outcome so far."""
        self.missing: dict[int, int] = {}
        """Of them, those without a payload, with the index of their entry: a payload is dropped only after the outcome."""
        self.last_sequence = 0
        self._epochs: dict[str, int] = {}
        """The newest epoch of each writer."""
        self._previous: sequencer_pb2.Entry | None = None
        self._formless: int | None = None
        """Index of the newest entry without a form."""
        self._batch: tuple[int, int, int] | None = None
        """First sequence, count and position of the next entry, within a batch."""

    def check(self, sealed: Sealed) -> list[str]:
        """The faults of the next entry."""
        previous = self._previous
        self._previous = entry = sequencer_pb2.Entry(header=sealed.header, entry_hash=sealed.entry_hash, payload=sealed.payload)
        faults = check_link(previous, entry)
        if previous is not None and sealed.previous_hash != previous.entry_hash:
            faults.append("previous_hash: is not the hash of the entry before")
        for check in (self._epoch_faults, self._sequence_faults, self._batch_faults):
            faults += check(sealed.header)
        return [*faults, *self._payload_faults(sealed)]

    def _epoch_faults(self, header: types_pb2.EntryHeader) -> Iterator[str]:
        newest = self._epochs.get(header.writer, 0)
        if header.kind == types_pb2.ENTRY_KIND_OPENED:
            self._epochs[header.writer] = max(newest, header.epoch)
            if header.epoch <= newest:
                yield f"epoch: opens {header.epoch} after {newest}"
        elif header.epoch != newest:
            yield f"epoch: {header.epoch}, and the writer's newest is {newest}"

    def _sequence_faults(self, header: types_pb2.EntryHeader) -> Iterator[str]:
        expected = self.last_sequence + 1
        if header.kind == types_pb2.ENTRY_KIND_ADMITTED:
            self.unfinished.add(header.sequence)
            self.last_sequence = max(self.last_sequence, header.sequence)
            if header.sequence != expected:
                yield f"sequence: {header.sequence} instead of {expected}"
        elif header.kind == types_pb2.ENTRY_KIND_LOST:
            self.last_sequence = header.first_sequence + header.count - 1
            if header.first_sequence != expected:
                yield f"first_sequence: {header.first_sequence} instead of {expected}"
        elif header.kind in OUTCOMES:
            if header.sequence not in self.unfinished:
                yield f"sequence: {header.sequence} was not admitted, or had ended before"
            self.unfinished.discard(header.sequence)

    def _batch_faults(self, header: types_pb2.EntryHeader) -> Iterator[str]:
        """A batch's entries stand together: each but the last is followed by the next of the same batch."""
        expected, self._batch, found = self._batch, None, None
        if header.kind == types_pb2.ENTRY_KIND_ADMITTED:
            first, count, position = header.first_sequence, header.count, header.sequence - header.first_sequence
            found, expected = (first, count, position), expected or (first, count, 0)
            if position + 1 < count:
                self._batch = (first, count, position + 1)
        if found != expected:
            yield "batch: is not whole"

    def _payload_faults(self, sealed: Sealed) -> Iterator[str]:
        header = sealed.header
        if not header.form:
            self._formless = header.index
        if header.kind == types_pb2.ENTRY_KIND_ADMITTED and not sealed.payload:
            self.missing[header.sequence] = header.index
        elif header.kind in OUTCOMES:
            if (self.missing.pop(header.sequence, None) is None) != bool(sealed.payload):
                yield "payload: it and that of its item are kept or dropped together, and one is missing"
        elif self._payloads and lacks_payload(sealed):
            yield LACKS
        if not sealed.payload or header.kind not in PAYLOADS:
            return
        claims = dict[str, object]()
        try:
            payload = PAYLOADS[header.kind].FromString(sealed.payload)
            if isinstance(payload, sequencer_pb2.AdmittedPayload):
                claims = {"seed": payload.seed, "input_digest": sealed_input(header.form, payload)}
            elif isinstance(payload, sequencer_pb2.CompletedPayload):
                claims = {"seed": payload.output.seed, "grade": payload.output.grade}
                claims |= sealed_output(header.form, payload.nonce, payload.output)
        except DecodeError:
            yield "payload: cannot be read"
            return
        except (AssertionError, struct.error):
            yield "payload: no digest can be taken of it, it holds NaN or a negative number"
            return
        yield from check_nonce(header.form, payload.nonce)
        yield from (f"{name}: is not the payload's" for name, actual in claims.items() if getattr(header, name) != actual)
        # What was dropped before prunes were recorded is said right after the entries of that time and an OPENED entry.
        earlier = self._formless is not None and header.index <= self._formless + 2
        if isinstance(payload, sequencer_pb2.PrunedPayload) and payload.reason == "earlier" and not earlier:
            yield "payload: says that it is of an earlier version, and the entries before are not"


def prune(store: SqlStore, old: Callable[[types_pb2.EntryHeader], bool], now_millis: int) -> Iterator[tuple[int, int]]:
    """Drop the payloads of items whose outcome is old. Yields, for each page, its last index and the payloads dropped."""
    for page in pages(store.entries, store.name, payloads=False):
        ended = [entry.header for entry in page if entry.header.kind in OUTCOMES]
        with store.snapshot() as tables:
            kept = tables.kept([header.sequence for header in ended if old(header)])
        yield page[-1].header.index, store.drop(kept, "age", now_millis)
    with store.changing() as tables:
        tables.forget(())


def redact(store: SqlStore, sequences: Iterable[int], now_millis: int) -> int:
    """Drop the payloads of these items, whether they are kept or not; returns how many were. Raises JournalUnusable, and drops
    nothing, if one of them is unknown or has not ended."""
    wanted, gone = sorted(set(sequences)), set[int]()
    for sequence in wanted:
        found = store.items(sequence, sequence, 1)
        if not found:
            raise JournalUnusable(f"{store.name}: there is no sequence {sequence}")
        if found[0].outcome is None:
            raise JournalUnusable(f"{store.name}: sequence {sequence} has not ended: its payload is needed to finish it")
        if not found[0].admitted.payload and not found[0].outcome.payload:
            gone.add(sequence)
    with store.changing() as tables:
        tables.forget(wanted)
    told = _pruned(store, gone) if gone else gone  # of what was deleted beside the programs the entry has yet to say it
    return store.drop([sequence for sequence in wanted if sequence not in told], "request", now_millis)


def _pruned(store: SqlStore, sequences: set[int]) -> set[int]:
    """Those of the sequences that a PRUNED entry names."""
    named, index = set[int](), 1
    while page := store.entries(index, PAGE, payloads=False):
        for header in (entry.header for entry in page if entry.header.kind == types_pb2.ENTRY_KIND_PRUNED):
            with suppress(DecodeError):
                (entry,) = store.entries(header.index, 1, payloads=True)
                ranges = sequencer_pb2.PrunedPayload.FromString(entry.payload).ranges
                named |= {each for each in sequences if any(run.first <= each <= run.last for run in ranges)}
        index += len(page)
    return named
