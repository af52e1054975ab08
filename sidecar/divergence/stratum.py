"""The counts of one kind, grade, fingerprint and replica. Pure, and bounded however long it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TypeVar

from ostinato.v1 import types_pb2

from sidecar.divergence.evidence import Evidence
from sidecar.divergence.statistics import CONFIDENCE, Ended, Rate, span_of
from sidecar.divergence.verdicts import Compared, Key, Moment

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
class Stratum:
    """All that is known of comparisons that are alike."""

    key: Key
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

    def after(self, event: Compared) -> Stratum:
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
class Forgotten:
    """The sum of strata of one kind, grade and replica whose fingerprints are not told apart any more: what counters need."""

    key: Key
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

    def after(self, stratum: Stratum) -> Forgotten:
        """And this stratum. Names are not moved to the empty one, or the count of one would go down: there are no more of them
        than a service's fingerprint has fields."""
        drift = Counter(self.drift)
        drift.update(stratum.drift)
        spans = tuple(one + other for one, other in zip_longest(self.spans, stratum.spans, fillvalue=Ended()))
        return Forgotten(
            self.key,
            self.matched + stratum.matched,
            self.diverged + stratum.diverged,
            self.incomparable + stratum.incomparable,
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
