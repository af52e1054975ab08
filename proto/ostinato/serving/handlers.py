"""RPC handlers taken apart and put together again, for what stands around them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ostinato.errors import MalformedMessage

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Any]


def behaviour_of(handler: Any) -> Behaviour:
    """What a handler does, as one coroutine function. An async generator's answers are written for it, and it is closed at once
    when the call ends early, not when the garbage collector comes by."""
    kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    behaviour: Behaviour = getattr(handler, kind)
    if not inspect.isasyncgenfunction(behaviour):
        return behaviour

    async def written(request: Any, context: Context) -> None:
        async with contextlib.aclosing(behaviour(request, context)) as answers:
            async for answer in answers:
                await context.write(answer)

    return written


def rebuilt(handler: Any, behaviour: Behaviour, deserializer: Callable[[bytes], Any]) -> Any:
    """The handler with another behaviour and request deserialiser."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(behaviour, request_deserializer=deserializer, response_serializer=handler.response_serializer)


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands where a message should: gRPC's deserialisers cannot refuse, only crash."""

    why: str


def lenient(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The deserialiser, with Malformed for what it cannot parse: no wire format, or text that is no UTF-8."""

    def parse(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as error:
            return Malformed(str(error))

    return parse


def checked(parsed: Any) -> Any:
    """The message. Raises MalformedMessage where there is none."""
    if isinstance(parsed, Malformed):
        raise MalformedMessage(f"these bytes are no such message: {parsed.why}")
    return parsed


async def messages(source: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """A call's messages, each checked."""
    async for message in source:  # not before the first is asked for: gRPC warns of an iterator that was made and never asked
        yield checked(message)


class Reader:
    """A context whose `read` checks; all else is gRPC's."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        return checked(await self._context.read())
