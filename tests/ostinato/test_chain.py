"""Receipts and links between entries: sound ones have no faults, and every change is a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ostinato.chain import (
    FORM,
    GENESIS,
    OUTCOMES,
    check_link,
    check_receipt,
    check_record,
    check_result,
    entry_hash,
    payload_digest,
    receipt,
    sealed_input,
    sealed_output,
)
from ostinato.digest import fingerprint_digest, input_digest, logprobs_digest, output_digest, text_digest
from ostinato.v1 import sequencer_pb2, types_pb2

LOG_ID = "0123456789abcdef0123456789abcdef"


each_form = pytest.mark.parametrize("form", [0, FORM])


def completed(form: int = FORM, seed: int = 2**64 - 1) -> sequencer_pb2.ItemRecord:
    """A sound record."""
    nonce = b"n" * 16 if form else b""
    given = sequencer_pb2.AdmittedPayload(
        token_ids=[1, 2], parameters=types_pb2.ResolvedParameters(top_p=1.0), seed=seed, nonce=nonce
    )
    output = types_pb2.Output(
        text="a city",
        token_ids=[5, 6],
        finish_reason=types_pb2.FINISH_REASON_LENGTH,
        seed=seed,
        grade=types_pb2.GRADE_EXACT,
        logprobs=[types_pb2.TokenLogprobs(logprob=-1.5), types_pb2.TokenLogprobs(logprob=-2.5)],
    )
    place = types_pb2.EntryHeader(log_id=LOG_ID, writer="w", epoch=1, sequence=7, first_sequence=7, count=1, seed=seed)
    place.form, place.input_digest = form, sealed_input(form, given)
    admitted, header = types_pb2.EntryHeader(), types_pb2.EntryHeader()
    admitted.CopyFrom(place)
    admitted.kind = types_pb2.ENTRY_KIND_ADMITTED
    header.CopyFrom(place)
    header.index = 1
    header.kind, header.attempt, header.grade = types_pb2.ENTRY_KIND_COMPLETED, 1, output.grade
    for field, digest in sealed_output(form, nonce, output).items():
        setattr(header, field, digest)
    previous = b"p" * 32
    proof = receipt(header, previous, entry_hash(previous, header), nonce)
    result = types_pb2.Result(sequence=7, output=output, receipt=proof, attempt=1)
    return sequencer_pb2.ItemRecord(admitted=admitted, input=given, result=result)


@each_form
def test_sound_record(form: int) -> None:
    """A sound record has no faults, also without its optional parts."""
    record = completed(form)
    assert check_record(record) == check_result(record.result) == check_receipt(record.result.receipt) == []
    record.ClearField("input")
    assert check_record(record) == []
    record.ClearField("result")
    assert check_record(record) == []


def other(field: FieldDescriptor, value: object) -> object:
    match value:
        case bytes():
            return bytes(32) if value != bytes(32) else b"x" * 32
        case str():
            return value + "x"
        case bool():
            return not value
        case _:
            return value + 1 if value != 2**64 - 1 else 0  # type: ignore[operator]


def test_a_sealed_header_tests_no_guess() -> None:
    """In form 2 no digest of the input or the output is in the header, and equal items have different ones: form 0 had both."""
    record = completed()
    given, output, header = record.input, record.result.output, record.result.receipt.header
    guesses = {input_digest(given.token_ids, given.parameters, given.seed), output_digest(output), logprobs_digest(output)}
    guesses |= {text_digest(output)}
    shown = {header.input_digest, header.output_digest, header.logprobs_digest, header.text_digest}
    bare = completed(0).result.receipt.header
    assert len(shown) == 4
    assert not shown & guesses
    assert guesses > {bare.input_digest, bare.output_digest, bare.logprobs_digest}
    given.nonce = b"m" * 16
    assert not shown & {sealed_input(FORM, given), *sealed_output(FORM, given.nonce, output).values()}


def test_a_receipt_without_its_nonce() -> None:
    """It still proves the entry. It shows nothing of the answer, and cannot be compared with it. Unknown enum values and NaN
    are faults too, not exceptions."""
    record = completed()
    record.result.receipt.ClearField("nonce")
    assert check_receipt(record.result.receipt) == []
    assert "receipt.nonce: has 0 bytes instead of 16" in check_result(record.result)
    record = completed()
    record.result.output.logprobs[0].logprob = float("nan")
    record.result.output.finish_reason = -1  # type: ignore[assignment]
    record.result.receipt.header.grade = -1  # type: ignore[assignment]
    assert len(check_result(record.result)) == 4


@each_form
@pytest.mark.parametrize("field", list(types_pb2.EntryHeader.DESCRIPTOR.fields), ids=lambda field: field.name)
def test_header_covers_every_field(field: FieldDescriptor, form: int) -> None:
    """A change of any header field, or of the previous hash, changes the entry's hash, or is of another form."""
    proof = completed(form).result.receipt
    setattr(proof.header, field.name, other(field, getattr(proof.header, field.name)))

    assert check_receipt(proof) != []


def test_receipt_of_another_place() -> None:
    """A receipt depends on the entry before it, and only a COMPLETED entry has one."""
    proof = completed().result.receipt
    proof.previous_hash = GENESIS
    assert check_receipt(proof) == ["entry_hash: is not the hash of this header after this previous_hash"]
    proof.previous_hash = b"short"
    assert check_receipt(proof) == ["previous_hash: not 32 bytes"]
    failed = types_pb2.EntryHeader(kind=types_pb2.ENTRY_KIND_FAILED)
    forged = types_pb2.Receipt(header=failed, previous_hash=GENESIS, entry_hash=entry_hash(GENESIS, failed))
    assert check_receipt(forged) == ["header.kind: not COMPLETED"]
    for kind in OUTCOMES - {types_pb2.ENTRY_KIND_COMPLETED}:
        with pytest.raises(AssertionError):
            receipt(types_pb2.EntryHeader(kind=kind), GENESIS, GENESIS, b"")


@pytest.mark.parametrize(
    ("tamper", "fault"),
    [
        (lambda r: r.result.output.token_ids.append(9), "header.output_digest"),
        (lambda r: setattr(r.result.output, "matched_stop", "x"), "header.output_digest"),
        (lambda r: r.result.output.logprobs.pop(), "header.logprobs_digest"),
        (lambda r: r.result.output.ClearField("logprobs"), "header.logprobs_digest"),
        (lambda r: setattr(r.result.output, "text", "A city"), "header.text_digest"),
        (lambda r: setattr(r.result.receipt, "nonce", b"m" * 16), "header.output_digest"),
        (lambda r: setattr(r.input, "nonce", b"m" * 16), "admitted.input_digest"),
        (lambda r: setattr(r.result.output, "seed", 1), "header.seed"),
        (lambda r: setattr(r.result.output, "grade", types_pb2.GRADE_SERIAL), "header.grade"),
        (lambda r: setattr(r.result, "attempt", 2), "header.attempt"),
        (lambda r: setattr(r.result, "sequence", 8), "header.sequence"),
        (lambda r: r.input.token_ids.append(9), "admitted.input_digest"),
        (lambda r: setattr(r.input.parameters, "top_k", 1), "admitted.input_digest"),
        (lambda r: setattr(r.input, "seed", 1), "admitted.input_digest"),
        (lambda r: setattr(r.admitted, "input_digest", b"x" * 32), "header.input_digest"),
        (lambda r: setattr(r.admitted, "sequence", 8), "header.sequence"),
        (lambda r: setattr(r.admitted, "log_id", "f" * 32), "header.log_id"),
        (lambda r: setattr(r.admitted, "first_sequence", 8), "header.first_sequence"),
        (lambda r: setattr(r.admitted, "count", 8), "header.count"),
        (lambda r: setattr(r.admitted, "seed", 8), "admitted.seed"),
        (lambda r: setattr(r.admitted, "index", 8), "admitted.index"),
        (lambda r: setattr(r.admitted, "kind", types_pb2.ENTRY_KIND_LOST), "admitted.kind"),
        (lambda r: r.outcome.MergeFrom(r.admitted), "outcome"),
        (lambda r: r.fingerprint.fields.update(model="another"), "fingerprint.fields"),
        (lambda r: setattr(r.fingerprint, "digest", fingerprint_digest({})), "fingerprint.digest"),
    ],
)
def test_tampered_record(tamper: Callable[[sequencer_pb2.ItemRecord], object], fault: str) -> None:
    """After any change of a record, a fault names the place."""
    record = completed()
    tamper(record)

    assert fault in [line.split(":")[0] for line in check_record(record)]


def chain(*headers: types_pb2.EntryHeader) -> list[sequencer_pb2.Entry]:
    """Entries with these headers, and matching indexes, hashes and payloads."""
    entries, previous = [], GENESIS
    for index, header in enumerate(headers, start=1):
        header.index, payload = header.index or index, f"payload {index}".encode()
        header.payload_digest = payload_digest(payload)
        previous = entry_hash(previous, header)
        entries.append(sequencer_pb2.Entry(header=header, entry_hash=previous, payload=payload))
    return entries


def faults(entries: Iterable[sequencer_pb2.Entry]) -> list[str]:
    found, previous = [], None
    for entry in entries:
        found += check_link(previous, entry)
        previous = entry
    return found


def header(writer: str = "w", epoch: int = 1, log_id: str = LOG_ID, index: int = 0) -> types_pb2.EntryHeader:
    return types_pb2.EntryHeader(log_id=log_id, writer=writer, epoch=epoch, index=index)


def test_links() -> None:
    """A chain of one or several writers has no faults, with or without its payloads."""
    entries = chain(header(), header(), header("v", 9), header(), header("v", 9), header("v", 10))
    assert faults(entries) == []
    entries[2].payload = b""
    assert faults(entries) == []


@pytest.mark.parametrize(
    ("headers", "fault"),
    [
        ([header(), header(index=3)], "index: 3 after 1"),
        ([header(index=2)], "index: 2 after 0"),
        ([header(epoch=2), header(epoch=1)], "epoch: 1 after 2"),
        ([header(), header(log_id="x")], f"log_id: x after {LOG_ID}"),
    ],
)
def test_broken_invariants(headers: list[types_pb2.EntryHeader], fault: str) -> None:
    """Invariants 2, 5, 6: a chain with correct hashes can still have faults."""
    assert faults(chain(*headers)) == [fault]


@settings(deadline=None)
@given(st.integers(0, 3), st.sampled_from(["entry_hash", "payload"]), st.binary(min_size=1, max_size=32))
def test_broken_links(position: int, field: str, value: bytes) -> None:
    """Invariant 1: a change of a hash or a payload is a fault."""
    entries = chain(*(header() for _ in range(4)))
    assume(getattr(entries[position], field) != value)
    setattr(entries[position], field, value)

    assert faults(entries) != []


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Any receipt or result gets a list of faults; none raises an exception."""
    with suppress(DecodeError):
        assert check_receipt(types_pb2.Receipt.FromString(data)) != []
    with suppress(DecodeError):
        assert check_result(types_pb2.Result.FromString(data)) != []
