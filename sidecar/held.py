"""Bytes held for callers: what waits for a reader, and what gRPC has not written yet.

Each call, each tenant and all together have a bound.

1. A stream that makes more wait than a call may is lost (SLOW_READER).
2. Where a tenant holds too much, the call of this tenant that makes most wait is lost.
3. Where all together hold too much, so is that of the tenant that holds most. Another tenant's call is lost only where that one
   has nothing that waits.
4. What gRPC has already cannot be taken back: it counts until the reader takes it or leaves. While that is half of what a
   tenant, or all, may hold, new requests are refused (QUEUE_FULL): what was begun needs room for its answer.

What waits is kept serialised, so that its size is known. gRPC holds a message twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ostinato.errors import QueueFull, SlowReader
from serving.auth import caller

COPIES = 2
"""Of a message that gRPC is to write: Python's bytes and its own."""
RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """In bytes."""

    call: int
    """Waiting, for one stream."""
    tenant: int
    all: int


@dataclass(slots=True, eq=False)
class _Tenant:
    bytes: int = 0
    """All, and of them those that gRPC has."""
    writing: int = 0
    accounts: set[Account] = field(default_factory=set)


class Account:
    """Of one call. `lost` is done when it may hold nothing any more; what waited is forgotten then."""

    def __init__(self, held: Held, tenant: str, call_bytes_max: int | None) -> None:
        self._held, self._tenant, self._max = held, tenant, call_bytes_max
        self.waiting = 0
        self._closed = False
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.error = SlowReader("")
        """Why it is lost."""
        self.forget: Callable[[], None] = lambda: None
        """Lets go of what waits."""

    def add(self, count: int) -> None:
        """So many bytes more wait. It, or another call, may be lost by that. Without effect once lost or closed."""
        if self.lost.done() or self._closed:
            return
        self.waiting += count
        self._held.changed(self._tenant, count)
        if self._max is not None and self.waiting > self._max:
            self.lose("call", self._max)
        self._held.settle(self._tenant)

    def change(self, count: int) -> None:
        """So many bytes more wait, or fewer where it is negative."""
        if count < 0:
            self.drop(-count)
        else:
            self.add(count)

    def drop(self, count: int) -> None:
        """So many bytes wait no more."""
        if not (self.lost.done() or self._closed):
            self.waiting -= count
            self._held.changed(self._tenant, -count)

    def close(self) -> None:
        """The call is over: nothing waits for it any more, also not what its items still say."""
        self.drop(self.waiting)
        self._closed = True

    def lose(self, bound: str, most: int) -> None:
        """The reader is too slow. `bound`: of whom."""
        whose = {"call": "this call", "tenant": "its tenant", "all": "all callers"}[bound]
        self.error = SlowReader(f"more than {most} bytes waited to be read by {whose}", retry_after=RETRY_SECONDS)
        self.drop(self.waiting)
        self.lost.set_result(None)
        self.forget()
        self._held.on_lost(bound)


class Held:
    """Of one sidecar. `on_lost` is told of each call that is lost, with the bound that it ran into."""

    def __init__(self, bounds: Bounds, on_lost: Callable[[str], None]) -> None:
        self._bounds = bounds
        self.on_lost = on_lost
        self.bytes = 0
        self._writing = 0
        self._tenants: dict[str, _Tenant] = {}

    @contextlib.contextmanager
    def account(self, *, stream: bool) -> Iterator[Account]:
        """Of one more call of the caller's. What waits at its end is forgotten. One that does not stream has no bound of its
        own: it waits for its items, and not for its reader."""
        name = caller().tenant
        account = Account(self, name, self._bounds.call if stream else None)
        tenant = self._tenants.setdefault(name, _Tenant())
        tenant.accounts.add(account)
        try:
            yield account
        finally:
            account.close()
            tenant.accounts.discard(account)
            self._tidy(name)

    @property
    def tenants(self) -> int:
        """That have a call, or hold anything."""
        return len(self._tenants)

    def check(self) -> None:
        """Raises QueueFull where nothing more should be begun for this caller."""
        tenant = self._tenants.get(caller().tenant)
        for unread, most in ((tenant.writing if tenant else 0, self._bounds.tenant), (self._writing, self._bounds.all)):
            if 2 * unread >= most:
                raise QueueFull(f"{unread} bytes of answers are not read yet", retry_after=RETRY_SECONDS)

    def writing(self, count: int) -> Callable[[], None]:
        """See handlers.Unwritten."""
        name, held = caller().tenant, COPIES * count
        self._written(name, held)

        def done() -> None:
            self._written(name, -held)
            self._tidy(name)

        return done

    def _written(self, name: str, count: int) -> None:
        self.changed(name, count)
        self._tenants[name].writing += count
        self._writing += count

    def late(self) -> None:
        """See handlers.Unwritten."""
        self.on_lost("time")

    def changed(self, tenant: str, count: int) -> None:
        """What this tenant holds."""
        self.bytes += count
        self._tenants.setdefault(tenant, _Tenant()).bytes += count

    def settle(self, name: str) -> None:
        """Calls are lost until every bound holds, or nothing waits."""
        tenant = self._tenants[name]
        while self.bytes > self._bounds.all and (account := self._largest()) is not None:
            account.lose("all", self._bounds.all)
        while tenant.bytes > self._bounds.tenant and (account := _most(tenant)) is not None:
            account.lose("tenant", self._bounds.tenant)

    def _largest(self) -> Account | None:
        """Of the tenant that holds most, of those for whom something waits."""
        ranked = sorted(self._tenants.values(), key=lambda tenant: tenant.bytes, reverse=True)
        return next(filter(None, map(_most, ranked)), None)

    def _tidy(self, name: str) -> None:
        tenant = self._tenants.get(name)
        if tenant is not None and not tenant.bytes and not tenant.accounts:
            del self._tenants[name]


def _most(tenant: _Tenant) -> Account | None:
    """The call of this tenant that makes most wait; None: nothing waits."""
    most = max(tenant.accounts, key=lambda account: account.waiting, default=None)
    return most if most is not None and most.waiting else None
