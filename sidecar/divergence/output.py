"""The counts as metrics and as a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ostinato import enums
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.divergence.statistics import Rate, life_table, span_first
from sidecar.divergence.tracker import GROUPS_MAX, Counts, Group, Share
from sidecar.divergence.verdicts import Moment

SPANS = 18
"""Of the token index, up to 2^17 - 1; what lies beyond is in +Inf."""


class DivergenceCollector(Collector):
    """Asks for the counts at every scrape, from the scrape's thread. Without one nothing is served: a counter that stood at 0
    while a start reads what was counted would look as if all of it had happened since."""

    def __init__(self, counts: Callable[[], Counts | None]) -> None:
        self._tally = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._tally()
        if counts is None:
            return
        yield from _comparisons(counts)
        yield _first_difference(counts)
        yield from _judgement(counts)
        lost = [((kind, why), count) for kind, reasons in counts.not_compared.items() for why, count in reasons.items()]
        yield _counter("not_compared", "Second runs that were due and brought no verdict.", ("kind", "reason"), lost)
        yield _counter(
            "collision_checks", "Unseeded outputs compared with those of equal inputs.", (), [((), counts.collision_checks)]
        )
        yield _counter(
            "collisions", "Unseeded outputs that were equal to an earlier one of another seed.", (), [((), counts.collisions)]
        )


def _comparisons(counts: Counts) -> Iterator[Metric]:
    comparisons, tokens, drift = Counter[tuple[str, ...]](), Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for group in counts.counted:
        kind, grade = group.key.kind, group.key.grade
        verdicts = {"match": group.matched, "diverged": group.diverged, "incomparable": group.incomparable}
        for verdict, count in verdicts.items():
            comparisons[kind, grade, verdict, "other" if group.key.other_replica else "same"] += count
        tokens[kind, grade] += group.compared_tokens
        drift.update({(kind, name or "others"): count for name, count in group.drift.items()})
    yield _counter("comparisons", "Verdicts.", ("kind", "grade", "verdict", "replica"), comparisons.items())
    yield _counter("compared_tokens", "Tokens compared, up to the first difference.", ("kind", "grade"), tokens.items())
    yield _counter(
        "drift", "Incomparable ones by what differed; one may count under several.", ("kind", "field"), drift.items()
    )


def _first_difference(counts: Counts) -> Metric:
    family = HistogramMetricFamily(
        "ostinato_first_difference_token", "Index of the first differing token.", labels=("kind", "grade")
    )
    diverged: dict[tuple[str, str], list[int]] = {}
    tokens = Counter[tuple[str, str]]()
    for group in counts.counted:
        kind = group.key.kind, group.key.grade
        buckets = diverged.setdefault(kind, [0] * (SPANS + 1))
        for number, ended in enumerate(group.spans):
            buckets[min(number, SPANS)] += ended.diverged
            tokens[kind] += ended.diverged_tokens
    bounds = [str(float(span_first(number + 1) - 1)) for number in range(SPANS)] + ["+Inf"]
    for kind, buckets in diverged.items():
        if any(buckets):
            family.add_metric(kind, list(zip(bounds, accumulate(buckets), strict=True)), tokens[kind])
    return family


def _judgement(counts: Counts) -> Iterator[Metric]:
    newest = counts.newest().items()
    gauges: tuple[tuple[str, str, Callable[[Group], float]], ...] = (
        ("rate", "Share of the newest 1,000 comparisons that diverged.", lambda group: group.recent_rate().value),
        ("rate_lower", "Its lower bound, 95 % confidence.", lambda group: group.recent_rate().lower),
        ("rate_upper", "Its upper bound, 95 % confidence.", lambda group: group.recent_rate().upper),
        (
            "evidence_log10",
            "Logarithm of the evidence that more than 1 in 1,000 diverges.",
            lambda group: group.evidence.log10,
        ),
        ("alarm", "1 while that evidence is 100 or more.", lambda group: group.evidence.alarm),
    )
    for name, text, value in gauges:
        gauge = GaugeMetricFamily(f"ostinato_divergence_{name}", text, labels=("kind", "grade"))
        for kind, group in newest:
            gauge.add_metric(kind, value(group))
        yield gauge


def _counter(name: str, text: str, names: tuple[str, ...], counts: Iterable[tuple[tuple[str, ...], int]]) -> Metric:
    family = CounterMetricFamily(f"ostinato_{name}", text, labels=names)
    for values, count in counts:
        family.add_metric(values, count)
    return family


def report(
    counts: Counts, index: int, confidence: float, fingerprints: Mapping[bytes, types_pb2.Fingerprint]
) -> sequencer_pb2.ReportResponse:
    """Everything but log id and writer. Fingerprints by their digests."""
    seen = {bytes.fromhex(group.key.fingerprint) for group in counts.groups}
    return sequencer_pb2.ReportResponse(
        index=index,
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
    series = group.series
    return sequencer_pb2.Stratum(
        kind=enums.value(types_pb2.ComparisonKind, group.key.kind.upper()),
        grade=enums.value(types_pb2.Grade, group.key.grade.upper()),
        fingerprint_digest=bytes.fromhex(group.key.fingerprint),
        other_replica=group.key.other_replica,
        matched=group.matched,
        diverged=group.diverged,
        incomparable=group.incomparable,
        drift=group.drift,
        compared_tokens=group.compared_tokens,
        per_comparison=_rate(Rate(group.diverged, group.compared, confidence)),
        recent=_rate(group.recent_rate(confidence)),
        per_token=_rate(group.token_rate(confidence)),
        evidence_log10=group.evidence.log10,
        alarm=group.evidence.alarm,
        alarmed=_moment(group.alarmed),
        first=_moment(group.first),
        last=_moment(group.last),
        first_diverged=_moment(group.first_diverged),
        last_diverged=_moment(group.last_diverged),
        token_spans=_token_spans(group, confidence),
        samplings=[
            sequencer_pb2.SamplingShare(sampling=name, rate=_share(share, confidence))
            for name, share in sorted(group.samplings.items(), key=lambda item: item[1].worst_first)
        ],
        companies=[
            sequencer_pb2.CompanyShare(first=1 << length >> 1, last=(1 << length) - 1, rate=_share(share, confidence))
            for length, share in enumerate(group.companies)
            if share.compared
        ],
        times=[
            sequencer_pb2.TimeShare(
                time_unix_millis=number * series.bucket_millis,
                width_millis=series.bucket_millis,
                rate=_share(share, confidence),
            )
            for number, share in sorted(series.buckets.items())
        ],
    )


def _token_spans(group: Group, confidence: float) -> Iterable[sequencer_pb2.TokenSpan]:
    return [
        sequencer_pb2.TokenSpan(
            first=row.first,
            last=row.last,
            at_risk=row.at_risk,
            diverged=row.ended.diverged,
            censored=row.ended.clean,
            hazard=_rate(row.hazard),
            equal_before=row.equal_before,
        )
        for row in life_table(group.spans, confidence)
    ]


def _share(share: Share, confidence: float) -> sequencer_pb2.Rate:
    return _rate(Rate(share.diverged, share.compared, confidence))


def _rate(rate: Rate) -> sequencer_pb2.Rate:
    return sequencer_pb2.Rate(events=rate.events, trials=rate.trials, value=rate.value, lower=rate.lower, upper=rate.upper)


def _moment(moment: Moment | None) -> sequencer_pb2.Moment | None:
    return None if moment is None else sequencer_pb2.Moment(index=moment.index, time_unix_millis=moment.unix_millis)
