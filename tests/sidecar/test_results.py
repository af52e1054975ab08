"""What a caller is told is derived from the record alone, and so is always the same."""

from __future__ import annotations

import pytest

from ostinato import errors
from ostinato.chain import check_result
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from sidecar.answers import answer_of, ended_payload, outcome_kind, record_of, result_of, stamp_of
from sidecar.journal.ledger import Known, Ledger
from sidecar.journal.model import Head, ItemEntries, Outcome, Sealed
from tests.sidecar.journal_kit import LOG_ID, admission, audit, completed, ended, item

TIMING = types_pb2.Timing(queue_micros=1, first_token_micros=2, total_micros=3)


def ledger(head: Head | None = None, *unfinished: int) -> Ledger:
    """Of an empty journal, or of one that stands there."""
    head = head or Head(LOG_ID, "writer", 1, 0, bytes(32), 0)
    return Ledger(head, Known(unfinished=frozenset(unfinished)), 1_700_000_000_000)


def entries(outcome: str = "completed") -> tuple[Sealed, Sealed]:
    """An item's ADMITTED entry and its outcome's."""
    made = ledger()
    (admitted,) = made.append(admission(item(1, 2, seed=5))).entries
    draft = completed(admitted, 7, 8)
    if outcome != "completed":
        error = errors.TABLE[outcome]("it was not to be")
        draft = Outcome(admitted.header, outcome_kind(error), 2, ended_payload(error, TIMING))
    (sealed,) = ledger(made.head, 1).append(draft).entries
    return admitted, sealed


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (None, types_pb2.ENTRY_KIND_COMPLETED),
        (errors.Cancelled(""), types_pb2.ENTRY_KIND_CANCELLED),
        (errors.Abandoned(""), types_pb2.ENTRY_KIND_ABANDONED),
        (errors.DeadlineExceeded(""), types_pb2.ENTRY_KIND_FAILED),
        (errors.AttemptsExhausted(""), types_pb2.ENTRY_KIND_FAILED),
        (errors.GradeLost(""), types_pb2.ENTRY_KIND_FAILED),
        (errors.OstinatoError("of another world"), types_pb2.ENTRY_KIND_FAILED),
    ],
)
def test_an_ends_kind(error: errors.OstinatoError | None, kind: types_pb2.EntryKind.ValueType) -> None:
    """What nobody ended and nobody left behind is FAILED."""
    assert outcome_kind(error) == kind


def test_an_output_and_its_proof() -> None:
    """A completed item's result has output and timing as recorded, and a receipt that proves them."""
    _, sealed = entries()

    result = result_of(sealed)

    recorded = sequencer_pb2.CompletedPayload.FromString(sealed.payload)
    assert (result.output, result.timing) == (recorded.output, recorded.timing)
    assert (result.sequence, result.attempt, result.receipt.entry_hash) == (1, 1, sealed.entry_hash)
    assert check_result(result) == []


@pytest.mark.parametrize("reason", ["CANCELLED", "ABANDONED", "DEADLINE_EXCEEDED", "GRADE_LOST", "ENGINE_FAILED"])
def test_an_end_without_output(reason: str) -> None:
    """It has the status that was recorded, with code and reason, and no receipt."""
    result = result_of(entries(reason)[1])

    error = errors.from_status(result.status)
    assert (error.reason, error.code, error.message) == (reason, errors.TABLE[reason].code, "it was not to be")
    assert (result.attempt, result.timing, result.HasField("receipt")) == (2, TIMING, False)


def test_a_reason_that_nobody_knows() -> None:
    """What a later version recorded, or an engine made up, reads as ENGINE_FAILED."""
    _, sealed = entries()
    unknown = sequencer_pb2.EndedPayload(code=2, reason="FROM_THE_FUTURE", message="why").SerializeToString()
    header = types_pb2.EntryHeader(kind=types_pb2.ENTRY_KIND_FAILED, sequence=1)

    result = result_of(Sealed(header, sealed.previous_hash, sealed.entry_hash, unknown))

    error = errors.from_status(result.status)
    assert (error.reason, error.message) == ("ENGINE_FAILED", "why")


@pytest.mark.parametrize("outcome", ["completed", "CANCELLED"])
def test_the_same_entries_give_the_same_bytes(outcome: str) -> None:
    """Derived twice, or read back and derived again, an answer is equal byte for byte."""
    admitted, sealed = entries(outcome)

    def answer(header: types_pb2.EntryHeader, outcome: Sealed) -> bytes:
        response = generation_pb2.GenerateResponse(stamp=stamp_of(header), results=[result_of(outcome)])
        return response.SerializeToString(deterministic=True)

    def read_back(header: types_pb2.EntryHeader) -> types_pb2.EntryHeader:
        return types_pb2.EntryHeader.FromString(header.SerializeToString())

    again = Sealed(read_back(sealed.header), sealed.previous_hash, sealed.entry_hash, bytes(sealed.payload))
    first = answer(admitted.header, sealed)
    assert answer(admitted.header, sealed) == first
    assert answer(read_back(admitted.header), again) == first


def test_a_stamp_is_of_the_batch() -> None:
    """Every item's ADMITTED entry gives the batch's stamp."""
    made = ledger()
    made.append(admission(item()))

    stamps = [stamp_of(entry.header) for entry in made.append(admission(item(), item(), item())).entries]

    assert stamps == [types_pb2.Stamp(log_id=LOG_ID, writer="writer", epoch=1, first_sequence=2, count=3)] * 3


def test_what_was_pruned_is_not_made_up() -> None:
    """Without its payload an outcome is PAYLOAD_PRUNED to a caller, and left out of a record; the headers stay."""
    admitted, sealed = entries()
    bare = Sealed(sealed.header, sealed.previous_hash, sealed.entry_hash, b"")

    with pytest.raises(errors.PayloadPruned):
        result_of(bare)
    record = record_of(ItemEntries(Sealed(admitted.header, admitted.previous_hash, admitted.entry_hash, b""), bare), {})
    assert record == sequencer_pb2.ItemRecord(admitted=admitted.header, outcome=sealed.header)


def test_a_record() -> None:
    """A record has what went in and, once the item has ended, what a caller is told, and what it ran on where that is known."""
    admitted, sealed = entries()
    known = types_pb2.Fingerprint(digest=sealed.header.fingerprint_digest, fields={"device": "abacus"})

    assert not record_of(ItemEntries(admitted), {}).HasField("result")
    assert not record_of(ItemEntries(admitted, sealed), {}).HasField("fingerprint")
    record = record_of(ItemEntries(admitted, sealed), {known.digest: known})
    assert (record.outcome, record.fingerprint) == (sealed.header, known)
    assert record.input.SerializeToString(deterministic=True) == admitted.payload
    assert record.result == result_of(sealed)


def test_a_verdict_that_was_asked_for() -> None:
    """Where the journal has it, it is part of the answer; where it was asked for and is not there, the answer says so, always
    in the same words; an item that failed, or that nobody wanted verified, has none."""
    made = ledger()
    asked = item(1, 2, seed=5)
    asked.verify = True
    (admitted,) = made.append(admission(asked)).entries
    (sealed,) = ledger(made.head, 1).append(completed(admitted)).entries
    (verified,) = ledger(made.head).append(audit(admitted, types_pb2.COMPARISON_KIND_VERIFY)).entries

    assert answer_of(ItemEntries(admitted, sealed, verified)).comparison.verdict == types_pb2.VERDICT_MATCH
    without = [answer_of(ItemEntries(admitted, sealed)).comparison for _ in range(2)]
    assert without[0].SerializeToString(deterministic=True) == without[1].SerializeToString(deterministic=True)
    assert (without[0].sequence, without[0].verdict) == (1, types_pb2.VERDICT_UNSPECIFIED)
    assert errors.from_status(without[0].status).reason == "ABANDONED"
    (failed,) = ledger(made.head, 1).append(ended(admitted)).entries
    assert not answer_of(ItemEntries(admitted, failed)).HasField("comparison")
    assert not answer_of(ItemEntries(*entries())).HasField("comparison")
