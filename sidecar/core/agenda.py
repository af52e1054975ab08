"""When to look at what: the next moment of each of many, without looking at all of them. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterator


class Agenda:
    """By key, one moment each."""

    def __init__(self) -> None:
        self._moments: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []
        """With some that were put off or dropped since."""

    def put(self, key: int, moment: float | None) -> None:
        """Look at it then, and not when it was put down for before; None: never."""
        if moment is None:
            self._moments.pop(key, None)
            return
        self._moments[key] = moment
        heapq.heappush(self._heap, (moment, key))
        if len(self._heap) > 2 * len(self._moments) + 64:
            self._heap = [(moment, key) for key, moment in self._moments.items()]
            heapq.heapify(self._heap)

    def due(self, now: float) -> Iterator[int]:
        """Those whose moment has come, the earliest first; they are dropped."""
        while self._heap and self._heap[0][0] <= now:
            moment, key = heapq.heappop(self._heap)
            if self._moments.get(key) == moment:
                del self._moments[key]
                yield key
