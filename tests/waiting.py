"""Waiting for what another task or thread of this process does soon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def eventually(condition: Callable[[], object]) -> None:
    """The ceiling is for what never happens."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)
