"""What leaves together: everything that comes soon enough after the first, and never for ever."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from serving.handlers import QUIET_TURNS, TURNS_MAX, coalesce


def turns_waited(coming: list[bool]) -> int:
    """The oracle: up to the first so many turns in a row in which nothing came, or to the last turn."""
    for end in range(QUIET_TURNS, TURNS_MAX):
        if not any(coming[end - QUIET_TURNS : end]):
            return end
    return TURNS_MAX


@given(st.lists(st.booleans(), min_size=2 * TURNS_MAX, max_size=2 * TURNS_MAX))
def test_waits_as_long_as_something_comes(coming: list[bool]) -> None:
    """Something comes in some turns of the loop and not in others: the wait ends with the first few quiet ones, or in time."""

    async def play() -> list[bool]:
        waiting, turns = list[int](), list[bool]()

        async def bring() -> None:
            for comes in coming:
                turns.append(comes)
                if comes:
                    waiting.append(1)
                await asyncio.sleep(0)

        bringing = asyncio.create_task(bring())
        await coalesce(lambda: len(waiting))
        seen = list(turns)
        await bringing
        return seen

    assert len(asyncio.run(play())) == turns_waited(coming)
