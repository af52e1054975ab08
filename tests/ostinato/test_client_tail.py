"""Tail: every entry once, in order, whatever happens to the connection."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato import Client, errors
from ostinato.v1 import sequencer_pb2

from tests.ostinato.fake import Fake, serving, talking

LOST = [errors.Draining("going", retry_after=0.01), errors.SlowReader("slow", retry_after=0.01)]


async def _indexes(client: Client, count: int, from_index: int = 1) -> list[int]:
    """Of the first so many entries of a follow."""
    found: list[int] = []
    async with aclosing(client.tail(from_index, follow=True)) as entries:
        async for entry in entries:
            found.append(entry.header.index)
            if len(found) == count:
                break
    return found


async def test_tail_ends_at_the_head() -> None:
    """Without follow the entries end where the journal does, each by itself, with payloads only if wanted."""
    async with talking() as (_, client):
        await client.generate(["a", "b"])

        bare = [entry async for entry in client.tail(2)]
        full = [entry async for entry in client.tail(2, payloads=True)]

        assert [entry.header.index for entry in bare] == [2, 3, 4]
        assert not any(entry.payload for entry in bare)
        assert all(entry.payload for entry in full)


async def test_tail_without_follow_does_not_hide_a_loss() -> None:
    """A bounded tail that breaks is an error: nobody asked to wait."""
    async with talking() as (fake, client):
        await client.generate("a")
        fake.script["Tail"].append([sequencer_pb2.TailResponse(entries=fake.journal.entries[:1]), LOST[0]])
        with pytest.raises(errors.Draining):
            _ = [entry async for entry in client.tail()]


@settings(max_examples=10, deadline=None)
@given(breaks=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([*LOST, None])), max_size=3), start=st.integers(1, 3))
async def test_follow_resumes_where_it_was(breaks: list[tuple[int, errors.OstinatoError | None]], start: int) -> None:
    """However often and wherever a follow is cut, also by a quiet end, no entry is missing and none comes twice."""
    async with talking() as (fake, client):
        await client.generate(["a"] * 10)
        at = start - 1
        for count, error in breaks:
            sent = sequencer_pb2.TailResponse(entries=fake.journal.entries[at : at + count])
            fake.script["Tail"].append([sent, error] if error else [sent])
            at += count

        assert await _indexes(client, 21 - start, start) == list(range(start, 21))


async def test_follow_raises_what_waiting_does_not_cure() -> None:
    """Only a sidecar that is away is waited for."""
    async with talking() as (fake, client):
        fake.script["Tail"].append([errors.InvalidRequest("no")])
        with pytest.raises(errors.InvalidRequest):
            await _indexes(client, 1)


async def test_follow_outlives_a_restart(tmp_path: Path) -> None:
    """Entries of before and after a restart form one sequence, even if none had come when the sidecar went away."""
    fake, target = Fake(), f"unix:{tmp_path}/s"
    async with Client(target) as client:
        async with serving(fake, target):
            silent = asyncio.create_task(_indexes(client, 4))
            while fake.count("Tail") < 1:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        async with serving(fake, target):
            async with Client(target) as other:
                await other.generate(["a", "b"])
            assert await silent == [1, 2, 3, 4]


async def test_follow_of_nobody_is_an_error() -> None:
    """A sidecar that is not there at first is a wrong target, not a lost connection."""
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(errors.Disconnected):
            await _indexes(client, 1)


async def test_follow_keeps_its_deadline() -> None:
    """The timeout bounds a follow as a whole, over all its connections and the pauses between them."""
    async with talking() as (fake, client):
        fake.script["Tail"].append([errors.SlowReader("slow", retry_after=1000)])
        with pytest.raises(errors.DeadlineExceeded):
            async with aclosing(client.tail(follow=True, timeout=0.5)) as entries:
                await anext(entries)


async def test_leaving_a_follow_ends_the_call() -> None:
    """A follower that goes away leaves nothing running at the sidecar."""
    async with talking() as (fake, client):
        await client.generate("a")
        await _indexes(client, 1)
        for _ in range(3000):
            if fake.calls[-1].cancelled:
                break
            await asyncio.sleep(0.01)
        assert fake.calls[-1].method == "Tail"
        assert fake.calls[-1].cancelled
