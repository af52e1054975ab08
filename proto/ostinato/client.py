"""The asyncio client: one method per RPC. It takes Python values, returns the contract's messages, raises `ostinato.errors`.

Calls that are safe to repeat are retried while the sidecar, its engine or room in its queue is missing: reads, and requests
with an idempotency key. Retries end at the timeout; without one, a few seconds (reads) or a minute (keys) after the first
failure. All other calls are sent once, because a Generate that is sent again is another request with other sequences.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message

from ostinato import errors, requests, tracing
from ostinato.requests import RESPONSE_BYTES_METADATA, GradeName, Prompts, Sampling
from ostinato.resume import resumed
from ostinato.retry import BACKOFF_SECONDS, BACKOFF_SECONDS_MAX, KEYED_SECONDS, READ_SECONDS, RetryPolicy
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2
from ostinato.v1.generation_pb2_grpc import GenerationStub
from ostinato.v1.sequencer_pb2_grpc import SequencerStub

if TYPE_CHECKING:  # these exist for type checkers only
    from ostinato.v1.generation_pb2_grpc import GenerationAsyncStub
    from ostinato.v1.sequencer_pb2_grpc import SequencerAsyncStub

DEFAULT_TARGET = "localhost:7001"
DEFAULT_RESPONSE_BYTES = 4 * 2**20
"""gRPC's default limit for a received message."""

File: TypeAlias = str | os.PathLike[str]
RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT")


class Client:
    """A client of the sidecar at `target`: "host:port", "https://host:port" or "unix:/path". It belongs to one event loop.
    Use it as `async with Client(...) as client`.

    `credentials`: for TLS with your own files, from `ostinato.tls(...)`. https:// alone trusts the system's authorities.
    `token`: sent with every call. Without TLS it is sent to loopback and unix sockets only, unless `allow_plaintext_token`: it
    could be read on the way. `max_response_bytes`: the largest response to receive. The sidecar refuses a request whose
    response could be larger before it does any work.

    Every method takes a `timeout` in seconds, which is the deadline of the call (None: no deadline). It raises
    `errors.OstinatoError`, or a TypeError or ValueError that names a bad argument. To end a call, cancel its task or close its
    iterator.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        allow_plaintext_token: bool = False,
        max_response_bytes: int = DEFAULT_RESPONSE_BYTES,
    ) -> None:
        self.target = requests.target(target)
        self._response_bytes = requests.integer("max_response_bytes", max_response_bytes, 1, 2**31 - 1)
        self._address, self._credentials = target, credentials
        scheme, mark, address = target.partition("://")
        if mark and scheme in ("http", "https"):
            self._address = address.rstrip("/")
            self._credentials = credentials or (grpc.ssl_channel_credentials() if scheme == "https" else None)
        self._metadata = grpc.aio.Metadata((RESPONSE_BYTES_METADATA, str(max_response_bytes)))
        if token is not None:
            if self._credentials is None and not (allow_plaintext_token or _local(self._address)):
                how = "use https:// or TLS credentials, or allow it with allow_plaintext_token (--allow-plaintext-token)"
                raise ValueError(f"token: could be read on the way to {self._address}: {how}")
            self._metadata.add("authorization", bearer(token))
        self._opened: _Stubs | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every call and closes the connection. A later call opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.channel.close()

    async def generate(
        self,
        prompts: Prompts | generation_pb2.GenerateRequest,
        *,
        key: str = "",
        request_id: str = "",
        required_grade: GradeName | None = None,
        verify: bool = False,
        timeout: float | None = None,
        **parameters: Unpack[Sampling],
    ) -> generation_pb2.GenerateResponse:
        """One result per prompt, in their order. A failed item raises nothing; its result has a status.

        With a `key`, the same call again returns the recorded response, and the client retries it while the sidecar is away or
        full. Without one, a lost connection or an expired `timeout` cancels the items. With `verify`, each output is generated
        twice, and `comparison` in its result has the verdict.
        """
        request = requests.batch(prompts, key, request_id, required_grade, parameters, verify=verify)
        retry_seconds = KEYED_SECONDS if request.idempotency_key else 0.0
        return await self._unary(self._stubs.generation.Generate, request, timeout, retry_seconds)

    def stream(
        self,
        prompts: Prompts | generation_pb2.GenerateRequest,
        *,
        key: str = "",
        request_id: str = "",
        required_grade: GradeName | None = None,
        verify: bool = False,
        timeout: float | None = None,
        **parameters: Unpack[Sampling],
    ) -> AsyncGenerator[generation_pb2.GenerateEvent, None]:
        """As `generate`, as events: admitted, tokens, restarted, and one finished or failed per item.

        With a `key`, a lost stream is resumed after the last event: no event comes twice. Tokens that were generated while no
        stream was open come in one run before the item's finished.
        """
        request = requests.batch(prompts, key, request_id, required_grade, parameters, verify=verify)
        connect = partial(self._stream, self._stubs.generation.GenerateStream, request)
        seconds = requests.seconds(timeout)
        return resumed(connect, seconds) if request.idempotency_key else connect(seconds)

    async def cancel(
        self, first: int | None = None, last: int | None = None, *, key: str = "", timeout: float | None = None
    ) -> generation_pb2.CancelResponse:
        """Cancels the unfinished items of `first` to `last` (without `last`, only `first`), or of the batch with this key."""
        if _by_key(first, key):
            request = generation_pb2.CancelRequest(idempotency_key=key)
        else:
            request = generation_pb2.CancelRequest(range=requests.span(first, last))
        return await self._unary(self._stubs.generation.Cancel, request, timeout)

    async def model(self, *, timeout: float | None = None) -> types_pb2.Model:
        """The running model, its limits, its fingerprint and the grade that it has earned."""
        request = generation_pb2.GetModelRequest()
        return (await self._unary(self._stubs.generation.GetModel, request, timeout, READ_SECONDS)).model

    async def tokenize(self, prompts: Prompts, *, timeout: float | None = None) -> list[list[int]]:
        """The token ids of each prompt, as `generate` would use them."""
        request = generation_pb2.TokenizeRequest(items=requests.items(prompts))
        response = await self._unary(self._stubs.generation.Tokenize, request, timeout, READ_SECONDS)
        return [list(tokens.ids) for tokens in response.results]

    async def get(
        self, sequence: int | None = None, *, key: str = "", timeout: float | None = None
    ) -> list[sequencer_pb2.ItemRecord]:
        """The journal's records of one item, or of every item of the batch with this key, in ascending order."""
        if _by_key(sequence, key):
            request = sequencer_pb2.GetRequest(idempotency_key=key)
        else:
            request = sequencer_pb2.GetRequest(sequence=requests.integer("sequence", sequence, 1, 2**64 - 1))
        return list((await self._unary(self._stubs.sequencer.Get, request, timeout, READ_SECONDS)).items)

    async def head(self, *, timeout: float | None = None) -> sequencer_pb2.HeadResponse:
        """The journal's last entry and last sequence, and the writer's epoch."""
        request = sequencer_pb2.HeadRequest()
        return await self._unary(self._stubs.sequencer.Head, request, timeout, READ_SECONDS)

    async def witness(self, head: types_pb2.SignedHead, *, timeout: float | None = None) -> sequencer_pb2.WitnessResponse:
        """Records a signed head of another log. Raises InvalidRequest for one that is not signed with a key that was given for
        that log, that is older than the last one, or that contradicts it."""
        request = sequencer_pb2.WitnessRequest(head=head)
        return await self._unary(self._stubs.sequencer.Witness, request, timeout)

    async def report(self, *, confidence: float = 0.0, timeout: float | None = None) -> sequencer_pb2.ReportResponse:
        """Statistics of divergence. `confidence`: of the intervals, above 0 and below 1; 0 is the sidecar's default."""
        request = sequencer_pb2.ReportRequest(confidence=confidence)
        return await self._unary(self._stubs.sequencer.Report, request, timeout, READ_SECONDS)

    def tail(
        self, from_index: int = 1, *, follow: bool = False, payloads: bool = False, timeout: float | None = None
    ) -> AsyncGenerator[sequencer_pb2.Entry, None]:
        """The journal's entries in ascending order, up to the head, or with `follow` without end.

        With `follow`, a sidecar that goes away is waited for, and the entries continue after the last one: none is missing or
        comes twice. A sidecar that cannot be reached at the start is an error.
        """
        from_index = requests.integer("from_index", from_index, 0, 2**64 - 1)
        request = sequencer_pb2.TailRequest(from_index=from_index, follow=follow, payloads=payloads)
        requests.seconds(timeout)
        return self._follow(request, timeout) if follow else self._entries(request, timeout, READ_SECONDS)

    def replay(
        self,
        first: int,
        last: int | None = None,
        *,
        concurrency: int = 0,
        alone: bool = False,
        timeout: float | None = None,
    ) -> AsyncGenerator[sequencer_pb2.ReplayResponse, None]:
        """Runs the completed items `first` to `last` (without `last`, only `first`) again. Yields a verdict for each, in any
        order, and the sequences of the items that were passed over. `ostinato.replay` runs items at another sidecar.

        `concurrency`: runs at once, 1 to 64; 0 is the sidecar's default. `alone`: each run has the engine to itself, as far as
        the sidecar's own work goes, however long it has to wait for that.
        """
        concurrency = requests.integer("concurrency", concurrency, 0, 2**32 - 1)
        request = sequencer_pb2.ReplayRequest(range=requests.span(first, last), concurrency=concurrency, alone=alone)
        return self._stream(self._stubs.sequencer.Replay, request, requests.seconds(timeout))

    async def _entries(
        self, request: sequencer_pb2.TailRequest, timeout: float | None, retry_seconds: float = 0.0
    ) -> AsyncGenerator[sequencer_pb2.Entry, None]:
        stream = self._stream(self._stubs.sequencer.Tail, request, timeout, retry_seconds)
        async with aclosing(stream) as responses:
            async for response in responses:
                for entry in response.entries:
                    yield entry

    async def _follow(
        self, request: sequencer_pb2.TailRequest, timeout: float | None
    ) -> AsyncGenerator[sequencer_pb2.Entry, None]:
        policy = RetryPolicy(timeout, 0.0)
        await self.head(timeout=timeout)  # a Tail that waits for entries does not show whether the sidecar is there
        pause = BACKOFF_SECONDS
        while True:
            try:
                async with aclosing(self._entries(request, policy.remaining)) as entries:
                    async for entry in entries:
                        request.from_index = entry.header.index + 1
                        pause = BACKOFF_SECONDS
                        yield entry
                wait = pause  # a follow that ends without an error: the sidecar is stopping
            except errors.OstinatoError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE and not isinstance(error, errors.SlowReader):
                    raise
                wait = error.retry_after or pause
            await asyncio.sleep(min(wait, policy.remaining or wait))
            pause = min(2 * pause, BACKOFF_SECONDS_MAX)

    # Calls. gRPC's own retries are off: they end after five attempts, within seconds, whatever time is left. `retry_seconds` is
    # that of RetryPolicy: 0 for calls that are not safe to repeat.

    @property
    def _stubs(self) -> _Stubs:
        """Connects at the first use."""
        if self._opened is None:
            channel = self._open()
            self._opened = _Stubs(channel, GenerationStub(channel), SequencerStub(channel))
        return self._opened

    async def _unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout: float | None,
        retry_seconds: float = 0.0,
    ) -> ResponseT:
        policy = RetryPolicy(requests.seconds(timeout), retry_seconds)
        with _span(request, streamed=False) as span:
            while True:
                try:
                    return await method(request, timeout=policy.remaining, metadata=self._with(span))
                except grpc.aio.AioRpcError as error:
                    failure = self._failure(error)
                await policy.backoff(failure)
                span.event("tried again", {"ostinato.reason": failure.reason})

    async def _stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout: float | None,
        retry_seconds: float = 0.0,
    ) -> AsyncGenerator[ResponseT, None]:
        """The call starts at the first step; closing the iterator ends it. After the first response it is not retried."""
        policy, started = RetryPolicy(timeout, retry_seconds), False
        with _span(request, streamed=True) as span:
            while True:
                call = method(request, timeout=policy.remaining, metadata=self._with(span))
                try:
                    async for response in call:
                        started = True
                        yield response
                    return
                except grpc.aio.AioRpcError as error:
                    failure = self._failure(error)
                finally:
                    call.cancel()
                if started:
                    raise failure
                await policy.backoff(failure)
                span.event("tried again", {"ostinato.reason": failure.reason})

    def _failure(self, error: grpc.aio.AioRpcError) -> errors.OstinatoError:
        failure = errors.from_rpc_error(error)
        if isinstance(failure, errors.Disconnected):
            failure.target = self.target
        return failure

    def _with(self, span: tracing.Span) -> grpc.aio.Metadata:
        return grpc.aio.Metadata(*self._metadata, *span.metadata) if span.metadata else self._metadata

    def _open(self) -> grpc.aio.Channel:
        options = [
            ("grpc.max_receive_message_length", self._response_bytes),
            ("grpc.initial_reconnect_backoff_ms", round(BACKOFF_SECONDS * 1000)),
            ("grpc.max_reconnect_backoff_ms", round(BACKOFF_SECONDS_MAX * 1000)),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),  # otherwise clients share connections, and their failures
        ]
        if _local(self._address):
            options.append(("grpc.enable_http_proxy", 0))  # its loopback is another one, and it would read the token
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._address, options)
        return grpc.aio.secure_channel(self._address, self._credentials, options)


def _by_key(number: int | None, key: str) -> bool:
    if (number is None) == (key == ""):
        raise TypeError("a sequence or a key: give one of them")
    return number is None


def tls(ca: File | None = None, *, certificate: File | None = None, key: File | None = None) -> grpc.ChannelCredentials:
    """TLS credentials from PEM files. `ca`: the authorities to trust; None: the system's. `certificate` and `key`: for a
    sidecar that requires a client certificate. Raises ValueError that names the argument and the file."""
    if (certificate is None) != (key is None):
        raise ValueError("certificate, key: one needs the other")
    return grpc.ssl_channel_credentials(_pem("ca", ca), _pem("key", key), _pem("certificate", certificate))


def _pem(name: str, file: File | None) -> bytes | None:
    if file is None:
        return None
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: {file}: {error.strerror}") from None
    if b"-----BEGIN" not in data:  # gRPC would only report that it cannot connect
        raise ValueError(f"{name}: {file}: is not a PEM file")
    return data


def bearer(token: str) -> str:
    """The `authorization` metadata for a token. Raises ValueError."""
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("token: must be printable ASCII without spaces")
    return f"Bearer {token}"


def _local(target: str) -> bool:
    """Whether what is sent to this target stays on this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Stubs(NamedTuple):
    channel: grpc.aio.Channel
    generation: GenerationAsyncStub
    sequencer: SequencerAsyncStub


_METHODS = {
    (method.input_type.full_name, method.server_streaming): f"{service.full_name}/{method.name}"
    for file in (generation_pb2, sequencer_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Names of the RPCs, by the type of the request and whether the response is a stream."""


def _span(request: Message, *, streamed: bool) -> tracing.Span:
    if tracing.tracer is None:
        return tracing.OFF
    label = getattr(request, "request_id", "")
    return tracing.call(_METHODS[request.DESCRIPTOR.full_name, streamed], {"ostinato.request_id": label} if label else None)
