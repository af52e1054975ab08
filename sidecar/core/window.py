"""The core's bounds, and the engine's capacity in use. Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from sidecar.core.events import Connected


@dataclass(frozen=True, slots=True)
class Bounds:
    """Each comes from a setting of the same name."""

    queue_items_max: int
    window_runs_max: int
    """0: twice what the engine runs at once."""
    attempts_max: int
    item_timeout_seconds: float
    tenant_queue_items_max: int = sys.maxsize
    """Items of one tenant that wait for a sequence."""
    numbered_items_max: int = sys.maxsize
    """Items that have a sequence and wait for the engine."""
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
        assert self.fits(kv_tokens, exclusive=exclusive), "invariants 1 to 3"
        self.exclusive = exclusive
        self.runs += 1
        self.blocks += self.need(kv_tokens)

    def give(self, kv_tokens: int) -> None:
        self.exclusive = False  # an exclusive run was the only one
        self.runs -= 1
        self.blocks -= self.need(kv_tokens)
        assert self.runs >= 0, "invariant 1"
        assert self.blocks >= 0, "invariant 2"
