"""The Execute stream: a sidecar's runs in, what happens to them out.

1. A stream begins with Hello and is answered with Welcome; `service.fence` decides who is let in, and only one is.
2. Runs reach the engine in the order of submission.
3. The stream's half-close lets its runs end, then ends the stream. Any other end stops them at once.
4. A service that is told to stop keeps the stream, and takes runs from it, until there were none for a while: the sidecar, told
   to stop at the same moment, still needs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from ostinato.errors import EpochStale, OstinatoError, ProtocolViolation, QueueFull, to_status
from ostinato.v1 import engine_pb2

from service.description import Describer
from service.fence import Fence
from service.memory import Memory
from service.metrics import Metrics
from service.outbox import Outbox
from service.prepare import Preparer
from service.runs import Owner, Runs
from service.submissions import Protocol, unfit

Requests = AsyncIterator[engine_pb2.ExecuteRequest]
_log = logging.getLogger(__name__)


SUBMITS_AT_ONCE = 16
"""Of one message: then the engine may begin with them. Taking in hundreds of long prompts takes as long as its first steps."""
REMEMBER_SECONDS = 1.0
"""Between two writings of the memory, at least."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one stream."""

    runs_max: int
    """That have not ended."""
    buffer_bytes_max: int
    frame_bytes_max: int


@dataclass(slots=True)
class Streams:
    """All Execute streams of the process, of which one is connected at most."""

    runs: Runs
    describer: Describer
    preparer: Preparer
    bounds: Bounds
    metrics: Metrics
    fence: Fence = field(default_factory=Fence)
    memory: Memory | None = None
    """Where the fence's sequences are kept; None: nowhere."""
    _current: Stream | None = None
    _idle_seconds: float | None = None
    _remembering: asyncio.TimerHandle | None = None

    async def execute(
        self, first: engine_pb2.ExecuteRequest | None, requests: Requests
    ) -> AsyncGenerator[engine_pb2.ExecuteResponse]:
        """Serve one stream, its first request and the rest, to its end. Raises a StreamRefused for a sidecar that breaks a rule
        or is replaced."""
        try:
            if first is None or not first.HasField("hello"):
                raise ProtocolViolation("a stream begins with hello")
            stream = self._admit(first.hello)
        except OstinatoError as error:
            self._count(error)
            raise
        try:
            async with aclosing(stream.serve(first, requests)) as frames:
                async for frame in frames:
                    yield frame
        except OstinatoError as error:
            self._count(error)
            raise
        finally:
            self._leave(stream)

    def drain(self, idle_seconds: float) -> None:
        """From now on a stream ends well once it has had no run for this long."""
        self._idle_seconds = idle_seconds
        if self._current is not None:
            self._current.drain(idle_seconds)

    def ran(self, log_id: str, sequence: int) -> None:
        """This sequence was submitted. It is remembered soon."""
        self.fence.ran(log_id, sequence)
        if self.memory is not None and self._remembering is None:
            self._remembering = asyncio.get_running_loop().call_later(REMEMBER_SECONDS, self._remember, self.memory)

    def _remember(self, memory: Memory) -> None:
        self._remembering = None
        memory.write(self.fence.sequences)

    def _admit(self, hello: engine_pb2.Hello) -> Stream:
        """The new stream; the one before, if it is still there, is out of the way."""
        self.fence.admit(hello)
        if self._current is not None:
            self._current.replace(hello.epoch)
        self._current = Stream(self, hello)
        if self._idle_seconds is not None:
            self._current.drain(self._idle_seconds)
        self.metrics.streams.set(1)
        _log.info("sidecar connected", extra=_names(hello))
        return self._current

    def _leave(self, stream: Stream) -> None:
        stream.stop()
        _log.info("sidecar gone", extra=_names(stream.hello))
        if self._current is stream:
            self._current = None
            self.fence.leave()
            if self._remembering is not None and self.memory is not None:
                self._remembering.cancel()
                self._remember(self.memory)
            self.metrics.streams.set(0)

    def _count(self, error: OstinatoError) -> None:
        self.metrics.refused.labels(error.reason).inc()
        _log.warning("stream refused", extra={"reason": error.reason, "why": error.message})


class Stream:
    """One sidecar's stream, once let in."""

    def __init__(self, streams: Streams, hello: engine_pb2.Hello) -> None:
        self.hello = hello
        self._streams = streams
        self._describer, self._bounds, self._metrics = streams.describer, streams.bounds, streams.metrics
        self._outbox = Outbox(self._bounds.buffer_bytes_max, self._bounds.frame_bytes_max)
        self._owner = Owner(streams.runs, self._deliver)
        self._protocol = Protocol()
        self._half_closed = self._stopped = False
        self._idle_seconds: float | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._unwatch = streams.describer.held.watch(self._welcome)

    async def serve(self, first: engine_pb2.ExecuteRequest, requests: Requests) -> AsyncGenerator[engine_pb2.ExecuteResponse]:
        """Frames, as soon as there is something to say."""
        self._welcome()
        reading = asyncio.create_task(self._read(first, requests))
        try:
            while (frame := await self._outbox.next()) is not None:
                self._metrics.frame_events.observe(len(frame.events))
                yield frame
        finally:
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading

    def replace(self, epoch: int) -> None:
        """Make way for a later stream."""
        self.stop()
        self._outbox.fail(EpochStale(f"replaced by a stream of epoch {epoch}", details={"highest": str(epoch)}))

    def drain(self, idle_seconds: float) -> None:
        """End well once there has been no run for this long."""
        self._idle_seconds = idle_seconds
        self._settle()

    def stop(self) -> None:
        """Stop all runs and take no more. May be called again."""
        self._stopped = True
        self._owner.close()
        self._settle()
        self._unwatch()

    async def _read(self, first: engine_pb2.ExecuteRequest, requests: Requests) -> None:
        """Take requests until the sidecar half-closes. Whatever goes wrong ends the stream, through the outbox."""
        try:
            await self._take(first)
            async for request in requests:
                if request.HasField("hello"):
                    raise ProtocolViolation("hello stands in the first message only")
                await self._take(request)
        except Exception as error:  # noqa: BLE001  # raised again where the stream is served
            self.stop()
            self._outbox.fail(error)
            return
        self._half_closed = True
        self._settle()

    async def _take(self, request: engine_pb2.ExecuteRequest) -> None:
        for number, submit in enumerate(request.submits):
            if number and number % SUBMITS_AT_ONCE == 0:
                await asyncio.sleep(0)
            if self._stopped:
                break
            self._submit(submit)
        if self._stopped:
            return  # a later stream has the engine; this one only does not know yet
        for run_id in request.cancels:
            self._owner.cancel(run_id)
        for prepare in request.prepares:
            self._outbox.answer(self._streams.preparer.answer(prepare))
        self._settle()

    def _submit(self, submit: engine_pb2.Submit) -> None:
        self._protocol.check(submit)
        if submit.purpose == engine_pb2.PURPOSE_PRIMARY:
            self._streams.ran(self.hello.log_id, submit.sequence)
        error: OstinatoError | None = unfit(submit, self._describer.limits, self._describer.engine.vocabulary.size)
        if len(self._owner) >= self._bounds.runs_max:
            error = QueueFull(f"more than {self._bounds.runs_max} runs at once")
        if error is None:
            self._owner.submit(submit)
        else:
            self._outbox.put(engine_pb2.RunEvent(run_id=submit.run_id, failed=to_status(error)))

    def _deliver(self, event: engine_pb2.RunEvent) -> None:
        self._outbox.put(event)
        if self._outbox.failed:
            self.stop()
        self._settle()

    def _settle(self) -> None:
        """Without a run, a half-closed stream ends at once, and one that is to end anyway after a while."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if len(self._owner):
            return
        if self._half_closed:
            self._outbox.close()
        elif self._idle_seconds is not None and not self._stopped:
            self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self._retire)

    def _retire(self) -> None:
        _log.info("sidecar let go", extra=_names(self.hello))
        self.stop()
        self._outbox.close()

    def _welcome(self) -> None:
        self._outbox.welcome(engine_pb2.Welcome(description=self._describer.response()))


def _names(hello: engine_pb2.Hello) -> dict[str, object]:
    return {"log_id": hello.log_id, "writer": hello.writer, "epoch": hello.epoch, "last_sequence": hello.last_sequence}
