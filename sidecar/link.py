"""The one ordered stream to the service, kept open, and the calls beside it for what would delay the stream.

Short requests to prepare go over the stream: a call of their own would cost more than the preparing. What waits for a write
leaves in one message. Each request is answered, refused and given up by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

import grpc
from google.rpc import status_pb2

from ostinato import errors, tracing
from ostinato.errors import from_rpc_error
from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, types_pb2
from serving.handlers import Coalescer
from serving.hop import Metadata, SidecarEnd

log = logging.getLogger(__name__)
CLOSE_SECONDS = 1.0
"""For the service to end a half-closed stream."""
SUBMIT_BYTES = 1 << 20
"""One message carries about this much of waiting submits, and as much of requests to prepare."""
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A half-open connection is found in 15 seconds, also while it is idle.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


class Listener(Protocol):
    """Gets what comes over the stream, on the event loop."""

    def engine_up(self, description: engine_pb2.DescribeResponse) -> None:
        """Welcome, or a changed description."""

    def engine_events(self, events: Sequence[engine_pb2.RunEvent]) -> None: ...

    def engine_fault(self, error: errors.ProtocolViolation) -> None:
        """The service violated the protocol. The stream ends."""

    def engine_down(self, error: errors.OstinatoError) -> None: ...


Stream = grpc.aio.StreamStreamCall[engine_pb2.ExecuteRequest, engine_pb2.ExecuteResponse]
Answer = asyncio.Future[engine_pb2.PrepareResponse]


class EngineLink:
    """Reconnects until the link is closed, or a stream is refused for good (EPOCH_STALE, JOURNAL_BEHIND).

    The service proves itself before each stream (serving/hop.py). Nothing is sent to it while no stream is open.
    """

    def __init__(
        self,
        target: str,
        pause_seconds: float,
        hop: SidecarEnd | None = None,
        tls: grpc.ChannelCredentials | None = None,
        alone: Callable[[], bool] = lambda: False,
    ) -> None:
        """`hop`: None: the service need not prove itself, because it is in this process, or `tls` does that. `alone`: whether
        what is sent next is all that is under way."""
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, tls, options=CHANNEL_OPTIONS)
        self._hop = hop
        self._metadata: Metadata | None = None
        """Of every call; None: no stream is open."""
        self._stub: engine_pb2_grpc.EngineAsyncStub = engine_pb2_grpc.EngineStub(self._channel)
        self._pause_seconds = pause_seconds
        self._submits: deque[engine_pb2.Submit] = deque()
        self._cancels: list[int] = []
        self._preparing = Preparing()
        self._coalescer = Coalescer(alone)
        self._closing = False
        self._stream: Stream | None = None
        self._ended = asyncio.Event()
        self._ended.set()

    def submit(self, submit: engine_pb2.Submit) -> None:
        """Sent behind every earlier submit. Lost with the stream; `engine_down` follows."""
        self._submits.append(submit)
        self._coalescer.add()

    def cancel(self, run_id: int) -> None:
        self._cancels.append(run_id)
        self._coalescer.add()

    def drop(self, why: str) -> None:
        """End the stream, because the service violated the protocol."""
        log.error("dropping the engine stream: %s", why)
        if self._stream is not None:
            self._stream.cancel()

    async def run(self, listener: Listener, hello: Callable[[], Awaitable[engine_pb2.Hello]]) -> None:
        """Until closed.

        Raises EpochStale if a newer epoch of this writer has connected, JournalBehind if the service has run a sequence that
        the journal does not have.
        """
        said = ""  # a reason is logged once, not at each attempt while a service loads its model
        while not self._closing:
            try:
                metadata = await self._introduced()
                if not self._closing:
                    await self._one_stream(listener, await hello(), metadata)
            except (errors.EpochStale, errors.JournalBehind):
                raise
            except errors.OstinatoError as error:
                why = f"{error.reason} ({error.code.name}): {error.message}"
                if why != said and not self._closing:
                    log.warning("engine stream ended: %s", why)
                said = why
            await asyncio.sleep(self._pause_seconds)

    async def _introduced(self) -> Metadata:
        """Waits for a service that proves itself. Raises Unauthenticated for a process that does not."""
        while self._hop is not None and not self._closing:
            with contextlib.suppress(errors.Disconnected):  # as wait_for_ready does
                return await self._hop.introduced(self._channel)
            await asyncio.sleep(self._pause_seconds)
        return ()

    async def _one_stream(self, listener: Listener, hello: engine_pb2.Hello, metadata: Metadata) -> None:
        stream = self._stream = self._stub.Execute(wait_for_ready=self._hop is None, metadata=metadata)
        self._ended.clear()
        up = False
        writer: asyncio.Task[None] | None = None
        error: errors.OstinatoError = errors.Disconnected("the service closed the stream")
        try:
            # Once more, now that the stream has its connection, which all calls of the channel share: another process may have
            # taken the place of a service that has just ended.
            if self._hop is not None and await self._hop.introduced(self._channel) != metadata:
                raise errors.Disconnected("the service was restarted")
            with contextlib.suppress(asyncio.InvalidStateError):  # it has ended already; the read tells why
                await stream.write(engine_pb2.ExecuteRequest(hello=hello))
            while (response := await stream.read()) is not grpc.aio.EOF:
                if not isinstance(response, engine_pb2.ExecuteResponse):  # gRPC's None for bytes that it cannot parse
                    raise errors.ProtocolViolation("a message that cannot be parsed")
                if response.HasField("welcome"):
                    check_description(response.welcome.description)
                    self._preparing.open = True
                    self._metadata = metadata
                    listener.engine_up(response.welcome.description)
                    up = True
                    if writer is None:
                        writer = asyncio.create_task(self._write(stream))
                        # If it fails, the stream must not stay open for reading alone.
                        writer.add_done_callback(lambda task: stream.cancel() if _fault(task) else None)
                elif not up:
                    raise errors.ProtocolViolation("the first message is not a Welcome")
                if response.prepared:
                    self._preparing.settle(response.prepared)
                if response.events:
                    listener.engine_events(response.events)
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
        except errors.ProtocolViolation as fault:
            listener.engine_fault(fault)
            error = fault
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # else the stream was cancelled, which the read shows alike
                raise
            error = errors.Disconnected("the stream was dropped")
        finally:
            self._stream = None
            self._ended.set()
            stream.cancel()
            if writer is not None:
                writer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({writer})
            self._submits.clear()
            self._cancels.clear()
            self._preparing.lose()
            self._metadata = None
            if up:
                listener.engine_down(error)
        raise _fault(writer) or error

    async def _write(self, stream: Stream) -> None:
        while True:
            waiting = len(self._submits) + len(self._cancels) + len(self._preparing.unsent)
            if self._closing and not waiting:
                await stream.done_writing()
                return
            await self._coalescer.ready(waiting)
            if (message := self._message()).ByteSize():  # else what waited was given up
                await stream.write(message)

    def _message(self) -> engine_pb2.ExecuteRequest:
        prepares = self._preparing.take(SUBMIT_BYTES) if self._preparing.unsent else ()
        message = engine_pb2.ExecuteRequest(prepares=prepares)
        size = 0
        while self._submits and size < SUBMIT_BYTES:
            submit = self._submits.popleft()
            size += submit.ByteSize()
            message.submits.append(submit)
        if not self._submits:
            message.cancels.extend(self._cancels)
            self._cancels.clear()
        return message

    async def close(self) -> None:
        """Half-close, give the service time to end the stream, and close the channel."""
        self._closing = True
        self._coalescer.add()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), CLOSE_SECONDS)
        await self._channel.close()

    async def _call(self, name: str, request: Any, timeout: float | None) -> Any:
        """The answer of a call beside the stream; None: gRPC could not parse it. Raises what refused it, or EngineUnavailable
        if the service is unreachable or no stream is open."""
        if self._metadata is None:
            raise unreachable()
        with tracing.call(f"ostinato.v1.Engine/{name}") as span:
            try:
                return await getattr(self._stub, name)(request, timeout=timeout, metadata=(*self._metadata, *span.metadata))
            except grpc.aio.AioRpcError as failure:
                raise unavailable(from_rpc_error(failure)) from None

    def prepare(self, request: engine_pb2.PrepareRequest, timeout: float | None) -> asyncio.Future[engine_pb2.PrepareResponse]:
        """Sends a short request (see `is_short`) over the stream. See `Preparing.ask`."""
        answer = self._preparing.ask(request, timeout)
        self._coalescer.add()
        if tracing.tracer is not None:
            span = tracing.call("ostinato.v1.Engine/Prepare")
            request.traceparent = span.traceparent
            answer.add_done_callback(lambda done: span.end(asyncio.CancelledError() if done.cancelled() else done.exception()))
        return answer

    async def prepare_long(self, request: engine_pb2.PrepareRequest, timeout: float | None) -> engine_pb2.PrepareResponse:
        """Raises as `_call`, and ProtocolViolation for a useless answer."""
        return check_prepared(await self._call("Prepare", request, timeout), len(request.items))

    async def tokenize(self, request: generation_pb2.TokenizeRequest, timeout: float | None) -> generation_pb2.TokenizeResponse:
        """Raises as `prepare_long`."""
        tokenized: generation_pb2.TokenizeResponse | None = await self._call("Tokenize", request, timeout)
        if tokenized is None or len(tokenized.results) != len(request.items):
            raise errors.ProtocolViolation("the service did not tokenise what it was given")
        return tokenized

    async def tokenizer(self, timeout: float | None) -> bytes:
        """The zip of the tokenizer's files. Raises as `_call`."""
        if self._metadata is None:
            raise unreachable()
        try:
            parts = self._stub.GetTokenizer(engine_pb2.GetTokenizerRequest(), timeout=timeout, metadata=self._metadata)
            return b"".join([part.chunk async for part in parts])
        except grpc.aio.AioRpcError as failure:
            raise unavailable(from_rpc_error(failure)) from None


def _fault(writer: asyncio.Task[None] | None) -> BaseException | None:
    """What ended the task that writes. None: it did not fail, or only because the stream has ended."""
    if writer is None or not writer.done() or writer.cancelled():
        return None
    error = writer.exception()
    return None if isinstance(error, grpc.aio.AioRpcError | asyncio.InvalidStateError) else error


def check_description(description: engine_pb2.DescribeResponse) -> None:
    """Raises ProtocolViolation for an engine without capacity, or of an unknown grade."""
    capacity, grade = description.capacity, description.model.grade
    if not (capacity.runs and capacity.kv_blocks and capacity.block_tokens):
        raise errors.ProtocolViolation("an engine without capacity")
    if grade not in types_pb2.Grade.values():
        raise errors.ProtocolViolation(f"unknown grade {grade}")


def run_error(status: status_pb2.Status) -> errors.OstinatoError:
    """Why a run ended without output."""
    error = errors.from_status(status)
    # gRPC's own codes would mean the call; this is a run.
    return errors.EngineFailed(error.message) if isinstance(error, errors.CallLost) else error


def unavailable(error: errors.OstinatoError) -> errors.OstinatoError:
    """An engine that cannot be reached may be asked again."""
    if isinstance(error, errors.Disconnected):
        return unreachable()
    return error


def check_prepared(prepared: engine_pb2.PrepareResponse | None, count: int) -> engine_pb2.PrepareResponse:
    """Raises ProtocolViolation for what could be numbered but not run. None: gRPC could not parse the message."""
    if prepared is None or len(prepared.items) != count:
        raise errors.ProtocolViolation("the service did not prepare what it was given")
    if not all(item.token_ids and item.parameters.max_new_tokens for item in prepared.items):
        raise errors.ProtocolViolation("the service prepared an item without tokens or parameters")
    return prepared


class Preparing:
    """Short requests to prepare on their way out over the stream, and the futures of their answers. Closed while there is no
    stream."""

    def __init__(self) -> None:
        self.open = False
        self._last_id = self._last_sent_id = 0
        self.unsent: deque[engine_pb2.PrepareRequest] = deque()
        """Some of them may have been given up."""
        self._answers: dict[int, tuple[Answer, int]] = {}
        """By prepare id: those that are awaited, each with the number of its items."""

    def ask(self, request: engine_pb2.PrepareRequest, timeout: float | None) -> Answer:
        """Takes the request over. To give it up, cancel its answer.

        The answer fails with what refused the request, DeadlineExceeded, ProtocolViolation for a useless response, or
        EngineUnavailable if there is no stream or it is lost.
        """
        self._last_id += 1
        request.prepare_id = self._last_id
        loop = asyncio.get_running_loop()
        answer: Answer = loop.create_future()
        if not self.open:
            answer.set_exception(unreachable())
            return answer
        self._answers[request.prepare_id] = answer, len(request.items)
        answer.add_done_callback(lambda _: self._answers.pop(request.prepare_id, None))
        self.unsent.append(request)
        if timeout is not None:
            late = loop.call_later(timeout, _fail, answer, errors.DeadlineExceeded("the deadline passed while it was prepared"))
            answer.add_done_callback(lambda _: late.cancel())
        return answer

    def take(self, bytes_max: int) -> list[engine_pb2.PrepareRequest]:
        """The next requests that are still awaited, up to about this many bytes."""
        taken, size = list[engine_pb2.PrepareRequest](), 0
        while self.unsent and size < bytes_max:
            request = self.unsent.popleft()
            self._last_sent_id = request.prepare_id
            if request.prepare_id in self._answers:
                size += request.ByteSize()
                taken.append(request)
        return taken

    def settle(self, responses: Iterable[engine_pb2.PrepareResponse]) -> None:
        """Set the answers. Those that were given up are dropped. Raises ProtocolViolation for one of a request not sent."""
        for response in responses:
            if response.prepare_id > self._last_sent_id:
                raise errors.ProtocolViolation("an answer to a request to prepare that was not sent")
            answer, count = self._answers.pop(response.prepare_id, (None, 0))
            if answer is None or answer.done():
                continue
            try:
                if response.HasField("refused"):
                    raise errors.from_status(response.refused)
                answer.set_result(check_prepared(response, count))
            except errors.OstinatoError as error:
                answer.set_exception(error)

    def lose(self) -> None:
        """The stream is closed: every answer is EngineUnavailable."""
        self.open = False
        self.unsent.clear()
        for answer, _ in self._answers.values():
            _fail(answer, unreachable())
        self._answers.clear()


def _fail(answer: Answer, error: errors.OstinatoError) -> None:
    if not answer.done():
        answer.set_exception(error)


def unreachable() -> errors.EngineUnavailable:
    return errors.EngineUnavailable("the service cannot be reached", retry_after=1.0)
