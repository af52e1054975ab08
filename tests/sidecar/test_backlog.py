"""Which audits run when: company, room, budget and bounds, with the time as an argument."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sidecar.core.backlog import BURST_SECONDS, GROUP, Backlog, Bucket, Due

PATIENCE = 30.0


def backlog(*alone: bool, most: int = 100) -> Backlog:
    """Sequences 1, 2 and so on, all chosen at time 0."""
    made = Backlog(most, PATIENCE)
    for sequence, each in enumerate(alone, start=1):
        assert made.add(Due(sequence, each, 0.0))
    return made


def taken(made: Backlog, now: float = 0.0, *, company: int = 0, room: int = 8) -> list[int]:
    return [due.sequence for due in made.take(now, company=company, room=room)]


def test_what_ran_in_a_crowd_goes_at_once() -> None:
    """Oldest first, as far as there is room; what ran alone waits."""
    made = backlog(False, True, False, False)

    assert taken(made, room=2) == [1, 3]
    assert taken(made) == [4]
    assert [due.sequence for due in made.waiting] == [2]


@pytest.mark.parametrize(
    ("alone", "now", "company", "room", "go"),
    [
        pytest.param(GROUP - 1, 0.0, 0, 8, 0, id="too few"),
        pytest.param(GROUP, 0.0, 0, 8, GROUP, id="a group"),
        pytest.param(GROUP + 2, 0.0, 0, 8, GROUP + 2, id="more than a group"),
        pytest.param(1, 0.0, 1, 8, 1, id="others run"),
        pytest.param(2, PATIENCE, 0, 8, 2, id="waited long enough, and takes another along"),
        pytest.param(2, PATIENCE - 0.1, 0, 8, 0, id="not yet"),
        pytest.param(2, 0.0, 0, 2, 2, id="as large a group as may run"),
        pytest.param(1, 0.0, 0, 1, 1, id="there never is company"),
        pytest.param(0, PATIENCE, 1, 8, 0, id="nothing"),
    ],
)
def test_what_ran_alone_waits_for_company(alone: int, now: float, company: int, room: int, go: int) -> None:
    """A group, others that run, or the end of patience; then all go together."""
    assert len(taken(backlog(*[True] * alone), now, company=company, room=room)) == go


@given(st.lists(st.booleans(), max_size=20), st.integers(0, 2), st.integers(1, 6), st.floats(0, 2 * PATIENCE))
def test_nothing_is_lost_or_run_twice(alone: list[bool], company: int, room: int, now: float) -> None:
    """What is taken and what waits are all there is; within each kind the order holds, and the room is kept."""
    made = backlog(*alone)
    chosen = taken(made, now, company=company, room=room)

    assert sorted([*chosen, *(due.sequence for due in made.waiting)]) == list(range(1, len(alone) + 1))
    assert chosen == sorted(chosen)
    assert len(chosen) <= room


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 6))
def test_everything_goes_in_the_end(alone: list[bool], room: int) -> None:
    """Once patience is over, nothing waits for anything but room."""
    made, seen = backlog(*alone), 0
    while made.waiting:
        seen += 1
        assert taken(made, PATIENCE, room=room)

    assert seen == -(-len(alone) // room)


def test_the_backlog_is_bounded() -> None:
    """One more than it holds is refused."""
    made = backlog(True, False, most=2)

    assert not made.add(Due(3, False, 0.0))
    assert taken(made) == [2]
    assert made.add(Due(3, False, 0.0))


def test_the_budget() -> None:
    """What is at hand may be overdrawn once; then nothing opens until the debt is paid, and no more is saved than the burst."""
    bucket = Bucket(10.0, now=100.0)
    assert bucket.open(100.0)
    bucket.take(int(10 * BURST_SECONDS) + 50)
    assert not bucket.open(105.0)
    assert bucket.open(105.1)
    bucket.take(1)
    assert not bucket.open(105.1)
    assert bucket.open(10_000.0)
    bucket.take(int(10 * BURST_SECONDS))
    assert not bucket.open(10_000.0)


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(1, 500)), max_size=50))
def test_the_budget_holds(story: list[tuple[float, int]]) -> None:
    """Over any time no more is taken than the burst, the rate, and the last one's overdraft."""
    bucket, now, spent = Bucket(20.0, 0.0), 0.0, 0
    for seconds, tokens in story:
        now += seconds
        if bucket.open(now):
            assert spent <= 20.0 * (BURST_SECONDS + now) + 1e-6
            bucket.take(tokens)
            spent += tokens


def test_no_budget_is_no_bound() -> None:
    """0 never closes."""
    bucket = Bucket(0.0, 0.0)
    bucket.take(10**12)

    assert bucket.open(0.0)
