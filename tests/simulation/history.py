"""What was seen: by clients, by the engine, on the disk. The promises are judged by this and by nothing else.

Steps number everything that is noted, so that "before" has a meaning where two things happen in one moment.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from ostinato import errors
from ostinato.v1 import engine_pb2, generation_pb2, types_pb2

from sidecar.journal.model import Sealed


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

    def __str__(self) -> str:
        return f"call {self.number} ({self.request.request_id})"


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
    run_id: int
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
    started: dict[tuple[int, int], int] = field(default_factory=dict)
    """Step at which the engine began a run, by stream and run_id."""
    durable: dict[int, int] = field(default_factory=dict)
    """Step at which an entry was safe, by index."""
    disk: list[Sealed] = field(default_factory=list)
    """Every entry, in the end."""
    taken: dict[int, int] = field(default_factory=dict)
    """Step at which a sidecar was told that another writer's item is its own, by sequence."""
    opened: int = 0
    """Journals that were opened."""
    deaths: list[str] = field(default_factory=list)
    """Processes that ended by themselves, and for no reason that the world gave them."""
    coverage: set[str] = field(default_factory=set)
    """What the world saw happen, for those who ask whether it happened at all."""
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

    @property
    def digest(self) -> str:
        """Two runs with equal digests were the same run."""
        return self._digest.hexdigest()
