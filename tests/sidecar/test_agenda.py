"""When to look at what."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.sequencer import Timers

MOMENTS = st.none() | st.integers(0, 20).map(float)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), MOMENTS), max_size=400))
def test_each_comes_once_when_it_is_due(steps: list[tuple[bool, int, float | None]]) -> None:
    """Whatever is put down, put off and dropped, what is due is what a look at all of them would find, the earliest first."""
    timers, plain = Timers(), dict[int, float]()
    for look, key, moment in steps:
        if look and moment is not None:
            expected = sorted((at, each) for each, at in plain.items() if at <= moment)
            assert list(timers.due(moment)) == [each for _, each in expected]
            plain = {each: at for each, at in plain.items() if at > moment}
        else:
            timers.put(key, moment)
            plain.pop(key, None)
            if moment is not None:
                plain[key] = moment


def test_what_was_put_off_takes_no_room() -> None:
    """However often a few are put off, the timers does not grow."""
    timers = Timers()
    for moment in range(100_000):
        timers.put(moment % 3, float(moment))
    assert len(timers._heap) < 100
