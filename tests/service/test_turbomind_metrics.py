"""Preemptions are counted from what TurboMind reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.engines.turbomind.metrics import Preemptions
from service.engines.turbomind.native import Handle, Load


@dataclass
class FakeRun:
    """A run: whether it has been in a step, and is in the newest."""

    scheduled: bool = False
    active: bool = False


@dataclass
class Engine:
    """TurboMind's order: the runs of a step are chosen and marked, and then the numbers of that step are published."""

    inside: dict[int, FakeRun] = field(default_factory=dict)
    queue: dict[int, FakeRun] = field(default_factory=dict)
    """Submitted, and not accepted yet."""
    now: Load = field(default_factory=lambda: Load(0, 0.0, 0, 0, 0.0))

    def choose(self, room: int) -> int:
        """The oldest are in the step. Returns how many left it."""
        self.inside |= self.queue
        self.queue.clear()
        out = 0
        for place, run in enumerate(self.inside.values()):
            out += run.active and place >= room
            run.active = place < room
            run.scheduled = run.scheduled or run.active
        return out

    def publish(self) -> None:
        self.now = Load(self.now.tick + 1, 0.0, 0, sum(not run.active for run in self.inside.values()), 0.0)


WHAT = ("submit", "leave", "choose", "publish", "observe")


@settings(max_examples=500)
@example([("submit", 0), ("choose", 0), ("publish", 0), ("choose", 1), ("observe", 0), ("observe", 0)])
@given(st.lists(st.tuples(st.sampled_from(WHAT), st.integers(0, 3)), max_size=40))
def test_no_preemption_is_counted_where_there_is_none(steps: list[tuple[str, int]]) -> None:
    """Whenever it observes, runs leave, and numbers are published late."""
    engine, ids = Engine(), iter(range(100))
    found = Preemptions(lambda: engine.now)
    for what, number in steps:
        if what == "submit":
            run_id = next(ids)
            engine.queue[run_id] = run = FakeRun()
            found.enter(run_id, cast(Handle, run))
        elif what == "leave" and engine.inside:
            run_id = [*engine.inside][number % len(engine.inside)]
            del engine.inside[run_id]  # the numbers of the newest step still have it
            found.leave(run_id)
        elif what == "choose":
            assert not engine.choose(sum(run.active for run in engine.inside.values()) + number)
        elif what == "publish":
            engine.publish()
        elif what == "observe":
            found.observe()
            assert found.count == 0


def test_a_preemption_is_counted_once() -> None:
    """However long it lasts; a second one of the same run is counted again."""
    engine = Engine()
    found = Preemptions(lambda: engine.now)
    for run_id in (1, 2, 3):
        engine.queue[run_id] = run = FakeRun()
        found.enter(run_id, cast(Handle, run))
    counts = []
    for room in (2, 3, 1, 1, 3, 2):
        engine.choose(room)
        engine.publish()
        found.observe()
        counts.append(found.count)

    assert counts == [0, 0, 2, 2, 2, 3]
