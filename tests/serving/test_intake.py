"""What is let in: shares of a bound, room to arrive, and messages that are counted before they are parsed."""

from __future__ import annotations

import asyncio
import math
import resource
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import DeadlineExceeded, InvalidRequest, MalformedMessage, QueueFull
from ostinato.v1 import generation_pb2, types_pb2
from serving.intake import (
    BURST_SECONDS,
    COPIES,
    FIELD_BYTES,
    RETRY_SECONDS,
    Bounds,
    Charge,
    Intake,
    Pool,
    connections_allowed,
    counted,
    shape_of,
)
from serving.program import StartupError

Request = generation_pb2.GenerateRequest
SHAPE = shape_of(Request.DESCRIPTOR)
MANY = 1 << 30


def fields_of(message: Message) -> int:
    """An oracle: set fields, each value of a list, and those of the messages in them. Lists of numbers are packed into one."""
    count = 0
    for field, value in message.ListFields():
        values = list(value) if field.is_repeated and field.type in (field.TYPE_MESSAGE, field.TYPE_STRING) else [value]
        count += len(values)
        count += sum(fields_of(each) for each in values if isinstance(each, Message))
    return count


PARAMETERS = st.builds(
    types_pb2.Parameters,
    seed=st.none() | st.integers(0, 2**64 - 1),
    temperature=st.none() | st.floats(0, 2),
    stop=st.lists(st.text(max_size=3), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3),
)
CHATS = st.builds(types_pb2.Chat, messages=st.lists(st.builds(types_pb2.Message, role=st.text(max_size=3)), max_size=4))
ITEMS = st.builds(
    types_pb2.Item,
    text=st.none() | st.text(max_size=300),
    token_ids=st.none() | st.builds(types_pb2.TokenIds, ids=st.lists(st.integers(0, 2**32 - 1), max_size=60)),
    chat=st.none() | CHATS,
    parameters=st.none() | PARAMETERS,
)
REQUESTS = st.builds(
    Request, items=st.lists(ITEMS, max_size=5), parameters=st.none() | PARAMETERS, request_id=st.text(max_size=200)
)


@given(REQUESTS)
def test_fields_are_counted_as_they_are_parsed(request: Any) -> None:
    """The count from the bytes is that of the parsed message."""
    assert counted(request.SerializeToString(), SHAPE, MANY, MANY) == fields_of(request)


@given(REQUESTS, st.data())
def test_what_is_parsed_is_never_taken_for_malformed(request: Any, data: Any) -> None:
    """Of damaged messages none is refused that protobuf parses, and none is counted lower."""
    damaged = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = Request.FromString(bytes(damaged))
    except DecodeError:
        return
    try:
        assert counted(bytes(damaged), SHAPE, MANY, MANY) >= fields_of(parsed)
    except MalformedMessage:
        assert any(byte & 7 in (3, 4) for byte in damaged), "of what protobuf parses only groups are refused"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"\x0a\x00" * 5, "items"),
        (
            Request(items=[types_pb2.Item(chat=types_pb2.Chat(messages=[types_pb2.Message()] * 9))]).SerializeToString(),
            "request",
        ),
    ],
)
def test_too_many_are_refused_by_name(data: bytes, field: str) -> None:
    """More items, or more fields in all, than are allowed."""
    with pytest.raises(InvalidRequest) as refused:
        counted(data, SHAPE, 4, 10)

    assert [violation.field for violation in refused.value.violations] == [field]


def test_a_tenant_takes_no_more_than_it_leaves() -> None:
    """One tenant gets half, the next a quarter, and one that has nothing finds something; without tenants one gets all."""
    pool, alone = Pool("--calls-max", 64, shared=True), Pool("--calls-max", 64, shared=False)

    def most(pool: Pool, tenant: str) -> int:
        count = 0
        while pool.add(tenant, 1):
            count += 1
        return count

    assert [most(pool, tenant) for tenant in "abcd"] == [32, 16, 8, 4]
    assert most(alone, "a") == 64
    assert pool.full(1).message == "--calls-max: no room is left for this tenant"
    assert alone.full(1).message == "--calls-max: no room is left for all callers"
    pool.add("a", -32)
    assert most(pool, "e") > 0


def test_a_charge_is_given_back_when_the_last_holder_ends() -> None:
    """The call and its items hold it, in whatever order they end. After preparation a third is left, and what was made. More
    than there is room for is refused, with the setting and when to come back."""
    pool = Intake(BOUNDS).requests
    charge = Charge(pool, "a")
    charge.set(COPIES * 100 + FIELD_BYTES * 10)
    assert pool.taken == COPIES * 100 + FIELD_BYTES * 10
    charge.prepared(50)
    assert pool.taken == (COPIES * 100 + FIELD_BYTES * 10) // 3 + COPIES * 50
    charge.hold(2)
    charge.release()
    charge.release()
    assert pool.taken > 0

    charge.release()

    assert pool.taken == 0
    with pytest.raises(QueueFull, match="^--request-bytes-max: no room is left for all callers$") as refused:
        Charge(pool, "a").set(BOUNDS.request_bytes_max + 1)
    assert refused.value.retry_after == RETRY_SECONDS


class Call:
    """In place of gRPC's context: a message that comes when it is told to."""

    def __init__(self, message: Any = None) -> None:
        self.sent: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if message is not None:
            self.sent.set_result(message)

    async def read(self) -> Any:
        return await self.sent


async def received(intake: Intake, tenant: str, call: Call) -> bytes:
    charge = intake.enter(tenant)
    try:
        return await intake.receive(call, charge, SHAPE)  # type: ignore[arg-type]
    finally:
        intake.leave(charge)


BOUNDS = Bounds(arriving_bytes_max=4000, message_bytes_max=1000, request_bytes_max=1 << 20, arrival_seconds_max=0.2)
"""Four places to arrive."""


async def test_a_tenant_waits_for_itself_to_arrive() -> None:
    """With two half-sent requests a tenant's third waits for one of them, in order; another tenant's is received at once."""
    intake = Intake(BOUNDS)
    halves = [Call() for _ in range(2)]
    half = [asyncio.create_task(received(intake, "a", call)) for call in halves]
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(received(intake, "a", Call(b""))) for _ in range(2)]

    assert await received(intake, "b", Call(b"")) == b""
    assert not any(each.done() for each in waiting)
    halves[0].sent.set_result(b"")
    assert await asyncio.gather(half[0], *waiting) == [b""] * 3
    half[1].cancel()


async def test_a_request_that_does_not_arrive_ends() -> None:
    """Half-sent ones with DEADLINE_EXCEEDED, those that waited for room with QUEUE_FULL, and then there is room again."""
    intake = Intake(BOUNDS)
    tasks = [asyncio.create_task(received(intake, "a", Call())) for _ in range(4)]

    ends = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(end) for end in ends[:2]] == [DeadlineExceeded] * 2
    assert {type(end) for end in ends[2:]} <= {QueueFull, DeadlineExceeded}
    assert await received(intake, "a", Call(b"")) == b""
    assert intake.calls.taken == intake.requests.taken == 0


async def test_those_who_leave_while_they_wait_take_no_room() -> None:
    """A call that is cancelled while it waits is passed over."""
    intake = Intake(BOUNDS)
    halves = [Call() for _ in range(2)]
    half = [asyncio.create_task(received(intake, "a", call)) for call in halves]
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(received(intake, "a", Call(b""))) for _ in range(3)]
    await asyncio.sleep(0)
    for each in waiting[:2]:
        each.cancel()

    halves[0].sent.set_result(b"")

    assert await waiting[2] == b""
    half[1].cancel()
    await asyncio.gather(*half, *waiting, return_exceptions=True)
    assert await asyncio.gather(*(received(intake, "a", Call(b"")) for _ in range(2))) == [b""] * 2


async def test_a_call_without_a_message_is_malformed() -> None:
    """gRPC's end of a stream is no message."""
    with pytest.raises(MalformedMessage):
        await received(Intake(BOUNDS), "a", Call(grpc.aio.EOF))


def limited(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> list[tuple[int, int]]:
    """This process's descriptors, as if limited so; what is set."""
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: made.append(limits))
    return made


@pytest.mark.parametrize(
    ("soft", "hard", "addresses", "connections", "raised"),
    [
        (64, 64, 1, 16, []),
        (64, 64, 2, 8, []),
        (32, 256, 1, 208, [(256, 256)]),
        (1024, 4096, 1, 1024, [(1072, 4096)]),
        (1024, 1 << 20, 2, 1024, [(2096, 1 << 20)]),
        (1024, resource.RLIM_INFINITY, 1, 1024, [(1072, resource.RLIM_INFINITY)]),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1, 1024, []),
    ],
)
def test_connections_leave_descriptors(
    soft: int, hard: int, addresses: int, connections: int, raised: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default callers get what the hard limit of descriptors leaves; the soft limit is raised as far as that needs."""
    made = limited(monkeypatch, soft, hard)

    assert connections_allowed(None, addresses) == connections
    assert made == raised


@pytest.mark.parametrize(("wanted", "limit"), [(17, 64), (None, 48), (1024, 1024)])
def test_connections_without_descriptors(wanted: int | None, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of connections for which there are no descriptors is refused, not cut."""
    limited(monkeypatch, limit, limit)
    with pytest.raises(StartupError, match=rf"^(--connections-max|ulimit -n): .* 48 descriptors besides, exceed {limit}$"):
        connections_allowed(wanted, 1)


async def test_a_tenants_calls_are_spread_out_while_others_call() -> None:
    """Alone a tenant is never early. Beside another one its calls after a burst are due one after another, and the other's is
    not early."""
    intake = Intake(Bounds(tenant_calls_second=100.0))

    def ahead(tenant: str) -> float:
        charge = intake.enter(tenant)
        try:
            return intake.ahead(tenant)
        finally:
            intake.leave(charge)

    intake._mixed_at = -math.inf
    intake._latest = "a"
    assert max(ahead("a") for _ in range(1000)) == 0
    assert ahead("b") <= 0

    early = [ahead("a") for _ in range(1000)]

    assert max(early[:10]) <= 0
    assert early[-1] == pytest.approx(1000 / 100 - BURST_SECONDS, abs=2)
    assert ahead("b") <= 0


async def test_reset_calls_of_a_tenant_end_at_a_rate() -> None:
    """They end one after another. Another tenant's does not wait behind them, and neither does one beyond --calls-max."""
    intake, ended = Intake(Bounds(tenant_resets_second=100.0, calls_max=42)), list[str]()

    async def reset(tenant: str) -> None:
        await intake.reset(tenant)
        ended.append(tenant)

    async with asyncio.TaskGroup() as group:
        for tenant in ["a"] * 40 + ["b", "a", "c"]:
            group.create_task(reset(tenant))

    assert ended[0] == "c"
    assert "b" in ended[:10]
    assert ended[-1] == "a"


async def test_a_stop_ends_reset_calls() -> None:
    """Those that wait end, and later ones do not wait. Until then they wait also if gRPC cancels them."""
    intake = Intake(Bounds(tenant_resets_second=0.001))
    waiting = asyncio.create_task(intake.reset("a"))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting}, timeout=0.01)
    assert not waiting.done()
    intake.close()
    await asyncio.wait_for(waiting, 10)
    await asyncio.wait_for(intake.reset("a"), 10)


async def test_a_call_that_ends_before_its_turn_leaves_it() -> None:
    """After any number of calls that were reset before their turn, the tenant's next one is as early as before them."""
    intake = Intake(Bounds(tenant_calls_second=100.0))
    intake.ahead("b")
    for _ in range(1000):
        if (seconds := intake.ahead("a")) > 0:
            waiting = asyncio.create_task(intake.spread("a", seconds))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
    assert intake.ahead("a") < 1
