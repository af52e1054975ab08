"""Work that is done for a few callers at a time, of which no tenant has all places."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import AsyncIterator

import msgspec

from ostinato import errors

from sidecar.core.fairness import FairQueue

QUANTUM_BYTES = 4096
RETRY_SECONDS = 1.0


class Asked(msgspec.Struct, frozen=True):
    """Work that waits."""

    batch_id: int
    tenant: str
    cost: int
    items: int = 1
    deadline: float | None = None


class TurnQueue:
    """Work that is done for a few at a time: long requests on their way to the service's threads, and reads of the journal.

    1. At most `places` are worked on, at most `tenant_places` of one tenant: another one finds a place free.
    2. Tenants that wait take turns, by cost.
    3. The work of a caller that leaves is dropped.
    """

    def __init__(self, places: int, tenant_places: int, tenant_waiting_max: int = sys.maxsize) -> None:
        self._places, self._tenant_places, self._tenant_waiting_max = places, tenant_places, tenant_waiting_max
        self._waiting = FairQueue[Asked](QUANTUM_BYTES)
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._held: Counter[str] = Counter()
        """Places, by tenant."""
        self._last_id = 0

    @contextlib.asynccontextmanager
    async def place(self, tenant: str, cost: int) -> AsyncIterator[None]:
        """While the work is done. `cost`: about bytes. Raises QueueFull."""
        if (own := self._waiting.items_of(tenant)) >= self._tenant_waiting_max:
            raise errors.QueueFull(f"{own} long requests of this tenant wait to be prepared", retry_after=RETRY_SECONDS)
        self._last_id += 1
        asked = Asked(self._last_id, tenant, cost)
        turn = self._turns[asked.batch_id] = asyncio.get_running_loop().create_future()
        self._waiting.put(asked)
        self._advance()
        try:
            await turn
            yield
        finally:
            if self._turns.pop(asked.batch_id, None) is not None:
                self._waiting.drop(asked)
            else:
                self._held[tenant] -= 1
                if not self._held[tenant]:
                    del self._held[tenant]
                self._advance()

    def _advance(self) -> None:
        while self._held.total() < self._places and (asked := self._next()) is not None:
            self._waiting.take(asked)
            self._held[asked.tenant] += 1
            turn = self._turns.pop(asked.batch_id)
            if not turn.done():
                turn.set_result(None)

    def _next(self) -> Asked | None:
        first = self._waiting.first()
        if first is None or self._may(first.tenant):
            return first
        return self._waiting.passing(self._may)

    def _may(self, tenant: str) -> bool:
        return self._held[tenant] < self._tenant_places
