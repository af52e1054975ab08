"""The Engine service, and its Execute stream: a sidecar's runs in, what happens to them out."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc

from ostinato.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineUnavailable,
    EpochStale,
    InvalidRequest,
    JournalBehind,
    NotBuilt,
    OstinatoError,
    OutOfOrder,
    ProtocolViolation,
    QueueFull,
    SlowReader,
    Violation,
    WriterBusy,
    from_status,
    to_status,
)
from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, types_pb2
from serving.handlers import coalesce
from serving.program import StartupError, replace_file

from service.answer import Answer
from service.description import Describer, HeldGrade
from service.engines.base import Engine, Events, Run, Vocabulary
from service.engines.huggingface import archive
from service.observe import Metrics, RunSpans
from service.prepare import Limits, Preparer

NAME = "ostinato.v1.Engine"
RETRY_SECONDS = 1.0
HEAVY_BYTES = 4096
"""Of items: what is tokenised without a thread takes about a millisecond at most."""

Context = grpc.aio.ServicerContext[Any, Any]
CHUNK_BYTES = 1 << 20
"""Of the tokenizer's files."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ready:
    """All that exists once the engine is loaded and tested."""

    describer: Describer
    vocabulary: Vocabulary
    preparer: Preparer
    streams: Streams


class Workers:
    """Threads for what would hold the event loop up: a bounded number, with a bounded queue."""

    def __init__(self, threads: int, queue_max: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "prepare")
        self._max = threads + queue_max
        self._now = 0

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, done in a thread. Raises QueueFull."""
        if self._now >= self._max:
            raise QueueFull(f"{self._now} requests are being prepared", retry_after=RETRY_SECONDS)
        self._now += 1
        done = asyncio.get_running_loop().run_in_executor(self._pool, work)
        # Not when the caller stops waiting: the thread does not.
        done.add_done_callback(self._count_down)
        return await asyncio.shield(done)

    def _count_down(self, done: asyncio.Future[T]) -> None:
        self._now -= 1
        if not done.cancelled():
            done.exception()  # somebody has to look at it, and the caller may have left

    def close(self) -> None:
        """Drop what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """UNAVAILABLE until `ready` is set."""

    def __init__(self, workers: Workers) -> None:
        self.ready: Ready | None = None
        self._workers = workers

    async def Describe(self, request: engine_pb2.DescribeRequest, context: Context) -> engine_pb2.DescribeResponse:
        return self._ready().describer.response()

    async def Prepare(self, request: engine_pb2.PrepareRequest, context: Context) -> engine_pb2.PrepareResponse:
        preparer = self._ready().preparer
        return await self._do(_heavy(request.items, request.parameters), lambda: preparer.prepare(request))

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Context) -> generation_pb2.TokenizeResponse:
        preparer = self._ready().preparer
        return await self._do(_heavy(request.items), lambda: preparer.tokenize(request))

    async def GetTokenizer(
        self, request: engine_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncGenerator[engine_pb2.GetTokenizerResponse]:
        vocabulary = self._ready().vocabulary
        try:
            packed = await self._workers.run(lambda: archive(vocabulary.files()))
        except ValueError as error:
            raise NotBuilt(f"no tokenizer.json can be made for this model: {error}") from error
        for start in range(0, len(packed), CHUNK_BYTES):
            yield engine_pb2.GetTokenizerResponse(chunk=packed[start : start + CHUNK_BYTES])

    async def Execute(
        self, request_iterator: AsyncIterator[engine_pb2.ExecuteRequest], context: Context
    ) -> AsyncGenerator[engine_pb2.ExecuteResponse]:
        # Heard before anything is refused: a refusal that is quicker than hello makes the sidecar's write fail, and gRPC then
        # tells it of that instead.
        hello = await anext(request_iterator, None)
        async with aclosing(self._ready().streams.execute(hello, request_iterator)) as frames:
            async for frame in frames:
                yield frame

    def _ready(self) -> Ready:
        if self.ready is None:
            raise EngineUnavailable("the model is being loaded and tested", retry_after=RETRY_SECONDS)
        return self.ready

    async def _do(self, heavy: bool, work: Callable[[], T]) -> T:
        return await self._workers.run(work) if heavy else work()


def _heavy(items: Sequence[types_pb2.Item], parameters: types_pb2.Parameters | None = None) -> bool:
    """Whether this takes longer than the event loop should wait: much text, or a grammar to compile."""
    every = [item.parameters for item in items] + ([parameters] if parameters is not None else [])
    return any(each.HasField("response_format") for each in every) or sum(item.ByteSize() for item in items) > HEAVY_BYTES


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
    fence: Fence = field(default_factory=lambda: Fence())
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
    """One sidecar's stream, once let in.

    1. A stream begins with Hello and is answered with Welcome; `Fence` decides who is let in, and only one is.
    2. Runs reach the engine in the order of submission.
    3. The stream's half-close lets its runs end, then ends the stream. Any other end stops them at once.
    4. A service that is told to stop keeps the stream, and takes runs from it, until there were none for a while: the
       sidecar, told to stop at the same moment, still needs it.
    """

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


@dataclass(frozen=True, slots=True)
class Writer:
    """Who is connected."""

    log_id: str
    name: str

    def __str__(self) -> str:
        return f"writer {self.name} of log {self.log_id}"


@dataclass(slots=True)
class Fence:
    """Which sidecar may drive the engine. Pure; but for the sequences, for the life of the process.

    1. An epoch lower than the highest admitted of its writer on its log is refused: that sidecar has been replaced.
    2. While one writer of one log is connected, every other writer and log is refused.
    3. The same writer with the same epoch or a higher one takes over from its own earlier stream.
    4. A sidecar whose journal ends before a sequence that was run here is refused: it would give that number out again.
    """

    connected: Writer | None = None
    sequences: dict[str, int] = field(default_factory=dict)
    """By log id, the newest that was run here; the log that was run last is the last."""
    _highest: dict[Writer, int] = field(default_factory=dict)

    def admit(self, hello: engine_pb2.Hello) -> None:
        """Let this writer in; whoever was connected before is to go. Raises ProtocolViolation, EpochStale, WriterBusy or
        JournalBehind, and then remembers nothing of it."""
        if not hello.log_id or not hello.writer or not hello.epoch:
            raise ProtocolViolation("hello lacks log_id, writer or epoch")
        writer = Writer(hello.log_id, hello.writer)
        highest = self._highest.get(writer, 0)
        if hello.epoch < highest:
            raise EpochStale(
                f"epoch {hello.epoch} of {writer} is over: {highest} has been here",
                details={"epoch": str(hello.epoch), "highest": str(highest)},
            )
        if self.connected not in (None, writer):
            raise WriterBusy(f"another is connected: {self.connected}", retry_after=1.0)
        newest = self.sequences.get(hello.log_id, 0)
        if hello.last_sequence < newest:
            raise JournalBehind(
                f"sequence {newest} of log {hello.log_id} was run here, and the sidecar's journal ends at "
                f"{hello.last_sequence}: put a newer copy back, or accept the loss: "
                f"python -m sidecar accept-loss --through {newest}",
                details={"last_sequence": str(hello.last_sequence), "newest": str(newest)},
            )
        self.connected = writer
        self._highest[writer] = hello.epoch

    def ran(self, log_id: str, sequence: int) -> None:
        """This sequence was submitted."""
        self.sequences[log_id] = max(sequence, self.sequences.pop(log_id, 0))

    def leave(self) -> None:
        """The writer's stream has ended."""
        self.connected = None


LOGS_MAX = 256
"""Those that were run last."""


class Memory:
    """One file, replaced whole, in a thread of its own: a disk may take its time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "memory")

    def read(self) -> dict[str, int]:
        """By log id. Raises StartupError for a file that cannot be read, or that is something else."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StartupError(
                f"--state-dir: {self._path} cannot be read: {error.strerror or error}: let this user read it, or name another"
            ) from error
        try:
            return {log_id: int(sequence) for log_id, sequence in json.loads(content).items()}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise StartupError(
                f"--state-dir: {self._path} is not a list of sequences ({error!r}): put a copy back, or, if every journal is "
                "known to have its end, remove it"
            ) from error

    def write(self, sequences: Mapping[str, int]) -> None:
        """Soon. The last ones of the mapping are kept; what cannot be written is logged."""
        kept = {log_id: str(sequence) for log_id, sequence in list(sequences.items())[-LOGS_MAX:]}
        self._thread.submit(replace_file, self._path, json.dumps(kept, indent=1)).add_done_callback(_say_what_failed)

    def close(self) -> None:
        """When everything is written."""
        self._thread.shutdown()


def _say_what_failed(written: Future[None]) -> None:
    if written.exception() is not None:
        _log.error("what was run is not remembered", extra={"why": str(written.exception())})


PURPOSES = frozenset(engine_pb2.Purpose.values()) - {engine_pb2.PURPOSE_UNSPECIFIED}
_FLOATS = (("temperature", 100.0, True), ("min_p", 1.0, True), ("top_p", 1.0, False), ("repetition_penalty", 10.0, False))
"""The most that each may be, and whether it may be nothing."""
REMEMBERED = 65_536
"""How many run ids a stream remembers, to find one that is used again."""


@dataclass(slots=True)
class Protocol:
    """What one stream has submitted so far. A sidecar that breaks the protocol loses its stream; a run that this engine cannot
    take (`unfit`) fails by itself, and its neighbours go on."""

    last_sequence: int = 0
    _seen: set[int] = field(default_factory=set)
    _order: deque[int] = field(default_factory=deque)

    def check(self, submit: engine_pb2.Submit) -> None:
        """Take note of it. Raises ProtocolViolation, or OutOfOrder for a primary sequence that does not rise: of first
        attempts only, because a later one may be of an item that another writer has left behind."""
        run_id, primary = submit.run_id, submit.purpose == engine_pb2.PURPOSE_PRIMARY
        if not run_id or run_id in self._seen:
            raise ProtocolViolation(f"run_id {run_id} is {'used twice' if run_id else 'no run_id'}")
        if submit.purpose not in PURPOSES:
            raise ProtocolViolation(f"run {run_id}: purpose {submit.purpose} is none")
        if not submit.attempt:
            raise ProtocolViolation(f"run {run_id}: attempts count from 1")
        if not submit.token_ids or not submit.parameters.max_new_tokens:
            raise ProtocolViolation(f"run {run_id}: lacks token_ids or parameters")
        if primary and (not submit.sequence or (submit.attempt == 1 and submit.sequence <= self.last_sequence)):
            raise OutOfOrder(f"run {run_id}: sequence {submit.sequence} comes after {self.last_sequence}")
        if primary and submit.attempt == 1:
            self.last_sequence = submit.sequence
        self._remember(run_id)

    def _remember(self, run_id: int) -> None:
        self._seen.add(run_id)
        self._order.append(run_id)
        if len(self._order) > REMEMBERED:
            self._seen.discard(self._order.popleft())


def unfit(submit: engine_pb2.Submit, limits: Limits, vocabulary_size: int) -> InvalidRequest | None:
    """Why this engine cannot take the run. Checked although Prepare has: it may have been prepared by an earlier service, and
    some of these would take the whole process down."""
    found = [Violation(name, text) for name, text in _unfit(submit, limits, vocabulary_size)]
    return InvalidRequest(violations=found) if found else None


def _unfit(submit: engine_pb2.Submit, limits: Limits, vocabulary_size: int) -> Iterator[tuple[str, str]]:
    given = submit.parameters
    if max(submit.token_ids) >= vocabulary_size:
        yield "token_ids", f"{max(submit.token_ids)} is not below the vocabulary's {vocabulary_size}"
    if len(submit.token_ids) + given.max_new_tokens > limits.context_tokens:
        yield "parameters.max_new_tokens", f"prompt and answer are more than the context's {limits.context_tokens} tokens"
    if given.min_new_tokens > given.max_new_tokens:
        yield "parameters.min_new_tokens", "is more than max_new_tokens"
    if given.top_k > limits.top_k_max:
        yield "parameters.top_k", f"is above {limits.top_k_max}"
    if given.logprobs > limits.logprobs_max:
        yield "parameters.logprobs", f"is above {limits.logprobs_max}"
    for name, most, zero in _FLOATS:
        value: float = getattr(given, name)
        if not 0 <= value <= most or not (value or zero):  # so NaN is neither
            yield f"parameters.{name}", f"{value} is out of bounds"
    for name in ("stop_token_ids", "bad_token_ids"):
        if any(token_id >= vocabulary_size for token_id in getattr(given, name)):
            yield f"parameters.{name}", "holds a token outside the vocabulary"


Deliver = Callable[[engine_pb2.RunEvent], None]


@dataclass(slots=True)
class _Live:
    owner: Owner
    submit: engine_pb2.Submit
    submitted_at: float
    spans: RunSpans
    last_token_at: float | None = None
    started: bool = False
    reported_tokens: int = 0
    deadline: asyncio.TimerHandle | None = None


class Runs:
    """Between the engine and those who use it: the sidecar's stream, and the self-test. On the event loop.

    1. Run ids are unique in the process; each owner sees its own.
    2. A run ends once: by the engine, by its deadline, or by its owner. After that nothing of it is delivered.
    3. When an owner goes, so do its runs, at once.
    """

    def __init__(self, engine: Engine, held: HeldGrade, metrics: Metrics) -> None:
        self.engine, self.held = engine, held
        self._metrics = metrics
        self._live: dict[int, _Live] = {}
        self._ids = itertools.count(1)

    def start(self) -> None:
        """Start the engine on the running loop, whose clock is that of all deadlines."""
        self._loop = asyncio.get_running_loop()
        self.engine.start(self._on_events, self.held.fall)

    def __len__(self) -> int:
        return len(self._live)

    def _submit(self, owner: Owner, submit: engine_pb2.Submit) -> int:
        run_id = next(self._ids)
        live = self._live[run_id] = _Live(owner, submit, self._loop.time(), RunSpans(submit, self.engine))
        if submit.timeout_millis:
            live.deadline = self._loop.call_later(submit.timeout_millis / 1000, self._expire, run_id)
        self._metrics.queued.inc()
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
        return run_id

    def _cancel(self, run_id: int) -> None:
        self.engine.cancel(run_id)
        self._end(run_id, "cancelled", Cancelled("not wanted any more"))

    def _expire(self, run_id: int) -> None:
        live = self._live[run_id]
        self.engine.cancel(run_id)
        error = DeadlineExceeded(f"the run did not end within {live.submit.timeout_millis} ms")
        self._end(run_id, "expired", error)
        live.owner._deliver(engine_pb2.RunEvent(run_id=live.submit.run_id, failed=to_status(error)))

    def _end(self, run_id: int, end: str, error: OstinatoError | None = None) -> None:
        live = self._live.pop(run_id)
        live.spans.ended(error)
        live.owner._forget(live.submit.run_id)
        if live.deadline is not None:
            live.deadline.cancel()
        (self._metrics.running if live.started else self._metrics.queued).dec()
        self._metrics.end(live.submit.purpose, end)

    def _on_events(self, events: Events) -> None:
        now = self._loop.time()
        for event in events:
            live = self._live.get(event.run_id)
            if live is None:
                continue  # ended here while the engine's report was under way
            self._note(event.run_id, event, live, now)
            event.run_id = live.submit.run_id
            live.owner._deliver(event)

    def _note(self, run_id: int, event: engine_pb2.RunEvent, live: _Live, now: float) -> None:
        """Keep the books, and fill in the grade."""
        match event.WhichOneof("event"):
            case "started":
                live.started = True
                live.spans.started()
                self._metrics.queued.dec()
                self._metrics.running.inc()
                self._metrics.queue_seconds.observe(now - live.submitted_at)
                self._metrics.prompt_tokens.inc(len(live.submit.token_ids))
            case "tokens":
                self._note_tokens(len(event.tokens.token_ids), live, now)
            case "finished":
                output = event.finished.output
                output.grade = self.held.grade
                live.spans.finished(output)
                self._metrics.new_tokens.inc(len(output.token_ids) - live.reported_tokens)
                self._metrics.cached_tokens.inc(output.cached_tokens)
                self._metrics.run_seconds.observe(now - live.submitted_at)
                self._end(run_id, "finished")
            case _:
                self._end(run_id, "failed", from_status(event.failed))

    def _note_tokens(self, count: int, live: _Live, now: float) -> None:
        if not count:
            return
        if live.last_token_at is None:
            live.spans.first_token()
            self._metrics.first_token_seconds.observe(now - live.submitted_at)
        else:
            self._metrics.between_tokens_seconds.observe((now - live.last_token_at) / count)
        live.last_token_at = now
        live.reported_tokens += count
        self._metrics.new_tokens.inc(count)


class Owner:
    """One user of the engine, with run ids of its own."""

    def __init__(self, runs: Runs, deliver: Deliver) -> None:
        """`deliver` gets every event of this owner's runs, in order, with the owner's run id."""
        self._runs, self._deliver = runs, deliver
        self._ids: dict[int, int] = {}

    def __len__(self) -> int:
        """Runs that have not ended."""
        return len(self._ids)

    def __contains__(self, run_id: int) -> bool:
        return run_id in self._ids

    def submit(self, submit: engine_pb2.Submit) -> None:
        """Start a run; its id must be none of those that have not ended."""
        assert submit.run_id not in self._ids, "the caller checks run ids"
        self._ids[submit.run_id] = self._runs._submit(self, submit)

    def cancel(self, run_id: int) -> None:
        """Stop a run, silently. Unknown and ended ones are ignored."""
        if run_id in self._ids:
            self._runs._cancel(self._ids[run_id])

    def close(self) -> None:
        """Stop all runs, silently. May be called again."""
        for run_id in tuple(self._ids):
            self.cancel(run_id)

    def _forget(self, run_id: int) -> None:
        del self._ids[run_id]


class Outbox:
    """1. Events of one run leave in order, and no timer holds any back.
    2. A run's tokens that wait are one event, however often the engine reported.
    3. Bounded in bytes: a sidecar that does not read loses its stream; the engine never waits for it.
    """

    def __init__(self, bytes_max: int, frame_bytes_max: int) -> None:
        self._bytes_max, self._frame_bytes_max = bytes_max, frame_bytes_max
        self._events: deque[engine_pb2.RunEvent | engine_pb2.PrepareResponse] = deque()
        self._bytes = 0
        self._tokens: dict[int, engine_pb2.RunEvent] = {}
        """Tokens that wait, by run. The text of one in `_texts` is joined when it leaves."""
        self._texts: dict[int, list[str]] = {}
        self._welcome: engine_pb2.Welcome | None = None
        self._bell = asyncio.Event()
        self._closed = False
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def answer(self, prepared: engine_pb2.PrepareResponse) -> None:
        """As `put`, the answer to a request."""
        if self._has_room(prepared.ByteSize()):
            self._events.append(prepared)
            self._bell.set()

    def put(self, event: engine_pb2.RunEvent) -> None:
        """Add an event, which is the outbox's from now on. Without effect once failed."""
        if not self._has_room(event.ByteSize()):
            return
        waiting = self._tokens.get(event.run_id)
        if waiting is not None and event.HasField("tokens"):
            self._append(event.run_id, waiting.tokens, event.tokens)
        else:
            self._events.append(event)
            if event.HasField("tokens"):
                self._tokens[event.run_id] = event
        self._bell.set()

    def _has_room(self, size: int) -> bool:
        """For so many bytes more; without room it has failed."""
        if self._error is None:
            self._bytes += size
            if self._bytes > self._bytes_max:
                self.fail(SlowReader(f"more than {self._bytes_max} bytes wait to be read"))
        return self._error is None

    def welcome(self, welcome: engine_pb2.Welcome) -> None:
        """To stand in the next message; a newer one replaces one that waits."""
        self._welcome = welcome
        self._bell.set()

    def close(self) -> None:
        """Nothing more comes: `next` returns None once all is written."""
        self._closed = True
        self._bell.set()

    def fail(self, error: Exception) -> None:
        """End at once: `next` raises this, whatever waits. The first error counts."""
        self._error = self._error or error
        self._bell.set()

    async def next(self) -> engine_pb2.ExecuteResponse | None:
        """Everything that waits, as far as it fits one message, as soon as anything does. None: closed, and all is written."""
        while self._error is None:
            if self._events or self._welcome is not None:
                await coalesce(lambda: self._bytes)
                if self._error is None:
                    return self._frame()
            elif self._closed:
                return None
            else:
                self._bell.clear()
                await self._bell.wait()
        raise self._error

    def _frame(self) -> engine_pb2.ExecuteResponse:
        frame = engine_pb2.ExecuteResponse(welcome=self._welcome)
        self._welcome = None
        taken = 0
        while self._events:
            event = self._events[0]
            if isinstance(event, engine_pb2.RunEvent) and event.HasField("tokens") and event.run_id in self._texts:
                event.tokens.text = "".join(self._texts.pop(event.run_id))
            size = event.ByteSize()
            if taken and taken + size > self._frame_bytes_max:
                break
            taken += size
            self._events.popleft()
            if isinstance(event, engine_pb2.PrepareResponse):
                frame.prepared.append(event)
                continue
            if event.HasField("tokens"):
                del self._tokens[event.run_id]
            frame.events.append(event)
        self._bytes = max(0, self._bytes - taken) if self._events else 0
        return frame

    def _append(self, run_id: int, tokens: engine_pb2.RunTokens, more: engine_pb2.RunTokens) -> None:
        tokens.token_ids.extend(more.token_ids)
        tokens.logprobs.extend(more.logprobs)
        # Joined once: a message keeps every text that it was ever given.
        self._texts.setdefault(run_id, [tokens.text]).append(more.text)
