"""RPC handlers taken apart and put together again, for what stands around them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from ostinato.errors import MalformedMessage, SlowReader

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Any]


class Unwritten(Protocol):
    """Counts what was handed to gRPC and is not written yet."""

    def writing(self, count: int) -> Callable[[], None]:
        """So many bytes more, for the caller in whose task this is called; until the returned function is called."""
        ...

    def late(self) -> None:
        """A call was lost, for one of its messages was not written in time."""
        ...


class Uncounted:
    """Where the bytes are bounded otherwise."""

    def writing(self, count: int) -> Callable[[], None]:
        return _nothing

    def late(self) -> None: ...


def _nothing() -> None: ...


async def written(write: Awaitable[None], *, lost: asyncio.Future[Any] | None = None, seconds: float | None = None) -> bool:
    """Whether this write ended before `lost` was done and before the time was over. If not it goes on by itself: gRPC keeps the
    message until the reader takes it or leaves."""
    writing = asyncio.ensure_future(write)
    try:
        awaited = {writing} if lost is None else {writing, lost}
        await asyncio.wait(awaited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        writing.cancel()
        raise
    if writing.done():
        writing.result()
        return True
    writing.add_done_callback(_retrieved)
    return False


def _retrieved(writing: asyncio.Future[None]) -> None:
    """Or asyncio logs an exception that tells only that the reader has left."""
    if not writing.cancelled():
        writing.exception()


def behaviour_of(handler: Any, write_seconds: float | None = None, late: Callable[[], None] = _nothing) -> Behaviour:
    """What a handler does, as one coroutine function. An async generator's answers are written for it, and it is closed at once
    when the call ends early, not when the garbage collector comes by. `write_seconds`: for one of its messages to be written;
    then `late` is told, and the behaviour raises SlowReader."""
    kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    behaviour: Behaviour = getattr(handler, kind)
    if not inspect.isasyncgenfunction(behaviour):
        return behaviour

    async def answered(request: Any, context: Context) -> None:
        async with contextlib.aclosing(behaviour(request, context)) as answers:
            async for answer in answers:
                writing = context.write(answer)
                if write_seconds is None:
                    await writing
                elif not await written(writing, seconds=write_seconds):
                    late()
                    raise SlowReader(f"a message waited more than {write_seconds:g} s to be read")

    return answered


def rebuilt(
    handler: Any,
    behaviour: Behaviour,
    deserializer: Callable[[bytes], Any],
    serializer: Callable[[Any], bytes] | None,
) -> Any:
    """The handler with another behaviour, request deserialiser and response serialiser; None: the behaviour answers bytes."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(behaviour, request_deserializer=deserializer, response_serializer=serializer)


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


def serialized(message: Any, serialize: Callable[[Any], bytes]) -> bytes:
    """Its bytes; those of one that was serialised before as they are."""
    return message if isinstance(message, bytes) else serialize(message)


class Checked:
    """A context whose `read` checks, and whose `write` serialises at once and counts; all else is gRPC's. A message that waits
    to be written is held as bytes, and not as an object of several times that size."""

    def __init__(self, context: Context, serialize: Callable[[Any], bytes], unwritten: Unwritten) -> None:
        self._context, self._serialize, self._unwritten = context, serialize, unwritten
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        return checked(await self._context.read())

    def write(self, message: Any) -> Awaitable[None]:
        """A message, or its bytes. Ends when gRPC has written it all."""
        return self._write(serialized(message, self._serialize))

    async def _write(self, data: bytes) -> None:
        done = self._unwritten.writing(len(data))
        try:
            if not self._begun:  # else they would go with the message, and a call whose first one waits could not be aborted
                self._begun = True
                await self._context.send_initial_metadata(())
            await self._context.write(data)
        finally:
            done()
