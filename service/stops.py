"""Stop strings in a growing text: which is found first, and how much of the text's end could still become one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class StopStrings:
    """An Aho-Corasick automaton over the text's characters; a character costs amortised constant time.

    Invariants:
    1. `pending` is the length of the longest end of the text that begins a stop string.
    2. The stop string that is *completed* first in the text wins, of those completed at once the longest. So what is found
       depends on the text alone, never on how tokens cut it, and nothing has to wait for a longer match.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth: list[int] = [0]
        self._match: list[str] = [""]
        for stop in stops:
            self._add(stop)
        self._fall: list[int] = [0] * len(self._next)
        self._link()
        self._state = 0

    def __bool__(self) -> bool:
        return len(self._next) > 1

    @property
    def pending(self) -> int:
        """Characters at the text's end that could be the beginning of a stop string."""
        return self._depth[self._state]

    def feed(self, text: str) -> tuple[int, str] | None:
        """Append `text`. The stop string that it completes and how many of its characters that took, or None."""
        following, fall, state = self._next, self._fall, self._state
        for index, character in enumerate(text):
            while state and character not in following[state]:
                state = fall[state]
            state = following[state].get(character, 0)
            if self._match[state]:
                self._state = state
                return index + 1, self._match[state]
        self._state = state
        return None

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            branches = self._next[state]
            if character not in branches:
                branches[character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append("")
            state = branches[character]
        self._match[state] = stop

    def _link(self) -> None:
        """Breadth first: where a state falls back to, and the longest stop string that ends at it."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, child in self._next[state].items():
                waiting.append(child)
                back = self._fall[state]
                while back and character not in self._next[back]:
                    back = self._fall[back]
                self._fall[child] = self._next[back].get(character, 0)
                self._match[child] = self._match[child] or self._match[self._fall[child]]
