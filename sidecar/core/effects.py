"""What the core asks for, to be performed in its order."""

from __future__ import annotations

from dataclasses import dataclass

from ostinato.errors import OstinatoError


@dataclass(frozen=True, slots=True)
class AppendAdmission:
    """Make the batch durable, then tell Numbered or NotNumbered."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The batch gets no numbers."""

    ticket: int
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
