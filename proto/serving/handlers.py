"""What stands between gRPC and every handler: identity, bad bytes, errors, writes, counts.

- A caller is identified before its request is read, and the handler finds it by `auth.caller()`. gRPC's own services are for
  admins, except health. To gRPC every handler takes a stream: of one that takes a message it would read it first.
- What a caller may take of memory is in `serving.intake`.
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
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Never, Protocol, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ostinato import tracing
from ostinato.errors import Internal, MalformedMessage, OstinatoError, QueueFull, SlowReader, Unauthenticated, to_status
from serving.auth import CALLER, NONE, Context, Credentials, caller
from serving.intake import CHARGE, RETRY_SECONDS, Bounds, Intake, shape_of

STATUS_BYTES_MAX, MESSAGE_BYTES_MAX, OTHER_DETAILS_BYTES = 3072, 768, 256
"""Of a google.rpc.Status. It travels in headers, as base64, and its message once more, percent-encoded. A peer must accept
8 KiB of headers, and no more."""

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
"""Codes that mark a server's span as failed; the others are errors of the caller."""

EARLY_SECONDS, EARLY_SHARE = 0.05, 0.02
"""The caller's clock runs out before ours: by the way here, and because gRPC rounds a timeout up by up to a hundredth."""

WITHOUT_CREDENTIALS = ("/grpc.health.", "/ostinato.v1.Hop/")
"""Paths of calls that need none."""
ENDLESS_MAX = 256
"""Health watches and reflection streams at once. Those who watch need no credentials."""

QUIET_TURNS, TURNS_MAX = 8, 64

_log = logging.getLogger(__name__)


class Unwritten(Protocol):
    """Counts what was passed to gRPC and is not written yet."""

    def writing(self, count: int) -> Callable[..., None]:
        """Adds bytes for the caller in whose task this is called, until the returned function is called, with whatever."""

    def late(self) -> None:
        """A call was lost because one of its messages was not written in time."""


class Guard(grpc.GenericRpcHandler):
    """All handlers of a server, wrapped. Generated code adds them to it as it would to the server."""

    def __init__(
        self,
        registry: CollectorRegistry,
        credentials: Credentials = NONE,
        unwritten: Unwritten | None = None,
        write_seconds: float | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        """`write_seconds`: how long one message of an async generator may take to be written before its call is lost; None: no
        bound. `bounds`: of what is let in; None: there are none."""
        self.intake = intake = Intake(bounds) if bounds is not None else None
        if intake is not None:
            Gauge("ostinato_open_calls", "Calls that are open.", registry=registry).set_function(lambda: intake.calls.taken)
            charged = Gauge("ostinato_request_bytes", "Memory of requests that wait or are worked on.", registry=registry)
            charged.set_function(lambda: intake.requests.taken)
        self.credentials, self.unwritten, self.write_seconds = credentials, unwritten, write_seconds
        self.handled = Counter(
            "ostinato_rpc_handled", "Calls that ended, by code.", ["service", "method", "code"], registry=registry
        )
        self.seconds = Histogram(
            "ostinato_rpc_handling_seconds",
            "From a call's arrival to its end.",
            ["service", "method"],
            registry=registry,
            buckets=BUCKETS,
        )
        self.endless: set[asyncio.Task[Any]] = set()
        """Open health watches and reflection streams."""
        self.closed = False
        self._inner: list[grpc.GenericRpcHandler] = []
        self._wrapped: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._inner += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Generated code gives the same handlers in this way, too."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The wrapped handler of a method, or None."""
        path = details.method
        if path not in self._wrapped:
            handler = next((found for each in self._inner if (found := each.service(details)) is not None), None)
            if handler is None:  # not kept: callers choose these names
                return grpc.stream_unary_rpc_method_handler(self._refuse_unknown)
            streams = bool(handler.response_streaming)
            make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
            # Without a deserialiser: gRPC's cannot refuse a message.
            self._wrapped[path] = make(_Method(self, path, handler).handle)
        return self._wrapped[path]

    async def _refuse_unknown(self, request: Any, context: Context) -> None:
        """Ends a call of a method that there is not, at the rate of calls that were reset: it may have been, too."""
        if self.intake is not None:
            await self.intake.reset(caller().tenant)
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    def close_streams(self) -> None:
        """Ends health watches and reflection streams with UNAVAILABLE: they do not end by themselves, and would keep every
        drain open for its whole grace."""
        self.closed = True
        for call in self.endless:
            call.cancel()
        if self.intake is not None:
            self.intake.close()


class _Method:
    """A handler with all that stands around it. That is one coroutine: a stream passes each layer at every message."""

    def __init__(self, guard: Guard, path: str, handler: Any) -> None:
        kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
        self._guard, self._path = guard, path
        self._behaviour: Callable[[Any, Context], Any] = getattr(handler, kind)
        self._generates = inspect.isasyncgenfunction(self._behaviour)
        self._serialize: Callable[[Any], bytes] = handler.response_serializer
        self._deserialize: Callable[[bytes], Any] = handler.request_deserializer
        self._shape = shape_of(handler.request_deserializer.__self__.DESCRIPTOR)
        self.takes_stream, self._gives_stream = bool(handler.request_streaming), bool(handler.response_streaming)
        self._standard = path.startswith("/grpc.")
        self._endless = self._standard and self._gives_stream
        self._identifies = guard.credentials.required and not path.startswith(WITHOUT_CREDENTIALS)
        self._observed = not self._standard or self._identifies
        self.labels = path.strip("/").rpartition("/")[::2]
        if self._observed:
            self._seconds = guard.seconds.labels(*self.labels)
        self._codes: dict[str, Counter] = {}

    async def handle(self, request: Any, context: Context) -> bytes | None:
        """The answer of one call, serialised; None if it streams."""
        guard, intake, charge, given = self._guard, self._guard.intake, None, None
        try:
            with _Observation(self, context) if self._observed else contextlib.nullcontext():
                try:
                    tenant = self._admit(context)
                    if intake is not None:
                        charge = intake.enter(tenant)
                        if intake.shared and (seconds := intake.ahead(tenant)) > 0:
                            await intake.spread(tenant, seconds)
                    if self.takes_stream:
                        given = self._messages(request)
                    else:
                        asking = intake.receive(context, charge, self._shape) if charge and intake else context.read()
                        given = self._parsed(await asking)
                    if self.takes_stream or self._gives_stream:
                        context = cast(Context, _CheckedContext(context, self._parsed, self._serialize, guard.unwritten))
                    if self._generates:  # closed when the call ends early: the garbage collector would do that later
                        async with contextlib.aclosing(self._behaviour(given, context)) as answers:
                            async for answer in answers:
                                if guard.write_seconds is None:
                                    await context.write(answer)
                                else:
                                    await self._write(answer, context, guard.write_seconds)
                        return None
                    made = await self._behaviour(given, context)
                    return None if self._gives_stream else self._counted(made, context)
                except Unauthenticated as error:
                    if intake is not None:
                        await intake.refused()
                    await _abort(context, error)
                except OstinatoError as error:
                    await _abort(context, error)
                except asyncio.CancelledError:
                    if refused := guard.credentials.refusal():
                        await _abort(context, refused)
                    if not (self._endless and guard.closed):
                        raise
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
                except grpc.aio.BaseError:  # the handler has aborted, or the caller is gone
                    raise
                except Exception:  # noqa: BLE001  # whatever it is, the caller gets a code and the log gets the rest
                    _log.exception("handler failed", extra={"method": self._path})
                    await _abort(context, Internal("internal error"))
                finally:
                    if charge is not None and intake is not None:
                        intake.leave(charge)
        except (asyncio.CancelledError, grpc.aio.BaseError) as error:
            given = None  # gRPC keeps the frames of an aborted call until the garbage collector comes
            read = charge is not None and charge.whole
            if intake is not None and not read and not isinstance(error, grpc.aio.AbortError):
                await intake.reset(caller().tenant)
            raise

    def _parsed(self, data: Any) -> Any:
        """Raises MalformedMessage for what is no wire format, or text that is not UTF-8."""
        try:
            return self._deserialize(data)
        except (DecodeError, TypeError) as error:  # TypeError: gRPC's end of a stream
            raise MalformedMessage(f"these bytes are no such message: {error}") from None

    async def _messages(self, source: AsyncIterable[bytes]) -> AsyncIterator[Any]:
        charge, intake = CHARGE.get(), self._guard.intake
        async for data in source:  # not before the first is asked for: gRPC warns of an iterator that was made and never asked
            if charge is not None:
                charge.whole = True
            yield self._parsed(data)
        if intake is not None and charge is not None and not charge.whole:  # a stream that was reset ends without an error
            await intake.reset(charge.tenant)

    def _admit(self, context: Context) -> str:
        """Identifies the caller. The tenant. Raises Unauthenticated, PermissionDenied or QueueFull."""
        if self._endless:
            if len(self._guard.endless) >= ENDLESS_MAX:
                raise QueueFull(f"{ENDLESS_MAX} health watches and reflection streams are open", retry_after=RETRY_SECONDS)
            call = asyncio.current_task()
            assert call is not None, "a handler runs in a task"
            self._guard.endless.add(call)
            call.add_done_callback(self._guard.endless.discard)
        if not self._identifies:
            return caller().tenant
        identity = self._guard.credentials.identify(context)
        CALLER.set(identity)
        if self._standard:
            identity.require_admin(self._path)
        return identity.tenant

    async def _write(self, answer: Any, context: Context, seconds: float) -> None:
        if not await written(context.write(answer), seconds=seconds):
            if self._guard.unwritten is not None:
                self._guard.unwritten.late()
            raise SlowReader(f"a message waited more than {seconds:g} s to be read")

    def _counted(self, answer: Any, context: Context) -> bytes:
        """The answer's bytes, which are held until gRPC has written them."""
        data = answer if isinstance(answer, bytes) else self._serialize(answer)
        if self._guard.unwritten is not None:
            context.add_done_callback(self._guard.unwritten.writing(len(data)))  # type: ignore[arg-type]  # any Callable will do
        return data

    def ended(self, code: str, seconds: float, span: tracing.Span) -> None:
        """Counts a call."""
        if code not in self._codes:
            self._codes[code] = self._guard.handled.labels(*self.labels, code)
        self._codes[code].inc()
        self._seconds.observe(seconds, span.exemplar if span is not tracing.OFF else None)


class _Observation:
    """Of one call: its time, its code, its span."""

    def __init__(self, method: _Method, context: Context) -> None:
        self._method, self._context = method, context
        self._started, self._deadline = time.monotonic(), remaining(context)

    def __enter__(self) -> None:
        traced = tracing.tracer is not None and not self._method.takes_stream
        self._span = _span("/".join(self._method.labels), self._context) if traced else tracing.OFF
        if traced:
            self._entered = self._span.entered()
            self._entered.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """gRPC's code is None until it is set, whatever its types say."""
        gone = isinstance(error, asyncio.CancelledError | grpc.aio.BaseError) and not isinstance(error, grpc.aio.AbortError)
        code = cast("grpc.StatusCode | None", self._context.code())
        if gone:
            late = ran_out(remaining(self._context), self._deadline)
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        name = "OK" if code is None else code.name
        self._method.ended(name, time.monotonic() - self._started, self._span)
        if self._span is not tracing.OFF:
            self._entered.__exit__(kind, error, trace)
            self._span.note({"rpc.response.status_code": name} | ({"error.type": name} if gone else {}))
            self._span.end()


class _CheckedContext:
    """gRPC's context, but `read` checks, and `write` serialises at once and counts. A message that waits to be written is held
    as bytes: as an object it takes several times that size."""

    def __init__(
        self, context: Context, parse: Callable[[Any], Any], serialize: Callable[[Any], bytes], unwritten: Unwritten | None
    ) -> None:
        self._context, self._parse, self._serialize, self._unwritten = context, parse, serialize, unwritten
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        data = await self._context.read()
        return data if data is grpc.aio.EOF else self._parse(data)

    def write(self, message: Any) -> Awaitable[None]:
        """A message, or its bytes. Ends when gRPC has written it all."""
        data = message if isinstance(message, bytes) else self._serialize(message)
        return self._context.write(data) if self._begun and self._unwritten is None else self._write(data)

    async def _write(self, data: bytes) -> None:
        done = self._unwritten.writing(len(data)) if self._unwritten is not None else None
        try:
            if not self._begun:  # else they would go with the message, and a call whose first one waits could not be aborted
                self._begun = True
                await self._context.send_initial_metadata(())
            await self._context.write(data)
        finally:
            if done is not None:
                done()


def _span(name: str, context: Context) -> tracing.Span:
    """Of a call, within the caller's. gRPC's own retries say how many came before."""
    metadata = dict(context.invocation_metadata() or ())
    attributes = {"rpc.system.name": "grpc", "rpc.method": name}
    span = tracing.span(name, attributes, "SERVER", metadata.items())
    if retries := metadata.get("grpc-previous-rpc-attempts"):
        span.event("retried", {"ostinato.previous_attempts": str(retries)})
    return span


async def _abort(context: Context, error: OstinatoError) -> Never:
    """Ends the call with this error. Trailers that the handler had set stay."""
    _forget_frames(error)
    tracing.current().fail(error.reason, fault=error.code in FAULTS)
    status = rpc_status.to_status(fitting(to_status(error)))
    trailers = [*(context.trailing_metadata() or ()), *status.trailing_metadata]
    if error.retry_after is not None:
        trailers.append(("grpc-retry-pushback-ms", str(round(error.retry_after * 1000))))
    await context.abort(status.code, status.details, tuple(trailers))


def _forget_frames(error: BaseException | None) -> None:
    """Drops what its frames refer to, the request above all. gRPC's call keeps the error in a cycle until the garbage collector
    comes, which counts objects and not their bytes."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


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


def remaining(context: Context) -> float | None:
    """Seconds until the caller's deadline; None: it has none."""
    left: float | None = context.time_remaining()
    return left


def ran_out(left: float | None, at_arrival: float | None) -> bool:
    """Whether the deadline of a caller has passed that left with `left` seconds of `at_arrival`: gRPC cancels a handler for a
    deadline as for a caller that leaves. None: there is no deadline."""
    return left is not None and at_arrival is not None and left <= EARLY_SECONDS + EARLY_SHARE * at_arrival


async def written(write: Awaitable[None], *, lost: asyncio.Future[Any] | None = None, seconds: float | None = None) -> bool:
    """Whether this write ended before `lost` was done and within this time. If not it goes on by itself: gRPC keeps the message
    until the reader takes it or leaves."""
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
    writing.add_done_callback(_retrieve)
    return False


def _retrieve(writing: asyncio.Future[None]) -> None:
    """Else asyncio logs an exception that says only that the reader has left."""
    if not writing.cancelled():
        writing.exception()


class Coalescer:
    """Tells a sender when to send, so that what is about to come leaves in the same message: a message costs some thirty times
    as much as a turn of the event loop. No timer is used: where nothing happens, a turn takes some microseconds.

    A sender for which nothing else is under way sends at once. Any other waits until nothing has come for a few turns.
    """

    def __init__(self, alone: Callable[[], bool]) -> None:
        """`alone`: whether nothing else is under way."""
        self._alone = alone
        self._ready: asyncio.Future[None] | None = None
        """Of the sender that waits."""
        self._waiting = self._before = 0
        """Things to be sent, now and a turn ago."""
        self._quiet = self._turns = 0
        """Turns in which nothing came, and all turns, of this wait."""

    def ready(self, waiting: int) -> asyncio.Future[None]:
        """Done when the sender should send. So much waits already."""
        self._ready, self._waiting = asyncio.get_running_loop().create_future(), 0
        if waiting:
            self.add(waiting)
        return self._ready

    def add(self, count: int = 1) -> None:
        """So much more is to be sent."""
        waited, self._waiting = self._waiting, self._waiting + count
        if waited or self._ready is None or self._ready.done():
            return
        if self._alone():
            self._ready.set_result(None)
        else:
            self._quiet = self._turns = self._before = 0
            self._ready.get_loop().call_soon(self._turn, self._ready)

    def _turn(self, ready: asyncio.Future[None]) -> None:
        self._quiet = self._quiet + 1 if self._waiting == self._before else 0
        self._before, self._turns = self._waiting, self._turns + 1
        if ready.done():
            return
        if self._quiet < QUIET_TURNS and self._turns < TURNS_MAX:
            ready.get_loop().call_soon(self._turn, ready)
        else:
            ready.set_result(None)
