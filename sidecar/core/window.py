"""The core's bounds, and the engine's capacity in use: by all, and by each tenant. Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from sidecar.core.events import Connected


@dataclass(frozen=True, slots=True)
class Bounds:
    """Each comes from a setting of the same name."""

    queue_items_max: int
    window_runs_max: int
    """0: twice what the engine runs at once; with a `tenant_share` what it runs."""
    attempts_max: int
    item_timeout_seconds: float
    tenant_queue_items_max: int = sys.maxsize
    """Items of one tenant that wait for a sequence."""
    numbered_items_max: int = sys.maxsize
    """Items that have a sequence and wait for the engine."""
    tenant_share: float = 1.0
    """Share of the engine that one tenant's items may hold. 1: all of it, and the order of submission knows no tenants."""
    reruns_max: int = 256
    """Reruns of one urgency that wait."""
    reruns_share: float = 0.25
    """Share of the engine for reruns other than verifications."""
    overdue_seconds: float = 1.0
    """A run that reports nothing for this long after its timeout is cancelled."""
    retry_after_seconds: float = 1.0


@dataclass(slots=True)
class Window:
    """The engine's capacity, and what of it is in use. The caller balances `take` and `give`.

    1. 0 <= runs <= runs_max
    2. 0 <= blocks <= engine.kv_blocks
    3. Nothing runs beside an exclusive run.
    """

    engine: Connected
    runs_max: int
    runs: int = 0
    blocks: int = 0
    exclusive: bool = False
    """Whether the only run is an exclusive one."""

    @property
    def running(self) -> int:
        """Of the runs, those that the engine computes; the others wait in it."""
        return min(self.runs, self.engine.runs)

    def need(self, kv_tokens: int) -> int:
        """KV blocks for this many tokens."""
        return -(-kv_tokens // self.engine.block_tokens)

    def fits(self, blocks: int, *, exclusive: bool = False) -> bool:
        """Whether a run of so many blocks may start now."""
        room = self.runs < self.runs_max and self.blocks + blocks <= self.engine.kv_blocks
        return room and not self.exclusive and not (exclusive and self.runs)

    def take(self, blocks: int, *, exclusive: bool = False) -> None:
        self.exclusive = exclusive
        self.runs += 1
        self.blocks += blocks
        assert self.runs <= self.runs_max, "invariant 1"
        assert self.blocks <= self.engine.kv_blocks, "invariant 2"
        assert self.runs == 1 or not exclusive, "invariant 3"

    def give(self, blocks: int) -> None:
        self.exclusive = False  # an exclusive run was the only one
        self.runs -= 1
        self.blocks -= blocks
        assert self.runs >= 0, "invariant 1"
        assert self.blocks >= 0, "invariant 2"


@dataclass(slots=True, eq=False)
class Holding:
    """What one tenant's items have."""

    queued: int = 0
    """Items that wait for the journal or for the engine."""
    runs: int = 0
    blocks: int = 0


class Shares:
    """The engine's capacity between tenants. The caller balances `queue` and `run`. Idle where one tenant may have all.

    A tenant may hold `share` of the runs that the engine computes at once, and of its KV blocks. While items of others wait, it
    may hold no more than an equal part. A run that is larger than that may be its only one.
    """

    def __init__(self, share: float) -> None:
        self._share, self.divided = share, share < 1
        self._holdings: dict[str, Holding] = {}
        """Of the tenants that have anything here."""
        self.waiting = 0
        """Tenants with queued items."""

    def queued(self, tenant: str) -> int:
        """Its items that wait for the journal or for the engine."""
        holding = self._holdings.get(tenant)
        return 0 if holding is None else holding.queued

    def may_take(self, tenant: str, blocks: int, engine: Connected) -> bool:
        """Whether its next item may start, as far as the other tenants are concerned."""
        holding = self._holdings.get(tenant)
        if holding is None or not holding.runs:
            return True
        others_wait = self.waiting > (holding.queued > 0)
        part = min(self._share, 1 / len(self._holdings)) if others_wait else self._share
        return holding.runs < most(part, engine.runs) and holding.blocks + blocks <= part * engine.kv_blocks

    def queue(self, tenant: str, count: int) -> None:
        """More items of a tenant wait, or fewer if it is negative."""
        holding = self._holdings.setdefault(tenant, Holding())
        waited = holding.queued > 0
        holding.queued += count
        assert holding.queued >= 0
        self.waiting += (holding.queued > 0) - waited
        self._tidy(tenant, holding)

    def run(self, tenant: str, runs: int, blocks: int) -> None:
        """A run of a tenant has started or, if these are negative, ended."""
        holding = self._holdings.setdefault(tenant, Holding())
        holding.runs += runs
        holding.blocks += blocks
        assert holding.runs >= 0
        assert holding.blocks >= 0
        self._tidy(tenant, holding)

    def lose(self) -> None:
        """All runs are lost."""
        for tenant, holding in list(self._holdings.items()):
            holding.runs = holding.blocks = 0
            self._tidy(tenant, holding)

    def _tidy(self, tenant: str, holding: Holding) -> None:
        if not (holding.queued or holding.runs):
            del self._holdings[tenant]


def most(share: float, runs: int) -> int:
    """This share of the engine's runs, at least one."""
    return max(1, int(share * runs))
