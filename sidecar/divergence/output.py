"""The counts as Prometheus metrics and as the response of `Sequencer.Report`.

Metrics are computed at each scrape. Counters count journal entries, so a restart does not reset them. Gauges show the newest
fingerprint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ostinato import enums
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.divergence.statistics import Share, bin_bounds
from sidecar.divergence.tracker import GROUPS_MAX, Checkpoint, Counts, Group, Moment

TOKEN_BINS = 18
"""Buckets of the first difference's index, up to 2^17 - 1. Larger indexes are in +Inf."""


class DivergenceCollector(Collector):
    """Reads the counts at each scrape, from the scrape's thread.

    Exports nothing while there are no counts: a counter that is 0 during a start would look like a reset, and its return like
    an increase.
    """

    def __init__(self, counts: Callable[[], Counts | None]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        if counts is None:
            return
        yield from _sums(counts)
        yield _first_difference(counts)
        yield from _gauges(counts)
        lost = [((kind, why), count) for kind, reasons in counts.not_compared.items() for why, count in reasons.items()]
        yield _counter("not_compared", "Second runs that were due and gave no verdict.", ("kind", "reason"), lost)
        checks, collisions = counts.collision_checks, counts.collisions
        yield _counter("collision_checks", "Unseeded outputs compared with those of equal inputs.", (), [((), checks)])
        yield _counter("collisions", "Unseeded outputs equal to one of another seed.", (), [((), collisions)])


def _sums(counts: Counts) -> Iterator[Metric]:
    comparisons, tokens, drift = Counter[tuple[str, ...]](), Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for key, sums in counts.all_sums:
        replica = "other" if key.other_replica else "same"
        for verdict in ("matched", "diverged", "incomparable"):
            label = "match" if verdict == "matched" else verdict
            comparisons[key.kind, key.grade, label, replica] += getattr(sums, verdict)
        tokens[key.kind, key.grade] += sums.compared_tokens
        drift.update({(key.kind, name or "others"): count for name, count in sums.drift.items()})
    yield _counter("comparisons", "Verdicts.", ("kind", "grade", "verdict", "replica"), comparisons.items())
    yield _counter("compared_tokens", "Tokens compared, up to the first difference.", ("kind", "grade"), tokens.items())
    yield _counter("drift", "Incomparable runs by what differed; a run may have several.", ("kind", "field"), drift.items())


def _first_difference(counts: Counts) -> Metric:
    buckets: dict[tuple[str, str], list[int]] = {}
    tokens = Counter[tuple[str, str]]()
    for key, sums in counts.all_sums:
        row = buckets.setdefault((key.kind, key.grade), [0] * (TOKEN_BINS + 1))
        for bits, count in sums.first_differences.items():
            row[min(bits, TOKEN_BINS)] += count
        tokens[key.kind, key.grade] += sums.first_difference_tokens
    family = HistogramMetricFamily(
        "ostinato_first_difference_token", "Index of the first differing token.", labels=("kind", "grade")
    )
    bounds = [str(float(bin_bounds(number)[1])) for number in range(TOKEN_BINS)] + ["+Inf"]
    for labels, row in buckets.items():
        if any(row):
            family.add_metric(labels, list(zip(bounds, accumulate(row), strict=True)), tokens[labels])
    return family


def _gauges(counts: Counts) -> Iterator[Metric]:
    newest = counts.newest().items()
    gauges: tuple[tuple[str, str, Callable[[Group], float]], ...] = (
        ("rate", "Share of the newest 1,000 comparisons that diverged.", lambda group: group.recent_share.value),
        ("rate_lower", "Its lower bound, 95 % confidence.", lambda group: group.recent_share.lower()),
        ("rate_upper", "Its upper bound, 95 % confidence.", lambda group: group.recent_share.upper()),
        ("evidence_log10", "Logarithm of the evidence that more than 1 in 1,000 diverges.", lambda group: group.evidence.log10),
        ("alarm", "1 while that evidence is 100 or more.", lambda group: group.evidence.alarm),
    )
    for name, text, value in gauges:
        gauge = GaugeMetricFamily(f"ostinato_divergence_{name}", text, labels=("kind", "grade"))
        for labels, group in newest:
            gauge.add_metric(labels, value(group))
        yield gauge


def _counter(name: str, text: str, labels: tuple[str, ...], counts: Iterable[tuple[tuple[str, ...], int]]) -> Metric:
    family = CounterMetricFamily(f"ostinato_{name}", text, labels=labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


def report(
    checkpoint: Checkpoint, confidence: float, fingerprints: Mapping[bytes, types_pb2.Fingerprint]
) -> sequencer_pb2.ReportResponse:
    """The response without log id and writer. `fingerprints`: by digest."""
    counts = checkpoint.counts
    seen = {bytes.fromhex(group.key.fingerprint) for group in counts.groups}
    return sequencer_pb2.ReportResponse(
        index=checkpoint.index,
        confidence=confidence,
        alarm=any(group.evidence.alarm for group in counts.groups),
        strata=[_stratum(group, confidence) for group in reversed(counts.groups)],
        fingerprints=[fingerprint for digest, fingerprint in sorted(fingerprints.items()) if digest in seen],
        collision_checks=counts.collision_checks,
        collisions=counts.collisions,
        not_compared=[
            sequencer_pb2.NotCompared(kind=enums.value(types_pb2.ComparisonKind, kind.upper()), reason=reason, count=count)
            for kind, reasons in sorted(counts.not_compared.items())
            for reason, count in sorted(reasons.items())
        ],
        strata_max=GROUPS_MAX,
    )


def _stratum(group: Group, confidence: float) -> sequencer_pb2.Stratum:
    sums, series = group.sums, group.series
    return sequencer_pb2.Stratum(
        kind=enums.value(types_pb2.ComparisonKind, group.key.kind.upper()),
        grade=enums.value(types_pb2.Grade, group.key.grade.upper()),
        fingerprint_digest=bytes.fromhex(group.key.fingerprint),
        other_replica=group.key.other_replica,
        matched=sums.matched,
        diverged=sums.diverged,
        incomparable=sums.incomparable,
        drift=sums.drift,
        compared_tokens=sums.compared_tokens,
        per_comparison=_rate(Share(sums.compared, sums.diverged), confidence),
        recent=_rate(group.recent_share, confidence),
        per_token=_rate(group.token_share, confidence),
        evidence_log10=group.evidence.log10,
        alarm=group.evidence.alarm,
        alarmed=_moment(group.alarmed),
        first=_moment(group.first),
        last=_moment(group.last),
        first_diverged=_moment(group.first_diverged),
        last_diverged=_moment(group.last_diverged),
        token_spans=[
            sequencer_pb2.TokenSpan(first=bin_bounds(bits)[0], last=bin_bounds(bits)[1], diverged=count)
            for bits, count in sorted(sums.first_differences.items())
        ],
        samplings=[
            sequencer_pb2.SamplingShare(sampling=name, rate=_rate(share, confidence))
            for name, share in sorted(group.samplings.items(), key=lambda item: (-item[1].value, -item[1].compared))
        ],
        companies=[
            sequencer_pb2.CompanyShare(first=bin_bounds(bits)[0], last=bin_bounds(bits)[1], rate=_rate(share, confidence))
            for bits, share in sorted(group.companies.items())
        ],
        times=[
            sequencer_pb2.TimeShare(
                time_unix_millis=number * series.bucket_millis,
                width_millis=series.bucket_millis,
                rate=_rate(share, confidence),
            )
            for number, share in sorted(series.buckets.items())
        ],
    )


def _rate(share: Share, confidence: float) -> sequencer_pb2.Rate:
    return sequencer_pb2.Rate(
        events=share.diverged,
        trials=share.compared,
        value=share.value,
        lower=share.lower(confidence),
        upper=share.upper(confidence),
    )


def _moment(moment: Moment | None) -> sequencer_pb2.Moment | None:
    return None if moment is None else sequencer_pb2.Moment(index=moment.index, time_unix_millis=moment.unix_millis)
