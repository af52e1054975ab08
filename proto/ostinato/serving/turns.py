"""What happens at about the same time leaves together: a message costs ten times as much as a turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

QUIET_TURNS, TURNS_MAX = 4, 16


async def still(amount: Callable[[], int]) -> None:
    """Until the amount of what waits has stood still for a few turns of the loop, and for many turns at most. No timer: where
    nothing happens, a turn takes some microseconds."""
    quiet = 0
    for _ in range(TURNS_MAX):
        before = amount()
        await asyncio.sleep(0)
        quiet = quiet + 1 if amount() == before else 0
        if quiet == QUIET_TURNS:
            return
