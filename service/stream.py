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
import io
import itertools
import json
import logging
import threading
import zipfile
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc

from ostinato.chain import SEQUENCE_MAX
from ostinato.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineUnavailable,
    EpochStale,
    JournalBehind,
    NotBuilt,
    OstinatoError,
    OutOfOrder,
    ProtocolViolation,
    QueueFull,
    SlowReader,
    WriterBusy,
    from_status,
    to_status,
)
from ostinato.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, types_pb2
from serving import files
from serving.handlers import Coalescer
from serving.program import StartupError

from service.answer import Answer
from service.description import Describer, HeldGrade
from service.engines.base import Engine, Events, Run
from service.observe import Metrics, RunSpans
from service.parse import Parser
from service.prepare import Preparer, Wanted, always

NAME = "ostinato.v1.Engine"
RETRY_SECONDS = 1.0
HEAVY_BYTES, MESSAGE_BYTES = 4096, 128
"""Items of fewer bytes are prepared on the event loop, which takes about 1 ms at most. A message of a chat counts as so many
more: a template takes up to 30 us for each. The sidecar has the same rule."""
CHUNK_BYTES = 1 << 20
"""Size of one message of GetTokenizer."""
SUBMITS_AT_ONCE = 16
"""Submits of one message between two turns of the event loop. Receiving hundreds of long prompts takes as long as the engine's
first steps, which begin meanwhile."""
SAVE_SECONDS = 1.0
"""The least time between two writes of the sequence file."""
LOGS_MAX = 256
"""Logs in the sequence file: those that were run last."""
EPOCH_MAX, EPOCH_JUMP_MAX = 1 << 32, 1 << 16
"""Of a writer, and above the highest that this process has admitted of it. An epoch is one start of a sidecar."""
SEQUENCE_JUMP_MAX = 1 << 32
"""Above the newest that the sidecar has named or submitted. Between two items of its own, only other writers' can lie."""
RUN_IDS_MAX = 65_536
"""Run ids that a stream remembers, the newest ones, to detect one that is used twice."""
PURPOSES = frozenset(engine_pb2.Purpose.values()) - {engine_pb2.PURPOSE_UNSPECIFIED}

Requests = AsyncIterator[engine_pb2.ExecuteRequest]
Context = grpc.aio.ServicerContext[Any, Any]
Deliver = Callable[[engine_pb2.RunEvent], None]
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
                while (frame := await stream.outbox.next()) is not None:
                    streams.metrics.frame_events.observe(len(frame.events))
                    yield frame
            finally:
                receiving.cancel()
                with suppress(asyncio.CancelledError):
                    await receiving

    async def Describe(self, request: engine_pb2.DescribeRequest, context: Context) -> engine_pb2.DescribeResponse:
        return self._ready().describer.response()

    async def Prepare(self, request: engine_pb2.PrepareRequest, context: Context) -> engine_pb2.PrepareResponse:
        preparer = self._ready().preparer
        return await self._do(_is_heavy(request.items, request.parameters), lambda wanted: preparer.prepare(request, wanted))

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Context) -> generation_pb2.TokenizeResponse:
        preparer = self._ready().preparer
        return await self._do(_is_heavy(request.items), lambda wanted: preparer.tokenize(request, wanted))

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

    async def _do(self, heavy: bool, work: Callable[[Wanted], T]) -> T:
        return await self._workers.run(work) if heavy else work(always)


def _is_heavy(items: Sequence[types_pb2.Item], parameters: types_pb2.Parameters | None = None) -> bool:
    """Whether it would block the event loop for too long: much text, or a grammar to compile."""
    every = [item.parameters for item in items] + ([parameters] if parameters is not None else [])
    size = sum(item.ByteSize() + MESSAGE_BYTES * len(item.chat.messages) for item in items)
    return size > HEAVY_BYTES or any(each.HasField("response_format") for each in every)


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip archive, the same bytes for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


class Workers:
    """A bounded number of threads with a bounded queue, for work that would block the event loop."""

    def __init__(self, threads: int, queue_max: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "prepare")
        self._max = threads + queue_max
        self._now = 0

    async def run(self, work: Callable[[Wanted], T]) -> T:
        """What `work` returns or raises, done in a thread. Raises QueueFull. When the caller is cancelled, work that waits is
        dropped, and work that has begun is not wanted any more."""
        if self._now >= self._max:
            raise QueueFull(f"{self._now} requests are being prepared", retry_after=RETRY_SECONDS)
        self._now += 1
        gone = threading.Event()
        job = self._pool.submit(work, lambda: not gone.is_set())
        done = asyncio.wrap_future(job)
        done.add_done_callback(self._count_down)  # not when the caller is cancelled: its thread goes on
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            gone.set()
            job.cancel()
            raise

    def _count_down(self, done: asyncio.Future[T]) -> None:
        self._now -= 1
        if not done.cancelled():
            done.exception()  # retrieved here, because the caller may have been cancelled

    def close(self) -> None:
        """Cancels what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Limits of one stream."""

    runs_max: int
    """Active runs."""
    buffer_bytes_max: int
    """Events that wait to be read."""
    frame_bytes_max: int
    """Events in one message, if more than one waits."""


@dataclass(slots=True)
class Streams:
    """The Execute streams of the process, of which at most one is connected, and what they share."""

    runs: Runs
    describer: Describer
    preparer: Preparer
    limits: StreamLimits
    metrics: Metrics
    fence: Fence
    file: SequenceFile | None = None
    """Where the fence's sequences are kept; None: nowhere."""
    _current: Stream | None = None
    _idle_seconds: float | None = None

    @contextmanager
    def admitted(self, first: engine_pb2.ExecuteRequest) -> Iterator[Stream]:
        """The new stream that begins with this message, connected until the context ends."""
        try:
            stream = self._admit(first)
            try:
                yield stream
            finally:
                self._leave(stream)
        except OstinatoError as error:
            self.metrics.refused.labels(error.reason).inc()
            _log.warning("stream refused", extra={"reason": error.reason, "why": error.message})
            raise

    def drain(self, idle_seconds: float) -> None:
        """From now on a stream ends once it has had no run for `idle_seconds`."""
        self._idle_seconds = idle_seconds
        if self._current is not None:
            self._current.drain(idle_seconds)

    def ran(self, log_id: str, sequence: int) -> None:
        """Records that this sequence was submitted."""
        self.fence.ran(log_id, sequence)
        if self.file is not None:
            self.file.write_soon(self.fence.sequences)

    def _admit(self, first: engine_pb2.ExecuteRequest) -> Stream:
        """The new stream; the one before, if it is still connected, has been stopped."""
        if not first.HasField("hello"):
            raise ProtocolViolation("a stream begins with hello")
        self.fence.admit(first.hello)
        if self._current is not None:
            self._current.replace(first.hello.epoch)
        self._current = Stream(self, first.hello)
        if self._idle_seconds is not None:
            self._current.drain(self._idle_seconds)
        self.metrics.streams.set(1)
        _log.info("sidecar connected", extra=_names(first.hello))
        return self._current

    def _leave(self, stream: Stream) -> None:
        stream.stop()
        _log.info("sidecar gone", extra=_names(stream.hello))
        if self._current is stream:
            self._current = None
            self.fence.leave()
            if self.file is not None:
                self.file.flush()
            self.metrics.streams.set(0)


@dataclass(frozen=True, slots=True)
class Writer:
    """A sidecar's name, and the log it writes."""

    log_id: str
    name: str

    def __str__(self) -> str:
        return f"writer {self.name} of log {self.log_id}"


@dataclass(slots=True)
class Fence:
    """Which sidecar may drive the engine. Pure. Lives as long as the process; the sequences live longer (`SequenceFile`).

    1. An epoch lower than the highest admitted of its writer on its log is refused: that sidecar has been replaced.
    2. While one writer of one log is connected, every other writer and log is refused.
    3. The same writer with the same epoch or a higher one takes over from its own earlier stream.
    4. A sidecar whose journal ends before a sequence that was run here is refused: it would assign that number again.
    5. Epochs and sequences beyond bounds that no sidecar reaches are refused: they would shut the right one out.
    6. A refusal changes nothing.
    """

    connected: Writer | None = None
    sequences: dict[str, int] = field(default_factory=dict)
    """The newest that was run here, by log id. The log that was run last is the last."""
    _highest: dict[Writer, int] = field(default_factory=dict)

    def admit(self, hello: engine_pb2.Hello) -> None:
        """Connects this writer. Raises ProtocolViolation, EpochStale, WriterBusy or JournalBehind."""
        if not hello.log_id or not hello.writer or not hello.epoch:
            raise ProtocolViolation("hello lacks log_id, writer or epoch")
        writer = Writer(hello.log_id, hello.writer)
        highest = self._highest.get(writer, 0)
        if hello.epoch < highest:
            raise EpochStale(
                f"epoch {hello.epoch} of {writer} is over: {highest} has been here (if that cannot be, restart the service)",
                details={"epoch": str(hello.epoch), "highest": str(highest)},
            )
        if hello.epoch > EPOCH_MAX or (highest and hello.epoch > highest + EPOCH_JUMP_MAX):
            raise ProtocolViolation(
                f"epoch {hello.epoch} of {writer} is too far above {highest}, the highest that has been here: "
                "if it is right, restart the service, which remembers no epochs"
            )
        if hello.last_sequence > SEQUENCE_MAX:
            raise ProtocolViolation(f"sequence {hello.last_sequence} of {writer}: no log has reached {SEQUENCE_MAX}")
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
        assert hello.epoch >= highest and self.connected in (None, writer) and hello.last_sequence >= newest
        self.connected = writer
        self._highest[writer] = hello.epoch

    def ran(self, log_id: str, sequence: int) -> None:
        """Records that this sequence was submitted."""
        self.sequences[log_id] = max(sequence, self.sequences.pop(log_id, 0))

    def leave(self) -> None:
        """Records that the writer's stream has ended."""
        self.connected = None


class SequenceFile:
    """The newest sequence that was run of each log, over restarts. One file, replaced whole, in a thread of its own because a
    disk may be slow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "sequences")
        self._soon: asyncio.TimerHandle | None = None
        self._waiting: Mapping[str, int] = {}

    def read(self) -> dict[str, int]:
        """By log id. Raises StartupError for a file that cannot be read or has another content."""
        try:
            content = files.read(self._path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StartupError(
                f"--state-dir: {self._path} cannot be read: {error.strerror or error}: let this user read it, or name another"
            ) from error
        try:
            sequences = {log_id: int(sequence) for log_id, sequence in json.loads(content).items()}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise StartupError(
                f"--state-dir: {self._path} is not a list of sequences ({error!r}): put a copy back, or, if every journal is "
                "known to have its end, remove it"
            ) from error
        for log_id, sequence in sequences.items():
            if sequence > SEQUENCE_MAX:
                raise StartupError(
                    f"--state-dir: {self._path}: log {log_id} cannot have reached sequence {sequence}: remove this log from "
                    "the file, if its journal is known to have its end, or put a copy of the file back"
                )
        return sequences

    def write_soon(self, sequences: Mapping[str, int]) -> None:
        """Writes this mapping, as it is then, within SAVE_SECONDS."""
        self._waiting = sequences
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(SAVE_SECONDS, self.flush)

    def flush(self) -> None:
        """Writes now what `write_soon` has left to do."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
            self.write(self._waiting)

    def write(self, sequences: Mapping[str, int]) -> None:
        """Keeps the last LOGS_MAX of the mapping. Returns at once; a failure is logged."""
        kept = {log_id: str(sequence) for log_id, sequence in list(sequences.items())[-LOGS_MAX:]}
        written = self._thread.submit(files.replace, self._path, json.dumps(kept, indent=1), parents=True)
        written.add_done_callback(self._log_failure)

    def close(self) -> None:
        """Waits until everything is written."""
        self._thread.shutdown()

    @staticmethod
    def _log_failure(written: Future[None]) -> None:
        if written.exception() is not None:
            _log.error("cannot write the newest sequences", extra={"why": str(written.exception())})


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
        self.outbox = Outbox(streams.limits.buffer_bytes_max, streams.limits.frame_bytes_max)
        self._streams, self._runs, self._describer = streams, streams.runs, streams.describer
        self._submissions = Submissions(hello.last_sequence)
        self._half_closed = self._stopped = False
        self._idle_seconds: float | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._runs.attach(self._deliver)
        self._unwatch = streams.describer.held.watch(self._welcome)
        self._welcome()

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
        self._settle()

    def replace(self, epoch: int) -> None:
        """Ends it for a later stream of this writer."""
        self.stop()
        self.outbox.fail(EpochStale(f"replaced by a stream of epoch {epoch}", details={"highest": str(epoch)}))

    def drain(self, idle_seconds: float) -> None:
        """From now on it ends once it has had no run for `idle_seconds`."""
        self._idle_seconds = idle_seconds
        self._settle()

    def stop(self) -> None:
        """Stops all runs and takes no more. May be called again."""
        if not self._stopped:
            self._stopped = True
            self._runs.detach()
            self._settle()
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
        self._settle()

    def _submit(self, submit: engine_pb2.Submit) -> None:
        assert not self._stopped, "a stopped stream reaches no engine"
        self._submissions.add(submit)
        if submit.purpose == engine_pb2.PURPOSE_PRIMARY:
            self._streams.ran(self.hello.log_id, submit.sequence)
        error: OstinatoError | None = self._streams.preparer.check_submit(submit)
        if len(self._runs) >= self._streams.limits.runs_max:
            error = QueueFull(f"more than {self._streams.limits.runs_max} runs at once")
        if error is None:
            self._runs.submit(submit)
        else:
            self.outbox.put(engine_pb2.RunEvent(run_id=submit.run_id, failed=to_status(error)))

    def _deliver(self, event: engine_pb2.RunEvent) -> None:
        self.outbox.put(event)
        if self.outbox.failed:
            self.stop()
        self._settle()

    def _settle(self) -> None:
        """Ends a half-closed stream that has no run, and one that drains after a while without runs."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._stopped or len(self._runs):
            return
        if self._half_closed:
            self.outbox.close()
        elif self._idle_seconds is not None:
            self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self._end_idle)

    def _end_idle(self) -> None:
        _log.info("idle sidecar let go", extra=_names(self.hello))
        self.stop()
        self.outbox.close()

    def _welcome(self) -> None:
        self.outbox.welcome(engine_pb2.Welcome(description=self._describer.response()))


def _names(hello: engine_pb2.Hello) -> dict[str, object]:
    return {"log_id": hello.log_id, "writer": hello.writer, "epoch": hello.epoch, "last_sequence": hello.last_sequence}


class Submissions:
    """What one stream has submitted. A sidecar that breaks one of these rules loses its stream.

    1. Run ids are used once (among the newest RUN_IDS_MAX) and are not 0.
    2. Sequences of primary first attempts rise, except those that go ahead of other tenants' items. Later attempts need not:
       an item may come from another writer. None is more than SEQUENCE_JUMP_MAX above the newest that the sidecar has named:
       the service would remember it for good.
    3. Every run has a known purpose, an attempt from 1, token ids and a length.
    """

    def __init__(self, last_sequence: int) -> None:
        """`last_sequence`: of the sidecar's journal when the stream began."""
        self._last_sequence = 0
        self._known = last_sequence
        """The newest that the sidecar has named or submitted."""
        self._ids: set[int] = set()
        self._order: deque[int] = deque()

    def add(self, submit: engine_pb2.Submit) -> None:
        """Raises ProtocolViolation or OutOfOrder."""
        run_id, primary = submit.run_id, submit.purpose == engine_pb2.PURPOSE_PRIMARY
        if not run_id or run_id in self._ids:
            raise ProtocolViolation(f"run_id {run_id} is used twice" if run_id else "run_id 0 is not allowed")
        if submit.purpose not in PURPOSES:
            raise ProtocolViolation(f"run {run_id}: unknown purpose {submit.purpose}")
        if not submit.attempt:
            raise ProtocolViolation(f"run {run_id}: attempts count from 1")
        if not submit.token_ids or not submit.parameters.max_new_tokens:
            raise ProtocolViolation(f"run {run_id}: lacks token_ids or parameters")
        in_order = primary and submit.attempt == 1 and not submit.ahead
        if primary and (not submit.sequence or (in_order and submit.sequence <= self._last_sequence)):
            raise OutOfOrder(f"run {run_id}: sequence {submit.sequence} comes after {self._last_sequence}")
        if primary and submit.sequence > min(self._known + SEQUENCE_JUMP_MAX, SEQUENCE_MAX):
            raise OutOfOrder(f"run {run_id}: sequence {submit.sequence} is too far above {self._known}, the newest known one")
        if primary:
            self._known = max(self._known, submit.sequence)
        if in_order:
            self._last_sequence = submit.sequence
        self._ids.add(run_id)
        self._order.append(run_id)
        if len(self._order) > RUN_IDS_MAX:
            self._ids.discard(self._order.popleft())


@dataclass(slots=True)
class ActiveRun:
    """A run that the engine has and that has not ended."""

    submit: engine_pb2.Submit
    submitted_at: float
    spans: RunSpans
    started: bool = False
    last_token_at: float | None = None
    reported_tokens: int = 0
    deadline: asyncio.TimerHandle | None = None


class Runs:
    """The runs in the engine, of one user at a time: the self-test, then one stream after another. On the event loop.

    1. The engine's run ids are unique in the process. The user sees its own, `Submit.run_id`.
    2. A run ends once: by the engine, by its deadline, or by its user. Nothing of it is delivered after that.
    3. When a user is replaced, its runs are stopped first.
    """

    def __init__(self, engine: Engine, held: HeldGrade, metrics: Metrics) -> None:
        self.engine, self.held = engine, held
        self._metrics, self._parser = metrics, Parser.of(engine.vocabulary)
        self._active: dict[int, ActiveRun] = {}
        """By the engine's run id."""
        self._ids = itertools.count(1)
        self._deliver: Deliver | None = None

    def start(self) -> None:
        """Starts the engine on the running loop, whose clock is that of all deadlines."""
        self._loop = asyncio.get_running_loop()
        self.engine.start(self.on_events, self.held.fall)

    def attach(self, deliver: Deliver) -> None:
        """A new user, which gets the events of its runs, each run's in order."""
        self.detach()
        self._deliver = deliver

    def detach(self) -> None:
        """Stops all runs, silently, and releases the user."""
        for run_id in tuple(self._active):
            self._cancel(run_id)
        assert not self._active, "every run was stopped"
        self._deliver = None

    def __len__(self) -> int:
        return len(self._active)

    def submit(self, submit: engine_pb2.Submit) -> None:
        """Starts a run. The user checks its run id."""
        run_id = next(self._ids)
        assert run_id not in self._active and self._deliver is not None, "run ids are unique, and a run has a user"
        run = self._active[run_id] = ActiveRun(submit, self._loop.time(), RunSpans(submit, self.engine))
        if submit.timeout_millis:
            run.deadline = self._loop.call_later(submit.timeout_millis / 1000, self._expire, run_id)
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

    def cancel(self, run_ids: Collection[int]) -> None:
        """Stops these of the user's runs, silently. Unknown ones and those that have ended are ignored."""
        chosen = set(run_ids)
        for run_id, run in tuple(self._active.items()):
            if run.submit.run_id in chosen:
                self._cancel(run_id)

    def on_events(self, events: Events) -> None:
        """The engine's report of one step."""
        now = self._loop.time()
        for event in events:
            run = self._active.get(event.run_id)
            if run is not None:  # else it was ended while the report was under way
                self._record(event.run_id, run, event, now)
                self._send(run, event)

    def _send(self, run: ActiveRun, event: engine_pb2.RunEvent) -> None:
        assert self._deliver is not None, "a run has a user"
        event.run_id = run.submit.run_id
        self._deliver(event)

    def _cancel(self, run_id: int) -> None:
        self.engine.cancel(run_id)
        self._end(run_id, "cancelled", error=Cancelled("no longer wanted"))

    def _expire(self, run_id: int) -> None:
        run = self._active[run_id]
        self.engine.cancel(run_id)
        error = DeadlineExceeded(f"the run did not end within {run.submit.timeout_millis} ms")
        self._end(run_id, "expired", error=error)
        self._send(run, engine_pb2.RunEvent(failed=to_status(error)))

    def _end(self, run_id: int, end: str, output: types_pb2.Output | None = None, error: OstinatoError | None = None) -> None:
        run = self._active.pop(run_id)
        run.spans.ended(output, error)
        if run.deadline is not None:
            run.deadline.cancel()
        (self._metrics.running if run.started else self._metrics.queued).dec()
        self._metrics.end(run.submit.purpose, end)

    def _record(self, run_id: int, run: ActiveRun, event: engine_pb2.RunEvent, now: float) -> None:
        """Updates the run, metrics and spans, and fills in the grade."""
        match event.WhichOneof("event"):
            case "started":
                run.started = True
                run.spans.started()
                self._metrics.queued.dec()
                self._metrics.running.inc()
                self._metrics.queue_seconds.observe(now - run.submitted_at)
                self._metrics.prompt_tokens.inc(len(run.submit.token_ids))
            case "tokens":
                self._record_tokens(len(event.tokens.token_ids), run, now)
            case "finished":
                output = event.finished.output
                output.grade = self.held.grade
                if run.submit.parameters.parse:
                    output.parsed.CopyFrom(self._parser.parsed(output, run.submit))
                self._metrics.new_tokens.inc(len(output.token_ids) - run.reported_tokens)
                self._metrics.cached_tokens.inc(output.cached_tokens)
                self._metrics.run_seconds.observe(now - run.submitted_at)
                self._end(run_id, "finished", output)
            case _:
                self._end(run_id, "failed", error=from_status(event.failed))

    def _record_tokens(self, count: int, run: ActiveRun, now: float) -> None:
        if not count:
            return
        if run.last_token_at is None:
            run.spans.first_token()
            self._metrics.first_token_seconds.observe(now - run.submitted_at)
        else:
            self._metrics.between_tokens_seconds.observe((now - run.last_token_at) / count)
        run.last_token_at = now
        run.reported_tokens += count
        self._metrics.new_tokens.inc(count)


class Outbox:
    """What waits to be written to the sidecar, joined into as few messages as possible.

    1. Events of one run leave in order, and no timer delays any.
    2. A run's tokens that wait are one event, however often the engine reported.
    3. Bounded in bytes: a sidecar that does not read loses its stream. The engine never waits for it.
    """

    def __init__(self, bytes_max: int, frame_bytes_max: int) -> None:
        self._bytes_max, self._frame_bytes_max = bytes_max, frame_bytes_max
        self._waiting: deque[engine_pb2.RunEvent | engine_pb2.PrepareResponse] = deque()
        self._bytes = 0
        self._tokens: dict[int, tuple[engine_pb2.RunTokens, list[str]]] = {}
        """Tokens that wait, by run, and their texts. Texts are joined once, on leaving: a message keeps the memory of every
        text that was ever assigned to it."""
        self._welcome: engine_pb2.Welcome | None = None
        self._wake = asyncio.Event()
        self._coalescer = Coalescer()
        self._closed = False
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def put(self, message: engine_pb2.RunEvent | engine_pb2.PrepareResponse) -> None:
        """Adds a message, which the outbox then owns. Without effect once failed."""
        if self._error is not None:
            return
        self._bytes += message.ByteSize()
        if self._bytes > self._bytes_max:
            self.fail(SlowReader(f"more than {self._bytes_max} bytes wait to be read"))
            return
        if isinstance(message, engine_pb2.RunEvent) and message.HasField("tokens"):
            self._put_tokens(message)
        else:
            self._waiting.append(message)
        self._wake.set()

    def welcome(self, welcome: engine_pb2.Welcome) -> None:
        """To be part of the next message. Replaces one that waits."""
        self._welcome = welcome
        self._wake.set()

    def close(self) -> None:
        """Nothing more comes: `next` returns None once everything is taken."""
        self._closed = True
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """Ends at once: `next` raises this, whatever waits. The first error counts."""
        self._error = self._error or error
        self._wake.set()

    async def next(self) -> engine_pb2.ExecuteResponse | None:
        """What waits, as far as it fits one message, as soon as there is anything. None: closed, and everything is taken."""
        while self._error is None:
            if self._waiting or self._welcome is not None:
                await self._coalescer.wait(lambda: self._bytes)
                if self._error is None:
                    return self._frame()
            elif self._closed:
                return None
            else:
                self._wake.clear()
                await self._wake.wait()
        raise self._error

    def _put_tokens(self, event: engine_pb2.RunEvent) -> None:
        found = self._tokens.get(event.run_id)
        if found is None:
            self._tokens[event.run_id] = (event.tokens, [event.tokens.text])
            self._waiting.append(event)
        else:
            tokens, texts = found
            tokens.token_ids.extend(event.tokens.token_ids)
            tokens.logprobs.extend(event.tokens.logprobs)
            texts.append(event.tokens.text)

    def _frame(self) -> engine_pb2.ExecuteResponse:
        frame = engine_pb2.ExecuteResponse(welcome=self._welcome)
        self._welcome = None
        taken = 0
        while self._waiting:
            message = self._waiting[0]
            run_id = message.run_id if isinstance(message, engine_pb2.RunEvent) and message.HasField("tokens") else None
            if run_id is not None:
                self._join_texts(run_id)
            size = message.ByteSize()
            if taken and taken + size > self._frame_bytes_max:
                break
            taken += size
            self._waiting.popleft()
            if isinstance(message, engine_pb2.PrepareResponse):
                frame.prepared.append(message)
                continue
            if run_id is not None:
                del self._tokens[run_id]
            frame.events.append(message)
        self._bytes = max(0, self._bytes - taken) if self._waiting else 0
        return frame

    def _join_texts(self, run_id: int) -> None:
        tokens, texts = self._tokens[run_id]
        if len(texts) > 1:
            tokens.text = "".join(texts)
            texts[:] = [tokens.text]
