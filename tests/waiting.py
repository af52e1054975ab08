"""Waiting for what another task, thread or process does soon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

SECONDS = 30.0


async def eventually(condition: Callable[[], object | Awaitable[object]], what: str = "", seconds: float = SECONDS) -> None:
    """Wait until the condition holds. Fails with `what` after this time."""
    deadline = time.monotonic() + seconds
    while True:
        holds = condition()
        if await holds if isinstance(holds, Awaitable) else holds:
            return
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what or condition}"
        await asyncio.sleep(0.005)


def until(condition: Callable[[], object], what: str = "", seconds: float = SECONDS) -> None:
    """Likewise in a thread without a loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what or condition}"
        time.sleep(0.01)
