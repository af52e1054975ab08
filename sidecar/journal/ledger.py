"""Turns drafts into entries: numbered, chained, each with its digests.

Here an item gets its sequence number, and here it is decided which outcome counts and what an idempotency key stands for. The
ledger is pure: what the journal holds, its secret and the time are arguments. A store opens a transaction, reads the `Known`
that `needs` asks for, lets a `Ledger` append, writes the result and commits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

from google.protobuf.message import DecodeError
from msgspec.structs import replace

from ostinato.chain import (
    FORM,
    NONCE_BYTES,
    OUTCOMES,
    SEQUENCE_MAX,
    Payload,
    entry_hash,
    payload_digest,
    sealed,
    sealed_output,
)
from ostinato.compare import Side, compare
from ostinato.digest import DIGEST_BYTES, input_digest, output_digest, u64
from ostinato.signature import SignedTree, Signer
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.model import (
    WITNESSED,
    Admission,
    Appended,
    Audit,
    Binding,
    Draft,
    Head,
    Loss,
    Note,
    Outcome,
    Sealed,
    Twin,
    Witnessed,
)

SECRET_BYTES = 32


def keyed(secret: bytes, purpose: str, message: bytes) -> bytes:
    """Keyed BLAKE2b of the message, 32 bytes. The key is the log's secret, which the journal keeps and never shows."""
    assert len(secret) == SECRET_BYTES
    return blake2b(message, digest_size=32, key=secret, person=purpose.encode()).digest()


def twins_of(group: str, bare_input_digest: bytes) -> bytes:
    """What items have in common whose outputs should be equal. `group`: of tenants that are compared with each other."""
    return bare_input_digest + group.encode()


@lru_cache(maxsize=512)  # a transaction needs each twice: for what it reads, and for what it appends
def twins_tag(secret: bytes, twins: bytes) -> bytes:
    """The name of `twins_of` in the journal. Without the secret it tests no guess."""
    return keyed(secret, "twins", twins)


@dataclass(frozen=True, slots=True)
class Needs:
    """What has to be read before a group of drafts can be appended."""

    keys: frozenset[tuple[str, str]]
    """Tenant and key of each keyed admission."""
    sequences: frozenset[int]
    """Of the items that outcomes are about."""
    twins: frozenset[bytes]
    """Tags of the items that have completed."""
    fingerprint_digests: frozenset[bytes]
    """Of the service instances that completed them."""
    witnessed: frozenset[str]
    """The ids of other logs whose heads are to be recorded."""


@dataclass(frozen=True, slots=True)
class Known:
    """The answer to `Needs`, read in the transaction that appends."""

    bindings: Mapping[tuple[str, str], Binding] = field(default_factory=dict)
    """By tenant and key, without those that have expired."""
    unfinished: frozenset[int] = frozenset()
    """Those of the sequences that have no outcome."""
    twins: Mapping[bytes, tuple[Twin, ...]] = field(default_factory=dict)
    """By tag, the first COMPLETED entry of every fingerprint, ascending."""
    fingerprints: Mapping[bytes, Mapping[str, str]] = field(default_factory=dict)
    """By digest, the fields of the fingerprints that may have to be compared, as far as notes have them."""
    witnessed: Mapping[str, int] = field(default_factory=dict)
    """By log id, the index of the newest head that is recorded."""
    expired: tuple[range, ...] = ()
    """Sequences of batches whose keys have expired and whose payloads are to be dropped now."""
    damaged: Mapping[bytes, str] = field(default_factory=dict)
    """By tag, why an entry is not among the twins."""


def needs(drafts: Iterable[Draft], secret: bytes) -> Needs:
    drafts = tuple(drafts)
    outcomes = [draft for draft in drafts if isinstance(draft, Outcome)]
    completed = [outcome for outcome in outcomes if outcome.kind == types_pb2.ENTRY_KIND_COMPLETED]
    return Needs(
        frozenset((draft.tenant, draft.key) for draft in drafts if isinstance(draft, Admission) and draft.key),
        frozenset(outcome.admitted.sequence for outcome in outcomes),
        frozenset(twins_tag(secret, outcome.twins) for outcome in completed if outcome.twins),
        frozenset(outcome.fingerprint_digest for outcome in completed),
        frozenset(draft.head.log_id for draft in drafts if isinstance(draft, Witnessed)),
    )


NUMBER_MAX = 2**63 - 1
"""Indexes and sequences are uint64 in the contract and int64 in the databases; no journal comes near."""
LOST_MAX = 2**32 - 1
"""Numbers that one LOST entry can stand for."""
ITEMS = OUTCOMES | {types_pb2.ENTRY_KIND_ADMITTED}
"""Kinds of entries whose payloads are an item's own."""


SIGNED_ENTRIES_MAX = 1024
"""Entries that one signed head covers: a receipt is made of all of their hashes."""


def runs_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges, both ends included."""
    runs = list[tuple[int, int]]()
    for number in numbers:
        if runs and runs[-1][1] + 1 == number:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def verifications(entries: Iterable[Sealed]) -> list[types_pb2.EntryHeader]:
    """The headers of the AUDITED entries of kind VERIFY among these."""
    audited = (entry for entry in entries if entry.header.kind == types_pb2.ENTRY_KIND_AUDITED)
    verify = types_pb2.COMPARISON_KIND_VERIFY
    return [e.header for e in audited if e.read(sequencer_pb2.AuditedPayload).comparison.kind == verify]


def _is_twin(twin: Twin, header: types_pb2.EntryHeader, twins: bytes) -> bool:
    """Whether the item of this entry had the input of `twins_of`, as far as its payload is kept."""
    recorded = twin.entry.header
    if recorded.kind != types_pb2.ENTRY_KIND_COMPLETED or recorded.seed != header.seed:
        return False
    try:
        nonce = twin.entry.read(sequencer_pb2.CompletedPayload).nonce
    except DecodeError:
        return False
    return not twin.entry.payload or recorded.input_digest == sealed(recorded.form, nonce, "input", twins[:DIGEST_BYTES])


class Ledger:
    """The entries of one transaction, after a head. A ledger that is dropped has changed nothing.

    The entries that ledgers made, one after the other, hold these invariants. `maintenance.Checker` checks them in a journal
    that is read back.

    1. Indexes have no gap, and an entry's hash covers the hash of the entry before and its own header.
    2. Sequences have no gap: an ADMITTED entry has the next one; a LOST entry stands for those that follow the last one.
    3. The ADMITTED entries of a batch stand together, in the request's order.
    4. An item has at most one outcome, after its ADMITTED entry.
    5. A key that is bound is not bound again before it expires, and its second admission appends nothing.
    6. Form, seed, input digest and batch of an item are the same in all of its entries.
    7. An entry has the writer and the epoch of the head.
    """

    def __init__(self, head: Head, known: Known, now_millis: int, secret: bytes, signer: Signer | None = None) -> None:
        self.head = head
        """After the newest entry."""
        self.entries: list[Sealed] = []
        self.bound: list[tuple[Admission, Binding]] = []
        self.notes: dict[str, bytes] = {}
        """By name; a later one has replaced an earlier one."""
        self.twins: list[tuple[bytes, types_pb2.EntryHeader, types_pb2.Output]] = []
        """Tag, COMPLETED entry and output of those with which later ones are to be compared."""
        self._bindings = dict(known.bindings)
        self._unfinished = set(known.unfinished)
        self._twins, self._damaged = dict(known.twins), dict(known.damaged)
        self._fingerprints = known.fingerprints
        self._witnessed = dict(known.witnessed)
        self._now_millis, self._secret = now_millis, secret
        self._signer, self._trees = signer, list[SignedTree]()
        self._key_id = signer.key_id if signer is not None else ""
        if known.expired:
            self.prune([sequence for batch in known.expired for sequence in batch], "digests")

    def prune(self, sequences: Iterable[int], reason: str) -> Sealed:
        """Record that the payloads of these items are dropped, in this transaction or before it."""
        ranges = runs_of(sorted(sequences))
        first, last = ranges[0][0], ranges[-1][1]
        header = types_pb2.EntryHeader(kind=types_pb2.ENTRY_KIND_PRUNED, first_sequence=first, form=FORM)
        header.count = min(last + 1 - first, LOST_MAX)
        payload = sequencer_pb2.PrunedPayload(reason=reason, entries=2 * sum(last + 1 - first for first, last in ranges))
        for first, last in ranges:
            payload.ranges.add(first=first, last=last)
        return self._seal(header, payload)

    def sign(self) -> list[types_pb2.SignedHead]:
        """Sign the entries, once there are no more to append: one head for each SIGNED_ENTRIES_MAX. None if there is no key."""
        for part, tree in enumerate(self._trees):
            assert self._signer is not None
            signed = self.entries[part * SIGNED_ENTRIES_MAX : (part + 1) * SIGNED_ENTRIES_MAX]
            tree.sign(self.head.log_id, signed[0].header.index, [entry.entry_hash for entry in signed], self._signer)
        return [tree.head for tree in self._trees]

    def open(self, version: str, settings: sequencer_pb2.OpenedPayload | None = None) -> Sealed:
        """Record that the head's writer has begun the head's epoch, and with which settings."""
        payload = sequencer_pb2.OpenedPayload(version=version, signing_key_id=self._key_id)
        if settings is not None:
            payload.MergeFrom(settings)
        return self._seal(types_pb2.EntryHeader(kind=types_pb2.ENTRY_KIND_OPENED, form=FORM), payload)

    def fence(self, writer: str, epoch: int, version: str) -> Sealed:
        """Record that the head's writer has begun an epoch of another writer, whose items it takes over."""
        assert writer != self.head.writer
        own = self.head
        self.head = replace(own, writer=writer, epoch=epoch)
        opened = sequencer_pb2.OpenedPayload(version=version, taken_over_by=own.writer, signing_key_id=self._key_id)
        entry = self._seal(types_pb2.EntryHeader(kind=types_pb2.ENTRY_KIND_OPENED, form=FORM), opened)
        self.head = replace(self.head, writer=own.writer, epoch=own.epoch)
        return entry

    def append(self, draft: Draft) -> Appended:
        match draft:
            case Outcome():
                return self._end(draft)
            case Admission():
                return self._admit(draft)
            case Audit():
                return Appended((self._audit(draft),))
            case Note(name, value):
                assert name
                self.notes[name] = value
                return Appended(())
            case Loss():
                return Appended(self._lose(draft))
            case Witnessed(head):
                return Appended(self._witness(head))

    def _admit(self, admission: Admission) -> Appended:
        assert admission.items
        binding = self._bindings.get((admission.tenant, admission.key))
        if binding is not None:
            return Appended((), binding=binding)
        binding = Binding(admission.request_digest, self.head.last_sequence + 1, len(admission.items))
        made = [self._admit_item(item, admission, binding) for item in admission.items]
        entries, inputs = zip(*made, strict=True)
        assert self.head.last_sequence == binding.first_sequence + binding.count - 1
        assert self.head.index == entries[0].header.index + binding.count - 1, "a batch stands together"
        assert len({item.nonce for item in admission.items}) == len(admission.items), "each item has its own nonce"
        if admission.key:
            self._bindings[admission.tenant, admission.key] = binding
            self.bound.append((admission, binding))
        return Appended(entries, inputs=inputs)

    def _admit_item(self, item: sequencer_pb2.AdmittedPayload, admission: Admission, batch: Binding) -> tuple[Sealed, bytes]:
        """The entry, and the bare input digest."""
        sequence = self.head.last_sequence + 1
        payload = sequencer_pb2.AdmittedPayload()
        payload.CopyFrom(item)
        payload.idempotency_key, payload.request_digest = admission.key, admission.request_digest
        payload.tenant = admission.tenant
        if payload.seed_derived:
            payload.seed = int.from_bytes(keyed(self._secret, "seed", u64(sequence))[:8])
        digest = input_digest(payload.token_ids, payload.parameters, payload.seed)
        header = types_pb2.EntryHeader(
            kind=types_pb2.ENTRY_KIND_ADMITTED,
            sequence=sequence,
            first_sequence=batch.first_sequence,
            count=batch.count,
            seed=payload.seed,
            input_digest=sealed(FORM, payload.nonce, "input", digest),
            form=FORM,
        )
        return self._seal(header, payload), digest

    def _end(self, outcome: Outcome) -> Appended:
        assert outcome.kind in OUTCOMES
        assert outcome.attempt >= 1
        assert 1 <= outcome.admitted.sequence <= self.head.last_sequence, "an outcome comes after its admission"
        if outcome.admitted.sequence not in self._unfinished:
            return Appended(())
        self._unfinished.remove(outcome.admitted.sequence)
        header = self._about(outcome.admitted, outcome.kind, outcome.fingerprint_digest)
        header.attempt = outcome.attempt
        if not isinstance(outcome.payload, sequencer_pb2.CompletedPayload):
            assert outcome.kind != types_pb2.ENTRY_KIND_COMPLETED
            return Appended((self._seal(header, outcome.payload),))
        assert outcome.kind == types_pb2.ENTRY_KIND_COMPLETED
        output = outcome.payload.output
        assert output.seed == header.seed, "an output bears its item's seed"
        header.grade = output.grade
        for field_, digest in sealed_output(header.form, outcome.payload.nonce, output).items():
            setattr(header, field_, digest)
        if not outcome.twins:
            return Appended((self._seal(header, outcome.payload),))
        tag = twins_tag(self._secret, outcome.twins)
        earlier = self._twins.get(tag, ())
        same = [twin for twin in earlier if twin.entry.header.fingerprint_digest == header.fingerprint_digest]
        twin, damaged = next(iter(same or earlier), None), self._damaged.pop(tag, "")
        if twin is not None and not _is_twin(twin, header, outcome.twins):
            index = twin.entry.header.index
            twin, damaged = None, f"table twins is damaged: it names entry {index}, whose item had another input"
        entry = self._seal(header, self._with_twin(header, outcome.payload, twin))
        if not same and not damaged:
            self._twins[tag] = (*earlier, Twin(entry))
            self.twins.append((tag, header, output))
        return Appended((entry,), damaged=damaged)

    def _with_twin(
        self, header: types_pb2.EntryHeader, given: sequencer_pb2.CompletedPayload, twin: Twin | None
    ) -> sequencer_pb2.CompletedPayload:
        """The payload to record. With a twin it is a copy with the comparison."""
        assert not given.HasField("twin")
        if twin is None:
            return given
        recorded, equal = twin.entry.header, None
        first = twin.entry.read(sequencer_pb2.CompletedPayload)
        if not twin.entry.payload:
            first.output.grade, equal = recorded.grade, twin.output_tag == self.output_tag(given.output)
        expected, actual = (
            Side.recorded(
                each,
                completed.output,
                self._fingerprints.get(each.fingerprint_digest),
                company=completed.company,
                sampling=completed.sampling,
                input_digest=b"",
            )
            for each, completed in ((recorded, first), (header, given))
        )
        payload = sequencer_pb2.CompletedPayload()
        payload.CopyFrom(given)
        verdict = compare(expected, actual, types_pb2.COMPARISON_KIND_TWIN, header.sequence, dropped_equal=equal)
        payload.twin.CopyFrom(verdict)
        return payload

    def output_tag(self, output: types_pb2.Output) -> bytes:
        """Equal outputs have equal tags. Without the log's secret one tests no guess."""
        return keyed(self._secret, "output", output_digest(output))

    def _audit(self, audit: Audit) -> Sealed:
        assert audit.comparison.sequence == audit.admitted.sequence
        if audit.canary:
            header = types_pb2.EntryHeader(
                kind=types_pb2.ENTRY_KIND_AUDITED,
                fingerprint_digest=audit.fingerprint_digest,
                seed=audit.admitted.seed,
                input_digest=audit.admitted.input_digest,
                form=audit.admitted.form,
            )
        else:
            header = self._about(audit.admitted, types_pb2.ENTRY_KIND_AUDITED, audit.fingerprint_digest)
        header.grade = audit.grade
        payload = sequencer_pb2.AuditedPayload(comparison=audit.comparison, canary=audit.canary)
        assert len(audit.nonce) == (NONCE_BYTES if header.form else 0)
        for field_ in ("expected_output_digest", "actual_output_digest"):
            digest = getattr(audit.comparison, field_)
            setattr(payload.comparison, field_, sealed(header.form, audit.nonce, "output", digest))
        return self._seal(header, payload)

    def _lose(self, loss: Loss) -> tuple[Sealed, ...]:
        """One entry, or as many as its 32-bit count makes necessary."""
        assert self.head.last_sequence <= loss.through <= SEQUENCE_MAX
        payload = sequencer_pb2.LostPayload()
        if loss.mark is not None:
            payload.index, payload.entry_hash = loss.mark.index, loss.mark.entry_hash
        entries: list[Sealed] = []
        while not entries or self.head.last_sequence < loss.through:
            first = self.head.last_sequence + 1
            count = min(loss.through + 1 - first, LOST_MAX)
            header = types_pb2.EntryHeader(kind=types_pb2.ENTRY_KIND_LOST, first_sequence=first, count=count, form=FORM)
            entries.append(self._seal(header, payload))
            self.head = replace(self.head, last_sequence=first - 1 + count)
        return tuple(entries)

    def _witness(self, head: types_pb2.SignedHead) -> tuple[Sealed, ...]:
        """Nothing, unless it covers only entries after the newest head of its log."""
        if head.first_index <= self._witnessed.get(head.log_id, 0):
            return ()
        self._witnessed[head.log_id] = head.last_index
        header = types_pb2.EntryHeader(kind=types_pb2.ENTRY_KIND_WITNESSED, form=FORM)
        entry = self._seal(header, sequencer_pb2.WitnessedPayload(head=head))
        noted = sequencer_pb2.Entry(header=entry.header, entry_hash=entry.entry_hash, payload=entry.payload)
        self.notes[WITNESSED + head.log_id] = noted.SerializeToString()
        return (entry,)

    def _about(
        self, admitted: types_pb2.EntryHeader, kind: types_pb2.EntryKind.ValueType, fingerprint_digest: bytes
    ) -> types_pb2.EntryHeader:
        """A header with what every entry about an item repeats of its ADMITTED entry."""
        assert admitted.kind == types_pb2.ENTRY_KIND_ADMITTED
        assert admitted.log_id == self.head.log_id
        header = types_pb2.EntryHeader()
        header.CopyFrom(admitted)  # the fields that are not repeated are set by `_seal`
        header.kind, header.fingerprint_digest = kind, fingerprint_digest
        return header

    def _seal(self, header: types_pb2.EntryHeader, payload: Payload) -> Sealed:
        """A payload of an item has the item's nonce. Any other gets one here; nothing in it is ever redacted."""
        head = self.head
        header.index = head.index + 1
        if header.form and header.kind not in ITEMS:
            payload.nonce = keyed(self._secret, "nonce", u64(header.index))[:NONCE_BYTES]
        assert len(payload.nonce) == (NONCE_BYTES if header.form else 0)
        recorded = payload.SerializeToString(deterministic=True)
        header.log_id, header.writer, header.epoch = head.log_id, head.writer, head.epoch
        header.time_unix_millis = self._now_millis
        header.payload_digest = payload_digest(recorded)
        assert header.index <= NUMBER_MAX
        assert not self.entries or self.entries[-1].header.index == head.index, "indexes have no gap"
        if self._signer is not None and len(self.entries) % SIGNED_ENTRIES_MAX == 0:
            self._trees.append(SignedTree())
        tree = self._trees[-1] if self._trees and header.kind in OUTCOMES else None
        entry = Sealed(header, head.entry_hash, entry_hash(head.entry_hash, header), recorded, tree, payload)
        last = head.last_sequence
        if header.kind == types_pb2.ENTRY_KIND_ADMITTED:
            assert header.sequence == last + 1, "sequences have no gap"
            last = header.sequence
        self.head = Head(head.log_id, head.writer, head.epoch, header.index, entry.entry_hash, last)
        self.entries.append(entry)
        return entry
