"""How much the engine holds at once: items and KV blocks."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from sidecar.core.events import Connected


@dataclass(frozen=True, slots=True)
class Bounds:
    """Named limits; each comes from a setting of the same name."""

    queue_items_max: int
    window_runs_max: int
    """0: twice what the engine runs at once."""
    attempts_max: int
    item_timeout_seconds: float
    tenant_queue_items_max: int = sys.maxsize
    """Of one tenant, before they are numbered."""
    numbered_items_max: int = sys.maxsize
    """That are numbered and wait for the engine; more wait before they are."""
    reruns_max: int = 256
    """That wait, of each urgency."""
    reruns_share: float = 0.25
    """Of the engine, held at most by runs that no caller of Generate waits for."""
    overdue_seconds: float = 1.0
    """How long past its time a run may be silent before it is given up here."""
    retry_after_seconds: float = 1.0


@dataclass(slots=True)
class Window:
    """The engine's capacity, and what of it is in use. The caller balances `take` and `give`.

    1. 0 <= runs <= runs_max
    2. 0 <= blocks <= engine.kv_blocks
    3. Nothing runs beside a run that was taken as exclusive.
    """

    engine: Connected
    runs_max: int
    runs: int = 0
    blocks: int = 0
    exclusive: bool = False
    """Whether the only run is an exclusive one."""

    def need(self, kv_tokens: int) -> int:
        """KV blocks for this many tokens."""
        return -(-kv_tokens // self.engine.block_tokens)

    def ever_fits(self, kv_tokens: int) -> bool:
        return self.need(kv_tokens) <= self.engine.kv_blocks

    def fits(self, kv_tokens: int, *, exclusive: bool = False) -> bool:
        """Whether the run may start now."""
        room = self.runs < self.runs_max and self.blocks + self.need(kv_tokens) <= self.engine.kv_blocks
        return room and not self.exclusive and not (exclusive and self.runs)

    def take(self, kv_tokens: int, *, exclusive: bool = False) -> None:
        assert self.fits(kv_tokens, exclusive=exclusive)
        self.exclusive = exclusive
        self.runs += 1
        self.blocks += self.need(kv_tokens)

    def give(self, kv_tokens: int) -> None:
        self.exclusive = False  # an exclusive run was the only one
        self.runs -= 1
        self.blocks -= self.need(kv_tokens)
        assert self.runs >= 0
        assert self.blocks >= 0
