"""How long a call that may be sent twice goes on trying, and when it tries."""

from __future__ import annotations

import asyncio
import random
import time
from typing import NoReturn

import grpc.aio

from ostinato import errors

PAUSE_SECONDS = 0.2
PAUSE_SECONDS_MAX = 2.0
"""Between attempts to reach a sidecar that does not say when: the first pause, which doubles, and the longest."""

READ_SECONDS = 3.0
KEYED_SECONDS = 60.0
"""Without a timeout: no other try begins so long after the first that failed, of a read and of a batch with a key."""

WAITED_FOR = (
    errors.QueueFull,
    errors.JournalFull,
    errors.JournalUnavailable,
    errors.EngineUnavailable,
    errors.Draining,
    errors.SlowReader,
    errors.Disconnected,
)
"""What the table of reasons says may be tried again as it is: it passes."""

_PUSHBACK = "grpc-retry-pushback-ms"


class Patience:
    """Of one call, over all its tries.

    `timeout`: seconds until all of them have to be over. None: no end, but `bound` seconds after the first failure the next one
    is the caller's, unless something was heard meanwhile. `bound` 0: there is one try.
    """

    def __init__(self, timeout: float | None, bound: float) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout
        self._bound = bound
        self._bound_end: float | None = None
        self._pause = PAUSE_SECONDS
        self._lost: errors.CallLost | None = None
        """A try of which nobody knows what became."""

    @property
    def left(self) -> float | None:
        """The deadline of the next try; never 0 or less, so that the call itself tells of an expired one."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.001)

    def heard(self) -> None:
        """The far side is there: whatever fails next is a first failure."""
        self._bound_end, self._pause = None, PAUSE_SECONDS

    async def wait(self, error: errors.OstinatoError) -> None:
        """Until another try makes sense. Raises the error where none does, or no time is left for one; but a refusal says that
        nothing was done, which is not known of a try that was lost before."""
        if isinstance(error, errors.CallLost):
            self._lost = error
        if not self._bound or not isinstance(error, WAITED_FOR) or _forbidden(error):
            self._give_up(error)
        now = time.monotonic()
        self._bound_end = self._bound_end or now + self._bound
        left = (self._end or self._bound_end) - now
        # Callers who wait for one sidecar should not all come at once; and the last try has to have some time.
        pause = (error.retry_after or min(self._pause, left / 2)) * random.uniform(1.0, 1.25)  # noqa: S311  # no secret
        if left <= PAUSE_SECONDS or pause >= left:
            self._give_up(error)
        self._pause = min(2 * self._pause, PAUSE_SECONDS_MAX)
        await asyncio.sleep(pause)

    def _give_up(self, error: errors.OstinatoError) -> NoReturn:
        if self._lost is not None and isinstance(error, errors.Refused):
            raise self._lost from error
        raise error


def _forbidden(error: errors.OstinatoError) -> bool:
    """Whether whoever answered forbids another try, in gRPC's way: a pushback that is no number of milliseconds."""
    cause = error.__cause__
    if not isinstance(cause, grpc.aio.AioRpcError):
        return False
    return any(name == _PUSHBACK and not str(value).isdecimal() for name, value in cause.trailing_metadata() or ())
