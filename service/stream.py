"""The Engine service. Its Execute stream carries a sidecar's runs in and their events out.

The life of a run, which `EngineServicer.Execute` begins with:

    admitted     Fence.admit: may this sidecar drive the engine?
    received     Stream.receive, by the rules of Submissions: a sidecar that breaks one loses its stream
    judged       Preparer.check_submit: can the engine take this run?
    run          Runs.submit hands it to the engine
    tokens, end  Runs.on_events gets them from the engine, Stream._deliver puts them into the outbox
    framed       Outbox.next joins what waits into as few messages as possible
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from ostinato.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineUnavailable,
    EpochStale,
    NotBuilt,
    OstinatoError,
    ProtocolViolation,
    QueueFull,
    from_status,
    to_status,
)
from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, types_pb2
from serving.hop import is_short

from service.answer import Answer
from service.config import Settings
from service.description import HeldGrade, describe
from service.engines.base import Engine, Events, Run
from service.engines.huggingface import zipped
from service.fence import Fence, SequenceFile, Submissions
from service.observe import Metrics, RunStatistics
from service.outbox import Outbox
from service.parse import form_of, parsed
from service.prepare import Preparer, Wanted, Workers, always

NAME = "ostinato.v1.Engine"
RETRY_SECONDS = 1.0
CHUNK_BYTES = 1 << 20
"""Size of one message of GetTokenizer."""
SUBMITS_AT_ONCE = 16
"""Submits of one message between two turns of the event loop. Receiving hundreds of long prompts takes as long as the engine's
first steps, which begin meanwhile."""

Requests = AsyncIterator[engine_pb2.ExecuteRequest]
Context = grpc.aio.ServicerContext[Any, Any]
Deliver = Callable[[Sequence[engine_pb2.RunEvent]], None]
T = TypeVar("T")
_log = logging.getLogger(__name__)


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """The RPCs. UNAVAILABLE until `streams` is set, which is when the engine is loaded and tested."""

    def __init__(self, workers: Workers) -> None:
        self.streams: Streams | None = None
        self._workers = workers

    async def Execute(self, request_iterator: Requests, context: Context) -> AsyncGenerator[engine_pb2.ExecuteResponse]:
        """One stream, from Hello to its end. Raises a StreamRefused for a sidecar that breaks a rule or is replaced."""
        # Read before anything is refused: if a refusal were quicker than the sidecar's first write, gRPC would report a failed
        # write to it and not the refusal.
        first = await anext(request_iterator, engine_pb2.ExecuteRequest())
        streams = self._ready()
        with streams.admitted(first) as stream:
            receiving = asyncio.create_task(stream.receive(first, request_iterator))
            try:
                while True:
                    await stream.outbox.ready()
                    if (frame := stream.outbox.next()) is None:
                        break
                    streams.metrics.frame_events.observe(len(frame.events))
                    yield frame
            finally:
                receiving.cancel()
                with suppress(asyncio.CancelledError):
                    await receiving

    async def Describe(self, request: engine_pb2.DescribeRequest, context: Context) -> engine_pb2.DescribeResponse:
        return self._ready().description()

    async def Prepare(self, request: engine_pb2.PrepareRequest, context: Context) -> engine_pb2.PrepareResponse:
        preparer = self._ready().preparer
        return await self._do(request, lambda wanted: preparer.prepare(request, wanted))

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Context) -> generation_pb2.TokenizeResponse:
        preparer = self._ready().preparer
        return await self._do(request, lambda wanted: preparer.tokenize(request, wanted))

    async def GetTokenizer(
        self, request: engine_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncGenerator[engine_pb2.GetTokenizerResponse]:
        vocabulary = self._ready().preparer.vocabulary
        try:
            packed = await self._workers.run(lambda _: zipped(vocabulary.files()))
        except ValueError as error:
            raise NotBuilt(f"no tokenizer.json can be made for this model: {error}") from error
        for start in range(0, len(packed), CHUNK_BYTES):
            yield engine_pb2.GetTokenizerResponse(chunk=packed[start : start + CHUNK_BYTES])

    def _ready(self) -> Streams:
        if self.streams is None:
            raise EngineUnavailable("the model is being loaded and tested", retry_after=RETRY_SECONDS)
        return self.streams

    async def _do(self, request: engine_pb2.PrepareRequest | generation_pb2.TokenizeRequest, work: Callable[[Wanted], T]) -> T:
        return work(always) if is_short(request) else await self._workers.run(work)


@dataclass(slots=True)
class Streams:
    """The Execute streams of the process, of which at most one is connected, and what they share."""

    settings: Settings
    runs: Runs
    preparer: Preparer
    metrics: Metrics
    fingerprint: types_pb2.Fingerprint
    incarnation: str
    """32 hexadecimal digits, new at every start."""
    fence: Fence
    file: SequenceFile | None = None
    """Where the fence's sequences are kept; None: nowhere."""
    idle_seconds: float | None = None
    """Of a service that drains: a stream ends once it has had no run for so long."""
    _current: Stream | None = None

    def description(self) -> engine_pb2.DescribeResponse:
        """The response of Describe. Only the grade in it changes."""
        runs = self.runs
        return describe(runs.engine, self.preparer.limits, self.fingerprint, runs.held, self.incarnation)

    @contextmanager
    def admitted(self, first: engine_pb2.ExecuteRequest) -> Iterator[Stream]:
        """The new stream that begins with this message, connected until the context ends."""
        try:
            if not first.HasField("hello"):
                raise ProtocolViolation("a stream begins with hello")
            self.fence.admit(first.hello)
            if self._current is not None:  # it is still connected
                self._current.replace(first.hello.epoch)
            stream = self._current = Stream(self, first.hello)
            self.metrics.streams.set(1)
            _log.info("sidecar connected", extra=_names(first.hello))
            try:
                yield stream
            finally:
                stream.stop()
                _log.info("sidecar gone", extra=_names(first.hello))
                if self._current is stream:
                    self._leave()
        except OstinatoError as error:
            self.metrics.refused.labels(error.reason).inc()
            _log.warning("stream refused", extra={"reason": error.reason, "why": error.message})
            raise

    def drain(self, idle_seconds: float) -> None:
        """From now on a stream ends once it has had no run for `idle_seconds`."""
        self.idle_seconds = idle_seconds
        if self._current is not None:
            self._current.settle()

    def _leave(self) -> None:
        self._current = None
        self.fence.leave()
        if self.file is not None:
            self.file.flush()
        self.metrics.streams.set(0)


class Stream:
    """One sidecar's stream, from its admission to its end.

    1. It begins with Hello, which is answered with Welcome.
    2. Runs reach the engine in the order of their submission.
    3. After the sidecar's half-close its runs go on to their ends, and then the stream ends. Any other end stops them at once.
    4. A service that is told to stop keeps the stream, and takes runs from it, until there were none for a while: a sidecar
       that was told to stop at the same moment still needs it.
    5. A stream that was stopped never reaches the engine again.
    """

    def __init__(self, streams: Streams, hello: engine_pb2.Hello) -> None:
        self.hello = hello
        self._streams, self._runs, settings = streams, streams.runs, streams.settings
        self.outbox = Outbox(settings.buffer_bytes_max, settings.frame_bytes_max, alone=lambda: len(self._runs.active) <= 1)
        self._submissions = Submissions(hello.last_sequence)
        self._half_closed = self._stopped = False
        self._idle: asyncio.TimerHandle | None = None
        self._runs.attach(self._deliver)
        self._unwatch = self._runs.held.watch(self._welcome)
        self._welcome()
        self.settle()

    async def receive(self, first: engine_pb2.ExecuteRequest, others: Requests) -> None:
        """Takes messages until the sidecar half-closes. Every error ends the stream, through the outbox."""
        try:
            await self._take(first)
            async for request in others:
                if request.HasField("hello"):
                    raise ProtocolViolation("only the first message may have hello")
                await self._take(request)
        except Exception as error:  # noqa: BLE001  # raised again by Outbox.next
            self.stop()
            self.outbox.fail(error)
            return
        self._half_closed = True
        self.settle()

    def replace(self, epoch: int) -> None:
        """Ends it for a later stream of this writer."""
        self.stop()
        self.outbox.fail(EpochStale(f"replaced by a stream of epoch {epoch}", details={"highest": str(epoch)}))

    def stop(self) -> None:
        """Stops all runs and takes no more. May be called again."""
        if not self._stopped:
            self._stopped = True
            self._runs.detach()
            self.settle()
            self._unwatch()

    async def _take(self, request: engine_pb2.ExecuteRequest) -> None:
        for number, submit in enumerate(request.submits):
            if number and number % SUBMITS_AT_ONCE == 0:
                await asyncio.sleep(0)
            if self._stopped:
                return
            self._submit(submit)
        if self._stopped:
            return  # a later stream has the engine
        if request.cancels:
            self._runs.cancel(request.cancels)
        for prepare in request.prepares:
            self.outbox.put(self._streams.preparer.answer(prepare))
        self.settle()

    def _submit(self, submit: engine_pb2.Submit) -> None:
        assert not self._stopped, "a stopped stream reaches no engine"
        streams = self._streams
        self._submissions.add(submit)
        if submit.purpose == engine_pb2.PURPOSE_PRIMARY:
            streams.fence.ran(self.hello.log_id, submit.sequence)
            if streams.file is not None:
                streams.file.write_soon(streams.fence.sequences)
        error: OstinatoError | None = streams.preparer.check_submit(submit)
        if len(self._runs.active) >= (most := streams.settings.runs_max):
            error = QueueFull(f"more than {most} runs at once")
        if error is None:
            self._runs.submit(submit)
        else:
            self.outbox.put(engine_pb2.RunEvent(run_id=submit.run_id, failed=to_status(error)))

    def _deliver(self, events: Sequence[engine_pb2.RunEvent]) -> None:
        for event in events:
            self.outbox.put(event)
        if self.outbox.error is not None:
            self.stop()
        self.settle()

    def settle(self) -> None:
        """Ends a half-closed stream that has no run, and one that drains after a while without runs."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._stopped or self._runs.active:
            return
        if self._half_closed:
            self.outbox.close()
        elif self._streams.idle_seconds is not None:
            self._idle = asyncio.get_running_loop().call_later(self._streams.idle_seconds, self._end_idle)

    def _end_idle(self) -> None:
        _log.info("idle sidecar let go", extra=_names(self.hello))
        self.stop()
        self.outbox.close()

    def _welcome(self) -> None:
        self.outbox.welcome(engine_pb2.Welcome(description=self._streams.description()))


def _names(hello: engine_pb2.Hello) -> dict[str, object]:
    return {"log_id": hello.log_id, "writer": hello.writer, "epoch": hello.epoch, "last_sequence": hello.last_sequence}


@dataclass(slots=True)
class ActiveRun:
    """A run that the engine has and that has not ended."""

    submit: engine_pb2.Submit
    statistics: RunStatistics
    deadline: asyncio.TimerHandle | None = None


class Runs:
    """The runs in the engine, of one user at a time: the self-test, then one stream after another. On the event loop.

    1. The engine's run ids are unique in the process. The user sees its own, `Submit.run_id`.
    2. A run ends once: by the engine, by its deadline, or by its user. Nothing of it is delivered after that.
    3. When a user is replaced, its runs are stopped first.
    """

    def __init__(self, engine: Engine, held: HeldGrade, metrics: Metrics) -> None:
        self.engine, self.held = engine, held
        self._metrics, self._form = metrics, form_of(engine.vocabulary.template)
        self.active: dict[int, ActiveRun] = {}
        """By the engine's run id."""
        self._ids = itertools.count(1)
        self._deliver: Deliver | None = None

    def start(self) -> None:
        """Starts the engine on the running loop, whose clock is that of all deadlines."""
        self._loop = asyncio.get_running_loop()
        self.engine.start(self.on_events, self.held.fall)

    def attach(self, deliver: Deliver) -> None:
        """A new user, which gets the events of its runs, each run's in order, and those of one step together."""
        self.detach()
        self._deliver = deliver

    def detach(self) -> None:
        """Stops all runs, silently, and releases the user."""
        for run_id in tuple(self.active):
            self._cancel(run_id)
        assert not self.active, "every run was stopped"
        self._deliver = None

    def submit(self, submit: engine_pb2.Submit) -> None:
        """Starts a run. The user checks its run id."""
        run_id = next(self._ids)
        assert run_id not in self.active and self._deliver is not None, "run ids are unique, and a run has a user"
        run = self.active[run_id] = ActiveRun(submit, RunStatistics(self._metrics, submit, self.engine, self._loop.time()))
        if submit.timeout_millis:
            run.deadline = self._loop.call_later(submit.timeout_millis / 1000, self._expire, run_id)
        self.engine.submit(
            Run(
                run_id=run_id,
                sequence=submit.sequence,
                attempt=submit.attempt,
                purpose=submit.purpose,
                token_ids=tuple(submit.token_ids),
                parameters=submit.parameters,
                seed=submit.seed,
                stream=submit.stream,
                answer=Answer(submit.parameters, self.engine.vocabulary),
            )
        )

    def cancel(self, run_ids: Collection[int]) -> None:
        """Stops these of the user's runs, silently. Unknown ones and those that have ended are ignored."""
        chosen = set(run_ids)
        for run_id, run in tuple(self.active.items()):
            if run.submit.run_id in chosen:
                self._cancel(run_id)

    def on_events(self, events: Events) -> None:
        """The engine's report of one step."""
        now, delivered = self._loop.time(), list[engine_pb2.RunEvent]()
        for event in events:
            run = self.active.get(event.run_id)
            if run is None:
                continue  # it was ended while the report was under way
            match event.WhichOneof("event"):
                case "started":
                    run.statistics.started(now)
                case "tokens":
                    run.statistics.tokens(len(event.tokens.token_ids), now)
                case "finished":
                    output = event.finished.output
                    output.grade = self.held.grade
                    if run.submit.parameters.parse:
                        output.parsed.CopyFrom(parsed(self.engine.vocabulary, self._form, output, run.submit))
                    self._end(event.run_id).finished(output, now)
                case _:
                    self._end(event.run_id).end("failed", from_status(event.failed))
            event.run_id = run.submit.run_id
            delivered.append(event)
        if delivered:
            self._send(delivered)

    def _send(self, events: Sequence[engine_pb2.RunEvent]) -> None:
        assert self._deliver is not None, "a run has a user"
        self._deliver(events)

    def _cancel(self, run_id: int) -> None:
        self.engine.cancel(run_id)
        self._end(run_id).end("cancelled", Cancelled("no longer wanted"))

    def _expire(self, run_id: int) -> None:
        run = self.active[run_id]
        self.engine.cancel(run_id)
        error = DeadlineExceeded(f"the run did not end within {run.submit.timeout_millis} ms")
        self._end(run_id).end("expired", error)
        self._send([engine_pb2.RunEvent(run_id=run.submit.run_id, failed=to_status(error))])

    def _end(self, run_id: int) -> RunStatistics:
        run = self.active.pop(run_id)
        if run.deadline is not None:
            run.deadline.cancel()
        return run.statistics
