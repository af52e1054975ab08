"""The sequential test: what it computes, how seldom it errs, how soon it finds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.divergence.evidence import ALARM, FAULTY, TOLERABLE, Evidence
from tests.sidecar.evidence_paths import NEVER, alarms, log_evidence

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
def test_it_is_fair(length: int) -> None:
    """Over all outcomes of so many comparisons that diverge as often as is tolerable, E is 1 on average: a fair game."""
    average = 0.0
    for path in itertools.product([False, True], repeat=length):
        probability = math.prod(TOLERABLE if each else 1 - TOLERABLE for each in path)
        average += probability * math.exp(after(*path).log)

    assert average == pytest.approx(1.0)


def test_nothing_overflows() -> None:
    """A hundred thousand divergences in a row are evidence beyond any floating-point number, and its logarithm is not."""
    evidence = after(*[True] * 100_000)

    assert math.isfinite(evidence.log10)
    assert evidence.log10 > 99_000
    assert math.isfinite(after(*[False] * 100_000).log10)


def test_early_divergences_raise_it() -> None:
    """Three divergences in a row do; one does not."""
    assert [after(*[True] * n).alarm for n in (0, 1, 2, 3)] == [False, False, False, True]


def test_the_other_program_computes_the_same() -> None:
    """What the simulations below compute is what the sidecar computes."""
    diverged = np.random.default_rng(SEED).random((20, 500)) < 0.01
    expected = log_evidence(diverged)
    for row, path in enumerate(diverged):
        evidence = Evidence()
        for column, each in enumerate(path):
            evidence = evidence.after(diverged=bool(each))
            assert evidence.log == pytest.approx(expected[row, column], abs=1e-9)


def test_false_alarms_are_rare() -> None:
    """However long one looks, at most one in a hundred who have no fault ever sees the alarm; here over 10,000 comparisons."""
    paths = 4_000
    wrong = int(np.count_nonzero(alarms(paths, 0, 10_000, TOLERABLE, SEED) != NEVER))

    assert wrong <= 0.01 * paths, f"seed {SEED}: {wrong} of {paths}"


@pytest.mark.parametrize(("clean", "enough"), [(0, 1_000), (10_000, 2_000)])
def test_a_fault_is_found(clean: int, enough: int) -> None:
    """Where 1 in 100 diverges, half of all who look know by then, also after a long clean past."""
    first = alarms(1_000, clean, enough, FAULTY, SEED)

    assert np.count_nonzero(first != NEVER) > 500, f"seed {SEED}"
