"""Comparisons counted by group, and kept through restarts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TypeVar

import msgspec

from ostinato import enums, errors
from ostinato.v1 import types_pb2

from sidecar.divergence.statistics import CONFIDENCE, Ended, Evidence, Rate, span_of
from sidecar.divergence.verdicts import CollisionCheck, Compared, Event, GroupKey, Moment, NotCompared, events
from sidecar.journal.model import Note, Sealed
from sidecar.journal.writer import Journal

T = TypeVar("T")

WINDOW_COMPARISONS = 1_000
"""The newest ones, over which a rate of today is taken."""
SAMPLINGS_MAX = 32
"""Of the ways to sample that are told apart."""
DRIFT_MAX = 64
"""Of the names of what drifted."""
BUCKET_MILLIS = 60_000
"""The finest time that is told apart, at first."""
BUCKETS_MAX = 96
"""Of time: one more, and the buckets get twice as wide."""


@dataclass(frozen=True, slots=True)
class Share:
    """How many of the compared diverged."""

    compared: int = 0
    diverged: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.compared + other.compared, self.diverged + other.diverged)

    @property
    def worst_first(self) -> tuple[float, int]:
        """Sorts by how often it diverges, then by how often it was compared."""
        return (-self.diverged / self.compared if self.compared else 0.0, -self.compared)


@dataclass(frozen=True, slots=True)
class Series:
    """Shares over time, coarser the longer it gets."""

    bucket_millis: int = BUCKET_MILLIS
    buckets: Mapping[int, Share] = field(default_factory=dict)
    """By number: Unix time divided by the width."""

    def after(self, unix_millis: int, share: Share) -> Series:
        """And this. A clock that was set back fills older buckets."""
        number = unix_millis // self.bucket_millis
        series = Series(self.bucket_millis, {**self.buckets, number: self.buckets.get(number, Share()) + share})
        while len(series.buckets) > BUCKETS_MAX:
            series = series._coarser()
        return series

    def _coarser(self) -> Series:
        buckets: dict[int, Share] = {}
        for number, share in self.buckets.items():
            buckets[number // 2] = buckets.get(number // 2, Share()) + share
        return Series(2 * self.bucket_millis, buckets)


@dataclass(frozen=True, slots=True)
class Group:
    """All that is known of comparisons that are alike."""

    key: GroupKey
    first: Moment
    last: Moment
    matched: int = 0
    diverged: int = 0
    incomparable: int = 0
    drift: Mapping[str, int] = field(default_factory=dict)
    """Incomparable ones by the names of what differed; one may count under several."""
    evidence: Evidence = field(default_factory=Evidence)
    alarmed: Moment | None = None
    """When the alarm first went up."""
    first_diverged: Moment | None = None
    last_diverged: Moment | None = None
    recent: str = ""
    """The newest comparisons, newest last: 1 diverged, 0 did not."""
    spans: tuple[Ended, ...] = ()
    """By span of the token index up to which runs were equal; see `statistics`."""
    samplings: Mapping[str, Share] = field(default_factory=dict)
    companies: tuple[Share, ...] = ()
    """By bit length of the company: not known, 1, 2-3, 4-7, …"""
    series: Series = field(default_factory=Series)

    @property
    def compared(self) -> int:
        return self.matched + self.diverged

    @property
    def compared_tokens(self) -> int:
        """Up to the first difference."""
        return _tokens(self.spans)

    def recent_rate(self, confidence: float = CONFIDENCE) -> Rate:
        """Of a comparison to diverge, over the newest ones."""
        return Rate(self.recent.count("1"), len(self.recent), confidence)

    def token_rate(self, confidence: float = CONFIDENCE) -> Rate:
        """Of a token to be the first that differs: the differing ones were tried too."""
        diverged = sum(each.diverged for each in self.spans)
        return Rate(diverged, self.compared_tokens + diverged, confidence)

    def after(self, event: Compared) -> Group:
        """With one verdict more."""
        assert event.key == self.key
        if event.drift:
            return replace(self, last=event.at, incomparable=self.incomparable + 1, drift=_count(self.drift, event.drift))
        diverged, comparison = event.diverged, event.comparison
        share, evidence = Share(1, int(diverged)), self.evidence.after(diverged=diverged)
        company = comparison.company.bit_length()
        companies = _padded(self.companies, company, Share())
        return replace(
            self,
            last=event.at,
            matched=self.matched + (not diverged),
            diverged=self.diverged + diverged,
            evidence=evidence,
            alarmed=self.alarmed or (event.at if evidence.alarm else None),
            first_diverged=self.first_diverged or (event.at if diverged else None),
            last_diverged=event.at if diverged else self.last_diverged,
            recent=(self.recent + "01"[diverged])[-WINDOW_COMPARISONS:],
            spans=self._spans_after(comparison),
            samplings=_sampled(self.samplings, comparison.sampling, share),
            companies=_put(companies, company, companies[company] + share),
            series=self.series.after(event.at.unix_millis, share),
        )

    def _spans_after(self, comparison: types_pb2.Comparison) -> tuple[Ended, ...]:
        """Where it is not known where two outputs part, nothing is said of tokens."""
        diverged = comparison.verdict == types_pb2.VERDICT_DIVERGED
        if diverged and not comparison.HasField("first_difference"):
            return self.spans
        number = span_of(comparison.compared_tokens)
        spans = _padded(self.spans, number, Ended())
        return _put(spans, number, spans[number].after(comparison.compared_tokens, diverged=diverged))


@dataclass(frozen=True, slots=True)
class RetiredGroups:
    """The sum of groups of one kind, grade and replica whose fingerprints are not told apart any more: what counters need."""

    key: GroupKey
    """Its fingerprint is empty."""
    matched: int = 0
    diverged: int = 0
    incomparable: int = 0
    drift: Mapping[str, int] = field(default_factory=dict)
    spans: tuple[Ended, ...] = ()

    @property
    def compared_tokens(self) -> int:
        """Up to the first difference."""
        return _tokens(self.spans)

    def after(self, group: Group) -> RetiredGroups:
        """And this group. Names are not moved to the empty one, or the count of one would go down: there are no more of them
        than a service's fingerprint has fields."""
        drift = Counter(self.drift)
        drift.update(group.drift)
        spans = tuple(one + other for one, other in zip_longest(self.spans, group.spans, fillvalue=Ended()))
        return RetiredGroups(
            self.key,
            self.matched + group.matched,
            self.diverged + group.diverged,
            self.incomparable + group.incomparable,
            dict(drift),
            spans,
        )


def _tokens(spans: tuple[Ended, ...]) -> int:
    return sum(each.diverged_tokens + each.clean_tokens for each in spans)


def _padded(row: tuple[T, ...], number: int, empty: T) -> tuple[T, ...]:
    return row + (empty,) * (number + 1 - len(row))


def _put(row: tuple[T, ...], number: int, value: T) -> tuple[T, ...]:
    return (*row[:number], value, *row[number + 1 :])


def _count(counts: Mapping[str, int], names: tuple[str, ...]) -> Mapping[str, int]:
    """Names beyond the most are counted together, under the empty one."""
    counted = dict(counts)
    for name in names:
        known = name if name in counted or len(counted) < DRIFT_MAX else ""
        counted[known] = counted.get(known, 0) + 1
    return counted


def _sampled(shares: Mapping[str, Share], sampling: str, share: Share) -> Mapping[str, Share]:
    """What diverges most stays. A way to sample that comes back after it was dropped begins at 0."""
    kept = {**shares, sampling: shares.get(sampling, Share()) + share}
    if len(kept) > SAMPLINGS_MAX:
        del kept[min((name for name in kept if name != sampling), key=lambda name: (kept[name].diverged, kept[name].compared))]
    return kept


GROUPS_MAX = 256
"""One more, and the one that was counted in longest ago is forgotten but for its sums."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Never changed, only replaced."""

    groups: tuple[Group, ...] = ()
    """In the order in which they were last counted in, so that the newest fingerprints are last."""
    forgotten: tuple[RetiredGroups, ...] = ()
    """The sums of groups that were dropped: counters add them, since they must never go down."""
    collision_checks: int = 0
    collisions: int = 0
    not_compared: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Second runs that brought no verdict, by kind and reason. Not in the journal: what a kill -9 finds unsaved is lost."""

    def after(self, event: Event) -> Counts:
        """With one event more."""
        match event:
            case Compared():
                return self._compared(event)
            case CollisionCheck(collides=collides):
                checks, found = self.collision_checks + 1, self.collisions + collides
                return replace(self, collision_checks=checks, collisions=found)
            case NotCompared(kind, reason):
                reasons = self.not_compared.get(kind, {})
                reasons = {**reasons, reason: reasons.get(reason, 0) + 1}
                return replace(self, not_compared={**self.not_compared, kind: reasons})

    def _compared(self, event: Compared) -> Counts:
        others = tuple(each for each in self.groups if each.key != event.key)
        group = self.group(event.key) or Group(event.key, event.at, event.at)
        groups = (*others, group.after(event))
        forgotten = self.forgotten
        for dropped in groups[:-GROUPS_MAX]:
            forgotten = _forget(forgotten, dropped)
        return replace(self, groups=groups[-GROUPS_MAX:], forgotten=forgotten)

    @property
    def counted(self) -> tuple[Group | RetiredGroups, ...]:
        """All that was ever compared."""
        return (*self.groups, *self.forgotten)

    def group(self, key: GroupKey) -> Group | None:
        """None: nothing was compared that is like this."""
        return next((each for each in self.groups if each.key == key), None)

    def newest(self) -> Mapping[tuple[str, str], Group]:
        """Of every kind and grade the group to look at: of those of its newest fingerprint, the one with most evidence."""
        fingerprints = {(each.key.kind, each.key.grade): each.key.fingerprint for each in self.groups}
        current = [each for each in self.groups if fingerprints[each.key.kind, each.key.grade] == each.key.fingerprint]
        return {(each.key.kind, each.key.grade): each for each in sorted(current, key=lambda each: each.evidence.log)}


def _forget(forgotten: tuple[RetiredGroups, ...], group: Group) -> tuple[RetiredGroups, ...]:
    key = replace(group.key, fingerprint="")
    others = tuple(each for each in forgotten if each.key != key)
    sums = next((each for each in forgotten if each.key == key), RetiredGroups(key))
    return (*others, sums.after(group))


log = logging.getLogger(__name__)

SAVE_ENTRIES = 4_096
"""Saved at the latest after so many entries,"""
SAVE_SECONDS = 30.0
"""or so many seconds: a start has to read no more than was written since."""
PAGE_ENTRIES = 256
"""Read at once."""
VERSION = 2
"""Of what is kept. Another is not read, and the journal is counted anew."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is kept: a counts, and the newest entry that is counted in."""

    version: int = VERSION
    index: int = 0
    counts: Counts = field(default_factory=Counts)


class DivergenceTracker:
    """The writer's counts. Entries of other writers on the same log are theirs to count."""

    def __init__(self, writer: str) -> None:
        self._writer = writer
        self._name = f"divergence/{writer}"
        self._page = self._saved = Checkpoint()
        self._early: list[Sealed] | None = []
        """Committed before what is older was counted in: a takeover may end items during the start. None: it was."""
        self._due = asyncio.Event()

    @property
    def counts(self) -> Counts:
        return self._page.counts

    @property
    def counted(self) -> Counts | None:
        """The counts; None: what was counted before this start has not been read yet."""
        return self.counts if self._early is None else None

    @property
    def index(self) -> int:
        """Of the newest entry that is counted in."""
        return self._page.index

    async def restore(self, journal: Journal) -> None:
        """Read what was kept, and count what came after it. Once; what is committed meanwhile is counted at the end, from
        memory, since the journal may have dropped its payload."""
        assert self._early is not None
        head = (await journal.head()).index
        if self._early:
            head = self._early[0].header.index - 1
        self._page = self._saved = _read((await journal.notes(self._name)).get(self._name), head)
        while page := await journal.entries(self.index + 1, min(PAGE_ENTRIES, head - self.index), payloads=True):
            self._count(page)
        log.info("divergence restored", extra={"index": self.index, "read": self.index - self._saved.index})
        early, self._early = self._early, None
        self.committed(early)

    def committed(self, entries: Sequence[Sealed]) -> None:
        """These are durable; ascending, and after all that was counted before."""
        if self._early is not None:
            self._early += entries
            return
        for event in self._count(entries):
            _say(event)
        if self.index - self._saved.index >= SAVE_ENTRIES:
            self._due.set()

    def not_compared(self, kind: types_pb2.ComparisonKind.ValueType, reason: str) -> None:
        """A second run was due and brought no verdict: an audit that was chosen and did not run, say."""
        lost = NotCompared(enums.word(types_pb2.ComparisonKind, kind).lower(), reason)
        self._page = Checkpoint(index=self.index, counts=self.counts.after(lost))

    async def keep(self, journal: Journal) -> None:
        """Save now and then, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), SAVE_SECONDS)
            self._due.clear()
            await self.save(journal)

    async def save(self, journal: Journal) -> None:
        """What has changed. Where the journal is full, the next start has the more to read."""
        page = self._page
        if page is not self._saved:
            with contextlib.suppress(errors.Refused):
                await journal.append(Note(self._name, msgspec.json.encode(page)))
                self._saved = page

    def _count(self, entries: Sequence[Sealed]) -> list[Compared | CollisionCheck]:
        if not entries:
            return []
        assert entries[0].header.index > self.index, "an entry is counted once"
        own = [entry for entry in entries if entry.header.writer == self._writer]
        found = [event for entry in own for event in events(entry.header, entry.payload)]
        counts = self.counts
        for event in found:
            counts = counts.after(event)
        self._page = Checkpoint(index=entries[-1].header.index, counts=counts)
        return found


def _read(kept: bytes | None, head: int) -> Checkpoint:
    """An empty page where nothing is kept that can be believed."""
    if kept is None:
        return Checkpoint()
    try:
        page = msgspec.json.decode(kept, type=Checkpoint)
    except (msgspec.DecodeError, ValueError) as error:
        log.warning("what was counted cannot be read, and is counted anew: %s", error)
        return Checkpoint()
    if page.version != VERSION or page.index > head:
        log.warning("what was counted is of another version or journal, and is counted anew")
        return Checkpoint()
    return page


def _say(event: Compared | CollisionCheck) -> None:
    """A collision is said by the observer, which has the item's parameters."""
    if isinstance(event, Compared) and event.diverged:
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
