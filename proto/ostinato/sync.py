"""The client for programs without an event loop. It runs the asyncio client on a loop in a thread of its own."""

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


def _blocking(
    method: Callable[Concatenate[Client, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SyncClient, P], T]:
    @functools.wraps(method)
    def wrapper(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait(method(self._client, *args, **kwargs))

    return wrapper


def _blocking_stream(
    method: Callable[Concatenate[Client, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[SyncClient, P], Generator[T, None, None]]:
    @functools.wraps(method)
    def wrapper(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        async def begin() -> AsyncGenerator[T, None]:
            return method(self._client, *args, **kwargs)

        return self._steps(self._wait(begin()))

    return wrapper


class _Closed(RuntimeError):
    """A call on a closed client: an error of the program, not of the server."""


class SyncClient:
    """A client of the sidecar at `target`. Methods, arguments and errors are those of `Client`; streams are generators.

    It is thread-safe. An interrupted call is cancelled. Use it as `with SyncClient(...) as client`.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        allow_plaintext_token: bool = False,
        max_response_bytes: int = DEFAULT_RESPONSE_BYTES,
    ) -> None:
        self._client = Client(
            target,
            credentials=credentials,
            token=token,
            allow_plaintext_token=allow_plaintext_token,
            max_response_bytes=max_response_bytes,
        )
        self._lock = threading.Lock()  # no call enters the loop once it is closing
        self._closed = False
        self._loop = asyncio.new_event_loop()
        # A daemon thread: a client that was not closed does not keep the program running.
        self._thread = threading.Thread(target=self._loop.run_forever, name="ostinato", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call and closes the connection, for good. Calls of other threads raise `errors.Cancelled`."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    generate = _blocking(Client.generate)
    stream = _blocking_stream(Client.stream)
    cancel = _blocking(Client.cancel)
    model = _blocking(Client.model)
    tokenize = _blocking(Client.tokenize)
    get = _blocking(Client.get)
    tail = _blocking_stream(Client.tail)
    head = _blocking(Client.head)
    witness = _blocking(Client.witness)
    replay = _blocking_stream(Client.replay)
    report = _blocking(Client.report)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._client.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed:
                work.close()
                raise _Closed("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise errors.Cancelled("the client was closed") from None
        finally:
            future.cancel()  # no effect unless an interrupt left it running

    def _steps(self, source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        lock = asyncio.Lock()  # an interrupted step has to end before the source can be closed

        async def step() -> tuple[T] | None:
            async with lock:
                async for value in source:
                    return (value,)
            return None

        async def close() -> None:
            async with lock:
                await source.aclose()

        try:
            while (item := self._wait(step())) is not None:
                yield item[0]
        finally:
            with suppress(_Closed):
                self._wait(close())
