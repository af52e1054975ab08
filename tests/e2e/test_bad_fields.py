"""Requests that must take no sequence number: bad fields, bad bytes, too large, or about what does not exist."""

from __future__ import annotations

import math
from collections.abc import Mapping

import grpc
import pytest

from ostinato import errors
from ostinato.client import Client
from ostinato.requests import batch
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.e2e.kit import (
    GENERATE,
    GET,
    STREAM,
    Door,
    Item,
    Parameters,
    Request,
    TokenIds,
    asked,
    entries,
    ids,
    items,
    one,
    own,
    refusal,
    replayed,
    span,
)

CONTEXT = 4096
LETTERS = b"etaoinshrdlcumwfgypbvkjxqz .,-\n"
"""With all of these as stop tokens, a scripted answer ends at its first token."""


def chat(*roles: str) -> types_pb2.Item:
    return Item(chat=types_pb2.Chat(messages=[types_pb2.Message(role=role, content="hello") for role in roles]))


BAD: Mapping[str, tuple[Request, str]] = {
    "empty batch": (items(), "items"),
    "one item too many": (items(*[Item(text="hello")] * 257), "items"),
    "a chat that the template refuses": (items(chat("user", "system")), "items[0].chat"),
    "no prompt": (items(Item(text="hello"), Item()), "items[1]"),
    "text over the context": (items(Item(text="a" * CONTEXT)), "items[0].text"),
    "token ids over the context": (items(ids(CONTEXT)), "items[0].token_ids"),
    "token id outside the vocabulary": (items(Item(token_ids=TokenIds(ids=[1, 262]))), "items[0].token_ids.ids[1]"),
    "temperature NaN": (one(temperature=math.nan), "parameters.temperature"),
    "temperature of one item": (
        items(Item(text="a"), Item(text="b", parameters=Parameters(temperature=math.nan))),
        "items[1].parameters.temperature",
    ),
    "top_k above the engine's": (one(top_k=1025), "parameters.top_k"),
    "stop string empty": (one(stop=["a", ""]), "parameters.stop[1]"),
    "a format that the engine does not obey": (
        one(response_format=types_pb2.ResponseFormat(regex="a+")),
        "parameters.response_format.regex",
    ),
    "idempotency key too long": (batch("hello", key="é" * 128 + "x"), "idempotency_key"),
    "request id too long": (batch("hello", request_id="x" * 257), "request_id"),
    "idempotency key with a NUL": (batch("hello", key="a\0b"), "idempotency_key"),
    "request id with a NUL": (batch("hello", request_id="a\0b"), "request_id"),
    "an unknown grade": (Request(items=[Item(text="hello")], required_grade=4), "required_grade"),  # type: ignore[arg-type]
}
"""One of each kind; all bounds are tested in tests/service/test_prepare.py and tests/sidecar/test_admission.py."""


@pytest.mark.parametrize(("request_", "field"), BAD.values(), ids=BAD)
async def test_a_bad_field_is_named(door: Door, request_: Request, field: str) -> None:
    """INVALID_ARGUMENT with the field's path, from both methods, before any number is given."""
    async with door.nothing_numbered():
        (await refusal(door.generation.Generate(request_))).says(errors.InvalidRequest, field)
        (await refusal(door.streamed(request_))).says(errors.InvalidRequest, field)


async def test_bad_requests_among_good_ones(door: Door) -> None:
    """Concurrent requests are prepared together but checked separately: bad ones are refused with their own fields, good ones
    are numbered without a gap, and one whose caller disconnects has no effect on the others."""
    before = await door.last_sequence()
    good = [door.generation.Generate(one(max_new_tokens=2)) for _ in range(20)]
    bad = [door.generation.Generate(items(*[Item(text="a")] * index, Item(text=""))) for index in range(10)]
    left = door.generation.Generate(one(max_new_tokens=2))
    left.cancel()

    for index, call in enumerate(bad):
        (await refusal(call)).says(errors.InvalidRequest, f"items[{index}].text")
    numbers = sorted([(await call).stamp.first_sequence for call in good])

    assert numbers == list(range(before + 1, before + 21))
    assert left.cancelled()


@pytest.mark.parametrize("confidence", [1.0, -0.1, 95.0, float("nan"), float("inf"), 1 - 2**-53])
async def test_report_with_a_bad_confidence(door: Door, confidence: float) -> None:
    """A confidence outside 0 to 1, or too close to 1, is refused."""
    (await refusal(door.sequencer.Report(sequencer_pb2.ReportRequest(confidence=confidence)))).says(
        errors.InvalidRequest, "confidence"
    )


async def test_a_grade_that_is_not_earned_is_refused(door: Door) -> None:
    """Without a self-test the grade is BEST_EFFORT."""
    async with door.nothing_numbered():
        for grade in ("serial", "exact"):
            said = await refusal(door.generation.Generate(batch("a", required_grade=grade)))
            said.says(errors.GradeNotEarned)
    response = await door.client.generate("a", required_grade="best-effort", max_new_tokens=1)
    assert response.results[0].output.grade == types_pb2.GRADE_BEST_EFFORT


BROKEN = {"no wire format": b"\xff\xff\xff\xff", "a field cut short": b"\x0a\x7fabc"}


NO_UTF8 = {GENERATE: b"\x0a\x03\x0a\x01\xff", STREAM: b"\x0a\x03\x0a\x01\xff", GET: b"\x12\x01\xff"}
"""A prompt of one byte, and a key."""


@pytest.mark.parametrize("method", [GENERATE, STREAM, GET])
async def test_malformed_bytes(door: Door, method: str) -> None:
    """Bytes that are not a message are the caller's error: INVALID_ARGUMENT, MALFORMED_MESSAGE."""
    async with door.nothing_numbered():
        for data in (*BROKEN.values(), NO_UTF8[method]):
            (await refusal(door.raw(method, data))).says(errors.MalformedMessage)


async def test_a_message_over_the_limit(door: Door) -> None:
    """RESOURCE_EXHAUSTED from gRPC itself, without details, and the connection goes on."""
    huge = Request(items=[Item(text="x" * (5 << 20))])

    async with door.nothing_numbered():
        for call in (door.generation.Generate(huge), door.streamed(huge)):
            said = await refusal(call)
            assert (said.code, said.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, ""), said
        assert (await door.generation.GetModel(generation_pb2.GetModelRequest())).model.engine == "scripted"


async def test_fields_of_a_newer_client_are_ignored(door: Door) -> None:
    """A field that this side does not know changes nothing, the request's digest included."""
    request = asked("hello", key="newer client", max_new_tokens=2).SerializeToString()
    known = Request.FromString(request)

    first = await door.raw(GENERATE, request + b"\xfa\x3e\x03abc")
    assert await door.raw(GENERATE, request) == first
    async with door.nothing_numbered():
        item = known.items[0].SerializeToString() + b"\xf8\x3e\x01"
        nested = b"\x0a" + bytes([len(item)]) + item + request[2 + known.items[0].ByteSize() :]
        assert await door.raw(GENERATE, nested) == first


LARGE = items(*[Item(text="a")] * 4, max_new_tokens=4000, logprobs=20, stop_token_ids=LETTERS)
"""At most nearly 5 MB; it ends at its first token."""


async def test_an_answer_that_may_be_too_large_is_refused_before_the_work(door: Door) -> None:
    """The largest possible answer exceeds gRPC's default limit of a client."""
    async with door.nothing_numbered():
        (await refusal(door.generation.Generate(LARGE))).says(errors.InvalidRequest, "items")


async def test_a_client_that_reads_more_may_say_so(door: Door) -> None:
    """Metadata raises the limit."""
    response = await door.generation.Generate(LARGE, metadata=[("ostinato-max-response-bytes", str(8 << 20))])
    assert [len(result.output.token_ids) for result in response.results] == [1] * 4


async def test_cancel_of_what_is_not_there(door: Door) -> None:
    """A sequence or a key that was never given out is NOT_FOUND."""
    async with door.nothing_numbered():
        newest = await door.last_sequence()
        for request in (span(newest + 1, newest + 1), span(1, newest + 1), span(2**64 - 1, 2**64 - 1)):
            (await refusal(door.generation.Cancel(request))).says(errors.NotFound)
        for key in ("never used", ""):
            by_key = generation_pb2.CancelRequest(idempotency_key=key)
            (await refusal(door.generation.Cancel(by_key))).says(errors.NotFound)


async def test_cancel_without_a_range(door: Door) -> None:
    """An empty range, or no target, is INVALID_ARGUMENT."""
    for request in (span(0, 1), span(2, 1), span(0, 0)):
        (await refusal(door.generation.Cancel(request))).says(errors.InvalidRequest, "range")
    (await refusal(door.generation.Cancel(generation_pb2.CancelRequest()))).says(errors.InvalidRequest, "target")


async def test_a_key_that_no_database_can_hold(door: Door) -> None:
    """A NUL in the key of Get or Cancel is INVALID_ARGUMENT."""
    by_key = generation_pb2.CancelRequest(idempotency_key="a\0b")
    (await refusal(door.generation.Cancel(by_key))).says(errors.InvalidRequest, "idempotency_key")
    get = sequencer_pb2.GetRequest(idempotency_key="a\0b")
    (await refusal(door.sequencer.Get(get))).says(errors.InvalidRequest, "idempotency_key")


async def test_get_of_what_is_not_there(door: Door) -> None:
    """A sequence or key that does not exist is NOT_FOUND; no target is INVALID_ARGUMENT."""
    newest = await door.last_sequence()
    for sequence in (newest + 1, 2**63, 2**64 - 1):
        (await refusal(door.sequencer.Get(sequencer_pb2.GetRequest(sequence=sequence)))).says(errors.NotFound)
    (await refusal(door.sequencer.Get(sequencer_pb2.GetRequest(idempotency_key="never used")))).says(errors.NotFound)
    (await refusal(door.sequencer.Get(sequencer_pb2.GetRequest(sequence=0)))).says(errors.InvalidRequest, "sequence")
    (await refusal(door.sequencer.Get(sequencer_pb2.GetRequest()))).says(errors.InvalidRequest, "target")


async def test_tail_from_anywhere(door: Door) -> None:
    """Index 0 means 1; beyond the head there are no entries."""
    await door.client.generate("a", max_new_tokens=1)
    head = (await door.client.head()).index

    assert await entries(door, 0) == await entries(door, 1) == list(range(1, head + 1))
    assert await entries(door, head) == [head]
    for beyond in (head + 1, 2**63, 2**64 - 1):
        assert await entries(door, beyond) == []


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

        assert await entries(door, 1, payloads=True) == list(range(1, 2 * 256 + 2))
        said = await refusal(door.sequencer.Get(sequencer_pb2.GetRequest(idempotency_key="large")))
        said.says(errors.InvalidRequest, "idempotency_key")
        assert "sequences 1 to 256" in said.message
        async with Client(door.pair.target, max_response_bytes=64 << 20) as reader:
            assert [each.admitted.sequence for each in await reader.get(key="large")] == list(range(1, 257))


async def test_replay_without_a_range(door: Door) -> None:
    """An empty range, one beyond the newest sequence, and too much concurrency are refused; nothing is numbered."""
    async with door.nothing_numbered():
        for first, last in ((0, 1), (2, 1), (0, 0)):
            (await refusal(replayed(door, first, last))).says(errors.InvalidRequest, "range")
        (await refusal(replayed(door, 1, 1, concurrency=65))).says(errors.InvalidRequest, "concurrency")
        newest = await door.last_sequence()
        (await refusal(replayed(door, newest + 1, 2**64 - 1))).says(errors.NotFound)
        (await refusal(door.sequencer.Replay(sequencer_pb2.ReplayRequest()).read())).says(errors.InvalidRequest, "range")
