"""The journal's hash chain, and receipts.

Each entry's hash covers its header and the hash of the entry before, so a changed entry changes every later hash. A header has
the digests of input, output and payload. A receipt is a COMPLETED entry's header with its two hashes, and its nonce.

An entry has a form. In form 2 the digests of input, output, logprobs and text are sealed: hashed again with a random nonce that
only the payload has, and the receipt. Without it a reader of the chain can test no guess. Form 0 has the bare digests, and
none of the text; it is not written any more.

Invariants of a journal:
 1. The previous hash of the first entry is 32 zero bytes; that of every other entry is the hash of the entry before.
 2. Indexes are 1, 2, 3 and so on.
 3. Sequences are 1, 2, 3 and so on over the ADMITTED entries, except those that a LOST entry stands for. The entries of a batch
    are consecutive.
 4. Every outcome names a sequence that was admitted before and had no outcome.
 5. A writer's epoch increases with each of its OPENED entries. Its other entries have its newest epoch.
 6. All entries have the same log id.
 7. An entry about an item has the form of the item's ADMITTED entry.

`check_link` checks 1, 2, 6 and, between entries of one writer, 5. The others need more than two entries; the journal's
verification checks them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from functools import lru_cache

from ostinato.digest import (
    DIGEST_BYTES,
    fingerprint_digest,
    input_digest,
    logprobs_digest,
    output_digest,
    tag,
    tagged_digest,
    text,
    text_digest,
    u64,
)
from ostinato.v1 import sequencer_pb2, types_pb2

GENESIS = bytes(DIGEST_BYTES)
"""The previous hash of the first entry."""
FORM = 2
"""Of new entries."""
FORMS = frozenset({0, FORM})
NONCE_BYTES = 16
REPEATED = ("log_id", "sequence", "first_sequence", "count", "seed", "input_digest", "form")
"""The header fields of an ADMITTED entry that every entry about the item repeats."""

SEQUENCE_MAX = 1 << 48
"""No log reaches it: at 100,000 items a second that takes 89 years."""
BATCH_ITEMS_MAX = 4096
"""No setting allows more items in a request."""

_PLACE, _NUMBERS, _TEXT = struct.Struct(">Qq"), struct.Struct(">7Qq"), struct.Struct(">2Q")
"""Adjacent header fields, each as u64 or i64."""

Payload = (
    sequencer_pb2.OpenedPayload
    | sequencer_pb2.AdmittedPayload
    | sequencer_pb2.CompletedPayload
    | sequencer_pb2.EndedPayload
    | sequencer_pb2.AuditedPayload
    | sequencer_pb2.LostPayload
    | sequencer_pb2.PrunedPayload
    | sequencer_pb2.WitnessedPayload
)
PAYLOADS: Mapping[types_pb2.EntryKind.ValueType, type[Payload]] = {
    types_pb2.ENTRY_KIND_OPENED: sequencer_pb2.OpenedPayload,
    types_pb2.ENTRY_KIND_ADMITTED: sequencer_pb2.AdmittedPayload,
    types_pb2.ENTRY_KIND_COMPLETED: sequencer_pb2.CompletedPayload,
    types_pb2.ENTRY_KIND_FAILED: sequencer_pb2.EndedPayload,
    types_pb2.ENTRY_KIND_CANCELLED: sequencer_pb2.EndedPayload,
    types_pb2.ENTRY_KIND_ABANDONED: sequencer_pb2.EndedPayload,
    types_pb2.ENTRY_KIND_AUDITED: sequencer_pb2.AuditedPayload,
    types_pb2.ENTRY_KIND_LOST: sequencer_pb2.LostPayload,
    types_pb2.ENTRY_KIND_PRUNED: sequencer_pb2.PrunedPayload,
    types_pb2.ENTRY_KIND_WITNESSED: sequencer_pb2.WitnessedPayload,
}
"""The message in an entry's payload, by the entry's kind."""

OUTCOMES = frozenset(
    {
        types_pb2.ENTRY_KIND_COMPLETED,
        types_pb2.ENTRY_KIND_FAILED,
        types_pb2.ENTRY_KIND_CANCELLED,
        types_pb2.ENTRY_KIND_ABANDONED,
    }
)
"""The kinds of entries that end an item."""


_SEALED = {name: tag(f"sealed-{name}") for name in ("input", "output", "logprobs", "text")}


def sealed(form: int, nonce: bytes, name: str, digest: bytes) -> bytes:
    """A digest as a header of this form has it. `name`: input, output, logprobs or text. An empty digest stays empty."""
    return hashlib.sha256(_SEALED[name] + nonce + digest).digest() if form and digest else digest


def sealed_input(form: int, given: sequencer_pb2.AdmittedPayload) -> bytes:
    """The input digest as a header of this form has it."""
    return sealed(form, given.nonce, "input", input_digest(given.token_ids, given.parameters, given.seed))


def sealed_output(form: int, nonce: bytes, output: types_pb2.Output) -> dict[str, bytes]:
    """The digests of an output as a header of this form has them, by field."""
    return {
        "output_digest": sealed(form, nonce, "output", output_digest(output)),
        "logprobs_digest": sealed(form, nonce, "logprobs", logprobs_digest(output)),
        "text_digest": sealed(form, nonce, "text", text_digest(output)) if form else b"",
    }


def entry_hash(previous_hash: bytes, header: types_pb2.EntryHeader) -> bytes:
    """Over the previous hash and every field of the header, in the order of the field numbers."""
    assert len(previous_hash) == DIGEST_BYTES
    inputs, output, logprobs = header.input_digest, header.output_digest, header.logprobs_digest
    fingerprint, payload, form = header.fingerprint_digest, header.payload_digest, header.form
    return tagged_digest(
        "sealed-entry" if form else "entry",
        previous_hash,
        _PLACE.pack(header.index, header.kind),
        _names(header.log_id, header.writer),
        _NUMBERS.pack(
            header.epoch,
            header.sequence,
            header.first_sequence,
            header.count,
            header.attempt,
            header.time_unix_millis,
            header.seed,
            header.grade,
        ),
        u64(len(inputs)),
        inputs,
        u64(len(output)),
        output,
        u64(len(logprobs)),
        logprobs,
        u64(len(fingerprint)),
        fingerprint,
        u64(len(payload)),
        payload,
        _TEXT.pack(form, len(header.text_digest)) + header.text_digest if form else b"",
    )


@lru_cache
def _names(log_id: str, writer: str) -> bytes:
    """Cached: they rarely change between entries."""
    return text(log_id) + text(writer)


def payload_digest(payload: bytes) -> bytes:
    """SHA-256 of a payload's bytes, without a tag."""
    return hashlib.sha256(payload).digest()


def receipt(header: types_pb2.EntryHeader, previous_hash: bytes, hash_: bytes, nonce: bytes) -> types_pb2.Receipt:
    """The receipt of a COMPLETED entry. `nonce`: its payload's."""
    assert header.kind == types_pb2.ENTRY_KIND_COMPLETED
    return types_pb2.Receipt(header=header, previous_hash=previous_hash, entry_hash=hash_, nonce=nonce)


def check_form(header: types_pb2.EntryHeader) -> list[str]:
    """The faults of a header's form."""
    if header.form not in FORMS:
        return [f"form: {header.form} is not known"]
    return ["text_digest: is not part of form 0"] if header.text_digest and not header.form else []


def check_nonce(form: int, nonce: bytes) -> list[str]:
    """The faults of the nonce of an entry of this form."""
    size = NONCE_BYTES if form else 0
    return [] if len(nonce) == size else [f"nonce: has {len(nonce)} bytes instead of {size}"]


def check_receipt(proof: types_pb2.Receipt) -> list[str]:
    """The faults of a receipt; empty: it is sound. It is so without its nonce, too."""
    faults = [f"header.{fault}" for fault in check_form(proof.header)]
    if proof.header.kind != types_pb2.ENTRY_KIND_COMPLETED:
        faults.append("header.kind: not COMPLETED")
    if len(proof.previous_hash) != DIGEST_BYTES:
        faults.append("previous_hash: not 32 bytes")
    elif entry_hash(proof.previous_hash, proof.header) != proof.entry_hash:
        faults.append("entry_hash: is not the hash of this header after this previous_hash")
    return faults


def check_result(result: types_pb2.Result) -> list[str]:
    """The faults of a result's receipt, and the differences between it and the output. In form 0 the text is not compared."""
    header, output, nonce = result.receipt.header, result.output, result.receipt.nonce
    faults = check_receipt(result.receipt) + [f"receipt.{fault}" for fault in check_nonce(header.form, nonce)]
    actual = sealed_output(header.form, nonce, output) | {
        "sequence": result.sequence,
        "seed": output.seed,
        "grade": output.grade,
        "attempt": result.attempt,
    }
    return faults + [
        f"header.{field}: does not belong to this output" for field, value in actual.items() if getattr(header, field) != value
    ]


def check_record(record: sequencer_pb2.ItemRecord) -> list[str]:
    """The faults of an item's receipt, and the differences between it, the two headers, the input, the output and the
    fingerprint. Nothing else in a record is covered by its receipt."""
    faults = check_result(record.result) if record.result.HasField("receipt") else []
    if record.HasField("input") and record.admitted.input_digest != sealed_input(record.admitted.form, record.input):
        faults.append("admitted.input_digest: does not belong to this input")
    if record.HasField("admitted") and record.admitted.kind != types_pb2.ENTRY_KIND_ADMITTED:
        faults.append("admitted.kind: not ADMITTED")
    if record.HasField("input") and record.admitted.seed != record.input.seed:
        faults.append("admitted.seed: is not the input's")
    fingerprint = record.fingerprint
    if record.HasField("fingerprint") and fingerprint_digest(fingerprint.fields) != fingerprint.digest:
        faults.append("fingerprint.fields: do not belong to fingerprint.digest")
    if record.result.HasField("receipt"):
        proof, admitted = record.result.receipt.header, record.admitted
        faults += [
            f"header.{field}: is not the admitted one"
            for field in REPEATED
            if getattr(proof, field) != getattr(admitted, field)
        ]
        if not admitted.index < proof.index:
            faults.append("admitted.index: is not before the receipt's")
        if record.HasField("outcome") and record.outcome != proof:
            faults.append("outcome: is not the receipt's header")
        if record.HasField("fingerprint") and fingerprint.digest != proof.fingerprint_digest:
            faults.append("fingerprint.digest: is not the receipt's")
    return faults


def check_link(previous: sequencer_pb2.Entry | None, entry: sequencer_pb2.Entry) -> list[str]:
    """The faults of an entry after the previous one (None: it is the first)."""
    before, index = (previous.entry_hash, previous.header.index) if previous is not None else (GENESIS, 0)
    faults = check_form(entry.header)
    if entry.header.index != index + 1:
        faults.append(f"index: {entry.header.index} after {index}")
    if len(before) != DIGEST_BYTES or entry_hash(before, entry.header) != entry.entry_hash:
        faults.append("entry_hash: is not the hash of this header after the entry before")
    if entry.payload and payload_digest(entry.payload) != entry.header.payload_digest:
        faults.append("payload: does not match payload_digest")
    if previous is not None and entry.header.epoch < previous.header.epoch and entry.header.writer == previous.header.writer:
        faults.append(f"epoch: {entry.header.epoch} after {previous.header.epoch}")
    if previous is not None and entry.header.log_id != previous.header.log_id:
        faults.append(f"log_id: {entry.header.log_id} after {previous.header.log_id}")
    return faults
