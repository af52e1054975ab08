"""What stands around handlers, over real sockets: bad bytes, errors, counts; and what leaves together."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Never, cast

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from ostinato import errors
from serving.handlers import (
    EARLY_SECONDS,
    EARLY_SHARE,
    QUIET_TURNS,
    STATUS_BYTES_MAX,
    TURNS_MAX,
    Coalescer,
    _Observation,
    fitting,
    ran_out,
)

from tests.serving.echo import METHODS, NAME, Context, Echo, Message, call, raw, serving, text
from tests.waiting import eventually

NOT_WIRE_FORMAT = b"\xff\xff\xff"
NOT_UTF8 = b"\x12\x02\xff\xfe"  # field 2, a string of two bytes


def raising(error: BaseException) -> Callable[[str, Context], Never]:
    """A handler's act that raises."""

    def act(_content: str, _context: Context) -> Never:
        raise error

    return act


async def failure(channel: grpc.aio.Channel, method: str, *messages: bytes, timeout: float = 10) -> grpc.aio.AioRpcError:
    """The error with which this call ends."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(channel, method, *messages, timeout=timeout)
    return raised.value


def ours(error: Any) -> errors.OstinatoError:
    """The error as our client sees it."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no details: {error}"
    return errors.from_status(status)


async def test_a_refused_call_lets_go_of_its_request() -> None:
    """Before the garbage collector comes, nothing refers to a request that was refused: gRPC keeps the call's frames."""
    kept = list[Message]()

    class Refusing(Echo):
        async def UnaryUnary(self, request: Message, context: Context) -> Message:
            kept.append(request)
            raise errors.QueueFull("no room")

    gc.disable()
    try:
        async with serving(Refusing()) as channel:
            await failure(channel, "UnaryUnary", text("x"))
            await eventually(lambda: sys.getrefcount(kept[0]) == 2, "only the list refers to it")
    finally:
        gc.enable()


@pytest.mark.parametrize("method", METHODS)
async def test_a_good_call_passes(method: str) -> None:
    """Every kind of method answers as if there were no guard."""
    async with serving(Echo()) as channel:
        answers = await call(channel, method, text("hé"))

    assert {answer.content for answer in answers} == {"hé"}


@pytest.mark.parametrize("data", [NOT_WIRE_FORMAT, NOT_UTF8], ids=["wire format", "UTF-8"])
@pytest.mark.parametrize("method", METHODS)
async def test_bytes_that_are_no_message_are_the_callers_fault(method: str, data: bytes) -> None:
    """Malformed bytes are answered INVALID_ARGUMENT with our reason, on every kind of method."""
    async with serving(Echo()) as channel:
        error = await failure(channel, method, data)

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(ours(error), errors.MalformedMessage)


@pytest.mark.parametrize("method", ["StreamUnary", "StreamStream", "ReaderWriter"])
async def test_a_later_message_is_checked_too(method: str) -> None:
    """In a stream of requests the bad one ends the call, not only a bad first."""
    async with serving(Echo()) as channel:
        error = await failure(channel, method, text("good"), NOT_UTF8)

    assert isinstance(ours(error), errors.MalformedMessage)


async def test_an_empty_message_is_a_message() -> None:
    """No bytes at all are the message with nothing set."""
    async with serving(Echo()) as channel:
        assert [answer.content for answer in await call(channel, "UnaryUnary", b"")] == [""]


@pytest.mark.parametrize(
    "error",
    [
        errors.invalid("items[3].parameters.top_p", "is above 1"),
        errors.QueueFull("full", retry_after=0.25, details={"queue_items": "1024"}),
        errors.KeyReused("another request"),
    ],
    ids=lambda error: error.reason,
)
@pytest.mark.parametrize("method", METHODS)
async def test_our_errors_arrive_whole(method: str, error: errors.OstinatoError) -> None:
    """What a handler raises is what from_status gives the client: class, message, fields, delay and details."""
    async with serving(Echo(raising(error))) as channel:
        raised = await failure(channel, method, text("x"))

    assert raised.code() is error.code
    got = ours(raised)
    assert type(got) is type(error)
    assert vars(got) == vars(error)


async def test_a_delay_is_also_told_to_grpc() -> None:
    """A retry_after goes into grpc-retry-pushback-ms, so that gRPC's own retries wait; trailers set before stay."""

    def act(_content: str, context: Context) -> None:
        context.set_trailing_metadata((("ostinato-kept", "yes"),))
        raise errors.QueueFull("full", retry_after=0.25)

    async with serving(Echo(act)) as channel:
        trailers = (await failure(channel, "UnaryUnary", text("x"))).trailing_metadata()

    assert dict(trailers or ())["grpc-retry-pushback-ms"] == "250"
    assert dict(trailers or ())["ostinato-kept"] == "yes"


@pytest.mark.parametrize("method", METHODS)
async def test_a_fault_of_ours_tells_the_log_and_not_the_caller(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """Any other exception is INTERNAL with nothing of its text, and is logged with its traceback."""
    async with serving(Echo(raising(ValueError("the password is tiger")))) as channel:
        error = await failure(channel, method, text("x"))

    assert error.code() is grpc.StatusCode.INTERNAL
    assert "tiger" not in str(error)
    status = rpc_status.from_call(cast(Any, error))
    info = error_details_pb2.ErrorInfo()
    assert status is not None and status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("INTERNAL", errors.DOMAIN)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None and "tiger" in str(record.exc_info[1])


async def test_a_hundred_bad_fields_arrive_as_the_first_of_them() -> None:
    """An error too large for headers is cut to what fits, instead of not arriving."""
    violations = [errors.Violation(f"items[{i}].parameters.temperature", "ist größer als 100") for i in range(1000)]
    async with serving(Echo(raising(errors.InvalidRequest(violations=violations)))) as channel:
        got = ours(await failure(channel, "UnaryUnary", text("x")))

    assert isinstance(got, errors.InvalidRequest)
    assert 10 < len(got.violations) < 1000
    assert list(got.violations) == violations[: len(got.violations)]


def test_a_long_message_is_cut_between_characters() -> None:
    """A message alone can be too long, and is cut without half a character."""
    status = errors.to_status(errors.EngineFailed("ü" * 5000))

    assert fitting(status).ByteSize() <= STATUS_BYTES_MAX
    assert set(fitting(status).message) == {"ü"}


async def test_calls_are_counted_by_code() -> None:
    """Every end of a call is counted once under its own code, and timed."""
    registry, hanging = CollectorRegistry(), asyncio.Event()
    handled: dict[str, str] = {"service": NAME, "method": "UnaryUnary"}

    def count(code: str) -> float:
        return registry.get_sample_value("ostinato_rpc_handled_total", {**handled, "code": code}) or 0

    async def act(content: str, context: Context) -> None:
        match content:
            case "full":
                raise errors.QueueFull("full")
            case "bug":
                raise ValueError
            case "own":
                await context.abort(grpc.StatusCode.NOT_FOUND, "not here")
            case "slow":
                hanging.set()
                await asyncio.Event().wait()

    async with serving(Echo(act), registry) as channel:
        await call(channel, "UnaryUnary", text("good"))
        for content in ("full", "bug", "own"):
            await failure(channel, "UnaryUnary", text(content))
        await failure(channel, "UnaryUnary", NOT_UTF8)
        leaving = asyncio.create_task(call(channel, "UnaryUnary", text("slow"), timeout=1000))
        await hanging.wait()
        leaving.cancel()
        codes = ("OK", "RESOURCE_EXHAUSTED", "INTERNAL", "NOT_FOUND", "INVALID_ARGUMENT", "CANCELLED")
        await eventually(lambda: [count(code) for code in codes] == [1] * len(codes))
    assert registry.get_sample_value("ostinato_rpc_handling_seconds_count", handled) == len(codes)


async def test_a_passed_deadline_is_counted_once() -> None:
    """A caller whose deadline passed is one end more; which of two codes it gets is the clocks' business."""
    registry, hanging = CollectorRegistry(), asyncio.Event()

    async def act(_content: str, _context: Context) -> None:
        hanging.set()
        await asyncio.Event().wait()

    def ends() -> dict[str, float]:
        counted = (metric for metric in registry.collect() if metric.name == "ostinato_rpc_handled")
        samples = (sample for metric in counted for sample in metric.samples if sample.name.endswith("_total"))
        return {sample.labels["code"]: sample.value for sample in samples}

    async with serving(Echo(act), registry) as channel:
        error = await failure(channel, "UnaryUnary", text("x"), timeout=0.3)
        if hanging.is_set():  # else it was over before it got there
            await eventually(lambda: bool(ends()))

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert sum(ends().values()) <= 1
    assert set(ends()) <= {"DEADLINE_EXCEEDED", "CANCELLED"}


@pytest.mark.parametrize("patience", [0.1, 1.0, 30.0, 3600.0])
def test_a_caller_whose_time_is_all_but_over_left_because_of_it(patience: float) -> None:
    """The caller's own clock runs out before ours, by EARLY_SECONDS and EARLY_SHARE at most; before that, or without a
    deadline, it went by itself."""
    early = EARLY_SECONDS + EARLY_SHARE * patience

    assert all(ran_out(left, patience) for left in (-1.0, 0.0, early * 0.99))
    assert not ran_out(early * 1.01, patience)
    assert not ran_out(None, None)


@pytest.mark.parametrize(
    ("at_arrival", "left", "code"),
    [(30.0, 0.0, "DEADLINE_EXCEEDED"), (30.0, 20.0, "CANCELLED"), (None, None, "CANCELLED")],
)
def test_a_caller_that_left_is_counted_by_its_clock(at_arrival: float | None, left: float | None, code: str) -> None:
    """A call that ends because its caller is gone is DEADLINE_EXCEEDED if the caller's time had run out, else CANCELLED."""
    clock, counted = iter([at_arrival, left]), list[str]()
    context: Any = SimpleNamespace(time_remaining=lambda: next(clock), code=lambda: None)
    method: Any = SimpleNamespace(ended=lambda code, *_: counted.append(code))
    with pytest.raises(asyncio.CancelledError), _Observation(method, context):
        raise asyncio.CancelledError

    assert counted == [code]


async def test_grpcs_own_services_are_not_counted() -> None:
    """Health checks every second would drown the numbers that matter."""
    registry = CollectorRegistry()
    async with serving(Echo(), registry) as channel:
        await raw(channel, "/grpc.health.v1.Health/Check")

    assert not [metric for metric in registry.collect() if any(sample.labels.get("service") for sample in metric.samples)]


async def test_a_stream_is_cleaned_up_when_its_caller_leaves() -> None:
    """A generator's finally runs when the call is cancelled, not when the garbage collector finds it."""
    hanging = asyncio.Event()

    async def act(_content: str, _context: Context) -> None:
        hanging.set()
        await asyncio.Event().wait()

    echo = Echo(act)
    async with serving(echo) as channel:
        leaving = asyncio.create_task(call(channel, "UnaryStream", text("x"), timeout=1000))
        await hanging.wait()
        leaving.cancel()
        await echo.closed.wait()


async def test_an_unknown_method_is_grpcs_to_refuse() -> None:
    """Without a handler there is nothing to guard: UNIMPLEMENTED."""
    async with serving(Echo()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await raw(channel, f"/{NAME}/Nothing")

    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def turns_waited(coming: list[bool]) -> int:
    """The oracle: up to the first QUIET_TURNS turns in a row without a change, or to the last turn. One turn begins a wait."""
    for end in range(QUIET_TURNS, TURNS_MAX - 1):
        if not any(coming[end - QUIET_TURNS : end]):
            return end
    return TURNS_MAX - 1


@given(st.lists(st.booleans(), min_size=2 * TURNS_MAX, max_size=2 * TURNS_MAX))
def test_waits_as_long_as_something_comes(coming: list[bool]) -> None:
    """Something comes in some turns of the loop and not in others: the wait ends with the first few quiet ones, or in time."""

    async def play() -> int:
        coalescer, turns = Coalescer(alone=lambda: False), 0
        ready = coalescer.ready(1)
        await asyncio.sleep(0)  # in this turn the wait begins
        for comes in coming:
            if ready.done():
                break
            if comes:
                coalescer.add()
            turns += 1
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(play()) == turns_waited(coming)


async def test_a_sender_that_is_alone_does_not_wait() -> None:
    """Where nothing else is under way, what waits already is sent at once, and so is what comes."""
    coalescer = Coalescer(alone=lambda: True)
    assert coalescer.ready(1).done()
    ready = coalescer.ready(0)
    await asyncio.sleep(0)
    assert not ready.done()
    coalescer.add()
    assert ready.done()


async def test_a_sender_that_was_given_up() -> None:
    """A sender that is cancelled while it waits is not told anything; the next one is."""
    coalescer = Coalescer(alone=lambda: True)
    coalescer.ready(1).cancel()
    await asyncio.sleep(0)
    later = coalescer.ready(0)
    coalescer.add()
    await later
