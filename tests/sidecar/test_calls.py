"""Those who wait: what is merged for a reader who is not always there, in what order, and when it is too much."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import Cancelled, Draining, SlowReader, to_status
from ostinato.v1 import generation_pb2, types_pb2

from sidecar.calls import Streamed, Unary

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


async def test_a_unary_call_waits_for_all() -> None:
    """Its results are complete and ascending, whatever the order of the ends; tokens and restarts are not for it."""
    call = Unary(3)
    assert not call.wants_tokens
    waiting = asyncio.ensure_future(call.results())
    call.tokens(run(1, 0, 65))
    call.restarted(restarted(1, 2))
    for result in (completed(3), failed(1)):
        call.result(result)
        await asyncio.sleep(0)
        assert not waiting.done()

    call.result(completed(2))

    assert await waiting == [failed(1), completed(2), completed(3)]


async def test_tokens_that_wait_are_one_message() -> None:
    """Runs of one item become one run; those of several items one message."""
    call = Streamed(2, 100)
    for piece in (run(1, 0, 65), run(2, 0, 66), run(1, 1, 67, 68), run(2, 1, 69)):
        call.tokens(piece)

    assert await call.take() == [Event(tokens=generation_pb2.Tokens(runs=[run(1, 0, 65, 67, 68), run(2, 0, 66, 69)]))]


async def test_nothing_moves_past_an_end_or_a_restart() -> None:
    """Only what follows one another is merged: the order of one item's events is the order in which they happened."""
    call = Streamed(2, 100)
    call.tokens(run(1, 0, 65))
    call.restarted(restarted(1, 2))
    call.tokens(run(1, 0, 66, attempt=2))
    call.tokens(run(2, 0, 67))
    call.result(failed(2))
    call.tokens(run(1, 1, 68, attempt=2))
    call.result(completed(1))

    assert await call.take() == [
        Event(tokens=generation_pb2.Tokens(runs=[run(1, 0, 65)])),
        Event(restarted=restarted(1, 2)),
        Event(tokens=generation_pb2.Tokens(runs=[run(1, 0, 66, attempt=2), run(2, 0, 67)])),
        Event(failed=failed(2)),
        Event(tokens=generation_pb2.Tokens(runs=[run(1, 1, 68, attempt=2)])),
        Event(finished=completed(1)),
    ]
    assert not list(await call.take()), "all has ended and was told"


async def test_a_run_is_of_one_attempt() -> None:
    """Tokens of an attempt that goes on behind another one are a run of their own, and bear its number."""
    call = Streamed(1, 100)
    for piece in (run(1, 0, 65), run(1, 1, 66, attempt=2), run(1, 2, 67, attempt=2)):
        call.tokens(piece)

    (event,) = await call.take()
    assert list(event.tokens.runs) == [run(1, 0, 65), run(1, 1, 66, 67, attempt=2)]


async def test_a_taken_message_is_closed() -> None:
    """What a reader has taken does not grow under its hands."""
    call = Streamed(1, 100)
    call.tokens(run(1, 0, 65))
    (taken,) = await call.take()

    call.tokens(run(1, 1, 66))

    assert list(taken.tokens.runs) == [run(1, 0, 65)]
    assert [list(event.tokens.runs) for event in await call.take()] == [[run(1, 1, 66)]]


async def test_a_reader_waits_for_something() -> None:
    """With nothing to take it waits, and is woken by tokens and by an end."""
    call = Streamed(1, 100)
    happenings: list[Callable[[], None]] = [lambda: call.tokens(run(1, 0, 65)), lambda: call.result(completed(1))]
    for happen in happenings:
        waiting = asyncio.ensure_future(call.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        happen()
        assert len(list(await waiting)) == 1
    assert not list(await call.take())


async def test_a_call_is_lost_behind_what_it_was_told() -> None:
    """Both kinds are woken to raise why, the first reason; a stream after what had come before."""
    unary, streamed = Unary(2), Streamed(2, 100)
    waiting = asyncio.ensure_future(unary.results())
    await asyncio.sleep(0)
    for call in (unary, streamed):
        call.result(completed(1))
        call.lost(Draining("first"))
        call.lost(Draining("second"))

    with pytest.raises(Draining, match="first"):
        await waiting
    assert await streamed.take() == [Event(finished=completed(1))]
    with pytest.raises(Draining, match="first"):
        await streamed.take()


async def test_a_reader_who_falls_behind() -> None:
    """As many tokens as may wait are fine; one more loses the call, and from then on it grows no more."""
    call = Streamed(2, 3)
    call.tokens(run(1, 0, 65, 66))
    call.tokens(run(2, 0, 67))
    assert not call.overrun.done()
    await call.take()
    call.tokens(run(1, 2, 68, 69, 70))
    assert not call.overrun.done(), "what was taken does not count"

    call.tokens(run(2, 1, 71))

    assert call.overrun.done()
    call.tokens(run(2, 2, *[72] * 1000))
    with pytest.raises(SlowReader):
        await call.take()


async def test_ends_do_not_count_as_waiting() -> None:
    """A reader is not slow for having many items."""
    call = Streamed(100, 1)
    for sequence in range(100):
        call.result(completed(sequence))

    assert len(list(await call.take())) == 100


steps = st.lists(st.one_of(st.just("take"), st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans())), max_size=30)


@given(steps)
def test_merging_loses_nothing(script: list[str | tuple[int, int, bool]]) -> None:
    """However tokens and restarts of three items mix and whenever the reader comes, each item's tokens are there, in place."""

    async def tell() -> None:
        call = Streamed(3, 1000)
        sent: dict[int, list[int]] = {1: [], 2: [], 3: []}
        got: dict[int, list[int]] = {1: [], 2: [], 3: []}
        attempts = dict.fromkeys(sent, 1)

        async def take() -> None:
            for event in await call.take():
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
