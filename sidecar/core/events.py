"""What the core is told (events), and what it asks for (effects). Times are seconds on the clock that `step` is given."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from ostinato.digest import model_digest
from ostinato.errors import OstinatoError
from ostinato.v1 import engine_pb2, types_pb2


@dataclass(frozen=True, slots=True)
class Need:
    """What one item requires of the engine."""

    kv_tokens: int
    """Tokens of the prompt, and of the answer at worst."""
    model_digest: bytes
    """Of the model that the item was prepared for."""
    required_grade: types_pb2.Grade.ValueType = types_pb2.GRADE_UNSPECIFIED


# ---- events: numbers


@dataclass(frozen=True, slots=True)
class Admit:
    """A prepared batch asks for sequences. Refuse or AppendAdmission follows, possibly later."""

    batch_id: int
    """Names the batch until it has sequences. Never used twice in a process."""
    needs: tuple[Need, ...]
    keyed: bool
    deadline: float | None = None
    """Of the call. A keyed batch outlives it."""
    tenant: str = ""

    @property
    def items(self) -> int:
        return len(self.needs)

    @property
    def cost(self) -> int:
        """Tokens, prompts and answers at worst; at least 1."""
        return max(1, sum(need.kv_tokens for need in self.needs))

    @property
    def waits_until(self) -> float | None:
        return None if self.keyed else self.deadline

    def expired(self, now: float) -> bool:
        return self.waits_until is not None and now >= self.waits_until


@dataclass(frozen=True, slots=True)
class Numbered:
    """The batch is durable. Its items have the sequences from `first_sequence` on."""

    batch_id: int
    first_sequence: int


@dataclass(frozen=True, slots=True)
class NotNumbered:
    """The batch was not appended: the journal has no room, or the key was bound already."""

    batch_id: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """An unfinished item of an earlier epoch of this writer (told before anything else), or of a writer whose lease expired."""

    sequence: int
    need: Need
    keyed: bool
    attempt: int
    """Of its next submission."""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """The item's outcome is durable."""

    sequence: int


@dataclass(frozen=True, slots=True)
class CancelItems:
    """A request to end these sequences, both included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class CancelBatch:
    """The call has ended before its answer. Ends a batch without a key; a keyed one goes on."""

    batch_id: int
    error: OstinatoError
    """Cancelled or DeadlineExceeded."""


# ---- events: the engine


@dataclass(frozen=True, slots=True)
class Connected:
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


@dataclass(frozen=True, slots=True)
class Regraded:
    """The engine's grade has changed."""

    grade: types_pb2.Grade.ValueType


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The engine stream is closed, and all its runs are lost."""


@dataclass(frozen=True, slots=True)
class Started:
    run_id: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The run has an output, which the caller of `step` keeps."""

    run_id: int
    grade: types_pb2.Grade.ValueType


@dataclass(frozen=True, slots=True)
class Failed:
    """The run ended without output."""

    run_id: int
    error: OstinatoError


# ---- events: reruns


class Urgency(IntEnum):
    """The order in which reruns start."""

    VERIFY = 0
    """A call waits for it. Told before the end of the item's first run, whose room it takes over."""
    REPLAY = 1
    BACKGROUND = 2


@dataclass(frozen=True, slots=True)
class Rerun:
    """A run without a sequence asks for room. RerunLost or the run's own end concludes it."""

    rerun_id: int
    kv_tokens: int
    urgency: Urgency
    exclusive: bool = False
    """Whether nothing may run beside it."""
    tenant: str | None = None
    """Who asked for it; None: the sidecar itself."""


@dataclass(frozen=True, slots=True)
class CancelRerun:
    rerun_id: int


# ---- events: time


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Admit nothing more, and finish what was admitted. Drained follows."""


@dataclass(frozen=True, slots=True)
class DrainEnd:
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
    | Started
    | Finished
    | Failed
    | Rerun
    | CancelRerun
    | Tick
    | Drain
    | DrainEnd
)


# ---- effects


@dataclass(frozen=True, slots=True)
class AppendAdmission:
    """Make the batch durable. Numbered or NotNumbered follows."""

    batch_id: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The batch gets no sequences."""

    batch_id: int
    error: OstinatoError


@dataclass(frozen=True, slots=True)
class Submit:
    """Send the item to the engine, behind every earlier Submit."""

    run_id: int
    sequence: int
    attempt: int
    expires_at: float
    company: int
    """Runs that the engine holds now, this one included."""
    ahead: bool = False
    """Whether items of other tenants that wait have lower sequences."""


@dataclass(frozen=True, slots=True)
class SubmitRerun:
    run_id: int
    rerun_id: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class CancelRun:
    run_id: int


@dataclass(frozen=True, slots=True)
class End:
    """Make the item's outcome durable. Ended follows."""

    sequence: int
    attempt: int
    error: OstinatoError | None
    """None: COMPLETED, with the output of Finished. Cancelled and Abandoned have kinds of outcome; other errors are FAILED."""


@dataclass(frozen=True, slots=True)
class LeaveToRecovery:
    """This process will not finish the item; the next epoch will. Callers have to ask again."""

    sequence: int


@dataclass(frozen=True, slots=True)
class RerunLost:
    """The rerun will not run, or will not finish."""

    rerun_id: int
    error: OstinatoError


@dataclass(frozen=True, slots=True)
class Fault:
    """The service violated the protocol: drop the stream. Disconnected follows."""

    error: OstinatoError


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing is left that this process will finish."""


Effect = AppendAdmission | Refuse | Submit | SubmitRerun | CancelRun | End | LeaveToRecovery | RerunLost | Fault | Drained
