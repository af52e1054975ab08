"""An event loop without clock and sockets: time passes when nothing is left to do, so a minute costs what happens in it.

The coroutines that run on it are the product's. What belongs to a `Node` stands still while the node is stopped: between one
step and the next, wherever that is, with no cleanup; as SIGSTOP and SIGKILL do it.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

_node: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)
NO_NODE = contextvars.Context()
"""Of callbacks that belong to no process: the network's, the disk's."""


class Deadlock(Exception):
    """A task waits, and no event is left."""


class Died(BaseException):
    """Raised where a process is to die: whatever it would have done next, it does not."""


class Node:
    """A process: every task and callback that was begun in its context, or by one of those."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.stopped = False
        self.dead = False
        self._parked: list[asyncio.Handle] = []
        self._context = contextvars.copy_context()
        self._context.run(_node.set, self)
        loop.nodes.append(self)

    def __repr__(self) -> str:
        return self.name

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return self.loop.create_task(coroutine, context=self.context())

    def context(self) -> contextvars.Context:
        """For callbacks that are to belong to this process."""
        return self._context.copy()

    def park(self, handle: asyncio.Handle) -> None:
        self._parked.append(handle)

    def stop(self) -> None:
        """From here on nothing of it runs."""
        self.stopped = True

    def resume(self) -> None:
        """What would have run meanwhile runs now, in its order."""
        self.stopped = False
        parked, self._parked = self._parked, []
        self.loop.ready(parked)

    def kill(self) -> None:
        """As stop, for good."""
        self.stopped = self.dead = True


class _Handle(asyncio.Handle):
    __slots__ = ()

    def _run(self) -> None:
        _run(self, super()._run)


class _TimerHandle(asyncio.TimerHandle):
    """Of those that are due in one moment, the one that was asked for first is first."""

    __slots__ = ("number",)
    number: int

    def __lt__(self, other: _TimerHandle) -> bool:  # type: ignore[override]
        return (self._when, self.number) < (other._when, other.number)  # type: ignore[attr-defined]

    def _run(self) -> None:
        _run(self, super()._run)


def _run(handle: asyncio.Handle, run: Callable[[], None]) -> None:
    node = handle._context.get(_node)  # type: ignore[attr-defined]
    if node is not None and node.stopped:
        node.park(handle)
    else:
        run()


class _Clock:
    """The loop's selector: nothing ever comes from outside, so waiting is all there is to do."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Deadlock("all tasks wait, and no event is left")
        self.now += timeout
        return []

    def close(self) -> None: ...


class VirtualLoop(asyncio.BaseEventLoop):
    """Deterministic: what runs next follows from what was called, and from nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _Clock()
        self.nodes: list[Node] = []
        self.answer_delay: Callable[[], float] = lambda: 0.0
        """How long a call from a thread takes to arrive; in order."""
        self._arrives_at = 0.0
        self._timers = 0
        self.failures: list[BaseException] = []
        """What callbacks raised."""
        self.set_exception_handler(self._note_failure)

    def time(self) -> float:
        return self._selector.now

    def ready(self, handles: list[asyncio.Handle]) -> None:
        """To run next, in this order."""
        self._ready.extend(handles)  # type: ignore[attr-defined]

    def call_at(  # type: ignore[override]  # asyncio's types want the arguments' own
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        timer = _TimerHandle(when, callback, args, self, context)
        self._timers += 1
        timer.number = self._timers
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        if threading.get_ident() == self._thread_id:  # type: ignore[attr-defined]
            return self.call_soon(callback, *args, context=context)
        self._arrives_at = max(self._arrives_at, self.time() + self.answer_delay())
        return self.call_at(self._arrives_at, callback, *args, context=context)

    def run_in_executor(self, executor: Executor | None, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        done: asyncio.Future[T] = self.create_future()
        done.set_result(func(*args))
        return done

    def shut(self) -> None:
        """End whatever still stands around, so that nothing of this run is left to the next."""
        for _ in range(20):
            for node in self.nodes:
                node.resume()
            tasks = asyncio.all_tasks(self)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.wait(tasks, timeout=60))
        self.close()

    def _call_soon(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def _note_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "handle" in context:
            self.failures.append(context["exception"])

    def _process_events(self, event_list: list[Any]) -> None: ...

    def _write_to_self(self) -> None: ...
