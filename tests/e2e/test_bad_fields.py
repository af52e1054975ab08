"""Requests that must take no sequence number: bad fields, bad bytes, too large, or about what does not exist."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Mapping
from typing import Any

import pytest

from ostinato import errors
from ostinato.client import Client
from ostinato.requests import batch
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.e2e.kit import Door, Item, Parameters, Request, ids, items, one, own, refused, span

CONFIDENCES = (1.0, -0.1, float("nan"), 1 - 2**-53)
"""Outside 0 to 1, or too close to 1."""


def replay(door: Door, first: int, last: int, **options: Any) -> Awaitable[object]:
    span = generation_pb2.SequenceRange(first=first, last=last)
    return door.sequencer.Replay(sequencer_pb2.ReplayRequest(range=span, **options)).read()


def chat(*roles: str) -> types_pb2.Item:
    return Item(chat=types_pb2.Chat(messages=[types_pb2.Message(role=role, content="hello") for role in roles]))


BAD: Mapping[str, tuple[Request, str]] = {
    "empty batch": (items(), "items"),
    "a chat that the template refuses": (items(chat("user", "system")), "items[0].chat"),
    "no prompt": (items(Item(text="hello"), Item()), "items[1]"),
    "temperature of one item": (
        items(Item(text="a"), Item(text="b", parameters=Parameters(temperature=math.nan))),
        "items[1].parameters.temperature",
    ),
    "a format that the engine does not obey": (
        one(response_format=types_pb2.ResponseFormat(regex="a+")),
        "parameters.response_format.regex",
    ),
    "idempotency key too long": (batch("hello", key="é" * 128 + "x"), "idempotency_key"),
    "request id with a NUL": (batch("hello", request_id="a\0b"), "request_id"),
    "an answer that may be too large": (items(*[Item(text="a")] * 4, max_new_tokens=4000, logprobs=20), "items"),
}
"""One of each kind; all bounds are tested in tests/service/test_prepare.py and tests/sidecar/test_admission.py."""


@pytest.mark.parametrize(("request_", "field"), BAD.values(), ids=BAD)
async def test_a_bad_field_is_named(door: Door, request_: Request, field: str) -> None:
    """INVALID_ARGUMENT with the field's path, from both methods, before any number is given."""
    async with door.nothing_numbered():
        await refused(door.generation.Generate(request_), errors.InvalidRequest, field)
        await refused(door.streamed(request_), errors.InvalidRequest, field)


async def test_bad_requests_among_good_ones(door: Door) -> None:
    """Concurrent requests are prepared together but checked separately: bad ones are refused with their own fields, good ones
    are numbered without a gap, and one whose caller disconnects has no effect on the others."""
    before = await door.last_sequence()
    good = [door.generation.Generate(one(max_new_tokens=2)) for _ in range(20)]
    bad = [door.generation.Generate(items(*[Item(text="a")] * index, Item(text=""))) for index in range(10)]
    left = door.generation.Generate(one(max_new_tokens=2))
    left.cancel()

    for index, call in enumerate(bad):
        await refused(call, errors.InvalidRequest, f"items[{index}].text")
    numbers = sorted([(await call).stamp.first_sequence for call in good])

    assert numbers == list(range(before + 1, before + 21))
    assert left.cancelled()


async def test_a_bad_target_is_named(door: Door) -> None:
    """No target, an empty range, and a key that no database can hold are INVALID_ARGUMENT, with the field."""
    generation, sequencer, nul = door.generation, door.sequencer, "a\0b"
    async with door.nothing_numbered():
        for first, last in ((0, 1), (2, 1), (0, 0)):
            await refused(generation.Cancel(span(first, last)), errors.InvalidRequest, "range")
            await refused(replay(door, first, last), errors.InvalidRequest, "range")
        wrong: list[tuple[Awaitable[object], str]] = [
            (generation.Cancel(generation_pb2.CancelRequest()), "target"),
            (generation.Cancel(generation_pb2.CancelRequest(idempotency_key=nul)), "idempotency_key"),
            (sequencer.Get(sequencer_pb2.GetRequest()), "target"),
            (sequencer.Get(sequencer_pb2.GetRequest(sequence=0)), "sequence"),
            (sequencer.Get(sequencer_pb2.GetRequest(idempotency_key=nul)), "idempotency_key"),
            (sequencer.Replay(sequencer_pb2.ReplayRequest()).read(), "range"),
            (replay(door, 1, 1, concurrency=65), "concurrency"),
            *((sequencer.Report(sequencer_pb2.ReportRequest(confidence=bad)), "confidence") for bad in CONFIDENCES),
        ]
        for call, field in wrong:
            await refused(call, errors.InvalidRequest, field)


async def test_a_target_that_does_not_exist(door: Door) -> None:
    """A sequence or a key that was never given out is NOT_FOUND, for Cancel, Get and Replay alike."""
    newest = await door.last_sequence()
    cancels = [span(newest + 1, newest + 1), span(1, newest + 1), span(2**64 - 1, 2**64 - 1)]
    cancels += [generation_pb2.CancelRequest(idempotency_key=key) for key in ("never used", "")]
    gets = [sequencer_pb2.GetRequest(sequence=sequence) for sequence in (newest + 1, 2**63, 2**64 - 1)]
    gets.append(sequencer_pb2.GetRequest(idempotency_key="never used"))
    async with door.nothing_numbered():
        calls: list[Awaitable[object]] = [*map(door.generation.Cancel, cancels), *map(door.sequencer.Get, gets)]
        for call in (*calls, replay(door, newest + 1, 2**63)):
            await refused(call, errors.NotFound)


async def test_tail_from_anywhere(door: Door) -> None:
    """Index 0 means 1; beyond the head there are no entries."""
    await door.client.generate("a", max_new_tokens=1)
    head = (await door.client.head()).index

    assert await door.entries(0) == await door.entries(1) == list(range(1, head + 1))
    assert await door.entries(head) == [head]
    for beyond in (head + 1, 2**63, 2**64 - 1):
        assert await door.entries(beyond) == []


async def test_reading_large_payloads() -> None:
    """However large the record, each message of Tail is within gRPC's default limit. Get, which has one message, refuses and
    says what to do, and answers a client with a larger limit."""
    async with own(context_tokens=16_000) as door:
        # Stop strings stand in the request once, and in every payload.
        request = items(*[ids(13_000)] * 256, max_new_tokens=1, stop=[f"{n:->256}" for n in range(16)])
        request.idempotency_key = "large"
        response = await door.generation.Generate(request)
        record = await door.client.get(response.stamp.first_sequence)
        assert 256 * record[0].input.ByteSize() > 4 << 20, "or nothing is tested"

        assert await door.entries(1, payloads=True) == list(range(1, 2 * 256 + 2))
        said = await refused(
            door.sequencer.Get(sequencer_pb2.GetRequest(idempotency_key="large")), errors.InvalidRequest, "idempotency_key"
        )
        assert "sequences 1 to 256" in said.message
        async with Client(door.pair.target, max_response_bytes=64 << 20) as reader:
            assert [each.admitted.sequence for each in await reader.get(key="large")] == list(range(1, 257))
