"""Maintenance of a journal, without an epoch: verify it, and drop payloads."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ostinato.chain import OUTCOMES, PAYLOADS, check_link, check_nonce, sealed_input, sealed_output
from ostinato.signature import PublicKeys, SignedTree
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.derived import LACKS, lacks_payload, rebuilding
from sidecar.journal.diagnosis import RESTORE
from sidecar.journal.model import JournalUnusable, Sealed, Signature
from sidecar.journal.sql import SqlStore, SqlTables
from sidecar.journal.store import PAGE

MISSING = "its payload is missing, and its item has not ended"


@dataclass(frozen=True, slots=True)
class Checked:
    """How far a verification has come, and the faults since the last one."""

    index: int
    """Of the last entry that was checked."""
    faults: tuple[str, ...]
    """Each begins with the entry's index and kind, `entry 7, ADMITTED:`, or with the table."""
    tables: bool = False
    """Whether they are of the tables, and every entry is sound."""


def verify(
    read: Callable[[int, int], Sequence[Sealed]], on_page: Callable[[Sequence[Sealed]], None] = lambda page: None
) -> Iterator[Checked]:
    """Check all entries, page by page. `read` takes an index and a limit and returns the entries from there, if any. `on_page`
    is given each page up to the first fault."""
    checker, index, sound = Checker(), 0, True
    while page := read(index + 1, PAGE):
        faults = [f"{name_of(sealed.header)}: {fault}" for sealed in page for fault in checker.check(sealed)]
        index = max(index + len(page), page[-1].header.index)  # an index may be what is damaged
        if sound := sound and not faults:
            on_page(page)
        yield Checked(index, tuple(faults))
    if checker.missing:
        yield Checked(index, tuple(f"entry {entry}, ADMITTED: {MISSING}" for entry in checker.missing.values()))


def verify_all(store: SqlStore) -> Generator[Checked]:
    """Check all entries, and then, if they are sound, the tables beside them. To be closed."""
    with store.snapshot() as tables:
        log, sound = tables.log(), True
        with rebuilding(tables) as rebuilt:
            for checked in verify(lambda index, limit: tables.entries(index, limit, payloads=True), rebuilt.add):
                sound = sound and not checked.faults
                yield checked
            if sound and log is not None and (found := tuple(rebuilt.faults(log, whole=True))):
                yield Checked(log.index, found, tables=True)
            elif sound and log is not None and (found := tuple(rebuilt.missing_payloads())):
                yield Checked(log.index, found)


def rebuild(store: SqlStore) -> None:
    """Make the tables beside the entries again. Raises JournalUnusable, and changes nothing, if an entry is not sound."""
    with store.changing() as tables, rebuilding(tables) as rebuilt:
        for page in pages(tables.entries, store.name, payloads=True):
            rebuilt.add(page)
        rebuilt.repair()


def signatures_of(read: Callable[[int, int], Sequence[Signature]]) -> Iterator[Signature]:
    """All of them, by last index, ascending. `read` takes an index and a limit."""
    index = 1
    while page := read(index, PAGE):
        yield from page
        index = page[-1].last_index + 1


def check_signatures(signatures: Sequence[Signature], last_index: int) -> None:
    """Raises ValueError if they are not of transactions that come one after the other, up to this index."""
    before = 0
    for each in signatures:
        if not before < each.first_index <= each.last_index <= last_index:
            raise ValueError(f"head of entries {each.first_index} to {each.last_index}: they are no transaction of this log")
        before = each.last_index


@dataclass(slots=True)
class Heads:
    """What a verification of the signed heads has found."""

    verified: Counter[str]
    """Heads by key id, for each key that was given."""
    entries: int = 0
    """Entries that they cover."""
    fault: str = ""
    """What is wrong with a head, or where one is missing; empty: nothing."""
    foreign: str = ""
    """The first epoch or head of a key that was not given, if some were; empty: none."""


def verify_heads(tables: SqlTables, keys: PublicKeys) -> Heads:
    """Verify the signed heads of sound entries. If there are keys, each epoch and head that is signed must be of one of them.
    Without keys, no signature is verified."""
    heads = Heads(Counter(dict.fromkeys(keys, 0)))

    def opened(header: types_pb2.EntryHeader, key_id: str) -> None:
        if len(keys) and key_id and key_id not in keys:
            heads.foreign = heads.foreign or f"{name_of(header)}: its epoch is signed by key {key_id}, which was not given"

    log, before = tables.log(), Signature(0, 0, "", b"")
    for each in signatures_of(tables.signatures):
        name = f"head of entries {each.first_index} to {each.last_index}"
        try:
            check_signatures([before, each] if before.last_index else [each], log.index if log is not None else 0)
        except ValueError as error:
            heads.fault = str(error)
            return heads
        before = each
        if each.key_id in keys:
            covered = tables.entries(each.first_index, each.last_index + 1 - each.first_index, payloads=False)
            tree, hashes = SignedTree(), [entry.entry_hash for entry in covered]
            tree.restore(covered[0].header.log_id, each.first_index, hashes, each.key_id, each.signature)
            if not keys.verify(tree.head):
                heads.fault = f"{name}: its signature is not by key {each.key_id}"
                return heads
            heads.verified[each.key_id] += 1
            heads.entries += len(covered)
        elif len(keys):
            heads.foreign = heads.foreign or f"{name}: it is signed by key {each.key_id}, which was not given"
    heads.fault = unsigned_fault(tables, opened)
    return heads


def unsigned_fault(
    tables: SqlTables, on_opened: Callable[[types_pb2.EntryHeader, str], None] = lambda header, key_id: None
) -> str:
    """The first entry that no head covers, or one of another key, although its epoch's OPENED entry names a key; empty: none.
    `on_opened` is given each OPENED entry up to it, and the id of that key.

    PRUNED entries are not counted: commands make them, without the key. Nor are those before a LOST entry and its epoch: the
    end of a transaction may be what was lost, and its head with it."""
    heads, signing, fault, last = signatures_of(tables.signatures), dict[str, str](), "", 0
    head, index = next(heads, None), 1
    while page := tables.entries(index, PAGE, payloads=False):
        for entry in tables.with_payloads(page, lambda header: header.kind == types_pb2.ENTRY_KIND_OPENED):
            header = entry.header
            if header.kind == types_pb2.ENTRY_KIND_OPENED:
                signing[header.writer] = sequencer_pb2.OpenedPayload.FromString(entry.payload).signing_key_id
                on_opened(header, signing[header.writer])
            while head is not None and head.last_index < header.index:
                head = next(heads, None)
            covering = head.key_id if head is not None and head.first_index <= header.index else ""
            key_id = signing.get(header.writer, "")
            if key_id and covering != key_id and header.kind != types_pb2.ENTRY_KIND_PRUNED:
                fault, last = fault or f"{name_of(header)}: no signed head of key {key_id} covers it", header.index
            elif fault and header.kind == types_pb2.ENTRY_KIND_LOST and header.index == last + 2:
                fault = ""
            elif fault and header.index > last + 1:
                return fault
        index += len(page)
    return fault


def name_of(header: types_pb2.EntryHeader) -> str:
    """`entry 7, ADMITTED`."""
    kinds = types_pb2.EntryKind
    kind = kinds.Name(header.kind).removeprefix("ENTRY_KIND_") if header.kind in kinds.values() else f"kind {header.kind}"
    return f"entry {header.index}, {kind}"


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
        self.epochs: dict[str, int] = {}
        """The newest epoch of each writer."""
        self._previous: sequencer_pb2.Entry | None = None
        self._formless: int | None = None
        """Index of the newest entry without a form."""
        self._batch: tuple[int, int, int] | None = None
        """First sequence, count and position of the next entry, within a batch."""

    @property
    def whole(self) -> bool:
        """Whether the last batch is complete."""
        return self._batch is None

    def check(self, sealed: Sealed) -> list[str]:
        """The faults of the next entry."""
        previous = self._previous
        entry = sequencer_pb2.Entry(header=sealed.header, entry_hash=sealed.entry_hash, payload=sealed.payload)
        self._previous = entry
        faults = check_link(previous, entry)
        if sealed.header.kind == types_pb2.ENTRY_KIND_ADMITTED and not sealed.payload:
            self.missing[sealed.header.sequence] = sealed.header.index
        elif sealed.header.kind in OUTCOMES:
            kept = self.missing.pop(sealed.header.sequence, None) is None
            if kept != bool(sealed.payload):
                faults.append("payload: it and that of its item are kept or dropped together, and one is missing")
        elif self._payloads and lacks_payload(sealed):
            faults.append(LACKS)
        if previous is not None and sealed.previous_hash != previous.entry_hash:
            faults.append("previous_hash: is not the hash of the entry before")
        for check in (self._check_epoch, self._check_sequence, self._check_batch):
            faults += check(sealed.header)
        faults += self._check_prune(sealed)
        return faults + _check_payload(sealed)

    def _check_epoch(self, header: types_pb2.EntryHeader) -> list[str]:
        newest = self.epochs.get(header.writer, 0)
        if header.kind == types_pb2.ENTRY_KIND_OPENED:
            self.epochs[header.writer] = max(newest, header.epoch)
            return [] if header.epoch > newest else [f"epoch: opens {header.epoch} after {newest}"]
        return [] if header.epoch == newest else [f"epoch: {header.epoch}, and the writer's newest is {newest}"]

    def _check_sequence(self, header: types_pb2.EntryHeader) -> list[str]:
        if header.kind == types_pb2.ENTRY_KIND_ADMITTED:
            self.unfinished.add(header.sequence)
            expected, self.last_sequence = self.last_sequence + 1, max(self.last_sequence, header.sequence)
            return [] if header.sequence == expected else [f"sequence: {header.sequence} instead of {expected}"]
        if header.kind == types_pb2.ENTRY_KIND_LOST:
            expected, self.last_sequence = self.last_sequence + 1, header.first_sequence + header.count - 1
            return (
                [] if header.first_sequence == expected else [f"first_sequence: {header.first_sequence} instead of {expected}"]
            )
        if header.kind not in OUTCOMES:
            return []
        if header.sequence not in self.unfinished:
            return [f"sequence: {header.sequence} was not admitted, or had ended before"]
        self.unfinished.remove(header.sequence)
        return []

    def _check_prune(self, sealed: Sealed) -> list[str]:
        """What was dropped before prunes were recorded can only be said right after the entries of that time."""
        if not sealed.header.form:
            self._formless = sealed.header.index
        if sealed.header.kind != types_pb2.ENTRY_KIND_PRUNED:
            return []
        with suppress(DecodeError):
            earlier = sequencer_pb2.PrunedPayload.FromString(sealed.payload).reason == "earlier"
            if earlier and (self._formless is None or sealed.header.index > self._formless + 2):  # an OPENED entry between them
                return ["payload: says that it is of an earlier version, and the entries before are not"]
        return []

    def _check_batch(self, header: types_pb2.EntryHeader) -> list[str]:
        """A batch's entries stand together: each but the last is followed by the next of the same batch."""
        expected, self._batch = self._batch, None
        admitted = header.kind == types_pb2.ENTRY_KIND_ADMITTED
        position = header.sequence - header.first_sequence
        if admitted and position + 1 < header.count:
            self._batch = (header.first_sequence, header.count, position + 1)
        found = (header.first_sequence, header.count, position) if admitted else None
        begins = found is None or position == 0
        return [] if found == expected or (expected is None and begins) else ["batch: is not whole"]


def _check_payload(sealed: Sealed) -> list[str]:
    """Where a payload and its header contradict each other."""
    header, claims = sealed.header, dict[str, object]()
    if not sealed.payload or header.kind not in PAYLOADS:
        return []
    try:
        payload = PAYLOADS[header.kind].FromString(sealed.payload)
        if isinstance(payload, sequencer_pb2.AdmittedPayload):
            claims = {"seed": payload.seed, "input_digest": sealed_input(header.form, payload)}
        elif isinstance(payload, sequencer_pb2.CompletedPayload):
            claims = {"seed": payload.output.seed, "grade": payload.output.grade}
            claims |= sealed_output(header.form, payload.nonce, payload.output)
    except DecodeError:
        return ["payload: cannot be read"]
    except (AssertionError, struct.error):
        return ["payload: no digest can be taken of it, it holds NaN or a negative number"]
    faults = [f"{name}: is not the payload's" for name, actual in claims.items() if getattr(header, name) != actual]
    return check_nonce(header.form, payload.nonce) + faults


def pages(read: Callable[..., Sequence[Sealed]], name: str, *, payloads: bool) -> Iterator[Sequence[Sealed]]:
    """All entries. `read` is `entries` of the store or its tables, `name` the store's. Raises JournalUnusable for the first
    that is damaged: neither it nor what follows can be trusted."""
    checker, index = Checker(payloads=payloads), 1
    while page := read(index, PAGE, payloads=payloads):
        for sealed in page:
            if faults := checker.check(sealed):
                raise JournalUnusable(f"{name} is damaged: {name_of(sealed.header)}: {'; '.join(faults)}: {RESTORE}")
        yield page
        index += len(page)


def prune(store: SqlStore, old: Callable[[types_pb2.EntryHeader], bool], now_millis: int) -> Iterator[tuple[int, int]]:
    """Drop the payloads of items whose outcome is old. Yields, for each page, its last index and the payloads dropped."""
    for page in pages(store.entries, store.name, payloads=False):
        ended = [entry.header for entry in page if entry.header.kind in OUTCOMES]
        kept = store.kept([header.sequence for header in ended if old(header)])
        yield page[-1].header.index, store.drop(kept, "age", now_millis)
    store.forget(())


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
    store.forget(wanted)
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
