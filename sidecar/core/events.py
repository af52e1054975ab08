"""What the core is told. Times are seconds on the clock that `step` is given."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from ostinato.digest import model_digest
from ostinato.errors import OstinatoError
from ostinato.v1 import engine_pb2, types_pb2


@dataclass(frozen=True, slots=True)
class Need:
    """What one item asks of the engine."""

    kv_tokens: int
    """Prompt and answer at worst."""
    model_digest: bytes
    """Of the model it was prepared for."""
    required_grade: types_pb2.Grade.ValueType = types_pb2.GRADE_UNSPECIFIED


@dataclass(frozen=True, slots=True)
class Admit:
    """A prepared batch wants numbers. Answered by Refuse, or by AppendAdmission."""

    batch_id: int
    """The edge's name for this call, never used twice."""
    needs: tuple[Need, ...]
    keyed: bool
    deadline: float | None = None
    """Of the caller; a keyed batch outlives it."""
    tenant: str = ""

    def over(self, now: float) -> bool:
        """Whether nobody would wait for it any more."""
        return not self.keyed and self.deadline is not None and now >= self.deadline


@dataclass(frozen=True, slots=True)
class Numbered:
    """The batch is durable."""

    batch_id: int
    first_sequence: int


@dataclass(frozen=True, slots=True)
class NotNumbered:
    """The batch was not appended: no room, or its key was bound."""

    batch_id: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """An item that an earlier epoch left unfinished: of this writer, told before anything else, or later of another one, whose
    lease has run out. It is not a first submission, and goes to its place among what waits."""

    sequence: int
    need: Need
    keyed: bool
    attempt: int
    """Of its next submission."""


@dataclass(frozen=True, slots=True)
class Connected:
    """An engine stream is up."""

    runs: int
    kv_blocks: int
    block_tokens: int
    model_digest: bytes
    grade: types_pb2.Grade.ValueType

    @classmethod
    def of(cls, description: engine_pb2.DescribeResponse) -> Connected:
        """To an engine that says this of itself."""
        room, model = description.capacity, description.model
        return cls(room.runs, room.kv_blocks, room.block_tokens, model_digest(model.fingerprint.fields), model.grade)


@dataclass(frozen=True, slots=True)
class Regraded:
    """The engine's grade changed while it runs."""

    grade: types_pb2.Grade.ValueType


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The engine stream is gone, with every run on it."""


@dataclass(frozen=True, slots=True)
class Started:
    run_id: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A run made its output; the edge keeps it."""

    run_id: int
    grade: types_pb2.Grade.ValueType


@dataclass(frozen=True, slots=True)
class Failed:
    """A run ended without output."""

    run_id: int
    error: OstinatoError


@dataclass(frozen=True, slots=True)
class Ended:
    """The item's outcome is durable."""

    sequence: int


@dataclass(frozen=True, slots=True)
class CancelItems:
    """Somebody wants these sequences ended, both included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class CancelBatch:
    """Nobody waits for the batch any more. A keyed one goes on."""

    batch_id: int
    error: OstinatoError
    """Cancelled or DeadlineExceeded."""


class Urgency(IntEnum):
    """Which rerun goes first."""

    VERIFY = 0
    """A caller waits for it. Told before the end of the item's first run, whose room it takes over."""
    REPLAY = 1
    BACKGROUND = 2


@dataclass(frozen=True, slots=True)
class Rerun:
    """A run without a number wants room. Ended by RerunLost, or by the run's own end."""

    rerun_id: int
    kv_tokens: int
    urgency: Urgency
    exclusive: bool = False
    """With nothing beside it, whatever it has to wait for."""


@dataclass(frozen=True, slots=True)
class CancelRerun:
    rerun_id: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Admit nothing more; finish what there is. Answered by Drained, sooner or later."""


@dataclass(frozen=True, slots=True)
class DrainEnd:
    """Finish nothing more."""


Event = (
    Admit
    | Numbered
    | NotNumbered
    | Recovered
    | Connected
    | Regraded
    | Disconnected
    | Started
    | Finished
    | Failed
    | Ended
    | CancelItems
    | CancelBatch
    | Rerun
    | CancelRerun
    | Tick
    | Drain
    | DrainEnd
)


@dataclass(frozen=True, slots=True)
class AppendAdmission:
    """Make the batch durable, then tell Numbered or NotNumbered."""

    batch_id: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The batch gets no numbers."""

    batch_id: int
    error: OstinatoError


@dataclass(frozen=True, slots=True)
class Submit:
    """Hand the item to the engine, after every Submit before it."""

    run_id: int
    sequence: int
    attempt: int
    expires_at: float
    company: int
    """Runs that the engine holds now, this one included."""


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
    """Make the outcome durable, then tell Ended."""

    sequence: int
    attempt: int
    error: OstinatoError | None
    """None: COMPLETED, with the output that Finished came with. Else Cancelled and Abandoned have kinds of their own, and the
    rest is FAILED."""


@dataclass(frozen=True, slots=True)
class LeaveToRecovery:
    """This process will not finish the item, and the next one will: who waits for it must come back."""

    sequence: int


@dataclass(frozen=True, slots=True)
class RerunLost:
    """The rerun will not run, or not to its end."""

    rerun_id: int
    error: OstinatoError


@dataclass(frozen=True, slots=True)
class Fault:
    """The service said what it must not: drop the stream (Disconnected follows)."""

    error: OstinatoError


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing is left that this process will finish."""


Effect = AppendAdmission | Refuse | Submit | SubmitRerun | CancelRun | End | LeaveToRecovery | RerunLost | Fault | Drained
