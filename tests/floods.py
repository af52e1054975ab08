"""Hostile callers: what each of them does to a sidecar. `python -m tests.floods NAME TARGET SECONDS [TOKEN]` runs one."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc

from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.http2 import Peer, connected, framed

GENERATE, STREAM = "/ostinato.v1.Generation/Generate", "/ostinato.v1.Generation/GenerateStream"
GET, WATCH = "/ostinato.v1.Sequencer/Get", "/grpc.health.v1.Health/Watch"
MIB = 1 << 20
MESSAGE_BYTES = 4 * MIB - 64
Metadata = Sequence[tuple[str, str]]
Request = generation_pb2.GenerateRequest


@dataclass(frozen=True, slots=True)
class Flood:
    """One attack on `target`, for `seconds`."""

    target: str
    seconds: float
    metadata: Metadata

    async def lasting(self, attack: Callable[[], Awaitable[object]], callers: int, pause: float = 0.0) -> None:
        """The attack again and again, by this many callers at once. Refusals and lost connections are expected."""
        end = time.monotonic() + self.seconds

        async def one() -> None:
            while time.monotonic() < end:
                with contextlib.suppress(grpc.aio.AioRpcError, OSError, TimeoutError):
                    async with asyncio.timeout(max(0.0, end - time.monotonic())):
                        await attack()
                await asyncio.sleep(pause)

        await asyncio.gather(*(one() for _ in range(callers)))

    async def calls(self, method: str, message: bytes, at_once: int) -> None:
        """Whole messages, by gRPC's own client."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(self.target, options) as channel:
            call: Any = channel.unary_unary(method)
            await self.lasting(lambda: call(message, metadata=tuple(self.metadata)), at_once)

    @contextlib.asynccontextmanager
    async def peers(self, count: int) -> AsyncIterator[list[Peer]]:
        """Connections that read nothing of a stream, until the time is over."""
        end = time.monotonic() + self.seconds
        async with AsyncExitStack() as stack:
            peers = list[Peer]()
            for _ in range(count):
                with contextlib.suppress(OSError):
                    peers.append(await stack.enter_async_context(connected(self.target)))
            yield peers
            await asyncio.sleep(max(0.0, end - time.monotonic()))

    async def unread(self, method: str, message: bytes) -> None:
        """10 connections with 50 calls each, whose answers are not read."""
        async with self.peers(10) as peers:
            for _ in range(50):
                for peer in peers:
                    peer.call(method, message, self.metadata)


def long_text() -> bytes:
    return Request(items=[types_pb2.Item(text="lorem ipsum " * (MESSAGE_BYTES // 12 - 2))]).SerializeToString()


def nested(count: int) -> bytes:
    """A chat of empty messages: the most objects that one item can hold."""
    chat = types_pb2.Chat(messages=[types_pb2.Message()] * count)
    return Request(items=[types_pb2.Item(chat=chat)]).SerializeToString()


FLOODS: dict[str, Callable[[Flood], Awaitable[None]]] = {}


def named(flood: Callable[[Flood], Awaitable[None]]) -> Callable[[Flood], Awaitable[None]]:
    FLOODS[flood.__name__] = flood
    return flood


@named
async def large(flood: Flood) -> None:
    """60 callers with requests of 4 MB."""
    await flood.calls(GENERATE, long_text(), 60)


@named
async def empty_items(flood: Flood) -> None:
    """10 callers with requests of 2.09 million empty items."""
    await flood.calls(GENERATE, b"\x0a\x00" * 2_090_000, 10)


@named
async def empty_messages(flood: Flood) -> None:
    """10 callers with chats of 2 million empty messages."""
    await flood.calls(GENERATE, nested(2_000_000), 10)


@named
async def resets(flood: Flood) -> None:
    """4 connections that begin calls and reset them at once."""
    message = Request(items=[types_pb2.Item(text="hello")]).SerializeToString()

    async def connection() -> None:
        async with connected(flood.target) as peer:
            while not peer.over:
                for _ in range(50):
                    peer.reset(peer.call(GENERATE, message, flood.metadata))
                await peer.drain()
                await asyncio.sleep(0)

    await flood.lasting(connection, 4)


@named
async def small(flood: Flood) -> None:
    """100 callers with small requests, on 4 connections."""
    message = Request(items=[types_pb2.Item()]).SerializeToString()
    await asyncio.gather(*(flood.calls(GENERATE, message, 25) for _ in range(4)))


@named
async def idle(flood: Flood) -> None:
    """2,000 connections that do nothing."""
    async with flood.peers(2_000):
        pass


@named
async def half_sent(flood: Flood) -> None:
    """20 connections with 100 requests each, which never end: all but the last bytes of 4 MB are sent, as windows allow."""
    part = framed(long_text()[: -MIB // 16], MESSAGE_BYTES)
    async with flood.peers(20) as peers:
        sending = asyncio.gather(*(peer.send(peer.begin(GENERATE, flood.metadata), part) for _ in range(100) for peer in peers))
    sending.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await sending


def chatty() -> bytes:
    """About 400 kB of answer for each item."""
    parameters = types_pb2.Parameters(max_new_tokens=1200, ignore_eos=True, logprobs=20)
    return Request(items=[types_pb2.Item(text="hello")] * 4, parameters=parameters).SerializeToString()


@named
async def unread_streams(flood: Flood) -> None:
    """10 connections with 50 streams each, whose tokens are not read."""
    await flood.unread(STREAM, chatty())


@named
async def unread_answers(flood: Flood) -> None:
    """10 connections with 50 requests each, whose answers are not read."""
    await flood.unread(GENERATE, chatty())


@named
async def unread_records(flood: Flood) -> None:
    """10 connections with 50 reads each of a batch of 3 MB, which are not read."""
    many = types_pb2.Parameters(max_new_tokens=600, ignore_eos=True, logprobs=20)
    batch = Request(items=[types_pb2.Item(text="hello")] * 12, parameters=many, idempotency_key="flood")
    async with grpc.aio.insecure_channel(flood.target, [("grpc.max_receive_message_length", -1)]) as channel:
        call: Any = channel.unary_unary(GENERATE)
        await call(batch.SerializeToString(), metadata=tuple(flood.metadata))
    await flood.unread(GET, sequencer_pb2.GetRequest(idempotency_key="flood").SerializeToString())


@named
async def watchers(flood: Flood) -> None:
    """100 connections with 100 health watches each."""
    async with flood.peers(100) as peers:
        for peer in peers:
            for _ in range(100):
                peer.call(WATCH, b"", flood.metadata)
            await peer.drain()


async def main() -> None:
    name, target, seconds, *token = sys.argv[1:]
    metadata = [("authorization", f"Bearer {token[0]}")] if token else []
    await FLOODS[name](Flood(target, float(seconds), metadata))


if __name__ == "__main__":
    asyncio.run(main())
