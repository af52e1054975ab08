"""Journal entries as events about divergence. No other module interprets entries for this purpose. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ostinato import enums
from ostinato.v1 import sequencer_pb2, types_pb2

FAILED = "failed"
"""The drift of a comparison whose second run made no output."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A journal index, and the writer's time there."""

    index: int
    unix_millis: int


@dataclass(frozen=True, slots=True)
class GroupKey:
    """Comparisons are counted by this."""

    kind: str
    """A metric label: twin, audit, …"""
    grade: str
    """A metric label: exact, serial, best_effort."""
    fingerprint: str
    """Digest of the second run's fingerprint, in hexadecimal. Empty if there was no second run."""
    other_replica: bool
    """Whether another sidecar recorded the first run."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One comparison."""

    at: Moment
    key: GroupKey
    comparison: types_pb2.Comparison

    @property
    def diverged(self) -> bool:
        return self.comparison.verdict == types_pb2.VERDICT_DIVERGED

    @property
    def drift(self) -> tuple[str, ...]:
        """Why the runs are incomparable. Empty if they were compared."""
        if self.comparison.verdict != types_pb2.VERDICT_INCOMPARABLE:
            return ()
        return tuple(self.comparison.drift) or (FAILED,)


@dataclass(frozen=True, slots=True)
class CollisionCheck:
    """An unseeded output was compared with those of other seeds."""

    at: Moment
    sequence: int
    collides: bool


Event = Compared | CollisionCheck


def events(header: types_pb2.EntryHeader, payload: bytes) -> Iterator[Event]:
    """The events of one entry, in order. There are none if its payload was dropped."""
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
