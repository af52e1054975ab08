"""The tally as a report and as metrics: both say what was counted, and agree."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.divergence.book import Book
from sidecar.divergence.numbers import Numbers
from sidecar.divergence.statistics import Rate
from sidecar.divergence.summary import report
from sidecar.divergence.tally import STRATA_MAX, Tally
from sidecar.divergence.verdicts import Checked, Compared, Key, Moment, NotCompared

MATCH, DIVERGED, INCOMPARABLE = types_pb2.VERDICT_MATCH, types_pb2.VERDICT_DIVERGED, types_pb2.VERDICT_INCOMPARABLE
OLD, NEW, OTHER = (
    Key("twin", "exact", name * 32, other_replica=other) for name, other in (("aa", False), ("bb", False), ("bb", True))
)


def made() -> Tally:
    """Two fingerprints, the newer one with two replicas; something of everything."""
    tally, index = Tally(), 0
    for key, verdict, tokens, company, sampling, times in (
        (OLD, DIVERGED, 5, 1, "greedy", 2),
        (OTHER, MATCH, 8, 0, "", 4),
        (NEW, MATCH, 8, 3, "top_k=40", 6),
        (NEW, DIVERGED, 200_000, 9, "greedy", 1),
        (NEW, INCOMPARABLE, 1, 1, "greedy", 1),
    ):
        for _ in range(times):
            index += 1
            said = types_pb2.Comparison(verdict=verdict, compared_tokens=tokens, company=company, sampling=sampling)
            said.drift.extend(["fingerprint.device"] if verdict == INCOMPARABLE else [])
            if verdict == DIVERGED:
                said.first_difference = tokens
            tally = tally.after(Compared(Moment(index, index * 60_000), key, said))
    for collides in (True, False, False):
        tally = tally.after(Checked(Moment(99, 1), 1, collides))
    return tally.after(NotCompared("audit", "busy"))


def metrics(tally: Tally | None) -> dict[str, float]:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(Numbers(lambda: tally))
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def test_metrics_are_sums_over_fingerprints() -> None:
    """Counters add up what was compared on any fingerprint, replicas apart; the histogram has every divergence."""
    seen = metrics(made())
    kind = 'grade="exact",kind="twin"'

    assert {name: value for name, value in seen.items() if name.startswith("ostinato_comparisons_total") and value} == {
        f'ostinato_comparisons_total{{{kind},replica="same",verdict="match"}}': 6,
        f'ostinato_comparisons_total{{{kind},replica="same",verdict="diverged"}}': 3,
        f'ostinato_comparisons_total{{{kind},replica="same",verdict="incomparable"}}': 1,
        f'ostinato_comparisons_total{{{kind},replica="other",verdict="match"}}': 4,
    }
    assert seen[f"ostinato_compared_tokens_total{{{kind}}}"] == 2 * 5 + 4 * 8 + 6 * 8 + 200_000
    assert seen['ostinato_drift_total{field="fingerprint.device",kind="twin"}'] == 1
    assert seen['ostinato_not_compared_total{kind="audit",reason="busy"}'] == 1
    assert (seen["ostinato_collision_checks_total"], seen["ostinato_collisions_total"]) == (3, 1)
    buckets = [seen[f'ostinato_first_difference_token_bucket{{{kind},le="{le}"}}'] for le in ("3.0", "7.0", "131071.0", "+Inf")]
    assert buckets == [0, 2, 2, 3]
    assert seen[f"ostinato_first_difference_token_sum{{{kind}}}"] == 2 * 5 + 200_000


def test_no_counter_goes_down() -> None:
    """Whatever is compared, on more fingerprints than are told apart, every counter and bucket stays where it was or rises:
    Prometheus would take a smaller value for a restart, and page for all that was counted before."""
    tally, before = Tally(), dict[str, float]()
    for n in range(STRATA_MAX + 40):
        key = Key(("twin", "audit")[n % 2], "exact", f"{n % (STRATA_MAX + 20):064x}", other_replica=n % 3 == 0)
        for verdict in (MATCH, DIVERGED, INCOMPARABLE):
            said = types_pb2.Comparison(verdict=verdict, compared_tokens=1 << n % 20)
            said.drift.extend([f"fingerprint.{n % 5}"] if verdict == INCOMPARABLE else [])
            if verdict == DIVERGED:
                said.first_difference = said.compared_tokens
            tally = tally.after(Compared(Moment(n, n), key, said))
        if n % 20 == 0 or n >= STRATA_MAX:
            seen = {name: value for name, value in metrics(tally).items() if not name.startswith("ostinato_divergence_")}
            assert {name: (value, seen.get(name, 0)) for name, value in before.items() if seen.get(name, 0) < value} == {}
            before = seen

    assert len(tally.strata) == STRATA_MAX
    assert sum(value for name, value in before.items() if "comparisons_total" in name) == 3 * (STRATA_MAX + 40)
    assert sum(value for name, value in before.items() if "drift_total" in name) == STRATA_MAX + 40


def test_nothing_is_served_before_it_is_restored() -> None:
    """While a start reads what was counted there is no counter at all: one that stands at 0 would look like a restart of the
    count, and all of it like an increase."""
    book = Book("writer")

    assert metrics(book.counted) == {}


def test_gauges_are_the_newest_fingerprints() -> None:
    """Two divergences of the fingerprint before are no longer in the gauges."""
    seen, rate = metrics(made()), Rate(1, 7)
    labels = '{grade="exact",kind="twin"}'

    assert seen[f"ostinato_divergence_rate{labels}"] == rate.value
    assert seen[f"ostinato_divergence_rate_lower{labels}"] == rate.lower
    assert seen[f"ostinato_divergence_rate_upper{labels}"] == rate.upper
    assert seen[f"ostinato_divergence_alarm{labels}"] == 0


def test_nothing_is_served_of_nothing() -> None:
    """Before anything was compared there is no rate: 0 would be a claim."""
    assert set(metrics(Tally())) == {"ostinato_collision_checks_total", "ostinato_collisions_total"}


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_a_report_says_it_all(confidence: float) -> None:
    """The newest stratum comes first; worst samplings first, companies and times ascending, intervals as confident as asked."""
    known = {digest: types_pb2.Fingerprint(digest=digest) for digest in (b"\xcc" * 32, b"\xbb" * 32)}
    found = report(made(), 77, confidence, known)
    stratum = found.strata[0]
    rate = Rate(1, 7, confidence)

    assert (found.index, found.confidence, found.alarm) == (77, confidence, False)
    assert [(each.fingerprint_digest[:1], each.other_replica) for each in found.strata] == [
        (b"\xbb", False),
        (b"\xbb", True),
        (b"\xaa", False),
    ]
    assert [each.digest for each in found.fingerprints] == [b"\xbb" * 32]
    assert (stratum.kind, stratum.grade) == (types_pb2.COMPARISON_KIND_TWIN, types_pb2.GRADE_EXACT)
    assert (stratum.matched, stratum.diverged, stratum.incomparable) == (6, 1, 1)
    assert stratum.per_comparison == sequencer_pb2.Rate(events=1, trials=7, value=1 / 7, lower=rate.lower, upper=rate.upper)
    assert (stratum.per_token.events, stratum.per_token.trials) == (1, 6 * 8 + 200_000 + 1)
    assert [(each.sampling, each.rate.events, each.rate.trials) for each in stratum.samplings] == [
        ("greedy", 1, 1),
        ("top_k=40", 0, 6),
    ]
    assert [(each.first, each.last, each.rate.trials) for each in stratum.companies] == [(2, 3, 6), (8, 15, 1)]
    assert [(each.first, each.last) for each in found.strata[1].companies] == [(0, 0)], "not known"
    assert [each.time_unix_millis for each in stratum.times] == [n * 60_000 for n in range(7, 14)]
    assert (stratum.first.index, stratum.last.index, stratum.first_diverged.index) == (7, 14, 13)
    assert not stratum.HasField("alarmed")
    assert sum(each.diverged for each in stratum.token_spans) == 1
    assert sum(each.hazard.trials for each in stratum.token_spans) == stratum.per_token.trials
    (lost,) = found.not_compared
    assert (lost.kind, lost.reason, lost.count) == (types_pb2.COMPARISON_KIND_AUDIT, "busy", 1)
