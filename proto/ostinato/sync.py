"""The client for programs without an event loop: the asyncio client, run on a private loop in a thread of its own."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc

from ostinato import errors
from ostinato.client import DEFAULT_RESPONSE_BYTES, DEFAULT_TARGET, Client

P = ParamSpec("P")
T = TypeVar("T")


def _answer(
    method: Callable[Concatenate[Client, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncClient, P], T]:
    """The method, waiting."""

    @functools.wraps(method)
    def wrapper(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait(method(self._client, *args, **kwargs))

    return wrapper


def _answers(
    method: Callable[Concatenate[Client, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[SyncClient, P], Generator[T, None, None]]:
    """The method, with an iterator that waits at each step."""

    @functools.wraps(method)
    def wrapper(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        async def begin() -> AsyncGenerator[T, None]:
            return method(self._client, *args, **kwargs)

        return self._steps(self._wait(begin()))

    return wrapper


class _Closed(RuntimeError):
    """A call on a closed client: the program's mistake, and nothing that a server could say."""


class SyncClient:
    """A sidecar at `target`. The methods, their arguments and their errors are those of `Client`; streams are generators.

    Any thread may use it, also several at once. An interrupted call is cancelled. `with SyncClient(...) as client` closes it.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        max_response_bytes: int = DEFAULT_RESPONSE_BYTES,
    ) -> None:
        self._client = Client(target, credentials=credentials, token=token, max_response_bytes=max_response_bytes)
        self._gate = threading.Lock()  # nothing enters the loop once it is about to end
        self._closed = False
        self._loop = asyncio.new_event_loop()
        # A daemon: a client that nobody closed does not keep the program from ending.
        self._thread = threading.Thread(target=self._loop.run_forever, name="ostinato", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call and connection, for good. What other threads wait for becomes `errors.Cancelled`."""
        with self._gate:
            closed, self._closed = self._closed, True
        if closed:
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    generate = _answer(Client.generate)
    stream = _answers(Client.stream)
    cancel = _answer(Client.cancel)
    model = _answer(Client.model)
    tokenize = _answer(Client.tokenize)
    get = _answer(Client.get)
    tail = _answers(Client.tail)
    head = _answer(Client.head)
    replay = _answers(Client.replay)
    report = _answer(Client.report)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._client.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        with self._gate:
            if self._closed:
                work.close()
                raise _Closed("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise errors.Cancelled("the client was closed") from None
        finally:
            future.cancel()  # does nothing to a finished one: only an interrupt leaves it running

    def _steps(self, source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        free = asyncio.Lock()  # an interrupted step has to end before the source can be closed

        async def step() -> tuple[T] | None:
            async with free:
                async for value in source:
                    return (value,)
            return None

        async def end() -> None:
            async with free:
                await source.aclose()

        try:
            while (found := self._wait(step())) is not None:
                yield found[0]
        finally:
            with suppress(_Closed):
                self._wait(end())
