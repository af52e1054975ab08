"""The tally as metrics: read when Prometheus asks, so they say what the journal says, also after a restart.

Counters go on where they were, as they count entries and not what one process saw. The newest fingerprint has the gauges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sidecar.divergence.statistics import span_first
from sidecar.divergence.stratum import Stratum
from sidecar.divergence.tally import Tally

SPANS = 18
"""Of the token index, up to 2^17 - 1; what lies beyond is in +Inf."""


class Numbers(Collector):
    """Asks for the tally at every scrape, from the scrape's thread. Without one nothing is served: a counter that stood at 0
    while a start reads what was counted would look as if all of it had happened since."""

    def __init__(self, tally: Callable[[], Tally | None]) -> None:
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        tally = self._tally()
        if tally is None:
            return
        yield from _comparisons(tally)
        yield _first_difference(tally)
        yield from _judgement(tally)
        lost = [((kind, why), count) for kind, reasons in tally.not_compared.items() for why, count in reasons.items()]
        yield _counter("not_compared", "Second runs that were due and brought no verdict.", ("kind", "reason"), lost)
        yield _counter(
            "collision_checks", "Unseeded outputs compared with those of equal inputs.", (), [((), tally.collision_checks)]
        )
        yield _counter(
            "collisions", "Unseeded outputs that were equal to an earlier one of another seed.", (), [((), tally.collisions)]
        )


def _comparisons(tally: Tally) -> Iterator[Metric]:
    comparisons, tokens, drift = Counter[tuple[str, ...]](), Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for stratum in tally.counted:
        kind, grade = stratum.key.kind, stratum.key.grade
        verdicts = {"match": stratum.matched, "diverged": stratum.diverged, "incomparable": stratum.incomparable}
        for verdict, count in verdicts.items():
            comparisons[kind, grade, verdict, "other" if stratum.key.other_replica else "same"] += count
        tokens[kind, grade] += stratum.compared_tokens
        drift.update({(kind, name or "others"): count for name, count in stratum.drift.items()})
    yield _counter("comparisons", "Verdicts.", ("kind", "grade", "verdict", "replica"), comparisons.items())
    yield _counter("compared_tokens", "Tokens compared, up to the first difference.", ("kind", "grade"), tokens.items())
    yield _counter(
        "drift", "Incomparable ones by what differed; one may count under several.", ("kind", "field"), drift.items()
    )


def _first_difference(tally: Tally) -> Metric:
    family = HistogramMetricFamily(
        "ostinato_first_difference_token", "Index of the first differing token.", labels=("kind", "grade")
    )
    diverged: dict[tuple[str, str], list[int]] = {}
    tokens = Counter[tuple[str, str]]()
    for stratum in tally.counted:
        kind = stratum.key.kind, stratum.key.grade
        counts = diverged.setdefault(kind, [0] * (SPANS + 1))
        for number, ended in enumerate(stratum.spans):
            counts[min(number, SPANS)] += ended.diverged
            tokens[kind] += ended.diverged_tokens
    bounds = [str(float(span_first(number + 1) - 1)) for number in range(SPANS)] + ["+Inf"]
    for kind, counts in diverged.items():
        if any(counts):
            family.add_metric(kind, list(zip(bounds, accumulate(counts), strict=True)), tokens[kind])
    return family


def _judgement(tally: Tally) -> Iterator[Metric]:
    newest = tally.newest().items()
    gauges: tuple[tuple[str, str, Callable[[Stratum], float]], ...] = (
        ("rate", "Share of the newest 1,000 comparisons that diverged.", lambda stratum: stratum.recent_rate().value),
        ("rate_lower", "Its lower bound, 95 % confidence.", lambda stratum: stratum.recent_rate().lower),
        ("rate_upper", "Its upper bound, 95 % confidence.", lambda stratum: stratum.recent_rate().upper),
        (
            "evidence_log10",
            "Logarithm of the evidence that more than 1 in 1,000 diverges.",
            lambda stratum: stratum.evidence.log10,
        ),
        ("alarm", "1 while that evidence is 100 or more.", lambda stratum: stratum.evidence.alarm),
    )
    for name, text, value in gauges:
        gauge = GaugeMetricFamily(f"ostinato_divergence_{name}", text, labels=("kind", "grade"))
        for kind, stratum in newest:
            gauge.add_metric(kind, value(stratum))
        yield gauge


def _counter(name: str, text: str, names: tuple[str, ...], counts: Iterable[tuple[tuple[str, ...], int]]) -> Metric:
    family = CounterMetricFamily(f"ostinato_{name}", text, labels=names)
    for values, count in counts:
        family.add_metric(values, count)
    return family
