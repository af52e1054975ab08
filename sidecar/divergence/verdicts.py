"""What an entry of the journal says about divergence: the one place where entries become events. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ostinato import enums
from ostinato.v1 import sequencer_pb2, types_pb2

FAILED = "failed"
"""Stands among the names of what drifted where the second run made no output."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When, by the journal and by the writer's clock."""

    index: int
    unix_millis: int


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What comparisons are counted by."""

    kind: str
    """As a label: twin, audit, …"""
    grade: str
    """As a label: exact, serial, best_effort."""
    fingerprint: str
    """Hexadecimal digits of the second run's digest; empty where there was none."""
    other_replica: bool
    """Whether another sidecar recorded the first run."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One verdict."""

    at: Moment
    key: GroupKey
    comparison: types_pb2.Comparison

    @property
    def diverged(self) -> bool:
        return self.comparison.verdict == types_pb2.VERDICT_DIVERGED

    @property
    def drift(self) -> tuple[str, ...]:
        """Why nothing was compared; empty: it was."""
        if self.comparison.verdict != types_pb2.VERDICT_INCOMPARABLE:
            return ()
        return tuple(self.comparison.drift) or (FAILED,)


@dataclass(frozen=True, slots=True)
class CollisionCheck:
    """An unseeded output was held against those of other seeds."""

    at: Moment
    sequence: int
    collides: bool


@dataclass(frozen=True, slots=True)
class NotCompared:
    """A second run was due and brought no verdict. No entry says so."""

    kind: str
    reason: str


Event = Compared | CollisionCheck | NotCompared


def events(header: types_pb2.EntryHeader, payload: bytes) -> Iterator[Compared | CollisionCheck]:
    """Of one entry, in order; none where its payload was dropped."""
    at = Moment(header.index, header.time_unix_millis)
    if header.kind == types_pb2.ENTRY_KIND_COMPLETED:
        completed = sequencer_pb2.CompletedPayload.FromString(payload)
        if completed.HasField("twin"):
            yield _compared(at, header, completed.twin)
        if completed.collision:
            yield CollisionCheck(at, header.sequence, completed.collision == sequencer_pb2.COLLISION_FOUND)
    elif header.kind == types_pb2.ENTRY_KIND_AUDITED:
        comparison = sequencer_pb2.AuditedPayload.FromString(payload).comparison
        if comparison.verdict:
            yield _compared(at, header, comparison)


def _compared(at: Moment, header: types_pb2.EntryHeader, comparison: types_pb2.Comparison) -> Compared:
    key = GroupKey(
        enums.word(types_pb2.ComparisonKind, comparison.kind).lower(),
        enums.word(types_pb2.Grade, comparison.grade or header.grade).lower(),
        header.fingerprint_digest.hex(),
        comparison.expected_writer not in ("", header.writer),
    )
    return Compared(at, key, comparison)
