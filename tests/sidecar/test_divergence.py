"""Divergence: statistics, counts, the tracker and its outputs."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from scipy import stats

from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.divergence.output import DivergenceCollector, report
from sidecar.divergence.statistics import ALARM, BUCKETS_MAX, FAULTY, TOLERABLE, Evidence, Share, bin_bounds
from sidecar.divergence.tracker import (
    DRIFT_MAX,
    FAILED,
    GROUPS_MAX,
    SAMPLINGS_MAX,
    WINDOW_COMPARISONS,
    Checkpoint,
    CollisionCheck,
    Compared,
    Counts,
    DivergenceTracker,
    Event,
    Group,
    GroupKey,
    Moment,
    RetiredGroups,
    events,
)
from sidecar.journal.model import Sealed
from tests.sidecar.evidence_paths import NEVER, alarms, log_evidence

counts = st.integers(1, 10**7).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(deadline=None)
@given(counts, st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]))
def test_the_interval_is_wilsons(count: tuple[int, int], confidence: float) -> None:
    """The bounds are those of scipy's Wilson score interval."""
    events, trials = count
    expected = stats.binomtest(events, trials).proportion_ci(confidence, method="wilson")
    share = Share(trials, events)

    assert (share.lower(confidence), share.upper(confidence)) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert share.lower(confidence) <= share.value <= share.upper(confidence)


def test_no_comparisons() -> None:
    """Without comparisons the interval is 0 to 1."""
    assert (Share().value, Share().lower(), Share().upper()) == (0.0, 0.0, 1.0)


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_bins_cover_every_index(index: int) -> None:
    """Each token index lies in the bin of its bit length."""
    first, last = bin_bounds(index.bit_length())

    assert first <= index <= last
    assert (last + 1).bit_length() == index.bit_length() + 1


SEED = 20_261_124


def after(*diverged: bool) -> Evidence:
    evidence = Evidence()
    for each in diverged:
        evidence = evidence.after(diverged=each)
    return evidence


@given(st.lists(st.booleans(), max_size=40))
def test_it_is_the_mixture_over_all_starts(diverged: list[bool]) -> None:
    """E is the likelihood ratio of a fault from the s-th comparison on, averaged over s with weights 1 / (s (s + 1))."""
    ratios = [FAULTY / TOLERABLE if each else (1 - FAULTY) / (1 - TOLERABLE) for each in diverged]
    mixture = sum(math.prod(ratios[s:]) / ((s + 1) * (s + 2)) for s in range(len(ratios)))
    not_yet = 1 / (len(ratios) + 1)

    assert after(*diverged).log == pytest.approx(math.log(mixture + not_yet), abs=1e-9)
    assert after(*diverged).alarm == (mixture + not_yet >= ALARM)


@pytest.mark.parametrize("length", [1, 2, 6])
def test_the_expected_evidence_is_one(length: int) -> None:
    """If comparisons diverge with probability TOLERABLE, the expectation of E is 1."""
    average = 0.0
    for path in itertools.product([False, True], repeat=length):
        probability = math.prod(TOLERABLE if each else 1 - TOLERABLE for each in path)
        average += probability * math.exp(after(*path).log)

    assert average == pytest.approx(1.0)


def test_nothing_overflows() -> None:
    """The logarithm is finite after a hundred thousand divergences, whose evidence exceeds any floating-point number."""
    evidence = after(*[True] * 100_000)

    assert math.isfinite(evidence.log10)
    assert evidence.log10 > 99_000
    assert math.isfinite(after(*[False] * 100_000).log10)


def test_the_simulation_computes_the_same() -> None:
    """The vectorised simulation below computes the same evidence as the sidecar."""
    diverged = np.random.default_rng(SEED).random((500, 20)) < 0.01
    evidence = [Evidence()] * 20
    for row, expected in zip(diverged, log_evidence(diverged), strict=True):
        evidence = [path.after(diverged=bool(each)) for path, each in zip(evidence, row, strict=True)]
        assert [path.log for path in evidence] == pytest.approx(expected, abs=1e-9)


def test_false_alarms_are_rare() -> None:
    """Without a fault, at most 1 of 100 series of 10,000 comparisons ever raises the alarm."""
    paths = 4_000
    wrong = int(np.count_nonzero(alarms(paths, 0, 10_000, TOLERABLE, SEED) != NEVER))

    assert wrong <= 0.01 * paths, f"seed {SEED}: {wrong} of {paths}"


@pytest.mark.parametrize(("clean", "enough"), [(0, 1_000), (10_000, 2_000)])
def test_a_fault_is_found(clean: int, enough: int) -> None:
    """If 1 in 100 diverges, half of all series raise the alarm within this many comparisons, also after a long clean past."""
    first = alarms(1_000, clean, enough, FAULTY, SEED)

    assert np.count_nonzero(first != NEVER) > 500, f"seed {SEED}"


KEY = GroupKey("twin", "exact", "ab" * 32, other_replica=False)
MATCH, DIVERGED, INCOMPARABLE = types_pb2.VERDICT_MATCH, types_pb2.VERDICT_DIVERGED, types_pb2.VERDICT_INCOMPARABLE

comparisons = st.builds(
    types_pb2.Comparison,
    verdict=st.sampled_from([MATCH, DIVERGED, INCOMPARABLE]),
    compared_tokens=st.integers(0, 300),
    company=st.integers(0, 9),
    sampling=st.sampled_from(["greedy", "top_k=40", ""]),
)
keys = st.builds(GroupKey, st.sampled_from(["twin", "audit"]), st.just("exact"), st.sampled_from(["aa", "bb"]), st.booleans())


def compared(comparison: types_pb2.Comparison, index: int = 1, key: GroupKey = KEY, millis: int = 0) -> Compared:
    if comparison.verdict == INCOMPARABLE:
        comparison.drift.append("fingerprint.device")
    if comparison.verdict == DIVERGED:
        comparison.first_difference = comparison.compared_tokens
    return Compared(Moment(index, millis), key, comparison)


def verdict(value: types_pb2.Verdict.ValueType = MATCH, **fields: object) -> types_pb2.Comparison:
    return types_pb2.Comparison(verdict=value, **fields)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(st.tuples(keys, comparisons), max_size=60))
def test_counts_equal_those_of_a_list(given: list[tuple[GroupKey, types_pb2.Comparison]]) -> None:
    """Each group's counts equal those computed from the list of its verdicts."""
    counts, all_events = Counts(), [compared(said, n, key, n * 1_000) for n, (key, said) in enumerate(given, start=1)]
    for event in all_events:
        counts = counts.after(event)

    assert {group.key for group in counts.groups} == {key for key, _ in given}
    for group in counts.groups:
        own = [event for event in all_events if event.key == group.key]
        judged = [event for event in own if not event.drift]
        verdicts = Counter(event.comparison.verdict for event in own)
        evidence = Evidence()
        for event in judged:
            evidence = evidence.after(diverged=event.diverged)
        diverged = [event.at for event in judged if event.diverged]
        assert (group.sums.matched, group.sums.diverged, group.sums.incomparable) == tuple(
            verdicts[each] for each in (MATCH, DIVERGED, INCOMPARABLE)
        )
        assert (group.first, group.last) == (own[0].at, own[-1].at)
        assert (group.first_diverged, group.last_diverged) == ((diverged[0], diverged[-1]) if diverged else (None, None))
        assert group.evidence == evidence
        assert group.sums.compared_tokens == sum(event.comparison.compared_tokens for event in judged)
        assert group.recent == "".join("01"[event.diverged] for event in judged)
        assert sum(group.sums.drift.values()) == group.sums.incomparable
        parted = [event.comparison.compared_tokens for event in judged if event.diverged]
        assert group.sums.first_differences == Counter(index.bit_length() for index in parted)
        assert group.sums.first_difference_tokens == sum(parted)
        for name, share in group.samplings.items():
            of = [event.diverged for event in judged if event.comparison.sampling == name]
            assert share == Share(len(of), sum(of))
        for shares in (group.samplings.values(), group.companies.values(), group.series.buckets.values()):
            assert sum(shares, Share()) == Share(group.sums.compared, group.sums.diverged)


@settings(deadline=None)
@given(st.lists(st.tuples(keys, comparisons), max_size=30))
def test_counts_survive_json(given: list[tuple[GroupKey, types_pb2.Comparison]]) -> None:
    """Counts survive JSON unchanged, to the last bit of the evidence."""
    counts = Counts(not_compared={"audit": {"busy": 1}}).after(CollisionCheck(collides=True))
    for n, (key, said) in enumerate(given, start=1):
        counts = counts.after(compared(said, n, key, n))
    counts = replace(counts, retired=tuple(RetiredGroups(group.key, group.sums) for group in counts.groups))

    assert msgspec.json.decode(msgspec.json.encode(counts), type=Counts) == counts


def test_the_alarm_goes_up_and_is_remembered() -> None:
    """Three divergences raise the alarm, enough clean comparisons end it, and the time of its start is kept."""
    group, up = Group(KEY, Moment(1, 1), Moment(1, 1)), []
    for index in range(1, 1_000):
        group = group.after(compared(verdict(DIVERGED if index <= 3 else MATCH), index))
        up.append(group.evidence.alarm)

    assert up[:4] == [False, False, True, True]
    assert up == sorted(up[:3]) + sorted(up[3:], reverse=True), "it falls once"
    assert not up[-1]
    assert group.alarmed is not None
    assert group.alarmed.index == 3


def test_the_recent_rate_has_a_window() -> None:
    """A divergence leaves the recent rate after WINDOW_COMPARISONS, and stays in the total."""
    group = Group(KEY, Moment(1, 1), Moment(1, 1)).after(compared(verdict(DIVERGED)))
    for index in range(WINDOW_COMPARISONS):
        group = group.after(compared(verdict(), index))

    assert group.recent_share == Share(WINDOW_COMPARISONS, 0)
    assert (group.sums.diverged, group.sums.compared) == (1, WINDOW_COMPARISONS + 1)


def test_the_size_is_bounded() -> None:
    """The size is bounded, however many sampling labels, field names, days, occupancies and fingerprints there are."""
    group = Group(KEY, Moment(1, 1), Moment(1, 1)).after(compared(verdict(DIVERGED, sampling="the bad one")))
    for n in range(1_000):
        said = verdict(sampling=f"temperature={n}", company=n, compared_tokens=n)
        group = group.after(compared(said, n, millis=n * 86_400_000))
        group = group.after(Compared(Moment(n, n), KEY, verdict(INCOMPARABLE, drift=[f"fingerprint.{n}"])))
    counts = Counts()
    for n in range(2 * GROUPS_MAX):
        counts = counts.after(compared(verdict(), n, GroupKey("twin", "exact", f"{n:064x}", other_replica=False)))

    assert len(group.samplings) == SAMPLINGS_MAX
    assert "the bad one" in group.samplings, "what diverges stays"
    assert len(group.sums.drift) == DRIFT_MAX + 1
    assert sum(group.sums.drift.values()) == 1_000
    assert len(group.series.buckets) <= BUCKETS_MAX
    assert sum(group.series.buckets.values(), Share()) == Share(1_001, 1)
    assert len(counts.groups) == GROUPS_MAX
    assert [(each.key.fingerprint, each.sums.matched) for each in counts.retired] == [("", GROUPS_MAX)]
    assert counts.groups[-1].last.index == 2 * GROUPS_MAX - 1, "the newest stay"


def said(kind: types_pb2.EntryKind.ValueType, payload: bytes, **fields: object) -> list[Event]:
    """The events of an entry."""
    header = types_pb2.EntryHeader(index=9, time_unix_millis=5, kind=kind, writer="w", fingerprint_digest=b"\xab", **fields)  # type: ignore[arg-type]
    return list(events(Sealed(header, b"", b"", payload)))


def test_events_of_a_completed_entry() -> None:
    """A COMPLETED entry has the twin's verdict, at the lower of the two grades, and the result of the collision check."""
    twin = verdict(sequence=3, kind=types_pb2.COMPARISON_KIND_TWIN, grade=types_pb2.GRADE_BEST_EFFORT, expected_writer="v")
    payload = sequencer_pb2.CompletedPayload(twin=twin, collision=sequencer_pb2.COLLISION_FOUND).SerializeToString()
    assert said(types_pb2.ENTRY_KIND_COMPLETED, payload, sequence=3, grade=types_pb2.GRADE_EXACT) == [
        Compared(Moment(9, 5), GroupKey("twin", "best_effort", "ab", other_replica=True), twin),
        CollisionCheck(collides=True),
    ]
    assert said(types_pb2.ENTRY_KIND_COMPLETED, b"") == [], "a payload that was dropped says nothing"


def test_events_of_an_audited_entry() -> None:
    """An AUDITED entry has a verdict or none; a second run without output is incomparable because it failed."""
    payload = sequencer_pb2.AuditedPayload(comparison=verdict(INCOMPARABLE, kind=types_pb2.COMPARISON_KIND_AUDIT))
    (event,) = said(types_pb2.ENTRY_KIND_AUDITED, payload.SerializeToString(), grade=types_pb2.GRADE_SERIAL)
    assert isinstance(event, Compared)
    assert event.key == GroupKey("audit", "serial", "ab", other_replica=False)
    assert event.drift == (FAILED,)
    assert said(types_pb2.ENTRY_KIND_AUDITED, sequencer_pb2.AuditedPayload().SerializeToString()) == []


def test_other_entries_have_no_events() -> None:
    """Entries of other kinds have no events, whatever their payloads hold."""
    for kind in (types_pb2.ENTRY_KIND_OPENED, types_pb2.ENTRY_KIND_ADMITTED, types_pb2.ENTRY_KIND_FAILED):
        assert said(kind, b"\x08\x01") == []


def test_values_of_a_newer_version_are_numbers() -> None:
    """The journal of a newer sidecar can be counted: an unknown enum value is counted under its number."""
    comparison = types_pb2.Comparison.FromString(b"\x10\x63\x18\x01\x68\x62")
    payload = sequencer_pb2.AuditedPayload(comparison=comparison).SerializeToString()
    (event,) = said(types_pb2.ENTRY_KIND_AUDITED, payload)

    assert isinstance(event, Compared)
    assert (event.key.kind, event.key.grade) == ("99", "98")


def test_a_divergence_without_a_position() -> None:
    """A divergence without a position (one output is not kept) counts as a comparison, and not in the tokens."""
    known, unknown = verdict(DIVERGED, compared_tokens=7, first_difference=7), verdict(DIVERGED)
    counts = Counts().after(compared(known)).after(Compared(Moment(2, 0), KEY, unknown))

    (group,) = counts.groups
    assert (group.sums.diverged, group.sums.compared, group.sums.compared_tokens) == (2, 2, 7)
    assert group.token_share == Share(8, 1)


OLD, NEW, OTHER = (
    GroupKey("twin", "exact", name * 32, other_replica=other) for name, other in (("aa", False), ("bb", False), ("bb", True))
)


def made() -> Counts:
    """Two fingerprints, the newer one with two replicas, and every kind of event."""
    counts, index = Counts(not_compared={"audit": {"busy": 1}}), 0
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
            counts = counts.after(compared(said, index, key, index * 60_000))
    for collides in (True, False, False):
        counts = counts.after(CollisionCheck(collides))
    return counts


def metrics(counts: Counts | None) -> dict[str, float]:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(DivergenceCollector(lambda: counts))
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def test_metrics_are_sums_over_fingerprints() -> None:
    """Counters sum over fingerprints and keep replicas apart; the histogram has every divergence."""
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
    """No counter or bucket decreases, also with more fingerprints than are kept: Prometheus would take that for a reset, and
    alert for everything that was counted before."""
    counts, before = Counts(), dict[str, float]()
    for n in range(GROUPS_MAX + 40):
        key = GroupKey(("twin", "audit")[n % 2], "exact", f"{n % (GROUPS_MAX + 20):064x}", other_replica=n % 3 == 0)
        for verdict in (MATCH, DIVERGED, INCOMPARABLE):
            counts = counts.after(compared(types_pb2.Comparison(verdict=verdict, compared_tokens=1 << n % 20), n, key, n))
        if n % 20 == 0 or n >= GROUPS_MAX:
            seen = {name: value for name, value in metrics(counts).items() if not name.startswith("ostinato_divergence_")}
            assert {name: (value, seen.get(name, 0)) for name, value in before.items() if seen.get(name, 0) < value} == {}
            before = seen

    assert len(counts.groups) == GROUPS_MAX
    assert sum(value for name, value in before.items() if "comparisons_total" in name) == 3 * (GROUPS_MAX + 40)
    assert sum(value for name, value in before.items() if "drift_total" in name) == GROUPS_MAX + 40


def test_nothing_is_served_before_it_is_restored() -> None:
    """Before the counts are restored there are no metrics: a counter at 0 would look like a reset, and its return like an
    increase."""
    tracker = DivergenceTracker("writer")

    assert metrics(tracker.restored_counts) == {}


def test_gauges_are_the_newest_fingerprints() -> None:
    """The gauges are of the newest fingerprint, and of its replicas of the one with more evidence."""
    seen, share = metrics(made()), Share(7, 1)
    labels = '{grade="exact",kind="twin"}'

    assert seen[f"ostinato_divergence_rate{labels}"] == share.value
    assert seen[f"ostinato_divergence_rate_lower{labels}"] == share.lower()
    assert seen[f"ostinato_divergence_rate_upper{labels}"] == share.upper()
    assert seen[f"ostinato_divergence_alarm{labels}"] == 0


def test_no_rate_without_comparisons() -> None:
    """Before the first comparison there is no rate."""
    assert set(metrics(Counts())) == {"ostinato_collision_checks_total", "ostinato_collisions_total"}


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_a_report(confidence: float) -> None:
    """The report has the newest group and the worst samplings first, the rest ascending, with the requested confidence."""
    known = {digest: types_pb2.Fingerprint(digest=digest) for digest in (b"\xcc" * 32, b"\xbb" * 32)}
    found = report(Checkpoint(index=77, counts=made()), confidence, known)
    group = found.strata[0]
    lower, upper = Share(7, 1).lower(confidence), Share(7, 1).upper(confidence)

    assert (found.index, found.confidence, found.alarm) == (77, confidence, False)
    assert [(each.fingerprint_digest[:1], each.other_replica) for each in found.strata] == [
        (b"\xbb", False),
        (b"\xbb", True),
        (b"\xaa", False),
    ]
    assert [each.digest for each in found.fingerprints] == [b"\xbb" * 32]
    assert (group.kind, group.grade) == (types_pb2.COMPARISON_KIND_TWIN, types_pb2.GRADE_EXACT)
    assert (group.matched, group.diverged, group.incomparable) == (6, 1, 1)
    assert group.per_comparison == sequencer_pb2.Rate(events=1, trials=7, value=1 / 7, lower=lower, upper=upper)
    assert (group.per_token.events, group.per_token.trials) == (1, 6 * 8 + 200_000 + 1)
    assert [(each.sampling, each.rate.events, each.rate.trials) for each in group.samplings] == [
        ("greedy", 1, 1),
        ("top_k=40", 0, 6),
    ]
    assert [(each.first, each.last, each.rate.trials) for each in group.companies] == [(2, 3, 6), (8, 15, 1)]
    assert [(each.first, each.last) for each in found.strata[1].companies] == [(0, 0)], "not known"
    assert [each.time_unix_millis for each in group.times] == [n * 60_000 for n in range(7, 14)]
    assert (group.first.index, group.last.index, group.first_diverged.index) == (7, 14, 13)
    assert not group.HasField("alarmed")
    assert sum(each.diverged for each in group.token_spans) == 1
    (lost,) = found.not_compared
    assert (lost.kind, lost.reason, lost.count) == (types_pb2.COMPARISON_KIND_AUDIT, "busy", 1)
