"""What stands between gRPC and every handler: identity, bad bytes, errors, writes, counts.

- A caller is identified before its handler runs, and the handler finds it by `auth.caller()`. gRPC's own services are for
  admins, except health.
- Bytes that are not a message raise MalformedMessage. gRPC itself answers UNKNOWN, as if it were the server's fault, and logs a
  traceback.
- An OstinatoError is sent whole: code, reason, fields, and when to retry. Any other error is sent as INTERNAL and logged.
- Answers are serialised here, and counted until gRPC has written them.
- Each call is counted by its code and timed, and has a span if traces are on; a stream without an end has none. Where callers
  need no credentials, gRPC's own services are not counted: health checks would hide the other numbers.

Handlers are those of generated aio servicers: coroutines, or async generators for streamed answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Never, Protocol, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry, Counter, Histogram

from ostinato import tracing
from ostinato.errors import Internal, MalformedMessage, OstinatoError, SlowReader, to_status
from serving.auth import CALLER, NONE, Context, Credentials

EARLY_SECONDS, EARLY_SHARE = 0.05, 0.02
"""A caller's own clock runs out before ours: by the way here, and because gRPC rounds a timeout up, by up to a hundredth."""


def remaining(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """Seconds until the caller's deadline; None: it has none."""
    left: float | None = context.time_remaining()
    return left


def ran_out(left: float | None, patience: float | None) -> bool:
    """Whether a caller that came with `patience` seconds to its deadline, and was gone with `left`, waited for as long as it
    could. None: it has no deadline."""
    return left is not None and patience is not None and left <= EARLY_SECONDS + EARLY_SHARE * patience


QUIET_TURNS, TURNS_MAX = 4, 16


async def coalesce(amount: Callable[[], int]) -> None:
    """Until the amount of what waits has stood still for a few turns of the loop, and for many turns at most. No timer: where
    nothing happens, a turn takes some microseconds."""
    quiet = 0
    for _ in range(TURNS_MAX):
        before = amount()
        await asyncio.sleep(0)
        quiet = quiet + 1 if amount() == before else 0
        if quiet == QUIET_TURNS:
            return


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


STATUS_BYTES_MAX, MESSAGE_BYTES_MAX, OTHER_DETAILS_BYTES = 3072, 768, 256
"""Of a google.rpc.Status. It travels in headers, as base64 and its message once more, percent-encoded; 8 KiB of headers are all
that a peer must take."""

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds in seconds: from a refusal to a long batch."""

FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""Codes that mark a server's span as failed; the others are the caller's doing."""

_log = logging.getLogger(__name__)


class Guard(grpc.aio.ServerInterceptor):
    """Wraps all handlers. One Guard for one server and one registry."""

    def __init__(
        self,
        registry: CollectorRegistry,
        credentials: Credentials = NONE,
        unwritten: Unwritten | None = None,
        write_seconds: float | None = None,
    ) -> None:
        """`unwritten`: counts what gRPC has not written yet. `write_seconds`: for one message of an async generator to be
        written, or its call is lost; None: for ever."""
        self._credentials = credentials
        self._unwritten = unwritten or Uncounted()
        self._write_seconds = write_seconds
        self._handled = Counter(
            "ostinato_rpc_handled", "Calls that ended, by code.", ["service", "method", "code"], registry=registry
        )
        self._seconds = Histogram(
            "ostinato_rpc_handling_seconds",
            "From a call's arrival to its end.",
            ["service", "method"],
            registry=registry,
            buckets=BUCKETS,
        )
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        path = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if path not in self._wrapped:
            self._wrapped[path] = self._wrap(path, handler)
        return self._wrapped[path]

    def _wrap(self, path: str, handler: Any) -> Any:
        answer = self._answer(handler)
        standard = path.startswith("/grpc.")
        asked = not standard or (self._credentials.asked and not path.startswith("/grpc.health."))

        async def guarded(request: Any, context: Context) -> Any:
            span = _span(path, context) if asked and not handler.request_streaming else tracing.OFF
            with span.entered(), self._observed(path, context, span) if asked else contextlib.nullcontext():
                try:
                    if asked:
                        CALLER.set(self._credentials.identify(context))
                    if asked and standard:
                        CALLER.get().need_admin(path)
                    return await answer(request, context)
                except OstinatoError as error:
                    await _abort(context, span, error)
                except grpc.aio.BaseError:  # the handler aborted by itself, or the caller is gone
                    raise
                except Exception:  # noqa: BLE001  # whatever it is, the caller gets a code and the log gets the rest
                    _log.exception("handler failed", extra={"method": path})
                    await _abort(context, span, Internal("internal error"))

        return rebuilt(handler, guarded, lenient(handler.request_deserializer), serializer=None)

    def _answer(self, handler: Any) -> Callable[[Any, Context], Awaitable[bytes | None]]:
        """What the handler does, with messages that are checked when they come and are bytes when they go; None where it
        streams."""
        behaviour = behaviour_of(handler, self._write_seconds, self._unwritten.late)
        serialize = handler.response_serializer

        async def answer(request: Any, context: Context) -> bytes | None:
            given = messages(request) if handler.request_streaming else checked(request)
            made = await behaviour(given, cast(Context, Checked(context, serialize, self._unwritten)))
            if handler.response_streaming:
                return None
            data = serialized(made, serialize)
            done = self._unwritten.writing(len(data))
            context.add_done_callback(lambda _: done())  # type: ignore[arg-type]  # its types want a named parameter
            return data

        return answer

    @contextlib.contextmanager
    def _observed(self, path: str, context: Context, span: tracing.Span) -> Iterator[None]:
        service, _, method = path.strip("/").rpartition("/")
        started, patience, gone = time.monotonic(), remaining(context), False
        try:
            yield
        except grpc.aio.AbortError:
            raise
        except (asyncio.CancelledError, grpc.aio.BaseError):
            gone = True
            raise
        finally:
            code = _code(context, patience, gone=gone)
            self._seconds.labels(service, method).observe(time.monotonic() - started, span.exemplar)
            self._handled.labels(service, method, code).inc()
            span.note({"rpc.response.status_code": code} | ({"error.type": code} if gone else {}))
            span.end()


def _span(path: str, context: Context) -> tracing.Span:
    """Of a call, within the caller's. gRPC's own retries tell how many came before."""
    if not tracing.on():
        return tracing.OFF
    metadata = dict(context.invocation_metadata() or ())
    name = path.strip("/")
    attributes = {"rpc.system.name": "grpc", "rpc.method": name}
    span = tracing.span(name, attributes, tracing.Kind.SERVER, metadata.items())
    if retries := metadata.get("grpc-previous-rpc-attempts"):
        span.event("retried", {"ostinato.previous_attempts": str(retries)})
    return span


async def _abort(context: Context, span: tracing.Span, error: OstinatoError) -> Never:
    """Ends the call with this error. Trailers that the handler had set stay."""
    span.fail(error.reason, fault=error.code in FAULTS)
    status = rpc_status.to_status(fitting(to_status(error)))
    trailers = [*(context.trailing_metadata() or ()), *status.trailing_metadata]
    if error.retry_after is not None:
        trailers.append(("grpc-retry-pushback-ms", str(round(error.retry_after * 1000))))
    await context.abort(status.code, status.details, tuple(trailers))


def fitting(status: status_pb2.Status) -> status_pb2.Status:
    """The status, its message and its bad fields cut to what arrives: of a hundred bad fields the first thirty or so."""
    if status.ByteSize() <= STATUS_BYTES_MAX and len(status.message.encode()) <= MESSAGE_BYTES_MAX:
        return status
    cut = status_pb2.Status(code=status.code, message=status.message.encode()[:MESSAGE_BYTES_MAX].decode(errors="ignore"))
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            while bad.field_violations and cut.ByteSize() + bad.ByteSize() > STATUS_BYTES_MAX - OTHER_DETAILS_BYTES:
                bad.field_violations.pop()
            cut.details.add().Pack(bad)
        else:
            cut.details.append(detail)
    return cut


def _code(context: Context, patience: float | None, *, gone: bool) -> str:
    """The name of the code with which a call ends that came with `patience` seconds to its deadline."""
    if gone:
        return (grpc.StatusCode.DEADLINE_EXCEEDED if ran_out(remaining(context), patience) else grpc.StatusCode.CANCELLED).name
    code = cast("grpc.StatusCode | None", context.code())  # None until it is set, whatever its types say
    return (code or grpc.StatusCode.OK).name
