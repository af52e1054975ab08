"""What stands between gRPC and every handler of ours.

- Callers are identified, and handlers find them in `identity.caller()`. gRPC's own services are an admin's, but for health.
- Bytes that are no message raise MalformedMessage; gRPC by itself answers UNKNOWN, as if it were the server's fault, and logs
  a traceback.
- Our errors go out whole: code, reason, fields, and when to come back. Anything else goes out as INTERNAL, and into the log.
- Answers are serialised here, and counted until gRPC has written them.
- Each call is counted by its code and timed, and has a span where there are traces; a stream without an end has none. Where
  callers need no credentials, gRPC's own services are not counted: health checks would hide the other numbers.

Handlers are those of generated aio servicers: coroutines, or async generators for streamed answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Never, cast

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry, Counter, Histogram

from ostinato import tracing
from ostinato.errors import Internal, OstinatoError, to_status
from ostinato.serving.credentials import NONE, Credentials
from ostinato.serving.deadlines import ran_out, remaining
from ostinato.serving.handlers import (
    Checked,
    Context,
    Uncounted,
    Unwritten,
    behaviour_of,
    checked,
    lenient,
    messages,
    rebuilt,
    serialized,
)
from ostinato.serving.identity import CALLER

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
