"""Which pieces of prompts the slots' memory holds, so that a prompt that begins alike need not compute them again.

Pure bookkeeping; `batching` copies the memory itself. Why reuse changes no bit of an answer: a prompt is always cut into pieces
of PIECE tokens from its first token on, and only whole pieces are reused. The keys and values of a whole piece depend on the
tokens up to its end and on nothing else (that is what EXACT says of the engine), so a copy is what computing it would give.

1. `held[slot]` is a whole number of pieces, and the slot's memory holds these tokens at these places.
2. A run reuses at most what leaves it one token to compute: without a row there are no logits.
"""

from __future__ import annotations

from collections.abc import Iterable

PIECE = 64
"""Tokens of a prompt that are computed in one step, its last piece apart."""

Tokens = tuple[int, ...]


class Prefixes:
    """Of a fixed number of slots, all empty at first."""

    def __init__(self, slots: int) -> None:
        self.held: list[Tokens] = [()] * slots
        self._used = [0] * slots
        self._uses = 0

    def longest(self, prompt: Tokens, slot: int) -> tuple[int, int]:
        """The slot that holds the longest reusable beginning of `prompt`, and its tokens; of equals `slot` itself."""
        found = [(_shared(held, prompt), place == slot, place) for place, held in enumerate(self.held)]
        tokens, _, place = max(found)
        return place, tokens

    def spare(self, slot: int, source: int, keep: int, free: Iterable[int]) -> int | None:
        """A free slot to copy `slot` to before all but its first `keep` tokens are lost: the least recently used one.

        None if there is nothing to lose, another slot holds it too, or every free slot was used more recently. Never `source`,
        which is about to be read.
        """
        lost = self.held[slot]
        others = (held for place, held in enumerate(self.held) if place != slot)
        if len(lost) <= keep or any(held[: len(lost)] == lost for held in others):
            return None
        spare = min((place for place in free if place not in (slot, source)), key=self._age, default=None)
        return spare if spare is not None and self._age(spare) < self._age(slot) else None

    def copied(self, source: int, target: int) -> None:
        """`target` now holds what `source` holds, and is as recently used."""
        self.held[target], self._used[target] = self.held[source], self._used[source]

    def resumed(self, slot: int, source: int, prompt: Tokens, tokens: int) -> None:
        """A run with this prompt begins in `slot`, with the first `tokens` of `source`."""
        self._uses += 1
        self._used[source] = self._used[slot] = self._uses
        self.held[slot] = prompt[:tokens]

    def computed(self, slot: int, prompt: Tokens, tokens: int) -> None:
        """The model has seen this many of the prompt, in order."""
        if tokens % PIECE == 0:
            assert len(self.held[slot]) == tokens - PIECE, "a prompt is computed piece by piece"
            self.held[slot] = prompt[:tokens]

    def forget(self, slot: int) -> None:
        """The slot's memory is empty."""
        self.held[slot], self._used[slot] = (), 0

    def _age(self, slot: int) -> tuple[int, int]:
        return self._used[slot], slot


def _shared(held: Tokens, prompt: Tokens) -> int:
    """Tokens of whole pieces with which both begin, less than all of the prompt's."""
    most = min(len(held), (len(prompt) - 1) // PIECE * PIECE)
    starts = range(0, most, PIECE)
    return next((start for start in starts if held[start : start + PIECE] != prompt[start : start + PIECE]), most)
