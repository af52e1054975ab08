"""A number and where it stands, and the limits it lives under."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeVar

from sidecar.core.events import Need

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Named limits; each comes from a setting of the same name."""

    queue_items_max: int
    window_runs_max: int
    """0: twice what the engine runs at once."""
    attempts_max: int
    item_timeout_seconds: float
    tenant_queue_items_max: int = sys.maxsize
    """Of one tenant, before they are numbered."""
    numbered_items_max: int = sys.maxsize
    """That are numbered and wait for the engine; more wait before they are."""
    reruns_max: int = 256
    """That wait, of each urgency."""
    reruns_share: float = 0.25
    """Of the engine, held at most by runs that no caller of Generate waits for."""
    overdue_seconds: float = 1.0
    """How long past its time a run may be silent before it is given up here."""
    retry_after_seconds: float = 1.0


SCARES_MAX = 4
"""An engine that dies too quickly to say what it began blames nobody; from then on, what it held is tried one at a time."""


class Phase(Enum):
    WAITING = auto()
    """For room, in order."""
    SUBMITTED = auto()
    STARTED = auto()
    ENDING = auto()
    """Its outcome is on the way to the disk."""


@dataclass(slots=True, eq=False)
class Item:
    """An admitted item that has no durable outcome yet."""

    sequence: int
    ticket: int
    """Of its call; 0 where that was in an earlier epoch."""
    need: Need
    keyed: bool
    deadline: float | None
    first_attempt: int = 1
    """More than 1 if earlier epochs had it."""
    attempt: int = field(init=False)
    """The newest that was submitted, and the first one until then: its outcome is that one's."""
    phase: Phase = Phase.WAITING
    run_id: int = 0
    expires_at: float = 0.0
    losses: int = 0
    """Engines that were lost under it after Started, or with nothing beside it."""
    scares: int = 0
    """Engines that were lost before they began it, with others beside it."""

    def __post_init__(self) -> None:
        self.attempt = self.first_attempt

    @property
    def suspect(self) -> bool:
        """Whether it may be what kills the engine; it then runs with nothing beside it."""
        return self.losses >= 2 or self.scares >= SCARES_MAX

    def lost(self) -> None:
        """The engine that held it is gone. With nothing beside it, it is held against it, begun or not."""
        if self.phase is Phase.STARTED or self.suspect:
            self.losses += 1
        else:
            self.scares += 1
        self.phase = Phase.WAITING

    def overdue_at(self, overdue_seconds: float) -> float | None:
        """When its time is over, where it stands now; None: never."""
        match self.phase:
            case Phase.WAITING:
                return self.deadline
            case Phase.SUBMITTED | Phase.STARTED:
                return self.expires_at + overdue_seconds
            case Phase.ENDING:
                return None

    @property
    def why_overdue(self) -> str:
        waited = self.phase is Phase.WAITING
        return "the deadline passed while it waited" if waited else "its time passed and the engine was silent"


def numbered(by_sequence: Mapping[int, T], first: int, last: int) -> list[T]:
    """Those numbered first to last, without looking at more than there are, or than were asked for."""
    if last - first < len(by_sequence):
        return [by_sequence[sequence] for sequence in range(first, last + 1) if sequence in by_sequence]
    return [each for sequence, each in by_sequence.items() if first <= sequence <= last]
