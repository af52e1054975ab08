"""How long a call that is safe to repeat is retried, and how long it waits between attempts."""

from __future__ import annotations

import asyncio
import random
import time
from typing import NoReturn

import grpc.aio

from ostinato import errors

BACKOFF_SECONDS = 0.2
BACKOFF_SECONDS_MAX = 2.0
"""The first wait after a failure that does not say when to retry, and the longest; each is twice the one before."""

READ_SECONDS = 3.0
KEYED_SECONDS = 60.0
"""Without a timeout: how long after its first failure a read, and a request with an idempotency key, is retried."""

RETRIED = (
    errors.QueueFull,
    errors.JournalFull,
    errors.JournalUnavailable,
    errors.EngineUnavailable,
    errors.Draining,
    errors.SlowReader,
    errors.Disconnected,
)
"""Errors that pass by themselves: see the table of reasons in docs/protocol.md."""

_PUSHBACK = "grpc-retry-pushback-ms"


class RetryPolicy:
    """The attempts of one call.

    `timeout`: seconds until all attempts have to be over. None: no deadline, but attempts end `retry_seconds` after the first
    failure since the last `reset`. `retry_seconds` 0: there is one attempt that the server looks at.
    """

    def __init__(self, timeout: float | None, retry_seconds: float) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._retry_seconds = retry_seconds
        self._retries_end: float | None = None
        self._pause = BACKOFF_SECONDS
        self._lost: errors.CallLost | None = None
        """An attempt whose effect is unknown."""

    @property
    def remaining(self) -> float | None:
        """The timeout of the next attempt in seconds. It is above 0, so that an expired deadline is reported by gRPC."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.001)

    def reset(self) -> None:
        """The server answered: the next failure counts as the first."""
        self._retries_end, self._pause = None, BACKOFF_SECONDS

    async def backoff(self, error: errors.OstinatoError) -> None:
        """Waits before the next attempt. Raises if there is none: `error`, or if that is a refusal and an earlier attempt was
        lost, the loss, because a refusal would mean that nothing was done."""
        if isinstance(error, errors.CallLost):
            self._lost = error
        seconds = self._retry_seconds or (KEYED_SECONDS if isinstance(error, errors.ConnectionFull) else 0.0)
        if not seconds or not isinstance(error, RETRIED) or _forbidden(error):
            self._give_up(error)
        now = time.monotonic()
        self._retries_end = self._retries_end or now + seconds
        left = (self._deadline or self._retries_end) - now
        # Jitter spreads the callers that wait for one sidecar. Half of what is left remains for the last attempt.
        pause = (error.retry_after or min(self._pause, left / 2)) * random.uniform(1.0, 1.25)  # noqa: S311  # no secret
        if left <= BACKOFF_SECONDS or pause >= left:
            self._give_up(error)
        self._pause = min(2 * self._pause, BACKOFF_SECONDS_MAX)
        await asyncio.sleep(pause)

    def _give_up(self, error: errors.OstinatoError) -> NoReturn:
        if self._lost is not None and isinstance(error, errors.Refused):
            raise self._lost from error
        raise error


def _forbidden(error: errors.OstinatoError) -> bool:
    """Whether the server forbids a retry as gRPC defines it: by a pushback that is not a number of milliseconds."""
    cause = error.__cause__
    if not isinstance(cause, grpc.aio.AioRpcError):
        return False
    return any(name == _PUSHBACK and not str(value).isdecimal() for name, value in cause.trailing_metadata() or ())
