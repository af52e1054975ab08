"""Many things at once, but not too many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def abreast(works: AsyncIterable[Coroutine[Any, Any, T]], most: int) -> AsyncGenerator[T, None]:
    """What works return, as it falls, with `most` of them under way at once. The first that raises ends all of them."""
    running: set[asyncio.Task[T]] = set()

    async def fallen() -> AsyncGenerator[T, None]:
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            running.remove(task)
            yield task.result()

    try:
        async for work in works:
            running.add(asyncio.create_task(work))
            while len(running) >= most:
                async for result in fallen():
                    yield result
        while running:
            async for result in fallen():
                yield result
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
