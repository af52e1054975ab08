"""Whatever comes through the public door: bad requests, bad callers, bad luck. Real processes on real sockets throughout."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ostinato import errors
from ostinato.client import Client
from ostinato.requests import batch
from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, sequencer_pb2, types_pb2

from tests.e2e.conftest import GENERATE, GET, STREAM, Door, Refusal, ended, eventually, opened, refusal
from tests.pair import Pair, Program, running_pair

Request = generation_pb2.GenerateRequest
Item, Parameters, TokenIds, Chat, Message = (
    types_pb2.Item,
    types_pb2.Parameters,
    types_pb2.TokenIds,
    types_pb2.Chat,
    types_pb2.Message,
)

CONTEXT = 4096
LETTERS = b"etaoinshrdlcumwfgypbvkjxqz .,-\n"
"""With all of these as stop tokens a scripted answer ends at its first token, however long it might be."""

SLOWLY = {"delay_seconds": 0.005, "rules": [{"do": "diverge", "at": 3, "purposes": ["REPLAY"]}]}
ENDLESS: dict[str, Any] = {"max_new_tokens": 4000, "ignore_eos": True}
"""Of an engine that works slowly: 20 seconds at least."""


def scripted(script: Mapping[str, object], *more: str) -> Sequence[str]:
    """Arguments of a service that earns no grade, and so starts quickly."""
    return ["--script", json.dumps(script), "--self-test", "off", *more]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """One for all that leaves it as it was."""
    with running_pair(service=scripted(SLOWLY)) as shared:
        yield shared


@pytest.fixture
async def door(pair: Pair) -> AsyncIterator[Door]:
    async with opened(pair) as door:
        yield door


@contextlib.asynccontextmanager
async def own(service: Mapping[str, object] | None = None, *sidecar: str) -> AsyncIterator[Door]:
    """A pair for one test alone."""
    with running_pair(service=scripted(service or {}), sidecar=sidecar) as pair:
        async with opened(pair) as door:
            yield door


# ---- bad fields


def items(*given: types_pb2.Item, **parameters: Any) -> Request:
    return Request(items=given, parameters=Parameters(**parameters))


def one(**parameters: Any) -> Request:
    """A good prompt, and these parameters."""
    return items(Item(text="hello"), **parameters)


def asked(prompts: Any, key: str = "", **parameters: Any) -> Request:
    """What a client would send."""
    return batch(prompts, key, sampling=parameters)  # type: ignore[arg-type]


def chat(*roles: str) -> types_pb2.Item:
    return Item(chat=Chat(messages=[Message(role=role, content="hello") for role in roles]))


def ids(count: int) -> types_pb2.Item:
    return Item(token_ids=TokenIds(ids=[65] * count))


BAD: Mapping[str, tuple[Request, str]] = {
    "empty batch": (items(), "items"),
    "one item too many": (items(*[Item(text="hello")] * 257), "items"),
    "empty text": (items(Item(text="")), "items[0].text"),
    "empty token ids": (items(Item(token_ids=TokenIds())), "items[0].token_ids"),
    "no messages": (items(chat()), "items[0].chat"),
    "unknown role": (items(chat("user", "king")), "items[0].chat.messages[1].role"),
    "a chat that the template refuses": (items(chat("user", "system")), "items[0].chat"),
    "no prompt": (items(Item(text="hello"), Item()), "items[1]"),
    "two prompts": (items(Item(text="hello", token_ids=TokenIds(ids=[1]))), "items[0]"),
    "text over the context": (items(Item(text="a" * CONTEXT)), "items[0].text"),
    "token ids over the context": (items(ids(CONTEXT)), "items[0].token_ids"),
    "prompt and answer over the context": (items(ids(4000), max_new_tokens=97), "parameters.max_new_tokens"),
    "token id outside the vocabulary": (items(Item(token_ids=TokenIds(ids=[1, 262]))), "items[0].token_ids.ids[1]"),
    "temperature NaN": (one(temperature=math.nan), "parameters.temperature"),
    "temperature +inf": (one(temperature=math.inf), "parameters.temperature"),
    "temperature -inf": (one(temperature=-math.inf), "parameters.temperature"),
    "temperature negative": (one(temperature=-0.5), "parameters.temperature"),
    "temperature above 100": (one(temperature=100.5), "parameters.temperature"),
    "temperature of one item": (
        items(Item(text="a"), Item(text="b", parameters=Parameters(temperature=math.nan))),
        "items[1].parameters.temperature",
    ),
    "top_p 0": (one(top_p=0.0), "parameters.top_p"),
    "top_p negative": (one(top_p=-0.1), "parameters.top_p"),
    "top_p above 1": (one(top_p=1.0000001), "parameters.top_p"),
    "top_p NaN": (one(top_p=math.nan), "parameters.top_p"),
    "min_p negative": (one(min_p=-0.1), "parameters.min_p"),
    "min_p above 1": (one(min_p=1.1), "parameters.min_p"),
    "min_p NaN": (one(min_p=math.nan), "parameters.min_p"),
    "repetition_penalty 0": (one(repetition_penalty=0.0), "parameters.repetition_penalty"),
    "repetition_penalty NaN": (one(repetition_penalty=math.nan), "parameters.repetition_penalty"),
    "top_k above the engine's": (one(top_k=1025), "parameters.top_k"),
    "top_k negative": (one(top_k=-1), "parameters.top_k"),
    "max_new_tokens 0": (one(max_new_tokens=0), "parameters.max_new_tokens"),
    "max_new_tokens negative": (one(max_new_tokens=-1), "parameters.max_new_tokens"),
    "max_new_tokens above the limit": (one(max_new_tokens=CONTEXT), "parameters.max_new_tokens"),
    "min_new_tokens above max": (one(min_new_tokens=9, max_new_tokens=8), "parameters.min_new_tokens"),
    "min_new_tokens negative": (one(min_new_tokens=-1), "parameters.min_new_tokens"),
    "stop string empty": (one(stop=["a", ""]), "parameters.stop[1]"),
    "stop strings too many": (one(stop=["a"] * 17), "parameters.stop"),
    "stop string too long": (one(stop=["é" * 129]), "parameters.stop[0]"),
    "stop token outside the vocabulary": (one(stop_token_ids=[262]), "parameters.stop_token_ids[0]"),
    "stop tokens too many": (one(stop_token_ids=range(33)), "parameters.stop_token_ids"),
    "bad word that is no token": (one(bad_words=["a", "two"]), "parameters.bad_words[1]"),
    "logprobs 21": (one(logprobs=21), "parameters.logprobs"),
    "logprobs -1": (one(logprobs=-1), "parameters.logprobs"),
    "a format without a format": (one(response_format=types_pb2.ResponseFormat()), "parameters.response_format"),
    "a format that the engine does not obey": (
        one(response_format=types_pb2.ResponseFormat(regex="a+")),
        "parameters.response_format.regex",
    ),
    "idempotency key too long": (batch("hello", key="é" * 128 + "x"), "idempotency_key"),
    "request id too long": (batch("hello", request_id="x" * 257), "request_id"),
    "a grade that is none": (Request(items=[Item(text="hello")], required_grade=4), "required_grade"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("request_", "field"), BAD.values(), ids=BAD)
async def test_a_bad_field_is_named(door: Door, request_: Request, field: str) -> None:
    """INVALID_ARGUMENT with the field's path, from both methods, before any number is given."""
    async with door.nothing_numbered():
        (await refusal(door.generation.Generate(request_))).says(errors.InvalidRequest, field)
        (await refusal(door.streamed(request_))).says(errors.InvalidRequest, field)


async def test_all_bad_fields_are_named_at_once(door: Door) -> None:
    """A caller with three mistakes learns of three."""
    request = items(Item(text=""), Item(text="b", parameters=Parameters(top_k=-1)), top_p=0.0)

    async with door.nothing_numbered():
        said = await refusal(door.generation.Generate(request))
        said.says(errors.InvalidRequest, "parameters.top_p", "items[0].text", "items[1].parameters.top_k")


@pytest.mark.parametrize("name", ["empty batch", "empty text", "no prompt", "two prompts", "unknown role"])
async def test_tokenize_has_the_same_rules(door: Door, name: str) -> None:
    """A prompt that Generate refuses is refused by Tokenize, by the same path."""
    request, field = BAD[name]

    async with door.nothing_numbered():
        said = await refusal(door.generation.Tokenize(generation_pb2.TokenizeRequest(items=request.items)))
        said.says(errors.InvalidRequest, field)


async def test_the_largest_of_everything_is_taken(door: Door) -> None:
    """Bounds are inclusive: each limit itself is no error."""
    request = items(
        ids(CONTEXT - 1), temperature=100.0, top_k=1024, top_p=1.0, min_p=1.0, repetition_penalty=10.0, max_new_tokens=1,
        min_new_tokens=1, stop=["é" * 128] * 16, stop_token_ids=range(32), bad_words=["a"] * 32, logprobs=20, seed=2**64 - 1,
    )  # fmt: skip
    request.idempotency_key, request.request_id = "é" * 128, "x" * 256

    (result,) = (await door.generation.Generate(request)).results
    assert (result.output.prompt_tokens, len(result.output.token_ids), result.output.seed) == (CONTEXT - 1, 1, 2**64 - 1), (
        result
    )


async def test_the_items_seed_wins(door: Door) -> None:
    """A seed given in both places is the item's, 0 included, and the answer says so."""
    given = [Item(text="a", parameters=Parameters(seed=0)), Item(text="a", parameters=Parameters(seed=7)), Item(text="a")]

    response = await door.generation.Generate(items(*given, seed=1, max_new_tokens=2))
    assert [result.output.seed for result in response.results] == [0, 7, 1]


@pytest.mark.parametrize("confidence", [1.0, -0.1, 95.0, float("nan"), float("inf"), 1 - 2**-53])
async def test_report_at_no_confidence(door: Door, confidence: float) -> None:
    """A confidence that is none, or that no interval could have, is refused."""
    (await refusal(door.sequencer.Report(sequencer_pb2.ReportRequest(confidence=confidence)))).says(
        errors.InvalidRequest, "confidence"
    )


async def test_a_grade_that_is_not_earned_is_refused(door: Door) -> None:
    """A service that was not tested has earned BEST_EFFORT and no more."""
    async with door.nothing_numbered():
        for grade in ("serial", "exact"):
            said = await refusal(door.generation.Generate(batch("a", required_grade=grade)))
            said.says(errors.GradeNotEarned)
    response = await door.client.generate("a", required_grade="best-effort", max_new_tokens=1)
    assert response.results[0].output.grade == types_pb2.GRADE_BEST_EFFORT


# ---- bad bytes

BROKEN = {"no wire format": b"\xff\xff\xff\xff", "a field cut short": b"\x0a\x7fabc"}
NO_UTF8 = {GENERATE: b"\x0a\x03\x0a\x01\xff", STREAM: b"\x0a\x03\x0a\x01\xff", GET: b"\x12\x01\xff"}
"""A prompt of one byte, and a key."""


@pytest.mark.parametrize("method", [GENERATE, STREAM, GET])
async def test_bytes_that_are_no_message(door: Door, method: str) -> None:
    """They are the caller's fault (INVALID_ARGUMENT, MALFORMED_MESSAGE), not ours."""
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


# ---- answers that may be too large


LARGE = items(*[Item(text="a")] * 4, max_new_tokens=4000, logprobs=20, stop_token_ids=LETTERS)
"""Nearly 5 MB at worst; in truth it ends at once."""


async def test_an_answer_that_may_be_too_large_is_refused_before_the_work(door: Door) -> None:
    """The worst case is over what a gRPC client reads unless told otherwise."""
    async with door.nothing_numbered():
        (await refusal(door.generation.Generate(LARGE))).says(errors.InvalidRequest, "items")


async def test_a_client_that_reads_more_may_say_so(door: Door) -> None:
    """Metadata raises the limit."""
    response = await door.generation.Generate(LARGE, metadata=[("ostinato-max-response-bytes", str(8 << 20))])
    assert [len(result.output.token_ids) for result in response.results] == [1] * 4


async def test_a_client_that_reads_less_may_say_so(door: Door) -> None:
    """Metadata lowers it too."""
    async with door.nothing_numbered():
        call = door.generation.Generate(one(max_new_tokens=1), metadata=[("ostinato-max-response-bytes", "1000")])
        (await refusal(call)).says(errors.InvalidRequest, "items")


@pytest.mark.parametrize("value", ["", "0", "-1", "1e6", "4 MiB", "9" * 21])
async def test_metadata_that_is_no_size(door: Door, value: str) -> None:
    """Metadata that is no positive number is refused rather than ignored."""
    async with door.nothing_numbered():
        call = door.generation.Generate(one(), metadata=[("ostinato-max-response-bytes", value)])
        (await refusal(call)).says(errors.InvalidRequest, "metadata.ostinato-max-response-bytes")


# ---- keys


def bytes_of(response: generation_pb2.GenerateResponse) -> bytes:
    return response.SerializeToString(deterministic=True)


async def test_a_key_is_bound_to_its_request(door: Door) -> None:
    """The same key with another request is refused, whatever it differs in; with another request_id it is the same request."""
    first = await door.client.generate("a", key="bound", max_new_tokens=2)

    async with door.nothing_numbered():
        for other in (asked("b", key="bound", max_new_tokens=2), asked("a", key="bound", max_new_tokens=3)):
            (await refusal(door.generation.Generate(other))).says(errors.KeyReused)
            (await refusal(door.streamed(other))).says(errors.KeyReused)
        again = await door.client.generate("a", key="bound", max_new_tokens=2, request_id="another label")
        assert bytes_of(again) == bytes_of(first)


async def test_a_retry_joins_what_is_in_flight(door: Door) -> None:
    """Two callers with one key share one run; one who streams and comes late gets every token from the first on."""
    before = door.pair.metrics()["ostinato_admitted_items_total"]
    request = asked(["a", "b"], key="joined", max_new_tokens=200, ignore_eos=True)
    early, first = await begun(door, request)

    late, unary = await asyncio.gather(door.streamed(request), door.generation.Generate(request))
    first, second = await rest(early, first), heard(late)

    assert (first.repeated, second.repeated) == (False, True)
    assert first.results == second.results == list(unary.results)
    for result in unary.results:
        assert first.tokens[result.sequence] == second.tokens[result.sequence] == list(result.output.token_ids)
    assert door.pair.metrics()["ostinato_admitted_items_total"] == before + 2


async def test_many_callers_with_one_key(door: Door) -> None:
    """However they race, one request of those gets the key, and all who sent it get its answer; the others are refused."""
    requests = [asked(prompt, key="raced", max_new_tokens=8) for prompt in "ab" for _ in range(8)]

    answers = await asyncio.gather(*map(door.generation.Generate, requests), return_exceptions=True)

    found = {bytes_of(each) for each in answers if isinstance(each, generation_pb2.GenerateResponse)}
    refused = [Refusal.of(each) for each in answers if isinstance(each, grpc.aio.AioRpcError)]
    assert (len(found), len(refused)) == (1, 8), (answers, refused)
    for said in refused:
        said.says(errors.KeyReused)


async def test_a_keyed_caller_may_leave_and_come_back(door: Door) -> None:
    """Its work goes on, and the retry gets the same sequences and, from then on, the same bytes."""
    request = asked(["a", "b"], key="left", max_new_tokens=40, ignore_eos=True)
    call, listener = await begun(door, request)
    call.cancel()

    joined = await door.generation.Generate(request)
    recorded = await door.generation.Generate(request)

    assert joined.stamp == listener.stamp
    assert [result.WhichOneof("outcome") for result in joined.results] == ["output", "output"]
    assert bytes_of(recorded) == bytes_of(joined)


async def test_a_keyed_caller_outlives_its_deadline(door: Door) -> None:
    """With a key a deadline ends the call, not the work."""
    request = asked("a", key="too late", max_new_tokens=60, ignore_eos=True)

    said = await refusal(door.generation.Generate(request, timeout=0.1))

    assert said.code == grpc.StatusCode.DEADLINE_EXCEEDED, said
    (result,) = (await door.generation.Generate(request)).results
    assert len(result.output.token_ids) == 60, result
    assert result.attempt == 1


async def test_a_key_outlives_the_sidecar() -> None:
    """After a drain, and after a kill, the same key returns the same bytes; what the kill interrupted is finished."""
    async with own(SLOWLY) as door:
        first = await door.client.generate(["a", "b"], key="kept", max_new_tokens=4)
        interrupted = asked("c", key="interrupted", max_new_tokens=40)
        assert door.pair.sidecar is not None
        assert door.pair.sidecar.stop() == 0
        door.pair.start_sidecar().wait_for("engine connected")
        assert bytes_of(await door.client.generate(["a", "b"], key="kept", max_new_tokens=4)) == bytes_of(first)
        _, listener = await begun(door, interrupted)

        door.pair.sidecar.kill()
        door.pair.start_sidecar().wait_for("engine connected")

        assert bytes_of(await door.client.generate(["a", "b"], key="kept", max_new_tokens=4)) == bytes_of(first)
        finished = await door.client.generate(interrupted)
        assert finished.stamp == listener.stamp
        assert (finished.results[0].WhichOneof("outcome"), finished.results[0].attempt) == ("output", 2)


# ---- callers who go


class Heard:
    """What a listener has who obeys Restarted; asserts that nothing is missing, repeated or out of place."""

    def __init__(self) -> None:
        self.stamp = types_pb2.Stamp()
        self.repeated = False
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.restarts: list[int] = []
        self.results: list[types_pb2.Result] = []

    def hear(self, event: generation_pb2.GenerateEvent) -> None:
        kind = event.WhichOneof("event")
        assert (kind == "admitted") == (not self.stamp.count), f"Admitted comes first, and once:\n{event}"
        match kind:
            case "admitted":
                self.stamp, self.repeated = event.admitted.stamp, event.admitted.repeated_key
                first = self.stamp.first_sequence
                self.tokens = {first + i: [] for i in range(self.stamp.count)}
                self.texts = dict.fromkeys(self.tokens, "")
            case "tokens":
                for run in event.tokens.runs:
                    known = self.tokens[run.sequence]
                    assert run.first_token == len(known), f"token {len(known)} was due:\n{run}"
                    known.extend(run.token_ids)
                    self.texts[run.sequence] += run.text
            case "restarted":
                self.restarts.append(event.restarted.sequence)
                self.tokens[event.restarted.sequence], self.texts[event.restarted.sequence] = [], ""
            case _:
                self.results.append(event.finished if kind == "finished" else event.failed)
                self.results.sort(key=lambda result: result.sequence)

    def whole(self) -> None:
        """Assert that what was streamed is what was answered."""
        for result in self.results:
            assert result.HasField("output"), result
            assert self.tokens[result.sequence] == list(result.output.token_ids)
            assert self.texts[result.sequence] == result.output.text


def heard(events: Sequence[generation_pb2.GenerateEvent]) -> Heard:
    listener = Heard()
    for event in events:
        listener.hear(event)
    return listener


async def begun(door: Door, request: Request) -> tuple[Any, Heard]:
    """A stream that has got its first tokens."""
    stream: Any = door.generation.GenerateStream(request)
    return stream, heard([await stream.read(), await stream.read()])


async def rest(stream: Any, listener: Heard) -> Heard:
    """Read a stream to its end."""
    while (event := await stream.read()) is not grpc.aio.EOF:
        listener.hear(event)
    return listener


async def test_a_deadline_that_has_passed(door: Door) -> None:
    """The caller is told by its own gRPC, and nothing is numbered."""
    async with door.nothing_numbered():
        for call in (door.generation.Generate(one(), timeout=-1), door.generation.GenerateStream(one(), timeout=-1).read()):
            said = await refusal(call)
            assert (said.code, said.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, ""), said


async def test_an_unkeyed_deadline_ends_the_work(door: Door) -> None:
    """The items become FAILED with DEADLINE_EXCEEDED, however the caller's clock and ours race, and the engine is free."""
    first = await door.last_sequence() + 1

    async def until(timeout: float) -> None:
        call = door.generation.Generate(one(**ENDLESS), timeout=timeout)
        said = await refusal(call)
        assert said.code == grpc.StatusCode.DEADLINE_EXCEEDED, said

    async def streamed_until(timeout: float) -> None:
        said = await refusal(rest(door.generation.GenerateStream(one(**ENDLESS), timeout=timeout), Heard()))
        assert said.code == grpc.StatusCode.DEADLINE_EXCEEDED, said

    for timeout in (0.002, 0.005, 0.05, 0.5):
        await asyncio.gather(*[call(timeout) for call in (until, streamed_until) for _ in range(5)])

    last = await door.last_sequence()
    assert last >= first, "those that took longer than an admission have numbers"
    assert {await door.outcome(number) for number in range(first, last + 1)} == {("FAILED", "DEADLINE_EXCEEDED")}
    await door.freed()


async def test_an_unkeyed_caller_who_leaves_ends_the_work(door: Door) -> None:
    """All its items become CANCELLED, and the engine is free."""
    call, listener = await begun(door, asked(["a", "b"], **ENDLESS))
    unary = asyncio.ensure_future(door.client.generate("c", **ENDLESS))
    first = listener.stamp.first_sequence
    await eventually(lambda: newest_is(door, first + 2), "the unary call has its number")

    call.cancel()
    unary.cancel()

    for sequence in range(first, first + 3):
        assert await door.outcome(sequence) == ("CANCELLED", "CANCELLED")
    await door.freed()


async def newest_is(door: Door, sequence: int) -> bool:
    return await door.last_sequence() == sequence


# ---- Cancel


def span(first: int, last: int) -> generation_pb2.CancelRequest:
    return generation_pb2.CancelRequest(range=generation_pb2.SequenceRange(first=first, last=last))


async def test_cancel_of_what_is_not_there(door: Door) -> None:
    """A sequence or a key that was never given out is NOT_FOUND."""
    async with door.nothing_numbered():
        newest = await door.last_sequence()
        for request in (span(newest + 1, newest + 1), span(1, newest + 1), span(2**64 - 1, 2**64 - 1)):
            (await refusal(door.generation.Cancel(request))).says(errors.NotFound)
        for key in ("never used", ""):
            by_key = generation_pb2.CancelRequest(idempotency_key=key)
            (await refusal(door.generation.Cancel(by_key))).says(errors.NotFound)


async def test_cancel_of_no_range(door: Door) -> None:
    """A range that is none, or no target at all, is the caller's mistake."""
    for request in (span(0, 1), span(2, 1), span(0, 0)):
        (await refusal(door.generation.Cancel(request))).says(errors.InvalidRequest, "range")
    (await refusal(door.generation.Cancel(generation_pb2.CancelRequest()))).says(errors.InvalidRequest, "target")


async def test_cancel_while_it_runs(door: Door) -> None:
    """It answers once the outcomes are durable; the listener is told, and the engine is free."""
    stream, listener = await begun(door, asked(["a", "b"], **ENDLESS))
    first = listener.stamp.first_sequence

    answer = await door.generation.Cancel(span(first, first + 1))

    assert (answer.cancelled, answer.ended) == (2, 0)
    results = (await rest(stream, listener)).results
    assert [result.sequence for result in results] == [first, first + 1]
    assert {errors.from_status(result.status).reason for result in results} == {"CANCELLED"}
    assert await door.kinds(first) == ["CANCELLED"]
    await door.freed()


async def test_cancel_after_the_end(door: Door) -> None:
    """What has ended keeps its outcome, and is counted as ended."""
    stamp = (await door.client.generate(["a", "b"], max_new_tokens=2)).stamp

    for _ in range(2):
        answer = await door.generation.Cancel(span(stamp.first_sequence, stamp.first_sequence + 1))
        assert (answer.cancelled, answer.ended) == (0, 2)
    assert await door.outcome(stamp.first_sequence) == ("COMPLETED", "")


async def test_cancel_by_key(door: Door) -> None:
    """A key ends the whole batch, also when its caller has left; a retry then gets those outcomes."""
    request = asked(["a", "b"], key="cancelled", **ENDLESS)
    stream, listener = await begun(door, request)
    stream.cancel()

    answer = await door.generation.Cancel(generation_pb2.CancelRequest(idempotency_key="cancelled"))

    assert (answer.cancelled, answer.ended) == (2, 0)
    again = await door.generation.Generate(request)
    assert again.stamp == listener.stamp
    assert {errors.from_status(result.status).reason for result in again.results} == {"CANCELLED"}
    await door.freed()


# ---- reading


async def test_get_of_what_is_not_there(door: Door) -> None:
    """Nothing is NOT_FOUND, and no target is the caller's mistake."""
    newest = await door.last_sequence()
    for sequence in (newest + 1, 2**63, 2**64 - 1):
        (await refusal(door.sequencer.Get(sequencer_pb2.GetRequest(sequence=sequence)))).says(errors.NotFound)
    (await refusal(door.sequencer.Get(sequencer_pb2.GetRequest(idempotency_key="never used")))).says(errors.NotFound)
    (await refusal(door.sequencer.Get(sequencer_pb2.GetRequest(sequence=0)))).says(errors.InvalidRequest, "sequence")
    (await refusal(door.sequencer.Get(sequencer_pb2.GetRequest()))).says(errors.InvalidRequest, "target")


async def entries(door: Door, from_index: int, *, payloads: bool = False) -> list[int]:
    """Indexes that a Tail without follow sends."""
    stream = door.sequencer.Tail(sequencer_pb2.TailRequest(from_index=from_index, payloads=payloads))
    return [entry.header.index async for response in stream for entry in response.entries]


async def test_tail_from_anywhere(door: Door) -> None:
    """0 is taken as 1; beyond the head there is nothing, however far."""
    await door.client.generate("a", max_new_tokens=1)
    head = (await door.client.head()).index

    assert await entries(door, 0) == await entries(door, 1) == list(range(1, head + 1))
    assert await entries(door, head) == [head]
    for beyond in (head + 1, 2**63, 2**64 - 1):
        assert await entries(door, beyond) == []


async def test_reading_large_payloads() -> None:
    """However much was recorded at once, each message of Tail is one that a client reads which knows of no limits; Get, whose
    one message may not be, says what to do, and gives it to a client that reads more."""
    async with own({"context_tokens": 16_000}) as door:
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


async def replayed(door: Door, first: int, last: int, **options: Any) -> list[sequencer_pb2.ReplayResponse]:
    span = generation_pb2.SequenceRange(first=first, last=last)
    return [each async for each in door.sequencer.Replay(sequencer_pb2.ReplayRequest(range=span, **options))]


async def test_replay_of_no_range(door: Door) -> None:
    """A range that is none, or lies ahead, or too much at once, is refused; nothing is numbered."""
    async with door.nothing_numbered():
        for first, last in ((0, 1), (2, 1), (0, 0)):
            (await refusal(replayed(door, first, last))).says(errors.InvalidRequest, "range")
        (await refusal(replayed(door, 1, 1, concurrency=65))).says(errors.InvalidRequest, "concurrency")
        newest = await door.last_sequence()
        (await refusal(replayed(door, newest + 1, 2**64 - 1))).says(errors.NotFound)
        (await refusal(door.sequencer.Replay(sequencer_pb2.ReplayRequest()).read())).says(errors.InvalidRequest, "range")


async def test_replay_names_the_token_that_differs(door: Door) -> None:
    """An engine that makes another token 3 in a replay is DIVERGED at 3, journalled and counted; no number is taken."""
    name = 'ostinato_comparisons_total{grade="best_effort",kind="replay",replica="same",verdict="diverged"}'
    before = door.pair.metrics().get(name, 0)
    stamp = (await door.client.generate(["a", "b"], max_new_tokens=8, logprobs=2, ignore_eos=True)).stamp

    async with door.nothing_numbered():
        found = await replayed(door, stamp.first_sequence, stamp.first_sequence + 1)

        assert sorted(each.comparison.sequence for each in found) == [stamp.first_sequence, stamp.first_sequence + 1]
        assert [each.seen for each in found] == [1, 2]
        for each in found:
            said = each.comparison
            assert (said.verdict, said.first_difference, said.compared_tokens) == (types_pb2.VERDICT_DIVERGED, 3, 3), said
            assert said.HasField("margin") and said.actual.token_ids, said
        assert door.pair.metrics()[name] == before + 2
        audited = [entry async for entry in door.client.tail() if entry.header.kind == types_pb2.ENTRY_KIND_AUDITED]
        assert {entry.header.sequence for entry in audited[-2:]} == {each.comparison.sequence for each in found}


async def test_a_twin_that_differs_is_counted() -> None:
    """Equal inputs with unequal outputs are one divergence, at its token."""
    script = {"rules": [{"do": "diverge", "at": 2, "sequences": [3]}]}
    async with own(script) as door:
        first, second, third = (await door.client.generate(["a"] * 3, seed=1, max_new_tokens=8)).results
        assert list(first.output.token_ids) == list(second.output.token_ids)
        assert list(first.output.token_ids[:2]) == list(third.output.token_ids[:2])

        metrics = door.pair.metrics()
        assert {name: value for name, value in metrics.items() if name.startswith("ostinato_comparisons_total")} == {
            'ostinato_comparisons_total{grade="best_effort",kind="twin",replica="same",verdict="match"}': 1,
            'ostinato_comparisons_total{grade="best_effort",kind="twin",replica="same",verdict="diverged"}': 1,
            'ostinato_comparisons_total{grade="best_effort",kind="twin",replica="same",verdict="incomparable"}': 0,
        }
        assert metrics['ostinato_first_difference_token_sum{grade="best_effort",kind="twin"}'] == 2
        assert metrics['ostinato_compared_tokens_total{grade="best_effort",kind="twin"}'] == 8 + 2


# ---- a reader that does not read

UNREAD = [("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", 32 << 20)]
MANY: dict[str, Any] = {"max_new_tokens": 1000, "ignore_eos": True, "logprobs": 20}


async def test_a_slow_reader_loses_its_call_and_stalls_nobody() -> None:
    """Tokens beyond the bound end an unread stream with SLOW_READER and its items as CANCELLED; with a key they go on."""
    async with own({}, "--stream-tokens-max", "500") as door, grpc.aio.insecure_channel(door.pair.target, UNREAD) as channel:
        unread: Any = channel.unary_stream(
            STREAM, request_serializer=Request.SerializeToString, response_deserializer=generation_pb2.GenerateEvent.FromString
        )
        limit = [("ostinato-max-response-bytes", str(32 << 20))]
        plain = unread(asked(["a"] * 4, **MANY), metadata=limit)
        await eventually(lambda: newest_is(door, 4), "the first has its numbers")
        keyed = unread(asked(["a"] * 2, key="slow", **MANY), metadata=limit)
        await eventually(lambda: newest_is(door, 6), "the second has its numbers")

        for _ in range(20):
            async with asyncio.timeout(30):
                await door.client.generate("b", max_new_tokens=2)

        for call in (plain, keyed):
            said = await refusal(rest(call, Heard()))
            said.says(errors.SlowReader)
        outcomes = [await door.outcome(number) for number in range(1, 7)]
        assert sorted(outcomes[:4]) == [("CANCELLED", "CANCELLED")] * 4
        assert sorted(outcomes[4:]) == [("COMPLETED", "")] * 2
        await door.freed()


# ---- programs that go


async def test_no_engine() -> None:
    """Without a service work is refused with a time to come back, nothing is numbered, and reads are served; then it comes, and
    goes: health says so at once, not when the clock is looked at next."""
    with Pair(service=scripted({}), sidecar=["--tick-seconds", "1000"]) as pair:
        pair.start_sidecar()
        async with opened(pair) as door:
            for call in (
                door.generation.Generate(one()),
                door.streamed(one()),
                door.generation.GetModel(generation_pb2.GetModelRequest()),
                door.generation.Tokenize(generation_pb2.TokenizeRequest(items=[Item(text="a")])),
            ):
                said = await refusal(call)
                said.says(errors.EngineUnavailable)
                assert said.retry_after is not None, said
            assert await door.last_sequence() == 0
            assert len(await entries(door, 1)) == 1
            assert await health(door) == "NOT_SERVING"

            service = pair.start_service()

            assert pair.sidecar is not None
            pair.sidecar.wait_for("engine connected")
            assert (await door.client.generate("a", max_new_tokens=1)).stamp.first_sequence == 1
            await eventually(lambda: healthy(door), "health says so")

            service.kill()
            await eventually(lambda: not_serving(door), "health says so")


async def health(door: Door, service: str = "ostinato.v1.Generation") -> str:
    request = health_pb2.HealthCheckRequest(service=service)
    answer = await health_pb2_grpc.HealthStub(door.channel).Check(request)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def healthy(door: Door) -> bool:
    return await health(door) == "SERVING"


async def test_draining() -> None:
    """Told to stop, it refuses what is new with a time to come back, finishes what it has, and exits 0."""
    script = {**SLOWLY, "rules": [{"do": "hang", "at": 1, "sequences": [1]}]}
    async with own(script) as door:
        held, holder = await begun(door, one())
        stream, listener = await begun(door, one(max_new_tokens=200, ignore_eos=True))
        assert door.pair.sidecar is not None
        os.kill(door.pair.sidecar.pid, signal.SIGTERM)
        door.pair.sidecar.wait_for("draining")

        said = await refusal(door.generation.Generate(one()))
        said.says(errors.Draining)
        assert said.retry_after is not None, said
        assert await health(door) == "NOT_SERVING"
        assert await door.last_sequence() == listener.stamp.first_sequence
        (result,) = (await rest(stream, listener)).results

        listener.whole()
        assert len(result.output.token_ids) == 200
        assert door.pair.sidecar.running, "the first one is not finished yet"
        await door.client.cancel(1)
        await rest(held, holder)
        code, log = await asyncio.to_thread(ended, door.pair.sidecar)
        assert code == 0, log


async def test_a_drain_that_runs_out_of_time() -> None:
    """Those who wait with a key are told DRAINING and when to come back, and the next start has their answers; without a key
    it is over."""
    script = {**SLOWLY, "rules": [{"do": "hang", "at": 1, "attempts": [1]}]}
    async with own(script, "--drain-seconds", "0") as door:
        request = asked("a", key="left", max_new_tokens=4)
        stream, listener = await begun(door, request)
        waiting = asyncio.ensure_future(refusal(door.generation.Generate(request)))
        unkeyed, other = await begun(door, one())
        await eventually(lambda: door.pair.metrics()["ostinato_repeated_requests_total"] == 1, "it waits for the same answer")
        assert door.pair.sidecar is not None
        os.kill(door.pair.sidecar.pid, signal.SIGTERM)

        for said in (await refusal(rest(stream, listener)), await waiting):
            said.says(errors.Draining)
            assert said.retry_after is not None, said
        (result,) = (await rest(unkeyed, other)).results
        assert errors.from_status(result.status).reason == "ABANDONED"
        code, log = await asyncio.to_thread(ended, door.pair.sidecar)
        assert code == 0, log

        door.pair.start_sidecar().wait_for("engine connected")
        (result,) = (await door.client.generate(request)).results
        assert (result.WhichOneof("outcome"), result.attempt) == ("output", 2)


IN_USE = "Address already in use"
TROUBLES = {
    "second sidecar": ("sidecar --journal {journal} --listen 127.0.0.1:0", "{journal} is in use by another sidecar"),
    "sidecar's port": ("sidecar --journal {folder}/1.sqlite --listen {target}", IN_USE),
    "metrics' port": ("sidecar --journal {folder}/2.sqlite --listen 127.0.0.1:0 --metrics {target}", IN_USE),
    "journal is a directory": ("sidecar --journal {folder} --listen 127.0.0.1:0", "{folder}"),
    "service's port": ("service --engine scripted --listen {target}", IN_USE),
    "service's socket": ("service --engine scripted --listen {engine}", IN_USE),
    "no room by its settings": ("sidecar --journal-bytes-max 65536", "--journal-bytes-max must be more than twice"),
    "the engine as its shadow": ("sidecar --engine unix:a --shadow unix:a", "--shadow: is the address of --engine"),
    "no rate": ("sidecar --audit-rate nan", "--audit-rate: 'nan' is not finite"),
    "more than all": ("sidecar --shadow-rate 1.5", "--shadow-rate: '1.5' is not 0.0 to 1.0"),
    "no database": ("sidecar --journal postgresql://me:hunter2@127.0.0.1:1/x", "the database cannot be reached"),
    "a file's bound": ("sidecar --journal postgresql://h/x --journal-bytes-max 99999999", "--journal-bytes-max bounds a file"),
    "no model": ("service --engine llama --listen unix:{folder}/llama.sock --model /nonexistent.gguf", "/nonexistent.gguf"),
}


@pytest.mark.parametrize(("line", "why"), TROUBLES.values(), ids=TROUBLES)
def test_a_program_that_cannot_start_says_why(pair: Pair, line: str, why: str) -> None:
    """Exit code 1 (2 for its settings) and a last line that names the trouble; the pair that runs is not disturbed."""
    names = {"journal": pair.folder / "journal.sqlite", "folder": pair.folder, "target": pair.target}
    line, why = (text.format(**names, engine=pair.engine_address) for text in (line, why))
    name, *args = line.split()

    code, log = ended(Program(name, args if "--metrics" in args else [*args, "--metrics", ""]))

    assert code == (2 if why.startswith("--") else 1), log
    assert why in log.splitlines()[-1], log
    assert "Traceback" not in log and "hunter2" not in log, log
    assert pair.sidecar is not None and pair.sidecar.running
    assert pair.service is not None and pair.service.running


async def test_a_sidecar_that_was_replaced_ends() -> None:
    """When a later epoch of the same writer has the engine, the earlier one exits and says so; its successor takes over."""
    async with own() as door:
        head = await door.client.head()
        hello = engine_pb2.Hello(log_id=head.log_id, writer=head.writer, epoch=head.epoch + 1)
        async with grpc.aio.insecure_channel(door.pair.engine_address) as channel:
            stub: engine_pb2_grpc.EngineAsyncStub = engine_pb2_grpc.EngineStub(channel)
            stream = stub.Execute()
            await stream.write(engine_pb2.ExecuteRequest(hello=hello))
            assert door.pair.sidecar is not None

            code, log = await asyncio.to_thread(ended, door.pair.sidecar)

            assert code == 1, log
            assert f"replaced by a stream of epoch {head.epoch + 1}" in log, log
            stream.cancel()
        door.pair.start_sidecar().wait_for("engine connected")
        assert (await door.client.generate("a", max_new_tokens=1)).stamp.epoch == head.epoch + 1


async def test_a_full_journal() -> None:
    """No new work, and a time to come back; what is in flight still ends, everything can be read, and both can be seen."""
    limits = ("--journal-bytes-max", str(1 << 20), "--journal-reserve-bytes", str(256 << 10))
    async with own(SLOWLY, *limits) as door:
        kept = await door.client.generate("kept", key="kept", max_new_tokens=2)
        # Its outcome has some hundred thousand bytes: of the reserve, once nothing else is left.
        stream, listener = await begun(door, one(max_new_tokens=400, ignore_eos=True, logprobs=20))
        said = await filled(door)
        said.says(errors.JournalFull)
        assert said.retry_after is not None, said
        last = await door.last_sequence()

        (result,) = (await rest(stream, listener)).results

        listener.whole()
        assert len(result.output.token_ids) == 400
        assert await door.kinds(result.sequence) == ["COMPLETED"]
        assert (await door.client.head()).unfinished == 0
        assert (await door.client.get(result.sequence))[0].result == result
        (await refusal(door.streamed(one()))).says(errors.JournalFull)
        assert await door.last_sequence() == last
        assert bytes_of(await door.client.generate("kept", key="kept", max_new_tokens=2)) == bytes_of(kept)
        await eventually(lambda: not_serving(door), "health says so")
        assert await health(door, "ostinato.v1.Sequencer") == "SERVING"
        assert door.pair.metrics()["ostinato_journal_full"] == 1


async def filled(door: Door) -> Any:
    """The refusal by a journal that had been filled until then."""
    for _ in range(100):
        try:
            await door.generation.Generate(items(*[ids(4000)] * 16, max_new_tokens=1))
        except grpc.aio.AioRpcError as error:
            return Refusal.of(error)
    raise AssertionError("the journal takes more than it may")


async def not_serving(door: Door) -> bool:
    return await health(door) == "NOT_SERVING"


async def test_no_room_for_the_engine_or_the_queue() -> None:
    """What can never fit is the caller's mistake; what does not fit now is told when to come back, and fits then."""
    held = {"do": "hang", "at": 1, "sequences": [2]}
    small = {"kv_blocks": 4, "block_tokens": 16, "context_tokens": 256, "rules": [held]}
    async with own(small, "--queue-items-max", "3") as door:
        async with door.nothing_numbered():
            (await refusal(door.generation.Generate(items(Item(text="a"), ids(60))))).says(errors.InvalidRequest, "items[0]")
            said = await refusal(door.generation.Generate(items(*[Item(text="a")] * 4, max_new_tokens=1)))
            said.says(errors.QueueFull)

        stream, listener = await begun(door, one(max_new_tokens=40, ignore_eos=True))
        waiting = asyncio.ensure_future(door.client.generate(["a"] * 3, max_new_tokens=40, ignore_eos=True))
        await eventually(lambda: newest_is(door, listener.stamp.first_sequence + 3), "the queue is full")
        said = await refusal(door.generation.Generate(one(max_new_tokens=1)))
        said.says(errors.QueueFull)
        assert said.retry_after is not None, said
        await door.client.cancel(2)
        await rest(stream, listener)
        assert all(result.HasField("output") for result in (await waiting).results)
        assert (await door.client.generate("a", max_new_tokens=1)).stamp.first_sequence == listener.stamp.first_sequence + 4


# ---- an engine that hangs, falls or dies


async def test_an_engine_that_hangs() -> None:
    """No item outlives its time, keyed or not, and the engine is free of it."""
    script = {"rules": [{"do": "hang", "at": 2, "sequences": [1, 2]}]}
    async with own(script, "--item-timeout-seconds", "0.3") as door:
        responses = await asyncio.gather(door.client.generate("a"), door.client.generate("b", key="hangs"))
        assert {errors.from_status(each.results[0].status).reason for each in responses} == {"DEADLINE_EXCEEDED"}
        assert [await door.kinds(number) for number in (1, 2)] == [["FAILED"]] * 2
        await door.freed()


async def test_a_grade_that_is_lost() -> None:
    """Items that asked for it fail with GRADE_LOST, those that did not say what they got, and no more are admitted."""
    script = {"delay_seconds": 0.002, "rules": [{"do": "lose_grade", "at": 3, "sequences": [1]}]}
    with running_pair(service=["--script", json.dumps(script)]) as pair:
        async with opened(pair) as door:
            exact = door.client.generate(["a", "b"], required_grade="exact", max_new_tokens=60, ignore_eos=True)
            wanted = asyncio.ensure_future(exact)
            await eventually(lambda: newest_is(door, 2), "those that asked for it have the first numbers")
            whatever = await door.client.generate("c", max_new_tokens=60, ignore_eos=True)
            assert {errors.from_status(result.status).reason for result in (await wanted).results} == {"GRADE_LOST"}
            assert whatever.results[0].output.grade == types_pb2.GRADE_BEST_EFFORT
            async with door.nothing_numbered():
                said = await refusal(door.generation.Generate(batch("a", required_grade="exact")))
                said.says(errors.GradeNotEarned)


async def test_a_listener_whose_engine_dies() -> None:
    """Attempt 2 goes on behind what was sent where it is equal; where it is not, Restarted says so, once, and it is counted."""
    script = {"delay_seconds": 0.005, "rules": [{"do": "diverge", "at": 4, "sequences": [2], "attempts": [2]}]}
    async with own(script) as door:
        stream: Any = door.generation.GenerateStream(asked(["a", "b", "c"], max_new_tokens=100, ignore_eos=True))
        listener = Heard()
        while not listener.tokens or min(map(len, listener.tokens.values())) < 10:
            listener.hear(await stream.read())

        assert door.pair.service is not None
        door.pair.service.kill()
        door.pair.start_service()
        await rest(stream, listener)

        listener.whole()
        assert listener.restarts == [2]
        assert [result.attempt for result in listener.results] == [2, 2, 2]
        counted = 'ostinato_comparisons_total{grade="best_effort",kind="recovery",replica="same",verdict="%s"}'
        verdicts = {counted % "diverged": 1.0, counted % "match": 2.0}
        await eventually(lambda: verdicts.items() <= door.pair.metrics().items(), "the verdicts are durable")
        metrics = door.pair.metrics()
        assert metrics['ostinato_first_difference_token_sum{grade="best_effort",kind="recovery"}'] == 4
        assert metrics["ostinato_attempts_total"] == 3


async def test_an_item_that_kills_every_engine() -> None:
    """It fails after its attempts, and takes no neighbour with it."""
    script = {"delay_seconds": 0.002, "rules": [{"do": "crash", "at": 5, "sequences": [3]}]}
    async with own(script) as door:
        answer = asyncio.ensure_future(door.client.generate(["a", "b", "c", "d", "e"], max_new_tokens=40, ignore_eos=True))
        deaths = 0
        while not answer.done():
            assert door.pair.service is not None
            if not door.pair.service.running:
                deaths += 1
                door.pair.start_service()
            await asyncio.sleep(0.02)

        results = (await answer).results
        assert deaths == 3
        assert [result.WhichOneof("outcome") for result in results] == ["output", "output", "status", "output", "output"]
        assert errors.from_status(results[2].status).reason == "ATTEMPTS_EXHAUSTED"
        assert [await door.kinds(number) for number in range(1, 6)] == [
            [k] for k in ["COMPLETED"] * 2 + ["FAILED"] + ["COMPLETED"] * 2
        ]
