"""A service with one method of each kind, and what a test needs to talk to it over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from ostinato.v1 import types_pb2
from serving.server import Server

NAME = "ostinato.test.Echo"
Message = types_pb2.Message
Context = grpc.aio.ServicerContext[Any, Any]


class Echo:
    """Answers with its request. A test changes that by setting `act`."""

    def __init__(self, act: Callable[[str, Context], Any] | None = None) -> None:
        self.act = act
        self.closed = asyncio.Event()
        """Set when a streamed answer was cleaned up."""

    async def reply(self, request: Message, context: Context) -> Message:
        if self.act is not None:
            made = self.act(request.content, context)
            if asyncio.iscoroutine(made):
                await made
        return request

    async def UnaryUnary(self, request: Message, context: Context) -> Message:
        return await self.reply(request, context)

    async def UnaryStream(self, request: Message, context: Context) -> AsyncIterator[Message]:
        try:
            for _ in range(3):
                yield await self.reply(request, context)
        finally:
            self.closed.set()

    async def StreamUnary(self, requests: AsyncIterator[Message], context: Context) -> Message:
        return Message(content="".join([(await self.reply(request, context)).content async for request in requests]))

    async def StreamStream(self, requests: AsyncIterator[Message], context: Context) -> AsyncIterator[Message]:
        async for request in requests:
            yield await self.reply(request, context)

    async def ReaderWriter(self, _requests: AsyncIterator[Message], context: Context) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(await self.reply(request, context))


def register(servicer: Echo, server: grpc.aio.Server) -> None:
    """Registers it, as generated code does for a service of the contract."""

    def made(kind: Callable[..., Any], behaviour: Any) -> Any:
        return kind(behaviour, request_deserializer=Message.FromString, response_serializer=Message.SerializeToString)

    handlers = {
        "UnaryUnary": made(grpc.unary_unary_rpc_method_handler, servicer.UnaryUnary),
        "UnaryStream": made(grpc.unary_stream_rpc_method_handler, servicer.UnaryStream),
        "StreamUnary": made(grpc.stream_unary_rpc_method_handler, servicer.StreamUnary),
        "StreamStream": made(grpc.stream_stream_rpc_method_handler, servicer.StreamStream),
        "ReaderWriter": made(grpc.stream_stream_rpc_method_handler, servicer.ReaderWriter),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))


@contextlib.asynccontextmanager
async def serving(
    echo: Echo, registry: CollectorRegistry | None = None, *, options: Sequence[tuple[str, Any]] = (), **kwargs: Any
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel, with these options, to `echo` behind a Server."""
    server = Server(["127.0.0.1:0"], registry=registry or CollectorRegistry(), **kwargs)
    server.add(register, echo, NAME)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.addresses[0], options) as channel:
            yield channel
    finally:
        await server.stop(grace=0)


async def call(channel: Any, method: str, *messages: bytes, timeout: float = 10) -> list[Message]:
    """Sends raw bytes as messages and returns the answers, whatever the kind of the method."""
    path, parse = f"/{NAME}/{method}", Message.FromString
    match method:
        case "UnaryUnary":
            return [await channel.unary_unary(path, response_deserializer=parse)(*messages, timeout=timeout)]
        case "UnaryStream":
            stream = channel.unary_stream(path, response_deserializer=parse)(*messages, timeout=timeout)
        case "StreamUnary":
            return [await channel.stream_unary(path, response_deserializer=parse)(iter(messages), timeout=timeout)]
        case _:
            stream = channel.stream_stream(path, response_deserializer=parse)(iter(messages), timeout=timeout)
    return [message async for message in stream]


async def raw(channel: Any, path: str, message: bytes = b"") -> bytes:
    """One unary call of any service, bytes for bytes."""
    answer: bytes = await channel.unary_unary(path)(message)
    return answer


def text(content: str) -> bytes:
    """The bytes of a message."""
    return Message(content=content).SerializeToString()


METHODS = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream", "ReaderWriter")
"""One of each kind, and both styles of a stream."""
