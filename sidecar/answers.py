"""Those who wait for items, and what they are answered.

A `Waiter` collects the results of one call; `sidecar.streaming` has the one that streams. An answer is derived from journal
entries alone: a later answer equals the first, byte for byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import grpc

from ostinato import enums, errors
from ostinato.chain import receipt
from ostinato.errors import PayloadPruned
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from sidecar.held import COPIES, Account
from sidecar.journal.model import ItemEntries, Sealed
from sidecar.journal.writer import Journal


class Waiter:
    """One call that waits for items. Told what happens to them on the event loop, and never blocks it."""

    wants_tokens = False
    batch_id = 0
    """0: the call joined items that were admitted before."""
    sequences = range(0)
    """Empty until they are known."""

    def tokens(self, run: generation_pb2.TokenRun) -> None: ...

    def restarted(self, event: generation_pb2.Restarted) -> None: ...

    def result(self, result: types_pb2.Result) -> None:
        raise NotImplementedError

    def lost(self, error: errors.OstinatoError) -> None:
        """The call ends without an outcome of its items. The first error counts."""
        raise NotImplementedError

    async def answer(self, stamp: types_pb2.Stamp, *, repeated: bool = False) -> bytes | None:
        """The response, or None if it was written. Raises what the call is lost for. `repeated`: the key was bound before."""
        raise NotImplementedError


class UnaryWaiter(Waiter):
    """Collects the results of a whole batch, serialised, so that their size is known: they are counted in the account."""

    def __init__(self, count: int, account: Account) -> None:
        self._count, self._account = count, account
        self._results: dict[int, bytes] = {}
        """By sequence: a response with this result alone. Serialised messages, concatenated, are one message."""
        self._ended: asyncio.Future[errors.OstinatoError | None] = asyncio.get_running_loop().create_future()
        account.forget = self._forget

    def result(self, result: types_pb2.Result) -> None:
        if self._account.error is not None:
            return
        data = self._results[result.sequence] = generation_pb2.GenerateResponse(results=[result]).SerializeToString()
        if len(self._results) == self._count and not self._ended.done():
            self._ended.set_result(None)
        self._account.add(COPIES * len(data))

    def lost(self, error: errors.OstinatoError) -> None:
        if not self._ended.done():
            self._ended.set_result(error)

    def _forget(self) -> None:
        self._results.clear()
        if not self._ended.done():
            self._ended.set_result(self._account.error)

    async def answer(self, stamp: types_pb2.Stamp, *, repeated: bool = False) -> bytes:
        """A serialised GenerateResponse, its results in ascending order of sequence."""
        error = await self._ended or self._account.error
        if error is not None:
            raise error
        results = [self._results[sequence] for sequence in sorted(self._results)]
        return b"".join([generation_pb2.GenerateResponse(stamp=stamp).SerializeToString(), *results])


class CancelWaiter(Waiter):
    """Waits for the ends of items that are cancelled on request."""

    def __init__(self, count: int) -> None:
        self._open, self._cancelled = count, 0
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._check()

    def result(self, result: types_pb2.Result) -> None:
        self._open -= 1
        self._cancelled += result.status.code == grpc.StatusCode.CANCELLED.value[0]
        self._check()

    def lost(self, error: errors.OstinatoError) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    def _check(self) -> None:
        if not self._open and not self._ended.done():
            self._ended.set_result(self._cancelled)

    async def cancelled(self) -> int:
        """How many ended as CANCELLED, when all have ended."""
        return await self._ended


# ---- answers, from journal entries


ENDED_BY_KIND: Mapping[types_pb2.EntryKind.ValueType, type[errors.Ended]] = {
    types_pb2.ENTRY_KIND_CANCELLED: errors.Cancelled,
    types_pb2.ENTRY_KIND_ABANDONED: errors.Abandoned,
}
"""Kinds of outcome that one error makes. The header alone shows which."""


def outcome_kind(error: errors.OstinatoError | None) -> types_pb2.EntryKind.ValueType:
    if error is None:
        return types_pb2.ENTRY_KIND_COMPLETED
    if isinstance(error, errors.Cancelled):
        return types_pb2.ENTRY_KIND_CANCELLED
    return types_pb2.ENTRY_KIND_ABANDONED if isinstance(error, errors.Abandoned) else types_pb2.ENTRY_KIND_FAILED


def ended_payload(error: errors.OstinatoError, timing: types_pb2.Timing, nonce: bytes) -> sequencer_pb2.EndedPayload:
    code, reason = error.code.value[0], error.reason
    return sequencer_pb2.EndedPayload(code=code, reason=reason, message=error.message, timing=timing, nonce=nonce)


def result_of(
    outcome: Sealed, payload: sequencer_pb2.CompletedPayload | sequencer_pb2.EndedPayload | None = None
) -> types_pb2.Result:
    """The result of an outcome's entry. `payload`: the entry's, if it need not be parsed. Raises PayloadPruned."""
    header = outcome.header
    if payload is None:
        if not outcome.payload:
            raise PayloadPruned(f"the payload of sequence {header.sequence} is not kept any more")
        completed = header.kind == types_pb2.ENTRY_KIND_COMPLETED
        kind = sequencer_pb2.CompletedPayload if completed else sequencer_pb2.EndedPayload
        payload = kind.FromString(outcome.payload)
    result = types_pb2.Result(sequence=header.sequence, attempt=header.attempt, timing=payload.timing)
    if isinstance(payload, sequencer_pb2.CompletedPayload):
        result.output.CopyFrom(payload.output)
        result.receipt.CopyFrom(receipt(header, outcome.previous_hash, outcome.entry_hash, payload.nonce))
        if outcome.signed is not None:
            outcome.signed.put_into(result.receipt)
    else:
        error = errors.TABLE.get(payload.reason, errors.EngineFailed)(payload.message)
        result.status.CopyFrom(errors.to_status(error))
    return result


def answer_of(entries: ItemEntries) -> types_pb2.Result:
    """The result, and the verdict if one was asked for. The item must have ended. Raises PayloadPruned."""
    assert entries.outcome is not None
    result = result_of(entries.outcome)
    if result.HasField("output") and (_verify(entries) or entries.verified is not None):
        result.comparison.CopyFrom(verification_of(result.sequence, entries.verified))
    return result


def answer_or_header(entries: ItemEntries) -> types_pb2.Result:
    """As `answer_of`. If the outcome's payload was dropped, the status that its header shows: CANCELLED, ABANDONED, or
    PAYLOAD_PRUNED for the other kinds."""
    assert entries.outcome is not None
    header = entries.outcome.header
    if entries.outcome.payload:
        return answer_of(entries)
    kind = enums.word(types_pb2.EntryKind, header.kind)
    why = f"sequence {header.sequence} ended as {kind}; its payload is not kept any more"
    error = ENDED_BY_KIND.get(header.kind, PayloadPruned)(why)
    return types_pb2.Result(sequence=header.sequence, attempt=header.attempt, status=errors.to_status(error))


def is_whole(entries: ItemEntries) -> bool:
    """Whether the journal has the outcome, and the verdict if one was asked for."""
    if entries.outcome is None or entries.outcome.header.kind != types_pb2.ENTRY_KIND_COMPLETED:
        return entries.outcome is not None
    return not _verify(entries) or entries.verified is not None


def _verify(entries: ItemEntries) -> bool:
    payload = entries.admitted.payload
    return bool(payload) and sequencer_pb2.AdmittedPayload.FromString(payload).verify


def verification_of(sequence: int, verified: Sealed | None) -> types_pb2.Comparison:
    """The verdict of a verification. None: the journal has none, and will not get one."""
    if verified is not None and verified.payload:
        comparison = sequencer_pb2.AuditedPayload.FromString(verified.payload).comparison
        if verified.header.form:
            comparison.ClearField("company")  # how much others ran is not for a tenant
        return comparison
    missing = errors.Abandoned("no verdict was recorded: the sidecar stopped before, or the journal was full")
    return no_verdict(sequence, types_pb2.COMPARISON_KIND_VERIFY, missing)


def no_verdict(sequence: int, kind: types_pb2.ComparisonKind.ValueType, error: errors.OstinatoError) -> types_pb2.Comparison:
    """Why there is no second output to compare."""
    return types_pb2.Comparison(sequence=sequence, kind=kind, status=errors.to_status(error))


def stamp_of(header: types_pb2.EntryHeader) -> types_pb2.Stamp:
    """The stamp of a batch, from the ADMITTED header of any of its items."""
    return types_pb2.Stamp(
        log_id=header.log_id,
        writer=header.writer,
        epoch=header.epoch,
        first_sequence=header.first_sequence,
        count=header.count,
    )


def record_of(entries: ItemEntries, fingerprints: Mapping[bytes, types_pb2.Fingerprint]) -> sequencer_pb2.ItemRecord:
    """What the journal has of an item; what was pruned is left out. `fingerprints`: by digest."""
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


PAGE_ITEMS = 16
"""An item with all its logprobs has more than a megabyte."""


async def pages(journal: Journal, first: int, last: int) -> AsyncIterator[Sequence[ItemEntries]]:
    """The items of a range, a page at a time."""
    while first <= last and (page := await journal.items(first, last, PAGE_ITEMS)):
        yield page
        first = page[-1].admitted.header.sequence + 1
