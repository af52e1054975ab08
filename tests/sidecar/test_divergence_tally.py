"""The fold: what is counted, by what, and that it stays small."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.divergence.evidence import Evidence
from sidecar.divergence.statistics import span_of
from sidecar.divergence.stratum import BUCKETS_MAX, DRIFT_MAX, SAMPLINGS_MAX, WINDOW_COMPARISONS, Forgotten, Share, Stratum
from sidecar.divergence.tally import STRATA_MAX, Tally
from sidecar.divergence.verdicts import FAILED, Checked, Compared, Key, Moment, NotCompared, events

KEY = Key("twin", "exact", "ab" * 32, other_replica=False)
MATCH, DIVERGED, INCOMPARABLE = types_pb2.VERDICT_MATCH, types_pb2.VERDICT_DIVERGED, types_pb2.VERDICT_INCOMPARABLE

comparisons = st.builds(
    types_pb2.Comparison,
    verdict=st.sampled_from([MATCH, DIVERGED, INCOMPARABLE]),
    compared_tokens=st.integers(0, 300),
    company=st.integers(0, 9),
    sampling=st.sampled_from(["greedy", "top_k=40", ""]),
)
keys = st.builds(Key, st.sampled_from(["twin", "audit"]), st.just("exact"), st.sampled_from(["aa", "bb"]), st.booleans())


def compared(comparison: types_pb2.Comparison, index: int = 1, key: Key = KEY, millis: int = 0) -> Compared:
    if comparison.verdict == INCOMPARABLE:
        comparison.drift.append("fingerprint.device")
    if comparison.verdict == DIVERGED:
        comparison.first_difference = comparison.compared_tokens
    return Compared(Moment(index, millis), key, comparison)


def verdict(value: types_pb2.Verdict.ValueType = MATCH, **fields: object) -> types_pb2.Comparison:
    return types_pb2.Comparison(verdict=value, **fields)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(st.tuples(keys, comparisons), max_size=60))
def test_it_counts_what_a_list_would(given: list[tuple[Key, types_pb2.Comparison]]) -> None:
    """Each stratum's counts are those that one gets by going through all its verdicts again."""
    tally, all_events = Tally(), [compared(said, n, key, n * 1_000) for n, (key, said) in enumerate(given, start=1)]
    for event in all_events:
        tally = tally.after(event)

    assert {stratum.key for stratum in tally.strata} == {key for key, _ in given}
    for stratum in tally.strata:
        own = [event for event in all_events if event.key == stratum.key]
        judged = [event for event in own if not event.drift]
        verdicts = Counter(event.comparison.verdict for event in own)
        evidence = Evidence()
        for event in judged:
            evidence = evidence.after(diverged=event.diverged)
        diverged = [event.at for event in judged if event.diverged]
        assert (stratum.matched, stratum.diverged, stratum.incomparable) == tuple(
            verdicts[each] for each in (MATCH, DIVERGED, INCOMPARABLE)
        )
        assert (stratum.first, stratum.last) == (own[0].at, own[-1].at)
        assert (stratum.first_diverged, stratum.last_diverged) == ((diverged[0], diverged[-1]) if diverged else (None, None))
        assert stratum.evidence == evidence
        assert stratum.compared_tokens == sum(event.comparison.compared_tokens for event in judged)
        assert stratum.recent == "".join("01"[event.diverged] for event in judged)
        assert sum(stratum.drift.values()) == stratum.incomparable
        for number, ended in enumerate(stratum.spans):
            there = [event for event in judged if span_of(event.comparison.compared_tokens) == number]
            assert ended.diverged == sum(event.diverged for event in there)
            assert ended.clean == len(there) - ended.diverged
        for name, share in stratum.samplings.items():
            of = [event.diverged for event in judged if event.comparison.sampling == name]
            assert share == Share(len(of), sum(of))
        for shares in (stratum.samplings.values(), stratum.companies, stratum.series.buckets.values()):
            assert sum(shares, Share()) == Share(stratum.compared, stratum.diverged)


@settings(deadline=None)
@given(st.lists(st.tuples(keys, comparisons), max_size=30))
def test_it_survives_being_written_down(given: list[tuple[Key, types_pb2.Comparison]]) -> None:
    """As JSON and back it is the same, to the last bit of the evidence."""
    tally = Tally().after(NotCompared("audit", "busy")).after(Checked(Moment(1, 1), 1, collides=True))
    for n, (key, said) in enumerate(given, start=1):
        tally = tally.after(compared(said, n, key, n))
    tally = replace(tally, forgotten=tuple(Forgotten(stratum.key).after(stratum) for stratum in tally.strata))

    assert msgspec.json.decode(msgspec.json.encode(tally), type=Tally) == tally


def test_the_alarm_goes_up_and_is_remembered() -> None:
    """Three divergences raise it, enough clean comparisons let it fall, and when it first rose stays known."""
    stratum, up = Stratum(KEY, Moment(1, 1), Moment(1, 1)), []
    for index in range(1, 1_000):
        stratum = stratum.after(compared(verdict(DIVERGED if index <= 3 else MATCH), index))
        up.append(stratum.evidence.alarm)

    assert up[:4] == [False, False, True, True]
    assert up == sorted(up[:3]) + sorted(up[3:], reverse=True), "it falls once"
    assert not up[-1]
    assert stratum.alarmed is not None
    assert stratum.alarmed.index == 3


def test_the_window_is_of_the_newest() -> None:
    """A divergence leaves the recent rate after so many comparisons, and the rate over all time never."""
    stratum = Stratum(KEY, Moment(1, 1), Moment(1, 1)).after(compared(verdict(DIVERGED)))
    for index in range(WINDOW_COMPARISONS):
        stratum = stratum.after(compared(verdict(), index))

    assert (stratum.recent_rate().events, stratum.recent_rate().trials) == (0, WINDOW_COMPARISONS)
    assert (stratum.diverged, stratum.compared) == (1, WINDOW_COMPARISONS + 1)


def test_it_stays_small() -> None:
    """However many ways to sample, names, days, companies and fingerprints there are, what is kept has a bound."""
    stratum = Stratum(KEY, Moment(1, 1), Moment(1, 1)).after(compared(verdict(DIVERGED, sampling="the bad one")))
    for n in range(1_000):
        said = verdict(sampling=f"temperature={n}", company=n, compared_tokens=n)
        stratum = stratum.after(compared(said, n, millis=n * 86_400_000))
        stratum = stratum.after(Compared(Moment(n, n), KEY, verdict(INCOMPARABLE, drift=[f"fingerprint.{n}"])))
    tally = Tally()
    for n in range(2 * STRATA_MAX):
        tally = tally.after(compared(verdict(), n, Key("twin", "exact", f"{n:064x}", other_replica=False)))

    assert len(stratum.samplings) == SAMPLINGS_MAX
    assert "the bad one" in stratum.samplings, "what diverges stays"
    assert len(stratum.drift) == DRIFT_MAX + 1
    assert sum(stratum.drift.values()) == 1_000
    assert len(stratum.series.buckets) <= BUCKETS_MAX
    assert sum(stratum.series.buckets.values(), Share()) == Share(1_001, 1)
    assert len(tally.strata) == STRATA_MAX
    assert [(sums.key.fingerprint, sums.matched) for sums in tally.forgotten] == [("", STRATA_MAX)]
    assert tally.strata[-1].last.index == 2 * STRATA_MAX - 1, "the newest stay"


def test_the_gauges_are_the_newest_fingerprints() -> None:
    """Of a kind and grade the fingerprint that was compared last is shown, and of its replicas the one with more evidence."""
    old, same, other = Key("twin", "exact", "aa", False), Key("twin", "exact", "bb", False), Key("twin", "exact", "bb", True)
    tally = Tally()
    for index, key in enumerate((old, other, same), start=1):
        tally = tally.after(compared(verdict(DIVERGED if key is not same else MATCH), index, key))

    assert {kind: stratum.key for kind, stratum in tally.newest().items()} == {("twin", "exact"): other}


def header(kind: types_pb2.EntryKind.ValueType, **fields: object) -> types_pb2.EntryHeader:
    return types_pb2.EntryHeader(index=9, time_unix_millis=5, kind=kind, writer="w", fingerprint_digest=b"\xab", **fields)  # type: ignore[arg-type]


def test_what_a_completed_entry_says() -> None:
    """The twin's verdict, at the lower of the two grades, and whether a collision was looked for and found."""
    twin = verdict(sequence=3, kind=types_pb2.COMPARISON_KIND_TWIN, grade=types_pb2.GRADE_BEST_EFFORT, expected_writer="v")
    payload = sequencer_pb2.CompletedPayload(twin=twin, collision=sequencer_pb2.COLLISION_FOUND).SerializeToString()
    entry = header(types_pb2.ENTRY_KIND_COMPLETED, sequence=3, grade=types_pb2.GRADE_EXACT)

    assert list(events(entry, payload)) == [
        Compared(Moment(9, 5), Key("twin", "best_effort", "ab", other_replica=True), twin),
        Checked(Moment(9, 5), 3, collides=True),
    ]
    assert list(events(entry, b"")) == [], "a payload that was dropped says nothing"


def test_what_an_audited_entry_says() -> None:
    """Its verdict; nothing where there is none; a second run without output is incomparable for a reason of its own."""
    entry = header(types_pb2.ENTRY_KIND_AUDITED, grade=types_pb2.GRADE_SERIAL)

    def said(comparison: types_pb2.Comparison) -> list[Compared | Checked]:
        return list(events(entry, sequencer_pb2.AuditedPayload(comparison=comparison).SerializeToString()))

    (event,) = said(verdict(INCOMPARABLE, kind=types_pb2.COMPARISON_KIND_AUDIT))
    assert isinstance(event, Compared)
    assert event.key == Key("audit", "serial", "ab", other_replica=False)
    assert event.drift == (FAILED,)
    assert said(types_pb2.Comparison()) == []


def test_other_entries_say_nothing() -> None:
    """An admission or a failure is no comparison, whatever its payload holds."""
    for kind in (types_pb2.ENTRY_KIND_OPENED, types_pb2.ENTRY_KIND_ADMITTED, types_pb2.ENTRY_KIND_FAILED):
        assert list(events(header(kind), b"\x08\x01")) == []


def test_values_of_a_newer_version_are_numbers() -> None:
    """A journal that a newer sidecar wrote can be counted: what has no name here is known by its number."""
    comparison = types_pb2.Comparison.FromString(b"\x10\x63\x18\x01\x68\x62")
    payload = sequencer_pb2.AuditedPayload(comparison=comparison).SerializeToString()
    (event,) = events(header(types_pb2.ENTRY_KIND_AUDITED), payload)

    assert isinstance(event, Compared)
    assert (event.key.kind, event.key.grade) == ("99", "98")


def test_nobody_knows_where() -> None:
    """Outputs that differ where one is not kept count as a comparison, and say nothing of tokens."""
    known, unknown = verdict(DIVERGED, compared_tokens=7, first_difference=7), verdict(DIVERGED)
    tally = Tally().after(compared(known)).after(Compared(Moment(2, 0), KEY, unknown))

    (stratum,) = tally.strata
    assert (stratum.diverged, stratum.compared, stratum.compared_tokens) == (2, 2, 7)
    assert (stratum.token_rate().events, stratum.token_rate().trials) == (1, 8)
