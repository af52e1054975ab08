"""Many things at once, but not too many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato.replay import bounded_gather


class Works:
    """Numbered works that take so many turns of the loop each; at the number `breaks` one raises."""

    def __init__(self, turns: list[int], breaks: int = -1) -> None:
        self.turns, self.breaks = turns, breaks
        self.running = self.most = self.begun = 0

    async def __aiter__(self) -> AsyncIterator[Coroutine[Any, Any, int]]:
        for number in range(len(self.turns)):
            yield self._work(number)

    async def _work(self, number: int) -> int:
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(self.turns[number]):
                await asyncio.sleep(0)
            if number == self.breaks:
                raise LookupError(number)
            return number
        finally:
            self.running -= 1


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(1, 6))
def test_every_result_and_never_too_many(turns: list[int], most: int) -> None:
    """Each work's result comes once, and no more than so many are ever under way."""

    async def run() -> None:
        works = Works(turns)
        found = [result async for result in bounded_gather(works, most)]
        assert sorted(found) == list(range(len(turns)))
        assert works.most <= most

    asyncio.run(run())


async def test_the_first_failure_ends_all() -> None:
    """Nothing is begun after a failure, and nothing goes on."""
    works = Works([50, 2, 50, 50, 50], breaks=1)
    with pytest.raises(LookupError):
        _ = [result async for result in bounded_gather(works, 3)]
    assert (works.begun, works.running) == (3, 0)


async def test_who_leaves_ends_all() -> None:
    """Closing it cancels what is under way, before the close returns."""
    works = Works([1, 500, 500])
    async with aclosing(bounded_gather(works, 3)) as results:
        async for _ in results:
            break
    assert works.running == 0
