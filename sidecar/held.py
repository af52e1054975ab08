"""Bytes held for callers: results that wait for a reader, and messages that gRPC has not written yet.

What waits is kept serialised, so that its size is known. gRPC holds a message twice.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from ostinato.errors import QueueFull, SlowReader
from serving.auth import caller

COPIES = 2
"""Of a message that gRPC is to write: Python's bytes, and its own."""
RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """In bytes."""

    call: int
    """For one stream: what waits."""
    tenant: int
    all: int


@dataclass(slots=True, eq=False)
class _Tenant:
    name: str
    bytes: int = 0
    """All that is held."""
    writing: int = 0
    """Of them, what gRPC holds."""
    accounts: set[Account] = field(default_factory=set)


class Account:
    """The bytes that wait for one call, while this is entered as a context. When the call is lost, it has an `error`, `lost` is
    done, and what waits is dropped."""

    def __init__(self, held: Held, tenant: _Tenant, call_bytes_max: int) -> None:
        self._held, self._tenant, self._max = held, tenant, call_bytes_max
        self.waiting = 0
        self._closed = False
        self._lost: asyncio.Future[None] | None = None
        self.error: SlowReader | None = None
        self.forget: Callable[[], None] = lambda: None
        """Drops what waits. Set by the waiter."""

    @property
    def lost(self) -> asyncio.Future[None]:
        if self._lost is None:
            self._lost = asyncio.get_running_loop().create_future()
            if self.error is not None:
                self._lost.set_result(None)
        return self._lost

    def __enter__(self) -> Self:
        self._tenant.accounts.add(self)
        self._held.calls += 1
        return self

    def __exit__(self, *_: object) -> None:
        """The call has ended. What its items tell from now on is not counted."""
        self.add(-self.waiting)
        self._closed = True
        self._tenant.accounts.discard(self)
        self._held.calls -= 1
        self._held.tidy(self._tenant)

    def add(self, count: int) -> None:
        """More bytes wait, or fewer if it is negative. This call or another one may be lost. No effect once this one is lost or
        closed."""
        if self.error is not None or self._closed:
            return
        self.waiting += count
        self._tenant.bytes += count
        self._held.bytes += count
        if count > 0:
            if self.waiting > self._max:
                self.lose("call", self._max)
            self._held.settle(self._tenant)

    def lose(self, bound: str, most: int) -> None:
        """The reader is too slow. `bound`: call, tenant or all."""
        whose = {"call": "this call", "tenant": "its tenant", "all": "all callers"}[bound]
        self.add(-self.waiting)
        self.error = SlowReader(f"more than {most} bytes waited to be read by {whose}", retry_after=RETRY_SECONDS)
        if self._lost is not None:
            self._lost.set_result(None)
        self.forget()
        self._held.on_lost(bound)


class Held:
    """All accounts of a sidecar. `on_lost` gets the bound of each call that is lost: call, tenant, all or time.

    1. A stream with more waiting than the bound for a call is lost (SLOW_READER).
    2. While a tenant holds more than its bound, the call of this tenant with most waiting is lost.
    3. While all together hold more than their bound, the call with most waiting is lost, of the tenant that holds most. A call
       of another tenant is lost only if nothing waits for that one.
    4. What gRPC holds cannot be taken back, not even by ending the call. While that is half of a tenant's bound, or as much as
       it leaves of the bound for all, its new requests are refused (QUEUE_FULL): what was begun needs room for its answer. So
       one tenant's unread answers leave room for all others'.
    """

    def __init__(self, bounds: Bounds, on_lost: Callable[[str], None]) -> None:
        self._bounds = bounds
        self.on_lost = on_lost
        self.calls = self.bytes = 0
        self._writing = 0
        self._tenants: dict[str, _Tenant] = {}

    def account(self, *, stream: bool) -> Account:
        """For a call of the present caller. A unary call has no bound of its own: it waits for its items, not its reader."""
        return Account(self, self._tenant(), self._bounds.call if stream else sys.maxsize)

    def alone(self) -> bool:
        """Whether at most one call is open."""
        return self.calls <= 1

    @property
    def tenants(self) -> int:
        """Tenants with a call, or with held bytes."""
        return len(self._tenants)

    def _tenant(self) -> _Tenant:
        name = caller().tenant
        return self._tenants.get(name) or self._tenants.setdefault(name, _Tenant(name))

    def check(self) -> None:
        """Raises QueueFull if nothing more should begin for the present caller (4)."""
        tenant = self._tenants.get(caller().tenant)
        unread = tenant.writing if tenant else 0
        if unread >= min(self._bounds.tenant // 2, self._bounds.all - self._writing):
            raise QueueFull(f"{unread} bytes of answers are not read yet", retry_after=RETRY_SECONDS)

    def writing(self, count: int) -> Callable[..., None]:
        """See handlers.Unwritten."""
        tenant, held = self._tenant(), COPIES * count
        self._write(tenant, held)

        def done(_: object = None) -> None:
            self._write(tenant, -held)
            self.tidy(tenant)

        return done

    def _write(self, tenant: _Tenant, count: int) -> None:
        tenant.writing += count
        tenant.bytes += count
        self._writing += count
        self.bytes += count

    def late(self) -> None:
        """See handlers.Unwritten."""
        self.on_lost("time")

    def settle(self, tenant: _Tenant) -> None:
        """Lose calls until the bounds hold, or nothing waits (2, 3)."""
        while self.bytes > self._bounds.all and (account := self._largest()) is not None:
            account.lose("all", self._bounds.all)
        while tenant.bytes > self._bounds.tenant and (account := _most(tenant)) is not None:
            account.lose("tenant", self._bounds.tenant)

    def _largest(self) -> Account | None:
        """The call to lose for the bound of all."""
        ranked = sorted(self._tenants.values(), key=lambda tenant: tenant.bytes, reverse=True)
        return next(filter(None, map(_most, ranked)), None)

    def tidy(self, tenant: _Tenant) -> None:
        """Forget a tenant that has nothing here."""
        if not tenant.bytes and not tenant.accounts and self._tenants.get(tenant.name) is tenant:
            del self._tenants[tenant.name]


def _most(tenant: _Tenant) -> Account | None:
    """The tenant's call with most waiting; None: nothing waits."""
    most = max(tenant.accounts, key=lambda account: account.waiting, default=None)
    return most if most is not None and most.waiting else None
