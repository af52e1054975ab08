"""What the core is told (events), and what it asks for (effects). Times are seconds on the clock that `step` is given."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from ostinato.digest import model_digest
from ostinato.errors import OstinatoError
from ostinato.v1 import engine_pb2, types_pb2


class Need(msgspec.Struct, frozen=True):
    """What one item requires of the engine."""

    kv_tokens: int
    """Tokens of the prompt, and of the answer at worst."""
    model_digest: bytes
    """Of the model that the item was prepared for."""
    required_grade: types_pb2.Grade.ValueType = types_pb2.GRADE_UNSPECIFIED


# ---- events: numbers


class Admit(msgspec.Struct, frozen=True):
    """A prepared batch asks for sequences. Refuse or AppendAdmission follows, possibly later."""

    batch_id: int
    """Names the batch until it has sequences. Never used twice in a process."""
    needs: tuple[Need, ...]
    keyed: bool
    deadline: float | None = None
    """Of the call; None also for a keyed batch, which outlives it."""
    tenant: str = ""

    @property
    def items(self) -> int:
        return len(self.needs)

    @property
    def cost(self) -> int:
        """Tokens, prompts and answers at worst; at least 1."""
        return max(1, sum(need.kv_tokens for need in self.needs))

    def expired(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline


class Numbered(msgspec.Struct, frozen=True):
    """The batch is durable. Its items have the sequences from `first_sequence` on."""

    batch_id: int
    first_sequence: int


class NotNumbered(msgspec.Struct, frozen=True):
    """The batch was not appended: the journal has no room, or the key was bound already."""

    batch_id: int


class Recovered(msgspec.Struct, frozen=True):
    """An unfinished item of an earlier epoch of this writer (told before anything else), or of a writer whose lease expired."""

    sequence: int
    need: Need
    keyed: bool
    attempt: int
    """Of its next submission."""
    tenant: str = ""


class Ended(msgspec.Struct, frozen=True):
    """The outcomes of these items are durable."""

    sequences: tuple[int, ...]


class CancelItems(msgspec.Struct, frozen=True):
    """A request to end these sequences, both included."""

    first: int
    last: int


class CancelBatch(msgspec.Struct, frozen=True):
    """The call has ended before its answer. Ends a batch without a key; a keyed one goes on."""

    batch_id: int
    error: OstinatoError
    """Cancelled or DeadlineExceeded."""


# ---- events: the engine


class Connected(msgspec.Struct, frozen=True):
    """The engine stream is open."""

    runs: int
    kv_blocks: int
    block_tokens: int
    model_digest: bytes
    grade: types_pb2.Grade.ValueType

    @classmethod
    def of(cls, description: engine_pb2.DescribeResponse) -> Connected:
        capacity, model = description.capacity, description.model
        digest = model_digest(model.fingerprint.fields)
        return cls(capacity.runs, capacity.kv_blocks, capacity.block_tokens, digest, model.grade)


class Regraded(msgspec.Struct, frozen=True):
    """The engine's grade has changed."""

    grade: types_pb2.Grade.ValueType


class Disconnected(msgspec.Struct, frozen=True):
    """The engine stream is closed, and all its runs are lost."""


class Started(msgspec.Struct, frozen=True):
    run_id: int


class Finished(msgspec.Struct, frozen=True):
    """The run has an output, which the caller of `step` keeps."""

    run_id: int
    grade: types_pb2.Grade.ValueType


class Failed(msgspec.Struct, frozen=True):
    """The run ended without output."""

    run_id: int
    error: OstinatoError


Report = Started | Finished | Failed


class Reported(msgspec.Struct, frozen=True):
    """What the engine reported together, in order. What waits for room is submitted after all of it."""

    reports: tuple[Report, ...]


# ---- events: reruns


class Urgency(IntEnum):
    """The order in which reruns start."""

    VERIFY = 0
    """A call waits for it. Told before the end of the item's first run, whose room it takes over."""
    REPLAY = 1
    BACKGROUND = 2


class Rerun(msgspec.Struct, frozen=True):
    """A run without a sequence asks for room. RerunLost or the run's own end concludes it."""

    rerun_id: int
    kv_tokens: int
    urgency: Urgency
    exclusive: bool = False
    """Whether nothing may run beside it."""
    tenant: str | None = None
    """Who asked for it; None: the sidecar itself."""


class CancelRerun(msgspec.Struct, frozen=True):
    rerun_id: int


# ---- events: time


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""


class Drain(msgspec.Struct, frozen=True):
    """Admit nothing more, and finish what was admitted. Drained follows."""


class DrainEnd(msgspec.Struct, frozen=True):
    """Finish nothing more."""


Event = (
    Admit
    | Numbered
    | NotNumbered
    | Recovered
    | Ended
    | CancelItems
    | CancelBatch
    | Connected
    | Regraded
    | Disconnected
    | Reported
    | Rerun
    | CancelRerun
    | Tick
    | Drain
    | DrainEnd
)


# ---- effects


class AppendAdmission(msgspec.Struct, frozen=True):
    """Make the batch durable. Numbered or NotNumbered follows."""

    batch_id: int


class Refuse(msgspec.Struct, frozen=True):
    """The batch gets no sequences."""

    batch_id: int
    error: OstinatoError


class Submit(msgspec.Struct, frozen=True):
    """Send the item to the engine, behind every earlier Submit."""

    run_id: int
    sequence: int
    attempt: int
    expires_at: float
    company: int
    """Runs that the engine holds now, this one included."""
    ahead: bool = False
    """Whether items of other tenants that wait have lower sequences."""


class SubmitRerun(msgspec.Struct, frozen=True):
    run_id: int
    rerun_id: int
    expires_at: float


class CancelRun(msgspec.Struct, frozen=True):
    run_id: int


class End(msgspec.Struct, frozen=True):
    """Make the item's outcome durable. Ended follows."""

    sequence: int
    attempt: int
    error: OstinatoError | None
    """None: COMPLETED, with the output of Finished. Cancelled and Abandoned have kinds of outcome; other errors are FAILED."""


class LeaveToRecovery(msgspec.Struct, frozen=True):
    """This process will not finish the item; the next epoch will. Callers have to ask again."""

    sequence: int


class RerunLost(msgspec.Struct, frozen=True):
    """The rerun will not run, or will not finish."""

    rerun_id: int
    error: OstinatoError


class Fault(msgspec.Struct, frozen=True):
    """The service violated the protocol: drop the stream. Disconnected follows."""

    error: OstinatoError


class Drained(msgspec.Struct, frozen=True):
    """Nothing is left that this process will finish."""


Effect = AppendAdmission | Refuse | Submit | SubmitRerun | CancelRun | End | LeaveToRecovery | RerunLost | Fault | Drained
