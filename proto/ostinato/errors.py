"""All errors of the API. On the wire an error is a google.rpc.Status with details; `to_status` and `from_status` convert.

The classes are the tree of errors, and the table of reasons and status codes: a class with a `code` is an error that is raised,
and its name is the reason. docs/protocol.md says of each when to retry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import ClassVar, NamedTuple

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

TABLE: dict[str, type[OstinatoError]] = {}
"""The classes below by reason, in their order."""
DOMAIN = "ostinato"
RETRY_SECONDS_MAX = 1e6
"""A peer's longer pause is read as this."""
"""ErrorInfo.domain of these errors."""
Code, Bad = grpc.StatusCode, error_details_pb2.BadRequest


class OstinatoError(Exception):
    """The root. `message` is for people; `reason` and `code` are for programs. `retry_after`: in seconds; None: not known."""

    code: ClassVar[grpc.StatusCode] = Code.UNKNOWN
    reason: ClassVar[str] = "UNKNOWN"
    """The class's name as ErrorInfo has it: QueueFull is QUEUE_FULL."""

    def __init_subclass__(cls) -> None:
        if "code" in vars(cls):
            cls.reason = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).upper()
            TABLE.setdefault(cls.reason, cls)

    def __init__(self, message: str, *, retry_after: float | None = None, details: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message, self.retry_after, self.details = message, retry_after, dict(details or {})


class Violation(NamedTuple):
    """One bad field: its path in the request, such as `items[3].parameters.top_p`, and why it is bad."""

    field: str
    description: str


class InvalidRequest(OstinatoError):
    code = Code.INVALID_ARGUMENT

    def __init__(self, message: str = "", *, violations: Iterable[Violation] = ()) -> None:
        self.violations = tuple(violations)
        super().__init__(message or "; ".join(f"{v.field}: {v.description}" for v in self.violations))


def invalid(field: str, description: str) -> InvalidRequest:
    """An InvalidRequest about one field."""
    return InvalidRequest(violations=[Violation(field, description)])


class Refused(OstinatoError):
    """The request was refused before sequencing."""


class MalformedMessage(Refused):
    code = Code.INVALID_ARGUMENT


class Unauthenticated(Refused):
    code = Code.UNAUTHENTICATED


class PermissionDenied(Refused):
    code = Code.PERMISSION_DENIED


class QueueFull(Refused):
    code = Code.RESOURCE_EXHAUSTED


class ConnectionFull(QueueFull):
    """The server took no further call on this connection, and did not look at this one."""


class JournalFull(Refused):
    code = Code.RESOURCE_EXHAUSTED


class JournalUnavailable(Refused):
    code = Code.UNAVAILABLE


class EngineUnavailable(Refused):
    code = Code.UNAVAILABLE


class Draining(Refused):
    code = Code.UNAVAILABLE


class GradeNotEarned(Refused):
    code = Code.FAILED_PRECONDITION


class KeyReused(Refused):
    code = Code.ALREADY_EXISTS


class PayloadPruned(Refused):
    code = Code.FAILED_PRECONDITION


class RecordDamaged(Refused):
    """What is recorded is not what was written."""

    code = Code.DATA_LOSS


class NotFound(Refused):
    code = Code.NOT_FOUND


class NotBuilt(Refused):
    code = Code.UNIMPLEMENTED


class Ended(OstinatoError):
    """An admitted item ended without an output."""


class DeadlineExceeded(Ended):
    code = Code.DEADLINE_EXCEEDED


class Cancelled(Ended):
    code = Code.CANCELLED


class Abandoned(Ended):
    code = Code.ABORTED


class GradeLost(Ended):
    code = Code.ABORTED


class AttemptsExhausted(Ended):
    code = Code.ABORTED


class FingerprintChanged(Ended):
    code = Code.FAILED_PRECONDITION


class EngineFailed(Ended):
    code = Code.INTERNAL


class CallLost(OstinatoError):
    """The call ended; the items of a request with a key go on."""


class SlowReader(CallLost):
    code = Code.RESOURCE_EXHAUSTED


class Disconnected(CallLost):
    code = Code.UNAVAILABLE
    target = ""
    """Of the client that raised it."""


class Internal(OstinatoError):
    code = Code.INTERNAL


class StreamRefused(OstinatoError):
    """The service refused the Execute stream, or the sidecar refused the service."""


class EpochStale(StreamRefused):
    code = Code.FAILED_PRECONDITION


class WriterBusy(StreamRefused):
    code = Code.FAILED_PRECONDITION


class JournalBehind(StreamRefused):
    code = Code.FAILED_PRECONDITION


class OutOfOrder(StreamRefused):
    code = Code.FAILED_PRECONDITION


class ProtocolViolation(StreamRefused):
    code = Code.INTERNAL


def to_status(error: OstinatoError) -> status_pb2.Status:
    """The error as it goes over the wire."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.details))
    if isinstance(error, InvalidRequest) and error.violations:
        status.details.add().Pack(Bad(field_violations=[Bad.FieldViolation(**v._asdict()) for v in error.violations]))
    if error.retry_after is not None:
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=timedelta(seconds=error.retry_after)))
    return status


def from_status(status: status_pb2.Status) -> OstinatoError:
    """The inverse of `to_status`. An unknown reason becomes an OstinatoError with that code."""
    info, bad, retry = error_details_pb2.ErrorInfo(), Bad(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad, retry):
            with suppress(DecodeError):  # another server's details may be malformed
                detail.Unpack(message)
    if info.domain != DOMAIN or (kind := TABLE.get(info.reason)) is None:
        codes = {code.value[0]: code for code in Code if code is not Code.OK}
        return from_code(codes.get(status.code, Code.UNKNOWN), status.message)
    if issubclass(kind, InvalidRequest):
        return kind(status.message, violations=[Violation(v.field, v.description) for v in bad.field_violations])
    delay = retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None
    retry_after = None if delay is None else min(max(delay, 0.0), RETRY_SECONDS_MAX)
    return kind(status.message, retry_after=retry_after, details=info.metadata)


def from_rpc_error(error: grpc.aio.AioRpcError) -> OstinatoError:
    """The error that the server raised, or one for gRPC's own error. Its `__cause__` is `error`."""
    ours = from_code(error.code(), error.details() or "")
    with suppress(ValueError, DecodeError):  # a proxy may have changed the code or the details
        # The synchronous decoder fits: an AioRpcError is of a call that has ended.
        if (status := rpc_status.from_call(error)) is not None:
            ours = from_status(status)
    ours.__cause__ = error
    return ours


_REFUSED_STREAM = re.compile(r"RST_STREAM with error code 7\b")
"""HTTP/2: nothing of the call was processed. gRPC has it in its text only."""
_OVERSIZE = re.compile(r"(SERVER|CLIENT): Received message larger than max \((\d+) vs\. (\d+)\)")


def from_code(code: grpc.StatusCode, message: str) -> OstinatoError:
    """An error for a status without our details, from gRPC or a proxy. gRPC's CANCELLED means that the server stopped."""
    if code is Code.RESOURCE_EXHAUSTED and (found := _OVERSIZE.search(message)):
        who, size, limit = found.groups()
        if who == "SERVER":
            return InvalidRequest(f"the request has {size} bytes, the server accepts {limit}: split it")
        return InvalidRequest(f"the response has {size} bytes, the client accepts {limit}: raise max_response_bytes")
    if code is Code.UNAVAILABLE and _REFUSED_STREAM.search(message):
        return ConnectionFull("the server takes no more calls on this connection")
    kinds = {Code.UNAVAILABLE: Disconnected, Code.DEADLINE_EXCEEDED: DeadlineExceeded, Code.CANCELLED: Disconnected}
    error = kinds.get(code, OstinatoError)(message or code.name)
    if code not in kinds:
        error.code = code  # type: ignore[misc]  # the only instances whose code differs from their class's
    return error
