"""Waiting for what another task, thread or process does soon, and a loop in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

T = TypeVar("T")

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


@contextlib.contextmanager
def apart(context: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """The context on a loop in a thread, for callers that block."""
    begun, over = Future[T](), threading.Event()

    async def live() -> None:
        async with context as made:
            begun.set_result(made)
            await asyncio.to_thread(over.wait)

    with ThreadPoolExecutor(1) as thread:
        living = thread.submit(asyncio.run, live())
        ends: tuple[Future[Any], ...] = (begun, living)
        wait(ends, return_when=FIRST_COMPLETED)
        try:
            if living.done():
                living.result()  # which raises
            yield begun.result()
        finally:
            over.set()
            living.result()
