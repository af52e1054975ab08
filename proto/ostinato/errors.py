"""Everything that can go wrong between a caller and an answer. A class is its row of the table; on the wire it is a
google.rpc.Status with details, and `to_status` and `from_status` are inverse.
    OstinatoError
      + InvalidRequest        can never succeed as it is      INVALID_ARGUMENT
      + Refused               before sequencing: no number was burned
      |   + MalformedMessage  bytes that are no message       INVALID_ARGUMENT
      |   + Unauthenticated   who calls?                      UNAUTHENTICATED
      |   + PermissionDenied  not for this role               PERMISSION_DENIED
      |   + QueueFull         retry later                     RESOURCE_EXHAUSTED
      |   + JournalFull       retry later                     RESOURCE_EXHAUSTED
      |   + JournalUnavailable later or elsewhere             UNAVAILABLE
      |   + EngineUnavailable retry later                     UNAVAILABLE
      |   + Draining          retry later; a key's are kept   UNAVAILABLE
      |   + GradeNotEarned                                    FAILED_PRECONDITION
      |   + KeyReused                                         ALREADY_EXISTS
      |   + PayloadPruned                                     FAILED_PRECONDITION
      |   + NotFound                                          NOT_FOUND
      |   + NotBuilt                                          UNIMPLEMENTED
      + Ended                 an admitted item's outcome without an output
      |   + DeadlineExceeded                                  DEADLINE_EXCEEDED
      |   + Cancelled                                         CANCELLED
      |   + Abandoned                                         ABORTED
      |   + GradeLost                                         ABORTED
      |   + AttemptsExhausted                                 ABORTED
      |   + FingerprintChanged                                FAILED_PRECONDITION
      |   + EngineFailed                                      INTERNAL
      + CallLost              the call is over, the items may not be
      |   + SlowReader                                        RESOURCE_EXHAUSTED
      |   + Disconnected      the far side was not reached    UNAVAILABLE
      + Internal              our fault; the log has the rest INTERNAL
      + StreamRefused         between sidecar and service
          + EpochStale                                        FAILED_PRECONDITION
          + WriterBusy                                        FAILED_PRECONDITION
          + JournalBehind                                     FAILED_PRECONDITION
          + OutOfOrder                                        FAILED_PRECONDITION
          + ProtocolViolation                                 INTERNAL"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import ClassVar, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

TABLE: dict[str, type[OstinatoError]] = {}  # by reason; filled in by the classes below, in their order
DOMAIN, Code, Bad = "ostinato", grpc.StatusCode, error_details_pb2.BadRequest  # ErrorInfo.domain of every error of ours


class OstinatoError(Exception):
    """Root of the tree. `message` is for people; `reason` and `code` are for programs."""

    code: ClassVar[grpc.StatusCode] = Code.UNKNOWN
    reason: ClassVar[str] = "UNKNOWN"  # the class's name, in the form of an ErrorInfo: QueueFull is QUEUE_FULL

    def __init_subclass__(cls) -> None:
        if "code" in vars(cls):
            cls.reason = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).upper()
            TABLE.setdefault(cls.reason, cls)

    def __init__(self, message: str, *, retry_after: float | None = None, details: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message, self.retry_after, self.details = message, retry_after, dict(details or {})  # seconds; None: not known


class Violation(NamedTuple):
    """One bad field: its path in the request, such as `items[3].parameters.top_p`, and what is wrong with it."""

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
    """Turned away before sequencing."""


class MalformedMessage(Refused):
    code = Code.INVALID_ARGUMENT


class Unauthenticated(Refused):
    code = Code.UNAUTHENTICATED


class PermissionDenied(Refused):
    code = Code.PERMISSION_DENIED


class QueueFull(Refused):
    code = Code.RESOURCE_EXHAUSTED


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


class NotFound(Refused):
    code = Code.NOT_FOUND


class NotBuilt(Refused):
    code = Code.UNIMPLEMENTED


class Ended(OstinatoError):
    """The outcome of an admitted item that has no output."""


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
    """The caller's call is over; with a key its items go on."""


class SlowReader(CallLost):
    code = Code.RESOURCE_EXHAUSTED


class Disconnected(CallLost):
    code = Code.UNAVAILABLE


class Internal(OstinatoError):
    code = Code.INTERNAL


class StreamRefused(OstinatoError):
    """The service will not have this Execute stream, or the sidecar this service."""


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
    """The error that `to_status` was given; an unknown reason becomes a plain OstinatoError with that code."""
    info, bad, retry = error_details_pb2.ErrorInfo(), Bad(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad, retry):
            with suppress(DecodeError):  # a far side that is not ours may send anything
                detail.Unpack(message)
    if info.domain != DOMAIN or (kind := TABLE.get(info.reason)) is None:
        return foreign({code.value[0]: code for code in Code}.get(status.code, Code.UNKNOWN), status.message)
    if issubclass(kind, InvalidRequest):
        return kind(status.message, violations=[Violation(v.field, v.description) for v in bad.field_violations])
    retry_after = retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None
    return kind(status.message, retry_after=retry_after, details=info.metadata)


def foreign(code: grpc.StatusCode, message: str) -> OstinatoError:
    """An error that is not ours: gRPC's own, or a proxy's. Its CANCELLED is a server that stops, not somebody's wish."""
    kinds = {Code.UNAVAILABLE: Disconnected, Code.DEADLINE_EXCEEDED: DeadlineExceeded, Code.CANCELLED: Disconnected}
    error = kinds.get(code, OstinatoError)(message or code.name)
    if code not in kinds:
        error.code = code  # type: ignore[misc]  # the one place where an instance knows better than its class
    return error
