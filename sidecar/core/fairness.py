"""Whose batch is numbered next: deficit round robin over tenants, by tokens. Pure.

Tenants take turns. A turn is worth a quantum of tokens, saved up while it does not pay for the tenant's first batch, and lost
when nothing of the tenant waits any more. So of two that wait, neither gets more than a quantum and two batches ahead, however
much one of them has sent; and within a tenant, first come is first served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sidecar.core.agenda import Agenda
from sidecar.core.events import Admit

QUANTUM_TOKENS = 256
"""About one short request. A smaller quantum would cost nothing, and change nothing either."""


def cost(admit: Admit) -> int:
    """Tokens of a batch, prompts and answers at worst; never nothing."""
    return max(1, sum(need.kv_tokens for need in admit.needs))


@dataclass(slots=True, eq=False)
class Lane:
    """What waits of one tenant."""

    tenant: str
    batches: dict[int, Admit] = field(default_factory=dict)
    """By ticket, the first first."""
    items: int = 0
    tokens: int = 0
    """Saved up, and good for so many."""

    @property
    def first(self) -> Admit:
        return next(iter(self.batches.values()))

    def turns(self, quantum: int) -> int:
        """That it has to wait for until its first batch is paid, at least one."""
        return max(1, -(-(cost(self.first) - self.tokens) // quantum))


class FairQueue:
    """Batches that wait for numbers."""

    def __init__(self, quantum: int = QUANTUM_TOKENS) -> None:
        self._quantum = quantum
        self._lanes: dict[str, Lane] = {}
        """In the order of their turns."""
        self._admits: dict[int, Admit] = {}
        """By ticket."""
        self._agenda = Agenda()
        self._serving: Lane | None = None
        """Whose turn has begun; stands first while something of it waits."""
        self.items = 0
        """Of all tenants."""

    @property
    def tenants(self) -> int:
        """How many have something waiting."""
        return len(self._lanes)

    def items_of(self, tenant: str) -> int:
        lane = self._lanes.get(tenant)
        return lane.items if lane is not None else 0

    def get(self, ticket: int) -> Admit | None:
        """The batch with this ticket, if it waits."""
        return self._admits.get(ticket)

    def __iter__(self) -> Iterator[Admit]:
        return (admit for lane in list(self._lanes.values()) for admit in list(lane.batches.values()))

    def put(self, admit: Admit) -> None:
        lane = self._lanes.setdefault(admit.tenant, Lane(admit.tenant))
        assert admit.ticket not in self._admits
        self._admits[admit.ticket] = lane.batches[admit.ticket] = admit
        self._agenda.put(admit.ticket, None if admit.keyed else admit.deadline)
        lane.items += len(admit.needs)
        self.items += len(admit.needs)

    def first(self) -> Admit | None:
        """Whose turn it is; stays so until it is taken or dropped."""
        if not self._lanes:
            return None
        lane = next(iter(self._lanes.values()))
        if lane is not self._serving or lane.tokens < cost(lane.first):
            lane = self._advance()
        return lane.first

    def take(self) -> Admit:
        """The first, which pays."""
        admit = self.first()
        assert admit is not None, "something waits"
        self._lanes[admit.tenant].tokens -= cost(admit)
        self.drop(admit)
        return admit

    def drop(self, admit: Admit) -> None:
        """It does not wait any more."""
        lane = self._lanes[admit.tenant]
        del self._admits[admit.ticket], lane.batches[admit.ticket]
        self._agenda.put(admit.ticket, None)
        lane.items -= len(admit.needs)
        self.items -= len(admit.needs)
        if not lane.batches:
            del self._lanes[admit.tenant]

    def drop_late(self, now: float) -> Iterator[Admit]:
        """Those that nobody would wait for any more; they do not wait either."""
        for ticket in self._agenda.due(now):
            self.drop(admit := self._admits[ticket])
            yield admit

    def _advance(self) -> Lane:
        """Ends the turn that there is, and gives turns until one can pay: all at once, however many there are."""
        lanes = list(self._lanes.values())
        if lanes[0] is self._serving:
            lanes.append(lanes.pop(0))
        turns = [lane.turns(self._quantum) for lane in lanes]
        fewest = min(turns)
        chosen = turns.index(fewest)
        for place, lane in enumerate(lanes):
            lane.tokens += self._quantum * (fewest if place <= chosen else fewest - 1)
        self._lanes = {lane.tenant: lane for lane in (*lanes[chosen:], *lanes[:chosen])}
        self._serving = lanes[chosen]
        return lanes[chosen]
