"""Runs that TurboMind takes out of its batch, seen from outside."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.engines.turbomind.metrics import Preemptions


@dataclass
class Seen:
    """A run inside: whether it has been in a step, and is in the newest."""

    scheduled: bool = False
    active: bool = False


@dataclass
class Snapshot:
    """What TurboMind says of its scheduler."""

    tick: int = 0
    waiting: int = 0


@dataclass
class Engine:
    """TurboMind's own order of things: a step's runs are chosen and marked, and then the numbers of that step are published."""

    inside: dict[int, Seen] = field(default_factory=dict)
    queue: dict[int, Seen] = field(default_factory=dict)
    """Handed over, and not taken in yet."""
    now: Snapshot = field(default_factory=Snapshot)

    def choose(self, room: int) -> int:
        """The oldest are in the step; how many fall out of it."""
        self.inside |= self.queue
        self.queue.clear()
        out = 0
        for place, run in enumerate(self.inside.values()):
            out += run.active and place >= room
            run.active = place < room
            run.scheduled = run.scheduled or run.active
        return out

    def publish(self) -> None:
        self.now = Snapshot(self.now.tick + 1, sum(not run.active for run in self.inside.values()))


WHAT = ("hand over", "leave", "choose", "publish", "look")


@settings(max_examples=500)
@example([("hand over", 0), ("choose", 0), ("publish", 0), ("choose", 1), ("look", 0), ("look", 0)])
@given(st.lists(st.tuples(st.sampled_from(WHAT), st.integers(0, 3)), max_size=40))
def test_where_none_is_taken_out_none_is_counted(steps: list[tuple[str, int]]) -> None:
    """Whatever the moments are at which it looks, runs leave, and numbers are published late."""
    engine, ids = Engine(), iter(range(100))
    found = Preemptions(lambda: engine.now)
    for what, number in steps:
        if what == "hand over":
            run_id = next(ids)
            engine.queue[run_id] = run = Seen()
            found.enter(run_id, run)
        elif what == "leave" and engine.inside:
            run_id = [*engine.inside][number % len(engine.inside)]
            del engine.inside[run_id]  # the numbers of the newest step still have it
            found.leave(run_id)
        elif what == "choose":
            assert not engine.choose(sum(run.active for run in engine.inside.values()) + number)
        elif what == "publish":
            engine.publish()
        elif what == "look":
            found.look()
            assert found.count == 0


def test_each_is_counted_once_however_long_it_is_out() -> None:
    """And again when it is taken out again."""
    engine = Engine()
    found = Preemptions(lambda: engine.now)
    for run_id in (1, 2, 3):
        engine.queue[run_id] = run = Seen()
        found.enter(run_id, run)
    counts = []
    for room in (2, 3, 1, 1, 3, 2):
        engine.choose(room)
        engine.publish()
        found.look()
        counts.append(found.count)

    assert counts == [0, 0, 2, 2, 2, 3]
