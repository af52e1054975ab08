"""Calls over gRPC: two channels to one target, deadlines and metadata on every call, and every failure as one of ours."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from ostinato import errors, requests, tracing
from ostinato.v1 import generation_pb2, sequencer_pb2
from ostinato.v1.generation_pb2_grpc import GenerationStub
from ostinato.v1.sequencer_pb2_grpc import SequencerStub

if TYPE_CHECKING:  # they exist for type checkers only
    from ostinato.v1.generation_pb2_grpc import GenerationAsyncStub
    from ostinato.v1.sequencer_pb2_grpc import SequencerAsyncStub

RESPONSE_BYTES_METADATA = "ostinato-max-response-bytes"
"""Metadata of every call: the largest answer that the sidecar may send, in decimal."""

PAUSE_SECONDS = 0.2
PAUSE_SECONDS_MAX = 5.0
"""Between attempts to reach a sidecar: the first pause, which doubles, and the longest."""

_RETRY_POLICY = {
    "maxAttempts": 5,
    "initialBackoff": f"{PAUSE_SECONDS}s",
    "maxBackoff": f"{PAUSE_SECONDS_MAX}s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_RETRY_BUFFER_BYTES = 64 * 2**20  # a larger request is not kept for a second attempt; gRPC's default is 256 KiB

_METHODS = {
    (method.input_type.full_name, method.server_streaming): f"{service.full_name}/{method.name}"
    for file in (generation_pb2, sequencer_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""What a request is for, by its type and whether the answer is a stream."""

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT")


class Stubs(NamedTuple):
    """The services, over one channel."""

    channel: grpc.aio.Channel
    generation: GenerationAsyncStub
    sequencer: SequencerAsyncStub


class Wire:
    """What is safe to send twice goes over `retrying`, anything else over `once`: gRPC decides by channel, not by call.

    Both connect at their first use, in the event loop that uses them.
    """

    def __init__(
        self, target: str, credentials: grpc.ChannelCredentials | None, response_bytes: int, token: str | None = None
    ) -> None:
        scheme, mark, rest = target.partition("://")
        if mark and scheme in ("http", "https"):
            target = rest.rstrip("/")
            credentials = credentials or (grpc.ssl_channel_credentials() if scheme == "https" else None)
        self._target = target
        self._credentials = credentials
        self._response_bytes = response_bytes
        self._metadata = grpc.aio.Metadata((RESPONSE_BYTES_METADATA, str(response_bytes)))
        if token is not None:
            self._metadata.add("authorization", bearer(token))
        self._opened: dict[bool, Stubs] = {}

    @property
    def once(self) -> Stubs:
        return self.stubs(retry=False)

    @property
    def retrying(self) -> Stubs:
        return self.stubs(retry=True)

    def stubs(self, *, retry: bool) -> Stubs:
        if retry not in self._opened:
            channel = self._open({"methodConfig": [{"name": [{}], "retryPolicy": _RETRY_POLICY}]} if retry else {}, retry)
            self._opened[retry] = Stubs(channel, GenerationStub(channel), SequencerStub(channel))
        return self._opened[retry]

    async def close(self) -> None:
        """Ends every call and connection. A later call opens them again."""
        while self._opened:
            _, stubs = self._opened.popitem()
            await stubs.channel.close()

    async def ask(
        self, method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT], request: RequestT, timeout: float | None
    ) -> ResponseT:
        """One answer."""
        with _span(request, streamed=False) as span:
            try:
                return await method(request, timeout=requests.seconds(timeout), metadata=self._with(span))
            except grpc.aio.AioRpcError as error:
                raise ours(error) from error

    def read(
        self, method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT], request: RequestT, timeout: float | None
    ) -> AsyncGenerator[ResponseT, None]:
        """A stream of answers; the call begins at the first step, and closing the iterator ends it."""
        return self._responses(method, request, requests.seconds(timeout))

    async def _responses(
        self, method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT], request: RequestT, seconds: float | None
    ) -> AsyncGenerator[ResponseT, None]:
        with _span(request, streamed=True) as span:
            call = method(request, timeout=seconds, metadata=self._with(span))
            try:
                async for response in call:
                    yield response
            except grpc.aio.AioRpcError as error:
                raise ours(error) from error
            finally:
                call.cancel()

    def _with(self, span: tracing.Span) -> grpc.aio.Metadata:
        """A call's metadata."""
        return grpc.aio.Metadata(*self._metadata, *span.metadata) if span.metadata else self._metadata

    def _open(self, service_config: object, retry: bool) -> grpc.aio.Channel:
        options = [
            ("grpc.max_receive_message_length", self._response_bytes),
            ("grpc.initial_reconnect_backoff_ms", round(PAUSE_SECONDS * 1000)),
            ("grpc.max_reconnect_backoff_ms", round(PAUSE_SECONDS_MAX * 1000)),
            ("grpc.enable_retries", int(retry)),
            ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER_BYTES),
            ("grpc.service_config", json.dumps(service_config)),
        ]
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._target, options)
        return grpc.aio.secure_channel(self._target, self._credentials, options)


def _span(request: Message, *, streamed: bool) -> tracing.Span:
    """Of one call, within whatever span its caller is in."""
    if not tracing.on():
        return tracing.OFF
    label = getattr(request, "request_id", "")
    return tracing.call(_METHODS[request.DESCRIPTOR.full_name, streamed], {"ostinato.request_id": label} if label else None)


def bearer(token: str) -> str:
    """The metadata `authorization` of a call. Raises ValueError."""
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("token: must be printable ASCII without spaces")
    return f"Bearer {token}"


def ours(error: grpc.aio.AioRpcError) -> errors.OstinatoError:
    """The error that the far side raised, or what stands for gRPC's own."""
    try:
        # The synchronous decoder, since an AioRpcError is a call that has ended.
        status = rpc_status.from_call(error)
        if status is not None:
            return errors.from_status(status)
    except (ValueError, DecodeError):
        pass  # these details are none, or belong to another code: somebody between us wrote one of them
    return errors.foreign(error.code(), error.details() or "")
