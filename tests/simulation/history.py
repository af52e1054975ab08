"""What was seen: by clients, by the engine, on the disk. The promises are judged by this and by nothing else.

Steps number everything that is noted, so that "before" has a meaning where two things happen in one moment.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from ostinato import errors
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

from sidecar.journal.model import Sealed
from tests.simulation.plan import Job


@dataclass(slots=True, eq=False)
class Call:
    """One call, as its client saw it."""

    number: int
    job: int
    request: generation_pb2.GenerateRequest
    streamed: bool
    sent: int
    """Step."""
    stamp: types_pb2.Stamp | None = None
    acknowledged: int = 0
    """Step at which the client first knew its numbers."""
    repeated: bool = False
    results: list[types_pb2.Result] = field(default_factory=list)
    answered: dict[int, int] = field(default_factory=dict)
    """Step at which the client saw the outcome, by sequence."""
    tokens: dict[int, list[int]] = field(default_factory=dict)
    """Streamed, by sequence, those of a discarded attempt left out."""
    texts: dict[int, str] = field(default_factory=dict)
    """Likewise."""
    restarts: int = 0
    faults: list[str] = field(default_factory=list)
    """What a stream must not do."""
    error: errors.OstinatoError | None = None
    closed: int = 0
    """Step at which the call ended for its client, whichever way; 0: it was open to the end."""
    ended_well: bool = False
    """The sidecar ended it, and not with an error."""
    afterwards: bool = False
    """Sent when all was over, to see what is remembered."""

    @property
    def key(self) -> str:
        return self.request.idempotency_key

    @property
    def complete(self) -> bool:
        return self.stamp is not None and len(self.results) == self.stamp.count

    @property
    def refused(self) -> bool:
        """Whether it took no number. A drain also ends the calls of what has a key and numbers."""
        drained = self.key and isinstance(self.error, errors.Draining)
        return isinstance(self.error, errors.Refused | errors.InvalidRequest) and not drained

    def __str__(self) -> str:
        return f"call {self.number} ({self.request.request_id})"

    def answer(self, response: generation_pb2.GenerateResponse, step: int) -> None:
        self.stamp, self.acknowledged = response.stamp, step
        for result in response.results:
            self._result(result, step)

    def hear(self, event: generation_pb2.GenerateEvent, step: int) -> None:
        if event.HasField("admitted") != (self.stamp is None):
            self.faults.append("Admitted does not come first, and once")
        match event.WhichOneof("event"):
            case "admitted":
                self.stamp, self.acknowledged = event.admitted.stamp, step
                self.repeated = event.admitted.repeated_key
            case "tokens":
                for run in event.tokens.runs:
                    self._tokens(run)
            case "restarted":
                self.restarts += 1
                self.tokens[event.restarted.sequence], self.texts[event.restarted.sequence] = [], ""
            case "finished":
                self._result(event.finished, step)
            case "failed":
                self._result(event.failed, step)

    def _result(self, result: types_pb2.Result, step: int) -> None:
        self.results.append(result)
        if result.sequence in self.answered:
            self.faults.append(f"sequence {result.sequence} ended twice")
        self.answered[result.sequence] = step

    def _tokens(self, run: generation_pb2.TokenRun) -> None:
        had = self.tokens.setdefault(run.sequence, [])
        if run.first_token != len(had):
            self.faults.append(f"sequence {run.sequence}: tokens from {run.first_token} after {len(had)}")
        if run.sequence in self.answered:
            self.faults.append(f"sequence {run.sequence}: tokens after its end")
        had.extend(run.token_ids)
        self.texts[run.sequence] = self.texts.get(run.sequence, "") + run.text


@dataclass(frozen=True, slots=True)
class Submission:
    """A run that reached the engine."""

    step: int
    stream: int
    service: int
    """Which start of the service."""
    epoch: int
    purpose: int
    sequence: int
    attempt: int
    input: bytes
    """Token ids and seed."""


@dataclass(slots=True)
class Stream:
    """An engine stream, as the service saw it."""

    number: int
    service: int
    hello: engine_pb2.Hello
    step: int
    blocks: int
    """Of the engine's KV cache."""
    runs: int
    """That the sidecar may have handed over at once."""
    live: dict[int, int] = field(default_factory=dict)
    """KV blocks of each run that was neither ended nor cancelled, by run_id."""
    overfull: list[str] = field(default_factory=list)


@dataclass(slots=True)
class History:
    """Everything, in its order."""

    step: int = 0
    calls: list[Call] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    welcomed: list[tuple[int, int, int]] = field(default_factory=list)
    """Step, service and epoch of each stream that was let in."""
    durable: dict[int, int] = field(default_factory=dict)
    """Step at which an entry was safe, by index. Empty where that is not known, as of real programs."""
    disk: list[Sealed] = field(default_factory=list)
    """Every entry, in the end."""
    taken: dict[int, int] = field(default_factory=dict)
    """Step at which a sidecar was told that another writer's item is its own, by sequence."""
    opened: int = 0
    """Journals that were opened."""
    deaths: list[str] = field(default_factory=list)
    """Processes that ended by themselves, and for no reason that the world gave them."""
    coverage: set[str] = field(default_factory=set)
    """What happened in the world: some of what coverage.py asks for."""
    out_of_reach: list[tuple[float, float]] = field(default_factory=list)
    """From and to which second of the clock a path was cut, a process stood still, or a replaced sidecar did not know of it."""
    drains: list[tuple[int, int]] = field(default_factory=list)
    """Step and epoch of each sidecar that was told to stop."""
    unended: str = ""
    """Why it did not come to its end."""
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    trace: list[str] | None = None
    """Every line, if a trace is wanted."""
    _times: list[float] = field(default_factory=list)

    def call(self, job: Job, name: str, now: float, *, afterwards: bool = False) -> Call:
        """A new call of this job. The request_id of each is its own, so that the journal tells them apart."""
        request = generation_pb2.GenerateRequest()
        request.CopyFrom(job.request)
        number = len(self.calls) + 1
        request.request_id = f"{name}/{number}"
        sent = self.note(now, "sent", request.request_id)
        self.calls.append(Call(number, job.number, request, job.streamed, sent, afterwards=afterwards))
        return self.calls[-1]

    def note(self, now: float, *what: object) -> int:
        """The step at which this happened."""
        self.step += 1
        self._times.append(now)
        line = f"{self.step} {now:.6f} " + " ".join(map(str, what))
        self._digest.update(line.encode())
        if self.trace is not None:
            self.trace.append(line)
        return self.step

    def time_of(self, step: int) -> float:
        """When it was, in seconds of the world's clock."""
        return self._times[step - 1]

    def is_durable(self, entry: Sealed, step: int) -> bool:
        """Whether the entry was safe before this step; unless nothing is known of that."""
        return not self.durable or self.durable.get(entry.header.index, step) < step

    @property
    def digest(self) -> str:
        """Two runs with equal digests were the same run."""
        return self._digest.hexdigest()
