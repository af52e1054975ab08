"""How much the engine holds at once: items and KV blocks."""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.core.events import Connected


@dataclass(slots=True)
class Window:
    """Room in a connected engine. `take` and `give` are balanced by the caller.

    1. 0 <= runs <= runs_max
    2. 0 <= blocks <= engine.kv_blocks
    3. Beside what was taken exclusively there is nothing.
    """

    engine: Connected
    runs_max: int
    runs: int = 0
    blocks: int = 0
    exclusive: bool = False
    """Whether the one run that it holds was taken as exclusive."""

    def need(self, kv_tokens: int) -> int:
        """KV blocks for this many tokens."""
        return -(-kv_tokens // self.engine.block_tokens)

    def ever_fits(self, kv_tokens: int) -> bool:
        return self.need(kv_tokens) <= self.engine.kv_blocks

    def fits(self, kv_tokens: int, *, exclusive: bool = False) -> bool:
        """Whether there is room now; `exclusive`: and nothing beside it."""
        room = self.runs < self.runs_max and self.blocks + self.need(kv_tokens) <= self.engine.kv_blocks
        return room and not self.exclusive and not (exclusive and self.runs)

    def take(self, kv_tokens: int, *, exclusive: bool = False) -> None:
        assert self.fits(kv_tokens, exclusive=exclusive)
        self.exclusive = exclusive
        self.runs += 1
        self.blocks += self.need(kv_tokens)

    def give(self, kv_tokens: int) -> None:
        self.exclusive = False  # with it, nothing else could be given back
        self.runs -= 1
        self.blocks -= self.need(kv_tokens)
        assert self.runs >= 0
        assert self.blocks >= 0
