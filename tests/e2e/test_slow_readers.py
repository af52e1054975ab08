"""Clients that do not read or that disappear: their calls are bounded and lost, and other clients are not affected."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ostinato import errors
from ostinato.v1 import generation_pb2, sequencer_pb2

from tests.e2e.kit import GENERATE, STREAM, Door, asked, numbered, one, own, refused
from tests.http2 import Peer, connected
from tests.waiting import eventually

TAIL, REPLAY = "/ostinato.v1.Sequencer/Tail", "/ostinato.v1.Sequencer/Replay"
MANY: dict[str, Any] = {"max_new_tokens": 400, "ignore_eos": True, "logprobs": 20}
"""About 130 kB for each item."""
SMALL = ["--max-response-bytes", "1000000", "--response-bytes-ceiling", "1000000"]
"""Of answers: what is held for all is at least twice as much."""
HELD = ("--held-bytes-max", "2000000", "--held-call-bytes-max", "2000000")


def lost(door: Door, bound: str) -> float:
    """Calls that were lost to this bound."""
    return door.pair.metrics()[f'ostinato_lost_calls_total{{bound="{bound}"}}']


def held(door: Door) -> float:
    return door.pair.metrics()["ostinato_held_bytes"]


def wanted(count: int, key: str = "") -> bytes:
    return asked(["a"] * count, key, **MANY).SerializeToString()


async def said(peer: Peer, stream: int) -> bytes:
    """The headers and trailers of a call that is read at last."""
    peer.grant(stream)
    async with asyncio.timeout(30):
        await peer.ended[stream].wait()
    return bytes(peer.headers[stream])


async def test_a_peer_that_never_grants_a_window() -> None:
    """Not even Admitted can be written to it. Its calls are lost: items without a key are CANCELLED, those with one go on, and
    other callers are served meanwhile."""
    async with own("--held-call-bytes-max", "20000") as door, connected(door.pair.target, window=0) as peer:
        plain = peer.call(STREAM, wanted(2))
        await numbered(door.client, 2)
        keyed = peer.call(STREAM, wanted(1, key="slow"))

        for _ in range(5):
            async with asyncio.timeout(30):
                await door.client.generate("b", max_new_tokens=2)
        await eventually(lambda: lost(door, "call") == 2, "both calls are lost")

        assert [await door.outcome(number) for number in (1, 2)] == [("CANCELLED", "CANCELLED")] * 2
        assert await door.outcome(3) == ("COMPLETED", "")
        for stream in (plain, keyed):
            assert b"waited" in await said(peer, stream)
        await door.freed()
        await eventually(lambda: held(door) == 0, "nothing is held any more")


async def test_unread_streams_are_bounded_together() -> None:
    """The bound of all calls together applies where each call is within its own: the largest is lost, and readers are
    served."""
    async with own(*SMALL, *HELD) as door, connected(door.pair.target, window=0) as peer:
        small = peer.call(STREAM, wanted(1))
        for _ in range(3):
            peer.call(STREAM, wanted(6))  # many times as much: what a call holds is an estimate
        await eventually(lambda: lost(door, "all") >= 1, "one is lost")
        await door.freed()

        assert held(door) <= 2_000_000
        assert (await door.client.generate("b", max_new_tokens=2)).results[0].HasField("output")
        assert b"waited" not in await said(peer, small)
        assert lost(door, "call") == 0


async def test_unread_answers_are_counted() -> None:
    """A unary answer that gRPC cannot write counts twice (it is held twice) and cannot be dropped: with too many of them, new
    calls are refused until their callers disconnect."""
    async with own(*SMALL, *HELD) as door, connected(door.pair.target, window=0) as peer:
        streams = []
        for count in range(1, 4):
            streams.append(peer.call(GENERATE, wanted(2)))
            await eventually(lambda: held(door) > count * 400_000, "its answer waits")  # noqa: B023

        before = await door.last_sequence()
        await refused(door.generation.Generate(one()), errors.QueueFull)
        await refused(door.streamed(one()), errors.QueueFull)
        await refused(door.sequencer.Get(sequencer_pb2.GetRequest(sequence=1)), errors.QueueFull)
        assert await door.last_sequence() == before

        for stream in streams:
            peer.reset(stream)
        await eventually(lambda: held(door) == 0, "nothing is held any more")
        assert (await door.generation.Generate(one(max_new_tokens=2))).results[0].HasField("output")


async def test_followers_leave_room_for_readers() -> None:
    """With the maximum of followers, another follower is refused, but the journal can be read."""
    async with own("--followers-max", "2") as door:
        await door.client.generate(["a", "b"], max_new_tokens=1)
        follow = sequencer_pb2.TailRequest(from_index=1, follow=True)
        followers: list[Any] = [door.sequencer.Tail(follow) for _ in range(2)]
        for follower in followers:
            assert (await follower.read()).entries

        assert len(await door.entries(1)) == (await door.client.head()).index
        await refused(door.sequencer.Tail(follow).read(), errors.QueueFull)
        for follower in followers:
            follower.cancel()


READS: dict[str, Any] = {
    "a follower": (TAIL, sequencer_pb2.TailRequest(from_index=1, follow=True)),
    "a tail": (TAIL, sequencer_pb2.TailRequest(from_index=1)),
    "a replay": (REPLAY, sequencer_pb2.ReplayRequest(range=generation_pb2.SequenceRange(first=1, last=1))),
}
ONE_PLACE = ("--followers-max", "1", "--tails-max", "1", "--replays-max", "1", "--unread-seconds-max", "0.3")


@pytest.mark.parametrize(("path", "request_"), READS.values(), ids=READS)
async def test_a_read_that_does_not_read_loses_its_place(path: str, request_: Any) -> None:
    """After --unread-seconds-max, with SLOW_READER; then another gets the place: else a few such callers would block all."""
    async with own(*ONE_PLACE) as door, connected(door.pair.target, window=0) as peer:
        await door.client.generate("a", max_new_tokens=1)
        unread = peer.call(path, request_.SerializeToString())
        await eventually(lambda: lost(door, "time") == 1, "it is lost")

        reader: Any = door.sequencer.Tail(request_) if path == TAIL else door.sequencer.Replay(request_)
        assert (await reader.read()).ByteSize()
        reader.cancel()
        assert b"waited" in await said(peer, unread)


@pytest.mark.parametrize("how", ["reset", "vanish"])
async def test_a_caller_that_vanishes_leaves_no_traceback(door: Door, how: str) -> None:
    """A client that disappears while it is written to: its items end, and the log has no error."""
    before, said = await door.last_sequence(), len(door.pair.sidecar.records())
    async with connected(door.pair.target, window=0) as peer:
        streams = [peer.call(path, wanted(1)) for path in (STREAM, GENERATE) for _ in range(10)]
        streams += [peer.call(TAIL, sequencer_pb2.TailRequest(follow=True).SerializeToString()) for _ in range(10)]
        await numbered(door.client, before + 20)
        if how == "reset":
            for stream in streams:
                peer.reset(stream)
        else:
            peer.vanish()
    await door.freed()
    await eventually(lambda: held(door) == 0, "nothing is held any more")

    wrong = [record for record in door.pair.sidecar.records()[said:] if record["level"] == "ERROR"]
    assert wrong == []
    assert not [line for line in door.pair.sidecar.lines if line.startswith("Traceback")]
