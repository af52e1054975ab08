"""Intervals and the life table, against other people's programs and against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sidecar.divergence.statistics import Ended, Rate, life_table, span_first, span_of

counts = st.integers(1, 10**7).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
runs = st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=60)
"""Each: tokens that were equal, and whether it diverged behind them."""


@settings(deadline=None)
@given(counts, st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]))
def test_the_interval_is_wilsons(count: tuple[int, int], confidence: float) -> None:
    """The bounds are those of scipy's Wilson score interval."""
    events, trials = count
    expected = stats.binomtest(events, trials).proportion_ci(confidence, method="wilson")
    rate = Rate(events, trials, confidence)

    assert (rate.lower, rate.upper) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert rate.lower <= rate.value <= rate.upper


def test_nothing_is_known_of_nothing() -> None:
    """Without trials the probability lies anywhere."""
    assert (Rate(0, 0).value, Rate(0, 0).lower, Rate(0, 0).upper) == (0.0, 0.0, 1.0)


def test_known_bounds() -> None:
    """No divergence in 300 comparisons: at most 1.26 %. In 3,000: at most 0.13 %."""
    assert [round(Rate(0, trials).upper, 4) for trials in (300, 3_000)] == [0.0126, 0.0013]


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_spans_cover_every_index(index: int) -> None:
    """Each token index lies in one span."""
    assert span_first(span_of(index)) <= index < span_first(span_of(index) + 1)


def spans(given: list[tuple[int, bool]]) -> list[Ended]:
    """The runs by span."""
    table = [Ended()] * (1 + max(span_of(tokens) for tokens, _ in given))
    for tokens, diverged in given:
        table[span_of(tokens)] = table[span_of(tokens)].after(tokens, diverged=diverged)
    return table


@settings(deadline=None)
@given(runs)
def test_the_life_table_counts_positions(given: list[tuple[int, bool]]) -> None:
    """Each position at which both runs had a token, or parted, is a trial of its span; a difference is one event."""
    trials, events = np.zeros(64, int), np.zeros(64, int)
    for tokens, diverged in given:
        trials[: tokens + diverged] += 1
        events[tokens] += diverged
    table = life_table(spans(given))

    for row in table:
        within = slice(row.first, row.last + 1)
        assert (row.hazard.events, row.hazard.trials) == (events[within].sum(), trials[within].sum())
        assert row.at_risk == sum(tokens >= row.first for tokens, _ in given)
    assert sum(row.hazard.trials for row in table) == trials.sum()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=60))
def test_it_is_kaplan_and_meiers_where_spans_are_narrow(given: list[tuple[int, bool]]) -> None:
    """Where a span is one index wide, the share that is still equal is scipy's estimate from censored data."""
    # A run of n equal tokens was tried up to position n - 1, or up to n where it parted there; half a position keeps
    # "censored after the trial" apart from "censored before".
    parted = [tokens for tokens, diverged in given if diverged]
    clean = [tokens - 0.5 for tokens, diverged in given if not diverged]
    estimate = stats.ecdf(stats.CensoredData(uncensored=parted, right=clean)).sf

    for row in life_table(spans(given)):
        # Where nobody is left to try, scipy says 0 and the table goes on with what it knew.
        if row.at_risk:
            assert row.equal_before == pytest.approx(float(estimate.evaluate(row.first - 0.25)) if row.first else 1.0)
