"""Closed loops: so many requesters, each with one request under way, for so long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.bench.table import count, median, millis


@dataclass(frozen=True, slots=True)
class Round:
    """What one loop saw. Seconds, but for the first."""

    per_second: float
    p50: float
    p99: float

    def cells(self) -> list[str]:
        """Of a table: a second, and milliseconds."""
        return [count(self.per_second), millis(self.p50), millis(self.p99)]


async def closed_loop(requesters: int, seconds: float, request: Callable[[], Awaitable[object]]) -> Round:
    """One round. Requests that are under way at its end are waited for, and count."""
    taken, began = list[float](), time.perf_counter()

    async def requester() -> None:
        while (sent := time.perf_counter()) < began + seconds:
            await request()
            taken.append(time.perf_counter() - sent)

    await asyncio.gather(*(requester() for _ in range(requesters)))
    return summary(taken, time.perf_counter() - began)


def summary(taken: list[float], seconds: float) -> Round:
    """Of a round's latencies."""
    taken.sort()
    return Round(len(taken) / seconds, taken[len(taken) // 2], taken[len(taken) * 99 // 100])


def middle(rounds: Sequence[Round]) -> Round:
    """The median of each number."""
    return Round(*(median([getattr(each, name) for each in rounds]) for name in ("per_second", "p50", "p99")))
