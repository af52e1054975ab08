"""What is written to the sidecar: in order, tokens joined, bounded in size."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import EpochStale, SlowReader
from ostinato.v1 import engine_pb2, types_pb2

from service.outbox import Outbox

MANY = 1 << 30


async def next_of(outbox: Outbox) -> engine_pb2.ExecuteResponse | None:
    await outbox.ready()
    return outbox.next()


def tokens(run_id: int, first: int, text: str) -> engine_pb2.RunEvent:
    made = engine_pb2.RunTokens(
        first_token=first, token_ids=text.encode(), text=text, logprobs=[types_pb2.TokenLogprobs(logprob=-1)] * len(text)
    )
    return engine_pb2.RunEvent(run_id=run_id, tokens=made)


def finished(run_id: int) -> engine_pb2.RunEvent:
    return engine_pb2.RunEvent(run_id=run_id, finished=engine_pb2.Finished(output=types_pb2.Output(text="x" * 50)))


@given(st.lists(st.tuples(st.integers(1, 4), st.text(alphabet="ab", max_size=3)), max_size=60), st.data())
def test_nothing_is_lost_or_reordered(said: list[tuple[int, str]], data: st.DataObject) -> None:
    """Whenever the sidecar reads, each run's tokens arrive without gaps and in order, and its end last."""

    async def play() -> dict[int, str]:
        outbox, ended = Outbox(MANY, 60), set[int]()
        arrived, sent = dict.fromkeys(range(1, 5), ""), dict.fromkeys(range(1, 5), "")

        async def read() -> None:
            frame = await next_of(outbox)
            for event in frame.events if frame else ():
                assert event.run_id not in ended
                if event.HasField("finished"):
                    ended.add(event.run_id)
                    continue
                assert event.tokens.first_token == len(arrived[event.run_id])
                assert bytes(event.tokens.token_ids).decode() == event.tokens.text
                assert len(event.tokens.logprobs) == len(event.tokens.text)
                arrived[event.run_id] += event.tokens.text

        for run_id, text in said:
            outbox.put(tokens(run_id, len(sent[run_id]), text))
            sent[run_id] += text
            if data.draw(st.booleans()):
                await read()
        for run_id in sent:
            outbox.put(finished(run_id))
        outbox.close()
        while len(ended) < 4:
            await read()
        assert await next_of(outbox) is None
        assert arrived == sent
        return arrived

    asyncio.run(play())


async def test_tokens_that_wait_become_one() -> None:
    """However often a run reports, its tokens leave as one event in one message."""
    outbox = Outbox(MANY, MANY)
    for first in range(100):
        outbox.put(tokens(1 + first % 2, first // 2, "a"))
    frame = await next_of(outbox)

    assert frame is not None
    assert [(event.run_id, event.tokens.text) for event in frame.events] == [(1, "a" * 50), (2, "a" * 50)]


async def test_a_message_ends_at_its_size() -> None:
    """What exceeds the size waits for the next message; a larger event is a message of its own."""
    outbox = Outbox(MANY, 130)
    for run_id in range(1, 6):
        outbox.put(finished(run_id))
    outbox.put(tokens(9, 0, "a" * 200))
    counts = [len(frame.events) for _ in range(4) if (frame := await next_of(outbox)) is not None]

    assert counts == [2, 2, 1, 1]


async def test_welcome_goes_ahead_of_events() -> None:
    """The newest welcome is in the next message, once."""
    outbox = Outbox(MANY, MANY)
    outbox.put(finished(1))
    for incarnation in ("a", "b"):
        outbox.welcome(engine_pb2.Welcome(description=engine_pb2.DescribeResponse(incarnation=incarnation)))
    first = await next_of(outbox)
    outbox.put(finished(2))
    second = await next_of(outbox)

    assert first is not None
    assert (first.welcome.description.incarnation, len(first.events)) == ("b", 1)
    assert second is not None
    assert not second.HasField("welcome")


async def test_bound() -> None:
    """Beyond its bound the outbox fails at once, takes nothing more, and keeps its first error."""
    outbox = Outbox(200, MANY)
    for run_id in range(1, 100):
        outbox.put(finished(run_id))
    outbox.fail(EpochStale("later"))

    assert outbox.error
    assert len(outbox._waiting) < 5
    with pytest.raises(SlowReader):
        await next_of(outbox)


async def test_bound_counts_what_waits() -> None:
    """Only what waits counts towards the bound."""
    outbox = Outbox(200, 70)
    for run_id in range(1, 100):
        outbox.put(finished(run_id))
        await next_of(outbox)

    assert not outbox.error


async def test_next_waits() -> None:
    """While nothing waits there is no message."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(next_of(Outbox(MANY, MANY)), 0.02)
