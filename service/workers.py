"""Threads for work that would block the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ostinato.errors import QueueFull

from service.prepare import Wanted

RETRY_SECONDS = 1.0
T = TypeVar("T")


class Workers:
    """A bounded number of threads with a bounded queue, for work that would block the event loop."""

    def __init__(self, threads: int, queue_max: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "prepare")
        self._max = threads + queue_max
        self._now = 0

    async def run(self, work: Callable[[Wanted], T]) -> T:
        """What `work` returns or raises, done in a thread. Raises QueueFull. When the caller is cancelled, work that waits is
        dropped, and work that has begun is not wanted any more."""
        if self._now >= self._max:
            raise QueueFull(f"{self._now} requests are being prepared", retry_after=RETRY_SECONDS)
        self._now += 1
        gone = threading.Event()
        job = self._pool.submit(work, lambda: not gone.is_set())
        done = asyncio.wrap_future(job)
        done.add_done_callback(self._count_down)  # not when the caller is cancelled: its thread goes on
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            gone.set()
            job.cancel()
            raise

    def _count_down(self, done: asyncio.Future[T]) -> None:
        self._now -= 1
        if not done.cancelled():
            done.exception()  # retrieved here, because the caller may have been cancelled

    def close(self) -> None:
        """Cancels what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)
