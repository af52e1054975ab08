"""How much the engine holds at once: items and KV blocks."""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.core.events import Connected


@dataclass(slots=True)
class Window:
    """Room in a connected engine. `take` and `give` are balanced by the caller.

    1. 0 <= runs <= runs_max
    2. 0 <= blocks <= engine.kv_blocks
    3. Beside what was taken alone there is nothing.
    """

    engine: Connected
    runs_max: int
    runs: int = 0
    blocks: int = 0
    alone: bool = False
    """Whether what it holds was taken to be alone."""

    def need(self, kv_tokens: int) -> int:
        """KV blocks for this many tokens."""
        return -(-kv_tokens // self.engine.block_tokens)

    def ever_fits(self, kv_tokens: int) -> bool:
        return self.need(kv_tokens) <= self.engine.kv_blocks

    def fits(self, kv_tokens: int, *, alone: bool = False) -> bool:
        """Whether there is room now; `alone`: and nothing beside it."""
        room = self.runs < self.runs_max and self.blocks + self.need(kv_tokens) <= self.engine.kv_blocks
        return room and not self.alone and not (alone and self.runs)

    def take(self, kv_tokens: int, *, alone: bool = False) -> None:
        assert self.fits(kv_tokens, alone=alone)
        self.alone = alone
        self.runs += 1
        self.blocks += self.need(kv_tokens)

    def give(self, kv_tokens: int) -> None:
        self.alone = False  # with it, nothing else could be given back
        self.runs -= 1
        self.blocks -= self.need(kv_tokens)
        assert self.runs >= 0
        assert self.blocks >= 0
