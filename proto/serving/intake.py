"""What a server lets in: connections, open calls, requests on their way, and the memory of requests that are there.

The caller is known before a byte of the request is read. Then, in this order:

1. The call takes a place among the open calls (--calls-max), and waits if its tenant calls very often while others call
   (--tenant-calls-second).
2. It waits for room to receive a message of any size (--arriving-bytes-max): how long a message is, gRPC does not tell before
   all of it is there. A request that is not whole in time (--arrival-seconds-max) ends the call.
3. What has arrived is counted, still as bytes: its items, and its fields. A parsed message of two million empty items takes
   four hundred times its bytes.
4. The memory that it takes while it is worked on is charged (--request-bytes-max), until the call and all its items end.

Each of the three bounds is shared: a tenant takes no more than it leaves for the others. So one tenant has at most half, the
next half of the rest, and a tenant that has nothing finds something. Beyond that a call is refused (QUEUE_FULL) or, for room to
arrive, waits behind those of its own tenant. Callers without credentials count as one tenant, also for health.

A call that is reset before its request was read costs as much as it did, and the next may be there at once. So it ends, and
frees its place on its connection, at a bounded rate (--tenant-resets-second).
"""

from __future__ import annotations

import asyncio
import math
import resource
import sys
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from ostinato.chain import BATCH_ITEMS_MAX
from ostinato.errors import DeadlineExceeded, MalformedMessage, QueueFull, invalid
from serving.program import BAD_CONFIGURATION, StartupError
from serving.settings import field

COPIES, PARSED_COPIES = 6, 2
"""Of a request's bytes, at worst: as received, parsed, and both again for the program that works on it. What is parsed lies in
an arena, which may be twice as large."""
FIELD_BYTES = 128
"""A field's memory beside its bytes, at worst: an empty message, as often as it is parsed."""
FIELDS_PER_ITEM = 256
"""Fields of a request, those of its fields included, for each item that it may have."""
RETRY_SECONDS = 1.0
REFUSAL_SECONDS, REFUSALS_MAX = 1.0, 1024
"""How long a caller without credentials waits for the refusal, and how many wait at once: one who asks again and again, and
waits for the answers, takes no time from others."""
PLACE_BYTES_SECOND, PLACE_FIELDS_SECOND, AT_ONCE_SECONDS = 8 << 20, 1 << 16, 0.005
"""What one place to arrive takes in a second: to receive and to count the largest requests one after another takes the time of
all tenants. A place is free at once after a request that took less than the last."""
SWEEPS = 8
"""For requests that are late, within the time that one has."""
MIXED_SECONDS, BURST_SECONDS = 1.0, 0.2
"""How long after a call another tenant counts as calling, and how many calls at once a tenant may begin, in the time that so
many are due in."""
STREAM_WINDOW_BYTES = 16 << 10
"""Of a request, before room for it is there. gRPC reads this much of each stream by itself."""
HANDSHAKE_SECONDS = 20


CONNECTIONS_MAX = 1024
DESCRIPTORS_RESERVED = 48
"""For everything else: libraries, listening sockets, the metrics page, the journal, the engine's stream, files that are read
again."""


def connections_allowed(wanted: int | None, addresses: int) -> int:
    """Connections to each address, so that DESCRIPTORS_RESERVED descriptors are left for the rest. Raises this process's limit
    of descriptors as far as that needs and it may. Raises StartupError if there is no room for those that are wanted."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if each == resource.RLIM_INFINITY else each for each in limits)
    limit = max(soft, min(hard, (wanted or CONNECTIONS_MAX) * addresses + DESCRIPTORS_RESERVED))
    if limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    room = (limit - DESCRIPTORS_RESERVED) // addresses
    if room < (wanted or 1):
        flag, count = ("--connections-max", wanted) if wanted is not None else ("ulimit -n", 1)
        why = f"{count} to each of {addresses} addresses, and {DESCRIPTORS_RESERVED} descriptors besides, exceed {limit}"
        raise StartupError(f"{flag}: {why}", exit_code=BAD_CONFIGURATION)
    return min(room, CONNECTIONS_MAX) if wanted is None else wanted


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of what a server lets in: settings, which a program's settings inherit."""

    message_bytes_max: int = field(4 << 20, "size of one request", minimum=1024, maximum=2**31 - 1)
    batch_items_max: int = field(256, "items in one request", minimum=1, maximum=BATCH_ITEMS_MAX)
    connections_max: int | None = field(
        None, "connections to each address", minimum=1, applies=f"what ulimit -n leaves room for, at most {CONNECTIONS_MAX}"
    )
    # gRPC counts calls that have just ended, too, so a client that has nearly as many open sees some refused (REFUSED_STREAM).
    connection_calls_max: int = field(512, "calls open on one connection; its client keeps further ones back", minimum=1)
    connection_idle_seconds: float = field(300.0, "after which a connection without calls is closed", minimum=1.0)
    connection_age_seconds: float = field(3600.0, "after which a connection takes no more calls", minimum=1.0)
    connection_grace_seconds: float = field(3600.0, "after that, for its calls to end", minimum=0.0)
    calls_max: int = field(4096, "calls open at once", minimum=2)
    tenant_calls_second: float = field(500.0, "calls of one tenant in a second, while others call", minimum=1.0)
    tenant_resets_second: float = field(
        250.0, "calls of one tenant, reset before their request was read, that end in a second", minimum=1.0
    )
    arriving_bytes_max: int = field(48 << 20, "requests being received, each counted as --message-bytes-max", minimum=2048)
    arrival_seconds_max: float = field(20.0, "for a request to arrive, from its first byte on", minimum=0.01)
    request_bytes_max: int = field(96 << 20, "memory of requests that are worked on or wait", minimum=1024)

    def __post_init__(self) -> None:
        """Raises ValueError that names the flag."""
        if self.arriving_bytes_max < 2 * self.message_bytes_max:
            raise ValueError("--arriving-bytes-max: at least twice --message-bytes-max")
        if self.request_bytes_max < 2 * COPIES * self.message_bytes_max:
            raise ValueError(f"--request-bytes-max: at least {2 * COPIES} times --message-bytes-max")

    @property
    def tenants(self) -> bool:
        """Whether there are tenants, which share the bounds."""
        return True

    def options(self) -> list[tuple[str, int]]:
        """gRPC's, but that of the connections. It has no bound of the bytes or the streams of all connections together."""
        return [
            ("grpc.max_concurrent_streams", self.connection_calls_max),
            ("grpc.max_connection_idle_ms", _millis(self.connection_idle_seconds)),
            ("grpc.max_connection_age_ms", _millis(self.connection_age_seconds)),
            ("grpc.max_connection_age_grace_ms", _millis(self.connection_grace_seconds)),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
            ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
            ("grpc.http2.bdp_probe", 0),  # on a fast link it would raise the window of every stream
        ]


def _millis(seconds: float) -> int:
    return min(round(seconds * 1000), (1 << 31) - 1)


class Pool:
    """An amount that tenants share."""

    def __init__(self, flag: str, most: int, *, shared: bool) -> None:
        self._flag, self._most, self._shared = flag, most, shared
        self.taken = 0
        self._by_tenant: dict[str, int] = {}

    def add(self, tenant: str, count: int) -> bool:
        """Take this much more, or give it back if it is negative. False: there is no room, and nothing is taken."""
        own, left = self._by_tenant.get(tenant, 0) + count, self._most - self.taken
        if count > 0 and (own if self._shared else count) > left:
            return False
        self.taken += count
        if own:
            self._by_tenant[tenant] = own
        else:
            self._by_tenant.pop(tenant, None)
        return True

    def full(self, count: int) -> QueueFull:
        """The refusal of so much. It names the setting, and whose calls take all there is."""
        whose = "all callers" if self.taken + count > self._most else "this tenant"
        return QueueFull(f"{self._flag}: no room is left for {whose}", retry_after=RETRY_SECONDS)


class Charge:
    """The memory of one request. It is given back when nothing holds it any more: the call, and each of its items."""

    __slots__ = ("_bytes", "_holders", "_pool", "tenant", "whole")

    def __init__(self, pool: Pool, tenant: str) -> None:
        self._pool, self.tenant = pool, tenant
        self._bytes, self._holders = 0, 1
        self.whole = False
        """Whether the request has arrived."""

    def prepared(self, size: int) -> None:
        """It was prepared: one copy is left, and what it was made into, of so many bytes as a message. Raises QueueFull."""
        self.set(PARSED_COPIES * self._bytes // COPIES + COPIES * size)

    def hold(self, count: int) -> None:
        """So many items hold it, too."""
        self._holders += count

    def release(self, count: int = 1) -> None:
        """So many holders less."""
        self._holders -= count
        if not self._holders:
            self.set(0)

    def set(self, count: int) -> None:
        """So many bytes from now on. Raises QueueFull."""
        more, self._bytes = count - self._bytes, count
        if not self._pool.add(self.tenant, more):
            self._bytes -= more
            raise self._pool.full(more)


CHARGE: ContextVar[Charge | None] = ContextVar("charge", default=None)
"""Of the call that this task handles."""


class Intake:
    """Of one server."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds, self.shared = bounds, bounds.tenants
        self.calls = Pool("--calls-max", bounds.calls_max, shared=self.shared)
        self.requests = Pool("--request-bytes-max", bounds.request_bytes_max, shared=self.shared)
        places = bounds.arriving_bytes_max // bounds.message_bytes_max
        self._arriving = Pool("--arriving-bytes-max", places, shared=self.shared)
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By tenant, in the order of their turns."""
        self._refusals = 0
        self._latest, self._mixed_at = "", -math.inf
        """Whose the latest call is, and when it was another tenant's than the one before."""
        self._due: dict[str, float] = {}
        """By tenant that calls often: when its next call is due."""
        self._resets: dict[str, float] = {}
        """By tenant: when its next reset call ends."""
        self._reset: set[asyncio.Task[Any]] = set()
        """Reset calls that wait for that."""
        self._closed = False
        self._reading: dict[asyncio.Task[Any], float] = {}
        """When they began. One that is not here any more was too late."""
        self._sweeping: asyncio.TimerHandle | None = None

    def enter(self, tenant: str) -> Charge:
        """A call begins. Its charge, to be passed to `leave` at its end. Raises QueueFull."""
        if not self.calls.add(tenant, 1):
            raise self.calls.full(1)
        charge = Charge(self.requests, tenant)
        CHARGE.set(charge)
        return charge

    def leave(self, charge: Charge) -> None:
        charge.release()
        self.calls.add(charge.tenant, -1)

    def ahead(self, tenant: str) -> float:
        """Seconds by which the tenant's call is too early. gRPC takes calls up as they arrive, whosever they are. Spread out,
        they leave room between them for others'."""
        now = asyncio.get_running_loop().time()
        if tenant != self._latest:
            self._latest, self._mixed_at = tenant, now
        if now - self._mixed_at > MIXED_SECONDS:
            self._due.clear()
            return 0.0
        due = self._due[tenant] = max(self._due.get(tenant, 0.0), now - BURST_SECONDS) + 1 / self.bounds.tenant_calls_second
        return due - now

    async def spread(self, tenant: str, seconds: float) -> None:
        """Waits for a call's turn. If the call ends before, its turn is the tenant's next call's."""
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            if tenant in self._due:
                self._due[tenant] -= 1 / self.bounds.tenant_calls_second
            raise

    async def reset(self, tenant: str) -> None:
        """Keeps a call that was reset before its request was read, as long as its tenant's rate demands. Until then gRPC counts
        it among the calls of its connection (--connection-calls-max). Else others would wait behind the calls that follow. The
        call may be cancelled meanwhile: gRPC tells of a reset late."""
        if self._closed or len(self._reset) >= self.bounds.calls_max:
            return
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None, "a handler runs in a task"
        due = max(self._resets.get(tenant, 0.0), loop.time()) + 1 / self.bounds.tenant_resets_second
        self._resets[tenant] = due
        self._reset.add(task)
        try:
            while (seconds := due - loop.time()) > 0 and not self._closed:
                try:
                    await asyncio.sleep(seconds)
                except asyncio.CancelledError:
                    task.uncancel()
        finally:
            self._reset.discard(task)
            if not self._reset:
                self._resets.clear()

    def close(self) -> None:
        """Reset calls end at once from now on: the server stops."""
        self._closed = True
        for task in self._reset:
            task.cancel()

    async def receive(self, context: grpc.aio.ServicerContext[Any, Any], charge: Charge, shape: Shape) -> bytes:
        """The call's one message, as bytes that were counted. Raises a Refused, InvalidRequest or DeadlineExceeded.

        A timeout of its own for each would cost more than all else here: nearly every request is there when it is read.
        """
        tenant, task, loop = charge.tenant, asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None, "a handler runs in a task"
        if tenant in self._waiting or not self._arriving.add(tenant, 1):
            await self._turn(tenant)
        seconds, items, late = 0.0, self.bounds.batch_items_max, self.bounds.arrival_seconds_max
        if self._sweeping is None:
            self._sweeping = loop.call_later(late / SWEEPS, self._sweep, late)
        self._reading[task] = loop.time()
        try:
            data = await context.read()
            if not isinstance(data, bytes):
                raise MalformedMessage("the call has no message")
            charge.whole, seconds = True, len(data) / PLACE_BYTES_SECOND
            fields = counted(data, shape, items, FIELDS_PER_ITEM * items)
            seconds += fields / PLACE_FIELDS_SECOND
        except asyncio.CancelledError:
            if task in self._reading:
                raise
            task.uncancel()
            raise DeadlineExceeded(f"the request was not whole within {late:g} s") from None
        finally:
            self._reading.pop(task, None)
            if seconds > AT_ONCE_SECONDS:
                loop.call_later(seconds, self._make_room, tenant)
            else:
                self._make_room(tenant)
        charge.set(COPIES * len(data) + FIELD_BYTES * fields)  # all copies to come included
        return data

    def _sweep(self, seconds: float) -> None:
        """Ends what has not arrived in time."""
        loop, self._sweeping = asyncio.get_running_loop(), None
        for task in [task for task, begun in self._reading.items() if begun <= loop.time() - seconds]:
            del self._reading[task]
            task.cancel()
        if self._reading:
            self._sweeping = loop.call_later(seconds / SWEEPS, self._sweep, seconds)

    def _make_room(self, tenant: str) -> None:
        self._arriving.add(tenant, -1)
        if self._waiting:
            self._next()

    async def _turn(self, tenant: str) -> None:
        """Waits for room, which is then taken. Raises QueueFull."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(mine)
        try:
            async with asyncio.timeout(self.bounds.arrival_seconds_max):
                await mine
        except (TimeoutError, asyncio.CancelledError) as error:
            if not mine.cancelled():
                self._arriving.add(tenant, -1)
            self._next()
            if isinstance(error, TimeoutError):
                raise self._arriving.full(1) from None
            raise

    def _next(self) -> None:
        """Gives room to those that wait: one of each tenant in turn, as long as there is some."""
        for tenant in list(self._waiting):
            line = self._waiting.pop(tenant)
            while line and line[0].cancelled():
                del line[0]
            if line and self._arriving.add(tenant, 1):
                line.popleft().set_result(None)
            if line:
                self._waiting[tenant] = line  # behind the others

    async def refused(self) -> None:
        """Keeps a caller without credentials waiting."""
        if self._refusals < REFUSALS_MAX:
            self._refusals += 1
            try:
                await asyncio.sleep(REFUSAL_SECONDS)
            finally:
                self._refusals -= 1


# ---- counting what is not parsed yet

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Kinds of fields on the wire. The other two, groups, are in no message of proto3."""
VARINT_BYTES_MAX = 10


class Shape:
    """What has to be known of a message to count its fields: which of them are messages."""

    def __init__(self, inner: dict[int, Shape], lists: dict[int, str]) -> None:
        self.inner, self.lists = inner, lists
        """By tag: messages, and the names of lists of messages."""


def shape_of(descriptor: Descriptor, known: dict[str, Shape] | None = None) -> Shape:
    """Of a message type. It may contain itself."""
    known = {} if known is None else known
    if descriptor.full_name not in known:
        shape = known[descriptor.full_name] = Shape({}, {})
        for each in descriptor.fields:
            if each.message_type is not None and each.type == FieldDescriptor.TYPE_MESSAGE:
                tag = each.number << 3 | BYTES
                shape.inner[tag] = shape_of(each.message_type, known)
                if each.is_repeated:
                    shape.lists[tag] = each.name
    return known[descriptor.full_name]


def counted(data: bytes, shape: Shape, items_max: int, fields_max: int) -> int:
    """The fields of a message and of the messages in it. Raises MalformedMessage, and InvalidRequest for more than `items_max`
    messages in one list of the outermost message, or more than `fields_max` fields."""
    count, position, end = 0, 0, len(data)
    outer: list[tuple[int, Shape]] = []
    lists = dict.fromkeys(shape.lists, 0)
    try:
        while True:
            while position >= end:
                if position > end:
                    raise DecodeError
                if not outer:
                    return count
                end, shape = outer.pop()
            count += 1
            if count > fields_max:
                raise invalid("request", f"has more than {fields_max} fields, those of its items included")
            tag, position = data[position], position + 1
            if tag & 0x80:
                tag, position = _varint(data, position - 1)
            kind = tag & 7
            if kind == BYTES:
                size, position = data[position], position + 1
                if size & 0x80:
                    size, position = _varint(data, position - 1)
                inner = shape.inner.get(tag)
                if inner is None:
                    position += size
                    continue
                if not outer and tag in lists:
                    lists[tag] += 1
                    if lists[tag] > items_max:
                        raise invalid(shape.lists[tag], f"has more than {items_max} items, at most {items_max} are allowed")
                outer.append((end, shape))
                if position + size > end:
                    raise DecodeError
                end, shape = position + size, inner
            elif kind == VARINT:
                while data[position] & 0x80:
                    position += 1
                position += 1
            elif kind in (FIXED32, FIXED64):
                position += 4 if kind == FIXED32 else 8
            else:
                raise DecodeError
    except (IndexError, DecodeError):
        raise MalformedMessage("these bytes are no such message") from None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """It, and where it ends. Raises IndexError and DecodeError."""
    value = 0
    for place in range(VARINT_BYTES_MAX):
        byte = data[position + place]
        value |= (byte & 0x7F) << 7 * place
        if not byte & 0x80:
            return value, position + place + 1
    raise DecodeError
