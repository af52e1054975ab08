"""How fast items end, and so when it makes sense to come back. Pure."""

from __future__ import annotations

import math

MEMORY_SECONDS = 10.0
"""An item that ended so long ago counts for 1/e."""
LEAST_SECONDS, MOST_SECONDS = 0.1, 60.0
"""Of a hint."""


class Pace:
    """Outcomes per second, of late. `unknown_seconds`: the hint while nothing has ended yet."""

    def __init__(self, unknown_seconds: float) -> None:
        self._unknown_seconds = unknown_seconds
        self._ended, self._at = 0.0, 0.0

    def ended(self, now: float) -> None:
        """One more item has its outcome."""
        self._ended, self._at = self._left(now) + 1.0, now

    def per_second(self, now: float) -> float:
        return self._left(now) / MEMORY_SECONDS

    def retry_after(self, queued: int, now: float) -> float:
        """Seconds until half of what waits has ended, if that goes on: early enough that the engine has work then."""
        if not self._ended:
            return self._unknown_seconds
        rate = self.per_second(now)
        return MOST_SECONDS if queued > 2 * MOST_SECONDS * rate else max(LEAST_SECONDS, queued / (2 * rate))

    def _left(self, now: float) -> float:
        return self._ended * math.exp(min(0.0, self._at - now) / MEMORY_SECONDS)
