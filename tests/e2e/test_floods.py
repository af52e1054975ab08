"""Hostile callers, with and without a token: the sidecar's memory stays bounded, and another tenant is served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from ostinato import errors

from tests.bench.floods import STRANGER, TENANT, begin
from tests.bench.memory import Memory
from tests.e2e.kit import GENERATE, Tenants, one, own, tenants
from tests.floods import chatty
from tests.http2 import connected, framed
from tests.waiting import eventually

MEGABYTES_MAX = 400
SECONDS = 2.5
"""Without the bounds the slowest of these floods takes 400 MB in less."""


@pytest.fixture(scope="module", name="attacked")
def _attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    """acme is hostile, zeta is not."""
    with tenants(tmp_path_factory.mktemp("floods"), "acme", "zeta", sidecar=["--arrival-seconds-max", "2"]) as attacked:
        yield attacked


@pytest.mark.parametrize(
    ("flood", "who"),
    [
        ("large", STRANGER),
        ("resets", STRANGER),
        ("large", TENANT),
        ("empty_items", TENANT),
        ("empty_messages", TENANT),
        ("unread_records", TENANT),
    ],
)
async def test_a_flood_leaves_memory_and_others_alone(attacked: Tenants, flood: str, who: str) -> None:
    """At most 400 MB are resident at any moment, and each request of another tenant is answered."""
    peak, processes = 0.0, begin(flood, who, attacked.pair.target, attacked.tokens["acme"], SECONDS)
    async with attacked.client("zeta") as other:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            peak = max(peak, Memory.of(attacked.pair.sidecar.pid).now)
            assert (await other.generate("hello", max_new_tokens=2, timeout=20)).results[0].HasField("output")
    for process in processes:
        process.kill()
        process.wait()

    assert peak < MEGABYTES_MAX


async def test_the_token_is_judged_before_the_request_is_there(attacked: Tenants) -> None:
    """A call whose request never comes is refused for its credentials; with a token it waits for the request."""
    async with connected(attacked.pair.target, window=65535) as peer:
        missing = peer.begin(GENERATE)
        await peer.send(missing, framed(b"", 1000))
        await asyncio.wait_for(peer.ended[missing].wait(), 10)
        waiting, begun = peer.begin(GENERATE, attacked.metadata("acme")), time.monotonic()
        await asyncio.wait_for(peer.ended[waiting].wait(), 10)

        assert b"who calls?" in peer.headers[missing]
        assert time.monotonic() - begun > 1, "it was waited for"
        assert b"not whole within" in peer.headers[waiting]


async def test_charges_end_with_their_items(attacked: Tenants) -> None:
    """After requests that were answered, refused and cancelled nothing is charged any more."""
    async with attacked.client("acme") as client:
        await client.generate(["a"] * 8, max_new_tokens=2, key="twice")
        await client.generate(["a"] * 8, max_new_tokens=2, key="twice")
        with pytest.raises(errors.InvalidRequest):
            await client.generate("a", max_new_tokens=0)
        left = asyncio.create_task(client.generate(["b"] * 8, max_new_tokens=4000, ignore_eos=True))
        await eventually(lambda: attacked.pair.metrics()["ostinato_request_bytes"] > 0, "it is charged")
        left.cancel()

    for charged in ("ostinato_request_bytes", "ostinato_open_calls"):
        await eventually(lambda name=charged: attacked.pair.metrics()[name] == 0, f"{charged} is 0")  # type: ignore[misc]


async def test_a_connection_ends_at_its_age() -> None:
    """A reader that takes nothing loses its connection, and what gRPC holds for it, after age and grace."""
    async with own("--connection-age-seconds", "1", "--connection-grace-seconds", "1") as door:
        pair = door.pair
        async with connected(pair.target, window=0) as peer:
            peer.call(GENERATE, chatty())
            await eventually(lambda: pair.metrics()["ostinato_held_bytes"] > 100_000, "an answer waits")
            await eventually(lambda: peer.over, "the connection is closed")
        await eventually(lambda: pair.metrics()["ostinato_held_bytes"] == 0, "nothing is held")


async def test_connections_are_bounded() -> None:
    """Beyond --connections-max a connection is closed at once; those that are there are served."""
    async with own("--connections-max", "2") as door:
        pair = door.pair
        async with connected(pair.target, window=65535) as first, connected(pair.target) as second:
            await asyncio.gather(*(asyncio.wait_for(peer.greeted.wait(), 10) for peer in (first, second)))
            async with connected(pair.target) as third:
                await eventually(lambda: third.over, "it is closed")
            stream = first.call(GENERATE, one(max_new_tokens=2).SerializeToString())
            await asyncio.wait_for(first.ended[stream].wait(), 10)

            assert first.data[stream]
            assert not second.over


async def test_a_burst_on_a_new_connection_loses_no_call() -> None:
    """1,000 calls at once, without a key, are all answered, although one connection takes fewer."""
    async with own("--connection-calls-max", "128") as door:
        answers = await asyncio.gather(*(door.client.generate("hello", max_new_tokens=2) for _ in range(1000)))
        assert len({answer.results[0].sequence for answer in answers}) == 1000
