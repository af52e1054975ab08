"""Calls over gRPC: one channel, deadlines and metadata on every call, second tries, and every failure as one of ours."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from ostinato import errors, requests, tracing
from ostinato.patience import PAUSE_SECONDS, PAUSE_SECONDS_MAX, Patience
from ostinato.v1 import generation_pb2, sequencer_pb2
from ostinato.v1.generation_pb2_grpc import GenerationStub
from ostinato.v1.sequencer_pb2_grpc import SequencerStub

if TYPE_CHECKING:  # they exist for type checkers only
    from ostinato.v1.generation_pb2_grpc import GenerationAsyncStub
    from ostinato.v1.sequencer_pb2_grpc import SequencerAsyncStub

RESPONSE_BYTES_METADATA = "ostinato-max-response-bytes"
"""Metadata of every call: the largest answer that the sidecar may send, in decimal."""

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
    """Connects at its first use, in the event loop that uses it.

    gRPC's own retries are off: they end after five, a few seconds, whatever time is left. `bound` below is that of `Patience`:
    0 for what is not safe to send twice.
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
        self._opened: Stubs | None = None

    @property
    def stubs(self) -> Stubs:
        if self._opened is None:
            channel = self._open()
            self._opened = Stubs(channel, GenerationStub(channel), SequencerStub(channel))
        return self._opened

    async def close(self) -> None:
        """Ends every call and connection. A later call opens them again."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.channel.close()

    async def ask(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout: float | None,
        bound: float = 0.0,
    ) -> ResponseT:
        """One answer."""
        patience = Patience(requests.seconds(timeout), bound)
        with _span(request, streamed=False) as span:
            while True:
                try:
                    return await method(request, timeout=patience.left, metadata=self._with(span))
                except grpc.aio.AioRpcError as error:
                    failure = ours(error)
                await patience.wait(failure)
                span.event("tried again", {"ostinato.reason": failure.reason})

    def read(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout: float | None,
        bound: float = 0.0,
    ) -> AsyncGenerator[ResponseT, None]:
        """A stream of answers; the call begins at the first step, and closing the iterator ends it. Once something has come
        there is no second try."""
        return self._responses(method, request, requests.seconds(timeout), bound)

    async def _responses(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout: float | None,
        bound: float,
    ) -> AsyncGenerator[ResponseT, None]:
        patience, begun = Patience(timeout, bound), False
        with _span(request, streamed=True) as span:
            while True:
                call = method(request, timeout=patience.left, metadata=self._with(span))
                try:
                    async for response in call:
                        begun = True
                        yield response
                    return
                except grpc.aio.AioRpcError as error:
                    failure = ours(error)
                finally:
                    call.cancel()
                if begun:
                    raise failure
                await patience.wait(failure)
                span.event("tried again", {"ostinato.reason": failure.reason})

    def _with(self, span: tracing.Span) -> grpc.aio.Metadata:
        """A call's metadata."""
        return grpc.aio.Metadata(*self._metadata, *span.metadata) if span.metadata else self._metadata

    def _open(self) -> grpc.aio.Channel:
        options = [
            ("grpc.max_receive_message_length", self._response_bytes),
            ("grpc.initial_reconnect_backoff_ms", round(PAUSE_SECONDS * 1000)),
            ("grpc.max_reconnect_backoff_ms", round(PAUSE_SECONDS_MAX * 1000)),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),  # or another client's failures would be answers to this one
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
    """The error that the far side raised, or what stands for gRPC's own; its cause is what gRPC raised."""
    made = errors.foreign(error.code(), error.details() or "")
    with suppress(ValueError, DecodeError):  # these details are none, or another code's: somebody between us wrote one of them
        # The synchronous decoder, since an AioRpcError is a call that has ended.
        if (status := rpc_status.from_call(error)) is not None:
            made = errors.from_status(status)
    made.__cause__ = error
    return made
