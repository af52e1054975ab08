"""Those who wait: what is merged for a reader who is not always there, in what order, and when it is too much."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import Cancelled, Draining, SlowReader, to_status
from ostinato.v1 import generation_pb2, types_pb2

from sidecar.answers import MESSAGE_BYTES, StreamWaiter, UnaryWaiter
from tests.sidecar.held_kit import account
from tests.sidecar.held_kit import held as reserved

Event = generation_pb2.GenerateEvent


def completed(sequence: int) -> types_pb2.Result:
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
    for result in (completed(3), failed(1)):
        call.result(result)
        await asyncio.sleep(0)
        assert not waiting.done()

    call.result(completed(2))

    answer = generation_pb2.GenerateResponse(stamp=STAMP, results=[failed(1), completed(2), completed(3)])
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
    call.result(completed(1))

    assert await taken(call, 6) == [
        Event(tokens=generation_pb2.Tokens(runs=[run(1, 0, 65)])),
        Event(restarted=restarted(1, 2)),
        Event(tokens=generation_pb2.Tokens(runs=[run(1, 0, 66, attempt=2), run(2, 0, 67)])),
        Event(failed=failed(2)),
        Event(tokens=generation_pb2.Tokens(runs=[run(1, 1, 68, attempt=2)])),
        Event(finished=completed(1)),
    ]
    assert await call.next() is None, "all has ended and was told"


async def test_a_run_is_of_one_attempt() -> None:
    """Tokens of an attempt that goes on behind another one are a run of their own, and bear its number."""
    call = StreamWaiter(1, account(), unwritten)
    for piece in (run(1, 0, 65), run(1, 1, 66, attempt=2), run(1, 2, 67, attempt=2)):
        call.tokens(piece)

    (event,) = await taken(call)
    assert list(event.tokens.runs) == [run(1, 0, 65), run(1, 1, 66, 67, attempt=2)]


async def test_a_taken_message_is_closed() -> None:
    """What a reader has taken does not grow under its hands."""
    call = StreamWaiter(1, account(), unwritten)
    call.tokens(run(1, 0, 65))
    (first,) = await taken(call)

    call.tokens(run(1, 1, 66))

    assert list(first.tokens.runs) == [run(1, 0, 65)]
    assert [list(event.tokens.runs) for event in await taken(call)] == [[run(1, 1, 66)]]


async def test_a_reader_waits_for_something() -> None:
    """With nothing to take it waits, and is woken by tokens and by an end."""
    call = StreamWaiter(1, account(), unwritten)
    happenings: list[Callable[[], None]] = [lambda: call.tokens(run(1, 0, 65)), lambda: call.result(completed(1))]
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
        call.result(completed(1))
        call.lost(Draining("first"))
        call.lost(Draining("second"))

    with pytest.raises(Draining, match="first"):
        await waiting
    assert await taken(streamed) == [Event(finished=completed(1))]
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
    held, lost = reserved(call=50_000)
    with held.account(stream=True) as account:
        call = StreamWaiter(2, account, unwritten)
        for index in range(100):
            call.tokens(large(1, index))
        assert 100 * 320 < account.waiting < 50_000
        await call.next()
        assert account.waiting == 0
        result = completed(2)
        result.output.logprobs.extend(large(2, 0, 60).logprobs)
        call.result(result)
        assert not account.lost.done()

        call.tokens(large(1, 100, 10))

        assert account.lost.done()
        call.tokens(large(1, 110, 1000))
        call.result(completed(1))
        assert (account.waiting, held.bytes, lost) == (0, 0, ["call"])
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
    held, lost = reserved(everything=20_000)
    with held.account(stream=False) as account:
        call = UnaryWaiter(3, account)
        waiting = asyncio.ensure_future(call.answer(STAMP))
        for sequence in (1, 2):
            result = completed(sequence)
            result.output.logprobs.extend(large(sequence, 0, 20).logprobs)
            call.result(result)

        with pytest.raises(SlowReader):
            await waiting
        call.result(completed(3))
        assert (held.bytes, lost) == (0, ["all"])


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
            call.result(completed(sequence))
        await take()
        assert got == sent

    asyncio.run(tell())
