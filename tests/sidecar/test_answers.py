"""Waiters: what is merged for a slow reader, in what order, and when it is too much. Answers derived from journal entries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato import errors
from ostinato.chain import check_result
from ostinato.errors import Cancelled, Draining, SlowReader, to_status
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from sidecar.answers import (
    MESSAGE_BYTES,
    StreamWaiter,
    UnaryWaiter,
    answer_of,
    ended_payload,
    outcome_kind,
    record_of,
    result_of,
    stamp_of,
)
from sidecar.journal.ledger import Known, Ledger
from sidecar.journal.model import Head, ItemEntries, Outcome, Sealed
from tests.sidecar.held_kit import account, held
from tests.sidecar.journal_kit import LOG_ID, SECRET, admission, audit, completed, ended, item

TIMING = types_pb2.Timing(queue_micros=1, first_token_micros=2, total_micros=3)


def ledger(head: Head | None = None, *unfinished: int) -> Ledger:
    """Of an empty journal, or of one that stands there."""
    head = head or Head(LOG_ID, "writer", 1, 0, bytes(32), 0)
    return Ledger(head, Known(unfinished=frozenset(unfinished)), 1_700_000_000_000, SECRET)


def entries(outcome: str = "completed") -> tuple[Sealed, Sealed]:
    """An item's ADMITTED entry and its outcome's."""
    made = ledger()
    (admitted,) = made.append(admission(item(1, 2, seed=5))).entries
    draft = completed(admitted, 7, 8)
    if outcome != "completed":
        error = errors.TABLE[outcome]("it was not to be")
        draft = Outcome(admitted.header, outcome_kind(error), 2, ended_payload(error, TIMING, draft.payload.nonce))
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
    """Every other error than Cancelled and Abandoned is FAILED."""
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


def test_an_unknown_reason() -> None:
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
    in the same words; an item that failed, or that was not to be verified, has none."""
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


Event = generation_pb2.GenerateEvent


def finished(sequence: int) -> types_pb2.Result:
    return types_pb2.Result(sequence=sequence, output=types_pb2.Output(text="x"))


def failed(sequence: int) -> types_pb2.Result:
    return types_pb2.Result(sequence=sequence, status=to_status(Cancelled("no")))


def run(sequence: int, first_token: int, *ids: int, attempt: int = 1) -> generation_pb2.TokenRun:
    return generation_pb2.TokenRun(
        sequence=sequence,
        attempt=attempt,
        first_token=first_token,
        token_ids=ids,
        text="".join(map(chr, ids)),
        logprobs=[types_pb2.TokenLogprobs(logprob=-token) for token in ids],
    )


def restarted(sequence: int, attempt: int) -> generation_pb2.Restarted:
    return generation_pb2.Restarted(sequence=sequence, attempt=attempt)


async def unwritten(event: bytes) -> None:
    """Events are taken by `next` here."""
    raise AssertionError


async def taken(call: StreamWaiter, count: int = 1) -> list[Event]:
    """The next events."""
    events = [await call.next() for _ in range(count)]
    return [Event.FromString(data) for data in events if data is not None]


STAMP = types_pb2.Stamp(log_id="0" * 32, first_sequence=1, count=3)


async def test_a_unary_call_waits_for_all() -> None:
    """Its results are complete and ascending, whatever the order of the ends; tokens and restarts are not for it."""
    call = UnaryWaiter(3, account())
    assert not call.wants_tokens
    waiting = asyncio.ensure_future(call.answer(STAMP))
    call.tokens(run(1, 0, 65))
    call.restarted(restarted(1, 2))
    for result in (finished(3), failed(1)):
        call.result(result)
        await asyncio.sleep(0)
        assert not waiting.done()

    call.result(finished(2))

    answer = generation_pb2.GenerateResponse(stamp=STAMP, results=[failed(1), finished(2), finished(3)])
    assert await waiting == answer.SerializeToString()


async def test_tokens_that_wait_are_one_message() -> None:
    """Runs of one item become one run; those of several items one message."""
    call = StreamWaiter(2, account(), unwritten)
    for piece in (run(1, 0, 65), run(2, 0, 66), run(1, 1, 67, 68), run(2, 1, 69)):
        call.tokens(piece)

    assert await taken(call) == [Event(tokens=generation_pb2.Tokens(runs=[run(1, 0, 65, 67, 68), run(2, 0, 66, 69)]))]


async def test_nothing_moves_past_an_end_or_a_restart() -> None:
    """Only what follows one another is merged: the order of one item's events is the order in which they happened."""
    call = StreamWaiter(2, account(), unwritten)
    call.tokens(run(1, 0, 65))
    call.restarted(restarted(1, 2))
    call.tokens(run(1, 0, 66, attempt=2))
    call.tokens(run(2, 0, 67))
    call.result(failed(2))
    call.tokens(run(1, 1, 68, attempt=2))
    call.result(finished(1))

    assert await taken(call, 6) == [
        Event(tokens=generation_pb2.Tokens(runs=[run(1, 0, 65)])),
        Event(restarted=restarted(1, 2)),
        Event(tokens=generation_pb2.Tokens(runs=[run(1, 0, 66, attempt=2), run(2, 0, 67)])),
        Event(failed=failed(2)),
        Event(tokens=generation_pb2.Tokens(runs=[run(1, 1, 68, attempt=2)])),
        Event(finished=finished(1)),
    ]
    assert await call.next() is None, "all has ended and was told"


async def test_a_run_is_of_one_attempt() -> None:
    """Tokens of an attempt that goes on behind another one are a run of their own, and bear its number."""
    call = StreamWaiter(1, account(), unwritten)
    for piece in (run(1, 0, 65), run(1, 1, 66, attempt=2), run(1, 2, 67, attempt=2)):
        call.tokens(piece)

    (event,) = await taken(call)
    assert list(event.tokens.runs) == [run(1, 0, 65), run(1, 1, 66, 67, attempt=2)]


async def test_a_reader_waits_for_something() -> None:
    """With nothing to take it waits, and is woken by tokens and by an end."""
    call = StreamWaiter(1, account(), unwritten)
    happenings: list[Callable[[], None]] = [lambda: call.tokens(run(1, 0, 65)), lambda: call.result(finished(1))]
    for happen in happenings:
        waiting = asyncio.ensure_future(taken(call))
        await asyncio.sleep(0)
        assert not waiting.done()
        happen()
        assert len(list(await waiting)) == 1
    assert await call.next() is None


async def test_a_call_is_lost_behind_what_it_was_told() -> None:
    """Both kinds are woken to raise why, the first reason; a stream after what had come before."""
    unary, streamed = UnaryWaiter(2, account()), StreamWaiter(2, account(), unwritten)
    waiting = asyncio.ensure_future(unary.answer(STAMP))
    await asyncio.sleep(0)
    for call in (unary, streamed):
        call.result(finished(1))
        call.lost(Draining("first"))
        call.lost(Draining("second"))

    with pytest.raises(Draining, match="first"):
        await waiting
    assert await taken(streamed) == [Event(finished=finished(1))]
    with pytest.raises(Draining, match="first"):
        await streamed.next()


def large(sequence: int, first_token: int, count: int = 1) -> generation_pb2.TokenRun:
    """With 20 logprobs for each token: about 320 bytes."""
    top = [types_pb2.TopLogprob(token_id=1000 + rank, logprob=-rank / 7) for rank in range(20)]
    each = types_pb2.TokenLogprobs(logprob=-0.1, top=top)
    ids = [65] * count
    return generation_pb2.TokenRun(
        sequence=sequence, attempt=1, first_token=first_token, token_ids=ids, text="A" * count, logprobs=[each] * count
    )


async def test_a_reader_who_falls_behind() -> None:
    """What waits counts in bytes, logprobs and results too; what was taken does not. Beyond the bound the call is lost, holds
    nothing, and does not grow any more."""
    bytes_held, lost = held(call=50_000)
    with bytes_held.account(stream=True) as account:
        call = StreamWaiter(2, account, unwritten)
        for index in range(100):
            call.tokens(large(1, index))
        assert 100 * 320 < account.waiting < 50_000
        await call.next()
        assert account.waiting == 0
        result = finished(2)
        result.output.logprobs.extend(large(2, 0, 60).logprobs)
        call.result(result)
        assert not account.lost.done()

        call.tokens(large(1, 100, 60))

        assert account.lost.done()
        call.tokens(large(1, 160, 1000))
        call.result(finished(1))
        assert (account.waiting, bytes_held.bytes, lost) == (0, 0, ["call"])
        with pytest.raises(SlowReader, match="more than 50000 bytes"):
            await call.next()


async def test_a_reader_who_waits_is_told_that_its_call_is_lost() -> None:
    """Another call's bytes may end one whose reader waits for something."""
    call = StreamWaiter(1, given := account(), unwritten)
    waiting = asyncio.ensure_future(call.next())
    await asyncio.sleep(0)

    given.lose("all", 1)

    with pytest.raises(SlowReader):
        await waiting


async def test_a_unary_answer_is_lost_to_the_bound_of_all() -> None:
    """Its results count twice, as gRPC will hold them; over the bound they are forgotten, and the caller is told."""
    bytes_held, lost = held(everything=20_000)
    with bytes_held.account(stream=False) as account:
        call = UnaryWaiter(3, account)
        waiting = asyncio.ensure_future(call.answer(STAMP))
        for sequence in (1, 2):
            result = finished(sequence)
            result.output.logprobs.extend(large(sequence, 0, 20).logprobs)
            call.result(result)

        with pytest.raises(SlowReader):
            await waiting
        call.result(finished(3))
        assert (bytes_held.bytes, lost) == (0, ["all"])


async def test_messages_of_tokens_are_bounded() -> None:
    """However much waits, no message of tokens grows far beyond its bound: a client reads 4 MiB, and what gRPC has it keeps."""
    call = StreamWaiter(64, account(), unwritten)
    for index in range(20):
        for sequence in range(1, 65):
            call.tokens(large(sequence, index))
    sizes, tokens = [], 0
    while tokens < 20 * 64:
        data = await call.next()
        assert data is not None
        sizes.append(len(data))
        tokens += sum(len(each.token_ids) for each in Event.FromString(data).tokens.runs)

    assert len(sizes) > 1
    assert max(sizes) < 2 * MESSAGE_BYTES


steps = st.lists(st.one_of(st.just("take"), st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans())), max_size=30)


@given(steps)
def test_merging_loses_nothing(script: list[str | tuple[int, int, bool]]) -> None:
    """However tokens and restarts of three items mix and whenever the reader comes, each item's tokens are there, in place."""

    async def tell() -> None:
        call = StreamWaiter(3, given := account(), unwritten)
        sent: dict[int, list[int]] = {1: [], 2: [], 3: []}
        got: dict[int, list[int]] = {1: [], 2: [], 3: []}
        attempts = dict.fromkeys(sent, 1)

        async def take() -> None:
            while given.waiting and (data := await call.next()) is not None:
                event = Event.FromString(data)
                if event.HasField("restarted"):
                    got[event.restarted.sequence] = []
                for each in event.tokens.runs:
                    assert each.first_token == len(got[each.sequence])
                    assert len(each.token_ids) == len(each.text) == len(each.logprobs)
                    got[each.sequence].extend(each.token_ids)

        waiting = 0
        for step in script:
            if not isinstance(step, tuple):
                if waiting:
                    await take()
                waiting = 0
                continue
            sequence, count, again = step
            if again:
                attempts[sequence] += 1
                sent[sequence] = []
                call.restarted(restarted(sequence, attempts[sequence]))
            ids = [65 + len(sent[sequence]) + index for index in range(count)]
            call.tokens(run(sequence, len(sent[sequence]), *ids, attempt=attempts[sequence]))
            sent[sequence] += ids
            waiting += 1
        for sequence in sent:
            call.result(finished(sequence))
        await take()
        assert got == sent

    asyncio.run(tell())
