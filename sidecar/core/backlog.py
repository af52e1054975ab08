"""Which chosen items are run again, and when. Pure: the time and what the engine holds are arguments.

What differs in production is the company that a run keeps, so an audit keeps another. An item that ran in a crowd is audited as
soon as there is room. One that ran alone waits until others run, until a group of such audits can run side by side, or until
it has waited long enough.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

GROUP = 4
"""So many audits of items that ran alone are company to each other; fewer, where fewer may run at once."""
BURST_SECONDS = 10.0
"""What the budget allows at once, in seconds of itself."""


class Bucket:
    """A budget of tokens. Whoever comes while something is left may take more than that; the debt is paid off first."""

    def __init__(self, tokens_per_second: float, now: float) -> None:
        """0: no bound."""
        self.tokens_per_second = tokens_per_second
        self._left = self._most = tokens_per_second * BURST_SECONDS
        self._at = now

    def open(self, now: float) -> bool:
        """Whether something is left."""
        self._left = min(self._most, self._left + (now - self._at) * self.tokens_per_second)
        self._at = now
        return not self.tokens_per_second or self._left > 0

    def take(self, tokens: int) -> None:
        self._left -= tokens


@dataclass(frozen=True, slots=True)
class Due:
    """An item that was chosen."""

    sequence: int
    alone: bool
    """Whether its first run had no company, as far as is known."""
    since: float


class Backlog:
    """What waits to be audited, oldest first."""

    def __init__(self, most: int, patience_seconds: float) -> None:
        self.most, self.patience_seconds = most, patience_seconds
        self.waiting: deque[Due] = deque()

    def add(self, due: Due) -> bool:
        """False: there is no room for it."""
        if len(self.waiting) >= self.most:
            return False
        self.waiting.append(due)
        return True

    def take(self, now: float, *, company: int, room: int) -> list[Due]:
        """Those that are to run now. `company`: runs that the engine holds; `room`: audits that may begin, at least 1."""
        lonely = [due for due in self.waiting if due.alone]
        together = bool(company) or len(lonely) >= min(GROUP, room)
        if lonely and now - lonely[0].since >= self.patience_seconds:
            together = True
        chosen = [due for due in self.waiting if together or not due.alone][:room]
        for due in chosen:
            self.waiting.remove(due)
        return chosen
