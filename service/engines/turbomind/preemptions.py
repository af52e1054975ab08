"""Whether TurboMind took a run out of its batch, to compute it again later, and by other kernels than the first time. Pure.

TurboMind tells nobody. But it says how many runs wait, and of each run whether it has been in a step. So:

1. Where more wait than have never been in a step, one was taken out. That is certain, and so is its count at that moment.
2. What was out only between two looks is missed. There is one whenever TurboMind reports something (at every step while
   anything streams, else at each run's end) and every few seconds.
3. Who leaves without ever having been in a step may still be among those that wait, until the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Seen(Protocol):
    """Of a run."""

    @property
    def scheduled(self) -> bool:
        """Whether it has been in a step; once true it stays so."""
        ...


class Load(Protocol):
    """Of the scheduler, at one moment."""

    @property
    def tick(self) -> int: ...

    @property
    def waiting(self) -> int: ...


class Preemptions:
    """As far as can be seen."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self.count = 0
        self._load = load
        self._new: dict[int, Seen] = {}
        """Those that had not been in a step at the last look, and those that came since."""
        self._left: list[int] = []
        """Of those that left from among them, the tick then."""
        self._as_of = -1
        """Numbers of a later tick than this are younger than the last look."""
        self._out = 0

    def enter(self, run_id: int, run: Seen) -> None:
        """Before TurboMind can have it among those that wait."""
        self._new[run_id] = run

    def leave(self, run_id: int) -> None:
        if self._new.pop(run_id, None) is not None:
            self._left.append(self._load().tick)

    def look(self) -> None:
        """TurboMind marks runs first and publishes its numbers a moment later. So only numbers that are younger than the last
        look are held against the runs that were new then: who waits in them without a step is one of these."""
        now = self._load()
        self._left = [tick for tick in self._left if tick >= now.tick]
        if now.tick > self._as_of:
            out = max(0, now.waiting - len(self._new) - len(self._left))
            self.count += max(0, out - self._out)
            self._out = out
        self._new = {run_id: run for run_id, run in self._new.items() if not run.scheduled}
        self._as_of = self._load().tick
