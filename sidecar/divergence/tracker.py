"""Comparisons, counted by kind, grade, fingerprint and replica, and kept through restarts.

`Counts` is a pure fold over events. `DivergenceTracker` feeds it with the journal's entries and saves a checkpoint as a note
beside the chain, so that a start has to read only the entries since then.

1. An entry is counted exactly once: entries are counted in ascending order of their indexes, and the checkpoint holds the index
   of the newest that is included.
2. No counter ever decreases: if there are too many groups, the sums of the oldest are kept.
3. The size is bounded, however much is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import starmap
from typing import TypeVar

import msgspec

from ostinato import enums, errors
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.divergence.statistics import Evidence, Series, Share
from sidecar.journal.model import Note, Sealed
from sidecar.journal.writer import Journal

log = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V", int, Share)

GROUPS_MAX = 256
"""Groups. If there would be more, the one that was least recently counted is reduced to its sums."""
WINDOW_COMPARISONS = 1_000
"""The newest comparisons of a group, for its recent rate."""
SAMPLINGS_MAX = 32
"""Sampling labels in a group."""
DRIFT_MAX = 64
"""Names of drifted fields in a group."""

FAILED = "failed"
"""The drift of a comparison whose second run made no output."""

SAVE_ENTRIES = 4_096
"""A checkpoint is saved after this many entries,"""
SAVE_SECONDS = 30.0
"""or after this time."""
PAGE_ENTRIES = 256
"""Entries in one read of the journal."""
VERSION = 2
"""Of the checkpoint's format. One of another version is ignored, and the journal is counted from its start."""


# ---- journal entries as events


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

    collides: bool


Event = Compared | CollisionCheck


def events(entry: Sealed) -> Iterator[Event]:
    """The events of one entry, in order. There are none if its payload was dropped."""
    header = entry.header
    at = Moment(header.index, header.time_unix_millis)
    if header.kind == types_pb2.ENTRY_KIND_COMPLETED:
        completed = entry.read(sequencer_pb2.CompletedPayload)
        if completed.HasField("twin"):
            yield _compared(at, header, completed.twin)
        if completed.collision:
            yield CollisionCheck(completed.collision == sequencer_pb2.COLLISION_FOUND)
    elif header.kind == types_pb2.ENTRY_KIND_AUDITED:
        comparison = entry.read(sequencer_pb2.AuditedPayload).comparison
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


# ---- counts


@dataclass(frozen=True, slots=True)
class Sums:
    """What counters are made of. Sums of different groups can be added."""

    matched: int = 0
    diverged: int = 0
    incomparable: int = 0
    drift: Mapping[str, int] = field(default_factory=dict)
    """Incomparable runs by the field that differed. A run may count under several. "" stands for all names beyond DRIFT_MAX."""
    compared_tokens: int = 0
    """Tokens before the first difference."""
    first_differences: Mapping[int, int] = field(default_factory=dict)
    """Diverged comparisons by the bit length of the index of the first differing token."""
    first_difference_tokens: int = 0
    """The sum of these indexes."""

    @property
    def compared(self) -> int:
        return self.matched + self.diverged

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.matched + other.matched,
            self.diverged + other.diverged,
            self.incomparable + other.incomparable,
            _merged(self.drift, other.drift),
            self.compared_tokens + other.compared_tokens,
            _merged(self.first_differences, other.first_differences),
            self.first_difference_tokens + other.first_difference_tokens,
        )


@dataclass(frozen=True, slots=True)
class Group:
    """The comparisons with one key."""

    key: GroupKey
    first: Moment
    last: Moment
    sums: Sums = field(default_factory=Sums)
    evidence: Evidence = field(default_factory=Evidence)
    alarmed: Moment | None = None
    """When the alarm was first raised."""
    first_diverged: Moment | None = None
    last_diverged: Moment | None = None
    recent: str = ""
    """The newest comparisons, the newest last: 1 if it diverged, else 0."""
    samplings: Mapping[str, Share] = field(default_factory=dict)
    companies: Mapping[int, Share] = field(default_factory=dict)
    """By bit length of the batch occupancy, which is 0 if unknown."""
    series: Series = field(default_factory=Series)

    @property
    def recent_share(self) -> Share:
        """Of the newest comparisons."""
        return Share(len(self.recent), self.recent.count("1"))

    @property
    def token_share(self) -> Share:
        """First differences among the compared token positions. The differing position was compared too."""
        diverged = sum(self.sums.first_differences.values())
        return Share(self.sums.compared_tokens + diverged, diverged)

    def after(self, event: Compared) -> Group:
        """The group after one more comparison."""
        assert event.key == self.key
        sums, diverged, comparison = self.sums, event.diverged, event.comparison
        if event.drift:
            drift = sums.drift
            for name in event.drift:
                drift = _plus(drift, name if name in drift or len(drift) < DRIFT_MAX else "", 1)
            return replace(self, last=event.at, sums=replace(sums, incomparable=sums.incomparable + 1, drift=drift))
        share, evidence = Share(1, int(diverged)), self.evidence.after(diverged=diverged)
        return replace(
            self,
            last=event.at,
            sums=sums + _sums_of(comparison, diverged=diverged),
            evidence=evidence,
            alarmed=self.alarmed or (event.at if evidence.alarm else None),
            first_diverged=self.first_diverged or (event.at if diverged else None),
            last_diverged=event.at if diverged else self.last_diverged,
            recent=(self.recent + "01"[diverged])[-WINDOW_COMPARISONS:],
            samplings=_limited(_plus(self.samplings, comparison.sampling, share), comparison.sampling),
            companies=_plus(self.companies, comparison.company.bit_length(), share),
            series=self.series.after(event.at.unix_millis, share),
        )


def _sums_of(comparison: types_pb2.Comparison, *, diverged: bool) -> Sums:
    """If it is not known where two outputs differ, tokens are not counted."""
    tokens = comparison.compared_tokens
    if not diverged:
        return Sums(matched=1, compared_tokens=tokens)
    if not comparison.HasField("first_difference"):
        return Sums(diverged=1)
    return Sums(diverged=1, compared_tokens=tokens, first_differences={tokens.bit_length(): 1}, first_difference_tokens=tokens)


def _limited(samplings: Mapping[str, Share], newest: str) -> Mapping[str, Share]:
    """Without the label that diverged least, if there are too many. A label that is dropped and comes back starts at 0."""
    if len(samplings) <= SAMPLINGS_MAX:
        return samplings
    others = (name for name in samplings if name != newest)
    dropped = min(others, key=lambda name: (samplings[name].diverged, samplings[name].compared))
    return {name: share for name, share in samplings.items() if name != dropped}


def _plus(counts: Mapping[K, V], key: K, value: V) -> Mapping[K, V]:
    """The mapping with this value added at the key."""
    return {**counts, key: counts[key] + value if key in counts else value}


def _merged(counts: Mapping[K, int], more: Mapping[K, int]) -> Mapping[K, int]:
    return {**counts, **{key: counts.get(key, 0) + value for key, value in more.items()}}


@dataclass(frozen=True, slots=True)
class RetiredGroups:
    """The sums of groups that differ only in their fingerprints and are no longer kept apart."""

    key: GroupKey
    """Its fingerprint is empty."""
    sums: Sums


@dataclass(frozen=True, slots=True)
class Counts:
    """Everything that is counted. Immutable, so other threads may read it."""

    groups: tuple[Group, ...] = ()
    """In the order in which they were last counted, so the newest fingerprints are last."""
    retired: tuple[RetiredGroups, ...] = ()
    collision_checks: int = 0
    collisions: int = 0
    not_compared: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Second runs without a verdict, by kind and reason. Not in the journal: a crash loses those since the last checkpoint."""

    def after(self, event: Event) -> Counts:
        """The counts after one more event."""
        if isinstance(event, CollisionCheck):
            return replace(self, collision_checks=self.collision_checks + 1, collisions=self.collisions + event.collides)
        others = tuple(each for each in self.groups if each.key != event.key)
        group = next((each for each in self.groups if each.key == event.key), Group(event.key, event.at, event.at))
        groups = (*others, group.after(event))
        retired = self.retired
        for dropped in groups[:-GROUPS_MAX]:
            sums, key = {each.key: each.sums for each in retired}, replace(dropped.key, fingerprint="")
            sums[key] = sums.get(key, Sums()) + dropped.sums
            retired = tuple(starmap(RetiredGroups, sums.items()))
        return replace(self, groups=groups[-GROUPS_MAX:], retired=retired)

    @property
    def all_sums(self) -> tuple[tuple[GroupKey, Sums], ...]:
        """The sums of all comparisons since the journal's start."""
        return (*((each.key, each.sums) for each in self.groups), *((each.key, each.sums) for each in self.retired))

    def newest(self) -> Mapping[tuple[str, str], Group]:
        """By kind and grade, the group for the gauges: of the newest fingerprint, the replica with most evidence."""
        fingerprints = {(each.key.kind, each.key.grade): each.key.fingerprint for each in self.groups}
        current = [each for each in self.groups if fingerprints[each.key.kind, each.key.grade] == each.key.fingerprint]
        return {(each.key.kind, each.key.grade): each for each in sorted(current, key=lambda each: each.evidence.log)}


# ---- the checkpoint


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is saved: the counts, and the index of the newest entry that they include."""

    version: int = VERSION
    index: int = 0
    counts: Counts = field(default_factory=Counts)


class DivergenceTracker:
    """The counts of one writer. Entries of other writers on the same log are skipped: their sidecars count them."""

    def __init__(self, writer: str) -> None:
        self._writer = writer
        self._name = f"divergence/{writer}"
        self.checkpoint = self._saved = Checkpoint()
        self._early: list[Sealed] | None = []
        """Entries that were committed during `restore`, by a takeover for example. None after it."""
        self._save_now = asyncio.Event()

    @property
    def restored_counts(self) -> Counts | None:
        """The counts, or None before `restore` has ended."""
        return self.checkpoint.counts if self._early is None else None

    async def restore(self, journal: Journal) -> None:
        """Load the checkpoint and count the entries since. To be called once.

        Entries that are committed meanwhile are counted last, from memory: the journal may have dropped their payloads.
        """
        assert self._early is not None
        head = (await journal.head()).index
        if self._early:
            head = self._early[0].header.index - 1
        self.checkpoint = self._saved = _read((await journal.notes(self._name)).get(self._name), head)
        while page := await journal.entries(
            self.checkpoint.index + 1, min(PAGE_ENTRIES, head - self.checkpoint.index), payloads=True
        ):
            self._count(page)
        log.info(
            "divergence restored", extra={"index": self.checkpoint.index, "read": self.checkpoint.index - self._saved.index}
        )
        early, self._early = self._early, None
        self.committed(early)

    def committed(self, entries: Sequence[Sealed]) -> None:
        """Count entries that are durable now: ascending, and newer than all before."""
        if self._early is not None:
            self._early += entries
            return
        for event in self._count(entries):
            if isinstance(event, Compared) and event.diverged:  # the observer logs collisions: it has the item's parameters
                log.error(
                    "diverged",
                    extra={
                        "sequence": event.comparison.sequence,
                        "kind": event.key.kind,
                        "grade": event.key.grade,
                        "first_difference": event.comparison.first_difference,
                        "index": event.at.index,
                    },
                )
        if self.checkpoint.index - self._saved.index >= SAVE_ENTRIES:
            self._save_now.set()

    def not_compared(self, kind: types_pb2.ComparisonKind.ValueType, reason: str) -> None:
        """Count a second run that was due and gave no verdict."""
        word, counts = enums.word(types_pb2.ComparisonKind, kind).lower(), self.checkpoint.counts
        not_compared = {**counts.not_compared, word: _plus(counts.not_compared.get(word, {}), reason, 1)}
        self.checkpoint = replace(self.checkpoint, counts=replace(counts, not_compared=not_compared))

    async def run(self, journal: Journal) -> None:
        """Save checkpoints until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._save_now.wait(), SAVE_SECONDS)
            self._save_now.clear()
            await self.save(journal)

    async def save(self, journal: Journal) -> None:
        """Save a checkpoint if anything has changed. Does nothing if the journal is full."""
        checkpoint = self.checkpoint
        if checkpoint is not self._saved:
            with contextlib.suppress(errors.Refused):
                await journal.append(Note(self._name, msgspec.json.encode(checkpoint)))
                self._saved = checkpoint

    def _count(self, entries: Sequence[Sealed]) -> list[Event]:
        if not entries:
            return []
        assert entries[0].header.index > self.checkpoint.index, "invariant 1: an entry is counted once"
        own = [entry for entry in entries if entry.header.writer == self._writer]
        found = [event for entry in own for event in events(entry)]
        counts = self.checkpoint.counts
        for event in found:
            counts = counts.after(event)
        self.checkpoint = Checkpoint(index=entries[-1].header.index, counts=counts)
        return found


def _read(note: bytes | None, head: int) -> Checkpoint:
    """The checkpoint, or an empty one if the note is missing, damaged, of another version, or newer than the journal."""
    try:
        checkpoint = msgspec.json.decode(note, type=Checkpoint) if note is not None else Checkpoint()
        if checkpoint.version == VERSION and checkpoint.index <= head:
            return checkpoint
        why = "it is of another version or journal"
    except (msgspec.DecodeError, ValueError) as error:
        why = str(error)
    log.warning("the divergence checkpoint cannot be used; the journal is counted from its start", extra={"why": why})
    return Checkpoint()
