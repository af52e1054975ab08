"""What a caller is told of an entry. Derived from the journal alone, so a later answer is the earlier one, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping

from ostinato import enums, errors
from ostinato.chain import receipt
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.model import ItemEntries, Sealed

ENDED_BY_KIND: Mapping[types_pb2.EntryKind.ValueType, type[errors.Ended]] = {
    types_pb2.ENTRY_KIND_CANCELLED: errors.Cancelled,
    types_pb2.ENTRY_KIND_ABANDONED: errors.Abandoned,
}
"""Kinds of outcome that one error makes, so that the header alone says which."""


def outcome_kind(error: errors.OstinatoError | None) -> types_pb2.EntryKind.ValueType:
    """The kind of entry that an item's end becomes."""
    if error is None:
        return types_pb2.ENTRY_KIND_COMPLETED
    if isinstance(error, errors.Cancelled):
        return types_pb2.ENTRY_KIND_CANCELLED
    return types_pb2.ENTRY_KIND_ABANDONED if isinstance(error, errors.Abandoned) else types_pb2.ENTRY_KIND_FAILED


def ended_payload(error: errors.OstinatoError, timing: types_pb2.Timing) -> sequencer_pb2.EndedPayload:
    """What is recorded of an item without output."""
    return sequencer_pb2.EndedPayload(code=error.code.value[0], reason=error.reason, message=error.message, timing=timing)


def result_of(outcome: Sealed) -> types_pb2.Result:
    """Raises PayloadPruned where the payload was dropped."""
    header = outcome.header
    result = types_pb2.Result(sequence=header.sequence, attempt=header.attempt)
    if not outcome.payload:
        raise errors.PayloadPruned(f"the payload of sequence {header.sequence} is not kept any more")
    if header.kind == types_pb2.ENTRY_KIND_COMPLETED:
        completed = sequencer_pb2.CompletedPayload.FromString(outcome.payload)
        result.output.CopyFrom(completed.output)
        result.timing.CopyFrom(completed.timing)
        result.receipt.CopyFrom(receipt(header, outcome.previous_hash, outcome.entry_hash))
    else:
        ended = sequencer_pb2.EndedPayload.FromString(outcome.payload)
        kind = errors.TABLE.get(ended.reason, errors.EngineFailed)
        result.status.CopyFrom(errors.to_status(kind(ended.message)))
        result.timing.CopyFrom(ended.timing)
    return result


def answer_of(entries: ItemEntries) -> types_pb2.Result:
    """A result with all that belongs to it. The item must have ended. Raises PayloadPruned."""
    assert entries.outcome is not None
    result = result_of(entries.outcome)
    asked = bool(entries.admitted.payload) and sequencer_pb2.AdmittedPayload.FromString(entries.admitted.payload).verify
    if result.HasField("output") and (asked or entries.verified is not None):
        result.comparison.CopyFrom(verification_of(result.sequence, entries.verified))
    return result


def answer_or_header(entries: ItemEntries) -> types_pb2.Result:
    """As `answer_of`. Where the outcome's payload was dropped, a status that the entry's header gives: CANCELLED, ABANDONED,
    or PAYLOAD_PRUNED for the other kinds, whose reason or output only the payload had."""
    assert entries.outcome is not None
    header = entries.outcome.header
    if entries.outcome.payload:
        return answer_of(entries)
    kind = enums.word(types_pb2.EntryKind, header.kind)
    why = f"sequence {header.sequence} ended as {kind}; its payload is not kept any more"
    error = ENDED_BY_KIND.get(header.kind, errors.PayloadPruned)(why)
    return types_pb2.Result(sequence=header.sequence, attempt=header.attempt, status=errors.to_status(error))


def is_whole(entries: ItemEntries) -> bool:
    """Whether the journal has all of its answer: the outcome, and the verdict that was asked for."""
    if entries.outcome is None or entries.outcome.header.kind != types_pb2.ENTRY_KIND_COMPLETED:
        return entries.outcome is not None
    asked = bool(entries.admitted.payload) and sequencer_pb2.AdmittedPayload.FromString(entries.admitted.payload).verify
    return not asked or entries.verified is not None


def verification_of(sequence: int, verified: Sealed | None) -> types_pb2.Comparison:
    """The verdict that the client asked for; None: the journal has none, and will not get one any more."""
    if verified is not None and verified.payload:
        return sequencer_pb2.AuditedPayload.FromString(verified.payload).comparison
    missing = errors.Abandoned("no verdict was recorded: the sidecar stopped before, or the journal was full")
    return no_verdict(sequence, types_pb2.COMPARISON_KIND_VERIFY, missing)


def no_verdict(sequence: int, kind: types_pb2.ComparisonKind.ValueType, error: errors.OstinatoError) -> types_pb2.Comparison:
    """What is said where there was no second output: why."""
    return types_pb2.Comparison(sequence=sequence, kind=kind, status=errors.to_status(error))


def stamp_of(header: types_pb2.EntryHeader) -> types_pb2.Stamp:
    """Of the batch that this item belongs to, from its ADMITTED header."""
    return types_pb2.Stamp(
        log_id=header.log_id,
        writer=header.writer,
        epoch=header.epoch,
        first_sequence=header.first_sequence,
        count=header.count,
    )


def record_of(entries: ItemEntries, fingerprints: Mapping[bytes, types_pb2.Fingerprint]) -> sequencer_pb2.ItemRecord:
    """What is known of an item; what was pruned is left out. `fingerprints`: by digest."""
    record = sequencer_pb2.ItemRecord(admitted=entries.admitted.header)
    if entries.admitted.payload:
        record.input.CopyFrom(sequencer_pb2.AdmittedPayload.FromString(entries.admitted.payload))
    if entries.outcome is not None:
        record.outcome.CopyFrom(entries.outcome.header)
        if entries.outcome.payload:
            record.result.CopyFrom(answer_of(entries))
        if record.outcome.fingerprint_digest in fingerprints:
            record.fingerprint.CopyFrom(fingerprints[record.outcome.fingerprint_digest])
    return record
